"""A network whose layers can be given other weights at each call, run by onnxruntime.

The weights of the layers are inputs of the graph rather than constants in it: one session serves every perturbation of
the network, and nothing is copied but what changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.patterns import Dense, SparsityPattern
from tvm_nm.schedules.machine import usable_threads

__all__ = ["LayerParameters", "MagnitudeWeights", "PerturbedNetwork", "WeightSource", "kl_divergence"]

_log = logging.getLogger(__name__)

_WEIGHT, _BIAS = 1, 2
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """What a layer computes with.

    Attributes
    ----------
    weight
        float32 (OC, IC / groups, KH, KW); a fully connected layer's is (OUT, K, 1, 1). As in the ONNX model: batch
        norms that follow are not folded into it.
    bias
        float32 (OC,); None leaves the model's.
    """

    weight: Floats
    bias: Floats | None = None


class WeightSource(Protocol):
    """Where the parameters of pruned layers come from: magnitude pruning, or a database of reconstructed layers."""

    def parameters(self, layer: str, pattern: SparsityPattern, density: float) -> LayerParameters:
        """Return the parameters of a layer pruned to a pattern and density; not called for `Dense`."""
        ...


@dataclass(frozen=True, slots=True)
class _Node:
    """A layer in the graph: the graph inputs that its weight and bias became, and how its weight lies in the model."""

    node: onnx.NodeProto
    weight_input: str
    bias_input: str | None
    weight: Floats
    bias: Floats | None
    transposed: bool

    def from_layer(self, weight: Floats) -> Floats:
        """Bring a weight of shape (OC, IC / groups, KH, KW) to the model's shape."""
        if self.node.op_type != "Conv":
            matrix = weight.reshape(weight.shape[:2])
            weight = matrix if self.transposed else matrix.T
        return np.ascontiguousarray(weight.reshape(self.weight.shape), np.float32)

    def to_layer(self) -> Floats:
        """Bring the model's weight to (OC, IC / groups, KH, KW)."""
        if self.node.op_type == "Conv":
            shape = self.weight.shape if self.weight.ndim == 4 else (*self.weight.shape[:2], 1, self.weight.shape[2])
            return self.weight.reshape(shape)
        matrix = self.weight if self.transposed else self.weight.T
        return np.ascontiguousarray(matrix)[:, :, None, None]


