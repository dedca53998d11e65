"""The model of the core chooses kernels that fit it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv import BLOCKS, workloads

from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.pixel_cycles import predicted_cycles
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.workload import ConvWorkload

AVX512, AVX2, NEON, SSE = Machine(16, 32, 1), Machine(8, 16, 1), Machine(4, 32, 4), Machine(4, 16, 2)


def assert_fits(kernel: ConvKernel, machine: Machine) -> None:
    work, geometry = kernel.workload, kernel.geometry
    assert geometry.lanes == machine.lanes
    assert 1 <= kernel.vectors_per_tile <= geometry.vectors
    # Sums of the register tile stay in registers, with some left for operands.
    assert kernel.oc_tile * kernel.vectors_per_tile <= machine.accumulators or kernel.vectors_per_tile == 1
    assert kernel.oc_tile <= machine.accumulators
    assert machine.accumulators < machine.registers
    assert 1 <= kernel.oc_tile <= kernel.block <= work.out_channels_per_group
    assert (kernel.block_rows - 1) * kernel.block < work.out_channels_per_group <= kernel.block_rows * kernel.block
    assert kernel.block_rows % kernel.rows_per_task == 0
    assert kernel.kept_per_block == 0 or kernel.kept % kernel.kept_per_block == 0
    indexed = work.in_channels
    if kernel.index is IndexKind.POSITION:
        indexed = (work.in_channels - 1) * kernel.channel_stride + 1
        indexed += (
            0
            if geometry.flat
            else max(geometry.tap_offset(ky, kx) for ky in range(work.kernel[0]) for kx in range(work.kernel[1]))
        )
    assert indexed - 1 <= np.iinfo(kernel.index_dtype).max
    assert np.isfinite(predicted_cycles(kernel, machine))
    assert predicted_cycles(kernel, machine) > 0


@settings(max_examples=200, deadline=None)
@given(
    workloads(),
    st.sampled_from([AVX512, AVX2, NEON, SSE]),
    st.sampled_from(IndexKind),
    st.sampled_from(BLOCKS),
    st.floats(0.01, 1),
)
def test_choices_fit_the_machine(
    work: ConvWorkload, machine: Machine, index: IndexKind, block: int, density: float
) -> None:
    if index is IndexKind.NONE:
        kernel = choose_kernel(work, machine)
        assert kernel.kept == work.in_channels_per_group
    else:
        inputs = work.in_channels_per_group * (work.taps if index is IndexKind.POSITION else 1)
        kept = max(1, int(inputs * density))
        kernel = choose_kernel(work, machine, block=block, index=index, kept=kept)
        assert kernel.kept == kept
        assert kernel.block == min(block, work.out_channels_per_group)
    assert kernel.index is index
    assert_fits(kernel, machine)


def layer(inputs: int, outputs: int, size: int, kernel: int, stride: int = 1) -> ConvWorkload:
    pad = kernel // 2
    return ConvWorkload(
        1, inputs, outputs, size * stride, size * stride, (kernel, kernel), (stride, stride), (pad, pad, pad, pad)
    )


RESNET50 = [
    layer(3, 64, 112, 7, 2),
    layer(64, 64, 56, 1),
    layer(64, 64, 56, 3),
    layer(64, 256, 56, 1),
    layer(128, 128, 28, 3, 2),
    layer(128, 128, 28, 3),
    layer(256, 512, 28, 1, 2),
    layer(512, 128, 28, 1),
    layer(256, 256, 14, 3),
    layer(256, 1024, 14, 1),
    layer(512, 512, 7, 3),
    layer(512, 2048, 7, 1),
    layer(2048, 512, 7, 1),
]


@pytest.mark.parametrize("work", RESNET50, ids=str)
def test_resnet50_on_avx512(work: ConvWorkload) -> None:
    dense = choose_kernel(work, AVX512)
    assert_fits(dense, AVX512)
    # Two FMAs of latency 4 a cycle need 8 sums in flight, and each load should serve several FMAs.
    assert dense.oc_tile * dense.vectors_per_tile >= 8
    tile_loads = dense.oc_tile + dense.vectors_per_tile
    assert dense.oc_tile * dense.vectors_per_tile / tile_loads >= 1.5
    assert dense.block_rows * dense.tiles * dense.oc_tile == work.out_channels  # none is computed for nothing
    # 7x7 maps waste the most: 49 pixels in four vectors.
    assert dense.geometry.useful_share >= (0.75 if work.out_width == 7 else 0.87)


@pytest.mark.parametrize("work", RESNET50[1:], ids=str)
def test_dropping_half_of_the_channels_pays_off(work: ConvWorkload) -> None:
    dense = predicted_cycles(choose_kernel(work, AVX512), AVX512)
    half, quarter = (
        predicted_cycles(
            choose_kernel(work, AVX512, block=16, index=IndexKind.CHANNEL, kept=work.in_channels // share), AVX512
        )
        for share in (2, 4)
    )
    assert quarter < half < dense
    assert half > dense / 4  # half of the work is not less than half of the time, give or take the tile


def test_sharing_an_index_beats_choosing_alone() -> None:
    work = layer(256, 256, 14, 3)
    alone, shared = (
        predicted_cycles(choose_kernel(work, AVX512, block=block, index=IndexKind.POSITION, kept=1152), AVX512)
        for block in (1, 8)
    )
    assert shared < alone


@pytest.mark.parametrize("threads", [2, 4, 8])
def test_tasks_for_every_thread(threads: int) -> None:
    for work in RESNET50:
        kernel = choose_kernel(work, Machine(16, 32, threads))
        tasks = kernel.geometry.chunks * (kernel.block_rows // kernel.rows_per_task)
        # Even shares, or so many that the uneven rest is small.
        assert tasks % threads == 0 or tasks >= 8 * threads, f"{work}: {tasks} tasks for {threads} threads"
