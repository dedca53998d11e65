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

_NAME = re.compile(r"tvm_nm_transpose_(\d+)_(\d+(?:x\d+)*)")


@lru_cache(maxsize=256)
def transpose_intrinsic(lanes: int, *shape: int) -> str | None:
    """Register and name the intrinsic of `target[lane, *pixel] = source[*pixel, lane]`, float32, both contiguous.

    Returns None where there are fewer pixels than lanes, or an axis of one pixel, which tensorize cannot match.
    """
    if math.prod(shape) < lanes or 1 in shape:
        return None
    name = f"tvm_nm_transpose_{lanes}_{'x'.join(map(str, shape))}"
    description, implementation = _function(lanes, shape, _copy), _function(lanes, shape, _shuffle_tiles)
    s_tir.TensorIntrin.register(name, description, implementation, override=True)
    return name


def register_named_intrinsics(text: str) -> None:
    """Register the intrinsics that a text names: records of schedules cannot be read in a process that lacks them."""
    for lanes, shape in set(_NAME.findall(text)):
        transpose_intrinsic(int(lanes), *map(int, shape.split("x")))


def _function(lanes: int, shape: tuple[int, ...], body: Callable[[Any, Any], None]) -> Any:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("transpose")
        source = T.match_buffer(T.arg("source", T.handle()), (*shape, lanes), "float32", offset_factor=1)
        target = T.match_buffer(T.arg("target", T.handle()), (lanes, *shape), "float32", offset_factor=1)
        with T.sblock("root"):
            pixels, vector = tuple(slice(0, extent) for extent in shape), (slice(0, lanes),)
            T.reads(source[pixels + vector])
            T.writes(target[vector + pixels])
            body(source, target)
    return builder.get()


def _copy(source: Any, target: Any) -> None:
    with T.grid(*target.shape) as loops, T.sblock("turned"):
        at = T.axis.remap("S" * len(loops), list(loops))
        value = source[tuple(at[1:] + at[:1])]
        T.reads(value)
        T.writes(target[tuple(at)])
        T.buffer_store(target, value, at)


def _shuffle_tiles(source: Any, target: Any) -> None:
    """Transpose `lanes` pixels at a time; the last tile begins early enough to be whole."""
    lanes, *shape = (int(extent) for extent in target.shape)
    pixels, width = math.prod(shape), shape[-1]

    def at(pixel: Any) -> list[Any]:
        return [pixel] if len(shape) == 1 else [tirx.indexdiv(pixel, width), tirx.indexmod(pixel, width)]

    with T.serial(0, -(-pixels // lanes)) as tile:
        start = T.Bind(tirx.min(tile * lanes, tirx.IntImm("int32", pixels - lanes)))
        rows = [T.Bind(source.vload((*at(start + i), 0), f"float32x{lanes}")) for i in range(lanes)]
        *row, column = at(start)
        for lane, values in enumerate(turned_square(rows)):
            T.buffer_store(target, values, [lane, *row, tirx.Ramp(column, 1, lanes)])


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
