"""A tensor intrinsic that turns channel vectors into rows of pixels with shuffles.

LLVM compiles a strided copy to one scalar load and one insertion for each element. A network of two-operand shuffles
needs `log2(lanes)` of them for each vector, a quarter of an instruction for each element with 16 lanes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

__all__ = ["register_named_intrinsics", "transpose_intrinsic", "turned_square"]

_NAME = re.compile(r"tvm_nm_(transpose|interleave)_(\d+)_(\d+(?:x\d+)*)")


@lru_cache(maxsize=256)
def transpose_intrinsic(lanes: int, *shape: int, to_rows: bool = True) -> str | None:
    """Register and name the intrinsic of `target[lane, *pixel] = source[*pixel, lane]`, float32, both contiguous.

    With `to_rows` false it is the opposite, `target[*pixel, lane] = source[lane, *pixel]`; the source may have a single
    row of pixels, whose axis the target lacks, at any distance from channel to channel.

    Returns None where there are fewer pixels than lanes, or an axis of one pixel, which tensorize cannot match.
    """
    if math.prod(shape) < lanes or 1 in (shape if to_rows else shape[-1:]):
        return None
    name = f"tvm_nm_{'transpose' if to_rows else 'interleave'}_{lanes}_{'x'.join(map(str, shape))}"
    description, implementation = (_function(lanes, shape, body, to_rows) for body in (_copy, _shuffle_tiles))
    s_tir.TensorIntrin.register(name, description, implementation, override=True)
    return name


def register_named_intrinsics(text: str) -> None:
    """Register the intrinsics that a text names: records of schedules cannot be read in a process that lacks them."""
    for name, lanes, shape in set(_NAME.findall(text)):
        transpose_intrinsic(int(lanes), *map(int, shape.split("x")), to_rows=name == "transpose")


def _function(lanes: int, shape: tuple[int, ...], body: Callable[[Any, Any, bool], None], to_rows: bool) -> Any:
    vectors, rows = (*(shape[1:] if shape[0] == 1 else shape), lanes), (lanes, *shape)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("transpose")
        shapes = (vectors, rows) if to_rows else (rows, vectors)
        # A single row of pixels of each channel may be part of a plane.
        strides = [T.int32(), T.int32(), 1] if not to_rows and len(shape) == 2 and shape[0] == 1 else None
        source = T.match_buffer(T.arg("source", T.handle()), shapes[0], "float32", strides=strides, offset_factor=1)
        target = T.match_buffer(T.arg("target", T.handle()), shapes[1], "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(source[tuple(slice(0, extent) for extent in shapes[0])])
            T.writes(target[tuple(slice(0, extent) for extent in shapes[1])])
            body(source, target, to_rows)
    return builder.get()


def _copy(source: Any, target: Any, to_rows: bool) -> None:
    with T.grid(*target.shape) as loops, T.sblock("turned"):
        at = T.axis.remap("S" * len(loops), list(loops))
        unit = [0] * (len(source.shape) - len(at))
        value = source[tuple(at[1:] + at[:1] if to_rows else at[-1:] + unit + at[:-1])]
        T.reads(value)
        T.writes(target[tuple(at)])
        T.buffer_store(target, value, at)


def _shuffle_tiles(source: Any, target: Any, to_rows: bool) -> None:
    """Transpose `lanes` pixels at a time; the last tile begins early enough to be whole."""
    lanes, *shape = (int(extent) for extent in (target if to_rows else source).shape)
    pixels, width = math.prod(shape), shape[-1]

    def at(pixel: Any) -> list[Any]:
        return (
            [pixel] if len(shape) == 1 or shape[0] == 1 else [tirx.indexdiv(pixel, width), tirx.indexmod(pixel, width)]
        )

    with T.serial(0, -(-pixels // lanes)) as tile:
        start = T.Bind(tirx.min(tile * lanes, tirx.IntImm("int32", pixels - lanes)))
        *row, column = at(start)
        if to_rows:
            rows = [T.Bind(source.vload((*at(start + i), 0), f"float32x{lanes}")) for i in range(lanes)]
            for lane, values in enumerate(turned_square(rows)):
                T.buffer_store(target, values, [lane, *row, tirx.Ramp(column, 1, lanes)])
        else:
            row = row or [0] * (len(shape) - 1)
            rows = [T.Bind(source.vload((lane, *row, column), f"float32x{lanes}")) for lane in range(lanes)]
            for i, values in enumerate(turned_square(rows)):
                T.buffer_store(target, values, [*at(start + i), tirx.Ramp(0, 1, lanes)])


def turned_square(rows: list[Any]) -> list[Any]:
    """Return the columns of a square of vectors.

    Two stages transpose 4x4 squares within chunks of 4 lanes, the rest transposes whole chunks: each step is one
    instruction of SSE, AVX or AVX-512 (unpack, then permutations of 128-bit chunks) without an index vector.
    """
    lanes = len(rows)
    chunks = range(0, lanes, 4)
    low, high = ([start + i + of for start in chunks for i in pair for of in (0, lanes)] for pair in ((0, 1), (2, 3)))
    pairs = [[_shuffle(a, b, low), _shuffle(a, b, high)] for a, b in _in_pairs(rows)]
    first, second = (
        [start + i + of for start in chunks for of in (0, lanes) for i in pair] for pair in ((0, 1), (2, 3))
    )
    squares = [
        [_shuffle(a, b, half) for a, b in zip(upper, lower, strict=True) for half in (first, second)]
        for upper, lower in _in_pairs(pairs)
    ]
    columns = [_transpose_chunks([square[j] for square in squares], lanes // 4) for j in range(4)]
    return [columns[lane % 4][lane // 4] for lane in range(lanes)]


def _transpose_chunks(vectors: list[Any], chunks: int) -> list[Any]:
    """Return the columns of a square of `chunks` vectors of as many chunks of 4 lanes; halves it in each recursion."""
    if len(vectors) == 1:
        return vectors
    even, odd = ([4 * chunk + i for chunk in range(parity, 2 * chunks, 2) for i in range(4)] for parity in (0, 1))
    evens, odds = (
        _transpose_chunks([_shuffle(a, b, half) for a, b in _in_pairs(vectors)], chunks) for half in (even, odd)
    )
    return [column for pair in zip(evens, odds, strict=True) for column in pair]


def _shuffle(a: Any, b: Any, lanes: list[int]) -> Any:
    return T.Bind(tirx.Shuffle([a, b], [tirx.IntImm("int32", lane) for lane in lanes]))


def _in_pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))
