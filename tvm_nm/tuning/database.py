"""The tuning database: a directory with, for each target, a file of trials that only grows.

A trial is one line of JSON: which task, which variant, and either its time or why it has none. The file's name has the
templates' revision, so that trials of other revisions are not seen, and its first line says what the target is::

    DIR/sapphirerapids/trials.r2.jsonl
        {"format": "tvm_nm trials", "version": 1, "revision": 1, "target": {...}, "yardstick_us": 49.1}
        {"task": "conv 64x56x56->64 k1x1 bias+relu; dense; 1 thread", "variant": "pixel 8x3 ...", "us": 171.2}
        {"task": "...", "variant": "...", "error": "killed by SIGSEGV"}
        {"task": "...", "finished": "full"}
        {"task": "...", "variant": "...", "within_us": 180.4}
    DIR/sapphirerapids/database_workload.json, database_tuning_record.json     # MetaSchedule's, the best of each task

The last is a time between other layers of a network: variants that have one go before those that were timed alone only,
until another search of the task ends. Lines are appended whole, under a lock; a line that a crash cut off is skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir

from tvm_nm.errors import ArtifactError, TuningError
from tvm_nm.json_file import write_text
from tvm_nm.schedules.apply import apply_template
from tvm_nm.schedules.chain import ChainKernel
from tvm_nm.schedules.kernel_task import TEMPLATE_REVISION, KernelTask
from tvm_nm.schedules.tensor_intrin_stub import skip_tensor_intrinsics
from tvm_nm.schedules.transpose import register_named_intrinsics
from tvm_nm.schedules.tuned import TunedKernel
from tvm_nm.schedules.variants import kernel_prim_func
from tvm_nm.tuning.trials import Trial, TrialTable

__all__ = ["TuningDatabase", "open_records", "target_name"]

_FORMAT = "tvm_nm trials"
_VERSION = 1
_RECORDS, _WORKLOADS = "database_tuning_record.json", "database_workload.json"  # MetaSchedule's names
_log = logging.getLogger(__name__)


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
        self._append(lines)
        for trial in trials:
            self.trials.setdefault(trial.task, {})[trial.variant] = trial
        self.finished.update(marks)
        for task in marks:
            self.within.pop(task, None)

    def add_within(self, times: Mapping[KernelTask, Mapping[str, float]]) -> None:
        """Append times of tasks' variants within a network, in us, in one write."""
        found = [(task, variant, round(us, 2)) for task, variants in times.items() for variant, us in variants.items()]
        self._append([json.dumps({"task": str(task), "variant": text, "within_us": us}) for task, text, us in found])
        for entry in found:
            self._add_within(*entry)

    def _append(self, lines: Sequence[str]) -> None:
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
