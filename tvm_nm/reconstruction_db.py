"""A database of pruned layers: each layer in each pattern and density, to put networks together from.

As in Frantar, Singh and Alistarh, "Optimal Brain Compression" (NeurIPS 2022), each layer is pruned on its own, on the
inputs that it gets in the dense network. Any plan can then be stitched together and scored without pruning again; at
the end the statistics of each channel are set right behind the layers that were pruned before it (`stitch`). Weights
are those of the ONNX model's nodes, before batch norms are folded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tvm_nm.channel_repair import ChannelRepair
from tvm_nm.errors import ArtifactError
from tvm_nm.json_file import read_json, write_bytes, write_text
from tvm_nm.layer_pruning import Fit, fit_layer
from tvm_nm.observation import Walk, observe_layer
from tvm_nm.onnx_network import LayerWeights, OnnxNetwork
from tvm_nm.patterns import Dense, SparsityPattern
from tvm_nm.plan import Plan
from tvm_nm.reconstruction import Options
from tvm_nm.tensor_store import TensorStore

__all__ = ["ReconstructionDatabase", "build_database", "network_fingerprint", "stitch"]

_INDEX = "index.json"
_FORMAT = "tvm_nm reconstruction database"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Key:
    layer: str
    pattern: str
    density: float

    @property
    def file(self) -> str:
        text = f"{self.layer}\n{self.pattern}\n{self.density:.6f}"
        return hashlib.sha256(text.encode()).hexdigest()[:24] + ".npz"


class ReconstructionDatabase:
    """Pruned layers in a folder, one compressed file for each layer, pattern and density.

    Files are written whole or not at all, so that a build that was interrupted goes on where it stopped.

    Parameters
    ----------
    directory
        The folder; it need not exist yet.
    key
        What all entries depend on (model, images, options), as `build_database` gives it. None opens a database as it
        is.

    Raises
    ------
    ArtifactError
        If the folder holds a database with another key, or none although no key is given.
    """

    def __init__(self, directory: str | os.PathLike[str], key: Mapping[str, str] | None = None) -> None:
        self.directory = Path(directory)
        index = self.directory / _INDEX
        if index.exists():
            found = read_json(index.read_text("utf-8"), str(index), _FORMAT, _VERSION, "reconstruction database")
            self.key: dict[str, str] = dict(found.get("key", {}))
            if key is not None and self.key != dict(key):
                other = sorted(name for name in {*key, *self.key} if key.get(name) != self.key.get(name))
                raise ArtifactError(
                    f"{self.directory} was made with another {', '.join(other)}; choose another folder or delete it"
                )
        elif key is None:
            raise ArtifactError(f"{self.directory} is no reconstruction database")
        else:
            self.key = dict(key)
            self.directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"format": _FORMAT, "version": _VERSION, "key": self.key}, indent=2)
            write_text(index, text + "\n", "reconstruction database")

    def __contains__(self, entry: tuple[str, SparsityPattern, float]) -> bool:
        return self._path(*entry).exists()

    def weights(self, layer: str, pattern: SparsityPattern, density: float) -> LayerWeights:
        """Return a pruned layer's weight and bias, for the inputs of the dense network.

        Raises
        ------
        ArtifactError
            If it is not in the database or its file is damaged.
        """
        data = self._read(layer, pattern, density)
        shape = tuple(int(size) for size in data["shape"])
        mask = np.unpackbits(data["mask"].astype(np.uint8), count=int(np.prod(shape))).astype(np.bool_)
        weight = np.zeros(mask.shape, np.float32)
        weight[mask] = data["values"]
        return LayerWeights(weight.reshape(shape), data["bias"])

    def error(self, layer: str, pattern: SparsityPattern, density: float) -> float:
        """Return the squared error of a pruned layer's outputs, as a share of their variance.

        Raises
        ------
        ArtifactError
            As `weights`.
        """
        return float(self._read(layer, pattern, density)["error"])

    def add(self, layer: str, pattern: SparsityPattern, density: float, fit: Fit) -> None:
        """Write an entry; it replaces an older one."""
        memory = io.BytesIO()
        np.savez_compressed(
            memory,
            shape=np.array(fit.mask.shape),
            mask=np.packbits(fit.mask),
            values=fit.weights.weight[fit.mask],
            bias=fit.weights.bias,
            error=np.array(fit.error),
        )
        write_bytes(self._path(layer, pattern, density), memory.getvalue(), "entry")

    def _path(self, layer: str, pattern: SparsityPattern, density: float) -> Path:
        return self.directory / _Key(layer, str(pattern), density).file

    def _read(self, layer: str, pattern: SparsityPattern, density: float) -> dict[str, NDArray[np.float32]]:
        path = self._path(layer, pattern, density)
        if not path.exists():
            raise ArtifactError(f"{self.directory} has no {layer!r} in {pattern} at {density:g}; build it first")
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path} is damaged ({error}); delete it and build it again") from error


def network_fingerprint(network: OnnxNetwork) -> str:
    """SHA-256 of a network's nodes and weights."""
    return hashlib.sha256(network.model.SerializeToString(deterministic=True)).hexdigest()


