"""Lane-select kernels for N:M."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.families.base import ConvFamily
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.lane_conv import LaneConvKernel, lane_conv_prim_func
from tvm_nm.schedules.lane_packing import pack_lane_conv, random_lanes
from tvm_nm.schedules.lane_tiling import lane_candidates, lane_cycles
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights

__all__ = ["LaneFamily"]


class LaneFamily(ConvFamily[LaneConvKernel]):
    """See `tvm_nm.schedules.lane_conv`."""

    word = "lane"

    def candidates(self, task: KernelTask, machine: Machine) -> list[LaneConvKernel]:
        """Return the variants of an N:M convolution whose M divides a vector's lanes."""
        if task.block != 1 or not task.group or machine.lanes % task.group:
            return []
        found = lane_candidates(task.workload, machine, machine.lanes // task.group * task.of_group)
        return sorted(found, key=lambda kernel: lane_cycles(kernel, machine))

    def cycles(self, kernel: LaneConvKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return lane_cycles(kernel, machine)

    def prim_func(self, kernel: LaneConvKernel) -> tvm.tirx.PrimFunc:
        """Return the unscheduled function."""
        return lane_conv_prim_func(kernel)

    def text(self, kernel: LaneConvKernel) -> str:
        """Return `lane VECTORS tile ROWSxCOLUMNS`."""
        return f"lane {kernel.vectors} tile {kernel.tile_rows}x{kernel.tile_columns}"

    def steps(self, kernel: LaneConvKernel, machine: Machine) -> list[LaneConvKernel]:
        """Return other tiles."""
        found = lane_candidates(kernel.workload, machine, kernel.per_vector)
        return self._beside(kernel, found, ("vectors", "tile_rows", "tile_columns"), machine)

    def pack(self, kernel: LaneConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the packed weights."""
        return pack_lane_conv(kernel, weights)

    def random_table(self, kernel: LaneConvKernel, rng: np.random.Generator) -> npt.NDArray[np.integer]:
        """Return a table of lanes."""
        return random_lanes(kernel, rng)
