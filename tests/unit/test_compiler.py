from __future__ import annotations

import hashlib
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from models import Net, large_model, small_cnn
from small_models import SMALL_MODELS

import tvm_nm
from tvm_nm import compiler
from tvm_nm.artifact import LIBRARY, REPORT
from tvm_nm.environment import missing_features
from tvm_nm.errors import ArtifactError, EnvironmentMismatchError, ModelMismatchError, PlanError, UnsupportedModelError
from tvm_nm.frontend import import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.linker import file_sha256
from tvm_nm.manifest import MANIFEST, Manifest
from tvm_nm.patterns import parse_pattern
from tvm_nm.plan import uniform_plan
from tvm_nm.pruning import PruneRequest, prune_file
from tvm_nm.reference_run import random_inputs, run_onnx
from tvm_nm.targets import resolve_target


def wide() -> onnx.ModelProto:
    """Large enough for sparse kernels to be worth it; the middle convolution is prunable."""
    net = Net((1, 8, 12, 12))
    x = net.add("Relu", net.conv("input", (32, 8, 3, 3), pads=[1, 1, 1, 1]))
    x = net.add("Relu", net.conv(x, (32, 32, 3, 3), pads=[1, 1, 1, 1]))
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    return net.model(net.fc(x, 32, 8))


