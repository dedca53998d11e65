"""Kernel variants of a task: which are worth measuring, in which order, and how a record names one.

Two levels of choice meet here. A `ConvKernel` fixes the packed layout: pixel geometry, channel tile. The template's
sampled decisions (pixel vectors of the register tile, block rows of a task, reduction blocks) are kernel attributes as
well, as its block annotations' defaults: a variant in this module's sense is both, so that choosing one kernel chooses
everything.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import tvm

from tvm_nm.schedules.chain import ChainKernel
from tvm_nm.schedules.chain_code import chain_prim_func
from tvm_nm.schedules.chain_tiling import chain_candidates, chain_cycles
from tvm_nm.schedules.channel_conv import ChannelConvKernel, channel_conv_prim_func
from tvm_nm.schedules.channel_tiling import channel_candidates, channel_cycles
from tvm_nm.schedules.conv import ConvKernel, IndexKind, conv_prim_func
from tvm_nm.schedules.fc import FcKernel, choose_fc_kernel, fc_prim_func
from tvm_nm.schedules.geometry import FLAT_SCOPES, CopyScope, PixelGeometry
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.lane_conv import LaneConvKernel, lane_conv_prim_func
from tvm_nm.schedules.lane_tiling import lane_candidates, lane_cycles
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.tiling import (
    SCRATCH_BYTES,
    choose_kernel,
    geometries_for,
    index_dtype,
    oc_tiles,
    predicted_cycles,
    reduction_blocks,
    variant,
)
from tvm_nm.schedules.winograd import WinogradKernel, winograd_prim_func
from tvm_nm.schedules.winograd_tiling import choose_winograd, winograd_candidates, winograd_cycles

__all__ = [
    "Kernel",
    "default_kernel",
    "kernel_cycles",
    "kernel_from_text",
    "kernel_prim_func",
    "neighbours",
    "ranked_kernels",
    "variant_text",
]

Kernel: TypeAlias = ConvKernel | ChannelConvKernel | LaneConvKernel | FcKernel | WinogradKernel | ChainKernel

_BEST_LAYOUTS = 24
_OF_CHANNELS = 6
# A family other than the usual one must be predicted to be this much faster: the model's error is of this order.
_OTHER_FAMILY = 0.95
_SAME_LAYOUT = 3

_PIXEL = re.compile(
    r"pixel (?P<tile>\d+)x(?P<vectors>\d+) (?P<copy>direct|padded|own|packed|panels) pitch (?P<pitch>\d+)"
    r"(?P<copies> copies)? rows (?P<rows>\d+) task (?P<task>\d+)(?: cut (?P<cut>\d+))?"
)
_LANE = re.compile(r"lane (?P<vectors>\d+) tile (?P<rows>\d+)x(?P<columns>\d+)")
_CHANNEL = re.compile(r"channel (?P<vectors>\d+) tile (?P<rows>\d+)x(?P<columns>\d+)")
_WINOGRAD = re.compile(
    r"winograd (?P<tile>\d+) step (?P<step>\d+)x(?P<vectors>\d+)"
    r" chunk (?P<rows>\d+)x(?P<columns>\d+)(?P<staged> staged)?"
)
_FEATURE = re.compile(r"feature (?P<block>\d+)")


def default_kernel(task: KernelTask, machine: Machine) -> Kernel:
    """Return the variant of an untuned build."""
    work = task.workload
    if task.links is not None:
        return min(_chain_kernels(task, machine), key=lambda kernel: chain_cycles(kernel, machine))
    if task.winograd:
        found = choose_winograd(work, machine)
        assert found is not None  # the task has checked that it applies
        return found
    if task.kind == "conv":
        if task.index is IndexKind.NONE:
            pixels = choose_kernel(work, machine)
        else:
            pixels = choose_kernel(work, machine, block=task.block, index=task.index, kept=task.kept)
        others = _channel_kernels(task, machine)[:1] + _lane_kernels(task, machine)[:1]
        best = min(others, key=lambda kernel: kernel_cycles(kernel, machine), default=None)
        if best is not None and kernel_cycles(best, machine) < _OTHER_FAMILY * predicted_cycles(pixels):
            return best
        return pixels
    sizes = (work.batch, work.in_channels, work.out_channels)
    if task.index is IndexKind.NONE:
        return choose_fc_kernel(*sizes, work.epilogue, machine)
    return choose_fc_kernel(*sizes, work.epilogue, machine, block=task.block, kept=task.kept)


def kernel_cycles(kernel: Kernel, machine: Machine) -> float:
    """Return the model's cycles of a convolution's variant of any family."""
    if isinstance(kernel, ChainKernel):
        return chain_cycles(kernel, machine)
    if isinstance(kernel, WinogradKernel):
        return winograd_cycles(kernel, machine)
    if isinstance(kernel, ChannelConvKernel):
        return channel_cycles(kernel, machine)
    if isinstance(kernel, LaneConvKernel):
        return lane_cycles(kernel, machine)
    assert isinstance(kernel, ConvKernel)  # of fully connected layers, bytes decide
    return predicted_cycles(kernel)


def _chain_kernels(task: KernelTask, machine: Machine) -> list[ChainKernel]:
    """Return the variants of a chain."""
    links = task.links
    assert links is not None
    return chain_candidates(
        (task.workload, links.depthwise, links.last),
        machine,
        kept=(links.kept, links.last_kept),
        blocked_input=links.blocked_input,
    )


def _lane_kernels(task: KernelTask, machine: Machine) -> list[Kernel]:
    """Return the lane-select variants of an N:M convolution, by their predicted time; none where M does not fit."""
    if task.block != 1 or not task.group or machine.lanes % task.group:
        return []
    found = lane_candidates(task.workload, machine, machine.lanes // task.group * task.of_group)
    found.sort(key=lambda kernel: lane_cycles(kernel, machine))
    return list[Kernel](found)


def _channel_kernels(task: KernelTask, machine: Machine) -> list[Kernel]:
    """Return the channel-vector variants of a direct convolution, by their predicted time."""
    if task.index is IndexKind.NONE:
        found = channel_candidates(task.workload, machine)
    else:
        # The family's tables hold positions.
        positions = task.kept * (task.workload.taps if task.index is IndexKind.CHANNEL else 1)
        found = channel_candidates(task.workload, machine, block=task.block, kept=positions)
    found.sort(key=lambda kernel: channel_cycles(kernel, machine))
    return list[Kernel](found)


def kernel_prim_func(kernel: Kernel) -> tvm.tirx.PrimFunc:
    """Return the PrimFunc of a variant of any family, which is not scheduled unless it is a chain's."""
    if isinstance(kernel, ChainKernel):
        return chain_prim_func(kernel)
    if isinstance(kernel, WinogradKernel):
        return winograd_prim_func(kernel)
    if isinstance(kernel, ChannelConvKernel):
        return channel_conv_prim_func(kernel)
    if isinstance(kernel, LaneConvKernel):
        return lane_conv_prim_func(kernel)
    return conv_prim_func(kernel) if isinstance(kernel, ConvKernel) else fc_prim_func(kernel)


