"""Pack what a stride leaves of an input into panels, without a copy in between.

A pointwise convolution with a stride reads every other pixel of every other row. Its panels hold whole vectors of the
remaining pixels, joined to one flat row (see `geometry`), so that vectors begin and end anywhere in rows of 28, 14 or 7
pixels. A copy of all channels without the skipped pixels goes to L2 and comes back, and takes as long as reading the
input from beyond L2 does. Here the rows of a few channels are joined in L1, and packed from there::

    for 8 channels
      for row of the chunk, piece          2 loads, a shuffle, a store to the joined row
      for vector of the chunk              a load from it, a store to the channel's panel
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize
from tvm.tirx import BufferRegion

from tvm_nm.schedules.fetch_code import substitute
from tvm_nm.schedules.row_copy import columns_of, pieces, vector_at

__all__ = ["PANEL_GATHER", "Panels", "gather_panels"]

PANEL_GATHER = "tvm_nm_panel_gather"
"""Annotation of a loop over the channels of a chunk's panels: the numbers of a `Panels`."""

# Joined rows are read back when the stores to them are done: a load cannot take its lanes from two pending stores.
_CHANNELS = 8


@dataclass(frozen=True, slots=True)
class Panels:
    """How the pixels of a map without those which a stride skips are cut.

    Attributes
    ----------
    lanes
        float32 elements of one vector.
    height, width
        Rows and columns of the map: the output's.
    down, across
        The stride.
    chunk
        Pixels of one chunk, whole vectors.
    panel
        Pixels of one panel; the last one of a chunk may be shorter.
    """

    lanes: int
    height: int
    width: int
    down: int
    across: int
    chunk: int
    panel: int

    @property
    def attribute(self) -> list[int]:
        """What `PANEL_GATHER` is annotated with."""
        return list(astuple(self))

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def last_vector(self) -> int:
        """Where the last vector of the flat row begins: it ends with the row."""
        return self.pixels - self.lanes

    @property
    def rows(self) -> int:
        """The most rows that a chunk has pixels of."""
        starts = range(0, self.pixels, self.chunk)
        ends = [min(start + self.chunk, self.pixels) for start in starts]
        tops = [min(start, self.last_vector) // self.width for start in starts]
        return max((end - 1) // self.width - top + 1 for top, end in zip(tops, ends, strict=True))

    @property
    def clipped(self) -> bool:
        """Whether vectors of the last chunk would reach beyond the row."""
        return self.pixels % self.chunk != 0


def gather_panels(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Return a scheduled function whose marked loops pack panels from rows that are joined in L1."""

    def visit(loop: Any) -> Any:
        if PANEL_GATHER not in loop.annotations:
            return loop
        return _gather(Panels(*(int(number) for number in loop.annotations[PANEL_GATHER])), loop)

    body = tvm_ffi.structural_map(func.body, (tirx.For, visit))
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


def _gather(panels: Panels, loop: Any) -> Any:
    """Return the block of a chunk, for a loop over channels around the block that copies an element."""
    realize = loop.body
    while isinstance(realize, tirx.For):
        realize = realize.body
    block = realize.block
    target, source = block.body.buffer, block.body.value.source
    bound = dict(zip((axis.var for axis in block.iter_vars), realize.iter_values, strict=True))
    image, chunk, _, from_channel, _ = substitute(
        substitute(list(block.body.indices), bound), {loop.loop_var: tirx.const(0, loop.loop_var.ty.dtype)}
    )
    lanes, width, channels = panels.lanes, panels.width, int(loop.extent)
    together = math.gcd(channels, _CHANNELS)
    first = chunk * panels.chunk
    top = tirx.indexdiv(tirx.min(first, panels.last_vector) if panels.clipped else first, width)
    joined = tirx.decl_buffer((together, panels.rows * width), "float32", name="joined")

    group, channel, row, to_pack = (tirx.Var(name, "int32") for name in ("group", "channel", "row", "to_pack"))
    y = tirx.min(top + row, panels.height - 1) * panels.down
    join = [
        tirx.BufferStore(
            joined,
            columns_of(
                source, [image, from_channel + group * together + channel, y], at * panels.across, size, panels.across
            ),
            vector_at([channel, row * width], at, size),
        )
        for at, size in pieces(0, width, lanes)
    ]

    def pack(panel: Any, vector: int) -> Any:
        start = first + panel * panels.panel + vector * lanes
        if panels.clipped:
            start = tirx.min(start, panels.last_vector)
        value = tirx.BufferLoad(joined, vector_at([to_pack, start - top * width], 0, lanes))
        place = [image, chunk, panel, from_channel + group * together + to_pack, vector * lanes]
        return tirx.BufferStore(target, value, vector_at(place, 0, lanes))

    full, rest = divmod(panels.chunk, panels.panel)
    panel = tirx.Var("panel", "int32")
    packs = [_loop(panel, full, [pack(panel, vector) for vector in range(panels.panel // lanes)])] if full else []
    packs += [pack(tirx.const(full, "int32"), vector) for vector in range(rest // lanes)]
    body = _loop(
        group,
        channels // together,
        [_loop(channel, together, [_loop(row, panels.rows, join)]), _loop(to_pack, together, packs)],
    )
    whole = [tvm.ir.Range.from_min_extent(0, extent) for extent in source.shape]
    of_chunk = [tvm.ir.Range.from_min_extent(at, 1) for at in (image, chunk)]
    written = [*of_chunk, *(tvm.ir.Range.from_min_extent(0, extent) for extent in list(target.shape)[2:])]
    gather = SBlock(
        [],
        [BufferRegion(source, whole)],
        [BufferRegion(target, written)],
        block.name_hint,
        body,
        alloc_buffers=[joined],
    )
    return SBlockRealize([], tirx.const(True, "bool"), gather)


def _loop(variable: Any, extent: int, body: list[Any]) -> Any:
    inner = body[0] if len(body) == 1 else tirx.SeqStmt(body)
    return tirx.For(variable, 0, extent, tirx.ForKind.SERIAL, inner)
