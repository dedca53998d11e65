"""A piece of an ONNX network that onnxruntime runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tvm_nm.errors import UnsupportedModelError

__all__ = ["FloatArray", "Segment", "default_threads", "runtime_failure"]

FloatArray = NDArray[np.floating[Any]]


class Segment:
    """A piece of a network, ready to run.

    Attributes
    ----------
    inputs, outputs
        Names of the tensors that it reads and computes.
    passed
        Names of tensors that were asked of it but come from before it.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        weights: Mapping[str, FloatArray],
        inputs: Sequence[str],
        outputs: Sequence[str],
        passed: Sequence[str],
        threads: int | None,
    ) -> None:
        import onnxruntime as ort  # only here: `tvm-nm --help` need not wait for it

        self.inputs, self.outputs, self.passed = tuple(inputs), tuple(outputs), tuple(passed)
        self._session = None
        if not self.outputs:
            return
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or default_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Calibration tensors are large and of few sizes: an arena would keep the largest of each segment.
        options.enable_cpu_mem_arena = False
        # One more copy of the weights, for which a few batches do not pay.
        options.add_session_config_entry("session.disable_prepacking", "1")
        self._weights = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options.add_external_initializers(list(weights), self._weights)
        try:
            # onnxruntime 1.31 moves explicit zero padding into a max pool, wrong where padded values are negative.
            self._session = ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers={"Pad_Fusion"},
            )
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise runtime_failure(error) from error

    def __call__(self, tensors: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Run on one batch: from the tensors at its start to those in `outputs`.

        Raises
        ------
        UnsupportedModelError
            If onnxruntime cannot run it.
        """
        if self._session is None:
            return {}
        try:
            values = self._session.run(list(self.outputs), {name: tensors[name] for name in self.inputs})
        except Exception as error:
            raise runtime_failure(error) from error
        return dict(zip(self.outputs, values, strict=True))


def default_threads() -> int:
    """Threads to compute with: what OMP_NUM_THREADS says, or else the processors that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runtime_failure(error: Exception) -> UnsupportedModelError:
    """Return what onnxruntime said, in one line."""
    return UnsupportedModelError(f"onnxruntime cannot run the model: {' '.join(str(error).split())[:300]}")
