"""Turns a built executable into a shared library that plain TVM loads.

x86-64 objects are linked in this process by `tvm_nm.elf_link`. Objects for other processors, and what that linker does
not know, go to a compiler of the system or, where it is installed, to the ``ziglang`` package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_nm.elf_link import link_shared
from tvm_nm.elf_object import LinkError
from tvm_nm.errors import ArtifactError, EnvironmentMismatchError
from tvm_nm.library import BLOB_SYMBOL

__all__ = ["export_library", "file_sha256", "find_compiler"]

_log = logging.getLogger(__name__)

_CHUNK = 1 << 24


def export_library(executable: Any, path: Path, target: tvm.target.Target) -> str:
    """Write an executable as a shared library.

    Parameters
    ----------
    executable
        A `tvm.relax.VMExecutable`.
    path
        File to write; it must not exist yet.
    target
        What it was built for.

    Returns
    -------
    SHA-256 of the file, in hexadecimal.

    Raises
    ------
    EnvironmentMismatchError
        If a compiler is needed and there is none.
    ArtifactError
        If the compiler fails.
    OSError
        If the file cannot be written.
    """
    try:
        return _link_here(executable, path)
    except LinkError as error:
        _log.info("linking with a compiler: %s", error)
        _link_with_compiler(executable, path, target)
        return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def find_compiler(target: tvm.target.Target) -> list[str]:
    """Return the command of a compiler that links for a target.

    Raises
    ------
    EnvironmentMismatchError
        If there is none.
    """
    triple = str(target.attrs.get("mtriple", "")) or f"{platform.machine()}-linux-gnu"
    arch = triple.partition("-")[0]
    names = [f"{triple}-g++", f"{triple}-gcc", f"{arch}-linux-gnu-g++", f"{arch}-linux-gnu-gcc"]
    if arch == platform.machine():
        names += ["g++", "gcc", "clang++", "clang", "c++", "cc"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found:
        return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu"]
    raise EnvironmentMismatchError(
        f"no compiler to link for {triple}: install {names[-1]}, or run `pip install ziglang`"
    )


class _HashingWriter:
    """Writes to a file and hashes on the way; chunks keep the process open to interrupts."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._file.write(chunk)
            self.digest.update(chunk)


def _link_here(executable: Any, path: Path) -> str:
    code = [module for module in executable.mod.imports if module.kind == "llvm"]
    if len(code) != 1 or len(executable.mod.imports) != 1:
        raise LinkError("the executable is more than one LLVM module")
    # In memory, because LLVM aborts the process when a disk is full.
    with os.fdopen(os.memfd_create("object"), "rb") as file:
        code[0].write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        object_file = file.read()
    packed = tvm.get_global_func("runtime.ModulePackImportsToTensor")(executable.mod)
    with path.open("xb") as library:
        writer = _HashingWriter(library)
        link_shared(object_file, np.from_dlpack(packed).data, BLOB_SYMBOL, writer)
        library.flush()
        os.fsync(library.fileno())
    return writer.digest.hexdigest()


def _link_with_compiler(executable: Any, path: Path, target: tvm.target.Target) -> None:
    command = find_compiler(target)

    def run(output: str, objects: list[str], **_: object) -> None:
        done = subprocess.run(
            [*command, "-shared", "-fPIC", "-o", output, *objects], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            raise ArtifactError(f"{command[0]} failed to link the library: {said[-1]}")

    with tempfile.TemporaryDirectory(dir=path.parent, prefix="link-") as workspace:
        executable.export_library(str(path), fcompile=run, workspace_dir=workspace)
