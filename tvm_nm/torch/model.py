"""An ONNX model as a PyTorch module, and its way back into the same ONNX graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import fx, nn

from tvm_nm.errors import PlanError
from tvm_nm.onnx_graph import OnnxGraph, node_name
from tvm_nm.plan import near_names

__all__ = ["BatchNorm", "Slot", "TorchModel"]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter of the module comes from in the ONNX graph, and goes back to."""

    path: str
    value: str
    node: int
    position: int
    transposed: bool = False


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of any rank: over the batch while training, else by the running statistics."""

    def _check_input_dim(self, input: Any) -> None:  # noqa: A002
        """Take any rank."""


class TorchModel:
    """An ONNX model as a PyTorch module.

    Convolutions, fully connected layers and batch norms become submodules with parameters; other constants are fixed.
    A model whose batch norms were folded is trained as it is, by weights and biases; where they were kept they use
    batch statistics in training mode and follow them.

    Attributes
    ----------
    module
        A `torch.fx.GraphModule` from the graph's inputs to its output, or to a tuple of outputs.
    layers
        The submodule's path of each layer with a weight, by the name of its ONNX node.
    shape
        (C, H, W) of the first input; 0 for symbolic axes.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        module: fx.GraphModule,
        layers: dict[str, str],
        slots: Sequence[Slot],
        shape: tuple[int, ...],
    ) -> None:
        self.module, self.layers, self.shape = module, layers, shape
        self._model, self._slots = model, tuple(slots)
        self._norms: dict[str, str] = {}  # of a convolution's submodule, the batch norm that was put behind it

    def layer(self, name: str) -> Any:
        """Return the submodule of a layer.

        Raises
        ------
        PlanError
            If there is no such layer.
        """
        if name not in self.layers:
            raise PlanError(f"the model has no layer {name!r}; {near_names(name, self.layers)}")
        return self.module.get_submodule(self.layers[name])

    def weight(self, name: str) -> NDArray[np.float32]:
        """Return a layer's weight, as it goes to ONNX, as a new array of shape (OC, IC / groups, KH, KW)."""
        path = self.layers.get(name, "")
        weight = self.layer(name).weight.detach()
        return self.as_layer(self._folded(path, weight).float().cpu().numpy().copy())

    def add_norm(self, path: str, norm: Any) -> str:
        """Add a batch norm to be folded into the convolution at `path` on the way back; return its path."""
        self._norms[path] = f"{path}_norm"
        self.module.add_submodule(self._norms[path], norm)
        return self._norms[path]

    def as_layer(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Bring a weight of PyTorch's shape to (OC, IC / groups, KH, KW)."""
        if weight.ndim == 4:
            return weight
        return weight.reshape(*weight.shape[:2], 1, weight.shape[2] if weight.ndim == 3 else 1)

    def to_onnx(self) -> onnx.ModelProto:
        """Return the ONNX model with the module's present parameters: graph, names and shapes are the model's own.

        A weight that two nodes share in different ways becomes one for each.
        """
        result = onnx.ModelProto()
        result.CopyFrom(self._model)
        graph = OnnxGraph(result)
        nodes = list(result.graph.node)
        by_value: dict[str, list[Slot]] = defaultdict(list)
        for slot in self._slots:
            by_value[slot.value].append(slot)
        for value, slots in by_value.items():
            tensors = {id(_find(self.module, slot.path)) for slot in slots}
            old = graph.constant(value, nodes[slots[0].node], node_name(nodes[slots[0].node]))
            if len(tensors) == 1 and graph.uses[value] == len(slots) and graph.can_overwrite(value):
                graph.overwrite(value, [self._value(slots[0], old)])
                continue
            for slot in slots:
                own = graph.add_initializer(value, self._value(slot, old))
                nodes[slot.node].input[slot.position] = own
                graph.uses[own] += 1
                graph.uses[value] -= 1
            graph.drop_unused(value)
        return result

    def _value(self, slot: Slot, old: NDArray[Any]) -> NDArray[Any]:
        path, _, key = slot.path.rpartition(".")
        tensor = _find(self.module, slot.path)
        if path in self._norms:
            tensor = self._folded(path, tensor) if key == "weight" else self._folded_bias(path)
        found = tensor.detach().float().cpu().numpy().astype(old.dtype)
        found = found.T if slot.transposed else found
        return np.ascontiguousarray(found.reshape(old.shape) if found.size == old.size else found)

    def _folded(self, path: str, weight: Any) -> Any:
        """Scale a weight by the batch norm behind it, if one was put there."""
        if path not in self._norms:
            return weight
        norm = self.module.get_submodule(self._norms[path])
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        return weight.detach() * scale.reshape(-1, *[1] * (weight.dim() - 1))

    def _folded_bias(self, path: str) -> Any:
        norm = self.module.get_submodule(self._norms[path])
        return norm.bias.detach() - norm.running_mean * norm.weight.detach() / (norm.running_var + norm.eps).sqrt()


def _find(module: Any, path: str) -> Any:
    parent, _, key = path.rpartition(".")
    return getattr(module.get_submodule(parent), key)
