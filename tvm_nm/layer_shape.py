"""One convolution or fully connected layer by itself: its shape as text, and a model of nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tvm_nm.workload import ConvWorkload, Epilogue

__all__ = ["LayerShape", "layer_model"]

_MIN_PRUNED_CHANNELS = 8


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A convolution or fully connected layer, without its weights.

    Attributes
    ----------
    kind
        `conv` or `fc`.
    weight_shape
        (OC, IC / groups, KH, KW).
    input_shape
        (N, C, H, W), or (N, K).
    strides, padding, dilation, groups
        As in `tvm_nm.inventory.Layer`.
    """

    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    strides: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def name(self) -> str:
        """The shape in words, as reports write it."""
        out, inputs = self.weight_shape[:2]
        if self.kind == "fc":
            batch = self.input_shape[0]
            return f"{inputs}->{out} fc" + (f" n{batch}" if batch > 1 else "")
        batch, channels, height, width = self.input_shape
        kernel, stride, dilation = ((pair[0], pair[1]) for pair in (self.weight_shape[2:], self.strides, self.dilation))
        top, left, bottom, right = self.padding
        padding = (top, left, bottom, right)
        work = ConvWorkload(batch, channels, out, height, width, kernel, stride, padding, dilation, self.groups)
        return str(work)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, OC, OH, OW), or (N, OUT)."""
        if self.kind == "fc":
            return self.input_shape[0], self.weight_shape[0]
        top, left, bottom, right = self.padding
        extents = (
            (size + before + after - gap * (taps - 1) - 1) // step + 1
            for size, before, after, gap, taps, step in zip(
                self.input_shape[2:],
                (top, left),
                (bottom, right),
                self.dilation,
                self.weight_shape[2:],
                self.strides,
                strict=True,
            )
        )
        return self.input_shape[0], self.weight_shape[0], *extents

    @property
    def text(self) -> str:
        """All of it, such as ``conv-64x64x3x3-1x64x56x56-1x1-1x1x1x1-1x1-1``; `parse` reads it."""
        parts = (self.weight_shape, self.input_shape, self.strides, self.padding, self.dilation, (self.groups,))
        return "-".join((self.kind, *("x".join(map(str, part)) for part in parts)))

    @classmethod
    def parse(cls, text: str) -> LayerShape:
        """Read what `text` writes.

        Raises
        ------
        ValueError
            If it is nothing of the kind.
        """
        kind, *parts = text.split("-")
        numbers = [tuple(int(number) for number in part.split("x")) for part in parts]
        if kind not in ("conv", "fc") or [len(part) for part in numbers] != [4, 4 if kind == "conv" else 2, 2, 4, 2, 1]:
            raise ValueError(f"{text!r} is no layer's shape")
        weight, data, strides, padding, dilation, (groups,) = numbers
        return cls(kind, weight, data, strides, padding, dilation, groups)

    @property
    def is_prunable(self) -> bool:
        """Whether a sparse kernel is worth looking at: not for depthwise and grouped layers, or for RGB images."""
        return self.groups == 1 and self.weight_shape[1] >= _MIN_PRUNED_CHANNELS


def layer_model(shape: LayerShape, epilogue: Epilogue) -> onnx.ModelProto:
    """Return a model of the layer with random weights.

    Parameters
    ----------
    shape
        The layer.
    epilogue
        What follows it. A residual is the model's second input.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape.weight_shape, dtype=np.float32)
    weight *= np.float32(1 / math.sqrt(math.prod(shape.weight_shape[1:])))
    constants = {"weight": weight, "bias": rng.standard_normal(shape.weight_shape[0], dtype=np.float32)}
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape.input_shape))]
    if shape.kind == "fc":
        constants["weight"] = weight.reshape(shape.weight_shape[:2])
        nodes = [helper.make_node("Gemm", ["input", "weight", "bias"], ["y0"], name="layer", transB=1)]
    else:
        attributes = {
            "kernel_shape": list(shape.weight_shape[2:]),
            "strides": list(shape.strides),
            "pads": list(shape.padding),
            "dilations": list(shape.dilation),
            "group": shape.groups,
        }
        nodes = [helper.make_node("Conv", ["input", "weight", "bias"], ["y0"], name="layer", **attributes)]
    if epilogue.residual:
        inputs.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, list(shape.output_shape)))
        nodes.append(helper.make_node("Add", ["y0", "residual"], ["y1"], name="add"))
    last = nodes[-1].output[0]
    if epilogue.clip_min == 0.0 and epilogue.clip_max is None:
        nodes.append(helper.make_node("Relu", [last], ["y2"], name="relu"))
    elif epilogue.clip_min is not None or epilogue.clip_max is not None:
        bounds = []
        for name, bound in (("low", epilogue.clip_min), ("high", epilogue.clip_max)):
            if bound is not None:
                constants[name] = np.asarray(bound, np.float32)
            bounds.append(name if bound is not None else "")
        nodes.append(helper.make_node("Clip", [last, *bounds], ["y2"], name="clip"))
    stored = list(shape.output_shape)
    if epilogue.pool is not None:
        pool = epilogue.pool
        windows = {"kernel_shape": list(pool.kernel), "strides": list(pool.stride), "pads": list(pool.padding)}
        nodes.append(helper.make_node("MaxPool", [nodes[-1].output[0]], ["y3"], name="pool", **windows))
        stored[2:] = pool.output_size(*stored[2:])
    graph = helper.make_graph(
        nodes,
        shape.name,
        inputs,
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, stored)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
