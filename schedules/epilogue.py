"""The scalar tail that every kernel family applies to its sums."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from tvm_nm.workload import Epilogue

__all__ = ["activate"]


def activate(value: Any, epilogue: Epilogue) -> Any:
    """Return `value` clipped to the epilogue's bounds."""
    if epilogue.clip_min is not None:
        value = tirx.max(value, tirx.const(epilogue.clip_min, "float32"))
    if epilogue.clip_max is not None:
        value = tirx.min(value, tirx.const(epilogue.clip_max, "float32"))
    return value
