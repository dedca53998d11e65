"""What a layer's sparse kernel gains: the layer alone, sparse and with the best dense kernel, in turns.

Inside a network a layer's time depends on what ran before it; and the dense kernel is not in the artefact at all. So
both are built again for a model of this one layer, with the same shape, epilogue, pattern and density, and random
weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from tvm_nm.errors import TvmNmError
from tvm_nm.fma_peak import FmaPeak
from tvm_nm.frontend import import_onnx
from tvm_nm.layer_report import LayerReport
from tvm_nm.layer_shape import LayerShape, layer_model
from tvm_nm.patterns import parse_pattern
from tvm_nm.pipeline import build_executable
from tvm_nm.pruning import PruneRequest, prune_module
from tvm_nm.reference_run import random_inputs
from tvm_nm.runtime import CompiledModel, use_threads
from tvm_nm.schedules.machine import target_from_json
from tvm_nm.workload import Epilogue

__all__ = ["LayerAlone", "layers_alone"]

_ROUNDS = 9
_BLOCK_S = 0.004


@dataclass(frozen=True, slots=True)
class LayerAlone:
    """A sparse layer by itself, beside the dense one.

    Attributes
    ----------
    time_us, dense_us
        Medians over the blocks, of the best call.
    speedup
        Dense over sparse: the median of the ratios within a round.
    share_of_peak, dense_share
        Operations with weights that are not zero, a second, over the FMA peak beside the block.
    kernel, dense_kernel
        The variants. The sparse one may differ from the artefact's, if that was tuned.
    """

    time_us: float
    dense_us: float
    speedup: float
    share_of_peak: float
    dense_share: float
    kernel: str
    dense_kernel: str


def layers_alone(
    model: CompiledModel, *, rounds: int = _ROUNDS, progress: Callable[[str], None] = lambda _: None
) -> dict[LayerReport, LayerAlone]:
    """Measure each distinct sparse layer of an artefact alone; a second or so for each.

    Parameters
    ----------
    model
        The artefact; its target and number of threads are used.
    rounds
        Blocks of each kernel.
    progress
        Called with a line before each layer.

    Returns
    -------
    By the layer's report; layers that are built dense are not in it.
    """
    target = target_from_json(model.manifest.target, model.threads)
    sparse = [layer for layer in model.layers if layer.pattern != "dense"]
    peak = FmaPeak(model.threads) if sparse else None
    measured: dict[tuple[str, str, str, float], LayerAlone | None] = {}
    found: dict[LayerReport, LayerAlone] = {}
    for layer in sparse:
        assert peak is not None
        key = (layer.shape, layer.epilogue, layer.pattern, round(layer.density, 3))
        if key not in measured:
            progress(f"building {layer.workload} alone, {layer.pattern} and dense")
            try:
                measured[key] = _alone(layer, target, peak, model.threads, rounds)
            except TvmNmError:  # a shape or pattern that a single layer cannot be given
                measured[key] = None
        if (result := measured[key]) is not None:
            found[layer] = result
    return found


def _alone(
    layer: LayerReport, target: tvm.target.Target, peak: FmaPeak, threads: int, rounds: int
) -> LayerAlone | None:
    shape, epilogue = LayerShape.parse(layer.shape), Epilogue.parse(layer.epilogue)
    pattern = parse_pattern(layer.pattern)
    density = layer.density if pattern.fixed_density is None else None
    imported = import_onnx(layer_model(shape, epilogue), verify=False)
    pruned, _ = prune_module(imported.module, PruneRequest.make(pattern, density, include=("*",)))
    inputs = [tvm.runtime.tensor(array) for array in random_inputs(imported.inputs).values()]
    sparse = build_executable(pruned, target, always_sparse=True)
    dense = build_executable(imported.module, target)
    if sparse.layers[0].pattern == "dense":
        return None
    calls = [_Call(built.executable, inputs) for built in (sparse, dense)]
    times: list[list[float]] = [[], []]
    shares: list[list[float]] = [[], []]
    use_threads(threads)
    for number in range(rounds):
        before = peak.gflops(2)
        for which in (0, 1) if number % 2 else (1, 0):
            seconds = calls[which].block()
            after = peak.gflops(2)
            useful = 2e-9 * layer.macs * (layer.density if which == 0 else 1.0)
            times[which].append(seconds)
            shares[which].append(useful / seconds / ((before + after) / 2))
            before = after
    return LayerAlone(
        time_us=statistics.median(times[0]) * 1e6,
        dense_us=statistics.median(times[1]) * 1e6,
        speedup=statistics.median(d / s for s, d in zip(*times, strict=True)),
        share_of_peak=statistics.median(shares[0]),
        dense_share=statistics.median(shares[1]),
        kernel=sparse.layers[0].kernel,
        dense_kernel=dense.layers[0].kernel,
    )


class _Call:
    def __init__(self, executable: Any, inputs: list[Any]) -> None:
        self._main = relax.VirtualMachine(executable, tvm.cpu())["main"]
        self._inputs = inputs
        self._main(*inputs)

    def block(self) -> float:
        """Return the time of the best call, in seconds: these are too short to average over interruptions."""
        self._main(*self._inputs)  # the other kernel's data are in the caches
        best, end = float("inf"), time.perf_counter() + _BLOCK_S
        while True:
            start = time.perf_counter()
            self._main(*self._inputs)
            now = time.perf_counter()
            best = min(best, now - start)
            if now >= end:
                return best
