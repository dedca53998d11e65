"""Runs real processes: the workers with runtimes that misbehave, and the script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_nm.errors import EnvironmentMismatchError, UnsupportedModelError
from tvm_nm.layer_shape import LayerShape
from tvm_nm.peers import registry
from tvm_nm.peers.benchmark import OURS, Settings, bench_layers, choose_peers
from tvm_nm.peers.client import PeerError, Worker
from tvm_nm.peers.models import variants
from tvm_nm.peers.table import best_peer, contest_rows

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = """
import os, signal
from tvm_nm.peers.registry import peer

def onnx_reference(job):
    from onnx.reference import ReferenceEvaluator
    evaluator = ReferenceEvaluator(str(job.model))
    return lambda: evaluator.run(None, dict(job.inputs))

@peer("chatty", packages=["onnx"])
def chatty(job):
    os.write(1, b"loading\\n")
    return onnx_reference(job)

@peer("wrong", packages=["onnx"])
def wrong(job):
    run = onnx_reference(job)
    return lambda: [1.05 * output for output in run()]

@peer("crashing")
def crashing(job):
    os.kill(os.getpid(), signal.SIGSEGV)

@peer("crashing-later")
def crashing_later(job):
    run, calls = onnx_reference(job), []
    def step():
        calls.append(0)
        if len(calls) > 2:
            os._exit(3)
        return run()
    return step

@peer("refusing", prepare=lambda job: 1 / 0)
def refusing(job):
    raise AssertionError

@peer("absent", packages=["no-such-distribution"])
def absent(job):
    raise AssertionError
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    return path


def test_runtimes_of_a_user_and_their_failures(plugin: Path, tmp_path: Path) -> None:
    names = ["chatty", "wrong", "crashing", "crashing-later", "refusing", "absent"]
    try:
        peers, skipped = choose_peers(names, [plugin])
        settings = Settings(
            peers, skipped, variants(["1x16"], [0.5]), (1,), tmp_path, rounds=2, block_ms=1.0, plugins=(plugin,)
        )
        layer = LayerShape("conv", (32, 16, 3, 3), (1, 16, 7, 7), padding=(1, 1, 1, 1))
        (contest,) = bench_layers([layer], settings)
    finally:
        for name in names:
            registry.PEERS.pop(name, None)
    assert contest.model == "16->32 7x7 k3x3"
    assert contest.macs == 32 * 16 * 9 * 49
    assert contest.skipped == {"absent": "no-such-distribution not installed"}
    found = {(entry.peer.name, entry.file.variant.name): entry for entry in contest.entries}
    assert list(found) == [
        (OURS, "dense"),
        ("onnxruntime", "dense"),
        *((name, "dense") for name in names[:-1]),
        (OURS, "1x16@0.5"),
    ]
    for name in (OURS, "onnxruntime", "chatty", "wrong"):
        entry = found[name, "dense"]
        assert [block.round for block in entry.blocks] == [0, 1]
        assert all(block.ms > 0 and block.peak_gflops > 1 for block in entry.blocks)
        assert entry.is_fp32 == (name != "wrong")
    assert found["wrong", "dense"].note == "wrong result"
    assert found["wrong", "dense"].error == pytest.approx(0.05, rel=1e-3)
    assert found["crashing", "dense"].note.startswith("its process died (SIGSEGV)")
    assert found["crashing-later", "dense"].note.startswith("its process died (exit code 3)")
    assert found["crashing-later", "dense"].blocks == []
    assert found["refusing", "dense"].note == "ZeroDivisionError: division by zero"
    sparse = found[OURS, "1x16@0.5"]
    assert sparse.file.kept_macs == pytest.approx(contest.macs / 2)
    assert sparse.kernel
    best = best_peer(sparse, contest.entries, OURS)
    assert best is not None
    assert best.peer.name in ("onnxruntime", "chatty")
    assert len(contest_rows(contest, OURS)) == len(contest.entries) + 1
    # Everything is there now: nothing is prepared again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")}
    assert before
    ours = tuple(peer for peer in peers if peer.name == OURS)
    bench_layers([layer], Settings(ours, {}, settings.variants, (1,), tmp_path, build_only=True))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")} == before


def test_unknown_runtimes_and_missing_plugins_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no runtime is called 'onxruntime'; there are: tvm_nm, onnx"):
        choose_peers(["onxruntime"])
    with pytest.raises(EnvironmentMismatchError, match=r"nowhere\.py: no such Python file"):
        choose_peers(plugins=[tmp_path / "nowhere.py"])


def test_a_worker_survives_what_it_cannot_do() -> None:
    with Worker(1) as worker:
        with pytest.raises(PeerError, match="KeyError"):
            worker.ask(do="block", key="nothing", ms=1.0)
        with pytest.raises(PeerError, match="KeyError"):
            worker.ask(do="load", key="k", peer="nobody", job={})
        assert worker.alive
    assert not worker.alive


def test_smoke(tmp_path: Path) -> None:
    result, table = tmp_path / "result.json", tmp_path / "table.md"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench_peers.py", "--smoke", "--json", result, "--markdown", table],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    (contest,) = json.loads(result.read_text())["contests"]
    assert contest["threads"] == 1
    assert all(1 < peak < 1e4 for peak in contest["peaks_gflops"])
    rows = {(row["runtime"], row["variant"]): row for row in contest["rows"]}
    for runtime in (OURS, "onnxruntime"):
        for variant in ("dense", "1x16@0.5"):
            row = rows[runtime, variant]
            assert len(row["blocks"]) == 2
            assert row["max_rel_error"] < 1e-3
            assert 0 < row["share_of_peak"] < 2
            assert row["speed_vs_onnxruntime"] > 0
    assert rows["onnxruntime", "dense"]["speed_vs_onnxruntime"] == 1
    assert rows[OURS, "1x16@0.5"]["kept_macs"] < 0.6 * contest["macs"]
    # Whatever else is installed has to work, too; what is not is named.
    assert [row["note"] for row in rows.values() if row["note"]] == []
    assert set(contest["skipped"]).isdisjoint(row["runtime"] for row in rows.values())
    assert all("not installed" in reason for reason in contest["skipped"].values())
    assert "| reference | 1 | 1x16@0.5 | tvm_nm | fp32 |" in table.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a MODEL.onnx"),
        (["nowhere.onnx"], "nowhere.onnx: no such file"),
        (["--smoke", "--peers", "nobody"], "no runtime is called 'nobody'"),
        (["--smoke", "--patterns", "9:8"], "9:8"),
        (["x.onnx", "--build-only"], "--build-only needs --artifacts"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
