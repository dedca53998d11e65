"""im2col and the moments of it, against onnxruntime's convolution and against all data at once."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tvm_nm import moments
from tvm_nm.moments import MomentsAccumulator, columns
from tvm_nm.onnx_network import LayerNode

RNG = np.random.default_rng(0)

LAYERS = {
    "3x3": LayerNode("l", "conv", 0, "x", "y", (6, 4, 3, 3), padding=(1, 1, 1, 1)),
    "1x1": LayerNode("l", "conv", 0, "x", "y", (6, 4, 1, 1)),
    "stride, dilation, uneven padding": LayerNode(
        "l", "conv", 0, "x", "y", (6, 4, 3, 2), strides=(2, 3), dilation=(2, 1), padding=(2, 0, 1, 1)
    ),
    "depthwise": LayerNode("l", "conv", 0, "x", "y", (4, 1, 3, 3), groups=4, padding=(1, 1, 1, 1)),
    "grouped": LayerNode("l", "conv", 0, "x", "y", (6, 2, 3, 3), groups=2, strides=(2, 2)),
    "same upper": LayerNode("l", "conv", 0, "x", "y", (6, 4, 3, 3), strides=(2, 2), padding="SAME_UPPER"),
    "same lower": LayerNode("l", "conv", 0, "x", "y", (6, 4, 2, 4), padding="SAME_LOWER"),
}


def convolve(layer: LayerNode, weight: np.ndarray, data: np.ndarray) -> np.ndarray:
    """onnxruntime's convolution."""
    padding = {"auto_pad": layer.padding} if isinstance(layer.padding, str) else {"pads": layer.padding}
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=layer.strides, dilations=layer.dilation, group=layer.groups, **padding
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xwy"]
    graph = helper.make_graph([node], "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": data, "w": weight})[0])


