"""What a layer gets and what it should give, on calibration data, in a network that is pruned step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tvm_nm.following import Following, what_follows
from tvm_nm.moments import Moments, MomentsAccumulator, paired_columns
from tvm_nm.onnx_network import LayerNode, LayerWeights, OnnxNetwork
from tvm_nm.onnx_segment import FloatArray
from tvm_nm.rectified import Observed
from tvm_nm.tensor_store import StoredTensor, TensorStore

__all__ = ["Observation", "Walk", "observe_layer"]

# Positions that are held for a refit behind the ReLU: so many, or so many a column; and the fewest a column.
_HELD, _HELD_PER_COLUMN, _FEWEST_PER_COLUMN = 1 << 15, 64, 4
_ENOUGH_IMAGES = 1024


class Walk:
    """The activations of one network at a cut that moves forward, for all batches of the calibration data.

    Parameters
    ----------
    network
        The network.
    store
        Where activations are kept.
    threads
        Threads of onnxruntime.
    """

    def __init__(self, network: OnnxNetwork, store: TensorStore, threads: int | None = None) -> None:
        self.network = network
        self.position = 0
        self.batches: list[dict[str, StoredTensor]] = []
        self._store, self._threads = store, threads

    def start(self, batches: Iterator[NDArray[np.float32]]) -> None:
        """Take in the images."""
        self.batches = [{self.network.input: self._store.put(batch)} for batch in batches]

    def fork(self) -> Walk:
        """Return a walk at the same cut, which goes on with a network of its own."""
        other = Walk(self.network, self._store, self._threads)
        other.position, other.batches = self.position, [dict(batch) for batch in self.batches]
        return other

    def advance(self, position: int, weights: Mapping[str, LayerWeights] | None = None) -> None:
        """Move on to the cut at `position`, with other weights in the layers on the way."""
        if position == self.position:
            return
        outputs = self.network.frontier(position)
        segment = self.network.segment(self.position, position, outputs, weights, self._threads)
        for batch in self.batches:
            values = segment({name: batch[name].get() for name in segment.inputs})
            found = {name: batch[name] for name in segment.passed}
            found.update({name: self._store.put(values[name]) for name in segment.outputs})
            batch.clear()
            batch.update(found)
        self.position = position


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of a layer.

    Attributes
    ----------
    moments
        Of its inputs and the outputs that it should have.
    positions
        Some of the positions, if it is followed by a ReLU or Clip and they were asked for.
    image_weight
        How much an image's mean counts in the moments.
    """

    moments: Moments
    positions: tuple[Observed, ...] = ()
    image_weight: float = 0.0


