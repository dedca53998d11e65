"""The channel-vector convolution family: vectors run over output channels, inputs are broadcast.

    Y[oc, y, x] = sum over kept (ic, ky, kx) of W[oc, ic, ky, kx] * X[ic, y * stride + ky, x * stride + kx]

The pixel-vector family (`conv`) wastes lanes where the pixels of a map are no multiple of the vector: 49 pixels fill 4
vectors of 16 to 77%. Here a register tile is some vectors of output channels times some pixels, of any number, and
nothing is computed for nothing. Inputs are read one at a time, so a stride needs no phases and a map without padding no
copy. A step of the reduction needs one weight vector for each vector of channels, packed in the order of their use. All
channels of a vector share their kept positions: dense, or 1xN with N a multiple of the vector's lanes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import tvm
from tvm import te, tirx

from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.conv_arguments import ConvArguments
from tvm_nm.schedules.epilogue import activate
from tvm_nm.schedules.row_copy import ROW_COPY, Columns
from tvm_nm.workload import ConvWorkload

__all__ = ["CHANNEL_CONV_RULE", "ChannelConvKernel", "channel_conv_prim_func", "store_turned", "turned_sums"]

CHANNEL_CONV_RULE = "tvm_nm_channel_conv"


@dataclass(frozen=True, slots=True)
class ChannelConvKernel:
    """A kernel variant of the channel-vector family.

    Attributes
    ----------
    workload
        The convolution. A pointwise one may have been reshaped to a single row of pixels.
    lanes
        float32 elements of one vector.
    index
        Which inputs a block row reads: all (`NONE`), or those in its table. With more than one tap there always is a
        table of positions, which the block rows of a dense layer share: an offset that is loaded keeps LLVM from
        recognising inputs that neighbouring taps have in common, and from spilling sums to hold on to them.
    vectors
        Vectors of output channels of the register tile.
    block
        Output channels of a block row, a multiple of `vectors * lanes`. The last row of a group may have fewer; the
        rest is computed with zero weights.
    kept
        Length of a block row's reduction: input channels of a 1x1 convolution, positions of others.
    index_dtype
        Integer type of the index table.
    tile_rows, tile_columns
        Default pixels of the register tile; the last tile of a row or column may have fewer.
    kept_per_block
        Default length of the blocks that the reduction is cut into, a divisor of `kept`. The weights of a block stay in
        the first-level cache while all pixels use them.
    """

    workload: ConvWorkload
    lanes: int
    index: IndexKind
    vectors: int
    block: int
    kept: int
    index_dtype: str
    tile_rows: int
    tile_columns: int
    kept_per_block: int

    @property
    def block_rows(self) -> int:
        """Block rows of one group."""
        return -(-self.workload.out_channels_per_group // self.block)

    @property
    def oc_tile(self) -> int:
        """Output channels of the register tile."""
        return self.vectors * self.lanes

    @property
    def tiles(self) -> int:
        """Register tiles of a block row's channels."""
        return self.block // self.oc_tile

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: (groups, block rows, tiles, kept, vectors, lanes)."""
        return (self.workload.groups, self.block_rows, self.tiles, self.kept, self.vectors, self.lanes)

    @property
    def index_shape(self) -> tuple[int, int, int] | None:
        if self.index is IndexKind.NONE:
            return None if self.workload.taps == 1 else (self.workload.groups, 1, self.kept)
        return (self.workload.groups, self.block_rows, self.kept)

    @property
    def reads_input_directly(self) -> bool:
        """Whether no padded copy is needed. A table of positions needs the copy's flat axis."""
        return self.workload.padding == (0, 0, 0, 0) and self.workload.taps == 1

    def tap_offset(self, ky: int, kx: int) -> int:
        """Offset of a tap in the padded copy of its channel."""
        return ky * self.workload.dilation[0] * self.workload.reach[1] + kx * self.workload.dilation[1]

    @property
    def channel_stride(self) -> int:
        """What the index of one channel's input differs by from the next one's in a table of positions."""
        return math.prod(self.workload.reach)

    @property
    def macs(self) -> int:
        """Multiply-accumulates on kept weights, padding of short rows included."""
        work = self.workload
        return work.batch * work.out_pixels * work.out_channels * self.kept

    def __str__(self) -> str:
        copy = "direct" if self.reads_input_directly else "padded"
        return f"channel-vector {self.vectors}x{self.tile_rows * self.tile_columns} {self.index.value} {copy}"