def variant_text(kernel: Kernel) -> str:
    """Return what tells a variant from the others of its task, as text that `kernel_from_text` reads."""
    if isinstance(kernel, ChainKernel):
        return str(kernel)
    if isinstance(kernel, FcKernel):
        return f"feature {kernel.block}"
    if isinstance(kernel, WinogradKernel):
        text = f"winograd {kernel.tile} step {kernel.tiles_per_step}x{kernel.oc_vectors}"
        return f"{text} chunk {kernel.chunk_rows}x{kernel.chunk_columns}{' staged' if kernel.staged else ''}"
    if isinstance(kernel, ChannelConvKernel):
        return f"channel {kernel.vectors} tile {kernel.tile_rows}x{kernel.tile_columns}"
    if isinstance(kernel, LaneConvKernel):
        return f"lane {kernel.vectors} tile {kernel.tile_rows}x{kernel.tile_columns}"
    geometry = kernel.geometry
    text = f"pixel {kernel.oc_tile}x{kernel.vectors_per_tile} {geometry.copy.value}"
    text += f" pitch {geometry.pitch}{' copies' if geometry.column_copies else ''} rows {geometry.rows_per_chunk}"
    text += f" task {kernel.rows_per_task}"
    return text + (f" cut {kernel.kept_per_block}" if kernel.kept_per_block else "")


