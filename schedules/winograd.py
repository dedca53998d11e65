"""The Winograd family: dense 3x3, stride 1 convolutions with 2.25 to 4 times fewer multiplications.

    Y = A^T [ sum over ic of (G w G^T) * (B^T d B) ] A      for each m x m tile of outputs (see `winograd_points`)

The sums are (m + 2)^2 independent matrix products, one for each *frequency*: [tiles x IC] times [IC x OC]. Vectors
run over channels in all stages, so any number of tiles fits; the input is transposed into channel vectors as it is
padded, and the output back into rows of pixels as it goes through the epilogue.

Tiles are cut into *chunks* of `chunk_rows` x `chunk_columns`, whose transformed inputs and sums stay in L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tvm
from tvm import te, tirx

from tvm_nm.schedules.conv_arguments import ConvArguments
from tvm_nm.schedules.winograd_output import in_parts, winograd_output
from tvm_nm.schedules.winograd_points import combine_rows, transform_matrices
from tvm_nm.workload import ConvWorkload

__all__ = [
    "WINOGRAD_RULE",
    "WinogradKernel",
    "winograd_applies",
    "winograd_prim_func",
]

WINOGRAD_RULE = "tvm_nm_winograd"


def winograd_applies(work: ConvWorkload) -> bool:
    """Whether a workload is of the family: 3x3, stride 1, no dilation, no groups."""
    return (work.kernel, work.stride, work.dilation, work.groups) == ((3, 3), (1, 1), (1, 1), 1)


@dataclass(frozen=True, slots=True)
class WinogradKernel:
    """A kernel variant: everything that fixes the generated code except its schedule decisions.

    Attributes
    ----------
    workload
        What is computed.
    lanes
        float32 elements of one vector.
    tile
        Output rows and columns of a tile, m.
    chunk_rows, chunk_columns
        Tiles of a chunk, vertically and horizontally.
    oc_vectors
        Channel vectors of the register tile.
    tiles_per_step
        Default tiles of the register tile.
    staged
        Whether each stage runs over all tiles, in parallel over channels and frequencies, before the next begins: for
        maps of few tiles. Otherwise chunks are the parallel tasks.
    block
        Output channels that share their kept input channels, a multiple of `oc_vectors * lanes`; 0 for dense.
    kept
        Input channels that a block row keeps; 0 for dense.
    parts
        Parallel tasks among which a chunk's output channels are divided; each transforms the chunk's input anew, which
        takes less than reading what another core has transformed. A divisor of `oc_blocks`; 1 if staged.

    Raises
    ------
    ValueError
        If the workload is not of the family, it is staged with several chunks or parts, the parts do not divide the
        blocks, or block rows are no whole register tiles.
    """

    workload: ConvWorkload
    lanes: int
    tile: int
    chunk_rows: int
    chunk_columns: int
    oc_vectors: int
    tiles_per_step: int
    staged: bool
    block: int = 0
    kept: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if not winograd_applies(self.workload):
            raise ValueError(f"Winograd kernels are for 3x3, stride 1, no groups: {self.workload}")
        if self.staged and (self.row_chunks > 1 or self.column_chunks > 1 or self.parts > 1):
            raise ValueError("a staged kernel has one chunk")
        if self.parts < 1 or self.oc_blocks % self.parts:
            raise ValueError(f"{self.parts} tasks do not divide {self.oc_blocks} blocks of channels: {self!r}")
        if (self.block > 0) != (self.kept > 0) or self.block % (self.oc_vectors * self.lanes):
            raise ValueError(f"block rows of {self.block} channels are no whole register tiles: {self!r}")

    @property
    def size(self) -> int:
        """Input rows and columns of a tile; its square is the number of frequencies."""
        return self.tile + 2

    @property
    def tile_rows(self) -> int:
        return -(-self._wanted(self.workload.out_height) // self.tile)

    @property
    def tile_columns(self) -> int:
        return -(-self._wanted(self.workload.out_width) // self.tile)

    def _wanted(self, pixels: int) -> int:
        """Return how many output rows or columns are needed: maxima leave an odd last one out."""
        return pixels - pixels % 2 if self.workload.epilogue.pool else pixels

    @property
    def stored_tile(self) -> int:
        """Rows and columns of a tile that are stored."""
        return self.tile // 2 if self.workload.epilogue.pool else self.tile

    @property
    def row_chunks(self) -> int:
        return -(-self.tile_rows // self.chunk_rows)

    @property
    def column_chunks(self) -> int:
        return -(-self.tile_columns // self.chunk_columns)

    @property
    def chunks(self) -> int:
        """Chunks of the whole batch."""
        return self.workload.batch * self.row_chunks * self.column_chunks

    @property
    def chunk_tiles(self) -> int:
        return self.chunk_rows * self.chunk_columns

    @property
    def ic_vectors(self) -> int:
        return -(-self.workload.in_channels // self.lanes)

    @property
    def oc_blocks(self) -> int:
        """Blocks of `oc_vectors` vectors of output channels; the last may be partly empty."""
        return -(-self.workload.out_channels // (self.lanes * self.oc_vectors))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: (blocks, m + 2, m + 2, reduction, vectors, lanes)."""
        return (self.oc_blocks, self.size, self.size, self.reduction, self.oc_vectors, self.lanes)

    @property
    def index_shape(self) -> tuple[int, int] | None:
        """Shape of the table of input channels: (block rows, kept); None for dense."""
        return (-(-self.workload.out_channels // self.block), self.kept) if self.block else None

    @property
    def index_dtype(self) -> str:
        """Integer type of the table; entries are read modulo a power of two, which must not be its whole range."""
        return (
            "uint8"
            if self.workload.in_channels <= 1 << 7
            else "uint16"
            if self.workload.in_channels <= 1 << 15
            else "int32"
        )

    @property
    def reduction(self) -> int:
        """Input channels that a sum adds up."""
        return self.kept or self.workload.in_channels

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the matrix products on wanted tiles and channels."""
        work = self.workload
        tiles = work.batch * self.tile_rows * self.tile_columns
        return tiles * self.size**2 * self.reduction * work.out_channels

    def __str__(self) -> str:
        place = "staged" if self.staged else f"{self.chunk_rows}x{self.chunk_columns} tiles"
        place += f", {self.parts} parts" if self.parts > 1 else ""
        how = "channel " if self.block else ""
        return f"winograd {self.tile}x{self.tile}, {self.tiles_per_step}x{self.oc_vectors} {how}{place}"


@lru_cache(maxsize=256)
def winograd_prim_func(kernel: WinogradKernel) -> tvm.tirx.PrimFunc:
    """Return the unscheduled PrimFunc of a kernel variant.

    Its arguments are those of `conv.conv_prim_func`, with the weights as `WinogradKernel.weight_shape` and the table as
    `WinogradKernel.index_shape`.
    """
    arguments = ConvArguments.of(kernel.workload, kernel.weight_shape, kernel.index_shape, kernel.index_dtype)
    frequencies = _input_transform(kernel, _channel_vectors(kernel, arguments.data))
    sums = _products(kernel, frequencies, arguments.weight, arguments.index)
    return arguments.func(winograd_output(kernel, sums, arguments.bias, arguments.residual))


def _channel_vectors(kernel: WinogradKernel, data: te.Tensor) -> te.Tensor:
    """Return each chunk's padded input as vectors of channels.

    Its shape is (batch, chunk row, chunk column, IC / lanes, row, column, lane). Where the map has rows of at least a
    vector, those of a chunk are turned to vectors first, as many pixels of each as it needs at most.
    """
    work, lanes, tile = kernel.workload, kernel.lanes, kernel.tile
    top, left, _, _ = work.padding
    down, across = kernel.chunk_rows * tile, kernel.chunk_columns * tile
    outer = (work.batch, kernel.row_chunks, kernel.column_chunks, kernel.ic_vectors, down + 2)
    width = min(work.width, across + 2)

    def first(cx: Any) -> Any:
        return tirx.max(tirx.min(cx * across - left, work.width - width), 0)

    def turned(n: Any, cy: Any, cx: Any, block: Any, row: Any, column: Any, lane: Any) -> Any:
        y = tirx.max(tirx.min(cy * down + row - top, work.height - 1), 0)
        return data[n, block * lanes + lane, y, first(cx) + column]

    # Chunks that each need all of a row would turn the same pixels: their rows cannot be tensorized.
    apart = kernel.column_chunks == 1 or width < work.width
    whole = width >= lanes and work.in_channels % lanes == 0 and apart
    rows = te.compute((*outer, width, lanes), turned, name="rows") if whole else None

    def element(n: Any, cy: Any, cx: Any, block: Any, row: Any, column: Any, lane: Any) -> Any:
        y, x, c = cy * down + row - top, cx * across + column - left, block * lanes + lane
        inside = tirx.all(y >= 0, y < work.height, x >= 0, x < work.width)
        if work.in_channels % lanes:
            inside = tirx.all(c < work.in_channels, inside)
        if rows is None:
            value = data[n, c, y, x]
        else:
            # A remainder tells TVM's region analysis that it may be any pixel of the row.
            at = tirx.indexmod(x - first(cx), 1 << (width - 1).bit_length())
            value = rows[n, cy, cx, block, row, at, lane]
        return tirx.if_then_else(inside, value, tirx.const(0.0, "float32"))

    return te.compute((*outer, across + 2, lanes), element, name="pixels")


def _input_transform(kernel: WinogradKernel, pixels: te.Tensor) -> te.Tensor:
    """Return `B^T d B` of every tile: (batch, chunk row, chunk column, i, j, tile, channel)."""
    work, size, tile, lanes = kernel.workload, kernel.size, kernel.tile, kernel.lanes
    matrix = transform_matrices(tile)[2]
    columns, tiles = kernel.chunk_columns, kernel.chunk_tiles

    def by_rows(n: Any, cy: Any, cx: Any, t: Any, i: Any, b: Any, block: Any, lane: Any) -> Any:
        y, x = tirx.indexdiv(t, columns) * tile, tirx.indexmod(t, columns) * tile
        return combine_rows(matrix, i, lambda a: pixels[n, cy, cx, block, y + a, x + b, lane])

    outer = (work.batch, kernel.row_chunks, kernel.column_chunks)
    half = in_parts((*outer, tiles, size, size, kernel.ic_vectors, lanes), 5, by_rows, "input_rows")

    def by_columns(n: Any, cy: Any, cx: Any, i: Any, j: Any, t: Any, block: Any, lane: Any) -> Any:
        return combine_rows(matrix, j, lambda b: half(n, cy, cx, t, i, b, block, lane))

    return te.compute((*outer, size, size, tiles, kernel.ic_vectors, lanes), by_columns, name="frequencies")


def _products(kernel: WinogradKernel, frequencies: te.Tensor, weight: te.Tensor, index: te.Tensor | None) -> te.Tensor:
    """Return the sums over input channels: (batch, chunk row, chunk column, block, i, j, tile, vector, lane)."""
    work, lanes = kernel.workload, kernel.lanes
    ic = te.reduce_axis((0, kernel.reduction), name="ic")

    def channel_of(block: Any) -> Any:
        if index is None:
            return ic
        row = tirx.indexdiv(block * (kernel.oc_vectors * lanes), kernel.block)
        # A remainder tells TVM's region analysis what a table may hold.
        return tirx.indexmod(index[row, ic].astype("int32"), 1 << (work.in_channels - 1).bit_length())

    def product(n: Any, cy: Any, cx: Any, block: Any, i: Any, j: Any, t: Any, vector: Any, lane: Any) -> Any:
        channel = channel_of(block)
        x = frequencies[n, cy, cx, i, j, t, tirx.indexdiv(channel, lanes), tirx.indexmod(channel, lanes)]
        return te.sum(x * weight[block, i, j, ic, vector, lane], axis=[ic])

    shape = (
        work.batch,
        kernel.row_chunks,
        kernel.column_chunks,
        kernel.oc_blocks,
        kernel.size,
        kernel.size,
        kernel.chunk_tiles,
        kernel.oc_vectors,
        lanes,
    )
    attrs = {
        "schedule_rule": WINOGRAD_RULE,
        "tvm_nm_chunk_rows": kernel.chunk_rows,
        "tvm_nm_chunk_columns": kernel.chunk_columns,
        "tvm_nm_tiles_per_step": kernel.tiles_per_step,
        "tvm_nm_staged": int(kernel.staged),
        "tvm_nm_parts": kernel.parts,
    }
    return te.compute(shape, product, name="sums", attrs=attrs)
