"""Every variant of the depthwise family computes the convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import integers, run_conv
from test_conv import TARGETS, workloads
from test_tiling import AVX2, AVX512, NEON, SSE, layer

from tvm_nm.schedules.conv import ConvKernel
from tvm_nm.schedules.depthwise_conv import DepthwiseKernel, pack_depthwise
from tvm_nm.schedules.depthwise_tiling import depthwise_candidates, depthwise_cycles
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine, machine_of
from tvm_nm.schedules.variants import default_kernel, kernel_from_text, neighbours, ranked_kernels, variant_text
from tvm_nm.workload import ConvWorkload, Epilogue

PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
RELU6 = Epilogue(False, 0.0, 6.0)


@dataclass(frozen=True)
class Case:
    work: ConvWorkload
    target: str
    seed: int


def depthwise(channels: int, size: int, kernel: int, stride: int = 1, batch: int = 1) -> ConvWorkload:
    pad = kernel // 2
    square = ((kernel, kernel), (stride, stride), (pad,) * 4)
    return ConvWorkload(batch, channels, channels, size, size, *square, groups=channels, epilogue=RELU6)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, DepthwiseKernel]:
    """Any variant of depthwise convolutions of all shapes, with more tiles, bands and tasks than are worth trying."""
    work = draw(workloads())
    target = draw(st.sampled_from(sorted(TARGETS)))
    lanes = machine_of(TARGETS[target]).lanes
    channels = lanes + draw(st.sampled_from([0, 1, 3, lanes, lanes + 2]))
    grown = (work.height + draw(st.sampled_from([0, 3, 9])), work.width + draw(st.sampled_from([0, 4, 17])))
    sizes = {"in_channels": channels, "out_channels": channels, "groups": channels}
    work = replace(work, **sizes, height=grown[0], width=grown[1])
    assume(min(work.height * work.width, work.out_pixels) >= lanes)
    least = -(-lanes // work.out_width)
    rows = [work.out_height, *(range(least, work.out_height) if work.width >= lanes else ())]
    kernel = DepthwiseKernel(work, lanes, draw(st.integers(1, work.out_width)), draw(st.sampled_from(rows)))
    kernel = replace(kernel, bands_per_task=draw(st.integers(1, kernel.bands)))
    return Case(work, target, draw(st.integers(0, 2**32 - 1))), kernel


def check(case: Case, kernel: DepthwiseKernel) -> None:
    rng = np.random.default_rng(case.seed)
    work = case.work
    weights = integers((work.out_channels, 1, *work.kernel), rng)
    packed = pack_depthwise(kernel, weights)
    assert packed.index is None
    assert (packed.values.shape, packed.values.dtype) == (kernel.weight_shape, np.float32)
    out, operands = run_conv(kernel, work, weights, TARGETS[case.target], rng)
    np.testing.assert_array_equal(out, conv(work, *operands))


@settings(max_examples=15, **PROPERTY)
@given(cases())
def test_random_variants(case: tuple[Case, DepthwiseKernel]) -> None:
    check(*case)


@pytest.mark.slow
@settings(max_examples=500, **PROPERTY)
@given(cases())
def test_many_random_variants(case: tuple[Case, DepthwiseKernel]) -> None:
    check(*case)


NAMED = {
    "3x3 7x7": depthwise(48, 7, 3),
    "7x7 7x7": depthwise(32, 7, 7),
    "5x5 14x14": depthwise(40, 14, 5),
    "5x5 stride 2": depthwise(24, 56, 5, 2),
    "3x3 stride 2": depthwise(16, 112, 3, 2),
    "batch 3": depthwise(20, 14, 3, batch=3),
    "one row": ConvWorkload(1, 32, 32, 1, 40, (1, 9), padding=(0, 4, 0, 4), groups=32),
    "only padding": ConvWorkload(1, 16, 16, 5, 5, (2, 2), padding=(3, 3, 3, 3), groups=16),
    "skipped rows": ConvWorkload(1, 16, 16, 40, 40, (2, 2), (3, 3), groups=16),
}


@pytest.mark.parametrize("target", ["two threads", *("avx2",) * ("avx2" in TARGETS)])
@pytest.mark.parametrize("name", NAMED)
def test_layers_of_real_networks(name: str, target: str) -> None:
    found = depthwise_candidates(NAMED[name], machine_of(TARGETS[target]))
    kernel = min(found, key=lambda k: depthwise_cycles(k, machine_of(TARGETS[target])))
    check(Case(NAMED[name], target, len(name)), kernel)


@pytest.mark.parametrize("bands_per_task", [1, 2, 4])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_bands_keep_the_rows_that_the_next_one_reads(rows: int, bands_per_task: int) -> None:
    work = depthwise(16, 17, 5)
    kernel = DepthwiseKernel(work, 16, 6, rows, bands_per_task)
    assert kernel.ring_rows == 8  # fewer than the map's 17: they are used again
    check(Case(work, "one thread", 0), kernel)


@pytest.mark.parametrize("machine", [AVX512, AVX2, NEON, SSE])
def test_sums_fit_the_registers(machine: Machine) -> None:
    for work in (depthwise(32, 7, 3), depthwise(32, 28, 7), depthwise(32, 56, 5, 2)):
        kernels = depthwise_candidates(work, machine)
        assert kernels
        assert all(kernel.columns <= machine.accumulators for kernel in kernels)


def test_what_the_family_leaves_to_others() -> None:
    work = depthwise(32, 14, 3)
    assert depthwise_candidates(work, AVX512)
    assert not depthwise_candidates(layer(32, 32, 14, 3), AVX512)
    assert not depthwise_candidates(replace(work, out_channels=64), AVX512)  # two outputs of each input
    assert not depthwise_candidates(depthwise(15, 14, 3), AVX512)  # less than a vector of channels
    assert not depthwise_candidates(depthwise(32, 3, 3), AVX512)  # less than a vector of pixels
    assert not depthwise_candidates(replace(work, width=40, kernel=(1, 17)), AVX512)
    with pytest.raises(ValueError, match="does not fit"):
        DepthwiseKernel(work, 16, 14, 2)  # rows of 14 pixels make no ring


def test_depthwise_layers_take_it() -> None:
    for work in (depthwise(960, 7, 3), depthwise(768, 7, 7), depthwise(72, 56, 5, 2), depthwise(32, 112, 3)):
        for threads in (1, 2):
            machine = replace(AVX512, threads=threads)
            assert isinstance(default_kernel(KernelTask("conv", work, threads), machine), DepthwiseKernel)
    assert isinstance(default_kernel(KernelTask("conv", depthwise(15, 7, 3), 1), AVX512), ConvKernel)


@pytest.mark.parametrize("threads", [1, 3])
def test_variants_are_offered_by_name(threads: int) -> None:
    machine = replace(AVX512, threads=threads)
    task = KernelTask("conv", depthwise(72, 56, 5, 2), threads)
    kernels = [kernel for kernel in ranked_kernels(task, machine, 40) if isinstance(kernel, DepthwiseKernel)]
    assert len(kernels) > 3
    assert kernels[0] == default_kernel(task, machine)
    for kernel in kernels:
        assert kernel_from_text(variant_text(kernel), task, machine) == kernel
    assert any(kernel.parts > 1 for kernel in kernels) == (threads > 1)
    near = neighbours(kernels[0], machine)
    assert near
    assert kernels[0] not in near
    with pytest.raises(ValueError, match="does not fit"):
        kernel_from_text("depthwise 11 rows 3 task 2", task, machine)
    with pytest.raises(ValueError, match="no variant"):
        kernel_from_text("deep 14 rows 1 task 1", task, machine)


def test_tasks_keep_threads_evenly_busy() -> None:
    work, machine = depthwise(48, 56, 3), replace(AVX512, threads=4)  # three vectors of channels
    kernel = default_kernel(KernelTask("conv", work, 4), machine)
    assert isinstance(kernel, DepthwiseKernel)
    assert machine.imbalance(kernel.tasks) < 1.1
