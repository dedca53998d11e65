"""Relax operators in NumPy: the table that `tvm_nm.relax_numpy` runs and that constants are folded with.

Every entry computes what TVM's own lowering of the operator computes, so that it can stand in for a compiled module
as an oracle. An entry that does not cover a case (an odd layout, integer division) raises `UnhandledError`; the caller
then compiles the single operator with TVM.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_nm.relax_numpy_nn import NN_OPS, Array, Operator, UnhandledError, ints, zero_padded

__all__ = ["OPS", "Array", "UnhandledError"]


def _clip(call: Any, x: Array, low: float, high: float) -> Array:
    return np.clip(x, x.dtype.type(low), x.dtype.type(high))


def _pad(call: Any, x: Array) -> Array:
    widths = ints(call.attrs.pad_width)
    if call.attrs.pad_mode != "constant" or min(widths, default=0) < 0:
        raise UnhandledError
    return zero_padded(x, widths[0::2], widths[1::2], float(call.attrs.pad_value))


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
    view: Array = x.transpose(ints(axes) if axes is not None else None)
    return view  # not made contiguous: nobody needs that, and it may be a 400 MB weight


def _split(call: Any, x: Array) -> tuple[Array, ...]:
    sections, axis = call.attrs.indices_or_sections, int(call.attrs.axis)
    try:
        bounds = list(ints(sections))
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
    return x.squeeze() if axis is None else x.squeeze(ints(axis))


def _take(call: Any, x: Array, indices: Any) -> Array:
    axis = call.attrs.axis
    index = np.asarray(indices)
    if index.size and (index.min() < 0 or (axis is not None and index.max() >= x.shape[int(axis)])):
        raise UnhandledError  # what is out of range depends on the mode
    return np.take(x, index, axis=None if axis is None else int(axis))


def _reduce(function: Operator) -> Operator:
    def reduce(call: Any, x: Array) -> Array:
        axis = call.attrs.axis
        axes = None if axis is None else ints(axis)
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
    **NN_OPS,
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
    "relax.nn.pad": _pad,
    "relax.matmul": _matmul,
    # shape and layout
    "relax.reshape": lambda call, x, shape: x.reshape(shape),
    "relax.flatten": lambda call, x: x.reshape(-1),
    "relax.nn.batch_flatten": lambda call, x: x.reshape(x.shape[0], -1),
    "relax.expand_dims": lambda call, x: np.expand_dims(x, ints(call.attrs.axis)),
    "relax.squeeze": _squeeze,
    "relax.permute_dims": _permute_dims,
    "relax.broadcast_to": lambda call, x, shape: np.ascontiguousarray(np.broadcast_to(x, shape)),
    "relax.concat": lambda call, xs: np.concatenate(xs, axis=int(call.attrs.axis)),
    "relax.stack": lambda call, xs: np.stack(xs, axis=int(call.attrs.axis)),
    "relax.split": _split,
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.tile": lambda call, x: np.tile(x, ints(call.attrs.repeats)),
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
