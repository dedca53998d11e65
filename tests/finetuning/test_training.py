"""Training: it learns, keeps zeros, goes on where it stopped, and says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from tests.models import small_cnn  # noqa: E402
from tvm_nm import reference  # noqa: E402
from tvm_nm.agreement import compare_answers  # noqa: E402
from tvm_nm.calibration import ArrayImages  # noqa: E402
from tvm_nm.cli import cli  # noqa: E402
from tvm_nm.compiler import compile as compile_model  # noqa: E402
from tvm_nm.errors import ArtifactError, CalibrationError, ModelMismatchError, PlanError  # noqa: E402
from tvm_nm.onnx_network import OnnxNetwork  # noqa: E402
from tvm_nm.pruning import PruneRequest, prune_file  # noqa: E402
from tvm_nm.torch import (  # noqa: E402
    Augmentation,
    Objective,
    Phase,
    Status,
    TrainingOptions,
    import_model,
    reconstruct_network,
    train,
)
from tvm_nm.torch.network_stage import DEFAULTS, block_borders  # noqa: E402
from tvm_nm.torch.options import cosine_rate  # noqa: E402

OPTIONS = TrainingOptions(epochs=2, batch=16, learning_rate=0.05, precision="float32", device="cpu")


def toy_images(count: int = 64, seed: int = 0) -> ArrayImages:
    """Images whose class is the quarter that is bright."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = rng.standard_normal((count, 3, 16, 16)).astype(np.float32) * 0.5
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1.5
    return ArrayImages(images, labels)


def unlabelled(images: ArrayImages) -> ArrayImages:
    return ArrayImages(images.take(np.arange(images.count)))


def classifier() -> onnx.ModelProto:
    """A network that can tell quarters apart: it does not pool all of them into one."""
    from tests.models import Net

    net = Net(("N", 3, 16, 16))
    x = net.add("Relu", net.batch_norm(net.conv("input", (8, 3, 3, 3), bias=False, pads=[1] * 4), 8))
    x = net.add("Relu", net.conv(x, (8, 8, 3, 3), pads=[1] * 4))
    x = net.add("Flatten", net.add("AveragePool", x, kernel_shape=[8, 8], strides=[8, 8]))
    return net.model(net.fc(x, 32, 4))


def conv_names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == "Conv"]


