"""The convolution family: one TE computation for dense, grouped, depthwise and sparse convolutions.

    Y[q, oc] = sum over kept (ic, ky, kx) of W[oc, ic, ky, kx] * X[ic, offset(ky, kx) + q]

with q a virtual pixel (see `geometry`). Vectors run over pixels, so every sparsity pattern vectorises: a weight is a
broadcast scalar, and N output channels that share their kept positions (a *block row*) share each load of X. Dense is
the same loop nest with every position present and no index table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import tvm
from tvm import te, tirx

from tvm_nm.schedules.conv_arguments import ConvArguments
from tvm_nm.schedules.decisions import MOST_ACCUMULATORS, task_rows
from tvm_nm.schedules.epilogue import activate
from tvm_nm.schedules.flat_rows import flat_row, with_flat_output
from tvm_nm.schedules.geometry import CopyScope, PixelGeometry
from tvm_nm.schedules.padded_rows import flattened_input, padded_input
from tvm_nm.schedules.row_copy import LONGEST_STRIDE
from tvm_nm.workload import ConvWorkload

__all__ = ["CONV_RULE", "ConvKernel", "IndexKind", "conv_prim_func", "padded_input", "tap_position"]

CONV_RULE = "tvm_nm_conv"


class IndexKind(str, Enum):
    """How a kernel finds the input of its weights."""

    NONE = "none"
    """Every input channel and tap in order: dense."""
    CHANNEL = "channel"
    """A table of input channels, all taps of each: whole kernels were dropped."""
    POSITION = "position"
    """A table of offsets, one for each kept (input channel, tap)."""


@dataclass(frozen=True, slots=True)
class ConvKernel:
    """A kernel variant: everything that fixes a convolution's generated code except its schedule decisions.

    Attributes
    ----------
    geometry
        Holds the workload (perhaps reshaped) and the pixel layout.
    index
        How inputs are found.
    block
        Output channels of a block row; the last of a group may be shorter.
    oc_tile
        Output channels of the register tile; a block row is `ceil(block / oc_tile)` tiles.
    kept
        Length of a block row's reduction: input channels (`NONE`, `CHANNEL`) or positions (`POSITION`).
    index_dtype
        Integer type of the index table.
    vectors_per_tile
        Default pixel vectors of the register tile.
    rows_per_task
        Default block rows that one parallel task computes.
    kept_per_block
        Default length of the blocks that the reduction is cut into, a divisor of `kept`; 0 sums the whole reduction in
        registers.
    """

    geometry: PixelGeometry
    index: IndexKind
    block: int
    oc_tile: int
    kept: int
    index_dtype: str
    vectors_per_tile: int
    rows_per_task: int
    kept_per_block: int = 0

    @property
    def workload(self) -> ConvWorkload:
        return self.geometry.workload

    @property
    def block_rows(self) -> int:
        """Block rows of one group."""
        return -(-self.workload.out_channels_per_group // self.block)

    @property
    def tiles(self) -> int:
        """Register tiles of a block row."""
        return -(-self.block // self.oc_tile)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: (groups, reduction blocks, block rows, tiles, reduction..., oc_tile).

        All block rows of a reduction block follow one another, as they are used: one stream.
        """
        taps = () if self.index is IndexKind.POSITION else self.workload.kernel
        rows = (self.reduction_blocks, self.block_rows, self.tiles, self.kept // self.reduction_blocks)
        return (self.workload.groups, *rows, *taps, self.oc_tile)

    @property
    def index_shape(self) -> tuple[int, ...] | None:
        """Shape of the index table: (groups, reduction blocks, block rows, kept of a block)."""
        if self.index is IndexKind.NONE:
            return None
        blocks = self.reduction_blocks
        return (self.workload.groups, blocks, self.block_rows, self.kept // blocks)

    @property
    def reduction_blocks(self) -> int:
        """Blocks that the packed weights cut the reduction into."""
        return self.kept // self.kept_per_block if self.kept_per_block else 1

    @property
    def kept_channels(self) -> int:
        """Input channels that a block row reads; of positions, as many as they would fill."""
        return -(-self.kept // self.workload.taps) if self.index is IndexKind.POSITION else self.kept

    @property
    def stores_from_registers(self) -> bool:
        """Whether sums go through the epilogue to the output without a scratch: whole vectors, whole tiles."""
        return (
            self.geometry.stores_vectors
            and not self.kept_per_block
            and self.workload.out_channels_per_group % self.block == 0
            and self.block % self.oc_tile == 0
        )

    @property
    def task_rows(self) -> list[int]:
        """Block rows that one parallel task may compute."""
        return task_rows(self.block_rows, self.workload.groups, stores_from_registers=self.stores_from_registers)

    @property
    def panel(self) -> int:
        """Pixels of a register tile."""
        return self.vectors_per_tile * self.geometry.lanes

    @property
    def gathers_panels(self) -> bool:
        """Whether panels are packed from what a stride leaves of the input, without a copy: where it is read once."""
        packs_once = self.geometry.copy is CopyScope.CHUNK and self.rows_per_task == self.block_rows
        return packs_once and self.geometry.subsampled and self.workload.stride[1] <= LONGEST_STRIDE

    @property
    def channel_stride(self) -> int:
        """What the index of one channel's input differs by from the next one's (`POSITION`)."""
        return 1 if self.geometry.flat else self.geometry.channel_size

    @property
    def macs(self) -> int:
        """Multiply-accumulates on kept weights, padding of short rows included, thrown-away pixels not."""
        work = self.workload
        taps = 1 if self.index is IndexKind.POSITION else work.taps
        return work.batch * work.out_pixels * work.out_channels * self.kept * taps

    def __str__(self) -> str:
        copy = self.geometry.copy.value
        return f"pixel-vector {self.oc_tile}x{self.vectors_per_tile} {self.index.value} {copy}"


@lru_cache(maxsize=512)
def conv_prim_func(kernel: ConvKernel) -> tvm.tirx.PrimFunc:
    """Return the unscheduled PrimFunc of a kernel variant.

    Its arguments, in order: data (N, C, H, W); packed weights (`ConvKernel.weight_shape`); the index table
    (`ConvKernel.index_shape`) unless the kernel is dense; bias (OC,); the residual (N, OC, OH, OW) if the epilogue adds
    one; the output (N, OC, OH, OW). All float32 but the table.
    """
    work = kernel.workload
    arguments = ConvArguments.of(work, kernel.weight_shape, kernel.index_shape, kernel.index_dtype)
    sums = _sums(kernel, arguments.data, arguments.weight, arguments.index)
    if not kernel.geometry.stores_vectors:
        return arguments.func(_store(kernel, sums, arguments.bias, arguments.residual))
    func = arguments.func(_store_vectors(kernel, sums, arguments.bias, arguments.residual))
    return with_flat_output(func, kernel.geometry, work.output_shape)


def _sums(kernel: ConvKernel, data: te.Tensor, weight: te.Tensor, index: te.Tensor | None) -> te.Tensor:
    work, geometry = kernel.workload, kernel.geometry
    lanes, pitch = geometry.lanes, geometry.pitch
    if geometry.flat:
        source = flat_row(geometry, kernel.panel, data, gathers=kernel.gathers_panels)
    else:
        source = flattened_input(geometry, data) if kernel.index is IndexKind.POSITION else padded_input(geometry, data)
    kept = te.reduce_axis((0, kernel.kept), name="kept")
    ky = te.reduce_axis((0, work.kernel[0]), name="ky")
    kx = te.reduce_axis((0, work.kernel[1]), name="kx")
    length = kernel.kept // kernel.reduction_blocks
    cut, at = (0, kept) if length == kernel.kept else (tirx.indexdiv(kept, length), tirx.indexmod(kept, length))

    def within_input(channel: Any) -> Any:
        """Return `channel`, such that TVM's region analysis sees that a task's copy holds no more than all channels.

        It knows no bounds of what a table holds, but that a remainder is less than its divisor: a power of two, so that
        the remainder costs a single bitwise and.
        """
        if geometry.copy in (CopyScope.TASK, CopyScope.TILE, CopyScope.CHUNK):
            return tirx.indexmod(channel, 1 << (work.in_channels - 1).bit_length())
        return channel

    def read_flat(n: Any, channel: Any, chunk: Any, v: Any, lane: Any) -> Any:
        if geometry.copy is CopyScope.TILE:
            return source[n, channel, 0, 0, chunk * pitch + v * lanes + lane]
        if geometry.copy is CopyScope.CHUNK:
            tile, in_tile = tirx.indexdiv(v, kernel.vectors_per_tile), tirx.indexmod(v, kernel.vectors_per_tile)
            return source[n, chunk, tile, channel, in_tile * lanes + lane]
        # Beyond the first row: the rows of a plane follow one another.
        return source[n, channel, 0, geometry.output_pixel(chunk, v, lane)]

    def read(n: Any, chunk: Any, g: Any, row: Any, v: Any, lane: Any) -> Any:
        pixel = geometry.virtual_pixel(chunk, v, lane)
        if kernel.index is IndexKind.POSITION:
            assert index is not None
            start = index[g, cut, row, at].astype("int32")
            if geometry.flat:
                return read_flat(n, within_input(start), chunk, v, lane)
            return source[n, start + pixel]
        if index is None:
            channel = g * work.in_channels_per_group + kept
        else:
            channel = within_input(index[g, cut, row, at].astype("int32"))
        if geometry.flat:
            return read_flat(n, channel, chunk, v, lane)
        phase, tap = tap_position(geometry, ky, kx)
        q = tap + pixel
        return source[n, channel, phase, tirx.indexdiv(q, pitch), tirx.indexmod(q, pitch)]

    def product(n: Any, chunk: Any, g: Any, row: Any, tile: Any, o: Any, v: Any, lane: Any) -> Any:
        x = read(n, chunk, g, row, v, lane)
        if kernel.index is IndexKind.POSITION:
            return te.sum(weight[g, cut, row, tile, at, o] * x, axis=[kept])
        return te.sum(weight[g, cut, row, tile, at, ky, kx, o] * x, axis=[kept, ky, kx])

    shape = (
        work.batch,
        geometry.chunks,
        work.groups,
        kernel.block_rows,
        kernel.tiles,
        kernel.oc_tile,
        geometry.vectors,
        lanes,
    )
    attrs = {
        "schedule_rule": CONV_RULE,
        "tvm_nm_vectors_per_tile": kernel.vectors_per_tile,
        "tvm_nm_rows_per_task": kernel.rows_per_task,
        "tvm_nm_kept_per_block": kernel.kept_per_block,
        "tvm_nm_store_from_registers": int(kernel.stores_from_registers),
        "tvm_nm_block": kernel.block,
        "tvm_nm_groups": work.groups,
        "tvm_nm_copy_scope": list(CopyScope).index(geometry.copy),
        # Of what is stored: of vectors, a chunk is a row.
        "tvm_nm_rows_per_chunk": 1 if geometry.stores_vectors else geometry.rows_per_chunk,
        "tvm_nm_tile_vectors": geometry.tile_vectors(max(kernel.vectors_per_tile, MOST_ACCUMULATORS // kernel.oc_tile)),
        # How far the index table's entries of neighbouring channels are apart, for who makes one up to measure with.
        "tvm_nm_index_step": kernel.channel_stride if kernel.index is IndexKind.POSITION else 1,
        "tvm_nm_taps": 0 if kernel.index is IndexKind.POSITION else work.taps,
    }
    return te.compute(shape, product, name="sums", attrs=attrs)


def tap_position(geometry: PixelGeometry, ky: Any, kx: Any) -> tuple[Any, Any]:
    """Return the phase that a tap reads and its offset from a virtual pixel in it; ky and kx are reduction axes."""
    work = geometry.workload
    if work.taps == 1:
        return 0, 0
    y = ky * work.dilation[0]
    column_phase, column = geometry.tap_column(kx)
    phase = tirx.indexmod(y, work.stride[0]) * geometry.phase_columns + column_phase
    return phase, tirx.indexdiv(y, work.stride[0]) * geometry.pitch + column


def _store(kernel: ConvKernel, sums: te.Tensor, bias: te.Tensor, residual: te.Tensor | None) -> te.Tensor:
    """Return the output (N, OC, OH, OW): sums of the wanted pixels through the epilogue."""
    work, geometry = kernel.workload, kernel.geometry
    lanes, rows = geometry.lanes, geometry.rows_per_chunk

    def element(n: Any, oc: Any, y: Any, x: Any) -> Any:
        pixel = tirx.indexmod(y, rows) * geometry.pitch + x
        place = (tirx.indexdiv(pixel, lanes), _lane_of(pixel, geometry))
        value = sums(n, tirx.indexdiv(y, rows), *_channel_place(kernel, oc), *place) + bias[oc]
        if residual is not None:
            value = value + residual[n, oc, y, x]
        return activate(value, work.epilogue)

    return te.compute(work.output_shape, element, name="out")


def _store_vectors(kernel: ConvKernel, sums: te.Tensor, bias: te.Tensor, residual: te.Tensor | None) -> te.Tensor:
    """Return what goes to the output, chunk by chunk: (N, OC, chunks, pixels of a chunk)."""
    work, geometry = kernel.workload, kernel.geometry

    def element(n: Any, oc: Any, chunk: Any, pixel: Any) -> Any:
        place = (tirx.indexdiv(pixel, geometry.lanes), tirx.indexmod(pixel, geometry.lanes))
        value = sums(n, chunk, *_channel_place(kernel, oc), *place) + bias[oc]
        if residual is not None:
            value = value + residual[n, oc, 0, geometry.output_pixel(chunk, *place)]
        return activate(value, work.epilogue)

    return te.compute((work.batch, work.out_channels, geometry.chunks, geometry.chunk_pixels), element, name="out")


def _channel_place(kernel: ConvKernel, oc: Any) -> tuple[Any, ...]:
    """Return the group, block row, register tile and place in it of an output channel."""
    per_group = kernel.workload.out_channels_per_group
    in_group = tirx.indexmod(oc, per_group)
    in_row = tirx.indexmod(in_group, kernel.block)
    return (
        tirx.indexdiv(oc, per_group),
        tirx.indexdiv(in_group, kernel.block),
        tirx.indexdiv(in_row, kernel.oc_tile),
        tirx.indexmod(in_row, kernel.oc_tile),
    )


def _lane_of(pixel: Any, geometry: PixelGeometry) -> Any:
    """Return pixel mod lanes, such that TVM's region analysis always sees whole vectors.

    Where the wanted columns are fewer than the lanes and rows start on whole vectors, the analysis would narrow the
    sums to those columns, and odd vector widths compile to slow code; it does not look through a bitwise and.
    """
    if geometry.workload.out_width < geometry.lanes:
        return tirx.bitwise_and(pixel, tirx.const(geometry.lanes - 1, "int32"))
    return tirx.indexmod(pixel, geometry.lanes)
