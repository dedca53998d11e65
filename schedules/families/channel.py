"""Kernels with vectors of output channels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.channel_conv import ChannelConvKernel, channel_conv_prim_func
from tvm_nm.schedules.channel_packing import pack_channel_conv, random_positions
from tvm_nm.schedules.channel_tiling import channel_candidates, channel_cycles
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.families.base import ConvFamily
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights

__all__ = ["ChannelFamily"]


class ChannelFamily(ConvFamily[ChannelConvKernel]):
    """See `tvm_nm.schedules.channel_conv`."""

    word = "channel"

    def candidates(self, task: KernelTask, machine: Machine) -> list[ChannelConvKernel]:
        """Return the variants of a direct convolution."""
        if task.index is IndexKind.NONE:
            found = channel_candidates(task.workload, machine)
        else:
            # The family's tables hold positions.
            positions = task.kept * (task.workload.taps if task.index is IndexKind.CHANNEL else 1)
            found = channel_candidates(task.workload, machine, block=task.block, kept=positions)
        return sorted(found, key=lambda kernel: channel_cycles(kernel, machine))

    def cycles(self, kernel: ChannelConvKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return channel_cycles(kernel, machine)

    def prim_func(self, kernel: ChannelConvKernel) -> tvm.tirx.PrimFunc:
        """Return the unscheduled function."""
        return channel_conv_prim_func(kernel)

    def text(self, kernel: ChannelConvKernel) -> str:
        """Return `channel VECTORS tile ROWSxCOLUMNS`."""
        return f"channel {kernel.vectors} tile {kernel.tile_rows}x{kernel.tile_columns}"

    def steps(self, kernel: ChannelConvKernel, machine: Machine) -> list[ChannelConvKernel]:
        """Return other tiles."""
        block = None if kernel.index is IndexKind.NONE else kernel.block
        found = channel_candidates(kernel.workload, machine, block=block, kept=kernel.kept)
        return self._beside(kernel, found, ("vectors", "tile_rows", "tile_columns"), machine)

    def pack(self, kernel: ChannelConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the packed weights."""
        return pack_channel_conv(kernel, weights)

    def random_table(self, kernel: ChannelConvKernel, rng: np.random.Generator) -> npt.NDArray[np.integer] | None:
        """Return a table of positions."""
        return random_positions(kernel, rng)
