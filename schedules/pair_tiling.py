"""Default decisions for a channel-pair convolution: a count of cycles, in the unit of `pixel_cycles.predicted_cycles`.

An input that both channels of a pair keep costs what its FMAs do; one that only one of them keeps, its load. Each visit
of a pair to a block of the reduction carries its sums from and to L2, and mispredicts the ends of its loops.

The constants were fitted to times of 38 variants of ResNet-50's layers at 2:4 and 1:4 on an AVX-512 server, most of
them within the network: 6% off on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.pair_conv import MOST_ROWS, NEIGHBOURS, PairConvKernel
from tvm_nm.workload import ConvWorkload

__all__ = ["pair_candidates", "pair_cycles", "shared_inputs"]

_FMAS_PER_CYCLE = 1.9
_LOADS_PER_CYCLE = 1.7
_VISIT_CYCLES = 15.0
_CHOSEN = 0.85
"""Of how far the largest of as many normal variables as a channel has to choose from lies above their mean."""
_CARRY_CYCLES_PER_VECTOR = 4.6
_OUTPUT_CYCLES_PER_VECTOR = 13.0
_PACK_CYCLES_PER_VECTOR = 6.5
_COPY_BYTES_PER_CYCLE = 5.0
_STREAM_BYTES_PER_CYCLE = 16.0
_TASK_OVERHEAD = 300.0

_MOST_TILE_BYTES = 40 * 1024
_LEAST_VECTORS = 4
_BLOCK_CHOICES = 3


def pair_cycles(kernel: PairConvKernel, machine: Machine) -> float:
    """Return the cycles of a kernel, those of idle threads included, as `pixel_cycles.predicted_cycles` counts."""
    work = kernel.workload
    full, rest = divmod(work.out_pixels, kernel.tile_pixels)
    tiles = full * _tile_cycles(kernel, kernel.tile_pixels) + (_tile_cycles(kernel, rest) if rest else 0.0)
    cycles = work.batch * tiles + kernel.tasks * _TASK_OVERHEAD
    cycles += kernel.packed_bytes / _STREAM_BYTES_PER_CYCLE
    if kernel.is_copied:
        cycles += 4 * work.batch * work.in_channels * kernel.channel_size / _COPY_BYTES_PER_CYCLE
    return cycles * machine.imbalance(kernel.tasks)


def _tile_cycles(kernel: PairConvKernel, pixels: int) -> float:
    """Cycles of all channels of a tile."""
    vectors, kept = kernel.vectors(pixels), kernel.kept_per_block
    shared = shared_inputs(kernel)
    step_of_both = max(2 * vectors / _FMAS_PER_CYCLE, (vectors + 2) / _LOADS_PER_CYCLE)
    step_of_one = max(2 * vectors / _FMAS_PER_CYCLE, (2 * vectors + 2) / _LOADS_PER_CYCLE)
    visit = shared * step_of_both + (kept - shared) * step_of_one + _VISIT_CYCLES
    carried = 2 * vectors * (kernel.blocks - 1) * _CARRY_CYCLES_PER_VECTOR
    output = 2 * vectors * (2 if kernel.workload.epilogue.residual else 1) * _OUTPUT_CYCLES_PER_VECTOR
    tasks = kernel.pairs // kernel.pairs_per_task
    packing = tasks * kernel.blocks * kernel.rows_per_block * vectors * _PACK_CYCLES_PER_VECTOR
    return kernel.pairs * (kernel.blocks * visit + carried + output) + packing


def shared_inputs(kernel: PairConvKernel) -> float:
    """Return how many inputs of a block both channels of a pair keep on average, of random weights.

    The first find the best partner of many, the last have no choice.
    """
    kept, of_group, group = kernel.kept_per_block, kernel.of_group, kernel.group
    share = of_group / group
    spread = math.sqrt(kept * share * (1 - share) * (group - of_group) / max(1, group - 1))
    choice = min(2 * kernel.pairs_per_task, NEIGHBOURS)
    return min(float(kept), kept * share + _CHOSEN * spread * math.sqrt(2 * math.log(choice / 2)))


def pair_candidates(work: ConvWorkload, machine: Machine, of_group: int, group: int) -> list[PairConvKernel]:
    """Return the variants worth trying, none where the family does not fit.

    Parameters
    ----------
    work
        The convolution.
    machine
        Vector width, registers, threads.
    of_group, group
        N and M.
    """
    fits = work.groups == 1 and work.out_channels % 2 == 0 and work.in_channels % group == 0
    if not fits or work.out_pixels < machine.lanes:
        return []
    return list(_variants(work, machine, of_group, group))


def _variants(work: ConvWorkload, machine: Machine, of_group: int, group: int) -> Iterator[PairConvKernel]:
    lanes = machine.lanes
    most = machine.accumulators // 2
    for pixels in _tile_sizes(work, lanes, most):
        row_bytes = 4 * -(-pixels // lanes) * lanes
        lengths = [
            channels
            for channels in range(group, work.in_channels + 1, group)
            if work.in_channels % channels == 0
            and channels * work.taps <= MOST_ROWS
            and channels * work.taps * row_bytes <= _MOST_TILE_BYTES
        ]
        for channels in lengths[-_BLOCK_CHOICES:]:
            kernel = PairConvKernel(work, lanes, of_group, group, pixels, channels, 1)
            for pairs in _task_sizes(kernel, machine.threads):
                yield PairConvKernel(work, lanes, of_group, group, pixels, channels, pairs)


def _tile_sizes(work: ConvWorkload, lanes: int, most: int) -> list[int]:
    """Return the tiles of up to `most` vectors worth trying: whole vectors of a 1x1 kernel, else whole rows, or all."""
    pixels = work.out_pixels
    if pixels <= most * lanes:
        return [pixels]
    if work.taps == 1:
        sizes = [vectors * lanes for vectors in range(_LEAST_VECTORS, most + 1)]
    else:
        sizes = [rows * work.out_width for rows in range(1, work.out_height + 1)]
    fitting = [size for size in sizes if size <= most * lanes and (pixels % size or size) >= lanes and size >= lanes]
    return [size for size in fitting if size > max(fitting) // 2]


def _task_sizes(kernel: PairConvKernel, threads: int) -> list[int]:
    """Return into how many pairs tasks may be cut: as few tasks as keep the threads evenly busy."""
    tiles = kernel.workload.batch * kernel.tiles
    for pairs in (d for d in range(kernel.pairs, 0, -1) if kernel.pairs % d == 0):
        tasks = tiles * (kernel.pairs // pairs)
        if tasks % threads == 0 or tasks >= 8 * threads:
            return [pairs]
    return [1]
