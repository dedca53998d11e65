"""Where a build takes tuned kernels from: the user's database, then the records that come with the package."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import tvm

from tvm_nm.schedules.kernel_task import TEMPLATE_REVISION, KernelTask
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.tuned import TunedKernel, TunedKernels
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.trials import TrialTable

__all__ = ["KernelTables", "families_of", "shipped_tables", "tuned_kernels"]


@dataclass(frozen=True, slots=True)
class KernelTables:
    """Several tables, the most trusted first. Satisfies `TunedKernels`.

    What a table measured for exactly a task goes before what an earlier one only predicts.
    """

    tables: tuple[TrialTable, ...]

    def best(self, task: KernelTask) -> TunedKernel | None:
        """Return the fastest variant known, or None."""
        answers = [table.measured(task) for table in self.tables] + [table.best(task) for table in self.tables]
        return next((found for found in answers if found is not None), None)


def tuned_kernels(
    target: tvm.target.Target, database: str | os.PathLike[str] | None = None, *, shipped: bool = True
) -> TunedKernels | None:
    """Return what is known about a target, None if that is nothing.

    Parameters
    ----------
    target
        What a build is for.
    database
        A tuning database's directory.
    shipped
        Whether to use the records that come with the package.

    Raises
    ------
    TuningError
        If the database cannot be read.
    """
    found: list[TrialTable] = []
    if database is not None:
        found.append(TuningDatabase(database, target))
    if shipped:
        found += shipped_tables(target)
    return KernelTables(tuple(found)) if found else None


def families_of(target: tvm.target.Target) -> tuple[str, ...]:
    """Return the families of processors whose shipped records are for a target, the nearest first."""
    machine = machine_of(target)
    if machine.lanes == 16 and machine.registers == 32:
        return ("zen-avx512", "avx512") if str(target.attrs.get("mcpu", "")).startswith("znver") else ("avx512",)
    return ("avx2",) if machine.lanes == 8 else ()


def shipped_tables(target: tvm.target.Target) -> tuple[TrialTable, ...]:
    """Return the package's own records of this template revision for a target, those of the nearest family first."""
    tables = []
    for family in families_of(target):
        text = _shipped_text(family)
        if text is not None:
            table = TrialTable(target, origin="shipped", name=family)
            table.read_lines(text.splitlines()[1:], f"the records shipped for {family}")
            tables.append(table)
    return tuple(tables)


@lru_cache(maxsize=4)
def _shipped_text(family: str) -> str | None:
    file = resources.files("tvm_nm") / "data" / "tuned" / f"{family}.r{TEMPLATE_REVISION}.jsonl"
    return file.read_text(encoding="utf-8") if file.is_file() else None
