"""Every variant of the lane-select family computes the convolution; N:M layers of one input are read by lanes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import conv, fc
from running import build, call, haswell, integers, run_conv
from test_conv import TARGETS, workloads
from test_tiling import AVX2, AVX512, NEON, SSE, layer

from tvm_nm.inventory import Layer
from tvm_nm.passes.select import choose_fc
from tvm_nm.patterns import NM, OneByN
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.lane_conv import LaneConvKernel, lane_conv_prim_func
from tvm_nm.schedules.lane_packing import pack_lane_conv, random_lanes
from tvm_nm.schedules.lane_tiling import lane_candidates, lane_cycles
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.variants import kernel_from_text, ranked_kernels, variant_text
from tvm_nm.workload import ConvWorkload, Epilogue

PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
ONE = (1, 1, 1, 1)
RELU, ADD = Epilogue(False, 0.0), Epilogue(True, 0.0)


@dataclass(frozen=True)
class Case:
    work: ConvWorkload
    pattern: NM
    target: str
    seed: int


def weights_of(work: ConvWorkload, pattern: NM, seed: int) -> np.ndarray:
    """Small integers with an N:M mask."""
    rng = np.random.default_rng(seed)
    weights = integers((work.out_channels, work.in_channels_per_group, *work.kernel), rng)
    weights[weights == 0] = 4
    return weights * pattern.mask(rng.random(weights.shape, np.float32), groups=work.groups)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, LaneConvKernel]:
    """Any variant of convolutions with at least a vector of channels on both sides, whole vectors or not."""
    work = draw(workloads())
    target = draw(st.sampled_from(sorted(TARGETS)))
    machine = machine_of(TARGETS[target])
    sizes = st.sampled_from([machine.lanes, machine.lanes + 3, 2 * machine.lanes])
    work = replace(work, in_channels=draw(sizes) * work.groups, out_channels=draw(sizes) * work.groups)
    n, m = draw(st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 8)]))
    found = lane_candidates(work, machine, machine.lanes // m * n)
    assume(found)
    kernel = draw(st.sampled_from(found))
    lengths = [d for d in range(1, kernel.kept + 1) if kernel.kept % d == 0]
    kernel = replace(kernel, kept_per_block=draw(st.sampled_from(lengths)))
    return Case(work, NM(n, m), target, draw(st.integers(0, 2**32 - 1))), kernel


def check(case: Case, kernel: LaneConvKernel) -> None:
    rng = np.random.default_rng(case.seed)
    weights = weights_of(case.work, case.pattern, case.seed)
    out, operands = run_conv(kernel, case.work, weights, TARGETS[case.target], rng)
    np.testing.assert_array_equal(out, conv(case.work, *operands))


def test_windows_in_the_padding_are_left_to_others() -> None:
    work = ConvWorkload(1, 16, 16, 1, 1, (1, 1), (1, 2), (0, 1, 0, 0))
    assert not lane_candidates(work, AVX512, 8)
    assert lane_candidates(replace(work, padding=(0, 0, 0, 1)), AVX512, 8)


@settings(max_examples=10, **PROPERTY)
@given(cases())
def test_random_variants(case: tuple[Case, LaneConvKernel]) -> None:
    check(*case)


@pytest.mark.slow
@settings(max_examples=400, **PROPERTY)
@given(cases())
def test_many_random_variants(case: tuple[Case, LaneConvKernel]) -> None:
    check(*case)


NAMED = {
    "3x3 7x7": ConvWorkload(1, 64, 64, 7, 7, (3, 3), padding=ONE, epilogue=ADD),
    "3x3 7x7 stride 2": ConvWorkload(1, 32, 64, 14, 14, (3, 3), (2, 2), ONE, epilogue=RELU),
    "1x1 14x14": ConvWorkload(1, 128, 64, 14, 14, (1, 1), epilogue=ADD),
    "1x1 shortcut": ConvWorkload(1, 64, 96, 14, 14, (1, 1), (2, 2)),
    "grouped": ConvWorkload(1, 64, 64, 14, 14, (3, 3), padding=ONE, groups=2),
    "batch 3": ConvWorkload(3, 16, 32, 9, 9, (3, 3), padding=ONE, epilogue=ADD),
    "one pixel": ConvWorkload(1, 128, 100, 1, 1, (1, 1)),
    "one row": ConvWorkload(1, 16, 32, 1, 40, (1, 3), padding=(0, 1, 0, 1)),
}


@pytest.mark.parametrize("name", NAMED)
def test_layers_of_real_networks(name: str) -> None:
    pattern = NM(1 + len(name) % 2, 4)
    machine = machine_of(TARGETS["one thread"])
    per_vector = machine.lanes // pattern.m * pattern.n
    kernel = min(lane_candidates(NAMED[name], machine, per_vector), key=lambda k: lane_cycles(k, machine))
    check(Case(NAMED[name], pattern, "one thread", len(name)), kernel)


@settings(max_examples=50, **PROPERTY)
@given(cases())
def test_packing_loses_nothing(case: tuple[Case, LaneConvKernel]) -> None:
    of, kernel = case
    work, lanes = of.work, kernel.lanes
    weights = weights_of(work, of.pattern, of.seed)
    packed = pack_lane_conv(kernel, weights)
    assert packed.values.shape == packed.index.shape == kernel.weight_shape
    assert packed.values.dtype == np.float32
    assert packed.index.dtype == np.uint8
    assert packed.index.max() < lanes
    assert packed.bytes == kernel.packed_bytes
    found = np.zeros((work.groups, kernel.block_rows * kernel.block, kernel.in_vectors * lanes, work.taps), np.float32)
    for group, row, _, kept, v, lane in np.ndindex(packed.values.shape):
        position = kept // kernel.per_vector
        place = (group, row, 0, kept, v, lane)
        channel = position // work.taps * lanes + packed.index[place]
        found[group, row * kernel.block + v * lanes + lane, channel, position % work.taps] += packed.values[place]
    found = found[:, : work.out_channels_per_group, : work.in_channels_per_group]
    np.testing.assert_array_equal(found.reshape(weights.shape), weights)


def test_packing_refuses_what_does_not_fit() -> None:
    kernel = lane_candidates(layer(64, 32, 7, 3), AVX512, 4)[0]
    with pytest.raises(ValueError, match="16 of 16 input channels are kept, the kernel was made for 4"):
        pack_lane_conv(kernel, np.ones((32, 64, 3, 3), np.float32))


def test_what_the_family_leaves_to_others() -> None:
    work = layer(64, 64, 7, 1)
    assert lane_candidates(work, AVX512, 8)
    assert lane_candidates(work, AVX2, 4)
    assert not lane_candidates(work, NEON, 2)  # no permutation of a whole vector by another
    assert not lane_candidates(work, SSE, 2)
    assert not lane_candidates(replace(work, in_channels=8), AVX512, 8)
    assert not lane_candidates(replace(work, out_channels=8), AVX512, 8)


def nm_task(work: ConvWorkload, n: int, m: int) -> KernelTask:
    kept = work.in_channels_per_group * work.taps * n // m
    index = IndexKind.CHANNEL if work.taps == 1 else IndexKind.POSITION
    return KernelTask("conv", work, 1, index, 1, kept, of_group=n, group=m)


@pytest.mark.parametrize(
    ("n", "m", "offered"), [(2, 4, True), (1, 4, True), (3, 16, True), (1, 3, False), (2, 32, False)]
)
def test_which_patterns_are_offered_lanes(n: int, m: int, offered: bool) -> None:
    task = nm_task(ConvWorkload(1, 96, 64, 7, 7, (3, 3), padding=ONE), n, m)
    kernels = [kernel for kernel in ranked_kernels(task, AVX512, 40) if isinstance(kernel, LaneConvKernel)]
    assert bool(kernels) == offered
    for kernel in kernels:
        assert kernel.per_vector == 16 * n // m
        assert kernel_from_text(variant_text(kernel), task, AVX512) == kernel
    blocks = replace(task, of_group=0, group=0)  # an output channel may keep any inputs: lanes cannot hold them
    assert not any(isinstance(kernel, LaneConvKernel) for kernel in ranked_kernels(blocks, AVX512, 40))


def test_random_lanes_are_lanes() -> None:
    kernel = lane_candidates(layer(64, 32, 7, 3), AVX512, 4)[0]
    table = random_lanes(kernel, np.random.default_rng(0))
    assert table.shape == kernel.weight_shape
    assert set(np.unique(table)) == set(range(16))


def fc_layer(batch: int, inputs: int, outputs: int) -> Layer:
    shapes = ((batch, inputs), (batch, outputs))
    return Layer(
        "fc", "fc", (outputs, inputs, 1, 1), 1, (1, 1), (0, 0, 0, 0), (1, 1), *shapes, batch * inputs * outputs, 0
    )


@pytest.mark.parametrize("target", ["one thread", "two threads", "haswell"])
@pytest.mark.parametrize(("inputs", "outputs"), [(208, 192), (200, 150)])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4)], ids=str)
def test_fully_connected_layers_of_one_input(pattern: NM, inputs: int, outputs: int, target: str) -> None:
    machine = machine_of(haswell() if target == "haswell" else TARGETS[target])
    weights = weights_of(ConvWorkload(1, inputs, outputs, 1, 1, (1, 1)), pattern, 3)
    choice = choose_fc(fc_layer(1, inputs, outputs), weights, RELU, machine)
    assert isinstance(choice.kernel, LaneConvKernel)
    assert choice.pattern == str(pattern)
    if outputs == 192:  # a byte for each lane beside four for each weight; nothing is filled up
        assert choice.packed.bytes == 5 / 4 * pattern.fixed_density * weights.nbytes
    rng = np.random.default_rng(0)
    data, bias = integers((1, inputs), rng), integers((outputs,), rng)
    module = build(lane_conv_prim_func(choice.kernel), haswell() if target == "haswell" else TARGETS[target])
    arguments = [data.reshape(1, inputs, 1, 1), choice.packed.values, choice.packed.index, bias]
    out = call(module, arguments, (1, outputs, 1, 1))
    np.testing.assert_array_equal(out.reshape(1, outputs), fc(data, weights.reshape(outputs, inputs), bias, RELU))


def test_fully_connected_layers_that_stay_dense() -> None:
    for batch, pattern in ((2, NM(2, 4)), (1, NM(1, 3)), (1, NM(7, 8))):
        weights = weights_of(ConvWorkload(1, 192, 64, 1, 1, (1, 1)), pattern, 3)
        choice = choose_fc(fc_layer(batch, 192, 64), weights, RELU, AVX512)
        assert not isinstance(choice.kernel, LaneConvKernel)
        assert choice.note.startswith(f"{pattern}: "), choice.note
    blocks = OneByN(4).mask(np.random.default_rng(0).random((64, 192, 1, 1), np.float32), 0.5)
    choice = choose_fc(fc_layer(1, 192, 64), blocks.astype(np.float32), RELU, AVX512)
    assert not isinstance(choice.kernel, LaneConvKernel)
