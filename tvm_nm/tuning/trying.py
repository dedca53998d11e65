"""What a worker process does: build a variant into a library, time libraries in turns.

Times are taken in the state that a network leaves the caches in. Before every call a buffer larger than L2 is written
by all threads, which moves weights, residual and output out to the next level, where a network's other layers would
have pushed them since the last image; then the input is written, as the layer before would just have done, by each
thread a part of the map.

A shared machine's clock moves by tens of percents within seconds. Variants are therefore timed in turns, and each call
stands beside two of a *yardstick*, a small kernel bound by arithmetic: the median over the rounds is that of the two's
ratio.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import te

from tvm_nm.linker import export_library
from tvm_nm.memory import release_memory
from tvm_nm.runtime import use_threads
from tvm_nm.schedules.apply import pass_context, schedule_function
from tvm_nm.schedules.families import family_of
from tvm_nm.schedules.kernel_task import parse_task
from tvm_nm.schedules.machine import Machine, machine_of, target_from_json
from tvm_nm.schedules.variants import default_kernel, kernel_from_text, kernel_prim_func

__all__ = ["YARDSTICK", "build", "time_variants"]

YARDSTICK = "conv 64x14x14->64 k1x1 bias; dense; 1 thread"
"""The task whose default variant other times are compared with: a fraction of L2, 4 M multiply-adds with few loads."""

_SCRUB_BYTES = 6 << 20  # per thread; read and written, it passes the L2 of server cores three times over


def build(task: str, variant: str, target: dict[str, Any], path: str) -> dict[str, Any]:
    """Build a variant of a task (both as text) into a library."""
    chosen, machine = _target(target, parse_task(task).threads)
    kernel = kernel_from_text(variant, parse_task(task), machine)
    function = schedule_function(kernel_prim_func(kernel), chosen)
    with pass_context():
        executable = tvm.compile(tvm.IRModule({"main": function}), target=chosen)
    export_library(executable, Path(path), chosen)
    return {}


def time_variants(
    runs: Sequence[dict[str, str]],
    target: dict[str, Any],
    threads: int,
    rounds: int,
    yardstick: str,
    say: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Time libraries in turns.

    Parameters
    ----------
    runs
        Task, variant and path of each library.
    target, threads
        What they were built for.
    rounds
        Calls of each that are timed, after one that is not.
    yardstick
        Path of the yardstick's library.
    say
        Told the number of the run that is about to be called for the first time, so that a crash can be laid to it.

    Returns
    -------
    Per run the median of its times in yardsticks and half the range of the middle half of them; the yardstick's
    shortest time in us.
    """
    use_threads(threads)
    _, machine = _target(target, threads)
    yard = _yardstick_call(yardstick, target)
    scrub = _Scrub(target, threads)
    contestants = []
    for number, run in enumerate(runs):
        say({"running": number})
        contestants.append(_Contestant(run, machine))
    ratios: list[list[float]] = [[] for _ in runs]
    shortest = min(_elapsed_us(yard) for _ in range(20))
    for turn in range(rounds):
        for position in range(len(runs)):
            number = (position + turn) % len(runs)  # no one always follows the same one
            scrub()
            contestants[number].produce_input(scrub)
            before = _elapsed_us(yard)
            elapsed = contestants[number].elapsed_us()
            after = _elapsed_us(yard)
            shortest = min(shortest, before, after)
            ratios[number].append(2 * elapsed / (before + after))
    del contestants
    gc.collect()
    release_memory()
    quarters = [np.quantile(values, (0.25, 0.5, 0.75)) for values in ratios]
    return {
        "ratios": [float(middle) for _, middle, _ in quarters],
        "spreads": [float((high - low) / 2) for low, _, high in quarters],
        "yardstick_us": shortest,
    }


class _Contestant:
    """A library with its arguments."""

    def __init__(self, run: dict[str, str], machine: Machine) -> None:
        kernel = kernel_from_text(run["variant"], parse_task(run["task"]), machine)
        self._function = tvm.runtime.load_module(run["path"])["main"]
        arrays = family_of(kernel).random_arguments(kernel, np.random.default_rng(0))
        self._source = _maps(tvm.runtime.tensor(arrays[0]))
        self._arguments = [tvm.runtime.tensor(array) for array in arrays]
        self._input = _maps(self._arguments[0])
        self._function(*self._arguments)

    def produce_input(self, scrub: _Scrub) -> None:
        scrub.copy(self._source, self._input)

    def elapsed_us(self) -> float:
        function, arguments = self._function, self._arguments
        start = time.perf_counter_ns()
        function(*arguments)
        return (time.perf_counter_ns() - start) / 1e3


class _Scrub:
    """Copies on all threads: a large buffer to empty the caches, an input to fill them."""

    def __init__(self, target: dict[str, Any], threads: int) -> None:
        chosen, _ = _target(target, threads)
        maps, pixels = te.var("maps", "int64"), te.var("pixels", "int64")
        source = te.placeholder((maps, pixels), name="source")
        copied = te.compute((maps, pixels), lambda channel, pixel: source[channel, pixel], name="copied")
        schedule = tvm.s_tir.Schedule(te.create_prim_func([source, copied]))
        channel, pixel = schedule.get_loops(schedule.get_sblock("copied"))
        part, rest = schedule.split(pixel, [threads, None])
        schedule.reorder(part, channel, rest)
        schedule.parallel(part)
        self._copy = tvm.compile(schedule.mod, target=chosen).jit()["main"]
        shape = (1, threads * _SCRUB_BYTES // 8)
        self._buffers = [tvm.runtime.tensor(np.ones(shape, np.float32)) for _ in range(2)]

    def __call__(self) -> None:
        self._copy(*self._buffers)

    def copy(self, source: Any, to: Any) -> None:
        """Copy maps of pixels, of each of which every thread writes a part."""
        self._copy(source, to)


def _maps(tensor: Any) -> Any:
    """View a tensor as a matrix: maps times pixels, or rows as they are."""
    shape = [int(extent) for extent in tensor.shape]
    outer = 2 if len(shape) > 2 else 1
    return tensor._create_view((int(np.prod(shape[:outer])), int(np.prod(shape[outer:]))))


def _yardstick_call(path: str, target: dict[str, Any]) -> Callable[[], object]:
    task = parse_task(YARDSTICK)
    _, machine = _target(target, task.threads)
    function = tvm.runtime.load_module(path)["main"]
    kernel = default_kernel(task, machine)
    arrays = family_of(kernel).random_arguments(kernel, np.random.default_rng(0))
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    return lambda: function(*arguments)


def _elapsed_us(call: Callable[[], object]) -> float:
    """Time the yardstick, after a call that brings its operands back to its cache."""
    call()
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def _target(target: dict[str, Any], threads: int) -> tuple[tvm.target.Target, Machine]:
    key = json.dumps([target, threads], sort_keys=True)
    if key not in _targets:
        chosen = target_from_json(target, threads)
        _targets[key] = (chosen, machine_of(chosen))
    return _targets[key]


_targets: dict[str, tuple[tvm.target.Target, Machine]] = {}
