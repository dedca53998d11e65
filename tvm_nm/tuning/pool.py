"""Builds and times variants in worker processes, and survives what happens to them there."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm

import tvm_nm
from tvm_nm.errors import TuningError
from tvm_nm.schedules.kernel_task import KernelTask, parse_task
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.variants import default_kernel, variant_text
from tvm_nm.tuning.requirements import need_filelock
from tvm_nm.tuning.trying import YARDSTICK

__all__ = ["Candidate", "Laboratory", "Timing", "Worker", "WorkerDiedError", "alone_on_the_machine"]

_BUILD_LIMIT_S = 90.0
_CALL_LIMIT_S = 20.0
_LEAST_FREE_BYTES = 4 << 20  # several times what a library takes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant of a task, to be tried."""

    task: KernelTask
    variant: str


@dataclass(frozen=True, slots=True)
class Timing:
    """What became of a candidate.

    Attributes
    ----------
    latency_us
        Median time of a call; infinite where it failed.
    spread_us
        Half of the range that holds the middle half of the times.
    error
        Why it failed, else empty.
    """

    latency_us: float
    spread_us: float = 0.0
    error: str = ""

    @classmethod
    def failed(cls, error: str) -> Timing:
        """Return the timing of a candidate that has no time."""
        return cls(float("inf"), 0.0, error)


class WorkerDiedError(Exception):
    """A worker process ended in the middle of a request."""


