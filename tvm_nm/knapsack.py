"""The dynamic program behind the planner: one choice a layer, costs in whole buckets, rounded up. NumPy only.

``best[t]`` is the least loss of the layers so far whose costs come to at most ``t`` buckets; a layer turns it into
``min over candidates of best[t - cost] + loss``. With a limit on memory or MACs the array has a second axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "Member", "Tables", "pareto_points", "solve_blocks", "within_limits"]

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Member:
    """A layer.

    Attributes
    ----------
    layer
        Its index.
    times, losses, extras
        By candidate; extras are what counts towards the second limit, zeros where there is none.
    allowed
        Indices of the candidates that may be taken.
    """

    layer: int
    times: Floats
    losses: Floats
    extras: Floats
    allowed: Indices

    @property
    def base(self) -> tuple[float, float]:
        """Least time and least extra of an allowed candidate: only what is above them is put into buckets."""
        return float(self.times[self.allowed].min()), float(self.extras[self.allowed].min())


@dataclass(frozen=True, slots=True)
class Block:
    """Layers that choose together.

    Attributes
    ----------
    members
        The layers.
    branches
        What they may choose: one of the branches, and in it for each member one of the candidates listed.
    """

    members: tuple[Member, ...]
    branches: tuple[tuple[Indices, ...], ...]

    @property
    def base_time(self) -> float:
        """Sum of the members' least times, whether or not they go together."""
        return sum(member.base[0] for member in self.members)

    @property
    def least_time(self) -> float:
        """Least time of a branch."""
        return min(self._sum(branch, "times", np.min) for branch in self.branches)

    @property
    def most_time(self) -> float:
        """Largest time that any branch can take."""
        return max(self._sum(branch, "times", np.max) for branch in self.branches)

    @property
    def least_extra(self) -> float:
        """Least extra of a branch."""
        return min(self._sum(branch, "extras", np.min) for branch in self.branches)

    def _sum(self, branch: tuple[Indices, ...], what: str, reduce: np.ufunc | object) -> float:
        pairs = zip(self.members, branch, strict=True)
        return float(sum(reduce(getattr(member, what)[choices]) for member, choices in pairs))  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class _Step:
    """Which candidate every cell took, for one member in one branch, and what the candidates cost."""

    member: Member
    choice: NDArray[np.int16]
    costs: tuple[Indices, ...]


@dataclass(frozen=True, slots=True)
class Tables:
    """The filled dynamic program.

    Attributes
    ----------
    best
        Least loss by buckets; infinite where nothing fits.
    buckets
        Buckets that the limits stand for, by axis; the array goes further by one bucket a layer.
    """

    best: Floats
    buckets: tuple[int, ...]
    _steps: list[list[list[_Step]]] = field(repr=False)
    _branches: list[NDArray[np.int16]] = field(repr=False)


def solve_blocks(blocks: Sequence[Block], rooms: Sequence[float], buckets: Sequence[int]) -> Tables:
    """Fill the dynamic program.

    Parameters
    ----------
    blocks
        The layers.
    rooms
        What may be spent above the members' bases, by axis: time, and the extra where it is limited.
    buckets
        Number of buckets by axis.
    """
    layers = sum(len(block.members) for block in blocks)
    shape = tuple(count + layers + 1 for count in buckets)
    widths = [room / count if room > 0 else 0.0 for room, count in zip(rooms, buckets, strict=True)]
    best = np.zeros(shape)
    steps: list[list[list[_Step]]] = []
    taken: list[NDArray[np.int16]] = []
    for block in blocks:
        results, paths = [], []
        for branch in block.branches:
            current, path = best, []
            for member, choices in zip(block.members, branch, strict=True):
                costs = _bucket_costs(member, widths, shape)
                current, choice = _apply(current, member, _worth(member, choices, len(rooms)), costs)
                path.append(_Step(member, choice, costs))
            results.append(current)
            paths.append(path)
        if len(results) == 1:
            best, which = results[0], np.zeros(0, dtype=np.int16)
        else:
            stack = np.stack(results)
            which = stack.argmin(axis=0).astype(np.int16)
            best = stack.min(axis=0)
        steps.append(paths)
        taken.append(which)
    return Tables(best, tuple(buckets), steps, taken)


def within_limits(tables: Tables, blocks: Sequence[Block], rooms: Sequence[float]) -> Indices:
    """Return choices that keep the limits, as rows of candidate indices; the best of them is the solution.

    Cells up to one bucket a layer beyond the limits are looked at, too: rounding up may have put there what meets them.
    """
    axes = [np.arange(count, size) for count, size in zip(tables.buckets, tables.best.shape, strict=True)]
    cells = [grid.ravel() for grid in np.meshgrid(*axes, indexing="ij")]
    return _meeting(tables, blocks, cells, rooms)


