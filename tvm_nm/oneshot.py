"""One-shot pruning of a model on calibration data: from a plan to an ONNX model with other weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import tvm
from numpy.typing import NDArray

from tvm_nm.calibration import CalibrationImages, batch_size
from tvm_nm.errors import CalibrationError, PlanError, UnsupportedModelError
from tvm_nm.inventory import layer_calls
from tvm_nm.masks import BoolArray, PackedMasks
from tvm_nm.memory import release_memory
from tvm_nm.onnx_network import LayerWeights, OnnxNetwork
from tvm_nm.onnx_segment import FloatArray
from tvm_nm.onnx_weights import replace_weights
from tvm_nm.patterns import Dense
from tvm_nm.plan import Plan, near_names
from tvm_nm.prune_onnx import prune_onnx
from tvm_nm.reconstruction import LayerFit, Options, reconstruct
from tvm_nm.reconstruction_db import build_database, stitch
from tvm_nm.saliency import calibrated_saliency

__all__ = ["OneShot", "channel_importance", "images_per_run", "plan_saliency", "prune_calibrated"]


@dataclass(frozen=True, slots=True)
class OneShot:
    """What `prune_calibrated` did.

    Attributes
    ----------
    masks
        By the names of the pruned layers, True where a weight is kept.
    layers
        What became of each layer that was refitted, in order; empty where layers come out of a database.
    uncalibrated
        Names of layers that could only be pruned by magnitude.
    """

    masks: dict[str, BoolArray]
    layers: tuple[LayerFit, ...]
    uncalibrated: tuple[str, ...]


def prune_calibrated(
    model: onnx.ModelProto,
    modules: list[tvm.IRModule],
    plan: Plan,
    images: CalibrationImages,
    options: Options | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    database: str | os.PathLike[str] | None = None,
) -> OneShot:
    """Prune a model to a plan on calibration data; `model` is changed in place.

    Layers whose inputs are too many for a Hessian, or that are written in a form that cannot be refitted (a scaled
    Gemm), are pruned by magnitude.

    Parameters
    ----------
    model
        The ONNX model with its weights loaded.
    modules
        A list of the same model as a canonical module, which is taken from it, so that its memory can be given back: it
        tells how batch norms scale each output channel.
    plan
        What to prune.
    images
        Calibration data.
    options
        How; the method is not to be MAGNITUDE.
    progress
        As for `tvm_nm.reconstruction.reconstruct`.
    database
        Directory of a database of reconstructed layers to take them from, each pruned on its own, instead of pruning
        one behind the other; what it lacks is added. See `tvm_nm.reconstruction_db.stitch`.

    Raises
    ------
    ArtifactError
        If the database is of another model, of other images or options.
    CalibrationError
        If the model cannot be run on the images.
    PlanError
        If the plan names a layer that the model lacks.
    UnsupportedModelError
        If it has more than one input.
    """
    options = options or Options()
    network = OnnxNetwork(model)
    possible = _calibrated_layers(network, options)
    choices = [choice for choice in plan.layers if not isinstance(choice.pattern, Dense)]
    calibrated = Plan(tuple(choice for choice in choices if choice.name in possible))
    others = {choice.name: choice for choice in choices if choice.name not in possible}
    module = modules.pop()
    known = {call.layer.name for call in layer_calls(module)}
    for name in others.keys() - known:
        raise PlanError(f"the plan names layer {name!r}, which the model does not have; {near_names(name, known)}")
    masks = PackedMasks(
        (name, others[name].pattern.mask(np.abs(call.weight), others[name].density, call.layer.groups))
        for call in layer_calls(module)
        if (name := call.layer.name) in others
    )
    importance = channel_importance(network, module)
    del module
    release_memory()
    stitched = {}
    if database is not None and calibrated.layers:  # before anything changes: it belongs to the model as it is
        size = images_per_run(network, images, options.threads)
        stitched = _stitched(database, network, importance, calibrated, images, size, options, progress)
    if masks:
        prune_onnx(model, masks, in_place=True)
    if database is not None or not calibrated.layers:
        replace_weights(model, stitched)
        return OneShot({**masks, **{name: w.weight != 0 for name, w in stitched.items()}}, (), tuple(others))
    size = images_per_run(network, images, options.threads)
    found = reconstruct(
        network,
        calibrated,
        images.batches(size),
        options,
        importance=importance,
        progress=progress,
    )
    replace_weights(model, found.weights)
    return OneShot({**masks, **found.masks}, found.layers, tuple(others))


def _stitched(
    directory: str | os.PathLike[str],
    network: OnnxNetwork,
    importance: Mapping[str, NDArray[np.float64]],
    plan: Plan,
    images: CalibrationImages,
    size: int,
    options: Options,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, LayerWeights]:
    database = build_database(
        directory,
        network,
        {choice.name: [(choice.pattern, choice.density)] for choice in plan.layers},
        lambda: images.batches(size),
        images.fingerprint,
        options,
        importance=importance,
        progress=progress,
    )
    return stitch(database, network, plan, images.batches(size), options)


def plan_saliency(
    model: onnx.ModelProto,
    module: tvm.IRModule,
    plan: Plan,
    images: CalibrationImages,
    progress: Callable[[str, int, int], None] | None = None,
    options: Options | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Compute what each weight of the layers that a plan prunes is worth; parameters are as for `prune_calibrated`.

    Returns
    -------
    By layer name, with a mean of 1. Layers that are pruned by magnitude have their squared weights.
    """
    options = options or Options()
    network = OnnxNetwork(model)
    names = {choice.name for choice in plan.layers if not isinstance(choice.pattern, Dense)}
    importance = channel_importance(network, module)
    possible = {name: importance.get(name) for name in names & _calibrated_layers(network, options)}
    found = {}
    for call in layer_calls(module):
        if call.layer.name in names - possible.keys():
            squares = np.square(call.weight)
            found[call.layer.name] = squares / max(float(squares.mean()), np.finfo(np.float32).tiny)
    if possible:
        batches = images.batches(images_per_run(network, images, options.threads))
        found |= calibrated_saliency(
            *(network, possible, batches),
            damping=options.damping,
            memory=options.memory,
            threads=options.threads,
            progress=progress,
        )
    return found


