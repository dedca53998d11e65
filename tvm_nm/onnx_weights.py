"""Gives layers of an ONNX model other weights and biases. Needs no TVM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from numpy.typing import NDArray

from tvm_nm.errors import PlanError
from tvm_nm.onnx_graph import WEIGHT, OnnxGraph, orient_weight, transposed_weight
from tvm_nm.onnx_network import LayerWeights

__all__ = ["layer_weight", "replace_input", "replace_weights"]

_BIAS = 2


def replace_weights(model: onnx.ModelProto, weights: Mapping[str, LayerWeights]) -> None:
    """Replace the weights and biases of layers, in place, and change nothing else.

    A weight that somebody else reads too is left to them. A layer without a bias gets one where it is not zero: as an
    input, or, behind a MatMul, as an Add.

    Parameters
    ----------
    model
        An ONNX model with its weights loaded.
    weights
        By node name, see `tvm_nm.onnx_network.LayerNode`.

    Raises
    ------
    PlanError
        If there is no such Conv, Gemm or MatMul, or the weight does not fit.
    UnsupportedModelError
        If a weight is not constant.
    """
    graph = OnnxGraph(model)
    for name, new in weights.items():
        node = graph.node(name)
        old = graph.constant(node.input[WEIGHT], node, name)
        fitting = orient_weight(new.weight, node, old.shape)
        if fitting is None:
            raise PlanError(
                f"node {name!r}: a weight of shape {new.weight.shape} does not fit that of shape {old.shape}"
            )
        replace_input(graph, node, WEIGHT, fitting.astype(old.dtype))
        bias = new.bias.astype(old.dtype)
        if len(node.input) > _BIAS and node.input[_BIAS]:
            given = graph.constant(node.input[_BIAS], node, name)
            replace_input(graph, node, _BIAS, bias.reshape(given.shape) if given.size == bias.size else bias)
        elif bias.any():
            _add_bias(graph, node, bias)


def layer_weight(weight: NDArray[Any], node: onnx.NodeProto) -> NDArray[Any]:
    """Bring a Conv's, Gemm's or MatMul's weight to (OC, IC / groups, KH, KW); undone by `orient_weight`."""
    if node.op_type == "Conv":
        return weight if weight.ndim == 4 else weight[:, :, None]
    matrix = weight if transposed_weight(node) else weight.T
    return matrix[:, :, None, None]


def replace_input(graph: OnnxGraph, node: onnx.NodeProto, position: int, value: NDArray[Any]) -> None:
    """Give a node another constant; what others read too is left to them."""
    name = node.input[position]
    if graph.uses[name] == 1 and graph.can_overwrite(name):
        graph.overwrite(name, [value])
        return
    node.input[position] = graph.add_initializer(name, value)
    graph.uses[node.input[position]] += 1
    graph.uses[name] -= 1
    graph.drop_unused(name)


def _add_bias(graph: OnnxGraph, node: onnx.NodeProto, bias: NDArray[Any]) -> None:
    own = graph.add_initializer(f"{node.output[0]}_bias", bias)
    graph.uses[own] += 1
    if node.op_type != "MatMul":
        while len(node.input) < _BIAS:
            node.input.append("")
        del node.input[_BIAS:]
        node.input.append(own)
        return
    output, product = node.output[0], graph.new_name(f"{node.output[0]}_product")
    nodes = graph.graph.node
    position = next(index for index, other in enumerate(nodes) if other.output and other.output[0] == output)
    node.output[0] = product
    nodes.insert(
        position + 1, onnx.helper.make_node("Add", [product, own], [output], name=graph.new_name(f"{product}/Add"))
    )