def build_database(
    directory: str | os.PathLike[str],
    network: OnnxNetwork,
    wanted: Mapping[str, Iterable[tuple[SparsityPattern, float]]],
    batches: Callable[[], Iterator[NDArray[np.float32]]],
    images: str,
    options: Options | None = None,
    *,
    importance: Mapping[str, NDArray[np.float64]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ReconstructionDatabase:
    """Prune layers to patterns, each on the inputs that it gets in the dense network.

    What the folder has already is kept; a layer of which nothing is missing is not even measured.

    Parameters
    ----------
    directory
        Where the database is or goes.
    network
        The dense network.
    wanted
        By layer name, patterns and densities.
    batches
        Gives the calibration images, float32 (N, C, H, W).
    images
        Their fingerprint.
    options
        How.
    importance
        See `tvm_nm.reconstruction.reconstruct`.
    progress
        Called with (layer name, number of the layer, number of layers).

    Raises
    ------
    ArtifactError
        If the folder holds a database of another model, of other images or options, or cannot be written.
    """
    options = options or Options()
    key = {
        "model": network_fingerprint(network),
        "images": images,
        "options": f"{options.method.value}, damping {options.damping:g}, {options.samples} samples, "
        f"images count {options.image_weight:g} times",
    }
    database = ReconstructionDatabase(directory, key)
    missing = {name: [entry for entry in entries if (name, *entry) not in database] for name, entries in wanted.items()}
    layers = sorted((network.layers[name] for name, entries in missing.items() if entries), key=lambda x: x.position)
    if not layers:
        return database
    walk = Walk(network, TensorStore(options.memory), options.threads)
    walk.start(batches())
    for number, layer in enumerate(layers):
        if progress is not None:
            progress(layer.name, number, len(layers))
        walk.advance(layer.position)
        seen = observe_layer(
            layer, walk, walk, options.samples, layer.position, options.threads, image_weight=options.image_weight
        )
        weight = network.weights(layer.name).weight
        for pattern, density in missing[layer.name]:
            scale = (importance or {}).get(layer.name)
            fit = fit_layer(
                seen.moments, weight, pattern, density, options.method, damping=options.damping, importance=scale
            )
            database.add(layer.name, pattern, density, fit)
    return database


def stitch(
    database: ReconstructionDatabase,
    network: OnnxNetwork,
    plan: Plan,
    batches: Iterator[NDArray[np.float32]] | None = None,
    options: Options | None = None,
) -> dict[str, LayerWeights]:
    """Put a plan's weights together.

    Parameters
    ----------
    database
        Has an entry for each layer that the plan prunes.
    network
        The dense network.
    plan
        What to prune.
    batches
        Calibration images to set each channel's mean and deviation right with, behind the pruned layers before it; None
        leaves the weights as they are in the database, which takes no time and is good enough to compare plans.
    options
        Memory and threads.

    Returns
    -------
    Weights by layer name.

    Raises
    ------
    ArtifactError
        If an entry is missing.
    """
    found = {
        choice.name: database.weights(choice.name, choice.pattern, choice.density)
        for choice in plan.layers
        if not isinstance(choice.pattern, Dense)
    }
    if batches is None:
        return found
    return ChannelRepair(network, found, batches, options)(found)
