"""The schedule template of the Winograd family.

Loop nest after scheduling (default decisions on AVX-512: register tile of 7 tiles x 4 channel vectors)::

    parallel n, chunk row, chunk column, part        # one task: a chunk of tiles, all or some blocks of channels
      for vector of input channels
        for row of pixels
          rows = data                                # vectors of channels: 16 loads, 64 shuffles, 16 stores a square
          pixels = rows                              # zeros around
        for tile                                     # 36 loads, 12 transforms of 6 values, 36 stores
          frequencies[6][6][tile] = B^T pixels B
      for block of output channels
        for frequency i, j                           # a matrix product each; its weights are one stream
          for step of tiles
            acc[7][4][lanes] = 0                     # 28 of 32 registers
            for input channel                        # 7 broadcasts, 4 loads, 28 FMAs
              acc += frequencies * weight
            sums[i][j] = acc
        for vector of output channels
          for tile                                   # 36 loads, 10 transforms of 6 values, 16 stores (4 maxima)
            tiles = A^T sums A
          for row, column, channel                   # bias, residual, activation, crop
            out = ...

A *staged* kernel has one chunk, and the three stages (input, products, output) are parallel loops of their own.

No buffer has the scope "local", which TVM would allocate on a heap: LLVM then takes what a register tile was stored to
for something that others may read, keeps it to the function's end, and spills what the loops in between need.

Decision: tiles of the register tile.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir

from tvm_nm.schedules.decisions import MOST_ACCUMULATORS, choose
from tvm_nm.schedules.transpose import transpose_intrinsic
from tvm_nm.schedules.weight_stream import PASSES, STREAM
from tvm_nm.schedules.winograd import WINOGRAD_RULE

__all__ = ["schedule_winograd"]

_ALIGN = 1024  # elements: the stride at which lines of L1 begin to compete for a set


def _producer(sch: s_tir.Schedule, block: Any, name: str) -> Any:
    return next(found for found in sch.get_producers(block) if sch.get(found).name_hint == name)


@tvm_ffi.register_global_func(f"s_tir.meta_schedule.cpu.{WINOGRAD_RULE}", override=True)  # type: ignore[untyped-decorator]
def schedule_winograd(sch: s_tir.Schedule, sums: Any) -> list[s_tir.Schedule]:
    """Schedule the convolution whose matrix products are block `sums`."""
    annotations = sch.get(sums).annotations
    chunk_rows, chunk_columns, default_tiles, staged, parts = (
        int(annotations[f"tvm_nm_{name}"])
        for name in ("chunk_rows", "chunk_columns", "tiles_per_step", "staged", "parts")
    )
    frequencies = _producer(sch, sums, "frequencies")
    input_rows = sch.get_producers(frequencies)
    pixels = _producer(sch, input_rows[0], "pixels")
    output_rows = sch.get_consumers(sums)
    tiles = sch.get_consumers(output_rows[0])[0]
    out = sch.get_consumers(tiles)[0]
    pixels_of_tile = int(sch.get(sch.get_loops(tiles)[-2]).extent)
    lanes, oc_vectors = (int(sch.get(sch.get_loops(sums)[axis]).extent) for axis in (8, 7))

    n, oc, y, x = sch.get_loops(out)
    chunk_row, row = sch.split(y, [None, chunk_rows * pixels_of_tile])
    chunk_column, column = sch.split(x, [None, chunk_columns * pixels_of_tile])
    block, in_block = sch.split(oc, [None, oc_vectors * lanes])
    vector, lane = sch.split(in_block, [oc_vectors, lanes])
    outer = [n, chunk_row, chunk_column]
    if parts > 1:
        part, block = sch.split(block, [parts, None])
        outer.append(part)
    sch.reorder(*outer, block, vector, row, column, lane)
    task = None
    if staged:
        sch.parallel(sch.fuse(*outer, block, vector))
    else:
        task = sch.fuse(*outer)
        sch.parallel(task)

    # output transform
    sch.compute_at(tiles, sch.get_loops(out)[0] if staged else vector, preserve_unit_loops=True)
    ty, p, tx, q, tlane = sch.get_loops(tiles)[-5:]
    sch.reorder(ty, tx, p, q, tlane)
    _register_block(sch, tiles, [p, q], tlane)
    for part in output_rows:
        sch.compute_at(part, tx, preserve_unit_loops=True)
        rp, rj, rlane = sch.get_loops(part)[-3:]
        sch.reorder(rj, rp, rlane)
        _register_block(sch, part, [rj, rp], rlane)

    # products
    flush = sch.cache_write(sums, 0, "global")
    if staged:
        fn, fy, fx, fb, fi, fj, ft, fv, fl = sch.get_loops(flush)
        sch.reorder(fn, fy, fx, fb, fi, fj)
        sch.parallel(sch.fuse(fn, fy, fx, fb, fi, fj))
    else:
        sch.compute_at(flush, block, preserve_unit_loops=True)
        ft, fv, fl = sch.get_loops(flush)[-3:]
    choices = list(range(1, max(default_tiles, MOST_ACCUMULATORS // oc_vectors) + 1))
    per_step = choose(sch, choices, default_tiles)
    t_outer, t_inner = sch.split(ft, [None, per_step])
    sch.annotate(t_outer, "pragma_loop_partition_hint", 1)
    sch.vectorize(fl)
    sch.unroll(fv)
    sch.unroll(t_inner)
    sch.compute_at(sums, t_outer, preserve_unit_loops=True)
    st, sv, sl, ic = sch.get_loops(sums)[-4:]
    sch.reorder(ic, st, sv, sl)
    sch.annotate(ic, STREAM, oc_vectors * lanes)
    sch.annotate(t_outer, PASSES, 1)
    sch.vectorize(sl)
    sch.unroll(sv)
    sch.unroll(st)
    sch.decompose_reduction(sums, ic)

    # input transform
    if task is not None:
        sch.compute_at(frequencies, task, preserve_unit_loops=True)
        fn, fcy, fcx, i, j, t, fblock, flane = sch.get_loops(frequencies)[-8:]
    else:
        fn, fcy, fcx, i, j, t, fblock, flane = sch.get_loops(frequencies)
    sch.reorder(fn, fcy, fcx, fblock, t, i, j, flane)
    if task is None:
        sch.parallel(sch.fuse(fn, fcy, fcx, fblock))
    ty, tx = sch.split(t, [chunk_rows, chunk_columns])
    _register_block(sch, frequencies, [i, j], flane)
    for part in input_rows:
        sch.compute_at(part, tx, preserve_unit_loops=True)
        ri, rb, _, rlane = sch.get_loops(part)[-4:]
        sch.reorder(rb, ri, rlane)
        _register_block(sch, part, [rb, ri], rlane)
    where = sch.get_loops(frequencies)[0] if task is None else fblock
    sch.compute_at(pixels, where, preserve_unit_loops=True)
    *_, row, _, plane = sch.get_loops(pixels)
    sch.vectorize(plane)
    rows = sch.get_producers(pixels)
    if rows:
        sch.compute_at(rows[0], row, preserve_unit_loops=True)
    sch.storage_align(frequencies, 0, 4, _ALIGN, 16)
    if rows:  # pixels of 16 channels become vectors of channels by shuffles
        column = sch.get_loops(rows[0])[-2]
        intrinsic = transpose_intrinsic(lanes, 1, int(sch.get(column).extent), to_rows=False)
        assert intrinsic is not None
        sch.tensorize(column, intrinsic)
    return [sch]


def _register_block(sch: s_tir.Schedule, block: Any, loops: list[Any], lane: Any) -> None:
    for loop in loops:
        sch.unroll(loop)
    sch.vectorize(lane)
