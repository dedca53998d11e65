from __future__ import annotations

import re

import numpy as np
import pytest
import tvm

from tvm_nm.fma_peak import FmaPeak, fma_loop
from tvm_nm.schedules.machine import host_target, machine_of


def _build(threads: int, lanes: int, steps: int, target: tvm.target.Target) -> tvm.runtime.Executable:
    return tvm.compile(tvm.IRModule({"main": fma_loop(threads, lanes, steps)}), target=target)


@pytest.mark.parametrize(("threads", "lanes"), [(1, 4), (1, 16), (2, 8)])
def test_the_loop_computes_what_it_says(threads: int, lanes: int) -> None:
    loop = _build(threads, lanes, 3, host_target(threads)).jit()["main"]
    seeds = np.random.default_rng(0).random((threads, 12, lanes), dtype=np.float32)
    sums = tvm.runtime.tensor(seeds)
    loop(sums)
    np.testing.assert_allclose(sums.numpy(), seeds / 8 + 7 / 8, rtol=1e-6)


@pytest.mark.parametrize(("cpu", "lanes", "register"), [("sapphirerapids", 16, "zmm"), ("haswell", 8, "ymm")])
def test_the_loop_touches_registers_only(cpu: str, lanes: int, register: str) -> None:
    target = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": cpu})
    assembly = _build(1, lanes, 1000, target).mod.inspect_source("asm")
    fmas = re.findall(r"vfn?m(?:add|sub)\w+\s+(.*)", assembly)
    assert len(fmas) >= 12
    assert all("(" not in operands and register in operands for operands in fmas)
    # A sum that was spilled would be loaded between the FMAs.
    body = assembly[assembly.index(fmas[0]) : assembly.rindex(fmas[-1])]
    assert "rsp" not in body


def test_the_peak_is_that_of_the_threads() -> None:
    lanes = machine_of(host_target(1)).lanes
    one, two = FmaPeak(1), FmaPeak(2)
    assert two.flops == 2 * one.flops
    # No processor does more than 8 vector FMAs a cycle at 8 GHz, nor so few that the loop cannot be the FMA units'.
    assert 1.0 < one.gflops(runs=8) < 2 * lanes * 8 * 8
