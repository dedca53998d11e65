"""How much saliency a layer's mask keeps, and what is gained when two channels change places. Needs NumPy only.

A layer's *term* belongs to one set of channels that may change places, and to one axis of the layer's weight. Both
kinds give a matrix ``value[a, b]``: what channel a keeps, or lets the others keep, in the place of channel b.
Exchanging a and b then gains ``value[a, b] + value[b, a] - value[a, a] - value[b, b]``.

- Output channels in blocks (1xN, tile-shared N:M): channel a keeps what the mask of b's block row leaves of it. The
  masks are those of the present order. The best masks after the exchange can only keep more, so the gain is a lower
  bound: it finds the promising exchanges, and `OutputTerm.gains` computes what these really gain.
- Input channels in groups of M (N:M): a group keeps its n largest. Let t be the n-th largest of the others of b's
  group; with a among them the group keeps what the others keep of n - 1, plus max(a, t). The first part cancels out,
  so the value is the sum of max(a, t) over the weight's rows: exact, as long as no other exchange touches the two
  groups.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tvm_nm.masks import (
    block_row_sizes,
    keep_largest,
    largest_of_groups,
    reduce_block_rows,
    round_half_up,
    tail_quota,
)
from tvm_nm.patterns import NM, Granularity, OneByN, SparsityPattern, TileNM

__all__ = ["Axis", "Floats", "Indices", "InputTerm", "LayerState", "OutputTerm", "Term"]

Axis: TypeAlias = Literal["output", "input"]
Floats: TypeAlias = NDArray[np.float32]
Indices: TypeAlias = NDArray[np.intp]

_ALL = slice(None)
_CHUNK = 1 << 22
_FEATURES = 1 << 10  # columns of a block row that the search looks at, at least, if there are as many
_PRODUCTS = 1 << 33  # multiplications that comparing all channels with each other may cost
_ROWS = 1 << 9  # rows of the weight by which an exchange of input channels is judged


@dataclass(slots=True)
class LayerState:
    """A pruned layer, and the order that its channels are in by now.

    Attributes
    ----------
    weight
        (OC, IC / groups, KH, KW) as it was.
    pattern, density, groups
        What it is pruned to, and the convolution's groups.
    outputs, inputs
        By place: the channel of `weight` that stands there; (OC,) and (IC,), a group's channels within its places.
    """

    weight: NDArray[Any]
    pattern: SparsityPattern
    density: float
    groups: int
    outputs: Indices
    inputs: Indices

    @classmethod
    def start(cls, weight: NDArray[Any], pattern: SparsityPattern, density: float, groups: int) -> LayerState:
        """Return the state in which nothing has moved."""
        channels, inputs = weight.shape[0], weight.shape[1] * groups
        return cls(weight, pattern, density, groups, np.arange(channels), np.arange(inputs))

    def order(self, axis: Axis) -> Indices:
        """Order of one axis, to be changed in place."""
        return self.outputs if axis == "output" else self.inputs

    def in_one_group(self, axis: Axis, places: Indices) -> bool:
        """Whether places on an axis belong to one group of the convolution."""
        width = len(self.order(axis)) // self.groups
        return bool((places // width == places[0] // width).all())

    def saliency(self, group: int, rows: slice = _ALL, columns: Indices | slice = _ALL) -> Floats:
        """Absolute weights in the present order, as a new array.

        Parameters
        ----------
        group
            The group of the convolution.
        rows, columns
            Places of output and input channels within the group.
        """
        channels, width = len(self.outputs) // self.groups, self.weight.shape[1]
        outputs = self.outputs[group * channels : (group + 1) * channels][rows]
        inputs = (self.inputs[group * width : (group + 1) * width] % width)[columns]
        part = self.weight[outputs]  # rows first: they are contiguous
        if not np.array_equal(inputs, np.arange(width)):
            part = part[:, inputs]
        return np.asarray(np.abs(part), np.float32)

    def kept_share(self) -> float:
        """Share of the layer's saliency that its mask keeps in the present order."""
        channels = len(self.outputs) // self.groups
        parts: Iterable[tuple[Floats, int]]
        if isinstance(self.pattern, OneByN) and not self.pattern.balanced:
            parts = [(np.concatenate([self.saliency(group) for group in range(self.groups)]), self.groups)]
        else:
            # Block rows choose by themselves, so that a few at a time will do: a weight may have 400 MB.
            step = max(1, _CHUNK // self.weight[0].size // self.pattern.block) * self.pattern.block
            starts = itertools.product(range(self.groups), range(0, channels, step))
            parts = ((self.saliency(group, slice(start, start + step)), 1) for group, start in starts)
        kept = total = 0.0
        for saliency, groups in parts:
            mask = self.pattern.mask(saliency, self.density, groups)
            kept += float(saliency.sum(where=mask, dtype=np.float64))
            total += float(saliency.sum(dtype=np.float64))
        return kept / total if total else 1.0


class Term(ABC):
    """What one axis of one layer has to say about a set of channels, in the order that they are in by now."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers that stand for one channel."""

    @property
    @abstractmethod
    def features(self) -> Floats:
        """Saliency by channel of the set, (n, width)."""

    @abstractmethod
    def begin(self) -> None:
        """Look at the present order before exchanges are judged."""

    @abstractmethod
    def total(self) -> float:
        """Saliency kept in the present order."""

    @abstractmethod
    def values(self, chosen: Indices) -> Floats:
        """Return the matrix of values of the chosen channels, numbered within the set."""

    @abstractmethod
    def groups_of(self, chosen: Indices) -> Indices:
        """Return the block row or group of M that each channel is in."""

    @abstractmethod
    def arrange(self, order: Indices) -> None:
        """Put channels in another order: by place, the one that comes there."""


class OutputTerm(Term):
    """The output channels of a layer whose pattern shares its choices among blocks of them.

    Attributes
    ----------
    rows
        Block row of each channel of the set.
    """

    def __init__(self, layer: LayerState, places: Indices) -> None:
        channels = len(layer.outputs) // layer.groups
        group = int(places[0]) // channels
        self._pattern, self._density = layer.pattern, layer.density
        saliency = layer.saliency(group, columns=_sampled_inputs(layer, len(places)))
        if isinstance(layer.pattern, OneByN) and layer.pattern.granularity is Granularity.KERNEL:
            saliency = saliency.sum(axis=(2, 3), keepdims=True)
        self._shape = saliency.shape[1:]
        self._all = saliency.reshape(channels, -1)
        self._places = places - group * channels
        sizes = block_row_sizes(channels, layer.pattern.block)
        self.rows = np.repeat(np.arange(len(sizes)), sizes)[self._places]
        self._scores = self._kept = np.zeros((0, 0), np.float32)
        self._sums = np.zeros(0, np.float32)

    @property
    def features(self) -> Floats:
        found: Floats = self._all[self._places]
        return found

    @property
    def width(self) -> int:
        return int(self._all.shape[1])

    def choice(self, scores: Floats) -> Floats:
        """Mask, as 0 and 1, of all block rows or of some, given their sums of saliency; shapes (rows, F)."""
        pattern = self._pattern
        if isinstance(pattern, TileNM):
            mask = largest_of_groups(scores.reshape(len(scores), *self._shape), pattern.n, pattern.m)
        else:
            # Balanced rows are chosen one by one, as `OneByN` does; unbalanced ones compete.
            balanced = isinstance(pattern, OneByN) and pattern.balanced
            flat = scores if balanced else scores.reshape(1, -1)
            mask = keep_largest(flat, max(1, round_half_up(self._density * flat.shape[1])))
        return mask.reshape(scores.shape).astype(np.float32)

    def begin(self) -> None:
        self._scores = reduce_block_rows(np.add, self._all, self._pattern.block)
        self._sums = self._kept_by(self._scores)
        self._kept = self.choice(self._scores)

    def values(self, chosen: Indices) -> Floats:
        rows = self.rows[chosen]
        needed, index = np.unique(rows, return_inverse=True)
        products: Floats = self._all[self._places[chosen]] @ self._kept[needed].T
        return products[:, index]

    def arrange(self, order: Indices) -> None:
        self._all[self._places] = self._all[self._places[order]]

    def total(self) -> float:
        return float(self._kept_by(reduce_block_rows(np.add, self._all, self._pattern.block)).sum(dtype=np.float64))

    def gains(self, first: Indices, second: Indices) -> Floats | None:
        """Return what each exchange gains if it is the only one in its two block rows; None if `values` says it all."""
        if isinstance(self._pattern, OneByN) and not self._pattern.balanced:
            return None
        gains = np.zeros(len(first), np.float32)
        step = max(1, _CHUNK // self._all.shape[1])
        for start in range(0, len(first), step):
            a, b = first[start : start + step], second[start : start + step]
            change = self._all[self._places[b]] - self._all[self._places[a]]
            of_a, of_b = self.rows[a], self.rows[b]
            gains[start : start + step] = (
                self._kept_by(self._scores[of_a] + change)
                + self._kept_by(self._scores[of_b] - change)
                - self._sums[of_a]
                - self._sums[of_b]
            )
        gains[self.rows[first] == self.rows[second]] = 0
        return gains

    def groups_of(self, chosen: Indices) -> Indices:
        rows: Indices = self.rows[chosen]
        return rows

    def _kept_by(self, scores: Floats) -> Floats:
        """Saliency that each of some block rows keeps."""
        pattern = self._pattern
        if isinstance(pattern, OneByN) and pattern.balanced:
            width = scores.shape[1]
            count = max(1, round_half_up(self._density * width))
            dropped = max(0, width - count)
            kept = np.partition(scores, dropped, axis=1)[:, dropped:]
        else:
            kept = self.choice(scores) * scores
        sums: Floats = kept.sum(axis=1)
        return sums


class InputTerm(Term):
    """The input channels of a layer whose pattern keeps N of every M consecutive ones."""

    def __init__(self, layer: LayerState, places: Indices, rng: np.random.Generator) -> None:
        pattern = layer.pattern
        assert isinstance(pattern, NM | TileNM)
        width = layer.weight.shape[1]
        group = int(places[0]) // width
        saliency = layer.saliency(group)
        if pattern.block > 1:
            saliency = reduce_block_rows(np.add, saliency, pattern.block)
        # A row for each input channel, so that two of them are compared along contiguous memory.
        columns = np.ascontiguousarray(saliency.transpose(1, 0, 2, 3).reshape(width, -1))
        if columns.shape[1] > _ROWS:
            columns = columns[:, np.sort(rng.choice(columns.shape[1], _ROWS, replace=False))]
        self._n, self._m = pattern.n, pattern.m
        self._columns = columns
        self._places = places - group * width
        self._rest = np.zeros((0, 0), np.float32)

    @property
    def features(self) -> Floats:
        found: Floats = self._columns[self._places]
        return found

    @property
    def seats(self) -> Indices:
        """Place of each channel within its group of M."""
        seats: Indices = self._places % self._m
        return seats

    @property
    def width(self) -> int:
        return int(self._columns.shape[1])

    def begin(self) -> None:
        width, m = len(self._columns), self._m
        self._rest = np.empty_like(self._columns)
        whole = width // m * m
        if whole:
            members = self._columns[:whole].reshape(whole // m, m, -1)
            self._rest[:whole] = _nth_of_others(members, self._n).reshape(whole, -1)
        if whole < width:
            tail = self._columns[None, whole:]
            self._rest[whole:] = _nth_of_others(tail, tail_quota(width - whole, self._n, m))[0]

    def values(self, chosen: Indices) -> Floats:
        places = self._places[chosen]
        columns, rest = self._columns[places], self._rest[places]
        values = np.empty((len(chosen), len(chosen)), np.float32)
        ones = np.ones(columns.shape[1], np.float32)
        scratch = np.empty_like(columns)
        for b, threshold in enumerate(rest):
            np.maximum(columns, threshold, out=scratch)
            values[:, b] = scratch @ ones
        return values

    def arrange(self, order: Indices) -> None:
        self._columns[self._places] = self._columns[self._places[order]]

    def total(self) -> float:
        columns = self._columns.T[:, :, None, None]
        return float(columns.sum(where=largest_of_groups(columns, self._n, self._m), dtype=np.float64))

    def groups_of(self, chosen: Indices) -> Indices:
        groups: Indices = self._places[chosen] // self._m
        return groups


def _nth_of_others(members: Floats, n: int) -> Floats:
    """For each member of a group, row by row, the n-th largest of the others; 0 where there are fewer.

    `members` has shape (groups, members, rows), as the result.
    """
    groups, size, rows = members.shape
    if size <= n:
        return np.zeros_like(members)
    largest = [np.zeros((groups, rows), np.float32) for _ in range(n + 1)]  # descending
    for k in range(size):
        value = members[:, k]
        for i in range(n + 1):
            value, largest[i] = np.minimum(largest[i], value), np.maximum(largest[i], value)
    nth, next_one = largest[n - 1][:, None], largest[n][:, None]
    return np.where(members >= nth, next_one, nth)


def _sampled_inputs(layer: LayerState, size: int) -> Indices | slice:
    """Input channels of a group that the search looks at, whole groups of M: all, or evenly spaced ones."""
    pattern, (_, width, height, breadth) = layer.pattern, layer.weight.shape
    area = 1 if isinstance(pattern, OneByN) and pattern.granularity is Granularity.KERNEL else height * breadth
    unit = pattern.m if isinstance(pattern, TileNM) else 1
    wanted, there = max(1, max(_FEATURES, _PRODUCTS // size**2) // area // unit), width // unit
    if there <= wanted:
        return _ALL
    firsts = np.linspace(0, there - 1, wanted).astype(np.intp) * unit
    return (firsts[:, None] + np.arange(unit)).reshape(-1)
