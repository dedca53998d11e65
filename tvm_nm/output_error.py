"""How much of what a network computes a candidate loses, judged on calibration images without labels.

Two quantities go together. The *error* of a candidate is the squared change of its layer's outputs as a share of their
variance, with the other layers dense: it takes one layer to compute, and is known for every candidate. What an error
does to the network's answers is the Kullback-Leibler divergence from the dense answers with that layer alone pruned, as
in SPDY's loss-guided sensitivities (Frantar and Alistarh, ICML 2022): it takes a whole network, and is measured for a
few densities of each pattern. Between them the divergence is interpolated over the error, both as logarithms: over
several decades one is close to a power of the other, with an exponent of each layer's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tvm_nm.costs import CostTable, LayerCosts
from tvm_nm.perturbed import LayerParameters, PerturbedNetwork, WeightSource, kl_divergence
from tvm_nm.plan_calibration import Calibration

__all__ = ["OUTPUT", "add_output_errors", "divergence_curve", "probe_candidates"]

OUTPUT = "output"
"""Name of the importance metric."""

_PROBES = 4
"""Candidates of each pattern whose divergence is measured."""
_MAC_LIMIT = 6e12
"""Multiply-accumulates to spend on either of the two, about two minutes' worth; images are left out beyond."""
_LEAST_IMAGES = 8
_BATCH = 16
_LEAST = 1e-9
"""Errors and divergences below this are rounding."""


def add_output_errors(
    table: CostTable, calibration: Calibration, *, progress: Callable[[str], None] | None = None
) -> CostTable:
    """Add the errors and sensitivities of the metric `output` to a table.

    A layer's candidates have its divergence as their error, over that of the worst of them; this one's share among all
    layers is the layer's sensitivity. A layer whose weight the network cannot replace gets the share of its squared
    norm that is dropped, and the mean sensitivity.

    Parameters
    ----------
    table
        Candidates of all layers, with the metric `l2`.
    calibration
        Images, network, and what weights pruned layers get.
    progress
        Called with the name of each step when it starts.
    """
    step = progress or (lambda _: None)
    network, images = calibration.network, calibration.images
    layers = [layer for layer in table.layers if layer.can_be_pruned and layer.name in network.layers]
    macs = max(1, sum(layer.macs for layer in table.layers))
    candidates = max((len(layer.candidates) for layer in layers), default=1)
    count = _images(_MAC_LIMIT / macs / candidates)
    errors = _errors(layers, network, images[:count], calibration.source, step)
    probes = {layer.name: probe_candidates(layer) for layer in layers}
    runs = max(1, sum(len(found) for found in probes.values()))
    count = _images(_MAC_LIMIT / macs / runs)
    losses = _divergences(layers, network, images[:count], calibration.source, errors, probes, step)
    return dataclasses.replace(_with_losses(table, losses), calibrated=calibration.origin)


def _with_losses(table: CostTable, losses: Mapping[str, Sequence[float]]) -> CostTable:
    worst = {name: max(found) for name, found in losses.items()}
    mean = float(np.mean(list(worst.values()))) if worst else 1.0
    total = sum(worst.get(layer.name, mean) for layer in table.layers if layer.can_be_pruned) or 1.0
    result = []
    for layer in table.layers:
        if layer.name in losses:
            found = [loss / (worst[layer.name] or 1.0) for loss in losses[layer.name]]
        else:
            found = [candidate.errors.get("l2", 0.0) for candidate in layer.candidates]
        share = worst.get(layer.name, mean) / total if layer.can_be_pruned else 0.0
        candidates = tuple(
            dataclasses.replace(candidate, errors={**candidate.errors, OUTPUT: error})
            for candidate, error in zip(layer.candidates, found, strict=True)
        )
        sensitivity = {**layer.sensitivity, OUTPUT: share}
        result.append(dataclasses.replace(layer, candidates=candidates, sensitivity=sensitivity))
    return dataclasses.replace(table, layers=tuple(result))


def probe_candidates(layer: LayerCosts) -> tuple[int, ...]:
    """Return the indices of the candidates to measure a layer with: of each pattern the ends and some in between."""
    patterns: dict[str, list[int]] = {}
    for index, candidate in enumerate(layer.candidates):
        if not candidate.is_dense:
            patterns.setdefault(str(candidate.pattern), []).append(index)
    found: list[int] = []
    for indices in patterns.values():
        ordered = sorted(indices, key=lambda i: -layer.candidates[i].density)
        places = np.linspace(0, len(ordered) - 1, min(_PROBES, len(ordered)))
        found += [ordered[round(place)] for place in places]
    return tuple(found)


