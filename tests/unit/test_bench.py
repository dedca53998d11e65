from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import small_cnn

import tvm_nm
from tvm_nm import bench
from tvm_nm.bench import BenchmarkResult, Timing, measure, onnxruntime_runner, profile_layers
from tvm_nm.errors import ArtifactError, UnsupportedModelError
from tvm_nm.layer_times import LayerTime
from tvm_nm.reference_run import random_inputs
from tvm_nm.runtime import CompiledModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return tvm_nm.compile(
        small_cnn(), output=tmp_path_factory.mktemp("bench") / "out", pattern="1x4", density=0.5, threads=1
    )


def test_contestants_take_turns_in_rotated_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    contestants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    monkeypatch.setattr(bench, "_SETTLE_S", 0)
    times = measure(contestants, rounds=4, block_ms=0)
    assert order[:3] == ["a", "b", "c"]  # once to warm up
    blocks = order[3::3]
    assert order[3:] == [name for name in blocks for _ in range(3)]  # one not counted and two counted
    assert blocks == [*"abc", *"bca", *"cab", *"abc"]
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_blocks_are_long_enough_and_give_the_time_of_one_call() -> None:
    (blocks,) = measure({"sleep": lambda: time.sleep(0.002)}, rounds=2, block_ms=20).values()
    assert all(2 <= block < 20 for block in blocks)


def test_statistics() -> None:
    ours, other = Timing("tvm_nm", 2, (2.0, 1.0, 4.0)), Timing("onnxruntime", 2, (6.0, 5.0, 3.0, 4.0))
    assert (ours.median_ms, ours.min_ms, other.median_ms, other.min_ms) == (2.0, 1.0, 4.5, 3.0)
    assert BenchmarkResult("net", (ours, other)).speedup == 2.25
    assert BenchmarkResult("net", (ours,)).speedup is None


def test_both_are_measured_with_the_same_threads(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def runner(source: Any, inputs: Any, threads: int) -> Any:
        seen.append(threads)
        return onnxruntime_runner(source, inputs, threads)

    monkeypatch.setattr(bench, "onnxruntime_runner", runner)
    result = model.benchmark(small_cnn(), rounds=2)  # type: ignore[arg-type]
    assert seen == [1]
    assert [(timing.name, timing.threads, len(timing.blocks_ms)) for timing in result.timings] == [
        ("tvm_nm", 1, 2),
        ("onnxruntime", 1, 2),
    ]
    assert result.speedup is not None
    assert result.speedup > 0
    assert result.layers == ()
    assert json.loads(json.dumps(result.to_dict()))["speedup"] == result.speedup


def test_layers_are_measured_in_order(model: CompiledModel) -> None:
    result = model.benchmark(rounds=1, layers=True)
    layers = [entry.layer for entry in result.layers if entry.layer]
    assert tuple(layers) == model.layers
    assert result.layers[-1].name == "other"
    assert all(entry.time_us >= 0 and entry.calls >= 1 for entry in result.layers)
    total_ms = sum(entry.time_us for entry in result.layers) / 1e3
    assert 0 < total_ms < 20 * result.ours.median_ms
    json.dumps(result.to_dict())


def test_speed_of_a_layer_is_that_of_what_it_executes(model: CompiledModel) -> None:
    layer = dataclasses.replace(model.layers[0], kept_macs=5_000_000)
    assert LayerTime("x", layer, 1, 100.0).gflops == pytest.approx(100)
    assert LayerTime("x", None, 1, 100.0).gflops == 0


def test_a_manifest_of_another_library_is_noticed(model: CompiledModel) -> None:
    first = dataclasses.replace(model.layers[0], function=model.layers[-1].function)
    wrong = CompiledModel(model.directory, dataclasses.replace(model.manifest, layers=(first, *model.layers[1:])))
    with pytest.raises(ArtifactError, match="where its manifest has another layer"):
        profile_layers(wrong, runs=1)


def test_onnxruntime_runs_the_model(tmp_path: Path) -> None:
    onnx.save(small_cnn(), tmp_path / "net.onnx")
    inputs = {"input": np.ones((1, 3, 16, 16), np.float32)}
    for source in (tmp_path / "net.onnx", str(tmp_path / "net.onnx"), small_cnn()):
        (output,) = onnxruntime_runner(source, inputs, 1)()
        assert output.shape == (1, 10)


def test_a_model_that_does_not_fit_is_refused(model: CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"nix\.onnx: no such file"):
        model.benchmark(tmp_path / "nix.onnx", rounds=1)
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(UnsupportedModelError, match=r"onnxruntime cannot run .*bad\.onnx"):
        model.benchmark(tmp_path / "bad.onnx", rounds=1)
    inputs = {"other": random_inputs(model.inputs)["input"]}
    with pytest.raises(UnsupportedModelError, match="its inputs are input, not other"):
        onnxruntime_runner(small_cnn(), inputs, 1)


def test_at_least_one_round(model: CompiledModel) -> None:
    with pytest.raises(ValueError, match="at least 1 round"):
        model.benchmark(rounds=0)
