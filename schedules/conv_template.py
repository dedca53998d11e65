"""The schedule template of the convolution family.

Loop nest after scheduling (default decisions of a 3x3 convolution on AVX-512: tile 8 x 3 vectors)::

    parallel n, channel                          # pad: the zero-padded, phase-split copy, or one in each task
    parallel n, chunk, group, rows-of-task       # one task: a chunk of output rows x some block rows
      for pixel tile                             #   its inputs stay in L1/L2 while all its channels are computed
        for block row, tile
          acc[oc_tile][vectors][lanes] = 0       #   24 of 32 registers
          for kept (ky, kx unrolled)             #   oc_tile broadcasts, `vectors` loads, oc_tile * vectors FMAs
            acc += weight * data
          scratch = acc
      for channel, row, column                   # epilogue from the scratch: bias, residual, activation, crop
        out = ...

A flat row of pixels (1x1 kernels) is packed for each pixel tile, or read in place; its tiles, and those of aligned rows
(see `geometry`), go through the epilogue without a scratch.

Decisions: pixel vectors of the register tile, block rows of a task, length of the blocks of the reduction.
"""

from __future__ import annotations

import math
from typing import Any

import tvm_ffi
from tvm import s_tir

from tvm_nm.schedules.conv import CONV_RULE
from tvm_nm.schedules.decisions import choose, divisors, task_rows
from tvm_nm.schedules.geometry import CopyScope
from tvm_nm.schedules.panel_gather import PANEL_GATHER
from tvm_nm.schedules.prefetch import PREFETCH
from tvm_nm.schedules.row_copy import ROW_COPY
from tvm_nm.schedules.weight_stream import STREAM

__all__ = ["schedule_conv", "schedule_pad"]

# A kernel of up to this many taps is unrolled whole; of larger ones, only a row.
_MAX_UNROLLED_TAPS = 25
_LEAST_EPILOGUE_LANES = 4
# More pixels read the weights so often that it does not matter how they came the first time.
_FEW_PIXELS = 1024


def _attribute(sch: s_tir.Schedule, block: Any, name: str) -> int:
    return int(sch.get(block).annotations[name])


@tvm_ffi.register_global_func(f"s_tir.meta_schedule.cpu.{CONV_RULE}", override=True)  # type: ignore[untyped-decorator]
def schedule_conv(sch: s_tir.Schedule, sums: Any) -> list[s_tir.Schedule]:
    """Schedule the convolution whose reduction is block `sums`.

    MetaSchedule calls it by the block's `schedule_rule`; `ApplyDefaultSchedules` does the same without a search.
    """
    out = sch.get_consumers(sums)[0]
    groups = _attribute(sch, sums, "tvm_nm_groups")
    block = _attribute(sch, sums, "tvm_nm_block")
    copy_scope = list(CopyScope)[_attribute(sch, sums, "tvm_nm_copy_scope")]
    oc_tile, vectors, lanes = (int(sch.get(loop).extent) for loop in sch.get_loops(sums)[5:8])
    block_rows = int(sch.get(sch.get_loops(sums)[3]).extent)
    stores_from_registers = bool(_attribute(sch, sums, "tvm_nm_store_from_registers"))
    streaming = int(sch.get(sch.get_loops(sums)[1]).extent) * vectors * lanes <= _FEW_PIXELS
    default_vectors = _attribute(sch, sums, "tvm_nm_vectors_per_tile")
    default_rows = _attribute(sch, sums, "tvm_nm_rows_per_task")

    vector_choices = [int(size) for size in sch.get(sums).annotations["tvm_nm_tile_vectors"]]
    if copy_scope is CopyScope.CHUNK:
        vector_choices = [default_vectors]  # the panels are laid out for it
    vectors_per_tile = choose(sch, vector_choices, default_vectors)
    per_group = int(sch.get(sch.get_loops(out)[1]).extent) // groups

    # One task: a chunk of rows, some block rows of one group.
    n, oc, y, x = sch.get_loops(out)
    chunk, row = sch.split(y, [None, _attribute(sch, sums, "tvm_nm_rows_per_chunk")])
    group, in_group = sch.split(oc, [groups, None])
    if per_group % block:
        # A short last block row: the task spans them all, so that the epilogue needs no bounds checks.
        rows, channel = sch.split(in_group, [1, None])
    else:
        rows_per_task = choose(
            sch, task_rows(block_rows, groups, stores_from_registers=stores_from_registers), default_rows
        )
        rows, rows_of_task, in_row = sch.split(in_group, [None, rows_per_task, block])
        channel = sch.fuse(rows_of_task, in_row)
    sch.reorder(n, chunk, group, rows, channel, row, x)
    task = sch.fuse(n, chunk, group, rows)
    sch.parallel(task)
    producers = {sch.get(producer).name_hint: producer for producer in sch.get_producers(sums)}
    if stores_from_registers:
        panels = copy_scope is CopyScope.CHUNK
        tile = _store_from_registers(sch, sums, out, (channel, x), oc_tile, vectors_per_tile, panels, streaming)
    else:
        _vectorize_epilogue(sch, x, lanes)
        if _attribute(sch, sums, "tvm_nm_kept_per_block"):
            tile = _accumulate_in_scratch(sch, sums, task, vectors_per_tile)
        else:
            tile = _accumulate_in_registers(sch, sums, task, vectors_per_tile, streaming)
    if "pad" in producers:
        producers |= {sch.get(producer).name_hint: producer for producer in sch.get_producers(producers["pad"])}
        if copy_scope is CopyScope.TILE:
            _schedule_packing(sch, producers["pad"], tile, lanes)
        elif copy_scope is CopyScope.CHUNK:
            _schedule_panels(sch, producers["pad"], task, lanes)
        else:
            schedule_pad(sch, producers["pad"], task if copy_scope is CopyScope.TASK else None)
    if "subsample" in producers:
        schedule_pad(sch, producers["subsample"], None)
    return [sch]


