"""The loop of planning, building and measuring, on a machine that is made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cost_tables import METRIC, table

from tvm_nm import plan_loop
from tvm_nm.costs import CostTable
from tvm_nm.plan import Plan
from tvm_nm.plan_loop import TOLERANCE, close_loop, describe_rounds, predicted_us


def costs(layers: int = 12) -> CostTable:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(layers):
        dense = float(rng.uniform(50, 200))
        options = [("dense", 1.0, dense, 0.0)]
        options += [("4", d, dense * (0.15 + 0.8 * d), (1 - d) ** 2) for d in np.arange(1, 19) / 20]
        found.append(options)
    return table(found, fixed=100)


class Machine:
    """Sparse layers take `slower` times what the table says, and everything `overhead` microseconds more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: CostTable, slower: float, overhead: float) -> None:
        self.costs, self.slower, self.overhead = costs, slower, overhead
        self.built: list[Plan] = []
        monkeypatch.setattr(plan_loop, "build_plan", self.build)
        monkeypatch.setattr(plan_loop, "_measure", self.measure)

    def build(self, _imported: Any, plan: Plan, _target: Any, _directory: Path, _tuned: Any) -> Plan:
        self.built.append(plan)
        return plan

    def times(self, plan: Plan) -> Iterator[tuple[str, float]]:
        choices = {choice.name: choice for choice in plan.layers}
        for layer in self.costs.layers:
            choice = choices.get(layer.name)
            found = layer.find(choice.pattern, choice.density) if choice else layer.dense
            assert found is not None
            yield layer.name, found.time_us * (1 if found.is_dense else self.slower)

    def whole(self, plan: Plan) -> float:
        sparse = any(not choice.pattern.fixed_density for choice in plan.layers)
        return self.costs.fixed_us + sum(time for _, time in self.times(plan)) + self.overhead * sparse

    def measure(self, dense: Plan, planned: Plan, _seconds: float, known_us: float) -> Any:
        assert known_us == self.costs.dense_us
        pace = 1.7  # the machine is slower than when the table was made
        return plan_loop._Measured(
            self.whole(dense) * pace,
            self.whole(planned) * pace,
            {name: time * pace for name, time in self.times(planned)},
            {name: 100 for name, _ in self.times(planned)},
        )


def run(costs: CostTable, share: float, **options: Any) -> Any:
    return close_loop(None, None, costs, METRIC, share * costs.dense_us, Path(), **options)  # type: ignore[arg-type]


def test_one_round_is_enough_where_times_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, costs(), 1.0, 0.0)
    result = run(machine.costs, 0.6)
    assert len(result.rounds) == 1
    assert result.chosen.measured == pytest.approx(result.chosen.predicted)
    assert result.chosen.plan.origin.measured_share == pytest.approx(result.chosen.measured, abs=1e-4)
    assert len(machine.built) == 2  # the dense network first


@pytest.mark.parametrize(("slower", "overhead"), [(1.15, 0.0), (1.0, 60.0), (1.1, 40.0), (0.9, -10.0)])
def test_later_rounds_meet_the_budget_and_predict_it(
    monkeypatch: pytest.MonkeyPatch, slower: float, overhead: float
) -> None:
    machine = Machine(monkeypatch, costs(), slower, overhead)
    result = run(machine.costs, 0.6)
    assert 1 < len(result.rounds) <= 3
    assert abs(result.rounds[0].measured / result.budget - 1) > TOLERANCE
    assert abs(result.chosen.measured / result.budget - 1) <= TOLERANCE
    assert abs(result.chosen.predicted / result.chosen.measured - 1) <= 0.05
    lines = describe_rounds(result)
    assert len(lines) == len(result.rounds)
    assert "budget 60.0%" in lines[0]
    assert [line.endswith("<- taken") for line in lines] == [i == result.best for i in range(len(lines))]


def test_a_plan_that_was_measured_is_predicted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, costs(), 1.2, 80.0)
    result = run(machine.costs, 0.6, rounds=1)
    (only,) = result.rounds
    assert predicted_us(result.table, only.plan) / machine.costs.dense_us == pytest.approx(only.measured)


def test_a_budget_that_cannot_be_met_after_all_gives_the_fastest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, costs(), 1.3, 200.0)
    least = predicted_us(machine.costs, Plan()) * 0.31
    result = run(machine.costs, least / machine.costs.dense_us)
    assert result.chosen.measured == min(item.measured for item in result.rounds)
    assert result.chosen.measured > result.budget


def test_the_first_plan_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, costs(), 1.0, 0.0)
    usual = run(machine.costs, 0.6).chosen.plan
    changed = dataclasses.replace(usual, layers=usual.layers[::-1])
    assert run(machine.costs, 0.6, first=changed).chosen.plan.layers == changed.layers


def test_prediction_of_a_plan() -> None:
    found = costs(3)
    name = found.layers[1].name
    candidate = found.layers[1].candidates[4]
    from tvm_nm.plan import LayerChoice

    plan = Plan((LayerChoice(name, candidate.pattern, candidate.density),))
    assert predicted_us(found, plan) == pytest.approx(
        found.dense_us - found.layers[1].dense.time_us + candidate.time_us
    )
