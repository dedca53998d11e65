"""Tunes the kernels of a model: lists its tasks, searches each and keeps what was measured in the database."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import onnx
import tvm

from tvm_nm.environment import check_environment, missing_features
from tvm_nm.errors import EnvironmentMismatchError
from tvm_nm.frontend import import_onnx
from tvm_nm.patterns import Dense, SparsityPattern
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import machine_of, usable_threads
from tvm_nm.schedules.variants import default_kernel, variant_text
from tvm_nm.targets import resolve_target
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.in_network import choose_in_network
from tvm_nm.tuning.outcomes import NetworkChoice, Progress, TaskOutcome, TuningSummary
from tvm_nm.tuning.pool import Candidate, Laboratory
from tvm_nm.tuning.requirements import need_filelock
from tvm_nm.tuning.search import Effort, Search
from tvm_nm.tuning.tasks import ModelTask, model_tasks, pruned_to
from tvm_nm.tuning.trials import Trial

__all__ = ["DEFAULT_TRIALS", "tune", "tune_tasks"]

DEFAULT_TRIALS = 24
"""Most variants that are tried for a task; a search mostly ends earlier."""

_GROUP = 8
_ROUNDS = 6
_FINAL_ROUNDS = 14
_EFFORTS = get_args(Effort)
_log = logging.getLogger(__name__)


def tune(
    model: str | os.PathLike[str] | onnx.ModelProto,
    database: str | os.PathLike[str],
    *,
    patterns: Sequence[str | SparsityPattern] = ("1x16",),
    densities: Sequence[float] = (0.5,),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    threads: int | None = None,
    target: Mapping[str, Any] | str | tvm.target.Target | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    trials: int = DEFAULT_TRIALS,
    minutes: float | None = None,
    thorough: bool = False,
    retune: bool = False,
    in_network: bool = False,
    progress: Progress | None = None,
) -> TuningSummary:
    """Measure kernel variants of a model's layers, dense and with the patterns, and keep the times in a database.

    What the database holds already is not measured again. At more than three densities of a pattern, those between are
    interpolated first and measured when time remains.

    Parameters
    ----------
    model
        A file, or a model in memory.
    database
        Directory; it is created.
    patterns, densities, include, exclude
        What layers may be pruned to; see `tvm_nm.tuning.tasks.model_tasks`. Dense kernels are always tuned.
    threads, target, shapes
        As `tvm_nm.compile` takes them; the target must be able to run here.
    trials
        Most variants to try for a task.
    minutes
        Time after which no more trials are started; default: none.
    thorough
        Try as many variants of every task as `trials` says, at all densities, also where nothing better is found.
    retune
        Measure anew what the database holds.
    in_network
        At the end, build the model pruned to each pattern and density with each layer's best variants in turn, and let
        those win that are fastest between the other layers; see `tvm_nm.tuning.in_network`.
    progress
        Told how it goes.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be read.
    PlanError
        If patterns and densities do not go together, or a glob matches no layer.
    EnvironmentMismatchError
        If this machine cannot run the target's code.
    TuningError
        If the database cannot be read or written, or kernels cannot be built.
    """
    check_environment()
    start = time.perf_counter()
    progress = progress or Progress()
    chosen = resolve_target(target, threads)
    progress.step("importing")
    imported = import_onnx(model, shapes=shapes, verify=False)
    include, exclude = tuple(include), tuple(exclude)
    found = model_tasks(imported.module, machine_of(chosen), patterns, densities, include, exclude)
    kept = imported if in_network else None  # its weights are needed no more otherwise
    del imported
    records = TuningDatabase(database, chosen)
    summary = tune_tasks(
        found, records, trials=trials, minutes=minutes, thorough=thorough, retune=retune, progress=progress
    )
    if kept is None:
        return summary
    choices: list[NetworkChoice] = []
    for pattern, density in pruned_to(patterns, densities) or [(Dense(), 1.0)]:
        choices += choose_in_network(
            kept, records, pattern, density, include=include, exclude=exclude, progress=progress
        )
    return replace(summary, choices=tuple(choices), seconds=time.perf_counter() - start)


def tune_tasks(
    tasks: Sequence[ModelTask],
    database: TuningDatabase,
    *,
    trials: int = DEFAULT_TRIALS,
    minutes: float | None = None,
    thorough: bool = False,
    retune: bool = False,
    progress: Progress | None = None,
    group: int = _GROUP,
    alone: Callable[[], AbstractContextManager[object]] | None = None,
    building: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> TuningSummary:
    """Tune tasks into a database; see `tune` for what is not said here.

    Parameters
    ----------
    tasks
        What to tune, of any model.
    database
        What is known, and where new trials go; its target is what is tuned for.
    group
        Tasks that are built together, and timed together.
    alone, building
        Contexts in which variants are timed and built, for machines that are shared by some agreement; default: timing
        excludes other tuners.
    """
    start = time.perf_counter()
    deadline = start + minutes * 60 if minutes is not None else float("inf")
    progress = progress or Progress()
    need_filelock()  # rather now than when there is something to write
    _check_runs_here(database.target)
    ordered: list[tuple[ModelTask, Effort]] = _ordered(tasks)
    if thorough:
        ordered = [(item, "thorough") for item, _ in ordered]
    missing = [item for item in ordered if retune or not _is_done(database, *item)]
    progress.start(len(ordered), len(ordered) - len(missing))
    run = _Run(database, progress, trials, retune, building)
    if missing:
        with Laboratory(database.target, builders=usable_threads(), alone=alone) as laboratory:
            with building():
                laboratory.prepare()
            if database.yardstick_us is None:
                with laboratory.alone():
                    database.start(laboratory.calibrate())
            laboratory.yardstick_us = database.yardstick_us
            try:
                for first in range(0, len(missing), group):
                    if time.perf_counter() > deadline:
                        break
                    run.tune_group(laboratory, missing[first : first + group], deadline)
            finally:
                run.commit()
    return TuningSummary(
        database=str(database.folder),
        outcomes=tuple(_outcome(database, item, run) for item in tasks),
        failures=tuple(sorted(run.failures.items(), key=lambda pair: -pair[1])),
        seconds=time.perf_counter() - start,
    )


class _Run:
    """One tuning run's way through the tasks."""

    def __init__(
        self,
        database: TuningDatabase,
        progress: Progress,
        trials: int,
        retune: bool,
        building: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._database = database
        self._progress = progress
        self._trials = trials
        self._retune = retune
        self._building = building
        self.done: list[KernelTask] = []
        self.tried: dict[KernelTask, set[str]] = {}
        self.failed: dict[KernelTask, int] = {}
        self.failures: dict[str, int] = {}

    def tune_group(self, laboratory: Laboratory, group: Sequence[tuple[ModelTask, Effort]], deadline: float) -> None:
        """Search some tasks side by side, batch by batch, so that all processors have something to build."""
        machine = machine_of(self._database.target)
        searches = [
            Search(item.task, machine, self._database, effort, self._trials, self._retune) for item, effort in group
        ]
        libraries: dict[Candidate, Path] = {}
        active = searches
        while active and time.perf_counter() < deadline:
            batches = {search.task: search.propose() for search in active}
            over = [search for search in active if not batches[search.task]]
            active = [search for search in active if batches[search.task]]
            self._build(laboratory, [Candidate(t, v) for t, variants in batches.items() for v in variants], libraries)
            with laboratory.alone():
                for search in active:
                    # What was tried in an earlier run has no library, and need not be compared with again.
                    again = [v for v in search.finalists if Candidate(search.task, v) in libraries]
                    self._time(laboratory, search, [*batches[search.task], *again], libraries, _ROUNDS)
                    self._drop_losers(search, libraries)
                self._finish(laboratory, over, libraries)

    def commit(self) -> None:
        """Write MetaSchedule's records of what is done: once, since its file takes a second or more to open."""
        found = [best for best in map(self._database.measured, self.done) if best is not None]
        if found:
            self._database.commit_records(found)

    def _build(self, laboratory: Laboratory, candidates: list[Candidate], libraries: dict[Candidate, Path]) -> None:
        if not candidates:
            return
        self._progress.step(f"building {len(candidates)} variants")
        with self._building():
            built = laboratory.build(candidates)
        failed = []
        for candidate, (path, error) in zip(candidates, built, strict=True):
            if error:
                failed.append(Trial(candidate.task, candidate.variant, float("inf"), error))
            else:
                libraries[candidate] = path
        self._record(failed)

    def _time(
        self,
        laboratory: Laboratory,
        search: Search,
        variants: list[str],
        libraries: dict[Candidate, Path],
        rounds: int,
    ) -> None:
        candidates = [Candidate(search.task, v) for v in variants if Candidate(search.task, v) in libraries]
        trials = [
            trial
            for trial in self._database.trials.get(search.task, {}).values()
            if trial.error and trial.variant in variants
        ]
        if candidates:
            self._progress.step(f"measuring {search.task}")
            timings = laboratory.time(candidates, [libraries[c] for c in candidates], rounds)
            new = [
                Trial(c.task, c.variant, timing.latency_us, timing.error)
                for c, timing in zip(candidates, timings, strict=True)
            ]
            self._record(new)
            trials += new
        search.observe(trials)

    def _finish(self, laboratory: Laboratory, searches: list[Search], libraries: dict[Candidate, Path]) -> None:
        """Measure the finalists once more with more calls: the fastest of many was partly lucky."""
        for search in searches:
            finalists = [v for v in search.finalists if Candidate(search.task, v) in libraries]
            if finalists:
                self._time(laboratory, search, finalists, libraries, _FINAL_ROUNDS)
            self._database.add([], {search.task: search.effort})
            self.done.append(search.task)
            for candidate in [c for c in libraries if c.task == search.task]:
                libraries.pop(candidate).unlink(missing_ok=True)
            best = self._database.measured(search.task)
            default_us = search.tried.get(search.default, float("inf"))
            self._progress.finished(search.task, best.latency_us if best else float("inf"), default_us)

    def _drop_losers(self, search: Search, libraries: dict[Candidate, Path]) -> None:
        kept = set(search.finalists)
        for candidate in [c for c in libraries if c.task == search.task and c.variant not in kept]:
            libraries.pop(candidate).unlink(missing_ok=True)

    def _record(self, trials: list[Trial]) -> None:
        if not trials:
            return
        self._database.add(trials)
        for trial in trials:
            self.tried.setdefault(trial.task, set()).add(trial.variant)
            if trial.error:
                _log.warning("%s, %s: %s", trial.task, trial.variant, trial.error)
                self.failed[trial.task] = self.failed.get(trial.task, 0) + 1
                self.failures[trial.error] = self.failures.get(trial.error, 0) + 1


def _is_done(database: TuningDatabase, item: ModelTask, effort: Effort) -> bool:
    how = database.finished.get(item.task)
    return how in _EFFORTS and _EFFORTS.index(how) >= _EFFORTS.index(effort)


def _ordered(tasks: Sequence[ModelTask]) -> list[tuple[ModelTask, Effort]]:
    """Return the tasks in the order of tuning, and how thorough to be.

    Dense ones and each layer's middle density first, then its outermost densities, which start from that; what lies
    between is interpolated until then and comes last. Each time those with the most work first.
    """
    series: dict[KernelTask, list[int]] = {}
    for item in tasks:
        if item.task.kept:
            series.setdefault(item.task.with_kept(1), []).append(item.task.kept)
    rounds: tuple[list[tuple[ModelTask, Effort]], ...] = ([], [], [])
    for item in sorted(tasks, key=lambda item: -item.macs):
        kept = sorted(series.get(item.task.with_kept(1), [])) if item.task.kept else []
        if not kept or item.task.kept == kept[len(kept) // 2]:
            rounds[0].append((item, "full"))
        else:
            rounds[1 if item.task.kept in (kept[0], kept[-1]) else 2].append((item, "light"))
    return [item for part in rounds for item in part]


def _outcome(database: TuningDatabase, item: ModelTask, run: _Run) -> TaskOutcome:
    task = item.task
    best = database.best(task)
    default = variant_text(default_kernel(task, machine_of(database.target)))
    tried = database.trials.get(task, {}).get(default)
    return TaskOutcome(
        task=str(task),
        layers=item.layers,
        variant=variant_text(best.kernel) if best else "",
        latency_us=best.latency_us if best else float("inf"),
        default_us=tried.latency_us if tried else float("inf"),
        trials=len(run.tried.get(task, ())),
        failed=run.failed.get(task, 0),
        origin=best.origin if best else "missing",
    )


def _check_runs_here(target: tvm.target.Target) -> None:
    features = [str(name) for name in tvm.get_global_func("target.llvm_get_cpu_features")(target)]
    triple = str(target.attrs.get("mtriple", ""))
    if missing := missing_features(triple.partition("-")[0] or platform.machine(), features):
        raise EnvironmentMismatchError(
            f"the target needs {', '.join(missing)}, which this machine lacks; tune on a machine that has it"
        )
