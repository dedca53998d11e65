"""One small model for each thing that an exporter may write; every one must import and agree with onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from models import Net, small_cnn
from onnx import TensorProto, helper

SMALL_MODELS: dict[str, Callable[[], onnx.ModelProto]] = {"cnn": small_cnn}


def _model(function: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    SMALL_MODELS[function.__name__] = function
    return function


@_model
def grouped() -> onnx.ModelProto:
    net = Net((1, 8, 9, 9))
    return net.model(net.conv("input", (12, 2, 3, 3), group=4, strides=[2, 2], pads=[1, 1, 1, 1]))


@_model
def depthwise_multiplier() -> onnx.ModelProto:
    net = Net((1, 4, 9, 7))
    return net.model(net.batch_norm(net.conv("input", (8, 1, 3, 5), group=4, pads=[1, 2, 1, 2]), 8))


@_model
def dilated_asymmetric() -> onnx.ModelProto:
    net = Net((1, 3, 12, 11))
    return net.model(net.conv("input", (5, 3, 3, 2), dilations=[2, 3], pads=[0, 2, 3, 1], strides=[1, 2]))


@_model
def factorised() -> onnx.ModelProto:
    net = Net((1, 4, 10, 10))
    x = net.conv("input", (6, 4, 1, 7), pads=[0, 3, 0, 3])
    return net.model(net.conv(x, (4, 6, 7, 1), pads=[3, 0, 3, 0]))


@_model
def same_upper_and_lower() -> onnx.ModelProto:
    net = Net((1, 4, 11, 13))
    x = net.conv("input", (4, 4, 4, 4), auto_pad="SAME_UPPER", strides=[2, 3])
    x = net.conv(x, (4, 4, 2, 2), auto_pad="SAME_LOWER")
    x = net.add("MaxPool", x, kernel_shape=[2, 2], auto_pad="SAME_LOWER", strides=[2, 2])
    x = net.add("AveragePool", x, kernel_shape=[2, 2], auto_pad="SAME_LOWER")
    return net.model(net.add("MaxPool", x, kernel_shape=[1, 1], auto_pad="VALID", strides=[2, 2]))


@_model
def one_dimensional() -> onnx.ModelProto:
    net = Net((1, 4, 40))
    x = net.add("Relu", net.batch_norm(net.conv("input", (8, 4, 5), pads=[2, 2], strides=[2]), 8))
    y = net.add("Sigmoid", net.conv(x, (8, 2, 3), bias=False, group=4, pads=[2, 2], dilations=[2]))
    x = net.add("MaxPool", net.add("Add", x, y), kernel_shape=[3], strides=[2], pads=[1, 1])
    x = net.add("AveragePool", net.add("Concat", x, x, axis=1), kernel_shape=[2], strides=[1])
    return net.model(net.fc(net.add("Flatten", net.add("GlobalAveragePool", x)), 16, 3))


@_model
def pools_in_ceil_mode() -> onnx.ModelProto:
    net = Net((1, 4, 14, 14))
    x = net.add("MaxPool", "input", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    x = net.add("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    a = net.add("AveragePool", "input", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1)
    b = net.add("AveragePool", "input", kernel_shape=[2, 2], pads=[1, 1, 0, 0], count_include_pad=1)
    return net.model(x, a, b)


@_model
def explicit_padding() -> onnx.ModelProto:
    net = Net((1, 4, 9, 9))

    def pad(x: str, *widths: int) -> str:
        return net.add("Pad", x, net.constant(np.array(widths, np.int64)))

    x = net.conv(pad("input", 0, 0, 1, 0, 0, 0, 2, 1), (6, 4, 3, 3), pads=[1, 0, 0, 1])
    x = net.add("MaxPool", pad(net.add("Relu", x), 0, 0, 1, 1, 0, 0, 1, 1), kernel_shape=[3, 3], strides=[2, 2])
    x = net.add("AveragePool", pad(x, 0, 0, 1, 0, 0, 0, 0, 1), kernel_shape=[2, 2], count_include_pad=1)
    y = net.add("MaxPool", pad("input", 0, 0, 1, 1, 0, 0, 1, 1), kernel_shape=[3, 3])  # negative values: must stay
    z = pad("input", 0, 2, -1, 0, 0, 1, 0, -2)
    r = net.add("Pad", "input", net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])), mode="reflect")
    return net.model(x, y, z, r)


@_model
def pad_of_old_opset() -> onnx.ModelProto:
    net = Net((1, 4, 9, 9), opset=9)
    x = net.add("Pad", "input", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.0, mode="constant")
    return net.model(net.add("Clip", net.conv(x, (4, 4, 3, 3)), min=0.0, max=6.0))


@_model
def pad_with_axes() -> onnx.ModelProto:
    net = Net((1, 4, 9, 9), opset=18)
    widths, axes = net.constant(np.array([1, 2, 3, 0])), net.constant(np.array([-1, 2]))
    return net.model(net.add("Pad", "input", widths, net.constant(np.float32(1.5)), axes))


@_model
def activations() -> onnx.ModelProto:
    net = Net((1, 4, 5, 5))
    plain = ("Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Softplus", "Elu", "LeakyRelu", "Selu")
    outputs = [net.add(op, net.conv("input", (4, 4, 1, 1))) for op in plain]
    outputs.append(net.add("PRelu", "input", net.weight(4, 1, 1)))
    outputs.append(net.add("Softmax", "input", axis=1))
    outputs.append(net.add("Mul", "input", net.add("Sigmoid", "input")))
    outputs.append(net.add("Erf", net.add("Exp", "input")))
    return net.model(*outputs)


@_model
def bounds() -> onnx.ModelProto:
    net = Net((1, 4, 5, 5))
    low, high, nan = (net.constant(np.float32(v)) for v in (-0.5, 0.75, np.nan))
    zero, six = net.constant(np.float32(0)), net.constant(np.float32(6))
    clips = [(low, high), (low,), ("", high), (nan, high), (zero, six), (zero,), (high, low)]
    outputs = [net.add("Clip", "input", *c) for c in clips]
    outputs.append(net.add("Min", net.add("Max", "input", zero), six))
    outputs.append(net.add("Relu", net.add("Clip", "input", low, high)))
    return net.model(*outputs)


@_model
def variadic() -> onnx.ModelProto:
    net = Net((1, 4, 5, 5))
    a, b = net.conv("input", (4, 4, 1, 1)), net.conv("input", (4, 4, 3, 3), pads=[1, 1, 1, 1])
    c = net.weight(1, 4, 1, 1)
    return net.model(*(net.add(op, a, c, b) for op in ("Sum", "Max", "Min", "Mean")), net.add("Sum", a))


@_model
def channel_shuffle() -> onnx.ModelProto:
    net = Net((1, 8, 6, 6))
    x = net.conv("input", (8, 2, 1, 1), group=4)
    x = net.add("Reshape", x, net.constant(np.array([0, 4, 2, 6, 6])))
    x = net.add("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = net.add("Reshape", x, net.constant(np.array([1, -1, 6, 6])))
    return net.model(net.conv(x, (8, 2, 3, 3), group=4))


@_model
def split_and_concat() -> onnx.ModelProto:
    net = Net((1, 6, 5, 5))
    first = net.add("Split", "input", net.constant(np.array([2, 3, 1])), outputs=3, axis=1)
    parts = [first, f"{first}_1", f"{first}_2"]
    even = net.add("Split", "input", outputs=2, axis=1, num_outputs=2) if net.opset >= 18 else parts[0]
    return net.model(net.add("Concat", *reversed(parts), net.add("Relu", even), axis=1))


@_model
def squeeze_and_excite() -> onnx.ModelProto:
    net = Net((1, 8, 6, 6))
    x = net.conv("input", (8, 8, 3, 3), pads=[1, 1, 1, 1])
    s = net.add("ReduceMean", x, axes=[2, 3], keepdims=1)
    s = net.add("Relu", net.conv(s, (4, 8, 1, 1)))
    return net.model(net.add("Mul", x, net.add("HardSigmoid", net.conv(s, (8, 4, 1, 1)))))


@_model
def view_by_size() -> onnx.ModelProto:
    """What PyTorch writes for ``x.view(x.size(0), -1)``."""
    net = Net(("N", 4, 3, 3))
    size = net.add("Gather", net.add("Shape", "input"), net.constant(np.int64(0)), axis=0)
    axes = net.constant(np.array([0]))
    shape = net.add("Concat", net.add("Unsqueeze", size, axes), net.constant(np.array([-1])), axis=0)
    return net.model(net.fc(net.add("Reshape", "input", shape), 36, 5))


@_model
def local_response_normalisation() -> onnx.ModelProto:
    net = Net((1, 8, 5, 5))
    return net.model(net.add("LRN", net.conv("input", (8, 8, 1, 1)), size=5, alpha=0.1, beta=0.75, bias=2.0))


@_model
def scales_everywhere() -> onnx.ModelProto:
    """Caffe's Scale, normalised inputs, scalars on either side, batch norm of a batch norm."""
    net = Net((1, 3, 7, 7))
    x = net.add("Div", net.add("Sub", "input", net.weight(3, 1, 1)), net.weight(3, 1, 1, low=0.5))
    x = net.conv(x, (6, 3, 3, 3))
    x = net.add("Add", net.add("Mul", net.weight(1, 6, 1, 1), net.batch_norm(x, 6)), net.weight(6, 1, 1))
    x = net.add("Add", net.add("Mul", x, net.constant(np.float32(0.5))), net.constant(np.float32([0.25])))
    x = net.add("Div", x, net.constant(np.float32(1.5)))
    x = net.add("Relu", x)
    x = net.batch_norm(net.batch_norm(x, 6), 6)
    return net.model(net.conv(x, (4, 6, 1, 1)))