@pytest.fixture
def wide_file(tmp_path: Path) -> Path:
    path = tmp_path / "wide.onnx"
    onnx.save(wide(), path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_build_leaves_a_complete_artefact(wide_file: Path, tmp_path: Path) -> None:
    output, steps = tmp_path / "out", []
    model = tvm_nm.compile(
        wide_file, output=output, pattern="1x16", density=0.25, threads=1, progress=steps.append, exclude=["*Gemm"]
    )
    assert steps == ["importing", "pruning", "compiling", "linking", "verifying"]
    assert names(output) == [MANIFEST, LIBRARY, REPORT]
    assert names(tmp_path) == ["out", "wide.onnx"]
    manifest = Manifest.load(output)
    assert manifest == model.manifest
    assert (manifest.model, manifest.pattern, manifest.density, manifest.threads) == ("wide", "1x16", 0.25, 1)
    assert (manifest.include, manifest.exclude) == ((), ("*Gemm",))
    assert manifest.model_sha256 == hashlib.sha256(wide_file.read_bytes()).hexdigest()
    assert manifest.library_sha256 == file_sha256(output / LIBRARY)
    assert manifest.library_bytes == (output / LIBRARY).stat().st_size
    assert manifest.target["num-cores"] == 1
    assert manifest.architecture == platform.machine()
    assert not missing_features(manifest.architecture, manifest.features)
    assert manifest.versions["apache-tvm"] == tvm.__version__ or manifest.versions["apache-tvm"].startswith("0.27")
    assert manifest.verification is not None
    assert manifest.verification.max_rel < 1e-5
    assert [layer.pattern for layer in manifest.layers] == ["dense", "1x16", "dense"]
    assert manifest.layers[1].density == 0.25
    report = (output / REPORT).read_text()
    for text in ("wide", "1x16 at density 0.25", *(layer.name for layer in model.layers), "3 layers", "onnxruntime"):
        assert text in report


@pytest.mark.parametrize(
    ("pattern", "density"), [("1x4", 0.5), ("1x4p", 0.25), ("1x4u", 0.5), ("2:4", None), ("1:4t8", None)]
)
def test_the_module_computes_what_the_pruned_model_does(
    wide_file: Path, tmp_path: Path, pattern: str, density: float | None
) -> None:
    model = tvm_nm.compile(wide_file, pattern=pattern, density=density, threads=2)
    prune_file(wide_file, tmp_path / "pruned.onnx", PruneRequest.make(pattern, density))
    inputs = random_inputs(model.inputs, seed=9)
    np.testing.assert_allclose(model(inputs), run_onnx(tmp_path / "pruned.onnx", inputs)[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(model(inputs), run_onnx(wide_file, inputs)[0], rtol=1e-3)


def test_a_model_pruned_elsewhere_is_left_alone_and_its_zeros_are_used(wide_file: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned.onnx"
    prune_file(wide_file, pruned, PruneRequest.make("1x16", 0.25))
    model = tvm_nm.compile(pruned, pattern="dense")
    assert model.layers[1].pattern == "1x16"
    assert model.layers[1].density == 0.25
    inputs = random_inputs(model.inputs)
    np.testing.assert_allclose(model(inputs), run_onnx(pruned, inputs)[0], rtol=1e-4, atol=1e-5)


def test_the_default_is_1x16_at_half_density(wide_file: Path) -> None:
    manifest = tvm_nm.compile(wide_file, verify=False).manifest
    assert (manifest.pattern, manifest.density, manifest.verification) == ("1x16", 0.5, None)


def test_layers_can_be_included_and_excluded(wide_file: Path) -> None:
    first, second, last = (layer.name for layer in tvm_nm.compile(wide_file, verify=False).layers)
    model = tvm_nm.compile(wide_file, pattern="1x4", density=0.5, include=[first], exclude=[second], verify=False)
    assert [layer.density for layer in model.layers] == [0.5, 1.0, 1.0]
    with pytest.raises(PlanError, match="no layer matches 'nothing'"):
        tvm_nm.compile(wide_file, include=["nothing"])
    assert last not in (first, second)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"pattern": "2:4", "density": 0.3}, PlanError, "2:4 has density 0.5, not 0.3"),
        ({"pattern": "1x16", "density": 1.5}, PlanError, "1.5"),
        ({"pattern": "3x3"}, PlanError, "bad sparsity pattern '3x3'; valid forms"),
        ({"threads": 0}, EnvironmentMismatchError, "at least 1 thread"),
        ({"target": "{"}, EnvironmentMismatchError, "is not JSON"),
        ({"target": "[1]"}, EnvironmentMismatchError, "is not a dictionary"),
        ({"target": {"kind": "cuda"}}, EnvironmentMismatchError, "cuda"),
        ({"target": {"kind": "llvm", "mcpu": "pentium9"}}, EnvironmentMismatchError, "pentium9"),
        ({"shapes": {"nothing": (1,)}}, UnsupportedModelError, "no input 'nothing'"),
    ],
)
def test_wrong_requests_end_early_and_leave_nothing(
    wide_file: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        tvm_nm.compile(wide_file, output=tmp_path / "out", **options)
    assert names(tmp_path) == ["wide.onnx"]


def test_an_output_that_is_taken_is_refused_before_the_work(wide_file: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    with pytest.raises(ArtifactError, match="is no directory"):
        tvm_nm.compile(wide_file, output=wide_file, progress=steps.append)
    assert not steps


def test_a_build_that_computes_something_else_is_refused(
    wide_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "run_onnx", lambda *args: [run_onnx(*args)[0] * np.float32(1.01)])
    with pytest.raises(ModelMismatchError, match=r"disagrees with onnxruntime: .* 0\.99% .*tolerance 0\.1%"):
        tvm_nm.compile(wide_file, output=tmp_path / "out", pattern="dense")
    assert names(tmp_path) == ["wide.onnx"]


def test_a_target_that_cannot_run_here_needs_no_verification(wide_file: Path, tmp_path: Path) -> None:
    target = {"kind": "llvm", "mtriple": "riscv64-linux-gnu", "num-cores": 1}
    with pytest.raises(EnvironmentMismatchError, match=r"needs riscv64, which this machine lacks.*--no-verify"):
        tvm_nm.compile(wide_file, target=target, output=tmp_path / "out")
    assert names(tmp_path) == ["wide.onnx"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 processor")
def test_a_narrower_processor_can_be_named(wide_file: Path) -> None:
    model = tvm_nm.compile(wide_file, target={"kind": "llvm", "mcpu": "x86-64-v2"}, threads=1)
    assert "avx" not in model.manifest.features
    assert model.manifest.target["mcpu"] == "x86-64-v2"


def test_targets_come_as_dictionary_json_or_target() -> None:
    config = {"kind": "llvm", "num-cores": 3}
    for form in (config, '{"kind": "llvm", "num-cores": 3}', tvm.target.Target(config)):
        assert int(resolve_target(form, None).attrs["num-cores"]) == 3
        assert int(resolve_target(form, 2).attrs["num-cores"]) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("grouped", "depthwise_multiplier", "one_dimensional", "activations", "tied_weights", "weights_in_disguise"),
        "scalar_input",
    ],
)
def test_small_models_are_built_and_verified(name: str) -> None:
    manifest = tvm_nm.compile(SMALL_MODELS[name](), pattern="1x4", density=0.5, include=["*"], threads=1).manifest
    assert manifest.verification is not None
    assert manifest.layers


def test_an_operator_that_tvm_cannot_compile_is_named() -> None:
    net = Net((1, 4, 5, 5))
    model = net.model(net.add("CumSum", net.conv("input", (4, 4, 1, 1)), net.constant(np.array(2))))
    with pytest.raises(UnsupportedModelError, match=r"^operator R.cumsum: TVM imports .*; export .* without it$"):
        tvm_nm.compile(model, threads=1)


def test_the_same_model_gives_the_same_library() -> None:
    digests = [tvm_nm.compile(small_cnn(), threads=2, verify=False).manifest.library_sha256 for _ in range(2)]
    assert digests[0] == digests[1]


@pytest.fixture
def heavy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of 2 MB, of which the code is 0.1 MB."""
    net = Net((1, 4, 16, 16))
    path = tmp_path_factory.mktemp("heavy") / "heavy.onnx"
    onnx.save(net.model(net.fc(net.add("Flatten", net.add("Relu", net.conv("input", (4, 4, 1, 1)))), 1024, 512)), path)
    return path


def start(model: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tvm_nm", "compile", str(model), "-o", str(output), "--threads", "1"]
    folder = output.parent / "tmp"
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("step", "number"), [("compiling", signal.SIGINT), ("linking", signal.SIGTERM)])
def test_an_interrupt_leaves_nothing(heavy_file: Path, tmp_path: Path, step: str, number: signal.Signals) -> None:
    process = start(heavy_file, tmp_path / "out")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(step):
            break
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    # Python itself ends by SIGINT where the interrupt came in certain places; shells call that 130 as well.
    assert process.returncode in (128 + number, -signal.SIGINT), said
    assert said.endswith("interrupted\n")
    assert names(tmp_path) == ["tmp"]
    assert names(tmp_path / "tmp") == []


def test_a_killed_build_leaves_no_artefact(heavy_file: Path, tmp_path: Path) -> None:
    process = start(heavy_file, tmp_path / "out")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("linking"):
            break
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_and_says_so(heavy_file: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000,) * 2);"
        "from tvm_nm.cli import main; sys.argv = ['tvm-nm', *sys.argv[1:]]; main()"
    )
    arguments = ["compile", str(heavy_file), "-o", str(tmp_path / "out"), "--no-verify"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == f"error: cannot write {tmp_path / 'out'}: File too large; free some space or choose another output"
    assert names(tmp_path) == []


# Runs the command line, then prints what was needed at most. Not ru_maxrss: that counts the parent's memory too.
MEASURED = """
import sys
import onnxruntime, tvm, tvm_nm.compiler
from tvm_nm.cli import main
def needed(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024
before = needed("VmRSS")
try:
    main()
except SystemExit as end:
    assert not end.code
print(before, needed("VmHWM"))
"""


def memory_of_build(path: Path, output: Path, pattern: str) -> tuple[int, int]:
    """Bytes that a process needs after its imports, and at most while it builds a model."""
    command = [sys.executable, "-c", MEASURED, "compile", str(path), "-o", str(output), "--pattern", pattern]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, most = done.stdout.splitlines()[-1].split()
    return int(before), int(most)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["dense", "1x16", "1x4", "2:4"])
def test_the_largest_model_needs_little_memory(tmp_path: Path, pattern: str) -> None:
    """VGG-16 has 553 MB of weights."""
    assert memory_of_build(large_model("vgg16"), tmp_path / "out", pattern)[1] < 2.5e9


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["dense", "1x4", "2:4"])
def test_a_build_needs_a_few_times_the_weights(tmp_path: Path, pattern: str) -> None:
    net = Net((1, 16, 8, 8))
    x = net.add("Flatten", net.add("Relu", net.conv("input", (512, 16, 3, 3), pads=[1, 1, 1, 1])))
    x = net.add("Relu", net.fc(x, 512 * 64, 1024))  # 134 MB
    onnx.save(net.model(net.fc(x, 1024, 16)), tmp_path / "heavy.onnx")
    weights = (tmp_path / "heavy.onnx").stat().st_size
    before, most = memory_of_build(tmp_path / "heavy.onnx", tmp_path / "out", pattern)
    assert most - before < 4 * weights  # 3.3 times, and what LLVM and onnxruntime take whatever the model


@pytest.mark.parametrize(("pattern", "density"), [("1x4", 0.5), ("2:4", None)])
def test_a_rearranged_build_is_verified_and_reported(
    wide_file: Path, tmp_path: Path, pattern: str, density: float | None
) -> None:
    output = tmp_path / "out"
    plain = tvm_nm.compile(wide_file, pattern=pattern, density=density, rearrange="none")
    model = tvm_nm.compile(wide_file, output=output, pattern=pattern, density=density, rearrange="swap")
    assert plain.manifest.rearrangement is None
    found = Manifest.load(output).rearrangement
    assert found is not None
    assert found == model.manifest.rearrangement
    assert model.manifest.verification is not None
    assert model.manifest.verification.max_rel < 1e-5
    before, after = found.kept
    assert after > before
    assert [layer.pattern for layer in found.layers] == ["", pattern, ""]
    assert [layer.density for layer in model.layers] == [1, 0.5, 1]
    report = (output / REPORT).read_text()
    assert f"rearranged by swap in {found.seconds:.1f} s: keeps {after:.1%} of the L1 norm, not {before:.1%}" in report
    assert "Filter rearrangement:" in report
    assert f"{found.layers[1].kept_after:.4f}" in report
    inputs = random_inputs(model.inputs, seed=3)
    assert not np.allclose(model(inputs), plain(inputs), rtol=1e-3)


def test_a_plan_is_rearranged_like_a_pattern(wide_file: Path) -> None:
    plan = uniform_plan(inventory(import_onnx(wide_file, verify=False).module), parse_pattern("1x4"), 0.5)
    model = tvm_nm.compile(wide_file, plan=plan, rearrange="swap", threads=1)
    by_pattern = tvm_nm.compile(wide_file, pattern="1x4", density=0.5, rearrange="swap", threads=1)
    found, other = model.manifest.rearrangement, by_pattern.manifest.rearrangement
    assert found is not None
    assert other is not None
    assert found.layers == other.layers
    assert model.manifest.verification is not None
    assert model.manifest.verification.max_rel < 1e-5


def test_unknown_rearrangements_are_refused(wide_file: Path) -> None:
    with pytest.raises(PlanError, match="no such rearrangement: 'best'; there are none, sort, cluster, swap"):
        tvm_nm.compile(wide_file, rearrange="best")
