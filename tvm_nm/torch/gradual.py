"""Gradual pruning: fewer weights step by step, chosen anew each time among those that are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm_nm.masks import round_half_up
from tvm_nm.patterns import NM, Dense, SparsityPattern, TileNM
from tvm_nm.plan import Plan

__all__ = ["PRUNING_SHARE", "Phase", "gradual_phases"]

PRUNING_SHARE = 1 / 3
"""Share of the steps by which the last masks have been chosen: the rest makes up for them."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A choice of masks during training.

    Attributes
    ----------
    start
        Share of all steps after which it is made.
    choices
        By layer name, pattern and density.
    """

    start: float
    choices: Mapping[str, tuple[SparsityPattern, float]]

    def first_step(self, steps: int) -> int:
        """Return the step, of so many, before which it is made."""
        return round_half_up(self.start * steps)


def gradual_phases(plan: Plan, steps: int = 3) -> tuple[Phase, ...]:
    """Reach a plan in several steps, with sparsity rising by the same amount in each.

    An N:M pattern gets there over larger N. Layers that a step would leave dense wait for the next.

    Parameters
    ----------
    plan
        What to prune to.
    steps
        How many; 1 prunes at once.

    Raises
    ------
    ValueError
        If there is less than one step.
    """
    if steps < 1:
        raise ValueError(f"gradual pruning needs at least 1 step, not {steps}")
    stages: list[dict[str, tuple[SparsityPattern, float]]] = []
    for number in range(1, steps + 1):
        choices = {}
        for choice in plan.layers:
            pattern, density = _eased(choice.pattern, choice.density, number / steps)
            if not isinstance(pattern, Dense):
                choices[choice.name] = pattern, density
        if choices and (not stages or stages[-1] != choices):
            stages.append(choices)
    gap = PRUNING_SHARE / max(1, len(stages) - 1)
    return tuple(Phase(gap * number, choices) for number, choices in enumerate(stages))


def _eased(pattern: SparsityPattern, density: float, share: float) -> tuple[SparsityPattern, float]:
    if isinstance(pattern, NM | TileNM):
        kept = pattern.m - round_half_up((pattern.m - pattern.n) * share)
        if kept >= pattern.m:
            return Dense(), 1.0
        eased = NM(kept, pattern.m) if isinstance(pattern, NM) else TileNM(kept, pattern.m, pattern.tile)
        return eased, kept / pattern.m
    return pattern, 1 - (1 - density) * share
