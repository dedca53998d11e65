"""Chains: a convolution, the depthwise one after it and the pointwise one after that in one kernel."""

from __future__ import annotations

import numpy as np
import tvm

from tvm_nm.schedules.chain import ChainKernel
from tvm_nm.schedules.chain_arguments import argument_shapes
from tvm_nm.schedules.chain_code import chain_prim_func
from tvm_nm.schedules.chain_packing import random_offsets
from tvm_nm.schedules.chain_tiling import chain_candidates, chain_cycles
from tvm_nm.schedules.families.base import Array, KernelFamily, RandomValues, nearest_sizes
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine

__all__ = ["ChainFamily"]


class ChainFamily(KernelFamily[ChainKernel]):
    """See `tvm_nm.schedules.chain`."""

    word = "chain"

    def candidates(self, task: KernelTask, machine: Machine) -> list[ChainKernel]:
        """Return the variants of a chain."""
        links = task.links
        if links is None:
            return []
        found = chain_candidates(
            (task.workload, links.depthwise, links.last),
            machine,
            kept=(links.kept, links.last_kept),
            blocked_input=links.blocked_input,
        )
        return sorted(found, key=lambda kernel: chain_cycles(kernel, machine))

    def cycles(self, kernel: ChainKernel, machine: Machine) -> float:
        """Return the predicted cycles."""
        return chain_cycles(kernel, machine)

    def prim_func(self, kernel: ChainKernel) -> tvm.tirx.PrimFunc:
        """Return the function, written out."""
        return chain_prim_func(kernel)

    def text(self, kernel: ChainKernel) -> str:
        """Return `chain TILES band|staged ROWS[, N shares]`."""
        return str(kernel)

    def steps(self, kernel: ChainKernel, machine: Machine) -> list[ChainKernel]:
        """Return other tiles, bands of the sizes beside, other shares, and the other way to hold what is between."""
        found = self.candidates(KernelTask.of(kernel, machine.threads), machine)
        rows = {kernel.rows, *nearest_sizes([k.rows for k in found], kernel.rows)}
        near = [k for k in found if k.rows in rows]
        return self._beside(kernel, near, ("staged", "mixing", "last_mixing", "cut"), machine)

    def random_arguments(self, kernel: ChainKernel, rng: np.random.Generator) -> list[Array]:
        """Return valid arguments, the output last."""
        values = RandomValues(rng)
        tables = {"first_index": False, "last_index": True}
        return [
            random_offsets(kernel, rng, last=tables[name]) if name in tables else values(shape)
            for name, (shape, _) in argument_shapes(kernel).items()
        ]
