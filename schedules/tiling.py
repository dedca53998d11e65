"""Default decisions for a convolution: an untuned build takes the variant that `pixel_cycles` ranks first."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.geometry import CopyScope, PixelGeometry, candidate_geometries
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.pixel_cycles import (
    MOST_BLOCKED_CHANNELS,
    SCRATCH_BYTES,
    channels_read,
    chunk_cycles,
    predicted_cycles,
)
from tvm_nm.workload import ConvWorkload

__all__ = ["choose_kernel", "geometries_for", "index_dtype", "oc_tiles", "reduction_blocks", "variant"]


def choose_kernel(
    workload: ConvWorkload,
    machine: Machine,
    *,
    block: int | None = None,
    index: IndexKind = IndexKind.NONE,
    kept: int | None = None,
) -> ConvKernel:
    """Return the kernel variant with the least predicted cycles.

    Parameters
    ----------
    workload
        The convolution.
    machine
        Vector width, registers, threads.
    block
        Output channels that share their kept positions; None where all do (dense).
    index
        How inputs are found.
    kept
        Length of a block row's reduction; default: everything.
    """
    if kept is None:
        kept = workload.in_channels_per_group * (workload.taps if index is IndexKind.POSITION else 1)
    geometries = geometries_for(workload, machine, index)
    variants = [
        variant(geometry, machine, block, oc_tile, index, kept, kept_per_block, scratch)
        for oc_tile in oc_tiles(workload, machine, block)
        for geometry in geometries
        for kept_per_block in reduction_blocks(kept, oc_tile)
        for scratch in SCRATCH_BYTES
    ]
    return min(variants, key=partial(predicted_cycles, machine=machine))


def geometries_for(workload: ConvWorkload, machine: Machine, index: IndexKind) -> list[PixelGeometry]:
    """Return the pixel layouts worth considering for a kernel with that kind of index."""
    found = candidate_geometries(workload, machine.lanes)
    return [g for g in found if index is IndexKind.NONE or g.allows_index(index is IndexKind.POSITION)]


def oc_tiles(workload: ConvWorkload, machine: Machine, block: int | None) -> list[int]:
    """Return the channel tiles worth considering; `block` as in `choose_kernel`."""
    per_group = workload.out_channels_per_group
    if block is None:
        # A tile that does not divide the channels computes some for nothing and bounds-checks the epilogue.
        dividing = [tile for tile in (8, 7, 6, 5, 4) if per_group % tile == 0]
        return dividing or [min(per_group, 8)]
    block = min(block, per_group)
    dividing = [tile for tile in range(8, 3, -1) if block % tile == 0]
    return dividing or [block if block < 8 else 8]


def reduction_blocks(kept: int, oc_tile: int) -> list[int]:
    """Return reduction block lengths to try, 0 for none: blocking pays where few output channels share a load."""
    if oc_tile > MOST_BLOCKED_CHANNELS:
        return [0]
    return [0, *(size for size in range(8, min(kept, 257)) if kept % size == 0)]


def variant(
    geometry: PixelGeometry,
    machine: Machine,
    block: int | None,
    oc_tile: int,
    index: IndexKind,
    kept: int,
    kept_per_block: int,
    scratch: int,
) -> ConvKernel:
    """Return the variant of a layout whose register tile and task are the best that the model knows.

    Parameters
    ----------
    geometry
        The pixel layout.
    machine, block, index, kept
        As in `choose_kernel`.
    oc_tile
        Output channels of the register tile.
    kept_per_block
        See `ConvKernel`.
    scratch
        Bytes that a task's sums may take.
    """
    work = geometry.workload
    row_block = min(block or oc_tile, work.out_channels_per_group)
    kept_channels = kept if index is not IndexKind.POSITION else -(-kept // work.taps)
    channels = channels_read(work, oc_tile, kept_channels, kept_per_block / kept or 1.0)
    most = max(1, machine.accumulators // oc_tile)
    vectors = min(
        geometry.tile_vectors(most),
        key=lambda v: chunk_cycles(geometry, oc_tile, v, channels),
    )
    kernel = ConvKernel(
        geometry=geometry,
        index=index,
        block=row_block,
        oc_tile=oc_tile,
        kept=kept,
        index_dtype=index_dtype(geometry, index),
        vectors_per_tile=vectors,
        rows_per_task=1,
        kept_per_block=kept_per_block,
    )
    return replace(kernel, rows_per_task=_rows_per_task(kernel, machine, scratch))


def index_dtype(geometry: PixelGeometry, index: IndexKind) -> str:
    """Return the smallest type that holds the entries of an index table."""
    entries = geometry.workload.in_channels
    if index is IndexKind.POSITION and not geometry.flat:
        entries *= geometry.channel_size
    if geometry.copy in (CopyScope.TASK, CopyScope.TILE, CopyScope.CHUNK):
        # A remainder by the type's whole range would be simplified away (see `conv._sums`).
        entries = (1 << (entries - 1).bit_length()) + 1
    return "uint8" if entries <= 1 << 8 else "uint16" if entries <= 1 << 16 else "int32"


def _rows_per_task(kernel: ConvKernel, machine: Machine, scratch: int) -> int:
    """Return as many block rows as fit the scratch while the tasks still divide evenly among the threads."""
    work, geometry, rows = kernel.workload, kernel.geometry, kernel.block_rows
    bytes_per_row = kernel.block * geometry.vectors * geometry.lanes * 4
    others = work.batch * geometry.chunks * work.groups
    if work.out_channels_per_group % kernel.block:
        return rows  # a short last block row: the task spans them all, so that the epilogue needs no bounds checks
    # Where tiles are stored from registers there is no scratch.
    limit = math.inf if kernel.stores_from_registers else scratch
    best = 1
    for per_task in kernel.task_rows:
        tasks = others * rows // per_task
        balanced = tasks % machine.threads == 0 or tasks >= 8 * machine.threads
        if per_task * bytes_per_row <= limit and balanced:
            best = per_task
    return best
