"""Sparsity patterns: which weights of a layer may be dropped together, and the mask that drops the least of it.

Needs NumPy only. Weights have shape ``(OC, IC / groups, KH, KW)``; a fully connected layer is ``(OUT, K, 1, 1)``.
``docs/patterns.md`` shows each pattern in a picture. N:M on CPUs is from Wu, Hong, Liu and Wu, "Exploiting
Fine-Grained Structured Pruning for Efficient Inference on CNN Model" (ICPADS 2023); 1xN blocks are from Lin et al.,
"1xN Pattern for Pruning Convolutional Neural Networks" (TPAMI 2022).
"""

from __future__ import annotations

import enum
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.masks import (
    BoolArray,
    block_row_sizes,
    keep_largest,
    largest_of_groups,
    reduce_block_rows,
    round_half_up,
    spread_rows,
)

__all__ = [
    "MAX_BLOCK",
    "MAX_GROUP",
    "NM",
    "PATTERN_FORMS",
    "Dense",
    "Granularity",
    "OneByN",
    "SparsityPattern",
    "TileNM",
    "parse_pattern",
]

MAX_BLOCK = 32
"""Largest number of output channels that can share one choice."""
MAX_GROUP = 32
"""Largest M of N:M."""
PATTERN_FORMS = (
    "dense, 2:4 (N:M), 2:4t8 (N:M shared by 8 output channels), 1x16 (whole kernels), 1x16p (positions), "
    "1x16u and 1x16pu (ranked over the layer)"
)
"""The text forms that `parse_pattern` reads, for error messages and help texts."""


class Granularity(enum.Enum):
    """What a 1xN block holds of the kernel: all of it, or one position."""

    KERNEL = "kernel"
    POSITION = "position"


class SparsityPattern(ABC):
    """A rule for which weights of one layer are kept; the base of `Dense`, `NM`, `TileNM` and `OneByN`.

    Patterns are immutable and hashable, and ``str(pattern)`` is the text form that `parse_pattern` reads back.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def block(self) -> int:
        """Number of consecutive output channels that share one choice."""

    @property
    @abstractmethod
    def fixed_density(self) -> float | None:
        """Share of weights kept, where the pattern alone settles it (before tails), else None."""

    @abstractmethod
    def _choose(self, saliency: NDArray[np.floating[Any]], density: float, groups: int) -> BoolArray:
        """Return the mask; the arguments have been checked."""

    def at(self, density: float) -> str:
        """Return the pattern with a density in words, such as ``1x16 at 0.25``, or alone where it implies that."""
        return str(self) if self.fixed_density is not None else f"{self} at {density:g}"

    def check_density(self, density: float | None) -> float:
        """Return the density to prune to.

        Parameters
        ----------
        density
            Share of weights to keep, in (0, 1]; None takes the pattern's own.

        Raises
        ------
        ValueError
            When it is out of range, missing, or not the pattern's own.
        """
        fixed = self.fixed_density
        if density is None:
            if fixed is None:
                raise ValueError(f"pattern {self} needs a density, the share of weights to keep")
            return fixed
        if not 0 < density <= 1:
            raise ValueError(f"density {density} is not in (0, 1]")
        if fixed is None:
            return float(density)
        if not math.isclose(density, fixed, rel_tol=1e-6):
            raise ValueError(f"pattern {self} has density {fixed:.4g}, not {density:.4g}; leave the density out")
        return fixed

    def mask(self, saliency: NDArray[Any], density: float | None = None, groups: int = 1) -> BoolArray:
        """Choose the weights to keep: those that hold the most saliency among all masks of the pattern.

        Among equals the lower index is kept, so that one weight always gives one mask.

        Parameters
        ----------
        saliency
            Non-negative and finite, shape (OC, IC / groups, KH, KW); typically the weights' absolute values.
        density
            Share of weights to keep; see `check_density`.
        groups
            Groups of the convolution. No block of output channels straddles two of them.

        Returns
        -------
        Boolean array of the same shape, True where the weight is kept.
        """
        density = self.check_density(density)
        scores = np.asarray(saliency)
        if scores.ndim != 4 or scores.size == 0:
            raise ValueError(f"saliency must have shape (OC, IC / groups, KH, KW), not {scores.shape}")
        if groups < 1 or scores.shape[0] % groups:
            raise ValueError(f"{scores.shape[0]} output channels do not divide into {groups} groups")
        if not np.issubdtype(scores.dtype, np.floating):
            scores = scores.astype(np.float32)
        # min and max pass NaN on, and take no temporary.
        if not (scores.min() >= 0 and scores.max() < math.inf):
            raise ValueError("saliency must be finite and non-negative")
        return self._choose(scores, density, groups)


@dataclass(frozen=True, slots=True)
class Dense(SparsityPattern):
    """Every weight is kept."""

    @property
    def block(self) -> int:
        """1: there is no choice to share."""
        return 1

    @property
    def fixed_density(self) -> float:
        """1: nothing is dropped."""
        return 1.0

    def _choose(self, saliency: NDArray[np.floating[Any]], density: float, groups: int) -> BoolArray:
        return np.ones(saliency.shape, dtype=np.bool_)

    def __str__(self) -> str:
        return "dense"


@dataclass(frozen=True, slots=True)
class NM(SparsityPattern):
    """N:M: n weights are kept of each m consecutive input channels, at one output channel and kernel position.

    Attributes
    ----------
    n, m
        ``1 <= n < m <= 32``. A last group of r < m input channels keeps `tail_quota` of them.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        _check_nm(self.n, self.m)

    @property
    def block(self) -> int:
        """1: each output channel chooses for itself."""
        return 1

    @property
    def fixed_density(self) -> float:
        """N / m."""
        return self.n / self.m

    def _choose(self, saliency: NDArray[np.floating[Any]], density: float, groups: int) -> BoolArray:
        return largest_of_groups(saliency, self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True, slots=True)