def _calibrated_layers(network: OnnxNetwork, options: Options) -> set[str]:
    return {
        layer.name for layer in network.layers.values() if int(np.prod(layer.weight_shape[1:])) <= options.max_columns
    }


def images_per_run(network: OnnxNetwork, images: CalibrationImages, threads: int | None = None) -> int:
    """Images that the network can be run on together: 1 for one that was written for a single image.

    Raises
    ------
    CalibrationError
        If it cannot be run even on one.
    """
    pair = next(images.batches(2))
    try:
        single = _piecewise(network, pair[:1], threads)
    except UnsupportedModelError as error:
        raise CalibrationError(f"the model cannot be run on the calibration images: {error}") from error
    if len(pair) < 2:
        return 1
    try:
        both = _piecewise(network, pair, threads)
    except UnsupportedModelError:
        return 1
    fits = both.shape == (2, *single.shape[1:]) and np.allclose(
        both[:1], single, rtol=1e-3, atol=1e-3 * np.abs(single).max()
    )
    return batch_size(pair.shape[1:]) if fits else 1


def _piecewise(network: OnnxNetwork, images: NDArray[np.float32], threads: int | None) -> FloatArray:
    """Run a network layer by layer: onnxruntime takes several copies of the weights that it is given at a time."""
    values: dict[str, FloatArray] = {network.input: images}
    position = 0
    for stop in [*sorted(layer.position + 1 for layer in network.layers.values()), network.end]:
        segment = network.segment(position, stop, network.frontier(stop), threads=threads)
        values = {**segment(values), **{name: values[name] for name in segment.passed}}
        position = stop
    return values[network.output]


def channel_importance(network: OnnxNetwork, module: tvm.IRModule) -> Mapping[str, NDArray[np.float64]]:
    """By layer name, the square of what scales each output channel behind the layer, such as a batch norm."""
    found = {}
    for call in layer_calls(module):
        name = call.layer.name
        if name not in network.layers or network.layers[name].weight_shape != call.layer.weight_shape:
            continue
        before, after = (
            np.einsum("ok,ok->o", flat, flat, dtype=np.float64)
            for flat in (array.reshape(len(array), -1) for array in (network.weights(name).weight, call.weight))
        )
        found[name] = np.where(before > 0, after / np.where(before > 0, before, 1.0), 0.0)
    return found
