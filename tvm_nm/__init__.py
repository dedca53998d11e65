"""Compile ONNX CNNs to sparse TVM modules that run faster on CPUs than dense runtimes.

>>> import tvm_nm                                                                        # doctest: +SKIP
>>> model = tvm_nm.compile("resnet50.onnx", output="resnet50-tvm", pattern="1x16")       # doctest: +SKIP
>>> logits = model(image)                                                                # doctest: +SKIP
>>> tvm_nm.load("resnet50-tvm").benchmark("resnet50.onnx").speedup                       # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvm_nm.environment import check_environment, prepare_environment
from tvm_nm.errors import (
    ArtifactError,
    EnvironmentMismatchError,
    ModelMismatchError,
    PlanError,
    TuningError,
    TvmNmError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from tvm_nm.bench import BenchmarkResult
    from tvm_nm.compiler import compile  # noqa: A004
    from tvm_nm.runtime import CompiledModel, load
    from tvm_nm.tuning.outcomes import TuningSummary
    from tvm_nm.tuning.tuner import tune

__all__ = [
    "ArtifactError",
    "BenchmarkResult",
    "CompiledModel",
    "EnvironmentMismatchError",
    "ModelMismatchError",
    "PlanError",
    "TuningError",
    "TuningSummary",
    "TvmNmError",
    "UnsupportedModelError",
    "__version__",
    "compile",
    "load",
    "tune",
]

__version__ = "0.1.0"

# TVM reads these settings once, when its thread pool starts.
prepare_environment()

# TVM takes a second or two to load, so what needs it is loaded when it is first asked for.
_LAZY = {
    "BenchmarkResult": "tvm_nm.bench",
    "CompiledModel": "tvm_nm.runtime",
    "compile": "tvm_nm.compiler",
    "TuningSummary": "tvm_nm.tuning.tuner",
    "load": "tvm_nm.runtime",
    "tune": "tvm_nm.tuning.tuner",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_environment()
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
