"""The schedule template of the convolution family.

Loop nest after scheduling (default decisions of a 3x3 convolution on AVX-512: tile 8 x 3 vectors)::

    parallel n, channel                          # pad: the zero-padded, phase-split copy (absent where not needed)
    parallel n, chunk, group, rows-of-task       # one task: a chunk of output rows x some block rows
      for pixel tile                             #   its inputs stay in L1/L2 while all its channels are computed
        for block row, tile
          acc[oc_tile][vectors][lanes] = 0       #   24 of 32 registers
          for kept (ky, kx unrolled)             #   oc_tile broadcasts, `vectors` loads, oc_tile * vectors FMAs
            acc += weight * data
          scratch = acc
      for channel, row, column                   # epilogue from the scratch: bias, residual, activation, crop
        out = ...

Decisions: pixel vectors of the register tile, block rows of a task, unrolling of the reduction.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir

from tvm_nm.schedules.conv import CONV_RULE

__all__ = ["schedule_conv"]

# A kernel of up to this many taps is unrolled whole; of larger ones, only a row.
_MAX_UNROLLED_TAPS = 25
_MOST_ACCUMULATORS = 28


def _divisors(number: int, largest: int) -> list[int]:
    return [d for d in range(1, min(number, largest) + 1) if number % d == 0]


def _choose(sch: s_tir.Schedule, candidates: list[int], default: int) -> Any:
    """Sample one candidate; untuned schedules take `default`."""
    probability = [1.0 / len(candidates)] * len(candidates)
    return sch.sample_categorical(candidates, probability, decision=candidates.index(default))


def _attribute(sch: s_tir.Schedule, block: Any, name: str) -> int:
    return int(sch.get(block).annotations[name])


@tvm_ffi.register_global_func(f"s_tir.meta_schedule.cpu.{CONV_RULE}", override=True)
def schedule_conv(sch: s_tir.Schedule, sums: Any) -> list[s_tir.Schedule]:
    """Schedule the convolution whose reduction is block `sums`.

    MetaSchedule calls it by the block's `schedule_rule`; `apply_default_schedules` does the same without a search.
    """
    out = sch.get_consumers(sums)[0]
    groups = _attribute(sch, sums, "tvm_nm_groups")
    taps = _attribute(sch, sums, "tvm_nm_taps")
    block = _attribute(sch, sums, "tvm_nm_block")
    oc_tile, vectors = (int(sch.get(loop).extent) for loop in sch.get_loops(sums)[5:7])
    block_rows = int(sch.get(sch.get_loops(sums)[3]).extent)
    default_vectors = _attribute(sch, sums, "tvm_nm_vectors_per_tile")
    default_rows = _attribute(sch, sums, "tvm_nm_rows_per_task")

    vector_choices = list(range(1, min(vectors, max(default_vectors, _MOST_ACCUMULATORS // oc_tile)) + 1))
    vectors_per_tile = _choose(sch, vector_choices, default_vectors)
    rows_per_task = _choose(sch, _divisors(block_rows, block_rows), default_rows)

    # One task: a chunk of rows, some block rows of one group.
    n, oc, y, x = sch.get_loops(out)
    chunk, row = sch.split(y, [None, _attribute(sch, sums, "tvm_nm_rows_per_chunk")])
    group, in_group = sch.split(oc, [groups, None])
    if block_rows == 1:
        task_rows, channel = sch.split(in_group, [1, None])
    else:
        task_rows, rows_of_task, in_row = sch.split(in_group, [None, rows_per_task, block])
        channel = sch.fuse(rows_of_task, in_row)
    sch.reorder(n, chunk, group, task_rows, channel, row, x)
    task = sch.fuse(n, chunk, group, task_rows)
    sch.parallel(task)

    pads = [producer for producer in sch.get_producers(sums) if sch.get(producer).name_hint == "pad"]
    flush = sch.cache_write(sums, 0, "local")
    sch.compute_at(flush, task, preserve_unit_loops=True)
    n1, chunk1, group1, row1, tile1, o1, v1, lane1 = sch.get_loops(flush)[-8:]
    tile_outer, tile_inner = sch.split(v1, [None, vectors_per_tile])
    sch.reorder(n1, chunk1, group1, tile_outer, row1, tile1, o1, tile_inner, lane1)
    # The last tile may be shorter; LoopPartition gives it its own code, so that full tiles carry no bounds checks.
    sch.annotate(tile_outer, "pragma_loop_partition_hint", 1)
    sch.vectorize(lane1)
    sch.unroll(tile_inner)
    sch.unroll(o1)

    sch.compute_at(sums, tile1, preserve_unit_loops=True)
    loops = sch.get_loops(sums)
    reduction_loops = 3 if taps else 1
    reduction, (o2, v2, lane2) = loops[-reduction_loops:], loops[-reduction_loops - 3 : -reduction_loops]
    sch.reorder(*reduction, o2, v2, lane2)
    sch.vectorize(lane2)
    sch.unroll(v2)
    sch.unroll(o2)
    if len(reduction) == 3:
        sch.unroll(reduction[2])
        if taps <= _MAX_UNROLLED_TAPS:
            sch.unroll(reduction[1])
    sch.decompose_reduction(sums, reduction[0])
    for pad in pads:
        _schedule_pad(sch, pad, task, private=bool(_attribute(sch, sums, "tvm_nm_private_pad")))
    return [sch]


def _schedule_pad(sch: s_tir.Schedule, pad: Any, task: Any, *, private: bool) -> None:
    annotations = sch.get(pad).annotations
    loops = sch.get_loops(pad)
    if "tvm_nm_plane" in annotations:
        planes, rows, columns = (int(extent) for extent in annotations["tvm_nm_plane"])
        plane, _, _ = sch.split(loops[1], [planes, rows, columns])
        sch.parallel(sch.fuse(loops[0], plane))
        return
    if private:
        sch.compute_at(pad, task, preserve_unit_loops=True)
        return
    sch.parallel(sch.fuse(*loops[:3]))
