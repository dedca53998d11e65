"""Kernels for convolutions of few input channels and large maps, as networks begin with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.families.base import ConvFamily
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.stem_code import stem_prim_func
from tvm_nm.schedules.stem_conv import StemKernel, pack_stem, stem_offsets
from tvm_nm.schedules.stem_tiling import stem_candidates, stem_cycles

__all__ = ["StemFamily"]


class StemFamily(ConvFamily[StemKernel]):
    """See `tvm_nm.schedules.stem_conv`."""

    word = "stem"

    def candidates(self, task: KernelTask, machine: Machine) -> list[StemKernel]:
        """Return the variants of a dense convolution of few input channels."""
        if task.index is not IndexKind.NONE:
            return []
        return sorted(stem_candidates(task.workload, machine), key=lambda kernel: stem_cycles(kernel, machine))

    def cycles(self, kernel: StemKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return stem_cycles(kernel, machine)

    def prim_func(self, kernel: StemKernel) -> tvm.tirx.PrimFunc:
        """Return the function, written out."""
        return stem_prim_func(kernel)

    def text(self, kernel: StemKernel) -> str:
        """Return `stem VECTORSxCOLUMNS task ROWS`."""
        return f"stem {kernel.vectors}x{kernel.columns} task {kernel.rows}"

    def steps(self, kernel: StemKernel, machine: Machine) -> list[StemKernel]:
        """Return other register tiles and numbers of tasks."""
        found = stem_candidates(kernel.workload, machine)
        return self._beside(kernel, found, ("vectors", "columns", "rows"), machine)

    def pack(self, kernel: StemKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the packed weights and the table of offsets."""
        return pack_stem(kernel, weights)

    def random_table(self, kernel: StemKernel, rng: np.random.Generator) -> npt.NDArray[np.integer]:
        """Return the table of offsets: there is one only."""
        return stem_offsets(kernel).astype(kernel.index_dtype)
