"""Functions of tensors that compute what ONNX operators do: what the FX graphs of imported models are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

__all__ = [
    "average_pool",
    "cast",
    "clip",
    "depth_to_space",
    "flatten",
    "gather",
    "global_average",
    "global_max",
    "hard_sigmoid",
    "local_response",
    "many",
    "max_pool",
    "pad",
    "pad_axes",
    "pad_pairs",
    "prelu",
    "reduce",
    "reshape",
    "same_pads",
    "selu",
    "shape_of",
    "slice_axes",
    "softmax",
    "split",
    "squeeze",
    "transpose",
    "unsqueeze",
]


def pad_pairs(pads: Sequence[int]) -> list[int]:
    """Bring (begin of each axis, end of each axis) to the order of `torch.nn.functional.pad`, the last axis first."""
    axes = len(pads) // 2
    return [width for axis in reversed(range(axes)) for width in (pads[axis], pads[axis + axes])]


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], upper: bool
) -> list[int]:
    """Return the pads (begins, ends) of ONNX's SAME_UPPER or SAME_LOWER."""
    begins, ends = [], []
    for size, extent, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (extent - 1) * dilation + 1 - size)
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends


def _pool_pads(x: Any, kernel: Any, strides: Any, dilations: Any, pads: Any, ceil: bool) -> tuple[list[int], list[int]]:
    """Return the pads as given, and those that reach to the end of the last window, which is clipped in ceil mode."""
    sizes = x.shape[2:]
    if isinstance(pads, str):
        pads = same_pads(sizes, kernel, strides, dilations, pads == "SAME_UPPER")
        ceil = False
    axes, reach = len(kernel), []
    for axis in range(axes):
        extent = (kernel[axis] - 1) * dilations[axis] + 1
        span = sizes[axis] + pads[axis] + pads[axis + axes] - extent
        windows = (-(-span // strides[axis]) if ceil else span // strides[axis]) + 1
        if ceil and (windows - 1) * strides[axis] >= sizes[axis] + pads[axis]:
            windows -= 1  # no window starts in the padding at the end
        reach.append(max(0, (windows - 1) * strides[axis] + extent - sizes[axis] - pads[axis]))
    return list(pads), [*pads[:axes], *reach]


def max_pool(x: Any, kernel: Any, strides: Any, dilations: Any, pads: Any, ceil: bool) -> Any:
    """ONNX's MaxPool over one or two spatial axes."""
    if not isinstance(pads, str) and not ceil and list(pads[: len(kernel)]) == list(pads[len(kernel) :]):
        half = all(2 * pad <= size for pad, size in zip(pads, kernel, strict=False))
        if half:
            pool = functional.max_pool1d if len(kernel) == 1 else functional.max_pool2d
            return pool(x, kernel, strides, list(pads[: len(kernel)]), dilations)
    _, reach = _pool_pads(x, kernel, strides, dilations, pads, ceil)
    pool = functional.max_pool1d if len(kernel) == 1 else functional.max_pool2d
    return pool(functional.pad(x, pad_pairs(reach), value=-math.inf), kernel, strides, 0, dilations)


def average_pool(x: Any, kernel: Any, strides: Any, pads: Any, ceil: bool, count_padding: bool) -> Any:
    """ONNX's AveragePool over one or two spatial axes."""
    pool = functional.avg_pool1d if len(kernel) == 1 else functional.avg_pool2d
    ones = [1] * len(kernel)
    given, reach = _pool_pads(x, kernel, strides, ones, pads, ceil)
    if not any(reach):
        return pool(x, kernel, strides)
    # Sums over the padded input, divided by how many values count in each window.
    total = pool(functional.pad(x, pad_pairs(reach)), kernel, strides)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=torch.float32, device=x.device)
    if count_padding:
        counted = functional.pad(counted, pad_pairs(given), value=1.0)
        reach = [wide - own for wide, own in zip(reach, given, strict=True)]
    share = pool(functional.pad(counted, pad_pairs([max(0, width) for width in reach])), kernel, strides)
    return total / share.to(total.dtype)


def reshape(x: Any, shape: Any, batch: int | None, allow_zero: bool = False) -> Any:
    """ONNX's Reshape; a leading size that is the file's fixed batch stands for whatever batch there is."""
    sizes = [int(size) for size in (shape.tolist() if isinstance(shape, torch.Tensor) else shape)]
    if not allow_zero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    if batch is not None and sizes and sizes[0] == batch and x.shape[0] != batch:
        sizes[0] = x.shape[0]
    return torch.reshape(x, tuple(sizes))


def slice_axes(x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
    """ONNX's Slice with constant bounds."""
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step > 0:
            index = slice(start, min(end, size), step)
            where = [slice(None)] * x.dim()
            where[axis] = index
            x = x[tuple(where)]
        else:
            x = x.index_select(axis, torch.arange(size, device=x.device)[list(range(size))[start:end:step]])
    return x


def pad(x: Any, pads: Any, mode: str, value: float) -> Any:
    """ONNX's Pad; negative widths crop."""
    axes = x.dim()
    pairs = pad_pairs(pads)
    if mode == "constant":
        return functional.pad(x, pairs, value=value)
    while len(pairs) > 2 * (axes - 2) and pairs[-1] == pairs[-2] == 0:
        pairs = pairs[:-2]
    return functional.pad(x, pairs, mode={"reflect": "reflect", "edge": "replicate"}[mode])


def clip(x: Any, low: Any, high: Any) -> Any:
    """ONNX's Clip; the upper bound wins, and a bound that is no number or left out does not count."""
    if low is not None and high is not None and low <= high and x.is_floating_point():
        return functional.hardtanh(x, low, high)  # one pass back instead of four: MobileNets train twice as fast
    if low is not None:
        x = torch.clamp(x, min=low)
    return x if high is None else torch.clamp(x, max=high)


def prelu(x: Any, slope: Any) -> Any:
    """ONNX's PRelu; the slope is broadcast."""
    return torch.where(x < 0, x * slope.to(x.dtype), x)


def local_response(x: Any, size: int, alpha: float, beta: float, bias: float) -> Any:
    """ONNX's LRN over channels."""
    before = (size - 1) // 2
    squares = functional.pad(x.float().square(), (0, 0, 0, 0, before, size - 1 - before))
    total = squares.unfold(1, size, 1).sum(-1)
    return (x / (bias + alpha / size * total) ** beta).to(x.dtype)


def softmax(x: Any, axis: int, log: bool, flat: bool) -> Any:
    """Softmax or its logarithm along an axis, or, in old versions of the operator, over all axes from there."""
    function = torch.log_softmax if log else torch.softmax
    if not flat:
        return function(x, axis)
    return function(x.flatten(axis), -1).reshape(x.shape)


def many(function: str, values: Any) -> Any:
    """Sum, Max, Min or Mean of any number of tensors, broadcast."""
    found = values[0]
    for value in values[1:]:
        found = {"Max": torch.maximum, "Min": torch.minimum}.get(function, torch.add)(found, value)
    return found / len(values) if function == "Mean" else found


def reduce(x: Any, kind: str, axes: Any, keep: bool) -> Any:
    """ONNX's reductions; no axes means all."""
    dims = list(range(x.dim())) if axes is None else list(axes)
    functions: dict[str, Callable[..., Any]] = {
        "ReduceMean": torch.mean,
        "ReduceSum": torch.sum,
        "ReduceMax": torch.amax,
        "ReduceMin": torch.amin,
        "ReduceL2": torch.linalg.vector_norm,
    }
    return functions[kind](x, dim=dims, keepdim=keep)


def squeeze(x: Any, axes: Any) -> Any:
    """ONNX's Squeeze."""
    dims = [axis for axis, size in enumerate(x.shape) if size == 1] if axes is None else list(axes)
    return x.squeeze(dims)


def unsqueeze(x: Any, axes: Any) -> Any:
    """ONNX's Unsqueeze: axes count in the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def flatten(x: Any, axis: int) -> Any:
    """ONNX's Flatten to a matrix."""
    axis = axis % (x.dim() + 1)
    return x.reshape(math.prod(x.shape[:axis]), -1) if axis != 1 else x.flatten(1)


def gather(x: Any, index: Any, axis: int) -> Any:
    """ONNX's Gather."""
    index = index.to(x.device)
    index = torch.where(index < 0, index + x.shape[axis], index)
    return x.index_select(axis, index.reshape(-1)).reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def shape_of(x: Any) -> Any:
    """ONNX's Shape."""
    return torch.tensor(x.shape, dtype=torch.int64)


def depth_to_space(x: Any, block: int, first: bool) -> Any:
    """ONNX's DepthToSpace in the modes DCR (`first`) and CRD."""
    count, channels, height, width = x.shape
    depth = channels // block**2
    if first:
        x = x.reshape(count, block, block, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(count, depth, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(count, depth, height * block, width * block)


def global_average(x: Any) -> Any:
    """Mean over all spatial axes, which are kept."""
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


def global_max(x: Any) -> Any:
    """Maximum over all spatial axes, which are kept."""
    return x.amax(dim=tuple(range(2, x.dim())), keepdim=True)


def split(x: Any, sizes: Any, count: int, axis: int) -> Any:
    """ONNX's Split; without sizes all parts but the last are equal."""
    part = -(-x.shape[axis] // count)
    return torch.split(x, part if sizes is None else list(sizes), axis)


def pad_axes(x: Any, pads: Any, axes: Any, mode: str, value: float) -> Any:
    """ONNX's Pad of some axes."""
    if axes is not None:
        full = [0] * (2 * x.dim())
        for index, axis in enumerate(axes):
            full[axis % x.dim()] = pads[index]
            full[axis % x.dim() + x.dim()] = pads[index + len(axes)]
        pads = full
    return pad(x, pads, mode, value)


def hard_sigmoid(x: Any, alpha: float, beta: float) -> Any:
    """ONNX's HardSigmoid."""
    return (x * alpha + beta).clamp(0, 1)


def selu(x: Any, alpha: float, gamma: float) -> Any:
    """ONNX's Selu, whose constants may be given."""
    return gamma * functional.elu(x, alpha)


def cast(x: Any, kind: int) -> Any:
    """ONNX's Cast among the types that CNNs use."""
    return x.to({1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool}[kind])


def transpose(x: Any, order: Any) -> Any:
    """ONNX's Transpose; all axes reversed by default."""
    return x.permute(list(order) if order is not None else list(reversed(range(x.dim()))))
