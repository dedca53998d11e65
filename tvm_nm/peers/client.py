"""The parent's side of a worker: starts the process, sends commands, and notices when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tvm_nm.peers.worker import FMA_PEAK

__all__ = ["Crew", "PeerError", "Worker"]

_LOAD_S = 600.0
"""Longest time that loading, preparing or measuring may take."""


class PeerError(Exception):
    """A runtime cannot take the model; the message is the note in the table."""


class Crew:
    """The processes of a contest: one for each contestant, or one for each runtime, and one for the FMA loop.

    Parameters
    ----------
    threads
        How many threads everything runs with.
    plugins
        Files that register further runtimes.
    shared
        Whether a runtime has one process for all its models, as for a long list of small ones; else each model has a
        process of its own.
    """

    def __init__(self, threads: int, plugins: tuple[Path, ...] = (), *, shared: bool = False) -> None:
        self.threads = threads
        self._plugins = plugins
        self._shared = shared
        self._workers: dict[str, Worker] = {}
        self._peak: Worker | None = None
        self._flops = 0.0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        for worker in self._workers.values():
            worker.close()
        if self._peak is not None:
            self._peak.close()

    def worker(self, peer: str, contestant: str) -> Worker:
        """Return the process of a runtime's contestant; a new one where there is none or it has died."""
        key = peer if self._shared else contestant
        found = self._workers.get(key)
        if found is None or not found.alive:
            if found is not None:
                found.close()
            found = self._workers[key] = Worker(self.threads, self._plugins)
        return found

    def dismiss(self, peer: str, contestant: str) -> None:
        """Free what a contestant holds."""
        if not self._shared:
            worker = self._workers.pop(contestant, None)
            if worker is not None:
                worker.close()
        elif (worker := self._workers.get(peer)) is not None and worker.alive:
            try:
                worker.ask(do="unload", key=contestant)
            except PeerError:
                worker.close()
                del self._workers[peer]

    def peak_gflops(self, ms: float) -> float:
        """Measure the FMA peak now."""
        if self._peak is None:
            self._peak = Worker(self.threads)
            self._flops = float(self._peak.ask(do="load", key="", peer=FMA_PEAK, threads=self.threads)["flops"])
        return self._flops / float(self._peak.ask(do="block", key="", ms=ms)["best_ms"]) / 1e6


class Worker:
    """A process for one runtime, which is stopped unless it has something to do.

    Runtimes let their idle threads spin for tens of milliseconds after each inference, which would slow down whoever
    comes next.

    Parameters
    ----------
    threads
        How many threads runtimes with OpenMP will use.
    plugins
        Files that register further runtimes.

    Raises
    ------
    PeerError
        From every method, if the runtime fails, dies or does not answer.
    """

    def __init__(self, threads: int, plugins: tuple[Path, ...] = ()) -> None:
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        environment.setdefault("TVM_NUM_THREADS", count)
        self._plugins = [str(path) for path in plugins]
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tvm_nm.peers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=environment,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command of `tvm_nm.peers.worker` and return the answer."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({**command, "plugins": self._plugins}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(self._death()) from None
        answer: dict[str, Any] = json.loads(self._line())
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # it died before it read what was written
                    stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._messages.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        line, deadline = b"", time.monotonic() + _LOAD_S
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._process.kill()
                raise PeerError(f"no answer within {_LOAD_S:.0f} s")
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise PeerError(self._death())
            line += part
        return line

    def _death(self) -> str:
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"exit code {code}"
        return f"its process died ({how})" + (f": {lines[-1][:200]}" if lines else "")
