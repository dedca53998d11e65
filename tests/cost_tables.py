"""Cost tables for tests, and all plans of a small one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_nm.costs import Candidate, CostTable, LayerCosts, TimeSource
from tvm_nm.patterns import Dense, OneByN

METRIC = "l1"


def table(
    layers: Sequence[Sequence[tuple[str, float, float, float]]], fixed: float = 0.0, bytes_: bool = False
) -> CostTable:
    """A table from (pattern, density, time, error) lists; a pattern is ``dense`` or the N of 1xN."""
    built = []
    for number, options in enumerate(layers):
        candidates = tuple(
            Candidate(
                pattern=Dense() if name == "dense" else OneByN(int(name)),
                density=density,
                time_us=time,
                source=TimeSource.MEASURED,
                macs=round(1000 * density),
                bytes=round(4000 * density) + (0 if name == "dense" else 7 * int(name)),
                kernel="k",
                errors={METRIC: error},
            )
            for name, density, time, error in options
        )
        built.append(LayerCosts(f"layer{number}", "conv", "w", "bias", 1000, candidates, {METRIC: 0.5}))
    return CostTable("m", "aa", "bb", {"kind": "llvm", "mcpu": "x"}, 1, 1, fixed, tuple(built))


def random_table(
    rng: np.random.Generator, layers: int, candidates: int, number: Callable[[np.random.Generator], float]
) -> CostTable:
    """A table whose times come from `number`; errors are uniform and now and then equal."""
    found = []
    for _ in range(layers):
        densities = rng.permutation(np.arange(1, 20))[: candidates - 1] / 20
        options: list[tuple[str, float, float, float]] = [("dense", 1.0, number(rng), 0.0)]
        for density in densities:
            error = float(rng.choice([rng.uniform(), 0.25]))
            options.append((str(rng.choice([2, 4])), float(density), number(rng), error))
        found.append(options)
    return table(found, fixed=number(rng))


@dataclass(frozen=True)
class Everything:
    """What one plan comes to."""

    choices: tuple[int, ...]
    time: float
    loss: float
    bytes: int
    macs: int


def every_plan(costs: CostTable) -> Iterator[Everything]:
    """All plans, by brute force."""
    for choices in itertools.product(*(range(len(layer.candidates)) for layer in costs.layers)):
        taken = [(layer, layer.candidates[i]) for layer, i in zip(costs.layers, choices, strict=True)]
        yield Everything(
            choices,
            costs.fixed_us + sum(candidate.time_us for _, candidate in taken),
            sum(layer.loss(candidate, METRIC) for layer, candidate in taken),
            sum(candidate.bytes for _, candidate in taken),
            sum(candidate.macs for _, candidate in taken),
        )
