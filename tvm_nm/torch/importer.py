"""From an ONNX model to a PyTorch module that can be trained, and back into the same ONNX graph."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import fx, nn

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.onnx_graph import WEIGHT, OnnxGraph, node_name, node_reads, transposed_weight
from tvm_nm.torch.layers import make_convolution
from tvm_nm.torch.model import BatchNorm, Slot, TorchModel
from tvm_nm.torch.operators import OPERATORS, NodeReader

__all__ = ["import_model"]

_BIAS = 2
_BATCH_NORM = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}


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
        self._slots: list[Slot] = []
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
        if node.op_type == "Split":
            for position, output in enumerate(node.output):
                self._values[output] = self._fx.call_function(operator.getitem, (result, position))
        else:  # other outputs, such as a dropout's mask, are of no use here
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
        self._slots.append(Slot(f"{path}.{key}", value, index, position, transposed))

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


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