@_model
def transposed_convolutions() -> onnx.ModelProto:
    net = Net((1, 4, 5, 6))
    kernel = net.weight(4, 3, 3, 3)
    outputs = [net.add("ConvTranspose", "input", kernel, net.weight(3), strides=[2, 2], output_padding=[1, 0])]
    outputs.append(net.add("ConvTranspose", "input", kernel, group=2, dilations=[2, 1], pads=[1, 0, 2, 1]))
    for mode in ("NOTSET", "SAME_UPPER", "SAME_LOWER"):
        for shape in ([10, 12], [9, 13], [12, 14], [6, 8]):
            options: dict[str, Any] = {"output_shape": shape, "strides": [2, 2], "auto_pad": mode}
            outputs.append(net.add("ConvTranspose", "input", kernel, **options))
        outputs.append(net.add("ConvTranspose", "input", kernel, strides=[2, 1], auto_pad=mode))
    outputs.append(
        net.add("ConvTranspose", "input", kernel, strides=[2, 2], output_shape=[9, 11], output_padding=[1, 1])
    )
    return net.model(*outputs)


def resizing(opset: int) -> onnx.ModelProto:
    """Resize, or Upsample before there was one, with scales and sizes as exporters write them."""
    net = Net((1, 4, 6, 5), opset=opset)
    double = np.array([1, 1, 2, 3], np.float32)
    if opset == 7:
        return net.model(*(net.add("Upsample", "input", scales=double, mode=mode) for mode in ("nearest", "linear")))
    if opset < 11:
        scales, op = net.constant(double), "Upsample" if opset == 9 else "Resize"
        return net.model(*(net.add(op, "input", scales, mode=mode) for mode in ("nearest", "linear")))
    empty, outputs = net.constant(np.zeros(0, np.float32)), []
    for mode in ("nearest", "linear", "cubic"):
        for how in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
            options = {"mode": mode, "coordinate_transformation_mode": how}
            outputs.append(net.add("Resize", "input", empty, net.constant(double), **options))
            sizes = net.constant(np.array([1, 4, 9, 7]))
            outputs.append(net.add("Resize", "input", empty, empty, sizes, **options))
            half = net.constant(np.array([1, 1, 0.5, 0.4], np.float32))
            outputs.append(net.add("Resize", "input", empty, half, **options))
    roundings = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    outputs += [net.add("Resize", "input", empty, net.constant(double), nearest_mode=mode) for mode in roundings]
    if opset >= 18:
        scales = net.constant(np.array([3, 4], np.float32))
        outputs.append(net.add("Resize", "input", "", scales, mode="linear", axes=[3, 2]))
    return net.model(*outputs)


