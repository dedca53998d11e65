"""Weights, index tables and biases in the formats of a chain."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.chain import ChainKernel, Mixing
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.workload import ConvWorkload

__all__ = ["channel_vectors", "pack_depthwise", "pack_mixing", "random_offsets"]

Array = npt.NDArray[np.float32]


def channel_vectors(values: Array, lanes: int) -> Array:
    """Return values with as many zeros behind along axis 0 as make it whole vectors."""
    rest = -len(values) % lanes
    return np.pad(values, [(0, rest), *[(0, 0)] * (values.ndim - 1)]) if rest else values


def pack_depthwise(kernel: ChainKernel, weights: Array) -> PackedWeights:
    """Pack weights (C, 1, KH, KW): (vectors of channels, taps, lanes)."""
    vectors = channel_vectors(weights.reshape(kernel.hidden, -1), kernel.lanes)
    return PackedWeights(np.ascontiguousarray(vectors.reshape(-1, kernel.lanes, vectors.shape[1]).swapaxes(1, 2)), None)


def pack_mixing(kernel: ChainKernel, weights: Array, *, last: bool) -> PackedWeights:
    """Pack the weights (OC, IC, KH, KW) of a chain's first or last layer.

    One stream: for each group of the register tile's vectors, kept input and tap, the group's channels.

    Raises
    ------
    ValueError
        If a block row keeps more inputs than the kernel was made for.
    """
    work, mixing = (kernel.last, kernel.last_mixing) if last else (kernel.first, kernel.mixing)
    assert work is not None
    lanes = kernel.lanes
    flat = channel_vectors(weights.reshape(*weights.shape[:2], -1), lanes)
    group = mixing.vectors * lanes
    starts = range(0, len(flat), group)
    if not mixing.kept:
        return PackedWeights(_joined([flat[start : start + group] for start in starts]), None)
    orders = _kept_inputs(weights, mixing)
    offsets = _offsets(kernel, work, last)
    parts = [flat[start : start + group][:, orders[start // mixing.block]] for start in starts]
    return PackedWeights(_joined(parts), _index(kernel, orders, offsets, last))


def random_offsets(kernel: ChainKernel, rng: np.random.Generator, *, last: bool) -> npt.NDArray[np.int32]:
    """Return an index table as `pack_mixing` makes it from weights of a random mask; the layer must have one."""
    work, mixing = (kernel.last, kernel.last_mixing) if last else (kernel.first, kernel.mixing)
    assert work is not None
    offsets = _offsets(kernel, work, last)
    rows = range(-(-work.out_channels // mixing.block))
    orders = [np.sort(rng.permutation(work.in_channels)[: mixing.kept]) for _ in rows]
    return _index(kernel, orders, offsets, last)


def _index(
    kernel: ChainKernel, orders: list[npt.NDArray[np.int64]], offsets: npt.NDArray[np.int64], last: bool
) -> npt.NDArray[np.int32]:
    """Return the table of a layer: where what each block row keeps lies.

    The shares of a last layer count from their own first channel; where each one's part of a row begins stands behind.
    """
    if not last or kernel.shares == 1:
        return np.concatenate([offsets[order] for order in orders]).astype(np.int32)
    begins = offsets[list(kernel.share_channels[:-1])]
    bounds = [np.searchsorted(order, kernel.share_channels) for order in orders]
    found = [offsets[order] - np.repeat(begins, np.diff(ends)) for order, ends in zip(orders, bounds, strict=True)]
    return np.concatenate(found + bounds).astype(np.int32)


def _joined(groups: list[Array]) -> Array:
    return np.concatenate([np.moveaxis(group, 0, -1).reshape(-1) for group in groups])


def _kept_inputs(weights: Array, mixing: Mixing) -> list[npt.NDArray[np.int64]]:
    """Return the inputs of each block row in order; short rows go on with dropped ones, whose weights are zero."""
    orders = []
    for start in range(0, len(weights), mixing.block):
        kept = (weights[start : start + mixing.block] != 0).any(axis=(0, 2, 3))
        if kept.sum() > mixing.kept:
            raise ValueError(f"a block row keeps {kept.sum()} inputs, the kernel was made for {mixing.kept}")
        orders.append(np.sort(np.argsort(~kept, kind="stable")[: mixing.kept]))
    return orders


def _offsets(kernel: ChainKernel, work: ConvWorkload, last: bool) -> npt.NDArray[np.int64]:
    """Return where each input channel begins in what the layer reads."""
    channels = np.arange(work.in_channels)
    pixels = work.height * work.width
    if last or kernel.blocked_input:
        plane = kernel.hidden_plane if last else pixels * kernel.lanes
        return channels // kernel.lanes * plane + channels % kernel.lanes
    return channels * pixels if work.is_pointwise else channels
