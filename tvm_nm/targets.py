"""What code is generated for: the target as users write it, and what it asks of a processor."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import tvm

from tvm_nm.errors import EnvironmentMismatchError
from tvm_nm.schedules.machine import host_target, target_from_json

__all__ = ["processor", "resolve_target"]


def resolve_target(
    target: Mapping[str, Any] | str | tvm.target.Target | None, threads: int | None
) -> tvm.target.Target:
    """Return the target with its number of threads filled in.

    Raises
    ------
    EnvironmentMismatchError
        If it is no target that TVM and LLVM know.
    """
    if threads is not None and threads < 1:
        raise EnvironmentMismatchError(f"a model runs with at least 1 thread, not {threads}")
    if target is None:
        return host_target(threads)
    if isinstance(target, tvm.target.Target):
        target = str(target)
    if isinstance(target, str):
        try:
            target = json.loads(target)
        except ValueError as error:
            raise EnvironmentMismatchError(
                f'target {target!r} is not JSON ({error}); write it as \'{{"kind": "llvm", "mcpu": "..."}}\''
            ) from error
    if not isinstance(target, Mapping):
        raise EnvironmentMismatchError(f"target {target!r} is not a dictionary")
    return target_from_json(dict(target), threads)


def processor(target: tvm.target.Target) -> tuple[str, tuple[str, ...]]:
    """Return the architecture and the features that code for a target may use."""
    triple = str(target.attrs.get("mtriple", ""))
    found = tvm.get_global_func("target.llvm_get_cpu_features")(target)
    return triple.partition("-")[0] or platform.machine(), tuple(sorted(str(name) for name in found))
