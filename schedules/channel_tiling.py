"""Default decisions for a channel-vector convolution: the model of `tiling`, for the other loop nest.

Its constants were chosen on ResNet-50's layers of 28x28 to 7x7 pixels, alone and within the network, on an AVX-512
server, such that the family is preferred where it measured faster. Where a reduction is short and the output large, and
for one vector of channels at a time (1x16), it is within 15% of the pixel-vector family on either side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from tvm_nm.schedules.channel_conv import ChannelConvKernel
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.core_traffic import REMOTE_BYTES_PER_CYCLE, remote_bytes, remote_bytes_of_channels
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.pixel_tiles import map_cycles, pixel_tiles
from tvm_nm.workload import ConvWorkload

__all__ = ["channel_candidates", "channel_cycles", "predicted_channel_cycles"]

_FMA_LATENCY = 4.0
_LOADS_PER_CYCLE = 1.6
_LOOP_OVERHEAD = 1.0
_TASK_OVERHEAD = 300.0
_CARRY_CYCLES_PER_VECTOR = 1.5
_STREAM_BYTES_PER_CYCLE = 12.0
_MEMORY_BYTES_PER_CYCLE = 12.0
_COPY_BYTES_PER_CYCLE = 8.0
_OUTPUT_CYCLES_PER_VECTOR = 36.0
# A step reads a few pixels of another channel: beyond L1, another line, that no prefetcher follows.
_NEAR_LINE_CYCLES = 2.0
_L1_BYTES = 40 * 1024
_FAR_LINE_CYCLES = 20.0
_L2_BYTES = 1 << 20

_MOST_VECTORS = 4
# Weights of a block of the reduction: they stay in L1 beside the inputs of a pixel tile.
_BLOCK_BYTES = 20 * 1024
# Sums of a task and its part of the output stay in L2.
_SCRATCH_BYTES = 256 * 1024


def _tile_cycles(vectors: int, pixels: int) -> float:
    """Cycles of one reduction step of a register tile."""
    cycles = max(vectors * pixels / 2, (vectors + pixels) / _LOADS_PER_CYCLE, _FMA_LATENCY)
    return cycles + _LOOP_OVERHEAD


def predicted_channel_cycles(kernel: ChannelConvKernel) -> float:
    """Return the model's cycles of a kernel on one thread, comparable with `pixel_cycles.predicted_cycles`."""
    work = kernel.workload
    pixels = work.out_pixels
    tasks = work.batch * work.groups * kernel.block_rows * kernel.tiles
    step = map_cycles(work, kernel.tile_rows, kernel.tile_columns, partial(_tile_cycles, kernel.vectors))
    blocks = kernel.kept // kernel.kept_per_block
    carry = blocks * pixels * kernel.vectors * _CARRY_CYCLES_PER_VECTOR
    output = pixels * kernel.vectors * _OUTPUT_CYCLES_PER_VECTOR
    weights = 4 * math.prod(kernel.weight_shape) * work.batch
    return (
        tasks * (kernel.kept * step + carry + output + _TASK_OVERHEAD)
        + weights / _STREAM_BYTES_PER_CYCLE
        + (weights / _MEMORY_BYTES_PER_CYCLE if weights > _L2_BYTES else 0.0)
        + _input_cycles(kernel, tasks)
    )


