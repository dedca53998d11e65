"""Judging builds: intervals, what fails, and what would pass."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tvm_nm import reference
from tvm_nm.agreement import Agreement, compare_answers, share_interval
from tvm_nm.calibration import ArrayImages
from tvm_nm.cli import cli
from tvm_nm.compiler import compile as compile_model
from tvm_nm.errors import CalibrationError, GateError, PlanError
from tvm_nm.evaluation import evaluate
from tvm_nm.gate import Alternative, Gate, best_passing, denser
from tvm_nm.patterns import parse_pattern
from tvm_nm.plan import Plan
from tvm_nm.pruning import PruneRequest, prune_file
from tvm_nm.reference import reference_model_path

MODEL = str(reference_model_path())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred labelled images of the embedded test set."""
    images, labels = reference.test_set()
    path = tmp_path_factory.mktemp("data") / "test.npz"
    np.savez(path, images=images[:200], labels=labels[:200])
    return path


def agreement(same: float, images: int = 100, lost: int = 0, won: int = 0) -> Agreement:
    dense = 0.8
    return Agreement(
        images,
        same,
        0.1,
        0.1,
        top1=dense - (lost - won) / images,
        dense_top1=dense,
        top5=1,
        dense_top5=1,
        lost=lost,
        won=won,
    )


def test_counts_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    dense, other = rng.standard_normal((2, 50, 8))
    labels = rng.integers(0, 8, 50)
    found = compare_answers(dense, other, labels)
    first, second = dense.argmax(1) == labels, other.argmax(1) == labels
    assert (found.lost, found.won) == ((first & ~second).sum(), (second & ~first).sum())
    assert found.drop == pytest.approx(first.mean() - second.mean())
    assert found.drop == pytest.approx((found.lost - found.won) / 50)
    ranked = [label in np.argsort(-row)[:5] for row, label in zip(other, labels, strict=True)]
    assert found.top5 == pytest.approx(np.mean(ranked))
    # A network that answers nothing has no right answers among its first five.
    assert compare_answers(dense, np.zeros_like(other), labels).top5 == 0


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_the_paired_interval_is_that_of_the_differences(lost: int, won: int, both: int) -> None:
    images = lost + won + both
    found = agreement(1.0, images, lost, won)
    differences = np.repeat([1.0, -1.0, 0.0], [lost, won, both])
    half = 1.959964 * differences.std() / math.sqrt(images)
    assert found.drop_interval is not None
    low, high = found.drop_interval
    assert (low + high) / 2 == pytest.approx(differences.mean(), abs=1e-9)
    assert (high - low) / 2 == pytest.approx(max(half, 1.959964 / images), rel=1e-6)


def test_share_intervals_cover_what_they_should() -> None:
    rng = np.random.default_rng(0)
    for share, images in ((0.5, 100), (0.98, 200), (0.999, 100)):
        covered = [
            low <= share <= high
            for low, high in (share_interval(x, images) for x in rng.binomial(images, share, 2000) / images)
        ]
        assert 0.9 < np.mean(covered) <= 1
    assert share_interval(1.0, 10)[1] == 1
    assert share_interval(1.0, 10)[0] > 0.6


def test_what_a_gate_lets_pass() -> None:
    assert Gate(min_agreement=0.98).passes(agreement(0.98))
    assert not Gate(min_agreement=0.98).passes(agreement(0.97))
    assert Gate(max_drop=1.0).passes(agreement(0.5, 1000, 15, 5))
    assert not Gate(max_drop=1.0).passes(agreement(0.5, 1000, 16, 5))
    assert Gate(max_drop=0).passes(agreement(0.5, 1000, 5, 5))
    both = Gate(0.9, 1.0).failures(agreement(0.8, 1000, 30, 5))
    assert len(both) == 2
    assert "80.00% of 1000 images" in both[0]
    assert "2.50 points lower" in both[1]
    unlabelled = dataclasses.replace(agreement(0.5), top1=None, lost=None, won=None)
    with pytest.raises(GateError, match="labels"):
        Gate(max_drop=1.0).passes(unlabelled)


