"""Greedy removal of weights with exact compensation of the error by those that stay.

Optimal Brain Surgeon (Hassibi and Stork, 1993) in the row-wise exact form of Frantar, Singh and Alistarh, "Optimal
Brain Compression" (NeurIPS 2022): removing weight p of a row w that minimises ``(w - t) H (w - t)'`` costs
``w_p^2 / G_pp``, with G the inverse of H restricted to what is left, and moves the others by ``-w_p / G_pp * G_p``.
Three things differ:

- Output channels that share their choice share one G, and the cost is the sum over them; whole kernels are removed by
  the block form ``w_g inv(G_gg) w_g'``.
- G is never updated. Its rows are read through the factor U with ``G = inv(H) - U'U`` that grows by one row for each
  weight removed: a pivoted Cholesky factor, so that a step costs s*K instead of K*K and U stays in the cache.
- N:M in layers with many inputs freezes the columns to the left, as in Frantar and Alistarh, "SparseGPT" (ICML 2023),
  but is exact within each block of columns.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Removal", "Units", "cheapest_prefixes", "remove", "remove_by_columns"]

Float64 = NDArray[np.float64]

_CACHE = 4 << 20  # bytes of U that are worked on together
_EXACT_UNITS = 768  # with more candidates than this, several are removed at a step
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Units:
    """What is removed together within one row of blocks, and how much of it.

    Attributes
    ----------
    size
        Consecutive columns in a unit.
    pools
        Number of each unit's pool, (units,): N:M removes from each pool of M its own number.
    quotas
        Units to remove from each pool, (pools,).
    """

    size: int
    pools: NDArray[np.intp]
    quotas: NDArray[np.intp]

    @property
    def removed(self) -> int:
        """Units that are removed in all."""
        return int(self.quotas.sum())


@dataclass(frozen=True, slots=True)
class Removal:
    """What `remove` did.

    Attributes
    ----------
    weights
        The compensated weights, (blocks, R, K), zero where removed.
    order
        Units in the order of their removal, (blocks, removed).
    losses
        What each removal added to the weighted squared error, (blocks, removed).
    """

    weights: Float64
    order: NDArray[np.intp]
    losses: Float64


def remove(target: Float64, inverse: Float64, units: Units, importance: Float64 | None = None) -> Removal:
    """Remove the units of least cost one by one, each time compensating exactly.

    Parameters
    ----------
    target
        Weights to start from, (blocks, R, K): R output channels that share their choice in each block.
    inverse
        Inverse of the Hessian, (K, K).
    units
        What may be removed.
    importance
        Weight of each output channel's squared error, (blocks, R); default: all the same.

    Returns
    -------
    Removal
        Of all blocks. Layers of more than 768 units remove up to 1/256 of them at a step.
    """
    blocks, rows, size = target.shape
    removed = units.removed
    importance = np.ones((blocks, rows)) if importance is None else importance
    result = Removal(target.copy(), np.empty((blocks, removed), np.intp), np.empty((blocks, removed)))
    if not removed:
        return result
    together = max(1, _CACHE // (removed * units.size * size * 8))
    for start in range(0, blocks, together):
        part = slice(start, start + together)
        state = _State(result.weights[part], inverse, units, importance[part])
        step = 1 if len(units.pools) <= _EXACT_UNITS else -(-len(units.pools) // 256)
        done = 0
        while done < removed:
            chosen, losses = state.cheapest(min(step, removed - done))
            state.eliminate(chosen)
            result.order[part, done : done + chosen.shape[1]] = chosen
            result.losses[part, done : done + chosen.shape[1]] = losses
            done += chosen.shape[1]
    # Rounding left about 1e-17 where nothing should be.
    columns = (result.order[:, :, None] * units.size + np.arange(units.size)).reshape(blocks, 1, -1)
    np.put_along_axis(result.weights, np.broadcast_to(columns, (blocks, rows, columns.shape[2])), 0.0, axis=2)
    return result


class _State:
    """Some blocks on their way; `weights` (B, R, K) is changed in place."""

    def __init__(self, weights: Float64, inverse: Float64, units: Units, importance: Float64) -> None:
        self.weights, self.inverse, self.units = weights, inverse, units
        blocks, _, size = weights.shape
        width, count = units.size, len(units.pools)
        self.importance = importance[:, :, None]
        self.every = np.arange(blocks)
        self.left = np.broadcast_to(units.quotas, (blocks, len(units.quotas))).copy()
        self.closed = np.broadcast_to(self.left[0][units.pools] == 0, (blocks, count)).copy()
        self.factor = np.empty((blocks, units.removed * width, size))
        self.used = 0
        if width == 1:
            self.diagonal = np.broadcast_to(np.diag(inverse), (blocks, size)).copy()
            self.floor = _TINY * float(np.diag(inverse).max())
        else:
            at = np.arange(count)
            corner = inverse.reshape(count, width, count, width)[at, :, at]
            self.corners = np.broadcast_to(corner, (blocks, *corner.shape)).copy()

    def costs(self) -> Float64:
        """Return what removing each unit would add to the error, (B, units); infinite where it may not be removed."""
        if self.units.size == 1:
            costs: Float64 = (self.importance * self.weights**2).sum(axis=1) / np.maximum(self.diagonal, self.floor)
        else:
            blocks, rows, _ = self.weights.shape
            split = self.weights.reshape(blocks, rows, *self.corners.shape[1:3]).transpose(0, 2, 3, 1)
            solved = np.linalg.solve(self.corners, split)
            costs = np.einsum("bnur,bnur,br->bn", split, solved, self.importance[:, :, 0])
        costs[self.closed] = np.inf
        return costs

    def cheapest(self, count: int) -> tuple[NDArray[np.intp], Float64]:
        """Choose up to `count` units of each block, no two of one pool unless there is only one pool."""
        costs = self.costs()
        if count == 1:
            chosen = costs.argmin(axis=1)[:, None]
        elif len(self.units.quotas) == 1:
            chosen = np.argpartition(costs, count - 1, axis=1)[:, :count]
        else:
            picks = []
            for row in costs:
                order = row.argsort(kind="stable")
                order = order[np.isfinite(row[order])]
                _, first = np.unique(self.units.pools[order], return_index=True)
                picks.append(order[np.sort(first)][:count])
            fewest = min(len(pick) for pick in picks)
            chosen = np.stack([pick[:fewest] for pick in picks])
        return chosen, np.take_along_axis(costs, chosen, axis=1)

    def eliminate(self, chosen: NDArray[np.intp]) -> None:
        """Remove units (B, count) of each block and let the weights that are left make up for them."""
        width = self.units.size
        if width == 1 and chosen.shape[1] == 1:
            self._eliminate_one(chosen[:, 0])
        else:
            columns = (chosen[:, :, None] * width + np.arange(width)).reshape(len(chosen), -1)
            self._eliminate_many(columns)
            if width > 1:  # what is gone must stay solvable
                self.corners[self.every[:, None], chosen] = np.eye(width)
        for pick in chosen.T:
            pools = self.units.pools[pick]
            self.left[self.every, pools] -= 1
            self.closed[self.every, pick] = True
            full = self.left[self.every, pools] == 0
            if full.any():
                self.closed |= full[:, None] & (self.units.pools == pools[:, None])

    def _eliminate_one(self, column: NDArray[np.intp]) -> None:
        every, used = self.every, self.used
        row: Float64 = self.inverse[column]
        if used:
            before = self.factor[:, :used]
            row = row - np.matmul(before[every, :, column][:, None], before)[:, 0]
        pivot = np.sqrt(np.maximum(row[every, column], self.floor))[:, None]
        row = row / pivot
        self.factor[:, used] = row
        self.used += 1
        self.diagonal -= row * row
        self.weights -= (self.weights[every, :, column] / pivot)[:, :, None] * row[:, None]

    def _eliminate_many(self, columns: NDArray[np.intp]) -> None:
        every, used, count = self.every[:, None], self.used, columns.shape[1]
        part: Float64 = self.inverse[columns]
        if used:
            before = self.factor[:, :used]
            part = part - np.matmul(before.transpose(0, 2, 1)[every, columns], before)
        corner = part.transpose(0, 2, 1)[every, columns]
        corner = 0.5 * (corner + corner.transpose(0, 2, 1))
        at = np.arange(count)
        corner[:, at, at] *= 1 + 1e-10
        lower = np.linalg.cholesky(corner)
        part = np.asarray(np.linalg.solve(lower, part), np.float64)
        self.factor[:, used : used + count] = part
        self.used += count
        gone = self.weights.transpose(0, 2, 1)[every, columns]  # (B, count, R)
        self.weights -= np.matmul(np.linalg.solve(lower, gone).transpose(0, 2, 1), part)
        if self.units.size == 1:
            self.diagonal -= np.einsum("bck,bck->bk", part, part)
        else:
            split = part.reshape(len(part), count, *self.corners.shape[1:3])
            self.corners -= np.einsum("bcnu,bcnv->bnuv", split, split)


def remove_by_columns(target: Float64, inverse: Float64, units: Units, width: int = 256) -> Float64:
    """`remove` for single output channels with very many columns: block of columns after block of columns.

    What has been passed stays as it is, so that all channels can share the inverse of what is to come. Within a block
    removal is exact.

    Parameters
    ----------
    target
        (OC, K).
    inverse
        Inverse of the Hessian, (K, K).
    units
        Of size 1; no pool may cross a multiple of `width`.
    width
        Columns in a block.

    Returns
    -------
    The compensated weights, (OC, K), zero where removed.
    """
    weights: Float64 = target.copy()
    upper = np.linalg.cholesky(inverse).T
    for start in range(0, weights.shape[1], width):
        stop = min(start + width, weights.shape[1])
        numbers, pools = np.unique(units.pools[start:stop], return_inverse=True)
        local = Units(1, pools, units.quotas[numbers])
        corner = upper[start:stop, start:stop]
        before = weights[:, start:stop]
        after = remove(before[:, None], corner.T @ corner, local).weights[:, 0]
        weights[:, stop:] += (after - before) @ np.linalg.solve(corner, upper[start:stop, stop:])
        weights[:, start:stop] = after
    return weights


def cheapest_prefixes(losses: Float64, sizes: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Share out removals among rows of blocks that each have an order of their own.

    Parameters
    ----------
    losses
        What each removal adds to the error, in the order of removal, (blocks, units).
    sizes
        Output channels of each row of blocks: a row's losses are compared per channel.
    count
        Removals in all.

    Returns
    -------
    How many removals each row makes, (blocks,): the cheapest next one, `count` times.
    """
    taken = np.zeros(len(losses), np.intp)
    heap = [(float(row[0] / size), index) for index, (row, size) in enumerate(zip(losses, sizes, strict=True))]
    heapq.heapify(heap)
    for _ in range(count):
        _, index = heapq.heappop(heap)
        taken[index] += 1
        if taken[index] < losses.shape[1]:
            heapq.heappush(heap, (float(losses[index, taken[index]] / sizes[index]), index))
    return taken
