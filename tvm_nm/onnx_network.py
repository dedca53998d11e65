"""An ONNX network that is run piece by piece, with weights of one's choice, by onnxruntime.

A *cut* at position p stands before the p-th node. The *frontier* of a cut is the set of tensors that cross it. What
lies between two cuts is a *segment*: a small ONNX model from one frontier to the next. Calibration walks through a
network this way, so that every node runs once however many layers are looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.onnx_graph import WEIGHT, OnnxGraph, node_name, node_reads, transposed_weight
from tvm_nm.onnx_segment import FloatArray, Segment

__all__ = ["LayerNode", "LayerWeights", "OnnxNetwork"]

_BIAS = 2
_LARGE = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The parameters of one layer.

    Attributes
    ----------
    weight
        float32 (OC, IC / groups, KH, KW); a fully connected layer's is (OUT, K, 1, 1).
    bias
        float32 (OC,).
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerNode:
    """A convolution or fully connected layer of an ONNX graph whose weight is constant.

    Attributes
    ----------
    name
        The node's name; for a node without one, the name of its first output.
    kind
        "conv" or "fc".
    position
        Where it stands among the nodes that run.
    data, output
        Names of the tensors that it reads and writes.
    groups, strides, dilation
        The convolution's, (vertical, horizontal).
    padding
        (top, left, bottom, right), or the ONNX name of an automatic padding.
    rank
        Axes of a convolution's input: 4, or 3 for a one-dimensional one, whose KH is 1.
    """

    name: str
    kind: Literal["conv", "fc"]
    position: int
    data: str
    output: str
    weight_shape: tuple[int, int, int, int]
    groups: int = 1
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] | str = (0, 0, 0, 0)
    rank: int = 4

    def pads(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the padding (top, left, bottom, right) for an input of that size."""
        if isinstance(self.padding, tuple):
            return self.padding
        total = []
        for size, kernel, stride, step in zip(
            (height, width), self.weight_shape[2:], self.strides, self.dilation, strict=True
        ):
            reach = (kernel - 1) * step + 1
            total.append(max(0, (-(-size // stride) - 1) * stride + reach - size))
        before = [t // 2 if self.padding == "SAME_UPPER" else t - t // 2 for t in total]
        return before[0], before[1], total[0] - before[0], total[1] - before[1]


class OnnxNetwork:
    """The nodes of a model's main graph in the order in which they run.

    Parameters
    ----------
    model
        A model with its weights loaded and one float32 input. It is not changed; its weights are not copied.

    Attributes
    ----------
    layers
        By name, the layers whose weights can be looked at and replaced.
    input, output
        Names of the graph's input and first output.

    Raises
    ------
    UnsupportedModelError
        If there is not exactly one input.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._graph = OnnxGraph(model)
        graph = model.graph
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        inputs = [value.name for value in graph.input if value.name not in self._initializers]
        if len(inputs) != 1:
            raise UnsupportedModelError(f"calibration needs a model with one input; this one has {len(inputs)}")
        self.input, self.output = inputs[0], graph.output[0].name
        self._makers: dict[str, onnx.NodeProto] = {}  # of values that depend on constants only
        fixed = set(self._initializers)
        self.nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            reads = set(node_reads(node))
            if reads <= fixed:
                fixed.update(node.output)
                self._makers.update({output: node for output in node.output if output})
            else:
                self.nodes.append(node)
        self._fixed = fixed
        self._weights: dict[str, LayerWeights] = {}
        counts = Counter(node_name(node) for node in self.nodes)
        self.layers = {
            layer.name: layer
            for position, node in enumerate(self.nodes)
            if counts[node_name(node)] == 1 and (layer := self._layer(node, position)) is not None
        }

    @property
    def end(self) -> int:
        """Position of the cut behind the last node."""
        return len(self.nodes)

    def weights(self, name: str) -> LayerWeights:
        """Return the layer's weights in the model as new arrays."""
        layer = self.layers[name]
        node = self.nodes[layer.position]
        weight = self._graph.constant(node.input[WEIGHT], node, name).astype(np.float32)
        if layer.kind == "fc":
            weight = weight if transposed_weight(node) else weight.T
        bias = np.zeros(layer.weight_shape[0], np.float32)
        if len(node.input) > _BIAS and node.input[_BIAS]:
            bias += self._graph.constant(node.input[_BIAS], node, name).astype(np.float32).reshape(-1)
        return LayerWeights(np.ascontiguousarray(weight).reshape(layer.weight_shape), bias)

    def constant(self, value: str) -> NDArray[Any] | None:
        """Return a value that depends on constants only; None for any other."""
        if value not in self._fixed:
            return None
        node = next(node for node in self.model.graph.node if value in node_reads(node))
        return self._graph.constant(value, node, node_name(node))

    def frontier(self, position: int) -> tuple[str, ...]:
        """Names of the tensors that cross the cut at `position`, the graph's outputs included."""
        made = {self.input}
        for node in self.nodes[:position]:
            made.update(output for output in node.output if output)
        needed = {value.name for value in self.model.graph.output}
        for node in self.nodes[position:]:
            needed.update(node_reads(node))
        return tuple(sorted(made & needed))

    def segment(
        self,
        start: int,
        stop: int,
        outputs: Sequence[str],
        weights: Mapping[str, LayerWeights] | None = None,
        threads: int | None = None,
    ) -> Segment:
        """Make the nodes from `start` up to, and without, `stop` runnable.

        Parameters
        ----------
        start, stop
            Cuts.
        outputs
            Tensors that are wanted; those made before `start` end up in `Segment.passed`.
        weights
            Weights to use instead of the model's, by layer name.
        threads
            Threads of onnxruntime; default: `default_threads`.
        """
        nodes: list[onnx.NodeProto] = []
        tensors: list[onnx.TensorProto] = []
        made: set[str] = set()
        weights = {**self._weights, **(weights or {})}
        for node in self.nodes[start:stop]:
            name = node_name(node)
            added = self._with_weights(node, weights[name], tensors) if name in weights else [node]
            nodes.extend(added)
            made.update(output for each in added for output in each.output)
        wanted = [name for name in outputs if name in made]
        nodes = _needed(nodes, wanted)
        reads = {name for node in nodes for name in node_reads(node)}
        read = reads - self._fixed - made
        own = {tensor.name for tensor in tensors}
        makers, constants = self._constants(reads & self._fixed - own)
        initializers, large = _large_apart([*constants, *tensors])
        graph = helper.make_graph(
            [*makers, *nodes],
            "segment",
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in sorted(read - own)],
            [onnx.ValueInfoProto(name=name) for name in wanted],
            initializers,
        )
        model = helper.make_model(
            graph,
            opset_imports=self.model.opset_import,
            functions=self.model.functions,
            ir_version=max(self.model.ir_version, 4),
        )
        passed = [name for name in outputs if name not in made]
        return Segment(model, large, sorted(read - own), wanted, passed, threads)

    def with_weights(self, weights: Mapping[str, LayerWeights]) -> OnnxNetwork:
        """Return the network with other weights; the arrays are shared, the model is not changed."""
        changed = OnnxNetwork.__new__(OnnxNetwork)
        changed.__dict__.update(self.__dict__)
        changed._weights = {**self._weights, **weights}
        return changed

    def run(self, images: NDArray[np.float32], threads: int | None = None) -> FloatArray:
        """Return the first output for a batch."""
        segment = self.segment(0, self.end, [self.output], threads=threads)
        return segment({self.input: images})[self.output]

    def _constants(self, names: Iterable[str]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Nodes and initialisers that constants are made of, in order."""
        pending, nodes, tensors = list(names), set(), {}
        while pending:
            name = pending.pop()
            if name in self._initializers:
                tensors[name] = self._initializers[name]
            elif (maker := self._makers[name]).output[0] not in nodes:
                nodes.add(maker.output[0])
                pending.extend(node_reads(maker))
        ordered = [node for node in self.model.graph.node if node.output and node.output[0] in nodes]
        return ordered, list(tensors.values())

    def _with_weights(
        self, node: onnx.NodeProto, weights: LayerWeights, tensors: list[onnx.TensorProto]
    ) -> list[onnx.NodeProto]:
        layer = self.layers[node_name(node)]
        shape = layer.weight_shape
        own = onnx.NodeProto()
        own.CopyFrom(node)
        weight: NDArray[Any] = weights.weight
        if layer.kind == "conv":
            weight = weight.reshape(shape if layer.rank == 4 else (*shape[:2], shape[3]))
        else:
            weight = weight.reshape(shape[:2])
            weight = weight if transposed_weight(node) else weight.T
        names = [f"{layer.output}/reconstructed_weight", f"{layer.output}/reconstructed_bias"]
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(weight, np.float32), names[0]))
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(weights.bias, np.float32), names[1]))
        own.ClearField("input")
        if node.op_type == "MatMul":  # has no bias, and takes data of any rank, which Gemm does not
            own.input.extend([layer.data, names[0]])
            own.output[0] = f"{layer.output}/product"
            return [own, helper.make_node("Add", [own.output[0], names[1]], [layer.output])]
        own.input.extend([layer.data, *names])
        return [own]

    def _layer(self, node: onnx.NodeProto, position: int) -> LayerNode | None:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) <= WEIGHT:
            return None
        if node.input[WEIGHT] not in self._fixed or any(name not in self._fixed for name in node.input[2:] if name):
            return None
        name, data, output = node_name(node), node.input[0], node.output[0]
        try:
            shape = self._graph.constant(node.input[WEIGHT], node, name).shape
        except UnsupportedModelError:
            return None
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type != "Conv":
            plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
            if len(shape) != 2 or not plain or attributes.get("transA"):
                return None
            outputs, inputs = shape if transposed_weight(node) else shape[::-1]
            return LayerNode(name, "fc", position, data, output, (outputs, inputs, 1, 1))
        if len(shape) not in (3, 4):
            return None
        flat = len(shape) == 3

        def pair(key: str) -> tuple[int, int]:
            values = attributes.get(key) or [1] * (len(shape) - 2)
            return (1, int(values[0])) if flat else (int(values[0]), int(values[1]))

        pads = [int(pad) for pad in attributes.get("pads", [0] * (2 * len(shape) - 4))]
        padding: tuple[int, int, int, int] | str = (0, pads[0], 0, pads[1]) if flat else (*pads[:2], *pads[2:])  # type: ignore[assignment]
        automatic = attributes.get("auto_pad", b"NOTSET").decode()
        if automatic.startswith("SAME"):
            padding = automatic
        elif automatic == "VALID":
            padding = (0, 0, 0, 0)
        kernel = (1, shape[2]) if flat else (shape[2], shape[3])
        layer = LayerNode(name, "conv", position, data, output, (shape[0], shape[1], *kernel))
        return replace(
            layer,
            groups=int(attributes.get("group", 1)),
            strides=pair("strides"),
            dilation=pair("dilations"),
            padding=padding,
            rank=len(shape),
        )


def _large_apart(tensors: Iterable[onnx.TensorProto]) -> tuple[list[onnx.TensorProto], dict[str, FloatArray]]:
    """Replace large weights by references; a model that holds them is copied whenever it is handed on."""
    kept, large = [], {}
    for tensor in tensors:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.raw_data) < _LARGE:
            kept.append(tensor)
            continue
        large[tensor.name] = numpy_helper.to_array(tensor)
        reference = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        reference.data_location = onnx.TensorProto.EXTERNAL
        reference.external_data.add(key="location", value="memory")
        kept.append(reference)
    return kept, large


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Nodes that the outputs depend on, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node_reads(node))
    return kept[::-1]
