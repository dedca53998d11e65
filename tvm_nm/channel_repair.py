"""Sets the statistics of each channel right behind layers that were pruned on their own.

Each pruned layer's error shifts and shrinks what the layers behind it read, and in a deep network this adds up to more
than the errors themselves. Scaling and shifting every channel to its mean and deviation in the dense network takes that
out, as in the correction of batch norms by Frantar, Singh and Alistarh, "Optimal Brain Compression" (NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tvm_nm.observation import Walk
from tvm_nm.onnx_network import LayerNode, LayerWeights, OnnxNetwork
from tvm_nm.onnx_segment import FloatArray
from tvm_nm.reconstruction import Options
from tvm_nm.tensor_store import TensorStore

__all__ = ["ChannelRepair"]

_SCALES = (0.5, 2.0)
"""A channel that would have to be scaled by less or more is not the same channel any more."""


class ChannelRepair:
    """Scales and shifts pruned layers' channels to the mean and deviation that they have in the dense network.

    Parameters
    ----------
    network
        The dense network.
    layers
        Names of the layers that may be pruned; their dense statistics are taken now.
    batches
        Images, float32 (N, C, H, W).
    options
        Memory and threads.
    """

    def __init__(
        self,
        network: OnnxNetwork,
        layers: Iterable[str],
        batches: Iterator[NDArray[np.float32]],
        options: Options | None = None,
    ) -> None:
        self._network, self._options = network, options or Options()
        self._images = list(batches)
        self._dense: dict[str, Sequence[NDArray[np.float64]]] = {}
        walk = self._walk()
        for layer in self._ordered(layers):
            walk.advance(layer.position)
            self._dense[layer.name] = self._statistics(layer, walk)

    def __call__(self, weights: Mapping[str, LayerWeights]) -> dict[str, LayerWeights]:
        """Return the pruned layers' weights with their channels set right, each behind those before it."""
        walk = self._walk()
        result: dict[str, LayerWeights] = {}
        for layer in self._ordered(weights):
            walk.advance(layer.position, result)
            old = weights[layer.name]
            mean, deviation = self._dense[layer.name]
            own_mean, own_deviation = self._statistics(layer, walk, old)
            scale = np.where(own_deviation > 0, deviation / np.where(own_deviation > 0, own_deviation, 1), 1)
            scale = np.clip(scale, *_SCALES)
            bias = mean + scale * (old.bias - own_mean)
            weight = old.weight * scale[:, None, None, None].astype(np.float32)
            result[layer.name] = LayerWeights(weight.astype(np.float32), bias.astype(np.float32))
        return result

    def _walk(self) -> Walk:
        walk = Walk(self._network, TensorStore(self._options.memory), self._options.threads)
        walk.start(iter(self._images))
        return walk

    def _ordered(self, names: Iterable[str]) -> list[LayerNode]:
        return sorted((self._network.layers[name] for name in names), key=lambda layer: layer.position)

    def _statistics(
        self, layer: LayerNode, walk: Walk, weights: LayerWeights | None = None
    ) -> Sequence[NDArray[np.float64]]:
        """Mean and deviation of each output channel, (OC,), with the inputs that the walk has there."""
        place, output = layer.position, layer.output
        changed = None if weights is None else {layer.name: weights}
        run = self._network.segment(place, place + 1, [output], changed, self._options.threads)
        channels = _Channels(layer.weight_shape[0])
        for batch in walk.batches:
            channels.add(run({layer.data: batch[layer.data].get()})[output], layer.kind)
        return channels.result()


class _Channels:
    """Mean and deviation of each output channel over batches."""

    def __init__(self, count: int) -> None:
        self._sum, self._square, self._count = np.zeros(count), np.zeros(count), 0

    def add(self, output: FloatArray, kind: str) -> None:
        axis = output.ndim - 1 if kind == "fc" else 1
        flat = np.moveaxis(output, axis, 0).reshape(len(self._sum), -1).astype(np.float64)
        self._sum += flat.sum(axis=1)
        self._square += np.einsum("cp,cp->c", flat, flat)
        self._count += flat.shape[1]

    def result(self) -> Sequence[NDArray[np.float64]]:
        mean = self._sum / self._count
        return mean, np.sqrt(np.maximum(self._square / self._count - mean**2, 0))
