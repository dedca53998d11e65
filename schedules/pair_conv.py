"""The channel-pair family: N:M convolutions whose output channels are computed two at a time.

    Y[oc, q] = sum over kept (ic, ky, kx) of W[oc, ic, ky, kx] * X[ic, offset(ky, kx) + q]

Vectors run over pixels. Each output channel of an N:M layer keeps inputs of its own, so that computed alone each FMA
needs a load, and the load ports are the limit. Any two channels of a 2:4 layer have a quarter of all inputs in common:
such an input is loaded once for both. Packing chooses, for each block of the reduction anew, the pairs that have most
in common, and sorts each pair's inputs into those of both and those of one; sums may be added up in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm_nm.workload import ConvWorkload

__all__ = ["HEADER", "MOST_ROWS", "NEIGHBOURS", "PairConvKernel"]


@dataclass(frozen=True, slots=True)
class PairConvKernel:
    """A kernel variant of the channel-pair family.

    Attributes
    ----------
    workload
        The convolution: one group, an even number of output channels.
    lanes
        float32 elements of one vector.
    of_group, group
        N and M: an output channel keeps at most N of each M consecutive input channels, at each kernel position.
    tile_pixels
        Output pixels of a register tile; whole rows unless the kernel is 1x1. The last tile of a map may have fewer.
    channels_per_block
        Input channels of the blocks that the reduction is cut into, a multiple of M that divides the input channels.
    pairs_per_task
        Pairs of output channels that one parallel task computes for a tile.

    Raises
    ------
    ValueError
        If it does not fit the workload.
    """

    workload: ConvWorkload
    lanes: int
    of_group: int
    group: int
    tile_pixels: int
    channels_per_block: int
    pairs_per_task: int

    def __post_init__(self) -> None:
        work = self.workload
        fits = (
            work.groups == 1
            and work.out_channels % 2 == 0
            and work.in_channels % self.channels_per_block == 0
            and self.channels_per_block % self.group == 0
            and self.rows_per_block <= MOST_ROWS
            and self.pairs % self.pairs_per_task == 0
            and (work.taps == 1 or self.tile_pixels % work.out_width == 0)
            and min(self.tile_sizes) >= self.lanes
        )
        if not fits:
            raise ValueError(f"{self!r} does not fit")

    @property
    def pairs(self) -> int:
        """Pairs of output channels."""
        return self.workload.out_channels // 2

    @property
    def blocks(self) -> int:
        """Blocks of the reduction."""
        return self.workload.in_channels // self.channels_per_block

    @property
    def rows_per_block(self) -> int:
        """Inputs of a block: rows of the packed tile."""
        return self.channels_per_block * self.workload.taps

    @property
    def kept_per_block(self) -> int:
        """Inputs of a block that an output channel keeps."""
        return self.rows_per_block // self.group * self.of_group

    @property
    def tile_sizes(self) -> tuple[int, ...]:
        """Pixels of the full tiles and, if there is one, of the shorter last one."""
        full, rest = divmod(self.workload.out_pixels, self.tile_pixels)
        return (self.tile_pixels,) * bool(full) + (rest,) * bool(rest)

    @property
    def tiles(self) -> int:
        """Register tiles of a map."""
        return -(-self.workload.out_pixels // self.tile_pixels)

    def vectors(self, pixels: int) -> int:
        """Vectors that hold some pixels; the last one begins early enough to end with them."""
        return -(-pixels // self.lanes)

    @property
    def tasks(self) -> int:
        """Parallel tasks."""
        return self.workload.batch * self.tiles * (self.pairs // self.pairs_per_task)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: (blocks, pairs, kept of a block, channels of a pair)."""
        return (self.blocks, self.pairs, self.kept_per_block, 2)

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Shape of the index table, uint8.

        For each block and pair first how many inputs both channels keep, then the two channels, low byte first; then
        for each weight of either channel the row of its input in the block; the second of an input of both is not read.
        """
        return (self.blocks, self.pairs, HEADER + 2 * self.kept_per_block)

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights and index table."""
        return 4 * math.prod(self.weight_shape) + math.prod(self.index_shape)

    @property
    def is_copied(self) -> bool:
        """Whether the input is copied before the tasks: padded, or split into the phases of a stride."""
        return not self.workload.is_pointwise

    @property
    def phases(self) -> tuple[int, int]:
        """Vertical and horizontal phases of the copy; of a 1x1 kernel's only one is read."""
        work = self.workload
        return work.stride if work.taps > 1 else (1, 1)

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of the copy of one channel and phase."""
        work = self.workload
        rows, columns = (
            out + (size - 1) * dilation // stride
            for out, size, dilation, stride in zip(
                (work.out_height, work.out_width), work.kernel, work.dilation, work.stride, strict=True
            )
        )
        return rows, columns

    @property
    def channel_size(self) -> int:
        """Elements of one channel of what the tasks read."""
        return math.prod(self.phases) * math.prod(self.plane) if self.is_copied else self.workload.out_pixels

    def tap_offset(self, tap: int) -> int:
        """Return how far after an output pixel's place a tap's input lies in the copy of a channel."""
        work = self.workload
        y, x = (at * dilation for at, dilation in zip(divmod(tap, work.kernel[1]), work.dilation, strict=True))
        (phases_y, phases_x), (rows, columns) = self.phases, self.plane
        phase = y % phases_y * phases_x + x % phases_x
        return (phase * rows + y // work.stride[0]) * columns + x // work.stride[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates on kept weights."""
        work = self.workload
        return work.batch * work.out_pixels * work.out_channels * self.kept_per_block * self.blocks

    def __str__(self) -> str:
        return f"channel-pair {self.vectors(self.tile_pixels)} vectors, {self.blocks} blocks"


HEADER = 5
"""Bytes of the table before a pair's inputs."""
MOST_ROWS = 256
"""Rows of a block that the table can tell apart."""
NEIGHBOURS = 256
"""Output channels among which pairs are sought: more gain little, and take time that grows with the square."""