for _opset in (7, 9, 10, 11, 13, 18, 19):
    SMALL_MODELS[f"resize_of_opset_{_opset}"] = partial(resizing, _opset)


@_model
def shared_convolution() -> onnx.ModelProto:
    """The convolution has two readers, one of them a batch norm: it must be neither copied nor folded into."""
    net = Net((1, 4, 6, 6))
    x = net.conv("input", (4, 4, 3, 3), pads=[1, 1, 1, 1])
    return net.model(net.add("Add", net.batch_norm(x, 4), net.add("Sigmoid", x)))


@_model
def convolution_as_output() -> onnx.ModelProto:
    net = Net((1, 4, 6, 6))
    x = net.conv("input", (4, 4, 3, 3))
    return net.model(x, net.batch_norm(x, 4), x)


@_model
def tied_weights() -> onnx.ModelProto:
    net = Net((1, 4, 6, 6))
    w = net.weight(4, 4, 1, 1)
    return net.model(net.batch_norm(net.add("Conv", net.batch_norm(net.add("Conv", "input", w), 4), w), 4))


@_model
def dense_layers() -> onnx.ModelProto:
    net = Net((3, 8))
    x = net.add("Gemm", "input", net.weight(8, 6), net.weight(6), alpha=0.5, beta=2.0)
    x = net.add("Relu", net.batch_norm(x, 6))
    x = net.add("Add", net.weight(5), net.add("MatMul", x, net.weight(6, 5)))
    y = net.add("Gemm", x, x, transB=1)  # no constant weight
    z = net.add("Gemm", "input", net.weight(3, 4), transA=1)
    return net.model(net.add("Gemm", x, net.weight(5, 4), net.weight(1, 4), beta=0.0), y, z)


