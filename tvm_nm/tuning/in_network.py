"""Compares the best kernels of each layer where they will run: between the other layers of the network.

A kernel timed alone finds caches, branch predictors and the other cores' caches in a state that is only made to look
like the network's, and the fastest of many variants was partly lucky. So the network is built several times, each time
with another of the best variants of every layer, the builds take turns, and each layer's calls are timed between those
of the others. In one more build every layer has a kernel of another kind than the best one: direct instead of
Winograd's, dense instead of sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from tvm_nm.cost_measure import build_plan
from tvm_nm.frontend import ImportedModel
from tvm_nm.inventory import inventory
from tvm_nm.layer_report import LayerReport
from tvm_nm.network_times import time_networks
from tvm_nm.patterns import SparsityPattern
from tvm_nm.plan import uniform_plan
from tvm_nm.runtime import CompiledModel
from tvm_nm.schedules.kernel_task import KernelTask, parse_task
from tvm_nm.schedules.machine import Machine, machine_of
from tvm_nm.schedules.tuned import TunedKernel
from tvm_nm.schedules.variants import default_kernel, kernel_from_text, variant_text
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.outcomes import NetworkChoice, Progress
from tvm_nm.tuning.pool import alone_on_the_machine
from tvm_nm.tuning.tables import KernelTables, shipped_tables
from tvm_nm.tuning.trials import TrialTable

__all__ = ["choose_in_network", "compare", "scale_to"]

_BUILDS = 4
"""How many of a layer's variants are compared: what would be built, the model's choice, the package's record for the
processor's family, and the second best alone."""

_SECONDS = 15.0
_PERIODS = 3
"""Parts of that time. Where the system puts threads, and what else the machine does, may favour a build for seconds; a
layer's time is the median over the parts."""
_NEAR = 1.3
"""Variants that take longer alone than this many times the best one's time are not compared."""
_NEVER_US = 1e9
_LEAST_SHARED = 5
"""What builds, or comparisons, must have in common to tell how much slower the machine was for one of them."""


def choose_in_network(
    imported: ImportedModel,
    database: TuningDatabase,
    pattern: SparsityPattern,
    density: float,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seconds: float = _SECONDS,
    progress: Progress | None = None,
) -> tuple[NetworkChoice, ...]:
    """Compare each layer's best variants within the network, and write their times there to the database.

    Which layers are built sparse, and which by Winograd's algorithm, is decided as `tvm_nm.compile` does; the last
    build has the second best kind of each.

    Parameters
    ----------
    imported
        The model.
    database
        What was measured so far, and where the times go; its target must be this machine.
    pattern, density, include, exclude
        What the network is pruned to; see `tvm_nm.plan.uniform_plan`.
    seconds
        How long to measure, at least.
    progress
        Told how it goes.

    Returns
    -------
    What was compared, a task each, those that take longest first.
    """
    told = progress or Progress()
    plan = uniform_plan(inventory(imported.module), pattern, density, include, exclude)
    label = pattern.at(density)
    shipped = shipped_tables(database.target)
    with TemporaryDirectory(prefix="tvm-nm-network-") as folder:

        def build(number: int, slate: _Slate) -> CompiledModel:
            told.step(f"building {label} with other kernels, {number + 1} of {_BUILDS + 1}")
            where = Path(folder) / str(number)
            return build_plan(imported, plan, database.target, where, slate, always_sparse=False)

        models = [build(number, _Slate(database, shipped, number)) for number in range(_BUILDS)]
        best_kinds = frozenset(parse_task(layer.task) for layer in models[0].layers if layer.task)
        models.append(build(_BUILDS, _Slate(database, shipped, 0, best_kinds)))
        told.step(f"measuring {len(models)} builds in turns, {label}")
        with alone_on_the_machine():
            periods = [time_networks(models, seconds / _PERIODS) for _ in range(_PERIODS)]
        reports = [model.layers for model in models]
    times = np.median([[build.layers_us for build in period] for period in periods], axis=0)
    found = compare(reports, times)
    new = {parse_task(choice.task): dict(choice.times_us) for choice in found}
    scale = scale_to(database.within, new)
    database.add_within({task: {text: us * scale for text, us in times.items()} for task, times in new.items()})
    told.compared(label, found)
    return found


