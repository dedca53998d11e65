"""Links one x86-64 object file and one block of bytes to a shared library, without a compiler or linker.

TVM hands out a position-independent object that calls a dozen functions of libc and of its own runtime, and the model's
weights as one block of bytes. That takes a small part of what a linker does, and doing it here has three uses: no
toolchain has to be installed, the library is the same whatever is installed, and the weights, which are almost all of
it, go from memory to the file once (through an object file and ``ld`` they exist three times).

The segments, each page-aligned: headers and read-only data; code; what the loader relocates and then protects; data;
the block. What the object defines is bound to itself, so that two libraries with equal symbol names do not mix.
Source: System V ABI, generic part, chapter 5, and AMD64 supplement, chapters 4 and 5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Protocol

from tvm_nm.elf_object import (
    EHDR,
    EM_X86_64,
    PAGE,
    RELA,
    SHDR,
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_WRITE,
    SHN_UNDEF,
    SHT_DYNAMIC,
    SHT_DYNSYM,
    SHT_HASH,
    SHT_PROGBITS,
    SHT_RELA,
    SHT_STRTAB,
    SYM,
    LinkError,
    Relocation,
    Section,
    damage_reported,
    read_object,
)

__all__ = ["BLOB_SECTION", "PROGRAM_HEADER", "Writer", "link_shared"]

BLOB_SECTION = ".tvm_weights"
"""Section, the last of the library, that holds the block of bytes."""

_NEEDED = ("libc.so.6", "libm.so.6")
_STUB = 16  # bytes

_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK, _PT_GNU_RELRO = 1, 2, 0x6474E551, 0x6474E552
_PF_X, _PF_W, _PF_R = 1, 2, 4
_ET_DYN, _STT_OBJECT, _STB_GLOBAL = 3, 1, 1
_DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_RELAENT = 1, 4, 5, 6, 7, 8, 9
_DT_STRSZ, _DT_SYMENT, _DT_FLAGS, _DF_BIND_NOW = 10, 11, 30, 8
_R_64, _R_PC32, _R_PLT32, _R_PC64 = 1, 2, 4, 24
_R_VIA_GOT = frozenset({9, 41, 42})  # GOTPCREL, GOTPCRELX, REX_GOTPCRELX
_R_GLOB_DAT, _R_RELATIVE = 6, 8

PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYN = struct.Struct("<qQ")
_INT32, _INT64 = struct.Struct("<i"), struct.Struct("<q")


class Writer(Protocol):
    """What a library is written to."""

    def write(self, data: bytes | bytearray | memoryview, /) -> object:
        """Append the data."""


def link_shared(object_file: bytes, blob: memoryview, blob_symbol: str, out: Writer) -> None:
    """Write the shared library of an object file and a block of bytes.

    Parameters
    ----------
    object_file
        Content of a position-independent x86-64 object file.
    blob
        The block: contiguous, of any size.
    blob_symbol
        Global symbol that the library gives to it.
    out
        Where the library is written, front to back.

    Raises
    ------
    LinkError
        If the object holds something other than code, data and references of the kinds that LLVM makes for TVM.
    OSError
        If `out` cannot be written.
    """
    with damage_reported():
        pieces = list(_Linker(object_file, blob.cast("B"), blob_symbol).pieces())
    position = 0
    for offset, data in pieces:
        out.write(bytes(offset - position))
        out.write(data)
        position = offset + len(data)


class _Linker:
    """Decides the layout, then fills it in. Symbols are numbered as in the object."""

    def __init__(self, data: bytes, blob: memoryview, blob_symbol: str) -> None:
        obj = read_object(data)
        self.sections, self.symbols, self.relocations = obj.sections, obj.symbols, obj.relocations
        loaded = {SHN_UNDEF, *self.sections}
        dynamic = [n for n, symbol in enumerate(self.symbols) if symbol.is_dynamic and symbol.section in loaded]
        self.dynamic = {number: position for position, number in enumerate(dynamic, 1)}
        for relocation in self.relocations:
            self._check(relocation)
        external_calls = [r.symbol for r in self.relocations if self._is_external_call(r)]
        self.stubs = _numbered(external_calls)
        self.slots = _numbered([r.symbol for r in self.relocations if r.type in _R_VIA_GOT] + external_calls)
        self._make_sections(blob, blob_symbol)
        self._place()
        self._fill_got_and_stubs()
        for relocation in self.relocations:
            self._relocate(relocation)
        self._fill_symbols(blob_symbol)
        self._fill_dynamic()

    def _is_external_call(self, relocation: Relocation) -> bool:
        return relocation.type == _R_PLT32 and self.symbols[relocation.symbol].is_undefined

    def _check(self, relocation: Relocation) -> None:
        symbol = self.symbols[relocation.symbol]
        direct = relocation.type in (_R_PC32, _R_PC64) and not symbol.is_undefined
        absolute = relocation.type == _R_64 and self.sections[relocation.section].flags & SHF_WRITE
        if symbol.is_undefined and relocation.symbol not in self.dynamic:
            raise LinkError(f"a reference to the local symbol {symbol.name!r}, which the object does not define")
        if not (direct or absolute or relocation.type == _R_PLT32 or relocation.type in _R_VIA_GOT):
            where = self.sections[relocation.section].name
            raise LinkError(f"relocation of type {relocation.type} to {symbol.name!r} in {where} is not supported")

    def _make_sections(self, blob: memoryview, blob_symbol: str) -> None:
        self.strings = bytearray(b"\0")
        self.name_offsets = [self._string(self.symbols[number].name) for number in self.dynamic]
        self.name_offsets.append(self._string(blob_symbol))
        self.needed = [self._string(name) for name in _NEEDED]
        symbols = len(self.dynamic) + 2  # the first is reserved, the last is the block
        self.pending: list[tuple[int, int, int]] = []  # what goes into .rela.dyn
        relocations = len(self.slots) + sum(r.type == _R_64 for r in self.relocations)
        self.hash = _made(".hash", SHT_HASH, 0, 4 * (2 + 2 * symbols), link=".dynsym", entry_size=4)
        self.dynsym = _made(".dynsym", SHT_DYNSYM, 0, SYM.size * symbols, link=".dynstr", info=1, entry_size=SYM.size)
        self.dynstr = Section(".dynstr", SHT_STRTAB, SHF_ALLOC, self.strings, len(self.strings), align=1)
        self.rela = _made(".rela.dyn", SHT_RELA, 0, RELA.size * relocations, link=".dynsym", entry_size=RELA.size)
        self.plt = _made(".plt", SHT_PROGBITS, SHF_EXECINSTR, _STUB * len(self.stubs), align=_STUB)
        self.got = _made(".got", SHT_PROGBITS, SHF_WRITE, 8 * len(self.slots), entry_size=8)
        dynamic = _DYN.size * (len(_NEEDED) + 10)
        self.dyn = _made(".dynamic", SHT_DYNAMIC, SHF_WRITE, dynamic, link=".dynstr", entry_size=_DYN.size)
        self.blob = Section(BLOB_SECTION, SHT_PROGBITS, SHF_ALLOC, blob, len(blob), align=PAGE)
        own = list(self.sections.values())
        read_only = [s for s in own if not s.flags & (SHF_WRITE | SHF_EXECINSTR)]
        code = [s for s in own if s.flags & SHF_EXECINSTR]
        protected = [s for s in own if s.flags & SHF_WRITE and s.name.startswith(".data.rel.ro")]
        data = [s for s in own if s.flags & SHF_WRITE and s not in protected]
        data.sort(key=lambda section: section.data is None)  # zeros last: they take no room in the file
        if any(s.flags & SHF_WRITE for s in code):
            raise LinkError("a section is both writable and executable")
        self.relocated = [*protected, self.got, self.dyn]
        self.segments = [
            (_PF_R, [self.hash, self.dynsym, self.dynstr, self.rela, *read_only]),
            (_PF_R | _PF_X, [*code, self.plt]),
            (_PF_R | _PF_W, self.relocated),
            (_PF_R | _PF_W, data),
            (_PF_R, [self.blob]),
        ]
        self.segments = [(flags, sections) for flags, sections in self.segments if any(s.size for s in sections)]

    def _string(self, text: str) -> int:
        offset = len(self.strings)
        self.strings += text.encode() + b"\0"
        return offset

    def _place(self) -> None:
        """Give every section its address and its offset, which agree modulo the page size."""
        address = offset = EHDR.size + PROGRAM_HEADER.size * (len(self.segments) + 3)
        for number, (_, sections) in enumerate(self.segments):
            if number:
                address, offset = _aligned(address, PAGE), _aligned(offset, PAGE)
            for section in sections:
                gap = _aligned(address, section.align) - address
                address += gap
                # Once a section takes no room in the file, those behind it are zeros too.
                offset += gap if section.data is not None else 0
                section.address, section.offset = address, offset
                address += section.size
                offset += section.size if section.data is not None else 0
        self.end = offset

    def _address(self, number: int) -> int:
        symbol = self.symbols[number]
        return self.sections[symbol.section].address + symbol.value

    def _fill_got_and_stubs(self) -> None:
        for number, slot in self.slots.items():
            address = self.got.address + 8 * slot
            if self.symbols[number].is_undefined:
                self.pending.append((address, self.dynamic[number] << 32 | _R_GLOB_DAT, 0))
            else:
                self.pending.append((address, _R_RELATIVE, self._address(number)))
        for number, stub in self.stubs.items():
            at = _STUB * stub
            slot_address = self.got.address + 8 * self.slots[number]
            jump = b"\xff\x25" + _INT32.pack(slot_address - (self.plt.address + at + 6))  # jmp *slot(%rip)
            _content(self.plt)[at : at + _STUB] = jump.ljust(_STUB, b"\xcc")  # int3

    def _relocate(self, relocation: Relocation) -> None:
        section_number, where, kind, number, addend = relocation
        section = self.sections[section_number]
        place = section.address + where
        if kind == _R_64:
            if self.symbols[number].is_undefined:
                self.pending.append((place, self.dynamic[number] << 32 | _R_64, addend))
            else:
                self.pending.append((place, _R_RELATIVE, self._address(number) + addend))
            return
        if kind in _R_VIA_GOT:
            target = self.got.address + 8 * self.slots[number]
        elif self._is_external_call(relocation):
            target = self.plt.address + _STUB * self.stubs[number]
        else:
            target = self._address(number)
        field = _INT64 if kind == _R_PC64 else _INT32
        try:
            field.pack_into(_content(section), where, target + addend - place)
        except struct.error as error:
            raise LinkError(f"a reference in {section.name} does not reach its target: {error}") from error

    def _fill_symbols(self, blob_symbol: str) -> None:
        index = {id(section): number for number, section in enumerate(self._listed(), 1)}
        entries = [bytes(SYM.size)]
        for offset, number in zip(self.name_offsets, self.dynamic, strict=False):
            symbol = self.symbols[number]
            where = (0, 0)
            if not symbol.is_undefined:
                where = (index[id(self.sections[symbol.section])], self._address(number))
            entries.append(SYM.pack(offset, symbol.info, symbol.other, *where, symbol.size))
        info = _STB_GLOBAL << 4 | _STT_OBJECT
        blob = (index[id(self.blob)], self.blob.address, self.blob.size)
        entries.append(SYM.pack(self.name_offsets[-1], info, 0, *blob))
        _content(self.dynsym)[:] = b"".join(entries)
        names = [self.symbols[number].name for number in self.dynamic] + [blob_symbol]
        _content(self.hash)[:] = _hash_table(names)
        _content(self.rela)[:] = b"".join(RELA.pack(*entry) for entry in self.pending)

    def _fill_dynamic(self) -> None:
        entries = [(_DT_NEEDED, offset) for offset in self.needed]
        entries += [
            (_DT_HASH, self.hash.address),
            (_DT_STRTAB, self.dynstr.address),
            (_DT_SYMTAB, self.dynsym.address),
            (_DT_STRSZ, self.dynstr.size),
            (_DT_SYMENT, SYM.size),
            (_DT_RELA, self.rela.address),
            (_DT_RELASZ, self.rela.size),
            (_DT_RELAENT, RELA.size),
            (_DT_FLAGS, _DF_BIND_NOW),  # the slots are protected after the loader has filled them
            (0, 0),
        ]
        _content(self.dyn)[:] = b"".join(_DYN.pack(*entry) for entry in entries)

    def _listed(self) -> list[Section]:
        return [section for _, sections in self.segments for section in sections]

    def pieces(self) -> Iterable[tuple[int, bytes | bytearray | memoryview]]:
        """Yield what the file is made of: offsets, in ascending order, and bytes."""
        sections = self._listed()
        names = bytearray(b"\0")
        number = {section.name: position for position, section in enumerate(sections, 1)}
        table = [bytes(SHDR.size)]
        for section in sections:
            table.append(
                SHDR.pack(
                    len(names),
                    section.type,
                    section.flags,
                    section.address,
                    section.offset,
                    section.size,
                    number.get(section.link, 0),
                    section.info,
                    section.align,
                    section.entry_size,
                )
            )
            names += section.name.encode() + b"\0"
        title = len(names)
        names += b".shstrtab\0"
        table.append(SHDR.pack(title, SHT_STRTAB, 0, 0, self.end, len(names), 0, 0, 1, 0))
        headers_at = _aligned(self.end + len(names), 8)
        programs = self._program_headers()
        identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        sizes = (EHDR.size, PROGRAM_HEADER.size, len(programs), SHDR.size, len(table), len(table) - 1)
        yield 0, EHDR.pack(identity, _ET_DYN, EM_X86_64, 1, 0, EHDR.size, headers_at, 0, *sizes)
        yield EHDR.size, b"".join(programs)
        for section in sections:
            if section.data is not None:
                yield section.offset, section.data
        yield self.end, names
        yield headers_at, b"".join(table)

    def _program_headers(self) -> list[bytes]:
        headers = []
        for number, (flags, sections) in enumerate(self.segments):
            first, last = sections[0], sections[-1]
            address, offset = (first.address, first.offset) if number else (0, 0)
            in_file = max((s.offset + s.size for s in sections if s.data is not None), default=offset) - offset
            in_memory = last.address + last.size - address
            headers.append(PROGRAM_HEADER.pack(_PT_LOAD, flags, offset, address, address, in_file, in_memory, PAGE))
        first, last = self.relocated[0], self.relocated[-1]
        size = last.address + last.size - first.address
        protected = (first.offset, first.address, first.address, size, _aligned(size, PAGE))
        headers.append(PROGRAM_HEADER.pack(_PT_GNU_RELRO, _PF_R, *protected, 1))
        dyn = (self.dyn.offset, self.dyn.address, self.dyn.address, self.dyn.size, self.dyn.size)
        headers.append(PROGRAM_HEADER.pack(_PT_DYNAMIC, _PF_R | _PF_W, *dyn, 8))
        headers.append(PROGRAM_HEADER.pack(_PT_GNU_STACK, _PF_R | _PF_W, 0, 0, 0, 0, 0, 16))
        return headers


def _made(name: str, kind: int, flags: int, size: int, **rest: object) -> Section:
    return Section(name, kind, SHF_ALLOC | flags, bytearray(size), size, **rest)  # type: ignore[arg-type]


def _content(section: Section) -> bytearray:
    assert isinstance(section.data, bytearray)
    return section.data


def _numbered(items: Iterable[int]) -> dict[int, int]:
    return {item: position for position, item in enumerate(dict.fromkeys(items))}


def _aligned(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _hash_table(names: list[str]) -> bytes:
    """Make the ABI's hash table of the dynamic symbols, one bucket a symbol; symbol 0 is the reserved one."""
    count = len(names) + 1
    buckets, chains = [0] * count, [0] * count
    for number, name in enumerate(names, 1):
        bucket = _hash(name) % count
        chains[number], buckets[bucket] = buckets[bucket], number
    return struct.pack(f"<{2 + 2 * count}I", count, count, *buckets, *chains)


def _hash(name: str) -> int:
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value & 0xFFFFFFFF
