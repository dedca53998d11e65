"""Puts the channels of an ONNX model into the order that a rearrangement found. Needs no TVM.

The order of each layer's channels is given; what lies between layers follows it: batch norms and other constants that
have a value for each channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from tvm_nm.errors import PlanError
from tvm_nm.onnx_graph import WEIGHT, OnnxGraph, node_name, node_reads, orient_weight, transposed_weight
from tvm_nm.onnx_weights import layer_weight, replace_input

__all__ = ["LayerOrderLike", "reorder_onnx"]

_Order = NDArray[np.intp]

_BIAS = 2
_LAYERS = ("Conv", "Gemm", "MatMul")
# What leaves each channel where it is and looks at no constant by channel.
_BY_CHANNEL = {
    *("Relu", "Clip", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Sigmoid", "HardSigmoid", "HardSwish"),
    *("Tanh", "Softplus", "Softsign", "Mish", "Gelu", "Erf", "Abs", "Neg", "Exp", "Log", "Sqrt", "Cast", "Identity"),
    *("Dropout", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization"),
    *("Pad", "Resize", "Upsample"),
}
_MEETING = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "PRelu", "Where"}


class LayerOrderLike(Protocol):
    """What is needed of `tvm_nm.passes.rearrange.LayerOrder`."""

    @property
    def outputs(self) -> _Order:
        """By output channel, the one that it was."""
        ...

    def apply(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Bring a weight to the new order."""
        ...


def reorder_onnx(model: onnx.ModelProto, orders: Mapping[str, LayerOrderLike]) -> None:
    """Rearrange the channels of a model in place; it computes what it computed.

    Parameters
    ----------
    model
        An ONNX model with its weights loaded.
    orders
        By layer name, the order of its channels, as `tvm_nm.passes.rearrange.rearrange` finds it: inputs and outputs of
        the model stay as they are. Layers that are not named stay as well.

    Raises
    ------
    PlanError
        If a constant by channel stands where it cannot be told which channels it belongs to, or a layer is inside a
        function or subgraph; `model` is spoilt then.
    UnsupportedModelError
        If a weight is not constant.
    """
    walk = _Walk(OnnxGraph(model), orders)
    for node in list(model.graph.node):
        walk.visit(node)
    if missing := sorted(orders.keys() - walk.reordered):
        raise PlanError(f"layer {missing[0]!r} is no node of the model's main graph; leave out --rearrange")


@dataclass(frozen=True, slots=True)
class _Channels:
    """Channels of a tensor: where each was (None: not known any more), their axis from the right, whether any moved."""

    source: _Order | None
    axis: int
    moved: bool


class _Walk:
    """Follows channels from layer to layer."""

    def __init__(self, graph: OnnxGraph, orders: Mapping[str, LayerOrderLike]) -> None:
        self.graph, self.orders = graph, orders
        self.channels: dict[str, _Channels] = {}
        self.reordered: set[str] = set()
        self.fixed = {tensor.name for tensor in graph.graph.initializer}

    def visit(self, node: onnx.NodeProto) -> None:
        """Bring a node's constants to the new order, and note the channels of its outputs."""
        if set(node_reads(node)) <= self.fixed:
            self.fixed.update(node.output)
            return
        if node.op_type in _LAYERS and len(node.input) > WEIGHT and node.input[WEIGHT] in self.fixed:
            self.channels[node.output[0]] = self._layer(node)
            return
        known = [self.channels[name] for name in node_reads(node) if name in self.channels]
        if not known:
            return
        found = known[0]
        if node.op_type == "BatchNormalization":
            for position in range(1, len(node.input)):
                self._follow(node, position, found, 0)
        elif node.op_type in _MEETING:
            for position, name in enumerate(node.input):
                if name in self.fixed:
                    self._follow(node, position, found, found.axis)
        elif node.op_type == "Concat":
            found = _concatenated(node, known)
        elif node.op_type not in _BY_CHANNEL:
            found = _unknown(known)
        if node.op_type in _MEETING and len({channels.axis for channels in known}) > 1:
            found = _unknown(known)
        self.channels.update({name: found for name in node.output if name})

    def _layer(self, node: onnx.NodeProto) -> _Channels:
        name = node_name(node)
        weight = self.graph.constant(node.input[WEIGHT], node, name)
        axis = 1 - weight.ndim if node.op_type == "Conv" else -1
        order = self.orders.get(name)
        if order is None:
            count = weight.shape[0 if node.op_type == "Conv" or transposed_weight(node) else -1]
            return _Channels(np.arange(count), axis, moved=False)
        self.reordered.add(name)
        outputs = order.outputs
        changed = orient_weight(order.apply(layer_weight(weight, node)), node, weight.shape)
        assert changed is not None
        replace_input(self.graph, node, WEIGHT, changed)
        if len(node.input) > _BIAS and node.input[_BIAS]:
            self._follow(node, _BIAS, _Channels(outputs, axis, moved=True), -1)
        return _Channels(outputs, axis, moved=not np.array_equal(outputs, np.arange(len(outputs))))

    def _follow(self, node: onnx.NodeProto, position: int, channels: _Channels, axis: int) -> None:
        """Bring a constant, whose channels lie on `axis`, to their order."""
        name = node_name(node)
        value = self.graph.constant(node.input[position], node, name)
        if not channels.moved or value.size == 1 or value.ndim < -axis:
            return
        source = channels.source
        if source is None or value.shape[axis] not in (1, len(source)):
            raise PlanError(
                f"node {name!r} ({node.op_type}) has values of its own for channels whose new order cannot be followed "
                "up to there; leave out --rearrange"
            )
        if value.shape[axis] > 1:
            replace_input(self.graph, node, position, np.take(value, source, axis))


def _concatenated(node: onnx.NodeProto, known: list[_Channels]) -> _Channels:
    axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
    sources = [channels.source for channels in known]
    if len(known) < len(node.input) or axis not in (1, known[0].axis) or any(source is None for source in sources):
        return _unknown(known)
    parts, start = [], 0
    for source in sources:
        assert source is not None
        parts.append(source + start)
        start += len(source)
    return _Channels(np.concatenate(parts), known[0].axis, any(channels.moved for channels in known))


def _unknown(known: list[_Channels]) -> _Channels:
    return _Channels(None, known[0].axis, any(channels.moved for channels in known))
