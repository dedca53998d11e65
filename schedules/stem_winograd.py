"""Winograd kernels for first convolutions: large windows with a stride of 2 over few channels, as 7x7 of ResNet.

    Y[oc, y, x] = sum over (ic, ky, kx) of W[oc, ic, ky, kx] * X[ic, 2 * y + ky - top, 2 * x + kx - left]

Even and odd rows and columns of the input never meet the same weights: with ky = 2 * j + p and kx = 2 * i + q this is
the sum of four convolutions of stride 1, one for each *phase* (p, q), of a quarter of the pixels and of the weights
W[oc, ic, p::2, q::2], of at most r = ceil(k / 2) taps each way. These are computed as F(4 x 4, r x r)
(`winograd_points`), whose products are summed over channels and phases before the transform back. Odd phases of an odd
window have a tap less: they take part in the products of all points but infinity. 7x7 takes 169 multiplications for
each pair of channels and 16 pixels, instead of 784.

Planes, that is channels of phases, lie side by side in vectors for the transform of the input; output channels do
for products and output. A task computes a band of stored rows, a row of tiles at a time, and stores those that the
epilogue's pooling then has all rows for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.stem_conv import least_width
from tvm_nm.schedules.winograd_points import POINTS, transform_matrices
from tvm_nm.workload import ConvWorkload

__all__ = ["STRIDE", "TILE", "Section", "StemWinogradKernel", "pack_stem_winograd", "stem_winograd_applies"]

TILE = 4
"""Rows and columns of sums of a tile."""

STRIDE = 2
"""Rows and columns from window to window, each way; its square is the number of phases."""

_MOST_CHANNELS = 4  # all products of a tile are written out


def stem_winograd_applies(work: ConvWorkload) -> bool:
    """Whether a convolution has a stride of 2, windows for which there are points, and few channels."""
    plain = (work.stride, work.dilation, work.groups) == ((STRIDE, STRIDE), (1, 1), 1)
    return plain and work.in_channels <= _MOST_CHANNELS and all((TILE, -(-k // STRIDE)) in POINTS for k in work.kernel)


@dataclass(frozen=True, slots=True)
class Section:
    """Neighbouring frequencies whose products have the same planes.

    Attributes
    ----------
    first_row, first_column
        The first frequency.
    rows, columns
        How many there are.
    planes
        Which planes they sum over.
    """

    first_row: int
    first_column: int
    rows: int
    columns: int
    planes: tuple[int, ...]

    @property
    def products(self) -> int:
        """Multiplications for each output channel and tile."""
        return self.rows * self.columns * len(self.planes)


@dataclass(frozen=True, slots=True)
class StemWinogradKernel:
    """A kernel variant.

    Attributes
    ----------
    workload
        The convolution, of at least a vector of output channels, whose rows are at least a vector wide, those of the
        input and stored ones.
    lanes
        float32 elements of one vector.
    vectors, tiles
        The register tile of the products: vectors of output channels, a divisor of all, and tiles of a row. The last
        ones of a row begin early enough to be as many.
    rows
        Stored rows of one parallel task; the last may have fewer.

    Raises
    ------
    ValueError
        If it does not fit the workload, or that is not of the family.
    """

    workload: ConvWorkload
    lanes: int
    vectors: int
    tiles: int
    rows: int

    def __post_init__(self) -> None:
        work = self.workload
        fits = (
            stem_winograd_applies(work)
            and work.out_channels >= self.lanes
            and least_width(work) >= self.lanes
            and self.vectors >= 1
            and self.channel_vectors % self.vectors == 0
            and 1 <= self.tiles <= self.tile_columns
            and 1 <= self.rows <= work.stored_shape[2]
        )
        if not fits:
            raise ValueError(f"{self!r} does not fit")

    @property
    def channel_vectors(self) -> int:
        """Vectors of output channels; the last one begins early enough to end with them."""
        return -(-self.workload.out_channels // self.lanes)

    @property
    def groups(self) -> int:
        """Register tiles' worth of vectors of output channels."""
        return self.channel_vectors // self.vectors

    @property
    def bands(self) -> int:
        """Tasks of an image."""
        return -(-self.workload.stored_shape[2] // self.rows)

    @property
    def tasks(self) -> int:
        """Parallel tasks."""
        return self.workload.batch * self.bands

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of a phase's weights, at most."""
        down, across = (-(-k // STRIDE) for k in self.workload.kernel)
        return down, across

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of frequencies, and of the pixels of each plane that a tile reads."""
        down, across = self.taps
        return TILE + down - 1, TILE + across - 1

    @property
    def tile_columns(self) -> int:
        """Tiles of a row."""
        return -(-self.workload.out_width // TILE)

    @property
    def plane_columns(self) -> int:
        """Columns of the padded planes."""
        return self.tile_columns * TILE + self.size[1] - TILE

    @property
    def planes(self) -> int:
        """Elements of a pixel of all planes, empty ones at the end of the last vector included: phase after phase."""
        return -(-(STRIDE**2 * self.workload.in_channels) // self.lanes) * self.lanes

    @property
    def kept_plane_rows(self) -> int:
        """Rows of the planes that are kept: the power of two that holds a tile's."""
        return 1 << (self.size[0] - 1).bit_length()

    @property
    def sum_rows(self) -> int:
        """Rows of sums that a task needs, at most."""
        pool = self.workload.epilogue.pool
        if pool is None:
            return self.rows
        return min(self.workload.out_height, (self.rows - 1) * pool.stride[0] + pool.kernel[0])

    @property
    def ring_rows(self) -> int:
        """Rows of sums that are kept: the power of two that holds a new tile's and those of an unfinished window."""
        pool = self.workload.epilogue.pool
        window = 1 if pool is None else pool.kernel[0]
        return 1 << (TILE + window - 2).bit_length()

    @property
    def scratch_bytes(self) -> int:
        """Bytes that a task works in."""
        down, across = self.size
        planes = self.planes * self.plane_columns * (self.kept_plane_rows + down)
        frequencies = down * across * (self.planes * self.tile_columns + self.tiles * self.vectors * self.lanes)
        sums = self.channel_vectors * self.lanes * self.ring_rows * self.tile_columns * TILE
        return 4 * (planes + frequencies + sums)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The frequencies, in the order of the packed weights."""
        channels = self.workload.in_channels
        parts = []
        for kernel, size in zip(self.workload.kernel, self.size, strict=True):
            all_phases = range(STRIDE)
            odd = kernel % STRIDE != 0  # the last frequency is that of infinity
            parts.append([(0, size - 1, all_phases), (size - 1, 1, range(1))] if odd else [(0, size, all_phases)])
        return tuple(
            Section(
                row,
                column,
                rows,
                columns,
                tuple((STRIDE * p + q) * channels + c for p in phases for q in others for c in range(channels)),
            )
            for row, rows, phases in parts[0]
            for column, columns, others in parts[1]
        )

    @property
    def products(self) -> int:
        """Multiplications for each output channel and tile."""
        return sum(section.products for section in self.sections)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights: flat, (frequency, plane, vector, lane) for each group of vectors."""
        return (self.channel_vectors * self.lanes * self.products,)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the products on wanted tiles and channels."""
        work = self.workload
        tiles = work.batch * -(-work.out_height // TILE) * self.tile_columns
        return tiles * self.products * work.out_channels

    def __str__(self) -> str:
        return f"winograd stem {TILE}x{TILE}, {self.tiles}x{self.vectors}"


def pack_stem_winograd(kernel: StemWinogradKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Transform and pack weights (OC, IC, KH, KW); the last vector repeats channels of the one before, if it must."""
    channels, inputs, lanes = kernel.workload.out_channels, kernel.workload.in_channels, kernel.lanes
    phases = np.zeros((channels, STRIDE**2 * inputs, *kernel.taps))
    for p in range(STRIDE):
        for q in range(STRIDE):
            part = weights[:, :, p::STRIDE, q::STRIDE]
            first = (STRIDE * p + q) * inputs
            phases[:, first : first + inputs, : part.shape[2], : part.shape[3]] = part
    down, across = (transform_matrices(TILE, taps)[1] for taps in kernel.taps)
    transformed = np.einsum("ia,ocab,jb->ijco", down, phases, across, optimize=True)
    starts = [min(vector * lanes, channels - lanes) for vector in range(kernel.channel_vectors)]
    vectors = np.stack([transformed[..., start : start + lanes] for start in starts], axis=-2)
    packed = []
    for first in range(0, kernel.channel_vectors, kernel.vectors):
        group = vectors[..., first : first + kernel.vectors, :]
        for section in kernel.sections:
            rows = slice(section.first_row, section.first_row + section.rows)
            columns = slice(section.first_column, section.first_column + section.columns)
            packed.append(group[rows, columns][:, :, np.array(section.planes)].reshape(-1))
    return PackedWeights(np.concatenate(packed).astype(np.float32), None)
