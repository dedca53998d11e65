"""Measures latency: of a built model, of onnxruntime beside it, and of the model's layers.

Times on a shared machine drift by tens of percents within seconds. So the contestants take turns in short blocks, in
another order each round, and are compared by the medians of their blocks.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tvm_nm.call_clock import CallTimer
from tvm_nm.errors import UnsupportedModelError
from tvm_nm.fma_peak import FmaPeak
from tvm_nm.layer_bench import layers_alone
from tvm_nm.layer_report import LayerReport
from tvm_nm.layer_times import LayerTime, mean_share_of_peak, pruned_layers
from tvm_nm.network_times import layer_calls
from tvm_nm.reference_run import random_inputs
from tvm_nm.runtime import CompiledModel

__all__ = [
    "BenchmarkResult",
    "Timing",
    "benchmark",
    "measure",
    "onnxruntime_runner",
    "profile_layers",
]

_BLOCK_MS = 40.0
_SETTLE_S = 0.04
"""Pause between contestants: idle threads of TVM keep a core busy for 5 ms, those of onnxruntime for 25."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency of one contestant.

    Attributes
    ----------
    name
        Who.
    threads
        Number of threads it ran with.
    blocks_ms
        Mean time of a call in each block.
    """

    name: str
    threads: int
    blocks_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median over the blocks."""
        return statistics.median(self.blocks_ms)

    @property
    def min_ms(self) -> float:
        """Best block."""
        return min(self.blocks_ms)

    def to_dict(self) -> dict[str, Any]:
        """Return the timing as JSON-ready values."""
        return {**asdict(self), "median_ms": self.median_ms, "min_ms": self.min_ms}


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """What `benchmark` measured.

    Attributes
    ----------
    model
        The model's name.
    timings
        The built model first, then the one it was compared with, if any.
    layers
        Times of the layers, if they were asked for.
    """

    model: str
    timings: tuple[Timing, ...]
    layers: tuple[LayerTime, ...] = ()

    @property
    def ours(self) -> Timing:
        """The built model's latency."""
        return self.timings[0]

    @property
    def baseline(self) -> Timing | None:
        """The other's."""
        return self.timings[1] if len(self.timings) > 1 else None

    @property
    def speedup(self) -> float | None:
        """Median of the other over median of the built model."""
        return self.baseline.median_ms / self.ours.median_ms if self.baseline else None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        pruned = pruned_layers(self.layers)
        return {
            "model": self.model,
            "threads": self.ours.threads,
            "timings": [timing.to_dict() for timing in self.timings],
            "speedup": self.speedup,
            "layers": [
                {**asdict(layer), "gflops": layer.gflops, "share_of_peak": layer.share_of_peak} for layer in self.layers
            ],
            "pruned_share_of_peak": mean_share_of_peak(pruned) if pruned else None,
        }


