"""Kernels for N:M whose output channels share loads in pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.families.base import ConvFamily
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.pair_code import pair_conv_prim_func
from tvm_nm.schedules.pair_conv import PairConvKernel
from tvm_nm.schedules.pair_packing import pack_pair_conv, random_pairs
from tvm_nm.schedules.pair_tiling import pair_candidates, pair_cycles

__all__ = ["PairFamily"]


class PairFamily(ConvFamily[PairConvKernel]):
    """See `tvm_nm.schedules.pair_conv`."""

    word = "pair"

    def candidates(self, task: KernelTask, machine: Machine) -> list[PairConvKernel]:
        """Return the variants of an N:M convolution."""
        if task.block != 1 or not task.group:
            return []
        found = pair_candidates(task.workload, machine, task.of_group, task.group)
        return sorted(found, key=lambda kernel: pair_cycles(kernel, machine))

    def cycles(self, kernel: PairConvKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return pair_cycles(kernel, machine)

    def prim_func(self, kernel: PairConvKernel) -> tvm.tirx.PrimFunc:
        """Return the function, written out."""
        return pair_conv_prim_func(kernel)

    def text(self, kernel: PairConvKernel) -> str:
        """Return `pair tile PIXELS block CHANNELS task PAIRS`."""
        return f"pair tile {kernel.tile_pixels} block {kernel.channels_per_block} task {kernel.pairs_per_task}"

    def steps(self, kernel: PairConvKernel, machine: Machine) -> list[PairConvKernel]:
        """Return other tiles and blocks; the task follows from the tile."""
        found = pair_candidates(kernel.workload, machine, kernel.of_group, kernel.group)
        return self._beside(kernel, found, ("tile_pixels", "channels_per_block"), machine)

    def pack(self, kernel: PairConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return the packed weights."""
        return pack_pair_conv(kernel, weights)

    def random_table(self, kernel: PairConvKernel, rng: np.random.Generator) -> npt.NDArray[np.integer]:
        """Return a table of choices."""
        return random_pairs(kernel, rng)
