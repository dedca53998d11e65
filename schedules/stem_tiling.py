"""Default decisions for a stem convolution: a count of cycles, in the unit of `pixel_cycles.predicted_cycles`.

FMAs of the register tiles, what a tile costs beside them, squares to transpose, copies of the input. Beside the sums,
short reductions take longer than either model counts, above all for outputs beyond L2: the constants were fitted such
that the family is preferred where it measured faster than vectors over pixels. Of 17 layers of 1 to 16 input channels,
windows from 3x3 to 11x11 and maps from 24x24 to 224x224 pixels it took 0.67 to 0.91 of their time on an AVX-512 server,
and as long on one (16->16, 3x3 on 32x32).
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.stem_conv import StemKernel, least_width, stem_applies
from tvm_nm.workload import ConvWorkload

__all__ = ["stem_candidates", "stem_cycles"]

_FMAS_PER_CYCLE = 2.0
_LOADS_PER_CYCLE = 1.6
_FMA_LATENCY = 4.0
_STEP_CYCLES = 0.5
_TILE_CYCLES = 5.0
_CYCLES_PER_SUM = 0.5
_SHUFFLES_PER_CYCLE = 2.0
_CYCLES_PER_MAXIMUM = 1.0
_COPY_BYTES_PER_CYCLE = 12.0
# A band's input is read from L2 once for each group of vectors; more of it is not there any more.
_L2_BYTES_PER_CYCLE = 48.0
_FAR_BYTES_PER_CYCLE = 12.0
_NEAR_BYTES = 256 * 1024
_TASK_OVERHEAD = 300.0

_LARGEST_WINDOW = 8
_MOST_SCRATCH_BYTES = 1 << 20
_MOST_VECTORS = 3
_TILE_CHOICES = 2


def stem_candidates(work: ConvWorkload, machine: Machine) -> list[StemKernel]:
    """Return the variants worth trying, none where the family does not fit: many input channels, small maps."""
    lanes, pool = machine.lanes, work.epilogue.pool
    if pool is not None and max(pool.kernel) > _LARGEST_WINDOW:
        return []  # whose taps are all unrolled
    if not stem_applies(work) or work.out_channels < lanes or least_width(work) < lanes:
        return []
    return list(dict.fromkeys(_variants(work, machine)))


def _variants(work: ConvWorkload, machine: Machine) -> Iterator[StemKernel]:
    all_vectors = -(-work.out_channels // machine.lanes)
    for vectors in range(1, min(all_vectors, _MOST_VECTORS) + 1):
        if all_vectors % vectors == 0:
            for columns in _tile_columns(work, machine, vectors):
                for rows in _band_rows(work, machine):
                    kernel = StemKernel(work, machine.lanes, vectors, columns, rows)
                    if kernel.scratch_bytes <= _MOST_SCRATCH_BYTES:
                        yield kernel


def _tile_columns(work: ConvWorkload, machine: Machine, vectors: int) -> list[int]:
    """Return the pixels of register tiles that divide a row most evenly, beside a step's weights and an input."""
    most = (machine.registers - vectors - 1) // vectors
    sizes = {-(-work.out_width // tiles) for tiles in range(1, work.out_width + 1)}
    return sorted((size for size in sizes if size <= min(most, machine.most_sums() // vectors)), reverse=True)[
        :_TILE_CHOICES
    ]


def _band_rows(work: ConvWorkload, machine: Machine) -> list[int]:
    """Return rows of tasks that keep the threads evenly busy: one to eight tasks for each."""
    height = work.stored_shape[2]
    parts = [machine.threads * count for count in (1, 2, 4, 8)]
    return sorted({-(-height // min(height, part)) for part in parts}, reverse=True)


def stem_cycles(kernel: StemKernel, machine: Machine) -> float:
    """Return the cycles of a kernel, those of idle threads included, as `pixel_cycles.predicted_cycles` counts."""
    work, lanes = kernel.workload, kernel.lanes
    sums, tiles = kernel.vectors * kernel.columns, -(-work.out_width // kernel.columns)
    step = max(sums / _FMAS_PER_CYCLE, (kernel.vectors + kernel.columns) / _LOADS_PER_CYCLE, _FMA_LATENCY)
    tile = kernel.steps * (step + _STEP_CYCLES) + _TILE_CYCLES + sums * _CYCLES_PER_SUM
    _, _, height, width = work.stored_shape
    squares = -(-width // lanes) * lanes * (lanes.bit_length() - 1) / _SHUFFLES_PER_CYCLE
    groups = kernel.channel_vectors // kernel.vectors
    rows = kernel.bands * groups * kernel.rows * kernel.vectors * squares
    if work.epilogue.pool is not None:
        taken = work.out_width * work.epilogue.pool.kernel[0] + width * work.epilogue.pool.kernel[1]
        rows += groups * kernel.vectors * height * taken * _CYCLES_PER_MAXIMUM
    rows += kernel.bands * kernel.sum_rows * groups * tiles * tile  # what two bands share is computed by both
    read = kernel.bands * kernel.scratch_bytes
    speed = _L2_BYTES_PER_CYCLE if kernel.scratch_bytes <= _NEAR_BYTES else _FAR_BYTES_PER_CYCLE
    cycles = work.batch * (rows + read / _COPY_BYTES_PER_CYCLE + groups * read / speed)
    return cycles * machine.imbalance(kernel.tasks) + kernel.tasks * _TASK_OVERHEAD
