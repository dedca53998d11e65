"""What weights are worth, and rearrangement by that: files, builds and the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from tvm_nm.calibration import ArrayImages
from tvm_nm.cli import cli
from tvm_nm.compiler import compile as compile_model
from tvm_nm.detect import detect_pattern
from tvm_nm.evaluation import evaluate
from tvm_nm.frontend import import_onnx
from tvm_nm.inventory import layer_calls
from tvm_nm.moments import MomentsAccumulator
from tvm_nm.oneshot import plan_saliency
from tvm_nm.onnx_network import OnnxNetwork
from tvm_nm.onnx_pruning import prune_imported
from tvm_nm.pruning import PruneRequest, prune_file
from tvm_nm.reference import calibration_images, reference_model_path
from tvm_nm.refit import masked_least_squares
from tvm_nm.saliency import calibrated_saliency

MODEL = reference_model_path()
IMAGES = ArrayImages(calibration_images()[:64])
RNG = np.random.default_rng(0)
SPARED = ["/block[34]*"]  # half of the layers, and nearly all of the time


def grouped_network() -> onnx.ModelProto:
    tensors = {"a": RNG.standard_normal((6, 4, 1, 1)), "b": RNG.standard_normal((4, 3, 2, 2))}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["y"], name="first"),
        helper.make_node("Relu", ["y"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["z"], name="second", group=2),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, 6, 6]) for n, c in (("x", 4), ("z", 4))]
    values[1].type.tensor_type.shape.dim[2].dim_value = values[1].type.tensor_type.shape.dim[3].dim_value = 5
    graph = helper.make_graph(
        nodes,
        "g",
        values[:1],
        values[1:],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_saliency_is_what_removing_a_weight_costs() -> None:
    network = OnnxNetwork(grouped_network())
    images = RNG.standard_normal((30, 4, 6, 6)).astype(np.float32)
    batches = lambda: iter([images[:20], images[20:]])  # noqa: E731
    scale = np.array([1.0, 2.0, 3.0, 4.0])
    found = calibrated_saliency(network, {"first": None, "second": scale}, batches(), damping=1e-9)
    assert set(found) == {"first", "second"}
    for name, importance in (("first", np.ones(6)), ("second", scale)):
        layer = network.layers[name]
        weight = network.weights(name).weight
        data = network.segment(0, layer.position, [layer.data])({"x": images})[layer.data] if layer.position else images
        accumulator = MomentsAccumulator(layer)
        accumulator.add(
            data, network.segment(layer.position, layer.position + 1, [layer.output])({layer.data: data})[layer.output]
        )
        moments = accumulator.result()
        per_group = len(weight) // layer.groups
        costs = np.empty((len(weight), weight[0].size))
        for row, flat in enumerate(weight.reshape(len(weight), -1).astype(np.float64)):
            hessian = moments.hessian[row // per_group]
            for column in range(len(flat)):
                mask = np.arange(len(flat)) != column
                refitted = masked_least_squares(flat[None], hessian, mask[None])[0]
                costs[row, column] = importance[row] * (refitted - flat) @ hessian @ (refitted - flat)
        np.testing.assert_allclose(found[name].reshape(costs.shape), costs / costs.mean(), rtol=2e-3)
        assert found[name].mean() == pytest.approx(1, rel=1e-5)


def test_layers_without_a_hessian_have_their_squared_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm_nm.reconstruction import Options

    module = import_onnx(MODEL, verify=False).module
    plan = PruneRequest.make("1x4p", 0.5).plan(module)
    found = plan_saliency(onnx.load(MODEL), module, plan, IMAGES, options=Options(max_columns=100))
    assert set(found) == {choice.name for choice in plan.layers}
    wide = 0
    for call in layer_calls(module):
        if call.layer.name in found:
            squares = call.weight**2
            same = np.allclose(found[call.layer.name], squares / squares.mean(), rtol=1e-4)
            assert same == (call.weight[0].size > 100)
            wide += same
    assert 0 < wide < len(found)


@pytest.mark.parametrize("pattern", ["1x4p", "2:4"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_rearranged_files_have_the_pattern_and_answer_alike(pattern: str, calibrated: bool, tmp_path: Path) -> None:
    request = PruneRequest.make(pattern, 0.5, exclude=SPARED, rearrange="swap")
    data = IMAGES if calibrated else None
    done = prune_file(MODEL, tmp_path / "r.onnx", request, images=data)
    assert done.rearrangement is not None
    before, after = done.rearrangement.kept
    assert after > before
    for call in layer_calls(import_onnx(tmp_path / "r.onnx", verify=False).module):
        if call.layer.name in done.masks:
            np.testing.assert_array_equal(call.weight_view[~done.masks[call.layer.name]], 0)
            form = str(detect_pattern(done.masks[call.layer.name], call.layer.groups).pattern)
            assert form == (pattern.rstrip("p") if call.weight_view[0, 0].size == 1 else pattern)
    # Most channels moved, and the network still answers as the dense one does.
    assert any(row.outputs_moved for row in done.rearrangement.layers)
    assert evaluate(tmp_path / "r.onnx", IMAGES, MODEL).same > (0.95 if calibrated else 0.3)


def test_what_is_written_is_the_dense_network_in_another_order(tmp_path: Path) -> None:
    """With a plan that drops next to nothing, the answers are the same to rounding."""
    imported = import_onnx(MODEL, verify=False)
    plan = PruneRequest.make("1x16p", 0.999).plan(imported.module)
    done = prune_imported(imported, [imported.module], onnx.load(MODEL), plan, rearrange="sort")
    onnx.save(done.model, tmp_path / "r.onnx")
    found = evaluate(tmp_path / "r.onnx", IMAGES, MODEL)
    assert found.same > 0.98
    assert done.rearrangement is not None
    assert sum(row.outputs_moved for row in done.rearrangement.layers) > 50


def test_builds_and_the_command_line(tmp_path: Path) -> None:
    built = compile_model(
        MODEL,
        output=tmp_path / "b",
        pattern="1x16p",
        exclude=SPARED,
        images=IMAGES,
        rearrange="cluster",
        threads=1,
        shipped_records=False,
    )
    assert built.manifest.verification is not None
    assert built.manifest.rearrangement is not None
    assert built.manifest.rearrangement.method == "cluster"
    assert "1x16p" in {layer.pattern for layer in built.manifest.layers}
    arguments = ["prune", str(MODEL), "-o", str(tmp_path / "p.onnx"), "--pattern", "2:4", "--rearrange", "swap"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "of the L1 norm is kept, not" in result.output
