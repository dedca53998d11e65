"""Finds loop nests that no schedule has touched."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

__all__ = ["assert_all_scheduled", "unscheduled_nests"]


def unscheduled_nests(func: tvm.tirx.PrimFunc, threshold: int) -> list[str]:
    """Outermost loops of more than `threshold` iterations in all that hold neither a parallel nor a vector loop."""
    nests: list[str] = []

    def work(node: Any) -> tuple[int, bool]:
        """Iterations of the innermost statements, and whether a loop is parallel or vectorised."""
        if isinstance(node, tirx.For):
            inner, scheduled = work(node.body)
            kinds = (tirx.ForKind.PARALLEL, tirx.ForKind.VECTORIZED)
            # A loop whose length depends on an outer one counts once.
            extent = int(node.extent) if isinstance(node.extent, tirx.IntImm) else 1
            return extent * inner, scheduled or (node.kind in kinds and extent > 1)
        if isinstance(node, tirx.SeqStmt):
            parts = [work(child) for child in node.seq]
            return sum(count for count, _ in parts), all(done for count, done in parts if count == max(parts)[0])
        for name in ("block", "body", "then_case"):
            if hasattr(node, name):
                return work(getattr(node, name))
        return 1, False

    def outermost(node: Any) -> None:
        if isinstance(node, tirx.For):
            count, scheduled = work(node)
            if count > threshold and not scheduled:
                nests.append(f"{node.loop_var} of {node.extent}: {count} iterations")
        elif isinstance(node, tirx.SeqStmt):
            for child in node.seq:
                outermost(child)
        else:
            for name in ("block", "body", "then_case"):
                if hasattr(node, name):
                    outermost(getattr(node, name))
                    return

    outermost(func.body)
    return nests


def assert_all_scheduled(mod: tvm.IRModule, threshold: int = 8192) -> None:
    """No operator is left as an unscheduled loop nest."""
    for name, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            assert func.attrs.get("tirx.is_scheduled", False), f"{name.name_hint} was not scheduled"
            nests = unscheduled_nests(func, threshold)
            assert not nests, f"{name.name_hint} has a naive loop nest: {nests}\n{func}"
