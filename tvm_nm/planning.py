"""From a cost table to a plan, and what people want to see of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm_nm.constraints import LayerRule, parse_budget, speedup_budget
from tvm_nm.costs import CostTable
from tvm_nm.errors import InfeasibleBudgetError, PlanError
from tvm_nm.plan import LayerChoice, Plan, PlanOrigin, near_names
from tvm_nm.planner import FrontPoint, Planner, Solution

__all__ = ["Goal", "UniformPoint", "make_plan", "matching_names", "parse_rules", "uniform_points"]

STAYS_DENSE = "no sparse kernel is faster than dense, or worth its loss: the network stays dense"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a plan is to achieve; exactly one of the three.

    Attributes
    ----------
    budget
        A share of the dense time (``0.6``) or a time (``25ms``).
    speedup
        How many times as fast as the dense network.
    max_loss
        The loss that may not be exceeded, in the least time.

    Raises
    ------
    PlanError
        If none or several are given, or the one is no budget whatever the times.
    """

    budget: str | None = None
    speedup: float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.budget, self.speedup, self.max_loss) if value is not None]
        if len(given) != 1:
            raise PlanError("a plan needs exactly one of --budget, --speedup and --max-loss")
        if self.max_loss is None:
            self._budget_us(1.0)
        elif not (math.isfinite(self.max_loss) and self.max_loss >= 0):
            raise PlanError(f"largest loss {self.max_loss:g} is not a number from 0")

    def solve(self, planner: Planner) -> Solution:
        """Return the plan that achieves it.

        Raises
        ------
        InfeasibleBudgetError
            If none does.
        """
        if self.max_loss is not None:
            return planner.least_time(self.max_loss)
        return planner.solve(self.budget_us(planner.table))

    def budget_us(self, table: CostTable) -> float:
        """Return the time budget on the scale of a table.

        Raises
        ------
        PlanError
            Always for a `max_loss`.
        """
        return self._budget_us(table.dense_us)

    def _budget_us(self, dense_us: float) -> float:
        if self.speedup is not None:
            return speedup_budget(self.speedup, dense_us)
        if self.budget is None:
            raise PlanError("a plan for a loss has no time budget")
        return parse_budget(self.budget, dense_us)

    def check_reachable(self, least_us: float, dense_us: float) -> None:
        """Refuse a time budget that is evidently out of reach, before the rest is built and measured.

        Parameters
        ----------
        least_us, dense_us
            First estimates of the least time that any plan takes, and of the dense network's.

        Raises
        ------
        InfeasibleBudgetError
            If the budget is a fifth less than the least time.
        """
        if self.max_loss is not None:
            return
        budget_us = self._budget_us(dense_us)
        if budget_us < 0.8 * least_us:
            raise InfeasibleBudgetError(
                f"the budget of {budget_us / 1e3:.3g} ms ({budget_us / dense_us:.1%} of the dense time) is out of "
                f"reach: with every layer at its lowest density the network takes about {least_us / 1e3:.3g} ms "
                f"({least_us / dense_us:.0%}); allow lower densities or raise the budget",
                least_us,
            )

    def check_work(self, least: int, dense: int) -> None:
        """Refuse a share of the dense time that is absurd for the work that is left, before anything is built.

        Parameters
        ----------
        least, dense
            Multiply-accumulates of the sparsest plan and of the dense network.

        Raises
        ------
        InfeasibleBudgetError
            If the share is less than half of the share of the work: kernels for so little do not become faster.
        """
        if self.max_loss is not None:
            return
        share = self._budget_us(1.0)
        if share != self._budget_us(2.0) / 2:
            return  # a time, of which nothing is known before the dense network is measured
        if 2 * share * dense < least:
            raise InfeasibleBudgetError(
                f"the budget of {share:.2%} of the dense time is out of reach: with every layer at its lowest "
                f"density {least / dense:.1%} of the multiply-accumulates are left; allow lower densities, prune more "
                "layers (--include) or raise the budget"
            )


