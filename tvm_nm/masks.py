"""Arithmetic of masks that the sparsity patterns share: block rows, groups, the largest of a row. Needs NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BoolArray",
    "PackedMasks",
    "block_row_sizes",
    "keep_largest",
    "largest_of_groups",
    "mask_density",
    "reduce_block_rows",
    "round_half_up",
    "spread_rows",
    "tail_quota",
]

BoolArray = NDArray[np.bool_]

# Rows of this many elements together are ranked at a time: the temporaries stay in tens of megabytes on any layer.
_CHUNK = 1 << 22


class PackedMasks(Mapping[str, BoolArray]):
    """Masks by name, held as one bit a weight; each access gives a new array.

    Parameters
    ----------
    masks
        The masks by name; looked at one by one, so that a generator of pairs never has two in memory.
    """

    def __init__(self, masks: Iterable[tuple[str, BoolArray]] = ()) -> None:
        self._packed = {name: (np.packbits(mask), mask.shape) for name, mask in masks}

    def __getitem__(self, name: str) -> BoolArray:
        bits, shape = self._packed[name]
        return np.unpackbits(bits, count=math.prod(shape)).view(np.bool_).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def mask_density(mask: BoolArray) -> float:
    """Share of weights that a mask keeps."""
    return int(np.count_nonzero(mask)) / mask.size


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves up; forgives the last digits of a product such as ``0.35 * 90``."""
    return math.floor(value + 0.5 + 1e-9)


def tail_quota(size: int, n: int, m: int) -> int:
    """Weights that N:M keeps of a last group of ``size < m``: ``size * n / m`` rounded half up, at least 1."""
    return max(1, (2 * size * n + m) // (2 * m))


def block_row_sizes(channels: int, n: int, groups: int = 1) -> NDArray[np.intp]:
    """Output channels of each block row, in order: n each, and what is left in the last row of each group."""
    per_group = channels // groups
    sizes = [min(n, per_group - start) for start in range(0, per_group, n)]
    return np.tile(np.asarray(sizes, dtype=np.intp), groups)


def reduce_block_rows(ufunc: np.ufunc, array: NDArray[Any], n: int, groups: int = 1) -> NDArray[Any]:
    """Reduce the output channels of each block row to one with `ufunc`.

    Parameters
    ----------
    ufunc
        Such as ``np.add`` or ``np.bitwise_or``.
    array
        Shape (OC, ...), OC a multiple of `groups`.
    n
        Output channels in a block row.
    groups
        Groups of the convolution.

    Returns
    -------
    Array of shape (groups * ceil(OC / groups / n), ...), of the type that the ufunc gives.
    """
    per_group, rest = array.shape[0] // groups, array.shape[1:]
    whole = per_group // n * n
    # Reshaping is ten times faster here than ufunc.reduceat along the first axis.
    split = array.reshape(groups, per_group, *rest)
    parts = []
    if whole:
        parts.append(ufunc.reduce(split[:, :whole].reshape(groups, whole // n, n, *rest), axis=2))
    if whole < per_group:
        parts.append(ufunc.reduce(split[:, whole:], axis=1, keepdims=True))
    return np.concatenate(parts, axis=1).reshape(-1, *rest)


def spread_rows(rows: BoolArray, channels: int, n: int, groups: int) -> BoolArray:
    """Give every output channel the choice of its block row."""
    return np.repeat(rows, block_row_sizes(channels, n, groups), axis=0)


def largest_of_groups(scores: NDArray[np.floating[Any]], n: int, m: int) -> BoolArray:
    """Mask of the n largest in each m consecutive input channels (axis 1)."""
    inputs_last = scores.transpose(0, 2, 3, 1)
    inputs = inputs_last.shape[-1]
    whole, tail = inputs // m * m, inputs % m
    kept = np.empty(inputs_last.shape, dtype=np.bool_)
    if whole:
        chosen = keep_largest(inputs_last[..., :whole].reshape(-1, m), n)
        kept[..., :whole] = chosen.reshape(*kept.shape[:-1], whole)
    if tail:
        chosen = keep_largest(inputs_last[..., whole:].reshape(-1, tail), tail_quota(tail, n, m))
        kept[..., whole:] = chosen.reshape(*kept.shape[:-1], tail)
    return np.ascontiguousarray(kept.transpose(0, 3, 1, 2))


def keep_largest(scores: NDArray[np.floating[Any]], count: int) -> BoolArray:
    """Mask of the `count` largest in each row of a matrix; among equals the lower index is kept."""
    rows, width = scores.shape
    if count >= width:
        return np.ones(scores.shape, dtype=np.bool_)
    kept = np.empty(scores.shape, dtype=np.bool_)
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        part = scores[start : start + step]
        threshold = np.partition(part, width - count, axis=1)[:, width - count, None]
        chosen = part >= threshold
        surplus = chosen.sum(axis=1) - count
        tied = np.flatnonzero(surplus)
        if tied.size:
            level = part[tied] == threshold[tied]
            room = level.sum(axis=1) - surplus[tied]
            chosen[tied] &= ~level | (level.cumsum(axis=1) <= room[:, None])
        kept[start : start + step] = chosen
    return kept
