"""Single layers as models: those of given networks, and sets of shapes that kernels tend to be weak at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tvm_nm.workload import ConvWorkload

__all__ = ["LAYER_SETS", "LayerShape", "layers_of", "write_layer"]

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
    def file_name(self) -> str:
        """Name of its model, which tells apart what `name` does not."""
        parts = (self.kind, self.weight_shape, self.input_shape, self.strides, self.padding, self.dilation, self.groups)
        return "-".join("x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in parts)

    @property
    def is_prunable(self) -> bool:
        """Whether a sparse kernel is worth looking at: not for depthwise and grouped layers, or for RGB images."""
        return self.groups == 1 and self.weight_shape[1] >= _MIN_PRUNED_CHANNELS


def _conv(
    channels: int, out: int, size: int, kernel: int, stride: int = 1, *, depthwise: bool = False, batch: int = 1
) -> LayerShape:
    pad = kernel // 2
    groups = channels if depthwise else 1
    return LayerShape(
        "conv",
        (out, channels // groups, kernel, kernel),
        (batch, channels, size, size),
        (stride, stride),
        (pad, pad, pad, pad),
        groups=groups,
    )


def _fc(inputs: int, out: int, batch: int = 1) -> LayerShape:
    return LayerShape("fc", (out, inputs, 1, 1), (batch, inputs))


LAYER_SETS: dict[str, tuple[LayerShape, ...]] = {
    "small-maps": (
        _conv(512, 512, 7, 3),
        _conv(512, 2048, 7, 1),
        _conv(2048, 512, 7, 1),
        _conv(960, 160, 7, 1),
        _conv(160, 960, 7, 1),
    ),
    "stride-2": (
        _conv(64, 128, 56, 3, 2),
        _conv(128, 128, 56, 3, 2),
        _conv(256, 256, 28, 3, 2),
        _conv(256, 512, 56, 1, 2),
        _conv(1024, 2048, 14, 1, 2),
    ),
    "first-convs": (
        _conv(3, 32, 224, 3, 2),
        _conv(3, 64, 224, 3),
        _conv(3, 64, 224, 7, 2),
        _conv(3, 32, 224, 5, 2),
        _conv(3, 64, 32, 5),
        _conv(1, 32, 28, 5),
    ),
    "depthwise": (
        _conv(32, 32, 112, 3, depthwise=True),
        _conv(96, 96, 112, 3, 2, depthwise=True),
        _conv(144, 144, 56, 3, depthwise=True),
        _conv(384, 384, 14, 3, depthwise=True),
        _conv(960, 960, 7, 3, depthwise=True),
        _conv(240, 240, 14, 5, depthwise=True),
        _conv(72, 72, 56, 5, 2, depthwise=True),
        _conv(768, 768, 7, 7, depthwise=True),
    ),
    "fc": (_fc(4096, 4096), _fc(2048, 1000), _fc(1280, 1000), _fc(512, 10)),
    "fc-batch-8": (_fc(4096, 4096, 8), _fc(2048, 1000, 8)),
    "fc-batch-32": (_fc(4096, 4096, 32), _fc(2048, 1000, 32)),
    "odd-channels": (
        _conv(60, 100, 28, 3),
        _conv(19, 37, 14, 3),
        _conv(75, 50, 28, 1),
        _conv(100, 250, 14, 1),
        _conv(50, 50, 28, 3, depthwise=True),
    ),
}
"""Shapes by the name of their set."""


def layers_of(rows: Iterable[dict[str, Any]]) -> tuple[LayerShape, ...]:
    """Return a model's distinct layers from the rows that ``tvm-nm inspect --json`` prints, in their order."""
    found: dict[LayerShape, None] = {}
    for row in rows:
        shapes = {key: tuple(row[key]) for key in ("weight_shape", "input_shape", "strides", "padding", "dilation")}
        # A matrix product of higher rank is no layer of an image network.
        if len(shapes["input_shape"]) == (4 if row["kind"] == "conv" else 2):
            found[LayerShape(row["kind"], groups=row["groups"], **shapes)] = None
    return tuple(found)


def write_layer(shape: LayerShape, folder: Path) -> Path:
    """Write a model of this layer with random weights, a bias and, behind a convolution, a ReLU; unless it is there."""
    path = folder / f"{shape.file_name}.onnx"
    if path.is_file():
        return path
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape.weight_shape, dtype=np.float32)
    weight *= np.float32(1 / math.sqrt(math.prod(shape.weight_shape[1:])))
    bias = rng.standard_normal(shape.weight_shape[0], dtype=np.float32)
    if shape.kind == "fc":
        weight = weight.reshape(shape.weight_shape[:2])
        nodes = [helper.make_node("Gemm", ["input", "weight", "bias"], ["output"], name="layer", transB=1)]
    else:
        attributes = {
            "kernel_shape": list(shape.weight_shape[2:]),
            "strides": list(shape.strides),
            "pads": list(shape.padding),
            "dilations": list(shape.dilation),
            "group": shape.groups,
        }
        nodes = [
            helper.make_node("Conv", ["input", "weight", "bias"], ["sums"], name="layer", **attributes),
            helper.make_node("Relu", ["sums"], ["output"], name="relu"),
        ]
    graph = helper.make_graph(
        nodes,
        shape.name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape.input_shape))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path