def _input_cycles(kernel: ChannelConvKernel, tasks: int) -> float:
    """Cycles of copying the input, and of reading one that exceeds L1 a few pixels of a channel at a time."""
    work = kernel.workload
    input_bytes = 4 * work.in_channels * math.prod(work.reach)
    copy = 0.0 if kernel.reads_input_directly else work.batch * input_bytes / _COPY_BYTES_PER_CYCLE
    if input_bytes <= _L1_BYTES:
        return copy
    pixel_tiles = -(-work.out_height // kernel.tile_rows) * -(-work.out_width // kernel.tile_columns)
    touches = tasks * kernel.kept * pixel_tiles / work.taps
    far = kernel.reads_input_directly and input_bytes > _L2_BYTES
    return copy + touches * (_FAR_LINE_CYCLES if far else _NEAR_LINE_CYCLES)


def channel_candidates(
    workload: ConvWorkload, machine: Machine, *, block: int | None = None, kept: int | None = None
) -> list[ChannelConvKernel]:
    """Return the variants worth trying, none where the family does not fit.

    Parameters
    ----------
    workload
        The convolution.
    machine
        Vector width, registers, threads.
    block
        Output channels that share their kept positions; None where all do (dense).
    kept
        Positions (input channel, tap) that a block row keeps; default: everything.
    """
    work = replace(workload, height=1, width=workload.height * workload.width) if workload.is_pointwise else workload
    positions = work.in_channels_per_group * work.taps
    return [
        variant
        for vectors in _vector_counts(work, machine, block)
        for variant in _variants(work, machine, vectors, block, positions if kept is None else kept)
    ]


def channel_cycles(kernel: ChannelConvKernel, machine: Machine) -> float:
    """Return the cycles of a kernel, those of idle threads included, as `pixel_cycles.predicted_cycles` counts."""
    tasks = kernel.workload.batch * kernel.workload.groups * kernel.block_rows * kernel.tiles
    cycles = predicted_channel_cycles(kernel) * machine.imbalance(tasks)
    return cycles + _remote_bytes(kernel, machine) / REMOTE_BYTES_PER_CYCLE


def _remote_bytes(kernel: ChannelConvKernel, machine: Machine) -> float:
    """Bytes that threads read from other cores: each reads the whole map, or its copy."""
    work = kernel.workload
    copying = 0.0 if kernel.reads_input_directly else remote_bytes_of_channels(work, machine)
    return copying + remote_bytes(work, machine, work.batch)


def _vector_counts(work: ConvWorkload, machine: Machine, block: int | None) -> list[int]:
    """Return the vectors of channels to try; none for few channels, or a pattern that is not whole vectors."""
    lanes = machine.lanes
    pixels = work.out_pixels
    if work.out_channels_per_group < lanes or work.in_channels_per_group == 1:
        return []
    if block is not None and (block % lanes or block > work.out_channels_per_group):
        return []
    vectors = (block or work.out_channels_per_group) // lanes
    fitting = [v for v in range(1, min(vectors, _MOST_VECTORS) + 1) if v * lanes * pixels * 4 <= _SCRATCH_BYTES]
    return fitting if block is None else [v for v in fitting if vectors % v == 0]


def _variants(
    work: ConvWorkload, machine: Machine, vectors: int, block: int | None, kept: int
) -> Iterator[ChannelConvKernel]:
    # Beside the sums: a step's weights, one input, and one to spare.
    most = max(1, (machine.registers - vectors - 2) // vectors)
    index = IndexKind.NONE if block is None else IndexKind.CHANNEL if work.taps == 1 else IndexKind.POSITION
    kept, kept_per_block = _blocked(kept, work.in_channels_per_group * work.taps, vectors * machine.lanes * 4)
    kernel = ChannelConvKernel(
        workload=work,
        lanes=machine.lanes,
        index=index,
        vectors=vectors,
        block=block or vectors * machine.lanes,
        kept=kept,
        index_dtype="int32",
        tile_rows=1,
        tile_columns=1,
        kept_per_block=kept_per_block,
    )
    entries = work.in_channels * (1 if work.taps == 1 else kernel.channel_stride)
    kernel = replace(kernel, index_dtype="uint8" if entries <= 1 << 8 else "uint16" if entries <= 1 << 16 else "int32")
    for rows, columns in pixel_tiles(work, most):
        yield replace(kernel, tile_rows=rows, tile_columns=columns)


def _blocked(kept: int, positions: int, step_bytes: int) -> tuple[int, int]:
    """Return a reduction of at least `kept` steps and the length of its blocks, which divides it."""
    blocks = -(-kept * step_bytes // _BLOCK_BYTES)
    if kept < positions:
        length = -(-kept // blocks)
        if length * blocks <= positions:
            return length * blocks, length
    fewest = [count for count in range(blocks, 2 * blocks + 1) if kept % count == 0]
    return kept, kept // fewest[0] if fewest else kept
