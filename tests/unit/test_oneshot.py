"""One-shot pruning on calibration data, from files to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from tests.models import shared_model
from tvm_nm import onnx_network, reference
from tvm_nm.calibration import ArrayImages
from tvm_nm.cli import cli
from tvm_nm.compiler import compile as compile_model
from tvm_nm.detect import detect_pattern
from tvm_nm.errors import CalibrationError, PlanError
from tvm_nm.frontend import import_onnx
from tvm_nm.layer_pruning import Method, fit_layer, relative_error
from tvm_nm.moments import MomentsAccumulator
from tvm_nm.oneshot import images_per_run
from tvm_nm.onnx_network import LayerNode, LayerWeights, OnnxNetwork
from tvm_nm.onnx_pruning import prune_imported
from tvm_nm.onnx_weights import replace_weights
from tvm_nm.patterns import Dense, parse_pattern
from tvm_nm.plan import LayerChoice, Plan
from tvm_nm.pruning import PruneRequest, prune_file
from tvm_nm.reconstruction import Options, reconstruct
from tvm_nm.reference import calibration_images, reference_model_path, top1
from tvm_nm.tensor_store import TensorStore

RNG = np.random.default_rng(0)


def constant(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def small_network(batch: int | str = "N", bn: bool = False) -> onnx.ModelProto:
    """Stem, residual block, depthwise convolution, pooling, MatMul and Gemm."""
    tensors = {
        "w0": constant(8, 3, 3, 3),
        "w1": constant(16, 8, 3, 3),
        "w2": constant(8, 16, 3, 3),
        "b2": constant(8),
        "wd": constant(8, 1, 3, 3),
        "m": constant(8, 12),
        "g": constant(5, 12),
        **({"s": np.abs(constant(16)) + 0.5, "t": constant(16), "mu": constant(16), "v": np.abs(constant(16)) + 0.5}),
    }
    norm = [helper.make_node("BatchNormalization", ["c1", "s", "t", "mu", "v"], ["n1"])] if bn else []
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], name="stem", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], name="first", pads=[1] * 4),
        *norm,
        helper.make_node("Relu", ["n1" if bn else "c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="second", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r0"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["r2"]),
        helper.make_node("Conv", ["r2", "wd"], ["c3"], name="depthwise", group=8),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["h"], name="hidden"),
        helper.make_node("Relu", ["h"], ["rh"]),
        helper.make_node("Gemm", ["rh", "g"], ["y"], name="classifier", transB=1),
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


IMAGES = RNG.standard_normal((96, 3, 8, 8)).astype(np.float32)


def plan(pattern: str, density: float | None = None, *names: str) -> Plan:
    chosen = parse_pattern(pattern)
    return Plan(
        tuple(LayerChoice(name, chosen, chosen.check_density(density)) for name in names or ("first", "second"))
    )


def answers(network: OnnxNetwork, weights: dict[str, LayerWeights]) -> np.ndarray:
    return network.with_weights(weights).run(IMAGES)


def batches(size: int = 32) -> Callable[[], object]:
    return lambda: (IMAGES[start : start + size] for start in range(0, len(IMAGES), size))


@pytest.mark.parametrize("large", [1, 1 << 20], ids=["weights beside the model", "weights in the model"])
@pytest.mark.parametrize("position", range(0, 13, 3))
def test_segments_put_together_are_the_network(position: int, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = OnnxNetwork(small_network())
    whole = network.run(IMAGES)
    monkeypatch.setattr(onnx_network, "_LARGE", large)
    first = network.segment(0, position, network.frontier(position))
    second = network.segment(position, network.end, [network.output])
    found = {network.input: IMAGES, **first({network.input: IMAGES})}
    np.testing.assert_allclose(second(found)[network.output], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("large", [1, 1 << 20], ids=["weights beside the model", "weights in the model"])
def test_other_weights_are_used_however_they_are_handed_over(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_network, "_LARGE", large)
    network = OnnxNetwork(small_network())
    halved = {
        name: LayerWeights(network.weights(name).weight / 2, network.weights(name).bias / 2) for name in network.layers
    }
    model = small_network()
    for tensor in network.model.graph.initializer:  # the same network, whose weights are drawn at random
        next(t for t in model.graph.initializer if t.name == tensor.name).CopyFrom(tensor)
    replace_weights(model, halved)
    np.testing.assert_allclose(answers(network, halved), OnnxNetwork(model).run(IMAGES), rtol=1e-5, atol=1e-6)
    assert not np.allclose(answers(network, halved), network.run(IMAGES), rtol=1e-2)


@pytest.mark.parametrize("form", ["2:4", "1:4", "2:4t4", "1x4", "1x4p", "1x4u", "1x4pu", "1x3p"])
@pytest.mark.parametrize("method", list(Method))
def test_masks_obey_their_pattern(form: str, method: Method) -> None:
    layer = LayerNode("l", "conv", 0, "x", "y", (16, 8, 3, 3), padding=(1, 1, 1, 1))
    weight, data = constant(16, 8, 3, 3), RNG.standard_normal((20, 8, 8, 8)).astype(np.float32)
    accumulator = MomentsAccumulator(layer)
    accumulator.add(data, RNG.standard_normal((20, 16, 8, 8)).astype(np.float32))
    pattern = parse_pattern(form)
    density = pattern.fixed_density or 0.5
    fit = fit_layer(accumulator.result(), weight, pattern, density, method)
    assert ((fit.weights.weight != 0) == fit.mask).all()
    expected = pattern.mask(np.abs(weight), density)
    assert fit.mask.mean() == pytest.approx(expected.mean())
    if form == "2:4t4":
        assert (fit.mask.reshape(4, 4, 8, 3, 3) == fit.mask[::4, None]).all()
        assert (fit.mask.reshape(16, 2, 4, 3, 3).sum(axis=2) == 2).all()
    else:
        assert str(detect_pattern(fit.mask).pattern) in (form, form.removesuffix("u"))
    # Of its mask, it is the choice of least damage when the damage is measured the way that it was chosen.
    if method is Method.OBS:
        other = fit_layer(accumulator.result(), weight, pattern, density, Method.LS)
        assert fit.error <= other.error * 1.02


def test_wide_layers_take_the_road_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm_nm.layer_pruning._WIDE", 10)
    test_masks_obey_their_pattern("2:4", Method.OBS)
    test_masks_obey_their_pattern("1:4", Method.OBS)


@pytest.mark.parametrize("bn", [False, True])
def test_refitting_what_nothing_was_taken_from_changes_nothing(bn: bool) -> None:
    network = OnnxNetwork(small_network(bn=bn))
    found = reconstruct(network, plan("1x4p", 1.0), batches()(), Options(damping=1e-6))
    np.testing.assert_allclose(answers(network, found.weights), answers(network, {}), rtol=1e-2, atol=1e-3)
    assert all(layer.error < 1e-4 for layer in found.layers)


@pytest.mark.parametrize("bn", [False, True])
def test_each_method_is_better_than_the_one_before(bn: bool) -> None:
    network = OnnxNetwork(small_network(bn=bn))
    dense = answers(network, {})
    errors, first = [], []
    for method in Method:
        found = reconstruct(network, plan("1x4p", 0.5), batches()(), Options(method=method))
        assert set(found.masks) == {"first", "second"}
        assert set(found.weights) == {"first", "second", "depthwise", "hidden", "classifier"}
        errors.append(float(((answers(network, found.weights) - dense) ** 2).mean()))
        first.append(found.layers[0].error)
    assert max(errors[1:]) < errors[0]
    assert first[2] < first[1] < first[0]


def test_neither_batches_nor_memory_change_the_result() -> None:
    network = OnnxNetwork(small_network())
    at_once = reconstruct(network, plan("2:4"), batches(96)())
    spilled = reconstruct(network, plan("2:4"), batches(17)(), Options(memory=0))
    # Sums in another order may decide between weights that cost the same, which moves what follows them a little.
    for one, other in zip(at_once.layers, spilled.layers, strict=True):
        assert other.error == pytest.approx(one.error, rel=0.05)
    first = at_once.layers[0].name
    same = np.isclose(spilled.weights[first].weight, at_once.weights[first].weight, rtol=1e-2, atol=1e-3)
    assert same.mean() > 0.95


def test_store_within_its_budget() -> None:
    store = TensorStore(1000)
    arrays = [RNG.standard_normal((10, 10)).astype(np.float32) for _ in range(4)]
    stored = [store.put(array) for array in arrays]
    assert store.held == 800
    for array, kept in zip(arrays, stored, strict=True):
        np.testing.assert_array_equal(kept.get(), array)
    del stored, kept
    assert store.held == 0


def test_unknown_layers() -> None:
    with pytest.raises(PlanError, match="frist"):
        reconstruct(OnnxNetwork(small_network()), plan("2:4", None, "frist"), batches()())


def test_a_plan_for_layers_that_do_not_exist(tmp_path: Path) -> None:
    onnx.save(small_network(1), tmp_path / "model.onnx")
    imported = import_onnx(tmp_path / "model.onnx", verify=False)
    images = ArrayImages(RNG.standard_normal((4, 3, 8, 8)).astype(np.float32))
    model = onnx.load(tmp_path / "model.onnx")
    for method in (Method.OBS, Method.MAGNITUDE):
        with pytest.raises(PlanError, match=r"layer 'first\.weight'.*first"):
            prune_imported(imported, [imported.module], model, plan("2:4", None, "first.weight"), images, method)


@pytest.mark.parametrize("bn", [False, True])
def test_replaced_weights_end_up_in_the_file(bn: bool) -> None:
    model = small_network(bn=bn)
    network = OnnxNetwork(model)
    found = reconstruct(network, plan("2:4"), batches()())
    expected = answers(network, found.weights)
    replace_weights(model, found.weights)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(OnnxNetwork(model).run(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_a_shared_weight_is_left_to_the_other_reader() -> None:
    model = small_network()
    model.graph.node.append(helper.make_node("Conv", ["r0", "w1"], ["other"], name="other", pads=[1] * 4))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["N", 16, 8, 8]))
    network = OnnxNetwork(model)
    before = network.weights("other").weight
    replace_weights(model, {"first": LayerWeights(constant(16, 8, 3, 3), constant(16))})
    after = OnnxNetwork(model)
    np.testing.assert_array_equal(after.weights("other").weight, before)
    assert not np.array_equal(after.weights("first").weight, before)


def test_models_for_a_single_image_run_on_one_at_a_time() -> None:
    images = ArrayImages(IMAGES)
    assert images_per_run(OnnxNetwork(small_network()), images) == 64
    model = small_network(batch=1)
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("shape")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 8]), "shape"))
    assert images_per_run(OnnxNetwork(model), images) == 1
    with pytest.raises(CalibrationError):
        images_per_run(OnnxNetwork(model), ArrayImages(IMAGES[:, :2]))


def test_dense_layers_are_refitted_to_the_target() -> None:
    layer = LayerNode("l", "fc", 0, "x", "y", (4, 6, 1, 1))
    data, true = RNG.standard_normal((200, 6)), constant(4, 6)
    accumulator = MomentsAccumulator(layer)
    accumulator.add(data, data @ true.T + 3)
    fit = fit_layer(accumulator.result(), constant(4, 6, 1, 1), Dense(), 1.0, damping=1e-9)
    np.testing.assert_allclose(fit.weights.weight.reshape(4, 6), true, atol=1e-5)
    np.testing.assert_allclose(fit.weights.bias, 3, atol=1e-4)
    assert relative_error(accumulator.result(), fit.weights.weight) < 1e-6


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded network pruned to 2:4 by magnitude and on its images."""
    folder = tmp_path_factory.mktemp("calibrated")
    np.save(folder / "images.npy", calibration_images()[:256])
    for method in ("magnitude", "obs"):
        result = CliRunner().invoke(
            cli,
            [
                *("prune", str(reference_model_path()), "-o", str(folder / f"{method}.onnx"), "--pattern", "2:4"),
                *("--calib", str(folder / "images.npy"), "--calib-images", "64", "--method", method),
                *("--exclude", "/block[34]*"),
            ],
        )
        assert result.exit_code == 0, result.output
    return {method: folder / f"{method}.onnx" for method in ("magnitude", "obs")}