def _vectorize_epilogue(sch: s_tir.Schedule, x: Any, lanes: int) -> None:
    """Store a row of at least a vector by vectors, or parts of one, that divide it.

    LLVM would unroll a row of up to 40 pixels whole and then vectorize over rows, with gathers and scatters: a third of
    the time of 5x5 layers with few input channels.
    """
    width = int(sch.get(x).extent)
    vector = math.gcd(width, lanes)
    if width >= lanes and vector >= min(lanes, _LEAST_EPILOGUE_LANES):
        sch.vectorize(sch.split(x, [None, vector])[1])


def _store_from_registers(
    sch: s_tir.Schedule,
    sums: Any,
    out: Any,
    loops: tuple[Any, Any],
    oc_tile: int,
    vectors_per_tile: Any,
    panels: bool,
    streaming: bool,
) -> Any:
    """Sum a register tile and store it through the epilogue; output rows of whole vectors need no scratch.

    Where all tiles of pixels are packed as `panels`, each tile of channels goes over all of them: its weights are read
    once, its output row by row.
    """
    channel, x = loops
    lanes = int(sch.get(sch.get_loops(sums)[7]).extent)
    tile, o = sch.split(channel, [None, oc_tile])
    vector, lane = sch.split(x, [None, lanes])
    tile_outer, tile_inner = _split_tile(sch, vector, vectors_per_tile)
    outer = (tile, tile_outer) if panels else (tile_outer, tile)
    sch.reorder(*outer, o, tile_inner, lane)
    sch.vectorize(lane)
    sch.unroll(tile_inner)
    sch.unroll(o)
    sch.compute_at(sums, outer[1], preserve_unit_loops=True)
    sch.set_scope(sums, 0, "local")
    _order_micro_kernel(sch, sums, streaming, prefetching=oc_tile if panels else 0)
    return tile_outer


def _accumulate_in_registers(sch: s_tir.Schedule, sums: Any, task: Any, vectors_per_tile: Any, streaming: bool) -> Any:
    """Sum a register tile over the whole reduction, then flush it to the task's scratch."""
    flush = sch.cache_write(sums, 0, "local")
    sch.compute_at(flush, task, preserve_unit_loops=True)
    n, chunk, group, row, tile, o, vector, lane = sch.get_loops(flush)[-8:]
    tile_outer, tile_inner = _split_tile(sch, vector, vectors_per_tile)
    sch.reorder(n, chunk, group, tile_outer, row, tile, o, tile_inner, lane)
    sch.vectorize(lane)
    sch.unroll(tile_inner)
    sch.unroll(o)

    sch.compute_at(sums, tile, preserve_unit_loops=True)
    _order_micro_kernel(sch, sums, streaming)
    return tile_outer


def _order_micro_kernel(sch: s_tir.Schedule, sums: Any, streaming: bool, *, prefetching: int = 0) -> None:
    """Put the reduction outside of the register tile and unroll the tile.

    The lines that the epilogue of `prefetching` channels touches are fetched meanwhile, in as many equal parts of the
    reduction as divide them, and, if `streaming`, so are weights.
    """
    taps = _attribute(sch, sums, "tvm_nm_taps")
    loops = sch.get_loops(sums)
    split = len(loops) - (3 if taps else 1)
    reduction, (o, vector, lane) = loops[split:], loops[split - 3 : split]
    if prefetching:
        parts = math.gcd(int(sch.get(reduction[0]).extent), prefetching)
        fetching, rest = sch.split(reduction[0], [parts, None])
        sch.annotate(fetching, PREFETCH, 1)
        reduction = [fetching, rest, *reduction[1:]]
    sch.reorder(*reduction, o, vector, lane)
    sch.vectorize(lane)
    sch.unroll(vector)
    sch.unroll(o)
    _unroll_taps(sch, reduction[-3:], taps)
    kept = reduction[-3] if taps else reduction[-1]
    if streaming and taps <= _MAX_UNROLLED_TAPS and int(sch.get(kept).extent) > 1:
        sch.annotate(kept, STREAM, max(taps, 1) * int(sch.get(o).extent))
    sch.decompose_reduction(sums, reduction[0])


