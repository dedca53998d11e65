"""Prefetches of weights: where they are, that they spoil no inner loop, on which processors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tvm
from running import haswell
from tvm import s_tir

from tvm_nm.schedules.apply import ApplyDefaultSchedules, apply_template, pass_context, schedule_function
from tvm_nm.schedules.kernel_task import parse_task
from tvm_nm.schedules.machine import architecture_of, machine_of
from tvm_nm.schedules.variants import kernel_from_text, kernel_prim_func
from tvm_nm.schedules.weight_stream import STREAM, stream_weights

AVX512 = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "sapphirerapids", "num-cores": 1})
ARM = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"], "num-cores": 1})
RISCV = tvm.target.Target({"kind": "llvm", "mtriple": "riscv64-linux-gnu", "num-cores": 1})

WINOGRAD = ("conv 64x28x28->64 k3x3 p1,1,1,1 bias+relu; winograd; 1 thread", "winograd 4 step 7x4 chunk 7x7")
STAGED = (WINOGRAD[0], WINOGRAD[1] + " staged")
CHANNEL = ("conv 64x14x14->64 k3x3 p1,1,1,1 bias+relu; dense; 1 thread", "channel 2 tile 1x14")
ONE_PASS = ("conv 64x4x4->64 k1x1 bias+relu; dense; 1 thread", "channel 1 tile 1x16")


def function_of(case: tuple[str, str]) -> tvm.tirx.PrimFunc:
    task = parse_task(case[0])
    return kernel_prim_func(kernel_from_text(case[1], task, machine_of(AVX512)))


def assembly(case: tuple[str, str], target: tvm.target.Target) -> str:
    module = tvm.IRModule({"main": schedule_function(function_of(case), target)})
    with pass_context():
        return str(tvm.compile(module, target=target).mod.inspect_source("asm"))


def inner_loops(text: str) -> list[list[str]]:
    """The bodies of the loops that hold no other loop."""
    found: list[list[str]] = []
    body: list[str] | None = None
    label = ""
    for line in text.splitlines():
        start = re.match(r"(\.LBB\w+):", line)
        if start:
            label, body = start.group(1), []
        elif body is not None:
            body.append(line.strip())
            if re.match(rf"\s+j\w+\s+{re.escape(label)}$", line):
                found.append(body)
                body = None
    return found


def is_product(body: list[str]) -> bool:
    """Whether a loop multiplies a register tile by weights: it broadcasts values, not just constants."""
    broadcasts = sum(("vbroadcastss" in line or "1to16" in line) and ".LCPI" not in line for line in body)
    return broadcasts >= 4 and sum("vfmadd" in line for line in body) >= 14


@pytest.mark.parametrize(
    "case", [WINOGRAD, STAGED, CHANNEL, ONE_PASS], ids=["winograd", "staged", "channel", "one pass"]
)
def test_products_prefetch_and_keep_their_sums_in_registers(case: tuple[str, str]) -> None:
    loops = [body for body in inner_loops(assembly(case, AVX512)) if is_product(body)]
    assert loops
    for body in loops:
        assert any("prefetcht1" in line for line in body)
        stores = [line for line in body if re.match(r"vmov\w+\s+%[xyz]mm\d+, .*\(", line) and "%rsp" not in line]
        assert not stores, "the prefetch keeps sums in memory"


def test_passes_share_the_next_panel() -> None:
    """Seven passes over rows of four lines: each line of the next panel once, and no more than a line an iteration."""
    text = str(schedule_function(function_of(STAGED), AVX512))
    assert text.count('T.call_extern("int32", "tvm_nm_prefetch"') == 1
    assert re.search(r"4096 \+ \w+ % 4 \* 16\]", text)  # 64 input channels of 4 vectors of 16 lanes: one frequency


def test_one_pass_fetches_its_own_weights_ahead() -> None:
    text = str(schedule_function(function_of(ONE_PASS), AVX512))
    assert re.search(r"1024( +|])", text)


@pytest.mark.parametrize(
    ("target", "instruction"), [(AVX512, "prefetcht1"), (haswell(), "prefetcht1"), (ARM, "prfm")], ids=str
)
def test_instruction_of_the_architecture(target: tvm.target.Target, instruction: str) -> None:
    assert instruction in assembly(STAGED, target)


def test_unknown_architectures_have_none() -> None:
    function = function_of(STAGED)
    schedule = s_tir.Schedule(function)
    apply_template(schedule)
    scheduled = schedule.mod["main"]
    assert architecture_of(RISCV) == "riscv64"
    assert stream_weights(scheduled, RISCV).same_as(scheduled)
    assert "tvm_nm_prefetch" not in str(schedule_function(function, RISCV))


def test_schedules_of_tuning_records_prefetch_too() -> None:
    """MetaSchedule applies the template itself: what it leaves is marked only."""
    schedule = s_tir.Schedule(function_of(STAGED))
    apply_template(schedule)
    marked = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    assert STREAM in str(marked)
    done: Any = ApplyDefaultSchedules(AVX512)(tvm.IRModule({"main": marked}))["main"]
    assert STREAM not in str(done)
    assert "tvm_nm_prefetch" in str(done)
