"""Default decisions for a depthwise convolution: a count of cycles, in the unit of `pixel_cycles.predicted_cycles`.

Squares to transpose, FMAs of the windows without what lies in the padding, and the bytes of maps beyond L2. The
constants were fitted to times of 16 layers, from 7x7 to 112x112 pixels with windows from 3x3 to 9x9, on an AVX-512
server, of up to eight variants each. On all of them the family was 1.3 to 4 times as fast as vectors over pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm_nm.schedules.depthwise_conv import DepthwiseKernel, is_depthwise
from tvm_nm.schedules.machine import Machine
from tvm_nm.workload import ConvWorkload

__all__ = ["depthwise_candidates", "depthwise_cycles"]

_FMAS_PER_CYCLE = 1.9
_LOADS_PER_CYCLE = 1.8
_FMA_LATENCY = 4.0
_STEP_CYCLES = 1.0
_TILE_CYCLES = 6.0
_SHUFFLES_PER_CYCLE = 1.3
_L1_BYTES = 40 * 1024
_L2_BYTES = 2 << 20
_L2_BYTES_PER_CYCLE = 64.0
_STREAM_BYTES_PER_CYCLE = 24.0
_TASK_OVERHEAD = 60.0

_MOST_SCRATCH_BYTES = 1 << 20
_MOST_COLUMN_TAPS = 16
"""Taps of a row have code of their own, at each register tile of a border once more."""
_BAND_ROWS = (1, 2, 4)
_TILE_CHOICES = 2


def depthwise_candidates(work: ConvWorkload, machine: Machine) -> list[DepthwiseKernel]:
    """Return the variants worth trying, none where the family does not fit."""
    lanes = machine.lanes
    pixels = min(work.height * work.width, work.out_pixels)
    if not is_depthwise(work) or work.in_channels < lanes or pixels < lanes or work.kernel[1] > _MOST_COLUMN_TAPS:
        return []
    return list(dict.fromkeys(_variants(work, machine)))


def _variants(work: ConvWorkload, machine: Machine) -> Iterator[DepthwiseKernel]:
    for rows in _band_rows(work, machine.lanes):
        for columns in _tile_columns(work, machine):
            kernel = DepthwiseKernel(work, machine.lanes, columns, rows)
            if kernel.scratch_bytes <= _MOST_SCRATCH_BYTES:
                most = 2 * machine.threads if machine.threads > 1 else 1
                for parts in range(1, min(kernel.bands, most) + 1):
                    yield DepthwiseKernel(work, machine.lanes, columns, rows, -(-kernel.bands // parts))


def _band_rows(work: ConvWorkload, lanes: int) -> Iterator[int]:
    """Yield the whole map's rows, then fewer for maps wide enough for a ring."""
    yield work.out_height
    if work.width >= lanes:
        for rows in _BAND_ROWS:
            bands = -(-work.out_height // rows)
            even = -(-work.out_height // bands)
            if rows < work.out_height and even * work.out_width >= lanes:
                yield even


def _tile_columns(work: ConvWorkload, machine: Machine) -> list[int]:
    """Return the pixels of register tiles that divide a row most evenly, beside the taps of a row and an input."""
    beside = 2 + min(work.kernel[1], machine.registers // 2)
    most = min(machine.accumulators, machine.registers - beside)
    sizes = {-(-work.out_width // tiles) for tiles in range(1, work.out_width + 1)}
    return sorted((size for size in sizes if size <= most), reverse=True)[:_TILE_CHOICES]


def depthwise_cycles(kernel: DepthwiseKernel, machine: Machine) -> float:
    """Return the cycles of a kernel, those of idle threads included, as `pixel_cycles.predicted_cycles` counts."""
    work = kernel.workload
    # Rows that tasks share are transposed by each of them.
    rows = min(kernel.parts * (kernel.in_rows - kernel.rows * work.stride[0]), work.height * (kernel.parts - 1))
    pixels = (work.height + max(0, rows if kernel.parts > 1 else 0)) * work.width
    outputs = kernel.bands * kernel.rows * work.out_width
    cycles = _turn_cycles(kernel, pixels, kernel.ring_rows * work.width if kernel.is_whole else work.width)
    cycles += _turn_cycles(kernel, outputs, kernel.rows * work.out_width)
    cycles += kernel.bands * kernel.rows / work.out_height * _window_cycles(kernel)
    moved = 4 * kernel.lanes * (pixels + outputs)
    if kernel.scratch_bytes > _L1_BYTES:
        cycles += 2 * moved / _L2_BYTES_PER_CYCLE
    cycles *= work.batch * kernel.blocks
    tensors = work.out_pixels * (2 if work.epilogue.residual else 1) + work.height * work.width
    moved = 4 * work.batch * work.in_channels * tensors
    if moved > _L2_BYTES:
        cycles += moved / _STREAM_BYTES_PER_CYCLE
    return cycles * machine.imbalance(kernel.tasks) + kernel.tasks * _TASK_OVERHEAD


def _turn_cycles(kernel: DepthwiseKernel, pixels: int, run: int) -> float:
    """Cycles of transposing pixels, in runs whose last square may overlap the one before."""
    lanes = kernel.lanes
    shuffles = lanes * (lanes.bit_length() - 1)
    return pixels / run * -(-run // lanes) * shuffles / _SHUFFLES_PER_CYCLE


def _window_cycles(kernel: DepthwiseKernel) -> float:
    """Cycles of the sums of a map."""
    work = kernel.workload
    steps = _taps_within(
        work.out_height, work.height, work.kernel[0], work.stride[0], work.dilation[0], work.padding[0]
    )
    taps = _taps_within(work.out_width, work.width, work.kernel[1], work.stride[1], work.dilation[1], work.padding[1])
    tiles = -(-work.out_width // kernel.columns)
    columns = work.out_width / tiles
    loads = min(columns * work.kernel[1], (columns - 1) * work.stride[1] + work.kernel[1]) + work.kernel[1]
    step = max(taps / tiles / _FMAS_PER_CYCLE, loads / _LOADS_PER_CYCLE, _FMA_LATENCY)
    return steps * tiles * (step + _STEP_CYCLES) + work.out_height * tiles * _TILE_CYCLES


def _taps_within(count: int, size: int, taps: int, stride: int, dilation: int, before: int) -> int:
    """Return how many taps of all windows along one axis lie within the map."""
    places = (start * stride - before + tap * dilation for start in range(count) for tap in range(taps))
    return sum(0 <= place < size for place in places)
