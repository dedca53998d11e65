"""The schedule template of the channel-vector convolution family.

Loop nest after scheduling (default decisions of a 3x3 convolution on a 14x14 map, AVX-512: tile 2 x 14)::

    parallel n, channel                          # pad: the zero-padded copy, for a convolution with padding
    parallel n, group, block row, tile           # one task: the output channels of a register tile, all pixels
      for block of the reduction                 #   its weights stay in L1 ...
        for pixel tile                           #   ... while all pixels use them
          acc[vectors][pixels][lanes] = scratch
          for kept                               #   `vectors` loads, `pixels` broadcasts, vectors * pixels FMAs
            acc += weight * data
          scratch = acc
      turned = transpose(scratch)                #   with shuffles
      for channel, pixel                         #   epilogue: bias, residual, activation
        out = ...

Decisions: rows and columns of the pixel tile, length of a block of the reduction.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir

from tvm_nm.schedules.channel_conv import CHANNEL_CONV_RULE
from tvm_nm.schedules.decisions import MOST_ACCUMULATORS, choose
from tvm_nm.schedules.lane_conv import LANE_CONV_RULE
from tvm_nm.schedules.row_copy import ROW_COPY
from tvm_nm.schedules.transpose import transpose_intrinsic
from tvm_nm.schedules.weight_stream import PASSES, STREAM

__all__ = ["schedule_channel_conv", "schedule_lane_conv"]


@tvm_ffi.register_global_func(f"s_tir.meta_schedule.cpu.{CHANNEL_CONV_RULE}", override=True)  # type: ignore[untyped-decorator]
def schedule_channel_conv(sch: s_tir.Schedule, sums: Any) -> list[s_tir.Schedule]:
    """Schedule the convolution whose reduction is block `sums`; see `conv_template.schedule_conv`."""
    return _schedule(sch, sums, lane_select=False)


def _schedule(sch: s_tir.Schedule, sums: Any, *, lane_select: bool) -> list[s_tir.Schedule]:
    annotations = sch.get(sums).annotations
    rows, columns, kept_per_block, block = (
        int(annotations[f"tvm_nm_{name}"]) for name in ("tile_rows", "tile_columns", "kept_per_block", "block")
    )
    turned = sch.get_consumers(sums)[0]
    out = sch.get_consumers(turned)[0]
    groups, block_rows, tiles = (int(sch.get(loop).extent) for loop in sch.get_loops(sums)[1:4])

    n, oc, y, x = sch.get_loops(out)
    per_group = int(sch.get(oc).extent) // groups
    if per_group % block == 0:
        if min(groups, block_rows, tiles) > 1:
            # compute_at would derive the row from the fused loop as `t // 2 - t // 4 * 2`, not `t % 4 // 2`: TVM does
            # not see that it is affine, and refuses to vectorize. A block that counts channels as its producer does
            # leaves nothing to derive. The transformation in turn does not take axes of a single element.
            oc_tile = block // tiles
            sch.transform_block_layout(
                out,
                lambda n, c, y, x: (n, c // per_group, c % per_group // block, c % block // oc_tile, c % oc_tile, y, x),
            )
            n, group, row, tile, _, y, x = sch.get_loops(out)
        else:
            group, in_group = sch.split(oc, [groups, None])
            row, tile, _ = sch.split(in_group, [block_rows, tiles, None])
        sch.fuse(y, x)
        task = sch.fuse(n, group, row, tile)
        sch.parallel(task)
        sch.compute_at(turned, task, preserve_unit_loops=True)
    else:
        # Some of the last row's channels do not exist: tasks of their own compute them, and the epilogue drops them.
        sch.fuse(y, x)
        sch.parallel(sch.fuse(n, oc))
        n, group, row, tile = sch.get_loops(turned)[:4]
        task = sch.fuse(n, group, row, tile)
        sch.parallel(task)
    sch.compute_at(sums, task, preserve_unit_loops=True)
    _order_micro_kernel(sch, sums, rows, columns, kept_per_block)
    _transpose(sch, turned)
    for copy in sch.get_producers(sums):
        if sch.get(copy).name_hint == "interleaved":
            _interleave(sch, copy)
        elif sch.get(copy).name_hint == "pad" and lane_select:
            _pad_vectors(sch, copy)
        elif sch.get(copy).name_hint == "pad":
            _schedule_pad(sch, copy)
    return [sch]


@tvm_ffi.register_global_func(f"s_tir.meta_schedule.cpu.{LANE_CONV_RULE}", override=True)  # type: ignore[untyped-decorator]
def schedule_lane_conv(sch: s_tir.Schedule, sums: Any) -> list[s_tir.Schedule]:
    """Schedule the lane-select convolution whose reduction is block `sums`: the same nest, from vectors of inputs."""
    return _schedule(sch, sums, lane_select=True)


def _order_micro_kernel(sch: s_tir.Schedule, sums: Any, rows: int, columns: int, kept_per_block: int) -> None:
    v, y, x, lane, kept = sch.get_loops(sums)[-5:]
    vectors, height, width = (int(sch.get(loop).extent) for loop in (v, y, x))
    most = max(rows * columns, MOST_ACCUMULATORS // vectors)
    length = int(sch.get(kept).extent)
    tile_columns = choose(sch, [c for c in range(1, width + 1) if c <= most], columns)
    tile_rows = choose(sch, [r for r in range(1, height + 1) if r <= most], rows)
    per_block = choose(sch, [d for d in range(1, length + 1) if length % d == 0], kept_per_block)
    kept_outer, kept_inner = sch.split(kept, [None, per_block])
    y_outer, y_inner = sch.split(y, [None, tile_rows])
    x_outer, x_inner = sch.split(x, [None, tile_columns])
    for outer in (y_outer, x_outer):
        # The last tile may be shorter; LoopPartition gives it its own code, so that full tiles carry no bounds checks.
        sch.annotate(outer, "pragma_loop_partition_hint", 1)
    sch.reorder(kept_outer, y_outer, x_outer, kept_inner, y_inner, x_inner, v, lane)
    sch.annotate(kept_inner, STREAM, vectors * int(sch.get(lane).extent))
    sch.annotate(max(x_outer, y_outer, key=lambda loop: int(sch.get(loop).extent)), PASSES, 1)
    sch.vectorize(lane)
    for loop in (v, y_inner, x_inner):
        sch.unroll(loop)
    sch.decompose_reduction(sums, kept_outer)


def _transpose(sch: s_tir.Schedule, turned: Any) -> None:
    loops = sch.get_loops(turned)
    at = len(loops) - len(sch.get(turned).iter_vars) + 5
    intrinsic = transpose_intrinsic(*(int(sch.get(loop).extent) for loop in loops[at:]))
    if intrinsic is not None:
        sch.tensorize(loops[at], intrinsic)


def _schedule_pad(sch: s_tir.Schedule, pad: Any) -> None:
    annotations = sch.get(pad).annotations
    loops = sch.get_loops(pad)
    if "tvm_nm_plane" in annotations:
        loops = [*loops[:-1], *sch.split(loops[-1], [int(extent) for extent in annotations["tvm_nm_plane"]])]
    if annotations.get(ROW_COPY):
        sch.annotate(loops[-1], ROW_COPY, [int(number) for number in annotations[ROW_COPY]])
    sch.parallel(sch.fuse(*loops[:2]))


def _interleave(sch: s_tir.Schedule, block: Any) -> None:
    """Transpose rows of pixels to vectors of channels, in parallel over the vectors."""
    n, vector, *pixels, lane = sch.get_loops(block)
    lanes, *extents = (int(sch.get(loop).extent) for loop in (lane, *pixels))
    whole = int(sch.get(block).annotations["tvm_nm_whole_vectors"])
    shape = extents if len(extents) == 2 else (1, *extents)
    intrinsic = transpose_intrinsic(lanes, *shape, to_rows=False) if whole else None
    sch.parallel(sch.fuse(n, vector))
    if intrinsic is not None:
        sch.tensorize(pixels[0], intrinsic)


def _pad_vectors(sch: s_tir.Schedule, pad: Any) -> None:
    """Copy whole vectors, in parallel over the planes."""
    for interleaved in sch.get_producers(pad):
        _interleave(sch, interleaved)
    n, vector, _, _, lane = sch.get_loops(pad)
    sch.parallel(sch.fuse(n, vector))
    sch.vectorize(lane)
