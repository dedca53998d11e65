"""Kernel variants of a task, of all families: which one an untuned build takes, and how a record names one.

Two levels of choice meet here. A `ConvKernel` fixes the packed layout: pixel geometry, channel tile. The template's
sampled decisions (pixel vectors of the register tile, block rows of a task, reduction blocks) are kernel attributes as
well, as its block annotations' defaults: a variant in this module's sense is both, so that choosing one kernel chooses
everything.
"""

from __future__ import annotations

import itertools

import tvm

from tvm_nm.schedules.families import Kernel, families_for, family_of
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.stem_winograd_tiling import stem_winograd_candidates
from tvm_nm.schedules.winograd import winograd_applies
from tvm_nm.workload import MaxPool

__all__ = [
    "Kernel",
    "default_kernel",
    "kernel_cycles",
    "kernel_from_text",
    "kernel_prim_func",
    "neighbours",
    "pooled_task",
    "ranked_kernels",
    "variant_text",
    "winograd_fits",
]

# A family other than the usual one must be predicted to be this much faster: the model's error is of this order.
_OTHER_FAMILY = 0.95
_OF_OTHERS = 6


def default_kernel(task: KernelTask, machine: Machine) -> Kernel:
    """Return the variant of an untuned build.

    Raises
    ------
    ValueError
        If no family computes the task.
    """
    usual, *others = families_for(task)
    kernel: Kernel | None = usual.default(task, machine)
    if kernel is None:
        raise ValueError(f"there are no kernels of {task}")
    rivals: list[Kernel] = [found for family in others if (found := family.default(task, machine)) is not None]
    best = min(rivals, key=lambda rival: kernel_cycles(rival, machine), default=kernel)
    return best if kernel_cycles(best, machine) < _OTHER_FAMILY * kernel_cycles(kernel, machine) else kernel


def winograd_fits(task: KernelTask, machine: Machine) -> bool:
    """Whether there are Winograd kernels for a direct task: block rows are whole vectors, stems wide enough."""
    if not task.takes_winograd or task.block % machine.lanes:
        return False
    return winograd_applies(task.workload) or bool(stem_winograd_candidates(task.workload, machine))


def pooled_task(task: KernelTask, pool: MaxPool, machine: Machine) -> KernelTask | None:
    """Return a task with the maxima that follow, where there are kernels for both in one; else None."""
    pooled = task.pooled(pool)
    if pooled is None or not any(family.candidates(pooled, machine) for family in families_for(pooled)):
        return None
    return pooled


def kernel_cycles(kernel: Kernel, machine: Machine) -> float:
    """Return the cycles that its family's model predicts for a variant."""
    return family_of(kernel).cycles(kernel, machine)


def kernel_prim_func(kernel: Kernel) -> tvm.tirx.PrimFunc:
    """Return the PrimFunc of a variant, scheduled already if its family writes it out."""
    return family_of(kernel).prim_func(kernel)


def variant_text(kernel: Kernel) -> str:
    """Return what tells a variant from the others of its task, as text that `kernel_from_text` reads."""
    return family_of(kernel).text(kernel)


def kernel_from_text(text: str, task: KernelTask, machine: Machine) -> Kernel:
    """Return the variant of a task that a text names; it may come from another density of the same layer.

    Raises
    ------
    ValueError
        If the text names no variant, or one that does not fit the task.
    """
    for family in families_for(task):
        kernel: Kernel | None = family.parse(text, task, machine)
        if kernel is not None:
            return kernel
    raise ValueError(f"{text!r:.100} is no variant of {task}")


def neighbours(kernel: Kernel, machine: Machine) -> list[Kernel]:
    """Return the variants that differ from one in a single choice, by their predicted time: a step of a climb."""
    return family_of(kernel).steps(kernel, machine)


def ranked_kernels(task: KernelTask, machine: Machine, limit: int) -> list[Kernel]:
    """Return the variants that are worth measuring, those with the least predicted time first.

    The first is the one that an untuned build uses. The families' models are not calibrated with each other: all are
    tried early.
    """
    default = default_kernel(task, machine)
    usual, *others = families_for(task)
    rivals = [kernel for family in others for kernel in family.candidates(task, machine)[:_OF_OTHERS]]
    both = ([kernel for kernel in found if kernel != default] for found in (rivals, usual.candidates(task, machine)))
    ranked = [kernel for pair in itertools.zip_longest(*both) for kernel in pair if kernel is not None]
    return [default, *ranked][:limit]