def divergence_curve(points: Sequence[tuple[float, float]], errors: Sequence[float]) -> list[float]:
    """Return divergences at some errors, between and beside those that were measured.

    Parameters
    ----------
    points
        Pairs (error, divergence), at least one. A divergence that is less than that of a smaller error is noise and is
        raised to it.
    errors
        Where divergences are wanted. Below the least error that was measured they are proportional to it, beyond the
        largest to its power of 1.5, which is about what layers do there.
    """
    ordered = sorted(points)
    x = np.log(np.maximum([error for error, _ in ordered], _LEAST))
    y = np.log(np.maximum.accumulate(np.maximum([divergence for _, divergence in ordered], _LEAST)))
    at = np.log(np.maximum(errors, _LEAST))
    inside = np.interp(at, x, y)
    outside = np.where(at < x[0], at - x[0], 0.0) + 1.5 * np.where(at > x[-1], at - x[-1], 0.0)
    return [float(value) for value in np.where(np.asarray(errors) > 0, np.exp(inside + outside), 0.0)]


def _images(affordable: float) -> int:
    return int(max(affordable, _LEAST_IMAGES))


def _errors(
    layers: Sequence[LayerCosts],
    network: PerturbedNetwork,
    images: NDArray[np.float32],
    source: WeightSource,
    step: Callable[[str], None],
) -> dict[str, list[float]]:
    variance = {layer.name: 0.0 for layer in layers}
    lost = {layer.name: np.zeros(len(layer.candidates)) for layer in layers}
    batches = range(0, len(images), _BATCH)
    for number, start in enumerate(batches):
        step(f"calibrating outputs, batch {number + 1} of {len(batches)}")
        inputs = network.layer_inputs(images[start : start + _BATCH])
        for layer in layers:
            run = network.layer_runner(layer.name)
            dense = network.parameters(layer.name)
            data = inputs.pop(layer.name)
            variance[layer.name] += _variance(run(data, dense.weight), layer.kind)
            for index, candidate in enumerate(layer.candidates):
                if not candidate.is_dense:
                    found = source.parameters(layer.name, candidate.pattern, candidate.density)
                    change = run(data, found.weight - dense.weight)
                    lost[layer.name][index] += _square(_shifted(change, found, dense, layer.kind))
    return {
        name: [float(value) / variance[name] if variance[name] else 0.0 for value in values]
        for name, values in lost.items()
    }


def _divergences(
    layers: Sequence[LayerCosts],
    network: PerturbedNetwork,
    images: NDArray[np.float32],
    source: WeightSource,
    errors: Mapping[str, Sequence[float]],
    probes: Mapping[str, Sequence[int]],
    step: Callable[[str], None],
) -> dict[str, list[float]]:
    batches = [images[start : start + 4 * _BATCH] for start in range(0, len(images), 4 * _BATCH)]
    dense = np.concatenate([network.run(batch) for batch in batches])
    losses = {}
    for number, layer in enumerate(layers):
        step(f"perturbing layers ({number + 1} of {len(layers)}: {layer.name})")
        points: dict[str, list[tuple[float, float]]] = {}
        for index in probes[layer.name]:
            candidate = layer.candidates[index]
            changed = {layer.name: source.parameters(layer.name, candidate.pattern, candidate.density)}
            answers = np.concatenate([network.run(batch, changed) for batch in batches])
            points.setdefault(str(candidate.pattern), []).append(
                (errors[layer.name][index], kl_divergence(dense, answers))
            )
        losses[layer.name] = [
            0.0 if candidate.is_dense else divergence_curve(points[str(candidate.pattern)], [error])[0]
            for candidate, error in zip(layer.candidates, errors[layer.name], strict=True)
        ]
    return losses


def _shifted(
    change: NDArray[np.float32], found: LayerParameters, dense: LayerParameters, kind: str
) -> NDArray[np.float32]:
    """Add what the bias changes to what the weights change."""
    if found.bias is None or dense.bias is None:
        return change
    axis = _channel_axis(change, kind)
    return change + (found.bias - dense.bias).reshape([-1 if i == axis else 1 for i in range(change.ndim)])


def _variance(output: NDArray[np.float32], kind: str) -> float:
    """Sum of squared deviations from each channel's mean; of a batch, which is close to that of all."""
    axis = _channel_axis(output, kind)
    flat = np.moveaxis(output, axis, 0).reshape(output.shape[axis], -1)
    return _square(flat - flat.mean(axis=1, keepdims=True))


def _channel_axis(output: NDArray[np.float32], kind: str) -> int:
    return output.ndim - 1 if kind == "fc" else 1


def _square(values: NDArray[np.float32]) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))
