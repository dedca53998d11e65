"""Default decisions for a chain: a count of cycles, comparable with that of single layers (`tiling`, `channel_tiling`).

Its constants were chosen on MobileNet-V2's blocks from 112x112 to 7x7 pixels, within the network, on an AVX-512 server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tvm_nm.schedules.chain import KEEP_ALL, ChainKernel, Mixing
from tvm_nm.schedules.machine import Machine
from tvm_nm.workload import ConvWorkload

__all__ = ["chain_candidates", "chain_cycles", "choose_chain"]

_FMA_LATENCY = 4.0
_LOADS_PER_CYCLE = 1.6
_LOOP_OVERHEAD = 1.0
_FMA_SLOWDOWN = 1.1
_STORE_CYCLES = 2.0
_TASK_OVERHEAD = 300.0
_STREAM_BYTES_PER_CYCLE = 12.0
_L2_BYTES_PER_CYCLE = 64.0
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
    small = [kernel for kernel in found if _band_bytes(kernel) <= _MOST_BAND_BYTES]
    return small or found[:1]


def _band_rows(height: int) -> Iterator[int]:
    seen = set()
    for bands in range(1, height + 1):
        rows = -(-height // bands)
        if rows not in seen and (rows >= 2 or height < 2):
            seen.add(rows)
            yield rows


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
    # Rows of the first layer that neighbouring bands share are computed by both.
    rows = min(kernel.bands * kernel.in_rows - sum(work.padding[::2]), kernel.bands * work.height)
    first = _mix_cycles(kernel, kernel.first, kernel.mixing, max(rows, work.height))
    depthwise = _depthwise_cycles(kernel)
    tasks = work.batch * kernel.bands
    if kernel.staged:
        groups = -(-kernel.hidden_vectors // kernel.mixing.vectors)
        cycles = (first + depthwise) * machine.imbalance(tasks * groups) + tasks * groups * _TASK_OVERHEAD
        if kernel.last is not None:
            groups = -(-kernel.out_vectors // kernel.last_mixing.vectors)
            last = _mix_cycles(kernel, kernel.last, kernel.last_mixing, work.out_height)
            cycles += last * machine.imbalance(tasks * groups) + tasks * groups * _TASK_OVERHEAD
            hidden_bytes = 4 * work.batch * kernel.hidden_vectors * kernel.hidden_plane
            if hidden_bytes > _L2_BYTES:
                cycles += (1 + groups) * hidden_bytes / _STREAM_BYTES_PER_CYCLE
    else:
        cycles = first + depthwise
        if kernel.last is not None:
            cycles += _mix_cycles(kernel, kernel.last, kernel.last_mixing, work.out_height)
        cycles = cycles * machine.imbalance(tasks) + tasks * _TASK_OVERHEAD
    return cycles + _weight_cycles(kernel)


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


def _weight_cycles(kernel: ChainKernel) -> float:
    """Cycles of bringing weights from beyond L2, and those of many bands from L2."""
    sizes = [
        4 * work.out_channels * (mixing.kept or work.in_channels) * work.taps
        for work, mixing in ((kernel.first, kernel.mixing), (kernel.last, kernel.last_mixing))
        if work is not None
    ]
    once = sum(sizes) / _STREAM_BYTES_PER_CYCLE
    bands = kernel.depthwise.batch * kernel.bands
    return once + (bands - 1) * sum(sizes) / _L2_BYTES_PER_CYCLE * (0.0 if math.fsum(sizes) < _L1_BYTES / 2 else 1.0)
