"""Tuning for real, on a small model: isolation of crashes, resuming, and what a build makes of the records."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from click.testing import CliRunner
from models import Net
from tvm import te, tirx

import tvm_nm
from tvm_nm.cli import cli
from tvm_nm.errors import EnvironmentMismatchError, PlanError, TuningError
from tvm_nm.frontend import import_onnx
from tvm_nm.linker import export_library
from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.kernel_task import KernelTask, parse_task
from tvm_nm.schedules.machine import host_target, machine_of
from tvm_nm.schedules.variants import default_kernel, kernel_from_text, neighbours, ranked_kernels, variant_text
from tvm_nm.tuning import pool
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.outcomes import Progress
from tvm_nm.tuning.pool import Candidate, Laboratory, Worker
from tvm_nm.tuning.search import Search
from tvm_nm.tuning.tasks import ModelTask, model_tasks
from tvm_nm.tuning.trials import Trial, TrialTable
from tvm_nm.tuning.tuner import tune_tasks

TARGET = host_target(1)
MACHINE = machine_of(TARGET)
TASK = parse_task("conv 16x8x8->16 k3x3 p1,1,1,1 bias+relu; dense; 1 thread")


def library_calling(symbol: str, path: Path) -> Path:
    """A library with the arguments of a dense convolution whose function calls one of the C library's."""

    def tensor(name: str, rank: int) -> te.Tensor:
        return te.placeholder([te.var(f"{name}{axis}", "int64") for axis in range(rank)], name=name)

    def body(_inputs: object, _outputs: object) -> tirx.Stmt:
        return tirx.Evaluate(tirx.call_extern("int32", symbol))

    arguments = [tensor("data", 4), tensor("weight", 8), tensor("bias", 1)]
    out = te.extern([te.var(f"out{axis}", "int64") for axis in range(4)], arguments, body, name="out")
    executable = tvm.compile(tvm.IRModule({"main": te.create_prim_func([*arguments, out])}), target=TARGET)
    export_library(executable, path, TARGET)
    return path


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    with Laboratory(TARGET, builders=2) as made:
        yield made


