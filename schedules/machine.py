"""What the kernels need to know of the machine they are generated for, read from the TVM target."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm

from tvm_nm.errors import EnvironmentMismatchError

__all__ = ["Machine", "architecture_of", "host_target", "machine_of", "target_from_json"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Vector unit, caches and threads of a target.

    Attributes
    ----------
    lanes
        float32 elements of one vector register: 16 with AVX-512, 8 with AVX2, 4 with NEON or SSE.
    registers
        Architectural vector registers.
    threads
        Worker threads that the module will run with.
    """

    lanes: int
    registers: int
    threads: int

    @property
    def accumulators(self) -> int:
        """How many registers a micro-kernel may hold sums in; the rest hold operands."""
        return 24 if self.registers >= 32 else 12

    def most_sums(self, channels: int = 1) -> int:
        """Return how many sums leave registers for operands; a tile of one vector may have as many as its channels."""
        return max(self.accumulators + self.registers // 8, channels)

    def imbalance(self, tasks: int) -> float:
        """Return how many times longer equal tasks take than if their work divided evenly among the threads."""
        return -(-tasks // self.threads) * self.threads / tasks


# CPU families by the flags Linux lists for them, best first. The name is what LLVM takes as `mcpu`; AMX and
# fp16 families add nothing for float32, but an exact name gives LLVM the right scheduling model.
_X86_FAMILIES: tuple[tuple[str, frozenset[str]], ...] = (
    ("sapphirerapids", frozenset({"avx512f", "avx512vl", "avx512bw", "avx512dq", "amx_tile", "avx512_fp16"})),
    ("znver4", frozenset({"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_bf16", "clzero"})),
    ("icelake-server", frozenset({"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_vnni", "gfni"})),
    ("cascadelake", frozenset({"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_vnni"})),
    ("skylake-avx512", frozenset({"avx512f", "avx512vl", "avx512bw", "avx512dq"})),
    ("znver3", frozenset({"avx2", "fma", "clzero", "vpclmulqdq"})),
    ("haswell", frozenset({"avx2", "fma", "bmi2"})),
    ("x86-64-v2", frozenset({"sse4_2", "popcnt"})),
)

# What a target triple may begin with. TVM crashes on others.
_ARCHITECTURES = re.compile(r"x86_64h?|amd64|i[3-6]86|aarch64|arm64e?|arm(v\w+)?|riscv(32|64)")


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def usable_threads() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_target(threads: int | None = None) -> tvm.target.Target:
    """Return the LLVM target of the machine this runs on, derived from the flags that the kernel reports.

    LLVM's own detection may name another CPU in a virtual machine, and an unknown `mcpu` silently gives SSE2 code.

    Parameters
    ----------
    threads
        Worker threads; default: the cores this process may use.
    """
    threads = threads or usable_threads()
    arch = platform.machine()
    if arch in ("aarch64", "arm64"):
        return tvm.target.Target(
            {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"], "num-cores": threads}
        )
    flags = _cpu_flags()
    for name, needed in _X86_FAMILIES:
        if needed <= flags:
            return tvm.target.Target({"kind": "llvm", "mcpu": name, "num-cores": threads})
    raise EnvironmentMismatchError(
        f"no known CPU family matches this machine ({arch}, SSE4.2 needed); name one with --target"
        ' \'{"kind": "llvm", "mcpu": "..."}\''
    )


def target_from_json(config: dict[str, Any], threads: int | None = None) -> tvm.target.Target:
    """Make a target from a TVM target dictionary, with `num-cores` filled in.

    Raises
    ------
    EnvironmentMismatchError
        If TVM refuses it, or it is not an LLVM target, or LLVM does not know the `mtriple`, `mcpu` or a feature in
        `mattr`.
    """
    config = dict(config)
    if config.get("kind") != "llvm":
        raise EnvironmentMismatchError(f'target kind {config.get("kind")!r} is not supported; use "llvm"')
    cores = config.get("num-cores", usable_threads()) if threads is None else threads
    if not isinstance(cores, int) or cores < 1:
        raise EnvironmentMismatchError(f"num-cores must be a positive integer, not {cores!r}")
    config["num-cores"] = cores
    triple = str(config.get("mtriple") or _system_triple())
    if not _ARCHITECTURES.fullmatch(triple.partition("-")[0]):
        raise EnvironmentMismatchError(
            f"mtriple {triple!r} names no known architecture; use one such as x86_64-linux-gnu or aarch64-linux-gnu"
        )
    try:
        target = tvm.target.Target(config)
    except Exception as error:  # TVM raises several types here
        raise EnvironmentMismatchError(f"TVM refuses the target {config}: {str(error).splitlines()[-1]}") from error
    mcpu = target.attrs.get("mcpu")
    if mcpu is not None and not tvm.get_global_func("target.llvm_is_valid_cpu")(str(mcpu), triple):
        raise EnvironmentMismatchError(f"LLVM knows no CPU named {str(mcpu)!r} for {triple}")
    has_feature = tvm.get_global_func("target.target_has_feature")
    for feature in config.get("mattr", ()):
        if feature.startswith("+") and not has_feature(feature[1:], target):
            raise EnvironmentMismatchError(f"LLVM knows no feature {feature!r} for {mcpu or triple}")
    return target


def architecture_of(target: tvm.target.Target) -> str:
    """Return the first word of the target's triple, such as x86_64; that of this machine where it names none."""
    return str(target.attrs.get("mtriple") or _system_triple()).partition("-")[0]


def _system_triple() -> str:
    return str(tvm.get_global_func("target.llvm_get_system_triple")())


def machine_of(target: tvm.target.Target) -> Machine:
    """Return the vector width, registers and threads of `target`."""
    has_feature = tvm.get_global_func("target.target_has_feature")
    threads = int(target.attrs.get("num-cores", 1))
    if has_feature("avx512f", target):
        return Machine(lanes=16, registers=32, threads=threads)
    if has_feature("avx2", target):
        return Machine(lanes=8, registers=16, threads=threads)
    if str(target.attrs.get("mtriple", "")).startswith(("aarch64", "arm64")):
        return Machine(lanes=4, registers=32, threads=threads)
    return Machine(lanes=4, registers=16, threads=threads)