class PerturbedNetwork:
    """A model with one input whose layers can be given other weights.

    Parameters
    ----------
    model
        A model with its weights loaded. It is changed.
    layers
        Names of the layers to make replaceable; those whose weight is no plain constant are left out, see `layers`.
    threads
        Threads of onnxruntime; default: the processors that this process may use.

    Attributes
    ----------
    layers
        Names of the layers that can be replaced.

    Raises
    ------
    UnsupportedModelError
        If the model has more than one input, or onnxruntime cannot load it.
    """

    def __init__(self, model: onnx.ModelProto, layers: Iterable[str], threads: int | None = None) -> None:
        import onnxruntime as ort  # only here: `tvm-nm --help` need not wait for it

        graph = model.graph
        constants = _constants(graph)
        inputs = [value for value in graph.input if value.name not in constants]
        if len(inputs) != 1:
            raise UnsupportedModelError(f"calibration needs a model with one input; this one has {len(inputs)}")
        self._input, self._output = inputs[0].name, graph.output[0].name
        wanted = set(layers)
        self._nodes: dict[str, _Node] = {}
        for node in graph.node:
            name = node.name or next(iter(node.output), "")
            if name in wanted and (found := _replaceable(node, constants, graph)) is not None:
                self._nodes[name] = found
        self.layers = tuple(self._nodes)
        if missing := wanted - self._nodes.keys():
            _log.info("no plain constant weight, not calibrated: %s", ", ".join(sorted(missing)))
        _free_batch(graph, inputs[0])
        known = {value.name for value in graph.output}
        graph.output.extend(
            onnx.ValueInfoProto(name=name)
            for name in dict.fromkeys(found.node.input[0] for found in self._nodes.values())
            if name not in known and name != self._input
        )
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads or usable_threads()
        self._options.log_severity_level = 4
        self._model_opset = model.opset_import
        self._session = self._load(model)
        self._feed = {found.weight_input: found.weight for found in self._nodes.values()}
        self._feed.update(
            {
                found.bias_input: found.bias
                for found in self._nodes.values()
                if found.bias_input and found.bias is not None
            }
        )
        self._batched: bool | None = None

    def weight(self, layer: str) -> Floats:
        """Return a layer's weight in the model, (OC, IC / groups, KH, KW)."""
        return self._nodes[layer].to_layer()

    def parameters(self, layer: str) -> LayerParameters:
        """Return a layer's weight and bias in the model; the bias is None where the layer can have none."""
        return LayerParameters(self.weight(layer), self._nodes[layer].bias)

    def run(self, images: Floats, changed: Mapping[str, LayerParameters] | None = None) -> NDArray[np.float64]:
        """Return the answers for a batch, (N, classes), with other parameters in some layers."""
        feed = dict(self._feed)
        for name, parameters in (changed or {}).items():
            found = self._nodes[name]
            feed[found.weight_input] = found.from_layer(parameters.weight)
            if parameters.bias is not None and found.bias_input is not None:
                feed[found.bias_input] = np.ascontiguousarray(parameters.bias, np.float32)
        (answers,) = self._run(images, feed, [self._output])
        return answers.reshape(len(images), -1).astype(np.float64)

    def layer_inputs(self, images: Floats) -> dict[str, Floats]:
        """Return what every layer reads, by layer name."""
        names = {name: found.node.input[0] for name, found in self._nodes.items()}
        tensors = [name for name in dict.fromkeys(names.values()) if name != self._input]
        values = dict(zip(tensors, self._run(images, self._feed, tensors), strict=True))
        values[self._input] = images
        return {name: values[tensor] for name, tensor in names.items()}

    def layer_runner(self, layer: str) -> Any:
        """Return a function of (input, weight in the layer's shape) that computes the layer without its bias."""
        found = self._nodes[layer]
        node = onnx.NodeProto()
        node.CopyFrom(found.node)
        del node.input[:]
        node.input.extend(["x", "w"])
        node.output[0] = "y"
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "w", "y")]
        part = helper.make_graph([node], "layer", values[:2], values[2:])
        model = helper.make_model(part, opset_imports=self._model_opset, ir_version=8)
        session = self._load(model)

        def run(data: Floats, weight: Floats) -> Floats:
            output: Floats = session.run(["y"], {"x": data, "w": found.from_layer(weight)})[0]
            return output

        return run

    def _load(self, model: onnx.ModelProto) -> Any:
        import onnxruntime as ort

        try:
            return ort.InferenceSession(
                model.SerializeToString(),
                self._options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers={"Pad_Fusion"},  # wrong in onnxruntime 1.31 where padded values are negative
            )
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise UnsupportedModelError(f"onnxruntime cannot load the model: {_one_line(error)}") from error

    def _run(self, images: Floats, feed: Mapping[str, Floats], outputs: list[str]) -> list[NDArray[Any]]:
        images = np.ascontiguousarray(images, np.float32)
        try:
            if self._batched is None and len(images) > 1:
                self._batched = self._can_batch(images, feed)
            if self._batched or len(images) == 1:
                return [np.asarray(value) for value in self._session.run(outputs, {**feed, self._input: images})]
            rows = [self._session.run(outputs, {**feed, self._input: images[i : i + 1]}) for i in range(len(images))]
        except Exception as error:
            raise UnsupportedModelError(f"onnxruntime cannot run the model: {_one_line(error)}") from error
        return [np.concatenate(values) for values in zip(*rows, strict=True)]

    def _can_batch(self, images: Floats, feed: Mapping[str, Floats]) -> bool:
        """Try whether the model takes several images at once: it may have its batch size in a constant."""
        try:
            both = self._session.run([self._output], {**feed, self._input: images[:2]})[0]
        except Exception:  # whatever onnxruntime raises, one by one is the remedy
            return False
        alone = self._session.run([self._output], {**feed, self._input: images[1:2]})[0]
        return both.shape[0] == 2 and np.allclose(both[1], alone[0], rtol=1e-3, atol=1e-4)


