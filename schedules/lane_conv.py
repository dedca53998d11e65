"""The lane-select convolution family: vectors run over output channels, each lane picks an input of its own.

    Y[oc, y, x] = sum over (16 input channels, ky, kx), over the J kept of them, of W[oc, ...] * X[lane[oc, ...], ...]

N:M sparsity leaves each output channel a choice of its own, so that vectors over pixels need a load for every FMA, and
the loads limit them. Here the values of as many input channels as a vector has lanes lie in one vector, one for each
pixel, and a permutation (`vpermps`) hands each output channel's lane the input that it keeps. A step is one permutation
and one FMA for 16 useful multiply-accumulates, whatever N and M are, as long as M divides the lanes.

The input is transposed to vectors of channels first, with shuffles, and padded by copying whole vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tvm
from tvm import te, tirx

from tvm_nm.schedules.channel_conv import store_turned, turned_sums
from tvm_nm.schedules.conv_arguments import ConvArguments
from tvm_nm.workload import ConvWorkload

__all__ = ["LANE_CONV_RULE", "PERMUTATIONS", "LaneConvKernel", "lane_conv_prim_func"]

LANE_CONV_RULE = "tvm_nm_lane_conv"

PERMUTATIONS = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}
"""LLVM's name of the permutation of a vector's lanes by a vector of indices, by the number of lanes."""


@dataclass(frozen=True, slots=True)
class LaneConvKernel:
    """A kernel variant of the lane-select family.

    Attributes
    ----------
    workload
        The convolution. A pointwise one may have been reshaped to a single row of pixels.
    lanes
        float32 elements of one vector.
    vectors
        Vectors of output channels of the register tile.
    per_vector
        Weights that an output channel keeps of each vector of input channels, at each kernel position; 8 for 2:4 and 16
        lanes.
    tile_rows, tile_columns
        Default pixels of the register tile; the last tile of a row or column may have fewer.
    kept_per_block
        Default length of the blocks that the reduction is cut into, a divisor of `kept`. The weights of a block stay in
        the first-level cache while all pixels use them.
    """

    workload: ConvWorkload
    lanes: int
    vectors: int
    per_vector: int
    tile_rows: int
    tile_columns: int
    kept_per_block: int

    @property
    def in_vectors(self) -> int:
        """Vectors of a group's input channels; the last is filled up with zeros."""
        return -(-self.workload.in_channels_per_group // self.lanes)

    @property
    def kept(self) -> int:
        """Length of the reduction."""
        return self.in_vectors * self.workload.taps * self.per_vector

    @property
    def block(self) -> int:
        """Output channels of a register tile; those of a group's last one that do not exist are dropped."""
        return self.vectors * self.lanes

    @property
    def oc_tile(self) -> int:
        return self.block

    @property
    def block_rows(self) -> int:
        """Register tiles of a group's output channels."""
        return -(-self.workload.out_channels_per_group // self.block)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights and of the lanes they take: (groups, block rows, 1, kept, vectors, lanes)."""
        return (self.workload.groups, self.block_rows, 1, self.kept, self.vectors, self.lanes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates on kept weights."""
        return self.workload.batch * self.workload.out_pixels * self.workload.out_channels * self.kept

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights and of the lanes they take."""
        return 5 * math.prod(self.weight_shape)

    def __str__(self) -> str:
        return f"lane-select {self.vectors}x{self.tile_rows * self.tile_columns} {self.per_vector} of {self.lanes}"


@lru_cache(maxsize=512)
def lane_conv_prim_func(kernel: LaneConvKernel) -> tvm.tirx.PrimFunc:
    """Return the unscheduled PrimFunc of a kernel variant.

    Its arguments are those of `conv.conv_prim_func`; the index table has the shape of the weights, uint8, and holds the
    lane that each weight takes.

    The permutation is written for one lane and means something once the lanes are vectorised, as the template does.
    """
    arguments = ConvArguments.of(kernel.workload, kernel.weight_shape, kernel.weight_shape, "uint8")
    assert arguments.index is not None
    sums = _sums(kernel, _source(kernel, arguments.data), arguments.weight, arguments.index)
    return arguments.func(store_turned(kernel, turned_sums(sums), arguments.bias, arguments.residual))


def _source(kernel: LaneConvKernel, data: te.Tensor) -> te.Tensor:
    """Return the input in vectors of channels: (N, vectors of all groups, rows, columns, lanes)."""
    work, lanes = kernel.workload, kernel.lanes
    vectors, per_group = kernel.in_vectors, work.in_channels_per_group

    def channel(vector: Any, lane: Any) -> Any:
        return tirx.indexdiv(vector, vectors) * per_group + tirx.indexmod(vector, vectors) * lanes + lane

    def element(n: Any, vector: Any, *place: Any) -> Any:
        *pixel, lane = place
        value = data[n, channel(vector, lane), pixel[0] if len(pixel) == 2 else 0, pixel[-1]]
        if per_group % lanes == 0:
            return value
        inside = tirx.indexmod(vector, vectors) * lanes + lane < per_group
        return tirx.if_then_else(inside, value, tirx.const(0.0, "float32"))

    # The axis of a single row would keep the transposition from being tensorized.
    pixels = (work.width,) if work.height == 1 else (work.height, work.width)
    shape = (work.batch, work.groups * vectors, *pixels, lanes)
    attrs = {"tvm_nm_whole_vectors": int(per_group % lanes == 0)}
    interleaved = te.compute(shape, element, name="interleaved", attrs=attrs)
    if not any(work.padding):
        return interleaved
    top, left, _, _ = work.padding

    def padded(n: Any, vector: Any, row: Any, column: Any, lane: Any) -> Any:
        y, x = row - top, column - left
        inside = tirx.all(y >= 0, y < work.height, x >= 0, x < work.width)
        value = interleaved[n, vector, x, lane] if work.height == 1 else interleaved[n, vector, y, x, lane]
        return tirx.if_then_else(inside, value, tirx.const(0.0, "float32"))

    return te.compute((work.batch, work.groups * vectors, *work.reach, lanes), padded, name="pad")


def _sums(kernel: LaneConvKernel, source: te.Tensor, weight: te.Tensor, index: te.Tensor) -> te.Tensor:
    work = kernel.workload
    kept = te.reduce_axis((0, kernel.kept), name="kept")
    permutation = PERMUTATIONS[kernel.lanes]

    def product(n: Any, g: Any, row: Any, tile: Any, v: Any, y: Any, x: Any, lane: Any) -> Any:
        # One axis for everything: were the weights of an input vector a loop of their own, LLVM would keep the inputs
        # of a tile in registers, and spill sums for them.
        position = tirx.indexdiv(kept, kernel.per_vector)
        tap = tirx.indexmod(position, work.taps)
        vector = g * kernel.in_vectors + tirx.indexdiv(position, work.taps)
        top = y * work.stride[0] + tirx.indexdiv(tap, work.kernel[1]) * work.dilation[0]
        left = x * work.stride[1] + tirx.indexmod(tap, work.kernel[1]) * work.dilation[1]
        value = source[n, vector, left, lane] if len(source.shape) == 4 else source[n, vector, top, left, lane]
        place = (g, row, tile, kept, v, lane)
        picked = tirx.call_llvm_pure_intrin("float32", permutation, value, index[place].astype("int32"))
        return te.sum(weight[place] * picked, axis=[kept])

    shape = (
        work.batch,
        work.groups,
        kernel.block_rows,
        1,
        kernel.vectors,
        work.out_height,
        work.out_width,
        kernel.lanes,
    )
    attrs = {
        "schedule_rule": LANE_CONV_RULE,
        "tvm_nm_tile_rows": kernel.tile_rows,
        "tvm_nm_tile_columns": kernel.tile_columns,
        "tvm_nm_kept_per_block": kernel.kept_per_block,
        "tvm_nm_block": kernel.block,
    }
    return te.compute(shape, product, name="sums", attrs=attrs)
