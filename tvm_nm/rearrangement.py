"""The search for an order of channels in which the sparsity patterns keep more saliency. Needs NumPy only.

What may move is given as `FreeChannels`: channels that may change places, and where they stand on the axes of layers
(`tvm_nm.passes.rearrange` finds that out). The measure is the one the pruner has: the sum of the absolute weights that
the plan's masks keep, over all layers that the channels belong to, as a share of each layer's sum.

- ``sort``: by the L1 norm of what a channel is computed from, the largest first (Lin et al., "1xN Pattern for Pruning
  Convolutional Neural Networks", TPAMI 2022). Blocks then differ by their weights' size; input channels of N:M
  groups are dealt out in turns, so that every group gets large and small ones.
- ``cluster``: block rows are filled, one channel after the other, with those whose large weights stand in the same
  columns.
- ``swap``: exchanges of two channels, the best ones of a matrix of all gains at a time, starting from the best of the
  given order and the two above. For N:M this is the search of Pool and Yu, "Channel Permutations for N:M Sparsity"
  (NeurIPS 2021), on all pairs instead of two groups at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import numpy as np

from tvm_nm.patterns import NM, TileNM
from tvm_nm.rearrangement_terms import Axis, Floats, Indices, InputTerm, LayerState, OutputTerm, Term

__all__ = ["SEARCHES", "ChannelTie", "FreeChannels", "OrderSearch", "check_search", "search_orders"]

OrderSearch: TypeAlias = Literal["none", "sort", "cluster", "swap"]
SEARCHES: tuple[str, ...] = get_args(OrderSearch)

_ROUNDS = 40
_FEWEST = 3
_WORK = 1 << 27  # numbers that all rounds of a set may look at, half a second; a set gets at least the fewest rounds
_CHUNK = 128  # channels whose exchanges among each other are looked at together, where that is expensive
_CANDIDATES = 4  # exchanges of each channel whose gain in block rows is computed, not estimated
_SEED = 0
_TINY = 1e-6  # an exchange that gains less than this share of all that is kept is noise of float32 sums
_WORTH = 3e-5  # a round that gains a smaller share is the last one


def check_search(name: str) -> OrderSearch:
    """Return the method of that name.

    Raises
    ------
    ValueError
        If there is none.
    """
    for method in get_args(OrderSearch):
        if name == method:
            return cast(OrderSearch, name)
    raise ValueError(f"no such rearrangement: {name!r}; there are {', '.join(SEARCHES)}")


@dataclass(frozen=True, slots=True)
class ChannelTie:
    """Where a set of channels stands on one axis of a layer's weight.

    Attributes
    ----------
    layer
        The layer's name.
    axis
        "output" or "input".
    places
        By channel of the set, its place on that axis, all groups of the convolution counted; (n,). Channels that stand
        in several places of a layer have several ties.
    """

    layer: str
    axis: Axis
    places: Indices


@dataclass(frozen=True, slots=True)
class FreeChannels:
    """Channels that may change places with each other, wherever they stand.

    Attributes
    ----------
    size
        Their number.
    ties
        Where they stand.
    """

    size: int
    ties: tuple[ChannelTie, ...]


def search_orders(layers: Mapping[str, LayerState], free: Sequence[FreeChannels], method: OrderSearch) -> list[Indices]:
    """Search an order for each set of channels.

    Parameters
    ----------
    layers
        The pruned layers by name; brought into the new order.
    free
        The sets; their ties may name layers that are not pruned, which do not count.
    method
        How to search.

    Returns
    -------
    For each set, by place, the channel that stands there in the end; (size,).
    """
    orders = [np.arange(channels.size) for channels in free]
    if method == "none":
        return orders
    # Where a pattern looks at both axes, one's best order depends on the other's.
    passes = 2 if method == "swap" and any(isinstance(s.pattern, TileNM) for s in layers.values()) else 1
    rng = np.random.default_rng(_SEED)
    for _ in range(passes):
        for order, channels in zip(orders, free, strict=True):
            ties = [tie for tie in channels.ties if tie.layer in layers]
            found = _search_set(channels.size, layers, ties, method, rng)
            if found is None:
                continue
            for tie in ties:
                axis = layers[tie.layer].order(tie.axis)
                axis[tie.places] = axis[tie.places[found]]
            order[:] = order[found]
    return orders


class _Terms:
    """All that has a say in the order of one set."""

    def __init__(
        self, size: int, layers: Mapping[str, LayerState], ties: Sequence[ChannelTie], rng: np.random.Generator
    ) -> None:
        self.size = size
        self.threshold = 0.0
        # The channels of a depthwise convolution are a group each, and nothing is chosen among them.
        ties = [tie for tie in ties if layers[tie.layer].in_one_group(tie.axis, tie.places)]
        self.outputs = [
            OutputTerm(layers[tie.layer], tie.places)
            for tie in ties
            if tie.axis == "output" and layers[tie.layer].pattern.block > 1
        ]
        # A flattened channel fills whole groups of M by itself; there is next to nothing to gain.
        inputs = [tie for tie in ties if tie.axis == "input" and isinstance(layers[tie.layer].pattern, NM | TileNM)]
        times = {tie.layer: sum(other.layer == tie.layer for other in inputs) for tie in inputs}
        self.inputs = [InputTerm(layers[tie.layer], tie.places, rng) for tie in inputs if times[tie.layer] == 1]
        self.all: tuple[Term, ...] = (*self.outputs, *self.inputs)

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def work(self) -> int:
        """Numbers that a round looks at."""
        looks = [4 * _CANDIDATES * term.width for term in self.outputs] + [_CHUNK * term.width for term in self.inputs]
        # Matrices of all pairs are gone through several times for each term.
        return self.size * (sum(looks) + 6 * len(self.all) * (min(self.size, _CHUNK) if self.inputs else self.size))

    def begin(self) -> None:
        """Look at the present order before a round of exchanges."""
        for term in self.all:
            term.begin()

    def total(self) -> float:
        """Saliency kept in the present order."""
        return sum(term.total() for term in self.all)

    def arrange(self, order: Indices) -> None:
        """Put the channels in another order."""
        for term in self.all:
            term.arrange(order)

    def exchanges(self, chosen: Indices) -> tuple[Indices, float]:
        """Return the best exchanges that do not disturb each other, as (pairs, 2), and what they gain together."""
        estimate = np.zeros((len(chosen), len(chosen)), np.float32)
        for term in self.outputs:
            estimate += _gains(term.values(chosen))
        exact = np.zeros_like(estimate)
        for dealt in self.inputs:
            gain = _gains(dealt.values(chosen))
            seats = dealt.groups_of(chosen)
            gain[seats[:, None] == seats] = 0
            exact += gain
        # Within a block row and a group of M the order does not matter.
        groups = [term.groups_of(chosen) for term in self.all]
        together = np.logical_and.reduce([group[:, None] == group for group in groups])
        first, second = _promising(np.where(together, -np.inf, estimate + exact))
        gains = exact[first, second]
        for term in self.outputs:
            known = term.gains(chosen[first], chosen[second])
            gains += estimate[first, second] if known is None else known
        return self._disjoint(chosen[first], chosen[second], gains)

    def _disjoint(self, first: Indices, second: Indices, gains: Floats) -> tuple[Indices, float]:
        """Choose exchanges, the best first, so that each block row and each group of M takes part in one."""
        groups = [term.groups_of(np.arange(self.size)) for term in self.all]
        taken: list[set[int]] = [set() for _ in groups]
        pairs, gained = [], 0.0
        worthwhile = np.flatnonzero(gains > self.threshold)
        for index in worthwhile[np.argsort(-gains[worthwhile], kind="stable")].tolist():
            a, b = int(first[index]), int(second[index])
            touched = [{int(group[a]), int(group[b])} for group in groups]
            if any(t & used for t, used in zip(touched, taken, strict=True)):
                continue
            for t, used in zip(touched, taken, strict=True):
                used |= t
            pairs.append((a, b))
            gained += float(gains[index])
        return np.array(pairs, np.intp).reshape(-1, 2), gained


def _gains(values: Floats) -> Floats:
    own = values.diagonal()
    gains: Floats = values + values.T - (own[:, None] + own)
    return gains


def _promising(gain: Floats) -> tuple[Indices, Indices]:
    """Return the pairs with the largest gains, some for each channel."""
    size = len(gain)
    count = min(_CANDIDATES, size)
    partner = np.argpartition(gain, size - count, axis=1)[:, size - count :].reshape(-1)
    own = np.repeat(np.arange(size), count)
    keys = np.unique(np.minimum(own, partner) * size + np.maximum(own, partner))
    return keys // size, keys % size


def _search_set(
    size: int,
    layers: Mapping[str, LayerState],
    ties: Sequence[ChannelTie],
    method: OrderSearch,
    rng: np.random.Generator,
) -> Indices | None:
    """Return the order of one set, None where nothing depends on it."""
    terms = _Terms(size, layers, ties, rng)
    if not terms:
        return None
    if method == "sort":
        return _sorted(terms)
    if method == "cluster":
        return _clustered(terms)
    best, best_total = np.arange(size), terms.total()
    terms.threshold = _TINY * best_total / size
    for start in (_sorted(terms), _clustered(terms)):
        if start is not None:
            terms.arrange(start)
            total = terms.total()
            terms.arrange(np.argsort(start))
            if total > best_total:
                best, best_total = start, total
    terms.arrange(best)
    return best[_improved(terms, best_total, rng)]


def _improved(terms: _Terms, total: float, rng: np.random.Generator) -> Indices:
    """Exchange channels for as long as it pays; returns the order relative to the present one."""
    order = np.arange(terms.size)
    parts = max(1, round(terms.size / _CHUNK)) if terms.inputs else 1
    for _ in range(min(_ROUNDS, max(_FEWEST, _WORK // terms.work))):
        gained = 0.0
        for chosen in np.array_split(rng.permutation(terms.size), parts):
            terms.begin()
            pairs, gain = terms.exchanges(np.sort(chosen))
            step = np.arange(terms.size)
            step[pairs] = pairs[:, ::-1]
            terms.arrange(step)
            order = order[step]
            gained += gain
        if gained < _WORTH * total:
            break
    return order


def _sorted(terms: _Terms) -> Indices:
    """By L1 norm; where there are no block rows, dealt out to the groups of M."""
    if terms.outputs:
        norms = sum(term.features.sum(axis=1, dtype=np.float64) for term in terms.outputs)
        return np.argsort(-norms, kind="stable")
    norms = sum(term.features.sum(axis=1, dtype=np.float64) for term in terms.inputs)
    places = np.lexsort([terms.inputs[0].groups_of(np.arange(terms.size)), terms.inputs[0].seats])
    order = np.empty(terms.size, np.intp)
    order[places] = np.argsort(-norms, kind="stable")
    return order


def _clustered(terms: _Terms) -> Indices | None:
    """Fill block row after block row with channels whose large weights stand in the same columns."""
    if not terms.outputs:
        return None
    likeness = np.zeros((terms.size, terms.size), np.float32)
    for term in terms.outputs:
        features = term.features
        kept = term.choice(features)
        likeness += features @ (kept - kept.mean(axis=1, keepdims=True)).T
    likeness += likeness.T.copy()
    strength = likeness.diagonal().copy()
    widest = max(terms.outputs, key=lambda term: int(np.bincount(term.rows).max()))
    order = np.empty(terms.size, np.intp)
    free = np.ones(terms.size, np.bool_)
    for row in np.unique(widest.rows):
        score = strength
        for number, place in enumerate(np.flatnonzero(widest.rows == row)):
            chosen = int(np.where(free, score, -np.inf).argmax())
            order[place], free[chosen] = chosen, False
            score = likeness[chosen] if number == 0 else score + likeness[chosen]
    return order
