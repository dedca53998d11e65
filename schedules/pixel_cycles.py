"""A small model of the core: the cycles that a variant with vectors of pixels takes.

It counts cycles of the register tile's inner loop. Two vector FMAs start each cycle; a load that straddles a
cache line takes two slots; fewer than 8 sums in flight leave the FMA latency exposed; a tile whose inputs exceed L1
streams them from L2. Beside that it counts the padded copy, the scratch, weights and inputs from beyond L2, and the
first line of every page that a pixel tile touches, and with several threads what one core reads that another wrote.

The constants were fitted to measured times of 14 variants of each of 45 layers (dense and 1x16) on an AVX-512 server:
the variant it picked was on average 4% slower than the best of the 14. It ranks variants and decides between sparse
and dense; it does not predict times (tuning measures those).
"""

from __future__ import annotations

import math

from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.core_traffic import remote_bytes, remote_bytes_of_copy
from tvm_nm.schedules.geometry import CopyScope, PixelGeometry
from tvm_nm.schedules.machine import Machine
from tvm_nm.workload import ConvWorkload

__all__ = ["MOST_BLOCKED_CHANNELS", "SCRATCH_BYTES", "channels_read", "chunk_cycles", "predicted_cycles"]

SCRATCH_BYTES = (24 * 1024, 96 * 1024, 256 * 1024)
"""Limits to try for a task's sums: they fit L1 beside the weights, or a part of L2."""

MOST_BLOCKED_CHANNELS = 3
"""Register tiles of at most so many channels share few loads: reductions in blocks may pay for them."""

_L1_BYTES = 40 * 1024
_L2_BYTES_PER_CYCLE = 28.0
# Narrow tiles load an input for each FMA, and are bound by that: constants of their own.
_NARROW_L1_BYTES = 44 * 1024
_NARROW_L2_BYTES_PER_CYCLE = 48.0
_NARROW_LOAD_SLOTS_PER_CYCLE = 1.75
_NARROW_LOOP_OVERHEAD = 0.25
_NARROW_LATENCY = 3.2
_NARROW_FLUSH_CYCLES_PER_VECTOR = 3.8
# Channels that lie a plane apart fall on few sets of L1.
_NARROW_IN_PLACE = 1.35
# Larger kernels, measured within networks: alone, with their indices in L2, they are faster.
_NARROW_TAPS = 1.4
_COPY_BYTES_PER_CYCLE = 8.0
_OWN_COPY_BYTES_PER_CYCLE = 12.0
_PACK_BYTES_PER_CYCLE = 16.0
_FMA_LATENCY = 4.0
_LOOP_OVERHEAD = 2.0
_LOAD_SLOTS_PER_CYCLE = 1.25
_STRADDLE = 2.0
_SPILLED = 2.0
_HALF_STRADDLE = 1.5
_TASK_OVERHEAD = 300.0
_FLUSH_CYCLES_PER_VECTOR = 1.5

_REMOTE_BYTES_PER_CYCLE = 3.0
_L2_BYTES = 1 << 20
_STREAM_BYTES_PER_CYCLE = 12.0
# What comes from memory, which a network's other weights have pushed out of the last cache, comes that much later.
_MEMORY_BYTES_PER_CYCLE = 12.0
# Panels that stay in L2 beside what passes through it.
_PANEL_BYTES = 1 << 19
_NEAR_LINE_CYCLES = 8.0
_FAR_LINE_CYCLES = 80.0
# Packing starts many such loads at once.
_PACKED_TOUCH = 0.5
# A tile's part of an output row and of the residual's, of which nobody knows before; panels fetch them ahead.
_OUTPUT_TOUCH_CYCLES = 30.0
_NEAR_OUTPUT_TOUCH_CYCLES = 8.0
_NARROW_OUTPUT_BYTES_PER_CYCLE = 6.0
_FETCHED_OUTPUT_CYCLES = 4.0
# A channel's inputs lie a whole plane after the previous one's: beyond L1, no prefetcher follows.
_STRIDED_STEP_CYCLES = 1.5
_PANEL_STEP_CYCLES = 0.7
_L1_COPY_BYTES_PER_CYCLE = 32.0
_L2_COPY_BYTES_PER_CYCLE = 10.0
_FEW_CHANNELS = 8


