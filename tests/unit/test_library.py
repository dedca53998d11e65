from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from models import Net
from tvm import relax

from tvm_nm import library, linker
from tvm_nm.elf_link import BLOB_SECTION
from tvm_nm.frontend import import_onnx
from tvm_nm.library import load_library
from tvm_nm.pipeline import build_executable
from tvm_nm.schedules.machine import host_target


def model() -> onnx.ModelProto:
    """Three layers with zeros, constants and a thread pool's closure: the library has code, data and .bss."""
    net = Net((1, 4, 8, 8))
    x = net.add("Softmax", net.add("Flatten", net.add("Relu", net.conv("input", (8, 4, 3, 3)))))
    return net.model(net.fc(x, 288, 5000))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Any]:
    target = host_target(2)
    executable = build_executable(import_onnx(model()).module, target).executable
    path = tmp_path_factory.mktemp("library") / "model.so"
    return path, linker.export_library(executable, path, target), executable


def run(module: Any) -> np.ndarray[Any, Any]:
    data = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    result: np.ndarray[Any, Any] = relax.VirtualMachine(module, tvm.cpu())["main"](tvm.runtime.tensor(data)).numpy()
    return result


def mapped_bytes(name: str) -> int:
    """Size of the mappings of files whose path contains `name`."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if name in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            total += end - start
    return total


def test_it_computes_what_tvms_own_loader_does_and_maps_only_the_code(exported: tuple[Path, str, Any]) -> None:
    path, digest, _ = exported
    assert path.stat().st_size > 5_000_000
    loaded = load_library(path, digest)
    assert mapped_bytes(str(path)) == 0
    assert 0 < mapped_bytes("memfd:tvm-nm") < 1_000_000
    np.testing.assert_array_equal(run(loaded), run(tvm.runtime.load_module(str(path))))


def test_libraries_are_unloaded_with_their_last_user(exported: tuple[Path, str, Any]) -> None:
    path, digest, _ = exported
    gc.collect()
    before = mapped_bytes("memfd:tvm-nm")
    for _ in range(3):
        machine = relax.VirtualMachine(load_library(path, digest), tvm.cpu())
        assert mapped_bytes("memfd:tvm-nm") > before
        del machine
        gc.collect()
    assert mapped_bytes("memfd:tvm-nm") == before


def test_two_libraries_at_a_time_do_not_mix(exported: tuple[Path, str, Any], tmp_path: Path) -> None:
    path, digest, _ = exported
    net = Net((1, 4, 8, 8), seed=1)
    target = host_target(2)
    other = build_executable(import_onnx(net.model(net.conv("input", (8, 4, 3, 3)))).module, target).executable
    other_digest = linker.export_library(other, tmp_path / "model.so", target)
    first, second = load_library(path, digest), load_library(tmp_path / "model.so", other_digest)
    assert run(first).shape == (1, 5000)
    np.testing.assert_array_equal(run(second), run(tvm.runtime.load_module(str(tmp_path / "model.so"))))


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_what_another_linker_made_is_left_to_tvm(exported: tuple[Path, str, Any], tmp_path: Path) -> None:
    path, digest, executable = exported
    compiled = tmp_path / "compiled.so"
    linker._link_with_compiler(executable, compiled, host_target(2))
    loaded = load_library(compiled, linker.file_sha256(compiled))
    assert mapped_bytes("compiled.so") + mapped_bytes(linker.file_sha256(compiled)) > 0
    np.testing.assert_array_equal(run(loaded), run(load_library(path, digest)))


def test_without_memory_files_tvm_loads_it(exported: tuple[Path, str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, digest, _ = exported
    want = run(load_library(path, digest))
    gc.collect()
    monkeypatch.delattr(library.os, "memfd_create")
    loaded = load_library(path, digest)
    assert mapped_bytes("memfd:tvm-nm") == 0
    np.testing.assert_array_equal(run(loaded), want)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(58), b"x" * 5000])
def test_what_is_no_library_of_ours_has_no_layout(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        assert library._layout(file) is None


def test_the_block_is_the_last_section(exported: tuple[Path, str, Any]) -> None:
    with exported[0].open("rb") as file:
        layout = library._layout(file)
        assert layout is not None
        file.seek(0)
        data = file.read()
    assert data.index(library._HEAD) == layout.blob + 8
    assert BLOB_SECTION.encode() in data[layout.blob :]
