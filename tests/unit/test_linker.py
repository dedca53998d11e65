from __future__ import annotations

import contextlib
import ctypes
import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net
from tvm import relax

from tvm_nm import linker
from tvm_nm.elf_link import link_shared
from tvm_nm.elf_object import LinkError
from tvm_nm.errors import ArtifactError, EnvironmentMismatchError
from tvm_nm.frontend import import_onnx
from tvm_nm.pipeline import build_executable
from tvm_nm.schedules.machine import host_target

needs_compiler = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")

SOURCE = r"""
#include <math.h>
#include <string.h>
extern void *not_there __attribute__((weak));
extern int missing(int) __attribute__((weak));
static int twice(int x) { return 2 * x; }
int thrice(int x) { return 3 * x; }
int (*const table[])(int) = {twice, thrice};
char zeros[70000];
int counter = 41;
double constants[] __attribute__((aligned(64))) = {1.5, 2.5};
int call(int which, int x) { return table[which](x); }
int count(void) { return ++counter; }
int clear(void) { memset(zeros, 1, sizeof zeros); return zeros[0] + zeros[69999]; }
double power(double x) { return pow(x, constants[1]); }
int weak(void) { return (&not_there != 0) + (missing != 0); }
long address(void) { return (long)constants % 64; }
"""


@pytest.fixture(scope="module")
def built() -> Any:
    net = Net((1, 4, 8, 8))
    x = net.add("Softmax", net.add("Flatten", net.add("Relu", net.conv("input", (8, 4, 3, 3)))))
    target = host_target(2)
    return build_executable(import_onnx(net.model(x)).module, target).executable, target


def run(path: Path) -> np.ndarray[Any, Any]:
    """Run a library with nothing but TVM."""
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    data = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    result: np.ndarray[Any, Any] = machine["main"](tvm.runtime.tensor(data)).numpy()
    return result


@needs_compiler
def test_both_roads_give_libraries_that_compute_the_same(built: Any, tmp_path: Path) -> None:
    executable, target = built
    here, compiled = tmp_path / "here.so", tmp_path / "compiled.so"
    digest = linker.export_library(executable, here, target)
    linker._link_with_compiler(executable, compiled, target)
    np.testing.assert_array_equal(run(here), run(compiled))
    assert digest == linker.file_sha256(here)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiled.so", "here.so"]


def test_linking_needs_no_compiler_and_is_reproducible(
    built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable, target = built
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    digests = [linker.export_library(executable, tmp_path / f"{n}.so", target) for n in range(2)]
    assert digests[0] == digests[1]


@needs_compiler
def test_what_the_linker_does_not_know_goes_to_a_compiler(
    built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable, target = built
    monkeypatch.setattr(linker, "link_shared", failing)
    assert linker.export_library(executable, tmp_path / "m.so", target) == linker.file_sha256(tmp_path / "m.so")
    assert run(tmp_path / "m.so").shape == (1, 288)


def failing(*_: object) -> None:
    raise LinkError("something new")


def test_without_any_linker_the_remedy_is_named(built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "link_shared", failing)
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentMismatchError, match=r"no compiler to link for x86_64.*install cc.*ziglang"):
        linker.export_library(built[0], tmp_path / "m.so", built[1])


def test_other_processors_need_their_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "num-cores": 1})
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentMismatchError, match="install aarch64-linux-gnu-gcc"):
        linker.find_compiler(target)
    compiler = tmp_path / "aarch64-linux-gnu-gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert linker.find_compiler(target) == [str(compiler)]
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: object())
    compiler.unlink()
    assert linker.find_compiler(target)[1:] == ["-m", "ziglang", "cc", "-target", "aarch64-linux-gnu"]


def test_a_failing_compiler_is_quoted(built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho cannot find crti.o >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(linker, "link_shared", failing)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtifactError, match=r"g\+\+ failed to link the library: cannot find crti\.o"):
        linker.export_library(built[0], tmp_path / "m.so", built[1])


@pytest.fixture(scope="module")
def c_object(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compiled(tmp_path_factory.mktemp("c"), SOURCE)


def compiled(folder: Path, source: str, *options: str) -> bytes:
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    command = ["gcc", "-c", "-fPIC", "-O1", "-x", "c", "-", "-o", str(folder / "c.o"), *options]
    subprocess.run(command, input=source, text=True, check=True)
    return (folder / "c.o").read_bytes()


@pytest.fixture
def library(c_object: bytes, tmp_path: Path) -> ctypes.CDLL:
    with (tmp_path / "c.so").open("wb") as file:
        link_shared(c_object, memoryview(b"weights" * 10000), "the_weights", file)
    return ctypes.CDLL(str(tmp_path / "c.so"))


def test_a_library_of_c_code_works(library: ctypes.CDLL) -> None:
    library.power.restype, library.power.argtypes = ctypes.c_double, [ctypes.c_double]
    assert [library.call(0, 7), library.call(1, 7)] == [14, 21]
    assert [library.count(), library.count()] == [42, 43]
    assert library.clear() == 2
    assert library.power(4.0) == 32.0
    assert library.weak() == 0
    assert library.address() == 0


def test_the_block_and_the_symbols_are_where_the_loader_looks(library: ctypes.CDLL) -> None:
    assert bytes((ctypes.c_char * 70000).in_dll(library, "the_weights")) == b"weights" * 10000
    assert ctypes.c_int.in_dll(library, "counter").value == 41
    assert library.thrice(2) == 6
    with pytest.raises(AttributeError):
        library.twice  # noqa: B018  (static)


def test_binary_tools_understand_the_library(c_object: bytes, tmp_path: Path) -> None:
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    (tmp_path / "c.so").write_bytes(linked(c_object))
    done = subprocess.run(["readelf", "-aW", str(tmp_path / "c.so")], capture_output=True, text=True, check=True)
    assert not done.stderr
    assert "GNU_RELRO" in done.stdout
    assert "RWE" not in done.stdout


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("__thread int x = 3; int get(void) { return x; }", (), "not supported"),
        ("int x; int get(void) { return x; }", ("-mcmodel=large", "-fno-pic"), "not supported"),
        ("void start(void) __attribute__((constructor)); void start(void) {}", (), "section .init_array"),
        ("int get(void) { return 1; }", ("-m32",), "not an x86-64 ELF object"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, source: str, options: tuple[str, ...], says: str) -> None:
    with pytest.raises(LinkError, match=says):
        linked(compiled(tmp_path, source, *options))


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_object_is_refused_or_linked_but_nothing_else(c_object: bytes, data: st.DataObject) -> None:
    damaged = bytearray(c_object[: data.draw(st.integers(0, len(c_object)))])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(LinkError):
        linked(bytes(damaged))


def linked(object_file: bytes) -> bytes:
    out = io.BytesIO()
    link_shared(object_file, memoryview(b"w"), "weights", out)
    return out.getvalue()
