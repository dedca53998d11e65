"""Refits behind a ReLU: against plain gradient descent, and what counts as a difference."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tvm_nm.following import what_follows
from tvm_nm.layer_pruning import fit_layer
from tvm_nm.moments import MomentsAccumulator
from tvm_nm.observation import Walk, _some, observe_layer
from tvm_nm.onnx_network import LayerNode, LayerWeights, OnnxNetwork
from tvm_nm.patterns import parse_pattern
from tvm_nm.rectified import Observed, fit_rectified, rectified_error
from tvm_nm.tensor_store import TensorStore


def layer(groups: int = 1, outputs: int = 6, inputs: int = 10) -> LayerNode:
    return LayerNode("l", "conv", 0, "x", "y", (outputs, inputs // groups, 1, 1), groups=groups)


def example(
    seed: int, groups: int = 1, low: float = 0.0, high: float = np.inf, images: int = 1
) -> tuple[tuple[Observed, ...], MomentsAccumulator, np.ndarray]:
    rng = np.random.default_rng(seed)
    node = layer(groups)
    weight = rng.standard_normal((6, 10 // groups)).astype(np.float32)
    accumulator = MomentsAccumulator(node)
    parts = []
    for _ in range(2):
        x = (rng.standard_normal((groups, 10 // groups, 150)) + 0.3).astype(np.float32)
        y = np.matmul(weight.reshape(groups, -1, 10 // groups), x).reshape(6, -1)
        accumulator.add_columns(x, y)
        ends = np.full((6, 1), low, np.float32), np.full((6, 1), high, np.float32)
        parts.append(Observed.between(x, y, *ends, image_means(x, y, images)))
    return tuple(parts), accumulator, weight


def image_means(x: np.ndarray, y: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Of images whose positions stand together."""
    return x.reshape(*x.shape[:2], images, -1).mean(axis=3), y.reshape(len(y), images, -1).mean(axis=2)


def descend(parts: tuple[Observed, ...], weights: LayerWeights, mask: np.ndarray, added: float) -> float:
    """Minimise the same objective by plain gradient descent with tiny steps, in float64."""
    groups, size = parts[0].data.shape[:2]
    w, b = weights.weight.reshape(-1, size).astype(np.float64), weights.bias.astype(np.float64)
    start = w.copy()
    data = np.concatenate([part.data for part in parts], axis=2).astype(np.float64)
    target = np.concatenate([part.target for part in parts], axis=1).astype(np.float64)
    below = np.concatenate([part.below for part in parts], axis=1)
    above = np.concatenate([part.above for part in parts], axis=1)
    keep = mask.reshape(w.shape)
    count = data.shape[2]
    for _ in range(6000):
        missing = target - np.matmul(w.reshape(groups, -1, size), data).reshape(target.shape) - b[:, None]
        missing[(below & (missing > 0)) | (above & (missing < 0))] = 0
        step = np.matmul(missing.reshape(groups, -1, count), data.transpose(0, 2, 1)).reshape(w.shape) / count
        w += 0.1 * (step + added * (start - w)) * keep
        b += 0.1 * missing.mean(axis=1)
    return float(np.square(missing).sum() / count + added * np.square(start - w).sum())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 1.0), (-np.inf, 0.5)])
def test_refit_reaches_the_minimum(groups: int, low: float, high: float) -> None:
    parts, accumulator, weight = example(0, groups, low, high)
    moments = accumulator.result()
    pattern = parse_pattern("2:4") if groups == 1 else parse_pattern("1:2")
    fit = fit_layer(moments, weight.reshape(6, -1, 1, 1), pattern, pattern.fixed_density or 0.5)
    damping = 1e-3
    found = fit_rectified(parts, moments, fit.weights, fit.mask, damping, steps=150)
    assert not found.weight[~fit.mask].any()
    added = damping * np.trace(moments.hessian, axis1=1, axis2=2).mean() / moments.hessian.shape[1]
    before, after = rectified_error(parts, fit.weights), rectified_error(parts, found)
    least = descend(parts, fit.weights, fit.mask, float(added))
    assert after < before
    moved = added * float(np.square(found.weight - fit.weights.weight).sum())
    assert after + moved <= least + 0.01 * (before - least)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2]), st.booleans(), st.sampled_from([0.0, 4.0]))
