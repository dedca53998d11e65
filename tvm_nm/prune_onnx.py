"""Zeroes weights in an ONNX model, so that a plan can be fine-tuned or run elsewhere. Needs no TVM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tvm_nm.errors import PlanError, UnsupportedModelError
from tvm_nm.masks import BoolArray
from tvm_nm.plan import near_names

__all__ = ["prune_onnx"]

_WEIGHT = 1  # position of the weight among the inputs of Conv, Gemm and MatMul


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
    graph = _Graph(result)
    readers: dict[str, list[tuple[onnx.NodeProto, str]]] = {}
    for name in masks:
        node = graph.node(name)
        readers.setdefault(node.input[_WEIGHT], []).append((node, name))
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
                node.input[_WEIGHT] = own
        graph.drop_unused(weight_name)
    return result


class _Graph:
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
            name = node.name or next(iter(node.output), "")
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
                pending.extend(_node_reads(self._producers[current]))
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

    def add_initializer(self, like: str, value: NDArray[Any]) -> str:
        """Add an initialiser and return its name."""
        name, count = f"{like}_pruned", 1
        while name in self._taken:
            count += 1
            name = f"{like}_pruned_{count}"
        self._taken.add(name)
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
                inputs = list(_node_reads(producer))
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


def _orient(mask: BoolArray, node: onnx.NodeProto, name: str, shape: tuple[int, ...]) -> BoolArray:
    """Bring a mask of shape (OC, IC / groups, KH, KW) to the shape of the node's weight."""
    mask = np.asarray(mask, dtype=np.bool_)
    fitting: BoolArray | None = None
    if node.op_type == "Conv":
        if mask.shape == shape or (len(shape) == 3 and mask.shape == (*shape[:2], 1, shape[2])):
            fitting = mask.reshape(shape)
    elif len(shape) == 2 and mask.ndim == 4 and mask.shape[2:] == (1, 1):
        matrix = mask[:, :, 0, 0]
        transposed = node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)
        matrix = matrix if transposed else matrix.T
        fitting = matrix if matrix.shape == shape else None
    if fitting is None:
        raise PlanError(f"node {name!r}: a mask of shape {mask.shape} does not fit the weight of shape {shape}")
    return fitting


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _node_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs may take from outside included."""
    yield from (name for name in node.input if name)
    for graph in _subgraphs(node):
        yield from _reads(graph)


def _reads(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from _node_reads(node)
    yield from (value.name for value in graph.output)


def _all_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of all values in a graph and its subgraphs."""
    yield from (tensor.name for tensor in graph.initializer)
    yield from (value.name for value in graph.input)
    for node in graph.node:
        yield from (*node.input, *node.output)
        for inner in _subgraphs(node):
            yield from _all_names(inner)
