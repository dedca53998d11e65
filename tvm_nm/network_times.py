"""Times of whole networks and of their layers, measured in turns and made to add up.

Other processes and other guests of the machine make a run slower, never faster, and they slow sparse and dense kernels
by different factors: medians of a busy minute say little about a quiet one. So networks take turns with few runs each,
every run is timed by itself, and what counts is the fastest tenth of each network's runs.

Layers are timed in other runs than the whole, with a clock between the calls. What they lack to the whole is more than
a fixed time: weights that do not fit into the caches beside each other drive out what the calls in between need, the
virtual machine's and Python's code and data. With 2 MB of weights this rest was twice that of the same network with
0.5 MB. `spread_rest` takes the least rest of several builds as the fixed time and puts the excess of each on its layers
by the size of their weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tvm_nm.call_clock import CallTimer
from tvm_nm.errors import ArtifactError
from tvm_nm.layer_report import LayerReport
from tvm_nm.reference_run import random_inputs
from tvm_nm.runtime import CompiledModel

__all__ = ["NetworkTimes", "fastest_tenth", "layer_calls", "spread_rest", "time_networks"]

_MIN_ROUNDS = 7
_BLOCK_US = 15_000.0
_MAX_RUNS = 12
"""A network takes several runs until all that it needs is back in the caches after the others' turns."""
_LEAST_RUNS = 3
"""Runs to average at least, where a tenth is less."""
_PATIENCE = 4
"""How many times as long to measure, at most, while the machine is evidently busy."""
_BUSY = 1.02


@dataclass(frozen=True, slots=True)
class NetworkTimes:
    """One network.

    Attributes
    ----------
    total_us
        One call, from NumPy arrays to NumPy arrays.
    layers_us
        Its layers, as in the model's `layers`; several that one call computes share its time by the
        multiply-accumulates that they execute. A layer's time includes that of its pooling.
    """

    total_us: float
    layers_us: NDArray[np.float64]


def time_networks(
    models: Sequence[CompiledModel], seconds: float, *, known_us: float | None = None
) -> tuple[NetworkTimes, ...]:
    """Measure networks in turns.

    Parameters
    ----------
    models
        The networks, for the same inputs.
    seconds
        How long, at least; a few rounds are made in any case.
    known_us
        Time of the first network on this machine, if that is known: while it takes evidently longer, the machine is
        busy, and measuring goes on up to 4 times as long.
    """
    contestants = [_Contestant(model) for model in models]
    start, rounds = time.perf_counter(), 0

    def enough() -> bool:
        elapsed = time.perf_counter() - start
        if rounds < _MIN_ROUNDS or elapsed < seconds:
            return False
        return known_us is None or elapsed >= _PATIENCE * seconds or contestants[0].total_us() <= _BUSY * known_us

    while not enough():
        first = rounds % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            contestant.block()
        rounds += 1
    return tuple(contestant.times() for contestant in contestants)


def fastest_tenth(samples: ArrayLike, keys: ArrayLike) -> NDArray[np.float64]:
    """Return the mean of those samples whose keys are the smallest tenth, at least three.

    Parameters
    ----------
    samples
        (runs, ...).
    keys
        (runs,): what is small in runs that nothing disturbed.
    """
    order = np.argsort(np.asarray(keys), kind="stable")
    chosen = np.asarray(samples, dtype=np.float64)[order[: max(_LEAST_RUNS, len(order) // 10)]]
    mean: NDArray[np.float64] = chosen.mean(axis=0)
    return mean


def spread_rest(
    totals: NDArray[np.float64], layers: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Make layers and a fixed time add up to the whole of every build.

    Parameters
    ----------
    totals
        (builds,): time of the whole.
    layers
        (builds, layers): times of the layers.
    weights
        (builds, layers): how a build's excess over the fixed time is shared among its layers.

    Returns
    -------
    Times of the layers, and the fixed time, which is the least rest of any build.
    """
    rest = totals - layers.sum(axis=1)
    fixed = float(rest.min())
    shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return layers + (rest - fixed)[:, None] * shares, fixed


def layer_calls(model: CompiledModel, names: Sequence[str]) -> list[tuple[LayerReport, ...]]:
    """Say which layers each call of an inference computes.

    Parameters
    ----------
    model
        The model.
    names
        The functions that it calls, in order.

    Returns
    -------
    For each call its layer, or the layers of its chain; nothing for calls that compute none. A layer with a pooling of
    its own has two.

    Raises
    ------
    ArtifactError
        If the calls do not match the manifest's layers.
    """
    functions = {layer.function for layer in model.layers}
    pending = list(model.layers)
    found: list[tuple[LayerReport, ...]] = []
    pooled: LayerReport | None = None
    for name in names:
        if pooled is not None and name == pooled.pool:
            found.append((pooled,))
            pooled = None
            continue
        if name not in functions:
            found.append(())
            continue
        if not pending or pending[0].function != name:
            raise ArtifactError(f"{model.directory}: the library calls {name} where its manifest has another layer")
        chain = [pending.pop(0)]
        while pending and pending[0].chain == chain[0].name:
            chain.append(pending.pop(0))
        found.append(tuple(chain))
        pooled = chain[0] if chain[0].pool else None
    return found


class _Contestant:
    def __init__(self, model: CompiledModel) -> None:
        self._model = model
        self._inputs = random_inputs(model.inputs)
        self._timer = CallTimer(model)
        calls = layer_calls(model, self._timer.names)
        place = {layer.name: number for number, layer in enumerate(model.layers)}
        self._shares = np.zeros((len(calls), len(model.layers)))  # of a call's time that a layer takes
        for call, chain in enumerate(calls):
            self._shares[call, [place[layer.name] for layer in chain]] = _shares(chain)
        model(self._inputs)
        begin = time.perf_counter()
        model(self._inputs)
        self._runs = int(np.clip(_BLOCK_US / ((time.perf_counter() - begin) * 1e6), 1, _MAX_RUNS))
        self._totals: list[float] = []
        self._layers: list[NDArray[np.float64]] = []

    def block(self) -> None:
        """Run a few times as users do, and a few times with the clock, after one run to fill the caches."""
        self._model(self._inputs)
        for _ in range(self._runs):
            begin = time.perf_counter()
            self._model(self._inputs)
            self._totals.append((time.perf_counter() - begin) * 1e6)
        # A slow network needs no warming: it replaces what is in the caches by itself.
        self._layers += list(self._timer.run(self._runs, warm=self._runs > 1))

    def times(self) -> NetworkTimes:
        calls = np.array(self._layers)
        layers = fastest_tenth(calls, calls.sum(axis=1)) @ self._shares
        return NetworkTimes(self.total_us(), layers)

    def total_us(self) -> float:
        return float(fastest_tenth(self._totals, self._totals))


def _shares(chain: Sequence[LayerReport]) -> list[float]:
    macs = [max(1, layer.kept_macs) for layer in chain]
    return [part / sum(macs) for part in macs]
