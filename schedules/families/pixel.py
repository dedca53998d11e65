"""Kernels with vectors of pixels: the usual ones, for any convolution."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.conv import ConvKernel, IndexKind, conv_prim_func
from tvm_nm.schedules.decisions import divisors
from tvm_nm.schedules.families.base import ConvFamily, nearest_sizes
from tvm_nm.schedules.geometry import FLAT_SCOPES, CopyScope, PixelGeometry
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights, pack_conv, random_index_table
from tvm_nm.schedules.pixel_cycles import SCRATCH_BYTES, predicted_cycles
from tvm_nm.schedules.tiling import (
    choose_kernel,
    geometries_for,
    index_dtype,
    oc_tiles,
    reduction_blocks,
    variant,
)

__all__ = ["PixelFamily"]

_FORM = re.compile(
    r"pixel (?P<tile>\d+)x(?P<vectors>\d+) (?P<copy>direct|padded|own|packed|panels) pitch (?P<pitch>\d+)"
    r"(?P<copies> copies)?(?P<aligned> aligned)? rows (?P<rows>\d+) task (?P<task>\d+)(?: cut (?P<cut>\d+))?"
)
_BEST_LAYOUTS = 24
_SAME_LAYOUT = 3


class PixelFamily(ConvFamily[ConvKernel]):
    """See `tvm_nm.schedules.conv`."""

    word = "pixel"

    def default(self, task: KernelTask, machine: Machine) -> ConvKernel:
        """Return the variant of an untuned build."""
        if task.index is IndexKind.NONE:
            return choose_kernel(task.workload, machine)
        return choose_kernel(task.workload, machine, block=task.block, index=task.index, kept=task.kept)

    def candidates(self, task: KernelTask, machine: Machine) -> list[ConvKernel]:
        """Return the best variants of the best layouts, not more than a few of any one."""
        cycles = partial(predicted_cycles, machine=machine)
        layouts = sorted(_layouts(task, machine), key=cycles)[:_BEST_LAYOUTS]
        expanded = {kernel: cycles(kernel) for layout in layouts for kernel in (layout, *_decisions(layout))}
        found: list[ConvKernel] = []
        count: dict[tuple[PixelGeometry, int], int] = {}
        for kernel in sorted(expanded, key=expanded.__getitem__):
            layout_of = (kernel.geometry, kernel.oc_tile)
            if _is_valid(kernel, machine) and count.get(layout_of, 0) < _SAME_LAYOUT:
                count[layout_of] = count.get(layout_of, 0) + 1
                found.append(kernel)
        return found

    def cycles(self, kernel: ConvKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return predicted_cycles(kernel, machine)

    def prim_func(self, kernel: ConvKernel) -> tvm.tirx.PrimFunc:
        """Return the unscheduled function."""
        return conv_prim_func(kernel)

    def text(self, kernel: ConvKernel) -> str:
        """Return `pixel CHANNELSxVECTORS COPY pitch P[ copies][ aligned] rows R task BLOCK-ROWS[ cut LENGTH]`."""
        geometry = kernel.geometry
        text = f"pixel {kernel.oc_tile}x{kernel.vectors_per_tile} {geometry.copy.value}"
        text += f" pitch {geometry.pitch}{' copies' if geometry.column_copies else ''}"
        text += f"{' aligned' if geometry.aligned else ''} rows {geometry.rows_per_chunk} task {kernel.rows_per_task}"
        return text + (f" cut {kernel.kept_per_block}" if kernel.kept_per_block else "")

    def parse(self, text: str, task: KernelTask, machine: Machine) -> ConvKernel | None:
        """Return the variant that a text names, also one that is no candidate.

        The text may come from another density of the same layer: a reduction block that does not divide what the task
        keeps is replaced by the nearest length that does.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            return None
        copy = CopyScope(found["copy"])
        pitch, rows_per_chunk = int(found["pitch"]), int(found["rows"])
        copies, flat, aligned = bool(found["copies"]), copy in FLAT_SCOPES, bool(found["aligned"])
        geometry = PixelGeometry(task.workload, machine.lanes, pitch, rows_per_chunk, copies, copy, flat, aligned)
        if geometry not in geometries_for(task.workload, machine, task.index):
            raise ValueError(f"{text!r:.100} does not fit {task}")
        cut = int(found["cut"] or 0)
        tile, vectors, rows = int(found["tile"]), int(found["vectors"]), int(found["task"])
        block, kept = task.block or None, task.kept or task.inputs
        kernel = variant(geometry, machine, block, tile, task.index, kept, 0, SCRATCH_BYTES[0])
        vectors = max(geometry.tile_vectors(vectors), default=0)
        if cut:
            cut = min(divisors(kernel.kept), key=lambda length: abs(length - cut))
        kernel = replace(kernel, vectors_per_tile=vectors, rows_per_task=rows, kept_per_block=cut)
        if not (1 <= tile * vectors <= machine.most_sums(tile) and rows in kernel.task_rows):
            raise ValueError(f"{text!r:.100} does not fit {task}")
        return kernel

    def steps(self, kernel: ConvKernel, machine: Machine) -> list[ConvKernel]:
        """Return other decisions of the same layout, chunks, layouts and tiles of channels."""
        found = {*_decisions(kernel), *_chunk_steps(kernel, machine), *_tile_steps(kernel, machine)} - {kernel}
        return sorted((k for k in found if _is_valid(k, machine)), key=partial(predicted_cycles, machine=machine))

    def pack(self, kernel: ConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the packed weights."""
        return pack_conv(kernel, weights)

    def random_table(self, kernel: ConvKernel, rng: np.random.Generator) -> npt.NDArray[np.integer] | None:
        """Return a table of channels or positions."""
        return random_index_table(kernel, rng)


def _layouts(task: KernelTask, machine: Machine) -> Iterator[ConvKernel]:
    block, kept = task.block or None, task.kept or task.inputs
    for tile in oc_tiles(task.workload, machine, block):
        for geometry in geometries_for(task.workload, machine, task.index):
            for cut in reduction_blocks(kept, tile):
                yield variant(geometry, machine, block, tile, task.index, kept, cut, SCRATCH_BYTES[1])


def _decisions(kernel: ConvKernel) -> list[ConvKernel]:
    """Other register tiles and tasks of the same layout."""
    sizes = kernel.geometry.tile_vectors(kernel.geometry.vectors)
    steps = [replace(kernel, vectors_per_tile=near) for near in nearest_sizes(sizes, kernel.vectors_per_tile)]
    work = kernel.workload
    if work.out_channels_per_group % kernel.block == 0:
        near_rows = nearest_sizes(kernel.task_rows, kernel.rows_per_task)
        steps += [replace(kernel, rows_per_task=near) for near in near_rows]
    if kernel.kept_per_block:
        lengths = [length for length in divisors(kernel.kept) if length >= 4]
        steps += [replace(kernel, kept_per_block=near) for near in nearest_sizes(lengths, kernel.kept_per_block)]
    return steps


def _chunk_steps(kernel: ConvKernel, machine: Machine) -> list[ConvKernel]:
    """Return the next smaller and larger chunk, and the other pixel layouts with chunks as large."""
    here = kernel.geometry
    geometries = geometries_for(kernel.workload, machine, kernel.index)
    same = {geometry.vectors: geometry for geometry in geometries if _layout(geometry) == _layout(here)}
    found = [same[size] for size in nearest_sizes(list(same), here.vectors)]
    found += [g for g in geometries if _layout(g) != _layout(here) and g.rows_per_chunk == here.rows_per_chunk]
    return [
        replace(
            kernel,
            geometry=geometry,
            index_dtype=index_dtype(geometry, kernel.index),
            vectors_per_tile=geometry.tile_vectors(kernel.vectors_per_tile)[-1],
        )
        for geometry in found
    ]


def _tile_steps(kernel: ConvKernel, machine: Machine) -> list[ConvKernel]:
    block = None if kernel.index is IndexKind.NONE else kernel.block
    return [
        variant(kernel.geometry, machine, block, tile, kernel.index, kernel.kept, 0, SCRATCH_BYTES[1])
        for tile in oc_tiles(kernel.workload, machine, block)
        if tile != kernel.oc_tile
    ]


def _layout(geometry: PixelGeometry) -> tuple[CopyScope, int, bool, bool]:
    """Return what stays when only the chunk changes; the pitch of a flat row is its chunk."""
    return geometry.copy, (0 if geometry.flat else geometry.pitch), geometry.column_copies, geometry.aligned


def _is_valid(kernel: ConvKernel, machine: Machine) -> bool:
    return kernel.oc_tile * kernel.vectors_per_tile <= machine.most_sums(kernel.oc_tile)
