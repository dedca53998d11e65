"""Targets are what they claim, and the code made for them uses their vectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tvm
from running import build, haswell, host_flags

from tvm_nm.errors import EnvironmentMismatchError
from tvm_nm.schedules import machine as machine_module
from tvm_nm.schedules.conv import IndexKind, conv_prim_func
from tvm_nm.schedules.machine import Machine, host_target, machine_of, target_from_json, usable_threads
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.workload import ConvWorkload, Epilogue

WORK = ConvWorkload(1, 64, 64, 14, 14, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(False, 0.0))
X86_WIDTHS = {
    "sapphirerapids": "zmm",
    "znver4": "zmm",
    "icelake-server": "zmm",
    "cascadelake": "zmm",
    "skylake-avx512": "zmm",
    "znver3": "ymm",
    "haswell": "ymm",
}


def assembly(work: ConvWorkload, target: tvm.target.Target, **sparse: Any) -> str:
    kernel = choose_kernel(work, machine_of(target), **sparse)
    return str(build(conv_prim_func(kernel), target).mod.inspect_source("asm"))


def fma_count(lines: list[str], register: str) -> int:
    return sum(line.startswith("vfmadd") and f"%{register}" in line for line in lines)


def inner_loops(text: str) -> list[list[str]]:
    """The bodies of loops that hold no other loop: from a label to the jump back to it."""
    lines = [line.strip() for line in text.splitlines()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\.LBB\w+:", line)}
    found = [(at, re.match(r"j\w+\s+(\.LBB\w+)$", line)) for at, line in enumerate(lines)]
    jumps = [(at, labels.get(jump[1], at)) for at, jump in found if jump]
    back = [(target, at) for at, target in jumps if target < at]
    inner = [(a, b) for a, b in back if not any((c, d) != (a, b) and a <= c and d <= b for c, d in back)]
    return [lines[a : b + 1] for a, b in inner]


def spills(lines: list[str]) -> int:
    """Vector registers moved to or from the stack. Without a frame pointer, %rbp is a register like any other."""
    return sum(bool(re.search(r"\(%rsp\)", line) and re.search(r"%[xyz]mm", line)) for line in lines)


def test_host_target_has_the_vectors_that_linux_lists() -> None:
    flags = host_flags()
    expected = 16 if "avx512f" in flags else 8 if "avx2" in flags else 4
    found = machine_of(host_target())
    assert found.lanes == expected
    assert found.registers == (32 if "avx512f" in flags or "asimd" in flags else 16)
    assert found.threads == usable_threads() >= 1
    assert machine_of(host_target(3)).threads == 3


@pytest.mark.skipif("avx2" not in host_flags(), reason="needs AVX2")
def test_host_code_uses_the_whole_vector() -> None:
    text = assembly(WORK, host_target(1))
    lines = [line.strip() for line in text.splitlines()]
    wide = "zmm" if "avx512f" in host_flags() else "ymm"
    narrow = {"zmm": "ymm", "ymm": "xmm"}[wide]
    assert fma_count(lines, wide) > 50
    assert fma_count(lines, narrow) == 0


@pytest.mark.parametrize("mcpu", X86_WIDTHS)
def test_x86_families(mcpu: str) -> None:
    target = target_from_json({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu}, threads=1)
    wide = X86_WIDTHS[mcpu]
    assert machine_of(target) == (Machine(16, 32, 1) if wide == "zmm" else Machine(8, 16, 1))
    lines = [line.strip() for line in assembly(WORK, target).splitlines()]
    assert fma_count(lines, wide) > 50
    assert fma_count(lines, "ymm" if wide == "zmm" else "xmm") == 0
    if wide == "ymm":
        assert not any("%zmm" in line for line in lines)


KERNELS: dict[str, tuple[ConvWorkload, dict[str, Any]]] = {
    "3x3 dense": (WORK, {}),
    "3x3 1x8": (WORK, {"block": 8, "index": IndexKind.CHANNEL, "kept": 32}),
    "3x3 1x8p": (WORK, {"block": 8, "index": IndexKind.POSITION, "kept": 288}),
    "1x1 dense": (ConvWorkload(1, 64, 64, 28, 28, (1, 1)), {}),
    "1x1 1x16": (ConvWorkload(1, 64, 64, 28, 28, (1, 1)), {"block": 16, "index": IndexKind.CHANNEL, "kept": 32}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_sums_stay_in_registers(name: str) -> None:
    work, sparse = KERNELS[name]
    target = target_from_json({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "sapphirerapids"}, threads=1)
    hottest = max(inner_loops(assembly(work, target, **sparse)), key=lambda lines: fma_count(lines, "zmm"))
    kernel = choose_kernel(work, machine_of(target), **sparse)
    # A whole register tile, full or the last of a chunk, for every unrolled step of the reduction.
    tiles = {kernel.vectors_per_tile, kernel.geometry.vectors % kernel.vectors_per_tile} - {0}
    assert any(fma_count(hottest, "zmm") % (kernel.oc_tile * vectors) == 0 for vectors in tiles)
    assert fma_count(hottest, "zmm") > 0
    assert spills(hottest) == 0
    stores = [line for line in hottest if re.match(r"vmov[au]p[sd]\s+%zmm\d+, ", line)]
    assert not stores, "sums are stored within the reduction"


def test_few_spills_with_sixteen_registers() -> None:
    hottest = max(inner_loops(assembly(WORK, haswell())), key=lambda lines: fma_count(lines, "ymm"))
    assert fma_count(hottest, "ymm") >= 16
    assert spills(hottest) <= fma_count(hottest, "ymm") / 5


def test_code_for_another_architecture(tmp_path: Path) -> None:
    target = target_from_json({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}, threads=4)
    machine = machine_of(target)
    assert machine == Machine(lanes=4, registers=32, threads=4)
    module = build(conv_prim_func(choose_kernel(WORK, machine)), target).mod
    # Vector by element is NEON's broadcast.
    assert len(re.findall(r"fmla\s+v\d+\.4s", module.inspect_source("asm"))) > 50
    module.write_to_file(str(tmp_path / "kernel.o"), "o")
    header = (tmp_path / "kernel.o").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 0xB7  # EM_AARCH64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "cuda"}, "target kind 'cuda' is not supported"),
        ({}, "target kind None is not supported"),
        ({"kind": "llvm", "mcpu": "native"}, "LLVM knows no CPU named 'native'"),
        ({"kind": "llvm", "mcpu": "pentium9000"}, "LLVM knows no CPU named 'pentium9000'"),
        ({"kind": "llvm", "mcpu": "haswell", "mtriple": "aarch64-linux-gnu"}, "'haswell' for aarch64-linux-gnu"),
        ({"kind": "llvm", "mtriple": "foo-linux-gnu"}, "'foo-linux-gnu' names no known architecture"),
        ({"kind": "llvm", "mattr": ["+warp-drive"]}, r"LLVM knows no feature '\+warp-drive'"),
        ({"kind": "llvm", "mattr": "+avx2"}, "TVM refuses the target"),
        ({"kind": "llvm", "speed": "full"}, "TVM refuses the target"),
        ({"kind": "llvm", "num-cores": "two"}, "num-cores must be a positive integer, not 'two'"),
        ({"kind": "llvm", "num-cores": 0}, "num-cores must be a positive integer, not 0"),
    ],
)
def test_targets_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvironmentMismatchError, match=message):
        target_from_json(config)


def test_threads_of_a_target() -> None:
    config = {"kind": "llvm", "mcpu": "haswell", "num-cores": 3}
    assert machine_of(target_from_json(config)).threads == 3
    assert machine_of(target_from_json(config, threads=2)).threads == 2
    assert config["num-cores"] == 3  # the caller's dictionary is not written to
    assert machine_of(target_from_json({"kind": "llvm", "mcpu": "haswell"})).threads == usable_threads()


AVX512 = {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx2", "fma", "bmi2", "sse4_2", "popcnt"}
AVX2 = {"avx2", "fma", "bmi2", "sse4_2", "popcnt"}


@pytest.mark.parametrize(
    ("flags", "mcpu"),
    [
        (AVX512, "skylake-avx512"),
        (AVX512 | {"avx512_vnni"}, "cascadelake"),
        (AVX512 | {"avx512_vnni", "gfni"}, "icelake-server"),
        (AVX512 | {"avx512_vnni", "gfni", "avx512_bf16", "clzero"}, "znver4"),
        (AVX512 | {"avx512_vnni", "gfni", "avx512_bf16", "avx512_fp16", "amx_tile"}, "sapphirerapids"),
        (AVX512 - {"avx512vl"}, "haswell"),
        (AVX2, "haswell"),
        (AVX2 | {"clzero", "vpclmulqdq"}, "znver3"),
        ({"sse4_2", "popcnt"}, "x86-64-v2"),
    ],
)
def test_family_of_flags(flags: set[str], mcpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "x86_64")
    target = host_target(1)
    assert str(target.attrs["mcpu"]) == mcpu
    # Every name in the table is one that LLVM knows: an unknown one would silently give SSE2 code.
    assert machine_of(target).lanes == (4 if mcpu == "x86-64-v2" else 8 if X86_WIDTHS[mcpu] == "ymm" else 16)


def test_machines_of_no_known_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_cpu_flags", lambda: frozenset({"sse2"}))
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "x86_64")
    with pytest.raises(EnvironmentMismatchError, match="no known CPU family"):
        host_target()


def test_arm_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "aarch64")
    assert machine_of(host_target(2)) == Machine(lanes=4, registers=32, threads=2)
