"""Closes the loop: builds a plan, measures it beside the dense network, corrects the table and plans again.

Layers' times do not quite add up, and the ones that a planner picks are those whose times were measured too low. After
building a plan, what its layers took in it replaces what the table said; the whole of the plan is right then, and other
plans are nearly so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm

from tvm_nm.constraints import Constraints
from tvm_nm.cost_measure import build_plan
from tvm_nm.costs import CostTable
from tvm_nm.frontend import ImportedModel
from tvm_nm.network_times import time_networks
from tvm_nm.plan import Plan
from tvm_nm.planner import Planner, Solution
from tvm_nm.planning import make_plan
from tvm_nm.runtime import CompiledModel
from tvm_nm.schedules.tuned import TunedKernels

__all__ = [
    "MAX_ROUNDS",
    "TOLERANCE",
    "LoopResult",
    "LoopRound",
    "close_loop",
    "describe_rounds",
    "predicted_us",
]

MAX_ROUNDS = 3
"""Plans that are built, at most."""
TOLERANCE = 0.03
"""How far the measured time may be from the budget."""

_RATIO_LIMITS = (0.7, 1.5)


@dataclass(frozen=True, slots=True)
class LoopRound:
    """One plan that was built.

    Attributes
    ----------
    plan
        The plan.
    predicted, measured
        Time of the planned network as a share of the dense one's: from the table, and measured in turns with it.
    dense_ms
        Measured time of the dense network.
    """

    plan: Plan
    predicted: float
    measured: float
    dense_ms: float


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What came of it.

    Attributes
    ----------
    rounds
        The plans that were built, in order.
    best
        Index of the one that is taken: of those that meet the budget the one that loses least, or else the fastest.
    table
        The corrected table.
    budget
        The budget as a share of the dense time.
    """

    rounds: tuple[LoopRound, ...]
    best: int
    table: CostTable
    budget: float

    @property
    def chosen(self) -> LoopRound:
        """The round that is taken."""
        return self.rounds[self.best]


def close_loop(
    imported: ImportedModel,
    target: tvm.target.Target,
    table: CostTable,
    metric: str,
    budget_us: float,
    directory: Path,
    *,
    constraints: Constraints | None = None,
    first: Plan | None = None,
    dense_us: float | None = None,
    dense: CompiledModel | None = None,
    tuned: TunedKernels | None = None,
    rounds: int = MAX_ROUNDS,
    seconds: float = 6.0,
    progress: Callable[[str], None] | None = None,
) -> LoopResult:
    """Plan, build, measure and correct until the measured time meets the budget.

    Parameters
    ----------
    imported, target
        What is built; the target must be this machine.
    table, metric, constraints
        As for `tvm_nm.planner.Planner`.
    budget_us
        The budget, on the scale of the table.
    directory
        Where builds go; they are left there.
    first
        The plan to begin with, for instance one that was searched; default: the planner's.
    dense_us
        Time of the dense network on the scale of the table, for one that has been corrected; default: the table's.
    dense
        A build of the dense network by `build_plan` with the same `tuned`; default: it is built.
    tuned
        Tuned kernel variants to build with.
    rounds
        Plans to build, at most.
    seconds
        How long to measure each.
    progress
        Called with the name of each step when it starts.

    Raises
    ------
    InfeasibleBudgetError
        If no plan meets the budget in the table that it begins with.
    """
    step = progress or (lambda _: None)
    dense_us = dense_us or table.dense_us  # what shares are shares of, however the table is corrected
    if dense is None:
        step("building the dense network")
        dense = build_plan(imported, Plan(), target, directory / "dense", tuned)
    done: list[LoopRound] = []
    seen: set[tuple[object, ...]] = set()
    for number in range(rounds):
        if number == 0 and first is not None:
            plan, predicted = first, predicted_us(table, first)
        else:
            solution = _solve(Planner(table, metric, constraints), budget_us)
            plan, predicted = make_plan(table, solution, metric, budget_us, dense_us), solution.time_us
        if plan.layers in seen:
            break
        seen.add(plan.layers)
        step(f"building plan {number + 1}")
        model = build_plan(imported, plan, target, directory / f"plan{number + 1}", tuned)
        step(f"measuring plan {number + 1} in turns with the dense network")
        measured = _measure(dense, model, seconds, dense_us)
        done.append(LoopRound(plan, predicted / dense_us, measured.share, measured.dense_us / 1e3))
        table = _corrected(table, plan, measured, dense_us)
        share = budget_us / dense_us
        if abs(measured.share / share - 1) <= TOLERANCE or (measured.share < share and _loses_nothing(plan)):
            break
    share = budget_us / dense_us
    meeting = [i for i, item in enumerate(done) if item.measured <= share * (1 + TOLERANCE)]
    if meeting:
        best = min(meeting, key=lambda i: _loss(done[i].plan))
    else:
        best = min(range(len(done)), key=lambda i: done[i].measured)
    return LoopResult(tuple(_with_measured(item) for item in done), best, table, share)


