"""Every variant of the channel-pair family computes the convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import tvm
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import run_conv
from test_conv import TARGETS, workloads
from test_lane_conv import nm_task, weights_of
from test_tiling import AVX2, AVX512, NEON, SSE, layer

from tvm_nm.patterns import NM
from tvm_nm.schedules.apply import pass_context, schedule_function
from tvm_nm.schedules.machine import Machine, machine_of
from tvm_nm.schedules.pair_code import pair_conv_prim_func
from tvm_nm.schedules.pair_conv import HEADER, PairConvKernel
from tvm_nm.schedules.pair_packing import pack_pair_conv, random_pairs
from tvm_nm.schedules.pair_tiling import pair_candidates, pair_cycles, shared_inputs
from tvm_nm.schedules.variants import kernel_from_text, neighbours, ranked_kernels, variant_text
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


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, PairConvKernel]:
    """Any variant of convolutions of one group with whole groups of M input channels."""
    work = draw(workloads())
    target = draw(st.sampled_from(sorted(TARGETS)))
    n, m = draw(st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (1, 3)]))
    inputs, outputs = draw(st.sampled_from([1, 2, 3, 4, 6])) * m, 2 * draw(st.sampled_from([1, 2, 3, 4, 8]))
    # Every variant but one needs a map of a vector; beyond that, tiles of all shapes.
    grown = (work.height + draw(st.sampled_from([0, 6, 13])), work.width + draw(st.sampled_from([0, 9, 20])))
    work = replace(work, in_channels=inputs, out_channels=outputs, groups=1, height=grown[0], width=grown[1])
    found = pair_candidates(work, machine_of(TARGETS[target]), n, m)
    assume(found)
    kernel = draw(st.sampled_from(found))
    # Smaller blocks and tasks than are worth trying, too.
    channels = [c for c in range(m, inputs + 1, m) if inputs % c == 0 and c <= kernel.channels_per_block]
    pairs = [p for p in range(1, kernel.pairs + 1) if kernel.pairs % p == 0]
    kernel = replace(
        kernel, channels_per_block=draw(st.sampled_from(channels)), pairs_per_task=draw(st.sampled_from(pairs))
    )
    return Case(work, NM(n, m), target, draw(st.integers(0, 2**32 - 1))), kernel


def check(case: Case, kernel: PairConvKernel) -> None:
    rng = np.random.default_rng(case.seed)
    work = case.work
    weights = weights_of(work, case.pattern, case.seed)
    assert pack_pair_conv(kernel, weights).index is not None
    out, operands = run_conv(kernel, work, weights, TARGETS[case.target], rng)
    np.testing.assert_array_equal(out, conv(work, *operands))


@settings(max_examples=15, **PROPERTY)
@given(cases())
def test_random_variants(case: tuple[Case, PairConvKernel]) -> None:
    check(*case)


@pytest.mark.slow
@settings(max_examples=400, **PROPERTY)
@given(cases())
def test_many_random_variants(case: tuple[Case, PairConvKernel]) -> None:
    check(*case)


NAMED = {
    "1x1 14x14": ConvWorkload(1, 128, 64, 14, 14, (1, 1), epilogue=ADD),
    "1x1 7x7": ConvWorkload(1, 512, 64, 7, 7, (1, 1), epilogue=RELU),
    "1x1 shortcut": ConvWorkload(1, 64, 96, 28, 28, (1, 1), (2, 2)),
    "3x3 28x28": ConvWorkload(1, 32, 16, 28, 28, (3, 3), padding=ONE, epilogue=RELU),
    "3x3 7x7": ConvWorkload(1, 64, 64, 7, 7, (3, 3), padding=ONE, epilogue=ADD),
    "3x3 stride 2": ConvWorkload(1, 32, 64, 28, 28, (3, 3), (2, 2), ONE, epilogue=RELU),
    "batch 3": ConvWorkload(3, 16, 32, 9, 9, (3, 3), padding=ONE, epilogue=ADD),
    "one row": ConvWorkload(1, 16, 32, 1, 40, (1, 3), padding=(0, 1, 0, 1)),
    "one column": ConvWorkload(1, 16, 32, 40, 1, (3, 3), padding=ONE),
}


@pytest.mark.parametrize("target", ["one thread", "two threads"])
@pytest.mark.parametrize("name", NAMED)
def test_layers_of_real_networks(name: str, target: str) -> None:
    pattern, machine = NM(1 + len(name) % 2, 4), machine_of(TARGETS[target])
    found = pair_candidates(NAMED[name], machine, pattern.n, pattern.m)
    check(Case(NAMED[name], pattern, target, len(name)), min(found, key=lambda k: pair_cycles(k, machine)))


@settings(max_examples=50, **PROPERTY)
@given(cases())
def test_packing_loses_nothing(case: tuple[Case, PairConvKernel]) -> None:
    of, kernel = case
    weights = weights_of(of.work, of.pattern, of.seed)
    packed = pack_pair_conv(kernel, weights)
    assert packed.index is not None
    assert (packed.values.shape, packed.index.shape) == (kernel.weight_shape, kernel.index_shape)
    assert (packed.values.dtype, packed.index.dtype) == (np.float32, np.uint8)
    assert packed.bytes == kernel.packed_bytes
    channels = channels_of(packed.index)
    found = np.zeros((of.work.out_channels, kernel.blocks, kernel.rows_per_block), np.float32)
    for block, pair, i, which in np.ndindex(packed.values.shape):
        shared, entries = packed.index[block, pair, 0], packed.index[block, pair, HEADER:]
        row = entries[2 * i + (0 if i < shared else which)]
        found[channels[block, pair, which], block, row] += packed.values[block, pair, i, which]
    np.testing.assert_array_equal(found.reshape(weights.shape), weights)
    # A task finds the sums of its channels in its own scratch.
    of_tasks = channels.reshape(kernel.blocks, -1, 2 * kernel.pairs_per_task)
    expected = np.arange(of.work.out_channels).reshape(1, -1, 2 * kernel.pairs_per_task)
    np.testing.assert_array_equal(np.sort(of_tasks, axis=-1), np.broadcast_to(expected, of_tasks.shape))


def channels_of(table: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The pairs (blocks, pairs, 2) of a table."""
    low_first = table[..., 1:HEADER].astype(np.int64)
    return low_first[..., ::2] + 256 * low_first[..., 1::2]


