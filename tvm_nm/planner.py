"""Chooses what every layer is pruned to: the least loss of accuracy within a time budget, by dynamic programming.

After Wu, Hong, Liu and Wu, "Exploiting Fine-Grained Structured Pruning for Efficient Inference on CNN Model" (ICPADS
2023), who choose every layer's sparsity under a total time from measured layer times and L1 norms; and SPDY (Frantar
and Alistarh, ICML 2022), for budgets in time buckets with a calibrated error per layer. Needs NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tvm_nm.constraints import Constraints, Resource
from tvm_nm.costs import CostTable
from tvm_nm.errors import InfeasibleBudgetError, PlanError
from tvm_nm.knapsack import Block, Member, Tables, pareto_points, solve_blocks, within_limits

__all__ = ["BUCKETS", "FrontPoint", "Planner", "Solution"]

BUCKETS = 10_000
"""Time buckets of a budget."""

_BUCKETS_2D = (1_000, 500)
"""Buckets of time and of memory or MACs, where both are limited."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice for every layer, and what it comes to.

    Attributes
    ----------
    choices
        Index of each layer's candidate, in the order of the table.
    time_us
        Time of the network that the table predicts, the fixed time included.
    loss
        Sum of the layers' losses.
    macs, bytes
        Multiply-accumulates and size of the packed weights, over all layers.
    """

    choices: tuple[int, ...]
    time_us: float
    loss: float
    macs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A point of the Pareto front: no plan is faster and loses as little.

    Attributes
    ----------
    time_us, loss
        As in `Solution`.
    choices
        As in `Solution`.
    """

    time_us: float
    loss: float
    choices: tuple[int, ...]


