from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from models import Net
from onnx import TensorProto, helper
from tvm import relax

import tvm_nm
from tvm_nm import runtime
from tvm_nm.artifact import LIBRARY
from tvm_nm.errors import ArtifactError, EnvironmentMismatchError
from tvm_nm.manifest import MANIFEST
from tvm_nm.reference_run import random_inputs, run_onnx
from tvm_nm.runtime import CompiledModel

# Run in CI on whatever there is, so the pool must allow 2 threads whatever the machine has.
os.environ["TVM_NUM_THREADS"] = str(max(2, int(os.environ.get("TVM_NUM_THREADS", "2"))))


def two_by_two() -> onnx.ModelProto:
    """Two inputs of different shapes, two outputs."""
    net = Net((1, 4, 8, 8))
    net.inputs.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1, 6, 8, 8]))
    x = net.add("Relu", net.conv("input", (6, 4, 3, 3), pads=[1, 1, 1, 1]))
    y = net.add("Add", net.conv("other", (6, 6, 1, 1)), x)
    return net.model(x, net.add("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]))


def chain(seed: int) -> onnx.ModelProto:
    net = Net((1, 4, 8, 8), seed=seed)
    return net.model(net.add("Relu", net.conv("input", (8, 4, 3, 3))))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompiledModel, onnx.ModelProto]:
    proto = two_by_two()
    folder = tmp_path_factory.mktemp("built")
    return tvm_nm.compile(proto, output=folder / "net-tvm", pattern="dense", threads=2), proto


@pytest.fixture
def model(built: tuple[CompiledModel, onnx.ModelProto]) -> CompiledModel:
    return built[0]


@pytest.fixture
def inputs(model: CompiledModel) -> dict[str, Any]:
    return random_inputs(model.inputs, seed=3)


@pytest.fixture
def copy(model: CompiledModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "copy")
    return tmp_path / "copy"


def check(got: Any, want: list[Any]) -> None:
    assert isinstance(got, tuple)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_calls_by_position_name_and_mapping_agree_with_onnxruntime(
    built: tuple[CompiledModel, onnx.ModelProto], inputs: dict[str, Any]
) -> None:
    model, proto = built
    want = run_onnx(proto, inputs)
    x, other = inputs["input"], inputs["other"]
    for got in (model(x, other), model(x, other=other), model(other=other, input=x), model(inputs)):
        check(got, want)
    check(model({"other": other}, input=x), want)


def test_one_output_is_an_array_that_the_next_call_does_not_change() -> None:
    model = tvm_nm.compile(chain(0), pattern="dense")
    first = random_inputs(model.inputs, 0)["input"]
    got = model(first)
    assert isinstance(got, np.ndarray)
    kept = got.copy()
    model(random_inputs(model.inputs, 1)["input"])
    np.testing.assert_array_equal(got, kept)
    got[...] = 0
    np.testing.assert_array_equal(model(first), kept)


@pytest.mark.parametrize("offset", [1, 2, 4, 12, 60])
def test_arrays_of_any_alignment_and_layout_are_taken(
    built: tuple[CompiledModel, onnx.ModelProto], inputs: dict[str, Any], offset: int
) -> None:
    model, proto = built
    x = inputs["input"]
    room = np.empty(x.nbytes + offset, np.uint8)
    shifted = np.ndarray(x.shape, x.dtype, room.data, offset)
    shifted[...] = x
    want = run_onnx(proto, inputs)
    check(model(shifted, inputs["other"]), want)
    shifted.flags.writeable = False
    reversed_twice = np.ascontiguousarray(x[:, ::-1])[:, ::-1]
    transposed = np.asfortranarray(inputs["other"])
    assert not reversed_twice.flags.c_contiguous
    assert not transposed.flags.c_contiguous
    check(model(reversed_twice, transposed), want)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"input": np.zeros((1, 4, 8, 8))}, TypeError, r"'input' is float64, float32 is needed: use \.astype"),
        ({"input": np.zeros((1, 4, 8, 8), ">f4")}, TypeError, "'input' is >f4"),
        ({"input": np.zeros((2, 4, 8, 8), "f4")}, ValueError, r"shape \(2, 4, 8, 8\), \(1, 4, 8, 8\) is needed"),
        ({"input": np.zeros((4, 8, 8), "f4")}, ValueError, r"shape \(4, 8, 8\)"),
        ({"input": "text"}, TypeError, "'input' is <U4"),
        ({"third": np.zeros(1, "f4")}, TypeError, "no input 'third'; it has input, other"),
    ],
)
def test_wrong_arrays_are_refused(
    model: CompiledModel, inputs: dict[str, Any], change: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        model({**inputs, **change})


def test_wrong_calls_are_refused(model: CompiledModel, inputs: dict[str, Any]) -> None:
    x, other = inputs["input"], inputs["other"]
    with pytest.raises(TypeError, match="'other' is missing"):
        model(x)
    with pytest.raises(TypeError, match="'input' is given twice"):
        model(x, input=x, other=other)
    with pytest.raises(TypeError, match=r"takes 2 inputs \(input, other\), not 3"):
        model(x, other, x)
    with pytest.raises(TypeError, match="'input' is missing"):
        model()


def test_plain_tvm_runs_the_library(model: CompiledModel, inputs: dict[str, Any]) -> None:
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(model.directory / LIBRARY)), tvm.cpu())
    got = machine["main"](*(tvm.runtime.tensor(inputs[spec.name]) for spec in model.inputs))
    want = model(inputs)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)


