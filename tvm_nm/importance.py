"""How much of a layer a candidate loses, judged by its weights alone.

``l1`` is the criterion of Wu, Hong, Liu and Wu (ICPADS 2023): the L1 norm that is kept, summed over the network.
``l2`` does the same with the squared L2 norm. What the layer computes is judged by `tvm_nm.output_error`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.costs import Candidate, CostTable
from tvm_nm.errors import PlanError
from tvm_nm.plan import near_names

__all__ = ["NORMS", "add_norms"]

NORMS = ("l1", "l2")
"""Importance metrics that need nothing but weights."""


def add_norms(table: CostTable, weights: Mapping[str, NDArray[Any]], groups: Mapping[str, int]) -> CostTable:
    """Add the errors and sensitivities of the metrics `l1` and `l2` to a table.

    A candidate's error is the share of the layer's norm that its mask drops, and a layer's sensitivity is its share of
    the norm of all layers that can be pruned: the sum of losses is the share of the network's norm that is dropped.

    Parameters
    ----------
    table
        Candidates of all layers.
    weights
        Weights of the layers that can be pruned, (OC, IC / groups, KH, KW), by name.
    groups
        Groups by layer name; 1 where a name is missing.

    Raises
    ------
    PlanError
        If a weight is missing or not finite, or a candidate's pattern does not go with it.
    """
    norms: dict[str, dict[str, float]] = {}
    errors: dict[str, list[dict[str, float]]] = {}
    for layer in table.layers:
        if not layer.can_be_pruned:
            continue
        if layer.name not in weights:
            raise PlanError(f"the table has layer {layer.name!r}, the model not; {near_names(layer.name, weights)}")
        magnitude = np.abs(weights[layer.name]).astype(np.float32)
        parts = {"l1": magnitude, "l2": np.square(magnitude)}
        totals = {metric: float(part.sum(dtype=np.float64)) for metric, part in parts.items()}
        norms[layer.name] = totals
        errors[layer.name] = [
            _dropped(candidate, magnitude, parts, totals, layer.name, groups.get(layer.name, 1))
            for candidate in layer.candidates
        ]
    sums = {metric: sum(norm[metric] for norm in norms.values()) for metric in NORMS}
    layers = []
    for layer in table.layers:
        if layer.name in norms:
            share = {m: norms[layer.name][m] / sums[m] if sums[m] else 0.0 for m in NORMS}
            found = errors[layer.name]
        else:
            share, found = dict.fromkeys(NORMS, 0.0), [dict.fromkeys(NORMS, 0.0)] * len(layer.candidates)
        candidates = tuple(
            dataclasses.replace(candidate, errors={**candidate.errors, **error})
            for candidate, error in zip(layer.candidates, found, strict=True)
        )
        layers.append(dataclasses.replace(layer, candidates=candidates, sensitivity={**layer.sensitivity, **share}))
    return dataclasses.replace(table, layers=tuple(layers))


def _dropped(
    candidate: Candidate,
    magnitude: NDArray[Any],
    parts: Mapping[str, NDArray[Any]],
    totals: Mapping[str, float],
    name: str,
    groups: int,
) -> dict[str, float]:
    if candidate.is_dense:
        return dict.fromkeys(parts, 0.0)
    try:
        dropped = ~candidate.pattern.mask(magnitude, candidate.density, groups)
    except ValueError as error:
        raise PlanError(f"layer {name!r} cannot be pruned to {candidate.label}: {error}") from error
    return {
        metric: float(part.sum(dtype=np.float64, where=dropped)) / totals[metric] if totals[metric] else 0.0
        for metric, part in parts.items()
    }
