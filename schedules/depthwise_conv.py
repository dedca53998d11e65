"""The depthwise family: every output channel sums over the window of one input channel.

    Y[c, y, x] = sum over (ky, kx) of W[c, ky, kx] * X[c, y * sy + ky * dy - top, x * sx + kx * dx - left]

Vectors run over channels, though the tensors are (N, C, H, W): both sides are transposed in registers, squares of lanes
each. Between them a pixel is one aligned vector, whatever the map's width, stride and dilation, and what lies in
the padding is skipped instead of multiplied by zeros. With vectors over pixels, rows of 7 fill 7 of 16 lanes, and most
loads straddle cache lines; the transposes cost less than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.workload import ConvWorkload

__all__ = ["DepthwiseKernel", "is_depthwise", "pack_depthwise"]


def is_depthwise(work: ConvWorkload) -> bool:
    """Whether each output channel has an input channel of its own."""
    return work.groups == work.in_channels == work.out_channels


@dataclass(frozen=True, slots=True)
class DepthwiseKernel:
    """A kernel variant of the depthwise family.

    Attributes
    ----------
    workload
        The convolution: depthwise, of at least a vector of channels.
    lanes
        float32 elements of one vector.
    columns
        Output pixels of a register tile: a part of a row. The last of a row may have fewer.
    rows
        Output rows of a band, whose sums are transposed together. The last band begins early enough to be as large.
        Bands of less than a map read their inputs from a ring of rows, which are at least a vector wide.
    bands_per_task
        Bands that one parallel task computes, each with the input rows that the one before left in the ring.

    Raises
    ------
    ValueError
        If it does not fit the workload.
    """

    workload: ConvWorkload
    lanes: int
    columns: int
    rows: int
    bands_per_task: int = 1

    def __post_init__(self) -> None:
        work = self.workload
        fits = (
            is_depthwise(work)
            and work.in_channels >= self.lanes
            and work.height * work.width >= self.lanes
            and self.rows * work.out_width >= self.lanes
            and (self.is_whole or work.width >= self.lanes)
            and 1 <= self.columns <= work.out_width
            and 1 <= self.rows <= work.out_height
            and 1 <= self.bands_per_task <= self.bands
        )
        if not fits:
            raise ValueError(f"{self!r} does not fit")

    @property
    def blocks(self) -> int:
        """Vectors of channels; the last one begins early enough to end with them."""
        return -(-self.workload.in_channels // self.lanes)

    @property
    def bands(self) -> int:
        """Bands of a map."""
        return -(-self.workload.out_height // self.rows)

    @property
    def is_whole(self) -> bool:
        """Whether the whole map is one band."""
        return self.rows == self.workload.out_height

    @property
    def parts(self) -> int:
        """Tasks of a vector of channels."""
        return -(-self.bands // self.bands_per_task)

    @property
    def tasks(self) -> int:
        """Parallel tasks."""
        return self.workload.batch * self.blocks * self.parts

    @property
    def in_rows(self) -> int:
        """Input rows that a band's windows reach, those in the padding included."""
        work = self.workload
        return (self.rows - 1) * work.stride[0] + (work.kernel[0] - 1) * work.dilation[0] + 1

    @property
    def ring_rows(self) -> int:
        """Input rows that are kept as vectors of channels: all of them, or the power of two that holds a band's."""
        if self.is_whole:
            return self.workload.height
        return min(self.workload.height, 1 << (self.in_rows - 1).bit_length())

    @property
    def scratch_bytes(self) -> int:
        """Bytes of inputs and sums that a task works on."""
        work = self.workload
        return 4 * self.lanes * (self.ring_rows * work.width + self.rows * work.out_width)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: (vectors of channels, taps, lanes)."""
        return (self.blocks, self.workload.taps, self.lanes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates, those with zeros of the padding included, as layers are counted."""
        return self.workload.macs

    def __str__(self) -> str:
        bands = "" if self.is_whole else f", bands of {self.rows} rows"
        return f"depthwise channel-vector 1x{self.columns}{bands}"


def pack_depthwise(kernel: DepthwiseKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (C, 1, KH, KW) for `kernel`; the last vector repeats channels of the one before, if it must."""
    channels, lanes = kernel.workload.out_channels, kernel.lanes
    starts = [min(block * lanes, channels - lanes) for block in range(kernel.blocks)]
    flat = weights.reshape(channels, -1)
    return PackedWeights(np.stack([flat[start : start + lanes].T for start in starts]), None)
