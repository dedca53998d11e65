"""The process that a runtime runs in: ``python -m tvm_nm.peers.worker``.

Reads commands from standard input and answers on standard output, one JSON object a line:

    {"do": "prepare", "peer": NAME, "job": {...}}                        -> {}
    {"do": "load", "key": K, "peer": NAME, "job": {...}, "save": FILE}   -> {"seconds": S}; outputs go to FILE (.npz)
    {"do": "block", "key": K, "ms": B}                                   -> {"calls": N, "mean_ms": M, "best_ms": M}
    {"do": "unload", "key": K}                                           -> {}

A command that fails is answered by ``{"error": TEXT}``. What the runtime prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tvm_nm.peers.registry import PEERS, Job, load_plugin

__all__ = ["FMA_PEAK", "job_from_dict", "job_to_dict", "main", "timed_block"]

FMA_PEAK = "fma-peak"
"""Name under which the worker knows the FMA loop; it is no peer."""
_LONG_MS = 100.0
"""A model that runs longer than this gains nothing from a call to warm up."""


_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until standard input ends."""
    if sys.platform == "linux":
        # A parent that is killed cannot wake the processes that it has stopped.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Runtimes print to the process's standard output; keep it for the answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    importlib.import_module("tvm_nm.peers.runtimes")
    _Server(answers).serve(sys.stdin)


def job_to_dict(job: Job, inputs: Path) -> dict[str, Any]:
    """Return a job as JSON-ready values, its inputs as the name of the file that holds them."""
    return {
        "model": str(job.model),
        "threads": job.threads,
        "inputs": str(inputs),
        "outputs": list(job.outputs),
        "folder": str(job.folder),
    }


def job_from_dict(data: dict[str, Any]) -> Job:
    """Read what `job_to_dict` wrote."""
    with np.load(data["inputs"]) as file:
        inputs = {name: np.ascontiguousarray(file[name]) for name in file.files}
    return Job(Path(data["model"]), int(data["threads"]), inputs, tuple(data["outputs"]), Path(data["folder"]))


def timed_block(run: Callable[[], object], block_ms: float, last_ms: float) -> dict[str, float]:
    """Call `run` for a while.

    Parameters
    ----------
    run
        What to call.
    block_ms
        Shortest duration of the block.
    last_ms
        Duration of an earlier call; a short one is called once more to warm up.
    """
    if last_ms < _LONG_MS:
        run()
    times: list[float] = []
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        run()
        after = time.perf_counter()
        times.append(after - before)
        if (after - start) * 1e3 >= block_ms:
            return {"calls": len(times), "mean_ms": (after - start) * 1e3 / len(times), "best_ms": min(times) * 1e3}


class _Server:
    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._runs: dict[str, Callable[[], object]] = {}
        self._last_ms: dict[str, float] = {}

    def serve(self, commands: TextIO) -> None:
        for line in commands:
            try:
                answer = self._obey(json.loads(line))
            except Exception as error:  # a runtime may raise anything, and the parent reports it
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            self._answers.write(json.dumps(answer) + "\n")

    def _obey(self, command: dict[str, Any]) -> dict[str, Any]:
        for plugin in command.get("plugins", ()):
            if plugin not in sys.modules:
                load_plugin(Path(plugin))
                sys.modules[plugin] = sys.modules[__name__]  # remembers that it was run
        action, key = command["do"], command.get("key", "")
        if action == "prepare":
            prepare = PEERS[command["peer"]].prepare
            if prepare is not None:
                prepare(job_from_dict(command["job"]))
            return {}
        if action == "load":
            return self._load(key, command)
        if action == "unload":
            self._runs.pop(key, None)
            gc.collect()
            return {}
        answer = timed_block(self._runs[key], command["ms"], self._last_ms[key])
        self._last_ms[key] = answer["mean_ms"]
        return answer

    def _load(self, key: str, command: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        if command["peer"] == FMA_PEAK:
            from tvm_nm.fma_peak import FmaPeak

            peak = FmaPeak(int(command["threads"]))
            self._runs[key], self._last_ms[key] = peak.run, 0.0
            return {"seconds": time.perf_counter() - start, "flops": peak.flops}
        run = PEERS[command["peer"]].load(job_from_dict(command["job"]))
        outputs = [as_numpy(output) for output in run()]
        seconds = time.perf_counter() - start
        np.savez(command["save"], *outputs)
        before = time.perf_counter()
        run()
        self._runs[key], self._last_ms[key] = run, (time.perf_counter() - before) * 1e3
        return {"seconds": seconds}


def as_numpy(value: Any) -> np.ndarray[Any, Any]:
    """Bring a runtime's tensor to NumPy."""
    return np.array(value.numpy() if hasattr(value, "numpy") else value)


if __name__ == "__main__":
    main()
