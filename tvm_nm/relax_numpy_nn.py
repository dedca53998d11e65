"""The heavier half of `tvm_nm.relax_numpy_ops`: convolutions, pools, normalisation and activations in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

__all__ = ["NN_OPS", "Array", "Operator", "UnhandledError", "conv2d", "ints", "zero_padded"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Operator: TypeAlias = Callable[..., Any]

_IM2COL_BYTES = 1 << 24  # patches are gathered in strips of rows this big: they stay in the last-level cache


class UnhandledError(Exception):
    """The NumPy table does not cover this operator or this use of it."""


def ints(values: Any) -> tuple[int, ...]:
    """Convert integers of any kind, TVM's among them."""
    return tuple(int(v) for v in values)


def zero_padded(x: Array, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> Array:
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
    x = zero_padded(x, (top, left), (bottom, right))
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
    return conv2d(x, w, ints(attrs.strides), ints(attrs.padding), ints(attrs.dilation), int(attrs.groups))


def _conv1d_op(call: Any, x: Array, w: Array) -> Array:
    attrs = call.attrs
    if attrs.data_layout != "NCW" or attrs.kernel_layout != "OIW" or x.dtype != np.float32 or w.dtype != np.float32:
        raise UnhandledError
    (stride,), (left, right), (dilation,) = ints(attrs.strides), ints(attrs.padding), ints(attrs.dilation)
    out = conv2d(x[:, :, None], w[:, :, None], (1, stride), (0, left, 0, right), (1, dilation), int(attrs.groups))
    return out[:, :, 0]


def _pool(kind: str, rank: int) -> Operator:
    layout = {1: "NCW", 2: "NCHW", 3: "NCDHW"}[rank]

    def pool(call: Any, x: Array) -> Array:
        attrs = call.attrs
        if attrs.layout != layout or x.dtype != np.float32:
            raise UnhandledError
        kernel, strides, dilation = ints(attrs.pool_size), ints(attrs.strides), ints(attrs.dilation)
        before, after = ints(attrs.padding)[:rank], ints(attrs.padding)[rank:]
        sizes = x.shape[2:]
        # A window of ceil mode may reach beyond the padding; what is out there does not count.
        low, high = [0] * rank, list(sizes)
        if attrs.count_include_pad:
            low, high = [-b for b in before], [n + a for n, a in zip(sizes, after, strict=True)]
        if attrs.ceil_mode:
            after = tuple(a + s - 1 for a, s in zip(after, strides, strict=True))
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        out = [
            (n + b + a - span) // s + 1 for n, b, a, span, s in zip(sizes, before, after, spans, strides, strict=True)
        ]
        padded = zero_padded(x, before, after, -np.inf if kind == "max" else 0.0)
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
            for axis in range(rank):
                starts = np.arange(out[axis])[:, None] * strides[axis] - before[axis]
                taps = starts + np.arange(kernel[axis]) * dilation[axis]
                inside = ((taps >= low[axis]) & (taps < high[axis])).sum(axis=1)
                shape = [-1 if a == axis else 1 for a in range(rank)]
                result /= np.maximum(inside, 1).astype(np.float32).reshape(shape)
        return result

    return pool


def _adaptive_avg_pool2d(call: Any, x: Array) -> Array:
    if call.attrs.layout != "NCHW":
        raise UnhandledError
    height, width = x.shape[2:]
    oh, ow = ints(call.attrs.output_size) if call.attrs.output_size else (height, width)
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


NN_OPS: dict[str, Operator] = {
    "relax.sigmoid": _sigmoid,
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
}
"""As `tvm_nm.relax_numpy_ops.OPS`, of which it is a part."""