class Worker:
    """One worker process; it is started at the first request, and again after it died.

    Parameters
    ----------
    threads
        Threads of TVM's pool in it.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None

    def request(
        self, action: str, data: dict[str, Any], limit_s: float, heard: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Let the worker do something and return its result.

        Parameters
        ----------
        action
            See `tvm_nm.tuning.worker`.
        data
            The action's arguments.
        limit_s
            Seconds after which the worker is killed.
        heard
            Called with what the worker says before it is done.

        Raises
        ------
        WorkerDiedError
            If it crashed or took too long.
        """
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"action": action, "limit_s": limit_s, **data}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                said = json.loads(line)
                if "result" in said:
                    result: dict[str, Any] = said["result"]
                    return result
                if heard is not None:
                    heard(said)
        except BrokenPipeError:
            pass
        except BaseException:
            self.close()  # an interrupt: its answer would be taken for that to the next request
            raise
        code = process.wait()
        self.close()
        if code == -signal.SIGALRM:
            raise WorkerDiedError(f"took longer than {limit_s:g} s")
        raise WorkerDiedError(f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}")

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "TVM_NUM_THREADS": str(self._threads)}
        # The same package as here, wherever it was imported from.
        here = str(Path(tvm_nm.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tvm_nm.tuning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,  # an interrupt from the terminal is for the parent only
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise TuningError(
                f"a worker process ended at its start with code {self._process.wait()}; "
                f"try `{sys.executable} -m tvm_nm.tuning.worker`"
            )
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process = None


class Laboratory:
    """Tries candidates: builds all of them on all processors, then times them with nothing beside.

    Parameters
    ----------
    target
        What to build for; its threads do not matter.
    builders
        Processes that build at the same time.
    alone
        Makes the context in which times are taken; default: `alone_on_the_machine`.
    """

    def __init__(
        self,
        target: tvm.target.Target,
        *,
        builders: int,
        alone: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        self._target = target
        described: dict[str, Any] = json.loads(str(target))
        self._described = {key: value for key, value in described.items() if key not in ("keys", "tag") and value}
        self._alone = alone or alone_on_the_machine
        self._builders = [Worker(1) for _ in range(builders)]
        self._timers: dict[int, Worker] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="tvm-nm-tune-")
        self._yardstick = Path(self._folder.name) / "yardstick.so"
        self._count = 0
        self.yardstick_us: float | None = None
        """What the yardstick takes at the machine's best; times are given for a machine of that speed."""

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._builders, *self._timers.values()):
            worker.close()
        self._folder.cleanup()

    def build(self, candidates: Sequence[Candidate], done: Callable[[], None] | None = None) -> list[tuple[Path, str]]:
        """Build candidates; returns for each the library's path and why there is none (else empty)."""
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._builders:
            idle.put(worker)
        stopped = False

        def job(candidate: Candidate, path: Path) -> str:
            if stopped:
                return "interrupted"
            worker = idle.get()
            try:
                data = {"task": str(candidate.task), "variant": candidate.variant, "path": str(path)}
                result = worker.request("build", {**data, "target": self._described}, _BUILD_LIMIT_S)
                return str(result.get("error", ""))
            except WorkerDiedError as error:
                return f"the compiler: {error}"
            finally:
                idle.put(worker)
                if done is not None:
                    done()

        paths = [self._new_path() for _ in candidates]
        with ThreadPoolExecutor(len(self._builders)) as pool:
            futures = [pool.submit(job, *pair) for pair in zip(candidates, paths, strict=True)]
            try:
                errors = [future.result() for future in futures]
            except BaseException:
                stopped = True
                for worker in self._builders:
                    worker.close()
                raise
        if any(errors) and shutil.disk_usage(self._folder.name).free < _LEAST_FREE_BYTES:
            # Nothing is known of these variants, and nothing must be written down of them.
            raise TuningError(
                f"kernels cannot be built in {self._folder.name}: no space is left on the device; "
                "free some, or name another folder in TMPDIR"
            )
        return list(zip(paths, errors, strict=True))

    def time(self, candidates: Sequence[Candidate], libraries: Sequence[Path], rounds: int) -> list[Timing]:
        """Time libraries of candidates with equal threads in turns."""
        (threads,) = {candidate.task.threads for candidate in candidates} or {1}
        worker = self._timers.setdefault(threads, Worker(threads))
        self.prepare()
        results: dict[int, Timing] = {}
        while True:
            pending = [number for number in range(len(candidates)) if number not in results]
            runs = [
                {"task": str(candidates[n].task), "variant": candidates[n].variant, "path": str(libraries[n])}
                for n in pending
            ]
            running = [0]
            data = {"runs": runs, "target": self._described, "threads": threads, "rounds": rounds}
            data["yardstick"] = str(self._yardstick)

            def heard(said: dict[str, Any], running: list[int] = running) -> None:
                running.append(int(said["running"]))

            try:
                answer = worker.request("time", data, _CALL_LIMIT_S, heard)
                failure = str(answer.get("error", ""))
            except WorkerDiedError as error:
                failure = str(error)
            if failure and not pending:
                raise TuningError(f"the yardstick does not run: {failure}")
            if failure:
                # It can only be told which one was called first when the worker failed; the others get another chance.
                results[pending[running[-1]]] = Timing.failed(failure)
                continue
            self.yardstick_us = self.yardstick_us or float(answer["yardstick_us"])
            for number, ratio, spread in zip(pending, answer["ratios"], answer["spreads"], strict=True):
                results[number] = Timing(ratio * self.yardstick_us, spread * self.yardstick_us)
            break
        return [results[number] for number in range(len(candidates))]

    def calibrate(self) -> float:
        """Return the yardstick's time at this machine's best, in us."""
        self.time([], [], 1)
        assert self.yardstick_us is not None
        return self.yardstick_us

    def alone(self) -> AbstractContextManager[object]:
        """Return a context in which nobody else on this machine times anything."""
        return self._alone()

    def prepare(self) -> None:
        """Build the yardstick."""
        if self._yardstick.exists():
            return
        task = parse_task(YARDSTICK)
        kernel = default_kernel(task, replace(machine_of(self._target), threads=task.threads))
        ((path, error),) = self.build([Candidate(task, variant_text(kernel))])
        if error:
            raise TuningError(f"this machine cannot build and run kernels for {self._described}: {error}")
        path.replace(self._yardstick)

    def _new_path(self) -> Path:
        self._count += 1
        return Path(self._folder.name) / f"{self._count}.so"


@contextlib.contextmanager
def alone_on_the_machine() -> Iterator[None]:
    """Wait until no other tuner of this user takes times on this machine."""
    with need_filelock().FileLock(str(Path(tempfile.gettempdir()) / f"tvm-nm-timing-{os.getuid()}.lock")):
        yield