def test_packing_refuses_what_does_not_fit() -> None:
    kernel = pair_candidates(layer(64, 32, 7, 3), AVX512, 1, 4)[0]
    with pytest.raises(ValueError, match=r"inputs of a block are kept, the kernel was made for \d+"):
        pack_pair_conv(kernel, np.ones((32, 64, 3, 3), np.float32))


def test_inputs_that_both_channels_keep_are_loaded_once() -> None:
    kernel = pair_candidates(layer(64, 32, 14, 1), AVX512, 2, 4)[0]
    weights = weights_of(kernel.workload, NM(2, 4), 0)
    weights[1::2] = weights[::2]
    table = pack_pair_conv(kernel, weights).index
    assert table is not None
    assert (table[..., 0] == kernel.kept_per_block).all()
    random = random_pairs(kernel, np.random.default_rng(0))
    assert random.shape == kernel.index_shape
    assert random[..., HEADER:].max() < kernel.rows_per_block


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(2, 4)], ids=str)
@pytest.mark.parametrize("outputs", [64, 512, 600])
def test_pairs_have_more_in_common_than_neighbours(outputs: int, pattern: NM) -> None:
    kernel = pair_candidates(layer(64, outputs, 14, 3), AVX512, pattern.n, pattern.m)[0]
    weights = weights_of(kernel.workload, pattern, 0)
    table = pack_pair_conv(kernel, weights).index
    assert table is not None
    kept, shared = weights.reshape(outputs, kernel.blocks, -1) != 0, table[..., 0]
    for block, pair in np.ndindex(*shared.shape):
        one, other = kept[channels_of(table)[block, pair], block]
        assert shared[block, pair] == (one & other).sum()
    neighbours = (kept[::2] & kept[1::2]).sum(axis=-1).mean()
    assert shared.mean() > 1.2 * neighbours
    assert shared.mean() == pytest.approx(shared_inputs(kernel), rel=0.1)
    assert shared.mean() == pytest.approx(random_pairs(kernel, np.random.default_rng(0))[..., 0].mean(), rel=0.1)
    of_tasks = shared.reshape(kernel.blocks, -1, kernel.pairs_per_task).astype(int)
    assert (np.diff(of_tasks, axis=-1) <= 0).all()  # first those that have most in common