class Planner:
    """Plans for one cost table, importance metric and set of constraints.

    Times are rounded up to whole buckets, so a solution never exceeds its budget; among solutions that exceed it only
    by this rounding and not by their times, the best is taken. Rounding loses less than one bucket a layer.

    Parameters
    ----------
    table
        Times and errors.
    metric
        Importance metric, such as ``l1`` or ``output``.
    constraints
        What the layers may be pruned to.
    buckets
        Number of time buckets.

    Raises
    ------
    PlanError
        If the table lacks the metric, a glob matches no layer, or the constraints leave a layer without candidates.
    """

    def __init__(
        self,
        table: CostTable,
        metric: str,
        constraints: Constraints | None = None,
        *,
        buckets: int = BUCKETS,
    ) -> None:
        if buckets < 1:
            raise ValueError(f"a planner needs at least 1 bucket, not {buckets}")
        table.check_metric(metric)
        self._table = table
        self._metric = metric
        self._constraints = constraints or Constraints()
        self._buckets = buckets
        self._times = [np.array([c.time_us for c in layer.candidates]) for layer in table.layers]
        self._losses = [np.array([layer.loss(c, metric) for c in layer.candidates]) for layer in table.layers]
        self._resource = self._constraints.resource
        self._extras = [
            np.array([self._constraints.usage(candidate) for candidate in layer.candidates], dtype=np.float64)
            for layer in table.layers
        ]
        self._blocks = self._make_blocks()

    @property
    def table(self) -> CostTable:
        """What it plans from."""
        return self._table

    @property
    def least_us(self) -> float:
        """Least time of any plan within the constraints, the limit on memory or MACs left aside."""
        return self._table.fixed_us + sum(block.least_time for block in self._blocks)

    def solve(self, budget_us: float) -> Solution:
        """Return the plan of least loss within a time budget.

        Parameters
        ----------
        budget_us
            Time of the whole network, the fixed time included.

        Raises
        ------
        InfeasibleBudgetError
            If no plan meets the budget, or the limit on memory or MACs; says the least time that can be achieved.
        """
        self._check_resource()
        room = min(budget_us - self._table.fixed_us - self._base_time, self._horizon)
        found = None
        if budget_us >= self.least_us:
            tables = self._fill(room)
            picks = within_limits(tables, self._blocks, [room, *self._extra_room()])
            if len(picks):
                solutions = [self._solution(row) for row in picks]
                found = min(solutions, key=lambda s: (s.loss, s.time_us))
        if found is None:
            raise self._infeasible(budget_us)
        return found

    def least_time(self, max_loss: float) -> Solution:
        """Return the fastest plan whose loss is no larger than `max_loss`.

        Raises
        ------
        InfeasibleBudgetError
            If every plan within the constraints loses more.
        """
        front = self.front()
        meeting = [point for point in front if point.loss <= max_loss]
        if not meeting:
            least = min((point.loss for point in front), default=float("inf"))
            raise InfeasibleBudgetError(
                f"no plan loses at most {max_loss:g} within the constraints; the least is {least:.4g}"
            )
        return self._solution(np.array(min(meeting, key=lambda point: point.time_us).choices))

    def front(self) -> tuple[FrontPoint, ...]:
        """Return the whole Pareto front, fastest first, at the resolution of the time buckets.

        Raises
        ------
        InfeasibleBudgetError
            If no plan meets the limit on memory or MACs.
        """
        self._check_resource()
        rows = pareto_points(self._fill(self._horizon), self._blocks, self._extra_room())
        if not len(rows):
            raise self._infeasible(None)
        points: list[FrontPoint] = []
        for solution in sorted((self._solution(row) for row in rows), key=lambda s: (s.time_us, s.loss)):
            if not points or solution.loss < points[-1].loss:
                points.append(FrontPoint(solution.time_us, solution.loss, solution.choices))
        return tuple(points)

    @property
    def _base_time(self) -> float:
        return sum(block.base_time for block in self._blocks)

    @property
    def _horizon(self) -> float:
        """Time above the base within which every plan lies."""
        return max(sum(block.most_time for block in self._blocks) - self._base_time, 0.0)

    def _extra_room(self) -> list[float]:
        if self._resource is None:
            return []
        assert self._constraints.limit is not None
        return [self._constraints.limit - sum(member.base[1] for block in self._blocks for member in block.members)]

    def _fill(self, room: float) -> Tables:
        if self._resource is None:
            return solve_blocks(self._blocks, [room], (self._buckets,))
        shape = (min(self._buckets, _BUCKETS_2D[0]), _BUCKETS_2D[1])
        return solve_blocks(self._blocks, [room, *self._extra_room()], shape)

    def _check_resource(self) -> None:
        if self._resource is None:
            return
        least = int(sum(block.least_extra for block in self._blocks))
        if self._constraints.limit is not None and least > self._constraints.limit:
            unit = "bytes of weights" if self._resource is Resource.BYTES else "multiply-accumulates"
            raise InfeasibleBudgetError(
                f"no plan has at most {self._constraints.limit} {unit}; the least within the constraints is {least}"
            )

    def _infeasible(self, budget_us: float | None) -> InfeasibleBudgetError:
        least = self.least_us
        if self._resource is not None:
            rows = pareto_points(self._fill(self._horizon), self._blocks, self._extra_room())
            if not len(rows):
                return InfeasibleBudgetError(
                    f"no plan meets the limit of {self._constraints.limit} ({self._resource.value}) together with the "
                    "other constraints; raise it"
                )
            least = min(self._solution(row).time_us for row in rows)
        assert budget_us is not None
        dense = self._table.dense_us
        return InfeasibleBudgetError(
            f"no plan meets the budget of {budget_us / 1e3:.3g} ms ({budget_us / dense:.1%} of the dense time); the "
            f"least achievable time is {least / 1e3:.4g} ms ({least / dense:.1%}); allow lower densities or other "
            "patterns, or raise the budget",
            least,
        )

    def _solution(self, row: NDArray[np.intp]) -> Solution:
        chosen = [layer.candidates[int(index)] for layer, index in zip(self._table.layers, row, strict=True)]
        time_us = self._table.fixed_us + float(sum(times[index] for times, index in zip(self._times, row, strict=True)))
        loss = float(sum(losses[index] for losses, index in zip(self._losses, row, strict=True)))
        return Solution(
            choices=tuple(int(index) for index in row),
            time_us=time_us,
            loss=loss,
            macs=sum(candidate.macs for candidate in chosen),
            bytes=sum(candidate.bytes for candidate in chosen),
        )

    def _make_blocks(self) -> list[Block]:
        names = [layer.name for layer in self._table.layers]
        allowed = self._constraints.allowed(self._table.layers)
        blocks = []
        for group in self._constraints.groups(names):
            branches = [[allowed[group[0]]]] if len(group) == 1 else self._tied_branches(group, allowed)
            blocks.append(
                Block(
                    tuple(
                        Member(index, self._times[index], self._losses[index], self._extras[index], allowed[index])
                        for index in group
                    ),
                    tuple(tuple(branch) for branch in branches),
                )
            )
        return blocks

    def _tied_branches(self, group: Sequence[int], allowed: Sequence[NDArray[np.intp]]) -> list[list[NDArray[np.intp]]]:
        """One branch a pattern: every layer of the group takes it, or stays dense."""
        layers = [self._table.layers[index] for index in group]
        patterns = dict.fromkeys(
            str(layer.candidates[int(i)].pattern)
            for layer, index in zip(layers, group, strict=True)
            for i in allowed[index]
            if not layer.candidates[int(i)].is_dense
        )
        branches = []
        for pattern in [*patterns, "dense"]:
            branch = [
                np.array(
                    [i for i in allowed[index] if str(layer.candidates[int(i)].pattern) in (pattern, "dense")],
                    dtype=np.intp,
                )
                for layer, index in zip(layers, group, strict=True)
            ]
            if all(len(choices) for choices in branch):
                branches.append(branch)
        if not branches:
            raise PlanError(
                f"layers {', '.join(repr(layer.name) for layer in layers)} are tied and the constraints leave them no "
                "pattern in common"
            )
        return branches