def observe_layer(
    layer: LayerNode,
    dense: Walk,
    pruned: Walk,
    samples: int,
    seed: int,
    threads: int | None = None,
    held: int = 0,
    image_weight: float = 0.0,
) -> Observation:
    """Run a layer on the calibration data, as far as both networks have come.

    Where its output is added to another branch, the outputs that it should have make up for that branch's error, too.

    Parameters
    ----------
    layer
        The layer.
    dense, pruned
        The dense network and the one pruned so far, both at the cut before the layer; may be the same.
    samples
        Output positions to look at, at most; or 16 a column, if that is more.
    seed
        Of their choice.
    threads
        Threads of onnxruntime.
    held
        Bytes of positions to keep for a refit behind the ReLU.
    image_weight
        How much an image's mean counts; see `tvm_nm.moments.MomentsAccumulator`. With fewer than 1,024 images it falls
        with the square of their number: few would be learnt by heart.
    """
    network = dense.network
    run = network.segment(layer.position, layer.position + 1, [layer.output], threads=threads)
    follows = what_follows(network, layer)
    axis = -1 if layer.kind == "fc" else 1
    channels = layer.weight_shape[0]
    inverse = np.divide(1, follows.scale, out=np.zeros_like(follows.scale), where=follows.scale != 0)
    rng = np.random.default_rng(seed)
    accumulator = MomentsAccumulator(layer)
    parts: list[Observed] = []
    share = kept = 1.0
    for number, (before, now) in enumerate(zip(dense.batches, pruned.batches, strict=True)):
        data = before[layer.data].get()
        target = run({layer.data: data})[layer.output]
        if number == 0:
            image_weight = _image_weight(layer, len(target) * len(dense.batches), image_weight)
            accumulator = MomentsAccumulator(layer, image_weight=image_weight)
            share, kept = _shares(layer, target, len(dense.batches), samples, held)
            if follows.other is not None and now[follows.other].get().shape != target.shape:
                follows, kept = Following(follows.scale, follows.shift), 0.0
            if not follows.clips:
                kept = 0.0
        if pruned is not dense:
            data = now[layer.data].get()
        wanted = target
        if follows.other is not None:
            other = now[follows.other].get()
            if before[follows.other] is not now[follows.other]:
                spread = inverse if axis == -1 else inverse.reshape(-1, *[1] * (target.ndim - 2))
                target = target + (before[follows.other].get() - other) * spread
            wanted = np.concatenate([target, other], axis=axis)
        for x, y, images in paired_columns(layer, data, wanted, share, rng):
            accumulator.add_columns(x, y[:channels], images)
            if kept:
                some = _some(x.shape[2], images, kept, rng)
                means = _image_means(x, images), _image_means(y[:channels], images)
                parts.append(_observed(follows, inverse, x[:, :, some], y[:, some], means))
    return Observation(accumulator.result(), tuple(parts), image_weight)


def _image_weight(layer: LayerNode, images: int, most: float) -> float:
    return most * min(1.0, images / _ENOUGH_IMAGES) ** 2 if layer.kind == "conv" else 0.0


def _some(count: int, images: int, share: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """Choose equally many positions of each image."""
    each = count // images
    chosen = rng.random((images, each)).argsort(axis=1)[:, : max(1, round(share * each))]
    return (np.sort(chosen, axis=1) + np.arange(images)[:, None] * each).reshape(-1)


def _image_means(values: FloatArray, images: int) -> FloatArray:
    means: FloatArray = values.reshape(*values.shape[:-1], images, -1).mean(axis=-1)
    return means


def _observed(
    follows: Following,
    inverse: NDArray[np.float32],
    data: FloatArray,
    values: FloatArray,
    means: tuple[FloatArray, FloatArray],
) -> Observed:
    """Columns and what makes no difference; `values` are targets and, below them, what is added to the outputs."""
    channels = len(follows.scale)
    gone = follows.scale == 0
    inverse = np.where(gone, 1, inverse)  # 0 times infinity is no limit
    rest: FloatArray = follows.shift[:, None]
    if follows.other is not None:
        rest = rest + values[channels:]
    ends = (follows.low - rest) * inverse[:, None], (follows.high - rest) * inverse[:, None]
    turned = follows.scale[:, None] < 0
    low, high = np.where(turned, ends[1], ends[0]), np.where(turned, ends[0], ends[1])
    low[gone], high[gone] = -np.inf, np.inf
    return Observed.between(data, values[:channels], low, high, means)


def _shares(layer: LayerNode, target: FloatArray, batches: int, samples: int, held: int) -> tuple[float, float]:
    """Share of the output rows to look at, and share of these positions to hold."""
    outputs, inputs, height, width = layer.weight_shape
    size = inputs * height * width
    positions = target.size // outputs * batches
    share = min(1.0, max(samples, 16 * size) / positions)
    bytes_each = 4 * layer.groups * size + 6 * outputs
    wanted = min(held / bytes_each, max(_HELD, _HELD_PER_COLUMN * size), share * positions)
    # With too few positions a refit would learn them by heart.
    kept = 0.0 if wanted < _FEWEST_PER_COLUMN * size else min(1.0, wanted / (share * positions))
    return share, kept