@_model
def matmul_of_rank_3() -> onnx.ModelProto:
    net = Net((2, 5, 8))
    x = net.add("Add", net.add("MatMul", "input", net.weight(8, 6)), net.weight(6))
    return net.model(net.add("MatMul", net.add("Relu", x), net.weight(6, 3)))


@_model
def weights_in_disguise() -> onnx.ModelProto:
    """Weights behind Identity, ConstantOfShape, Cast, Transpose, Constant."""
    net = Net((1, 4, 6, 6))
    x = net.add("Conv", "input", net.add("Identity", net.weight(4, 4, 3, 3)))
    of_shape = net.add(
        "ConstantOfShape",
        net.constant(np.array([4, 4, 1, 1])),
        value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5]),
    )
    x = net.add("Conv", x, of_shape)
    half = net.constant(net.rng.standard_normal((4, 4, 1, 1)).astype(np.float16))
    x = net.add("Conv", x, net.add("Cast", half, to=TensorProto.FLOAT))
    x = net.add("Conv", x, net.add("Transpose", net.weight(1, 1, 4, 4), perm=[3, 2, 0, 1]))
    literal = helper.make_tensor("v", TensorProto.FLOAT, [4, 1, 1], [1.0, 2.0, 3.0, 4.0])
    return net.model(net.add("Mul", x, net.add("Constant", value=literal)))


@_model
def no_layers() -> onnx.ModelProto:
    net = Net((1, 4, 6, 6))
    return net.model(net.add("Relu", net.add("GlobalMaxPool", "input")))


@_model
def identity() -> onnx.ModelProto:
    net = Net((1, 4, 6, 6))
    return net.model(net.add("Identity", net.add("Dropout", "input")))


@_model
def no_nodes() -> onnx.ModelProto:
    return Net((1, 4, 6, 6)).model("input")


