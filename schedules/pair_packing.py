"""From a weight tensor with zeros to the packed values and index table of a channel-pair kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.pair_conv import NEIGHBOURS, PairConvKernel

__all__ = ["pack_pair_conv", "random_pairs"]


def pack_pair_conv(kernel: PairConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (OC, IC, KH, KW) for `kernel`.

    Raises
    ------
    ValueError
        If an output channel keeps more of a block of the reduction than the kernel reads.
    """
    work = kernel.workload
    rows = weights.reshape(work.out_channels, kernel.blocks, kernel.rows_per_block)
    rows = np.moveaxis(rows, 1, 0)
    paired, order, shared = _ordered(kernel, rows != 0)
    values = np.take_along_axis(rows[np.arange(kernel.blocks)[:, None, None], paired], order, axis=-1)
    return PackedWeights(np.ascontiguousarray(np.moveaxis(values, 2, 3), np.float32), _table(paired, order, shared))


def random_pairs(kernel: PairConvKernel, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return an index table as `pack_pair_conv` makes it from weights of a random N:M mask."""
    work = kernel.workload
    groups = kernel.channels_per_block // kernel.group
    noise = rng.random((kernel.blocks, work.out_channels, groups, kernel.group, work.taps), np.float32)
    ranks = noise.argsort(axis=3).argsort(axis=3)
    kept = (ranks < kernel.of_group).reshape(kernel.blocks, work.out_channels, -1)
    return _table(*_ordered(kernel, kept))


def _ordered(
    kernel: PairConvKernel, kept: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each block's pairs, the inputs that their channels keep, those of both first, and how many these are.

    Parameters
    ----------
    kernel
        The variant; a channel that keeps fewer inputs than it reads goes on with dropped ones, whose weights are zero.
    kept
        (blocks, output channels, rows of a block).
    """
    length = kernel.kept_per_block
    most = int(kept.sum(axis=-1).max(initial=0))
    if most > length:
        raise ValueError(f"{most} inputs of a block are kept, the kernel was made for {length}")
    paired = np.stack([_pairs(kernel, of_block) for of_block in kept])
    chosen = kept[np.arange(kernel.blocks)[:, None, None], paired]
    both = chosen[:, :, 0] & chosen[:, :, 1]
    rank = np.where(both[:, :, None], 0, np.where(chosen, 1, 2))
    order = np.argsort(rank, axis=-1, kind="stable")[..., :length]
    return paired, order, both.sum(axis=-1)


def _pairs(kernel: PairConvKernel, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the pairs of a block, a task's after another's: which have most in common, and these first.

    Steps through the inputs of both take the processor another way than the others; pairs of as many of them in a row
    are foreseen.
    """
    outputs = kernel.workload.out_channels
    of_task = 2 * kernel.pairs_per_task
    found = []
    for first in range(0, outputs, of_task):
        of_this = []
        for start in range(first, first + of_task, NEIGHBOURS):
            some = kept[start : min(start + NEIGHBOURS, first + of_task)].astype(np.float32)
            of_this.append(start + _matched(some @ some.T))
        pairs = np.concatenate(of_this)
        common = (kept[pairs[:, 0]] & kept[pairs[:, 1]]).sum(axis=-1)
        found.append(pairs[np.argsort(-common, kind="stable")])
    return np.concatenate(found)


def _matched(common: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return all rows of a symmetric matrix as pairs (count / 2, 2) with large elements, in rounds of mutual choices.

    An even count of rows, whose elements are whole numbers below 2**12.
    """
    count = len(common)
    # All elements of a row are made different, alike for both sides: some two then prefer each other, in every round.
    tie = np.arange(count)
    score = common * (4.0 * count) + (tie[:, None] + tie[None, :]) % (2 * count)
    left, found = np.arange(count), []
    np.fill_diagonal(score, -1.0)
    while len(left):
        best = score.argmax(axis=1)
        mutual = (best[best] == np.arange(len(left))) & (best > np.arange(len(left)))
        found.append(np.stack([left[mutual], left[best[mutual]]], axis=1))
        stays = np.ones(len(left), bool)
        stays[np.concatenate([np.flatnonzero(mutual), best[mutual]])] = False
        left, score = left[stays], score[np.ix_(stays, stays)]
    return np.concatenate(found)


def _table(
    paired: npt.NDArray[np.int64], order: npt.NDArray[np.int64], shared: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    entries = np.moveaxis(order, 2, 3).reshape(*order.shape[:2], -1)
    channels = np.stack([paired % 256, paired // 256], axis=-1).reshape(*paired.shape[:2], 4)
    return np.concatenate([shared[..., None], channels, entries], axis=-1).astype(np.uint8)
