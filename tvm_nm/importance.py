"""How much of a layer a candidate loses, judged by its weights alone.

``l1`` is after the criterion of Wu, Hong, Liu and Wu (ICPADS 2023): the L1 norm that is kept, here as a share of each
layer's own. Summed up as it is, a layer's norm says more of how large its inputs happen to be than of what it is
worth, and plans sacrifice whole layers for it. ``l2`` does the same with the squared L2 norm. What a layer computes is
judged by `tvm_nm.output_error`.
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

    A candidate's error is the share of the layer's norm that its mask drops, and all layers that can be pruned are as
    sensitive: the sum of losses is the mean share that is dropped.

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
    errors: dict[str, list[dict[str, float]]] = {}
    for layer in table.layers:
        if not layer.can_be_pruned:
            continue
        if layer.name not in weights:
            raise PlanError(f"the table has layer {layer.name!r}, the model not; {near_names(layer.name, weights)}")
        magnitude = np.abs(weights[layer.name]).astype(np.float32)
        parts = {"l1": magnitude, "l2": np.square(magnitude)}
        totals = {metric: float(part.sum(dtype=np.float64)) for metric, part in parts.items()}
        errors[layer.name] = [
            _dropped(candidate, magnitude, parts, totals, layer.name, groups.get(layer.name, 1))
            for candidate in layer.candidates
        ]
    layers = []
    for layer in table.layers:
        share = dict.fromkeys(NORMS, 1 / len(errors) if layer.name in errors else 0.0)
        found = errors.get(layer.name) or [dict.fromkeys(NORMS, 0.0)] * len(layer.candidates)
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