@_model
def no_inputs() -> onnx.ModelProto:
    net = Net()
    net.inputs = []
    return net.model(net.add("Relu", net.weight(2, 3)))


@_model
def constant_output() -> onnx.ModelProto:
    net = Net((1, 4, 6, 6))
    return net.model(net.add("Relu", net.weight(2, 2)), net.add("Relu", "input"))


@_model
def integer_output() -> onnx.ModelProto:
    net = Net((1, 4, 6, 6))
    model = net.model(net.add("ArgMax", "input", axis=1))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


@_model
def scalar_input() -> onnx.ModelProto:
    net = Net((1, 4, 5, 5))
    net.inputs.append(helper.make_tensor_value_info("factor", TensorProto.FLOAT, []))
    return net.model(
        net.add("Mul", net.conv("input", (4, 4, 1, 1)), "factor"), net.add("Sqrt", net.add("Abs", "factor"))
    )


@_model
def two_inputs() -> onnx.ModelProto:
    net = Net((1, 4, 6, 6))
    net.inputs.append(helper.make_tensor_value_info("second/in:0", TensorProto.FLOAT, ["N", 2, 6, 6]))
    return net.model(net.add("Add", net.conv("input", (5, 4, 1, 1)), net.conv("second/in:0", (5, 2, 1, 1))))


@_model
def computed_weight() -> onnx.ModelProto:
    """A convolution whose weight is an input is no layer, but it is legal."""
    net = Net((1, 4, 6, 6))
    net.inputs.append(helper.make_tensor_value_info("kernel", TensorProto.FLOAT, [2, 4, 3, 3]))
    return net.model(net.add("Conv", "input", "kernel", net.weight(2)))


@_model
def left_to_tvm() -> onnx.ModelProto:
    """Operators that only TVM computes: 3-D and transposed convolution, resize, instance norm."""
    net = Net((1, 4, 6, 6))
    a = net.add("ConvTranspose", "input", net.weight(4, 3, 3, 3), strides=[2, 2])
    sizes = net.constant(np.array([1, 1, 2, 2], np.float32))
    b = net.add(
        "Resize", "input", "", sizes, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    c = net.add("InstanceNormalization", "input", net.weight(4), net.weight(4))
    d = net.add("Reshape", "input", net.constant(np.array([1, 1, 4, 6, 6])))
    return net.model(a, b, c, net.conv(d, (2, 1, 3, 3, 3)))


@_model
def slices() -> onnx.ModelProto:
    """ResNet's option A: every second pixel, then channels of zeros; and a slice backwards."""
    net = Net((1, 4, 6, 6))
    x = net.add("Slice", "input", *(net.constant(np.array(v)) for v in ([0, 0], [100, 100], [2, 3], [2, 2])))
    x = net.add("Pad", x, net.constant(np.array([0, 2, 0, 0, 0, 2, 0, 0])))
    y = net.conv("input", (8, 4, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    z = net.add("Slice", "input", *(net.constant(np.array([v])) for v in (-1, -100, 1, -1)))
    return net.model(net.add("Relu", net.add("Add", x, y)), z)


@_model
def unnamed_nodes() -> onnx.ModelProto:
    model = small_cnn()
    for node in model.graph.node:
        node.name = ""
    return model


@_model
def initializers_as_inputs() -> onnx.ModelProto:
    """Before IR version 4 every initializer had to be an input, too."""
    model = small_cnn()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


@_model
def local_function() -> onnx.ModelProto:
    """What PyTorch's newer exporter writes: a block of the model as a function of its own."""
    net = Net((1, 4, 6, 6))
    body = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ]
    block = helper.make_function("mine", "Block", ["x", "w"], ["z"], body, [helper.make_opsetid("", 17)])
    x = net.add("Block", "input", net.weight(4, 4, 3, 3), domain="mine")
    x = net.add("Block", x, net.weight(4, 4, 3, 3), domain="mine")
    model = net.model(x)
    model.functions.append(block)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    return model
