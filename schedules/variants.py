"""Kernel variants of a task: which one an untuned build takes, and how a record names one.

Two levels of choice meet here. A `ConvKernel` fixes the packed layout: pixel geometry, channel tile. The template's
sampled decisions (pixel vectors of the register tile, block rows of a task, reduction blocks) are kernel attributes as
well, as its block annotations' defaults: a variant in this module's sense is both, so that choosing one kernel chooses
everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
from tvm_nm.schedules.pair_code import pair_conv_prim_func
from tvm_nm.schedules.pair_conv import PairConvKernel
from tvm_nm.schedules.pair_tiling import pair_candidates, pair_cycles
from tvm_nm.schedules.tiling import (
    SCRATCH_BYTES,
    choose_kernel,
    geometries_for,
    predicted_cycles,
    variant,
)
from tvm_nm.schedules.winograd import WinogradKernel, winograd_prim_func
from tvm_nm.schedules.winograd_tiling import choose_winograd, winograd_cycles

__all__ = [
    "Kernel",
    "chain_kernels",
    "channel_kernels",
    "default_kernel",
    "divisors",
    "kernel_cycles",
    "kernel_from_text",
    "kernel_prim_func",
    "lane_kernels",
    "most_sums",
    "pair_kernels",
    "variant_text",
    "winograd_fits",
]

Kernel: TypeAlias = (
    ConvKernel | ChannelConvKernel | LaneConvKernel | PairConvKernel | FcKernel | WinogradKernel | ChainKernel
)

# A family other than the usual one must be predicted to be this much faster: the model's error is of this order.
_OTHER_FAMILY = 0.95

_PIXEL = re.compile(
    r"pixel (?P<tile>\d+)x(?P<vectors>\d+) (?P<copy>direct|padded|own|packed|panels) pitch (?P<pitch>\d+)"
    r"(?P<copies> copies)? rows (?P<rows>\d+) task (?P<task>\d+)(?: cut (?P<cut>\d+))?"
)
_LANE = re.compile(r"lane (?P<vectors>\d+) tile (?P<rows>\d+)x(?P<columns>\d+)")
_PAIR = re.compile(r"pair tile (?P<pixels>\d+) block (?P<block>\d+) task (?P<task>\d+)")
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
        return min(chain_kernels(task, machine), key=lambda kernel: chain_cycles(kernel, machine))
    if task.winograd:
        found = choose_winograd(work, machine, task.block, task.kept)
        if found is None:
            raise ValueError(f"Winograd kernels need block rows of whole vectors of {machine.lanes}: {task}")
        return found
    if task.kind == "conv":
        if task.index is IndexKind.NONE:
            pixels = choose_kernel(work, machine)
        else:
            pixels = choose_kernel(work, machine, block=task.block, index=task.index, kept=task.kept)
        others = [
            *channel_kernels(task, machine)[:1],
            *lane_kernels(task, machine)[:1],
            *pair_kernels(task, machine)[:1],
        ]
        best = min(others, key=lambda kernel: kernel_cycles(kernel, machine), default=None)
        if best is not None and kernel_cycles(best, machine) < _OTHER_FAMILY * predicted_cycles(pixels):
            return best
        return pixels
    sizes = (work.batch, work.in_channels, work.out_channels)
    if task.index is IndexKind.NONE:
        return choose_fc_kernel(*sizes, work.epilogue, machine)
    return choose_fc_kernel(*sizes, work.epilogue, machine, block=task.block, kept=task.kept)


def winograd_fits(task: KernelTask, machine: Machine) -> bool:
    """Whether there are Winograd kernels for a direct task: block rows are whole vectors."""
    return task.takes_winograd and task.block % machine.lanes == 0


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
    if isinstance(kernel, PairConvKernel):
        return pair_cycles(kernel, machine)
    assert isinstance(kernel, ConvKernel)  # of fully connected layers, bytes decide
    return predicted_cycles(kernel)


def chain_kernels(task: KernelTask, machine: Machine) -> list[ChainKernel]:
    """Return the variants of a chain."""
    links = task.links
    assert links is not None
    return chain_candidates(
        (task.workload, links.depthwise, links.last),
        machine,
        kept=(links.kept, links.last_kept),
        blocked_input=links.blocked_input,
    )


def lane_kernels(task: KernelTask, machine: Machine) -> list[Kernel]:
    """Return the lane-select variants of an N:M convolution, by their predicted time; none where M does not fit."""
    if task.block != 1 or not task.group or machine.lanes % task.group:
        return []
    found = lane_candidates(task.workload, machine, machine.lanes // task.group * task.of_group)
    found.sort(key=lambda kernel: lane_cycles(kernel, machine))
    return list[Kernel](found)


def pair_kernels(task: KernelTask, machine: Machine) -> list[Kernel]:
    """Return the channel-pair variants of an N:M convolution, by their predicted time; none where it does not fit."""
    if task.block != 1 or not task.group:
        return []
    found = pair_candidates(task.workload, machine, task.of_group, task.group)
    found.sort(key=lambda kernel: pair_cycles(kernel, machine))
    return list[Kernel](found)


def channel_kernels(task: KernelTask, machine: Machine) -> list[Kernel]:
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
    """Return the PrimFunc of a variant of any family, scheduled already if it is a chain's or of pairs."""
    if isinstance(kernel, ChainKernel):
        return chain_prim_func(kernel)
    if isinstance(kernel, WinogradKernel):
        return winograd_prim_func(kernel)
    if isinstance(kernel, ChannelConvKernel):
        return channel_conv_prim_func(kernel)
    if isinstance(kernel, LaneConvKernel):
        return lane_conv_prim_func(kernel)
    if isinstance(kernel, PairConvKernel):
        return pair_conv_prim_func(kernel)
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
    if isinstance(kernel, PairConvKernel):
        return f"pair tile {kernel.tile_pixels} block {kernel.channels_per_block} task {kernel.pairs_per_task}"
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
        return _one_of(channel_kernels(task, machine), _CHANNEL, text, task)
    if text.startswith("lane"):
        return _one_of(lane_kernels(task, machine), _LANE, text, task)
    if text.startswith("pair"):
        return _one_of(pair_kernels(task, machine), _PAIR, text, task)
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
    if not (1 <= tile * vectors <= most_sums(machine, tile) and divides):
        raise ValueError(f"{text!r:.100} does not fit {task}")
    if cut:
        cut = min(divisors(kernel.kept), key=lambda length: abs(length - cut))
    return replace(kernel, vectors_per_tile=vectors, rows_per_task=rows, kept_per_block=cut)


def _chain_from_text(text: str, task: KernelTask, machine: Machine) -> ChainKernel:
    for kernel in chain_kernels(task, machine):
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
    sizes = (machine.lanes, tile, rows, columns, vectors, step)
    kernel = WinogradKernel(task.workload, *sizes, found["staged"] is not None, task.block, task.kept)
    fits = tile in (2, 4) and 1 <= rows <= kernel.tile_rows and 1 <= columns <= kernel.tile_columns
    if not (fits and 1 <= step <= kernel.chunk_tiles and 1 <= step * vectors <= most_sums(machine, 1)):
        raise ValueError(f"{text!r:.100} does not fit {task}")
    return kernel


def most_sums(machine: Machine, oc_tile: int) -> int:
    """Return how many sums leave registers for operands; a tile of one vector may have as many as its channels."""
    return max(machine.accumulators + machine.registers // 8, oc_tile)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
