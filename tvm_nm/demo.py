"""What plain ``tvm-nm compile`` does: build the reference network dense and sparse, and compare speed and accuracy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.bench import Timing, measure, onnxruntime_runner, profile_layers
from tvm_nm.calibration import embedded_images
from tvm_nm.compiler import compile as compile_model
from tvm_nm.layer_pruning import Method
from tvm_nm.layer_times import LayerTime
from tvm_nm.pruning import PruneRequest
from tvm_nm.reference import reference_card, reference_model_path, test_set, top1
from tvm_nm.reference_run import random_inputs
from tvm_nm.runtime import CompiledModel

__all__ = ["DEMO_DENSITY", "DEMO_PATTERN", "DEMO_THREADS", "DemoResult", "run_demo"]

DEMO_PATTERN = "1x4p"
DEMO_DENSITY = 0.25
"""Refitted on the embedded images the network keeps 99% of its accuracy with this; by magnitude all is lost."""
DEMO_THREADS = 1
"""Its layers take 5 to 30 us: a second thread gains little, and costs where others use its processor as well."""
_ROUNDS = 15


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration measured.

    Attributes
    ----------
    dataset
        Where the test images are from.
    images
        Their number.
    request
        What the sparse build was pruned to.
    timings
        Latencies of onnxruntime, the dense build and the sparse build, taken in turns.
    top1
        Share of right answers of the dense and of the sparse build.
    layers
        Where the sparse build's time goes.
    """

    dataset: str
    images: int
    request: PruneRequest
    timings: tuple[Timing, ...]
    top1: tuple[float, float]
    layers: tuple[LayerTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return {
            "dataset": self.dataset,
            "images": self.images,
            "pattern": str(self.request.pattern),
            "density": self.request.density,
            "timings": [timing.to_dict() for timing in self.timings],
            "top1": {"dense": self.top1[0], "sparse": self.top1[1]},
            "layers": [{"name": layer.name, "calls": layer.calls, "time_us": layer.time_us} for layer in self.layers],
        }


def run_demo(
    request: PruneRequest | None = None,
    *,
    threads: int = DEMO_THREADS,
    output: Path | None = None,
    progress: Callable[[str], None] | None = None,
    images: int | None = None,
    rounds: int = _ROUNDS,
) -> DemoResult:
    """Build the reference network dense and sparse and compare them with each other and with onnxruntime.

    Parameters
    ----------
    request
        What to prune; default: `DEMO_PATTERN` at `DEMO_DENSITY`.
    threads
        Number of threads of all three.
    output
        Directory for the sparse artefact; None keeps none.
    progress
        Called with the name of each step when it starts.
    images
        How many of the test images to classify; default: all.
    rounds
        Blocks of calls per contestant.

    Raises
    ------
    TvmNmError
        As `tvm_nm.compile`.
    """
    step = progress or (lambda _: None)
    request = request or PruneRequest.make(DEMO_PATTERN, DEMO_DENSITY)
    path = reference_model_path()

    def build(title: str, chosen: PruneRequest, directory: Path) -> CompiledModel:
        return compile_model(
            path,
            output=directory,
            pattern=chosen.pattern,
            density=chosen.density,
            include=chosen.include,
            exclude=chosen.exclude,
            method=chosen.method,
            images=None if chosen.method is Method.MAGNITUDE or chosen.density == 1 else embedded_images(),
            threads=threads,
            progress=lambda name: step(f"{title}: {name}"),
        )

    with tempfile.TemporaryDirectory(prefix="tvm-nm-demo-") as folder:
        dense = build("dense", PruneRequest.make("dense"), Path(folder) / "dense")
        sparse = build("sparse", request, output or Path(folder) / "sparse")
        step("measuring latency")
        inputs = random_inputs(dense.inputs)
        contestants: dict[str, Callable[[], object]] = {
            "onnxruntime, dense": onnxruntime_runner(path, inputs, dense.threads),
            "tvm_nm, dense": lambda: dense(inputs),
            f"tvm_nm, {request.pattern} at {request.density:g}": lambda: sparse(inputs),
        }
        times = measure(contestants, rounds=rounds)
        layers = profile_layers(sparse)
        step("classifying test images")
        pictures, classes = test_set()
        pictures, classes = pictures[:images], classes[:images]
        scores = (top1(_predict(dense), pictures, classes, batch=1), top1(_predict(sparse), pictures, classes, batch=1))
    return DemoResult(
        dataset=reference_card().dataset,
        images=len(pictures),
        request=request,
        timings=tuple(Timing(name, dense.threads, blocks) for name, blocks in times.items()),
        top1=scores,
        layers=layers,
    )


def _predict(model: CompiledModel) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    def predict(images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = model(images)
        assert isinstance(logits, np.ndarray)
        return logits

    return predict
