"""Models for tests: real ones from files, the onnx wheel's with weights filled in, and small ones built on the spot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "models"
LIGHT_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
LIGHT = (
    *("bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19"),
    "zfnet512",
)
SHARED_NAMES = ("resnet20_cifar10", "resnet32_cifar10", "squeezenet1.1_imagenet")
LARGE_NAMES = ("mobilenet_v2", "mobilenet_v2_bn", "resnet50", "resnet50_bn", "vgg16", "vgg16_bn")


def shared_model(name: str) -> Path:
    """A model file from the folder beside the repository; skips where there is none."""
    path = SHARED / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def large_model(name: str) -> Path:
    """A model file from the folder that TVM_NM_MODELS names; skips where there is none."""
    folder = os.environ.get("TVM_NM_MODELS")
    if not folder or not (Path(folder) / f"{name}.onnx").is_file():
        pytest.skip(f"TVM_NM_MODELS names no folder with {name}.onnx")
    return Path(folder) / f"{name}.onnx"


def light_file(name: str) -> Path:
    """The onnx wheel's model as it is: weights are ConstantOfShape nodes."""
    return LIGHT_FOLDER / f"light_{name}.onnx"


def light_model(name: str, seed: int = 0) -> onnx.ModelProto:
    """The onnx wheel's model with random weights that keep the activations' scale, up to the logits.

    Its softmax is cut off: with random weights one class takes all, which hides differences.
    """
    model = onnx.load(light_file(name))
    graph = model.graph
    rng = np.random.default_rng(seed)
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    roles = {i: (n.op_type, index) for n in graph.node for index, i in enumerate(n.input)}
    sizes = {n.output[0]: tuple(given[n.input[0]]) for n in graph.node if n.op_type == "ConstantOfShape"}
    arrays: dict[str, np.ndarray] = {}
    for value, (op, index) in roles.items():
        shape = sizes.get(value) or (given[value].shape if value in given else None)
        if shape is None:
            continue
        if value in given and op != "BatchNormalization":
            arrays[value] = given[value]
        else:
            arrays[value] = _weight(rng, tuple(int(d) for d in shape), op, index)
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    inputs = [i for i in graph.input if i.name not in arrays and i.name in roles]
    outputs = list(graph.output)
    if nodes[-1].op_type == "Softmax":
        outputs = [helper.make_tensor_value_info(nodes.pop().input[0], TensorProto.FLOAT, None)]
    new = helper.make_graph(nodes, name, inputs, outputs, [numpy_helper.from_array(a, n) for n, a in arrays.items()])
    return helper.make_model(new, opset_imports=list(model.opset_import), ir_version=8)


def _weight(rng: np.random.Generator, shape: tuple[int, ...], op: str, index: int) -> np.ndarray:
    if len(shape) > 1:
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    if op == "BatchNormalization" and index in (1, 4):  # scale and variance
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (rng.standard_normal(shape) * 0.05).astype(np.float32)


class Net:
    """Build a model node by node.

    >>> net = Net((1, 3, 8, 8))
    >>> x = net.conv("input", 4, 3, pads=[1, 1, 1, 1])
    >>> model = net.model(net.add("Relu", x))
    """

    def __init__(self, shape: Sequence[int | str] = (1, 4, 8, 8), seed: int = 0, opset: int = 17) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))]
        self._count = 0

    def weight(self, *shape: int, scale: float = 1.0, low: float | None = None) -> str:
        """A random initializer: normal, or uniform from `low` to `low` + 1."""
        array = self.rng.standard_normal(shape) * scale if low is None else self.rng.uniform(low, low + 1, shape)
        return self.constant(array.astype(np.float32))

    def constant(self, array: Any) -> str:
        """An initializer with the given values."""
        self._count += 1
        name = f"w{self._count}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """A node; returns its first output."""
        self._count += 1
        names = [f"{op.lower()}{self._count}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"/{names[0]}/{op}", **attributes))
        return names[0]

    def conv(self, x: str, shape: Sequence[int], *, bias: bool = True, **attributes: Any) -> str:
        """A convolution with a random weight of `shape` (OC, IC / groups, *kernel)."""
        fan_in = int(np.prod(shape[1:]))
        names = [self.weight(*shape, scale=(2 / fan_in) ** 0.5)]
        if bias:
            names.append(self.weight(shape[0]))
        return self.add("Conv", x, *names, **attributes)

    def batch_norm(self, x: str, channels: int, **attributes: Any) -> str:
        """A batch norm with random parameters."""
        names = [self.weight(channels, low=0.5), self.weight(channels), self.weight(channels)]
        return self.add("BatchNormalization", x, *names, self.weight(channels, low=0.5), **attributes)

    def fc(self, x: str, inputs: int, outputs: int, **attributes: Any) -> str:
        """A Gemm with transposed weight and bias, as PyTorch exports it."""
        names = [self.weight(outputs, inputs, scale=inputs**-0.5), self.weight(outputs)]
        return self.add("Gemm", x, *names, transB=1, **attributes)

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The finished model; output shapes are left open."""
        results = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, results, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def small_cnn() -> onnx.ModelProto:
    """Convolution, batch norm, residual, pool, FC: 0.1 s to import."""
    net = Net(("N", 3, 16, 16))
    x = net.add("Relu", net.batch_norm(net.conv("input", (8, 3, 3, 3), bias=False, pads=[1, 1, 1, 1]), 8))
    y = net.add("Relu", net.batch_norm(net.conv(x, (8, 8, 3, 3), pads=[1, 1, 1, 1]), 8))
    y = net.add("Add", net.conv(y, (8, 8, 3, 3), pads=[1, 1, 1, 1]), x)
    y = net.add("Flatten", net.add("GlobalAveragePool", net.add("Relu", y)))
    return net.model(net.fc(y, 8, 10))
