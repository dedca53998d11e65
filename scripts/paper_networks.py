"""The papers' networks for images of 32x32 pixels, as ONNX models with batch norms and random weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["hidden_filters", "mobilenet_v2", "vgg16_bn"]

_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Expansion, output channels, blocks, stride of the first: two strides of ImageNet's are left out for 32x32 pixels.
_MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class _Builder:
    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def constant(self, name: str, array: NDArray[np.float32]) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def node(self, op: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def conv(self, x: str, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
        """Add a convolution with He-initialised weights, and a batch norm that changes nothing yet."""
        shape = (outputs, inputs // groups, kernel, kernel)
        deviation = np.sqrt(2 / (kernel * kernel * outputs / groups))
        weight = self.constant(f"{name}.weight", self._random.standard_normal(shape) * deviation)
        pads = [kernel // 2] * 4
        x = self.node("Conv", name, x, weight, strides=[stride] * 2, pads=pads, group=groups, kernel_shape=[kernel] * 2)
        ones, zeros = np.ones(outputs), np.zeros(outputs)
        parameters = [
            self.constant(f"{name}.{key}", value)
            for key, value in (("scale", ones), ("shift", zeros), ("mean", zeros), ("variance", ones))
        ]
        return self.node("BatchNormalization", f"{name}.norm", x, *parameters, epsilon=1e-5, momentum=0.9)

    def classifier(self, x: str, inputs: int, classes: int) -> None:
        weight = self.constant("classifier.weight", self._random.standard_normal((classes, inputs)) * 0.01)
        bias = self.constant("classifier.bias", np.zeros(classes))
        self.nodes.append(helper.make_node("Gemm", [x, weight, bias], ["logits"], name="classifier", transB=1))

    def model(self, name: str, pixels: int, classes: int) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, pixels, pixels])
        y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
        graph = helper.make_graph(self.nodes, name, [x], [y], self.tensors)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(made)
        return made


def vgg16_bn(width: float = 1.0, classes: int = 10, seed: int = 0) -> onnx.ModelProto:
    """Return VGG-16 with batch norms and one fully connected layer, as is usual for CIFAR: 313 million MACs."""
    builder, x, inputs = _Builder(seed), "input", 3
    for stage, widths in enumerate(_VGG16):
        for index, channels in enumerate(widths):
            name, outputs = f"conv{stage + 1}_{index + 1}", max(8, int(channels * width))
            x = builder.node("Relu", f"{name}.relu", builder.conv(x, name, inputs, outputs, 3))
            inputs = outputs
        x = builder.node("MaxPool", f"pool{stage + 1}", x, kernel_shape=[2, 2], strides=[2, 2])
    builder.classifier(builder.node("Flatten", "flatten", x), inputs, classes)
    return builder.model("vgg16_bn", 32, classes)


def mobilenet_v2(
    width: float = 1.0, classes: int = 10, seed: int = 0, hidden: Sequence[int] | None = None
) -> onnx.ModelProto:
    """Return MobileNet-V2 with strides for 32x32 pixels: 88 million MACs.

    Parameters
    ----------
    width, classes, seed
        Share of channels, classes, and the seed of the weights.
    hidden
        Channels inside each block that expands, in order; default: six times its inputs.
    """
    builder = _Builder(seed)

    def activated(name: str, x: str) -> str:
        return builder.node("Clip", f"{name}.relu6", x, "zero", "six")

    builder.constant("zero", np.zeros(()))
    builder.constant("six", np.full((), 6.0))
    inputs = _rounded(32 * width)
    x = activated("stem", builder.conv("input", "stem", 3, inputs, 3))
    block = expanding = 0
    for expand, channels, count, first in _MOBILENET:
        outputs = _rounded(channels * width)
        for index in range(count):
            block += 1
            stride, before, name, inner = (first if index == 0 else 1), x, f"block{block}", inputs * expand
            if expand > 1:
                inner = hidden[expanding] if hidden is not None else inner
                expanding += 1
                x = activated(f"{name}.expand", builder.conv(x, f"{name}.expand", inputs, inner, 1))
            depthwise = f"{name}.depthwise"
            x = activated(depthwise, builder.conv(x, depthwise, inner, inner, 3, stride, inner))
            x = builder.conv(x, f"{name}.project", inner, outputs, 1)
            if stride == 1 and inputs == outputs:
                x = builder.node("Add", f"{name}.add", x, before)
            inputs = outputs
    outputs = _rounded(1280 * max(1.0, width) if width >= 1 else 1280 * width)
    x = activated("last", builder.conv(x, "last", inputs, outputs, 1))
    x = builder.node("Flatten", "flatten", builder.node("GlobalAveragePool", "pool", x))
    builder.classifier(x, outputs, classes)
    return builder.model("mobilenet_v2", 32, classes)


def hidden_filters(dense: onnx.ModelProto, share: float, width: float) -> onnx.ModelProto:
    """Prune whole filters by their L1 norm: the channels inside MobileNet-V2's blocks.

    A filter of an expanding convolution goes with its depthwise filter and its input of the projection, so that the
    result is a smaller dense network.

    Parameters
    ----------
    dense
        A trained `mobilenet_v2` of that width.
    share
        Share of filters kept.
    width
        As it was made with.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in dense.graph.initializer}
    kept: dict[str, NDArray[np.intp]] = {}
    for name, array in arrays.items():
        if name.endswith(".expand.weight"):
            norms = np.abs(array).sum(axis=(1, 2, 3))
            count = max(8, round(len(norms) * share / 8) * 8)
            kept[name.removesuffix(".expand.weight")] = np.sort(np.argsort(-norms, kind="stable")[:count])
    classes = arrays["classifier.bias"].size
    smaller = mobilenet_v2(width, classes, hidden=[len(indices) for indices in kept.values()])
    for tensor in smaller.graph.initializer:
        block, _, rest = tensor.name.partition(".")
        array = arrays[tensor.name]
        if block in kept and rest.startswith(("expand.", "depthwise.")):
            array = array[kept[block]]
        elif block in kept and rest == "project.weight":
            array = array[:, kept[block]]
        tensor.CopyFrom(numpy_helper.from_array(np.array(array, order="C"), tensor.name))
    return smaller


def _rounded(channels: float) -> int:
    return max(8, int(channels + 4) // 8 * 8)