def kernel_from_text(text: str, task: KernelTask, machine: Machine) -> Kernel:
    """Return the variant of a task that a text names.

    The text may come from another density of the same layer: a reduction block that does not divide what the task
    keeps is replaced by the nearest length that does.

    Raises
    ------
    ValueError
        If the text names no variant, or one that does not fit the task.
    """
    if task.links is not None:
        return _chain_from_text(text, task, machine)
    if task.kind == "fc":
        return _fc_from_text(text, task, machine)
    if task.winograd:
        return _winograd_from_text(text, task, machine)
    if text.startswith("channel"):
        return _one_of(_channel_kernels(task, machine), _CHANNEL, text, task)
    if text.startswith("lane"):
        return _one_of(_lane_kernels(task, machine), _LANE, text, task)
    found = _PIXEL.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r:.100} is no variant of a convolution")
    copy = CopyScope(found["copy"])
    geometry = PixelGeometry(
        task.workload,
        machine.lanes,
        int(found["pitch"]),
        int(found["rows"]),
        bool(found["copies"]),
        copy,
        flat=copy in FLAT_SCOPES,
    )
    if geometry not in geometries_for(task.workload, machine, task.index):
        raise ValueError(f"{text!r:.100} does not fit {task}")
    cut = int(found["cut"] or 0)
    tile, vectors, rows = int(found["tile"]), int(found["vectors"]), int(found["task"])
    kernel = variant(
        geometry, machine, task.block or None, tile, task.index, task.kept or task.inputs, 0, SCRATCH_BYTES[0]
    )
    vectors = min(vectors, geometry.vectors)
    divides = kernel.block_rows % rows == 0
    if not (1 <= tile * vectors <= _most_sums(machine, tile) and divides):
        raise ValueError(f"{text!r:.100} does not fit {task}")
    if cut:
        cut = min(_divisors(kernel.kept), key=lambda length: abs(length - cut))
    return replace(kernel, vectors_per_tile=vectors, rows_per_task=rows, kept_per_block=cut)


def _chain_from_text(text: str, task: KernelTask, machine: Machine) -> ChainKernel:
    for kernel in _chain_kernels(task, machine):
        if variant_text(kernel) == text:
            return kernel
    raise ValueError(f"{text!r:.100} is no variant of {task}")


def _one_of(kernels: Iterable[Kernel], form: re.Pattern[str], text: str, task: KernelTask) -> Kernel:
    if form.fullmatch(text) is None:
        raise ValueError(f"{text!r:.100} is no variant of a convolution")
    for kernel in kernels:
        if variant_text(kernel) == text:
            return kernel
    raise ValueError(f"{text!r:.100} does not fit {task}")


def _fc_from_text(text: str, task: KernelTask, machine: Machine) -> FcKernel:
    found = _FEATURE.fullmatch(text)
    default = default_kernel(task, machine)
    assert isinstance(default, FcKernel)
    if found is None or int(found["block"]) % machine.lanes or (default.sparse and int(found["block"]) != task.block):
        raise ValueError(f"{text!r:.100} is no variant of {task}")
    return replace(default, block=int(found["block"]))


