"""Kernels for depthwise convolutions, with vectors of channels between transposes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.depthwise_code import depthwise_prim_func
from tvm_nm.schedules.depthwise_conv import DepthwiseKernel, pack_depthwise
from tvm_nm.schedules.depthwise_tiling import depthwise_candidates, depthwise_cycles
from tvm_nm.schedules.families.base import ConvFamily
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights

__all__ = ["DepthwiseFamily"]


class DepthwiseFamily(ConvFamily[DepthwiseKernel]):
    """See `tvm_nm.schedules.depthwise_conv`."""

    word = "depthwise"

    def candidates(self, task: KernelTask, machine: Machine) -> list[DepthwiseKernel]:
        """Return the variants of a dense depthwise convolution."""
        if task.index is not IndexKind.NONE:
            return []
        found = depthwise_candidates(task.workload, machine)
        return sorted(found, key=lambda kernel: depthwise_cycles(kernel, machine))

    def cycles(self, kernel: DepthwiseKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return depthwise_cycles(kernel, machine)

    def prim_func(self, kernel: DepthwiseKernel) -> tvm.tirx.PrimFunc:
        """Return the function, written out."""
        return depthwise_prim_func(kernel)

    def text(self, kernel: DepthwiseKernel) -> str:
        """Return `depthwise COLUMNS rows ROWS task BANDS`."""
        return f"depthwise {kernel.columns} rows {kernel.rows} task {kernel.bands_per_task}"

    def steps(self, kernel: DepthwiseKernel, machine: Machine) -> list[DepthwiseKernel]:
        """Return other tiles, bands and numbers of tasks."""
        found = depthwise_candidates(kernel.workload, machine)
        return self._beside(kernel, found, ("columns", "rows", "parts"), machine)

    def pack(self, kernel: DepthwiseKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the packed weights."""
        return pack_depthwise(kernel, weights)

    def random_table(self, kernel: DepthwiseKernel, rng: np.random.Generator) -> None:
        """Return no table."""
