"""Default decisions for a lane-select convolution: the model of `channel_tiling`, with a permutation for each FMA.

With AVX-512, permutations share an execution port with every second FMA: a register tile starts one pair a cycle. Its
constants were chosen on ResNet-50's layers at 2:4 and 1:4 on an AVX-512 server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from tvm_nm.schedules.lane_conv import PERMUTATIONS, LaneConvKernel
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.pixel_tiles import map_cycles, pixel_tiles
from tvm_nm.workload import ConvWorkload

__all__ = ["lane_candidates", "lane_cycles"]

_PAIRS_PER_CYCLE = 0.72
_LATENCY = 7.0
_LOOP_OVERHEAD = 2.0
_TASK_OVERHEAD = 300.0
_CARRY_CYCLES_PER_VECTOR = 1.5
_OUTPUT_CYCLES_PER_VECTOR = 24.0
_STREAM_BYTES_PER_CYCLE = 8.0
# Transposing the input to vectors of channels, and copying them for padding.
_INTERLEAVE_BYTES_PER_CYCLE = 8.0
_PAD_BYTES_PER_CYCLE = 16.0

_MOST_VECTORS = 4
_BLOCK_BYTES = 20 * 1024
_SCRATCH_BYTES = 256 * 1024


def _tile_cycles(vectors: int, pixels: int) -> float:
    """Cycles of one reduction step of a register tile."""
    return max(vectors * pixels / _PAIRS_PER_CYCLE, _LATENCY) + vectors + _LOOP_OVERHEAD


def lane_cycles(kernel: LaneConvKernel, machine: Machine) -> float:
    """Return the cycles of a kernel, those of idle threads included, as `pixel_cycles.predicted_cycles` counts."""
    work, pixels = kernel.workload, kernel.workload.out_pixels
    step = map_cycles(work, kernel.tile_rows, kernel.tile_columns, partial(_tile_cycles, kernel.vectors))
    blocks = kernel.kept // kernel.kept_per_block
    per_pixel = kernel.vectors * (blocks * _CARRY_CYCLES_PER_VECTOR + _OUTPUT_CYCLES_PER_VECTOR)
    tasks = work.batch * work.groups * kernel.block_rows
    cycles = tasks * (kernel.kept * step + pixels * per_pixel + _TASK_OVERHEAD)
    cycles += work.batch * kernel.packed_bytes / _STREAM_BYTES_PER_CYCLE
    input_bytes = 4 * work.batch * work.groups * kernel.in_vectors * kernel.lanes
    cycles += input_bytes * work.height * work.width / _INTERLEAVE_BYTES_PER_CYCLE
    if any(work.padding):
        cycles += input_bytes * math.prod(work.reach) / _PAD_BYTES_PER_CYCLE
    return cycles * machine.imbalance(tasks)


def lane_candidates(work: ConvWorkload, machine: Machine, per_vector: int) -> list[LaneConvKernel]:
    """Return the variants worth trying, none where the family does not fit.

    Parameters
    ----------
    work
        The convolution; a pointwise one may have a map of any shape.
    machine
        Vector width, registers, threads.
    per_vector
        Weights that an output channel keeps of each vector of input channels, at each kernel position.
    """
    lanes = machine.lanes
    if lanes not in PERMUTATIONS or work.out_channels_per_group < lanes or work.in_channels_per_group < lanes:
        return []
    if any(reach <= before for reach, before in zip(work.reach, work.padding[:2], strict=True)):
        return []  # windows that see nothing but padding: a copy of nothing cannot be scheduled
    if work.is_pointwise:
        work = replace(work, height=1, width=work.height * work.width)
    vectors = range(1, min(work.out_channels_per_group // lanes, _MOST_VECTORS) + 1)
    fitting = [v for v in vectors if v * lanes * work.out_pixels * 4 <= _SCRATCH_BYTES]
    return [kernel for v in fitting for kernel in _variants(work, machine, v, per_vector)]


def _variants(work: ConvWorkload, machine: Machine, vectors: int, per_vector: int) -> Iterator[LaneConvKernel]:
    # Beside the sums: a step's weights and lanes, and a permuted input.
    most = (machine.registers - 2 * vectors - 2) // vectors
    kernel = LaneConvKernel(work, machine.lanes, vectors, per_vector, 1, 1, 1)
    step_bytes = 5 * vectors * machine.lanes
    lengths = [d for d in range(1, kernel.kept + 1) if kernel.kept % d == 0 and d * step_bytes <= _BLOCK_BYTES]
    kernel = replace(kernel, kept_per_block=lengths[-1])
    for rows, columns in pixel_tiles(work, most):
        yield replace(kernel, tile_rows=rows, tile_columns=columns)
