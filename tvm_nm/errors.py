"""The errors a caller can act on.

Every message names the thing that is wrong and the remedy. The command line prints them as one line and exits with
code 2; library users catch `TvmNmError`.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "EnvironmentMismatchError",
    "GateError",
    "InfeasibleBudgetError",
    "ModelMismatchError",
    "PlanError",
    "TuningError",
    "TvmNmError",
    "UnsupportedModelError",
]


class TvmNmError(Exception):
    """Base of all errors that tvm_nm raises on purpose."""


class UnsupportedModelError(TvmNmError):
    """A model file that cannot be read or holds something that cannot be compiled.

    Parameters
    ----------
    reason
        What is wrong and, where there is one, the remedy.
    node
        Name of the ONNX node at fault, if one is.
    op
        Its operator type.
    """

    def __init__(self, reason: str, *, node: str | None = None, op: str | None = None) -> None:
        self.reason = reason
        self.node = node
        self.op = op
        where = f"node {node!r} ({op}): " if node is not None else f"operator {op}: " if op is not None else ""
        # The words come from a file that nobody vouches for: no line breaks, no terminal control.
        super().__init__("".join(c if c.isprintable() else "?" for c in where + reason))


class ModelMismatchError(TvmNmError):
    """A compiled or imported module whose outputs differ from onnxruntime's beyond tolerance."""


class ArtifactError(TvmNmError):
    """A built artefact that is missing, damaged or of another version, or that cannot be written."""


class EnvironmentMismatchError(TvmNmError):
    """The installed TVM, tvm-ffi or the host does not fit."""


class PlanError(TvmNmError):
    """A plan, or a selection of layers, that names what the model does not have or cannot be applied to it."""


class InfeasibleBudgetError(PlanError):
    """A budget that no plan meets.

    Parameters
    ----------
    message
        What cannot be met, with the least that can.
    least_us
        The least time that some plan achieves, in microseconds; None where the other limits rule out every plan.
    """

    def __init__(self, message: str, least_us: float | None = None) -> None:
        self.least_us = least_us
        super().__init__(message)


class CalibrationError(TvmNmError):
    """Calibration data that are missing, damaged, or do not fit the model."""


class GateError(TvmNmError):
    """A build whose answers are further from the dense network's than was allowed."""


class TuningError(TvmNmError):
    """A tuning database that cannot be read or written, or a tuning run that cannot start."""
