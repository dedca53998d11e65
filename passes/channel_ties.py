"""Which channels of a network must move together, and which may change places: bookkeeping without an operator's name.

Every channel that a layer computes gets a number, its *label*. A tensor carries one label for each of its elements, as
an array with size 1 along the axes where it does not vary: (1, C, 1, 1) behind a convolution, (1, G, C / G, 1, 1)
within a channel shuffle, (1, C * H * W) once flattened. What an operator does to its data it does to the labels.

- An elementwise operator of two tensors makes the labels that meet one (`Ties.unite`).
- Where an operator reads a channel by its place (a network's output, an operator that is not known), the label is
  pinned (`Ties.pin`).
- Everything else that tells channels apart is *noted* as a number for each of them (`Ties.note`): which group of a
  convolution they are in, which slice takes them, where in the concatenation they stand.

In the end (`Ties.solve`), united labels are one *channel class*. Two classes may change places if nothing that was
noted tells them apart: then each operator finds them in corresponding places, and every tensor whose elements follow
their classes is the original one in another order. The classes that may change places with each other are a
`ChannelSet`.

A class may stand in several places of one tensor (all the pixels of a flattened channel, both halves of
``concat(x, x)``). Then its k-th place corresponds to the k-th of the class that it changes places with; that operators
respect this is among what is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["PINNED", "ChannelSet", "Indices", "Solution", "Ties", "compressed", "places_along", "residual"]

Indices: TypeAlias = NDArray[np.int64]

PINNED = 0
"""The label of everything that never moves: inputs, constants, padding."""


@dataclass(frozen=True, slots=True)
class ChannelSet:
    """Channel classes that may change places with each other.

    Attributes
    ----------
    classes
        Their numbers, ascending; at least two.
    """

    classes: tuple[int, ...]


class Ties:
    """Labels, what unites them, and what tells them apart."""

    def __init__(self) -> None:
        self._parents = [PINNED]
        self._pins: list[tuple[Indices, str]] = []
        self._notes: list[tuple[Indices, list[Any]]] = []

    def new(self, count: int) -> Indices:
        """Return labels that nobody has."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def unite(self, first: Indices, second: Indices, reason: str) -> None:
        """Make the labels of two arrays of one shape the same, one by one; `reason` pins what meets `PINNED`."""
        different = (first != second).reshape(-1)
        pairs = np.unique(np.stack([first.reshape(-1)[different], second.reshape(-1)[different]]), axis=1)
        with_pinned = (pairs == PINNED).any(axis=0)
        self.pin(pairs[:, with_pinned], reason)
        for a, b in pairs[:, ~with_pinned].T.tolist():
            root_a, root_b = self._root(a), self._root(b)
            self._parents[max(root_a, root_b)] = min(root_a, root_b)

    def pin(self, labels: Indices, reason: str) -> None:
        """Keep channels in their places; `reason` says why."""
        self._pins.append((labels.reshape(-1), reason))

    def note(self, labels: Indices, *marks: Indices) -> None:
        """Tell the channels of a tensor apart: each mark is an array with a number for each of `labels`."""
        self._notes.append((labels.reshape(-1), [_Rank(labels, np.arange(labels.size)), *marks]))

    def move(
        self,
        source: Indices,
        target: Indices,
        origin: Indices,
        place: Indices | None = None,
        *marks: Indices,
    ) -> None:
        """Note that an operator takes elements of one tensor to another.

        Parameters
        ----------
        source, target
            The labels of the two tensors, of any shape.
        origin
            For each element that is taken, its flat index in `source`.
        place
            For each, its flat index in `target`; None for 0, 1, 2, ...
        marks
            What distinguishes elements beyond that, such as the pixel where labels are by channel.
        """
        place = np.arange(target.size) if place is None else place.reshape(-1)
        labels = target.reshape(-1)[place]
        self._notes.append((labels, [_Rank(target, place), _Rank(source, origin.reshape(-1)), *marks]))

    def _root(self, label: int) -> int:
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def solve(self) -> Solution:
        """Return the classes and which of them may change places."""
        roots = np.array([self._root(label) for label in range(len(self._parents))])
        reasons: dict[int, str] = {PINNED: "its channels are not computed by a layer"}
        for labels, reason in self._pins:
            for root in np.unique(roots[labels]).tolist():
                reasons.setdefault(root, reason)
        # What tells a class apart is a multiset of tuples; the sum of their hashes stands for it.
        signatures = np.zeros(len(roots), np.uint64)
        for number, (labels, marks) in enumerate(self._notes):
            mixed = np.full(labels.shape, number + 1, np.uint64)
            for mark in marks:
                value = mark.numbers(roots) if isinstance(mark, _Rank) else np.asarray(mark)
                mixed = _hash(mixed ^ _hash(value.reshape(-1).astype(np.uint64)))
            np.add.at(signatures, roots[labels], mixed)
        free: dict[int, list[int]] = {}
        for root in np.unique(roots).tolist():
            if root not in reasons:
                free.setdefault(int(signatures[root]), []).append(root)
        sets = tuple(ChannelSet(tuple(classes)) for classes in free.values() if len(classes) > 1)
        for alone in (classes[0] for classes in free.values() if len(classes) == 1):
            reasons[alone] = "no other channel is used in the same way"
        return Solution(roots, sets, reasons)


@dataclass(frozen=True, slots=True)
class Solution:
    """What `Ties.solve` found.

    Attributes
    ----------
    roots
        Class of each label.
    sets
        The classes that may change places.
    reasons
        Why a class is in none of the sets.
    """

    roots: Indices
    sets: tuple[ChannelSet, ...]
    reasons: dict[int, str]

    def source(self, labels: Indices, content: Indices) -> Indices:
        """Return where the elements of a rearranged tensor come from.

        Parameters
        ----------
        labels
            The tensor's labels.
        content
            By class: the class whose channel is found in its place after the rearrangement.

        Returns
        -------
        Flat indices into `labels`, one for each of its elements.
        """
        classes = self.roots[labels.reshape(-1)]
        ranks = _ranks(classes)
        # A class and the number of its occurrence name a place.
        width = int(ranks.max(initial=0)) + 1
        keys = classes * width + ranks
        order = np.argsort(keys)
        found = np.searchsorted(keys[order], content[classes] * width + ranks)
        return order[found]


@dataclass(frozen=True, slots=True)
class _Rank:
    """The number of an element among those of its class, in the order of the array."""

    labels: Indices
    places: Indices

    def numbers(self, roots: Indices) -> Indices:
        return _ranks(roots[self.labels.reshape(-1)])[self.places]


def _ranks(classes: Indices) -> Indices:
    """Count, for each element, the equal ones before it."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.append(starts, len(ordered)))
    ranks = np.empty(len(classes), np.int64)
    ranks[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return ranks


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each value (SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
        return mixed


def compressed(labels: Indices) -> Indices:
    """Cut the axes along which labels do not vary down to size 1."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1:
            first = labels.take([0], axis=axis)
            if (labels == first).all():
                labels = first
    return labels


def places_along(labels: Indices, shape: Sequence[int]) -> Indices:
    """Flat index into compressed labels for each element of a tensor of `shape`, in that shape."""
    return np.broadcast_to(np.arange(labels.size).reshape(labels.shape), tuple(shape))


def residual(labels: Indices, shape: Sequence[int]) -> Indices:
    """Return each element's number within the axes along which labels do not vary, for a tensor of `shape`."""
    rest = [1 if own > 1 else full for own, full in zip(labels.shape, shape, strict=True)]
    return np.broadcast_to(np.arange(int(np.prod(rest))).reshape(rest), tuple(shape))
