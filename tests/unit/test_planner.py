"""The planner against brute force, its constraints, budgets and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from cost_tables import METRIC, Everything, every_plan, random_table, table

from tvm_nm.constraints import Constraints, LayerRule, exclusion_rules, parse_budget, speedup_budget
from tvm_nm.costs import CostTable
from tvm_nm.errors import InfeasibleBudgetError, PlanError
from tvm_nm.planner import Planner, Solution


def whole(rng: np.random.Generator) -> float:
    return float(rng.integers(1, 30))


def real(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.1, 30))


def least_loss(plans: list[Everything], budget: float) -> float:
    return min((plan.loss for plan in plans if plan.time <= budget), default=math.inf)


def spread(plans: list[Everything]) -> list[float]:
    """Budgets from what nobody meets to what everybody does."""
    times = sorted(plan.time for plan in plans)
    return [times[0] - 1, *(times[(len(times) - 1) * i // 6] for i in range(7)), times[-1] + 5]


def check(costs: CostTable, solution: Solution, budget: float) -> None:
    """The solution is what it says it is."""
    taken = [layer.candidates[i] for layer, i in zip(costs.layers, solution.choices, strict=True)]
    assert solution.time_us == pytest.approx(costs.fixed_us + sum(candidate.time_us for candidate in taken))
    assert solution.time_us <= budget * (1 + 1e-9)
    assert solution.macs == sum(candidate.macs for candidate in taken)
    assert solution.bytes == sum(candidate.bytes for candidate in taken)
    losses = [layer.loss(c, METRIC) for layer, c in zip(costs.layers, taken, strict=True)]
    assert solution.loss == pytest.approx(sum(losses))


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_brute_force_where_times_are_whole_buckets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = random_table(rng, int(rng.integers(1, 7)), int(rng.integers(2, 6)), whole)
    plans = list(every_plan(costs))
    for budget in spread(plans):
        want = least_loss(plans, budget)
        # The room above the fastest plan is a whole number of buckets, so that rounding changes nothing.
        room = round(min(budget, max(plan.time for plan in plans)) - min(plan.time for plan in plans))
        planner = Planner(costs, METRIC, buckets=max(room, 1))
        if math.isinf(want):
            with pytest.raises(InfeasibleBudgetError) as error:
                planner.solve(budget)
            assert error.value.least_us == pytest.approx(min(plan.time for plan in plans))
            continue
        solution = planner.solve(budget)
        check(costs, solution, budget)
        assert solution.loss == pytest.approx(want)


@pytest.mark.parametrize("seed", range(40))
def test_is_between_the_exact_and_the_rounded_optimum(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    costs = random_table(rng, int(rng.integers(1, 7)), int(rng.integers(2, 6)), real)
    plans = list(every_plan(costs))
    buckets = int(rng.integers(20, 400))
    planner = Planner(costs, METRIC, buckets=buckets)
    for budget in spread(plans)[1:]:
        solution = planner.solve(budget)
        check(costs, solution, budget)
        width = (budget - min(plan.time for plan in plans)) / buckets
        rounded = least_loss(plans, budget - width * len(costs.layers) + 1e-9)
        assert least_loss(plans, budget) - 1e-12 <= solution.loss <= rounded + 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_front_is_every_plan_that_no_other_beats(seed: int) -> None:
    rng = np.random.default_rng(2000 + seed)
    costs = random_table(rng, int(rng.integers(1, 6)), int(rng.integers(2, 6)), whole)
    plans = list(every_plan(costs))
    span = max(plan.time for plan in plans) - min(plan.time for plan in plans)
    # Times are whole, but the slowest candidate need not be worth taking: the span is not always that of the front.
    front = Planner(costs, METRIC, buckets=round(span) or 1).front()
    want: list[tuple[float, float]] = []
    for plan in sorted(plans, key=lambda p: (p.time, p.loss)):
        if not want or plan.loss < want[-1][1] - 1e-12:
            want.append((plan.time, plan.loss))
    assert [point.time_us for point in front] == pytest.approx([time for time, _ in want])
    assert [point.loss for point in front] == pytest.approx([loss for _, loss in want])


@pytest.mark.parametrize("seed", range(20))
def test_least_time_for_a_loss(seed: int) -> None:
    rng = np.random.default_rng(3000 + seed)
    costs = random_table(rng, 4, 4, whole)
    plans = list(every_plan(costs))
    span = max(plan.time for plan in plans) - min(plan.time for plan in plans)
    planner = Planner(costs, METRIC, buckets=round(span))
    for limit in (0.0, 0.1, 0.4, 2.0):
        solution = planner.least_time(limit)
        assert solution.loss <= limit
        assert solution.time_us == pytest.approx(min(plan.time for plan in plans if plan.loss <= limit + 1e-12))


def test_a_loss_that_the_constraints_exclude() -> None:
    costs = table([[("dense", 1.0, 9, 0.0), ("4", 0.5, 5, 0.4)]])
    planner = Planner(costs, METRIC, Constraints((LayerRule(max_density=0.5),)))
    with pytest.raises(InfeasibleBudgetError, match=r"at most 0\.1 .* least is 0\.2"):
        planner.least_time(0.1)


def constrained(plans: list[Everything], costs: CostTable, allowed: Callable[[int, int], bool]) -> list[Everything]:
    return [plan for plan in plans if all(allowed(layer, choice) for layer, choice in enumerate(plan.choices))]


@pytest.mark.parametrize("seed", range(20))
def test_rules(seed: int) -> None:
    rng = np.random.default_rng(4000 + seed)
    costs = random_table(rng, 4, 5, whole)
    constraints = Constraints(
        (
            LayerRule("layer[01]", min_density=0.3),
            LayerRule("layer2", patterns=("1x4",)),
            *exclusion_rules(["layer3"]),
        )
    )

    def allowed(layer: int, choice: int) -> bool:
        candidate = costs.layers[layer].candidates[choice]
        if layer < 2:
            return candidate.density >= 0.3
        return candidate.is_dense or (layer == 2 and str(candidate.pattern) == "1x4")

    plans = constrained(list(every_plan(costs)), costs, allowed)
    for budget in spread(plans)[1:]:
        room = round(min(budget, max(p.time for p in plans)) - min(p.time for p in plans))
        solution = Planner(costs, METRIC, constraints, buckets=max(room, 1)).solve(budget)
        check(costs, solution, budget)
        assert solution.loss == pytest.approx(least_loss(plans, budget))


@pytest.mark.parametrize("seed", range(30))
def test_tied_layers_share_a_pattern_or_stay_dense(seed: int) -> None:
    rng = np.random.default_rng(5000 + seed)
    costs = random_table(rng, 5, 5, whole)
    groups = ((0, 2, 3), (1, 4)) if seed % 2 else ((1, 3),)
    constraints = Constraints(tied=tuple(tuple(f"layer{i}" for i in group) for group in groups))

    def fits(plan: Everything) -> bool:
        for group in groups:
            taken = [costs.layers[i].candidates[plan.choices[i]] for i in group]
            if len({str(candidate.pattern) for candidate in taken if not candidate.is_dense}) > 1:
                return False
        return True

    plans = [plan for plan in every_plan(costs) if fits(plan)]
    base = sum(min(c.time_us for c in layer.candidates) for layer in costs.layers) + costs.fixed_us
    for budget in spread(plans):
        want = least_loss(plans, budget)
        top = max(plan.time for plan in plans)
        planner = Planner(costs, METRIC, constraints, buckets=max(round(min(budget, top) - base), 1))
        if math.isinf(want):
            with pytest.raises(InfeasibleBudgetError) as error:
                planner.solve(budget)
            assert error.value.least_us == pytest.approx(min(plan.time for plan in plans))
            continue
        solution = planner.solve(budget)
        check(costs, solution, budget)
        assert fits(Everything(solution.choices, 0, 0, 0, 0))
        assert solution.loss == pytest.approx(want)


@pytest.mark.parametrize("what", ["bytes", "macs"])
@pytest.mark.parametrize("seed", range(10))
def test_second_limit(seed: int, what: str) -> None:
    rng = np.random.default_rng(6000 + seed)
    costs = random_table(rng, 4, 4, whole)
    plans = list(every_plan(costs))
    used = sorted(getattr(plan, what) for plan in plans)
    for limit in (used[len(used) // 20], used[len(used) // 3], used[-1]):
        within = [plan for plan in plans if getattr(plan, what) <= limit]
        limits = {"max_bytes": limit} if what == "bytes" else {"max_macs": limit}
        planner = Planner(costs, METRIC, Constraints(**limits))
        for budget in spread(within)[1:]:
            solution = planner.solve(budget)
            check(costs, solution, budget)
            assert getattr(solution, what) <= limit
            assert solution.loss == pytest.approx(least_loss(within, budget), abs=2e-3)
        with pytest.raises(InfeasibleBudgetError) as error:
            planner.solve(min(plan.time for plan in within) - 0.5)
        assert error.value.least_us == pytest.approx(min(plan.time for plan in within))
        fastest = planner.front()[0]
        assert fastest.time_us == pytest.approx(min(plan.time for plan in within))
    limits = {"max_bytes": used[0] - 1} if what == "bytes" else {"max_macs": used[0] - 1}
    planner = Planner(costs, METRIC, Constraints(**limits))
    with pytest.raises(InfeasibleBudgetError, match=f"the least within the constraints is {used[0]}"):
        planner.solve(1e6)


def test_dense_time_is_enough_for_the_dense_network() -> None:
    rng = np.random.default_rng(7)
    layers = []
    for _ in range(60):
        dense = float(rng.uniform(50, 900))
        layers.append([("dense", 1.0, dense, 0.0), ("4", 0.5, 0.6 * dense, 0.3)])
    costs = table(layers, fixed=31.7)
    solution = Planner(costs, METRIC).solve(costs.dense_us)
    assert solution.loss == 0
    assert set(solution.choices) == {0}


def test_sparse_that_never_wins_stays_dense() -> None:
    costs = table([[("dense", 1.0, 5, 0.0), ("4", 0.5, 6, 0.1)]] * 3, fixed=1)
    assert [point.choices for point in Planner(costs, METRIC).front()] == [(0, 0, 0)]
    with pytest.raises(InfeasibleBudgetError, match=r"least achievable time is 0\.016 ms \(100\.0%\)"):
        Planner(costs, METRIC).solve(0.9 * costs.dense_us)


def test_sixty_layers_with_forty_candidates_take_less_than_a_second() -> None:
    rng = np.random.default_rng(8)
    layers = []
    for _ in range(60):
        dense = float(rng.uniform(50, 900))
        options = [("dense", 1.0, dense, 0.0)]
        for number in range(39):
            density = (number % 20 + 1) / 21
            options.append((("2", "4")[number // 20], density, dense * (0.1 + 0.8 * density), (1 - density) ** 2))
        layers.append(options)
    costs = table(layers, fixed=100)
    start = time.process_time()
    solution = Planner(costs, METRIC).solve(0.5 * costs.dense_us)
    assert time.process_time() - start < 1
    check(costs, solution, 0.5 * costs.dense_us)
    assert solution.time_us > 0.499 * costs.dense_us
    start = time.process_time()
    front = Planner(costs, METRIC).front()
    assert time.process_time() - start < 2
    assert len(front) > 1000
    assert front[-1].loss == 0


@pytest.mark.parametrize(
    ("text", "budget"),
    [("0.6", 60), ("60%", 60), ("1", 100), ("25ms", 25_000), ("900us", 900), ("900 µs", 900), ("1.5s", 1.5e6)],
)
def test_budgets(text: str, budget: float) -> None:
    assert parse_budget(text, 100) == pytest.approx(budget)


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "1.2", "120%", "nan", "1..2", "3 h", "ms"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(PlanError, match="budget"):
        parse_budget(text, 100)


def test_speedups() -> None:
    assert speedup_budget(1.25, 100) == pytest.approx(80)
    for bad in (0.9, 0.0, math.nan, math.inf):
        with pytest.raises(PlanError, match="speed-up"):
            speedup_budget(bad, 100)


def test_bad_constraints() -> None:
    costs = table([[("dense", 1.0, 9, 0.0), ("4", 0.5, 5, 0.4)]] * 2)
    with pytest.raises(PlanError, match="not in order"):
        LayerRule(min_density=0.5, max_density=0.25)
    with pytest.raises(PlanError, match="bad sparsity pattern '1y4'"):
        LayerRule(patterns=("1y4",))
    with pytest.raises(PlanError, match="'layer0' is tied twice"):
        Constraints(tied=(("layer0",), ("layer0", "layer1")))
    with pytest.raises(PlanError, match="not in both"):
        Constraints(max_bytes=1, max_macs=1)
    with pytest.raises(PlanError, match="no layer matches 'layr0'; near: layer0"):
        Planner(costs, METRIC, Constraints((LayerRule("layr0"),)))
    with pytest.raises(PlanError, match="tied layer 'x' does not exist"):
        Planner(costs, METRIC, Constraints(tied=(("x", "layer0"),)))
    with pytest.raises(PlanError, match=r"leave layer 'layer0' no candidate of: dense, 1x4 at 0\.5"):
        Planner(costs, METRIC, Constraints((LayerRule(max_density=0.25),)))
    with pytest.raises(PlanError, match=r"no importance metric 'output' \(it has: l1\)"):
        Planner(costs, "output")
