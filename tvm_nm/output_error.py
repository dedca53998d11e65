"""How much of what a network computes a candidate loses, judged on calibration images without labels.

A candidate's error is the squared change of its layer's output over what is left of the output's energy: e / (1 - e)
for a change of the share e, with the other layers dense. It grows without limit as a layer loses everything, which a
network does not survive however small the layer; for a plain share the planner would give whole layers away.

What such an error does to the network's answers is found by pruning one layer at a time and looking at the
Kullback-Leibler divergence from the dense answers, as SPDY's loss-guided sensitivities do (Frantar and Alistarh, ICML
2022): the slope of the divergence over the error is the layer's sensitivity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.costs import Candidate, CostTable, LayerCosts
from tvm_nm.perturbed import MagnitudeWeights, PerturbedNetwork, WeightSource, kl_divergence

__all__ = ["MOST_IMAGES", "OUTPUT", "add_output_errors", "probe_candidates"]

OUTPUT = "output"
"""Name of the importance metric."""

_PROBE_ERRORS = (0.1, 0.4)
"""Layers are perturbed by candidates of about these errors: around where plans take them."""
_MAC_LIMIT = 3e12
"""Multiply-accumulates to spend on either of the two, about a minute's worth; images are left out beyond."""
_LEAST_IMAGES = 8
MOST_IMAGES = 256
"""Calibration images that are looked at, at most."""
_BATCH = 16


def add_output_errors(
    table: CostTable,
    network: PerturbedNetwork,
    images: NDArray[np.float32],
    weights: Mapping[str, NDArray[Any]],
    groups: Mapping[str, int],
    *,
    source: WeightSource | None = None,
    progress: Callable[[str], None] | None = None,
) -> CostTable:
    """Add the errors and sensitivities of the metric `output` to a table.

    A layer whose weight the network cannot replace gets the share of its squared norm that is dropped, and the mean
    sensitivity.

    Parameters
    ----------
    table
        Candidates of all layers, with the metric `l2`.
    network
        The dense network.
    images
        Calibration images as the network wants them, float32 (N, C, H, W).
    weights, groups
        Weights of the canonical module and groups, by layer name.
    source
        Parameters of pruned layers; default: magnitude pruning.
    progress
        Called with the name of each step when it starts.
    """
    step = progress or (lambda _: None)
    source = source or MagnitudeWeights(network, weights, groups)
    layers = [layer for layer in table.layers if layer.can_be_pruned and layer.name in network.layers]
    macs = max(1, sum(layer.macs for layer in table.layers))
    candidates = max((len(layer.candidates) for layer in layers), default=1)
    errors = _errors(layers, network, images[: _images(_MAC_LIMIT / macs / candidates)], source, step)
    probes = {layer.name: probe_candidates(layer, errors[layer.name]) for layer in layers}
    count = sum(len(found) for found in probes.values())
    slopes = _sensitivities(
        layers, network, images[: _images(_MAC_LIMIT / macs / max(1, count))], source, errors, probes, step
    )
    mean = float(np.mean(list(slopes.values()))) if slopes else 1.0
    pruned = [layer.name for layer in table.layers if layer.can_be_pruned]
    total = sum(slopes.get(name, mean) for name in pruned) or 1.0
    result = []
    for layer in table.layers:
        if layer.name in errors:
            found = errors[layer.name]
        else:
            found = [candidate.errors.get("l2", 0.0) for candidate in layer.candidates]
        share = slopes.get(layer.name, mean) / total if layer.can_be_pruned else 0.0
        result.append(
            dataclasses.replace(
                layer,
                candidates=tuple(
                    dataclasses.replace(candidate, errors={**candidate.errors, OUTPUT: error})
                    for candidate, error in zip(layer.candidates, found, strict=True)
                ),
                sensitivity={**layer.sensitivity, OUTPUT: share},
            )
        )
    return dataclasses.replace(table, layers=tuple(result))


def probe_candidates(layer: LayerCosts, errors: Sequence[float]) -> list[int]:
    """Return the indices of the candidates to perturb a layer with: those nearest to a small and a larger error."""
    sparse = [i for i, candidate in enumerate(layer.candidates) if not candidate.is_dense and errors[i] > 0]
    nearest = [min(sparse, key=lambda i: abs(errors[i] - wanted)) for wanted in _PROBE_ERRORS] if sparse else []
    return list(dict.fromkeys(nearest))


def _images(affordable: float) -> int:
    return int(np.clip(affordable, _LEAST_IMAGES, MOST_IMAGES))


def _errors(
    layers: Sequence[LayerCosts],
    network: PerturbedNetwork,
    images: NDArray[np.float32],
    source: WeightSource,
    step: Callable[[str], None],
) -> dict[str, list[float]]:
    energy = {layer.name: 0.0 for layer in layers}
    lost = {layer.name: np.zeros(len(layer.candidates)) for layer in layers}
    batches = range(0, len(images), _BATCH)
    for number, start in enumerate(batches):
        step(f"calibrating outputs, batch {number + 1} of {len(batches)}")
        inputs = network.layer_inputs(images[start : start + _BATCH])
        for layer in layers:
            run = network.layer_runner(layer.name)
            dense = network.weight(layer.name)
            data = inputs.pop(layer.name)
            energy[layer.name] += _energy(run(data, dense))
            for index, candidate in enumerate(layer.candidates):
                if not candidate.is_dense:
                    change = dense - _parameters(source, layer, candidate)
                    lost[layer.name][index] += _energy(run(data, change))
    return {
        name: [_over_rest(float(value) / energy[name]) if energy[name] else 0.0 for value in values]
        for name, values in lost.items()
    }


def _sensitivities(
    layers: Sequence[LayerCosts],
    network: PerturbedNetwork,
    images: NDArray[np.float32],
    source: WeightSource,
    errors: Mapping[str, Sequence[float]],
    probes: Mapping[str, Sequence[int]],
    step: Callable[[str], None],
) -> dict[str, float]:
    batches = [images[start : start + 4 * _BATCH] for start in range(0, len(images), 4 * _BATCH)]
    dense = np.concatenate([network.run(batch) for batch in batches])
    slopes = {}
    for number, layer in enumerate(layers):
        if number % 8 == 0:
            step(f"perturbing layers, {number + 1} of {len(layers)}")
        points = []
        for index in probes[layer.name]:
            candidate = layer.candidates[index]
            changed = {layer.name: source.parameters(layer.name, candidate.pattern, candidate.density)}
            answers = np.concatenate([network.run(batch, changed) for batch in batches])
            points.append((errors[layer.name][index], kl_divergence(dense, answers)))
        # The line through the origin that is nearest to the points.
        square = sum(error * error for error, _ in points)
        slopes[layer.name] = sum(error * divergence for error, divergence in points) / square if square else 0.0
    return slopes


def _over_rest(share: float) -> float:
    """Return a changed share of the energy over the rest; from 99% on it goes on as a line."""
    return share / max(1 - share, 0.01)


def _parameters(source: WeightSource, layer: LayerCosts, candidate: Candidate) -> NDArray[np.float32]:
    return source.parameters(layer.name, candidate.pattern, candidate.density).weight


def _energy(output: NDArray[np.float32]) -> float:
    flat = output.reshape(-1)
    return float(np.dot(flat, flat))
