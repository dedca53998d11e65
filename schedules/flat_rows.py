"""Pixels as one flat row (see `geometry`): the input of a pointwise convolution, and outputs stored by vectors."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import te, tirx
from tvm.s_tir import SBlock, SBlockRealize
from tvm.tirx import BufferRegion

from tvm_nm.schedules.geometry import CopyScope, PixelGeometry
from tvm_nm.schedules.in_place import flat_store
from tvm_nm.schedules.panel_gather import PANEL_GATHER, Panels
from tvm_nm.schedules.row_copy import ROW_COPY, Columns

__all__ = ["flat_row", "with_flat_output"]


def flat_row(geometry: PixelGeometry, panel: int, data: te.Tensor, *, gathers: bool = False) -> te.Tensor:
    """Return what a kernel of flat pixels reads: the input, or what is left of it by a stride, as it is or packed.

    Packed for a tile at a time it has the shape of `padded_input` with a single row, the vectors of
    `PixelGeometry.output_pixel` one after another. As panels it is cut into tiles of `panel` pixels, see `_panels`.
    A stride takes a copy of the whole layer, unless panels are packed from the input itself (`gathers`).
    """
    work, lanes = geometry.workload, geometry.lanes
    source = data
    if gathers:
        return _panels(geometry, panel, data, gathers=True)
    if geometry.subsampled:

        def pixel(n: Any, c: Any, _row: Any, flat: Any) -> Any:
            y, x = tirx.indexdiv(flat, work.out_width), tirx.indexmod(flat, work.out_width)
            return data[n, c, y * work.stride[0], x * work.stride[1]]

        kept = (work.batch, work.in_channels, 1, work.out_pixels)
        attrs = {
            "tvm_nm_phase_columns": 1,
            "tvm_nm_plane": [1, work.out_height, work.out_width],
            ROW_COPY: Columns(lanes, work.width, 0, work.stride[1], 1).attribute(math.prod(kept)),
        }
        source = te.compute(kept, pixel, name="subsample", attrs=attrs)
    if geometry.copy is CopyScope.NONE:
        return source

    if geometry.copy is CopyScope.CHUNK:
        return _panels(geometry, panel, source)

    def element(n: Any, c: Any, _phase: Any, _row: Any, column: Any) -> Any:
        return source[n, c, 0, geometry.output_pixel(0, tirx.indexdiv(column, lanes), tirx.indexmod(column, lanes))]

    shape = (work.batch, work.in_channels, 1, 1, geometry.chunks * geometry.pitch)
    return te.compute(shape, element, name="pad", attrs={"tvm_nm_phase_columns": 1})


def _panels(geometry: PixelGeometry, panel: int, source: te.Tensor, *, gathers: bool = False) -> te.Tensor:
    """Return the vectors of each register tile, one input channel after another: (batch, chunk, tile, IC, pixel)."""
    work, lanes = geometry.workload, geometry.lanes

    def element(n: Any, chunk: Any, tile: Any, c: Any, pixel: Any) -> Any:
        start = chunk * geometry.pitch + tile * panel + tirx.indexdiv(pixel, lanes) * lanes
        if geometry.chunks * -(-geometry.pitch // panel) * panel > work.out_pixels:
            start = tirx.min(start, work.out_pixels - lanes)  # vectors that a short tile lacks are copied, not used
        flat = start + tirx.indexmod(pixel, lanes)
        if not gathers:
            return source[n, c, 0, flat]
        y, x = tirx.indexdiv(flat, work.out_width), tirx.indexmod(flat, work.out_width)
        return source[n, c, y * work.stride[0], x * work.stride[1]]

    tiles = -(-geometry.pitch // panel)
    shape = (work.batch, geometry.chunks, tiles, work.in_channels, panel)
    panels = Panels(lanes, work.out_height, work.out_width, *work.stride, geometry.pitch, panel)
    attrs = {PANEL_GATHER: panels.attribute} if gathers else {}
    return te.compute(shape, element, name="pad", attrs=attrs)


def with_flat_output(func: tvm.tirx.PrimFunc, geometry: PixelGeometry, shape: tuple[int, ...]) -> tvm.tirx.PrimFunc:
    """Let the last block, (N, OC, chunk, pixel), store to an output (N, OC, OH, OW) at each chunk's place in the plane.

    Chunks may overlap at the end, which a TE computation cannot express: it has one iteration for each element.
    """
    out = tirx.decl_buffer(shape, "float32", name="out")

    def moved(block: SBlock) -> SBlock:
        store = block.body
        n, oc, chunk, pixel = store.indices
        vector, lane = tirx.indexdiv(pixel, geometry.lanes), tirx.indexmod(pixel, geometry.lanes)
        place = [n, oc, tirx.const(0, "int32"), geometry.output_pixel(chunk, vector, lane)]
        region = [tvm.ir.Range.from_min_extent(index, 1) for index in place]
        return SBlock(
            block.iter_vars,
            block.reads,
            [BufferRegion(out, region)],
            block.name_hint,
            tirx.BufferStore(out, store.value, place),
            annotations={**block.annotations, **flat_store(geometry)},
        )

    def within(node: Any) -> Any:
        if isinstance(node, tirx.SeqStmt):
            return tirx.SeqStmt([*node.seq[:-1], within(node.seq[-1])])
        if isinstance(node, tirx.For):
            return tirx.For(node.loop_var, node.min, node.extent, node.kind, within(node.body))
        return SBlockRealize(node.iter_values, node.predicate, moved(node.block))

    root = func.body.block
    body = SBlock([], [], [], root.name_hint, within(root.body), alloc_buffers=root.alloc_buffers)
    return tirx.PrimFunc([*func.params[:-1], out], SBlockRealize([], True, body), func.ret_type, func.attrs)