@pytest.mark.parametrize("name", LAYERS)
def test_columns_make_a_convolution_a_product(name: str) -> None:
    layer = LAYERS[name]
    data = RNG.standard_normal((3, 4, 9, 11)).astype(np.float32)
    weight = RNG.standard_normal(layer.weight_shape).astype(np.float32)
    expected = convolve(layer, weight, data)
    found = np.matmul(weight.reshape(layer.groups, -1, weight[0].size), columns(layer, data))
    got = found.reshape(len(weight), 3, *expected.shape[2:]).transpose(1, 0, 2, 3)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    rows = np.array([0, 2])
    part = np.matmul(weight.reshape(layer.groups, -1, weight[0].size), columns(layer, data, rows))
    got = part.reshape(len(weight), 3, 2, -1).transpose(1, 0, 2, 3)
    np.testing.assert_allclose(got, expected[:, :, rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_all_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_CHUNK", 50)  # several products for each batch
    layer = LAYERS[name]
    data = RNG.standard_normal((12, 4, 9, 11)).astype(np.float32) + 30  # a mean that swamps the deviation
    weight = RNG.standard_normal(layer.weight_shape).astype(np.float32)
    target = convolve(layer, weight, data)
    accumulator = MomentsAccumulator(layer)
    for start in (0, 5, 9):
        stop = {0: 5, 5: 9, 9: 12}[start]
        accumulator.add(data[start:stop], target[start:stop])
    found = accumulator.result()
    x = columns(layer, data).astype(np.float64)
    y = target.transpose(1, 0, 2, 3).reshape(len(weight), -1).astype(np.float64)
    assert found.count == x.shape[2]
    np.testing.assert_allclose(found.input_mean, x.mean(axis=2), rtol=1e-5)
    np.testing.assert_allclose(found.target_mean, y.mean(axis=1), rtol=1e-4, atol=1e-4)
    centred = x - x.mean(axis=2, keepdims=True)
    offset = y - y.mean(axis=1, keepdims=True)
    for group in range(layer.groups):
        expected = centred[group] @ centred[group].T / found.count
        np.testing.assert_allclose(found.hessian[group], expected, atol=1e-4 * np.abs(expected).max())
    by_group = offset.reshape(layer.groups, -1, found.count)
    expected = np.matmul(by_group, centred.transpose(0, 2, 1)).reshape(found.cross.shape) / found.count
    np.testing.assert_allclose(found.cross, expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(found.target_variance, (offset**2).mean(axis=1), rtol=1e-3)


def test_fully_connected_and_one_dimensional() -> None:
    fc = LayerNode("l", "fc", 0, "x", "y", (3, 5, 1, 1))
    data, target = RNG.standard_normal((40, 5)), RNG.standard_normal((40, 3))
    accumulator = MomentsAccumulator(fc)
    accumulator.add(data[:30], target[:30])
    accumulator.add(data[30:], target[30:])
    np.testing.assert_allclose(accumulator.result().hessian[0], np.cov(data.T, bias=True), atol=1e-9)
    line = LayerNode("l", "conv", 0, "x", "y", (3, 2, 1, 3), rank=3)
    accumulator = MomentsAccumulator(line)
    accumulator.add(RNG.standard_normal((4, 2, 10)), RNG.standard_normal((4, 3, 8)))
    assert accumulator.result().count == 32


def test_a_share_of_the_rows_is_representative() -> None:
    layer = LAYERS["3x3"]
    full, part = MomentsAccumulator(layer), MomentsAccumulator(layer, rows=0.25, seed=1)
    for _ in range(8):
        data = RNG.standard_normal((16, 4, 16, 16)).astype(np.float32)
        target = RNG.standard_normal((16, 6, 16, 16)).astype(np.float32)
        full.add(data, target)
        part.add(data, target)
    assert part.result().count * 4 == full.result().count
    np.testing.assert_allclose(part.result().hessian, full.result().hessian, atol=0.06)


def test_no_data() -> None:
    with pytest.raises(ValueError, match="no data"):
        MomentsAccumulator(LAYERS["1x1"]).result()


@pytest.mark.parametrize("name", ["3x3", "grouped", "depthwise"])
def test_means_of_images_count_besides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every image's mean stood among its positions once more, with the weight of so many."""
    monkeypatch.setattr(moments, "_CHUNK", 200)
    layer = LAYERS[name]
    data = RNG.standard_normal((6, 4, 9, 11)).astype(np.float32) + RNG.standard_normal((6, 4, 1, 1)).astype(np.float32)
    target = convolve(layer, RNG.standard_normal(layer.weight_shape).astype(np.float32), data)
    weight = 3.0
    accumulator = MomentsAccumulator(layer, image_weight=weight)
    for start in (0, 4):
        accumulator.add(data[start : start + 4], target[start : start + 4])
    found = accumulator.result()
    x = columns(layer, data).astype(np.float64)
    y = target.transpose(1, 0, 2, 3).reshape(layer.weight_shape[0], -1).astype(np.float64)
    each = x.shape[2] // 6
    means = [array.reshape(*array.shape[:-1], 6, each).mean(axis=-1) for array in (x, y)]
    share = np.concatenate([np.ones(x.shape[2]), np.full(6, weight * each)])
    x, y = np.concatenate([x, means[0]], axis=2), np.concatenate([y, means[1]], axis=1)
    for group in range(layer.groups):
        rows = slice(group * len(y) // layer.groups, (group + 1) * len(y) // layer.groups)
        both = np.cov(np.concatenate([x[group], y[rows]]), aweights=share, ddof=0)
        size = x.shape[1]
        np.testing.assert_allclose(found.hessian[group], both[:size, :size], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.cross[rows], both[size:, :size], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.target_variance[rows], np.diag(both)[size:], rtol=1e-4)
    np.testing.assert_allclose(found.input_mean, np.average(x, axis=2, weights=share), rtol=1e-4, atol=1e-5)
