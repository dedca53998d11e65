"""Rules of `Canonicalize` that move scales and shifts into the convolution or FC layer beside them.

A batch norm in inference is a scale and a shift by channel, ``y = x * k + t`` with ``k = gamma / sqrt(var + eps)`` and
``t = beta - mean * k``; Caffe's Scale layers, Gemm's alpha and normalised inputs are the same thing. All become
multiply and add by constants first, then one pair of rules folds those. ``x * k + t`` without a layer to fold into
stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from tvm_nm.passes.dataflow import TUPLE_ITEM, Dataflow, Rule, constant_of, is_call, static_shape
from tvm_nm.relax_numpy import as_constant
from tvm_nm.relax_numpy_ops import Array

__all__ = ["AFFINE_RULES", "Linear", "channel_vector", "match_linear"]

_LAYERS = ("relax.nn.conv2d", "relax.matmul")


@dataclass(frozen=True, slots=True)
class Linear:
    """A conv2d or matmul with constant weight, nobody else reading it, and its bias if it has one.

    Attributes
    ----------
    var
        Variable of the conv2d or matmul.
    call
        That call.
    weight
        Its weight as the call has it: (OC, IC / groups, KH, KW) or (K, OUT).
    bias
        (OC,), or None.
    """

    var: Any
    call: Any
    weight: Array
    bias: Array | None


def channel_vector(array: Array, shape: Sequence[int]) -> Array | None:
    """Reduce a constant that is broadcast against `shape` to one value for each channel (axis 1).

    Returns
    -------
    Array or None
        (shape[1],); None where the constant varies along another axis, or is the larger of the two.
    """
    if len(shape) < 2 or array.ndim > len(shape):
        return None
    aligned = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(a not in (1, s) for a, s in zip(aligned.shape, shape, strict=True)):
        return None
    first = aligned[tuple(slice(None) if axis == 1 else slice(0, 1) for axis in range(len(shape)))]
    if first.size != aligned.size and not np.array_equal(np.broadcast_to(first, aligned.shape), aligned):
        return None
    return np.broadcast_to(first.reshape(-1), shape[1:2])


def match_linear(flow: Dataflow, expr: Any) -> Linear | None:
    """Recognise a layer, or a layer plus bias, whose value nobody but the matched expression reads."""
    value = flow.value(expr)
    if value is None or not flow.used_once(expr):
        return None
    if is_call(value, "relax.add"):
        layer, shift, shape = match_linear(flow, value.args[0]), constant_of(value.args[1]), static_shape(expr)
        if layer is None or layer.bias is not None or shift is None or shape is None:
            return None
        bias = channel_vector(shift, shape)
        return None if bias is None else Linear(layer.var, layer.call, layer.weight, bias)
    weight = _layer_weight(value)
    return None if weight is None else Linear(expr, value, weight, None)


def _layer_weight(value: Any) -> Array | None:
    if not is_call(value, *_LAYERS) or static_shape(value) is None:
        return None
    weight = constant_of(value.args[1])
    if weight is None:
        return None
    if is_call(value, "relax.matmul"):
        return weight if weight.ndim == 2 and value.args[0].ty.ndim == 2 else None
    attrs = value.attrs
    layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout)
    return weight if layouts == ("NCHW", "OIHW", "NCHW") else None


def _with_weight(call: Any, weight: Array, data: Any = None) -> Any:
    return relax.Call(call.op, [call.args[0] if data is None else data, as_constant(weight)], call.attrs)


def _by_channel(vector: Array, rank: int) -> Any:
    """Constant of shape (1, C, 1, ...) with `rank` axes."""
    return as_constant(vector.astype(np.float32).reshape(1, -1, *[1] * (rank - 2)))


def _operands(call: Any) -> tuple[Any, Array, Array] | None:
    """Split ``x op constant`` into x, the constant, and the constant by channel; None for other calls."""
    shape, array = static_shape(call), constant_of(call.args[1])
    if shape is None or array is None or static_shape(call.args[0]) != shape:
        return None
    vector = channel_vector(array, shape)
    return None if vector is None else (call.args[0], array, vector)


def _commute(flow: Dataflow, call: Any) -> Any:
    """Constants go to the right of add and multiply."""
    left, right = call.args
    if constant_of(left) is not None and constant_of(right) is None:
        return relax.Call(call.op, [right, left], call.attrs)
    return None


def _scale(flow: Dataflow, call: Any) -> Any:
    """``layer(x) * k`` and ``(x * a + b) * k``."""
    found = _operands(call)
    if found is None:
        return None
    x, _, k = found
    if np.all(k == 1):
        return x
    layer = match_linear(flow, x)
    if layer is not None:
        along_output = (slice(None), *[None] * 3) if is_call(layer.call, "relax.nn.conv2d") else slice(None)
        out = flow.emit(_with_weight(layer.call, layer.weight * k[along_output]), flow.name_of(layer.var))
        return out if layer.bias is None else relax.op.add(out, _by_channel(layer.bias * k, call.ty.ndim))
    inner = flow.value(x)
    if not is_call(inner, "relax.multiply", "relax.add") or not flow.used_once(x):
        return None
    before = _operands(inner)
    if before is None:
        return None
    if is_call(inner, "relax.multiply"):
        return relax.op.multiply(before[0], _by_channel(before[2] * k, call.ty.ndim))
    scaled = flow.emit(relax.op.multiply(before[0], _by_channel(k, call.ty.ndim)), f"{flow.name}_scale")
    return relax.op.add(scaled, _by_channel(before[2] * k, call.ty.ndim))


def _shift(flow: Dataflow, call: Any) -> Any:
    """``layer(x) + t`` and ``(x + a) + t``."""
    found = _operands(call)
    if found is None:
        return None
    x, array, t = found
    if not np.any(t):
        return x
    canonical = (1, t.size, *[1] * (call.ty.ndim - 2))
    layer = match_linear(flow, x)
    if layer is not None and layer.bias is not None:
        return relax.op.add(layer.var, _by_channel(layer.bias + t, call.ty.ndim))
    inner = flow.value(x)
    if is_call(inner, "relax.add") and flow.used_once(x):
        before = _operands(inner)
        if before is not None:
            return relax.op.add(before[0], _by_channel(before[2] + t, call.ty.ndim))
    if _layer_weight(inner) is not None and array.shape != canonical:
        return relax.op.add(x, _by_channel(t, call.ty.ndim))
    return None


def _subtract(flow: Dataflow, call: Any) -> Any:
    array = constant_of(call.args[1])
    return None if array is None else relax.op.add(call.args[0], as_constant(-array))


def _divide(flow: Dataflow, call: Any) -> Any:
    """Divide by a constant only where it disappears: x / 6 and x * (1 / 6) differ in the last bit."""
    found = _operands(call)
    if found is None or not np.all(found[2]) or match_linear(flow, found[0]) is None:
        return None
    return relax.op.multiply(found[0], as_constant(np.float32(1) / found[1]))


def _batch_norm(flow: Dataflow, item: Any) -> Any:
    """First output of an inference batch norm with constant statistics."""
    call = flow.value(item.tuple_value)
    if item.index != 0 or not is_call(call, "relax.nn.batch_norm") or call.attrs.training:
        return None
    parameters = [constant_of(a) for a in call.args[1:]]
    if any(p is None for p in parameters):
        return None
    gamma, beta, mean, var = (np.asarray(p, dtype=np.float64) for p in parameters)
    spread = var + float(call.attrs.epsilon)
    if not np.all(spread > 0):
        return None
    k = (gamma if call.attrs.scale else 1.0) / np.sqrt(spread)
    t = (beta if call.attrs.center else 0.0) - mean * k
    rank = call.args[0].ty.ndim
    shape = [-1 if axis == int(call.attrs.axis) % rank else 1 for axis in range(rank)]
    scale, shift = (as_constant(v.astype(np.float32).reshape(shape)) for v in (k, t))
    return relax.op.add(flow.emit(relax.op.multiply(call.args[0], scale), f"{flow.name}_scale"), shift)


def _scaled_input(flow: Dataflow, call: Any) -> Any:
    """``layer(x * k)``: the scale of an input channel goes into the weights that read it."""
    weight, inner = _layer_weight(call), flow.value(call.args[0])
    if weight is None or not is_call(inner, "relax.multiply"):
        return None
    found = _operands(inner)
    if found is None:
        return None
    return _with_weight(call, weight * _along_input(call, weight, found[2]), found[0])


def _shifted_input(flow: Dataflow, call: Any) -> Any:
    """``layer(x + t)`` without padding: the shift becomes a bias. With padding it would be wrong at the borders."""
    weight, inner = _layer_weight(call), flow.value(call.args[0])
    if weight is None or not is_call(inner, "relax.add"):
        return None
    found = _operands(inner)
    if found is None or _layer_weight(flow.value(found[0])) is not None:
        return None  # another layer's bias stays where it is
    if is_call(call, "relax.nn.conv2d") and any(int(p) for p in call.attrs.padding):
        return None
    products = weight.astype(np.float64) * _along_input(call, weight, found[2])
    bias = products.sum(axis=(1, 2, 3) if is_call(call, "relax.nn.conv2d") else 0)
    out = flow.emit(_with_weight(call, weight, found[0]), flow.name)
    return relax.op.add(out, _by_channel(bias, call.ty.ndim))


def _along_input(call: Any, weight: Array, vector: Array) -> Array:
    """Shape one value for each input channel so that it multiplies the weight."""
    if is_call(call, "relax.matmul"):
        return vector[:, None]
    groups = int(call.attrs.groups)
    by_group = vector.reshape(groups, -1)
    return np.repeat(by_group, weight.shape[0] // groups, axis=0)[:, :, None, None]


def _flat_bias(flow: Dataflow, call: Any) -> Any:
    """``reshape(x @ W) + b`` with b along the last axis: the bias goes in front of the reshape."""
    inner, array, shape = flow.value(call.args[0]), constant_of(call.args[1]), static_shape(call)
    if not is_call(inner, "relax.reshape") or array is None or shape is None or not flow.used_once(call.args[0]):
        return None
    layer = match_linear(flow, inner.args[0])
    if layer is None or not is_call(layer.call, "relax.matmul") or layer.weight.shape[1] != shape[-1]:
        return None
    if (
        array.ndim == 0
        or math.prod(array.shape) != shape[-1]
        or array.shape[-1] != shape[-1]
        or array.ndim > len(shape)
    ):
        return None
    out = flow.emit(relax.op.add(inner.args[0], as_constant(array.reshape(1, -1))), f"{flow.name}_bias")
    return relax.op.reshape(out, shape)


AFFINE_RULES: Mapping[str, Sequence[Rule]] = {
    TUPLE_ITEM: [_batch_norm],
    "relax.multiply": [_commute, _scale],
    "relax.divide": [_divide],
    "relax.subtract": [_subtract],
    "relax.add": [_commute, _shift, _flat_bias],
    "relax.nn.conv2d": [_scaled_input, _shifted_input],
    "relax.matmul": [_scaled_input, _shifted_input],
}