class ChannelTile(Protocol):
    """How a kernel with vectors of output channels splits a group's channels: rows of blocks, tiles, vectors."""

    @property
    def workload(self) -> ConvWorkload: ...
    @property
    def lanes(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def oc_tile(self) -> int: ...


@lru_cache(maxsize=512)
def channel_conv_prim_func(kernel: ChannelConvKernel) -> tvm.tirx.PrimFunc:
    """Return the unscheduled PrimFunc of a kernel variant.

    Its arguments are those of `conv.conv_prim_func`, with the weights as `ChannelConvKernel.weight_shape`.
    """
    arguments = ConvArguments.of(kernel.workload, kernel.weight_shape, kernel.index_shape, kernel.index_dtype)
    sums = _sums(kernel, _source(kernel, arguments.data), arguments.weight, arguments.index)
    return arguments.func(store_turned(kernel, turned_sums(sums), arguments.bias, arguments.residual))


def _source(kernel: ChannelConvKernel, data: te.Tensor) -> te.Tensor:
    """Return what the kernel reads: the input, or its padded copy, (N, C, rows, columns) or flat (N, element)."""
    if kernel.reads_input_directly:
        return data
    work = kernel.workload
    top, left, _, _ = work.padding
    rows, columns = work.reach

    def element(n: Any, c: Any, row: Any, column: Any) -> Any:
        y, x = row - top, column - left
        inside = tirx.all(y >= 0, y < work.height, x >= 0, x < work.width)
        return tirx.if_then_else(inside, data[n, c, y, x], tirx.const(0.0, "float32"))

    elements = work.batch * work.in_channels * rows * columns
    attrs: dict[str, Any] = {ROW_COPY: Columns(kernel.lanes, work.width, left, 1, 1).attribute(elements)}
    if work.taps == 1:
        return te.compute((work.batch, work.in_channels, rows, columns), element, name="pad", attrs=attrs)

    def flat_element(n: Any, flat: Any) -> Any:
        row = tirx.indexmod(tirx.indexdiv(flat, columns), rows)
        return element(n, tirx.indexdiv(flat, rows * columns), row, tirx.indexmod(flat, columns))

    shape = (work.batch, work.in_channels * rows * columns)
    attrs["tvm_nm_plane"] = [work.in_channels, rows, columns]
    return te.compute(shape, flat_element, name="pad", attrs=attrs)


def _sums(kernel: ChannelConvKernel, source: te.Tensor, weight: te.Tensor, index: te.Tensor | None) -> te.Tensor:
    work = kernel.workload
    kept = te.reduce_axis((0, kernel.kept), name="kept")

    def product(n: Any, g: Any, row: Any, tile: Any, v: Any, y: Any, x: Any, lane: Any) -> Any:
        top, left = y * work.stride[0], x * work.stride[1]
        start = g * work.in_channels_per_group + kept
        if index is not None:
            start = index[g, 0 if kernel.index is IndexKind.NONE else row, kept].astype("int32")
        value = source[n, start, top, left] if work.taps == 1 else source[n, start + top * work.reach[1] + left]
        return te.sum(weight[g, row, tile, kept, v, lane] * value, axis=[kept])

    shape = (
        work.batch,
        work.groups,
        kernel.block_rows,
        kernel.tiles,
        kernel.vectors,
        work.out_height,
        work.out_width,
        kernel.lanes,
    )
    attrs = {
        "schedule_rule": CHANNEL_CONV_RULE,
        "tvm_nm_tile_rows": kernel.tile_rows,
        "tvm_nm_tile_columns": kernel.tile_columns,
        "tvm_nm_kept_per_block": kernel.kept_per_block,
        "tvm_nm_block": kernel.block,
    }
    return te.compute(shape, product, name="sums", attrs=attrs)


def turned_sums(sums: te.Tensor) -> te.Tensor:
    """Return the sums with the pixels innermost; a single row of pixels has no vertical axis."""
    n, g, rows, tiles, vectors, height, width, lanes = sums.shape
    pixels = (width,) if int(height) == 1 else (height, width)

    def element(n: Any, g: Any, row: Any, tile: Any, v: Any, lane: Any, *at: Any) -> Any:
        y, x = at if len(at) == 2 else (0, *at)
        return sums[n, g, row, tile, v, y, x, lane]

    return te.compute((n, g, rows, tiles, vectors, lanes, *pixels), element, name="turned")


def store_turned(kernel: ChannelTile, turned: te.Tensor, bias: te.Tensor, residual: te.Tensor | None) -> te.Tensor:
    """Return the output of (n, group, row, tile, vector, lane, pixel): cropped, through the epilogue."""
    work, lanes = kernel.workload, kernel.lanes
    per_group = work.out_channels_per_group

    def element(n: Any, oc: Any, y: Any, x: Any) -> Any:
        in_group = tirx.indexmod(oc, per_group)
        in_row = tirx.indexmod(in_group, kernel.block)
        in_tile = tirx.indexmod(in_row, kernel.oc_tile)
        channel = (
            tirx.indexdiv(oc, per_group),
            tirx.indexdiv(in_group, kernel.block),
            tirx.indexdiv(in_row, kernel.oc_tile),
            tirx.indexdiv(in_tile, lanes),
            tirx.indexmod(in_tile, lanes),
        )
        value = turned[(n, *channel, x) if work.out_height == 1 else (n, *channel, y, x)]
        value = value + bias[oc]
        if residual is not None:
            value = value + residual[n, oc, y, x]
        return activate(value, work.epilogue)

    return te.compute(work.output_shape, element, name="out")
