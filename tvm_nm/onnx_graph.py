"""The main graph of an ONNX model, edited in place: find layers, compute constants, replace weights. Needs no TVM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tvm_nm.errors import PlanError, UnsupportedModelError
from tvm_nm.plan import near_names

__all__ = ["WEIGHT", "OnnxGraph", "node_name", "node_reads", "orient_weight", "transposed_weight"]

WEIGHT = 1
"""Position of the weight among the inputs of Conv, Gemm and MatMul."""


def node_name(node: onnx.NodeProto) -> str:
    """Name of a node; for a node without one, that of its first output."""
    return node.name or next(iter(node.output), "")


class OnnxGraph:
    """The main graph of a model, changed in place.

    Attributes
    ----------
    uses
        How often each value is read, as an output of the graph or in subgraphs too.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        self.uses = Counter(_reads(self.graph))
        self._nodes: dict[str, onnx.NodeProto] = {}
        self._doubled: set[str] = set()
        for node in self.graph.node:
            name = node_name(node)
            if name in self._nodes:
                self._doubled.add(name)
            self._nodes[name] = node
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self._producers = {output: node for node in self.graph.node for output in node.output if output}
        self._taken = set(_all_names(self.graph))

    def node(self, name: str) -> onnx.NodeProto:
        """Return the Conv, Gemm or MatMul of that name."""
        node = self._nodes.get(name)
        if node is None:
            raise PlanError(f"the ONNX model has no node {name!r}; {near_names(name, self._nodes)}")
        if name in self._doubled:
            raise PlanError(f"the ONNX model has several nodes named {name!r}; give them names of their own")
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            raise PlanError(f"node {name!r} is a {node.op_type}; only Conv, Gemm and MatMul can be pruned")
        return node

    def constant(self, value: str, node: onnx.NodeProto, name: str) -> NDArray[Any]:
        """Return a value that depends on constants only; `node` reads it and is called `name` in errors."""
        tensors: dict[str, onnx.TensorProto] = {}
        needed: set[str] = set()
        pending = [value]
        while pending:
            current = pending.pop()
            if current in self._initializers:
                tensors[current] = self._initializers[current]
                if tensors[current].data_location == onnx.TensorProto.EXTERNAL:
                    raise _unsupported(
                        f"the data of {current!r} are in another file; load the model with its external data",
                        node,
                        name,
                    )
            elif current not in self._producers:
                raise _unsupported(
                    f"its weight {value!r} depends on {current!r}, which is no constant; leave it out of the plan",
                    node,
                    name,
                )
            elif current not in needed:
                needed.update(self._producers[current].output)
                pending.extend(node_reads(self._producers[current]))
        if value in tensors:
            found: NDArray[Any] = numpy_helper.to_array(tensors[value])
            return found
        nodes = [other for other in self.graph.node if needed.intersection(other.output)]
        output = onnx.helper.make_empty_tensor_value_info(value)
        part = onnx.helper.make_graph(nodes, "weight", [], [output], list(tensors.values()))
        program = onnx.helper.make_model(part, opset_imports=self.model.opset_import, functions=self.model.functions)
        try:
            return np.asarray(ReferenceEvaluator(program).run([value], {})[0])
        except Exception as error:  # the evaluator raises whatever the operator's NumPy code does
            raise _unsupported(
                f"its weight {value!r} cannot be computed ({error}); fold the model's constants first", node, name
            ) from error

    def can_overwrite(self, name: str) -> bool:
        """Whether `name` is an initialiser or the output of a Constant node."""
        producer = self._producers.get(name)
        return name in self._initializers or (producer is not None and producer.op_type == "Constant")

    def overwrite(self, name: str, values: list[NDArray[Any]]) -> None:
        """Give an initialiser or a Constant node the one value of a list, which is taken from it."""
        if name in self._initializers:
            # Not through a tensor of its own, and of the value only its bytes: each is a copy of up to 400 MB.
            tensor = self._initializers[name]
            element = tensor.data_type
            tensor.Clear()
            tensor.name, tensor.data_type = name, element
            value = values.pop()
            tensor.dims.extend(value.shape)
            data = value.tobytes()
            del value
            tensor.raw_data = data
        else:
            producer = self._producers[name]
            del producer.attribute[:]
            tensor = numpy_helper.from_array(np.ascontiguousarray(values.pop()), name)
            producer.attribute.append(onnx.helper.make_attribute("value", tensor))

    def new_name(self, stem: str) -> str:
        """Return a name that nothing in the model has yet."""
        name, count = stem, 1
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name

    def add_initializer(self, like: str, value: NDArray[Any]) -> str:
        """Add an initialiser and return its name."""
        name = self.new_name(f"{like}_pruned")
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        if self.model.ir_version < 4:  # such models list their initialisers as inputs
            element = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            self.graph.input.append(onnx.helper.make_tensor_value_info(name, element, value.shape))
        return name

    def drop_unused(self, value: str) -> None:
        """Remove a constant, and those it was computed from, as far as nothing reads them any more."""
        pending = [value]
        while pending:
            name = pending.pop()
            producer = self._producers.get(name)
            if self.uses[name]:
                continue
            if self._initializers.pop(name, None) is not None:
                _delete(self.graph.initializer, [tensor.name == name for tensor in self.graph.initializer])
                _delete(self.graph.input, [listed.name == name for listed in self.graph.input])
            elif producer is not None and not any(self.uses[output] for output in producer.output):
                for output in producer.output:
                    self._producers.pop(output, None)
                inputs = list(node_reads(producer))
                _delete(self.graph.node, [name in other.output for other in self.graph.node])
                self.uses.subtract(inputs)
                pending.extend(inputs)


def _delete(items: Any, unwanted: list[bool]) -> None:
    """Delete the marked items of a repeated protobuf field in place."""
    for index in reversed(range(len(unwanted))):
        if unwanted[index]:
            del items[index]


def _unsupported(reason: str, node: onnx.NodeProto, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(reason, node=name, op=node.op_type)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def node_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs may take from outside included."""
    yield from (name for name in node.input if name)
    for graph in _subgraphs(node):
        yield from _reads(graph)


def _reads(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node_reads(node)
    yield from (value.name for value in graph.output)


def _all_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of all values in a graph and its subgraphs."""
    yield from (tensor.name for tensor in graph.initializer)
    yield from (value.name for value in graph.input)
    for node in graph.node:
        yield from (*node.input, *node.output)
        for inner in _subgraphs(node):
            yield from _all_names(inner)


def transposed_weight(node: onnx.NodeProto) -> bool:
    """Whether the weight of a Gemm or MatMul is (OUT, K) instead of (K, OUT)."""
    return node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)


def orient_weight(array: NDArray[Any], node: onnx.NodeProto, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """Bring an array of shape (OC, IC / groups, KH, KW) to the shape of a node's weight; None where it does not fit."""
    if node.op_type == "Conv":
        if array.shape == shape or (len(shape) == 3 and array.shape == (*shape[:2], 1, shape[2])):
            return array.reshape(shape)
    elif len(shape) == 2 and array.ndim == 4 and array.shape[2:] == (1, 1):
        matrix = array[:, :, 0, 0]
        matrix = matrix if transposed_weight(node) else matrix.T
        return matrix if matrix.shape == shape else None
    return None
