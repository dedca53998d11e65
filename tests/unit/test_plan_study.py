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
    ways = ("uniform 1x4", "l1", "output", "search")
    arguments = [str(SCRIPT), str(model), "--calib", str(tmp_path / "calib.npz"), "--test", str(tmp_path / "test.npz")]
    arguments += ["--folder", str(folder), "--patterns", "1x4", "--speedups", "1.2", "--trials", "4", "--no-measure"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--stitched", "--ways", ",".join(ways)])
    study.main()
    said = capsys.readouterr()
    assert [f"] {way} at 1.2x" in said.err for way in ways] == [True] * 4
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
    assert "| 1.2x | uniform 1x4 | 1.20x | " in said.out
    assert "pruned in sequence | stitched" in said.out
    (folder / "1.2-l1.json").unlink()
    study.main()
    again = capsys.readouterr()
    assert [f"] {way} at 1.2x" in again.err for way in ways] == [False, True, False, False]
    assert again.out == said.out


def test_networks_measured_together(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = tmp_path / "small.onnx", tmp_path / "study"
    onnx.save(small_cnn(), model)
    folder.mkdir()
    made_up_costs(model, lambda _name, _n, density: 100 * density + 10).rename(folder / "costs.json")
    images = np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=np.zeros(16, np.int64))
    data = str(tmp_path / "images.npz")
    arguments = [str(SCRIPT), str(model), "--calib", data, "--test", data, "--folder", str(folder), "--patterns", "1x4"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--speedups", "1.2", "--ways", "l1,output", "--together"])
    measured: list[str] = []

    def measure(_dense: Any, planned: Any, _seconds: float) -> float:
        measured.extend(sorted({layer.pattern for layer in planned.manifest.layers}))
        return 0.8

    monkeypatch.setattr(study, "measure_share", measure)
    study.main()
    assert measured.count("1x4") == 2
    for way in ("l1", "output"):
        row = json.loads((folder / f"1.2-{way}.json").read_text())
        assert row["measured"] == pytest.approx(1.25)
        assert row["off"] == pytest.approx(-0.04)
        assert row["predicted_off"] == pytest.approx(row["rounds"][0]["predicted"] / 0.8 - 1)
    measured.clear()
    study.main()
    assert not measured


def test_ways_that_there_are_not(
    study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "m", "--calib", "c", "--test", "t", "--folder", "f", "--ways", "l1,l7"])
    with pytest.raises(SystemExit):
        study.main()
    assert "no such ways: l7" in capsys.readouterr().err
