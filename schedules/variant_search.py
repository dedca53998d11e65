"""The search space of a task's kernel variants: which are worth measuring, in which order, and what is near one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tvm_nm.schedules.chain import ChainKernel
from tvm_nm.schedules.chain_tiling import chain_cycles
from tvm_nm.schedules.channel_conv import ChannelConvKernel
from tvm_nm.schedules.channel_tiling import channel_candidates, channel_cycles
from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.fc import FcKernel
from tvm_nm.schedules.geometry import CopyScope, PixelGeometry
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.lane_conv import LaneConvKernel
from tvm_nm.schedules.lane_tiling import lane_candidates, lane_cycles
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.pair_conv import PairConvKernel
from tvm_nm.schedules.pair_tiling import pair_candidates, pair_cycles
from tvm_nm.schedules.tiling import (
    SCRATCH_BYTES,
    geometries_for,
    index_dtype,
    oc_tiles,
    predicted_cycles,
    reduction_blocks,
    variant,
)
from tvm_nm.schedules.variants import (
    Kernel,
    chain_kernels,
    channel_kernels,
    default_kernel,
    divisors,
    lane_kernels,
    most_sums,
    pair_kernels,
)
from tvm_nm.schedules.winograd import WinogradKernel
from tvm_nm.schedules.winograd_tiling import winograd_candidates, winograd_cycles

__all__ = ["neighbours", "ranked_kernels"]

_BEST_LAYOUTS = 24
_OF_CHANNELS = 6
_SAME_LAYOUT = 3


def ranked_kernels(task: KernelTask, machine: Machine, limit: int) -> list[Kernel]:
    """Return the variants with the least predicted time, best first, not more than a few of any one layout.

    The first is the one that an untuned build uses.
    """
    default = default_kernel(task, machine)
    if isinstance(default, ChainKernel):
        chains = sorted(chain_kernels(task, machine), key=lambda chain: chain_cycles(chain, machine))
        return list[Kernel](chains[:limit])
    if isinstance(default, FcKernel):
        return [default, *neighbours(default, machine)][:limit]
    if isinstance(default, WinogradKernel):
        ranked = sorted(
            winograd_candidates(task.workload, machine, task.block, task.kept),
            key=lambda k: winograd_cycles(k, machine),
        )
        found: list[Kernel] = [default, *ranked]
        return list(dict.fromkeys(found))[:limit]
    layouts = sorted(_layouts(task, machine), key=predicted_cycles)[:_BEST_LAYOUTS]
    expanded = {kernel: predicted_cycles(kernel) for layout in layouts for kernel in (layout, *_decisions(layout))}
    expanded = {kernel: cycles for kernel, cycles in expanded.items() if _is_valid(kernel, machine)}
    chosen: list[Kernel] = [default]
    count: dict[tuple[PixelGeometry, int], int] = {}
    for kernel in sorted(expanded, key=expanded.__getitem__):
        layout_of = (kernel.geometry, kernel.oc_tile)
        if len(chosen) == limit:
            break
        if kernel not in chosen and count.get(layout_of, 0) < _SAME_LAYOUT:
            count[layout_of] = count.get(layout_of, 0) + 1
            chosen.append(kernel)
    # The families' models are not calibrated with each other: all are tried early.
    families = (channel_kernels, lane_kernels, pair_kernels)
    others = [kernel for family in families for kernel in family(task, machine)[:_OF_CHANNELS]]
    return [*chosen[:1], *_alternate([kernel for kernel in others if kernel not in chosen], chosen[1:])][:limit]


def _alternate(some: Sequence[Kernel], others: Sequence[Kernel]) -> list[Kernel]:
    pairs = itertools.zip_longest(some, others)
    return [kernel for pair in pairs for kernel in pair if kernel is not None]


def neighbours(kernel: Kernel, machine: Machine) -> list[Kernel]:
    """Return the variants that differ from one in a single choice, by their predicted time: a step of a climb."""
    if isinstance(kernel, ChainKernel):
        return _chain_steps(kernel, machine)
    if isinstance(kernel, FcKernel):
        if kernel.sparse:
            return []
        blocks = (machine.lanes * vectors for vectors in (1, 2, 4, 8))
        return [replace(kernel, block=block) for block in blocks if block != kernel.block]
    if isinstance(kernel, WinogradKernel):
        candidates = winograd_candidates(kernel.workload, machine, kernel.block, kernel.kept)
        near = [k for k in candidates if _differences(k, kernel) == 1]
        steps = (kernel.tiles_per_step - 1, kernel.tiles_per_step + 1)
        near += [replace(kernel, tiles_per_step=s) for s in steps if 1 <= s <= kernel.chunk_tiles]
        near = [k for k in near if k.tiles_per_step * k.oc_vectors <= most_sums(machine, 1)]
        by_cycles = sorted(dict.fromkeys(near), key=lambda k: winograd_cycles(k, machine))
        return list[Kernel](by_cycles)
    if isinstance(kernel, ChannelConvKernel):
        return _channel_steps(kernel, machine)
    if isinstance(kernel, LaneConvKernel):
        lanes = lane_candidates(kernel.workload, machine, kernel.per_vector)
        ordered_lanes = sorted(lanes, key=lambda k: lane_cycles(k, machine))
        return list[Kernel](k for k in ordered_lanes if _tile_differences(k, kernel) == 1)[:_OF_CHANNELS]
    if isinstance(kernel, PairConvKernel):
        pairs = pair_candidates(kernel.workload, machine, kernel.of_group, kernel.group)
        ordered_pairs = sorted(pairs, key=lambda k: pair_cycles(k, machine))
        return list[Kernel](k for k in ordered_pairs if _pair_differences(k, kernel) == 1)[:_OF_CHANNELS]
    found = {*_decisions(kernel), *_chunk_steps(kernel, machine), *_tile_steps(kernel, machine)} - {kernel}
    ordered = sorted((k for k in found if _is_valid(k, machine)), key=predicted_cycles)
    return list(ordered)


def _chain_steps(kernel: ChainKernel, machine: Machine) -> list[Kernel]:
    found = chain_kernels(KernelTask.of(kernel, machine.threads), machine)
    rows = _beside({k.rows for k in found}, kernel.rows)
    near = []
    for other in found:
        pairs = ((other.staged, kernel.staged), (other.mixing, kernel.mixing), (other.last_mixing, kernel.last_mixing))
        changes = sum(one != same for one, same in pairs) + (other.rows != kernel.rows)
        if changes == 1 and (other.rows == kernel.rows or other.rows in rows):
            near.append(other)
    near.sort(key=lambda chain: chain_cycles(chain, machine))
    return list[Kernel](near)


def _differences(one: WinogradKernel, other: WinogradKernel) -> int:
    """Count the choices in which two kernels differ; the register tile follows from the others."""
    names = ("tile", "chunk_rows", "chunk_columns", "oc_vectors", "staged")
    return sum(getattr(one, name) != getattr(other, name) for name in names)


def _tile_differences(one: ChannelConvKernel | LaneConvKernel, other: ChannelConvKernel | LaneConvKernel) -> int:
    return sum(getattr(one, name) != getattr(other, name) for name in ("vectors", "tile_rows", "tile_columns"))


def _pair_differences(one: PairConvKernel, other: PairConvKernel) -> int:
    """Count the choices in which two kernels differ; the task follows from the tile."""
    return sum(getattr(one, name) != getattr(other, name) for name in ("tile_pixels", "channels_per_block"))


def _channel_steps(kernel: ChannelConvKernel, machine: Machine) -> list[Kernel]:
    block = None if kernel.index is IndexKind.NONE else kernel.block
    found = channel_candidates(kernel.workload, machine, block=block, kept=kernel.kept)
    near = [k for k in found if _tile_differences(k, kernel) == 1]
    return list[Kernel](sorted(near, key=lambda k: channel_cycles(k, machine))[:_OF_CHANNELS])


def _layouts(task: KernelTask, machine: Machine) -> Iterator[ConvKernel]:
    block, kept = task.block or None, task.kept or task.inputs
    for tile in oc_tiles(task.workload, machine, block):
        for geometry in geometries_for(task.workload, machine, task.index):
            for cut in reduction_blocks(kept, tile):
                yield variant(geometry, machine, block, tile, task.index, kept, cut, SCRATCH_BYTES[1])


def _decisions(kernel: ConvKernel) -> list[ConvKernel]:
    """Other register tiles and tasks of the same layout."""
    steps = [
        replace(kernel, vectors_per_tile=vectors)
        for vectors in (kernel.vectors_per_tile - 1, kernel.vectors_per_tile + 1)
        if 1 <= vectors <= kernel.geometry.vectors
    ]
    work = kernel.workload
    if work.out_channels_per_group % kernel.block == 0:
        rows = divisors(kernel.block_rows)
        steps += [replace(kernel, rows_per_task=near) for near in _beside(rows, kernel.rows_per_task)]
    if kernel.kept_per_block:
        lengths = [length for length in divisors(kernel.kept) if length >= 4]
        steps += [replace(kernel, kept_per_block=near) for near in _beside(lengths, kernel.kept_per_block)]
    return steps


def _chunk_steps(kernel: ConvKernel, machine: Machine) -> list[ConvKernel]:
    """Return the next smaller and larger chunk, and the other pixel layouts with chunks as large."""
    here = kernel.geometry
    geometries = geometries_for(kernel.workload, machine, kernel.index)
    same = sorted({g.vectors: g for g in geometries if _layout(g) == _layout(here)}.items())
    sizes = [size for size, _ in same]
    found = [geometry for size, geometry in same if size in _beside(sizes, here.vectors)]
    found += [g for g in geometries if _layout(g) != _layout(here) and g.rows_per_chunk == here.rows_per_chunk]
    return [
        replace(
            kernel,
            geometry=geometry,
            index_dtype=index_dtype(geometry, kernel.index),
            vectors_per_tile=min(kernel.vectors_per_tile, geometry.vectors),
        )
        for geometry in found
    ]


def _tile_steps(kernel: ConvKernel, machine: Machine) -> list[ConvKernel]:
    block = None if kernel.index is IndexKind.NONE else kernel.block
    task = KernelTask.of(kernel, machine.threads)
    return [
        variant(kernel.geometry, machine, block, tile, kernel.index, kernel.kept, 0, SCRATCH_BYTES[1])
        for tile in oc_tiles(task.workload, machine, block)
        if tile != kernel.oc_tile
    ]


def _layout(geometry: PixelGeometry) -> tuple[CopyScope, int, bool]:
    """Return what stays when only the chunk changes; the pitch of a flat row is its chunk."""
    return geometry.copy, (0 if geometry.flat else geometry.pitch), geometry.column_copies


def _is_valid(kernel: ConvKernel, machine: Machine) -> bool:
    return kernel.oc_tile * kernel.vectors_per_tile <= most_sums(machine, kernel.oc_tile)


def _beside(sizes: Iterable[int], size: int) -> list[int]:
    ordered = sorted(sizes)
    below, above = [s for s in ordered if s < size], [s for s in ordered if s > size]
    return below[-1:] + above[:1]
