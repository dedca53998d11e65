"""Finds the sparsity pattern of a weight that somebody else pruned. Needs NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.masks import BoolArray, block_row_sizes, mask_density, reduce_block_rows, tail_quota
from tvm_nm.patterns import MAX_BLOCK, MAX_GROUP, NM, Dense, Granularity, OneByN, SparsityPattern

__all__ = ["DENSE_ABOVE", "TOLERANCE", "Detection", "block_row_union", "detect_pattern"]

DENSE_ABOVE = 0.9
"""A weight of a higher density counts as dense: nothing is gained by skipping so little."""
TOLERANCE = 0.1
"""A pattern explains a mask when it adds at most this share to the weights kept."""

# Rows looked at before a candidate N:M is tried on all of them.
_SAMPLE = 64
_POPCOUNT = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Detection:
    """What `detect_pattern` found.

    Attributes
    ----------
    pattern
        The pattern that explains the mask, `Dense` for a nearly full one, None where nothing does.
    density
        Share of weights that are not zero.
    padded_density
        Share that a kernel executes whose block rows are all padded to the longest one of the layer; 1 when dense.
    reason
        Why the weight is treated as dense or not explained; empty when it has a sparse pattern.
    """

    pattern: SparsityPattern | None
    density: float
    padded_density: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Rows:
    """How many weights per output channel each block row of n channels keeps, as a union over its channels."""

    n: int
    counts: NDArray[np.intp]
    sizes: NDArray[np.intp]

    @property
    def kept(self) -> int:
        """Weights kept when every channel takes its row's union."""
        return int(self.counts @ self.sizes)

    @property
    def longest(self) -> int:
        return int(self.counts.max())


def block_row_union(mask: BoolArray, n: int, groups: int = 1) -> BoolArray:
    """Say which positions any channel of a block row keeps: the index list that its channels can share.

    Parameters
    ----------
    mask
        Shape (OC, IC / groups, KH, KW), True where a weight is kept.
    n
        Output channels in a block row; 1 gives the mask itself.
    groups
        Groups of the convolution.

    Returns
    -------
    Boolean array of shape (groups * ceil(OC / groups / n), IC / groups, KH, KW).
    """
    mask = _checked(mask, groups)
    if n < 1:
        raise ValueError(f"a block row needs at least 1 output channel, not {n}")
    union: BoolArray = reduce_block_rows(np.logical_or, mask, n, groups)
    return union


def detect_pattern(mask: BoolArray, groups: int = 1) -> Detection:
    """Find the pattern that explains which weights are not zero.

    Candidates, in order: 1xN blocks of as many channels as possible that fit exactly, N:M of the smallest M that fits
    exactly, then both again with `TOLERANCE`, because a kept weight may happen to be zero. Blocks come first since
    channels that share an index list are what makes a vector kernel fast; a tile-shared N:M is reported as the
    ``1xNp`` block pattern that it is. Blocks are of whole kernels where the mask allows, else of positions, and
    balanced when padding every block row to the longest costs no more than the tolerance.

    Parameters
    ----------
    mask
        Shape (OC, IC / groups, KH, KW), True where a weight is not zero.
    groups
        Groups of the convolution.

    Returns
    -------
    The pattern with its densities, or the reason why there is none.
    """
    mask = _checked(mask, groups)
    density = mask_density(mask)
    if density == 0:
        return Detection(None, 0.0, 0.0, "every weight is zero")
    if density > DENSE_ABOVE:
        return Detection(Dense(), density, 1.0, f"density {density:.3g} is above {DENSE_ABOVE}")
    blocks = _block_candidates(mask, groups)
    inputs_last = np.ascontiguousarray(mask.transpose(0, 2, 3, 1)).view(np.uint8).reshape(-1, mask.shape[1])
    for tolerance in (0.0, TOLERANCE):
        found = _as_blocks(mask, blocks, groups, tolerance) or _as_nm(mask, inputs_last, tolerance)
        if found is not None:
            return found
    return _unexplained(mask, blocks)


def _checked(mask: BoolArray, groups: int) -> BoolArray:
    mask = np.asarray(mask, dtype=np.bool_)
    if mask.ndim != 4 or mask.size == 0:
        raise ValueError(f"mask must have shape (OC, IC / groups, KH, KW), not {mask.shape}")
    if groups < 1 or mask.shape[0] % groups:
        raise ValueError(f"{mask.shape[0]} output channels do not divide into {groups} groups")
    return mask


