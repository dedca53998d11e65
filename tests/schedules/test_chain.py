"""Every variant of a chain computes its layers, and its inner loops keep their sums in registers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import build, call, integers
from test_conv import TARGETS
from test_machine import fma_count, inner_loops, spills
from test_tiling import AVX512
from test_weight_stream import RISCV

from tvm_nm.schedules.apply import schedule_function
from tvm_nm.schedules.blocked_layout import blocked_layout_func
from tvm_nm.schedules.chain import KEEP_ALL, ChainKernel, Mixing, blocked_shape, chain_applies
from tvm_nm.schedules.chain_arguments import argument_shapes
from tvm_nm.schedules.chain_code import chain_prim_func
from tvm_nm.schedules.chain_packing import channel_vectors, pack_depthwise, pack_mixing
from tvm_nm.schedules.chain_tiling import chain_candidates, chain_cycles, choose_chain, crossing_cycles
from tvm_nm.schedules.fetch_code import FETCHES, Fetch
from tvm_nm.schedules.machine import Machine, machine_of, target_from_json
from tvm_nm.workload import ConvWorkload, Epilogue

PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
RELU6 = Epilogue(False, 0.0, 6.0)
SERVER = target_from_json({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "sapphirerapids"}, threads=1)
Layers = tuple[ConvWorkload, ConvWorkload, ConvWorkload | None]


def block(ins: int, size: int, hidden: int, stride: int, outs: int, *, residual: bool = False) -> Layers:
    """An inverted residual block."""
    first = ConvWorkload(1, ins, hidden, size, size, (1, 1), epilogue=RELU6)
    depthwise = ConvWorkload(
        1, hidden, hidden, size, size, (3, 3), (stride, stride), (1, 1, 1, 1), groups=hidden, epilogue=RELU6
    )
    last = ConvWorkload(1, hidden, outs, depthwise.out_height, depthwise.out_width, (1, 1), epilogue=Epilogue(residual))
    return first, depthwise, last


@dataclass(frozen=True)
class Case:
    layers: Layers
    kept: tuple[Mixing, Mixing]
    blocked: bool
    target: str
    threads: int
    variant: int
    seed: int


def _activation(draw: st.DrawFn) -> Epilogue:
    return draw(st.sampled_from([RELU6, Epilogue(False, -5.0, 4.0), Epilogue(False, None, 3.0)]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Chains of every kind. Sums are integers and stay small enough to be exact, whatever their order."""
    batch, ins, hidden = draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(2, 70))
    height, width = (draw(st.one_of(st.integers(1, 10), st.sampled_from([7, 14, 23, 29]))) for _ in range(2))
    kernel, stride, padding = (1, 1), (1, 1), (0, 0, 0, 0)
    if draw(st.integers(0, 2)) == 0:
        kernel, stride, padding = _window(draw, height, width, 2)
    first = ConvWorkload(batch, ins, hidden, height, width, kernel, stride, padding, epilogue=_activation(draw))
    height, width = first.out_height, first.out_width
    kernel, stride, padding = _window(draw, height, width, draw(st.sampled_from([3, 3, 3, 5])))
    depthwise = ConvWorkload(
        batch, hidden, hidden, height, width, kernel, stride, padding, groups=hidden, epilogue=_activation(draw)
    )
    last = None
    if draw(st.integers(0, 4)):
        size = (depthwise.out_height, depthwise.out_width)
        epilogue = Epilogue(draw(st.booleans()), draw(st.sampled_from([None, 0.0])))
        last = ConvWorkload(batch, hidden, draw(st.integers(1, 60)), *size, (1, 1), epilogue=epilogue)
    target = draw(st.sampled_from(sorted(TARGETS)))
    lanes = machine_of(TARGETS[target]).lanes
    kept = tuple(
        Mixing(0, draw(st.integers(1, work.in_channels)), lanes * draw(st.sampled_from([1, 2, 4])))
        if work is not None and draw(st.booleans())
        else Mixing(0)
        for work in (first, last)
    )
    blocked = first.is_pointwise and draw(st.booleans())
    threads, variant = draw(st.integers(1, 6)), draw(st.integers(0, 99))
    return Case((first, depthwise, last), kept, blocked, target, threads, variant, draw(st.integers(0, 2**32 - 1)))


