"""The yardstick of every kernel: how many fused multiply-adds a second this machine does when nothing else bounds it.

A loop that touches registers only. It is measured beside whatever is compared with it, because the clock of a shared
machine moves by tens of percents within seconds: a share of the peak of the same moment means something, a share of
the data sheet's peak does not.
"""

from __future__ import annotations

import time

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812  (as TVMScript calls it)

from tvm_nm.runtime import use_threads
from tvm_nm.schedules.machine import host_target, machine_of

__all__ = ["FmaPeak", "fma_loop"]

_CHAINS = 12
"""Independent sums. Two units of 4 to 5 cycles' latency need 10; 12 and the two operands fit in 16 registers."""
_STEPS = 400_000
"""Rounds of the loop in one call: about a millisecond, so that starting the threads is no part of it."""


def fma_loop(threads: int, lanes: int, steps: int = _STEPS) -> tvm.tirx.PrimFunc:
    """Return the loop as a PrimFunc of one float32 buffer (threads, 12, lanes), which seeds the sums and takes them.

    Each step is ``sum = sum * 0.5 + 0.5`` on 12 vector registers: every step depends on the one before, so that nothing
    can be hoisted, the seeds differ, so that nothing can be shared, and the values tend to 1, so that none is denormal.

    Parameters
    ----------
    threads
        Each runs the whole loop.
    lanes
        float32 elements of a vector register.
    steps
        Rounds of the loop.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        seeds = T.arg("seeds", T.buffer((threads, _CHAINS, lanes), "float32"))
        with T.parallel(0, threads) as thread:
            sums = T.alloc_buffer((_CHAINS * lanes,), "float32", scope="local")
            half = T.broadcast(tvm.tirx.const(0.5, "float32"), lanes)
            registers = [T.ramp(chain * lanes, 1, lanes) for chain in range(_CHAINS)]
            whole = T.ramp(0, 1, lanes)
            for chain, register in enumerate(registers):
                T.buffer_store(sums, seeds[thread, chain, whole], [register])
            with T.serial(0, steps):
                for register in registers:
                    T.buffer_store(sums, T.fma(sums[register], half, half), [register])
            for chain, register in enumerate(registers):
                T.buffer_store(seeds, sums[register], [thread, chain, whole])
    return builder.get()


class FmaPeak:
    """The compiled loop, for this machine's widest vectors.

    Parameters
    ----------
    threads
        How many threads run it at a time.

    Attributes
    ----------
    flops
        Floating-point operations of one `run`, of all threads together.
    """

    def __init__(self, threads: int = 1) -> None:
        target = host_target(threads)
        lanes = machine_of(target).lanes
        self._threads = threads
        self._loop = tvm.compile(tvm.IRModule({"main": fma_loop(threads, lanes)}), target=target).jit()["main"]
        seeds = np.random.default_rng(0).random((threads, _CHAINS, lanes), dtype=np.float32)
        self._seeds = tvm.runtime.tensor(seeds)
        self.flops = 2 * threads * _STEPS * _CHAINS * lanes
        self.run()

    def run(self) -> None:
        """Run the loop once; about a millisecond."""
        use_threads(self._threads)
        self._loop(self._seeds)

    def gflops(self, runs: int = 4) -> float:
        """Measure the peak now, in 1e9 floating-point operations a second: the best of a few runs."""
        best = np.inf
        for _ in range(runs):
            start = time.perf_counter()
            self.run()
            best = min(best, time.perf_counter() - start)
        return float(self.flops / best / 1e9)
