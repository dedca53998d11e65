"""Every variant of the convolution family computes the convolution."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import haswell, host_flags, masked_weights, run_conv

from tvm_nm.schedules.apply import schedule_function
from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.decisions import divisors
from tvm_nm.schedules.geometry import CopyScope, candidate_geometries
from tvm_nm.schedules.machine import host_target, machine_of
from tvm_nm.schedules.packing import kept_per_block_row, pack_conv
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.schedules.variants import kernel_prim_func
from tvm_nm.workload import ConvWorkload, Epilogue

BLOCKS = (1, 2, 3, 4, 5, 8, 11, 16, 32)
TARGETS = {"one thread": host_target(1), "two threads": host_target(2)}
if "avx2" in host_flags():
    TARGETS["avx2"] = haswell()
Variant = tuple[ConvWorkload, ConvKernel, np.ndarray, str, int]
"""What is computed, how, with which weights, for which of the targets, and a seed."""
EPILOGUES = [
    Epilogue(residual, *bounds)
    for residual in (False, True)
    for bounds in ((None, None), (0.0, None), (0.0, 6.0), (None, 1.0), (-0.5, 0.5))
]


@st.composite
def workloads(draw: st.DrawFn) -> ConvWorkload:
    """Small convolutions of every kind."""
    groups = draw(st.sampled_from([1, 1, 1, 1, 2, 3]))
    ins, outs = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 20, 24, 33]))
    if draw(st.integers(0, 5)) == 0:  # depthwise, perhaps with a channel multiplier
        groups, ins, outs = draw(st.sampled_from([2, 8, 13, 16])), 1, draw(st.sampled_from([1, 1, 2]))
    square = st.integers(1, 7).map(lambda k: (k, k))
    kernel = draw(st.one_of(st.just((1, 1)), square, st.tuples(st.integers(1, 7), st.integers(1, 7))))
    stride = draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    dilation = draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    small = st.integers(0, 3)
    padding = draw(st.one_of(st.just((0, 0, 0, 0)), st.tuples(small, small, small, small)))
    # At least one window must fit.
    least_height = max(1, dilation[0] * (kernel[0] - 1) + 1 - padding[0] - padding[2])
    least_width = max(1, dilation[1] * (kernel[1] - 1) + 1 - padding[1] - padding[3])
    extra = st.one_of(st.just(0), st.integers(0, 12), st.sampled_from([13, 15, 16, 27]))
    return ConvWorkload(
        draw(st.sampled_from([1, 1, 2, 3])),
        groups * ins,
        groups * outs,
        least_height + draw(extra),
        least_width + draw(extra),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.sampled_from(EPILOGUES)),
    )


@dataclass(frozen=True)
class Case:
    work: ConvWorkload
    index: IndexKind
    block: int | None
    density: float
    target: str
    seed: int


cases = st.builds(
    lambda work, sparse, density, target, seed: Case(work, *sparse, density, target, seed),
    workloads(),
    st.one_of(
        st.just((IndexKind.NONE, None)),
        st.tuples(st.sampled_from([IndexKind.CHANNEL, IndexKind.POSITION]), st.sampled_from(BLOCKS)),
    ),
    st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]),
    st.sampled_from(sorted(TARGETS)),
    st.integers(0, 2**32 - 1),
)


def kernel_of(
    work: ConvWorkload, index: IndexKind, block: int | None, weights: np.ndarray, target: tvm.target.Target
) -> ConvKernel:
    if index is IndexKind.NONE:
        return choose_kernel(work, machine_of(target))
    kept = kept_per_block_row(weights, work.groups, min(block, work.out_channels_per_group), index).max()
    return choose_kernel(work, machine_of(target), block=block, index=index, kept=max(1, int(kept)))


def check(kernel: ConvKernel, work: ConvWorkload, weights: np.ndarray, target: tvm.target.Target, seed: int) -> None:
    out, arguments = run_conv(kernel, work, weights, target, np.random.default_rng(seed))
    np.testing.assert_array_equal(out, conv(work, *arguments))


def check_variant(variant: Variant) -> None:
    work, kernel, weights, target, seed = variant
    check(kernel, work, weights, TARGETS[target], seed)


def check_case(case: Case) -> None:
    target = TARGETS[case.target]
    rng = np.random.default_rng(case.seed)
    weights = masked_weights(case.work, case.block or 1, case.index, case.density, rng)
    check(kernel_of(case.work, case.index, case.block, weights, target), case.work, weights, target, case.seed)


PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=50, **PROPERTY)
@given(cases)
def test_random_convolutions(case: Case) -> None:
    check_case(case)


@pytest.mark.slow
@settings(max_examples=1000, **PROPERTY)
@given(cases)
def test_many_random_convolutions(case: Case) -> None:
    check_case(case)


@st.composite
def variants(draw: st.DrawFn) -> Variant:
    """Kernels that tuning may try but the model would not choose: any layout, tile, task and reduction block."""
    case = draw(cases)
    rng = np.random.default_rng(case.seed)
    weights = masked_weights(case.work, case.block or 1, case.index, case.density, rng)
    target = TARGETS[case.target]
    chosen = kernel_of(case.work, case.index, case.block, weights, target)
    geometries = [
        geometry
        for geometry in candidate_geometries(case.work, machine_of(target).lanes)
        if case.index is IndexKind.NONE or geometry.allows_index(case.index is IndexKind.POSITION)
    ]
    geometry = draw(st.sampled_from(geometries))
    kernel = replace(
        chosen,
        geometry=geometry,
        oc_tile=draw(st.integers(1, min(chosen.block, 8))),
        vectors_per_tile=draw(st.integers(1, min(geometry.vectors, 5))),
        kept_per_block=draw(st.sampled_from([0, *divisors(chosen.kept)])),
        index_dtype="int32",
    )
    kernel = replace(kernel, rows_per_task=draw(st.sampled_from(kernel.task_rows)))
    return case.work, kernel, weights, case.target, case.seed


@settings(max_examples=20, **PROPERTY)
@given(variants())
def test_variants_that_only_tuning_tries(variant: Variant) -> None:
    check_variant(variant)


@st.composite
def panels(draw: st.DrawFn) -> Variant:
    """Pointwise kernels whose pixels are packed a chunk at a time, and whose outputs are fetched ahead."""
    block = draw(st.sampled_from([1, 4, 8, 16]))
    index = draw(st.sampled_from([IndexKind.NONE, IndexKind.CHANNEL]))
    size = draw(st.tuples(st.integers(4, 15), st.integers(4, 15)))
    stride = draw(st.sampled_from([(1, 1), (2, 2), (2, 2), (2, 1), (1, 2), (3, 2), (2, 3)]))
    groups = draw(st.sampled_from([1, 1, 2])) if index is IndexKind.NONE else 1
    channels = (groups * draw(st.integers(1, 40)), groups * block * draw(st.integers(1, 4)))
    work = ConvWorkload(
        draw(st.integers(1, 2)),
        *channels,
        *(step * extent - draw(st.integers(0, step - 1)) for step, extent in zip(stride, size, strict=True)),
        (1, 1),
        stride,
        groups=groups,
        epilogue=draw(st.sampled_from(EPILOGUES)),
    )
    seed, name = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(sorted(TARGETS)))
    weights = masked_weights(work, block, index, 0.5, np.random.default_rng(seed))
    machine = machine_of(TARGETS[name])
    chosen = kernel_of(work, index, block, weights, TARGETS[name])
    geometry = draw(
        st.sampled_from([g for g in candidate_geometries(work, machine.lanes) if g.copy is CopyScope.CHUNK])
    )
    kernel = replace(
        chosen,
        geometry=geometry,
        vectors_per_tile=draw(st.integers(1, min(geometry.vectors, 4))),
        index_dtype="uint8" if index is IndexKind.NONE else "uint16",
        kept_per_block=0,
    )
    kernel = replace(kernel, rows_per_task=draw(st.sampled_from(kernel.task_rows)))
    return work, kernel, weights, name, seed


@settings(max_examples=20, **PROPERTY)
@given(panels())
def test_panels(variant: Variant) -> None:
    check_variant(variant)


@st.composite
def aligned(draw: st.DrawFn) -> Variant:
    """Kernels whose vectors are those of the output, one or two to a row; whole tiles are stored from registers."""
    name = draw(st.sampled_from(sorted(TARGETS)))
    machine = machine_of(TARGETS[name])
    block = draw(st.sampled_from([1, 3, 4, 8]))
    index = draw(st.sampled_from(list(IndexKind)))
    groups = draw(st.sampled_from([1, 1, 2])) if index is IndexKind.NONE else 1
    channels = (groups * draw(st.integers(1, 12)), groups * draw(st.integers(block, 4 * block)))
    stride, kernel = draw(st.sampled_from([(1, 1), (2, 2), (1, 2)])), (draw(st.integers(1, 3)), 3)
    size = (draw(st.integers(1, 6)), machine.lanes * draw(st.integers(1, 2)))
    top, left = draw(st.integers(0, kernel[0] - 1)), draw(st.integers(0, kernel[1] - 1))
    bottom, right = draw(st.integers(0, kernel[0] - 1)), draw(st.integers(0, kernel[1] - 1))
    needed = [step * (extent - 1) + length for step, extent, length in zip(stride, size, kernel, strict=True)]
    work = ConvWorkload(
        draw(st.integers(1, 2)),
        *channels,
        max(1, needed[0] - top - bottom),
        needed[1] - left - right,
        kernel,
        stride,
        (top, left, max(bottom, needed[0] - top - 1), right),
        groups=groups,
        epilogue=draw(st.sampled_from(EPILOGUES)),
    )
    assume(work.out_width == size[1])
    weights = masked_weights(work, block, index, 0.5, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    chosen = kernel_of(work, index, block, weights, TARGETS[name])
    found = [g for g in candidate_geometries(work, machine.lanes) if g.aligned]
    fitting = [g for g in found if index is IndexKind.NONE or g.allows_index(index is IndexKind.POSITION)]
    geometry = draw(st.sampled_from(fitting))
    kernel_variant = replace(
        chosen,
        geometry=geometry,
        oc_tile=draw(st.integers(1, min(chosen.block, 4))),
        vectors_per_tile=draw(st.sampled_from(geometry.tile_vectors(6))),
        kept_per_block=draw(st.sampled_from([0, 0, *divisors(chosen.kept)])),
        index_dtype="int32",
    )
    kernel_variant = replace(kernel_variant, rows_per_task=draw(st.sampled_from(kernel_variant.task_rows)))
    return work, kernel_variant, weights, name, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=25, **PROPERTY)
@given(aligned())
def test_aligned_rows(variant: Variant) -> None:
    check_variant(variant)


@pytest.mark.slow
@settings(max_examples=300, **PROPERTY)
@given(aligned())
def test_many_aligned_rows(variant: Variant) -> None:
    check_variant(variant)


def test_aligned_rows_have_no_scratch_and_are_chosen() -> None:
    work = ConvWorkload(1, 32, 32, 16, 16, (3, 3), padding=ONE, epilogue=ADD)
    target = TARGETS["one thread"]
    kernel = choose_kernel(work, machine_of(target), block=4, index=IndexKind.POSITION, kept=72)
    assert kernel.geometry.aligned
    assert kernel.stores_from_registers
    text = schedule_function(kernel_prim_func(kernel), target).script()
    buffers = re.findall(r"(\w+) = T\.sblock_alloc_buffer", text)
    assert [name for name in buffers if not name.endswith("_local")] == ["pad"]


@pytest.mark.parametrize(("scope", "kept_parts"), [(CopyScope.CHUNK, 8), (CopyScope.TILE, 0)])
def test_panels_fetch_each_line_of_the_output_and_the_residual(scope: CopyScope, kept_parts: int) -> None:
    work = ConvWorkload(1, 32, 16, 14, 14, (1, 1), epilogue=Epilogue(True, 0.0))
    target = TARGETS["one thread"]
    chosen = kernel_of(work, IndexKind.NONE, None, np.ones((16, 32, 1, 1)), target)
    geometry = next(
        g for g in candidate_geometries(work, machine_of(target).lanes) if g.copy is scope and g.vectors > 2
    )
    kernel = replace(chosen, geometry=geometry, oc_tile=8, block=8, vectors_per_tile=2, rows_per_task=1)
    text = schedule_function(kernel_prim_func(kernel), target).script()
    # In each of 8 parts of the reduction one channel's 2 vectors and the end of the second, of two tensors.
    assert text.count('"tvm_nm_fetch"') + text.count('"tvm_nm_fetch_to_write"') == (6 if kept_parts else 0)
    assert (f"range({kept_parts})" in text) == bool(kept_parts)


@pytest.mark.slow
@settings(max_examples=300, **PROPERTY)
@given(variants())
def test_many_variants(variant: Variant) -> None:
    check_variant(variant)


RELU, RELU6, ADD = Epilogue(False, 0.0), Epilogue(False, 0.0, 6.0), Epilogue(True)
ONE = (1, 1, 1, 1)
NAMED = {
    "first 7x7 stride 2": (ConvWorkload(1, 3, 16, 64, 64, (7, 7), (2, 2), (3, 3, 3, 3), epilogue=RELU), "none", None),
    "3x3": (ConvWorkload(1, 32, 32, 28, 28, (3, 3), padding=ONE, epilogue=RELU), "none", None),
    "3x3 stride 2": (ConvWorkload(1, 32, 48, 28, 28, (3, 3), (2, 2), ONE), "none", None),
    "3x3 7x7 map, residual": (ConvWorkload(1, 64, 64, 7, 7, (3, 3), padding=ONE, epilogue=ADD), "none", None),
    "3x3, long rows": (ConvWorkload(1, 3, 8, 5, 601, (3, 3), padding=ONE, epilogue=RELU), "none", None),
    "3x3 stride 2, long rows": (ConvWorkload(1, 3, 8, 5, 601, (3, 3), (2, 2), ONE), "position", 4),
    "1x1 56x56": (ConvWorkload(1, 32, 64, 56, 56, (1, 1), epilogue=RELU), "none", None),
    "1x1 14x14": (ConvWorkload(1, 128, 64, 14, 14, (1, 1), epilogue=Epilogue(True, 0.0)), "none", None),
    "1x1 stride 2 shortcut": (ConvWorkload(1, 64, 96, 14, 14, (1, 1), (2, 2)), "none", None),
    "1x1 stride 2, grouped": (ConvWorkload(1, 48, 96, 15, 14, (1, 1), (2, 2), groups=3), "channel", 16),
    "depthwise": (ConvWorkload(1, 48, 48, 28, 28, (3, 3), padding=ONE, groups=48, epilogue=RELU6), "none", None),
    "depthwise stride 2": (ConvWorkload(1, 40, 40, 28, 28, (3, 3), (2, 2), ONE, (1, 1), 40, RELU6), "none", None),
    "depthwise sparse": (ConvWorkload(1, 24, 24, 14, 14, (3, 3), (1, 1), ONE, (1, 1), 24), "position", 1),
    "grouped (ResNeXt)": (ConvWorkload(1, 64, 64, 14, 14, (3, 3), padding=ONE, groups=8), "none", None),
    "grouped 1x1 (ShuffleNet)": (ConvWorkload(1, 48, 96, 14, 14, (1, 1), groups=3), "channel", 16),
    "grouped 1x1, many block rows": (ConvWorkload(1, 96, 192, 14, 14, (1, 1), groups=3), "none", None),
    "dilated (DeepLab)": (ConvWorkload(1, 16, 16, 20, 20, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)), "none", None),
    "1x7 and 7x1 (Inception)": (ConvWorkload(1, 16, 24, 17, 17, (1, 7), (1, 1), (0, 3, 0, 3)), "position", 8),
    "one-dimensional": (ConvWorkload(1, 16, 24, 1, 100, (1, 9), (1, 2), (0, 4, 0, 4)), "channel", 4),
    "one row, padded": (ConvWorkload(1, 8, 16, 1, 40, (3, 3), padding=ONE, epilogue=RELU), "none", None),
    "one row, padded, stride 2": (ConvWorkload(1, 8, 16, 1, 40, (3, 3), (2, 2), ONE, epilogue=RELU), "position", 4),
    "copies on the stack": (ConvWorkload(1, 2, 2, 2, 4, (1, 1), (1, 2), (0, 0, 0, 3), groups=2), "none", None),
    "nothing but padding": (ConvWorkload(1, 8, 16, 1, 1, (1, 1), (2, 1), (1, 0, 0, 0)), "none", None),
    "one pixel": (ConvWorkload(1, 128, 100, 1, 1, (1, 1)), "none", None),
    "2:4 3x3": (ConvWorkload(1, 64, 64, 14, 14, (3, 3), padding=ONE, epilogue=Epilogue(True, 0.0)), "position", 1),
    "2:4 1x1": (ConvWorkload(1, 128, 64, 28, 28, (1, 1), epilogue=RELU), "channel", 1),
    "1x4 3x3": (ConvWorkload(1, 64, 64, 14, 14, (3, 3), padding=ONE, epilogue=RELU), "channel", 4),
    "1x16 1x1": (ConvWorkload(1, 128, 128, 28, 28, (1, 1), epilogue=ADD), "channel", 16),
    "1x16p 3x3 stride 2": (ConvWorkload(1, 32, 64, 28, 28, (3, 3), (2, 2), ONE), "position", 16),
    "1x16 of 40 channels": (ConvWorkload(1, 32, 40, 14, 14, (3, 3), padding=ONE, epilogue=ADD), "channel", 16),
    "int32 table": (ConvWorkload(1, 128, 16, 28, 28, (3, 3), padding=ONE), "position", 8),
    "batch 3": (ConvWorkload(3, 16, 24, 9, 9, (3, 3), padding=ONE, epilogue=ADD), "channel", 8),
}


@pytest.mark.parametrize("name", NAMED)
def test_layers_of_real_networks(name: str) -> None:
    work, index, block = NAMED[name]
    check_case(Case(work, IndexKind(index), block, 0.5, "one thread", seed=len(name)))


@pytest.mark.skipif("avx2" not in TARGETS, reason="needs AVX2")
@pytest.mark.parametrize(
    "name", ["3x3", "depthwise", "2:4 3x3", "1x16 1x1", "1x16p 3x3 stride 2", "copies on the stack"]
)
def test_layers_of_real_networks_with_avx2(name: str) -> None:
    work, index, block = NAMED[name]
    check_case(Case(work, IndexKind(index), block, 0.5, "avx2", seed=len(name)))


def test_the_named_int32_table_is_one() -> None:
    work, _, block = NAMED["int32 table"]
    machine = machine_of(TARGETS["one thread"])
    assert choose_kernel(work, machine, block=block, index=IndexKind.POSITION).index_dtype == "int32"
    assert choose_kernel(work, machine, block=block, index=IndexKind.CHANNEL).index_dtype == "uint8"


def unpack(kernel: ConvKernel, values: np.ndarray, index: np.ndarray | None) -> np.ndarray:
    """The weight tensor of packed values, from the documentation of `ConvKernel`; checks that fillers are zero."""
    work, geometry = kernel.workload, kernel.geometry
    weights = np.zeros((work.out_channels, work.in_channels_per_group, work.taps), np.float32)
    taps = [(ky, kx) for ky in range(work.kernel[0]) for kx in range(work.kernel[1])]
    where = {
        (0 if geometry.flat else geometry.tap_offset(*tap)) + channel * kernel.channel_stride: (
            channel,
            t,
        )
        for t, tap in enumerate(taps)
        for channel in range(work.in_channels)
    }
    assert len(where) == work.taps * work.in_channels, "two inputs have one offset"
    # The blocks of the reduction one after another again, for each row.
    values = np.concatenate(np.moveaxis(values, 1, 0), axis=3)
    index = None if index is None else np.concatenate(np.moveaxis(index, 1, 0), axis=2)
    groups, rows, tiles = values.shape[:3]
    for group, row, tile, o in np.ndindex(groups, rows, tiles, kernel.oc_tile):
        in_row = tile * kernel.oc_tile + o
        in_group = row * kernel.block + in_row
        of_channel = values[group, row, tile, ..., o]
        if in_row >= kernel.block or in_group >= work.out_channels_per_group:
            assert not of_channel.any()
            continue
        target = weights[group * work.out_channels_per_group + in_group]
        for k, value in enumerate(of_channel):
            if kernel.index is IndexKind.NONE:
                target[k] = value.reshape(-1)
            elif kernel.index is IndexKind.CHANNEL:
                target[index[group, row, k] - group * work.in_channels_per_group] += value.reshape(-1)
            else:
                channel, tap = where[int(index[group, row, k])]
                target[channel - group * work.in_channels_per_group, tap] += value
    return weights.reshape(work.out_channels, work.in_channels_per_group, *work.kernel)


@settings(max_examples=100, **PROPERTY)
@given(cases)
def test_packing_loses_nothing(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    weights = masked_weights(case.work, case.block or 1, case.index, case.density, rng)
    kernel = kernel_of(case.work, case.index, case.block, weights, TARGETS[case.target])
    packed = pack_conv(kernel, weights)
    assert packed.values.shape == kernel.weight_shape
    assert packed.values.flags.c_contiguous
    if packed.index is None:
        assert kernel.index_shape is None
        assert packed.bytes == packed.values.nbytes
    else:
        assert packed.index.shape == kernel.index_shape
        assert packed.index.dtype == kernel.index_dtype
        table = np.concatenate(np.moveaxis(packed.index, 1, 0), axis=2).astype(np.int64)
        assert (np.diff(np.sort(table)) > 0).all(), "an input is read twice"
        channel = table // kernel.channel_stride if kernel.index is IndexKind.POSITION else table
        assert (np.diff(channel) >= 0).all(), "inputs are read channel by channel"
        assert packed.bytes == packed.values.nbytes + packed.index.nbytes
    np.testing.assert_array_equal(unpack(kernel, packed.values, packed.index), weights)


def test_kept_per_block_row_counts_unions() -> None:
    weights = np.zeros((6, 5, 1, 3), np.float32)
    weights[0, 1, 0, 2] = weights[1, 1, 0, 0] = weights[1, 4, 0, 2] = 1  # row 0: channels 1 and 4, three positions
    weights[4, 0, 0, 0] = weights[5, 0, 0, 0] = 1  # row 2
    assert kept_per_block_row(weights, 1, 2, IndexKind.CHANNEL).tolist() == [[2, 0, 1]]
    assert kept_per_block_row(weights, 1, 2, IndexKind.POSITION).tolist() == [[3, 0, 1]]
    assert kept_per_block_row(weights, 2, 2, IndexKind.POSITION).tolist() == [[3, 0], [1, 1]]


WORK = ConvWorkload(1, 64, 16, 32, 32, (3, 3), padding=ONE)


@pytest.mark.parametrize("index", [IndexKind.CHANNEL, IndexKind.POSITION])
def test_a_block_row_that_keeps_too_much(index: IndexKind) -> None:
    kernel = choose_kernel(WORK, machine_of(TARGETS["one thread"]), block=8, index=index, kept=5)
    weights = np.ones((16, 64, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"a block row keeps (64|576) inputs, the kernel was made for 5"):
        pack_conv(kernel, weights)


def test_an_offset_that_its_type_cannot_hold() -> None:
    kernel = choose_kernel(WORK, machine_of(TARGETS["one thread"]), block=8, index=IndexKind.POSITION)
    assert kernel.index_dtype == "int32"
    with pytest.raises(ValueError, match="does not fit uint16"):
        pack_conv(replace(kernel, index_dtype="uint16"), np.ones((16, 64, 3, 3), np.float32))


def test_kernel_numbers() -> None:
    kernel = choose_kernel(WORK, machine_of(TARGETS["one thread"]), block=16, index=IndexKind.CHANNEL, kept=32)
    assert kernel.macs == WORK.macs // 2
    assert "channel" in str(kernel)
    assert choose_kernel(WORK, machine_of(TARGETS["one thread"])).macs == WORK.macs
