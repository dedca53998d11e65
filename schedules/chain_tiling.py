"""Default decisions for a chain: a count of cycles, comparable with that of single layers (`tiling`, `channel_tiling`).

Its constants were chosen on MobileNet-V2's blocks from 112x112 to 7x7 pixels, within the network, on an AVX-512 server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tvm_nm.schedules.chain import KEEP_ALL, ChainKernel, Mixing
from tvm_nm.schedules.core_traffic import REMOTE_BYTES_PER_CYCLE
from tvm_nm.schedules.machine import Machine
from tvm_nm.workload import ConvWorkload

__all__ = ["chain_candidates", "chain_cycles", "choose_chain", "crossing_cycles"]

_FMA_LATENCY = 4.0
_LOADS_PER_CYCLE = 1.6
_LOOP_OVERHEAD = 1.0
_FMA_SLOWDOWN = 1.1
_STORE_CYCLES = 2.0
_TASK_OVERHEAD = 300.0
_STREAM_BYTES_PER_CYCLE = 12.0
_L2_BYTES_PER_CYCLE = 64.0
# Of each thread, for a second parallel loop.
_LOOP_CYCLES = 2400.0
_L1_BYTES = 40 * 1024
_L2_BYTES = 1 << 20
_MOST_BAND_BYTES = 3 << 19

_VECTORS = (2, 4, 3, 1)


def choose_chain(
    layers: tuple[ConvWorkload, ConvWorkload, ConvWorkload | None],
    machine: Machine,
    *,
    kept: tuple[Mixing, Mixing] = (KEEP_ALL, KEEP_ALL),
    blocked_input: bool = False,
) -> ChainKernel:
    """Return the variant of a chain with the least predicted cycles.

    Parameters
    ----------
    layers
        First, depthwise and last; `chain_applies` to them.
    machine
        What the kernel is generated for.
    kept
        What the first and the last layer keep; their `vectors` do not matter.
    blocked_input
        Whether the input is blocked.
    """
    variants = chain_candidates(layers, machine, kept=kept, blocked_input=blocked_input)
    return min(variants, key=lambda kernel: chain_cycles(kernel, machine))


def chain_candidates(
    layers: tuple[ConvWorkload, ConvWorkload, ConvWorkload | None],
    machine: Machine,
    *,
    kept: tuple[Mixing, Mixing] = (KEEP_ALL, KEEP_ALL),
    blocked_input: bool = False,
) -> list[ChainKernel]:
    """Return the variants worth trying; parameters as of `choose_chain`."""
    first, depthwise, last = layers
    lanes = machine.lanes
    tiles = [Mixing(v, kept[0].kept, kept[0].block) for v in _vector_counts(first, kept[0], machine)]
    last_tiles = [Mixing(1)]
    if last is not None:
        last_tiles = [Mixing(v, kept[1].kept, kept[1].block) for v in _vector_counts(last, kept[1], machine)]
    # A stage's copy of a padded input would be made by each of its tasks.
    staged = [False, True] if first.is_pointwise else [False]
    found = [
        ChainKernel(first, depthwise, last, lanes, machine.registers, rows, stage, tile, last_tile, blocked_input)
        for rows in _band_rows(depthwise.out_height)
        for stage in staged
        for tile in tiles
        for last_tile in last_tiles
    ]
    if last is not None and first.is_pointwise:
        found += [
            replace(kernel, shares=shares)
            for kernel in found
            if not kernel.staged
            for shares in _share_counts(kernel, machine)
        ]
    small = [kernel for kernel in found if _band_bytes(kernel) <= _MOST_BAND_BYTES]
    return small or found[:1]


def _band_rows(height: int) -> Iterator[int]:
    seen = set()
    for bands in range(1, height + 1):
        rows = -(-height // bands)
        if rows not in seen and (rows >= 2 or height < 2):
            seen.add(rows)
            yield rows


def _share_counts(kernel: ChainKernel, machine: Machine) -> list[int]:
    """Return the counts of shares that give about as many tasks as there are threads, where bands are too few."""
    bands = kernel.depthwise.batch * kernel.bands
    found = set()
    for shares in {machine.threads // bands, -(-machine.threads // bands)}:
        if 1 < shares <= kernel.hidden_groups:  # rounded down to what leaves none empty
            found.add(-(-kernel.hidden_groups // -(-kernel.hidden_groups // shares)))
    return sorted(found)


def _vector_counts(work: ConvWorkload, kept: Mixing, machine: Machine) -> Sequence[int]:
    """Return the vectors of a register tile to try: a tile does not span block rows."""
    vectors = -(-work.out_channels // machine.lanes)
    if kept.kept:
        return [v for v in _VECTORS if (kept.block // machine.lanes) % v == 0 and v <= vectors] or [1]
    most = 4 if machine.registers >= 32 else 2
    return [v for v in _VECTORS if v <= min(vectors, most)]


def _band_bytes(kernel: ChainKernel) -> int:
    """Return the bytes of a task's scratch."""
    padded = kernel.mixing.vectors * kernel.in_rows * kernel.pitch * kernel.lanes
    hidden = 0 if kernel.staged or kernel.last is None else kernel.hidden_vectors * kernel.hidden_plane
    return 4 * (padded + hidden)


