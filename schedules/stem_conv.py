"""The stem family: convolutions of few input channels and large maps, as networks begin with.

    Y[oc, y, x] = sum over (ky, ic, kx) of W[oc, ic, ky, kx] * X[ic, y * sy + ky * dy - top, x * sx + kx * dx - left]

Vectors run over output channels and inputs are broadcast, as in `channel_conv`, so a stride needs no phases and rows of
any width fill their registers. Maps are large: a task computes a band of output rows, a few vectors of channels at a
time, and turns each row to pixels as it stores it. Channels being vectors, a max pooling behind the convolution takes
maxima of whole vectors, whatever its stride, of rows that are still in the cache; only what it leaves is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.workload import ConvWorkload

__all__ = ["StemKernel", "least_width", "pack_stem", "stem_applies", "stem_offsets"]

_L2_BYTES = 2 << 20
_MOST_CHANNELS = 16
_MOST_STEPS = 1024


def stem_applies(work: ConvWorkload) -> bool:
    """Whether a convolution has windows and few input channels, as those that networks begin with."""
    few = work.in_channels <= _MOST_CHANNELS and work.in_channels * work.taps <= _MOST_STEPS
    return few and work.groups == 1 and work.taps > 1


def least_width(work: ConvWorkload) -> int:
    """Return the shortest run of pixels that vectors load or store."""
    return min(work.stored_shape[3], work.width, work.reach[1] - work.padding[1])


@dataclass(frozen=True, slots=True)
class StemKernel:
    """A kernel variant of the stem family.

    Attributes
    ----------
    workload
        The convolution: of windows, without groups, of at least a vector of output channels, whose rows are at least a
        vector wide, those of the input and stored ones.
    lanes
        float32 elements of one vector.
    vectors, columns
        The register tile: vectors of output channels, a divisor of all, and pixels of a row. The last tile of a row
        begins early enough to be as large: with a shorter one LLVM would merge it, and spill.
    rows
        Stored rows of one parallel task; the last may have fewer.

    Raises
    ------
    ValueError
        If it does not fit the workload.
    """

    workload: ConvWorkload
    lanes: int
    vectors: int
    columns: int
    rows: int

    def __post_init__(self) -> None:
        work = self.workload
        fits = (
            work.groups == 1
            and work.out_channels >= self.lanes
            and least_width(work) >= self.lanes
            and self.vectors >= 1
            and self.channel_vectors % self.vectors == 0
            and 1 <= self.columns <= work.out_width
            and 1 <= self.rows <= work.stored_shape[2]
        )
        if not fits:
            raise ValueError(f"{self!r} does not fit")

    @property
    def channel_vectors(self) -> int:
        """Vectors of output channels; the last one begins early enough to end with them."""
        return -(-self.workload.out_channels // self.lanes)

    @property
    def bands(self) -> int:
        """Tasks of an image."""
        return -(-self.workload.stored_shape[2] // self.rows)

    @property
    def tasks(self) -> int:
        """Parallel tasks."""
        return self.workload.batch * self.bands

    @property
    def steps(self) -> int:
        """Length of the reduction."""
        return self.workload.in_channels * self.workload.taps

    @property
    def sum_rows(self) -> int:
        """Rows of sums that a task computes, at most."""
        pool = self.workload.epilogue.pool
        if pool is None:
            return self.rows
        return min(self.workload.out_height, (self.rows - 1) * pool.stride[0] + pool.kernel[0])

    @property
    def ring_rows(self) -> int:
        """Rows of sums that are kept: one, or the power of two that holds a pooling window's."""
        pool = self.workload.epilogue.pool
        return 1 if pool is None else 1 << (pool.kernel[0] - 1).bit_length()

    @property
    def in_rows(self) -> int:
        """Rows of the padded input that a task reads."""
        work = self.workload
        return (self.sum_rows - 1) * work.stride[0] + (work.kernel[0] - 1) * work.dilation[0] + 1

    @property
    def in_row(self) -> int:
        """Elements of a row of the padded input: its columns, channel after channel."""
        return self.workload.in_channels * self.workload.reach[1]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of a task's padded input."""
        return 4 * self.in_rows * self.in_row

    @property
    def fetches_output(self) -> bool:
        """Whether lines of the output are fetched before they are written: those beyond L2, of short reductions.

        Long ones leave the processor time enough to wait for lines beside the sums of the next row.
        """
        stored = 4 * math.prod(self.workload.stored_shape)
        return stored > _L2_BYTES and self.steps <= 2 * self.vectors * self.lanes

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: flat, (steps, vectors, lanes) for each group of vectors of a register tile."""
        return (self.channel_vectors * self.steps * self.lanes,)

    @property
    def index_shape(self) -> tuple[int]:
        """Shape of the table of offsets."""
        return (self.steps,)

    @property
    def index_dtype(self) -> str:
        """Integer type of the table."""
        return "uint16" if int(stem_offsets(self)[-1]) < 1 << 16 else "int32"

    @property
    def macs(self) -> int:
        """Multiply-accumulates, as layers are counted."""
        return self.workload.macs

    def __str__(self) -> str:
        return f"stem channel-vector {self.vectors}x{self.columns}"


def stem_offsets(kernel: StemKernel) -> npt.NDArray[np.int64]:
    """Return where a window finds its (ky, ic, kx) in the padded input of a task: (row, channel, column)."""
    work = kernel.workload
    rows = np.arange(work.kernel[0]) * (work.dilation[0] * kernel.in_row)
    channels = np.arange(work.in_channels) * work.reach[1]
    columns = np.arange(work.kernel[1]) * work.dilation[1]
    return (rows[:, None, None] + channels[:, None] + columns).reshape(-1)


def pack_stem(kernel: StemKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (OC, IC, KH, KW) for `kernel`; the last vector repeats channels of the one before, if it must."""
    channels, lanes = kernel.workload.out_channels, kernel.lanes
    flat = weights.transpose(2, 1, 3, 0).reshape(kernel.steps, channels)
    starts = [min(vector * lanes, channels - lanes) for vector in range(kernel.channel_vectors)]
    vectors = np.stack([flat[:, start : start + lanes] for start in starts], axis=1)
    groups = [vectors[:, at : at + kernel.vectors].reshape(-1) for at in range(0, len(starts), kernel.vectors)]
    return PackedWeights(np.concatenate(groups), stem_offsets(kernel).astype(kernel.index_dtype))
