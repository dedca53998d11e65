"""Kernels of fully connected layers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import tvm

from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.families.base import Array, KernelFamily, RandomValues
from tvm_nm.schedules.fc import FcKernel, choose_fc_kernel, fc_prim_func
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine

__all__ = ["FeatureFamily"]

_FORM = re.compile(r"feature (?P<block>\d+)")
_VECTORS = (1, 2, 4, 8)


class FeatureFamily(KernelFamily[FcKernel]):
    """See `tvm_nm.schedules.fc`."""

    word = "feature"

    def default(self, task: KernelTask, machine: Machine) -> FcKernel:
        """Return the variant of an untuned build."""
        work = task.workload
        sizes = (work.batch, work.in_channels, work.out_channels)
        if task.index is IndexKind.NONE:
            return choose_fc_kernel(*sizes, work.epilogue, machine)
        return choose_fc_kernel(*sizes, work.epilogue, machine, block=task.block, kept=task.kept)

    def candidates(self, task: KernelTask, machine: Machine) -> list[FcKernel]:
        """Return the variants of a fully connected layer."""
        default = self.default(task, machine)
        return [default, *self.steps(default, machine)]

    def cycles(self, kernel: FcKernel, machine: Machine) -> float:
        """Return a time in proportion to the weights: their bytes decide."""
        return kernel.macs / machine.lanes

    def prim_func(self, kernel: FcKernel) -> tvm.tirx.PrimFunc:
        """Return the unscheduled function."""
        return fc_prim_func(kernel)

    def text(self, kernel: FcKernel) -> str:
        """Return `feature BLOCK`."""
        return f"feature {kernel.block}"

    def parse(self, text: str, task: KernelTask, machine: Machine) -> FcKernel | None:
        """Return the variant that a text names."""
        found = _FORM.fullmatch(text)
        if found is None:
            return None
        block, default = int(found["block"]), self.default(task, machine)
        if block % machine.lanes or (default.sparse and block != task.block):
            raise ValueError(f"{text!r:.100} does not fit {task}")
        return replace(default, block=block)

    def steps(self, kernel: FcKernel, machine: Machine) -> list[FcKernel]:
        """Return other blocks; a sparse layer's are given by its weights."""
        if kernel.sparse:
            return []
        blocks = [machine.lanes * vectors for vectors in _VECTORS]
        return [replace(kernel, block=block) for block in blocks if block != kernel.block]

    def random_arguments(self, kernel: FcKernel, rng: np.random.Generator) -> list[Array]:
        """Return valid arguments, the output last."""
        values = RandomValues(rng)
        out = (kernel.batch, kernel.out_features)
        arrays: list[Array] = [
            values((kernel.batch, kernel.in_features)),
            values((kernel.blocks, kernel.kept, kernel.block)),
        ]
        if kernel.sparse:
            rows = [np.sort(rng.permutation(kernel.in_features)[: kernel.kept]) for _ in range(kernel.blocks)]
            arrays.append(np.stack(rows).astype(kernel.index_dtype))
        arrays.append(values((kernel.out_features,)))
        arrays += [values(out)] if kernel.epilogue.residual else []
        return [*arrays, np.zeros(out, np.float32)]