@dataclass(frozen=True, slots=True)
class UniformPoint:
    """The network with all layers that can be pruned at one pattern and density.

    Attributes
    ----------
    label
        Pattern and density in words.
    pattern
        Text form of the pattern.
    time_us, loss
        As in `tvm_nm.planner.Solution`.
    choices
        Index of each layer's candidate.
    """

    label: str
    pattern: str
    time_us: float
    loss: float
    choices: tuple[int, ...]


def make_plan(
    table: CostTable, solution: Solution | FrontPoint, metric: str, budget_us: float, dense_us: float | None = None
) -> Plan:
    """Write a solution down as a plan.

    Parameters
    ----------
    table, metric
        What it was planned from.
    solution
        A choice for every layer.
    budget_us
        The budget that it had to meet.
    dense_us
        Time of the dense network, where it is not the table's.
    """
    choices = []
    for layer, index in zip(table.layers, solution.choices, strict=True):
        if layer.can_be_pruned:
            candidate = layer.candidates[index]
            choices.append(LayerChoice(layer.name, candidate.pattern, candidate.density))
    stays = all(choice.pattern.fixed_density == 1 for choice in choices)
    origin = PlanOrigin(
        model=table.model,
        model_sha256=table.model_sha256,
        structure=table.structure,
        target=dict(table.target),
        threads=table.threads,
        revision=table.revision,
        metric=metric,
        budget_us=round(budget_us, 3),
        dense_us=round(dense_us if dense_us is not None else table.dense_us, 3),
        predicted_us=round(solution.time_us, 3),
        loss=solution.loss,
        note=STAYS_DENSE if stays else "",
    )
    return Plan(tuple(choices), origin)


def uniform_points(table: CostTable, metric: str) -> tuple[UniformPoint, ...]:
    """Return what one pattern and density for all layers that can be pruned comes to, densest first by pattern.

    Only patterns and densities that all of these layers have.
    """
    table.check_metric(metric)
    layers = [layer for layer in table.layers if layer.can_be_pruned]
    if not layers:
        return ()
    keys = [candidate.key for candidate in layers[0].candidates if not candidate.is_dense]
    points = []
    for key in keys:
        choices, time_us, loss, label = [], table.fixed_us, 0.0, ""
        for layer in table.layers:
            wanted = key if layer.can_be_pruned else layer.dense.key
            index = next((i for i, candidate in enumerate(layer.candidates) if candidate.key == wanted), None)
            if index is None:
                break
            candidate = layer.candidates[index]
            choices.append(index)
            time_us += candidate.time_us
            loss += layer.loss(candidate, metric)
            label = candidate.label if layer.can_be_pruned else label
        else:
            points.append(UniformPoint(label, key[0], time_us, loss, tuple(choices)))
    return tuple(sorted(points, key=lambda point: (point.pattern, -point.time_us)))


def parse_rules(min_density: Sequence[str], max_density: Sequence[str], allow: Sequence[str]) -> tuple[LayerRule, ...]:
    """Read the command line's rules: ``D`` or ``GLOB=D`` for densities, ``P,P`` or ``GLOB=P,P`` for patterns.

    Raises
    ------
    PlanError
        If one cannot be read.
    """
    rules = []
    for text in min_density:
        glob, value = _split(text)
        rules.append(LayerRule(glob, min_density=_number(value, text)))
    for text in max_density:
        glob, value = _split(text)
        rules.append(LayerRule(glob, max_density=_number(value, text)))
    for text in allow:
        glob, value = _split(text)
        rules.append(LayerRule(glob, patterns=tuple(item.strip() for item in value.split(",") if item.strip())))
    return tuple(rules)


def matching_names(names: Sequence[str], glob: str) -> tuple[str, ...]:
    """Return the names that match a glob.

    Raises
    ------
    PlanError
        If none does.
    """
    rule = LayerRule(glob)
    found = tuple(name for name in names if rule.matches(name))
    if not found:
        raise PlanError(f"no layer matches {glob!r}; {near_names(glob, names)}")
    return found


def _split(text: str) -> tuple[str, str]:
    glob, equals, value = text.rpartition("=")
    return (glob, value) if equals else ("*", text)


def _number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise PlanError(f"{text!r} is neither a density nor GLOB=DENSITY") from None
