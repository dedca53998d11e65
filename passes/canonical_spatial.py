"""Rules of `Canonicalize` about the spatial axes: explicit padding, global pools, one-dimensional layers, matmuls.

One-dimensional convolutions and pools become two-dimensional ones of height 1 between two reshapes. The reshape behind
a layer sinks through the elementwise operators that follow, so that biases, batch norms and activations see a
two-dimensional layer and the reshapes of consecutive layers cancel out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tvm import relax

from tvm_nm.passes.canonical_simplify import reshape
from tvm_nm.passes.dataflow import Dataflow, Rule, constant_of, is_call, static_shape
from tvm_nm.relax_numpy import as_constant

__all__ = ["SPATIAL_RULES"]

_UNARY = (
    *(f"relax.nn.{op}" for op in ("relu", "leakyrelu", "silu", "gelu")),
    *(f"relax.{op}" for op in ("clip", "sigmoid", "tanh", "exp", "log", "sqrt", "abs", "negative", "erf")),
)
_BINARY = tuple(f"relax.{op}" for op in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power"))
_NON_NEGATIVE = ("relax.nn.relu", "relax.sigmoid", "relax.exp", "relax.abs", "relax.nn.softmax", "relax.square")
_KEEPS_SIGN = (
    *(f"relax.nn.{kind}_pool{rank}d" for kind in ("max", "avg") for rank in (1, 2, 3)),
    *(f"relax.{op}" for op in ("reshape", "permute_dims", "strided_slice", "concat", "mean", "sum", "max")),
)


def _spatial_padding(flow: Dataflow, expr: Any) -> tuple[Any, list[int], list[int]] | None:
    """Source and widths (before, after) of a zero padding of spatial axes only."""
    pad = flow.value(expr)
    if not is_call(pad, "relax.nn.pad") or pad.attrs.pad_mode != "constant" or float(pad.attrs.pad_value) != 0:
        return None
    widths = [int(w) for w in pad.attrs.pad_width]
    if any(widths[:4]) or min(widths) < 0:
        return None
    return pad.args[0], widths[4::2], widths[5::2]


def _padded_conv(flow: Dataflow, call: Any) -> Any:
    """``conv(pad(x))``: convolutions pad with zeros themselves."""
    attrs = call.attrs
    found = _spatial_padding(flow, call.args[0])
    if found is None or attrs.data_layout not in ("NCW", "NCHW"):
        return None
    source, before, after = found
    op = relax.op.nn.conv1d if is_call(call, "relax.nn.conv1d") else relax.op.nn.conv2d
    return op(
        source,
        call.args[1],
        strides=list(attrs.strides),
        padding=[int(p) + w for p, w in zip(attrs.padding, [*before, *after], strict=True)],
        dilation=list(attrs.dilation),
        groups=int(attrs.groups),
        data_layout=attrs.data_layout,
        kernel_layout=attrs.kernel_layout,
        out_layout=attrs.out_layout,
        out_dtype=attrs.out_dtype,
    )


def _padded_pool(flow: Dataflow, call: Any) -> Any:
    """``pool(pad(x))`` where it is exact.

    Average pools that count their padding see the same zeros. Max pools ignore their padding, so zeros may stand in for
    it only if no value is negative and every window holds a value.
    """
    attrs = call.attrs
    found = _spatial_padding(flow, call.args[0])
    if found is None or attrs.layout not in ("NCW", "NCHW") or attrs.ceil_mode:
        return None
    source, before, after = found
    own = [int(p) for p in attrs.padding]
    average = call.op.name.startswith("relax.nn.avg")
    if average and any(own) and not attrs.count_include_pad:
        return None
    padding = [p + w for p, w in zip(own, [*before, *after], strict=True)]
    spans = [(int(k) - 1) * int(d) + 1 for k, d in zip(attrs.pool_size, attrs.dilation, strict=True)]
    rank = len(spans)
    if not average:
        if any(own) or any(int(d) != 1 for d in attrs.dilation) or not _is_non_negative(flow, source):
            return None
        if any(max(padding[a], padding[a + rank]) >= spans[a] for a in range(rank)):
            return None
    return _pool(call, source, [int(k) for k in attrs.pool_size], padding, count_include_pad=average)


def _pool(call: Any, data: Any, size: list[int], padding: list[int], *, count_include_pad: bool) -> Any:
    """Repeat a pool with another source, window and padding."""
    attrs = call.attrs
    return getattr(relax.op.nn, call.op.name.removeprefix("relax.nn."))(
        data,
        size,
        strides=list(attrs.strides),
        padding=padding,
        dilation=list(attrs.dilation),
        ceil_mode=bool(attrs.ceil_mode),
        count_include_pad=count_include_pad,
        layout=attrs.layout,
        out_layout=attrs.out_layout,
    )


def _global_average(flow: Dataflow, call: Any) -> Any:
    """Average pool of a single window, the whole map: the mean, as of a global one."""
    attrs, x = call.attrs, static_shape(call.args[0])
    if x is None or attrs.layout != "NCHW" or any(int(p) for p in attrs.padding):
        return None
    if [int(size) for size in attrs.pool_size] != list(x[2:]) or any(int(d) != 1 for d in attrs.dilation):
        return None
    return relax.op.mean(call.args[0], [2, 3], keepdims=True)


def _is_non_negative(flow: Dataflow, expr: Any) -> bool:
    if isinstance(expr, relax.Tuple):
        return all(_is_non_negative(flow, f) for f in expr.fields)
    value = flow.value(expr)
    if is_call(value, *_NON_NEGATIVE):
        return True
    if is_call(value, "relax.clip"):
        return float(value.args[1].value) >= 0 if hasattr(value.args[1], "value") else False
    return is_call(value, *_KEEPS_SIGN) and _is_non_negative(flow, value.args[0])


def _insert_height(data: Any, shape: tuple[int, ...]) -> Any:
    return reshape(data, (*shape[:2], 1, shape[2]))


def _conv1d(flow: Dataflow, call: Any) -> Any:
    """One-dimensional convolution with constant weight: two-dimensional of height 1."""
    attrs = call.attrs
    x, weight = static_shape(call.args[0]), constant_of(call.args[1])
    layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout)
    out = static_shape(call)
    if x is None or out is None or weight is None or layouts != ("NCW", "OIW", "NCW"):
        return None
    left, right = (int(p) for p in attrs.padding)
    conv = relax.op.nn.conv2d(
        flow.emit(_insert_height(call.args[0], x), f"{flow.name}_rows"),
        as_constant(weight[:, :, None]),
        strides=[1, int(attrs.strides[0])],
        padding=[0, left, 0, right],
        dilation=[1, int(attrs.dilation[0])],
        groups=int(attrs.groups),
    )
    return reshape(flow.emit(conv, flow.name), out)


def _pool1d(flow: Dataflow, call: Any) -> Any:
    """One-dimensional pool: two-dimensional of height 1."""
    attrs = call.attrs
    x, out = static_shape(call.args[0]), static_shape(call)
    if x is None or out is None or attrs.layout != "NCW":
        return None
    left, right = (int(p) for p in attrs.padding)
    kind = "max" if is_call(call, "relax.nn.max_pool1d") else "avg"
    pool = getattr(relax.op.nn, f"{kind}_pool2d")(
        flow.emit(_insert_height(call.args[0], x), f"{flow.name}_rows"),
        [1, int(attrs.pool_size[0])],
        strides=[1, int(attrs.strides[0])],
        padding=[0, left, 0, right],
        dilation=[1, int(attrs.dilation[0])],
        ceil_mode=bool(attrs.ceil_mode),
        count_include_pad=bool(attrs.count_include_pad),
    )
    return reshape(flow.emit(pool, flow.name), out)


def _without_height(flow: Dataflow, expr: Any) -> Any:
    """Source (N, C, 1, W) of a reshape to (N, C, W), or None."""
    value = flow.value(expr)
    if not is_call(value, "relax.reshape"):
        return None
    shape, source = static_shape(value), static_shape(value.args[0])
    if shape is None or len(shape) != 3 or source != (*shape[:2], 1, shape[2]):
        return None
    return value.args[0]


def _sink_through_unary(flow: Dataflow, call: Any) -> Any:
    source = _without_height(flow, call.args[0])
    if source is None:
        return None
    inner = flow.emit(relax.Call(call.op, [source, *call.args[1:]], call.attrs), flow.name)
    return reshape(inner, static_shape(call) or ())


def _sink_through_binary(flow: Dataflow, call: Any) -> Any:
    """Both operands lose their height, or one does and the other is a constant."""
    operands = [_without_height(flow, a) for a in call.args]
    shape = static_shape(call)
    if shape is None or all(o is None for o in operands):
        return None
    for index, (operand, arg) in enumerate(zip(operands, call.args, strict=True)):
        if operand is not None:
            continue
        array = constant_of(arg)
        if array is None or array.ndim > 3:
            return None
        aligned = array.reshape((1,) * (3 - array.ndim) + array.shape)
        operands[index] = as_constant(array if array.ndim == 0 else aligned[:, :, None])
    return reshape(flow.emit(relax.Call(call.op, operands, call.attrs), flow.name), shape)


def _sink_through_concat(flow: Dataflow, call: Any) -> Any:
    parts, shape = call.args[0], static_shape(call)
    if not isinstance(parts, relax.Tuple) or shape is None or int(call.attrs.axis) % 3 != 1:
        return None
    sources = [_without_height(flow, f) for f in parts.fields]
    if len(shape) != 3 or any(s is None for s in sources):
        return None
    return reshape(flow.emit(relax.op.concat(sources, axis=1), flow.name), shape)


def _matmul(flow: Dataflow, call: Any) -> Any:
    """``x @ W`` with x of rank 3 or more and a constant matrix: the leading axes become one."""
    x, out, weight = static_shape(call.args[0]), static_shape(call), constant_of(call.args[1])
    if x is None or out is None or weight is None or weight.ndim != 2 or len(x) < 3:
        return None
    rows = flow.emit(reshape(call.args[0], (math.prod(x[:-1]), x[-1])), f"{flow.name}_rows")
    product = flow.emit(relax.Call(call.op, [rows, call.args[1]], call.attrs), flow.name)
    return reshape(product, out)


SPATIAL_RULES: Mapping[str, Sequence[Rule]] = {
    **{op: [_sink_through_unary] for op in _UNARY},
    **{op: [_sink_through_binary] for op in _BINARY},
    "relax.concat": [_sink_through_concat],
    "relax.nn.conv1d": [_padded_conv, _conv1d],
    "relax.nn.conv2d": [_padded_conv],
    **{f"relax.nn.{kind}_pool1d": [_padded_pool, _pool1d] for kind in ("max", "avg")},
    "relax.nn.max_pool2d": [_padded_pool],
    "relax.nn.avg_pool2d": [_padded_pool, _global_average],
    "relax.matmul": [_matmul],
}