def test_refit_never_does_harm(seed: int, groups: int, six: bool, image_weight: float) -> None:
    parts, accumulator, weight = example(seed, groups, 0.0, 6.0 if six else np.inf, images=5)
    moments = accumulator.result()
    mask = np.random.default_rng(seed).random((6, 10 // groups, 1, 1)) < 0.6
    start = LayerWeights((weight.reshape(mask.shape) * mask).astype(np.float32), np.zeros(6, np.float32))
    found = fit_rectified(parts, moments, start, mask, 1e-2, image_weight=image_weight)
    assert rectified_error(parts, found, image_weight) <= rectified_error(parts, start, image_weight)
    assert not found.weight[~mask].any()


def test_what_an_image_has_in_common_counts_besides() -> None:
    parts, _, weight = example(1, images=5)
    start = LayerWeights((0.8 * weight).reshape(6, 10, 1, 1), np.full(6, 0.1, np.float32))
    squares, common, count = 0.0, 0.0, 0
    for part in parts:
        missing = part.missing(start.weight.reshape(6, -1), start.bias)
        squares += (missing.astype(np.float64) ** 2).sum()
        wanted = weight @ part.data[0] - start.weight.reshape(6, -1) @ part.data[0] - start.bias[:, None]
        for first in range(0, 150, 30):  # of each image 30 positions, one after the other
            common += 30 * (wanted[:, first : first + 30].astype(np.float64).mean(axis=1) ** 2).sum()
        count += 150
    for image_weight in (0.0, 4.0):
        expected = (squares + image_weight * common) / count
        assert rectified_error(parts, start, image_weight) == pytest.approx(expected, rel=1e-4)


def test_a_refit_may_look_at_images() -> None:
    """What is common to an image's positions gets smaller if it counts, at the cost of single positions."""
    rng = np.random.default_rng(2)
    node = layer()
    weight = rng.standard_normal((6, 10)).astype(np.float32)
    # Images differ in one thing that all columns show, so that those left can stand in for the others.
    level = np.repeat(rng.standard_normal((1, 10, 1)) * rng.standard_normal((1, 1, 30)), 40, axis=2)
    x = (level + rng.standard_normal((1, 10, 1200))).astype(np.float32)
    y = weight @ x[0]
    part = Observed.between(x, y, np.zeros((6, 1)), np.full((6, 1), np.inf), image_means(x, y, 30))
    mask = rng.random((6, 10, 1, 1)) < 0.5
    found = {}
    for image_weight in (0.0, 16.0):
        accumulator = MomentsAccumulator(node, image_weight=image_weight)
        accumulator.add_columns(x, y, 30)
        start = LayerWeights((weight.reshape(mask.shape) * mask).astype(np.float32), np.zeros(6, np.float32))
        fit = fit_rectified([part], accumulator.result(), start, mask, 1e-4, image_weight=image_weight, steps=60)
        given = fit.weight.reshape(6, -1), fit.bias
        found[image_weight] = tuple(float(np.square(m(*given)).mean()) for m in (part.missing, part.common))
    assert found[16.0][1] < 0.9 * found[0.0][1]
    assert found[16.0][0] >= found[0.0][0]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.floats(0.01, 1))
def test_equally_many_positions_of_each_image_are_held(images: int, each: int, share: float) -> None:
    some = _some(images * each, images, share, np.random.default_rng(0))
    wanted = max(1, round(share * each))
    assert (some // each == np.repeat(np.arange(images), wanted)).all()
    assert len(np.unique(some)) == images * wanted


def test_what_is_missing_beyond_the_limits() -> None:
    data = np.ones((1, 1, 4), np.float32)
    target = np.array([[-2.0, 3.0, 9.0, 1.0]], np.float32)
    seen = Observed.between(data, target, np.zeros((1, 1)), np.full((1, 1), 6.0))
    # Outputs are all 0.5, then -1, then 7.
    for output, missing in ((0.5, [-0.5, 2.5, 5.5, 0.5]), (-1.0, [0, 4, 7, 2]), (7.0, [-7, -4, 0, -6])):
        found = seen.missing(np.array([[output]], np.float32), np.zeros(1, np.float32))
        np.testing.assert_allclose(found, [missing], rtol=1e-6)
        # It is what clipping leaves of the difference, but that outputs short of a limit are drawn all the way.
        clipped = np.clip(target, 0, 6) - np.clip(output, 0, 6)
        assert (np.abs(found) >= np.abs(clipped) - 1e-6).all()


def network(after: str) -> OnnxNetwork:
    """Two convolutions of four channels, the second followed by what is asked for."""
    rng = np.random.default_rng(3)
    tensors = {
        "w0": rng.standard_normal((4, 3, 1, 1)),
        "w1": rng.standard_normal((4, 4, 1, 1)),
        "gamma": np.array([1.0, -2.0, 0.5, 0.0]),
        "beta": np.array([0.1, 0.2, -0.3, 0.4]),
        "mean": np.array([0.5, 0.0, -1.0, 1.0]),
        "variance": np.array([1.0, 2.0, 0.5, 1.0]),
        "zero": np.array(0.0),
        "six": np.array(6.0),
    }
    chain = {
        "relu": [helper.make_node("Relu", ["c1"], ["y"])],
        "relu6": [helper.make_node("Clip", ["c1", "zero", "six"], ["y"])],
        "norm": [
            helper.make_node("BatchNormalization", ["c1", "gamma", "beta", "mean", "variance"], ["n"]),
            helper.make_node("Add", ["c0", "n"], ["s"]),
            helper.make_node("Relu", ["s"], ["y"]),
        ],
        "none": [helper.make_node("Sigmoid", ["c1"], ["y"])],
        "twice": [helper.make_node("Relu", ["c1"], ["r"]), helper.make_node("Add", ["r", "c1"], ["y"])],
    }[after]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], name="first"),
        helper.make_node("Conv", ["c0", "w1"], ["c1"], name="second"),
        *chain,
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 5, 5])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items() if k in used],
    )
    return OnnxNetwork(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_what_follows_a_layer() -> None:
    assert what_follows(network("relu"), network("relu").layers["second"]).low == 0
    six = network("relu6")
    found = what_follows(six, six.layers["second"])
    assert (found.low, found.high, found.other) == (0, 6, None)
    normed = network("norm")
    found = what_follows(normed, normed.layers["second"])
    assert (found.low, found.high, found.other) == (0, np.inf, "c0")
    np.testing.assert_allclose(found.scale, [1, -2 / 2**0.5, 0.5 / 0.5**0.5, 0], rtol=1e-4)
    for other in ("none", "twice"):
        assert not what_follows(network(other), network(other).layers["second"]).clips
    # The first one's output is read twice.
    assert not what_follows(normed, normed.layers["first"]).clips


@pytest.mark.parametrize("after", ["relu", "relu6", "norm"])
def test_refits_bring_the_network_nearer(after: str) -> None:
    """Behind batch norms of either sign and additions, what the layer is refitted to is what comes out in the end."""
    net = network(after)
    images = np.random.default_rng(0).standard_normal((40, 3, 5, 5)).astype(np.float32)
    wanted = net.run(images)
    walk = Walk(net, TensorStore(1 << 20))
    walk.start(iter([images[:20], images[20:]]))
    node = net.layers["second"]
    walk.advance(node.position)
    seen = observe_layer(node, walk, walk, 1 << 20, 0, held=1 << 20)
    pattern = parse_pattern("1:4")
    fit = fit_layer(seen.moments, net.weights("second").weight, pattern, 0.25)
    assert sum(part.target.shape[1] for part in seen.positions) == 40 * 25
    assert sum(part.image_target.shape[1] for part in seen.positions) == 40
    better = fit_rectified(seen.positions, seen.moments, fit.weights, fit.mask, 1e-4)
    channels = slice(0, 3) if after == "norm" else slice(None)  # the last one's norm multiplies by zero

    def error(weights: LayerWeights) -> float:
        return float(np.square((net.with_weights({"second": weights}).run(images) - wanted)[:, channels]).mean())

    assert error(better) < 0.97 * error(fit.weights)


def test_positions_are_held_only_where_something_is_cut_off() -> None:
    for after, held in (("none", 1 << 20), ("relu", 0)):
        net = network(after)
        walk = Walk(net, TensorStore(1 << 20))
        walk.start(iter([np.ones((4, 3, 5, 5), np.float32)]))
        walk.advance(net.layers["second"].position)
        assert not observe_layer(net.layers["second"], walk, walk, 1 << 20, 0, held=held).positions


def test_few_images_count_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only many images say what errors they have in common."""
    net = network("relu")
    node = net.layers["second"]
    images = np.random.default_rng(0).standard_normal((40, 3, 5, 5)).astype(np.float32)
    found = {}
    monkeypatch.setattr("tvm_nm.observation._ENOUGH_IMAGES", 16)
    for count in (2, 8, 40):
        walk = Walk(net, TensorStore(1 << 20))
        walk.start(iter([images[: count // 2], images[count // 2 : count]]))
        walk.advance(node.position)
        seen = observe_layer(node, walk, walk, 1 << 20, 0, image_weight=4.0)
        found[count] = seen.image_weight
        data = net.segment(0, node.position, [node.data])({"x": images[:count]})[node.data]
        accumulator = MomentsAccumulator(node, image_weight=seen.image_weight)
        accumulator.add(data, net.segment(node.position, node.position + 1, ["c1"])({node.data: data})["c1"])
        np.testing.assert_allclose(seen.moments.hessian, accumulator.result().hessian, rtol=1e-4, atol=1e-6)
    assert found == {2: 0.0625, 8: 1.0, 40: 4.0}


def test_a_model_without_constants_for_its_clip_is_left_alone() -> None:
    net = network("relu6")
    model = onnx.ModelProto()
    model.CopyFrom(net.model)
    model.graph.node[-1].input[2] = ""
    found = what_follows(OnnxNetwork(model), OnnxNetwork(model).layers["second"])
    assert (found.low, found.high) == (0, np.inf)
