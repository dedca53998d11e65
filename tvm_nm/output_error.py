"""How much of what a network computes a candidate loses, judged on calibration images without labels.

Two quantities go together. The *error* e of a candidate is the squared change of its layer's outputs as a share of
their variance, with the other layers dense: it takes one layer to compute, and is known for every candidate. What an
error does to the network's answers is the Kullback-Leibler divergence from the dense answers with that layer alone
pruned, as in the loss-guided sensitivities of SPDY (Frantar and Alistarh, ICML 2022): it takes a whole network, and is
measured for a few candidates of each pattern. Their ratio, which hardly depends on e, is the layer's *sensitivity* s.

The loss is ``s * e ** 1.5``. With one layer pruned the divergence is closer to s * e; but small errors in many layers
are made up for when these are pruned one behind the other, and large ones are not. Measured on ResNet-32 pruned in
sequence, plans with the exponent 1.5 are nearer to the dense network than those with 1, with e / (1 - e), or with the
interpolated divergences themselves (docs/planner.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tvm_nm.calibration import batch_size
from tvm_nm.costs import CostTable, LayerCosts
from tvm_nm.perturbed import LayerParameters, PerturbedNetwork, WeightSource, kl_divergence
from tvm_nm.plan_calibration import Calibration

__all__ = ["OUTPUT", "add_output_errors", "probe_candidates", "sensitivity_of"]

OUTPUT = "output"
"""Name of the importance metric."""

_EXPONENT = 1.5
_PROBE_ERRORS = (0.03, 0.1, 0.3)
"""Layers are perturbed by the candidates of each pattern that are nearest to these errors: where plans take them."""
_MAC_LIMIT = 6e12
"""Multiply-accumulates to spend on either of the two, about two minutes' worth; images are left out beyond."""
_LEAST_IMAGES = 8
_LEAST = 1e-9
"""Errors and divergences below this are rounding."""


def add_output_errors(
    table: CostTable, calibration: Calibration, *, progress: Callable[[str], None] | None = None
) -> CostTable:
    """Add the errors and sensitivities of the metric `output` to a table.

    A layer whose weight the network cannot replace gets the share of its squared norm that is dropped, and the mean
    sensitivity.

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
    most = max((len(layer.candidates) for layer in layers), default=1)
    count = _images(_MAC_LIMIT / macs / most)
    errors = _errors(layers, network, images[:count], calibration.source, step)
    probes = {layer.name: probe_candidates(layer, errors[layer.name]) for layer in layers}
    runs = max(1, sum(len(found) for found in probes.values()))
    count = _images(_MAC_LIMIT / macs / runs)
    found = _sensitivities(layers, network, images[:count], calibration.source, errors, probes, step)
    mean = float(np.mean(list(found.values()))) if found else 1.0
    total = sum(found.get(layer.name, mean) for layer in table.layers if layer.can_be_pruned) or 1.0
    result = []
    for layer in table.layers:
        shares = errors.get(layer.name) or [candidate.errors.get("l2", 0.0) for candidate in layer.candidates]
        candidates = tuple(
            dataclasses.replace(candidate, errors={**candidate.errors, OUTPUT: share**_EXPONENT})
            for candidate, share in zip(layer.candidates, shares, strict=True)
        )
        part = found.get(layer.name, mean) / total if layer.can_be_pruned else 0.0
        sensitivity = {**layer.sensitivity, OUTPUT: part}
        result.append(dataclasses.replace(layer, candidates=candidates, sensitivity=sensitivity))
    return dataclasses.replace(table, layers=tuple(result), calibrated=calibration.origin)


def probe_candidates(layer: LayerCosts, errors: Sequence[float]) -> tuple[int, ...]:
    """Return the indices of the candidates to perturb a layer with, by the errors of all its candidates."""
    patterns: dict[str, list[int]] = {}
    for index, candidate in enumerate(layer.candidates):
        if not candidate.is_dense and errors[index] > _LEAST:
            patterns.setdefault(str(candidate.pattern), []).append(index)
    nearest = [
        min(indices, key=lambda i: abs(np.log(errors[i] / wanted)))
        for indices in patterns.values()
        for wanted in _PROBE_ERRORS
    ]
    return tuple(dict.fromkeys(nearest))


def sensitivity_of(points: Sequence[tuple[float, float]]) -> float:
    """Return the geometric mean of divergence over error, of pairs (error, divergence); 0 for none."""
    if not points:
        return 0.0
    return float(np.exp(np.mean([np.log(max(divergence, _LEAST) / error) for error, divergence in points])))


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
    size = batch_size(images.shape[1:])
    batches = range(0, len(images), size)
    for number, start in enumerate(batches):
        step(f"calibrating outputs, batch {number + 1} of {len(batches)}")
        inputs = network.layer_inputs(images[start : start + size])
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


def _sensitivities(
    layers: Sequence[LayerCosts],
    network: PerturbedNetwork,
    images: NDArray[np.float32],
    source: WeightSource,
    errors: Mapping[str, Sequence[float]],
    probes: Mapping[str, Sequence[int]],
    step: Callable[[str], None],
) -> dict[str, float]:
    size = batch_size(images.shape[1:])
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    dense = np.concatenate([network.run(batch) for batch in batches])
    found = {}
    for number, layer in enumerate(layers):
        step(f"perturbing layers ({number + 1} of {len(layers)}: {layer.name})")
        points = []
        for index in probes[layer.name]:
            candidate = layer.candidates[index]
            changed = {layer.name: source.parameters(layer.name, candidate.pattern, candidate.density)}
            answers = np.concatenate([network.run(batch, changed) for batch in batches])
            points.append((errors[layer.name][index], kl_divergence(dense, answers)))
        found[layer.name] = sensitivity_of(points)
    return found


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
