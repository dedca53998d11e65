"""From a 3 x 3 weight tensor to the transformed weights that a Winograd kernel reads.

Transformed weights are 1.8 to 4 times as large as the weights. Builds store `compact_winograd`, the weights in the
kernel's order, and `winograd_expansion` transforms them when the library is first called.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

from tvm_nm.schedules.kept_weights import EXPANDS
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.winograd import WinogradKernel
from tvm_nm.schedules.winograd_points import transform_matrices

__all__ = ["compact_winograd", "pack_winograd", "random_channels", "winograd_expansion"]


def compact_winograd(kernel: WinogradKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (OC, IC, 3, 3) as (blocks, 3, 3, reduction, vectors, lanes), with the table of channels.

    Raises
    ------
    ValueError
        If a block row keeps more input channels than `kernel.kept`.
    """
    if not kernel.block:
        return PackedWeights(_in_blocks(kernel, weights), None)
    rows, channels = -(-weights.shape[0] // kernel.block), weights.shape[1]
    filled = np.zeros((rows * kernel.block, *weights.shape[1:]), np.float32)
    filled[: weights.shape[0]] = weights
    kept = (filled.reshape(rows, kernel.block, channels, -1) != 0).any(axis=(1, 3))
    if kept.sum(axis=1).max(initial=0) > kernel.kept:
        raise ValueError(f"a block row keeps {kept.sum(axis=1).max()} inputs, the kernel was made for {kernel.kept}")
    # Kept channels first, in order; a short row goes on with dropped ones, whose weights are zero.
    table = np.sort(np.argsort(~kept, axis=1, kind="stable")[:, : kernel.kept], axis=1)
    taken = np.take_along_axis(filled, np.repeat(table, kernel.block, axis=0)[:, :, None, None], axis=1)
    return PackedWeights(_in_blocks(kernel, taken), table.astype(kernel.index_dtype))


def _in_blocks(kernel: WinogradKernel, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Bring weights (OC, reduction, 3, 3) into the order of `compact_winograd`."""
    blocks, _, _, reduction, vectors, lanes = kernel.weight_shape
    channels = min(weights.shape[0], blocks * vectors * lanes)
    filled = np.zeros((blocks * vectors * lanes, reduction, 3, 3), np.float32)
    filled[:channels] = weights[:channels]
    split = filled.reshape(blocks, vectors, lanes, reduction, 3, 3)
    return np.ascontiguousarray(split.transpose(0, 4, 5, 3, 1, 2))


def pack_winograd(kernel: WinogradKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Transform weights (OC, IC, 3, 3) and pack them into `WinogradKernel.weight_shape`, with the table of channels.

    Raises
    ------
    ValueError
        If a block row keeps more input channels than `kernel.kept`.
    """
    compact = compact_winograd(kernel, weights)
    matrix = transform_matrices(kernel.tile)[1]
    values = np.einsum("ia,bacrvl,jc->bijrvl", matrix, compact.values.astype(np.float64), matrix, optimize=True)
    return PackedWeights(np.ascontiguousarray(values, np.float32), compact.index)


@lru_cache(maxsize=256)
def winograd_expansion(kernel: WinogradKernel) -> tvm.tirx.PrimFunc:
    """Return the function that transforms what `compact_winograd` packs into `WinogradKernel.weight_shape`.

    It runs once in a library's life, on one thread: vectors over channels, a (m + 2) x (m + 2) square of them at a time
    for each reduction step, in float64 as `pack_winograd`.
    """
    blocks, size, _, reduction, vectors, lanes = kernel.weight_shape
    matrix = transform_matrices(kernel.tile)[1]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        attrs = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8, EXPANDS: True}
        T.func_attr({**attrs, "global_symbol": "main"})
        handles = [T.arg(name, T.handle()) for name in ("weight", "transformed")]
        weight = T.match_buffer(handles[0], (blocks, 3, 3, reduction, vectors, lanes), "float32")
        transformed = T.match_buffer(handles[1], kernel.weight_shape, "float32")
        with T.sblock("root"):  # as TVM's passes expect of a function
            T.reads()
            T.writes()
            with T.grid(blocks, reduction, vectors) as (block, step, vector), T.vectorized(0, lanes) as lane:
                square = [
                    [T.Bind(weight[block, y, x, step, vector, lane].astype("float64")) for x in range(3)]
                    for y in range(3)
                ]
                for i in range(size):
                    row = [T.Bind(_combined(matrix[i], [line[x] for line in square])) for x in range(3)]
                    for j in range(size):
                        value = _combined(matrix[j], row).astype("float32")
                        T.buffer_store(transformed, value, [block, i, j, step, vector, lane])
    return builder.get()


def _combined(coefficients: npt.NDArray[np.float64], values: list[Any]) -> Any:
    terms = [value * tirx.const(float(c), "float64") for c, value in zip(coefficients, values, strict=True) if c]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def random_channels(kernel: WinogradKernel, rng: np.random.Generator) -> npt.NDArray[np.integer] | None:
    """Return a table as `pack_winograd` makes it from weights of a random mask; None for a dense kernel."""
    if kernel.index_shape is None:
        return None
    rows, kept = kernel.index_shape
    table = [np.sort(rng.permutation(kernel.workload.in_channels)[:kept]) for _ in range(rows)]
    return np.stack(table).astype(kernel.index_dtype)