def test_pairs_of_a_channel_and_its_copy() -> None:
    rng = np.random.default_rng(0)
    kernel = pair_candidates(layer(64, 32, 14, 3), AVX512, 1, 4)[0]
    weights = weights_of(kernel.workload, NM(1, 4), 0)
    order = rng.permutation(16)
    weights[16:] = weights[order]
    packed = pack_pair_conv(kernel, weights)
    assert packed.index is not None
    channels = np.sort(channels_of(packed.index), axis=-1)
    np.testing.assert_array_equal(channels[..., 0], order[channels[..., 1] - 16])


@pytest.mark.parametrize("machine", [AVX512, AVX2, NEON, SSE])
def test_sums_fit_the_registers(machine: Machine) -> None:
    for work in (layer(64, 64, 28, 1), layer(64, 64, 14, 3), layer(64, 64, 7, 1)):
        kernels = pair_candidates(work, machine, 2, 4)
        assert kernels
        assert all(2 * kernel.vectors(kernel.tile_pixels) <= machine.accumulators for kernel in kernels)


def test_what_the_family_leaves_to_others() -> None:
    work = layer(64, 64, 14, 1)
    assert pair_candidates(work, AVX512, 2, 4)
    assert not pair_candidates(replace(work, out_channels=63), AVX512, 2, 4)
    assert not pair_candidates(replace(work, in_channels=66), AVX512, 2, 4)
    assert not pair_candidates(replace(work, groups=2), AVX512, 2, 4)
    assert not pair_candidates(layer(64, 64, 3, 1), AVX512, 2, 4)  # less than a vector of pixels
    with pytest.raises(ValueError, match="does not fit"):
        PairConvKernel(work, 16, 2, 4, 190, 64, 32)  # 6 pixels would be left


@pytest.mark.parametrize("threads", [1, 2])
def test_variants_are_offered_by_name(threads: int) -> None:
    machine = replace(AVX512, threads=threads)
    task = replace(nm_task(ConvWorkload(1, 256, 256, 14, 14, (3, 3), padding=ONE), 2, 4), threads=threads)
    kernels = [kernel for kernel in ranked_kernels(task, machine, 40) if isinstance(kernel, PairConvKernel)]
    assert kernels
    for kernel in kernels:
        assert kernel_from_text(variant_text(kernel), task, machine) == kernel
        assert kernel.tasks % threads == 0 or kernel.tasks >= 8 * threads
    near = neighbours(kernels[0], machine)
    assert near
    assert kernels[0] not in near
    unordered = replace(task, of_group=0, group=0)  # an output channel may keep any inputs
    assert not any(isinstance(kernel, PairConvKernel) for kernel in ranked_kernels(unordered, machine, 40))
    with pytest.raises(ValueError, match="does not fit"):
        kernel_from_text("pair tile 17 block 8 task 1", task, machine)


TRIPLES = {
    "x86_64-linux-gnu": {"mcpu": "sapphirerapids"},
    "aarch64-linux-gnu": {"mattr": ["+neon"]},
    "riscv64-linux-gnu": {},
}


@pytest.mark.parametrize(
    ("triple", "instruction"),
    [("x86_64-linux-gnu", "prefetchw"), ("aarch64-linux-gnu", "pstl1keep"), ("riscv64-linux-gnu", "")],
)
def test_processors_fetch_ahead_where_they_can(triple: str, instruction: str) -> None:
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "num-cores": 1, **TRIPLES[triple]})
    kernel = pair_candidates(layer(32, 8, 14, 1), machine_of(target), 2, 4)[0]
    function = schedule_function(pair_conv_prim_func(kernel), target)
    with pass_context():
        text = str(tvm.compile(tvm.IRModule({"main": function}), target=target).mod.inspect_source("asm"))
    assert "tvm_nm_fetch" not in text
    assert (instruction in text) if instruction else ("prefetch" not in text)
