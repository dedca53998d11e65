"""Where the pixels of a windowed operator lie: virtual pixels, stride phases, row chunks.

A window operator (convolution, depthwise convolution, pooling) reads its input through a zero-padded copy whose rows
have a common *pitch*. Output pixel (y, x) is *virtual pixel* q = y * pitch + x, and tap (ky, kx) of that pixel reads
the copy at q + offset(ky, kx): all pixels of a tap are contiguous, whatever the kernel's size. The pitch - OW columns
between two rows are computed too and thrown away; that is the price.

A stride s splits the copy into s*s *phases* (input rows congruent mod s, columns likewise), so that each tap of a
strided window again reads one phase contiguously.

Output rows are cut into *chunks* of `rows_per_chunk`. A chunk is one unit of parallel work and its sums live in a
scratch buffer that fits the cache; its pixels are counted in vectors of the machine's lanes.

Rows of one or two whole vectors can be *aligned*: their vectors hold the pixels of the output only, none of the columns
between rows, and go through the epilogue to the output without a scratch.

A pointwise convolution needs none of this: its pixels are read as one *flat* row of OH * OW, cut into whole vectors.
Where the pixels are no multiple of the lanes, the last vector starts early enough to end with them, and what it
shares with the one before is computed twice. The row is read in place, or each register tile's pixels are packed first:
a vector of each input channel, one after another, as matrix multiplications do (Goto and van de Geijn, ACM TOMS 2008).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from tvm import tirx

from tvm_nm.workload import ConvWorkload

__all__ = ["FLAT_SCOPES", "CopyScope", "PixelGeometry", "candidate_geometries"]

_MAX_COLUMN_COPIES = 3
# Of wider rows the columns between them are less than what tiles of whole rows cost.
_MOST_ALIGNED_VECTORS = 2


class CopyScope(str, Enum):
    """Who copies the input before it is read."""

    NONE = "direct"
    """Nobody: a flat row is read in place."""
    LAYER = "padded"
    """One padded copy serves all tasks, made before them."""
    TASK = "own"
    """Each task makes a padded copy of the rows that it reads: it stays in the cache, its planes are close."""
    TILE = "packed"
    """The pixels of each register tile of a flat row are packed for all the channels that the task computes."""
    CHUNK = "panels"
    """All register tiles of a chunk are packed first; each tile of channels then goes over all of them."""


FLAT_SCOPES = (CopyScope.NONE, CopyScope.TILE, CopyScope.CHUNK)
"""Of a flat row; the others are of padded rows."""


@dataclass(frozen=True, slots=True)
class PixelGeometry:
    """The pixel side of a kernel.

    Attributes
    ----------
    workload
        What is computed.
    lanes
        float32 elements of one vector.
    pitch
        Elements from one row of the padded copy to the next.
    rows_per_chunk
        Output rows of one chunk.
    copy
        Who copies the input.
    flat
        The pixels are one row; a chunk is `pitch` of them. For 1x1 kernels without padding; others are padded.
    column_copies
        Hold one copy of the input for each kernel column, shifted so that every tap column starts where its pixels do.
        Then no load is shifted against its cache line by kx and no columns are thrown away, for `KW` times the copying.
    aligned
        The vectors of padded rows are those of the output, without the columns between rows.
    """

    workload: ConvWorkload
    lanes: int
    pitch: int
    rows_per_chunk: int
    column_copies: bool = False
    copy: CopyScope = CopyScope.LAYER
    flat: bool = False
    aligned: bool = False

    def __post_init__(self) -> None:
        scopes = FLAT_SCOPES if self.flat else (CopyScope.LAYER, CopyScope.TASK)
        if self.copy not in scopes:
            raise ValueError(f"no {'flat' if self.flat else 'padded'} pixels with {self.copy}")
        if self.aligned and not self.can_be_aligned:
            raise ValueError(
                f"chunks of {self.rows_per_chunk} rows of {self.workload.out_width} pixels cannot be aligned"
            )

    @property
    def can_be_aligned(self) -> bool:
        """Whether the output is equal chunks of rows of one or two vectors, and the copy has columns between them."""
        width, height = self.workload.out_width, self.workload.out_height
        whole = width % self.lanes == 0 and width // self.lanes <= _MOST_ALIGNED_VECTORS
        return whole and height % self.rows_per_chunk == 0 and not self.flat and self.pitch > width

    @property
    def chunks(self) -> int:
        if self.flat:
            return -(-self.workload.out_pixels // self.pitch)
        return -(-self.workload.out_height // self.rows_per_chunk)

    @property
    def vectors(self) -> int:
        """Vectors of one chunk, from its first to its last wanted pixel."""
        if self.flat:
            return self.pitch // self.lanes
        if self.aligned:
            return self.chunk_pixels // self.lanes
        pixels = (self.rows_per_chunk - 1) * self.pitch + self.workload.out_width
        return -(-pixels // self.lanes)

    @property
    def stores_vectors(self) -> bool:
        """Whether each vector is one of the output's pixels, in their order."""
        return self.flat or self.aligned

    @property
    def chunk_pixels(self) -> int:
        """Pixels of a chunk's output."""
        return self.pitch if self.flat else self.rows_per_chunk * self.workload.out_width

    def tile_vectors(self, most: int) -> list[int]:
        """Return the sizes that a register tile may have, in ascending order.

        Aligned tiles are some whole rows or a part of one: then their loads lie at fixed distances from one address.
        """
        sizes = range(1, min(most, self.vectors) + 1)
        if not self.aligned:
            return list(sizes)
        row = self.workload.out_width // self.lanes
        return [size for size in sizes if size % row == 0 or row % size == 0]

    @property
    def phase_rows(self) -> int:
        """Vertical phases of the padded copy: the stride, or 1 where one kernel row reads only one phase."""
        return self.workload.stride[0] if self.workload.kernel[0] > 1 else 1

    @property
    def phase_columns(self) -> int:
        """Horizontal phases: the stride, or one for each kernel column where each has its own copy."""
        if self.column_copies:
            return self.workload.kernel[1]
        return self.workload.stride[1] if self.workload.kernel[1] > 1 else 1

    @property
    def column_step(self) -> int:
        """Input columns from one horizontal phase to the next."""
        return self.workload.dilation[1] if self.column_copies else 1

    def tap_column(self, kx: Any) -> tuple[Any, Any]:
        """Return the horizontal phase that tap column `kx` reads and its column in it; `kx` may be a TIR expression."""
        if self.column_copies:
            return kx, 0
        x = kx * self.workload.dilation[1]
        return x % self.workload.stride[1], x // self.workload.stride[1]

    @property
    def phases(self) -> int:
        return self.phase_rows * self.phase_columns

    @property
    def plane_rows(self) -> int:
        """Rows of the padded copy of one channel and phase, with room for the last vector of the last tap."""
        work = self.workload
        last_row = (work.kernel[0] - 1) * work.dilation[0] // work.stride[0]
        last_column = int(self.tap_column(work.kernel[1] - 1)[1])
        start = (self.chunks - 1) * self.rows_per_chunk * self.pitch
        pixels = (self.rows_per_chunk - 1) * self.pitch + work.out_width if self.aligned else self.vectors * self.lanes
        end = start + last_row * self.pitch + last_column + pixels
        return -(-end // self.pitch)

    @property
    def plane(self) -> int:
        """Elements of the padded copy of one channel and phase."""
        return self.plane_rows * self.pitch

    @property
    def channel_size(self) -> int:
        """Elements of the padded copy of one channel."""
        return self.phases * self.plane

    @property
    def elements_at_once(self) -> int:
        """Elements of the padded copy that exist at a time: all, or what a task reads of a group's channels."""
        work = self.workload
        if self.copy is CopyScope.LAYER:
            return work.batch * work.in_channels * self.channel_size
        rows = self.rows_per_chunk + (work.kernel[0] - 1) * work.dilation[0] // work.stride[0]
        return work.in_channels_per_group * self.phases * rows * self.pitch

    def tap_offset(self, ky: int, kx: int) -> int:
        """Offset of tap (ky, kx) from a virtual pixel, in elements of the padded copy of its channel."""
        work = self.workload
        y = ky * work.dilation[0]
        column_phase, column = self.tap_column(kx)
        phase = y % work.stride[0] * self.phase_columns + int(column_phase)
        return phase * self.plane + y // work.stride[0] * self.pitch + int(column)

    def virtual_pixel(self, chunk: Any, vector: Any, lane: Any) -> Any:
        """Return the virtual pixel of a lane of a chunk's vector."""
        start = chunk * (self.rows_per_chunk * self.pitch)
        if not self.aligned:
            return start + vector * self.lanes + lane
        row = self.workload.out_width // self.lanes
        return start + tirx.indexdiv(vector, row) * self.pitch + tirx.indexmod(vector, row) * self.lanes + lane

    def output_pixel(self, chunk: Any, vector: Any, lane: Any) -> Any:
        """Return the place among the output's pixels of a lane of a chunk's vector, if `stores_vectors`.

        Every vector ends within them.
        """
        start = chunk * self.chunk_pixels + vector * self.lanes
        if self.chunks * self.chunk_pixels > self.workload.out_pixels:
            start = tirx.min(start, self.workload.out_pixels - self.lanes)
        return start + lane

    def allows_index(self, position: bool) -> bool:
        """Whether a kernel with an index table, of positions or of channels, can have its input copied like this.

        The copy holds what the table might name: all channels, which is too much where a task needs those of a group.
        Offsets of positions are those of a whole plane.
        """
        if self.copy in (CopyScope.NONE, CopyScope.LAYER):
            return True
        return self.workload.groups == 1 and (self.flat or not position)

    @property
    def subsampled(self) -> bool:
        """Whether a flat row is that of a copy without the pixels which a stride skips."""
        return self.flat and self.workload.stride != (1, 1)

    @property
    def useful_share(self) -> float:
        """Share of the computed pixels that are output."""
        return self.workload.out_pixels / (self.chunks * self.vectors * self.lanes)


def candidate_geometries(workload: ConvWorkload, lanes: int) -> list[PixelGeometry]:
    """Return the layouts worth considering for a workload."""
    if workload.taps == 1 and not any(workload.padding) and workload.out_pixels >= lanes:
        return _flat_geometries(workload, lanes)
    width = workload.out_width
    layouts = [(width + (workload.kernel[1] - 1) * workload.dilation[1] // workload.stride[1], False)]
    if 1 < workload.kernel[1] <= _MAX_COLUMN_COPIES:
        layouts += [(width, True)] + ([(-(-width // lanes) * lanes, True)] if width % lanes else [])
    found: list[PixelGeometry] = []
    for chunks in range(1, min(workload.out_height, 64) + 1):
        rows = -(-workload.out_height // chunks)
        if -(-workload.out_height // rows) == chunks:
            padded = [
                PixelGeometry(workload, lanes, pitch, rows, columns, scope)
                for pitch, columns in layouts
                for scope in (CopyScope.LAYER, CopyScope.TASK)
            ]
            found += padded + [replace(geometry, aligned=True) for geometry in padded if geometry.can_be_aligned]
    return found


def _flat_geometries(workload: ConvWorkload, lanes: int) -> list[PixelGeometry]:
    """Return the ways to cut a flat row into chunks of equally many vectors, with few too many: one, or one in 16."""
    vectors = -(-workload.out_pixels // lanes)
    sizes = {
        -(-vectors // chunks)
        for chunks in range(1, vectors + 1)
        if chunks * -(-vectors // chunks) <= vectors + max(1, vectors // 16)
    }
    return [
        PixelGeometry(workload, lanes, size * lanes, 1, copy=scope, flat=True)
        for size in sorted(sizes)
        for scope in FLAT_SCOPES
    ]
