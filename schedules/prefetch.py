"""Fetch what a register tile's epilogue touches while its sums are computed.

An epilogue reads a few lines of the residual and writes as many of the output, in other pages for each output channel:
no prefetcher of the processor foresees them. Fetched when they are needed, they keep the core waiting: 64 lines for
each tile of 8 channels and 3 vectors, a quarter of the time of a pointwise layer with 256 input channels and more of a
sparse one. The templates mark a loop of the reduction with `PREFETCH`; each of its iterations then fetches the lines of
its share of the tile's channels.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlockRealize

from tvm_nm.schedules.fetch_code import Fetch, fetch, fetch_code, fetching_loop, substitute

__all__ = ["PREFETCH", "add_prefetches"]

PREFETCH = "tvm_nm_prefetch"
"""Annotation of a loop beside an epilogue, whose extent divides the channels of the register tile."""


def add_prefetches(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
    """Return a scheduled function with prefetches in the loops that are marked with `PREFETCH`.

    Unchanged where the target has no known instruction.
    """
    code = fetch_code(target)
    if code is None:
        return func

    def visit(stmt: Any) -> Any:
        store = _Store.of(stmt.seq[-1])
        if store is None:
            return stmt
        return tirx.SeqStmt([*(store.fetched_within(other, code) for other in stmt.seq[:-1]), stmt.seq[-1]])

    body = tvm_ffi.structural_map(func.body, (tirx.SeqStmt, visit))
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


class _Store:
    """An epilogue: a nest of loops around one block, the innermost over a tile's channels, vectors and lanes."""

    def __init__(self, loops: list[Any], realize: Any) -> None:
        self._fixed = [loop.loop_var for loop in loops[:-3]]
        self._channel, self._vector, self._lane = loops[-3:]
        block = realize.block
        store = block.body
        bound = dict(zip((axis.var for axis in block.iter_vars), realize.iter_values, strict=True))
        self._places = [(Fetch.WRITE, store.buffer, substitute(list(store.indices), bound))]
        for load in _loads(store.value):
            if load.source.name == "residual":
                self._places.append((Fetch.READ, load.source, substitute(list(load.indices), bound)))

    @staticmethod
    def of(stmt: Any) -> _Store | None:
        loops = []
        while isinstance(stmt, tirx.For):
            loops.append(stmt)
            stmt = stmt.body
        stores = isinstance(stmt, SBlockRealize) and isinstance(stmt.block.body, tirx.BufferStore)
        return _Store(loops, stmt) if stores and len(loops) >= 3 else None

    def fetched_within(self, stmt: Any, code: str) -> Any:
        """Return a statement whose marked loops fetch what this epilogue touches; `code` defines how."""

        def visit(loop: Any) -> Any:
            if PREFETCH not in loop.annotations:
                return loop
            return fetching_loop(loop, PREFETCH, self._fetches(loop.loop_var, int(loop.extent)), code)

        return tvm_ffi.structural_map(stmt, (tirx.For, visit))

    def _fetches(self, step: Any, steps: int) -> list[Any]:
        per_step = int(self._channel.extent) // steps
        vectors, lanes = int(self._vector.extent), int(self._lane.extent)
        # The first element of each vector, and the last of all: rows may start anywhere in a line.
        elements = [(vector, 0) for vector in range(vectors)] + [(vectors - 1, lanes - 1)]
        return [
            self._fetch(kind, buffer, indices, step * per_step + channel, vector, lane)
            for channel in range(per_step)
            for vector, lane in elements
            for kind, buffer, indices in self._places
        ]

    def _fetch(self, kind: Fetch, buffer: Any, indices: list[Any], channel: Any, vector: int, lane: int) -> Any:
        values = {var: tirx.const(0, var.ty.dtype) for var in self._fixed}
        for loop, value in ((self._channel, channel), (self._vector, vector), (self._lane, lane)):
            values[loop.loop_var] = tirx.const(value, "int32") if isinstance(value, int) else value
        return fetch(kind, buffer, substitute(indices, values))


def _loads(expr: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, (tvm.ir.TensorLoad, found.append))
    return found