def _tile_cycles(geometry: PixelGeometry, oc_tile: int, vectors: int, reduction_channels: int) -> float:
    """Cycles of one reduction step of an `oc_tile` x `vectors` register tile."""
    work = geometry.workload
    fmas = oc_tile * vectors
    loads = oc_tile + vectors * _load_slots(geometry)
    cycles = max(fmas / 2, loads / _LOAD_SLOTS_PER_CYCLE, _FMA_LATENCY)
    copies = work.kernel[1] if geometry.column_copies else 1
    bytes_per_channel = work.kernel[0] * copies * (vectors * geometry.lanes + work.kernel[1] - 1) * 4
    if _is_narrow(work, oc_tile):
        if not geometry.flat and geometry.pitch % geometry.lanes:
            loads = oc_tile + vectors * _STRADDLE  # neither rows nor planes begin with a cache line
        cycles = max(fmas / 2, loads / _NARROW_LOAD_SLOTS_PER_CYCLE, _NARROW_LATENCY)
        rows = vectors * geometry.lanes + (work.kernel[0] - 1) * geometry.pitch + work.kernel[1] - 1
        tile_bytes = min(bytes_per_channel, 4 * copies * rows) * reduction_channels
        # Panels are gone over for every channel.
        beyond = 1.0 if geometry.copy is CopyScope.CHUNK else max(0.0, 1 - _NARROW_L1_BYTES / tile_bytes)
        cycles += beyond * vectors * geometry.lanes * 4 / _NARROW_L2_BYTES_PER_CYCLE
        cycles *= _NARROW_IN_PLACE if geometry.copy is CopyScope.NONE else 1.0
        return cycles * (_NARROW_TAPS if work.taps > 1 else 1.0) + _NARROW_LOOP_OVERHEAD
    # Of panels, every tile of channels begins with another one.
    if bytes_per_channel * reduction_channels > _L1_BYTES or geometry.copy is CopyScope.CHUNK:
        cycles = max(cycles, bytes_per_channel / work.taps / _L2_BYTES_PER_CYCLE)
        if geometry.copy in (CopyScope.NONE, CopyScope.LAYER):
            cycles += _STRIDED_STEP_CYCLES / work.kernel[1]
        if geometry.copy is CopyScope.CHUNK:
            cycles += _PANEL_STEP_CYCLES
    return cycles + _LOOP_OVERHEAD


def _load_slots(geometry: PixelGeometry) -> float:
    """Load slots of one input vector: two where it straddles a cache line."""
    work = geometry.workload
    if geometry.flat:
        packed = geometry.copy in (CopyScope.TILE, CopyScope.CHUNK)
        return 1.0 if packed or work.out_pixels % geometry.lanes == 0 else _STRADDLE
    if work.taps == 1:
        return 1.0
    aligned_rows = geometry.pitch % geometry.lanes == 0 or work.kernel[0] == 1
    if geometry.column_copies:
        return 1.0 if aligned_rows else _HALF_STRADDLE
    return _STRADDLE


def _flush_cycles(kernel: ConvKernel) -> float:
    """Cycles of carrying a chunk's sums through the scratch between reduction blocks, for one tile of channels."""
    if not kernel.kept_per_block:
        return 0.0
    narrow = _is_narrow(kernel.workload, kernel.oc_tile)
    per_vector = _NARROW_FLUSH_CYCLES_PER_VECTOR if narrow else _FLUSH_CYCLES_PER_VECTOR
    return kernel.reduction_blocks * kernel.geometry.vectors * kernel.oc_tile * per_vector


def _is_narrow(work: ConvWorkload, oc_tile: int) -> bool:
    """Whether a register tile has so few channels that loads bound it; depthwise kernels have few loads altogether."""
    return oc_tile <= MOST_BLOCKED_CHANNELS and work.in_channels_per_group >= _FEW_CHANNELS


def channels_read(work: ConvWorkload, oc_tile: int, kept: int, share: float) -> int:
    """Return the input channels that L1 has to hold while a share of the reduction is computed.

    Narrow block rows choose for themselves: each reads few of the channels, all of them together read all.
    """
    return math.ceil((work.in_channels_per_group if _is_narrow(work, oc_tile) else kept) * share)