def predicted_us(table: CostTable, plan: Plan) -> float:
    """Return the time that a table predicts for a plan; layers that the plan does not name are dense."""
    total = table.fixed_us
    choices = {choice.name: choice for choice in plan.layers}
    for layer in table.layers:
        choice = choices.get(layer.name)
        found = layer.dense if choice is None else layer.find(choice.pattern, choice.density)
        total += (found or layer.dense).time_us
    return total


@dataclass(frozen=True, slots=True)
class _Measured:
    """Times in turns: the whole of both networks, and the planned one's layers with the size of their weights."""

    dense_us: float
    planned_us: float
    layers: dict[str, float]
    bytes: dict[str, int]

    @property
    def share(self) -> float:
        return self.planned_us / self.dense_us


def _solve(planner: Planner, budget_us: float) -> Solution:
    """Plan for the budget, or for the least time where the corrected table says that it cannot be met any more."""
    return planner.solve(max(budget_us, planner.least_us))


def _measure(dense: CompiledModel, planned: CompiledModel, seconds: float, dense_us: float) -> _Measured:
    whole, found = time_networks((dense, planned), seconds, known_us=dense_us)
    names = [layer.name for layer in planned.layers]
    return _Measured(
        whole.total_us,
        found.total_us,
        dict(zip(names, found.layers_us.tolist(), strict=True)),
        {layer.name: layer.packed_bytes for layer in planned.layers},
    )


def _corrected(table: CostTable, plan: Plan, measured: _Measured, dense_us: float) -> CostTable:
    scale = dense_us / measured.dense_us
    choices = {choice.name: choice for choice in plan.layers}
    names = [layer.name for layer in table.layers]
    weights = [measured.bytes[layer.name] if layer.can_be_pruned else 0 for layer in table.layers]
    times = np.array([measured.layers[name] * scale for name in names])
    # As in the table: what layers and fixed time lack to the whole goes with the weights.
    lack = measured.planned_us * scale - table.fixed_us - float(times.sum())
    times += lack * np.array(weights) / max(1, sum(weights))
    layers = []
    for layer, time_us in zip(table.layers, times.tolist(), strict=True):
        choice = choices.get(layer.name)
        chosen = (layer.find(choice.pattern, choice.density) if choice is not None else None) or layer.dense
        if chosen.time_us <= 0:
            layers.append(layer)
            continue
        ratio = float(np.clip(time_us / chosen.time_us, *_RATIO_LIMITS))
        # What this layer's kernel takes more or less than in uniform builds, it does at other densities, too.
        candidates = tuple(
            dataclasses.replace(candidate, time_us=candidate.time_us * ratio)
            if candidate.pattern == chosen.pattern
            else candidate
            for candidate in layer.candidates
        )
        layers.append(dataclasses.replace(layer, candidates=candidates))
    table = dataclasses.replace(table, layers=tuple(layers))
    missing = measured.share * dense_us - predicted_us(table, plan)
    return dataclasses.replace(table, fixed_us=table.fixed_us + missing)


def _loses_nothing(plan: Plan) -> bool:
    return _loss(plan) == 0


def _loss(plan: Plan) -> float:
    return plan.origin.loss if plan.origin is not None else 0.0


def _with_measured(item: LoopRound) -> LoopRound:
    if item.plan.origin is None:
        return item
    origin = dataclasses.replace(item.plan.origin, measured_share=round(item.measured, 4))
    return dataclasses.replace(item, plan=dataclasses.replace(item.plan, origin=origin))


def describe_rounds(result: LoopResult) -> Sequence[str]:
    """Return a line for each round, for people."""
    lines = []
    for number, item in enumerate(result.rounds):
        mark = " <- taken" if number == result.best else ""
        lines.append(
            f"plan {number + 1}: predicted {item.predicted:.1%} of the dense time, measured {item.measured:.1%} "
            f"({1 / item.measured:.2f}x), budget {result.budget:.1%}, off by {item.measured / result.budget - 1:+.1%}; "
            f"prediction off by {item.predicted / item.measured - 1:+.1%}{mark}"
        )
    return lines