@pytest.mark.parametrize(
    ("limits", "message"),
    [((), "needs"), ((1.5,), "share"), ((0,), "share"), ((None, -1), "points"), ((98.0,), "share")],
)
def test_gates_that_make_no_sense(limits: tuple[float, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Gate(*limits)


@given(st.lists(st.floats(0, 1), max_size=40), st.floats(0.01, 1))
def test_the_first_that_passes_is_found(shares: list[float], wanted: float) -> None:
    shares = sorted(shares)
    alternatives = [Alternative(str(index), Plan()) for index in range(len(shares))]
    looked = []

    def judge(alternative: Alternative) -> Agreement:
        looked.append(alternative.label)
        return agreement(shares[int(alternative.label)])

    found = best_passing(Gate(min_agreement=wanted), alternatives, judge)
    expected = next((index for index, share in enumerate(shares) if share >= wanted), None)
    assert (None if found is None else int(found[0].label)) == expected
    assert len(looked) <= max(1, len(shares)).bit_length()


def test_what_is_denser() -> None:
    for form, density in (
        ("2:4", 0.5),
        ("1:4", 0.25),
        ("2:8t4", 0.25),
        ("1x4p", 0.5),
        ("1x16u", 0.9375),
        ("3:4", 0.75),
    ):
        pattern = parse_pattern(form)
        found = denser(pattern, density)
        assert all(high > low for low, high in itertools.pairwise([density, *(d for _, d in found)]))
        assert all(p.check_density(d) == d and p.block == pattern.block for p, d in found)
    assert [str(p) for p, _ in denser(parse_pattern("1:4"), 0.25)] == ["2:4", "3:4"]
    assert denser(parse_pattern("3:4"), 0.75) == denser(parse_pattern("dense"), 1.0) == []


def test_a_build_that_passes_says_how_well(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "built"
    arguments = [
        "compile",
        MODEL,
        "-o",
        str(out),
        "--pattern",
        "1x4p",
        "--density",
        "0.9",
        "--threads",
        "1",
        "--untuned",
    ]
    result = CliRunner().invoke(cli, [*arguments, "--min-agreement", "0.9", "--max-drop", "5", "--data", str(data)])
    assert result.exit_code == 0, result.output
    assert "Beside the dense network, on 200 images" in result.output
    assert "agreement" in result.output
    # The very build gives the same answers again.
    again = CliRunner().invoke(cli, ["evaluate", str(out), "--data", str(data), "--against", MODEL, "--json", "-"])
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert found["images"] == 200
    assert f"{found['top1']:7.2%}".strip() in result.output
    assert found["same_interval"][0] < found["same"] <= found["same_interval"][1]


def test_a_build_that_fails_says_what_would_pass(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "built"
    arguments = ["compile", MODEL, "-o", str(out), "--pattern", "1x16p", "--density", "0.25", "--threads", "1"]
    limits = ["--min-agreement", "0.9", "--data", str(data)]
    result = CliRunner().invoke(cli, [*arguments, "--untuned", *limits])
    assert result.exit_code == 2
    assert not out.exists()
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert "the build fails: it agrees with the dense network on" in line
    density = float(line.split("--density ")[1].split()[0])
    # What it names passes, and one step sparser fails.
    shares = []
    for each in (density, density - 1 / 16):
        prune_file(MODEL, tmp_path / "p.onnx", PruneRequest.make("1x16p", each))
        shares.append(evaluate(tmp_path / "p.onnx", ArrayImages(*reference_images()), MODEL).same)
    assert shares[0] >= 0.9 > shares[1]
    assert f"{shares[0]:.2%} agreement" in line


def reference_images() -> tuple[np.ndarray, np.ndarray]:
    images, labels = reference.test_set()
    return images[:200], labels[:200]


def test_nothing_passes(tmp_path: Path) -> None:
    shape = reference_images()[0].shape
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)  # on which answers are a matter of luck
    gate = Gate(min_agreement=1.0, images=ArrayImages(noise))
    with pytest.raises(GateError, match="not even --pattern 3:4 passes"):
        compile_model(MODEL, output=tmp_path / "o", pattern="1:4", threads=1, shipped_records=False, gate=gate)
    plan = PruneRequest.make("1:4").plan(_module())
    with pytest.raises(GateError, match="plan with a larger budget"):
        compile_model(MODEL, output=tmp_path / "o", plan=plan, threads=1, shipped_records=False, gate=gate)


def _module() -> object:
    from tvm_nm.frontend import import_onnx

    return import_onnx(MODEL, verify=False).module


def test_judging_needs_images_and_labels(data: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = ["compile", MODEL, "-o", str(tmp_path / "o"), "--threads", "1", "--untuned"]
    for extra, message in (
        (["--data", str(data)], "need --min-agreement"),
        (["--min-agreement", "98"], "share in (0, 1]"),
        (["--min-agreement", "0.9", "--data-images", "3"], "needs --data"),
    ):
        result = runner.invoke(cli, [*arguments, *extra])
        assert result.exit_code == 2
        assert message in result.output
    images = ArrayImages(reference_images()[0])
    with pytest.raises(GateError, match="--data or --calib"):
        compile_model(MODEL, threads=1, shipped_records=False, gate=Gate(0.9))
    with pytest.raises(GateError, match="images with labels"):
        compile_model(MODEL, threads=1, shipped_records=False, gate=Gate(max_drop=1, images=images))


def test_evaluating_needs_something_to_compare_with(tmp_path: Path) -> None:
    images, labels = reference_images()
    with pytest.raises(CalibrationError, match="--against"):
        evaluate(MODEL, ArrayImages(images))
    with pytest.raises(CalibrationError, match="labels go up to 12"):
        evaluate(MODEL, ArrayImages(images, np.full(len(images), 12)))
    alone = evaluate(MODEL, ArrayImages(images, labels))
    assert alone.top1 == pytest.approx(reference.top1(reference_answers, images, labels))
    assert alone.same == 1
    result = CliRunner().invoke(cli, ["evaluate", MODEL, "--data", str(tmp_path / "none.npz")])
    assert result.exit_code == 2


def reference_answers(batch: np.ndarray) -> np.ndarray:
    import onnx

    from tvm_nm.onnx_network import OnnxNetwork

    return OnnxNetwork(onnx.load(MODEL)).run(batch)