def chunk_cycles(geometry: PixelGeometry, oc_tile: int, vectors: int, reduction_channels: int) -> float:
    """Cycles of one reduction step over all pixels of a chunk: full tiles and a shorter last one."""
    full, rest = divmod(geometry.vectors, vectors)
    cycles = full * _tile_cycles(geometry, oc_tile, vectors, reduction_channels)
    return cycles + (_tile_cycles(geometry, oc_tile, rest, reduction_channels) if rest else 0.0)


def _copy_cycles(kernel: ConvKernel) -> float:
    """Cycles of copying the input."""
    geometry, work = kernel.geometry, kernel.workload
    channels = work.batch * work.in_channels
    tasks_of_chunk = -(-kernel.block_rows // kernel.rows_per_task)
    cycles = 0.0
    if geometry.subsampled and not kernel.gathers_panels:
        cycles += channels * work.out_pixels * 4 / _COPY_BYTES_PER_CYCLE
    if geometry.copy is CopyScope.TILE:
        cycles += tasks_of_chunk * channels * geometry.chunks * geometry.pitch * 4 / _PACK_BYTES_PER_CYCLE
    if geometry.copy is CopyScope.CHUNK:
        pixels = geometry.chunks * -(-geometry.pitch // kernel.panel) * kernel.panel
        cycles += tasks_of_chunk * channels * pixels * 4 / _PACK_BYTES_PER_CYCLE
    if geometry.copy is CopyScope.LAYER:
        cycles += channels * geometry.channel_size * 4 / _COPY_BYTES_PER_CYCLE
    if geometry.copy is CopyScope.TASK:
        # Neighbouring chunks share rows, and the tasks of a group's channels each copy them.
        rows = geometry.chunks * (geometry.rows_per_chunk + (work.kernel[0] - 1) * work.dilation[0] // work.stride[0])
        size = rows * geometry.pitch * geometry.phases * 4
        cycles += tasks_of_chunk * channels * size / _OWN_COPY_BYTES_PER_CYCLE
    return cycles


def _stream_cycles(kernel: ConvKernel, machine: Machine) -> float:
    """Cycles of bringing weights and inputs from beyond L2, as far as computing does not hide them."""
    geometry, work = kernel.geometry, kernel.workload
    pixel_tiles = geometry.chunks * -(-geometry.vectors // kernel.vectors_per_tile)
    weight_bytes = 4 * math.prod(kernel.weight_shape)
    passes = geometry.chunks if geometry.copy is CopyScope.CHUNK else pixel_tiles
    # Threads with chunks of their own read all weights each.
    weight_passes = (
        work.batch * passes if weight_bytes > _L2_BYTES else min(machine.threads, work.batch * geometry.chunks)
    )
    rows_read = (geometry.rows_per_chunk + work.kernel[0] - 1) * geometry.phase_rows
    chunk_bytes = 4 * rows_read * geometry.pitch * geometry.phase_columns * work.in_channels
    tasks_of_chunk = -(-kernel.block_rows // kernel.rows_per_task)
    input_passes = tasks_of_chunk if chunk_bytes > _L2_BYTES else 1
    input_bytes = work.batch * geometry.chunks * chunk_bytes
    if input_bytes <= _L2_BYTES and geometry.copy is not CopyScope.NONE:
        input_passes = 0  # just copied, still in L2
    if geometry.copy is CopyScope.CHUNK and chunk_bytes > _PANEL_BYTES:
        input_passes = kernel.block_rows * kernel.tiles
    streamed = (weight_bytes * weight_passes + input_bytes * input_passes) / _STREAM_BYTES_PER_CYCLE
    if weight_bytes > _L2_BYTES:
        streamed += weight_bytes / _MEMORY_BYTES_PER_CYCLE
    # Each (pixel tile, channel) begins at another page: no prefetcher helps its first line.
    touches: float = work.batch * work.groups * pixel_tiles * kernel.kept_channels
    if geometry.copy is CopyScope.TILE:
        touches *= _PACKED_TOUCH
    if geometry.copy is CopyScope.CHUNK:
        touches = work.batch * geometry.chunks * work.in_channels * _PACKED_TOUCH
    far = min(input_passes, tasks_of_chunk) if input_bytes > _L2_BYTES else 0
    return streamed + touches * (far * _FAR_LINE_CYCLES + (tasks_of_chunk - far) * _NEAR_LINE_CYCLES)


def _scratch_cycles(kernel: ConvKernel) -> float:
    """Cycles of writing the sums to a task's scratch and reading them back."""
    geometry, work = kernel.geometry, kernel.workload
    if kernel.stores_from_registers:
        return 0.0
    chunk_bytes = 4 * kernel.block * geometry.vectors * geometry.lanes
    fits_l1 = kernel.rows_per_task * chunk_bytes <= SCRATCH_BYTES[0]
    speed = _L1_COPY_BYTES_PER_CYCLE if fits_l1 else _L2_COPY_BYTES_PER_CYCLE
    return 2 * work.batch * geometry.chunks * work.groups * kernel.block_rows * chunk_bytes / speed


def _output_cycles(kernel: ConvKernel) -> float:
    """Cycles of waiting for the residual's and the output's lines."""
    geometry, work = kernel.geometry, kernel.workload
    tensors = 2 if work.epilogue.residual else 1
    size = 4 * tensors * work.out_channels * work.out_pixels
    far = size > _L2_BYTES
    if _is_narrow(work, kernel.oc_tile):
        # A tile's vectors are one stretch of a row: what counts is bandwidth.
        return work.batch * size / _NARROW_OUTPUT_BYTES_PER_CYCLE if size > 2 * _L2_BYTES else 0.0
    if not kernel.stores_from_registers:
        return 0.0
    touches = tensors * work.batch * geometry.chunks * -(-geometry.vectors // kernel.vectors_per_tile)
    touches *= work.out_channels
    if geometry.copy is CopyScope.CHUNK:
        return touches * _FETCHED_OUTPUT_CYCLES
    return touches * (_OUTPUT_TOUCH_CYCLES if far else _NEAR_OUTPUT_TOUCH_CYCLES)


def _remote_bytes(kernel: ConvKernel, machine: Machine) -> float:
    """Bytes that threads read from other cores: of the input, or of its copy."""
    geometry, work = kernel.geometry, kernel.workload
    chunks = work.batch * geometry.chunks
    copied = geometry.copy is CopyScope.LAYER or (geometry.subsampled and not kernel.gathers_panels)
    if not copied:
        return remote_bytes(work, machine, chunks)
    pixels = work.out_pixels if geometry.subsampled else geometry.channel_size
    return remote_bytes_of_copy(work, machine, chunks, 4 * work.batch * work.in_channels * pixels)


def predicted_cycles(kernel: ConvKernel, machine: Machine) -> float:
    """Return the model's cycles of a kernel on all threads together."""
    geometry, work = kernel.geometry, kernel.workload
    steps = kernel.kept * (1 if kernel.index is IndexKind.POSITION else work.taps)
    channels = channels_read(work, kernel.oc_tile, kernel.kept_channels, kernel.kept_per_block / kernel.kept or 1.0)
    tiles = work.batch * geometry.chunks * work.groups * kernel.block_rows * kernel.tiles
    step_cycles = chunk_cycles(geometry, kernel.oc_tile, kernel.vectors_per_tile, channels)
    tasks = work.batch * geometry.chunks * work.groups * -(-kernel.block_rows // kernel.rows_per_task)
    # The sums, a vector of pixels for each and a weight: what does not fit is spilled.
    spilled = kernel.vectors_per_tile * (kernel.oc_tile + 1) + 1 > machine.registers and kernel.oc_tile > 1
    cycles = (
        tiles * (steps * step_cycles * (_SPILLED if spilled else 1.0) + _flush_cycles(kernel))
        + _copy_cycles(kernel)
        + _stream_cycles(kernel, machine)
        + _scratch_cycles(kernel)
        + _output_cycles(kernel)
        + tasks * _TASK_OVERHEAD
    )
    return cycles * machine.imbalance(tasks) + _remote_bytes(kernel, machine) / _REMOTE_BYTES_PER_CYCLE