def _block_candidates(mask: BoolArray, groups: int) -> list[_Rows]:
    """Block rows of every size that a group's channels allow, the largest first; an exact fit ends the list."""
    channels = mask.shape[0]
    kept = int(np.count_nonzero(mask))
    # One bit a weight: 31 unions of it cost less than reading the mask a few times.
    packed = np.packbits(mask.reshape(channels, -1), axis=1)
    candidates = []
    for n in range(min(MAX_BLOCK, channels // groups), 1, -1):
        union = reduce_block_rows(np.bitwise_or, packed, n, groups)
        counts = _POPCOUNT[union].sum(axis=1, dtype=np.intp)
        rows = _Rows(n, counts, block_row_sizes(channels, n, groups))
        candidates.append(rows)
        if rows.kept == kept:
            break
    return candidates


def _as_blocks(mask: BoolArray, candidates: list[_Rows], groups: int, tolerance: float) -> Detection | None:
    """Explain the mask by the largest block that adds at most `tolerance`."""
    kept = int(np.count_nonzero(mask))
    limit = kept * (1 + tolerance)
    rows = next((rows for rows in candidates if rows.kept <= limit), None)
    if rows is None:
        return None
    area = mask.shape[2] * mask.shape[3]
    union = block_row_union(mask, rows.n, groups)
    kernels = _Rows(rows.n, union.any(axis=(2, 3)).sum(axis=1, dtype=np.intp) * area, rows.sizes)
    granularity = Granularity.POSITION
    if kernels.kept <= limit:
        granularity, rows = Granularity.KERNEL, kernels
    padded = rows.longest * mask.shape[0]
    balanced = padded <= kept * (1 + TOLERANCE)
    return Detection(OneByN(rows.n, granularity, balanced), kept / mask.size, padded / mask.size)


def _as_nm(mask: BoolArray, inputs_last: NDArray[np.uint8], tolerance: float) -> Detection | None:
    """Explain the mask by N:M of the smallest M whose groups are all but full.

    `inputs_last` is the mask as 0 and 1, shape (OC * KH * KW, IC / groups).
    """
    kept = int(np.count_nonzero(mask))
    rows, inputs = inputs_last.shape
    sample = inputs_last[:: max(1, rows // _SAMPLE)]
    for m in range(2, min(MAX_GROUP, inputs) + 1):
        # More rows can only raise n: most candidates fall on the sample.
        for part in (sample, inputs_last):
            n = _smallest_n(part, m)
            if n is None or rows * _row_quota(inputs, n, m) > kept * (1 + tolerance):
                break
        else:
            assert n is not None
            longest = int(mask.reshape(len(mask), -1).sum(axis=1).max())
            return Detection(NM(n, m), kept / mask.size, longest * len(mask) / mask.size)
    return None


def _smallest_n(rows: NDArray[np.uint8], m: int) -> int | None:
    """Return the smallest N whose N:M mask can hold these rows, None where no N < M does."""
    whole, tail = rows.shape[1] // m * m, rows.shape[1] % m
    # Adding m strided columns is faster than a sum over a short last axis.
    largest = int(sum(rows[:, start:whole:m] for start in range(m)).max())  # type: ignore[union-attr]
    in_tail = int(rows[:, whole:].sum(axis=1).max()) if tail else 0
    fitting = (n for n in range(max(1, largest), m) if not tail or tail_quota(tail, n, m) >= in_tail)
    return next(fitting, None)


def _row_quota(inputs: int, n: int, m: int) -> int:
    """Weights that N:M keeps along `inputs` input channels."""
    whole, tail = divmod(inputs, m)
    return whole * n + (tail_quota(tail, n, m) if tail else 0)


def _unexplained(mask: BoolArray, candidates: list[_Rows]) -> Detection:
    """Say why no pattern fits, in numbers."""
    kept: int = int(np.count_nonzero(mask))
    lengths: NDArray[Any] = mask.reshape(len(mask), -1).sum(axis=1)
    density, padded = kept / mask.size, int(lengths.max()) * len(mask) / mask.size
    if candidates:
        pairs = candidates[-1]
        blocks = f"blocks of {pairs.n} output channels would keep {pairs.kept / mask.size:.3g} for {density:.3g}"
    else:
        blocks = "a group has 1 output channel"
    rows = f"output channels keep {lengths.min()} to {lengths.max()} of {mask[0].size} weights"
    return Detection(None, density, padded, f"no block structure ({blocks}) and no N:M; {rows}")
