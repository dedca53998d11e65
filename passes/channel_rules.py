"""What each operator does to the channels of its operands: the rules of `tvm_nm.passes.channel_flow`.

An operator without a rule pins the channels that it reads, so that a new operator costs permutations, not correctness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_nm.passes.channel_flow import ChannelFlow, Labels, LayerChannels, Rule, pinned, short, varying
from tvm_nm.passes.channel_ties import PINNED, Indices, compressed, places_along, residual
from tvm_nm.passes.dataflow import static_shape
from tvm_nm.relax_numpy import as_numpy
from tvm_nm.relax_numpy_ops import OPS

__all__ = ["follow_channels"]

_ELEMENTWISE = {
    f"relax.{op}"
    for op in (
        *("nn.relu", "nn.leakyrelu", "nn.silu", "nn.gelu", "nn.gelu_tanh", "nn.softplus", "sigmoid", "tanh", "clip"),
        *("abs", "negative", "square", "sign", "floor", "ceil", "round", "exp", "log", "sqrt", "rsqrt", "erf", "sin"),
        *("cos", "astype", "isnan", "isfinite", "isinf", "logical_not", "logical_and", "logical_or", "where", "power"),
        *("add", "subtract", "multiply", "divide", "maximum", "minimum"),
        *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
    )
}
_RESHAPES = ("reshape", "flatten", "nn.batch_flatten", "expand_dims", "squeeze")
_SYMMETRIC = {f"relax.{op}" for op in ("sum", "mean", "max", "min", "prod", "variance", "std")}


def follow_channels(mod: tvm.IRModule) -> ChannelFlow:
    """Walk through the function ``main`` of a canonical module.

    Raises
    ------
    UnsupportedModelError
        If the module's layers are not canonical; see `tvm_nm.inventory.layer_calls`.
    """
    return ChannelFlow(mod, RULES)


def _conv2d(flow: ChannelFlow, call: Any) -> Labels:
    found = flow.layer_call()
    labels, shape = flow.of(call.args[0]), static_shape(call.args[0])
    if found is None or shape is None or varying(labels) - {1}:
        return None
    ties, groups, channels = flow.ties, found.layer.groups, found.layer.weight_shape[0]
    inputs = np.broadcast_to(labels.reshape(-1), shape[1])
    places = np.arange(channels)
    if groups > 1 and groups == shape[1]:  # depthwise: outputs are named by their inputs
        origin = places // (channels // groups)
        outputs = inputs[origin]
        ties.move(inputs, outputs, origin, None, places % (channels // groups))
    else:
        outputs = ties.new(channels)
        ties.note(inputs, np.arange(shape[1]) // (shape[1] // groups))
        ties.note(outputs, places // (channels // groups))
    flow.layers[found.layer.name] = LayerChannels(found.layer.name, inputs, outputs)
    return outputs.reshape(1, -1, 1, 1)


def _matmul(flow: ChannelFlow, call: Any) -> Labels:
    found = flow.layer_call()
    labels, shape, out_shape = flow.of(call.args[0]), static_shape(call.args[0]), static_shape(call)
    if found is None or not shape or not out_shape or varying(labels) - {len(shape) - 1}:
        return None
    inputs = np.broadcast_to(labels.reshape(-1), shape[-1])
    outputs = flow.ties.new(out_shape[-1])
    flow.ties.note(inputs)
    flow.ties.note(outputs)
    flow.layers[found.layer.name] = LayerChannels(found.layer.name, inputs, outputs)
    return outputs.reshape((1,) * (len(out_shape) - 1) + (-1,))


def _elementwise(flow: ChannelFlow, call: Any) -> Labels:
    """Operands that meet along the channels have the same channels; what is broadcast along them does not matter."""
    shape = static_shape(call) or ()
    tensors = [(_aligned(flow.of(a), shape), _full(a, shape)) for a in call.args if isinstance(a, relax.Var)]
    if not tensors:
        return None
    space = tuple(max(sizes) for sizes in zip(*(labels.shape for labels, _ in tensors), strict=True))
    along = [axis for axis, size in enumerate(space) if size > 1]
    if not along:
        return tensors[0][0]
    result: Indices = np.full(space, PINNED)
    meeting = [labels for labels, own in tensors if any(own[axis] > 1 for axis in along)]
    for index, labels in enumerate(meeting):
        spread = np.broadcast_to(labels, space)
        if index:
            flow.ties.unite(result, spread, f"{short(call)} combines it with channels that cannot move")
        result = np.where(result == PINNED, spread, result)
    for labels in meeting:
        if labels.shape != space:
            flow.ties.move(labels, result, places_along(labels, space), None, residual(labels, space).reshape(-1))
    for argument, constant in enumerate(call.args):
        if isinstance(constant, tvm.ir.GenericConst):
            flow.use_constant(call, argument, _full(constant, shape), result)
    return result


def _prelu(flow: ChannelFlow, call: Any) -> Labels:
    labels, shape = flow.of(call.args[0]), static_shape(call.args[0]) or ()
    if not isinstance(call.args[1], tvm.ir.GenericConst):
        return None
    own = [1] * len(shape)
    own[int(call.attrs.axis)] = math.prod(static_shape(call.args[1]) or ())
    flow.use_constant(call, 1, tuple(own), labels)
    return labels


def _window(flow: ChannelFlow, call: Any) -> Labels:
    """Pooling and resizing: the pixels of each channel by themselves."""
    labels = flow.of(call.args[0])
    if not str(call.attrs.layout).startswith("NC") or varying(labels) - {1}:
        return None
    return labels


def _reduce(flow: ChannelFlow, call: Any) -> Labels:
    labels = flow.of(call.args[0])
    rank = labels.ndim
    axes = range(rank) if call.attrs.axis is None else [int(axis) % rank for axis in call.attrs.axis]
    if varying(labels) & set(axes):
        if not varying(labels) <= set(axes):
            return None
        labels = np.full((1,) * rank, PINNED)  # a sum over all channels does not ask for their order
    return labels if call.attrs.keepdims else labels.squeeze(tuple(axes))


def _softmax(flow: ChannelFlow, call: Any) -> Labels:
    labels = flow.of(call.args[0])
    mixed = int(call.attrs.axis) % labels.ndim in varying(labels) and len(varying(labels)) > 1
    return None if mixed else labels


def _reshape(flow: ChannelFlow, call: Any) -> Labels:
    labels, shape, out_shape = flow.of(call.args[0]), static_shape(call.args[0]), static_shape(call)
    if shape is None or out_shape is None:
        return None
    if labels.size == 1:
        return labels.reshape((1,) * len(out_shape))
    # Leading and trailing axes that stay as they are, and hold no channels, would only multiply the work.
    head = _common([*zip(shape, out_shape, labels.shape, strict=False)])
    tail = _common([*zip(shape[::-1], out_shape[::-1], labels.shape[::-1], strict=False)])
    before, after = shape[head : len(shape) - tail], out_shape[head : len(out_shape) - tail]
    inner = labels.reshape(labels.shape[head : len(shape) - tail])
    origin = places_along(inner, before).reshape(-1)
    out = compressed(inner.reshape(-1)[origin].reshape(after))
    place, rest = places_along(out, after), (residual(inner, before).reshape(-1), residual(out, after).reshape(-1))
    flow.ties.move(inner, out, origin, place, *rest)
    return out.reshape((1,) * head + out.shape + (1,) * tail)


def _common(sizes: Sequence[tuple[int, int, int]]) -> int:
    return next((i for i, (a, b, own) in enumerate(sizes) if a != b or own > 1), len(sizes))


def _permute(flow: ChannelFlow, call: Any) -> Labels:
    labels = flow.of(call.args[0])
    axes = None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes]
    return _pick(flow, labels, _flat(labels).transpose(axes))


def _slice(flow: ChannelFlow, call: Any) -> Labels:
    labels = flow.of(call.args[0])
    given = [_integers(argument) for argument in call.args[1:]]
    if any(part is None for part in given):
        return None
    # Along the axes where labels do not vary there is nothing to slice.
    kept = [i for i, axis in enumerate(given[0] or []) if labels.shape[axis] > 1]
    parts = [[part[i] for i in kept] for part in given if part is not None]
    return _pick(flow, labels, OPS["relax.strided_slice"](call, _flat(labels), *parts))


def _split(flow: ChannelFlow, call: Any) -> Labels:
    labels = flow.of(call.args[0])
    if labels.shape[int(call.attrs.axis)] == 1:
        return [labels] * len(call.ty.fields)
    return [_pick(flow, labels, part) for part in OPS["relax.split"](call, _flat(labels))]


def _take(flow: ChannelFlow, call: Any) -> Labels:
    labels, axis = flow.of(call.args[0]), call.attrs.axis
    if not isinstance(call.args[1], tvm.ir.GenericConst) or axis is None:
        return None
    index = np.asarray(call.args[1].value.numpy())
    size = (static_shape(call.args[0]) or ())[int(axis)]
    if index.size == 0 or index.min() < 0 or index.max() >= size:
        return None  # what is out of range depends on the mode
    index = index if labels.shape[int(axis)] > 1 else np.zeros_like(index)
    return compressed(_pick(flow, labels, np.take(_flat(labels), index, axis=int(axis))))


def _pad(flow: ChannelFlow, call: Any) -> Labels:
    labels, widths = flow.of(call.args[0]), [int(width) for width in call.attrs.pad_width]
    pairs = [
        (before, after) if size > 1 else (0, 0)
        for before, after, size in zip(widths[::2], widths[1::2], labels.shape, strict=True)
    ]
    padded = any(map(any, pairs))
    if min(widths) < 0 or (padded and call.attrs.pad_mode != "constant"):
        return None
    if not padded:
        return labels
    out = _pick(flow, labels, np.pad(_flat(labels), pairs, constant_values=-1))
    # Channels of padding are all alike: they may change places with each other.
    filling = np.pad(np.zeros(labels.shape, np.bool_), pairs, constant_values=True)
    out[filling] = flow.ties.new(int(filling.sum()))
    flow.ties.note(out, filling.reshape(-1))
    return out


def _broadcast(flow: ChannelFlow, call: Any) -> Labels:
    return _aligned(flow.of(call.args[0]), static_shape(call) or ())


def _concat(flow: ChannelFlow, call: Any) -> Labels:
    axis = int(call.attrs.axis) % call.ty.ndim
    if not isinstance(call.args[0], relax.Tuple):
        return None
    parts = [_filling(flow, part, axis) for part in call.args[0].fields]
    lengths = [int(ty.shape[axis]) for ty in call.args[0].ty.fields]
    sizes = [max(sizes) for sizes in zip(*(labels.shape for labels in parts), strict=True)]
    shapes = [(*sizes[:axis], length, *sizes[axis + 1 :]) for length in lengths]
    joined = np.concatenate([np.broadcast_to(own, s) for own, s in zip(parts, shapes, strict=True)], axis=axis)
    places = np.split(_flat(joined), np.cumsum(lengths)[:-1], axis=axis)
    for labels, shape, place in zip(parts, shapes, places, strict=True):
        flow.ties.move(labels, joined, places_along(labels, shape), place, residual(labels, shape).reshape(-1))
    return joined if joined.any() else pinned(call)


def _filling(flow: ChannelFlow, part: Any, axis: int) -> Labels:
    """Labels of an operand of a concatenation; the channels of a constant that are all alike may move, too."""
    if not isinstance(part, tvm.ir.GenericConst) or int(part.ty.shape[axis]) == 1:
        return flow.of(part)
    value = as_numpy(part)
    if not (value == value.take([0], axis=axis)).all():
        return flow.of(part)
    labels = flow.ties.new(value.shape[axis]).reshape([-1 if a == axis else 1 for a in range(value.ndim)])
    flow.ties.note(labels)
    return labels


def _flat(labels: Indices) -> Indices:
    return np.arange(labels.size).reshape(labels.shape)


def _pick(flow: ChannelFlow, labels: Indices, index: Indices) -> Indices:
    """Labels of a tensor whose elements are those of another at flat indices; -1 stands for a constant."""
    picked = np.where(index < 0, PINNED, labels.reshape(-1)[index])
    place = np.flatnonzero(index.reshape(-1) >= 0)
    flow.ties.move(labels, picked, index.reshape(-1)[place], place)
    return picked


def _aligned(labels: Indices, shape: Sequence[int]) -> Indices:
    return labels.reshape((1,) * (len(shape) - labels.ndim) + labels.shape)


def _full(expr: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of an operand with leading axes of size 1 up to the rank of the result's `shape`."""
    own = static_shape(expr) or ()
    return (1,) * (len(shape) - len(own)) + own


def _integers(expr: Any) -> list[int] | None:
    if isinstance(expr, relax.Tuple) and all(isinstance(field, tvm.tirx.IntImm) for field in expr.fields):
        return [int(field) for field in expr.fields]
    return None


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_SYMMETRIC, _reduce),
    **{f"relax.{op}": _reshape for op in _RESHAPES},
    **{f"relax.nn.{op}": _window for kind in ("max", "avg") for op in (f"{kind}_pool2d", f"{kind}_pool3d")},
    **{f"relax.nn.adaptive_{kind}_pool2d": _window for kind in ("max", "avg")},
    "relax.image.resize2d": _window,
    "relax.nn.conv2d": _conv2d,
    "relax.matmul": _matmul,
    "relax.nn.prelu": _prelu,
    "relax.nn.softmax": _softmax,
    "relax.nn.log_softmax": _softmax,
    "relax.permute_dims": _permute,
    "relax.strided_slice": _slice,
    "relax.split": _split,
    "relax.take": _take,
    "relax.nn.pad": _pad,
    "relax.broadcast_to": _broadcast,
    "relax.concat": _concat,
}
