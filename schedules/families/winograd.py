"""Winograd kernels, dense or skipping whole kernels."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.families.base import ConvFamily
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.winograd import WinogradKernel, winograd_prim_func
from tvm_nm.schedules.winograd_packing import compact_winograd, pack_winograd, random_channels, winograd_expansion
from tvm_nm.schedules.winograd_tiling import choose_winograd, winograd_candidates, winograd_cycles

__all__ = ["WinogradFamily"]

_FORM = re.compile(
    r"winograd (?P<tile>\d+) step (?P<step>\d+)x(?P<vectors>\d+)"
    r" chunk (?P<rows>\d+)x(?P<columns>\d+)(?P<staged> staged)?(?: parts (?P<parts>\d+))?"
)


class WinogradFamily(ConvFamily[WinogradKernel]):
    """See `tvm_nm.schedules.winograd`."""

    word = "winograd"

    def default(self, task: KernelTask, machine: Machine) -> WinogradKernel:
        """Return the variant of an untuned build; raises ValueError if block rows are not whole vectors."""
        found = choose_winograd(task.workload, machine, task.block, task.kept)
        if found is None:
            raise ValueError(f"Winograd kernels need block rows of whole vectors of {machine.lanes}: {task}")
        return found

    def candidates(self, task: KernelTask, machine: Machine) -> list[WinogradKernel]:
        """Return the variants of a 3x3 convolution."""
        found = winograd_candidates(task.workload, machine, task.block, task.kept)
        return sorted(found, key=lambda kernel: winograd_cycles(kernel, machine))

    def cycles(self, kernel: WinogradKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return winograd_cycles(kernel, machine)

    def prim_func(self, kernel: WinogradKernel) -> tvm.tirx.PrimFunc:
        """Return the unscheduled function."""
        return winograd_prim_func(kernel)

    def text(self, kernel: WinogradKernel) -> str:
        """Return `winograd TILE step TILESxVECTORS chunk ROWSxCOLUMNS[ staged][ parts PARTS]`."""
        text = f"winograd {kernel.tile} step {kernel.tiles_per_step}x{kernel.oc_vectors}"
        text += f" chunk {kernel.chunk_rows}x{kernel.chunk_columns}{' staged' if kernel.staged else ''}"
        return text + (f" parts {kernel.parts}" if kernel.parts > 1 else "")

    def parse(self, text: str, task: KernelTask, machine: Machine) -> WinogradKernel | None:
        """Return the variant that a text names, also one that is no candidate."""
        found = _FORM.fullmatch(text)
        if found is None:
            return None
        tile, step, vectors, rows, columns = (
            int(found[name]) for name in ("tile", "step", "vectors", "rows", "columns")
        )
        sizes = (machine.lanes, tile, rows, columns, vectors, step)
        staged, parts = found["staged"] is not None, int(found["parts"] or 1)
        kernel = WinogradKernel(task.workload, *sizes, staged, task.block, task.kept, parts)
        fits = tile in (2, 4) and 1 <= rows <= kernel.tile_rows and 1 <= columns <= kernel.tile_columns
        if not (fits and 1 <= step <= kernel.chunk_tiles and 1 <= step * vectors <= machine.most_sums()):
            raise ValueError(f"{text!r:.100} does not fit {task}")
        return kernel

    def steps(self, kernel: WinogradKernel, machine: Machine) -> list[WinogradKernel]:
        """Return other tiles and chunks, and register tiles with one tile more or less."""
        choices = ("tile", "chunk_rows", "chunk_columns", "oc_vectors", "staged", "parts")
        candidates = winograd_candidates(kernel.workload, machine, kernel.block, kernel.kept)
        near = self._beside(kernel, candidates, choices, machine)
        counts = (kernel.tiles_per_step - 1, kernel.tiles_per_step + 1)
        near += [replace(kernel, tiles_per_step=count) for count in counts if 1 <= count <= kernel.chunk_tiles]
        near = [k for k in near if k.tiles_per_step * k.oc_vectors <= machine.most_sums()]
        return sorted(dict.fromkeys(near), key=lambda k: winograd_cycles(k, machine))

    def pack(self, kernel: WinogradKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the transformed and packed weights."""
        return pack_winograd(kernel, weights)

    def stored(self, kernel: WinogradKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the packed weights before their transform."""
        return compact_winograd(kernel, weights)

    def expansion(self, kernel: WinogradKernel) -> tvm.tirx.PrimFunc | None:
        """Return the transform."""
        return winograd_expansion(kernel)

    def random_table(self, kernel: WinogradKernel, rng: np.random.Generator) -> npt.NDArray[np.integer] | None:
        """Return a table of channels."""
        return random_channels(kernel, rng)
