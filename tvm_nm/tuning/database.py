"""The tuning database: a directory with, for each target, a file of trials that only grows.

A trial is one line of JSON: which task, which variant, and either its time or why it has none. The file's name has the
templates' revision, so that trials of other revisions are not seen, and its first line says what the target is::

    DIR/sapphirerapids/trials.r2.jsonl
        {"format": "tvm_nm trials", "version": 1, "revision": 1, "target": {...}, "yardstick_us": 49.1}
        {"task": "conv 64x56x56->64 k1x1 bias+relu; dense; 1 thread", "variant": "pixel 8x3 ...", "us": 171.2}
        {"task": "...", "variant": "...", "error": "killed by SIGSEGV"}
        {"task": "...", "finished": "full"}
    DIR/sapphirerapids/database_workload.json, database_tuning_record.json     # MetaSchedule's, the best of each task

Lines are appended whole, under a lock; a line that a crash cut off is skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir

from tvm_nm.errors import ArtifactError, TuningError
from tvm_nm.json_file import write_text
from tvm_nm.schedules.apply import apply_template
from tvm_nm.schedules.chain import ChainKernel
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.kernel_task import TEMPLATE_REVISION, KernelTask, parse_task
from tvm_nm.schedules.machine import Machine, machine_of
from tvm_nm.schedules.tensor_intrin_stub import skip_tensor_intrinsics
from tvm_nm.schedules.transpose import register_named_intrinsics
from tvm_nm.schedules.tuned import Origin, TunedKernel
from tvm_nm.schedules.variants import Kernel, kernel_cycles, kernel_from_text, kernel_prim_func, variant_text

__all__ = ["Trial", "TrialTable", "TuningDatabase", "open_records", "target_name"]

_FORMAT = "tvm_nm trials"
_VERSION = 1
_RECORDS, _WORKLOADS = "database_tuning_record.json", "database_workload.json"  # MetaSchedule's names
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
    origin
        What the table calls its exact answers.
    """

    target: tvm.target.Target
    trials: dict[KernelTask, dict[str, Trial]] = field(default_factory=dict)
    finished: dict[KernelTask, str] = field(default_factory=dict)
    origin: Origin = "measured"

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
        """Return the fastest variant that was measured for exactly this task."""
        for trial in self.best_trials(task):
            kernel = self._kernel(trial.variant, task)
            if kernel is not None:
                return TunedKernel(task, kernel, trial.latency_us, self.origin)
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
        return TunedKernel(task, kernel, latency_us, self._predicted)

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
                    return TunedKernel(task, kernel, latency_us, self._predicted)
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
            return
        error = str(line.get("error", ""))
        latency_us = float("inf") if error else float(line["us"])
        if not latency_us > 0:
            raise ValueError(f"{latency_us} us")
        trial = Trial(task, str(line["variant"]), latency_us, error)
        self.trials.setdefault(task, {})[trial.variant] = trial

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


