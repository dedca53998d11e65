"""onnxruntime as the reference: run a model, and say how far other outputs are from its."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from tvm_nm.errors import UnsupportedModelError

__all__ = ["Array", "Comparison", "TensorSpec", "compare", "random_inputs", "run_onnx"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a model.

    Attributes
    ----------
    name
        The ONNX name.
    shape
        Static shape.
    dtype
        NumPy name of the element type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model's outputs are from the reference.

    Attributes
    ----------
    max_abs
        Largest absolute difference of the worst output.
    max_rel
        Largest, over the outputs, of ``max|got - want| / max|want|``. Infinite if the number of outputs or a shape
        differs, or if values are finite on one side only.
    output
        Index of the worst output.
    problem
        Why `max_rel` is infinite; empty otherwise.
    """

    max_abs: float
    max_rel: float
    output: int
    problem: str = ""

    def describe(self) -> str:
        """One clause for a message."""
        if self.problem:
            return self.problem
        return f"output {self.output} differs by {self.max_abs:.3g}, {self.max_rel:.2%} of its largest value"


def random_inputs(specs: Sequence[TensorSpec], seed: int = 0) -> dict[str, Array]:
    """Draw standard normal inputs; integers are 0 or 1.

    Parameters
    ----------
    specs
        The inputs.
    seed
        Equal seeds give equal inputs.

    Returns
    -------
    dict
        Array by input name.
    """
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            inputs[spec.name] = np.asarray(rng.standard_normal(spec.shape)).astype(dtype)
        else:
            inputs[spec.name] = np.asarray(rng.integers(0, 2, spec.shape)).astype(dtype)
    return inputs


def run_onnx(
    model: str | os.PathLike[str] | onnx.ModelProto, inputs: Mapping[str, Array], threads: int = 1
) -> list[Array]:
    """Run a model with onnxruntime on the CPU.

    Parameters
    ----------
    model
        A file, which onnxruntime reads itself, or a model in memory, which is serialised. Prefer the file for large
        models.
    inputs
        Array by input name.
    threads
        Number of threads.

    Returns
    -------
    list of Array
        The outputs in the order of the graph.

    Raises
    ------
    UnsupportedModelError
        If onnxruntime cannot load or run the model.
    """
    import onnxruntime as ort  # only here: `tvm-nm --help` need not wait for it

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions, too
    # One run: packing the weights would take longer than it saves, and hold a second copy of them.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # The model as it is written. onnxruntime 1.31's optimiser moves explicit zero padding into a max pool, which is
    # wrong where the padded values are negative.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(Path(model))
    try:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        del source
        return [np.asarray(out) for out in session.run(None, dict(inputs))]
    except Exception as err:
        # onnxruntime's exceptions have no common base but Exception.
        raise UnsupportedModelError(f"onnxruntime cannot run the model: {_one_line(err)}") from err


def compare(got: Sequence[Array], want: Sequence[Array]) -> Comparison:
    """Compare outputs with the reference's.

    Values that are not finite have to be the same on both sides; the measure is over the finite ones.

    Parameters
    ----------
    got, want
        The outputs, in the same order.
    """
    if len(got) != len(want):
        return Comparison(np.inf, np.inf, 0, f"there are {len(got)} outputs instead of {len(want)}")
    worst = Comparison(0.0, 0.0, 0)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            return Comparison(np.inf, np.inf, index, f"output {index} has shape {a.shape} instead of {b.shape}")
        found = _compare_one(a.astype(np.float64), b.astype(np.float64), index)
        if found.max_rel > worst.max_rel or index == 0:
            worst = found
    return worst


def _compare_one(got: Array, want: Array, index: int) -> Comparison:
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return Comparison(np.inf, np.inf, index, f"output {index} has NaN or infinite values in different places")
    if not finite.any():
        return Comparison(0.0, 0.0, index)
    max_abs = float(np.abs(got[finite] - want[finite]).max())
    scale = float(np.abs(want[finite]).max())
    return Comparison(max_abs, max_abs / scale if scale else (np.inf if max_abs else 0.0), index)


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())[:300]
