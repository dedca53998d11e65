"""Rules of `Canonicalize` that drop what does nothing and give each thing one spelling.

After them the module has no dropout, no identity, no ``stack`` + ``sum`` (how TVM's ONNX importer spells Sum), one kind
of reshape in place of flatten, squeeze and expand_dims, and clip or relu in place of maximum and minimum by scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_nm.passes.dataflow import TUPLE_ITEM, Dataflow, Rule, constant_of, is_call, static_shape
from tvm_nm.relax_numpy import as_constant

__all__ = ["SIMPLIFY_RULES", "reshape"]


def reshape(data: Any, shape: Sequence[int]) -> Any:
    """Reshape a tensor; `shape` is static."""
    return relax.op.reshape(data, relax.ShapeExpr([int(d) for d in shape]))


def _dropout(flow: Dataflow, item: Any) -> Any:
    call = flow.value(item.tuple_value)
    return call.args[0] if is_call(call, "relax.nn.dropout") and item.index == 0 else None


def _reshape(flow: Dataflow, call: Any) -> Any:
    """Reshape, flatten, squeeze and expand_dims, one after the other: one reshape from the source or none."""
    shape, source = static_shape(call), call.args[0]
    if shape is None:
        return None
    if static_shape(source) == shape:
        return source
    before = flow.value(source)
    if is_call(before, "relax.reshape"):
        return reshape(before.args[0], shape)
    return None if is_call(call, "relax.reshape") else reshape(source, shape)


def _keeps_everything(flow: Dataflow, call: Any) -> Any:
    """Drop an operator that can only be the identity if its result has the shape of its operand."""
    shape = static_shape(call)
    return call.args[0] if shape is not None and shape == static_shape(call.args[0]) else None


def _pad(flow: Dataflow, call: Any) -> Any:
    return None if any(int(w) for w in call.attrs.pad_width) else call.args[0]


def _slice(flow: Dataflow, call: Any) -> Any:
    """Drop a slice that takes everything; join two in a row along different axes."""
    extent = _slice_extent(call)
    if extent is None:
        return None
    if min(extent[3], default=1) > 0 and _keeps_everything(flow, call) is not None:
        return call.args[0]
    before = flow.value(call.args[0])
    inner = _slice_extent(before) if is_call(before, "relax.strided_slice") else None
    if inner is None or not flow.used_once(call.args[0]) or set(inner[0]) & set(extent[0]):
        return None
    axes, begin, end, steps = (a + b for a, b in zip(inner, extent, strict=True))
    return relax.op.strided_slice(before.args[0], axes, begin, end, steps)


def _slice_extent(call: Any) -> list[list[int]] | None:
    """Axes, begins, ends and steps of a static slice."""
    given = [list(a.fields) for a in call.args[1:] if isinstance(a, relax.Tuple)]
    if len(given) != len(call.args) - 1 or not all(isinstance(v, tvm.tirx.IntImm) for part in given for v in part):
        return None
    lists = [[int(v) for v in part] for part in given]
    if len(lists) == 3:
        lists.append([1] * len(lists[0]))
    lists[0] = [a % call.args[0].ty.ndim for a in lists[0]]
    return lists


def _permute(flow: Dataflow, call: Any) -> Any:
    """Drop a transposition that moves nothing; join two in a row; one that moves only axes of size 1 is a reshape."""
    source, shape = call.args[0], static_shape(call)
    if shape is None:
        return None
    axes = _axes(call)
    if axes == sorted(axes):
        return source
    before = flow.value(source)
    if is_call(before, "relax.permute_dims"):
        inner = _axes(before)
        return relax.op.permute_dims(before.args[0], [inner[a] for a in axes])
    moved = [a for a, size in zip(axes, shape, strict=True) if size > 1]
    return reshape(source, shape) if moved == sorted(moved) else None


def _axes(call: Any) -> list[int]:
    rank = len(static_shape(call) or ())
    axes = call.attrs.axes
    return [int(a) % rank for a in axes] if axes is not None else list(range(rank))[::-1]


def _astype(flow: Dataflow, call: Any) -> Any:
    return call.args[0] if str(call.ty.dtype) == str(call.args[0].ty.dtype) else None


def _concat(flow: Dataflow, call: Any) -> Any:
    parts = call.args[0]
    return parts.fields[0] if isinstance(parts, relax.Tuple) and len(parts.fields) == 1 else None


def _over_stack(combine: Callable[[Any, Any], Any], *, average: bool = False) -> Rule:
    """Rule for ``reduce(stack(a, b, ...))`` along the stacked axis: the operands are combined pairwise."""

    def rule(flow: Dataflow, call: Any) -> Any:
        stack, shape = flow.value(call.args[0]), static_shape(call)
        if not is_call(stack, "relax.stack") or shape is None or not isinstance(stack.args[0], relax.Tuple):
            return None
        rank = len(shape) + 1
        axes = call.attrs.axis
        if call.attrs.keepdims or axes is None or [int(a) % rank for a in axes] != [int(stack.attrs.axis) % rank]:
            return None
        operands = [_unbroadcast(flow, field, shape) for field in stack.args[0].fields]
        if all(static_shape(o) != shape for o in operands):
            operands[0] = stack.args[0].fields[0]  # somebody has to have the full shape
        # Constants last: they may be a bias.
        operands.sort(key=lambda o: isinstance(o, tvm.ir.GenericConst))
        total = operands[0]
        for operand in operands[1:]:
            total = flow.emit(combine(total, operand), flow.name)
        if average:
            total = relax.op.multiply(total, as_constant(np.asarray(1 / len(operands), np.float32)))
        return total

    return rule


def _unbroadcast(flow: Dataflow, operand: Any, shape: tuple[int, ...]) -> Any:
    """Operand before a ``broadcast_to`` that the pairwise operator does by itself."""
    value = flow.value(operand)
    if is_call(value, "relax.broadcast_to") and static_shape(value.args[0]) is not None:
        return value.args[0]
    return operand


def _bounds(value: Any) -> tuple[Any, float, float] | None:
    """Operand and bounds of relu, clip, and maximum or minimum by a scalar."""
    if is_call(value, "relax.nn.relu"):
        return value.args[0], 0.0, math.inf
    if is_call(value, "relax.clip"):
        low, high = value.args[1:]
        if not all(isinstance(b, tvm.tirx.IntImm | tvm.tirx.FloatImm) for b in (low, high)):
            return None
        return value.args[0], float(low.value), float(high.value)
    if is_call(value, "relax.maximum", "relax.minimum"):
        bound = constant_of(value.args[1])
        if bound is None or bound.size != 1 or static_shape(value) != static_shape(value.args[0]):
            return None
        limit = float(bound.reshape(()))
        return (
            (value.args[0], limit, math.inf) if is_call(value, "relax.maximum") else (value.args[0], -math.inf, limit)
        )
    return None


def _clip(flow: Dataflow, call: Any) -> Any:
    """Relu, clip, maximum and minimum: joined with the one before, then written as relu or clip if two-sided."""
    if str(call.ty.dtype) != "float32":
        return None
    bounds = _bounds(call)
    if bounds is None:
        return None
    x, low, high = bounds
    if not low <= high:
        return None
    before = _bounds(flow.value(x))
    joined = before is not None and flow.used_once(x) and before[1] <= before[2]
    if joined:
        assert before is not None
        x, (low, high) = before[0], (min(max(before[1], low), high), max(min(before[2], high), low))
    if low == -math.inf and high == math.inf:
        return x
    if low == 0 and high == math.inf:
        return None if is_call(call, "relax.nn.relu") and not joined else relax.op.nn.relu(x)
    if math.isfinite(low) and math.isfinite(high):
        return None if is_call(call, "relax.clip") and not joined else relax.op.clip(x, low, high)
    if is_call(call, "relax.clip") or joined:  # one-sided
        if high == math.inf:
            return relax.op.maximum(x, as_constant(np.asarray(low, np.float32)))
        if low == -math.inf:
            return relax.op.minimum(x, as_constant(np.asarray(high, np.float32)))
    return None


def _commute(flow: Dataflow, call: Any) -> Any:
    left, right = call.args
    if constant_of(left) is not None and constant_of(right) is None:
        return relax.Call(call.op, [right, left], call.attrs)
    return None


def _shape_of(flow: Dataflow, call: Any) -> Any:
    shape = static_shape(call.args[0])
    return None if shape is None else relax.ShapeExpr(list(shape))


def _shape_to_tensor(flow: Dataflow, call: Any) -> Any:
    shape = call.args[0]
    if not isinstance(shape, relax.ShapeExpr) or not all(isinstance(d, tvm.tirx.IntImm) for d in shape.values):
        return None
    return as_constant(np.array([int(d) for d in shape.values], dtype=np.int64))


def _tensor_to_shape(flow: Dataflow, call: Any) -> Any:
    tensor = call.args[0]
    if not isinstance(tensor, tvm.ir.GenericConst):
        return None
    return relax.ShapeExpr([int(d) for d in tensor.value.numpy()])


SIMPLIFY_RULES: Mapping[str, Sequence[Rule]] = {
    TUPLE_ITEM: [_dropout],
    **{f"relax.{op}": [_reshape] for op in ("reshape", "flatten", "squeeze", "expand_dims", "nn.batch_flatten")},
    "relax.broadcast_to": [_keeps_everything],
    "relax.nn.pad": [_pad],
    "relax.strided_slice": [_slice],
    "relax.permute_dims": [_permute],
    "relax.astype": [_astype],
    "relax.concat": [_concat],
    "relax.sum": [_over_stack(relax.op.add)],
    "relax.max": [_over_stack(relax.op.maximum)],
    "relax.min": [_over_stack(relax.op.minimum)],
    "relax.mean": [_over_stack(relax.op.add, average=True)],
    "relax.nn.relu": [_clip],
    "relax.clip": [_clip],
    "relax.maximum": [_commute, _clip],
    "relax.minimum": [_commute, _clip],
    "relax.shape_of": [_shape_of],
    "relax.shape_to_tensor": [_shape_to_tensor],
    "relax.tensor_to_shape": [_tensor_to_shape],
}
