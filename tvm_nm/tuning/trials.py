"""Trials of kernel variants by task, and what they say of tasks that were never tried."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tvm

from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.kernel_task import KernelTask, parse_task
from tvm_nm.schedules.machine import Machine, machine_of
from tvm_nm.schedules.tuned import Origin, TunedKernel
from tvm_nm.schedules.variants import Kernel, kernel_cycles, kernel_from_text, variant_text

__all__ = ["Trial", "TrialTable"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured variant, or one that failed.

    Attributes
    ----------
    task
        What was computed.
    variant
        Its text; see `tvm_nm.schedules.variants`.
    latency_us
        Median time of a call; infinite where it failed.
    error
        Why it failed, else empty.
    """

    task: KernelTask
    variant: str
    latency_us: float
    error: str = ""

    def to_json(self) -> str:
        """Return the trial's line."""
        line: dict[str, Any] = {"task": str(self.task), "variant": self.variant}
        line |= {"error": self.error} if self.error else {"us": round(self.latency_us, 2)}
        return json.dumps(line)


@dataclass(slots=True)
class TrialTable:
    """Trials of one target by task; answers what the best variant is. Satisfies `TunedKernels`.

    Attributes
    ----------
    target
        What they were measured on; its threads do not matter.
    trials
        Task -> variant -> its latest trial.
    finished
        Tasks whose search came to an end, and how thorough it was.
    within
        Task -> variant -> its time in us within a network, where the task's best variants were compared in one.
    origin
        What the table calls its exact answers.
    name
        Tells the package's tables from each other; empty for a database.
    """

    target: tvm.target.Target
    trials: dict[KernelTask, dict[str, Trial]] = field(default_factory=dict)
    finished: dict[KernelTask, str] = field(default_factory=dict)
    within: dict[KernelTask, dict[str, float]] = field(default_factory=dict)
    origin: Origin = "measured"
    name: str = ""

    @property
    def _predicted(self) -> Origin:
        """What the table calls its predictions: those from another machine's times are no better than these."""
        return "interpolated" if self.origin == "measured" else self.origin

    def tasks(self) -> tuple[KernelTask, ...]:
        """Return the tasks of which at least one variant was measured."""
        return tuple(task for task in self.trials if self.best_trials(task))

    def best_trials(self, task: KernelTask) -> list[Trial]:
        """Return a task's successful trials, fastest first."""
        found = [trial for trial in self.trials.get(task, {}).values() if not trial.error]
        return sorted(found, key=lambda trial: trial.latency_us)

    def failures(self, task: KernelTask) -> list[Trial]:
        """Return a task's failed trials."""
        return [trial for trial in self.trials.get(task, {}).values() if trial.error]

    def best(self, task: KernelTask) -> TunedKernel | None:
        """Return the fastest variant known: measured, or else predicted from what was measured nearby.

        Time grows linearly with what a block row keeps, so other densities of the same layer predict this one; and a
        layer that differs in its epilogue only has the same best variant, at any density.
        """
        return self.measured(task) or self._between_densities(task) or self._other_epilogue(task)

    def measured(self, task: KernelTask) -> TunedKernel | None:
        """Return the fastest variant that was measured for exactly this task: within a network, or else alone.

        Its time is that of a call alone, as other tasks' times are, if it was measured alone.
        """
        alone = {trial.variant: trial.latency_us for trial in self.best_trials(task)}
        within = self.within.get(task, {})
        for variant in (*sorted(within, key=lambda text: within[text]), *alone):
            kernel = self._kernel(variant, task)
            if kernel is not None:
                within_us = within.get(variant, 0.0)
                return TunedKernel(task, kernel, alone.get(variant, within_us), self.origin, self.name, within_us)
        return None

    def series(self, task: KernelTask) -> list[TunedKernel]:
        """Return the best measured variants of the layer at all densities of one kind, by what they keep."""
        if not task.kept:
            return []
        alike = (t for t in self.trials if t.kept and t.with_kept(1) == task.with_kept(1))
        found = [best for best in map(self.measured, alike) if best is not None]
        return sorted(found, key=lambda best: best.task.kept)

    def _between_densities(self, task: KernelTask) -> TunedKernel | None:
        points = self.series(task)
        if not points:
            return None
        nearest = min(points, key=lambda point: abs(point.task.kept - task.kept))
        kernel = self._kernel(variant_text(nearest.kernel), task)
        if kernel is None:
            return None
        if len(points) == 1:
            machine = self._machine(task.threads)
            latency_us = nearest.latency_us * kernel_cycles(kernel, machine) / kernel_cycles(nearest.kernel, machine)
        else:
            # The segment that holds this density, or the outermost one.
            above = next((i for i, point in enumerate(points) if point.task.kept >= task.kept), len(points) - 1)
            low, high = points[max(above, 1) - 1], points[max(above, 1)]
            share = (task.kept - low.task.kept) / (high.task.kept - low.task.kept)
            latency_us = low.latency_us + share * (high.latency_us - low.latency_us)
            # Noise may turn an extrapolation around; half of the proportional time is a safe floor.
            latency_us = max(latency_us, nearest.latency_us * min(1.0, task.kept / nearest.task.kept) / 2)
        return TunedKernel(task, kernel, latency_us, self._predicted, self.name)

    def _other_epilogue(self, task: KernelTask) -> TunedKernel | None:
        work, pool = task.workload, task.workload.epilogue.pool
        others = {
            other.workload.epilogue: replace(task, workload=other.workload)
            for other in self.trials
            if (other.kind, other.winograd) == (task.kind, task.winograd)
            if other.workload != work and replace(other.workload, epilogue=work.epilogue) == work
            # Only dense kernels take maxima, but for Winograd's.
            if other.workload.epilogue.pool is None or task.winograd or task.index is IndexKind.NONE
        }
        candidates = list(others.values())
        for answer in (self.measured, self._between_densities):
            for other in candidates:
                found = answer(other)
                kernel = None if found is None else self._kernel(variant_text(found.kernel), task)
                if found is not None and kernel is not None:
                    latency_us = found.latency_us
                    if other.workload.epilogue.pool != pool:  # a quarter of the stores, or four times as many
                        machine = self._machine(task.threads)
                        latency_us *= kernel_cycles(kernel, machine) / kernel_cycles(found.kernel, machine)
                    return TunedKernel(task, kernel, latency_us, self._predicted, self.name)
        return None

    def _machine(self, threads: int) -> Machine:
        return replace(machine_of(self.target), threads=threads)

    def _kernel(self, variant: str, task: KernelTask) -> Kernel | None:
        try:
            return kernel_from_text(variant, task, self._machine(task.threads))
        except ValueError as error:
            _log.info("a tuning record is not used: %s", error)
            return None

    def _add(self, line: Mapping[str, Any]) -> None:
        task = parse_task(line["task"])
        if "finished" in line:
            self.finished[task] = str(line["finished"])
            self.within.pop(task, None)
            return
        if "within_us" in line:
            self._add_within(task, str(line["variant"]), float(line["within_us"]))
            return
        error = str(line.get("error", ""))
        latency_us = float("inf") if error else float(line["us"])
        if not latency_us > 0:
            raise ValueError(f"{latency_us} us")
        trial = Trial(task, str(line["variant"]), latency_us, error)
        self.trials.setdefault(task, {})[trial.variant] = trial

    def _add_within(self, task: KernelTask, variant: str, within_us: float) -> None:
        if not within_us > 0:
            raise ValueError(f"{within_us} us")
        self.within.setdefault(task, {})[variant] = within_us

    def _read_line(self, text: str) -> str:
        try:
            self._add(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def read_lines(self, lines: Iterable[str], source: str) -> None:
        """Add the trials of a file's lines; damaged ones are skipped with a warning."""
        for number, text in enumerate(lines, start=2):
            if error := self._read_line(text):
                _log.warning("%s:%d is skipped: %s", source, number, error)
