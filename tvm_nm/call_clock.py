"""Times of the calls that a model's virtual machine makes, without Python between them.

TVM calls an instrument before and after each function. One in Python gets every argument wrapped first: 2 us a call and
more with more arguments, which is as much as small layers take, and it leaves the interpreter's data in the caches
where the network's were. This one is a few instructions of machine code that write down the system's clock.
"""

from __future__ import annotations

import ctypes
import functools
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812  (as TVMScript calls it)

from tvm_nm.reference_run import random_inputs
from tvm_nm.runtime import CompiledModel, use_threads
from tvm_nm.schedules.machine import host_target

__all__ = ["CallTimer"]

_CAPACITY = 1 << 16
"""Stamps that fit into the buffer; two for each call."""

# A function of TVM's calling convention: (self, arguments, their number, result), each value a 32-bit type index (1 is
# an integer) and, 8 bytes on, the value.
_LLVM = """
{head}
@stamps = internal global [{capacity} x i64] zeroinitializer
@count = internal global i64 0
declare i32 @clock_gettime(i32, ptr)

define i32 @__tvm_ffi_stamp(ptr %self, ptr %arguments, i32 %number, ptr %result) {{
  %time = alloca [2 x i64]
  %status = call i32 @clock_gettime(i32 {clock}, ptr %time)
  %s = load i64, ptr %time
  %place_ns = getelementptr i64, ptr %time, i64 1
  %ns = load i64, ptr %place_ns
  %s_ns = mul i64 %s, 1000000000
  %now = add i64 %s_ns, %ns
  %count = load i64, ptr @count
  %index = and i64 %count, {mask}
  %place = getelementptr i64, ptr @stamps, i64 %index
  store i64 %now, ptr %place
  %next = add i64 %count, 1
  store i64 %next, ptr @count
  ret i32 0
}}

"""
_ADDRESS = """
define i32 @__tvm_ffi_{name}(ptr %self, ptr %arguments, i32 %number, ptr %result) {{
  store i32 1, ptr %result
  %place = getelementptr i8, ptr %result, i64 8
  %address = ptrtoint ptr @{name} to i64
  store i64 %address, ptr %place
  ret i32 0
}}
"""


class CallTimer:
    """Times the calls of a model's inferences; one timer is used at a time.

    Parameters
    ----------
    model
        The model; it runs with its own number of threads, on random inputs.

    Attributes
    ----------
    names
        Names of the functions that one inference calls, in order.
    """

    def __init__(self, model: CompiledModel) -> None:
        machine = model.virtual_machine()
        self._main = machine["main"]
        self._threads = model.threads
        self._arguments = [tvm.runtime.tensor(array) for array in random_inputs(model.inputs).values()]
        names: list[str] = []

        def instrument(_function: object, name: str, before: bool, *_: object) -> None:
            if before:
                names.append(name)

        machine.set_instrument(instrument)
        self._run_once()
        self.names = tuple(names)
        self._clock = _clock()
        machine.set_instrument(self._clock.stamp)

    def run(self, runs: int = 1, *, warm: bool = True) -> NDArray[np.float64]:
        """Return the times of each call in `runs` inferences, (runs, calls), in us.

        Parameters
        ----------
        runs
            Inferences, one right behind the other.
        warm
            Whether one that is not counted comes first.
        """
        if warm:
            self._run_once()
        at_once = max(1, _CAPACITY // max(1, 2 * len(self.names)))
        found: list[NDArray[np.float64]] = []
        while (left := runs - sum(map(len, found))) > 0:
            count = min(left, at_once)
            self._clock.reset()
            for _ in range(count):
                self._run_once()
            stamps = self._clock.read(2 * len(self.names) * count).reshape(count, len(self.names), 2)
            found.append((stamps[:, :, 1] - stamps[:, :, 0]) / 1e3)
        return np.concatenate(found)

    def _run_once(self) -> None:
        use_threads(self._threads)
        self._main(*self._arguments)


class _Clock:
    """The machine code and its buffer."""

    def __init__(self) -> None:
        text = _LLVM.format(
            head=_module_head(), capacity=_CAPACITY, mask=_CAPACITY - 1, clock=int(time.CLOCK_MONOTONIC)
        )
        text += "".join(_ADDRESS.format(name=name) for name in ("stamps", "count"))
        with TemporaryDirectory(prefix="tvm-nm-clock-") as folder:
            path = Path(folder) / "clock.ll"
            path.write_text(text, encoding="ascii")
            self._module = tvm.runtime.load_module(str(path))
        self.stamp = self._module["stamp"]
        self._count = ctypes.c_int64.from_address(int(self._module["count"]()))
        stamps = (ctypes.c_int64 * _CAPACITY).from_address(int(self._module["stamps"]()))
        self._stamps: NDArray[np.int64] = np.ctypeslib.as_array(stamps)

    def reset(self) -> None:
        self._count.value = 0

    def read(self, expected: int) -> NDArray[np.int64]:
        """Return a copy of the stamps since the last reset."""
        count = int(self._count.value)
        if count != expected or count > _CAPACITY:
            raise RuntimeError(f"{count} stamps were taken where {expected} belong: inferences ran at the same time")
        stamps: NDArray[np.int64] = self._stamps[:count].copy()
        return stamps


@functools.cache
def _clock() -> Any:
    return _Clock()


def _module_head() -> str:
    """Return the lines by which LLVM knows this machine's data layout and triple, out of a function compiled here."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        value = T.arg("value", T.buffer((1,), "float32"))
        T.buffer_store(value, value[0], [0])
    pending = [tvm.compile(tvm.IRModule({"main": builder.get()}), target=host_target(1)).mod]
    while pending:
        module = pending.pop()
        pending += list(module.imports)
        if module.kind == "llvm":
            lines = module.inspect_source("ll").splitlines()
            return "\n".join(line for line in lines if line.startswith(("target datalayout", "target triple")))
    raise RuntimeError("TVM compiled a function without LLVM")
