"""Single layers as models: those of given networks, and sets of shapes that kernels tend to be weak at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

from tvm_nm.layer_shape import LayerShape, layer_model
from tvm_nm.workload import Epilogue

__all__ = ["LAYER_SETS", "layers_of", "write_layer"]


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
    path = folder / f"{shape.text}.onnx"
    if not path.is_file():
        onnx.save(layer_model(shape, Epilogue(clip_min=0.0 if shape.kind == "conv" else None)), path)
    return path
