"""What a plan may do to which layer, and how a time budget is written. Needs NumPy only."""

from __future__ import annotations

import enum
import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tvm_nm.costs import Candidate, LayerCosts
from tvm_nm.errors import PlanError
from tvm_nm.patterns import parse_pattern
from tvm_nm.plan import near_names

__all__ = ["Constraints", "LayerRule", "Resource", "exclusion_rules", "parse_budget", "speedup_budget"]

_BUDGET = re.compile(r"(?P<number>[0-9.]+(?:e-?[0-9]+)?)\s*(?P<unit>s|ms|us|µs|%|)")
_UNITS_US = {"s": 1e6, "ms": 1e3, "us": 1.0, "µs": 1.0}


class Resource(enum.Enum):
    """What can be limited beside time."""

    BYTES = "bytes"
    MACS = "macs"


@dataclass(frozen=True, slots=True)
class LayerRule:
    """A restriction of the layers whose names match a glob.

    Attributes
    ----------
    glob
        Glob (``*``, ``?``, ``[...]``) or name.
    min_density, max_density
        Bounds of the density; dense counts as 1.
    patterns
        Text forms of the patterns that are allowed beside dense; None allows all.

    Raises
    ------
    PlanError
        If the bounds are not in order within [0, 1], or a pattern is unknown.
    """

    glob: str = "*"
    min_density: float = 0.0
    max_density: float = 1.0
    patterns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_density <= self.max_density <= 1:
            raise PlanError(
                f"densities of {self.glob!r} from {self.min_density:g} to {self.max_density:g} are not in order from "
                "0 to 1"
            )
        try:
            for text in self.patterns or ():
                parse_pattern(text)
        except ValueError as error:
            raise PlanError(str(error)) from error

    def matches(self, name: str) -> bool:
        """Tell whether the rule is about a layer; a name may hold brackets, so it is tried as it stands, too."""
        return name == self.glob or fnmatch.fnmatchcase(name, self.glob)

    def allows(self, candidate: Candidate) -> bool:
        """Tell whether the rule lets a layer be pruned to that."""
        if not self.min_density - 1e-9 <= candidate.density <= self.max_density + 1e-9:
            return False
        return self.patterns is None or candidate.is_dense or str(candidate.pattern) in self.patterns


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan may do.

    Attributes
    ----------
    rules
        All of those that match a layer's name hold for it.
    tied
        Groups of layers, by name, whose pattern has to be the same where they are not dense.
    max_bytes, max_macs
        Largest size of the packed weights, and number of multiply-accumulates, over all layers; only one of them.

    Raises
    ------
    PlanError
        If a layer is in two groups, or both limits are given.
    """

    rules: tuple[LayerRule, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    max_bytes: int | None = None
    max_macs: int | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name in (name for group in self.tied for name in group):
            if name in seen:
                raise PlanError(f"layer {name!r} is tied twice")
            seen.add(name)
        if self.max_bytes is not None and self.max_macs is not None:
            raise PlanError("a plan can be limited in memory or in multiply-accumulates, not in both")

    def with_ties(self, groups: Iterable[Sequence[str]]) -> Constraints:
        """Return the constraints with more groups tied; groups that share a layer become one."""
        merged: list[set[str]] = []
        for group in [*self.tied, *groups]:
            names = set(group)
            for other in [other for other in merged if other & names]:
                merged.remove(other)
                names |= other
            merged.append(names)
        return replace(self, tied=tuple(tuple(sorted(names)) for names in merged))

    @property
    def resource(self) -> Resource | None:
        """What is limited beside time."""
        if self.max_bytes is not None:
            return Resource.BYTES
        return Resource.MACS if self.max_macs is not None else None

    @property
    def limit(self) -> int | None:
        """The limit on the resource."""
        return self.max_bytes if self.max_bytes is not None else self.max_macs

    def usage(self, candidate: Candidate) -> int:
        """Return what a candidate uses of the resource; 0 where none is limited."""
        if self.resource is None:
            return 0
        return candidate.bytes if self.resource is Resource.BYTES else candidate.macs

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `PlanError` if a rule matches none of the layers or a tied layer is not among them."""
        for rule in self.rules:
            if not any(rule.matches(name) for name in names):
                raise PlanError(f"no layer matches {rule.glob!r}; {near_names(rule.glob, names)}")
        for name in (name for group in self.tied for name in group):
            if name not in names:
                raise PlanError(f"tied layer {name!r} does not exist; {near_names(name, names)}")

    def allowed(self, layers: Sequence[LayerCosts]) -> list[NDArray[np.intp]]:
        """Return the indices of the candidates that each layer may take.

        A layer that has nothing but dense in the table, such as a depthwise convolution, stays so whatever the rules.

        Raises
        ------
        PlanError
            If a rule matches no layer or leaves one without candidates.
        """
        self.check_names([layer.name for layer in layers])
        found = []
        for layer in layers:
            rules = [rule for rule in self.rules if rule.matches(layer.name)] if layer.can_be_pruned else []
            kept = [i for i, candidate in enumerate(layer.candidates) if all(rule.allows(candidate) for rule in rules)]
            if not kept:
                there = ", ".join(candidate.label for candidate in layer.candidates)
                raise PlanError(f"the constraints leave layer {layer.name!r} no candidate of: {there}")
            found.append(np.array(kept, dtype=np.intp))
        return found

    def groups(self, names: Sequence[str]) -> list[list[int]]:
        """Return the layers' indices in groups that choose together, most of them alone.

        Raises
        ------
        PlanError
            If a group names a layer that does not exist.
        """
        self.check_names(names)
        index = {name: position for position, name in enumerate(names)}
        tied = [sorted(index[name] for name in group) for group in self.tied if group]
        covered = {position for group in tied for position in group}
        alone = [[position] for position in range(len(names)) if position not in covered]
        return sorted([*alone, *tied])


def parse_budget(text: str, dense_us: float) -> float:
    """Read a time budget: a share of the dense time (``0.6``, ``60%``) or a time (``25ms``, ``900us``).

    Returns
    -------
    The budget in microseconds.

    Raises
    ------
    PlanError
        If it is neither.
    """
    found = _BUDGET.fullmatch(text.strip().lower())
    try:
        number = float(found["number"]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not (math.isfinite(number) and number > 0):
        raise PlanError(f"budget {text!r} is neither a share of the dense time, such as 0.6, nor a time, such as 25ms")
    unit = found["unit"]
    if unit in _UNITS_US:
        return number * _UNITS_US[unit]
    share = number / 100 if unit == "%" else number
    if share > 1:
        raise PlanError(f"budget {text!r} is more than the dense time; write a time with its unit, such as {text}ms")
    return share * dense_us


def speedup_budget(speedup: float, dense_us: float) -> float:
    """Return the budget for being that many times as fast as the dense network.

    Raises
    ------
    PlanError
        If it is not at least 1.
    """
    if not (math.isfinite(speedup) and speedup >= 1):
        raise PlanError(f"speed-up {speedup:g} is not a number from 1")
    return dense_us / speedup


def exclusion_rules(globs: Iterable[str]) -> tuple[LayerRule, ...]:
    """Return rules that keep the layers matching any of the globs dense."""
    return tuple(LayerRule(glob, min_density=1.0, patterns=()) for glob in globs)
