"""Every variant of the stem family computes the convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import build, call, integers, run_conv
from test_conv import TARGETS, workloads
from test_tiling import AVX2, AVX512, NEON, SSE

from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine, machine_of
from tvm_nm.schedules.stem_code import stem_prim_func
from tvm_nm.schedules.stem_conv import StemKernel, pack_stem, stem_offsets
from tvm_nm.schedules.stem_tiling import stem_candidates, stem_cycles
from tvm_nm.schedules.variants import default_kernel, kernel_from_text, neighbours, ranked_kernels, variant_text
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
RELU = Epilogue(False, 0.0)


@dataclass(frozen=True)
class Case:
    work: ConvWorkload
    target: str
    seed: int


def first(out: int, size: int, kernel: int, stride: int = 1, channels: int = 3, **more: int) -> ConvWorkload:
    square = ((kernel, kernel), (stride, stride), (kernel // 2,) * 4)
    return ConvWorkload(more.pop("batch", 1), channels, out, size, size, *square, epilogue=RELU)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, StemKernel]:
    """Any variant of convolutions of all shapes, with more tiles and tasks than are worth trying."""
    work = draw(workloads())
    target = draw(st.sampled_from(sorted(TARGETS)))
    lanes = machine_of(TARGETS[target]).lanes
    vectors = draw(st.sampled_from([1, 1, 2, 3]))
    channels = (vectors * draw(st.sampled_from([1, 2])) - 1) * lanes + draw(st.integers(1, lanes))
    width = work.width + draw(st.integers(lanes, 3 * lanes)) * work.stride[1]
    work = replace(work, out_channels=max(lanes, channels), groups=1, width=width)
    work = replace(work, kernel=(work.kernel[0] + (work.taps == 1), work.kernel[1]), height=work.height + 3)
    if not work.epilogue.residual and draw(st.booleans()):
        size = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        padding = tuple(draw(st.integers(0, side - 1)) for side in size * 2)
        pool = MaxPool(size, draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), padding)
        left = pool.output_size(work.out_height, work.out_width)
        assume(min(left) >= 1)
        work = replace(work, width=work.width + max(0, (lanes - left[1]) * pool.stride[1] * work.stride[1]))
        work = work.pooled(pool)
    assume(min(work.stored_shape[3], work.reach[1] - work.padding[1]) >= lanes)
    columns, rows = draw(st.integers(1, min(work.out_width, 20))), draw(st.integers(1, work.stored_shape[2]))
    return Case(work, target, draw(st.integers(0, 2**32 - 1))), StemKernel(work, lanes, vectors, columns, rows)


def check(case: Case, kernel: StemKernel) -> None:
    rng = np.random.default_rng(case.seed)
    work = case.work
    weights = integers((work.out_channels, work.in_channels, *work.kernel), rng)
    packed = pack_stem(kernel, weights)
    assert (packed.values.shape, packed.values.dtype) == (kernel.weight_shape, np.float32)
    assert packed.index is not None
    assert (packed.index.shape, packed.index.dtype) == (kernel.index_shape, np.dtype(kernel.index_dtype))
    out, operands = run_conv(kernel, work, weights, TARGETS[case.target], rng)
    np.testing.assert_array_equal(out, conv(work, *operands))


@settings(max_examples=15, **PROPERTY)
@given(cases())
def test_random_variants(case: tuple[Case, StemKernel]) -> None:
    check(*case)


@pytest.mark.slow
@settings(max_examples=500, **PROPERTY)
@given(cases())
def test_many_random_variants(case: tuple[Case, StemKernel]) -> None:
    check(*case)


POOL = MaxPool((3, 3), (2, 2), (1, 1, 1, 1))
NAMED = {
    "7x7 stride 2": first(64, 224, 7, 2),
    "3x3": first(64, 64, 3),
    "3x3 stride 2, odd": replace(first(64, 115, 3, 2), padding=(0, 0, 0, 0)),
    "11x11 stride 4": first(96, 115, 11, 4),
    "one channel, 5x5": first(20, 28, 5, channels=1),
    "three vectors": first(48, 40, 3, batch=2),
    "outputs beyond L2": first(64, 128, 3),
    "a channel too many": first(33, 300, 3),
    "7x7 stride 2, pooled": first(64, 224, 7, 2).pooled(POOL),
    "3x3 stride 2, pooled": replace(first(64, 115, 3, 2), padding=(0, 0, 0, 0)).pooled(MaxPool((3, 3), (2, 2))),
    "pooled, two images": first(32, 80, 3, batch=2).pooled(MaxPool((2, 2), (2, 2), (0, 0, 1, 1))),
    "windows apart": first(20, 150, 3).pooled(MaxPool((1, 2), (4, 3))),
    "large windows": first(16, 40, 5).pooled(MaxPool((8, 3), (1, 1), (7, 2, 7, 0))),
}


@pytest.mark.parametrize("target", ["two threads", *("avx2",) * ("avx2" in TARGETS)])
@pytest.mark.parametrize("name", NAMED)
def test_layers_of_real_networks(name: str, target: str) -> None:
    machine = machine_of(TARGETS[target])
    kernel = min(stem_candidates(NAMED[name], machine), key=lambda k: stem_cycles(k, machine))
    check(Case(NAMED[name], target, len(name)), kernel)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 14])
def test_bands_compute_the_rows_that_their_windows_have(rows: int) -> None:
    work = first(16, 64, 3, 2).pooled(MaxPool((4, 3), (2, 1), (2, 1, 3, 1)))
    kernel = StemKernel(work, 16, 1, 16, rows)
    assert work.stored_shape == (1, 16, 17, 32)
    assert (kernel.ring_rows, kernel.sum_rows) == (4, min(32, 2 * rows + 2))
    check(Case(work, "two threads", rows), kernel)


def test_maxima_are_not_below_the_lowest_number() -> None:
    """Padding never wins, whatever the sums: it is not read."""
    work = replace(first(16, 32, 3), epilogue=Epilogue()).pooled(POOL)
    kernel = StemKernel(work, 16, 1, 16, 4)
    weights = np.zeros((16, 3, 3, 3), np.float32)
    packed = pack_stem(kernel, weights)
    bias = np.full(16, -np.inf, np.float32)
    data = np.zeros(work.input_shape, np.float32)
    out = call(
        build(stem_prim_func(kernel), TARGETS["one thread"]), [data, packed.values, packed.index, bias], (1, 16, 16, 16)
    )
    assert np.isneginf(out).all()


def test_pooling_is_counted() -> None:
    """What is stored is a quarter; maxima cost less than that of large maps, and two bands share a row."""
    work = first(64, 224, 7, 2)
    alone, pooled = StemKernel(work, 16, 2, 14, 28), StemKernel(work.pooled(POOL), 16, 2, 14, 14)
    assert 0.95 < stem_cycles(pooled, AVX512) / stem_cycles(alone, AVX512) < 1.1
    assert stem_cycles(StemKernel(work.pooled(POOL), 16, 2, 14, 1), AVX512) > 1.3 * stem_cycles(pooled, AVX512)


def test_large_outputs_are_fetched() -> None:
    """Lines of large outputs of short reductions; more lines than steps, and a last vector that overlaps."""
    assert not StemKernel(first(64, 56, 3), 16, 2, 14, 56).fetches_output
    assert not StemKernel(first(64, 224, 7, 2), 16, 2, 14, 28).fetches_output
    large = StemKernel(first(64, 224, 3), 16, 2, 14, 56)
    assert large.fetches_output
    assert "tvm_nm_fetch_to_write" in stem_prim_func(large).script()
    work = first(40, 160, 2, channels=1)
    kernel = StemKernel(work, 16, 3, 9, 40)
    assert kernel.fetches_output
    assert kernel.steps < kernel.vectors * kernel.lanes
    check(Case(work, "one thread", 0), kernel)


def test_offsets_follow_the_padded_copy() -> None:
    work = replace(first(16, 20, 3, 2), dilation=(2, 3))
    kernel = StemKernel(work, 8, 1, 4, 2)
    rows, columns = work.reach
    assert (kernel.in_row, kernel.in_rows) == (3 * columns, 2 + 4 + 1)
    assert rows >= kernel.in_rows
    table = stem_offsets(kernel).reshape(3, 3, 3)  # ky, channel, kx
    assert table[2, 1, 2] == 4 * kernel.in_row + columns + 6


@pytest.mark.parametrize("machine", [AVX512, AVX2, NEON, SSE])
def test_tiles_fit_the_registers(machine: Machine) -> None:
    for work in NAMED.values():
        kernels = stem_candidates(work, machine)
        assert kernels
        for kernel in kernels:
            assert kernel.vectors * kernel.columns + kernel.vectors + 1 <= machine.registers
            assert kernel.scratch_bytes <= 1 << 20


def test_sums_stay_in_registers() -> None:
    """A kernel allocates its input and a row of sums; what a tile sums up never is memory."""
    if machine_of(TARGETS["one thread"]) != AVX512:
        pytest.skip("reads the code for AVX-512")
    library = build(stem_prim_func(StemKernel(first(64, 64, 3), 16, 2, 13, 64)), TARGETS["one thread"])
    tiles = [part for part in library.mod.inspect_source("asm").split("\n.LBB") if part.count("vfmadd") >= 26]
    assert len(tiles) == 1
    body = tiles[0].split("\tj")[0]  # up to the branch back
    assert body.count("vfmadd") == 26
    assert "(%rsp)" not in body


def test_what_the_family_leaves_to_others() -> None:
    work = first(64, 56, 3)
    assert stem_candidates(work, AVX512)
    assert not stem_candidates(replace(work, in_channels=17), AVX512)
    assert not stem_candidates(replace(work, kernel=(1, 1), padding=(0, 0, 0, 0)), AVX512)
    assert not stem_candidates(work.pooled(MaxPool((9, 1), (1, 1))), AVX512)  # a large window
    assert not stem_candidates(work.pooled(MaxPool((4, 4), (4, 4))), AVX512)  # leaves rows of 14 pixels
    assert not stem_candidates(replace(work, out_channels=15), AVX512)  # less than a vector of channels
    assert not stem_candidates(replace(work, width=13), AVX512)  # less than a vector of pixels
    assert not stem_candidates(replace(work, in_channels=6, groups=2), AVX512)
    sparse = KernelTask("conv", work, 1, IndexKind.CHANNEL, 16, 2)
    assert not [k for k in ranked_kernels(sparse, AVX512, 40) if isinstance(k, StemKernel)]
    with pytest.raises(ValueError, match="does not fit"):
        StemKernel(work, 16, 3, 9, 56)  # three of four vectors


def test_first_layers_take_it() -> None:
    for work in (first(64, 224, 7, 2), first(64, 224, 3), first(32, 224, 3, 2), first(64, 56, 3, channels=8)):
        for threads in (1, 2):
            machine = replace(AVX512, threads=threads)
            assert isinstance(default_kernel(KernelTask("conv", work, threads), machine), StemKernel)
    assert isinstance(default_kernel(KernelTask("conv", first(64, 56, 3, channels=64), 1), AVX512), ConvKernel)


@pytest.mark.parametrize("threads", [1, 3])
def test_variants_are_offered_by_name(threads: int) -> None:
    machine = replace(AVX512, threads=threads)
    task = KernelTask("conv", first(64, 224, 7, 2), threads)
    kernels = [kernel for kernel in ranked_kernels(task, machine, 40) if isinstance(kernel, StemKernel)]
    assert len(kernels) > 3
    assert kernels[0] == default_kernel(task, machine)
    assert machine.imbalance(kernels[0].tasks) < 1.1
    for kernel in kernels:
        assert kernel_from_text(variant_text(kernel), task, machine) == kernel
    pooled = task.pooled(POOL)
    assert pooled is not None
    kernels = [*ranked_kernels(pooled, machine, 40), *kernels]
    assert kernels[0] == default_kernel(pooled, machine)
    assert all(isinstance(kernel, StemKernel) for kernel in kernels)
    assert kernel_from_text(variant_text(kernels[1]), pooled, machine) == kernels[1]
    near = neighbours(kernels[0], machine)
    assert near
    assert kernels[0] not in near
    with pytest.raises(ValueError, match="does not fit"):
        kernel_from_text("stem 3x9 task 112", task, machine)
