"""Loops, register tiles and vector accesses of generated code, over flat buffers whose positions are elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

from tvm_nm.schedules.transpose import turned_square
from tvm_nm.workload import Epilogue

__all__ = [
    "activated",
    "add_to",
    "blocked_channel",
    "bound",
    "divided",
    "flat_function",
    "in_groups",
    "least",
    "load",
    "most_of",
    "one_group",
    "registers",
    "splat",
    "store_turned",
    "store_vector",
    "tiles",
]


def flat_function(
    shapes: Mapping[str, tuple[tuple[int, ...], str]], emit: Callable[[dict[str, Any]], None]
) -> tvm.tirx.PrimFunc:
    """Return a function that needs no schedule, of arguments with names, shapes and dtypes; `emit` gets them flat."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8, "global_symbol": "main"})
        handles = [T.arg(name, T.handle()) for name in shapes]
        buffers = [T.match_buffer(h, *shape) for h, shape in zip(handles, shapes.values(), strict=True)]
        with T.sblock("root"):  # as TVM's passes expect of a function
            T.reads()
            T.writes()
            flat = {
                name: T.decl_buffer((math.prod(shape),), dtype, data=buffer.data)
                for (name, (shape, dtype)), buffer in zip(shapes.items(), buffers, strict=True)
            }
            emit(flat)
    return builder.get()


def bound(value: Any) -> Any:
    """Return a value, bound to a variable unless it is a constant."""
    return value if isinstance(value, int) else T.Bind(value)


def least(one: int, other: Any) -> Any:
    """Return the smaller of two values, as `bound` does."""
    return min(one, other) if isinstance(other, int) else T.Bind(tirx.min(one, other))


def most_of(one: int, other: Any) -> Any:
    """Return the larger of two values, as `bound` does."""
    return max(one, other) if isinstance(other, int) else T.Bind(tirx.max(one, other))


def divided(task: Any, inner: int, outer: int) -> tuple[Any, Any]:
    """Return a task's place in an outer and an inner loop; constants for loops of one iteration."""
    if outer == 1:
        return 0, task if inner > 1 else 0
    return (task, 0) if inner == 1 else (tirx.indexdiv(task, inner), tirx.indexmod(task, inner))


def in_groups(total: int, size: int, body: Callable[[Any, int], None]) -> None:
    """Loop over groups of vectors; the last may be smaller and has code of its own."""
    if total >= size:
        with T.serial(0, total // size) as group:
            body(group * size, size)
    if total % size:
        body(total // size * size, total % size)


def one_group(group: Any, total: int, size: int, body: Callable[[Any, int], None]) -> None:
    """Emit what task `group` of `_in_groups` does."""
    full, rest = divmod(total, size)
    if not rest:
        body(group * size, size)
    elif not full:
        body(0, rest)
    else:
        with T.If(group < full):
            with T.Then():
                body(group * size, size)
            with T.Else():
                body(full * size, rest)


def tiles(rows: Any, width: int, most: int, body: Callable[[Any, Any, int, int], None]) -> None:
    """Cut rows of pixels into register tiles of at most `most`: whole rows if several fit, else parts of a row.

    `body` gets a tile's first row and column, and its rows and columns.
    """
    if 2 * width <= most:
        together = most // width
        full = tirx.indexdiv(rows, together) if not isinstance(rows, int) else rows // together
        with T.serial(0, full) as t:
            body(t * together, 0, together, width)
        rest = rows - full * together
        if isinstance(rest, int):
            if rest:
                body(full * together, 0, rest, width)
            return
        with T.serial(0, rest) as t:
            body(full * together + t, 0, 1, width)
        return
    columns = -(-width // -(-width // most))
    full, rest = divmod(width, columns)
    with T.serial(0, rows) as row:
        if full > 1:
            with T.serial(0, full) as t:
                body(row, t * columns, 1, columns)
        else:
            body(row, 0, 1, columns)
        if rest:
            body(row, full * columns, 1, rest)


def blocked_channel(channel: Any, plane: int, lanes: int) -> Any:
    """Return where a channel's first pixel lies in a blocked tensor; lanes are a power of two."""
    vector = tirx.shift_right(channel, tirx.const(lanes.bit_length() - 1, "int32"))
    return vector * plane + tirx.bitwise_and(channel, tirx.const(lanes - 1, "int32"))


def splat(value: float, lanes: int) -> Any:
    """Return a vector of equal lanes."""
    return tirx.Broadcast(tirx.const(value, "float32"), lanes)


def load(buffer: Any, at: Any, lanes: int) -> Any:
    """Return a vector of a flat buffer."""
    return buffer.vload([at], f"float32x{lanes}")


def store_vector(buffer: Any, at: Any, value: Any, lanes: int) -> None:
    """Store a vector to a flat buffer, or a single element."""
    T.buffer_store(buffer, value, [at if lanes == 1 else tirx.Ramp(at, 1, lanes)])


def registers(count: int, lanes: int) -> list[Any]:
    """Return buffers of a vector each that LLVM keeps in registers.

    TVM puts them on the stack, being small and of scope `global`. Others are workspace, where LLVM writes the sums back
    only when the loops of a task end: until then nothing else gets their registers.
    """
    return [T.alloc_buffer((lanes,), "float32") for _ in range(count)]


def add_to(register: Any, product: Any, lanes: int) -> None:
    """Add a product to the sum in a register."""
    store_vector(register, 0, load(register, 0, lanes) + product, lanes)


def activated(value: Any, epilogue: Epilogue, lanes: int) -> Any:
    """Return a vector clipped to an epilogue's bounds."""
    if epilogue.clip_min is not None:
        value = tirx.max(value, splat(epilogue.clip_min, lanes))
    if epilogue.clip_max is not None:
        value = tirx.min(value, splat(epilogue.clip_max, lanes))
    return value


def store_turned(
    vectors: list[Any], buffers: Mapping[str, Any], at: Any, plane: int, epilogue: Epilogue, lanes: int
) -> None:
    """Turn vectors of channels, one for each of `lanes` pixels, and store them through the epilogue.

    The first channel's pixels go to element `at` of `buffers["out"]`, those of the next one `plane` elements further.
    """
    for i, value in enumerate(turned_square(vectors)):
        if epilogue.residual:
            value = value + load(buffers["residual"], at + i * plane, lanes)
        store_vector(buffers["out"], at + i * plane, activated(value, epilogue, lanes), lanes)
