"""Winograd kernels for convolutions of large windows with a stride of 2 and few input channels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.families.base import ConvFamily
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.stem_winograd import StemWinogradKernel, pack_stem_winograd
from tvm_nm.schedules.stem_winograd_code import stem_winograd_prim_func
from tvm_nm.schedules.stem_winograd_tiling import stem_winograd_candidates, stem_winograd_cycles

__all__ = ["StemWinogradFamily"]


class StemWinogradFamily(ConvFamily[StemWinogradKernel]):
    """See `tvm_nm.schedules.stem_winograd`."""

    word = "winograd stem"

    def candidates(self, task: KernelTask, machine: Machine) -> list[StemWinogradKernel]:
        """Return the variants of a dense convolution."""
        if task.index is not IndexKind.NONE:
            return []
        found = stem_winograd_candidates(task.workload, machine)
        return sorted(found, key=lambda kernel: stem_winograd_cycles(kernel, machine))

    def cycles(self, kernel: StemWinogradKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return stem_winograd_cycles(kernel, machine)

    def prim_func(self, kernel: StemWinogradKernel) -> tvm.tirx.PrimFunc:
        """Return the function, written out."""
        return stem_winograd_prim_func(kernel)

    def text(self, kernel: StemWinogradKernel) -> str:
        """Return `winograd stem TILESxVECTORS task ROWS`."""
        return f"winograd stem {kernel.tiles}x{kernel.vectors} task {kernel.rows}"

    def steps(self, kernel: StemWinogradKernel, machine: Machine) -> list[StemWinogradKernel]:
        """Return other register tiles and numbers of tasks."""
        found = stem_winograd_candidates(kernel.workload, machine)
        return self._beside(kernel, found, ("vectors", "tiles", "rows"), machine)

    def pack(self, kernel: StemWinogradKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the transformed and packed weights."""
        return pack_stem_winograd(kernel, weights)

    def random_table(self, kernel: StemWinogradKernel, rng: np.random.Generator) -> None:
        """Return None: there is no table."""