def _window(
    draw: st.DrawFn, height: int, width: int, most: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]:
    sizes = (draw(st.integers(1, most)), draw(st.integers(1, most)))
    padding = tuple(draw(st.integers(0, size - 1)) for size in sizes * 2)
    assume(height + padding[0] + padding[2] >= sizes[0] and width + padding[1] + padding[3] >= sizes[1])
    return sizes, (draw(st.integers(1, 2)), draw(st.integers(1, 2))), padding  # type: ignore[return-value]


def weights_of(work: ConvWorkload, kept: Mixing | None, rng: np.random.Generator) -> np.ndarray:
    """Small integers; a block row keeps at most what it may."""
    weights = rng.integers(-2, 3, (work.out_channels, work.in_channels_per_group, *work.kernel)).astype(np.float32)
    if kept is not None and kept.kept:
        for start in range(0, work.out_channels, kept.block):
            count = kept.kept if start == 0 else int(rng.integers(0, kept.kept + 1))
            weights[start : start + kept.block, rng.permutation(work.in_channels)[count:]] = 0
    return weights


def copied(array: np.ndarray, shape: tuple[int, ...], lanes: int, *, to_blocked: bool, target: object) -> np.ndarray:
    """Copy to or from the blocked layout by the kernel that does so."""
    threads = machine_of(target).threads  # type: ignore[arg-type]
    function = blocked_layout_func(shape, lanes, to_blocked=to_blocked, threads=threads)  # type: ignore[arg-type]
    return call(build(function, target), [array], blocked_shape(shape, lanes) if to_blocked else shape)  # type: ignore[arg-type]


def run(kernel: ChainKernel, weights: list[np.ndarray], target: object, rng: np.random.Generator) -> None:
    """Run a chain and compare it with its layers one by one."""
    layers = [work for work in (kernel.first, kernel.depthwise, kernel.last) if work is not None]
    first, lanes = kernel.first, kernel.lanes
    data = integers(first.input_shape, rng)
    biases = [integers((work.out_channels,), rng) for work in layers]
    expected, residual = data.astype(np.float64), None
    for work, weight, bias in zip(layers, weights, biases, strict=True):
        shape = work.output_shape
        residual = integers(shape, rng) if work.epilogue.residual else None
        expected = conv(work, expected, weight, bias, residual)
    packed = [pack_mixing(kernel, weights[0], last=False), pack_depthwise(kernel, weights[1])]
    packed += [pack_mixing(kernel, weights[2], last=True)] if kernel.last is not None else []
    arguments = [copied(data, data.shape, lanes, to_blocked=True, target=target) if kernel.blocked_input else data]
    for of_layer, bias in zip(packed, biases, strict=True):
        arguments += [of_layer.values, *([] if of_layer.index is None else [of_layer.index])]
        arguments.append(channel_vectors(bias, lanes))
    if residual is not None:
        arguments.append(copied(residual, residual.shape, lanes, to_blocked=True, target=target))
    shapes = argument_shapes(kernel)
    assert [array.shape for array in arguments] == [shape for shape, _ in list(shapes.values())[:-1]]
    found = call(build(chain_prim_func(kernel), target), arguments, shapes["out"][0])  # type: ignore[arg-type]
    assert not np.isnan(found).any()
    np.testing.assert_array_equal(
        copied(found, expected.shape, lanes, to_blocked=False, target=target), expected.astype(np.float32)
    )


def check(case: Case, *, in_shares: bool = False) -> None:
    target = TARGETS[case.target]
    assert chain_applies(*case.layers)
    machine = replace(machine_of(target), threads=case.threads)
    candidates = chain_candidates(case.layers, machine, kept=case.kept, blocked_input=case.blocked)
    if in_shares:
        candidates = [kernel for kernel in candidates if kernel.shares > 1]
        assume(candidates)
    kernel = candidates[case.variant % len(candidates)]
    rng = np.random.default_rng(case.seed)
    weights = [
        weights_of(work, kept, rng)
        for work, kept in zip(case.layers, (case.kept[0], None, case.kept[1]), strict=True)
        if work is not None
    ]
    run(kernel, weights, target, rng)


@settings(max_examples=6, **PROPERTY)  # type: ignore[arg-type]
@given(cases())
def test_every_variant_computes_its_layers(case: Case) -> None:
    check(case)


