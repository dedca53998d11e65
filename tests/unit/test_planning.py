"""Goals, plans from solutions, uniform points, and rules from the command line."""

from __future__ import annotations

from typing import Any

import pytest
from cost_tables import METRIC, table

from tvm_nm.constraints import LayerRule
from tvm_nm.errors import InfeasibleBudgetError, PlanError
from tvm_nm.patterns import Dense, OneByN
from tvm_nm.plan import LayerChoice
from tvm_nm.planner import Planner
from tvm_nm.planning import STAYS_DENSE, Goal, make_plan, matching_names, parse_rules, uniform_points

COSTS = table(
    [
        [("dense", 1.0, 40, 0.0), ("4", 0.5, 20, 0.4), ("4", 0.25, 10, 0.8), ("2", 0.5, 30, 0.3)],
        [("dense", 1.0, 20, 0.0)],
        [("dense", 1.0, 30, 0.0), ("4", 0.5, 20, 0.1), ("4", 0.25, 15, 0.4)],
    ],
    fixed=10,
)


def test_a_goal_is_exactly_one_thing() -> None:
    for several in ({}, {"budget": "0.5", "speedup": 2.0}, {"speedup": 2.0, "max_loss": 0.0}):
        with pytest.raises(PlanError, match="exactly one of --budget, --speedup and --max-loss"):
            Goal(**several)  # type: ignore[arg-type]


def test_goals_agree_with_each_other() -> None:
    planner = Planner(COSTS, METRIC)
    by_share = Goal(budget="0.8").solve(planner)
    assert by_share == Goal(speedup=1.25).solve(planner) == Goal(budget="80us").solve(planner)
    assert by_share.time_us == 80
    assert by_share.loss == pytest.approx(0.2)
    assert Goal(max_loss=by_share.loss).solve(planner).time_us <= by_share.time_us
    with pytest.raises(InfeasibleBudgetError):
        Goal(speedup=3.0).solve(planner)
    with pytest.raises(PlanError, match="no time budget"):
        Goal(max_loss=0.1).budget_us(COSTS)


@pytest.mark.parametrize(
    ("goal", "says"),
    [
        ({"budget": "0.0001x"}, "budget '0.0001x' is neither a share of the dense time"),
        ({"budget": "1.2"}, "more than the dense time"),
        ({"budget": "-3ms"}, "neither a share"),
        ({"budget": "0"}, "neither a share"),
        ({"speedup": 0.5}, "speed-up 0.5 is not a number from 1"),
        ({"speedup": float("nan")}, "speed-up nan"),
        ({"max_loss": -0.1}, "largest loss -0.1 is not a number from 0"),
        ({"max_loss": float("inf")}, "largest loss inf"),
    ],
)
def test_goals_that_are_none_are_refused_at_once(goal: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Goal(**goal)


def test_budgets_out_of_reach_are_refused_by_the_first_measurements() -> None:
    for goal in (Goal(budget="30us"), Goal(budget="0.15"), Goal(speedup=200 / 31)):
        with pytest.raises(InfeasibleBudgetError, match=r"15\.\d% of the dense time.* about 0.04 ms \(20%\)") as error:
            goal.check_reachable(40.0, 200.0)
        assert error.value.least_us == 40
    for goal in (Goal(budget="33us"), Goal(budget="0.165"), Goal(speedup=6.0), Goal(max_loss=0.0)):
        goal.check_reachable(40.0, 200.0)


def test_budgets_that_are_absurd_are_refused_by_the_work_that_is_left() -> None:
    for goal in (Goal(budget="0.04"), Goal(budget="4%"), Goal(speedup=25.0)):
        with pytest.raises(InfeasibleBudgetError, match=r"budget of 4.00% .* 10.0% of the multiply-accumulates"):
            goal.check_work(100, 1000)
    for goal in (Goal(budget="0.06"), Goal(speedup=15.0), Goal(budget="1us"), Goal(max_loss=0.0)):
        goal.check_work(100, 1000)


def test_a_plan_names_what_can_be_pruned_and_says_where_it_is_from() -> None:
    solution = Planner(COSTS, METRIC).solve(90)
    plan = make_plan(COSTS, solution, METRIC, 90)
    assert plan.layers == (LayerChoice("layer0", Dense(), 1.0), LayerChoice("layer2", OneByN(4), 0.5))
    origin = plan.origin
    assert origin is not None
    assert (origin.model, origin.structure, origin.metric) == ("m", "bb", METRIC)
    assert (origin.budget_us, origin.dense_us, origin.predicted_us) == (90, 100, 90)
    assert origin.loss == pytest.approx(0.05)
    assert origin.note == ""


def test_a_plan_that_stays_dense_says_so() -> None:
    slower = table([[("dense", 1.0, 5, 0.0), ("4", 0.5, 6, 0.1)]])
    plan = make_plan(slower, Planner(slower, METRIC).solve(5), METRIC, 5)
    assert plan.origin is not None
    assert plan.origin.note == STAYS_DENSE
    assert {str(choice.pattern) for choice in plan.layers} == {"dense"}


def test_uniform_points_are_those_that_all_layers_have() -> None:
    points = uniform_points(COSTS, METRIC)
    assert [(point.label, point.time_us) for point in points] == [("1x4 at 0.5", 70), ("1x4 at 0.25", 55)]
    assert [point.loss for point in points] == pytest.approx([0.25, 0.6])
    assert points[0].choices == (1, 0, 1)
    assert uniform_points(table([[("dense", 1.0, 5, 0.0)]]), METRIC) == ()


def test_rules() -> None:
    found = parse_rules(["0.25", "conv*=0.5"], ["fc=0.75"], ["1x4,2:4", "a=b=1x16"])
    assert found == (
        LayerRule(min_density=0.25),
        LayerRule("conv*", min_density=0.5),
        LayerRule("fc", max_density=0.75),
        LayerRule(patterns=("1x4", "2:4")),
        LayerRule("a=b", patterns=("1x16",)),
    )
    with pytest.raises(PlanError, match="'conv=x' is neither a density nor GLOB=DENSITY"):
        parse_rules(["conv=x"], [], [])


def test_names_that_match() -> None:
    assert matching_names(["conv1", "conv2", "fc"], "conv*") == ("conv1", "conv2")
    with pytest.raises(PlanError, match="no layer matches 'cnv'; near: conv1"):
        matching_names(["conv1"], "cnv")
