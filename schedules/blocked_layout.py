"""Copies between (N, C, H, W) and blocked tensors (N, C / lanes, H, W, lanes).

`lanes` pixels of as many channels at a time are turned by shuffles.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

from tvm_nm.schedules.chain import blocked_shape
from tvm_nm.schedules.transpose import turned_square

__all__ = ["blocked_layout_func"]


@lru_cache(maxsize=256)
def blocked_layout_func(
    shape: tuple[int, int, int, int], lanes: int, *, to_blocked: bool, threads: int
) -> tvm.tirx.PrimFunc:
    """Return the function that copies a tensor (N, C, H, W) to the blocked layout, or back.

    Parameters
    ----------
    shape
        (N, C, H, W).
    lanes
        Channels of a block.
    to_blocked
        Which way. Channels that fill up the last block are written as zeros.
    threads
        How many tasks are worth making.
    """
    batch, channels, height, width = shape
    pixels, vectors = height * width, -(-channels // lanes)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8, "global_symbol": "main"})
        handles = [T.arg(name, T.handle()) for name in ("source", "target")]
        shapes = [shape, blocked_shape(shape, lanes)]
        buffers = [
            T.match_buffer(handle, of, "float32")
            for handle, of in zip(handles, shapes if to_blocked else shapes[::-1], strict=True)
        ]
        with T.sblock("root"):  # as TVM's passes expect of a function
            T.reads()
            T.writes()
            source, target = (T.decl_buffer((math.prod(b.shape),), "float32", data=b.data) for b in buffers)
            plain, blocked = (source, target) if to_blocked else (target, source)
            loop = T.parallel if threads > 1 and batch * vectors * lanes * pixels >= 1 << 14 else T.serial
            with loop(0, batch * vectors) as task:
                image, vector = tirx.indexdiv(task, vectors), tirx.indexmod(task, vectors)
                rows = (image * channels + vector * lanes) * pixels
                block = task * (pixels * lanes)

                def copy(count: int) -> None:
                    if pixels < lanes:
                        _one_by_one(plain, blocked, rows, block, pixels, lanes, count, to_blocked)
                    else:
                        _squares(plain, blocked, rows, block, pixels, lanes, count, to_blocked)

                last = channels - (vectors - 1) * lanes
                if last == lanes:
                    copy(lanes)
                else:
                    with T.If(vector < vectors - 1):
                        with T.Then():
                            copy(lanes)
                        with T.Else():
                            copy(last)
    return builder.get()


def _squares(
    plain: Any, blocked: Any, rows: Any, block: Any, pixels: int, lanes: int, count: int, to_blocked: bool
) -> None:
    """Copy `lanes` pixels of `count` channels at a time; the last square begins early enough to be whole."""
    kind = f"float32x{lanes}"
    with T.serial(0, -(-pixels // lanes)) as square:
        start = T.Bind(tirx.min(square * lanes, tirx.IntImm("int32", pixels - lanes)))
        in_rows = [rows + i * pixels + start for i in range(lanes)]
        in_block = [block + (start + i) * lanes for i in range(lanes)]
        if to_blocked:
            zeros = tirx.Broadcast(tirx.const(0.0, "float32"), lanes)
            vectors = [T.Bind(plain.vload([in_rows[i]], kind)) if i < count else zeros for i in range(lanes)]
            places, buffer = in_block, blocked
        else:
            vectors = [T.Bind(blocked.vload([at], kind)) for at in in_block]
            places, buffer = in_rows[:count], plain
        for at, value in zip(places, turned_square(vectors), strict=False):
            T.buffer_store(buffer, value, [tirx.Ramp(at, 1, lanes)])


def _one_by_one(
    plain: Any, blocked: Any, rows: Any, block: Any, pixels: int, lanes: int, count: int, to_blocked: bool
) -> None:
    with T.serial(0, pixels) as p:
        for lane in range(lanes if to_blocked else count):
            at, in_block = rows + lane * pixels + p, block + p * lanes + lane
            if to_blocked:
                T.buffer_store(blocked, plain[at] if lane < count else tirx.const(0.0, "float32"), [in_block])
            else:
                T.buffer_store(plain, blocked[in_block], [at])
