"""The scripts that train: seconds-long runs of each, resumed once."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tvm_nm.patterns import parse_pattern
from tvm_nm.plan import LayerChoice, Plan

pytest.importorskip("torch", reason="the extra torch is not installed")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of the size of CIFAR's images; the class is the colour that is brightest."""
    folder = tmp_path_factory.mktemp("cifar")
    for name, seed in (("train", 0), ("test", 1)):
        rng = np.random.default_rng(seed)
        labels = np.arange(48) % 3
        images = rng.integers(0, 128, (48, 32, 32, 3))
        images[np.arange(48), :, :, labels] += 100
        np.savez(folder / f"{name}.npz", images=images.astype(np.uint8), labels=labels)
    return ["--train", str(folder / "train.npz"), "--test", str(folder / "test.npz")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script in this process, which has PyTorch and TVM loaded."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def call(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return call


def test_paper_networks_have_the_known_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import paper_networks

    for model, parameters in ((paper_networks.vgg16_bn(), 14.7e6), (paper_networks.mobilenet_v2(), 2.24e6)):
        sizes = [np.prod(t.dims) for t in model.graph.initializer if t.name.endswith("weight")]
        assert sum(sizes) == pytest.approx(parameters, rel=0.02)
    dense = paper_networks.mobilenet_v2(0.25)
    smaller = paper_networks.hidden_filters(dense, 0.5, 0.25)
    onnx.checker.check_model(smaller, full_check=True)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in dense.graph.initializer}
    halves = {t.name: onnx.numpy_helper.to_array(t) for t in smaller.graph.initializer}
    large, small = arrays["block5.expand.weight"], halves["block5.expand.weight"]
    assert len(small) * 2 == len(large)
    norms = np.abs(large).sum(axis=(1, 2, 3))
    assert np.abs(small).sum() == pytest.approx(np.sort(norms)[len(norms) // 2 :].sum(), rel=1e-5)


def test_the_second_paper_in_small(cifar: list[str], tmp_path: Path, run: Callable[..., str]) -> None:
    options = [*cifar, "--work", str(tmp_path), "--epochs", "1", "--tune-epochs", "1", "--batch", "24"]
    options += ["--width", "0.125"]
    blocks = ["1x4", "1x4, rearranged", "1x4, rearranged, on images"]
    everything = ["--rows", "dense", "unstructured", *blocks, "filters by L1"]
    first = run("reproduce_papers", "second", *options, "--no-times", *everything)
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+% \| [-+][\d.]+% \|  \|  \|$", first, re.MULTILINE)
    assert rows == everything[1:]
    # Half of the weights of each pruned layer are zero, whichever they are.
    weights = []
    for stem in ("unstructured", "1x4", "1x4__rearranged", "1x4__rearranged__on_images"):
        model = onnx.load(tmp_path / "second" / f"{stem}-0.onnx")
        tensor = next(t for t in model.graph.initializer if t.name == "block14.project.weight")
        weights.append(onnx.numpy_helper.to_array(tensor) != 0)
        assert np.count_nonzero(weights[-1]) == np.prod(tensor.dims) // 2
    assert not np.array_equal(weights[1], weights[2])
    assert not np.array_equal(weights[2], weights[3])


@pytest.mark.slow
def test_the_second_paper_is_resumed_and_measured(cifar: list[str], tmp_path: Path, run: Callable[..., str]) -> None:
    options = [*cifar, "--work", str(tmp_path), "--epochs", "1", "--tune-epochs", "1", "--batch", "24"]
    options += ["--width", "0.125"]
    first = run("reproduce_papers", "second", *options, "--no-times", "--rows", "dense", "1x4, rearranged")
    again = run("reproduce_papers", "second", *options, "--rows", "dense", "1x4, rearranged")
    assert not re.search(r"^training ", again, re.MULTILINE)
    times = json.loads((tmp_path / "second" / "times.json").read_text())
    assert times["dense"][1] == 1.0
    assert set(times) == {"dense", "1x4, rearranged"}
    for line in again.splitlines():
        if line.startswith("| 1x4, rearranged |"):
            assert line.split("|")[2:4] == next(x for x in first.splitlines() if x[:18] == line[:18]).split("|")[2:4]


@pytest.mark.slow
def test_the_first_paper_in_small(cifar: list[str], tmp_path: Path, run: Callable[..., str]) -> None:
    options = ["--work", str(tmp_path), "--epochs", "1", "--tune-epochs", "1", "--batch", "24", "--width", "0.5"]
    rows = ["--rows", "dense", "all patterns, calibrated"]
    assert "training dense-0" not in run("reproduce_papers", "first", *cifar, *options, *rows, "--prune-only")
    assert (tmp_path / "first" / "all_patterns__calibrated.plan.json").is_file()
    output = run("reproduce_papers", "first", *cifar, *options, *rows)
    assert "| all patterns, calibrated |" in output


def test_the_study_of_fine_tuning_in_small(
    cifar: list[str], tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import paper_networks

    onnx.save(paper_networks.vgg16_bn(0.125), tmp_path / "model.onnx")
    options = [str(tmp_path / "model.onnx"), *cifar, "--work", str(tmp_path / "work"), "--epochs", "1"]
    options += ["--batch", "24", "--patterns", "2:4"]
    output = run("finetune_study", *options)
    assert re.search(r"^\| dense \|( [\d.]+% \| [\d.]+% \| \+0\.00% \|)", output, re.MULTILINE)
    assert re.search(r"^\| 2:4 \|", output, re.MULTILINE)
    assert "training " not in run("finetune_study", *options)
    with pytest.raises(SystemExit, match="other settings"):
        run("finetune_study", *options, "--lr", "0.5")


def test_the_study_of_fine_tuning_takes_plans_and_pruned_networks(
    cifar: list[str], tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import paper_networks

    model = paper_networks.vgg16_bn(0.125)
    onnx.save(model, tmp_path / "model.onnx")
    choice = LayerChoice("conv3_2", parse_pattern("1x16"), 0.5)
    Plan((choice,)).save(tmp_path / "fast.plan.json")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "conv5_1.weight")
    half = onnx.numpy_helper.to_array(weight) * (np.arange(weight.dims[1]) % 2)[:, None, None]
    weight.CopyFrom(onnx.numpy_helper.from_array(half.astype(np.float32), weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    options = [str(tmp_path / "model.onnx"), *cifar, "--work", str(tmp_path / "work"), "--epochs", "1", "--batch", "24"]
    options += ["--distill", "0", "--patterns", str(tmp_path / "fast.plan.json")]
    output = run("finetune_study", *options, "--pruned", f"taken={tmp_path / 'other.onnx'}")
    assert re.search(rf"^\| {re.escape(str(tmp_path / 'fast.plan.json'))} \|", output, re.MULTILINE)
    assert re.search(r"^\| taken \|", output, re.MULTILINE)
    for stem, name in (("fast.plan", "conv3_2.weight"), ("taken", "conv5_1.weight")):
        trained = onnx.load(tmp_path / "work" / f"{stem}-trained-0.onnx")
        for tensor in trained.graph.initializer:
            if tensor.name.endswith("weight") and len(tensor.dims) == 4:
                share = np.count_nonzero(onnx.numpy_helper.to_array(tensor)) / np.prod(tensor.dims)
                assert share == pytest.approx(0.5 if tensor.name == name else 1.0, abs=0.01), tensor.name
    with pytest.raises(SystemExit):
        run("finetune_study", *options, "--pruned", "none=" + str(tmp_path / "none.onnx"))
