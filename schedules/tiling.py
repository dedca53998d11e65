"""Default decisions for a convolution: a small model of the core picks the kernel variant of an untuned build.

The model counts cycles of the register tile's inner loop. Two vector FMAs and two loads start each cycle; a load that
straddles a cache line takes two slots; fewer than 8 sums in flight leave the FMA latency exposed; a tile whose inputs
exceed L1 streams them from L2. It ranks variants; it does not predict times (tuning measures those).
"""

from __future__ import annotations

from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.geometry import PixelGeometry, candidate_geometries
from tvm_nm.schedules.machine import Machine
from tvm_nm.workload import ConvWorkload

__all__ = ["choose_kernel", "predicted_cycles"]

_L1_BYTES = 40 * 1024
_L2_BYTES_PER_CYCLE = 28.0
_COPY_BYTES_PER_CYCLE = 6.0
_FMA_LATENCY = 4.0
_LOOP_OVERHEAD = 0.6
_STRADDLE = 1.7
_TASK_OVERHEAD = 300.0

# A task's sums stay in L2 beside its inputs.
_MAX_SCRATCH_BYTES = 192 * 1024
_MAX_CHUNK_INPUT_BYTES = 1 << 20


def _tile_cycles(geometry: PixelGeometry, oc_tile: int, vectors: int, reduction_channels: int) -> float:
    """Cycles of one reduction step of an `oc_tile` x `vectors` register tile."""
    work = geometry.workload
    fmas = oc_tile * vectors
    loads = oc_tile + vectors * (1.0 if work.taps == 1 else _STRADDLE)
    cycles = max(fmas / 2, loads / 2, _FMA_LATENCY)
    bytes_per_channel = work.kernel[0] * (vectors * geometry.lanes + work.kernel[1] - 1) * 4
    if bytes_per_channel * reduction_channels > _L1_BYTES:
        cycles = max(cycles, bytes_per_channel / work.taps / _L2_BYTES_PER_CYCLE)
    return cycles + _LOOP_OVERHEAD


def _chunk_cycles(geometry: PixelGeometry, oc_tile: int, vectors: int, reduction_channels: int) -> float:
    """Cycles of one reduction step over all pixels of a chunk: full tiles and a shorter last one."""
    full, rest = divmod(geometry.vectors, vectors)
    cycles = full * _tile_cycles(geometry, oc_tile, vectors, reduction_channels)
    return cycles + (_tile_cycles(geometry, oc_tile, rest, reduction_channels) if rest else 0.0)


def _copy_cycles(geometry: PixelGeometry) -> float:
    work = geometry.workload
    if geometry.reads_input_directly:
        return 0.0
    return work.batch * work.in_channels * geometry.channel_size * 4 / _COPY_BYTES_PER_CYCLE


def predicted_cycles(kernel: ConvKernel) -> float:
    """Return the model's cycles of a kernel on one thread."""
    geometry, work = kernel.geometry, kernel.workload
    steps = kernel.kept * (1 if kernel.index is IndexKind.POSITION else work.taps)
    channels = kernel.kept if kernel.index is not IndexKind.POSITION else -(-kernel.kept // work.taps)
    tiles = work.batch * geometry.chunks * work.groups * kernel.block_rows * kernel.tiles
    compute = tiles * steps * _chunk_cycles(geometry, kernel.oc_tile, kernel.vectors_per_tile, channels)
    tasks = work.batch * geometry.chunks * work.groups * -(-kernel.block_rows // kernel.rows_per_task)
    scratch = kernel.rows_per_task * kernel.block * geometry.vectors * geometry.lanes * 4
    rows_read = geometry.rows_per_chunk + work.kernel[0] - 1
    chunk_input = rows_read * geometry.pitch * geometry.phases * work.in_channels_per_group * 4
    # Sums or inputs that leave L2 cost bandwidth of the next level; a mild penalty is enough to rank.
    spill = 1.0 + 0.05 * (scratch > _MAX_SCRATCH_BYTES) + 0.05 * (chunk_input > _MAX_CHUNK_INPUT_BYTES)
    return compute * spill + _copy_cycles(geometry) + tasks * _TASK_OVERHEAD


def choose_kernel(
    workload: ConvWorkload,
    machine: Machine,
    *,
    block: int | None = None,
    index: IndexKind = IndexKind.NONE,
    kept: int | None = None,
) -> ConvKernel:
    """Return the kernel variant with the least predicted cycles.

    Parameters
    ----------
    workload
        The convolution.
    machine
        Vector width, registers, threads.
    block
        Output channels that share their kept positions; None where all do (dense).
    index
        How inputs are found.
    kept
        Length of a block row's reduction; default: everything.
    """
    if kept is None:
        kept = workload.in_channels_per_group * (workload.taps if index is IndexKind.POSITION else 1)
    geometries = candidate_geometries(workload, machine.lanes)
    variants = [
        _variant(geometry, machine, block, oc_tile, index, kept)
        for oc_tile in _oc_tiles(workload, machine, block)
        for geometry in geometries
    ]
    return min(variants, key=predicted_cycles)


def _oc_tiles(workload: ConvWorkload, machine: Machine, block: int | None) -> list[int]:
    per_group = workload.out_channels_per_group
    if block is None:
        return [tile for tile in (8, 6, 4) if tile <= per_group] or [per_group]
    block = min(block, per_group)
    dividing = [tile for tile in range(8, 3, -1) if block % tile == 0]
    return dividing or [block if block < 8 else 8]


def _variant(
    geometry: PixelGeometry, machine: Machine, block: int | None, oc_tile: int, index: IndexKind, kept: int
) -> ConvKernel:
    work = geometry.workload
    row_block = min(block or oc_tile, work.out_channels_per_group)
    channels = kept if index is not IndexKind.POSITION else -(-kept // work.taps)
    most = max(1, machine.accumulators // oc_tile)
    vectors = min(
        range(1, min(most, geometry.vectors) + 1),
        key=lambda v: _chunk_cycles(geometry, oc_tile, v, channels),
    )
    rows = -(-work.out_channels_per_group // row_block)
    return ConvKernel(
        geometry=geometry,
        index=index,
        block=row_block,
        oc_tile=oc_tile,
        kept=kept,
        index_dtype=_index_dtype(geometry, index),
        vectors_per_tile=vectors,
        rows_per_task=_rows_per_task(geometry, machine, row_block, rows),
    )


def _index_dtype(geometry: PixelGeometry, index: IndexKind) -> str:
    entries = geometry.workload.in_channels
    if index is IndexKind.POSITION and not geometry.reads_input_directly:
        entries *= geometry.channel_size
    return "uint8" if entries <= 1 << 8 else "uint16" if entries <= 1 << 16 else "int32"


def _rows_per_task(geometry: PixelGeometry, machine: Machine, block: int, rows: int) -> int:
    """Return as many block rows as fit the scratch while the tasks still divide evenly among the threads."""
    work = geometry.workload
    bytes_per_row = block * geometry.vectors * geometry.lanes * 4
    others = work.batch * geometry.chunks * work.groups
    best = 1
    for per_task in (d for d in range(2, rows + 1) if rows % d == 0):
        tasks = others * rows // per_task
        balanced = tasks % machine.threads == 0 or tasks >= 8 * machine.threads
        if per_task * bytes_per_row <= _MAX_SCRATCH_BYTES and balanced:
            best = per_task
    return best
