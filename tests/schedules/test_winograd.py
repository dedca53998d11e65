"""Winograd kernels compute the convolution, with an error that stays small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import build, call, haswell, host_flags, integers
from tvm import s_tir, tirx

from tvm_nm.schedules.decisions import divisors
from tvm_nm.schedules.machine import Machine, host_target, machine_of
from tvm_nm.schedules.winograd import WinogradKernel, winograd_applies, winograd_prim_func
from tvm_nm.schedules.winograd_packing import pack_winograd
from tvm_nm.schedules.winograd_points import POINTS, column_sums, row_sums, transform_matrices
from tvm_nm.schedules.winograd_tiling import choose_winograd, winograd_candidates, winograd_cycles
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

TARGETS = {"one thread": host_target(1), "two threads": host_target(2)}
if "avx2" in host_flags():
    TARGETS["avx2"] = haswell()
EPILOGUES = [
    Epilogue(residual, *bounds)
    for residual in (False, True)
    for bounds in ((None, None), (0.0, None), (0.0, 6.0), (None, 1.0), (-0.5, 0.5))
]
MAXIMA = [replace(epilogue, pool=MaxPool()) for epilogue in EPILOGUES if not epilogue.residual]
PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
# Of the largest output; 256 channels of normal data give about 3e-6.
TOLERANCE = 2e-5


@st.composite
def workloads(draw: st.DrawFn) -> ConvWorkload:
    """3x3 convolutions of any size and padding, some with maxima."""
    padding = draw(st.one_of(st.just((1, 1, 1, 1)), st.tuples(*[st.integers(0, 3)] * 4)))
    size = st.one_of(st.integers(1, 20), st.sampled_from([14, 28, 33]))
    work = ConvWorkload(
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.sampled_from([1, 3, 7, 8, 16, 16, 20, 32, 33])),
        draw(st.sampled_from([1, 2, 7, 8, 16, 24, 33, 64, 70])),
        max(draw(size), 3 - padding[0] - padding[2]),
        max(draw(size), 3 - padding[1] - padding[3]),
        (3, 3),
        padding=padding,
        epilogue=draw(st.sampled_from(EPILOGUES)),
    )
    if min(work.out_height, work.out_width) > 1 and draw(st.booleans()):
        return replace(work, epilogue=draw(st.sampled_from(MAXIMA)))
    return work


@st.composite
def kernels(draw: st.DrawFn, target: str) -> WinogradKernel:
    """Any variant, also those that would not be chosen."""
    work = draw(workloads())
    tile = draw(st.sampled_from([2, 4]))
    rows, columns = -(-work.out_height // tile), -(-work.out_width // tile)
    staged = draw(st.booleans())
    chunk_rows = rows if staged else draw(st.integers(1, rows))
    chunk_columns = columns if staged else draw(st.integers(1, columns))
    vectors = draw(st.integers(1, 4))
    lanes = machine_of(TARGETS[target]).lanes
    block, kept = 0, 0
    if draw(st.booleans()):
        block = vectors * lanes * draw(st.integers(1, 2))
        kept = draw(st.integers(1, work.in_channels))
    kernel = WinogradKernel(
        work,
        lanes,
        tile,
        chunk_rows,
        chunk_columns,
        vectors,
        draw(st.integers(1, min(chunk_rows * chunk_columns, 28 // vectors))),
        staged,
        block,
        kept,
    )
    return kernel if staged else replace(kernel, parts=draw(st.sampled_from(divisors(kernel.oc_blocks))))


def pruned(kernel: WinogradKernel, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return weights whose block rows keep what the kernel can skip, one of them all of it and the others at most."""
    for start in range(0, len(weights), kernel.block or len(weights)):
        if kernel.block:
            kept = kernel.kept if start == 0 else int(rng.integers(0, kernel.kept + 1))
            weights[start : start + kernel.block, rng.permutation(weights.shape[1])[kept:]] = 0
    return weights


def run(
    kernel: WinogradKernel, target: tvm.target.Target, rng: np.random.Generator, draw: Any = integers
) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel's output and what it must be."""
    work = kernel.workload
    data = draw(work.input_shape, rng)
    weights = pruned(kernel, draw((work.out_channels, work.in_channels, 3, 3), rng), rng)
    bias = draw((work.out_channels,), rng)
    residual = draw(work.output_shape, rng) if work.epilogue.residual else None
    packed = pack_winograd(kernel, weights)
    assert packed.values.shape == kernel.weight_shape
    assert (None if packed.index is None else packed.index.shape) == kernel.index_shape
    arguments = [data, packed.values, *([] if packed.index is None else [packed.index]), bias]
    if residual is not None:
        arguments.append(residual)
    out = call(build(winograd_prim_func(kernel), target), arguments, work.stored_shape)
    return out, conv(work, data, weights, bias, residual)


def normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def error(out: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(out - want).max() / max(np.abs(want).max(), 1e-3))


def check(kernel: WinogradKernel, target: str, seed: int) -> None:
    out, want = run(kernel, TARGETS[target], np.random.default_rng(seed))
    if kernel.tile == 2:  # its points are 0 and 1: small integers stay exact
        np.testing.assert_array_equal(out, want)
    else:
        # Where the bounds of an activation are tight, the largest output says nothing of the size of the sums.
        scale = max(np.abs(want).max(), 3.0 * np.sqrt(9 * kernel.workload.in_channels))
        assert np.abs(out - want).max() <= TOLERANCE * scale


cases = st.sampled_from(sorted(TARGETS)).flatmap(lambda t: st.tuples(kernels(t), st.just(t), st.integers(0, 2**32 - 1)))


@pytest.mark.parametrize("width", [17, 18])
def test_chunks_that_each_need_whole_rows(width: int) -> None:
    work = ConvWorkload(1, 8, 1, 3, width, (3, 3), padding=(1, 1, 1, 1))
    check(WinogradKernel(work, 8, 4, 1, 4, 1, 1, False, 0, 0), "avx2", 0)


@settings(max_examples=12, **PROPERTY)
@given(cases)
def test_random_variants(case: tuple[WinogradKernel, str, int]) -> None:
    check(*case)


@pytest.mark.slow
@settings(max_examples=300, **PROPERTY)
@given(cases)
def test_many_random_variants(case: tuple[WinogradKernel, str, int]) -> None:
    check(*case)


@settings(max_examples=8, **PROPERTY)
@given(workloads(), st.sampled_from(sorted(TARGETS)), st.integers(0, 2**32 - 1))
def test_chosen_variants(work: ConvWorkload, target: str, seed: int) -> None:
    kernel = choose_winograd(work, machine_of(TARGETS[target]))
    assert kernel is not None
    check(kernel, target, seed)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("tile", "size"), [(4, 14), (4, 13), (2, 9)])
def test_maxima_are_those_of_what_would_be_stored(tile: int, size: int, staged: bool) -> None:
    """Bit by bit: what comes after the maxima rounds as it does before them."""
    work = ConvWorkload(2, 24, 40, size, size + 3, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(False, -0.3, 7.1))
    rows, columns = -(-size // tile), -(-(size + 3) // tile)
    plain = WinogradKernel(work, 16, tile, rows if staged else 2, columns, 2, 3, staged, 32, 11)
    fused = replace(plain, workload=replace(work, epilogue=replace(work.epilogue, pool=MaxPool())))
    stored, _ = run(plain, TARGETS["one thread"], *seeded(), draw=normal)
    out, _ = run(fused, TARGETS["one thread"], *seeded(), draw=normal)
    whole = stored[:, :, : size // 2 * 2, : (size + 3) // 2 * 2].reshape(2, 40, size // 2, 2, -1, 2)
    np.testing.assert_array_equal(out, whole.max(axis=(3, 5)))


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 3, 2, 0), (3, 0, 0, 2)])
@pytest.mark.parametrize("columns", [11, 4])
def test_chunks_that_turn_their_rows(columns: int, padding: tuple[int, int, int, int], target: str) -> None:
    """Chunks begin and end within a row, at the map's border and in what lies around it."""
    work = ConvWorkload(2, 32, 20, 9, 42, (3, 3), padding=padding, epilogue=Epilogue(False, 0.0))
    lanes = machine_of(TARGETS[target]).lanes
    func = winograd_prim_func(kernel := WinogradKernel(work, lanes, 4, 2, columns, 1, 5, False))
    assert "rows" in {block.name_hint for block in blocks_of(func)}
    check(kernel, target, 3)


def blocks_of(func: tvm.tirx.PrimFunc) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(func.body, ((s_tir.SBlock, found.append),))
    return found


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_only_what_is_between_the_stages_is_on_a_heap(target: str) -> None:
    """A register tile on a heap would be kept, and spilled, throughout the loops around it."""
    work = ConvWorkload(1, 32, 64, 28, 28, (3, 3), padding=(1, 1, 1, 1))
    lanes = machine_of(TARGETS[target]).lanes
    kernel = WinogradKernel(work, lanes, 4, 2, 7, 1, 14 if lanes == 16 else 7, False)
    code = build(winograd_prim_func(kernel), TARGETS[target]).mod.inspect_source("ll")
    assert code.count("load ptr, ptr @__TVMBackendAllocWorkspace") <= 3