def benchmark(
    model: CompiledModel,
    against: str | os.PathLike[str] | onnx.ModelProto | None = None,
    *,
    threads: int | None = None,
    rounds: int = 12,
    layers: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> BenchmarkResult:
    """Measure a model's latency from NumPy arrays to NumPy arrays, beside onnxruntime if wanted.

    Parameters
    ----------
    model
        The built model.
    against
        An ONNX model with inputs of the same names and shapes, which onnxruntime runs with the same threads.
    threads
        Number of threads of both; default: the model's.
    rounds
        Blocks per contestant.
    layers
        Also measure every layer of the built model, and each distinct sparse layer alone beside its dense kernel.
    progress
        Called with the name of each step when it starts.

    Raises
    ------
    UnsupportedModelError
        If onnxruntime cannot run `against` on the model's inputs.
    """
    if rounds < 1:
        raise ValueError(f"a benchmark needs at least 1 round, not {rounds}")
    if threads is not None and threads != model.threads:
        model = model.with_threads(threads)
    model.open()
    inputs = random_inputs(model.inputs)
    contestants: dict[str, Callable[[], object]] = {"tvm_nm": lambda: model(inputs)}
    if against is not None:
        contestants["onnxruntime"] = onnxruntime_runner(against, inputs, model.threads)
    progress("measuring latency")
    times = measure(contestants, rounds=rounds)
    found: tuple[LayerTime, ...] = ()
    if layers:
        alone = layers_alone(model, progress=progress)
        progress("measuring layers")
        found = tuple(
            replace(entry, alone=alone.get(entry.layer) if entry.layer else None) for entry in profile_layers(model)
        )
    return BenchmarkResult(
        model=model.manifest.model,
        timings=tuple(Timing(name, model.threads, blocks) for name, blocks in times.items()),
        layers=found,
    )


def measure(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 12, block_ms: float = _BLOCK_MS
) -> dict[str, tuple[float, ...]]:
    """Let contestants take turns.

    Parameters
    ----------
    contestants
        What to call, by name.
    rounds
        Blocks per contestant. Each round starts with the next one.
    block_ms
        Shortest duration of a block; it holds at least two calls, and one before that is not counted.

    Returns
    -------
    Mean time of a call in milliseconds, for each block, by name.
    """
    names = list(contestants)
    for call in contestants.values():
        call()
    blocks: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if len(names) > 1:
                time.sleep(_SETTLE_S)
            blocks[name].append(_block(contestants[name], block_ms))
    return {name: tuple(values) for name, values in blocks.items()}


def _block(call: Callable[[], object], block_ms: float) -> float:
    call()
    calls = 0
    start = time.perf_counter()
    while True:
        call()
        calls += 1
        elapsed_ms = (time.perf_counter() - start) * 1e3
        if calls >= 2 and elapsed_ms >= block_ms:
            return elapsed_ms / calls


def onnxruntime_runner(
    model: str | os.PathLike[str] | onnx.ModelProto, inputs: Mapping[str, NDArray[Any]], threads: int
) -> Callable[[], list[NDArray[Any]]]:
    """Load a model into onnxruntime with its usual settings and return a function that runs it.

    Raises
    ------
    UnsupportedModelError
        If onnxruntime cannot load it or run it on the inputs.
    """
    import onnxruntime as ort  # only here: loading an artefact need not wait for it

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    is_proto = isinstance(model, onnx.ModelProto)
    name = model.graph.name or "the model" if isinstance(model, onnx.ModelProto) else os.fspath(model)
    if not is_proto and not Path(os.fspath(model)).is_file():
        raise UnsupportedModelError(f"{name}: no such file")
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else name
    feed = dict(inputs)
    try:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        if (expected := {item.name for item in session.get_inputs()}) != feed.keys():
            raise ValueError(f"its inputs are {', '.join(sorted(expected))}, not {', '.join(sorted(feed))}")
        session.run(None, feed)
    except Exception as error:  # onnxruntime's exceptions have no other base
        raise UnsupportedModelError(f"onnxruntime cannot run {name}: {' '.join(str(error).split())[:300]}") from error
    return lambda: session.run(None, feed)


def profile_layers(model: CompiledModel, *, runs: int = 10) -> tuple[LayerTime, ...]:
    """Measure each layer of a built model inside whole inferences.

    Parameters
    ----------
    model
        The model; it runs with its own number of threads.
    runs
        Inferences to measure, after one to warm up.

    Returns
    -------
    The layers in call order, each with the pooling that belongs to it, then the other functions by name, then
    ``other``, which is the virtual machine's own work.

    Raises
    ------
    ArtifactError
        If the calls do not match the manifest's layers.
    """
    timer = CallTimer(model)
    calls = layer_calls(model, timer.names)
    peak, peaks, samples = FmaPeak(model.threads), [], []
    for number in range(runs + 1):
        peaks.append(peak.gflops(2))
        found = timer.run(warm=False)
        samples += [found] if number else []
    medians_us = np.median(np.concatenate(samples), axis=0)
    layers: list[LayerTime] = []
    rest: dict[str, tuple[int, float]] = {}
    for name, chain, time_us in zip(timer.names, calls, medians_us.tolist(), strict=True):
        if chain and name == chain[0].pool:
            layers[-1] = replace(layers[-1], calls=2, time_us=layers[-1].time_us + time_us)
        elif chain:
            layers.append(LayerTime(chain[0].name, _whole(chain), 1, time_us, statistics.median(peaks)))
        else:
            group = "other" if name.startswith("vm.builtin.") else name
            count, total = rest.get(group, (0, 0.0))
            rest[group] = (count + 1, total + time_us)
    other = rest.pop("other", None)
    layers += [LayerTime(name, None, *found) for name, found in sorted(rest.items())]
    return (*layers, LayerTime("other", None, *other)) if other else tuple(layers)


def _whole(chain: Sequence[LayerReport]) -> LayerReport:
    """Return one report for layers that a single call computes."""
    if len(chain) == 1:
        return chain[0]
    macs, kept, packed = (
        sum(getattr(layer, what) for layer in chain) for what in ("macs", "kept_macs", "packed_bytes")
    )
    patterns = dict.fromkeys(layer.pattern for layer in chain if layer.pattern != "dense")
    return replace(
        chain[0],
        workload=", ".join(layer.workload for layer in chain),
        pattern="+".join(patterns) or "dense",
        density=sum(layer.macs * layer.density for layer in chain) / max(1, macs),
        macs=macs,
        kept_macs=kept,
        packed_bytes=packed,
    )
