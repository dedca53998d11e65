"""The sampled decisions of schedule templates."""

from __future__ import annotations

from typing import Any

from tvm import s_tir

__all__ = ["choose"]


def choose(sch: s_tir.Schedule, candidates: list[int], default: int) -> Any:
    """Sample one candidate; untuned schedules take `default`."""
    probability = [1.0 / len(candidates)] * len(candidates)
    return sch.sample_categorical(candidates, probability, decision=candidates.index(default))
