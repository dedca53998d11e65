"""Copy rows of an input by vectors: zero-padded, and split into the phases of a stride by shuffles.

A copy has a condition at each element, whether it lies inside of the input, and a stride between its loads. LLVM makes
scalar code of rows that are no multiple of the vector, and where it does not, vectors of conditions. But which columns
lie inside is known: a row is some vectors of the input between some of the fill value, and every other element of two
vectors is one shuffle (`vpermt2ps`). Vectors that would reach beyond the row begin earlier, and the elements that they
share with the one before are copied twice. The loop over a copy's columns is marked with `ROW_COPY`; `copy_rows`
replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize
from tvm.sym import Analyzer
from tvm.tirx import BufferRegion

from tvm_nm.schedules.fetch_code import substitute, unmarked_loop

__all__ = [
    "LONGEST_STRIDE",
    "ROW_COPY",
    "Columns",
    "columns_of",
    "copies_by_vectors",
    "copy_rows",
    "pieces",
    "vector_at",
]

ROW_COPY = "tvm_nm_row_copy"
"""Annotation of a loop over a row's columns, perhaps around one over its phases: the numbers of a `Columns`."""

LONGEST_STRIDE = 2
"""Columns that one shuffle can skip between those of a row."""
# TVM puts smaller buffers on the stack. LLVM joins short shuffles that were stored there to longer ones, and may do so
# before it has them: the module is refused.
_STACK_BYTES = 1024
# Longer rows are loops.
_MOST_UNROLLED = 16


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of the input a row of a copy holds: column `c` of phase `p` is `c * stride + p * step - left`.

    Attributes
    ----------
    lanes
        float32 elements of one vector.
    width
        Columns of the input.
    left
        Columns of padding before them.
    stride
        From one column of the copy to the next.
    step
        From one phase to the next.
    """

    lanes: int
    width: int
    left: int
    stride: int
    step: int

    def attribute(self, elements: int) -> list[int]:
        """Return what `ROW_COPY` is annotated with; nothing where rows are better left to LLVM.

        Parameters
        ----------
        elements
            Of the copy, as much of it as there is at a time.
        """
        by_vectors = copies_by_vectors(self.stride, elements)
        return [self.lanes, self.width, self.left, self.stride, self.step] if by_vectors else []

    def start(self, phase: int) -> int:
        """Return the input's column in column 0 of a phase, perhaps a negative one."""
        return phase * self.step - self.left

    def inside(self, phase: int, count: int) -> tuple[int, int]:
        """Return the first and the end of a phase's columns, of `count`, that lie inside of the input."""
        start = self.start(phase)
        end = min(count, max(0, -(-(self.width - start) // self.stride)))
        return min(end, max(0, -(start // self.stride))), end


def copies_by_vectors(stride: int, elements: int) -> bool:
    """Whether columns `stride` apart are copied by vectors, to a copy of so many elements."""
    return stride == 1 or (stride <= LONGEST_STRIDE and 4 * elements > _STACK_BYTES)


def copy_rows(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Return a scheduled function whose marked loops copy rows by vectors; a loop over a part of a row stays."""

    def visit(loop: Any) -> Any:
        if ROW_COPY not in loop.annotations:
            return loop
        copy = _RowCopy.of(loop)
        return unmarked_loop(loop, ROW_COPY, loop.body) if copy is None else copy.emit()

    body = tvm_ffi.structural_map(func.body, (tirx.For, visit))
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


class _RowCopy:
    """Emits the copy of one row of the input to all its phases."""

    def __init__(self, columns: Columns, loop: Any, realize: Any) -> None:
        self._columns = columns
        self._count = int(loop.extent)
        self._column = loop.loop_var
        phases = loop.body
        has_phases = isinstance(phases, tirx.For)
        self._phase: Any
        self._fill: Any
        self._phase, self._phases = (phases.loop_var, int(phases.extent)) if has_phases else (None, 1)
        self._block = realize.block
        self._bound = dict(zip((axis.var for axis in self._block.iter_vars), realize.iter_values, strict=True))
        value = self._block.body.value
        guarded = not isinstance(value, tvm.ir.TensorLoad)
        self._inside: Any
        self._inside, self._load, self._fill = value.args if guarded else (None, value, None)

    @staticmethod
    def of(loop: Any) -> _RowCopy | None:
        """Return what a marked loop copies; None where it is not a whole row, but a part that a schedule left of it."""
        columns = Columns(*(int(number) for number in loop.annotations[ROW_COPY]))
        realize = loop.body.body if isinstance(loop.body, tirx.For) else loop.body
        whole = isinstance(loop.extent, tirx.IntImm) and int(loop.min) == 0
        if not whole or not isinstance(realize, SBlockRealize) or not _is_true(realize.predicate):
            return None
        if isinstance(realize.block.body.value, tirx.FloatImm):
            return None  # all of the copy is padding
        copy = _RowCopy(columns, loop, realize)
        return copy if copy._is_whole() else None

    def _is_whole(self) -> bool:
        """Whether the loops' first iteration is the first column of the first phase."""
        begin = self._at(self._load.indices)[-1]
        return bool(Analyzer().can_prove_equal(begin, self._columns.start(0)))

    def emit(self) -> Any:
        """Return the block of a row."""
        buffer, source = self._block.body.buffer, self._load.source
        starts = [self._at(self._block.body.indices, phase) for phase in range(self._phases)]
        rows = [self._at(self._load.indices, phase)[:-1] for phase in range(self._phases)]
        inside = [
            statement
            for phase in range(self._phases)
            for statement in self._row(buffer, starts[phase], source, rows[phase], phase)
        ]
        body = _sequence(inside)
        if self._fill is not None:
            outside = [
                tirx.BufferStore(buffer, self._filled(size), vector_at(start, at, size))
                for start in starts
                for at, size in pieces(0, self._count, self._columns.lanes)
            ]
            body = tirx.IfThenElse(self._row_is_inside(), body, _sequence(outside))
        whole = [tvm.ir.Range.from_min_extent(0, extent) for extent in source.shape]
        writes = [
            BufferRegion(
                buffer,
                [
                    *(tvm.ir.Range.from_min_extent(at, 1) for at in start[:-1]),
                    tvm.ir.Range.from_min_extent(start[-1], self._count),
                ],
            )
            for start in starts
        ]
        block = SBlock([], [BufferRegion(source, whole)], writes, self._block.name_hint, body)
        return SBlockRealize([], tirx.const(True, "bool"), block)

    def _row_is_inside(self) -> Any:
        """Return the condition of an element in a column that is inside of the input: what is left of it is the row's.

        The index of a row would not do: of an input of height 1 it is always 0.
        """
        for phase in range(self._phases):
            first, end = self._columns.inside(phase, self._count)
            if first < end:
                return self._at([self._inside], phase, first)[0]
        return tirx.const(False, "bool")

    def _at(self, indices: Any, phase: int = 0, column: int = 0) -> list[Any]:
        """Return indices at a column of a phase, in terms of the loops around."""
        values = {self._column: tirx.const(column, self._column.ty.dtype)}
        if self._phase is not None:
            values[self._phase] = tirx.const(phase, self._phase.ty.dtype)
        analyzer = Analyzer()
        return [analyzer.simplify(i) for i in substitute(substitute(list(indices), self._bound), values)]

    def _row(self, buffer: Any, start: list[Any], source: Any, row: list[Any], phase: int) -> Iterator[Any]:
        """Yield the stores of a row that lies inside of the input: fill values, columns of the input, fill values."""
        columns = self._columns
        first, end = columns.inside(phase, self._count)
        for piece in (*pieces(0, first, columns.lanes), *pieces(end, self._count, columns.lanes)):
            yield tirx.BufferStore(buffer, self._filled(piece[1]), vector_at(start, *piece))
        whole = (end - first) // columns.lanes
        if whole > _MOST_UNROLLED:
            vector = tirx.Var("vector", "int32")
            at = first + vector * columns.lanes
            value = self._vector(source, row, phase, at, columns.lanes)
            store = tirx.BufferStore(buffer, value, vector_at(start, at, columns.lanes))
            yield tirx.For(vector, 0, whole, tirx.ForKind.SERIAL, store)
        vectors = list(pieces(first, end, columns.lanes))
        for at, size in vectors[whole:] if whole > _MOST_UNROLLED else vectors:
            yield tirx.BufferStore(buffer, self._vector(source, row, phase, at, size), vector_at(start, at, size))

    def _vector(self, source: Any, row: list[Any], phase: int, at: Any, size: int) -> Any:
        """Return columns of the input from the copy's column `at` on."""
        x = at * self._columns.stride + self._columns.start(phase)
        return columns_of(source, row, x, size, self._columns.stride)

    def _filled(self, size: int) -> Any:
        return self._fill if size == 1 else tirx.Broadcast(self._fill, size)


def columns_of(source: Any, row: list[Any], x: Any, size: int, stride: int) -> Any:
    """Return a vector of a row's columns, `stride` apart, from column `x` on; nothing behind the last one is read."""
    if stride == 1 or size == 1:
        return tirx.BufferLoad(source, vector_at([*row, x], 0, size))
    halves = [tirx.BufferLoad(source, vector_at([*row, x + begin], 0, size)) for begin in (0, size - 1)]
    lanes = [lane if lane < size else lane + 1 for lane in range(0, 2 * size, 2)]
    return tirx.Shuffle(halves, [tirx.IntImm("int32", lane) for lane in lanes])


def pieces(first: int, end: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Yield begin and size of vectors that cover some columns, as large as they can be; the last ends with them."""
    if end <= first:
        return
    size = min(lanes, 1 << ((end - first).bit_length() - 1))
    for at in range(first, end, size):
        yield min(at, end - size), size


def vector_at(start: list[Any], at: Any, size: int) -> list[Any]:
    """Return the indices of `size` elements from the `at`-th behind `start` on."""
    begin = start[-1] + at
    return [*start[:-1], begin if size == 1 else tirx.Ramp(begin, 1, size)]


def _sequence(statements: list[Any]) -> Any:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)


def _is_true(condition: Any) -> bool:
    return isinstance(condition, tirx.IntImm) and bool(condition.value)