def pareto_points(tables: Tables, blocks: Sequence[Block], extra_rooms: Sequence[float]) -> Indices:
    """Return the choices of every time bucket at which the loss falls, as rows of candidate indices.

    Parameters
    ----------
    tables, blocks
        The filled dynamic program.
    extra_rooms
        What may be spent of the extra, where it is limited.
    """
    lines = tables.best[:, tables.buckets[1] :] if extra_rooms else tables.best
    falls = np.isfinite(lines)
    falls[1:] &= lines[1:] < lines[:-1]
    cells = list(np.nonzero(falls))
    if extra_rooms:
        cells[1] += tables.buckets[1]
    return _meeting(tables, blocks, cells, [np.inf, *extra_rooms])


def _meeting(tables: Tables, blocks: Sequence[Block], cells: list[Indices], rooms: Sequence[float]) -> Indices:
    finite = np.isfinite(tables.best[tuple(cells)])
    cells = [cell[finite] for cell in cells]
    rows = _backtrack(tables, blocks, cells)
    spent = np.zeros((len(rooms), len(rows)))
    for block in blocks:
        for member in block.members:
            index = rows[:, member.layer]
            spent[0] += member.times[index] - member.base[0]
            if len(rooms) > 1:
                spent[1] += member.extras[index] - member.base[1]
    # The last digits of sums in another order are no excess.
    meets = np.all(spent <= np.array(rooms)[:, None] + 1e-9 * np.maximum(1.0, spent), axis=0)
    return np.unique(rows[meets], axis=0) if meets.any() else rows[:0]


def _backtrack(tables: Tables, blocks: Sequence[Block], cells: list[Indices]) -> Indices:
    layers = sum(len(block.members) for block in blocks)
    rows = np.zeros((len(cells[0]), layers), dtype=np.intp)
    cells = [cell.copy() for cell in cells]
    for paths, which in zip(reversed(tables._steps), reversed(tables._branches), strict=True):
        branch = which[tuple(cells)] if len(paths) > 1 else np.zeros(len(rows), dtype=np.int16)
        for number, path in enumerate(paths):
            lines = np.flatnonzero(branch == number)
            for step in reversed(path):
                chosen = step.choice[tuple(cell[lines] for cell in cells)].astype(np.intp)
                rows[lines, step.member.layer] = chosen
                for cell, costs in zip(cells, step.costs, strict=True):
                    cell[lines] -= costs[chosen]
    return rows


def _bucket_costs(member: Member, widths: Sequence[float], shape: Sequence[int]) -> tuple[Indices, ...]:
    """Costs above the member's base in buckets, rounded up; what cannot fit costs the whole axis."""
    costs = []
    for values, base, width, size in zip((member.times, member.extras), member.base, widths, shape, strict=False):
        above = np.maximum(values - base, 0.0)  # candidates that are not allowed may be below
        scaled = np.divide(above, width, out=np.where(above > 0, np.inf, 0.0), where=width > 0)
        costs.append(np.minimum(np.ceil(scaled), size).astype(np.intp))
    return tuple(costs)


def _worth(member: Member, choices: Indices, axes: int) -> Indices:
    """Drop candidates that another one of the branch beats or equals in everything; the fastest comes first."""
    columns = [member.times[choices], member.losses[choices], *([member.extras[choices]] if axes > 1 else [])]
    order = np.lexsort(columns[::-1])
    kept: list[int] = []
    for position in order:
        if not any(all(column[other] <= column[position] for column in columns) for other in kept):
            kept.append(int(position))
    return choices[kept]


def _apply(
    best: Floats, member: Member, choices: Indices, costs: tuple[Indices, ...]
) -> tuple[Floats, NDArray[np.int16]]:
    result = np.full_like(best, np.inf)
    choice = np.zeros(best.shape, dtype=np.int16)
    for index in choices:
        shift = [int(cost[index]) for cost in costs]
        if any(step >= size for step, size in zip(shift, best.shape, strict=True)):
            continue
        source = best[tuple(slice(0, size - step) for step, size in zip(shift, best.shape, strict=True))]
        target = tuple(slice(step, None) for step in shift)
        moved = source + member.losses[index]
        better = moved < result[target]
        np.copyto(result[target], moved, where=better)
        choice[target][better] = index
    return result, choice