def chain_cycles(kernel: ChainKernel, machine: Machine) -> float:
    """Return the model's cycles, those of idle threads included."""
    work = kernel.depthwise
    cycles = _mix_cycles(kernel, kernel.first, kernel.mixing, _first_rows(kernel)) + _depthwise_cycles(kernel)
    tasks = work.batch * kernel.bands
    last = 0.0
    if kernel.last is not None:
        last = _mix_cycles(kernel, kernel.last, kernel.last_mixing, work.out_height)
    if kernel.staged:
        groups = kernel.hidden_groups
        cycles = cycles * _busiest(kernel, groups, 1, machine) + tasks * groups * _TASK_OVERHEAD
        if kernel.last is not None:
            groups = -(-kernel.out_vectors // kernel.last_mixing.vectors)
            cycles += last * _busiest(kernel, groups, 1, machine) + tasks * groups * _TASK_OVERHEAD
            if _hidden_bytes(kernel) > _L2_BYTES:
                cycles += (1 + groups) * _hidden_bytes(kernel) / _STREAM_BYTES_PER_CYCLE
    else:
        share = kernel.share_groups
        cycles = (cycles + last) * _busiest(kernel, kernel.hidden_groups, share, machine)
        cycles += tasks * kernel.shares * _TASK_OVERHEAD
        if kernel.shares > 1:
            cycles += work.batch * kernel.out_vectors * work.out_pixels * (kernel.shares + _STORE_CYCLES)
    return cycles + _weight_cycles(kernel, machine) + crossing_cycles(kernel, machine)


def crossing_cycles(kernel: ChainKernel, machine: Machine) -> float:
    """Return the cycles in which threads wait for what others wrote, and for each other.

    The layer before is taken to be cut into rows as this one is.
    """
    if machine.threads == 1:
        return 0.0
    first, last = kernel.first, kernel.output
    sizes = 4 * math.prod(first.input_shape), 4 * math.prod(last.output_shape)
    bands = first.batch * kernel.bands
    per_band = max(1.0, machine.threads / bands)
    # Of the rows that neighbouring bands share, those of one thread's bands stay with it.
    between = (min(machine.threads, bands) - 1) / max(1, bands - 1)
    shared = (_first_rows(kernel) / first.out_height - 1) * between
    crossing = (per_band * (1 + shared) - 1) * sizes[0]
    if kernel.staged and kernel.last is not None:
        crossing += (per_band - 1) * _hidden_bytes(kernel)
    crossing += (kernel.shares - 1) * sizes[1]
    loops = kernel.shares > 1 or (kernel.staged and kernel.last is not None)
    return crossing / REMOTE_BYTES_PER_CYCLE + loops * machine.threads * _LOOP_CYCLES


def _hidden_bytes(kernel: ChainKernel) -> int:
    return 4 * kernel.first.batch * kernel.hidden_vectors * kernel.lanes * kernel.depthwise.out_pixels


def _first_rows(kernel: ChainKernel) -> int:
    """Return the rows of the first layer of all bands: those that neighbours share are computed by both."""
    work = kernel.depthwise
    tops = [band * kernel.rows * work.stride[0] - work.padding[0] for band in range(kernel.bands)]
    return max(sum(min(top + kernel.in_rows, work.height) - max(top, 0) for top in tops), work.height)


def _busiest(kernel: ChainKernel, groups: int, per_task: int, machine: Machine) -> float:
    """Return how many times longer the thread with the most work takes than if all had as much.

    Each task is a band of so many of the groups of channels; threads get equal numbers of consecutive tasks.
    """
    height = kernel.depthwise.out_height
    rows = [min(kernel.rows, height - start) for start in range(0, height, kernel.rows)]
    parts = [min(per_task, groups - start) for start in range(0, groups, per_task)]
    tasks = [count * part for count in rows for part in parts] * kernel.depthwise.batch
    step = -(-len(tasks) // machine.threads)
    most = max(sum(tasks[start : start + step]) for start in range(0, len(tasks), step))
    return most * machine.threads / sum(tasks)


def _mix_cycles(kernel: ChainKernel, work: ConvWorkload, mixing: Mixing, rows: int) -> float:
    """Cycles of a layer that mixes channels, for that many rows of its output."""
    vectors = -(-work.out_channels // kernel.lanes)
    kept = (mixing.kept or work.in_channels) * work.taps
    cycles = 0.0
    for count, groups in ((mixing.vectors, vectors // mixing.vectors), (vectors % mixing.vectors, 1)):
        if not count or not groups:
            continue
        for pixels, tiles in _pixel_tiles(rows, work.out_width, kernel.pixels(count)):
            step = max(pixels * count / 2, (pixels + count) / _LOADS_PER_CYCLE, _FMA_LATENCY)
            step = step * _FMA_SLOWDOWN + _LOOP_OVERHEAD
            cycles += groups * tiles * (kept * step + pixels * count * _STORE_CYCLES)
    return work.batch * cycles


def _pixel_tiles(rows: int, width: int, most: int) -> list[tuple[int, int]]:
    """Return (pixels, count) of the register tiles of some rows."""
    if 2 * width <= most:
        together = most // width
        full, rest = divmod(rows, together)
        return [(together * width, full)] + ([(rest * width, 1)] if rest else [])
    columns = -(-width // -(-width // most))
    full, rest = divmod(width, columns)
    return [(columns, full * rows)] + ([(rest, rows)] if rest else [])


def _depthwise_cycles(kernel: ChainKernel) -> float:
    work = kernel.depthwise
    vector = work.taps / 2 * _FMA_SLOWDOWN + _STORE_CYCLES
    padded = 4 * kernel.in_rows * kernel.pitch * kernel.lanes
    if kernel.mixing.vectors * padded > _L1_BYTES:  # written and read in L2
        vector += 2 * work.stride[0] * work.stride[1] * kernel.lanes * 4 / _L2_BYTES_PER_CYCLE
    return work.batch * kernel.hidden_vectors * work.out_pixels * vector


def _weight_cycles(kernel: ChainKernel, machine: Machine) -> float:
    """Cycles of bringing weights from beyond L2, for each thread that has bands, and those of further ones from L2."""
    sizes = [
        4 * work.out_channels * (mixing.kept or work.in_channels) * work.taps
        for work, mixing in ((kernel.first, kernel.mixing), (kernel.last, kernel.last_mixing))
        if work is not None
    ]
    size = math.fsum(sizes)
    bands = kernel.depthwise.batch * kernel.bands
    readers = min(machine.threads, bands)
    again = 0.0 if size < _L1_BYTES / 2 else (bands - readers) * size / _L2_BYTES_PER_CYCLE
    return readers * size / _STREAM_BYTES_PER_CYCLE + again
