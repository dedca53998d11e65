"""What each weight of the dense network is worth on calibration data, before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from tvm_nm.observation import Walk, observe_layer
from tvm_nm.onnx_network import OnnxNetwork
from tvm_nm.refit import damped, spd_inverse
from tvm_nm.tensor_store import TensorStore

__all__ = ["calibrated_saliency"]

Float32 = NDArray[np.float32]

_SAMPLES = 1 << 14  # positions, or 16 a column: the order of saliencies needs fewer than weights do


def calibrated_saliency(
    network: OnnxNetwork,
    names: Mapping[str, NDArray[np.float64] | None],
    batches: Iterator[Float32],
    *,
    damping: float,
    memory: int = 1 << 28,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Float32]:
    """Compute what removing each weight alone would add to its layer's squared output error.

    That is ``w^2 / diag(inv(H))`` once the other weights have made up for it (Hassibi and Stork, "Optimal Brain
    Surgeon", 1993).

    Parameters
    ----------
    network
        The dense network.
    names
        Layers to look at, with the weight of each output channel's error (None: all the same).
    batches
        Calibration images, float32 (N, C, H, W).
    damping
        See `tvm_nm.refit.damped`.
    memory, threads
        As in `tvm_nm.reconstruction.Options`.
    progress
        Called with (layer name, number of the layer, number of layers).

    Returns
    -------
    By layer name, (OC, IC / groups, KH, KW), not negative, with a mean of 1.
    """
    layers = sorted((network.layers[name] for name in names), key=lambda layer: layer.position)
    walk = Walk(network, TensorStore(memory), threads)
    walk.start(batches)
    found = {}
    for number, layer in enumerate(layers):
        if progress is not None:
            progress(layer.name, number, len(layers))
        walk.advance(layer.position)
        moments = observe_layer(layer, walk, walk, _SAMPLES, number, threads).moments
        weight = network.weights(layer.name).weight
        flat = weight.reshape(layer.groups, -1, moments.hessian.shape[1]).astype(np.float64)
        for group, hessian in enumerate(moments.hessian):
            flat[group] **= 2
            flat[group] /= np.diag(spd_inverse(damped(hessian, damping)[0]))
        importance = names[layer.name]
        if importance is not None:
            flat *= importance.reshape(layer.groups, -1, 1)
        mean = float(flat.mean())
        found[layer.name] = (flat.reshape(weight.shape) / (mean if mean > 0 else 1.0)).astype(np.float32)
    return found