def half(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    imported = import_model(model)
    return {name: rng.random(imported.weight(name).shape) < 0.5 for name in conv_names(model)}


def parameters(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("batch_norm", ["keep", "insert", "freeze"])
def test_a_pruned_model_learns_and_keeps_its_zeros(batch_norm: Any) -> None:
    model = classifier()
    options = dataclasses.replace(OPTIONS, epochs=10, batch_norm=batch_norm)
    done = train(model, toy_images(), options, masks=half(model), test=toy_images(seed=1))
    first, last = done.epochs[0], done.epochs[-1]
    assert last.number == 10
    assert last.score is not None
    assert last.score.top1 is not None
    assert last.score.top1 > 0.9
    assert last.loss < first.loss / 2
    again = import_model(done.model)
    for name, mask in half(model).items():
        np.testing.assert_array_equal(again.weight(name) != 0, mask)


def test_distillation_needs_no_labels() -> None:
    dense = train(classifier(), toy_images(), dataclasses.replace(OPTIONS, epochs=10)).model
    images = toy_images(seed=2)
    masks = half(dense)
    pruned = train(dense, images, dataclasses.replace(OPTIONS, learning_rate=1e-9, epochs=1), masks=masks).model
    done = train(pruned, unlabelled(images), dataclasses.replace(OPTIONS, epochs=10), dense=dense)
    batch = images.take(np.arange(images.count))
    wanted = OnnxNetwork(dense).run(batch)
    before, after = (compare_answers(wanted, OnnxNetwork(m).run(batch)).divergence for m in (pruned, done.model))
    assert after < before / 4
    with pytest.raises(CalibrationError, match="no labels"):
        train(pruned, unlabelled(images), OPTIONS)


class InterruptedRunError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("batch_norm", ["keep", "insert"])
@pytest.mark.parametrize("stop", [3, 4])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, stop: int, batch_norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvm_nm.torch.training._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    model, images = classifier(), toy_images(56)
    options = dataclasses.replace(
        OPTIONS, augmentation=Augmentation(2, True), batch_norm=batch_norm, objective=Objective(0.5)
    )
    phases = (Phase(0.0, {conv_names(model)[1]: (_pattern("3:4"), 0.75)}),)
    phases += (Phase(0.7, {conv_names(model)[1]: (_pattern("1:4"), 0.25)}),)
    common: dict[str, Any] = {"dense": model, "phases": phases, "test": images}
    whole = train(model, images, options, **common)
    checkpoint = tmp_path / "run.checkpoint"

    def interrupt(status: Status) -> None:
        assert status.steps == 6
        if status.step == stop:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        train(model, images, options, **common, checkpoint=checkpoint, progress=interrupt)
    assert checkpoint.is_file()
    seen: list[int] = []
    resumed = train(model, images, options, **common, checkpoint=checkpoint, progress=lambda s: seen.append(s.step))
    assert seen == list(range(stop, 7))  # the interrupted step came before its checkpoint
    assert not checkpoint.exists()
    for name, array in parameters(whole.model).items():
        np.testing.assert_array_equal(array, parameters(resumed.model)[name])
    assert [e.number for e in resumed.epochs] == [1, 2]
    assert [e.score for e in resumed.epochs] == [e.score for e in whole.epochs]
    with pytest.raises(InterruptedRunError):
        train(model, images, options, **common, checkpoint=checkpoint, progress=interrupt)
    with pytest.raises(ArtifactError, match="another run"):
        train(model, images, dataclasses.replace(options, seed=1), **common, checkpoint=checkpoint)
    checkpoint.write_bytes(b"junk")
    with pytest.raises(ArtifactError, match="cannot be read"):
        train(model, images, options, **common, checkpoint=checkpoint)


def _pattern(text: str) -> Any:
    from tvm_nm.patterns import parse_pattern

    return parse_pattern(text)


def test_the_best_epoch_is_kept() -> None:
    # A rate that ruins the network: the first epochs are the better ones.
    options = dataclasses.replace(OPTIONS, epochs=4, learning_rate=0.5, warmup=0.9, keep="best")
    images = toy_images()
    start = train(classifier(), images, dataclasses.replace(OPTIONS, epochs=10)).model
    done = train(start, images, options, test=images)
    scores = [epoch.score for epoch in done.epochs if epoch.score is not None]
    best = max(scores, key=lambda score: (score.top1 or 0, -score.divergence))
    assert scores[done.kept - 1] == best
    answers = OnnxNetwork(done.model).run(images.take(np.arange(images.count)))
    assert float((answers.argmax(1) == images.labels).mean()) == pytest.approx(best.top1, abs=0.02)
    with pytest.raises(PlanError, match="test set"):
        train(start, images, options)


def test_divergence_is_an_error() -> None:
    options = dataclasses.replace(OPTIONS, learning_rate=1e6, clip=0.0, batch_norm="freeze")
    with pytest.raises(ModelMismatchError, match="lower learning rate"):
        train(classifier(), toy_images(), options)


def test_any_optimiser_and_schedule() -> None:
    made: list[torch.optim.Optimizer] = []

    def make(groups: Any, rate: float) -> torch.optim.Optimizer:
        made.append(torch.optim.RAdam(groups, rate))
        return made[0]

    model = classifier()
    done = train(model, toy_images(), dataclasses.replace(OPTIONS, optimizer=make), masks=half(model))
    assert len(made) == 1
    assert made[0].param_groups[0]["lr"] < OPTIONS.learning_rate * 0.2  # the cosine has come down
    assert not import_model(done.model).weight(conv_names(model)[0])[~half(model)[conv_names(model)[0]]].any()
    rates = [cosine_rate(step, 100, 0.1) for step in range(100)]
    assert np.argmax(rates) in (9, 10)
    assert rates[10] == 1
    assert rates[-1] < 0.01
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("text", ["shift=2", "flip", "shift=3,flip", "shift=2,flip,zoom=0.5", "none"])
def test_augmentation_moves_what_is_there(text: str) -> None:
    images = toy_images(8).take(np.arange(8))
    augmentation = Augmentation.parse(text)
    found = augmentation(images, np.random.default_rng(0))
    again = augmentation(images, np.random.default_rng(0))
    assert found.shape == images.shape
    np.testing.assert_array_equal(found, again)
    if text == "none":
        np.testing.assert_array_equal(found, images)
    elif "zoom" not in text:  # the same pixels in other places, all channels alike
        assert (found != images).any()
        for before, after in zip(images, found, strict=True):
            pixels = {tuple(pixel) for pixel in before.reshape(3, -1).T}
            assert {tuple(pixel) for pixel in after.reshape(3, -1).T} <= pixels
    else:
        assert found.min() >= images.min() - 1e-5
        assert found.max() <= images.max() + 1e-5


@pytest.mark.parametrize("text", ["shift=-1", "zoom=0", "zoom=x", "rotate"])
def test_bad_augmentation_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match=r"shift=4,flip,zoom=0\.5"):
        Augmentation.parse(text)


def test_block_borders_of_a_residual_network() -> None:
    model = onnx.load(reference.reference_model_path())
    borders = block_borders(model)
    adds = {output for node in model.graph.node if node.op_type == "Add" for output in node.output}
    after_adds = {node.output[0] for node in model.graph.node if set(node.input) & adds}
    assert len(adds) == 4
    assert after_adds <= set(borders)
    network = OnnxNetwork(model)
    inside = {network.layers[name].data for name in network.layers} - set(borders) - {network.input}
    assert inside  # what is within a block is no border


@pytest.fixture(scope="module")
def pruned_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded network in 1x16p, by magnitude: it keeps a fifth of its accuracy."""
    path = tmp_path_factory.mktemp("pruned") / "pruned.onnx"
    prune_file(reference.reference_model_path(), path, PruneRequest.make("1x16p", 0.5))
    return path


def test_the_network_stage_brings_back_the_dense_answers(pruned_reference: Path) -> None:
    pruned, dense = onnx.load(pruned_reference), onnx.load(reference.reference_model_path())
    images, labels = reference.test_set()
    options = dataclasses.replace(DEFAULTS, epochs=2, learning_rate=1e-3, augmentation=Augmentation())
    done = reconstruct_network(pruned, dense, ArrayImages(reference.calibration_images()[:256]), options)
    before, after = (
        float((OnnxNetwork(m).run(images[:400]).argmax(1) == labels[:400]).mean()) for m in (pruned, done.model)
    )
    assert before < 0.5
    assert after > 0.8
    found = import_model(done.model)
    for name, mask in done.masks.items():
        np.testing.assert_array_equal(found.weight(name) != 0, mask)


def test_the_command_trains_from_file_to_file_without_retuning(pruned_reference: Path, tmp_path: Path) -> None:
    images, labels = reference.test_set()
    np.savez(tmp_path / "train.npz", images=images[:256], labels=labels[:256])
    np.savez(tmp_path / "test.npz", images=images[256:512], labels=labels[256:512])
    output = tmp_path / "tuned.onnx"
    command = ["finetune", str(pruned_reference), "-o", str(output), "--data", str(tmp_path / "train.npz")]
    command += ["--test", str(tmp_path / "test.npz"), "--dense", str(reference.reference_model_path()), "--epochs", "2"]
    command += ["--batch", "32", "--augment", "shift=1", "--threads", "1", "--json", "-"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2]
    assert report["after"]["top1"] > report["before"]["top1"] + 0.2
    assert report["after"]["images"] == 256
    assert {layer["pattern"] for layer in report["layers"]} <= {"1x16", "1x16p"}
    assert not output.with_name("tuned.onnx.checkpoint").exists()
    # The graph is the same, and so is every kernel of a build.
    before, after = onnx.load(pruned_reference), onnx.load(output)
    assert [n.SerializeToString() for n in before.graph.node] == [n.SerializeToString() for n in after.graph.node]
    builds = [
        compile_model(path, pattern="dense", verify=False, threads=1).manifest for path in (pruned_reference, output)
    ]
    one, other = ([layer.to_dict() for layer in build.layers] for build in builds)
    assert one == other
    assert sum(layer["pattern"] != "dense" for layer in one) > 2


def test_the_help_says_the_defaults() -> None:
    said = " ".join(CliRunner().invoke(cli, ["refit", "--help"]).stdout.split())
    one, other = TrainingOptions(), DEFAULTS
    assert f"[default: {one.epochs:g}; refit: {other.epochs:g}]" in said
    assert f"[default: {one.batch}; refit: {other.batch}]" in said
    assert f"[default: {one.learning_rate:g}; refit: {other.learning_rate:g}]" in said
    assert f"[default: {one.optimizer}; refit: {other.optimizer}]" in said
    assert f"[default: {one.batch_norm}; refit: {other.batch_norm}]" in said


@pytest.mark.parametrize("command", ["finetune", "refit"])
def test_a_finished_training_is_kept_until_its_result_is_written(
    command: str, pruned_reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "images.npy", reference.calibration_images()[:32])
    output = tmp_path / "tuned.onnx"
    arguments = [command, str(pruned_reference), "-o", str(output), "--epochs", "1", "--batch", "16", "--threads", "1"]
    arguments += ["--dense", str(reference.reference_model_path())]
    arguments += ["--data" if command == "finetune" else "--calib", str(tmp_path / "images.npy")]

    def full(path: Path, *_: object) -> None:
        raise ArtifactError(f"cannot write model {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tvm_nm.torch.finetune.write_bytes", full)
        failed = CliRunner().invoke(cli, arguments)
    assert failed.exit_code == 2, failed.output
    assert failed.stderr.endswith(f"error: cannot write model {output}: No space left on device\n")
    assert output.with_name("tuned.onnx.checkpoint").is_file()
    monkeypatch.setattr("tvm_nm.torch.training._Run._step", lambda *_: pytest.fail("trained again"))
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "tuned.onnx"]


def test_the_refit_command(pruned_reference: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", reference.calibration_images()[:64])
    command = [
        "refit",
        str(pruned_reference),
        "--dense",
        str(reference.reference_model_path()),
        "-o",
        str(tmp_path / "out.onnx"),
    ]
    command += ["--calib", str(tmp_path / "images.npy"), "--epochs", "1", "--threads", "1"]
    command += ["--test", str(tmp_path / "images.npy")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert "layers keep their zeros" in result.output
    assert re.search(r"before: [\d.]+% as the dense model on 64 images\nafter: [\d.]+% as", result.output)
    assert (tmp_path / "out.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distill", "0.5"], "--distill needs --dense"),
        (["--gradual", "2"], "--gradual needs"),
        (["--density", "0.5"], "need --pattern"),
        (["--device", "nonsense"], "cannot use the device"),
        (["--augment", "spin"], "shift=4,flip,zoom=0.5"),
        (["--temperature", "0", "--dense", str(reference.reference_model_path())], "positive temperature"),
        (["--pattern", "3:2"], "N:M"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    images, labels = reference.test_set()
    np.savez(tmp_path / "train.npz", images=images[:8], labels=labels[:8])
    command = ["finetune", str(reference.reference_model_path()), "-o", str(tmp_path / "out.onnx")]
    result = CliRunner().invoke(cli, [*command, "--data", str(tmp_path / "train.npz"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out.onnx").exists()


def test_gradual_pruning_from_the_command_line(tmp_path: Path) -> None:
    images, labels = reference.test_set()
    np.savez(tmp_path / "train.npz", images=images[:192], labels=labels[:192])
    output = tmp_path / "out.onnx"
    command = [
        "finetune",
        str(reference.reference_model_path()),
        "-o",
        str(output),
        "--data",
        str(tmp_path / "train.npz"),
    ]
    command += ["--pattern", "1x16p", "--density", "0.5", "--epochs", "2", "--batch", "32", "--threads", "1"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    imported = import_model(onnx.load(output))
    densities = [np.count_nonzero(imported.weight(name)) / imported.weight(name).size for name in imported.layers]
    assert sum(abs(density - 0.5) < 0.01 for density in densities) > 5


def test_without_pytorch_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tvm_nm.torch") or name == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    command = ["finetune", str(reference.reference_model_path()), "-o", str(tmp_path / "out.onnx"), "--data", "x.npz"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2
    assert "pip install 'tvm-nm[torch]'" in result.output


def test_small_cnn_is_trained_in_bfloat16() -> None:
    images = ArrayImages(
        np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32), np.arange(16) % 10
    )
    done = train(small_cnn(), images, dataclasses.replace(OPTIONS, precision="bf16", epochs=1))
    assert all(np.isfinite(array).all() for array in parameters(done.model).values())
