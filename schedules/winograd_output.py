"""The output stages of Winograd kernels: the transform back, maxima, the epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import te, tirx

from tvm_nm.schedules.epilogue import activate
from tvm_nm.schedules.winograd_points import combine_columns, transform_matrices

if TYPE_CHECKING:
    from tvm_nm.schedules.winograd import WinogradKernel

__all__ = ["in_parts", "winograd_output"]

_STACK_BYTES = 1023  # what TVM keeps on the stack at most; the rest is allocated on a heap


def winograd_output(kernel: WinogradKernel, sums: te.Tensor, bias: te.Tensor, residual: te.Tensor | None) -> te.Tensor:
    """Return the output (N, OC, height, width) of the sums of all frequencies, through the epilogue."""
    return _store(kernel, _output_transform(kernel, sums), bias, residual)


def _output_transform(kernel: WinogradKernel, sums: te.Tensor) -> te.Tensor:
    """Return `A^T s A`: (batch, chunk row, chunk column, block, vector, tile row, p, tile column, q, lane).

    If the epilogue takes maxima, those of squares of 2x2 pixels: bias and activation grow with what they are applied
    to, also when rounded, and give the same afterwards.
    """
    work, size, tile, lanes = kernel.workload, kernel.size, kernel.tile, kernel.lanes
    matrix = transform_matrices(tile)[0]
    columns = kernel.chunk_columns
    outer = (work.batch, kernel.row_chunks, kernel.column_chunks, kernel.oc_blocks, kernel.oc_vectors)

    def by_rows(n: Any, cy: Any, cx: Any, block: Any, vector: Any, t: Any, p: Any, j: Any, lane: Any) -> Any:
        return combine_columns(matrix, p, lambda i: sums[n, cy, cx, block, i, j, t, vector, lane])

    half = in_parts((*outer, kernel.chunk_tiles, tile, size, lanes), 7, by_rows, "output_rows")

    def pixel(chunk: Any, ty: Any, p: Any, tx: Any, q: Any, lane: Any) -> Any:
        return combine_columns(matrix, q, lambda j: half(*chunk, ty * columns + tx, p, j, lane))

    def stored(*at: Any) -> Any:
        *chunk, ty, p, tx, q, lane = at
        if not kernel.workload.epilogue.pool:
            return pixel(chunk, ty, p, tx, q, lane)
        one, two, three, four = (pixel(chunk, ty, 2 * p + a, tx, 2 * q + b, lane) for a in (0, 1) for b in (0, 1))
        return tirx.max(tirx.max(one, two), tirx.max(three, four))

    shape = (*outer, kernel.chunk_rows, kernel.stored_tile, columns, kernel.stored_tile, lanes)
    return te.compute(shape, stored, name="tiles")


def in_parts(shape: tuple[int, ...], axis: int, value: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Compute a half-transformed tile so that LLVM keeps it in registers; returns a function of the value's indices.

    It removes what is on the stack, not what is on a heap. So there is a stage for each few columns of a tile.

    Parameters
    ----------
    shape
        Of all values. The last axis is of the lanes.
    axis
        That of the tile's columns, a number when the function is called; the one before has its rows.
    value
        What is computed.
    name
        What the stages' names begin with.
    """
    columns, rows, lanes = shape[axis], shape[axis - 1], shape[-1]
    most = max(1, _STACK_BYTES // (4 * rows * lanes))
    count = -(-columns // -(-columns // most))
    parts = []
    for start in range(0, columns, count):

        def part(*at: Any) -> Any:
            return value(*at[:axis], at[axis] + start, *at[axis + 1 :])  # noqa: B023 -- called right away

        size = min(count, columns - start)
        parts.append(te.compute((*shape[:axis], size, *shape[axis + 1 :]), part, name=f"{name}_{start}"))

    def element(*at: Any) -> Any:
        number, column = divmod(at[axis], count)
        place = (*at[:axis], column, *at[axis + 1 :])
        return parts[number][place]

    return element


def _store(kernel: WinogradKernel, tiles: te.Tensor, bias: te.Tensor, residual: te.Tensor | None) -> te.Tensor:
    work, lanes, columns, tile = kernel.workload, kernel.lanes, kernel.chunk_columns, kernel.stored_tile
    rows_of_chunk, columns_of_chunk = kernel.chunk_rows * tile, columns * tile
    per_block = kernel.oc_vectors * lanes

    def element(n: Any, oc: Any, y: Any, x: Any) -> Any:
        in_rows, in_columns = tirx.indexmod(y, rows_of_chunk), tirx.indexmod(x, columns_of_chunk)
        value = tiles[
            n,
            tirx.indexdiv(y, rows_of_chunk),
            tirx.indexdiv(x, columns_of_chunk),
            tirx.indexdiv(oc, per_block),
            tirx.indexdiv(tirx.indexmod(oc, per_block), lanes),
            tirx.indexdiv(in_rows, tile),
            tirx.indexmod(in_rows, tile),
            tirx.indexdiv(in_columns, tile),
            tirx.indexmod(in_columns, tile),
            tirx.indexmod(oc, lanes),
        ]
        value = value + bias[oc]
        if residual is not None:
            value = value + residual[n, oc, y, x]
        return activate(value, work.epilogue)

    return te.compute(work.stored_shape, element, name="out")
