"""The sampled decisions of schedule templates."""

from __future__ import annotations

from typing import Any

from tvm import s_tir

__all__ = ["MOST_ACCUMULATORS", "choose", "divisors", "task_rows"]

MOST_ACCUMULATORS = 28
"""Sums of a register tile that a search may try: of AVX-512's 32 registers, weights and inputs need some too."""


def choose(sch: s_tir.Schedule, candidates: list[int], default: int) -> Any:
    """Sample one candidate; untuned schedules take `default`."""
    probability = [1.0 / len(candidates)] * len(candidates)
    return sch.sample_categorical(candidates, probability, decision=candidates.index(default))


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, the smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]


def task_rows(block_rows: int, groups: int, *, stores_from_registers: bool) -> list[int]:
    """Return how many of a group's block rows one parallel task of a convolution may compute.

    Any divisor. But where a task of a grouped convolution computes some of a group's rows and stores them from
    registers, `compute_at` derives the row from the loop over tasks as `t % 4 * 2 - t % 4 // 2 * 4`, not `t % 2 * 2`:
    TVM does not see that it is affine, and refuses to vectorize.
    """
    if groups > 1 and stores_from_registers:
        return sorted({1, block_rows})
    return divisors(block_rows)
