"""From a weight tensor with zeros to the packed values and index table of a channel-pair kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.pair_conv import PairConvKernel

__all__ = ["pack_pair_conv", "random_pairs"]


def pack_pair_conv(kernel: PairConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (OC, IC, KH, KW) for `kernel`.

    Raises
    ------
    ValueError
        If an output channel keeps more of a block of the reduction than the kernel reads.
    """
    rows = weights.reshape(kernel.pairs, 2, kernel.blocks, kernel.rows_per_block)
    rows = np.moveaxis(rows, 2, 0)
    order, shared = _ordered(rows != 0, kernel.kept_per_block)
    values = np.moveaxis(np.take_along_axis(rows, order, axis=-1), 2, 3)
    return PackedWeights(np.ascontiguousarray(values, np.float32), _table(order, shared))


def random_pairs(kernel: PairConvKernel, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return an index table as `pack_pair_conv` makes it from weights of a random N:M mask."""
    taps = kernel.workload.taps
    groups = kernel.channels_per_block // kernel.group
    noise = rng.random((kernel.blocks, kernel.pairs, 2, groups, kernel.group, taps), np.float32)
    ranks = noise.argsort(axis=4).argsort(axis=4)
    order, shared = _ordered((ranks < kernel.of_group).reshape(*noise.shape[:3], -1), kernel.kept_per_block)
    return _table(order, shared)


def _ordered(kept: npt.NDArray[np.bool_], length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each channel's kept inputs, those of both channels of its pair first, and how many these are.

    Parameters
    ----------
    kept
        (blocks, pairs, 2, rows of a block).
    length
        Inputs to return for each channel; who keeps fewer goes on with dropped ones, whose weights are zero.
    """
    most = int(kept.sum(axis=-1).max(initial=0))
    if most > length:
        raise ValueError(f"{most} inputs of a block are kept, the kernel was made for {length}")
    both = kept[:, :, 0] & kept[:, :, 1]
    rank = np.where(both[:, :, None], 0, np.where(kept, 1, 2))
    order = np.argsort(rank, axis=-1, kind="stable")[..., :length]
    return order, both.sum(axis=-1)


def _table(order: npt.NDArray[np.int64], shared: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    entries = np.moveaxis(order, 2, 3).reshape(*order.shape[:2], -1)
    return np.concatenate([shared[..., None], entries], axis=-1).astype(np.uint8)