def test_a_crash_and_a_hang_cost_one_candidate_each(
    laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_CALL_LIMIT_S", 4.0)
    texts = [variant_text(kernel) for kernel in ranked_kernels(TASK, MACHINE, 12) if isinstance(kernel, ConvKernel)]
    candidates = [Candidate(TASK, text) for text in [*texts[:4], "pixel 0x0"]]
    built = laboratory.build(candidates)
    assert [bool(error) for _, error in built] == [False] * 4 + [True]
    assert "no variant" in built[-1][1]
    libraries = [path for path, error in built if not error]
    libraries[1] = library_calling("abort", tmp_path / "crash.so")
    libraries[2] = library_calling("pause", tmp_path / "hang.so")
    with laboratory.alone():
        timings = laboratory.time(candidates[:4], libraries, rounds=2)
    assert [timing.error for timing in timings] == ["", "killed by SIGABRT", "took longer than 4 s", ""]
    for timing in (timings[0], timings[3]):
        assert 0 < timing.latency_us < 1e5
    for timing in timings[1:3]:
        assert timing.latency_us == float("inf")


def test_a_worker_that_was_killed_is_started_again() -> None:
    worker = Worker(1)
    request = {"task": str(TASK), "variant": "nonsense", "target": json.loads(str(TARGET)), "path": ""}
    try:
        assert "no variant" in worker.request("build", request, 60.0)["error"]
        process = worker._process
        assert process is not None
        process.kill()
        process.wait()
        assert "no variant" in worker.request("build", request, 60.0)["error"]
    finally:
        worker.close()


def test_faster_kernels_get_shorter_times(laboratory: Laboratory) -> None:
    candidates = [Candidate(t, variant_text(default_kernel(t, MACHINE))) for t in (TASK, _wider(TASK, 8))]
    built = laboratory.build(candidates)
    with laboratory.alone():
        small, large = laboratory.time(candidates, [path for path, _ in built], rounds=5)
    assert large.latency_us > 3 * small.latency_us  # 64 times the work


def _wider(task: KernelTask, times: int) -> KernelTask:
    work = task.workload
    wider = replace(work, in_channels=work.in_channels * times, out_channels=work.out_channels * times)
    return replace(task, workload=wider)


class Landscape:
    """A search on made-up times, without measuring."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.batches: list[list[str]] = []

    def run(self, best: str) -> None:
        while batch := self.search.propose():
            self.batches.append(batch)
            trials = [Trial(self.search.task, v, 10.0 if v == best else 100.0) for v in batch]
            self.search.observe(trials)


def test_a_search_begins_with_the_default_and_stops_early() -> None:
    landscape = Landscape(Search(TASK, MACHINE, TrialTable(TARGET), "full", 100))
    landscape.run(best="none of them")
    tried = [variant for batch in landscape.batches for variant in batch]
    assert tried[0] == landscape.search.default
    assert len(set(tried)) == len(tried)
    assert len(landscape.batches) <= 3


def test_a_search_keeps_to_its_limit() -> None:
    search = Search(TASK, MACHINE, TrialTable(TARGET), "full", 7)
    count, latency_us = 0, 1000.0
    while batch := search.propose():
        count += len(batch)
        latency_us /= 2  # always better: nothing else would stop it
        search.observe([Trial(TASK, variant, latency_us) for variant in batch])
    assert count == 7


def test_a_thorough_search_stops_at_its_limit_only() -> None:
    landscape = Landscape(Search(TASK, MACHINE, TrialTable(TARGET), "thorough", 40))
    landscape.run(best="none of them")
    tried = [variant for batch in landscape.batches for variant in batch]
    assert len(set(tried)) == len(tried) == 40


def test_a_search_starts_from_what_won_nearby() -> None:
    half = KernelTask("conv", TASK.workload, 1, IndexKind.CHANNEL, 16, 8)
    unlikely = variant_text(ranked_kernels(half, MACHINE, 12)[-1])
    known = TrialTable(TARGET)
    known.trials[half] = {unlikely: Trial(half, unlikely, 1.0)}
    search = Search(half.with_kept(4), MACHINE, known, "light", 24)
    assert unlikely in search.propose()
    assert unlikely not in Search(half.with_kept(4), MACHINE, TrialTable(TARGET), "light", 24).propose()


def test_a_search_climbs_from_its_best() -> None:
    search = Search(TASK, MACHINE, TrialTable(TARGET), "full", 100)
    first = search.propose()
    search.observe([Trial(TASK, v, 10.0 if v == first[-1] else 100.0) for v in first])
    steps = {variant_text(k) for k in neighbours(kernel_from_text(first[-1], TASK, MACHINE), MACHINE)}
    assert steps & set(search.propose())


def small_model() -> onnx.ModelProto:
    net = Net((1, 16, 12, 12))
    x = net.add("Relu", net.conv("input", (32, 16, 3, 3), pads=[1, 1, 1, 1]))
    y = net.add("Relu", net.conv(x, (32, 32, 3, 3), pads=[1, 1, 1, 1]))
    y = net.add("Relu", net.add("Add", net.conv(y, (32, 32, 1, 1)), x))
    return net.model(net.fc(net.add("Flatten", net.add("GlobalAveragePool", y)), 32, 10))


def test_tasks_of_a_model() -> None:
    found = model_tasks(import_onnx(small_model()).module, MACHINE, ["1x16", "2:4"], [0.5, 0.25])
    assert [str(item.task) for item in found] == [
        "conv 16x12x12->32 k3x3 p1,1,1,1 bias+relu; dense; 1 thread",
        "conv 16x12x12->32 k3x3 p1,1,1,1 bias+relu; winograd; 1 thread",
        "conv 32x12x12->32 k3x3 p1,1,1,1 bias+relu; dense; 1 thread",
        "conv 32x12x12->32 k3x3 p1,1,1,1 bias+relu; winograd; 1 thread",
        "conv 32x12x12->32 k3x3 p1,1,1,1 bias+relu; 1x16 channel 16; 1 thread",
        "conv 32x12x12->32 k3x3 p1,1,1,1 bias+relu; winograd 1x16 channel 16; 1 thread",
        "conv 32x12x12->32 k3x3 p1,1,1,1 bias+relu; 1x16 channel 8; 1 thread",
        "conv 32x12x12->32 k3x3 p1,1,1,1 bias+relu; winograd 1x16 channel 8; 1 thread",
        "conv 32x12x12->32 k3x3 p1,1,1,1 bias+relu; 1x1 position 144 2 of 4; 1 thread",
        "conv 32x12x12->32 k1x1 bias+add+relu; dense; 1 thread",
        "conv 32x12x12->32 k1x1 bias+add+relu; 1x16 channel 16; 1 thread",
        "conv 32x12x12->32 k1x1 bias+add+relu; 1x16 channel 8; 1 thread",
        "conv 32x12x12->32 k1x1 bias+add+relu; 1x1 channel 16 2 of 4; 1 thread",
        "fc 32x1x1->10 k1x1 bias; dense; 1 thread",
    ]
    with pytest.raises(PlanError, match="bad sparsity pattern"):
        model_tasks(import_onnx(small_model()).module, MACHINE, ["1x"], [0.5])


def test_zeros_that_a_model_has_are_a_task() -> None:
    model = small_model()
    weight = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [32, 32, 3, 3])
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:16, 4:] = 0
    array[16:, :28] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    texts = [str(item.task) for item in model_tasks(import_onnx(model).module, MACHINE)]
    assert "conv 32x12x12->32 k3x3 p1,1,1,1 bias+relu; 1x16 channel 4; 1 thread" in texts


class Heard(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.counts = (0, 0)
        self.done: list[KernelTask] = []

    def start(self, tasks: int, done: int) -> None:
        self.counts = (tasks, done)

    def finished(self, task: KernelTask, best_us: float, default_us: float) -> None:
        assert best_us <= default_us
        self.done.append(task)


def test_tuning_again_tunes_what_is_missing(tmp_path: Path) -> None:
    tasks = model_tasks(import_onnx(small_model()).module, MACHINE)[:3]
    first = tune_tasks(tasks[:2], TuningDatabase(tmp_path, TARGET), trials=3, progress=(heard := Heard()))
    assert (heard.counts, set(heard.done)) == ((2, 0), {item.task for item in tasks[:2]})
    assert first.trials >= 2
    assert [outcome.origin for outcome in first.outcomes] == ["measured", "measured"]

    again = tune_tasks(tasks, TuningDatabase(tmp_path, TARGET), trials=3, progress=(heard := Heard()))
    assert (heard.counts, heard.done) == ((3, 2), [tasks[2].task])
    assert [bool(outcome.trials) for outcome in again.outcomes] == [False, False, True]

    nothing = tune_tasks(tasks, TuningDatabase(tmp_path, TARGET), trials=3, progress=(heard := Heard()))
    assert (heard.counts, heard.done, nothing.trials) == ((3, 3), [], 0)

    anew = tune_tasks(tasks[:1], TuningDatabase(tmp_path, TARGET), trials=2, retune=True)
    assert anew.outcomes[0].trials > 0


def test_chains_are_tuned(tmp_path: Path) -> None:
    net = Net((1, 16, 14, 14))
    x = net.add("Relu", net.conv("input", (96, 16, 1, 1)))
    x = net.add("Relu", net.conv(x, (96, 1, 3, 3), group=96, pads=[1, 1, 1, 1]))
    model = net.model(net.add("Relu", net.conv(x, (32, 96, 1, 1))))
    tasks = [item for item in model_tasks(import_onnx(model).module, MACHINE) if item.task.links is not None]
    assert [item.task.macs for item in tasks] == [(16 * 96 + 9 * 96 + 96 * 32) * 14 * 14]
    summary = tune_tasks(tasks, TuningDatabase(tmp_path, TARGET), trials=3)
    assert summary.outcomes[0].origin == "measured"
    assert not summary.failures
    tuned = tvm_nm.compile(model, database=tmp_path, pattern="dense", target=TARGET, shipped_records=False)
    assert {layer.tuning for layer in tuned.layers} == {"measured"}
    assert {layer.kernel for layer in tuned.layers} == {summary.outcomes[0].variant}


class Interrupts(Progress):
    """Presses Ctrl-C when the first task is done."""

    def finished(self, task: KernelTask, best_us: float, default_us: float) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    tasks = model_tasks(import_onnx(small_model()).module, MACHINE)[:2]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tune_tasks(tasks, TuningDatabase(tmp_path, TARGET), trials=2, group=1, progress=Interrupts())
    assert time.monotonic() - start < 60
    kept = TuningDatabase(tmp_path, TARGET)
    assert len(kept.finished) == 1
    assert kept.best(next(iter(kept.finished))) is not None


def test_a_full_disk_is_no_fault_of_a_variant(
    laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate(TASK, variant_text(default_kernel(TASK, MACHINE)))

    def killed(*_: object) -> dict[str, str]:
        raise pool.WorkerDiedError("ended with code 1")  # LLVM's answer to a full disk

    monkeypatch.setattr(Worker, "request", killed)
    assert [error for _, error in laboratory.build([candidate])] == ["the compiler: ended with code 1"]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(pool.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TuningError, match=r"no space is left .*; free some, or name another .* TMPDIR"):
        laboratory.build([candidate])


def test_failed_trials_are_recorded_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = library_calling("abort", tmp_path / "crash.so")
    build = Laboratory.build

    def sabotaged(self: Laboratory, candidates: list[Candidate], done: object = None) -> list[tuple[Path, str]]:
        built = build(self, candidates)
        # The library takes the arguments of a kernel without a table.
        bad = next((c for c in candidates[1:] if c.variant.startswith("pixel")), None)
        return [(crash if c is bad else path, error) for c, (path, error) in zip(candidates, built, strict=True)]

    monkeypatch.setattr(Laboratory, "build", sabotaged)
    summary = tune_tasks([ModelTask(TASK, ("a",))], TuningDatabase(tmp_path, TARGET), trials=3)
    assert summary.failures == (("killed by SIGABRT", 1),)
    assert (summary.outcomes[0].failed, summary.outcomes[0].origin) == (1, "measured")
    (failed,) = TuningDatabase(tmp_path, TARGET).failures(TASK)
    assert failed.error == "killed by SIGABRT"


def test_a_target_that_does_not_run_here(tmp_path: Path) -> None:
    arm = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]})
    with pytest.raises(EnvironmentMismatchError, match="which this machine lacks"):
        tune_tasks([], TuningDatabase(tmp_path, arm))


def records(database: Path, model: onnx.ModelProto, sparse_us: float, dense_us: float) -> dict[str, str]:
    """Fill a database with made-up times that favour the variant ranked last; returns it by task."""
    tasks = model_tasks(import_onnx(model).module, MACHINE, ["1x16"], [0.5])
    made = TuningDatabase(database, TARGET)
    made.start(10.0)
    chosen = {}
    for item in tasks:
        kernels = ranked_kernels(item.task, MACHINE, 6)
        latency_us = sparse_us if item.task.kept else dense_us
        made.add([Trial(item.task, variant_text(kernels[-1]), latency_us)])
        chosen[str(item.task)] = str(kernels[-1])
    return chosen


def test_a_build_takes_the_variants_of_the_database(tmp_path: Path) -> None:
    model = small_model()
    chosen = records(tmp_path / "db", model, sparse_us=1.0, dense_us=2.0)
    options = {"pattern": "1x16", "density": 0.5, "target": TARGET, "shipped_records": False}
    plain = tvm_nm.compile(model, **options)
    tuned = tvm_nm.compile(model, database=tmp_path / "db", **options)  # verified against onnxruntime
    assert {layer.tuning for layer in plain.layers} == {"default"}
    assert {layer.tuning for layer in tuned.layers} == {"measured"}
    assert all(layer.kernel in chosen.values() for layer in tuned.layers)
    assert [layer.kernel for layer in plain.layers] != [layer.kernel for layer in tuned.layers]
    image = np.random.default_rng(0).standard_normal((1, 16, 12, 12), np.float32)
    np.testing.assert_allclose(tuned(image), plain(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sparse_us", "pattern"), [(1.9, "1x16"), (2.1, "dense")])
def test_measured_times_decide_between_sparse_and_dense(tmp_path: Path, sparse_us: float, pattern: str) -> None:
    model = small_model()
    records(tmp_path, model, sparse_us, dense_us=2.0)
    built = tvm_nm.compile(model, database=tmp_path, pattern="1x16", density=0.5, target=TARGET, verify=False)
    layers = {layer.name: layer for layer in built.layers if layer.kind == "conv"}
    pruned = [layer for layer in layers.values() if layer.density < 1]
    assert {layer.pattern for layer in pruned} == {pattern}
    assert all(("tuned 1.05x" in layer.note) == (pattern == "dense") for layer in pruned)


def test_the_command_line(tmp_path: Path) -> None:
    onnx.save(small_model(), tmp_path / "net.onnx")
    where = [str(tmp_path / "net.onnx"), "--db", str(tmp_path / "db")]
    arguments = ["tune", *where, "--patterns", "dense", "--threads", "1"]
    done = CliRunner().invoke(cli, [*arguments, "--trials", "1", "--json", str(tmp_path / "tuned.json")])
    assert done.exit_code == 0, done.output
    assert "6 tasks, 0 of them tuned before" in done.output
    assert "6 variants tried" in done.output
    outcomes = json.loads((tmp_path / "tuned.json").read_text())["outcomes"]
    assert [outcome["origin"] for outcome in outcomes] == ["measured"] * 6

    build = ["compile", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "built"), "--threads", "1"]
    done = CliRunner().invoke(cli, [*build, "--db", str(tmp_path / "db"), "--pattern", "dense"])
    assert done.exit_code == 0, done.output
    assert "tuning     4 measured" in done.output
    done = CliRunner().invoke(cli, [*build, "--untuned", "--pattern", "dense"])
    assert "tuning     4 untuned (" in done.output

    done = CliRunner().invoke(cli, [*arguments, "--densities", "half"])
    assert done.exit_code == 2
    assert "'half' is no list of numbers, such as 0.5,0.25" in done.output
