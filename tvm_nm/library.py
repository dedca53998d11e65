"""Loads a built library with less memory than TVM's own loader takes.

TVM loads a library together with the block of bytes inside it, the virtual machine's program with all weights. It
copies that block twice before it copies the weights out of it, and the mapped file stays in memory on top: four times
the weights. Here the code alone is handed to the dynamic loader, and the program is read from the file, which makes
three, and after loading one instead of two. Libraries that another linker made are left to TVM.
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import tvm
import tvm_ffi

from tvm_nm.elf_link import BLOB_SECTION, PROGRAM_HEADER
from tvm_nm.elf_object import EHDR, EM_X86_64, SHDR

__all__ = ["BLOB_SYMBOL", "load_library"]

BLOB_SYMBOL = "__tvm_ffi__library_bin"
"""tvm-ffi looks up what a library holds beside its code, here the virtual machine's program, by this name."""

_PROGRAM = "relax.VMExecutable"
_PT_NULL = 0
_U64 = struct.Struct("<Q")
# How the block begins (tvm-ffi, library_module.cc): the tree of imports in CSR form, here two modules of which the
# first imports the second, then the first module's kind. The program's size and bytes follow, and the library's kind.
_HEAD = struct.pack("<7Q", 3, 0, 1, 1, 1, 1, len(_PROGRAM)) + _PROGRAM.encode()


class _Layout(NamedTuple):
    """Where things are in the library's file, and where the block would be in memory."""

    blob: int
    blob_address: int
    headers: int
    header_count: int
    names: int
    names_size: int


def load_library(path: Path, digest: str) -> Any:
    """Load a library, of which the caller knows that it is the one that was built.

    Parameters
    ----------
    path
        The library.
    digest
        Its SHA-256. Libraries with the same one share their code in memory.

    Returns
    -------
    The module for `tvm.relax.VirtualMachine`. It need not be kept: the virtual machine holds it.
    """
    with path.open("rb") as file:
        layout = _layout(file)
        if layout is not None and hasattr(os, "memfd_create"):
            code = _without_blob(file, layout)
            file.seek(layout.blob + _U64.size)  # behind the size of the block itself
            if file.read(len(_HEAD)) == _HEAD:
                return _assemble(code, file)
    # The dynamic loader takes a library of the same path for the same library, even when the file was replaced since.
    # Through a link that is named after the content it cannot be wrong.
    return _load_as(path.resolve(), f"{digest}.so")


def _load_as(path: Path, name: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="tvm-nm-") as folder:
        link = Path(folder) / name
        link.symlink_to(path)
        # Not kept alive for the rest of the process, as TVM's own function does.
        return tvm_ffi.load_module(str(link), keep_module_alive=False)


def _layout(file: BinaryIO) -> _Layout | None:
    """Find the block and its name; None if our linker did not write this file."""
    header = file.read(EHDR.size)
    if len(header) < EHDR.size:
        return None
    identity, _, machine, _, _, headers, sections_at, *_, header_count, _, section_count, _ = EHDR.unpack(header)
    if not identity.startswith(b"\x7fELF\x02\x01") or machine != EM_X86_64:
        return None
    file.seek(sections_at)
    table = file.read(SHDR.size * section_count)
    if not table or len(table) < SHDR.size * section_count:
        return None
    sections = list(SHDR.iter_unpack(table))
    titles = sections[-1]
    file.seek(titles[4])
    text = file.read(titles[5])
    named = {text[s[0] :].partition(b"\0")[0].decode("latin-1"): s for s in sections}
    if BLOB_SECTION not in named or ".dynstr" not in named:
        return None
    names = named[".dynstr"]
    blob = named[BLOB_SECTION]
    return _Layout(blob[4], blob[3], headers, header_count, names[4], names[5])


def _without_blob(file: BinaryIO, layout: _Layout) -> bytearray:
    """Return the library up to the block, which is its last part, as a library of its own.

    The segment of the block becomes an unused entry, and the block's symbol gets another name, so that nobody finds it.
    """
    file.seek(0)
    code = bytearray(file.read(layout.blob))
    for number in range(layout.header_count):
        at = layout.headers + PROGRAM_HEADER.size * number
        fields = PROGRAM_HEADER.unpack_from(code, at)
        if fields[3] == layout.blob_address:  # not the offset: a segment of zeros may have the same
            PROGRAM_HEADER.pack_into(code, at, _PT_NULL, *fields[1:])
    name = b"\0" + BLOB_SYMBOL.encode() + b"\0"
    at = code.index(name, layout.names, layout.names + layout.names_size)
    code[at + 1] = ord("-")
    return code


def _assemble(code: bytearray, file: BinaryIO) -> Any:
    """Load the code, then the program at the file's position, and join them as the block's tree of imports says."""
    number = os.memfd_create("tvm-nm")
    try:
        with open(number, "wb", closefd=False) as memory:
            memory.write(code)
        library = _load_as(Path(f"/proc/self/fd/{number}"), "code.so")
    finally:
        os.close(number)
    (size,) = _U64.unpack(file.read(_U64.size))
    program = tvm.get_global_func(f"ffi.Module.load_from_bytes.{_PROGRAM}")(file.read(size))
    program.import_module(library)
    return program
