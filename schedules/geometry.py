"""Where the pixels of a windowed operator lie: virtual pixels, stride phases, row chunks.

A window operator (convolution, depthwise convolution, pooling) reads its input through a zero-padded copy whose rows
have a common *pitch*. Output pixel (y, x) is *virtual pixel* q = y * pitch + x, and tap (ky, kx) of that pixel reads
the copy at q + offset(ky, kx): all pixels of a tap are contiguous, whatever the kernel's size. The pitch - OW columns
between two rows are computed too and thrown away; that is the price.

A stride s splits the copy into s*s *phases* (input rows congruent mod s, columns likewise), so that each tap of a
strided window again reads one phase contiguously.

Output rows are cut into *chunks* of `rows_per_chunk`. A chunk is one unit of parallel work and its sums live in a
scratch buffer that fits the cache; its pixels are counted in vectors of the machine's lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm_nm.workload import ConvWorkload

__all__ = ["PixelGeometry", "candidate_geometries"]

_MAX_COLUMN_COPIES = 3


@dataclass(frozen=True, slots=True)
class PixelGeometry:
    """The pixel side of a kernel.

    Attributes
    ----------
    workload
        What is computed. A pointwise workload may have been reshaped (see `choose_geometry`).
    lanes
        float32 elements of one vector.
    pitch
        Elements from one row of the padded copy to the next.
    rows_per_chunk
        Output rows of one chunk.
    column_copies
        Hold one copy of the input for each kernel column, shifted so that every tap column starts where its pixels do.
        Then no load is shifted against its cache line by kx and no columns are thrown away, for `KW` times the copying.
    """

    workload: ConvWorkload
    lanes: int
    pitch: int
    rows_per_chunk: int
    column_copies: bool = False

    @property
    def chunks(self) -> int:
        return -(-self.workload.out_height // self.rows_per_chunk)

    @property
    def vectors(self) -> int:
        """Vectors of one chunk, from its first to its last wanted pixel."""
        pixels = (self.rows_per_chunk - 1) * self.pitch + self.workload.out_width
        return -(-pixels // self.lanes)

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
        end = start + last_row * self.pitch + last_column + self.vectors * self.lanes
        return -(-end // self.pitch)

    @property
    def plane(self) -> int:
        """Elements of the padded copy of one channel and phase."""
        return self.plane_rows * self.pitch

    @property
    def channel_size(self) -> int:
        """Elements of the padded copy of one channel."""
        return self.phases * self.plane

    def tap_offset(self, ky: int, kx: int) -> int:
        """Offset of tap (ky, kx) from a virtual pixel, in elements of the padded copy of its channel."""
        work = self.workload
        y = ky * work.dilation[0]
        column_phase, column = self.tap_column(kx)
        phase = y % work.stride[0] * self.phase_columns + int(column_phase)
        return phase * self.plane + y // work.stride[0] * self.pitch + int(column)

    @property
    def reads_input_directly(self) -> bool:
        """Whether the input itself serves as the padded copy: pointwise, and every row is whole vectors."""
        work = self.workload
        row = self.vectors * self.lanes
        return work.is_pointwise and self.rows_per_chunk == 1 and self.pitch == work.width == row

    @property
    def useful_share(self) -> float:
        """Share of the computed pixels that are output."""
        return self.workload.out_height * self.workload.out_width / (self.chunks * self.vectors * self.lanes)


def candidate_geometries(workload: ConvWorkload, lanes: int) -> list[PixelGeometry]:
    """Return the layouts worth considering for a workload.

    A pointwise workload with a multiple of `lanes` pixels is also offered as rows of whole vectors, which makes its
    chunks contiguous and the padded copy unnecessary; one with other pixel counts as a single row.
    """
    found: list[PixelGeometry] = []
    pixels = workload.out_height * workload.out_width
    if workload.is_pointwise:
        vectors = pixels // lanes
        if pixels % lanes == 0:
            for per_chunk in (d for d in range(1, vectors + 1) if vectors % d == 0):
                flat = replace(workload, height=vectors // per_chunk, width=per_chunk * lanes)
                found.append(PixelGeometry(flat, lanes, per_chunk * lanes, 1))
        else:
            flat = replace(workload, height=1, width=pixels)
            found.append(PixelGeometry(flat, lanes, -(-pixels // lanes) * lanes, 1))
    width = workload.out_width
    layouts = [(width + (workload.kernel[1] - 1) * workload.dilation[1] // workload.stride[1], False)]
    if 1 < workload.kernel[1] <= _MAX_COLUMN_COPIES:
        layouts += [(width, True)] + ([(-(-width // lanes) * lanes, True)] if width % lanes else [])
    for chunks in range(1, min(workload.out_height, 64) + 1):
        rows = -(-workload.out_height // chunks)
        if -(-workload.out_height // rows) == chunks:
            found.extend(PixelGeometry(workload, lanes, pitch, rows, copies) for pitch, copies in layouts)
    return found
