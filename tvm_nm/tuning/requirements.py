"""The packages of the `tune` extra, asked for when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from tvm_nm.errors import TuningError

__all__ = ["need_filelock"]


def need_filelock() -> ModuleType:
    """Return the module `filelock`.

    Raises
    ------
    TuningError
        If it is not installed.
    """
    try:
        return importlib.import_module("filelock")
    except ModuleNotFoundError as error:
        raise TuningError(f"tuning needs the package {error.name}; run: pip install 'tvm-nm[tune]'") from error
