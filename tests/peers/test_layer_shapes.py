from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tvm_nm.layer_shape import LayerShape
from tvm_nm.peers.layers import LAYER_SETS, layers_of, write_layer
from tvm_nm.pruning import inspect_model
from tvm_nm.report import sparsity_rows

SMALL = [
    LayerShape("conv", (8, 4, 3, 3), (1, 4, 9, 7), (2, 1), (1, 0, 1, 2)),
    LayerShape("conv", (6, 1, 5, 5), (2, 6, 9, 9), padding=(4, 4, 4, 4), dilation=(2, 2), groups=6),
    LayerShape("fc", (5, 12, 1, 1), (8, 12)),
]


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_a_written_layer_is_the_layer(shape: LayerShape, tmp_path: Path) -> None:
    path = write_layer(shape, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    assert layers_of(sparsity_rows(inspect_model(path))) == (shape,)
    assert write_layer(shape, tmp_path) == path
    (output,) = onnx.load(path).graph.output
    assert tuple(axis.dim_value for axis in output.type.tensor_type.shape.dim) == shape.output_shape
    assert LayerShape.parse(shape.text) == shape


@pytest.mark.parametrize("text", ["", "conv", "pool-1x1x1x1-1x1x1x1-1x1-0x0x0x0-1x1-1", "conv-64x64-1x64-1x1-1-1x1-1"])
def test_other_texts_are_no_shapes(text: str) -> None:
    with pytest.raises(ValueError, match=r"no layer's shape|invalid literal"):
        LayerShape.parse(text)


def test_equal_layers_are_listed_once() -> None:
    row = {
        "kind": "conv",
        "weight_shape": [4, 4, 1, 1],
        "input_shape": [1, 4, 5, 5],
        "strides": [1, 1],
        "padding": [0, 0, 0, 0],
        "dilation": [1, 1],
        "groups": 1,
    }
    other = {**row, "strides": [2, 2]}
    matrix = {**row, "kind": "fc", "input_shape": [2, 3, 4]}
    found = layers_of([row, other, matrix, row])
    assert [shape.strides for shape in found] == [(1, 1), (2, 2)]


def test_the_sets_cover_what_kernels_are_weak_at() -> None:
    shapes = {name: set(members) for name, members in LAYER_SETS.items()}
    assert all(shape.input_shape[2:] == (7, 7) for shape in shapes["small-maps"])
    assert all(shape.strides == (2, 2) for shape in shapes["stride-2"])
    assert {shape.weight_shape[2] for shape in shapes["first-convs"]} >= {5, 7}
    assert all(shape.groups == shape.input_shape[1] > 1 for shape in shapes["depthwise"])
    assert [{shape.input_shape[0] for shape in shapes[name]} for name in ("fc", "fc-batch-8", "fc-batch-32")] == [
        {1},
        {8},
        {32},
    ]
    assert all(shape.weight_shape[0] % 16 for shape in shapes["odd-channels"])
    names = [shape.text for members in LAYER_SETS.values() for shape in members]
    assert len(set(names)) == len(names)
    assert not any(shape.is_prunable for shape in (*shapes["depthwise"], *shapes["first-convs"]))
