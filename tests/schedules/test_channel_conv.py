"""Every variant of the channel-vector family computes the convolution, and is chosen where it pays."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import build, haswell, masked_weights, run_conv
from test_conv import EPILOGUES, TARGETS, workloads
from test_machine import fma_count, inner_loops, spills
from test_tiling import AVX2, AVX512, NEON, SSE, layer
from tvm import s_tir

from tvm_nm.schedules.apply import apply_template
from tvm_nm.schedules.channel_conv import ChannelConvKernel, channel_conv_prim_func
from tvm_nm.schedules.channel_packing import pack_channel_conv
from tvm_nm.schedules.channel_tiling import channel_candidates, channel_cycles, predicted_channel_cycles
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine, machine_of, target_from_json
from tvm_nm.schedules.packing import kept_per_block_row
from tvm_nm.schedules.pixel_cycles import predicted_cycles
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.schedules.tuned import TunedKernel
from tvm_nm.tuning.database import TuningDatabase, open_records
from tvm_nm.workload import ConvWorkload, Epilogue

PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
ONE = (1, 1, 1, 1)
SERVER = target_from_json({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "sapphirerapids"}, threads=1)


@dataclass(frozen=True)
class Case:
    work: ConvWorkload
    vectors: int | None  # of a sparse layer's block rows
    density: float
    target: str
    seed: int

    @property
    def lanes(self) -> int:
        return machine_of(TARGETS[self.target]).lanes


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Convolutions with at least a vector of channels in each group, whole vectors or not."""
    work = draw(workloads())
    target = draw(st.sampled_from(sorted(TARGETS)))
    lanes = machine_of(TARGETS[target]).lanes
    vectors = draw(st.sampled_from([None, None, 1, 2]))
    least = lanes * (vectors or 1)
    per_group = draw(st.sampled_from([least, least + 1, least + lanes // 2, 2 * least, 3 * lanes + 5 + least]))
    per_group_in = max(2, work.in_channels_per_group)
    work = replace(work, out_channels=per_group * work.groups, in_channels=per_group_in * work.groups)
    density = draw(st.sampled_from([0.1, 0.25, 0.5, 1.0]))
    return Case(work, vectors, density, target, draw(st.integers(0, 2**32 - 1)))


def weights_of(case: Case) -> np.ndarray:
    index = IndexKind.NONE if case.vectors is None else IndexKind.POSITION
    block = (case.vectors or 1) * case.lanes
    return masked_weights(case.work, block, index, case.density, np.random.default_rng(case.seed))


def best_kernel(
    work: ConvWorkload, machine: Machine, block: int | None = None, kept: int | None = None
) -> ChannelConvKernel | None:
    """Return the variant that the model prefers, None where the family does not fit."""
    variants = channel_candidates(work, machine, block=block, kept=kept)
    return min(variants, key=lambda variant: channel_cycles(variant, machine), default=None)


def kernel_of(case: Case, weights: np.ndarray) -> ChannelConvKernel:
    machine = machine_of(TARGETS[case.target])
    if case.vectors is None:
        kernel = best_kernel(case.work, machine)
    else:
        block = case.vectors * case.lanes
        kept = int(kept_per_block_row(weights, case.work.groups, block, IndexKind.POSITION).max())
        kernel = best_kernel(case.work, machine, block=block, kept=max(1, kept))
    assert kernel is not None
    return kernel


def check(case: Case, kernel: ChannelConvKernel, weights: np.ndarray) -> None:
    out, arguments = run_conv(kernel, case.work, weights, TARGETS[case.target], np.random.default_rng(case.seed))
    np.testing.assert_array_equal(out, conv(case.work, *arguments))


def check_case(case: Case) -> None:
    weights = weights_of(case)
    check(case, kernel_of(case, weights), weights)


@settings(max_examples=25, **PROPERTY)
@given(cases())
def test_random_convolutions(case: Case) -> None:
    check_case(case)


@pytest.mark.slow
@settings(max_examples=500, **PROPERTY)
@given(cases())
def test_many_random_convolutions(case: Case) -> None:
    check_case(case)


@st.composite
def variants(draw: st.DrawFn) -> tuple[Case, ChannelConvKernel, np.ndarray]:
    """Kernels that tuning may try but the model would not choose: any pixel tile and reduction block."""
    case = draw(cases())
    weights = weights_of(case)
    kernel = kernel_of(case, weights)
    rows = draw(st.integers(1, min(kernel.workload.out_height, 4)))
    columns = draw(st.integers(1, min(kernel.workload.out_width, 28 // rows)))
    block = draw(st.sampled_from([d for d in range(1, kernel.kept + 1) if kernel.kept % d == 0]))
    kernel = replace(kernel, tile_rows=rows, tile_columns=columns, kept_per_block=block, index_dtype="int32")
    return case, kernel, weights


@settings(max_examples=15, **PROPERTY)
@given(variants())
def test_variants_that_only_tuning_tries(variant: tuple[Case, ChannelConvKernel, np.ndarray]) -> None:
    check(*variant)


@pytest.mark.slow
@settings(max_examples=300, **PROPERTY)
@given(variants())
def test_many_variants(variant: tuple[Case, ChannelConvKernel, np.ndarray]) -> None:
    check(*variant)


RELU, ADD = Epilogue(False, 0.0), Epilogue(True, 0.0)
NAMED = {
    "3x3 14x14": (ConvWorkload(1, 32, 32, 14, 14, (3, 3), padding=ONE, epilogue=RELU), None),
    "3x3 7x7": (ConvWorkload(1, 64, 64, 7, 7, (3, 3), padding=ONE, epilogue=ADD), None),
    "3x3 7x7 stride 2": (ConvWorkload(1, 32, 64, 14, 14, (3, 3), (2, 2), ONE, epilogue=RELU), None),
    "1x1 7x7": (ConvWorkload(1, 128, 64, 7, 7, (1, 1), epilogue=ADD), None),
    "1x1 shortcut": (ConvWorkload(1, 64, 96, 14, 14, (1, 1), (2, 2)), None),
    "1000 classes": (ConvWorkload(1, 64, 1000, 13, 13, (1, 1), epilogue=RELU), None),
    "1x16 3x3": (ConvWorkload(1, 64, 64, 7, 7, (3, 3), padding=ONE, epilogue=ADD), 1),
    "1x32 1x1": (ConvWorkload(1, 128, 128, 14, 14, (1, 1), epilogue=ADD), 2),
    "grouped": (ConvWorkload(1, 64, 64, 14, 14, (3, 3), padding=ONE, groups=2), 1),
    "batch 3": (ConvWorkload(3, 16, 32, 9, 9, (3, 3), padding=ONE, epilogue=ADD), None),
    "one pixel": (ConvWorkload(1, 128, 100, 1, 1, (1, 1)), None),
    "valid 5x5, dilated": (ConvWorkload(1, 8, 32, 19, 17, (5, 5), dilation=(2, 1)), None),
    "one column": (ConvWorkload(1, 8, 32, 40, 3, (3, 3)), None),
    "one row, padded": (ConvWorkload(1, 8, 32, 1, 40, (3, 3), padding=ONE, epilogue=RELU), None),
}


@pytest.mark.parametrize("name", NAMED)
def test_layers_of_real_networks(name: str) -> None:
    work, vectors = NAMED[name]
    check_case(Case(work, vectors, 0.5, "one thread", seed=len(name)))


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize(("height", "width", "side"), [(14, 17, 5), (1, 9, 1), (1, 1, 1)])
def test_several_groups_rows_and_tiles(height: int, width: int, side: int, target: str) -> None:
    """Register tiles of a part of a block row, of one of many: their numbers all come from one parallel loop."""
    machine = machine_of(TARGETS[target])
    outs, ins = 3 * 2 * 2 * machine.lanes, 3 * 2
    work = ConvWorkload(2, ins, outs, height, width, (side, side), (1, 2), groups=3, epilogue=ADD)
    case = Case(work, 2, 0.5, target, seed=side)
    weights = weights_of(case)
    kept = int(kept_per_block_row(weights, 3, 2 * machine.lanes, IndexKind.POSITION).max())
    found = channel_candidates(work, machine, block=2 * machine.lanes, kept=max(1, kept))
    kernel = next(kernel for kernel in found if kernel.vectors == 1)
    assert (kernel.workload.groups, kernel.block_rows, kernel.tiles) == (3, 2, 2)
    check(case, kernel, weights)


def test_a_record_of_several_groups_rows_and_tiles_can_be_replayed(tmp_path: Path) -> None:
    work = ConvWorkload(1, 6, 96, 6, 5, (3, 3), groups=3)
    kernel = next(k for k in channel_candidates(work, AVX2, block=16, kept=4) if k.vectors == 1)
    func = channel_conv_prim_func(kernel)
    database = TuningDatabase(tmp_path, haswell())
    task = KernelTask("conv", work, 1, block=16, kept=4, index=IndexKind.POSITION)
    database.commit_records([TunedKernel(task, kernel, 10.0, "measured")])
    (record,) = open_records(database.folder).get_all_tuning_records()
    replayed = s_tir.Schedule(func)
    record.trace.apply_to_schedule(replayed, remove_postproc=False)
    scheduled = s_tir.Schedule(func)
    assert apply_template(scheduled)
    tvm.ir.assert_structural_equal(replayed.mod, scheduled.mod)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_every_epilogue(epilogue: Epilogue) -> None:
    check_case(Case(ConvWorkload(1, 8, 16, 7, 7, (1, 1), epilogue=epilogue), None, 1.0, "two threads", seed=1))


def unpack(kernel: ChannelConvKernel, values: np.ndarray, index: np.ndarray | None) -> np.ndarray:
    """The weight tensor of packed values, from the documentation of `ChannelConvKernel`."""
    work = kernel.workload
    weights = np.zeros((work.out_channels, work.in_channels_per_group * work.taps), np.float32)
    for group, row, tile, kept, v, lane in np.ndindex(values.shape):
        in_group = row * kernel.block + (tile * kernel.vectors + v) * kernel.lanes + lane
        value = values[group, row, tile, kept, v, lane]
        if in_group >= work.out_channels_per_group:
            assert value == 0
            continue
        position = kept
        if index is not None:
            offset = int(index[group, 0 if index.shape[1] == 1 else row, kept])
            if work.taps == 1:
                position = offset - group * work.in_channels_per_group
            else:
                channel, rest = divmod(offset, kernel.channel_stride)
                y, x = divmod(rest, kernel.workload.reach[1])
                ky, kx = y // work.dilation[0], x // work.dilation[1]
                assert (ky * work.dilation[0], kx * work.dilation[1]) == (y, x)
                tap = ky * work.kernel[1] + kx
                position = (channel - group * work.in_channels_per_group) * work.taps + tap
        weights[group * work.out_channels_per_group + in_group, position] += value
    return weights.reshape(work.out_channels, work.in_channels_per_group, *work.kernel)


@settings(max_examples=50, **PROPERTY)
@given(cases())
def test_packing_loses_nothing(case: Case) -> None:
    weights = weights_of(case)
    kernel = kernel_of(case, weights)
    packed = pack_channel_conv(kernel, weights)
    assert packed.values.shape == kernel.weight_shape
    assert packed.values.flags.c_contiguous
    assert (packed.index is None) == (kernel.index_shape is None)
    if packed.index is not None:
        assert packed.index.shape == kernel.index_shape
        assert packed.index.dtype == kernel.index_dtype
        assert (np.diff(packed.index.astype(np.int64)) > 0).all(), "an input is read twice, or out of order"
    np.testing.assert_array_equal(unpack(kernel, packed.values, packed.index), weights)


WORK = ConvWorkload(1, 64, 32, 32, 32, (3, 3), padding=ONE)


def test_packing_refuses_what_does_not_fit() -> None:
    kernel = best_kernel(WORK, AVX512, block=16, kept=5)
    assert kernel is not None
    with pytest.raises(ValueError, match="a block row keeps 576 inputs, the kernel was made for"):
        pack_channel_conv(kernel, np.ones((32, 64, 3, 3), np.float32))
    dense = best_kernel(WORK, AVX512)
    assert dense is not None
    assert dense.index_dtype == "int32"
    with pytest.raises(ValueError, match="does not fit uint16"):
        pack_channel_conv(replace(dense, index_dtype="uint16"), np.ones((32, 64, 3, 3), np.float32))


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([AVX512, AVX2, NEON, SSE]))
def test_choices_fit_the_machine(case: Case, machine: Machine) -> None:
    block = None if case.vectors is None else case.vectors * machine.lanes
    positions = case.work.in_channels_per_group * case.work.taps
    kept = None if block is None else max(1, int(case.density * positions))
    kernel = best_kernel(case.work, machine, block=block, kept=kept)
    if case.work.out_channels_per_group < (block or machine.lanes):
        assert kernel is None
        return
    assert kernel is not None
    # Sums, a step's weights and an input at least.
    pixels = kernel.tile_rows * kernel.tile_columns
    assert kernel.vectors * pixels + kernel.vectors + 1 <= machine.registers
    assert kernel.kept % kernel.kept_per_block == 0
    assert (kept or positions) <= kernel.kept <= positions
    assert kernel.lanes == machine.lanes
    assert kernel.block % kernel.oc_tile == 0
    assert np.isfinite(predicted_channel_cycles(kernel))
    assert predicted_channel_cycles(kernel) > 0


def test_what_the_family_leaves_to_others() -> None:
    pointwise = ConvWorkload(1, 64, 64, 7, 7, (1, 1))
    assert best_kernel(pointwise, AVX512) is not None
    assert best_kernel(pointwise, AVX512, block=4, kept=32) is None  # not whole vectors
    assert best_kernel(replace(pointwise, out_channels=8), AVX512) is None
    assert best_kernel(ConvWorkload(1, 64, 64, 7, 7, (3, 3), groups=64), AVX512) is None  # depthwise
    assert best_kernel(layer(64, 64, 112, 1), AVX512) is None  # sums of a task would leave L2


SMALL_MAPS = [layer(512, 512, 7, 3), layer(512, 512, 7, 3, 2), layer(2048, 512, 7, 1), layer(256, 256, 14, 3)]


@pytest.mark.parametrize("work", SMALL_MAPS, ids=str)
def test_small_maps_prefer_channel_vectors(work: ConvWorkload) -> None:
    channels = best_kernel(work, AVX512)
    assert channels is not None
    assert predicted_channel_cycles(channels) < 0.9 * predicted_cycles(choose_kernel(work, AVX512), AVX512)


def test_large_maps_with_few_channels_prefer_pixel_vectors() -> None:
    work = layer(64, 256, 56, 1)
    channels = best_kernel(work, AVX512)
    assert channels is None or predicted_channel_cycles(channels) > predicted_cycles(
        choose_kernel(work, AVX512), AVX512
    )


@pytest.mark.parametrize("threads", [2, 4])
def test_tasks_for_every_thread(threads: int) -> None:
    for work in SMALL_MAPS:
        kernel = best_kernel(work, Machine(16, 32, threads))
        assert kernel is not None
        assert kernel.block_rows * kernel.tiles % threads == 0


KERNELS = {
    "3x3 dense": (layer(64, 64, 14, 3), None),
    "3x3 7x7": (layer(64, 64, 7, 3), None),
    "3x3 1x16": (layer(64, 64, 14, 3), 1),
    "1x1 dense": (layer(128, 64, 7, 1), None),
    "1x1 1x32": (layer(128, 64, 14, 1), 2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_sums_stay_in_registers(name: str) -> None:
    work, vectors = KERNELS[name]
    sparse = {} if vectors is None else {"block": 16 * vectors, "kept": work.in_channels * work.taps // 2}
    kernel = best_kernel(work, AVX512, **sparse)
    assert kernel is not None
    text = str(build(channel_conv_prim_func(kernel), SERVER).mod.inspect_source("asm"))
    hottest = max(inner_loops(text), key=lambda lines: fma_count(lines, "zmm"))
    assert fma_count(hottest, "zmm") % (kernel.vectors * kernel.tile_rows * kernel.tile_columns) == 0
    assert fma_count(hottest, "zmm") > 0
    assert spills(hottest) == 0
    assert not [line for line in hottest if re.match(r"vmov[au]p[sd]\s+%zmm\d+, ", line)], "sums are stored in the loop"


def test_sums_stay_in_sixteen_registers() -> None:
    kernel = best_kernel(layer(64, 64, 14, 3), AVX2)
    assert kernel is not None
    text = str(build(channel_conv_prim_func(kernel), haswell()).mod.inspect_source("asm"))
    hottest = max(inner_loops(text), key=lambda lines: fma_count(lines, "ymm"))
    tiles = {kernel.tile_columns, 14 % kernel.tile_columns} - {0}
    assert any(fma_count(hottest, "ymm") % (kernel.vectors * pixels) == 0 for pixels in tiles)
    assert fma_count(hottest, "ymm") > 0
    assert spills(hottest) == 0


def test_the_transpose_is_made_of_shuffles() -> None:
    kernel = best_kernel(layer(16, 16, 14, 1), AVX512)
    assert kernel is not None
    text = str(build(channel_conv_prim_func(kernel), SERVER).mod.inspect_source("asm"))
    # 16 rows of 16: 64 two-operand shuffles, none of which needs a vector of indices. LLVM may split off the last tile.
    shuffles = re.findall(r"^\s+v(?:unpck[lh]p[sd]|shuff\w+|permt2\w+|insertf\w+|perm2f128)\s.*%zmm", text, re.M)
    assert len(shuffles) in (64, 128)
    assert "vpermt2" not in text
