"""Finds the bias, residual add, activation and pooling that follow a layer and can be computed in its kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_nm.inventory import LayerCall
from tvm_nm.passes.dataflow import constant_of, is_call, static_shape
from tvm_nm.passes.select import conv_workload
from tvm_nm.relax_numpy import variables
from tvm_nm.schedules.pool import windows_padding
from tvm_nm.schedules.stem_conv import stem_applies
from tvm_nm.schedules.winograd import winograd_applies
from tvm_nm.workload import Epilogue, MaxPool

__all__ = ["BindingGraph", "FusedLayer", "fuse_epilogues", "scalar"]


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A layer and the bindings that its kernel replaces.

    Attributes
    ----------
    found
        The layer's call.
    absorbed
        Variables whose bindings disappear: the call and all of the chain but its end.
    end
        Variable that the kernel's output is bound to.
    bias
        (OC,) float32; zeros where the layer has none.
    residual
        Expression that is added, or None.
    epilogue
        What the kernel applies. Maxima are part of the layer, but only some kernels take them: for the others a pooling
        of its own follows.
    """

    found: LayerCall
    absorbed: tuple[Any, ...]
    end: Any
    bias: npt.NDArray[np.float32]
    residual: Any
    epilogue: Epilogue


class BindingGraph:
    """Bindings of one function, with their users."""

    def __init__(self, bindings: Sequence[Any], result: Any) -> None:
        self.value: dict[Any, Any] = {binding.var: binding.value for binding in bindings}
        self.order: dict[Any, int] = {binding.var: position for position, binding in enumerate(bindings)}
        self._users: dict[Any, list[Any]] = {}
        self._uses: Counter[Any] = Counter(variables(result))
        for binding in bindings:
            for operand in variables(binding.value):
                self._uses[operand] += 1
                self._users.setdefault(operand, []).append(binding.var)

    def only_user(self, var: Any) -> Any:
        """Return the variable whose binding is the only use of `var`, or None."""
        users = self._users.get(var, [])
        return users[0] if self._uses[var] == 1 and len(users) == 1 else None


def fuse_epilogues(calls: Sequence[LayerCall], bindings: Sequence[Any], result: Any) -> tuple[FusedLayer, ...]:
    """Attach to every layer the longest chain ``+ bias, + residual, clip`` whose links have no other use.

    Max pooling is attached to convolutions that kernels may compute which take it, unless there is a residual: that of
    2x2 pixels by Winograd's algorithm, any by kernels for first layers.
    An add of two layers goes to the later one, when the other's output is already there.

    Parameters
    ----------
    calls
        The layers.
    bindings
        All bindings of the function, in order.
    result
        What it returns.
    """
    graph = BindingGraph(bindings, result)
    claimed: set[Any] = set()
    fused = [_follow(found, graph, claimed) for found in sorted(calls, key=lambda c: -graph.order[c.var])]
    return tuple(sorted(fused, key=lambda layer: layer.found.layer.index))


def _follow(found: LayerCall, graph: BindingGraph, claimed: set[Any]) -> FusedLayer:
    channels = found.layer.weight_shape[0]
    bias = np.zeros(channels, np.float32)
    residual = None
    clip: tuple[float | None, float | None] | None = None
    chain = [found.var]
    while clip is None:
        user = graph.only_user(chain[-1])
        if user is None or user in claimed:
            break
        value = graph.value[user]
        addend = _other_operand(value, chain[-1])
        vector = None if addend is None else _channel_vector(addend, channels, len(found.layer.output_shape))
        if vector is not None and residual is None:
            bias = bias + vector
        elif addend is not None and residual is None and static_shape(addend) == found.layer.output_shape:
            residual = addend
        else:
            clip = _clip_bounds(value)
            if clip is None:
                break
        claimed.add(user)
        chain.append(user)
    low, high = clip or (None, None)
    pool = None if residual is not None else graph.only_user(chain[-1])
    maxima = None if pool is None else _maxima(found, graph.value[pool])
    if maxima is not None:
        claimed.add(pool)
        chain.append(pool)
    epilogue = Epilogue(residual is not None, low, high, maxima)
    return FusedLayer(found, tuple(chain[:-1]), chain[-1], bias, residual, epilogue)


def _maxima(found: LayerCall, value: Any) -> MaxPool | None:
    """Return the pooling that a value is of a layer, if there are kernels for both in one."""
    layer = found.layer
    if not is_call(value, "relax.nn.max_pool2d") or layer.kind != "conv" or value.attrs.layout != "NCHW":
        return None
    attrs, out_shape = value.attrs, static_shape(value)
    if out_shape is None:
        return None
    kernel, stride, dilation = (
        (int(sizes[0]), int(sizes[1])) for sizes in (attrs.pool_size, attrs.strides, attrs.dilation)
    )
    padding = windows_padding(layer.output_shape, out_shape, kernel, stride, dilation, attrs.padding)
    try:
        pool = MaxPool(kernel, stride, padding)
    except ValueError:
        return None
    work = conv_workload(layer, Epilogue())
    taken = (pool.is_squares and winograd_applies(work)) or stem_applies(work)
    same = out_shape == (*layer.output_shape[:2], *pool.output_size(*layer.output_shape[2:]))
    return pool if taken and same and dilation == (1, 1) else None


def _other_operand(value: Any, operand: Any) -> Any:
    if not is_call(value, "relax.add"):
        return None
    left, right = value.args
    return right if left.same_as(operand) else left


def _channel_vector(expr: Any, channels: int, rank: int) -> npt.NDArray[np.float32] | None:
    """Return a constant that differs only along the channel axis (1 of `rank`, or the last of a matrix) as a vector."""
    array = constant_of(expr)
    if array is None or array.ndim > rank:  # one of a higher rank changes the shape
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    if shape[1] not in (1, channels):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,)).astype(np.float32)


def _clip_bounds(value: Any) -> tuple[float | None, float | None] | None:
    if is_call(value, "relax.nn.relu"):
        return 0.0, None
    if is_call(value, "relax.nn.relu6"):
        return 0.0, 6.0
    if is_call(value, "relax.clip"):
        low, high = (scalar(argument) for argument in value.args[1:3])
        return (None if np.isneginf(low) else low), (None if np.isposinf(high) else high)
    return None


def scalar(expr: Any) -> float:
    """Return the value of a constant scalar argument."""
    inner = getattr(expr, "value", expr)
    return float(getattr(inner, "value", inner))