def test_the_embedded_network_keeps_its_accuracy(calibrated: dict[str, Path]) -> None:
    images, labels = reference.test_set()
    images, labels = images[:1000], labels[:1000]
    scores = {}
    for name, path in {"dense": reference_model_path(), **calibrated}.items():
        network = OnnxNetwork(onnx.load(path))
        scores[name] = top1(network.run, images, labels, 100)
    assert scores["magnitude"] < scores["obs"]
    assert scores["obs"] > scores["dense"] - 0.01


def test_a_calibrated_build_is_verified(tmp_path: Path) -> None:
    built = compile_model(
        reference_model_path(),
        output=tmp_path / "built",
        pattern="1x16p",
        images=ArrayImages(calibration_images()[:64]),
        threads=1,
    )
    assert built.manifest.verification is not None
    assert built.manifest.model == "reference"
    patterns = {layer.pattern for layer in built.manifest.layers}
    assert "1x16p" in patterns


def test_methods_that_need_data(tmp_path: Path) -> None:
    request = PruneRequest.make("2:4", method="obs")
    with pytest.raises(CalibrationError, match="--calib"):
        prune_file(reference_model_path(), tmp_path / "out.onnx", request)
    with pytest.raises(PlanError):
        PruneRequest.make("2:4", method="best")
    result = CliRunner().invoke(
        cli, ["prune", str(reference_model_path()), "-o", str(tmp_path / "o.onnx"), "--preprocess", "scale=1"]
    )
    assert result.exit_code == 2
    assert "--calib" in result.output


def test_trained_networks_keep_their_answers(tmp_path: Path) -> None:
    """On random images, which are all that can be relied on here: the answers stay near the dense ones."""
    path = shared_model("resnet20_cifar10")
    images = RNG.standard_normal((64, 3, 32, 32)).astype(np.float32)
    prune_file(path, tmp_path / "m.onnx", PruneRequest.make("1x16p", 0.5))
    prune_file(path, tmp_path / "o.onnx", PruneRequest.make("1x16p", 0.5), images=ArrayImages(images))
    dense, magnitude, obs = (
        OnnxNetwork(onnx.load(p)).run(images) for p in (path, tmp_path / "m.onnx", tmp_path / "o.onnx")
    )
    assert ((obs - dense) ** 2).mean() < 0.3 * ((magnitude - dense) ** 2).mean()
