"""What losses are estimated with: calibration images, the network run on them, and the weights that plans will get."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tvm_nm.calibration import CalibrationImages
from tvm_nm.channel_repair import ChannelRepair
from tvm_nm.costs import CostTable
from tvm_nm.frontend import ImportedModel
from tvm_nm.inventory import inventory, layer_weights
from tvm_nm.layer_pruning import Method
from tvm_nm.oneshot import channel_importance, images_per_run
from tvm_nm.onnx_network import LayerWeights, OnnxNetwork
from tvm_nm.patterns import SparsityPattern
from tvm_nm.perturbed import LayerParameters, MagnitudeWeights, PerturbedNetwork, WeightSource
from tvm_nm.reconstruction import Options
from tvm_nm.reconstruction_db import ReconstructionDatabase, build_database

__all__ = ["MOST_IMAGES", "Calibration", "ReconstructedWeights", "Repair", "calibrate"]

MOST_IMAGES = 256
"""Calibration images that estimates of losses look at, at most; reconstruction uses all of them."""


Repair: TypeAlias = Callable[[Mapping[str, LayerParameters]], Mapping[str, LayerParameters]]
"""From the parameters of all pruned layers, by name, to better ones."""
_REPAIR_IMAGES = 64


@dataclass(frozen=True, slots=True)
class Calibration:
    """What losses are estimated with.

    Attributes
    ----------
    images
        Float32 (N, C, H, W).
    network
        The dense network, whose layers can be given other weights.
    source
        The weights that pruned layers get.
    origin
        Method and images in words, to tell whether estimates can be used again.
    repair
        Sets right what pruned layers do to those behind them, in a whole network of them; None leaves them as they are.
    """

    images: NDArray[np.float32]
    network: PerturbedNetwork
    source: WeightSource
    origin: str
    repair: Repair | None = None


class ReconstructedWeights:
    """Layers that were pruned and refitted, out of a database.

    Parameters
    ----------
    database
        The database.
    others
        Where layers come from that it does not have: those that cannot be calibrated.
    """

    def __init__(self, database: ReconstructionDatabase, others: WeightSource) -> None:
        self._database, self._others = database, others

    def parameters(self, layer: str, pattern: SparsityPattern, density: float) -> LayerParameters:
        """Return the layer's weight and bias, as the dense network's inputs make them."""
        if (layer, pattern, density) not in self._database:
            return self._others.parameters(layer, pattern, density)
        found = self._database.weights(layer, pattern, density)
        return LayerParameters(found.weight, found.bias)


def calibrate(
    imported: ImportedModel,
    table: CostTable,
    data: CalibrationImages,
    method: Method,
    directory: str | os.PathLike[str],
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Prepare all that estimates of losses need.

    Parameters
    ----------
    imported
        The model.
    table
        Its layers and candidates.
    data
        Calibration images.
    method
        How weights are dropped in the end. All but MAGNITUDE prune every layer to every candidate first, which takes
        from half a minute to an hour.
    directory
        Where the pruned layers are kept, or are already. What is missing is added.
    progress
        Called with the name of each step when it starts, and how far it has come in brackets.

    Raises
    ------
    ArtifactError
        If the directory holds something else.
    CalibrationError
        If the model cannot be run on the images.
    """
    step = progress or (lambda _: None)
    pruned = [layer for layer in table.layers if layer.can_be_pruned]
    network = PerturbedNetwork(imported.onnx, [layer.name for layer in pruned])
    groups = {layer.name: layer.groups for layer in inventory(imported.module)}
    source: WeightSource = MagnitudeWeights(network, layer_weights(imported.module), groups)
    fingerprint, images = data.fingerprint, _spread_images(data)
    repair: Repair | None = None
    if method is not Method.MAGNITUDE:
        walked = OnnxNetwork(imported.onnx)
        options = Options(method=method)
        wanted = {
            layer.name: [(c.pattern, c.density) for c in layer.candidates if not c.is_dense]
            for layer in pruned
            if layer.name in walked.layers
            and int(np.prod(walked.layers[layer.name].weight_shape[1:])) <= options.max_columns
        }
        size = images_per_run(walked, data)
        database = build_database(
            *(directory, walked, wanted, lambda: data.batches(size), fingerprint, options),
            importance=channel_importance(walked, imported.module),
            progress=lambda name, number, count: step(f"pruning to all candidates ({number + 1} of {count}: {name})"),
        )
        source = ReconstructedWeights(database, source)
        repair = _repair(walked, wanted, images[:: -(-len(images) // _REPAIR_IMAGES)], size)
    return Calibration(images, network, source, f"{method.value}, images {fingerprint[:16]}", repair)


def _repair(network: OnnxNetwork, layers: Iterable[str], images: NDArray[np.float32], size: int) -> Repair:
    """Set channels' means and deviations right on some of the images."""
    channels = ChannelRepair(network, layers, iter([images[i : i + size] for i in range(0, len(images), size)]))
    known = set(layers)

    def repair(changed: Mapping[str, LayerParameters]) -> Mapping[str, LayerParameters]:
        weights = {
            name: LayerWeights(given.weight, given.bias)
            for name, given in changed.items()
            if name in known and given.bias is not None
        }
        return {**changed, **{name: LayerParameters(w.weight, w.bias) for name, w in channels(weights).items()}}

    return repair


def _spread_images(data: CalibrationImages) -> NDArray[np.float32]:
    """Return images at equal distances: they may be sorted by class."""
    count = min(MOST_IMAGES, data.count)
    picked = np.arange(count) * data.count // count
    parts: list[NDArray[np.float32]] = []
    start = 0
    for batch in data.batches(64):
        inside = picked[(picked >= start) & (picked < start + len(batch))] - start
        parts.append(batch[inside])
        start += len(batch)
    return np.concatenate(parts)
