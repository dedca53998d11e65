"""Zeroes weights in an ONNX model, so that a plan can be fine-tuned or run elsewhere. Needs no TVM."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from tvm_nm.errors import PlanError
from tvm_nm.masks import BoolArray
from tvm_nm.onnx_graph import WEIGHT, OnnxGraph, orient_weight

__all__ = ["prune_onnx"]


def prune_onnx(model: onnx.ModelProto, masks: Mapping[str, BoolArray], *, in_place: bool = False) -> onnx.ModelProto:
    """Zero the weights that masks drop, and change nothing else.

    A weight that something else reads too, or that is computed from other constants, is replaced by an initialiser of
    the node's own; nodes whose weight and mask are the same go on sharing it.

    Parameters
    ----------
    model
        An ONNX model with its weights loaded.
    masks
        By node name (for a node without one, the name of its first output), shape (OC, IC / groups, KH, KW), True
        where a weight is kept. A 1-D convolution's KH is 1; those of Gemm and MatMul are (OUT, K, 1, 1).
    in_place
        Change `model` instead of a copy, which saves the memory of all weights.

    Returns
    -------
    The pruned model.

    Raises
    ------
    PlanError
        If a mask names no Conv, Gemm or MatMul of the main graph, or does not fit its weight.
    UnsupportedModelError
        If a weight depends on the model's inputs or its data are not loaded.
    """
    result = model
    if not in_place:
        result = onnx.ModelProto()
        result.CopyFrom(model)
    graph = OnnxGraph(result)
    readers: dict[str, list[tuple[onnx.NodeProto, str]]] = {}
    for name in masks:
        node = graph.node(name)
        readers.setdefault(node.input[WEIGHT], []).append((node, name))
    for weight_name, nodes in readers.items():
        weight = graph.constant(weight_name, *nodes[0])
        variants: list[tuple[BoolArray, list[onnx.NodeProto]]] = []
        for node, name in nodes:
            mask = _orient(masks[name], node, name, weight.shape)
            same = next((sharing for other, sharing in variants if np.array_equal(other, mask)), None)
            if same is None:
                variants.append((mask, [node]))
            else:
                same.append(node)
        pruned = [np.where(mask, weight, np.zeros((), weight.dtype)) for mask, _ in variants]
        del weight  # as large as the pruned one
        if len(pruned) == 1 and graph.uses[weight_name] == len(nodes) and graph.can_overwrite(weight_name):
            graph.overwrite(weight_name, pruned)
            continue
        for value, (_, sharing) in zip(pruned, variants, strict=True):
            own = graph.add_initializer(weight_name, value)
            for node in sharing:
                graph.uses[weight_name] -= 1
                node.input[WEIGHT] = own
        graph.drop_unused(weight_name)
    return result


def _orient(mask: BoolArray, node: onnx.NodeProto, name: str, shape: tuple[int, ...]) -> BoolArray:
    """Bring a mask of shape (OC, IC / groups, KH, KW) to the shape of the node's weight."""
    fitting = orient_weight(np.asarray(mask, dtype=np.bool_), node, shape)
    if fitting is None:
        raise PlanError(f"node {name!r}: a mask of shape {mask.shape} does not fit the weight of shape {shape}")
    return fitting