def test_rows_and_columns_that_maxima_drop_are_not_computed() -> None:
    work = ConvWorkload(1, 8, 8, 5, 9, (3, 3), padding=(1, 1, 1, 1))
    kernel = WinogradKernel(work, 16, 4, 1, 3, 1, 3, False)
    fused = replace(kernel, workload=replace(work, epilogue=Epilogue(pool=MaxPool())))
    assert (kernel.tile_rows, kernel.tile_columns) == (2, 3)
    assert (fused.tile_rows, fused.tile_columns) == (1, 2)
    assert fused.workload.stored_shape == (1, 8, 2, 4)


@pytest.mark.parametrize("threads", ["one thread", "two threads"])
def test_maxima_are_predicted_to_save_stores(threads: str) -> None:
    machine = machine_of(TARGETS[threads])
    work = ConvWorkload(1, 64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1))
    plain, fused = (
        choose_winograd(replace(work, epilogue=Epilogue(False, 0.0, pool=pool)), machine) for pool in (None, MaxPool())
    )
    assert plain is not None
    assert fused is not None
    assert 0.7 < winograd_cycles(fused, machine) / winograd_cycles(plain, machine) < 1


@pytest.mark.parametrize("tile", [2, 4])
def test_error_on_normal_data(tile: int) -> None:
    work = ConvWorkload(1, 256, 32, 16, 16, (3, 3), padding=(1, 1, 1, 1))
    out, want = run(WinogradKernel(work, 16, tile, 4, 4, 2, 8, False), TARGETS["one thread"], *seeded(), draw=normal)
    assert error(out, want) <= {2: 2e-6, 4: 6e-6}[tile]


def seeded() -> tuple[np.random.Generator]:
    return (np.random.default_rng(0),)


@pytest.mark.parametrize(("tile", "taps"), sorted(POINTS))
def test_transforms_are_a_convolution(tile: int, taps: int) -> None:
    output, weight, data = transform_matrices(tile, taps)
    rng = np.random.default_rng(0)
    pixels, weights = rng.standard_normal((tile + taps - 1,) * 2), rng.standard_normal((taps, taps))
    found = output @ ((weight @ weights @ weight.T) * (data @ pixels @ data.T)) @ output.T
    want = [[(pixels[y : y + taps, x : x + taps] * weights).sum() for x in range(tile)] for y in range(tile)]
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tile", "taps"), sorted(POINTS))
def test_opposite_points_share_their_terms(tile: int, taps: int) -> None:
    """Rows of a pair are a part that both have plus or minus another: zeros are exact, and magnitudes equal."""
    output, _, data = transform_matrices(tile, taps)
    size = tile + taps - 1
    for first in range((size - 1) % 2, size - 1, 2):
        assert POINTS[tile, taps][first] == -POINTS[tile, taps][first + 1] > 0
        np.testing.assert_array_equal(np.abs(data[first]), np.abs(data[first + 1]))
        np.testing.assert_array_equal(np.abs(output[:, first]), np.abs(output[:, first + 1]))
    assert np.count_nonzero(data[-1]) == (size + 1) // 2
    values = np.random.default_rng(1).standard_normal(size)
    for matrix, sums in ((data, row_sums), (output, column_sums)):
        found = sums(matrix, lambda k: tirx.const(float(values[k]), "float32"))  # folded to constants
        assert [one.value for one in found] == pytest.approx(list(matrix @ values), rel=1e-5, abs=1e-6)


def transformed(weights: np.ndarray, tile: int) -> np.ndarray:
    """Return `G w G^T` in double precision: (OC, IC, 3, 3) to (m + 2, m + 2, OC, IC)."""
    matrix = transform_matrices(tile)[1]
    return (matrix @ weights.astype(np.float64) @ matrix.T).transpose(2, 3, 0, 1)


def test_packed_weights() -> None:
    work = ConvWorkload(1, 3, 20, 8, 8, (3, 3))
    kernel = WinogradKernel(work, 8, 2, 3, 3, 2, 6, False)
    weights = normal((20, 3, 3, 3), np.random.default_rng(1))
    packed = pack_winograd(kernel, weights)
    assert packed.values.shape == kernel.weight_shape == (2, 4, 4, 3, 2, 8)
    assert packed.bytes == 2 * 16 * 3 * 16 * 4
    # Output channel 19 is lane 3 of vector 0 of block 1; channels from 20 on are empty.
    np.testing.assert_allclose(packed.values[1, :, :, :, 0, 3], transformed(weights, 2)[:, :, 19], rtol=1e-7)
    assert not packed.values[1, :, :, :, 0, 4:].any()
    assert not packed.values[1, :, :, :, 1].any()


