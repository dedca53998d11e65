"""What ONNX operators without weights of their own compute, in PyTorch.

Each entry of `OPERATORS` is given a `NodeReader` and returns the value of the node's output in an FX graph. The
functions that end up in that graph are plain functions of tensors, so that a traced module can be printed, copied and
compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tvm_nm.errors import UnsupportedModelError

__all__ = ["OPERATORS", "NodeReader", "pad_pairs", "same_pads"]


class NodeReader:
    """What a converter may ask of the node that it converts.

    Parameters
    ----------
    name, op
        Of the node, for errors.
    attributes
        Its attributes as Python values.
    inputs
        Values in the FX graph, None for inputs left out.
    constants
        The arrays of those inputs that are constant, else None.
    call
        Adds a call to the FX graph and returns its value.
    opset
        Version of the standard operators.
    outputs
        Number of the node's outputs.
    """

    def __init__(
        self,
        name: str,
        op: str,
        attributes: dict[str, Any],
        inputs: Sequence[Any],
        constants: Sequence[NDArray[Any] | None],
        call: Callable[..., Any],
        opset: int,
        outputs: int = 1,
    ) -> None:
        self.name, self.op, self.attributes, self.inputs = name, op, attributes, inputs
        self.constants, self.call, self.opset, self.outputs = constants, call, opset, outputs

    def static(self, position: int, key: str | None = None) -> NDArray[Any] | None:
        """Return an input that has to be constant, or the attribute that it was in older versions of the operator."""
        if key is not None and key in self.attributes:
            return np.asarray(self.attributes[key])
        if position >= len(self.inputs) or self.inputs[position] is None:
            return None
        if self.constants[position] is None:
            raise self.error(f"its input {position} is not constant")
        return self.constants[position]

    def ints(self, position: int, key: str | None = None) -> tuple[int, ...] | None:
        """Return `static` as integers."""
        found = self.static(position, key)
        return None if found is None else tuple(int(value) for value in found.reshape(-1))

    def error(self, reason: str) -> UnsupportedModelError:
        """Return the error that says why this node cannot be converted."""
        return UnsupportedModelError(f"cannot be trained in PyTorch: {reason}", node=self.name, op=self.op)


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


def _geometry(read: NodeReader) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Any]:
    kernel = tuple(read.attributes["kernel_shape"])
    if len(kernel) > 2:
        raise read.error("only one or two spatial axes are known")
    ones = (1,) * len(kernel)
    strides = tuple(read.attributes.get("strides", ones))
    automatic = read.attributes.get("auto_pad", "NOTSET")
    pads: Any = tuple(read.attributes.get("pads", (0, 0) * len(kernel)))
    if automatic.startswith("SAME"):
        pads = automatic
    elif automatic == "VALID":
        pads = (0, 0) * len(kernel)
    return kernel, strides, tuple(read.attributes.get("dilations", ones)), pads


def _max_pool(read: NodeReader) -> Any:
    kernel, strides, dilations, pads = _geometry(read)
    if read.outputs > 1:
        raise read.error("the positions of maxima are not known")
    return read.call(max_pool, read.inputs[0], kernel, strides, dilations, pads, bool(read.attributes.get("ceil_mode")))


def _average_pool(read: NodeReader) -> Any:
    kernel, strides, dilations, pads = _geometry(read)
    if any(step != 1 for step in dilations):
        raise read.error("a dilated average is not known")
    flags = bool(read.attributes.get("ceil_mode")), bool(read.attributes.get("count_include_pad"))
    return read.call(average_pool, read.inputs[0], kernel, strides, pads, *flags)


def global_average(x: Any) -> Any:
    """Mean over all spatial axes, which are kept."""
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


def global_max(x: Any) -> Any:
    """Maximum over all spatial axes, which are kept."""
    return x.amax(dim=tuple(range(2, x.dim())), keepdim=True)


def _clip(read: NodeReader) -> Any:
    bounds = []
    for position, key in ((1, "min"), (2, "max")):
        found = read.static(position, key)
        bound = None if found is None else float(found.reshape(-1)[0])
        bounds.append(None if bound is None or math.isnan(bound) else bound)
    return read.call(clip, read.inputs[0], *bounds)


def _softmax(read: NodeReader) -> Any:
    axis = int(read.attributes.get("axis", -1 if read.opset >= 13 else 1))
    return read.call(softmax, read.inputs[0], axis, read.op == "LogSoftmax", read.opset < 13)


def _reduce(read: NodeReader) -> Any:
    axes = read.ints(1, "axes")
    if axes == () and read.attributes.get("noop_with_empty_axes"):
        return read.inputs[0]
    return read.call(reduce, read.inputs[0], read.op, axes or None, bool(read.attributes.get("keepdims", 1)))


def _reshape(read: NodeReader) -> Any:
    batch = read.attributes.get("static_batch")
    shape = read.inputs[1] if len(read.inputs) > 1 and read.constants[1] is None else read.ints(1, "shape")
    return read.call(reshape, read.inputs[0], shape, batch, bool(read.attributes.get("allowzero")))


def _slice(read: NodeReader) -> Any:
    starts, ends = read.ints(1, "starts"), read.ints(2, "ends")
    assert starts is not None
    axes = read.ints(3, "axes") or tuple(range(len(starts)))
    return read.call(slice_axes, read.inputs[0], starts, ends, axes, read.ints(4) or (1,) * len(starts))


def _split(read: NodeReader) -> Any:
    axis, sizes = int(read.attributes.get("axis", 0)), read.ints(1, "split")
    return read.call(split, read.inputs[0], sizes, read.outputs, axis)


def split(x: Any, sizes: Any, count: int, axis: int) -> Any:
    """ONNX's Split; without sizes all parts but the last are equal."""
    part = -(-x.shape[axis] // count)
    return torch.split(x, part if sizes is None else list(sizes), axis)


def _pad(read: NodeReader) -> Any:
    pads, axes = read.ints(1, "pads"), read.ints(3)
    mode = str(read.attributes.get("mode", "constant"))
    found = read.static(2, "value")
    assert pads is not None
    if mode not in ("constant", "reflect", "edge"):
        raise read.error(f"mode {mode!r} is not known")
    value = 0.0 if found is None else float(found.reshape(-1)[0])
    return read.call(pad_axes, read.inputs[0], pads, axes, mode, value)


def pad_axes(x: Any, pads: Any, axes: Any, mode: str, value: float) -> Any:
    """ONNX's Pad of some axes."""
    if axes is not None:
        full = [0] * (2 * x.dim())
        for index, axis in enumerate(axes):
            full[axis % x.dim()] = pads[index]
            full[axis % x.dim() + x.dim()] = pads[index + len(axes)]
        pads = full
    return pad(x, pads, mode, value)


def _attributes(function: Callable[..., Any], **defaults: float) -> Callable[[NodeReader], Any]:
    def convert(read: NodeReader) -> Any:
        values = {key: float(read.attributes.get(key, value)) for key, value in defaults.items()}
        return read.call(function, read.inputs[0], *values.values())

    return convert


def hard_sigmoid(x: Any, alpha: float, beta: float) -> Any:
    """ONNX's HardSigmoid."""
    return (x * alpha + beta).clamp(0, 1)


def selu(x: Any, alpha: float, gamma: float) -> Any:
    """ONNX's Selu, whose constants may be given."""
    return gamma * functional.elu(x, alpha)


def cast(x: Any, kind: int) -> Any:
    """ONNX's Cast among the types that CNNs use."""
    return x.to({1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool}[kind])


def _plain(function: Callable[..., Any]) -> Callable[[NodeReader], Any]:
    return lambda read: read.call(function, *read.inputs)


def _same(read: NodeReader) -> Any:
    return read.inputs[0]


def _many(read: NodeReader) -> Any:
    return read.call(many, read.op, tuple(read.inputs))


OPERATORS: dict[str, Callable[[NodeReader], Any]] = {
    **{name: _plain(getattr(torch, name.lower())) for name in ("Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Abs", "Neg")},
    **{name: _plain(getattr(torch, name.lower())) for name in ("Erf", "Floor", "Ceil", "Reciprocal", "Add", "Sub")},
    **{name: _plain(getattr(torch, name.lower())) for name in ("Mul", "Div", "Pow")},
    **dict.fromkeys(("Sum", "Max", "Min", "Mean"), _many),
    **dict.fromkeys(("Identity", "Dropout"), _same),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), _reduce),
    "Relu": _plain(functional.relu),
    "Softplus": _plain(functional.softplus),
    "Softsign": _plain(functional.softsign),
    "HardSwish": _plain(functional.hardswish),
    "Mish": _plain(functional.mish),
    "PRelu": _plain(prelu),
    "Elu": _attributes(functional.elu, alpha=1.0),
    "LeakyRelu": _attributes(functional.leaky_relu, alpha=0.01),
    "HardSigmoid": _attributes(hard_sigmoid, alpha=0.2, beta=0.5),
    "Selu": _attributes(selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "Clip": _clip,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _plain(global_average),
    "GlobalMaxPool": _plain(global_max),
    "LRN": lambda read: read.call(
        local_response,
        read.inputs[0],
        int(read.attributes["size"]),
        *(float(read.attributes.get(key, value)) for key, value in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))),
    ),
    "Concat": lambda read: read.call(torch.cat, tuple(read.inputs), int(read.attributes["axis"])),
    "Flatten": lambda read: read.call(flatten, read.inputs[0], int(read.attributes.get("axis", 1))),
    "Transpose": lambda read: read.call(transpose, read.inputs[0], read.attributes.get("perm")),
    "Squeeze": lambda read: read.call(squeeze, read.inputs[0], read.ints(1, "axes")),
    "Unsqueeze": lambda read: read.call(unsqueeze, read.inputs[0], read.ints(1, "axes")),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "Gather": lambda read: read.call(gather, *read.inputs, int(read.attributes.get("axis", 0))),
    "Shape": lambda read: read.call(shape_of, read.inputs[0]),
    "Cast": lambda read: read.call(cast, read.inputs[0], int(read.attributes["to"])),
    "DepthToSpace": lambda read: read.call(
        depth_to_space, read.inputs[0], int(read.attributes["blocksize"]), read.attributes.get("mode", "DCR") == "DCR"
    ),
}


def transpose(x: Any, order: Any) -> Any:
    """ONNX's Transpose; all axes reversed by default."""
    return x.permute(list(order) if order is not None else list(reversed(range(x.dim()))))
