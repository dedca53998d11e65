from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import fails, run
from models import small_cnn
from onnx import numpy_helper

import tvm_nm
from tvm_nm import demo
from tvm_nm.artifact import LIBRARY, REPORT
from tvm_nm.manifest import MANIFEST
from tvm_nm.pruning import PruneRequest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(small_cnn(), path)
    return path


@pytest.fixture(scope="module")
def artefact(model: Path) -> Path:
    output = model.parent / "small-tvm"
    result = run("compile", model, "-o", output, "--pattern", "1x4", "--threads", "1")
    assert result.exit_code == 0, result.output
    return output


def test_without_a_command_there_is_help() -> None:
    result = run()
    assert result.exit_code == 0
    for command in ("compile", "bench", "inspect", "prune", "demo"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", [["--help"], ["compile", "-h"], ["bench", "-h"], ["inspect", "-h"], ["--version"]])
def test_help_loads_no_tvm(command: list[str]) -> None:
    program = (
        "import sys, atexit; from tvm_nm.cli import main; sys.argv = ['tvm-nm', *sys.argv[1:]];"
        "atexit.register(lambda: print('loaded:', 'tvm' in sys.modules)); main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: False\n")
    assert "tvm-nm" in done.stdout


def test_the_help_says_the_default_patterns() -> None:
    from tvm_nm.demo import DEMO_DENSITY, DEMO_PATTERN, DEMO_THREADS
    from tvm_nm.pruning import DEFAULT_PATTERN

    for command, pattern in (("compile", DEFAULT_PATTERN), ("prune", DEFAULT_PATTERN), ("demo", DEMO_PATTERN)):
        assert f"[default: {pattern}]" in " ".join(run(command, "--help").stdout.split())
    demo_help = " ".join(run("demo", "--help").stdout.split())
    assert f"[default: {DEMO_DENSITY}; with --pattern" in demo_help
    assert f"Number of threads. [default: {DEMO_THREADS}]" in demo_help


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tvm_nm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tvm-nm, version {tvm_nm.__version__}\n"


def test_an_interrupt_while_loading_is_no_traceback() -> None:
    program = (
        "import os, signal, sys; from tvm_nm.__main__ import main\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tvm_nm.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.meta_path.insert(0, Interrupts()); main()"
    )
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert not done.stderr
    assert not done.stdout


def test_compile_says_what_it_built(model: Path, artefact: Path) -> None:
    assert sorted(path.name for path in artefact.iterdir()) == [MANIFEST, LIBRARY, REPORT]
    result = run("compile", model, "-o", artefact, "--pattern", "1x4", "--threads", "1", "--json", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((artefact / MANIFEST).read_text())
    assert result.stderr.splitlines() == [
        f"{step} ..." for step in ("importing", "pruning", "compiling", "linking", "verifying")
    ]


def test_the_artefact_is_named_after_the_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("compile", model, "--pattern", "2:4", "--no-verify", "--threads", "1", "--json", "out.json")
    assert result.exit_code == 0, result.output
    assert "pattern    2:4 at density 0.5" in result.stdout
    assert "verified   not verified" in result.stdout
    assert "written to small-tvm; the layers are listed in small-tvm/report.txt" in result.stdout
    assert json.loads(Path("out.json").read_text())["model"] == "small"
    assert tvm_nm.load("small-tvm").manifest.pattern == "2:4"


def test_a_shape_may_be_given(model: Path, tmp_path: Path) -> None:
    result = run(
        "compile", model, "-o", tmp_path / "out", "--shape", "input:3,3,16,16", "--no-verify", "--threads", "1"
    )
    assert result.exit_code == 0, result.output
    assert tvm_nm.load(tmp_path / "out")(np.zeros((3, 3, 16, 16), np.float32)).shape == (3, 10)  # type: ignore[union-attr]


def test_bench_compares_with_onnxruntime(model: Path, artefact: Path, tmp_path: Path) -> None:
    result = run("bench", artefact, "--against", model, "--rounds", "2", "--layers", "--json", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "speed-up" in lines[-3]
    assert lines[-2].startswith("tvm_nm")
    assert lines[-1].startswith("onnxruntime")
    assert lines[-1].endswith("1.00x")
    data = json.loads((tmp_path / "b.json").read_text())
    assert [timing["name"] for timing in data["timings"]] == ["tvm_nm", "onnxruntime"]
    assert [timing["threads"] for timing in data["timings"]] == [1, 1]
    for layer in data["layers"]:
        assert layer["name"] in result.stdout


def test_bench_alone_as_json(artefact: Path) -> None:
    result = run("bench", artefact, "--rounds", "1", "--threads", "2", "--json", "-")
    data = json.loads(result.stdout)
    assert (data["threads"], data["speedup"], data["layers"]) == (2, None, [])


def test_inspect_shows_an_artefact(artefact: Path) -> None:
    result = run("inspect", artefact)
    assert result.exit_code == 0
    assert "pattern    1x4 at density 0.5" in result.stdout
    assert "4 layers" in result.stdout
    assert json.loads(run("inspect", artefact, "--json").stdout) == json.loads((artefact / MANIFEST).read_text())


def test_prune_writes_a_model_and_inspect_finds_the_pattern(model: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned.onnx"
    result = run("prune", model, "-o", pruned, "--pattern", "2:4", "--include", "*")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("pruned 4 layers to 2:4: 7")
    before, after = onnx.load(model), onnx.load(pruned)
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    assert after.graph.input == before.graph.input
    zeros = sum(int((numpy_helper.to_array(tensor) == 0).sum()) for tensor in after.graph.initializer)
    rows: list[dict[str, Any]] = json.loads(run("inspect", pruned, "--json").stdout)
    assert zeros == sum(round(row["parameters"] * (1 - row["density"])) for row in rows)
    assert [row["pattern"] for row in rows][1:] == ["2:4"] * 3
    table = run("inspect", pruned).stdout
    assert all(row["name"] in table for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned.onnx"]


def test_expected_errors_are_one_line(model: Path, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    missing = tmp_path / "nix.onnx"
    assert fails("compile", missing) == f"{missing}: no such file"
    assert "not an ONNX file" in fails("compile", tmp_path / "bad.onnx", "-o", tmp_path / "out")
    assert "is no artefact" in fails("compile", model, "-o", tmp_path)
    assert "valid forms" in fails("compile", model, "-o", tmp_path / "out", "--pattern", "huh")
    assert "not 0.3" in fails("compile", model, "-o", tmp_path / "out", "--pattern", "2:4", "--density", "0.3")
    assert "NAME:1,3,224,224" in fails("compile", model, "-o", tmp_path / "out", "--shape", "input=3")
    assert "no layer matches" in fails("prune", model, "-o", tmp_path / "p.onnx", "--include", "nothing")
    assert "is the model itself" in fails("prune", model, "-o", model)
    assert "cannot write" in fails("prune", model, "-o", tmp_path / "no" / "p.onnx")
    assert "is not an artefact" in fails("bench", tmp_path)
    assert "is not an artefact" in fails("inspect", tmp_path)
    assert "no such file" in fails("inspect", missing)
    assert "no such file" in fails("bench", artefact, "--against", missing)
    # Before minutes of work, not after them.
    said = fails("bench", artefact, "--json", tmp_path / "no" / "b.json")
    assert said.startswith(f"cannot write result {tmp_path / 'no' / 'b.json'}: No such file or directory; create")
    for option in ("-o", "--front", "--costs", "--json"):
        assert "cannot write" in fails("plan", model, "--budget", "0.5", option, tmp_path / "no" / "file")
        assert "it is a folder; name a file" in fails("plan", model, "--budget", "0.5", option, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.onnx", "notes.txt"]


def test_wrong_usage_is_code_2(model: Path) -> None:
    for arguments in (["compile", "--target", "{}"], ["compile", str(model), "--threads", "0"], ["prune", str(model)]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Usage:" in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "compile", tmp_path / "nix.onnx")
    assert isinstance(result.exception, tvm_nm.UnsupportedModelError)


def test_an_unfit_environment_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        return {"apache-tvm": "0.27.0.post1"}.get(package, "0.1.15")

    monkeypatch.setattr("tvm_nm.environment.metadata.version", version)
    assert "apache-tvm-ffi 0.1.15 does not work" in fails("inspect", model)


def test_an_interrupt_is_code_130(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal should have been raised")

    monkeypatch.setattr("tvm_nm.compiler.build_executable", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    result = run("compile", model, "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_that_became_another_error_is_still_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def converted(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("InternalError: in a callback") from None

    monkeypatch.setattr("tvm_nm.pruning.import_onnx", converted)
    assert run("inspect", model).exit_code == 143


def test_the_demonstration_shows_speed_accuracy_and_where_the_time_goes(tmp_path: Path) -> None:
    request = PruneRequest.make("1x16", 0.75, method="magnitude")
    result = demo.run_demo(request, threads=1, output=tmp_path / "out", images=100, rounds=2)
    assert [timing.name for timing in result.timings] == ["onnxruntime, dense", "tvm_nm, dense", "tvm_nm, 1x16 at 0.75"]
    assert {timing.threads for timing in result.timings} == {1}
    assert result.images == 100
    dense, sparse = result.top1
    assert dense > 0.9
    assert 0.7 < sparse <= dense
    assert len([entry for entry in result.layers if entry.layer]) == 13
    json.dumps(result.to_dict())
    assert tvm_nm.load(tmp_path / "out").manifest.density == 0.75


@pytest.mark.parametrize("command", [["compile"], ["demo"], ["demo", "--json", "-"]])
def test_compile_without_a_model_is_the_demonstration(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PruneRequest] = []
    timings = tuple(demo.Timing(name, 2, (1.5,)) for name in ("onnxruntime, dense", "tvm_nm, dense", "tvm_nm, 1x4"))

    def fake(request: PruneRequest, **_: object) -> demo.DemoResult:
        asked.append(request)
        layer = demo.LayerTime("conv", None, 1, 5.0)
        return demo.DemoResult("Fashion-MNIST", 2000, request, timings, (0.9545, 0.928), (layer,))

    monkeypatch.setattr(demo, "run_demo", fake)
    result = run(*command, "--density", "0.75", "--pattern", "1x4")
    assert result.exit_code == 0, result.output
    assert [(str(request.pattern), request.density) for request in asked] == [("1x4", 0.75)]
    if "--json" in command:
        assert json.loads(result.stdout)["top1"] == {"dense": 0.9545, "sparse": 0.928}
    else:
        assert "Top-1 on 2000 images of Fashion-MNIST: dense 95.45%, sparse 92.80%" in result.stdout
        assert "tvm_nm, 1x4               2      1.500   1.500     1.00x" in result.stdout
