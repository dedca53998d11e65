"""Times from several sources put together: between densities that were measured, and out of two tables.

Needs NumPy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tvm_nm.costs import Candidate, CostTable, TimeSource
from tvm_nm.errors import PlanError
from tvm_nm.patterns import SparsityPattern

__all__ = ["add_density", "interpolate_times", "merge_tables"]


def interpolate_times(measured: Sequence[tuple[float, float]], densities: Sequence[float]) -> list[float]:
    """Return times at densities between and beside those that were measured.

    A sparse kernel's time is close to ``a + b * kept``; between two measured points the line through these, outside of
    them the line through the nearest two, but no less than a tenth of the nearest time.

    Parameters
    ----------
    measured
        Pairs (density, time) of different densities, at least one. A single one gives a time proportional to
        ``0.2 + 0.8 * density``, which is cautious for a fifth of the dense time being overhead.
    densities
        Where times are wanted.
    """
    points = sorted(measured)
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    found = []
    for density in densities:
        if len(x) == 1:
            value = y[0] * (0.2 + 0.8 * density) / (0.2 + 0.8 * x[0])
        else:
            right = int(np.clip(np.searchsorted(x, density), 1, len(x) - 1))
            slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
            value = y[right - 1] + slope * (density - x[right - 1])
        nearest = y[int(np.abs(x - density).argmin())]
        found.append(float(max(value, 0.1 * nearest)))
    return found


def add_density(table: CostTable, pattern: SparsityPattern, density: float) -> CostTable:
    """Return a table in which every layer that has a pattern has it at one more density, all of it interpolated."""
    layers = []
    for layer in table.layers:
        known = [candidate for candidate in layer.candidates if candidate.pattern == pattern]
        if known and layer.find(pattern, density) is None:

            def between(values: Sequence[float], known: Sequence[Candidate] = known) -> float:
                return interpolate_times([(c.density, v) for c, v in zip(known, values, strict=True)], [density])[0]

            added = Candidate(
                pattern,
                density,
                between([c.time_us for c in known]),
                TimeSource.INTERPOLATED,
                macs=round(between([c.macs for c in known])),
                bytes=round(between([c.bytes for c in known])),
                errors={metric: between([c.errors[metric] for c in known]) for metric in known[0].errors},
            )
            layer = dataclasses.replace(layer, candidates=(*layer.candidates, added))
        layers.append(layer)
    return dataclasses.replace(table, layers=tuple(layers))


def merge_tables(first: CostTable, second: CostTable) -> CostTable:
    """Put the candidates of two tables of the same model and target together.

    Of a candidate that both have, the better source wins and among equals the second table; errors that only one of
    them knows are kept.

    Raises
    ------
    PlanError
        If model, target, threads or template revision differ.
    """
    for what in ("structure", "target", "threads", "revision"):
        if getattr(first, what) != getattr(second, what):
            raise PlanError(
                f"two cost tables cannot be merged: {what} is {getattr(first, what)} in one and "
                f"{getattr(second, what)} in the other"
            )
    layers = []
    for layer in first.layers:
        other = second.layer(layer.name)
        if other is not None:
            merged = {candidate.key: candidate for candidate in layer.candidates}
            for candidate in other.candidates:
                known = merged.get(candidate.key)
                merged[candidate.key] = candidate if known is None else _better(known, candidate)
            sensitivity = {**layer.sensitivity, **other.sensitivity}
            layer = dataclasses.replace(layer, candidates=tuple(merged.values()), sensitivity=sensitivity)
        layers.append(layer)
    return dataclasses.replace(first, layers=tuple(layers), fixed_us=second.fixed_us)


def _better(known: Candidate, new: Candidate) -> Candidate:
    order = list(TimeSource)
    chosen = new if order.index(new.source) <= order.index(known.source) else known
    return dataclasses.replace(chosen, errors={**known.errors, **new.errors})