def test_a_loaded_artefact_computes_what_the_built_one_does(
    model: CompiledModel, copy: Path, inputs: dict[str, Any]
) -> None:
    loaded = tvm_nm.load(copy)
    assert loaded.manifest == model.manifest == tvm_nm.load(str(copy)).manifest
    assert loaded.directory == copy
    for a, b in zip(loaded(inputs), model(inputs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_describes_itself(model: CompiledModel) -> None:
    assert [spec.name for spec in model.inputs] == ["input", "other"]
    assert [spec.shape for spec in model.outputs] == [(1, 6, 8, 8), (1, 6, 4, 4)]
    assert len(model.layers) == 2
    assert repr(model) == "<CompiledModel net: 2 layers, 100% of the MACs, 2 threads>"


def test_a_changed_or_missing_library_is_refused(copy: Path) -> None:
    library = copy / LIBRARY
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    with pytest.raises(ArtifactError, match="its SHA-256 differs; build the artefact again"):
        tvm_nm.load(copy)
    library.unlink()
    with pytest.raises(ArtifactError, match=rf"{LIBRARY} is missing"):
        tvm_nm.load(copy)


def edit(artefact: Path, **changes: Any) -> None:
    data = json.loads((artefact / MANIFEST).read_text())
    (artefact / MANIFEST).write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"version": 99}, ArtifactError, "of version 99"),
        ({"versions": {"apache-tvm": "0.26.0"}}, EnvironmentMismatchError, "built by TVM 0.26.0 and this is TVM 0.27"),
        ({"architecture": "riscv64"}, EnvironmentMismatchError, "this machine lacks riscv64"),
        (
            {"features": ["avx2", "avx1024f"], "target": {"mcpu": "future"}},
            EnvironmentMismatchError,
            "built for future and this machine lacks avx1024f; build it again here",
        ),
    ],
)
def test_what_cannot_run_here_is_refused(
    copy: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    edit(copy, **changes)
    with pytest.raises(error, match=says):
        tvm_nm.load(copy)


def test_an_avx512_artefact_is_refused_where_there_is_avx2_only(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy, architecture="x86_64", features=["avx2", "fma", "avx512f"], target={"mcpu": "sapphirerapids"})
    monkeypatch.setattr("tvm_nm.environment.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("tvm_nm.environment.host_features", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(EnvironmentMismatchError, match="built for sapphirerapids and this machine lacks avx512f"):
        tvm_nm.load(copy)


def test_a_replaced_artefact_is_loaded_anew_in_the_same_process(tmp_path: Path) -> None:
    path = tmp_path / "out"
    x = np.ones((1, 4, 8, 8), np.float32)
    results, models = [], []
    for seed in (1, 2):
        tvm_nm.compile(chain(seed), output=path, pattern="dense")
        models.append(tvm_nm.load(path))  # the old one stays loaded
        results.append(models[-1](x))
        np.testing.assert_allclose(results[-1], run_onnx(chain(seed), {"input": x})[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(models[0](x), results[0])


def test_a_temporary_artefact_lives_as_long_as_its_model() -> None:
    model = tvm_nm.compile(chain(0), pattern="dense")
    folder = model.directory
    assert folder.is_dir()
    del model
    gc.collect()
    assert not folder.parent.exists()


def test_saving_refuses_what_is_no_artefact(model: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is no artefact"):
        model.save(tmp_path)
    model.save(tmp_path / "new")
    model.save(tmp_path / "new")
    with pytest.raises(ArtifactError, match="exists"):
        model.save(tmp_path / "new", overwrite=False)


def pool_size() -> int:
    return int(tvm.get_global_func("runtime.NumThreads")())


def test_threads_can_change_within_a_process(model: CompiledModel, inputs: dict[str, Any]) -> None:
    want = model(inputs)
    one = model.with_threads(1)
    sizes = []
    for current in (one, model.with_threads(2), one, model):
        for a, b in zip(current(inputs), want, strict=True):
            np.testing.assert_array_equal(a, b)
        sizes.append(pool_size())
    assert sizes == [1, 2, 1, model.threads]


def test_a_model_is_not_run_with_more_threads_than_there_are_processors_unless_asked(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "usable_threads", lambda: 1)
    assert tvm_nm.load(copy).threads == 1
    assert tvm_nm.load(copy, threads=2).threads == 2
    with pytest.raises(ValueError, match="at least 1 thread"):
        tvm_nm.load(copy, threads=0)


def test_too_small_a_pool_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.use_threads(1)  # the pool of this thread exists now and cannot grow
    many = int(os.environ["TVM_NUM_THREADS"]) + 50
    monkeypatch.setenv("TVM_NUM_THREADS", os.environ["TVM_NUM_THREADS"])
    with pytest.raises(EnvironmentMismatchError, match=rf"set TVM_NUM_THREADS={many} before"):
        runtime.use_threads(many)


def test_python_threads_may_share_a_model(built: tuple[CompiledModel, onnx.ModelProto]) -> None:
    model, proto = built
    cases = [random_inputs(model.inputs, seed) for seed in range(4)]
    wants = [run_onnx(proto, case) for case in cases]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(20):
                check(model(cases[number]), wants[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_model_that_was_not_loaded_checks_at_the_first_call(copy: Path, inputs: dict[str, Any]) -> None:
    manifest = dataclasses.replace(tvm_nm.load(copy).manifest, library_sha256="0" * 64)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        CompiledModel(copy, manifest)(inputs)


def test_an_artefact_may_be_removed_while_it_is_used(copy: Path, inputs: dict[str, Any]) -> None:
    model = tvm_nm.load(copy)
    shutil.rmtree(copy)
    assert len(model(inputs)) == 2
