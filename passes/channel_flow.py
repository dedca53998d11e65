"""Follows the channels of a canonical module from layer to layer: what every operator means for their labels.

See `tvm_nm.passes.channel_ties` for labels and how they are used.
The operators' rules are in `tvm_nm.passes.channel_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tvm
from tvm import relax

from tvm_nm.inventory import LayerCall, layer_calls
from tvm_nm.passes.channel_ties import PINNED, Indices, Ties

__all__ = ["ChannelFlow", "ConstantUse", "Labels", "LayerChannels", "Rule", "pinned", "short", "varying"]

Labels: TypeAlias = Any
"""Compressed labels of a tensor, or a list of them for a tuple."""

Rule: TypeAlias = Callable[["ChannelFlow", Any], Labels]
"""Labels of a call's value; None where the rule does not apply, which pins whatever the call reads."""

_OUTPUT = "it is an output of the network"


@dataclass(frozen=True, slots=True)
class LayerChannels:
    """The labels on both sides of a layer.

    Attributes
    ----------
    name
        The layer's name.
    inputs, outputs
        The labels of its input channels (all groups', (IC,)) and of its output channels, (OC,).
    """

    name: str
    inputs: Indices
    outputs: Indices


@dataclass(frozen=True, slots=True)
class ConstantUse:
    """A constant whose values belong to channels.

    Attributes
    ----------
    var, argument
        The variable that the call is bound to, and which of its arguments the constant is.
    shape
        The constant's shape, with leading axes of size 1 up to the rank of `labels`.
    labels
        Compressed labels of the tensor that it is combined with; the constant is of full size wherever they vary.
    """

    var: Any
    argument: int
    shape: tuple[int, ...]
    labels: Indices


class ChannelFlow:
    """Walks through the function ``main`` of a canonical module once.

    Attributes
    ----------
    ties
        What is known of the labels.
    layers
        The layers' labels by name.
    constants
        The other constants that follow channels.
    """

    def __init__(self, mod: tvm.IRModule, rules: Mapping[str, Rule]) -> None:
        self.ties = Ties()
        self._rules = rules
        self.layers: dict[str, LayerChannels] = {}
        self.constants: list[ConstantUse] = []
        self._labels: dict[Any, Labels] = {}
        self._calls = {found.var: found for found in layer_calls(mod)}
        self._var: Any = None
        main = mod["main"]
        for param in main.params:
            self._labels[param] = pinned(param)
        for block in main.body.blocks:
            for binding in block.bindings:
                self._bind(binding)
        self._pin_all(main.body.body, _OUTPUT)

    def _bind(self, binding: Any) -> None:
        self._var, value = binding.var, getattr(binding, "value", None)
        labels: Labels = None
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            rule = self._rules.get(value.op.name)
            # Rules count on static shapes; canonical modules have no others.
            labels = rule(self, value) if rule is not None and _is_static(value) else None
            if labels is None:
                self._pin_all(value, f"{value.op.name.removeprefix('relax.')} may depend on the channels' order")
        elif isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem):
            labels = self.of(value)
        elif value is not None:
            self._pin_all(value, "what reads it is no operator")
        self._labels[binding.var] = pinned(binding.var) if labels is None else labels

    def of(self, expr: Any) -> Labels:
        """Labels of an expression's value."""
        if isinstance(expr, relax.Tuple):
            return [self.of(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self.of(expr.tuple_value)[expr.index]
        return self._labels[expr] if isinstance(expr, relax.Var) else pinned(expr)

    def layer_call(self) -> LayerCall | None:
        """Return the layer whose call is being looked at, None if it is none."""
        return self._calls.get(self._var)

    def use_constant(self, call: Any, argument: int, shape: tuple[int, ...], labels: Indices) -> None:
        """Let a constant of `shape` (aligned with `labels`) follow the channels that it is combined with."""
        along = varying(labels)
        if any(shape[axis] > 1 for axis in along):
            if any(shape[axis] != labels.shape[axis] for axis in along):
                self.ties.pin(labels, f"{short(call)} combines it with a constant that spans a part of the channels")
                return
            self.constants.append(ConstantUse(self._var, argument, shape, labels))

    def _pin_all(self, expr: Any, reason: str) -> None:
        """Pin whatever an expression reads."""
        if isinstance(expr, relax.Call):
            for argument in expr.args:
                self._pin_all(argument, reason)
        elif isinstance(expr, relax.Tuple):
            for field in expr.fields:
                self._pin_all(field, reason)
        elif isinstance(expr, relax.TupleGetItem):
            self._pin_all(expr.tuple_value, reason)
        elif isinstance(expr, relax.Var):
            labels = self.of(expr)
            for part in labels if isinstance(labels, list) else [labels]:
                self.ties.pin(part, reason)


def varying(labels: Indices) -> set[int]:
    """Axes along which labels differ."""
    return {axis for axis, size in enumerate(labels.shape) if size > 1}


def short(call: Any) -> str:
    """Name of a call's operator without its namespace."""
    return str(call.op.name).rpartition(".")[2]


def pinned(expr: Any) -> Labels:
    """Labels of a value that never moves."""
    if isinstance(expr.ty, relax.TupleType):
        return [np.full((1,) * max(0, field.ndim), PINNED) for field in expr.ty.fields]
    return np.full((1,) * max(0, getattr(expr.ty, "ndim", 0)), PINNED)


def _is_static(call: Any) -> bool:
    """Whether the shapes of all tensors are known."""
    exprs = [call, *(argument for argument in call.args if isinstance(argument, relax.Var))]
    types = [ty for expr in exprs for ty in (expr.ty.fields if isinstance(expr.ty, relax.TupleType) else [expr.ty])]
    return all(
        isinstance(ty, relax.TensorType)
        and ty.shape is not None
        and all(isinstance(d, tvm.tirx.IntImm) for d in ty.shape)
        for ty in types
    )