def _accumulate_in_scratch(sch: s_tir.Schedule, sums: Any, task: Any, vectors_per_tile: Any) -> Any:
    """Sum over blocks of the reduction, all block rows for each, so that a block's inputs stay in L1.

    With few output channels sharing a load, every FMA needs a load of its own: they must come from L1. LLVM keeps a
    register tile in registers within a block and carries it through the scratch between blocks.
    """
    taps = _attribute(sch, sums, "tvm_nm_taps")
    default = _attribute(sch, sums, "tvm_nm_kept_per_block")
    sch.compute_at(sums, task, preserve_unit_loops=True)
    loops = sch.get_loops(sums)
    split = len(loops) - (3 if taps else 1)
    reduction, (n, chunk, group, row, tile, o, vector, lane) = loops[split:], loops[split - 8 : split]
    kept_choices = divisors(int(sch.get(reduction[0]).extent))
    block_outer, block_inner = sch.split(reduction[0], [None, choose(sch, kept_choices, default)])
    tile_outer, tile_inner = _split_tile(sch, vector, vectors_per_tile)
    taps_loops = list(reduction[1:])
    sch.reorder(n, chunk, group, tile_outer, block_outer, row, tile, block_inner, *taps_loops, o, tile_inner, lane)
    row_weights = [tile, block_inner, *taps_loops, o]
    row_size = math.prod(int(sch.get(loop).extent) for loop in row_weights)
    sch.vectorize(lane)
    sch.unroll(tile_inner)
    sch.unroll(o)
    _unroll_taps(sch, [block_inner, *taps_loops], taps)
    sch.decompose_reduction(sums, block_outer)
    sch.annotate(row, STREAM, row_size)  # not before: the loops that set the sums to zero would have it too
    return tile_outer


def _split_tile(sch: s_tir.Schedule, vector: Any, vectors_per_tile: Any) -> tuple[Any, Any]:
    outer, inner = sch.split(vector, [None, vectors_per_tile])
    # The last tile may be shorter; LoopPartition gives it its own code, so that full tiles carry no bounds checks.
    sch.annotate(outer, "pragma_loop_partition_hint", 1)
    return outer, inner


def _unroll_taps(sch: s_tir.Schedule, reduction: Any, taps: int) -> None:
    if not taps:
        return
    sch.unroll(reduction[2])
    if taps <= _MAX_UNROLLED_TAPS:
        sch.unroll(reduction[1])


def _schedule_packing(sch: s_tir.Schedule, pack: Any, tile: Any, lanes: int) -> None:
    """Copy the vectors of a register tile, one input channel after another."""
    sch.compute_at(pack, tile, preserve_unit_loops=True)
    vector, lane = sch.split(sch.get_loops(pack)[-1], [None, lanes])
    sch.vectorize(lane)
    sch.unroll(vector)


def _schedule_panels(sch: s_tir.Schedule, pack: Any, task: Any, lanes: int) -> None:
    """Copy a chunk's pixels, channel by channel: a channel's are contiguous in the input."""
    annotations = sch.get(pack).annotations
    sch.compute_at(pack, task, preserve_unit_loops=True)
    tile, channel, pixel = sch.get_loops(pack)[-3:]
    vector, lane = sch.split(pixel, [None, lanes])
    sch.reorder(channel, tile, vector, lane)
    sch.vectorize(lane)
    sch.unroll(vector)
    if PANEL_GATHER in annotations:
        sch.annotate(channel, PANEL_GATHER, [int(number) for number in annotations[PANEL_GATHER]])


def schedule_pad(sch: s_tir.Schedule, pad: Any, within: Any | None) -> None:
    """Schedule a copy of the input: where loop `within` needs it, or before the tasks, parallel over channels.

    The phases of one row are written side by side: their loads are the same lines.
    """
    annotations = sch.get(pad).annotations
    if within is not None:
        sch.compute_at(pad, within, preserve_unit_loops=True)
    loops = sch.get_loops(pad)
    if "tvm_nm_plane" in annotations:
        loops = [*loops[:-1], *sch.split(loops[-1], [int(extent) for extent in annotations["tvm_nm_plane"]])]
    *outer, phase, row, column = loops
    phase_row, phase_column = sch.split(phase, [None, int(annotations["tvm_nm_phase_columns"])])
    sch.reorder(phase_row, row, column, phase_column)
    sch.unroll(phase_column)
    if annotations.get(ROW_COPY):
        sch.annotate(column, ROW_COPY, [int(number) for number in annotations[ROW_COPY]])
    if within is None:
        sch.parallel(sch.fuse(*outer, phase_row))