class TuningDatabase(TrialTable):
    """A tuning database's directory for one target.

    Parameters
    ----------
    directory
        The database; it is created when the first trial is added.
    target
        What is tuned for. Its threads are part of the tasks.

    Raises
    ------
    TuningError
        If the directory holds something else there.
    """

    def __init__(self, directory: str | os.PathLike[str], target: tvm.target.Target) -> None:
        super().__init__(target)
        self.folder = Path(directory) / target_name(target)
        self.path = self.folder / f"trials.r{TEMPLATE_REVISION}.jsonl"
        self.yardstick_us: float | None = None
        if Path(directory).exists() and not Path(directory).is_dir():
            raise TuningError(f"{os.fspath(directory)} is not a directory; name one for the tuning database")
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise TuningError(f"{self.path} is damaged: it is not UTF-8 text; remove it") from error
        try:
            header = json.loads(lines[0])
            known = header["format"] == _FORMAT and header["version"] == _VERSION
            self.yardstick_us = float(header["yardstick_us"])
            described = header["target"]
        except (IndexError, ValueError, KeyError, TypeError) as error:
            raise TuningError(f"{self.path} is no file of trials: its first line is damaged; remove it") from error
        if not known or described != _plain(self.target):
            raise TuningError(f"{self.path} is of another version or target; remove it, or name another database")
        self.read_lines(lines[1:], str(self.path))

    def start(self, yardstick_us: float) -> None:
        """Create the file, unless it exists, with the time that the yardstick takes on this machine at its best."""
        with self._written():
            if not self.path.exists():
                header = {"format": _FORMAT, "version": _VERSION, "revision": TEMPLATE_REVISION}
                header |= {"target": _plain(self.target), "yardstick_us": round(yardstick_us, 3)}
                write_text(self.path, json.dumps(header) + "\n", "tuning database")
                self.yardstick_us = yardstick_us
            else:
                self._read()

    def add(self, trials: Sequence[Trial], finished: Mapping[KernelTask, str] | None = None) -> None:
        """Append trials, and which tasks they finished, in one write."""
        marks = finished or {}
        lines = [trial.to_json() for trial in trials]
        lines += [json.dumps({"task": str(task), "finished": how}) for task, how in marks.items()]
        if not lines:
            return
        with self._written(), self.path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # another process was killed in the middle of a line
                    file.write(b"\n")
            file.write(("\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        for trial in trials:
            self.trials.setdefault(trial.task, {})[trial.variant] = trial
        self.finished.update(marks)

    def commit_records(self, found: Iterable[TunedKernel]) -> None:
        """Write the best variants of tasks as records of MetaSchedule's, for those who build with its database.

        Such a record goes with one packed layout and one function; what a build needs to choose among layouts is in the
        trials. A schedule here is the template with its defaults, which the variant is.
        """
        skip_tensor_intrinsics()
        from tvm.s_tir import meta_schedule as ms

        with self._lock():
            # Opened for each call, under the lock: it counts the lines of its file, which others may have added to.
            try:
                records = open_records(self.folder)
            except RuntimeError as error:  # somebody was killed while writing, or the disk was full
                _log.warning("%s is damaged (%s) and made again from the trials", self.folder / _RECORDS, error)
                for name in (_RECORDS, _WORKLOADS):
                    (self.folder / name).unlink(missing_ok=True)
                records = open_records(self.folder)
                found = [best for best in map(self.measured, self.trials) if best is not None]
            for best in found:
                if isinstance(best.kernel, ChainKernel):
                    continue  # it needs no schedule
                module = tvm.IRModule({"main": kernel_prim_func(best.kernel)})
                schedule = s_tir.Schedule(module)
                apply_template(schedule)
                records.commit_tuning_record(
                    ms.database.TuningRecord(
                        schedule.trace,
                        records.commit_workload(module),
                        [best.latency_us * 1e-6],
                        self.target,
                        ms.arg_info.ArgInfo.from_prim_func(module["main"]),
                    )
                )

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Lock the database, and say clearly what hinders writing to it."""
        try:
            with self._lock():
                yield
        except ArtifactError as error:
            raise TuningError(str(error)) from error
        except OSError as error:
            raise TuningError(
                f"cannot write tuning database {self.folder}: {error.strerror or error}; what was written before is "
                "safe: tune again when this is mended, or name another database"
            ) from error

    def _lock(self) -> Any:
        from tvm_nm.tuning.requirements import need_filelock

        self.folder.mkdir(parents=True, exist_ok=True)
        return need_filelock().FileLock(str(self.folder / ".lock"))


def open_records(folder: str | os.PathLike[str]) -> Any:
    """Open the MetaSchedule database (`JSONDatabase`) in a folder, whichever process wrote it.

    Schedules name tensor intrinsics, which TVM must know before it can read them.
    """
    skip_tensor_intrinsics()
    from tvm.s_tir import meta_schedule as ms

    records = Path(folder) / _RECORDS
    if records.is_file():
        register_named_intrinsics(records.read_text(encoding="utf-8"))
    return ms.database.JSONDatabase(work_dir=os.fspath(folder))


def target_name(target: tvm.target.Target) -> str:
    """Return the name of a target's folder: its CPU, and a digest of the rest if there is any."""
    described = _plain(target)
    name = str(described.pop("mcpu", "")) or str(described.get("mtriple", "generic")).partition("-")[0]
    described = {key: value for key, value in described.items() if key not in ("kind", "mtriple")}
    if described:
        name += "-" + hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]
    return name


def _plain(target: tvm.target.Target) -> dict[str, Any]:
    """Return what the generated code depends on, without the threads."""
    described: dict[str, Any] = json.loads(str(target))
    kept = ("kind", "mcpu", "mattr") if described.get("mcpu") else ("kind", "mattr", "mtriple")
    return {key: value for key, value in described.items() if key in kept and value}