class _Slate:
    """Answers with another of each task's best variants. Satisfies `TunedKernels`.

    The time it gives is that of the best one, so that all slates decide alike between sparse and dense and between
    Winograd and direct kernels; tasks to avoid get one that loses against any other.
    """

    def __init__(
        self,
        database: TuningDatabase,
        shipped: tuple[TrialTable, ...],
        place: int,
        avoided: frozenset[KernelTask] = frozenset(),
    ) -> None:
        self._database = database
        self._shipped = KernelTables(shipped)
        self._tables = KernelTables((database, *shipped))
        self._place = place
        self._avoided = avoided

    def best(self, task: KernelTask) -> TunedKernel | None:
        found = self._tables.best(task)
        if found is None:
            return None
        machine = replace(machine_of(self._database.target), threads=task.threads)
        variants = self._variants(task, found, machine)
        kernel = kernel_from_text(variants[self._place % len(variants)], task, machine)
        if task in self._avoided:
            return replace(found, kernel=kernel, latency_us=_NEVER_US, within_us=_NEVER_US)
        return replace(found, kernel=kernel)

    def _variants(self, task: KernelTask, found: TunedKernel, machine: Machine) -> list[str]:
        """Return the texts of the variants to compare, what would be built first."""
        shipped = self._shipped.best(task)
        trials = self._database.best_trials(task)
        near = [trial.variant for trial in trials if trial.latency_us <= _NEAR * trials[0].latency_us]
        wanted = [variant_text(found.kernel), variant_text(default_kernel(task, machine))]
        wanted += [] if shipped is None else [variant_text(shipped.kernel)]
        return list(dict.fromkeys(wanted + near))[:_BUILDS]


def compare(reports: Sequence[Sequence[LayerReport]], times_us: NDArray[np.float64]) -> tuple[NetworkChoice, ...]:
    """Find the fastest variant of each task.

    Parameters
    ----------
    reports
        (builds, layers): the layers, of the same network in every build; the first has what would be built.
    times_us
        (builds, layers): their times.

    Returns
    -------
    The tasks; those that a layer of the first build has with what else it might have had, those of other kinds with no
    layers.
    """
    times_us = times_us / _pace(reports, times_us)[:, None]
    samples: dict[str, dict[str, list[float]]] = {}
    layers: dict[str, list[str]] = {}
    for number, row in enumerate(reports):
        for place, report in enumerate(row):
            if not report.task:
                continue
            chain = [at for at, other in enumerate(row) if at == place or other.chain == report.name]
            variants = samples.setdefault(report.task, {})
            variants.setdefault(report.variant, []).append(float(times_us[number, chain].sum()))
            if number == 0:
                layers.setdefault(report.task, []).append(report.name)
    found = []
    for task, variants in samples.items():
        means = {variant: float(np.mean(values)) for variant, values in variants.items()}
        before = next(iter(means))
        ordered = tuple(sorted(means.items(), key=lambda item: item[1]))
        found.append(NetworkChoice(task, tuple(layers.get(task, ())), before, means[before], ordered))
    return tuple(sorted(found, key=lambda choice: -choice.before_us * len(choice.layers)))


def scale_to(known: Mapping[KernelTask, Mapping[str, float]], new: Mapping[KernelTask, Mapping[str, float]]) -> float:
    """Return what makes a comparison's times comparable with those of earlier ones.

    For minutes at a time the threads may share a core, or the clock be low: networks that are compared one after the
    other had different machines, as what both measured tells.

    Parameters
    ----------
    known, new
        Task -> variant -> time.
    """
    shared = [
        known[task][text] / us
        for task, times in new.items()
        for text, us in times.items()
        if text in known.get(task, {})
    ]
    return float(np.median(shared)) if len(shared) >= _LEAST_SHARED else 1.0


def _pace(reports: Sequence[Sequence[LayerReport]], times_us: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how slow each build's rounds were: the median over layers that have the first build's variant, too."""
    pace = np.ones(len(reports))
    for number, row in enumerate(reports):
        same = [
            place
            for place, (report, first) in enumerate(zip(row, reports[0], strict=True))
            if (report.task, report.variant, report.kernel) == (first.task, first.variant, first.kernel)
            if times_us[0, place] > 0
        ]
        if len(same) >= _LEAST_SHARED:
            pace[number] = float(np.median(times_us[number, same] / times_us[0, same]))
    return pace
