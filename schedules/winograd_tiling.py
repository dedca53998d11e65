"""Default decisions of the Winograd family: which variant, and whether one beats the direct convolution.

The model counts the cycles of each stage on one thread, in the units of `pixel_cycles.predicted_cycles`: the matrix
products by FMAs and loads, the transforms by channel vectors of a tile and of its pixels, and what is streamed from
beyond L2: the weights, once for each chunk, and the transformed inputs, once for each block of output channels, where
they exceed L2; with several threads, what one core reads that another has written. Its constants were fitted to times
of 77 layers of ResNet-50, VGG-16 and SqueezeNet with one and two threads on an AVX-512 server: the variant that it
picks takes 7% longer on average than the best that a search found, and of 53 layers 50 get the faster of a Winograd
and a direct kernel.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tvm_nm.schedules.core_traffic import REMOTE_BYTES_PER_CYCLE, remote_bytes
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.winograd import WinogradKernel, winograd_applies
from tvm_nm.workload import ConvWorkload

__all__ = ["choose_winograd", "winograd_candidates", "winograd_cycles"]

_LOADS_PER_CYCLE = 1.6
_FMA_LATENCY = 4.0
_STEP_OVERHEAD = 30.0
# Register tiles whose sums and weights leave no register for anything else.
_FULL_REGISTERS = 1.2
_COPY_CYCLES_PER_PIXEL = 8.0
_INPUT_CYCLES_PER_VALUE = 5.0
_OUTPUT_CYCLES_PER_VALUE = 12.0
_MAXIMA_CYCLES_PER_VALUE = 4.0  # the same where a quarter of the values is stored
# What a core has to itself of 2 MiB beside a busy neighbour and what is streamed.
_L2_BYTES = 1 << 20
_L2_BYTES_PER_CYCLE = 40.0
_STREAM_BYTES_PER_CYCLE = 10.0
_MEMORY_BYTES_PER_CYCLE = 8.0
# Between these counts and those of the direct kernels.
_SCALE = 0.9
_TASK_OVERHEAD = 2000.0
_LEAST_CHUNK_TILES = 14
# Narrower chunks touch more rows, and so more pages, for as many pixels: measured up to 1.4 times as slow.
_LEAST_CHUNK_COLUMNS = 28
_MOST_CHUNK_TILES = 256
_STAGED_TILES = 64


def winograd_cycles(kernel: WinogradKernel, machine: Machine) -> float:
    """Return the model's cycles of a kernel on all threads, those that have nothing to do at its end included."""
    frequencies = kernel.size**2
    full, rest = divmod(kernel.chunk_tiles, kernel.tiles_per_step)
    steps = full * _step_cycles(kernel, kernel.tiles_per_step, machine)
    steps += _step_cycles(kernel, rest, machine) if rest else 0.0
    products = kernel.chunks * kernel.oc_blocks * frequencies * steps
    tiles = kernel.chunks * kernel.chunk_tiles
    pixels = kernel.chunks * (kernel.chunk_rows * kernel.tile + 2) * (kernel.chunk_columns * kernel.tile + 2)
    transforms = kernel.ic_vectors * (tiles * frequencies * _INPUT_CYCLES_PER_VALUE + pixels * _COPY_CYCLES_PER_PIXEL)
    transforms *= kernel.parts
    per_value = _MAXIMA_CYCLES_PER_VALUE if kernel.workload.epilogue.pool else _OUTPUT_CYCLES_PER_VALUE
    transforms += tiles * kernel.oc_blocks * kernel.oc_vectors * kernel.tile**2 * per_value
    tasks = frequencies * kernel.oc_blocks if kernel.staged else kernel.chunks * kernel.parts
    cycles = (products + transforms + _stream_cycles(kernel, machine)) * machine.imbalance(tasks)
    cycles += _TASK_OVERHEAD * kernel.chunks * kernel.parts
    return _SCALE * (cycles + _remote_bytes(kernel, machine) / REMOTE_BYTES_PER_CYCLE)


def _step_cycles(kernel: WinogradKernel, tiles: int, machine: Machine) -> float:
    fmas, loads = float(tiles * kernel.oc_vectors), tiles + kernel.oc_vectors
    if fmas + kernel.oc_vectors >= machine.registers:
        fmas *= _FULL_REGISTERS
    return kernel.reduction * max(fmas / 2, loads / _LOADS_PER_CYCLE, _FMA_LATENCY) + _STEP_OVERHEAD


