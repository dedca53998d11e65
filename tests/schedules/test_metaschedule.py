"""MetaSchedule finds the templates by name, and what it samples from them computes the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from oracle import conv, fc
from running import call, integers, masked_weights
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from tvm_nm.schedules.apply import TEMPLATES, pass_context
from tvm_nm.schedules.conv import ConvKernel, IndexKind, conv_prim_func
from tvm_nm.schedules.fc import choose_fc_kernel, fc_prim_func, pack_fc
from tvm_nm.schedules.machine import host_target, machine_of
from tvm_nm.schedules.packing import pack_conv
from tvm_nm.schedules.pool import PoolKind, choose_pool_kernel, pool_prim_func
from tvm_nm.schedules.tensor_intrin_stub import skip_tensor_intrinsics
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.schedules.winograd import WinogradKernel, winograd_prim_func
from tvm_nm.schedules.winograd_packing import pack_winograd
from tvm_nm.workload import ConvWorkload, Epilogue

skip_tensor_intrinsics()

TARGET = host_target(1)
MACHINE = machine_of(TARGET)
WORK = ConvWorkload(1, 16, 32, 14, 14, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(True, 0.0))


def space_generator() -> Any:
    return ms.space_generator.PostOrderApply(
        sch_rules=[ms.schedule_rule.ApplyCustomRule()],
        postprocs=[ms.postproc.DisallowDynamicLoop()],
        mutator_probs={ms.mutator.MutateTileSize(): 1.0},
    )


def tune_context(func: tvm.tirx.PrimFunc) -> Any:
    return ms.TuneContext(
        mod=tvm.IRModule({"main": func}),
        target=TARGET,
        space_generator=space_generator(),
        search_strategy="replay-trace",
        num_threads=1,
        rand_state=3,
    )


def design_space(func: tvm.tirx.PrimFunc) -> list[s_tir.Schedule]:
    return list(tune_context(func).generate_design_space())


def decisions(trace: Any) -> list[tuple[list[int], int]]:
    """(candidates, value) of each sampled choice."""
    found = []
    for instruction, decision in trace.decisions.items():
        assert instruction.kind.name == "SampleCategorical"
        candidates = [int(c) for c in instruction.attrs[0]]
        found.append((candidates, candidates[int(decision)]))
    return found


def sparse_kernel(kept_per_block: int = 0) -> tuple[ConvKernel, np.ndarray]:
    weights = masked_weights(WORK, 4, IndexKind.POSITION, 0.5, np.random.default_rng(0))
    kernel = choose_kernel(WORK, MACHINE, block=4, index=IndexKind.POSITION, kept=96)
    return replace(kernel, kept_per_block=kept_per_block), weights


def test_winograd_samples_compute_the_same() -> None:
    kernel = WinogradKernel(WORK, MACHINE.lanes, 2, 7, 7, 2, 8, False)  # its sums of small integers are exact
    (space,) = design_space(winograd_prim_func(kernel))
    ((tiles, chosen),) = decisions(space.trace)
    assert chosen == kernel.tiles_per_step
    assert min(tiles) == 1
    rng = np.random.default_rng(0)
    out_shape = WORK.output_shape
    data = integers(WORK.input_shape, rng)
    weights = integers((WORK.out_channels, WORK.in_channels, 3, 3), rng)
    bias, residual = integers((WORK.out_channels,), rng), integers(out_shape, rng)
    want = conv(WORK, data, weights, bias, residual)
    (instruction,) = space.trace.decisions
    for position in (0, len(tiles) // 2):
        sch = s_tir.Schedule(winograd_prim_func(kernel))
        space.trace.with_decision(instruction, position, remove_postproc=True).apply_to_schedule(sch, True)
        with pass_context():
            module = tvm.compile(sch.mod, target=TARGET)
        arguments = [data, pack_winograd(kernel, weights).values, bias, residual]
        np.testing.assert_array_equal(call(module, arguments, out_shape), want)


def test_design_space_of_a_convolution() -> None:
    kernel, _ = sparse_kernel()
    (space,) = design_space(conv_prim_func(kernel))
    (vectors, chosen_vectors), (rows, chosen_rows) = decisions(space.trace)
    # An untuned build takes the kernel's own numbers.
    assert (chosen_vectors, chosen_rows) == (kernel.vectors_per_tile, kernel.rows_per_task)
    assert len(vectors) > 1
    assert rows == [d for d in range(1, kernel.block_rows + 1) if kernel.block_rows % d == 0]


def test_design_space_of_a_convolution_with_a_blocked_reduction() -> None:
    kernel, _ = sparse_kernel(kept_per_block=32)
    (space,) = design_space(conv_prim_func(kernel))
    kept, chosen = decisions(space.trace)[-1]
    assert chosen == 32
    assert kept == [d for d in range(1, 97) if 96 % d == 0]


def test_design_spaces_of_the_other_families() -> None:
    (space,) = design_space(fc_prim_func(choose_fc_kernel(4, 64, 100, Epilogue(), MACHINE)))
    assert decisions(space.trace) == [([1, 2, 4], 4)]
    pool = ConvWorkload(1, 8, 8, 12, 12, (2, 2), (2, 2), groups=8)
    (space,) = design_space(pool_prim_func(choose_pool_kernel(pool, PoolKind.MAX, (0, 0, 0, 0), MACHINE)))
    assert "vectorize" in str(space.trace)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_every_choice_of_the_fc_template(rows: int) -> None:
    rng = np.random.default_rng(0)
    weights, data, bias = integers((50, 20), rng), integers((5, 20), rng), integers((50,), rng)
    kernel = choose_fc_kernel(5, 20, 50, Epilogue(), MACHINE)
    mod = tvm.IRModule({"main": fc_prim_func(kernel)})
    (space,) = design_space(mod["main"])
    (choice,) = space.trace.decisions
    schedule = s_tir.Schedule(mod)
    space.trace.with_decision(choice, [1, 2, 4].index(rows), remove_postproc=True).apply_to_schedule(schedule, False)
    assert decisions(schedule.trace) == [([1, 2, 4], rows)]
    with pass_context():
        module = tvm.compile(schedule.mod, target=TARGET)
    out = call(module, [data, pack_fc(kernel, weights).values, bias], (5, 50))
    np.testing.assert_array_equal(out, fc(data, weights, bias, Epilogue()))


def test_every_template_is_registered() -> None:
    for rule, template in TEMPLATES.items():
        assert tvm.get_global_func(f"s_tir.meta_schedule.cpu.{rule}") is not None
        assert callable(template)


class Laboratory:
    """Builds and runs candidates in this process, and compares what they compute."""

    def __init__(self, kernel: ConvKernel, weights: np.ndarray) -> None:
        rng = np.random.default_rng(1)
        data, bias = integers((1, 16, 14, 14), rng), integers((32,), rng)
        residual = integers((1, 32, 14, 14), rng)
        packed = pack_conv(kernel, weights)
        self.arguments = [tvm.runtime.tensor(a) for a in (data, packed.values, packed.index, bias, residual)]
        self.expected = conv(WORK, data, weights, bias, residual)
        self.built: list[Any] = []
        self.wrong = 0

    def build(self, mod: tvm.IRModule) -> str:
        with pass_context():
            self.built.append(tvm.compile(mod, target=TARGET))
        return str(len(self.built) - 1)

    def run(self, number: str) -> float:
        out = tvm.runtime.tensor(np.full(self.expected.shape, np.nan, np.float32))
        module = self.built[int(number)].mod
        timer = module.time_evaluator("main", tvm.cpu(), number=1, repeat=1)
        seconds = float(timer(*self.arguments, out).results[0])
        self.wrong += not np.array_equal(out.numpy(), self.expected)
        return seconds


def in_process(laboratory: Laboratory) -> tuple[Any, Any]:
    @tvm.ir.utils.derived_object
    class Builder(ms.builder.PyBuilder):  # type: ignore[misc]
        def build(self, build_inputs: list[Any]) -> list[Any]:
            return [ms.builder.BuilderResult(laboratory.build(i.mod), None) for i in build_inputs]

    @tvm.ir.utils.derived_object
    class Future(ms.runner.PyRunnerFuture):  # type: ignore[misc]
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            return ms.runner.RunnerResult([self.seconds], None)

    @tvm.ir.utils.derived_object
    class Runner(ms.runner.PyRunner):  # type: ignore[misc]
        def run(self, runner_inputs: list[Any]) -> list[Any]:
            return [Future(laboratory.run(str(i.artifact_path))) for i in runner_inputs]

    return Builder(), Runner()


@pytest.mark.parametrize("kept_per_block", [0, 32])
def test_what_a_search_samples_is_right(kept_per_block: int, tmp_path: Path) -> None:
    kernel, weights = sparse_kernel(kept_per_block)
    laboratory = Laboratory(kernel, weights)
    builder, runner = in_process(laboratory)
    database = ms.tune.tune_tasks(
        tasks=[tune_context(conv_prim_func(kernel))],
        task_weights=[1.0],
        work_dir=str(tmp_path),
        max_trials_global=8,
        num_trials_per_iter=8,
        builder=builder,
        runner=runner,
        database=ms.database.MemoryDatabase(),
        cost_model=ms.cost_model.RandomModel(),
        measure_callbacks=[ms.measure_callback.AddToDatabase()],
    )
    records = database.get_all_tuning_records()
    assert laboratory.wrong == 0
    assert len(laboratory.built) == len(records) == 8
    assert all(0 < float(record.run_secs[0]) < 1 for record in records)
    # The search moved away from the default decisions.
    assert len({tuple(value for _, value in decisions(record.trace)) for record in records}) >= 4


def test_intrinsics_are_skipped_and_can_still_be_had() -> None:
    """In a process of its own: this one has skipped them already."""
    program = """
import time
start = time.process_time()
from tvm_nm.schedules.tensor_intrin_stub import skip_tensor_intrinsics
skip_tensor_intrinsics()
skip_tensor_intrinsics()
import tvm
from tvm.s_tir import meta_schedule as ms
ms.TuneContext(num_threads=1)
assert tvm.s_tir.TensorIntrin.get("dot_16x4_vnni") is not None
assert tvm.s_tir.TensorIntrin.get("wmma_sync_16x16x16_f16f16f32", allow_missing=True) is None
from tvm.s_tir.tensor_intrin.arm_cpu import ARM_DOT_4x4_i8_NEON_INTRIN
assert tvm.s_tir.TensorIntrin.get(ARM_DOT_4x4_i8_NEON_INTRIN) is not None
assert time.process_time() - start < 10
"""
    subprocess.run([sys.executable, "-c", program], check=True)
