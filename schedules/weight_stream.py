"""Fetch weights from memory while earlier ones are being multiplied.

The weights of a network do not fit into L2: every inference streams them from beyond it. A kernel that goes over the
same *panel* of weights in several passes, one for each tile of pixels, needs them all within its first pass: too fast
for the memory, which has nothing to do in the other passes. Templates mark the loop over such a panel with `STREAM`,
and the loop of passes with `PASSES`; `stream_weights` then makes each pass fetch its share of the next panel into L2.
A kernel of one pass fetches its own weights a few iterations ahead, across the page boundaries at which the processor's
prefetchers stop.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_nm.schedules.fetch_code import Fetch, fetch, fetch_code, fetching_loop, substitute, unmarked_loop

__all__ = ["PASSES", "STREAM", "stream_weights"]

STREAM = "tvm_nm_stream"
"""Annotation of a loop over a panel: how many elements an iteration reads, contiguous with those of the next."""

PASSES = "tvm_nm_passes"
"""Annotation of a loop around it that goes over the same panel again and again."""

_WEIGHT = "weight"
_LINE = 16  # float32 elements of a cache line
_AHEAD = 1024  # elements that the only pass over a panel fetches ahead: a page


def stream_weights(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
    """Return a scheduled function whose marked loops prefetch; unchanged where the target has no known instruction."""
    code = fetch_code(target)
    if code is None:
        return func

    def in_passes(loop: Any) -> Any:
        return unmarked_loop(loop, PASSES, _stream(loop.body, code, loop)) if PASSES in loop.annotations else loop

    body = tvm_ffi.structural_map(func.body, (tirx.For, in_passes))
    return tirx.PrimFunc(func.params, _stream(body, code, None), func.ret_type, func.attrs)


def _stream(stmt: Any, code: str, passes: Any) -> Any:
    """Make the marked loops within a statement prefetch, each pass of the loop `passes` its share."""

    def stream(loop: Any) -> Any:
        if STREAM not in loop.annotations:
            return loop
        row = int(loop.annotations[STREAM])
        source, indices = _weights_of(loop)
        count = int(passes.extent) if passes is not None else 1
        ahead = int(loop.extent) * row if count > 1 else _AHEAD
        lines = -(-row // _LINE)
        share = -(-lines // count)
        first = passes.loop_var * share if count > 1 else tirx.const(0, "int32")
        offsets = [ahead + tirx.indexmod(first + line, lines) * _LINE for line in range(share)]
        fetches = [fetch(Fetch.AHEAD, source, [*indices[:-1], indices[-1] + offset]) for offset in offsets]
        return fetching_loop(loop, STREAM, fetches, code)

    return tvm_ffi.structural_map(stmt, (tirx.For, stream))


def _weights_of(loop: Any) -> tuple[Any, list[Any]]:
    """Return the weights that a loop reads and where its iteration starts to, in terms of the loops around."""
    loads: list[Any] = []
    values: dict[Any, Any] = {}

    def bind(realize: Any) -> None:
        for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
            values[axis.var] = value

    def start(inner: Any) -> None:
        values[inner.loop_var] = tirx.const(0, inner.loop_var.ty.dtype)

    def note(load: Any) -> None:
        if load.source.name == _WEIGHT:
            loads.append(load)

    kinds = ((s_tir.SBlockRealize, bind), (tirx.For, start), (tvm.ir.TensorLoad, note))
    tvm_ffi.structural_walk(loop.body, kinds)

    # Once from a block's axes to the loops, and once from the inner loops to their start.
    return loads[0].source, substitute(substitute(loads[0].indices, values), values)
