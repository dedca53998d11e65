"""What becomes of a layer's output: a batch norm, an addition, a ReLU. Tells which of its errors make a difference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from tvm_nm.onnx_network import LayerNode, OnnxNetwork

__all__ = ["Following", "what_follows"]

_BATCH_NORM_INPUTS = 5


@dataclass(frozen=True, slots=True)
class Following:
    """The output y of a layer becomes ``clip(scale * y + shift + other, low, high)``.

    Attributes
    ----------
    scale, shift
        Of a batch norm, (OC,).
    other
        Name of the tensor that is added, if it is there before the layer; None for none.
    low, high
        Of a ReLU or Clip; infinite where there is none.
    """

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    other: str | None = None
    low: float = -np.inf
    high: float = np.inf

    @property
    def clips(self) -> bool:
        """Whether there are outputs that make no difference."""
        return bool(np.isfinite(self.low) or np.isfinite(self.high))


def what_follows(network: OnnxNetwork, layer: LayerNode) -> Following:
    """Follow a layer's output for as long as nothing else reads it, up to a ReLU or Clip."""
    channels = layer.weight_shape[0]
    found = Following(np.ones(channels, np.float32), np.zeros(channels, np.float32))
    name = layer.output
    kept = {value.name for value in network.model.graph.output}
    while name not in kept:
        readers = [node for node in network.nodes if name in node.input]
        if len(readers) != 1:
            break
        node = readers[0]
        if node.op_type == "BatchNormalization" and found.other is None and layer.kind == "conv":
            norm = _batch_norm(network, node)
            if norm is None:
                break
            scale, shift = norm
            found = replace(found, scale=found.scale * scale, shift=found.shift * scale + shift)
        elif node.op_type == "Add" and found.other is None:
            others = [value for value in node.input if value != name]
            if len(others) != 1 or others[0] not in network.frontier(layer.position):
                break
            found = replace(found, other=others[0])
        elif node.op_type == "Relu":
            return replace(found, low=0.0)
        elif node.op_type == "Clip":
            limits = _limits(network, node)
            return found if limits is None else replace(found, low=limits[0], high=limits[1])
        elif node.op_type != "Identity":
            break
        name = node.output[0]
    return found


def _batch_norm(network: OnnxNetwork, node: onnx.NodeProto) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    values = [network.constant(name) for name in node.input[1:_BATCH_NORM_INPUTS]]
    if len(values) < _BATCH_NORM_INPUTS - 1 or any(value is None for value in values):
        return None
    gamma, beta, mean, variance = (np.asarray(value, np.float64).reshape(-1) for value in values)
    epsilon = next((helper.get_attribute_value(item) for item in node.attribute if item.name == "epsilon"), 1e-5)
    scale = gamma / np.sqrt(variance + epsilon)
    return scale.astype(np.float32), (beta - mean * scale).astype(np.float32)


def _limits(network: OnnxNetwork, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Limits of a Clip: attributes in old models, inputs in others; None where they are computed."""
    limits = {"min": -np.inf, "max": np.inf}
    limits.update({item.name: item.f for item in node.attribute if item.name in limits})
    for key, name in zip(limits, node.input[1:], strict=False):
        value = network.constant(name) if name else np.array(limits[key])
        if value is None or value.size != 1:
            return None
        limits[key] = float(value.reshape(-1)[0])
    return limits["min"], limits["max"]
