"""Schedules for whatever has no family of its own: elementwise chains, layout moves, reductions.

Elementwise producers are inlined into their consumers. A block that reads and writes the same positions of equal shapes
becomes one flat vector loop; other injective blocks keep their innermost loop, which LLVM vectorises; reductions run
parallel over their outputs.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.schedule import ScheduleError

from tvm_nm.schedules.machine import Machine

__all__ = ["schedule_generic"]

# Fewer elements than this are not worth waking the thread pool for.
_MIN_PARALLEL = 8192


def schedule_generic(sch: s_tir.Schedule, machine: Machine) -> None:
    """Schedule every block of the function in `sch`."""
    _inline_elementwise(sch)
    for block in _leaf_blocks(sch):
        if any(iterator.iter_type != tirx.IterVar.DataPar for iterator in sch.get(block).iter_vars):
            _schedule_reduction(sch, block, machine)
        else:
            _schedule_spatial(sch, block, machine)


def _leaf_blocks(sch: s_tir.Schedule) -> list[Any]:
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def _inline_elementwise(sch: s_tir.Schedule) -> None:
    for block in _leaf_blocks(sch):
        iterators = sch.get(block).iter_vars
        if any(iterator.iter_type != tirx.IterVar.DataPar for iterator in iterators) or not sch.get_consumers(block):
            continue
        # Inlining into a reduction repeats the work once for every element that it feeds.
        try:
            sch.compute_inline(block)
        except ScheduleError:
            continue  # not inlinable (an opaque access, say); it gets its own loops


def _extent(sch: s_tir.Schedule, loop: Any) -> int:
    """Return a loop's iterations; 1, the least, where they depend on an outer loop."""
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else 1


def _is_flat(sch: s_tir.Schedule, block: Any) -> bool:
    """Whether every buffer is accessed at exactly the block's own indices and has the same shape."""
    stmt = sch.get(block)
    iterators = [iterator.var for iterator in stmt.iter_vars]
    for region in [*stmt.reads, *stmt.writes]:
        if len(region.region) != len(iterators):
            return False
        for axis, variable, size in zip(region.region, iterators, region.source.shape, strict=True):
            one = isinstance(axis.extent, tirx.IntImm) and int(axis.extent) == 1
            full = one and (axis.min.same_as(variable) or (int(size) == 1 and _is_zero(axis.min)))
            if not full or int(size) != int(stmt.writes[0].source.shape[iterators.index(variable)]):
                return False
    return True


def _is_zero(value: Any) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == 0


def _schedule_spatial(sch: s_tir.Schedule, block: Any, machine: Machine) -> None:
    loops = sch.get_loops(block)
    if not loops:
        return
    total = math.prod(_extent(sch, loop) for loop in loops)
    if _is_flat(sch, block):
        fused = sch.fuse(*loops)
        vector = machine.lanes
        if total % vector:
            if total >= _MIN_PARALLEL:
                sch.parallel(sch.split(fused, [machine.threads, None])[0])
            return
        if total >= _MIN_PARALLEL and (total // vector) % machine.threads == 0:
            outer, _, lane = sch.split(fused, [machine.threads, None, vector])
            sch.parallel(outer)
        else:
            _, lane = sch.split(fused, [None, vector])
        sch.vectorize(lane)
        return
    if total < _MIN_PARALLEL:
        return
    # The last two axes stay loops, a row or an image at a time, if there are enough images, or rows, for the threads.
    for inner in (2, 1):
        outer = loops[:-inner]
        if math.prod(_extent(sch, loop) for loop in outer) >= machine.threads and outer:
            sch.parallel(sch.fuse(*outer))
            return
    part, _ = sch.split(loops[-1], [machine.threads, None])
    sch.parallel(sch.fuse(*loops[:-1], part))


def _schedule_reduction(sch: s_tir.Schedule, block: Any, machine: Machine) -> None:
    iterators = sch.get(block).iter_vars
    loops = sch.get_loops(block)
    spatial = [loop for loop, it in zip(loops, iterators, strict=True) if it.iter_type == tirx.IterVar.DataPar]
    reduction = [loop for loop, it in zip(loops, iterators, strict=True) if it.iter_type != tirx.IterVar.DataPar]
    total = math.prod(_extent(sch, loop) for loop in loops)
    outputs = math.prod(_extent(sch, loop) for loop in spatial)
    if outputs == 1:
        if total >= _MIN_PARALLEL and spatial:  # TVM fails on those of rank 0
            _reduce_in_parts(sch, reduction, total)
        return
    sch.reorder(*spatial, *reduction)
    fused = sch.fuse(*spatial)
    # Several sums at a time hide the latency of one after another, if enough are left for the threads and all are of
    # the same length.
    sizes = (8, 4, 2) if all(isinstance(sch.get(loop).extent, tirx.IntImm) for loop in reduction) else ()
    fitting = [size for size in sizes if outputs % size == 0 and outputs // size >= machine.threads]
    lanes = max(fitting, default=1)
    outer, inner = sch.split(fused, [None, lanes])
    sch.reorder(outer, *reduction, inner)
    sch.unroll(inner)
    if total >= _MIN_PARALLEL:
        sch.parallel(outer)
    sch.decompose_reduction(block, reduction[0])


def _reduce_in_parts(sch: s_tir.Schedule, reduction: list[Any], total: int) -> None:
    """Reduce parts of what gives a single value in parallel, then the parts."""
    parts = next(size for size in (64, 32, 16, 8, 4, 2, 1) if total % size == 0)
    part, _ = sch.split(sch.fuse(*reduction), [parts, None])
    sch.parallel(sch.fuse(*sch.get_loops(sch.rfactor(part, 0))[:-1]))