class MagnitudeWeights:
    """Parameters of layers pruned by magnitude, without any refitting.

    Parameters
    ----------
    network
        The dense network.
    weights
        Weights that are ranked, by layer name: those of the canonical module, with batch norms folded in.
    groups
        Groups by layer name; 1 where a name is missing.
    """

    def __init__(
        self, network: PerturbedNetwork, weights: Mapping[str, NDArray[Any]], groups: Mapping[str, int]
    ) -> None:
        self._network, self._weights, self._groups = network, weights, groups

    def parameters(self, layer: str, pattern: SparsityPattern, density: float) -> LayerParameters:
        """Return the layer's weight with zeros in it."""
        weight = self._network.weight(layer)
        if isinstance(pattern, Dense):
            return LayerParameters(weight)
        mask = pattern.mask(np.abs(self._weights[layer]), density, self._groups.get(layer, 1))
        return LayerParameters(np.where(mask.reshape(weight.shape), weight, np.float32(0)))


def kl_divergence(dense: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the mean Kullback-Leibler divergence of answers from the dense network's, in nats.

    Parameters
    ----------
    dense, other
        Logits or probabilities, (N, classes).
    """
    first, second = _log_softmax(dense), _log_softmax(other)
    return max(0.0, float((np.exp(first) * (first - second)).sum(axis=1).mean()))


def _log_softmax(answers: NDArray[np.float64]) -> NDArray[np.float64]:
    if answers.min() >= 0 and np.allclose(answers.sum(axis=1), 1, atol=1e-3):
        logs: NDArray[np.float64] = np.log(np.maximum(answers, 1e-12))  # probabilities already
        return logs
    shifted = answers - answers.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def _replaceable(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], graph: onnx.GraphProto
) -> _Node | None:
    """Turn a layer's weight and bias into inputs of the graph; None where they are no plain constants."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) <= _WEIGHT:
        return None
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    names = [node.input[_WEIGHT], *(name for name in node.input[_BIAS:] if name)]
    if any(name not in constants for name in names) or attributes.get("transA"):
        return None
    weight = numpy_helper.to_array(constants[names[0]]).astype(np.float32)
    transposed = bool(attributes.get("transB"))
    if node.op_type != "Conv" and (
        weight.ndim != 2 or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1
    ):
        return None
    channels = weight.shape[1] if node.op_type != "Conv" and not transposed else weight.shape[0]
    weight_input, bias_input, bias = f"{node.output[0]}/weight", None, None
    if node.op_type != "MatMul":
        bias = np.zeros(channels, np.float32)
        if len(names) > 1:
            bias = bias + numpy_helper.to_array(constants[names[1]]).astype(np.float32).reshape(-1)
        bias_input = f"{node.output[0]}/bias"
    data = node.input[0]
    del node.input[:]
    node.input.extend([data, weight_input, *([bias_input] if bias_input else [])])
    graph.input.append(helper.make_tensor_value_info(weight_input, TensorProto.FLOAT, weight.shape))
    if bias_input:
        graph.input.append(helper.make_tensor_value_info(bias_input, TensorProto.FLOAT, [channels]))
    return _Node(node, weight_input, bias_input, weight, bias, transposed)


def _free_batch(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> None:
    """Let the first axis of the input be anything."""
    shape = value.type.tensor_type.shape
    if shape.dim:
        shape.dim[0].Clear()
        shape.dim[0].dim_param = "batch"
    for output in graph.output:
        for dim in output.type.tensor_type.shape.dim:
            dim.Clear()
    del graph.value_info[:]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
