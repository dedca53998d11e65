"""From an ONNX model to a PyTorch module that can be trained, and back into the same ONNX graph."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import fx, nn

from tvm_nm.errors import PlanError, UnsupportedModelError
from tvm_nm.onnx_graph import WEIGHT, OnnxGraph, node_name, node_reads, transposed_weight
from tvm_nm.plan import near_names
from tvm_nm.torch.layers import make_convolution
from tvm_nm.torch.operators import OPERATORS, NodeReader

__all__ = ["TorchModel", "import_model"]

_BIAS = 2
_BATCH_NORM = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}


@dataclass(frozen=True, slots=True)
class _Slot:
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
        slots: Sequence[_Slot],
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
        by_value: dict[str, list[_Slot]] = defaultdict(list)
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

    def _value(self, slot: _Slot, old: NDArray[Any]) -> NDArray[Any]:
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


def import_model(model: onnx.ModelProto, outputs: Sequence[str] = ()) -> TorchModel:
    """Make a PyTorch module of an ONNX model.

    Parameters
    ----------
    model
        A float32 model with its weights loaded. It is not changed.
    outputs
        Names of further values that the module returns, behind the graph's outputs.

    Raises
    ------
    UnsupportedModelError
        If it has an operator that is not known here; names the node.
    """
    return _Importer(model).run(outputs)


class _Importer:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self._graph = model, OnnxGraph(model)
        self._fixed = {tensor.name for tensor in model.graph.initializer}
        self._fx, self._root = fx.Graph(), nn.Module()
        self._values: dict[str, Any] = {}
        self._arrays: dict[str, NDArray[Any]] = {}
        self._slots: list[_Slot] = []
        self._shared: dict[tuple[str, bool], Any] = {}
        self._paths: set[str] = set()
        self._layers: dict[str, str] = {}
        self._opset = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 17)

    def run(self, outputs: Sequence[str]) -> TorchModel:
        graph = self._model.graph
        inputs = [value for value in graph.input if value.name not in self._fixed]
        for value in inputs:
            self._values[value.name] = self._fx.placeholder(self._path(value.name))
        dims = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if inputs else []
        self._batch = dims[0] if dims and dims[0] > 0 else None
        for index, node in enumerate(graph.node):
            if set(node_reads(node)) <= self._fixed:
                self._fixed.update(node.output)
                continue
            self._node(index, node)
        wanted = [value.name for value in graph.output] + list(outputs)
        for name in wanted:
            if name not in self._values:
                raise UnsupportedModelError(f"the model has no value {name!r} that depends on its inputs")
        found = [self._values[name] for name in wanted]
        self._fx.output(found[0] if len(found) == 1 else tuple(found))
        self._fx.lint()
        module = fx.GraphModule(self._root, self._fx)
        counts: dict[str, int] = defaultdict(int)
        for node in graph.node:
            counts[node_name(node)] += 1
        layers = {name: path for name, path in self._layers.items() if counts[name] == 1}
        return TorchModel(self._model, module, layers, self._slots, tuple(dims[1:]))

    def _node(self, index: int, node: onnx.NodeProto) -> None:
        attributes = {item.name: _plain(onnx.helper.get_attribute_value(item)) for item in node.attribute}
        name = node_name(node)
        result = self._parametrised(index, node, attributes)
        if result is None:
            if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
                raise UnsupportedModelError(
                    "fine-tuning does not know this operator; export the model without it", node=name, op=node.op_type
                )
            constants = [self._array(value, node) if value in self._fixed else None for value in node.input]
            outputs = len(node.output)
            attributes["static_batch"] = self._batch
            reader = NodeReader(
                name,
                node.op_type,
                attributes,
                _Inputs(self, node),
                constants,
                lambda function, *args: self._fx.call_function(function, args),
                self._opset,
                outputs if node.op_type in ("Split", "MaxPool") else 1,
            )
            result = OPERATORS[node.op_type](reader)
        if len([output for output in node.output if output]) > 1:
            import operator

            for position, output in enumerate(node.output):
                self._values[output] = self._fx.call_function(operator.getitem, (result, position))
        else:
            self._values[node.output[0]] = result

    def _parametrised(self, index: int, node: onnx.NodeProto, attributes: dict[str, Any]) -> Any:
        """Value of a node that becomes a submodule; None for others."""
        constant = [value in self._fixed for value in node.input]
        if node.op_type == "Conv" and all(constant[WEIGHT:]):
            module = self._convolution(node, attributes)
        elif node.op_type == "BatchNormalization" and all(constant[WEIGHT:]):
            module = BatchNorm(
                len(self._array(node.input[1], node)),
                float(attributes.get("epsilon", 1e-5)),
                1 - float(attributes.get("momentum", 0.9)),
                device="meta",
            )
        elif node.op_type in ("Gemm", "MatMul") and all(constant[WEIGHT:]) and self._is_linear(node, attributes):
            shape = self._array(node.input[WEIGHT], node).shape
            outputs, inputs = shape if transposed_weight(node) else shape[::-1]
            module = nn.Linear(inputs, outputs, self._has_bias(node), device="meta")
        elif node.op_type == "Conv":
            raise UnsupportedModelError("its weight is not constant", node=node_name(node), op="Conv")
        else:
            return self._gemm(node, attributes) if node.op_type in ("Gemm", "MatMul") else None
        path = self._path(node_name(node))
        self._root.add_module(path, module)
        if node.op_type == "BatchNormalization":
            for position, key in _BATCH_NORM.items():
                self._fill(module, path, key, index, position)
            module.register_buffer("num_batches_tracked", torch.tensor(0))
        else:
            transposed = node.op_type != "Conv" and not transposed_weight(node)
            self._fill(module, path, "weight", index, WEIGHT, transposed)
            if self._has_bias(node):
                self._fill(module, path, "bias", index, _BIAS)
            self._layers[node_name(node)] = path
        return self._fx.call_module(path, (self._value(node.input[0], node),))

    def _fill(self, module: Any, path: str, key: str, index: int, position: int, transposed: bool = False) -> None:
        """Give a parameter or buffer of a module its values, and remember where they come from."""
        node = self._model.graph.node[index]
        value = node.input[position]
        array = self._array(value, node)
        array = array.T if transposed else array
        shape = tuple(getattr(module, key).shape)
        if array.size != int(np.prod(shape)):
            array = np.broadcast_to(array.reshape(-1), shape)
        tensor = torch.from_numpy(np.array(array.reshape(shape), np.float32, order="C"))
        if key.startswith("running"):
            module.register_buffer(key, tensor)
        else:
            shared = self._shared.get((value, transposed))
            if shared is None or shared.shape != shape:
                shared = nn.Parameter(tensor)
                self._shared[value, transposed] = shared
            setattr(module, key, shared)
        self._slots.append(_Slot(f"{path}.{key}", value, index, position, transposed))

    def _convolution(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Any:
        shape = self._array(node.input[WEIGHT], node).shape
        if len(shape) not in (3, 4):
            raise UnsupportedModelError("only 1-D and 2-D convolutions can be trained", node=node_name(node), op="Conv")
        axes = len(shape) - 2
        ones = (1,) * axes
        automatic = attributes.get("auto_pad", "NOTSET")
        pads: Any = tuple(attributes.get("pads", (0, 0) * axes))
        pads = automatic if automatic.startswith("SAME") else (0, 0) * axes if automatic == "VALID" else pads
        strides, dilations = tuple(attributes.get("strides", ones)), tuple(attributes.get("dilations", ones))
        return make_convolution(shape, int(attributes.get("group", 1)), strides, dilations, pads, self._has_bias(node))

    def _has_bias(self, node: onnx.NodeProto) -> bool:
        return len(node.input) > _BIAS and bool(node.input[_BIAS])

    def _is_linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> bool:
        plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
        return plain and not attributes.get("transA") and self._array(node.input[WEIGHT], node).ndim == 2

    def _gemm(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Any:
        """Value of a product that is no plain layer: nothing of it is trained."""
        values = [self._value(value, node) if value else None for value in node.input]
        if node.op_type == "MatMul":
            return self._fx.call_function(torch.matmul, (values[0], values[1]))
        flags = [bool(attributes.get(key)) for key in ("transA", "transB")]
        factors = [float(attributes.get(key, 1.0)) for key in ("alpha", "beta")]
        return self._fx.call_function(scaled_product, (*values, *([None] * (3 - len(values))), *flags, *factors))

    def _array(self, value: str, node: onnx.NodeProto) -> NDArray[Any]:
        if value not in self._arrays:
            self._arrays[value] = self._graph.constant(value, node, node_name(node))
        return self._arrays[value]

    def _value(self, value: str, node: onnx.NodeProto) -> Any:
        if value not in self._values:
            path = self._path(f"constant_{value}")
            self._root.register_buffer(path, torch.from_numpy(np.array(self._array(value, node), order="C")))
            self._values[value] = self._fx.get_attr(path)
        return self._values[value]

    def _path(self, name: str) -> str:
        stem = re.sub(r"\W+", "_", name).strip("_") or "value"
        stem = f"n{stem}" if stem[0].isdigit() else stem
        path, count = stem, 1
        while path in self._paths or hasattr(self._root, path):
            count += 1
            path = f"{stem}_{count}"
        self._paths.add(path)
        return path


class _Inputs(Sequence[Any]):
    """The inputs of a node as values of the FX graph; constants enter the graph only when they are asked for."""

    def __init__(self, importer: _Importer, node: onnx.NodeProto) -> None:
        self._importer, self._node = importer, node

    def __len__(self) -> int:
        return len(self._node.input)

    def __getitem__(self, position: Any) -> Any:
        name = self._node.input[position]
        return self._importer._value(name, self._node) if name else None

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))


def scaled_product(a: Any, b: Any, c: Any, transpose_a: bool, transpose_b: bool, alpha: float, beta: float) -> Any:
    """ONNX's Gemm in all generality."""
    product = alpha * ((a.T if transpose_a else a) @ (b.T if transpose_b else b))
    return product if c is None else product + beta * c


def _find(module: Any, path: str) -> Any:
    parent, _, key = path.rpartition(".")
    return getattr(module.get_submodule(parent), key)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


_Function = Callable[..., Any]
