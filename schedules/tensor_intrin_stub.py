"""Keeps MetaSchedule from parsing tensor intrinsics that no kernel here uses.

MetaSchedule imports `tvm.s_tir.tensor_intrin` in the tuning process and in every builder worker. That parses the
intrinsics of all of TVM's targets, about 40 CPU seconds; a worker's time limit is 30, so every build fails. Those of
x86, which TVM's own rules for CPUs look up, take 0.4 s.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import tvm.s_tir

__all__ = ["skip_tensor_intrinsics"]

_PACKAGE = "tvm.s_tir.tensor_intrin"


def skip_tensor_intrinsics(*, load_x86: bool = True) -> None:
    """Put a package in the place of `tvm.s_tir.tensor_intrin` that loads its modules only when they are asked for.

    Call it before anything of MetaSchedule runs, and hand it to `LocalBuilder` as `initializer`. Where the real package
    has been imported, and when called again, it does nothing.

    Parameters
    ----------
    load_x86
        Register the intrinsics of x86.
    """
    if _PACKAGE in sys.modules:
        return
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(Path(tvm.s_tir.__file__).with_name("tensor_intrin"))]
    sys.modules[_PACKAGE] = package
    tvm.s_tir.tensor_intrin = package
    if load_x86:
        importlib.import_module(f"{_PACKAGE}.x86")