@settings(max_examples=6, **PROPERTY)  # type: ignore[arg-type]
@given(cases())
def test_shares_of_the_hidden_channels_compute_the_layers(case: Case) -> None:
    check(case, in_shares=True)


@pytest.mark.slow
@settings(max_examples=200, **PROPERTY)  # type: ignore[arg-type]
@given(cases())
def test_shares_of_the_hidden_channels_compute_the_layers_at_length(case: Case) -> None:
    check(case, in_shares=True)


@pytest.mark.slow
@settings(max_examples=300, **PROPERTY)  # type: ignore[arg-type]
@given(cases())
def test_every_variant_computes_its_layers_at_length(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_usual_block(target: str, staged: bool) -> None:
    machine = machine_of(TARGETS[target])
    layers = block(24, 15, 40, 2, 24)
    candidates = [k for k in chain_candidates(layers, machine) if k.staged == staged and k.rows == 3]
    rng = np.random.default_rng(0)
    run(candidates[0], [weights_of(work, None, rng) for work in layers if work is not None], TARGETS[target], rng)


@settings(max_examples=10, **PROPERTY)  # type: ignore[arg-type]
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.sampled_from(sorted(TARGETS)))
def test_the_blocked_layout_and_back(n: int, c: int, h: int, w: int, name: str) -> None:
    target = TARGETS[name]
    lanes = machine_of(target).lanes
    data = np.random.default_rng(c).standard_normal((n, c, h, w)).astype(np.float32)
    blocked = copied(data, data.shape, lanes, to_blocked=True, target=target)
    filled = np.zeros((n, -(-c // lanes) * lanes, h, w), np.float32)
    filled[:, :c] = data
    np.testing.assert_array_equal(blocked, filled.reshape(n, -1, lanes, h, w).transpose(0, 1, 3, 4, 2))
    np.testing.assert_array_equal(copied(blocked, data.shape, lanes, to_blocked=False, target=target), data)


def test_what_is_a_chain() -> None:
    first, depthwise, last = block(16, 14, 96, 1, 24)
    assert last is not None
    assert chain_applies(first, depthwise, last)
    assert chain_applies(first, depthwise, None)
    assert not chain_applies(replace(first, epilogue=Epilogue(True)), depthwise, last)
    assert not chain_applies(first, replace(depthwise, epilogue=Epilogue(True)), last)
    assert not chain_applies(replace(first, groups=2), depthwise, last)
    assert not chain_applies(first, replace(depthwise, groups=48), last)
    assert not chain_applies(first, replace(depthwise, out_channels=192), None)
    assert not chain_applies(first, replace(depthwise, dilation=(2, 2), padding=(2, 2, 2, 2)), last)
    assert not chain_applies(first, replace(depthwise, height=13), None)
    assert not chain_applies(first, depthwise, replace(last, kernel=(3, 3), padding=(1, 1, 1, 1)))
    assert not chain_applies(first, depthwise, replace(last, groups=2))
    # A window that lies in the padding alone would begin or end outside of the rows that a band computes.
    assert not chain_applies(first, replace(depthwise, padding=(3, 1, 1, 1)), None)


def test_a_block_row_that_keeps_too_much_is_refused() -> None:
    layers = block(32, 14, 64, 1, 32)
    kernel = choose_chain(layers, machine_of(SERVER), kept=(Mixing(0, 8, 16), Mixing(0)))
    with pytest.raises(ValueError, match="keeps 32 inputs, the kernel was made for 8"):
        pack_mixing(kernel, np.ones((64, 32, 1, 1), np.float32), last=False)


def test_fewer_weights_are_predicted_to_take_less_time() -> None:
    layers = block(64, 14, 384, 1, 64)
    machine = machine_of(SERVER)
    dense = chain_cycles(choose_chain(layers, machine), machine)
    half = (Mixing(0, 32, 16), Mixing(0, 192, 16))
    quarter = (Mixing(0, 16, 16), Mixing(0, 96, 16))
    cycles = [chain_cycles(choose_chain(layers, machine, kept=kept), machine) for kept in (half, quarter)]
    assert dense > cycles[0] > cycles[1]


def machine_with(threads: int) -> Machine:
    return Machine(AVX512.lanes, AVX512.registers, threads)


@pytest.mark.parametrize("threads", [2, 4, 8, 16])
def test_threads_have_tasks(threads: int) -> None:
    """No variant that leaves much of the threads without work is chosen."""
    for layers in (block(16, 112, 96, 2, 24), block(96, 14, 576, 2, 160), block(160, 7, 960, 1, 160)):
        kernel = choose_chain(layers, machine_with(threads))
        assert kernel.staged or 4 * kernel.bands * kernel.shares >= 3 * threads


def test_small_maps_are_cut_so_that_little_crosses_cores() -> None:
    """Bands and shares read little of what another thread wrote; two stages read half of all hidden channels."""
    for layers in (block(64, 14, 384, 1, 64), block(96, 14, 576, 1, 96), block(160, 7, 960, 1, 160)):
        machine = machine_with(2)
        kernel = choose_chain(layers, machine, blocked_input=True)
        assert not kernel.staged
        assert kernel.bands * kernel.shares == 2
        staged = replace(kernel, rows=kernel.depthwise.out_height, shares=1, staged=True)
        assert crossing_cycles(kernel, machine) < crossing_cycles(staged, machine) / 2


def test_one_thread_waits_for_no_other_and_has_no_shares() -> None:
    layers = block(160, 7, 960, 1, 160)
    found = chain_candidates(layers, machine_with(1))
    assert {kernel.shares for kernel in found} == {1}
    assert {crossing_cycles(kernel, machine_with(1)) for kernel in found} == {0.0}


@pytest.mark.parametrize(("hidden", "threads"), [(960, 16), (70, 4), (33, 2), (16, 8)])
def test_no_share_is_empty(hidden: int, threads: int) -> None:
    for kernel in chain_candidates(block(32, 7, hidden, 1, 32), machine_with(threads)):
        sizes = np.diff(kernel.share_channels)
        assert (sizes > 0).all()
        assert sizes.sum() == hidden


def in_bands(layers: Layers, rows: int, kept: tuple[Mixing, Mixing] = (KEEP_ALL, KEEP_ALL)) -> ChainKernel:
    """Return the usual variant, but with bands of some rows."""
    kernel = choose_chain(layers, machine_of(SERVER), kept=kept, blocked_input=True)
    return replace(kernel, rows=rows, staged=False)


@pytest.mark.parametrize(
    "kernel",
    [
        choose_chain(block(24, 56, 144, 1, 24), machine_of(SERVER), blocked_input=True),
        choose_chain(block(160, 7, 960, 1, 160, residual=True), machine_of(SERVER), blocked_input=True),
        in_bands(block(96, 14, 576, 1, 96, residual=True), 7),  # its weights are fetched ahead
        replace(in_bands(block(160, 7, 960, 1, 160, residual=True), 7), shares=2),
        replace(in_bands(block(160, 7, 960, 1, 160), 7, (Mixing(0, 40, 16), Mixing(0, 240, 16))), shares=2),
    ],
    ids=str,
)
def test_sums_stay_in_registers(kernel: ChainKernel) -> None:
    executable = build(chain_prim_func(kernel), SERVER)
    # Of what is left of 7 rows, LLVM spills some: a tile of half the size.
    text = executable.mod.inspect_source("asm")
    loops = [loop for loop in inner_loops(text) if fma_count(loop, "zmm") >= 24]
    assert len(loops) >= 3
    # The address of an input is computed once for a tile: offsets below zero would be widened for each pixel.
    assert all(sum(line.startswith("movslq") for line in loop) <= 2 for loop in loops)
    assert not [loop for loop in loops if spills(loop)]
    # Only the depthwise loops store, and a sum only once all its taps are added.
    stores = re.compile(r"vmov[au]p[sd]\s+%zmm\d+, ")
    assert not [loop for loop in loops if 9 * sum(map(bool, map(stores.match, loop))) > fma_count(loop, "zmm")]


def test_weights_are_fetched_where_an_instruction_is_known() -> None:
    func = chain_prim_func(in_bands(block(96, 14, 576, 1, 96), 7))
    assert FETCHES in str(func)
    for target, known in ((SERVER, True), (RISCV, False)):
        scheduled = str(schedule_function(func, target))
        assert FETCHES not in scheduled
        assert (Fetch.READ.value in scheduled) is known
