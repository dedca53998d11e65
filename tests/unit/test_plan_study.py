"""The comparison of ways to plan: that it runs, goes on where it stopped, and says what it found."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from made_up_costs import made_up_costs
from models import small_cnn

from tvm_nm.costs import CostTable
from tvm_nm.plan import Plan
from tvm_nm.plan_loop import LoopResult, LoopRound, predicted_us
from tvm_nm.planner import Planner
from tvm_nm.planning import make_plan

SCRIPT = Path(__file__).parents[2] / "scripts" / "plan_study.py"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("plan_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plan_study", module)
    spec.loader.exec_module(module)
    return module


def loop(
    _imported: Any,
    _target: Any,
    table: CostTable,
    metric: str,
    budget_us: float,
    directory: Path,
    *,
    first: Plan | None = None,
    dense_us: float | None = None,
    dense: str,
    **_: Any,
) -> LoopResult:
    """Take what is predicted for what is measured."""
    assert dense == "dense"
    assert directory.is_dir()
    plan = first or make_plan(table, Planner(table, metric).solve(budget_us), metric, budget_us)
    dense_us = dense_us or table.dense_us
    share = predicted_us(table, plan) / dense_us
    return LoopResult((LoopRound(plan, share, share, 1.0),), 0, table, budget_us / dense_us)


def test_a_study_goes_on_where_it_stopped(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = tmp_path / "small.onnx", tmp_path / "study"
    onnx.save(small_cnn(), model)
    folder.mkdir()
    made_up_costs(model, lambda _name, _n, density: 100 * density + 10).rename(folder / "costs.json")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((32, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", images=images)
    np.savez(tmp_path / "test.npz", images=images, labels=rng.integers(0, 10, 32))
    monkeypatch.setattr(study, "build_plan", lambda *_: "dense")
    monkeypatch.setattr(study, "close_loop", loop)
    ways = ("uniform 1x4", "l1", "output", "search")
    arguments = [str(SCRIPT), str(model), "--calib", str(tmp_path / "calib.npz"), "--test", str(tmp_path / "test.npz")]
    arguments += ["--folder", str(folder), "--patterns", "1x4", "--speedups", "1.2", "--trials", "4", "--stitched"]
    arguments += ["--ways", ",".join(ways)]

    def run(*more: str) -> Any:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        study.main()
        return capsys.readouterr()

    assert "searching for 1.2x" in run("--steps", "losses").err
    assert not list(folder.glob("1.2-*"))
    said = run("--steps", "plans")
    assert [f"] {way} at 1.2x" in said.err for way in ways] == [True] * 4
    assert not (folder / "report.md").exists()
    said = run("--steps", "losses,answers")
    assert "searching" not in said.err
    assert [f"] pruning {way} at 1.2x" in said.err for way in ways] == [True] * 4
    rows = [json.loads((folder / f"1.2-{way.replace(' ', '-')}.json").read_text()) for way in ways]
    for row in rows:
        assert 1.199 <= row["measured"] <= 1.3  # densities are few
        assert 0 <= row["top1"] <= 1
        assert row["divergence"] > 0
        assert row["stitched"]["divergence"] > 0
    uniform = [layer["density"] for layer in rows[0]["plan"]]
    assert len(set(uniform)) == 1
    assert uniform[0] not in (0.75, 0.5, 0.25)  # between those of the table
    assert said.out == (folder / "report.md").read_text()
    assert "| 1.2x | uniform 1x4 | +0.0% | 1 | 1.20x | " in said.out
    assert "top-1 stitched" in said.out
    (folder / "1.2-l1.json").unlink()
    again = run()
    assert [f"] {way} at 1.2x" in again.err for way in ways] == [False, True, False, False]
    assert again.out == said.out


def test_costs_are_measured_in_a_step_of_their_own(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(small_cnn(), tmp_path / "small.onnx")
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 3, 16, 16), np.float32), labels=np.zeros(4, np.int64))
    data = str(tmp_path / "data.npz")
    arguments = [str(SCRIPT), str(tmp_path / "small.onnx"), "--calib", data, "--test", data]
    monkeypatch.setattr(sys, "argv", [*arguments, "--folder", str(tmp_path / "study"), "--steps", "plans"])
    with pytest.raises(SystemExit, match="measured in the step costs"):
        study.main()


def test_ways_that_there_are_not(
    study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "m", "--calib", "c", "--test", "t", "--folder", "f", "--ways", "l1,l7"])
    with pytest.raises(SystemExit):
        study.main()
    assert "no such ways: l7" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x", "m", "--calib", "c", "--test", "t", "--folder", "f", "--steps", "plan"])
    with pytest.raises(SystemExit):
        study.main()
    assert "no such steps: plan" in capsys.readouterr().err
