"""Default decisions of the Winograd kernels for first convolutions: cycles, as `pixel_cycles.predicted_cycles` counts.

Products are counted by FMAs and loads; the transforms by vectors that they read and write, with their sums; copies of
the input by elements. Fitted to 16 variants of 7x7 with a stride of 2 from 3 to 64 channels on 224x224 pixels, with
AVX-512: what it predicts for them, relative to each other, is 7% off.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.stem_conv import least_width
from tvm_nm.schedules.stem_winograd import TILE, StemWinogradKernel, stem_winograd_applies
from tvm_nm.workload import ConvWorkload

__all__ = ["stem_winograd_candidates", "stem_winograd_cycles"]

_FMAS_PER_CYCLE = 2.0
_LOADS_PER_CYCLE = 1.6
_FREQUENCY_CYCLES = 2.0  # neighbouring ones overlap: no reduction waits for its sums
_CYCLES_PER_SUM = 0.5
_INPUT_CYCLES_PER_VALUE = 2.0
_OUTPUT_CYCLES_PER_VALUE = 3.0
# Where the values between two transforms, and some terms, do not fit the registers.
_SPILLED_CYCLES_PER_VALUE = 3.0
_CYCLES_PER_PLANE_PIXEL = 1.0
_CYCLES_PER_STORED_VECTOR = 4.0
_CYCLES_PER_MAXIMUM = 1.0
# Products and weights beyond these are read from L2, and what a task works in from beyond it.
_L1_BYTES = 40 * 1024
_L2_BYTES_PER_CYCLE = 48.0
# Between these counts and those of the direct kernels.
_SCALE = 0.83
_TASK_OVERHEAD = 300.0

_LARGEST_POOLED_WINDOW = 8
_MOST_SCRATCH_BYTES = 1 << 20
_MOST_VECTORS = 4


def stem_winograd_candidates(work: ConvWorkload, machine: Machine) -> list[StemWinogradKernel]:
    """Return the variants worth trying, none where the family does not fit."""
    lanes, pool = machine.lanes, work.epilogue.pool
    if pool is not None and max(pool.kernel) > _LARGEST_POOLED_WINDOW:
        return []  # whose taps are all unrolled
    if not stem_winograd_applies(work) or work.out_channels < lanes or least_width(work) < lanes:
        return []
    return list(dict.fromkeys(_variants(work, machine)))


def _variants(work: ConvWorkload, machine: Machine) -> Iterator[StemWinogradKernel]:
    all_vectors, columns = -(-work.out_channels // machine.lanes), -(-work.out_width // TILE)
    for vectors in range(1, min(all_vectors, _MOST_VECTORS) + 1):
        most = min((machine.registers - vectors - 1) // vectors, machine.most_sums() // vectors)
        sizes = {-(-columns // parts) for parts in range(1, columns + 1)}
        for tiles in sizes if all_vectors % vectors == 0 else ():
            for rows in _band_rows(work, machine) if tiles <= most else ():
                kernel = StemWinogradKernel(work, machine.lanes, vectors, tiles, rows)
                if kernel.scratch_bytes <= _MOST_SCRATCH_BYTES:
                    yield kernel


def _band_rows(work: ConvWorkload, machine: Machine) -> list[int]:
    """Return rows of tasks that keep the threads evenly busy: one to four tasks for each."""
    height = work.stored_shape[2]
    return sorted({-(-height // min(height, machine.threads * count)) for count in (1, 2, 4)}, reverse=True)


def stem_winograd_cycles(kernel: StemWinogradKernel, machine: Machine) -> float:
    """Return the cycles of a kernel, those of idle threads included."""
    work, lanes = kernel.workload, kernel.lanes
    down, across = kernel.size
    frequencies, sums = down * across, kernel.tiles * kernel.vectors
    step = max(sums / _FMAS_PER_CYCLE, (kernel.vectors + kernel.tiles) / _LOADS_PER_CYCLE)
    block = kernel.products * step + frequencies * (sums * _CYCLES_PER_SUM + _FREQUENCY_CYCLES)
    # 2-D transforms: one coordinate of all columns, then the other of the rows that are left.
    moved = sums * (frequencies + TILE * across + TILE**2)
    block += moved * _OUTPUT_CYCLES_PER_VALUE / 2
    if TILE * across + 4 > machine.registers:
        block += sums * TILE * across * _SPILLED_CYCLES_PER_VALUE
    near = 4 * lanes * (frequencies * sums + kernel.products * kernel.vectors)
    if near > _L1_BYTES:
        block += near / _L2_BYTES_PER_CYCLE
    planes = kernel.planes // lanes
    row = kernel.groups * -(-kernel.tile_columns // kernel.tiles) * block
    row += planes * down * (2 * kernel.plane_columns + kernel.tile_columns * across) * _INPUT_CYCLES_PER_VALUE / 2
    row += TILE * kernel.plane_columns * kernel.planes * _CYCLES_PER_PLANE_PIXEL
    _, _, height, width = work.stored_shape
    stored = width * _CYCLES_PER_STORED_VECTOR
    if work.epilogue.pool is not None:
        stored += (work.out_width * work.epilogue.pool.kernel[0] + width * work.epilogue.pool.kernel[1]) * (
            _CYCLES_PER_MAXIMUM
        )
    cycles = kernel.bands * -(-kernel.sum_rows // TILE) * row + height * kernel.channel_vectors * stored
    return _SCALE * work.batch * cycles * machine.imbalance(kernel.tasks) + kernel.tasks * _TASK_OVERHEAD
