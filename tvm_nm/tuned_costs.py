"""Times of a tuning database in a cost table, where the network itself was not measured.

A tuned time is of one layer alone, on another day. What it says of a layer's time in the network is how densities
compare, so it is scaled by what the network's own times of that layer are to the tuned times of the same candidates.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

import tvm

from tvm_nm.cost_merge import interpolate_times
from tvm_nm.costs import Candidate, CostTable, LayerCosts, TimeSource
from tvm_nm.patterns import SparsityPattern
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.tuned import TunedKernel
from tvm_nm.schedules.variants import variant_text
from tvm_nm.tuning.tasks import conv_workloads, layer_task, with_winograd
from tvm_nm.tuning.trials import TrialTable

__all__ = ["add_tuned_times"]


def add_tuned_times(table: CostTable, module: tvm.IRModule, trials: TrialTable) -> CostTable:
    """Replace interpolated times by tuned ones.

    Candidates that were measured in the network stay as they are. Those that remain interpolated lie between measured
    and tuned ones then. A database that knows no candidate which was measured in the network, too, is of no use, since
    nothing says how its times compare.

    Parameters
    ----------
    table
        The cost table.
    module
        The canonical module that it is of.
    trials
        Times for the same target; only those of exactly the same layer, epilogue, density and number of threads count.
    """
    works = conv_workloads(module)
    found: dict[str, dict[tuple[str, float], TunedKernel]] = {}
    for layer in table.layers:
        known = {}
        for candidate in layer.candidates if layer.name in works else ():
            if not candidate.is_dense:
                work = works[layer.name]
                task = layer_task(work, table.threads, candidate.pattern, candidate.density)
                tasks = with_winograd([task], machine_of(trials.target), pool=work.epilogue.pool)
                measured = [best for best in map(trials.measured, tasks) if best is not None]
                if measured:
                    known[candidate.key] = min(measured, key=lambda best: best.latency_us)
        found[layer.name] = known
    ratios = {layer.name: _ratios(layer, found[layer.name]) for layer in table.layers}
    every = [ratio for part in ratios.values() for ratio in part]
    if not every:
        return table
    usual = statistics.median(every)
    layers = [
        _with_tuned(layer, found[layer.name], statistics.median(ratios[layer.name] or [usual]))
        for layer in table.layers
    ]
    return dataclasses.replace(table, layers=tuple(layers))


def _ratios(layer: LayerCosts, known: Mapping[tuple[str, float], TunedKernel]) -> list[float]:
    return [
        candidate.time_us / known[candidate.key].latency_us
        for candidate in layer.candidates
        if candidate.source is TimeSource.MEASURED and candidate.key in known
    ]


def _with_tuned(layer: LayerCosts, known: Mapping[tuple[str, float], TunedKernel], ratio: float) -> LayerCosts:
    if not known:
        return layer
    first = []
    for candidate in layer.candidates:
        best = known.get(candidate.key)
        if best is not None and candidate.source is not TimeSource.MEASURED:
            candidate = dataclasses.replace(
                candidate,
                time_us=best.latency_us * ratio,
                source=TimeSource.TUNED,
                kernel=variant_text(best.kernel),
            )
        first.append(candidate)
    points: dict[SparsityPattern, list[tuple[float, float]]] = {}
    for candidate in first:
        if candidate.source is not TimeSource.INTERPOLATED:
            points.setdefault(candidate.pattern, []).append((candidate.density, candidate.time_us))

    def between(candidate: Candidate) -> Candidate:
        if candidate.source is not TimeSource.INTERPOLATED or candidate.pattern not in points:
            return candidate
        (time_us,) = interpolate_times(points[candidate.pattern], [candidate.density])
        return dataclasses.replace(candidate, time_us=time_us)

    return dataclasses.replace(layer, candidates=tuple(between(candidate) for candidate in first))
