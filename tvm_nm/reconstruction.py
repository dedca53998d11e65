"""Prunes a network layer by layer on calibration data, each layer behind those that are pruned already."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tvm_nm.errors import PlanError
from tvm_nm.layer_pruning import Fit, Method, fit_layer
from tvm_nm.masks import BoolArray
from tvm_nm.memory import release_memory
from tvm_nm.observation import Observation, Walk, observe_layer
from tvm_nm.onnx_network import LayerNode, LayerWeights, OnnxNetwork
from tvm_nm.patterns import Dense
from tvm_nm.plan import LayerChoice, Plan, near_names
from tvm_nm.rectified import fit_rectified
from tvm_nm.refit import DAMPING
from tvm_nm.tensor_store import TensorStore

__all__ = ["LayerFit", "Options", "Reconstruction", "reconstruct"]


@dataclass(frozen=True, slots=True)
class Options:
    """How a network is reconstructed.

    Attributes
    ----------
    method
        How weights are dropped.
    damping
        Share of the mean input variance that holds each weight to what it was trained to.
    refit_dense
        Whether layers that the plan leaves dense are refitted, too, to make up for those before them.
    samples
        Output positions of a convolution that are looked at, at most; or 16 a column, if that is more.
    max_columns
        Inputs of one output value, at most: of layers with more no Hessian is made.
    memory
        Bytes of activations to hold in memory; the rest goes to temporary files.
    threads
        Threads of onnxruntime; None for all.
    rectified
        Bytes of positions by which layers are refitted behind the ReLU that follows them; 0 for no such refit.
    image_weight
        How much errors count that an image's positions have in common; see `tvm_nm.observation.observe_layer`.
    """

    method: Method = Method.OBS
    damping: float = DAMPING
    refit_dense: bool = True
    samples: int = 1 << 17
    max_columns: int = 8192
    memory: int = 1 << 28
    threads: int | None = None
    rectified: int = 400_000_000
    image_weight: float = 4.0


@dataclass(frozen=True, slots=True)
class LayerFit:
    """What was done to one layer.

    Attributes
    ----------
    name
        The layer.
    choice
        What it was pruned to; None where it was only refitted.
    error
        Squared error of its outputs as a share of their variance, on the calibration data.
    seconds
        What it took.
    """

    name: str
    choice: LayerChoice | None
    error: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """New parameters of a network.

    Attributes
    ----------
    weights
        By the names of all layers that changed.
    masks
        By the names of the pruned layers, True where a weight is kept.
    layers
        One entry for each layer that changed, in order.
    """

    weights: dict[str, LayerWeights] = field(default_factory=dict)
    masks: dict[str, BoolArray] = field(default_factory=dict)
    layers: tuple[LayerFit, ...] = ()


def reconstruct(
    network: OnnxNetwork,
    plan: Plan,
    batches: Iterator[NDArray[np.float32]],
    options: Options | None = None,
    *,
    importance: Mapping[str, NDArray[np.float64]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Reconstruction:
    """Prune a network to a plan and refit what is left, layer by layer.

    Each layer is fitted to the outputs that it has in the dense network, from the inputs that it gets in the network
    pruned so far. Where its output is added to another branch, the target makes up for that branch's error, too.

    Parameters
    ----------
    network
        The dense network.
    plan
        What to prune. Layers that it does not name may be refitted, see `Options.refit_dense`.
    batches
        Calibration images, float32 (N, C, H, W). They need no labels.
    options
        How.
    importance
        By layer name, the weight of each output channel's squared error in shared choices.
    progress
        Called with (layer name, number of the layer, number of layers) before each layer.

    Raises
    ------
    PlanError
        If the plan names a layer that the network does not have or that cannot be calibrated.
    UnsupportedModelError
        If onnxruntime cannot run the network on the images.
    """
    options = options or Options()
    choices = {choice.name: choice for choice in plan.layers if not isinstance(choice.pattern, Dense)}
    layers = _order(network, choices, options)
    dense = Walk(network, TensorStore(options.memory), options.threads)
    dense.start(batches)
    pruned = dense
    result = Reconstruction()
    reports: list[LayerFit] = []
    for number, layer in enumerate(layers):
        choice = choices.get(layer.name)
        if choice is None and pruned is dense:
            continue  # nothing to make up for yet
        if progress is not None:
            progress(layer.name, number, len(layers))
        started = time.perf_counter()
        dense.advance(layer.position)
        pruned.advance(layer.position, result.weights)
        seen = observe_layer(
            layer,
            dense,
            pruned,
            options.samples,
            number,
            options.threads,
            # By magnitude, weights that are kept stay as they are.
            held=0 if options.method is Method.MAGNITUDE else options.rectified,
            image_weight=options.image_weight,
        )
        fit = _fit(network, layer, choice, seen, options, (importance or {}).get(layer.name))
        result.weights[layer.name] = fit.weights
        if choice is not None:
            result.masks[layer.name] = fit.mask
        if pruned is dense:
            pruned = dense.fork()
        reports.append(LayerFit(layer.name, choice, fit.error, time.perf_counter() - started))
        del seen, fit
        release_memory()
    return Reconstruction(result.weights, result.masks, tuple(reports))


def _order(network: OnnxNetwork, choices: Mapping[str, LayerChoice], options: Options) -> list[LayerNode]:
    for name in choices:
        if name not in network.layers:
            raise PlanError(
                f"layer {name!r} cannot be calibrated: it is no Conv, Gemm or MatMul with a constant weight; "
                f"{near_names(name, network.layers)}"
            )
    wanted = [
        layer
        for layer in network.layers.values()
        if layer.name in choices
        or (options.refit_dense and int(np.prod(layer.weight_shape[1:])) <= options.max_columns)
    ]
    return sorted(wanted, key=lambda layer: layer.position)


def _fit(
    network: OnnxNetwork,
    layer: LayerNode,
    choice: LayerChoice | None,
    seen: Observation,
    options: Options,
    importance: NDArray[np.float64] | None,
) -> Fit:
    pattern, density = (choice.pattern, choice.density) if choice is not None else (Dense(), 1.0)
    weight = network.weights(layer.name).weight
    fit = fit_layer(
        seen.moments, weight, pattern, density, options.method, damping=options.damping, importance=importance
    )
    if not seen.positions:
        return fit
    weights = fit_rectified(
        *(seen.positions, seen.moments, fit.weights, fit.mask, options.damping),
        image_weight=seen.image_weight,
    )
    return replace(fit, weights=weights)
