"""Reads x86-64 ELF object files, as far as `tvm_nm.elf_link` needs them.

Source: System V ABI, generic part, chapter 4. Names are those of the ABI.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "LinkError",
    "ObjectFile",
    "Relocation",
    "Section",
    "Symbol",
    "damage_reported",
    "is_x86_64_object",
    "read_object",
]

PAGE = 4096

EM_X86_64 = 62
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_HASH, SHT_DYNAMIC = 1, 2, 3, 4, 5, 6
SHT_NOTE, SHT_NOBITS, SHT_DYNSYM, SHT_X86_64_UNWIND = 7, 8, 11, 0x70000001
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, SHF_TLS = 1, 2, 4, 0x400
SHN_UNDEF = 0
STB_LOCAL, STT_SECTION, STT_FILE = 0, 3, 4

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
SHDR = struct.Struct("<IIQQQQIIQQ")
SYM = struct.Struct("<IBBHQQ")
RELA = struct.Struct("<QQq")


class LinkError(Exception):
    """The object holds something that this linker does not know; a real linker may."""


@dataclass(slots=True)
class Section:
    """A section that is loaded into memory.

    Attributes
    ----------
    name, type, flags, align
        As in the section's header.
    data
        The content; None where the loader fills in zeros.
    size
        In bytes.
    link, info, entry_size
        As in the header of an output section; `link` is a section's name.
    address, offset
        Where the linker puts it: in memory and in the file.
    """

    name: str
    type: int
    flags: int
    data: bytearray | memoryview | None
    size: int
    align: int = 8
    link: str = ""
    info: int = 0
    entry_size: int = 0
    address: int = 0
    offset: int = 0


class Symbol(NamedTuple):
    """An entry of the symbol table, with its name looked up."""

    name: str
    info: int
    other: int
    section: int
    value: int
    size: int

    @property
    def is_undefined(self) -> bool:
        """Whether something else has to define it."""
        return self.section == SHN_UNDEF

    @property
    def is_dynamic(self) -> bool:
        """Whether the loader sees it: undefined or exported."""
        kind = self.info & 15
        return self.info >> 4 != STB_LOCAL and not self.other & 3 and kind not in (STT_SECTION, STT_FILE)


class Relocation(NamedTuple):
    """A place in a section that depends on a symbol's address."""

    section: int
    offset: int
    type: int
    symbol: int
    addend: int


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """A relocatable object file.

    Attributes
    ----------
    sections
        The loaded sections by index.
    symbols
        All symbols.
    relocations
        Those of the loaded sections.
    """

    sections: dict[int, Section]
    symbols: tuple[Symbol, ...]
    relocations: tuple[Relocation, ...]


def is_x86_64_object(data: bytes) -> bool:
    """Tell whether bytes are the beginning of a relocatable, little-endian x86-64 ELF file."""
    return data[:6] == b"\x7fELF\x02\x01" and data[16:20] == struct.pack("<HH", 1, EM_X86_64)


def read_object(data: bytes) -> ObjectFile:
    """Read an object file.

    Raises
    ------
    LinkError
        If it is none, is damaged, or has sections that need more than to be loaded, such as thread-local data.
    """
    if not is_x86_64_object(data):
        raise LinkError("not an x86-64 ELF object file")
    with damage_reported():
        return _read(data)


@contextmanager
def damage_reported() -> Iterator[None]:
    """Turn what numbers that make no sense lead to into a LinkError."""
    try:
        yield
    except (struct.error, IndexError, KeyError, OverflowError, ValueError) as error:
        raise LinkError(f"the object file is damaged or truncated: {error}") from error


def _read(data: bytes) -> ObjectFile:
    header = EHDR.unpack_from(data)
    table, count, names = header[6], header[12], header[13]
    if not count:
        raise LinkError("the object file has more sections than the header can count")
    headers = [SHDR.unpack_from(data, table + SHDR.size * index) for index in range(count)]
    sections: dict[int, Section] = {}
    symbols: tuple[Symbol, ...] = ()
    for index, (name, kind, flags, _, at, size, link, _, align, _) in enumerate(headers):
        if kind != SHT_NOBITS and at + size > len(data):
            raise ValueError("a section ends behind the file")
        if kind == SHT_SYMTAB:
            texts = headers[link][4]
            entries = SYM.iter_unpack(data[at : at + size])
            symbols = tuple(Symbol(_text(data, texts + start), *rest) for start, *rest in entries)
        if flags & SHF_ALLOC:
            title = _text(data, headers[names][4] + name)
            known = kind in (SHT_PROGBITS, SHT_NOBITS, SHT_NOTE, SHT_X86_64_UNWIND)
            if not known or flags & SHF_TLS or align > PAGE:
                raise LinkError(f"section {title} of type {kind:#x} with flags {flags:#x} is not supported")
            content = None if kind == SHT_NOBITS else bytearray(data[at : at + size])
            kept = flags & (SHF_WRITE | SHF_ALLOC | SHF_EXECINSTR)
            sections[index] = Section(title, kind, kept, content, size, max(align, 1))
    relocations = tuple(
        Relocation(target, where, info & 0xFFFFFFFF, info >> 32, addend)
        for _, kind, _, _, at, size, _, target, _, _ in headers
        if kind == SHT_RELA and target in sections
        for where, info, addend in RELA.iter_unpack(data[at : at + size])
    )
    for relocation in relocations:
        symbol = symbols[relocation.symbol]
        if not symbol.is_undefined and symbol.section not in sections:
            raise LinkError(f"symbol {symbol.name!r} lies in section {symbol.section:#x}, which is not loaded")
    return ObjectFile(sections, symbols, relocations)


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