class TileNM(SparsityPattern):
    """N:M whose choice is shared by a tile of consecutive output channels.

    Attributes
    ----------
    n, m
        As in `NM`.
    tile
        Output channels that share the choice, 2 to 32. The last tile of a group may be smaller.
    """

    n: int
    m: int
    tile: int

    def __post_init__(self) -> None:
        _check_nm(self.n, self.m)
        _check_block("tile", self.tile)

    @property
    def block(self) -> int:
        """The tile."""
        return self.tile

    @property
    def fixed_density(self) -> float:
        """N / m."""
        return self.n / self.m

    def _choose(self, saliency: NDArray[np.floating[Any]], density: float, groups: int) -> BoolArray:
        kept = largest_of_groups(reduce_block_rows(np.add, saliency, self.tile, groups), self.n, self.m)
        return spread_rows(kept, saliency.shape[0], self.tile, groups)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}t{self.tile}"


@dataclass(frozen=True, slots=True)
class OneByN(SparsityPattern):
    """1xN: n consecutive output channels at one input channel are kept or dropped together.

    A *block row* is the n output channels of one row of blocks; the last one of a group may hold fewer.

    Attributes
    ----------
    n
        Output channels in a block, 2 to 32.
    granularity
        Whether a block holds the whole kernel or one kernel position.
    balanced
        True: each block row keeps the same number of blocks, ``max(1, round_half_up(density * blocks_in_a_row))``.
        False: all blocks of the layer compete by their mean saliency per channel, so that rows differ in length; a
        row may even end up empty. At least one block of the layer is kept.
    """

    n: int
    granularity: Granularity = Granularity.KERNEL
    balanced: bool = True

    def __post_init__(self) -> None:
        _check_block("n", self.n)

    @property
    def block(self) -> int:
        """The n."""
        return self.n

    @property
    def fixed_density(self) -> None:
        """None: the density is free."""
        return

    def _choose(self, saliency: NDArray[np.floating[Any]], density: float, groups: int) -> BoolArray:
        channels, inputs, height, width = saliency.shape
        scores = reduce_block_rows(np.add, saliency, self.n, groups)
        if self.granularity is Granularity.KERNEL:
            scores = scores.sum(axis=(2, 3), keepdims=True)
        flat = scores.reshape(scores.shape[0], -1)
        if not self.balanced:
            # A short last block row competes on equal terms; equal sizes leave the paper's ranking by sums.
            sizes = block_row_sizes(channels, self.n, groups)
            flat = (flat / sizes[:, None]).reshape(1, -1)
        kept = keep_largest(flat, max(1, round_half_up(density * flat.shape[1]))).reshape(scores.shape)
        spread = np.broadcast_to(kept, (len(kept), inputs, height, width))
        return spread_rows(spread, channels, self.n, groups)

    def __str__(self) -> str:
        position = "p" if self.granularity is Granularity.POSITION else ""
        return f"1x{self.n}{position}{'' if self.balanced else 'u'}"


def parse_pattern(text: str) -> SparsityPattern:
    """Read a pattern's text form; the inverse of ``str(pattern)``.

    Raises
    ------
    ValueError
        When `text` is no pattern; the message lists the valid forms.
    """
    form = text.strip().lower()
    try:
        if form == "dense":
            return Dense()
        if found := re.fullmatch(r"(\d+):(\d+)(?:t(\d+))?", form, re.ASCII):
            n, m = int(found[1]), int(found[2])
            return TileNM(n, m, int(found[3])) if found[3] else NM(n, m)
        if found := re.fullmatch(r"1x(\d+)(p?)(u?)", form, re.ASCII):
            granularity = Granularity.POSITION if found[2] else Granularity.KERNEL
            return OneByN(int(found[1]), granularity, balanced=not found[3])
    except ValueError as error:
        raise ValueError(f"bad sparsity pattern {text!r}: {error}; valid forms: {PATTERN_FORMS}") from error
    raise ValueError(f"bad sparsity pattern {text!r}; valid forms: {PATTERN_FORMS}")


def _check_nm(n: int, m: int) -> None:
    if not (_is_int(n) and _is_int(m) and 1 <= n < m <= MAX_GROUP):
        raise ValueError(f"N:M needs integers 1 <= N < M <= {MAX_GROUP}, not {n}:{m}")


def _check_block(name: str, n: int) -> None:
    if not (_is_int(n) and 2 <= n <= MAX_BLOCK):
        raise ValueError(f"{name} must be an integer from 2 to {MAX_BLOCK}, not {n}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