def _winograd_from_text(text: str, task: KernelTask, machine: Machine) -> WinogradKernel:
    found = _WINOGRAD.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r:.100} is no variant of {task}")
    tile, step, vectors, rows, columns = (int(found[name]) for name in ("tile", "step", "vectors", "rows", "columns"))
    kernel = WinogradKernel(
        task.workload, machine.lanes, tile, rows, columns, vectors, step, found["staged"] is not None
    )
    fits = tile in (2, 4) and 1 <= rows <= kernel.tile_rows and 1 <= columns <= kernel.tile_columns
    if not (fits and 1 <= step <= kernel.chunk_tiles and 1 <= step * vectors <= _most_sums(machine, 1)):
        raise ValueError(f"{text!r:.100} does not fit {task}")
    return kernel


def ranked_kernels(task: KernelTask, machine: Machine, limit: int) -> list[Kernel]:
    """Return the variants with the least predicted time, best first, not more than a few of any one layout.

    The first is the one that an untuned build uses.
    """
    default = default_kernel(task, machine)
    if isinstance(default, ChainKernel):
        chains = sorted(_chain_kernels(task, machine), key=lambda chain: chain_cycles(chain, machine))
        return list[Kernel](chains[:limit])
    if isinstance(default, FcKernel):
        return [default, *neighbours(default, machine)][:limit]
    if isinstance(default, WinogradKernel):
        ranked = sorted(winograd_candidates(task.workload, machine), key=lambda k: winograd_cycles(k, machine))
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
    others = [*_channel_kernels(task, machine)[:_OF_CHANNELS], *_lane_kernels(task, machine)[:_OF_CHANNELS]]
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
        near = [k for k in winograd_candidates(kernel.workload, machine) if _differences(k, kernel) == 1]
        steps = (kernel.tiles_per_step - 1, kernel.tiles_per_step + 1)
        near += [replace(kernel, tiles_per_step=s) for s in steps if 1 <= s <= kernel.chunk_tiles]
        near = [k for k in near if k.tiles_per_step * k.oc_vectors <= _most_sums(machine, 1)]
        by_cycles = sorted(dict.fromkeys(near), key=lambda k: winograd_cycles(k, machine))
        return list[Kernel](by_cycles)
    if isinstance(kernel, ChannelConvKernel):
        return _channel_steps(kernel, machine)
    if isinstance(kernel, LaneConvKernel):
        lanes = lane_candidates(kernel.workload, machine, kernel.per_vector)
        ordered_lanes = sorted(lanes, key=lambda k: lane_cycles(k, machine))
        return list[Kernel](k for k in ordered_lanes if _tile_differences(k, kernel) == 1)[:_OF_CHANNELS]
    found = {*_decisions(kernel), *_chunk_steps(kernel, machine), *_tile_steps(kernel, machine)} - {kernel}
    ordered = sorted((k for k in found if _is_valid(k, machine)), key=predicted_cycles)
    return list(ordered)


def _chain_steps(kernel: ChainKernel, machine: Machine) -> list[Kernel]:
    found = _chain_kernels(KernelTask.of(kernel, machine.threads), machine)
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
        rows = _divisors(kernel.block_rows)
        steps += [replace(kernel, rows_per_task=near) for near in _beside(rows, kernel.rows_per_task)]
    if kernel.kept_per_block:
        lengths = [length for length in _divisors(kernel.kept) if length >= 4]
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
    return kernel.oc_tile * kernel.vectors_per_tile <= _most_sums(machine, kernel.oc_tile)


def _most_sums(machine: Machine, oc_tile: int) -> int:
    """Return how many sums leave registers for operands; a tile of one vector may have as many as its channels."""
    return max(machine.accumulators + machine.registers // 8, oc_tile)


def _beside(sizes: Iterable[int], size: int) -> list[int]:
    ordered = sorted(sizes)
    below, above = [s for s in ordered if s < size], [s for s in ordered if s > size]
    return below[-1:] + above[:1]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
