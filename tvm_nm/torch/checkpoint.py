"""Interrupted training goes on where it stopped: checkpoints that are written whole or not at all."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import onnx
import torch

from tvm_nm.errors import ArtifactError
from tvm_nm.json_file import write_bytes

__all__ = ["fingerprint", "read_checkpoint", "write_checkpoint"]

_FORMAT = "tvm_nm.training-checkpoint"
_VERSION = 1


def fingerprint(*parts: Any) -> str:
    """SHA-256 of models, and of what else decides how a run goes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, onnx.ModelProto):
            digest.update(part.SerializeToString(deterministic=True))
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def write_checkpoint(path: Path, run: str, state: dict[str, Any]) -> None:
    """Write the state of the run with that fingerprint.

    Raises
    ------
    ArtifactError
        If the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, "run": run, "state": state}, buffer)
    write_bytes(path, buffer.getvalue(), "checkpoint")


def read_checkpoint(path: Path, run: str) -> dict[str, Any] | None:
    """Read the state of a run; None where there is no file.

    Only tensors and plain values are read: a file from elsewhere cannot run code.

    Raises
    ------
    ArtifactError
        If the file is damaged or belongs to another run.
    """
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file the unpickler raises anything
        raise ArtifactError(f"checkpoint {path} cannot be read ({type(error).__name__}); delete it") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT or found.get("version") != _VERSION:
        raise ArtifactError(f"{path} is no checkpoint of this version of tvm_nm; delete it or choose another")
    if found["run"] != run:
        raise ArtifactError(
            f"checkpoint {path} belongs to another run (model, data or options differ); delete it or choose another"
        )
    state: dict[str, Any] = found["state"]
    return state