def _remote_bytes(kernel: WinogradKernel, machine: Machine) -> float:
    """Bytes that threads read from other cores: of the input, and what another stage left."""
    threads = machine.threads
    read = remote_bytes(kernel.workload, machine, kernel.chunks)
    if not kernel.staged:
        return read
    # The stages divide input channels, frequencies of blocks of output channels, and output channels.
    others = 1 - 1 / threads
    values = 4 * kernel.size**2 * kernel.chunk_tiles * kernel.lanes
    sums = values * kernel.oc_vectors * kernel.oc_blocks if kernel.oc_blocks % threads else 0
    return read / threads + others * (values * kernel.ic_vectors * min(kernel.oc_blocks, threads) + sums)


def _stream_cycles(kernel: WinogradKernel, machine: Machine) -> float:
    """Cycles of moving weights from memory, inputs from L2 and, where it is too small, all of them from beyond it.

    Each block of output channels reads the transformed inputs anew.
    """
    frequencies, tiles = kernel.size**2, kernel.chunk_tiles
    weights = 4 * math.prod(kernel.weight_shape)
    inputs = 4 * frequencies * tiles * kernel.ic_vectors * kernel.lanes
    sums = 4 * frequencies * tiles * kernel.oc_vectors * kernel.lanes * (kernel.oc_blocks if kernel.staged else 1)
    reads = kernel.chunks * inputs * kernel.oc_blocks
    cycles = weights / _MEMORY_BYTES_PER_CYCLE
    fits = weights / kernel.parts + inputs + sums <= _L2_BYTES
    passes = min(kernel.chunks, machine.threads) if fits else kernel.chunks
    cycles += weights * (passes - 1) / _STREAM_BYTES_PER_CYCLE
    if inputs + sums > _L2_BYTES:
        moved = reads + kernel.chunks * (kernel.parts * inputs + 2 * sums)
        return cycles + moved / _STREAM_BYTES_PER_CYCLE
    return cycles + reads / _L2_BYTES_PER_CYCLE


def choose_winograd(workload: ConvWorkload, machine: Machine, block: int = 0, kept: int = 0) -> WinogradKernel | None:
    """Return the variant with the least predicted cycles, or None where the family does not apply.

    Parameters
    ----------
    workload
        The convolution.
    machine
        Vector width, registers, threads.
    block, kept
        Output channels that share their kept input channels, and how many they keep; 0 for dense.
    """
    found = winograd_candidates(workload, machine, block, kept)
    return min(found, key=lambda kernel: winograd_cycles(kernel, machine), default=None)


def winograd_candidates(
    workload: ConvWorkload, machine: Machine, block: int = 0, kept: int = 0
) -> list[WinogradKernel]:
    """Return the variants worth considering, none where the family does not apply; as `choose_winograd`.

    Block rows must be whole vectors.
    """
    if not winograd_applies(workload):
        return []
    found = []
    most_vectors = min(4, -(-(block or workload.out_channels) // machine.lanes))
    vector_counts = [v for v in range(1, most_vectors + 1) if block % (v * machine.lanes) == 0]
    for tile in (2, 4):
        rows, columns = -(-workload.out_height // tile), -(-workload.out_width // tile)
        least = min(-(-rows * columns // machine.threads), _LEAST_CHUNK_TILES)
        shapes = [
            (chunk_rows, chunk_columns)
            for chunk_rows in _even_cuts(rows)
            for chunk_columns in _even_cuts(columns)
            if chunk_columns >= min(columns, _LEAST_CHUNK_COLUMNS)
            if least <= chunk_rows * chunk_columns <= _MOST_CHUNK_TILES
        ]
        cuts = [(*shape, False) for shape in shapes]
        if rows * columns <= _STAGED_TILES:
            cuts.append((rows, columns, True))
        for vectors in vector_counts:
            most = min(machine.accumulators // vectors + (vectors == 4), machine.most_sums() // vectors)
            for down, across, staged in cuts:
                per_step = _tiles_per_step(down * across, most)
                sizes = (machine.lanes, tile, down, across, vectors, per_step)
                kernel = WinogradKernel(workload, *sizes, staged, block, kept)
                found += [kernel, *_divided(kernel, machine)]
    return found


def _divided(kernel: WinogradKernel, machine: Machine) -> list[WinogradKernel]:
    """Return a kernel whose chunks do not occupy all threads with more tasks: up to twice as many as threads."""
    if kernel.staged or kernel.chunks >= machine.threads:
        return []
    most = min(kernel.oc_blocks, 2 * machine.threads // kernel.chunks)
    return [replace(kernel, parts=parts) for parts in range(2, most + 1) if kernel.oc_blocks % parts == 0]


def _even_cuts(count: int) -> list[int]:
    """Return the piece lengths that cut `count` into 1, 2, 3, ... pieces."""
    return sorted({-(-count // pieces) for pieces in range(1, count + 1)})


def _tiles_per_step(tiles: int, most: int) -> int:
    """Return the longest step up to `most` that needs no more steps than `most` itself, evenly."""
    steps = -(-tiles // most)
    return -(-tiles // steps)
