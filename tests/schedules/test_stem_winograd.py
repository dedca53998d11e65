"""Every Winograd kernel for first convolutions computes the convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import build, call
from test_conv import TARGETS
from test_stem_conv import POOL, first
from test_tiling import AVX2, AVX512, NEON, SSE

from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine, machine_of
from tvm_nm.schedules.stem_conv import StemKernel
from tvm_nm.schedules.stem_winograd import StemWinogradKernel, pack_stem_winograd, stem_winograd_applies
from tvm_nm.schedules.stem_winograd_code import stem_winograd_prim_func
from tvm_nm.schedules.stem_winograd_tiling import stem_winograd_candidates, stem_winograd_cycles
from tvm_nm.schedules.variants import (
    default_kernel,
    kernel_cycles,
    kernel_from_text,
    neighbours,
    ranked_kernels,
    variant_text,
)
from tvm_nm.schedules.winograd_points import transform_matrices
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
TOLERANCE = 6e-6
KERNELS = st.sampled_from((5, 6, 7, 8))


@dataclass(frozen=True)
class Case:
    kernel: StemWinogradKernel
    target: str
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any variant, of small maps, with more tiles and tasks than are worth trying."""
    target = draw(st.sampled_from(sorted(TARGETS)))
    lanes = machine_of(TARGETS[target]).lanes
    vectors = draw(st.sampled_from([1, 1, 2, 3]))
    channels = (vectors * draw(st.sampled_from([1, 2])) - 1) * lanes + draw(st.integers(1, lanes))
    kernel = (draw(KERNELS), draw(KERNELS))
    bounds = draw(st.sampled_from(((None, None), (0.0, None), (-2.0, 6.0))))
    work = ConvWorkload(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 4)),
        max(lanes, channels),
        draw(st.integers(8, 30)),
        draw(st.integers(2 * lanes, 5 * lanes)) + 8,
        kernel,
        (2, 2),
        tuple(draw(st.integers(0, size)) for size in kernel * 2),
        epilogue=Epilogue(draw(st.booleans()), *bounds),
    )
    if not work.epilogue.residual and draw(st.booleans()):
        size = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        padding = tuple(draw(st.integers(0, side - 1)) for side in size * 2)
        pool = MaxPool(size, draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), padding)
        left = pool.output_size(work.out_height, work.out_width)
        assume(min(left) >= 1)
        work = replace(work, width=work.width + max(0, (lanes - left[1]) * pool.stride[1] * 2)).pooled(pool)
    assume(min(work.stored_shape[3], work.width, work.reach[1] - work.padding[1]) >= lanes)
    tiles = draw(st.integers(1, min(-(-work.out_width // 4), 8)))
    rows = draw(st.integers(1, work.stored_shape[2]))
    return Case(StemWinogradKernel(work, lanes, vectors, tiles, rows), target, draw(st.integers(0, 2**32 - 1)))


def check(case: Case) -> None:
    kernel, rng = case.kernel, np.random.default_rng(case.seed)
    work = kernel.workload
    data = rng.standard_normal(work.input_shape, np.float32)
    weights = rng.standard_normal((work.out_channels, work.in_channels, *work.kernel), np.float32)
    bias = rng.standard_normal(work.out_channels, np.float32)
    residual = rng.standard_normal(work.output_shape, np.float32) if work.epilogue.residual else None
    packed = pack_stem_winograd(kernel, weights)
    assert (packed.values.shape, packed.values.dtype, packed.index) == (kernel.weight_shape, np.float32, None)
    arguments = [data, packed.values, bias, *([] if residual is None else [residual])]
    out = call(build(stem_winograd_prim_func(kernel), TARGETS[case.target]), arguments, work.stored_shape)
    want = conv(work, data, weights, bias, residual)
    # Where the bounds of an activation are tight, the largest output says nothing of the size of the sums.
    scale = max(np.abs(want).max(), 3.0 * np.sqrt(work.in_channels * work.taps))
    assert np.abs(out - want).max() <= TOLERANCE * scale


@settings(max_examples=15, **PROPERTY)
@given(cases())
def test_random_variants(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=300, **PROPERTY)
@given(cases())
def test_many_random_variants(case: Case) -> None:
    check(case)


NAMED = {
    "7x7": first(64, 224, 7, 2),
    "7x7, pooled": first(64, 224, 7, 2).pooled(POOL),
    "7x7, odd map, without padding": replace(first(64, 115, 7, 2), padding=(0, 0, 0, 0)),
    "5x5 of one channel": first(32, 128, 5, 2, channels=1),
    "6x6 of four, two images": first(48, 96, 6, 2, channels=4, batch=2),
    "a channel too many": first(33, 300, 7, 2).pooled(MaxPool((2, 2), (2, 2), (0, 0, 1, 1))),
    "large windows": first(16, 80, 5, 2).pooled(MaxPool((8, 3), (1, 1), (7, 2, 7, 0))),
    "windows apart": first(20, 300, 8, 2).pooled(MaxPool((1, 2), (5, 3))),
}


@pytest.mark.parametrize("target", ["two threads", *("avx2",) * ("avx2" in TARGETS)])
@pytest.mark.parametrize("name", NAMED)
def test_layers_of_real_networks(name: str, target: str) -> None:
    machine = machine_of(TARGETS[target])
    kernel = min(stem_winograd_candidates(NAMED[name], machine), key=lambda k: stem_winograd_cycles(k, machine))
    check(Case(kernel, target, len(name)))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 14])
def test_bands_compute_the_rows_that_their_windows_have(rows: int) -> None:
    work = first(16, 64, 7, 2).pooled(MaxPool((4, 3), (2, 1), (2, 1, 3, 1)))
    kernel = StemWinogradKernel(work, 16, 1, 3, rows)
    assert work.stored_shape == (1, 16, 17, 32)
    assert (kernel.ring_rows, kernel.sum_rows) == (8, min(32, 2 * rows + 2))
    check(Case(kernel, "two threads", rows))


def test_a_stem_has_a_quarter_of_the_multiplications() -> None:
    kernel = StemWinogradKernel(first(64, 224, 7, 2), 16, 2, 7, 112)
    assert (kernel.taps, kernel.size, kernel.tile_columns, kernel.plane_columns) == ((4, 4), (7, 7), 28, 115)
    assert [(part.rows, part.columns, len(part.planes)) for part in kernel.sections] == [
        (6, 6, 12),
        (6, 1, 6),
        (1, 6, 6),
        (1, 1, 3),
    ]
    assert kernel.products == 3 * 13**2
    assert kernel.workload.macs / kernel.macs == pytest.approx(16 * 49 / 169)
    (part,) = StemWinogradKernel(first(64, 224, 8, 2), 16, 2, 7, 112).sections
    assert (part.rows, part.columns, part.planes) == (7, 7, tuple(range(12)))


def test_odd_phases_have_no_product_at_infinity() -> None:
    """Where a coordinate is that of infinity, the weights of odd phases are zero: nothing is left out."""
    kernel = StemWinogradKernel(first(16, 64, 7, 2), 16, 1, 2, 8)
    transform = transform_matrices(4, 4)[1]
    assert not transform[-1, :3].any()
    weights = np.random.default_rng(0).standard_normal((16, 3, 7, 7)).astype(np.float32)
    values = pack_stem_winograd(kernel, weights).values
    last = values[-3 * 16 :].reshape(3, 16)  # infinity twice: the last tap of the even rows and columns
    np.testing.assert_array_equal(last, weights[:, :, 6, 6].T)


def test_error_on_normal_data() -> None:
    kernel = StemWinogradKernel(first(64, 224, 7, 2), 16, 2, 7, 112)
    rng = np.random.default_rng(0)
    work = replace(kernel.workload, epilogue=Epilogue())
    kernel = replace(kernel, workload=work)
    data = rng.standard_normal(work.input_shape, np.float32)
    weights = rng.standard_normal((64, 3, 7, 7), np.float32)
    bias = np.zeros(64, np.float32)
    packed = pack_stem_winograd(kernel, weights)
    out = call(
        build(stem_winograd_prim_func(kernel), TARGETS["one thread"]), [data, packed.values, bias], (1, 64, 112, 112)
    )
    want = conv(work, data, weights, bias)
    assert np.abs(out - want).max() <= 2.5e-6 * np.abs(want).max()


@pytest.mark.parametrize("machine", [AVX512, AVX2, NEON, SSE])
def test_tiles_fit_the_registers(machine: Machine) -> None:
    for work in NAMED.values():
        kernels = stem_winograd_candidates(work, machine)
        assert kernels
        for kernel in kernels:
            assert kernel.vectors * kernel.tiles + kernel.vectors + 1 <= machine.registers
            assert kernel.scratch_bytes <= 1 << 20


def test_sums_stay_in_registers() -> None:
    if machine_of(TARGETS["one thread"]) != AVX512:
        pytest.skip("reads the code for AVX-512")
    library = build(
        stem_winograd_prim_func(StemWinogradKernel(first(64, 224, 8, 2), 16, 2, 14, 112)), TARGETS["one thread"]
    )
    tiles = [part for part in library.mod.inspect_source("asm").split("\n.LBB") if part.count("vfmadd") >= 28 * 11]
    assert len(tiles) == 1
    body = tiles[0].split("\tj")[0]  # up to the branch back
    assert body.count("vfmadd") == 28 * 11  # the first of 12 planes multiplies
    assert "(%rsp)" not in body


def test_what_the_family_leaves_to_others() -> None:
    work = first(64, 112, 7, 2)
    assert stem_winograd_applies(work)
    for other in (
        replace(work, in_channels=5),
        replace(work, stride=(2, 1)),
        replace(work, kernel=(7, 3)),
        replace(work, kernel=(9, 9)),
        replace(work, dilation=(1, 2)),
        replace(work, in_channels=4, groups=2),
    ):
        assert not stem_winograd_applies(other)
        assert not stem_winograd_candidates(other, AVX512)
        with pytest.raises(ValueError, match="does not fit"):
            StemWinogradKernel(other, 16, 1, 1, 1)
    assert not stem_winograd_candidates(work.pooled(MaxPool((9, 1), (1, 1))), AVX512)  # a large window
    assert not stem_winograd_candidates(work.pooled(MaxPool((4, 4), (4, 4))), AVX512)  # leaves rows of 14 pixels
    assert not stem_winograd_candidates(replace(work, out_channels=15), AVX512)  # less than a vector of channels
    assert not stem_winograd_candidates(replace(work, width=13), AVX512)  # less than a vector of pixels
    with pytest.raises(ValueError, match="does not fit"):
        StemWinogradKernel(work, 16, 3, 7, 56)  # three of four vectors


@pytest.mark.parametrize("machine", [AVX512, AVX2])
def test_it_is_predicted_to_be_faster_where_it_was(machine: Machine) -> None:
    def gain(work: ConvWorkload) -> float:
        task = KernelTask("conv", work, 1)
        direct, other = default_kernel(task, machine), default_kernel(task.as_winograd, machine)
        assert isinstance(direct, StemKernel)
        return kernel_cycles(direct, machine) / kernel_cycles(other, machine)

    assert 1.8 < gain(first(64, 224, 7, 2)) < 2.8
    assert 1.05 < gain(first(32, 224, 5, 2)) < 1.6
    assert gain(first(32, 128, 7, 2, channels=1)) < 1.3


@pytest.mark.parametrize("threads", [1, 3])
def test_variants_are_offered_by_name(threads: int) -> None:
    machine = replace(AVX512, threads=threads)
    plain = KernelTask("conv", first(64, 224, 7, 2), threads).as_winograd
    pooled = plain.pooled(POOL)
    assert pooled is not None
    for task in (plain, pooled):
        kernels = ranked_kernels(task, machine, 40)
        assert len(kernels) > 10
        assert kernels[0] == default_kernel(task, machine)
        assert isinstance(kernels[0], StemWinogradKernel)
        assert machine.imbalance(kernels[0].tasks) < 1.1
        for kernel in kernels:
            assert kernel_from_text(variant_text(kernel), task, machine) == kernel
        near = neighbours(kernels[0], machine)
        assert near
        assert kernels[0] not in near
    with pytest.raises(ValueError, match="does not fit"):
        kernel_from_text("winograd stem 9x3 task 112", plain, machine)


def test_maxima_are_not_below_the_lowest_number() -> None:
    """Padding never wins, whatever the sums: it is not read."""
    work = replace(first(16, 64, 7, 2), epilogue=Epilogue()).pooled(POOL)
    kernel = StemWinogradKernel(work, 16, 1, 3, 4)
    packed = pack_stem_winograd(kernel, np.zeros((16, 3, 7, 7), np.float32))
    bias = np.full(16, -np.inf, np.float32)
    data = np.zeros(work.input_shape, np.float32)
    out = call(
        build(stem_winograd_prim_func(kernel), TARGETS["one thread"]), [data, packed.values, bias], (1, 16, 16, 16)
    )
    assert np.isneginf(out).all()