def test_packed_weights_of_block_rows() -> None:
    work = ConvWorkload(1, 6, 20, 8, 8, (3, 3))
    kernel = WinogradKernel(work, 8, 2, 3, 3, 1, 6, False, block=16, kept=3)
    weights = normal((20, 6, 3, 3), np.random.default_rng(1))
    weights[:16, [0, 2, 5]] = 0
    weights[16:, [0, 1, 2, 4]] = 0
    packed = pack_winograd(kernel, weights)
    assert packed.values.shape == kernel.weight_shape == (3, 4, 4, 3, 1, 8)
    assert packed.index is not None
    # The second row keeps two channels; the third is any, with zero weights.
    np.testing.assert_array_equal(packed.index, [[1, 3, 4], [0, 3, 5]])
    np.testing.assert_allclose(packed.values[1, :, :, 2, 0], transformed(weights, 2)[:, :, 8:16, 4], rtol=1e-7)
    assert not packed.values[2, :, :, 0].any()
    weights[0, 0] = 1.0
    with pytest.raises(ValueError, match="a block row keeps 4 inputs, the kernel was made for 3"):
        pack_winograd(kernel, weights)


@pytest.mark.parametrize(("block", "kept"), [(8, 4), (24, 4), (16, 0), (0, 4)])
def test_block_rows_are_whole_register_tiles(block: int, kept: int) -> None:
    work = ConvWorkload(1, 8, 48, 16, 16, (3, 3))
    with pytest.raises(ValueError, match="whole register tiles"):
        WinogradKernel(work, 16, 4, 1, 4, 1, 4, False, block, kept)
    assert winograd_candidates(work, machine_of(TARGETS["one thread"]), 16, 4)


@pytest.mark.parametrize(
    "change",
    [{"kernel": (5, 5)}, {"kernel": (1, 3)}, {"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}],
)
def test_other_convolutions_are_refused(change: dict[str, Any]) -> None:
    work = replace(ConvWorkload(1, 8, 8, 16, 16, (3, 3)), **change)
    assert not winograd_applies(work)
    assert choose_winograd(work, machine_of(TARGETS["one thread"])) is None
    with pytest.raises(ValueError, match="3x3"):
        WinogradKernel(work, 16, 4, 1, 1, 1, 1, False)


def test_tasks_divide_the_blocks_of_a_chunk() -> None:
    work = ConvWorkload(1, 32, 64, 14, 14, (3, 3), padding=(1, 1, 1, 1))
    kernel = WinogradKernel(work, 16, 2, 7, 7, 1, 7, False)
    assert kernel.oc_blocks == 4
    assert "2 parts" in str(replace(kernel, parts=2))
    for parts in (0, 3):
        with pytest.raises(ValueError, match="do not divide"):
            replace(kernel, parts=parts)
    with pytest.raises(ValueError, match="one chunk"):
        replace(kernel, parts=2, staged=True)


@pytest.mark.parametrize(("channels", "size"), [(256, 14), (512, 7), (64, 14), (32, 28)])
@pytest.mark.parametrize("threads", [2, 4])
def test_small_maps_occupy_all_threads(channels: int, size: int, threads: int) -> None:
    """Each thread transforms what it needs: it would wait longer for what another core has transformed."""
    work = ConvWorkload(1, channels, channels, size, size, (3, 3), padding=(1, 1, 1, 1))
    one, machine = Machine(16, 32, 1), Machine(16, 32, threads)
    alone, kernel = choose_winograd(work, one), choose_winograd(work, machine)
    assert alone is not None
    assert kernel is not None
    assert not kernel.staged
    assert kernel.chunks * kernel.parts >= threads
    assert winograd_cycles(kernel, machine) / threads < 0.8 * winograd_cycles(alone, one)
    assert all(candidate.parts == 1 for candidate in winograd_candidates(work, one))


def test_a_staged_kernel_has_one_chunk() -> None:
    with pytest.raises(ValueError, match="one chunk"):
        WinogradKernel(ConvWorkload(1, 8, 8, 16, 16, (3, 3)), 16, 4, 1, 4, 1, 1, True)


@settings(max_examples=100, deadline=None)
@given(workloads(), st.sampled_from(["one thread", "two threads"]))
def test_choices_fit_the_machine(work: ConvWorkload, target: str) -> None:
    machine = machine_of(TARGETS[target])
    kernel = choose_winograd(work, machine)
    assert kernel is not None
    assert kernel.lanes == machine.lanes
    # Sums, one vector of weights for each column of the register tile, and one input.
    assert kernel.tiles_per_step * kernel.oc_vectors + kernel.oc_vectors <= machine.registers
    assert 1 <= kernel.tiles_per_step <= kernel.chunk_tiles
    assert 0 < winograd_cycles(kernel, machine) < float("inf")
