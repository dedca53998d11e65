"""Searches the layers' sensitivities for the plan whose stitched network stays nearest to the dense one.

SPDY (Frantar and Alistarh, ICML 2022): layers' errors do not simply add up to the network's. Their coefficients are
searched: each trial gives a vector of coefficients to the dynamic program, stitches the network that it plans together
from pruned layers, and judges that on calibration images. Random vectors first; then the best one is changed in ever
fewer places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tvm_nm.constraints import Constraints
from tvm_nm.costs import CostTable
from tvm_nm.perturbed import LayerParameters, PerturbedNetwork, WeightSource, kl_divergence
from tvm_nm.plan_calibration import Repair
from tvm_nm.planner import Planner, Solution

__all__ = ["SearchResult", "search_plan", "stitched_divergence"]

_START_TRIALS = 30
_TRIALS = 100
_BUCKETS = 2_000
"""Trials need no more: the answer is planned again with all buckets."""
_BATCH = 64


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What the search found.

    Attributes
    ----------
    table
        The cost table with the sensitivities that were found, as those of the metric `search`.
    solution
        The plan for them.
    divergence, first_divergence
        Of the stitched network from the dense one on the calibration images: of the solution, and of the plan that the
        search began with.
    trials
        Different plans that were judged.
    """

    table: CostTable
    solution: Solution
    divergence: float
    first_divergence: float
    trials: int


def search_plan(
    table: CostTable,
    metric: str,
    budget_us: float,
    network: PerturbedNetwork,
    images: NDArray[np.float32],
    source: WeightSource,
    *,
    repair: Repair | None = None,
    constraints: Constraints | None = None,
    trials: int = _TRIALS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> SearchResult:
    """Search for sensitivities that give a better plan.

    Parameters
    ----------
    table, metric
        Where the search begins; errors stay as they are.
    budget_us, constraints
        As for the planner.
    network, images
        What the stitched network is judged with; images float32 (N, C, H, W), no labels.
    source
        Parameters of pruned layers, such as a database of reconstructed ones.
    repair
        Sets right what these do to layers behind them; see `tvm_nm.plan_calibration.Calibration`.
    trials
        Coefficient vectors to try.
    seed
        Equal seeds give equal results.
    progress
        Called with the name of each step when it starts.

    Raises
    ------
    InfeasibleBudgetError
        If no plan meets the budget.
    """
    step = progress or (lambda _: None)
    rng = np.random.default_rng(seed)
    free = np.flatnonzero([layer.can_be_pruned for layer in table.layers])
    given = np.array([layer.sensitivity[metric] for layer in table.layers])
    base = np.zeros(len(given))
    base[free] = np.maximum(given[free], 1e-3 * given[free].mean() + 1e-12)
    dense = _answers(network, images, {})
    known: dict[tuple[int, ...], float] = {}

    def judge(sensitivity: NDArray[np.float64]) -> tuple[float, CostTable]:
        changed = _with_sensitivity(table, metric, sensitivity)
        choices = Planner(changed, "search", constraints, buckets=_BUCKETS).solve(budget_us).choices
        if choices not in known:
            known[choices] = stitched_divergence(table, choices, network, images, source, dense, repair)
        return known[choices], changed

    best_vector = base
    best, best_table = judge(base)
    first = best
    for trial in range(trials):
        if trial % 10 == 0:
            step(f"searching, trial {trial + 1} of {trials}, best divergence {best:.4g}")
        vector = best_vector.copy()
        if trial < min(_START_TRIALS, trials // 3):
            # From the measured sensitivities to equal ones, which are right where the measured ones are not.
            vector[free] = base[free] ** rng.uniform(0, 1)
            if trial:
                vector[free] *= np.exp(rng.uniform(-1.5, 1.5, len(free)))
        else:
            # Ever fewer layers are changed at a time, down to one in ten.
            share = 0.5 * 0.2 ** (trial / max(1, trials))
            places = rng.choice(free, max(1, round(share * len(free))), replace=False)
            vector[places] *= np.exp(rng.normal(0, 0.7, len(places)))
        vector = vector / vector.sum()
        found, changed = judge(vector)
        if found < best:
            best, best_vector, best_table = found, vector, changed
    solution = Planner(best_table, "search", constraints).solve(budget_us)
    final = stitched_divergence(table, solution.choices, network, images, source, dense, repair)
    if final > best:  # finer buckets planned something else: take what was judged
        solution, final = Planner(best_table, "search", constraints, buckets=_BUCKETS).solve(budget_us), best
    return SearchResult(best_table, solution, final, first, len(known))


def stitched_divergence(
    table: CostTable,
    choices: tuple[int, ...],
    network: PerturbedNetwork,
    images: NDArray[np.float32],
    source: WeightSource,
    dense: NDArray[np.float64] | None = None,
    repair: Repair | None = None,
) -> float:
    """Return how far the network with all its layers pruned is from the dense one, in nats.

    Parameters
    ----------
    table, choices
        Index of each layer's candidate.
    network, images, source, repair
        As for `search_plan`.
    dense
        The dense network's answers, if they are known.
    """
    dense = _answers(network, images, {}) if dense is None else dense
    changed: dict[str, LayerParameters] = {}
    for layer, index in zip(table.layers, choices, strict=True):
        candidate = layer.candidates[index]
        if not candidate.is_dense and layer.name in network.layers:
            changed[layer.name] = source.parameters(layer.name, candidate.pattern, candidate.density)
    return kl_divergence(dense, _answers(network, images, changed if repair is None else repair(changed)))


def _answers(
    network: PerturbedNetwork, images: NDArray[np.float32], changed: Mapping[str, LayerParameters]
) -> NDArray[np.float64]:
    parts = [network.run(images[start : start + _BATCH], changed) for start in range(0, len(images), _BATCH)]
    return np.concatenate(parts)


def _with_sensitivity(table: CostTable, metric: str, sensitivity: NDArray[np.float64]) -> CostTable:
    """Return the table with a metric `search`: the errors of another one and these sensitivities."""
    total = float(sensitivity.sum()) or 1.0
    layers = []
    for layer, value in zip(table.layers, sensitivity, strict=True):
        candidates = tuple(
            dataclasses.replace(candidate, errors={**candidate.errors, "search": candidate.errors[metric]})
            for candidate in layer.candidates
        )
        share = float(value) / total
        layers.append(
            dataclasses.replace(layer, candidates=candidates, sensitivity={**layer.sensitivity, "search": share})
        )
    return dataclasses.replace(table, layers=tuple(layers))
