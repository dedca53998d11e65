"""Relax operators in NumPy: the table that `tvm_nm.relax_numpy` runs and that constants are folded with.

Every entry computes what TVM's own lowering of the operator computes, so that it can stand in for a compiled module
as an oracle. An entry that does not cover a case (an odd layout, integer division) raises `UnhandledError`; the caller
then compiles the single operator with TVM.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

__all__ = ["OPS", "Array", "UnhandledError", "conv2d"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Operator: TypeAlias = Callable[..., Any]

_IM2COL_BYTES = 1 << 24  # patches are gathered in strips of rows this big: they stay in the last-level cache


class UnhandledError(Exception):
    """The NumPy table does not cover this operator or this use of it."""


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _zero_padded(x: Array, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> Array:
    """Pad the trailing ``len(before)`` axes of `x`; np.pad takes several times as long."""
    if not any(before) and not any(after):
        return x
    lead = x.ndim - len(before)
    shape = (*x.shape[:lead], *(n + b + a for n, b, a in zip(x.shape[lead:], before, after, strict=True)))
    out = np.full(shape, fill, x.dtype)
    inner: tuple[Any, ...] = (..., *(slice(b, b + n) for n, b in zip(x.shape[lead:], before, strict=True)))
    out[inner] = x
    return out


def conv2d(
    x: Array, weight: Array, strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Array:
    """Cross-correlate `x` (N, C, H, W) with `weight` (OC, C/groups, KH, KW), both float32.

    Parameters
    ----------
    strides, dilation
        Along (H, W).
    padding
        Zeros at (top, left, bottom, right).
    groups
        Number of channel groups.

    Returns
    -------
    Array
        (N, OC, OH, OW) float32.
    """
    top, left, bottom, right = padding
    x = _zero_padded(x, (top, left), (bottom, right))
    n, channels, height, width = x.shape
    out_channels, group_in, kh, kw = weight.shape
    (sh, sw), (dh, dw) = strides, dilation
    oh = (height - (kh - 1) * dh - 1) // sh + 1
    ow = (width - (kw - 1) * dw - 1) // sw + 1
    if group_in == 1 and groups > 1:
        return _depthwise(x, weight, (sh, sw), (dh, dw), (oh, ow))
    out = np.empty((n, groups, out_channels // groups, oh * ow), np.float32)
    taps = np.ascontiguousarray(weight).reshape(groups, out_channels // groups, group_in * kh * kw)
    rows = max(1, _IM2COL_BYTES // (4 * channels * kh * kw * ow))
    for image, target in zip(x, out, strict=True):
        c_stride, h_stride, w_stride = image.strides
        patches = np.lib.stride_tricks.as_strided(
            image,
            (channels, kh, kw, oh, ow),
            (c_stride, h_stride * dh, w_stride * dw, h_stride * sh, w_stride * sw),
            writeable=False,
        )
        for r in range(0, oh, rows):
            strip = patches[:, :, :, r : r + rows].reshape(groups, group_in * kh * kw, -1)
            target[:, :, r * ow : (r + rows) * ow] = taps @ strip
    return out.reshape(n, out_channels, oh, ow)


def _depthwise(
    x: Array, weight: Array, strides: tuple[int, int], dilation: tuple[int, int], out_hw: tuple[int, int]
) -> Array:
    n, channels = x.shape[:2]
    out_channels, _, kh, kw = weight.shape
    (sh, sw), (dh, dw), (oh, ow) = strides, dilation, out_hw
    out = np.zeros((n, channels, out_channels // channels, oh, ow), np.float32)
    for a, b in itertools.product(range(kh), range(kw)):
        rows, cols = slice(a * dh, a * dh + (oh - 1) * sh + 1, sh), slice(b * dw, b * dw + (ow - 1) * sw + 1, sw)
        out += x[:, :, None, rows, cols] * weight[:, 0, a, b].reshape(1, channels, -1, 1, 1)
    return out.reshape(n, out_channels, oh, ow)


def _conv2d_op(call: Any, x: Array, w: Array) -> Array:
    attrs = call.attrs
    if attrs.data_layout != "NCHW" or attrs.kernel_layout != "OIHW" or attrs.out_layout not in ("", "NCHW"):
        raise UnhandledError
    if x.dtype != np.float32 or w.dtype != np.float32:
        raise UnhandledError
    return conv2d(x, w, _ints(attrs.strides), _ints(attrs.padding), _ints(attrs.dilation), int(attrs.groups))


def _conv1d_op(call: Any, x: Array, w: Array) -> Array:
    attrs = call.attrs
    if attrs.data_layout != "NCW" or attrs.kernel_layout != "OIW" or x.dtype != np.float32 or w.dtype != np.float32:
        raise UnhandledError
    (stride,), (left, right), (dilation,) = _ints(attrs.strides), _ints(attrs.padding), _ints(attrs.dilation)
    out = conv2d(x[:, :, None], w[:, :, None], (1, stride), (0, left, 0, right), (1, dilation), int(attrs.groups))
    return out[:, :, 0]


def _pool(kind: str, rank: int) -> Operator:
    layout = {1: "NCW", 2: "NCHW", 3: "NCDHW"}[rank]

    def pool(call: Any, x: Array) -> Array:
        attrs = call.attrs
        if attrs.layout != layout or x.dtype != np.float32:
            raise UnhandledError
        kernel, strides, dilation = _ints(attrs.pool_size), _ints(attrs.strides), _ints(attrs.dilation)
        before, after = _ints(attrs.padding)[:rank], _ints(attrs.padding)[rank:]
        sizes = x.shape[2:]
        if attrs.ceil_mode:
            after = tuple(a + s - 1 for a, s in zip(after, strides, strict=True))
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        out = [
            (n + b + a - span) // s + 1 for n, b, a, span, s in zip(sizes, before, after, spans, strides, strict=True)
        ]
        padded = _zero_padded(x, before, after, -np.inf if kind == "max" else 0.0)
        result: Array | None = None
        for tap in itertools.product(*(range(k) for k in kernel)):
            window: tuple[Any, ...] = (
                ...,
                *(
                    slice(t * d, t * d + (o - 1) * s + 1, s)
                    for t, d, o, s in zip(tap, dilation, out, strides, strict=True)
                ),
            )
            values = padded[window]
            if result is None:
                result = values.copy()
            elif kind == "max":
                np.maximum(result, values, out=result)
            else:
                result += values
        assert result is not None
        if kind == "avg":
            if attrs.count_include_pad:
                result /= np.float32(math.prod(kernel))
            else:
                for axis in range(rank):
                    starts = np.arange(out[axis])[:, None] * strides[axis] - before[axis]
                    taps = starts + np.arange(kernel[axis]) * dilation[axis]
                    inside = ((taps >= 0) & (taps < sizes[axis])).sum(axis=1)
                    shape = [-1 if a == axis else 1 for a in range(rank)]
                    result /= np.maximum(inside, 1).astype(np.float32).reshape(shape)
        return result

    return pool


def _adaptive_avg_pool2d(call: Any, x: Array) -> Array:
    if call.attrs.layout != "NCHW":
        raise UnhandledError
    height, width = x.shape[2:]
    oh, ow = _ints(call.attrs.output_size) if call.attrs.output_size else (height, width)
    out = np.empty((*x.shape[:2], oh, ow), x.dtype)
    for i, j in itertools.product(range(oh), range(ow)):
        rows = slice(i * height // oh, -(-(i + 1) * height // oh))
        cols = slice(j * width // ow, -(-(j + 1) * width // ow))
        out[:, :, i, j] = x[:, :, rows, cols].mean(axis=(2, 3))
    return out


def _batch_norm(call: Any, x: Array, gamma: Array, beta: Array, mean: Array, var: Array) -> tuple[Array, ...]:
    attrs = call.attrs
    if attrs.training:
        raise UnhandledError
    shape = [-1 if a == int(attrs.axis) % x.ndim else 1 for a in range(x.ndim)]
    out = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + np.float32(attrs.epsilon))
    if attrs.scale:
        out = out * gamma.reshape(shape)
    if attrs.center:
        out = out + beta.reshape(shape)
    return out, mean, var


def _softmax(call: Any, x: Array) -> Array:
    axis = int(call.attrs.axis)
    e: Array = np.exp(x - x.max(axis=axis, keepdims=True))
    out: Array = e / e.sum(axis=axis, keepdims=True)
    return out


def _log_softmax(call: Any, x: Array) -> Array:
    axis = int(call.attrs.axis)
    shifted: Array = x - x.max(axis=axis, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return out


def _sigmoid(call: Any, x: Array) -> Array:
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-x))).astype(x.dtype)


def _prelu(call: Any, x: Array, slope: Array) -> Array:
    shape = [-1 if a == int(call.attrs.axis) % x.ndim else 1 for a in range(x.ndim)]
    return np.where(x > 0, x, x * slope.reshape(shape))


def _clip(call: Any, x: Array, low: float, high: float) -> Array:
    return np.clip(x, x.dtype.type(low), x.dtype.type(high))


def _pad(call: Any, x: Array) -> Array:
    widths = _ints(call.attrs.pad_width)
    if call.attrs.pad_mode != "constant" or min(widths, default=0) < 0:
        raise UnhandledError
    return _zero_padded(x, widths[0::2], widths[1::2], float(call.attrs.pad_value))


def _matmul(call: Any, a: Array, b: Array) -> Array:
    if a.dtype != b.dtype or a.dtype.kind != "f":
        raise UnhandledError
    product: Array = np.matmul(a, b)
    return product


def _divide(call: Any, a: Array, b: Array) -> Array:
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        raise UnhandledError
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(a, b)


def _permute_dims(call: Any, x: Array) -> Array:
    axes = call.attrs.axes
    view: Array = x.transpose(_ints(axes) if axes is not None else None)
    return view  # not made contiguous: nobody needs that, and it may be a 400 MB weight


def _split(call: Any, x: Array) -> tuple[Array, ...]:
    sections, axis = call.attrs.indices_or_sections, int(call.attrs.axis)
    try:
        bounds = list(_ints(sections))
    except TypeError:  # a number of equal parts; the last one may be shorter
        part = -(-x.shape[axis] // int(sections))
        bounds = list(range(part, x.shape[axis], part))
    return tuple(np.ascontiguousarray(p) for p in np.split(x, bounds, axis=axis))


def _strided_slice(call: Any, x: Array, axes: Any, begin: Any, end: Any, strides: Any = None) -> Array:
    index = [slice(None)] * x.ndim
    for axis, b, e, s in zip(axes, begin, end, strides or [1] * len(axes), strict=True):
        # A negative end counts from the back; one beyond that means "to the start" when stepping backwards.
        if s < 0 and e < -x.shape[axis]:
            index[axis] = slice(b, None, s)
        else:
            index[axis] = slice(b, e, s)
    return np.ascontiguousarray(x[tuple(index)])


def _squeeze(call: Any, x: Array) -> Array:
    axis = call.attrs.axis
    return x.squeeze() if axis is None else x.squeeze(_ints(axis))


def _take(call: Any, x: Array, indices: Any) -> Array:
    axis = call.attrs.axis
    index = np.asarray(indices)
    if index.size and (index.min() < 0 or (axis is not None and index.max() >= x.shape[int(axis)])):
        raise UnhandledError  # what is out of range depends on the mode
    return np.take(x, index, axis=None if axis is None else int(axis))


def _reduce(function: Operator) -> Operator:
    def reduce(call: Any, x: Array) -> Array:
        axis = call.attrs.axis
        axes = None if axis is None else _ints(axis)
        return np.asarray(function(x, axis=axes, keepdims=bool(call.attrs.keepdims)), dtype=x.dtype)

    return reduce


def _arg_reduce(function: Operator) -> Operator:
    def reduce(call: Any, x: Array) -> Array:
        axis = call.attrs.axis
        out = function(x, axis=None if axis is None else int(axis), keepdims=bool(call.attrs.keepdims))
        return np.asarray(out, dtype=np.int64)

    return reduce


def _plain(function: Operator) -> Operator:
    return lambda call, *args: np.asarray(function(*args))


def _float_only(function: Operator) -> Operator:
    def apply(call: Any, x: Array) -> Array:
        if x.dtype.kind != "f":
            raise UnhandledError
        with np.errstate(all="ignore"):
            return np.asarray(function(x), dtype=x.dtype)

    return apply


def _filled(call: Any, shape: Any, value: float) -> Array:
    return np.full(shape, value, str(call.ty.dtype))


OPS: dict[str, Operator] = {
    # elementwise, one operand
    "relax.abs": _plain(np.abs),
    "relax.negative": _plain(np.negative),
    "relax.square": _plain(np.square),
    "relax.sign": _plain(np.sign),
    "relax.floor": _float_only(np.floor),
    "relax.ceil": _float_only(np.ceil),
    "relax.exp": _float_only(np.exp),
    "relax.log": _float_only(np.log),
    "relax.sqrt": _float_only(np.sqrt),
    "relax.rsqrt": _float_only(lambda x: 1 / np.sqrt(x)),
    "relax.sin": _float_only(np.sin),
    "relax.cos": _float_only(np.cos),
    "relax.tanh": _float_only(np.tanh),
    "relax.sigmoid": _sigmoid,
    "relax.logical_not": _plain(np.logical_not),
    "relax.isnan": _plain(np.isnan),
    "relax.astype": lambda call, x: x.astype(str(call.attrs.dtype)),
    "relax.clip": _clip,
    # elementwise, several operands
    "relax.add": _plain(np.add),
    "relax.subtract": _plain(np.subtract),
    "relax.multiply": _plain(np.multiply),
    "relax.divide": _divide,
    "relax.power": _plain(np.power),
    "relax.maximum": _plain(np.maximum),
    "relax.minimum": _plain(np.minimum),
    "relax.equal": _plain(np.equal),
    "relax.not_equal": _plain(np.not_equal),
    "relax.less": _plain(np.less),
    "relax.less_equal": _plain(np.less_equal),
    "relax.greater": _plain(np.greater),
    "relax.greater_equal": _plain(np.greater_equal),
    "relax.logical_and": _plain(np.logical_and),
    "relax.logical_or": _plain(np.logical_or),
    "relax.where": _plain(np.where),
    # neural networks
    "relax.nn.conv1d": _conv1d_op,
    "relax.nn.conv2d": _conv2d_op,
    **{f"relax.nn.{kind}_pool{rank}d": _pool(kind, rank) for kind in ("max", "avg") for rank in (1, 2, 3)},
    "relax.nn.adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "relax.nn.batch_norm": _batch_norm,
    "relax.nn.dropout": lambda call, x: (x, np.ones_like(x)),
    "relax.nn.relu": lambda call, x: np.maximum(x, x.dtype.type(0)),
    "relax.nn.leakyrelu": lambda call, x: np.where(x > 0, x, x * x.dtype.type(call.attrs.alpha)),
    "relax.nn.prelu": _prelu,
    "relax.nn.silu": lambda call, x: x * _sigmoid(call, x),
    "relax.nn.softmax": _softmax,
    "relax.nn.log_softmax": _log_softmax,
    "relax.nn.pad": _pad,
    "relax.matmul": _matmul,
    # shape and layout
    "relax.reshape": lambda call, x, shape: x.reshape(shape),
    "relax.flatten": lambda call, x: x.reshape(-1),
    "relax.nn.batch_flatten": lambda call, x: x.reshape(x.shape[0], -1),
    "relax.expand_dims": lambda call, x: np.expand_dims(x, _ints(call.attrs.axis)),
    "relax.squeeze": _squeeze,
    "relax.permute_dims": _permute_dims,
    "relax.broadcast_to": lambda call, x, shape: np.ascontiguousarray(np.broadcast_to(x, shape)),
    "relax.concat": lambda call, xs: np.concatenate(xs, axis=int(call.attrs.axis)),
    "relax.stack": lambda call, xs: np.stack(xs, axis=int(call.attrs.axis)),
    "relax.split": _split,
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.tile": lambda call, x: np.tile(x, _ints(call.attrs.repeats)),
    "relax.full": _filled,
    "relax.zeros": lambda call, shape: _filled(call, shape, 0),
    "relax.ones": lambda call, shape: _filled(call, shape, 1),
    "relax.shape_of": lambda call, x: x.shape,
    "relax.shape_to_tensor": lambda call, shape: np.array(shape, dtype=np.int64),
    "relax.tensor_to_shape": lambda call, x: tuple(int(d) for d in x),
    # reductions
    "relax.sum": _reduce(np.sum),
    "relax.mean": _reduce(np.mean),
    "relax.max": _reduce(np.max),
    "relax.min": _reduce(np.min),
    "relax.prod": _reduce(np.prod),
    "relax.variance": _reduce(np.var),
    "relax.std": _reduce(np.std),
    "relax.argmax": _arg_reduce(np.argmax),
    "relax.argmin": _arg_reduce(np.argmin),
}
"""Relax operator name to ``function(call, *arguments)``; arguments are arrays, numbers or tuples of them."""
