"""The key of the tuning database and the text forms of variants."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tvm_nm.schedules.chain import Mixing
from tvm_nm.schedules.channel_conv import ChannelConvKernel
from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.fc import FcKernel
from tvm_nm.schedules.kernel_task import ChainLinks, KernelTask, parse_task
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.schedules.variants import (
    default_kernel,
    kernel_cycles,
    kernel_from_text,
    neighbours,
    ranked_kernels,
    variant_text,
    winograd_fits,
)
from tvm_nm.schedules.winograd import winograd_applies
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

AVX512, AVX2 = Machine(16, 32, 1), Machine(8, 16, 1)


def with_maxima(task: KernelTask) -> KernelTask:
    """The same by Winograd's algorithm, with maxima of 2x2 pixels."""
    return replace(task.as_winograd, workload=task.workload.pooled(MaxPool()))


@st.composite
def tasks(draw: st.DrawFn) -> KernelTask:
    small = st.integers(1, 3)
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    kernel = (draw(small), draw(small))
    epilogue = Epilogue(
        draw(st.booleans()), *draw(st.sampled_from(((None, None), (0.0, None), (0.0, 6.0), (None, 1.5))))
    )
    work = ConvWorkload(
        draw(small),
        groups * draw(st.integers(1, 24)),
        groups * draw(st.integers(1, 24)),
        draw(st.integers(6, 30)),
        draw(st.integers(6, 30)),
        kernel,
        (draw(small), draw(small)),
        tuple(draw(st.integers(0, 2)) for _ in range(4)),
        (1, draw(st.sampled_from((1, 1, 1, 2)))),
        groups,
        epilogue,
    )
    threads = draw(st.sampled_from((1, 2, 8)))
    index = draw(st.sampled_from(tuple(IndexKind)))
    if index is IndexKind.NONE:
        task = KernelTask("conv", work, threads, winograd=winograd_applies(work) and draw(st.booleans()))
        maxima = task.winograd and not epilogue.residual and min(work.out_height, work.out_width) > 1
        return with_maxima(task) if maxima and draw(st.booleans()) else task
    of_nm = dict(zip(("of_group", "group"), draw(st.sampled_from(((0, 0), (2, 4), (1, 4), (3, 16)))), strict=True))
    full = KernelTask("conv", work, threads, index, draw(st.sampled_from((1, 4, 16))), 1, **of_nm)
    task = full.with_kept(draw(st.integers(1, full.inputs)))
    return task.as_winograd if winograd_fits(task, AVX512) and draw(st.booleans()) else task


@given(tasks())
def test_the_text_of_a_task_reads_back(task: KernelTask) -> None:
    assert parse_task(str(task)) == task


def test_what_the_text_of_a_task_looks_like() -> None:
    work = ConvWorkload(1, 64, 256, 56, 56, (1, 1), epilogue=Epilogue(True, 0.0))
    task = KernelTask("conv", work, 1, IndexKind.CHANNEL, 16, 32)
    assert str(task) == "conv 64x56x56->256 k1x1 bias+add+relu; 1x16 channel 32; 1 thread"
    assert (task.density, task.macs) == (0.5, work.macs // 2)
    alone = replace(task, block=1, of_group=2, group=4)
    assert str(alone) == "conv 64x56x56->256 k1x1 bias+add+relu; 1x1 channel 32 2 of 4; 1 thread"
    square = KernelTask("conv", replace(work, kernel=(3, 3), out_channels=64), 1, IndexKind.CHANNEL, 16, 32)
    assert str(square.as_winograd) == "conv 64x56x56->64 k3x3 bias+add+relu; winograd 1x16 channel 32; 1 thread"
    assert str(square.as_winograd.dense.as_winograd) == "conv 64x56x56->64 k3x3 bias+add+relu; winograd; 1 thread"
    assert str(replace(task.dense, threads=2)) == "conv 64x56x56->256 k1x1 bias+add+relu; dense; 2 threads"
    plain = replace(square, workload=replace(square.workload, epilogue=Epilogue(False, 0.0)))
    pooled = "conv 64x56x56->64 k3x3 bias+relu+max2x2; winograd 1x16 channel 32; 1 thread"
    assert str(with_maxima(plain)) == pooled
    assert str(with_maxima(plain).dense) == "conv 64x56x56->64 k3x3 bias+relu; dense; 1 thread"


def test_a_stem_with_maxima() -> None:
    pool = MaxPool((3, 3), (2, 2), (1, 1, 1, 1))
    work = ConvWorkload(1, 3, 64, 224, 224, (7, 7), (2, 2), (3,) * 4, epilogue=Epilogue(False, 0.0))
    task = KernelTask("conv", work, 1).pooled(pool)
    text = "conv 3x224x224->64 k7x7 s2x2 p3,3,3,3 bias+relu+max3x3s2x2p1,1,1,1; dense; 1 thread"
    assert (str(task), parse_task(text)) == (text, task)
    assert task is not None
    assert task.workload.stored_shape == (1, 64, 56, 56)
    assert task.macs == work.macs
    assert task.dense == KernelTask("conv", work, 1)
    assert KernelTask("conv", work, 1, IndexKind.CHANNEL, 16, 2).pooled(pool) is None
    assert KernelTask("conv", replace(work, in_channels=32), 1).pooled(pool) is None
    square = KernelTask("conv", ConvWorkload(1, 3, 64, 64, 64, (3, 3)), 1)
    assert square.as_winograd.pooled(pool) is None
    assert square.as_winograd.pooled(MaxPool()) == with_maxima(square)
    with pytest.raises(ValueError, match="no kernel takes"):
        parse_task(text.replace("dense", "1x16 channel 2"))


def test_a_stem_by_winograd() -> None:
    pool = MaxPool((3, 3), (2, 2), (1, 1, 1, 1))
    work = ConvWorkload(1, 3, 64, 224, 224, (7, 7), (2, 2), (3,) * 4, epilogue=Epilogue(False, 0.0))
    task = KernelTask("conv", work, 1)
    assert winograd_fits(task, AVX512)
    pooled = task.as_winograd.pooled(pool)
    text = "conv 3x224x224->64 k7x7 s2x2 p3,3,3,3 bias+relu+max3x3s2x2p1,1,1,1; winograd; 1 thread"
    assert (str(pooled), parse_task(text)) == (text, pooled)
    assert pooled is not None
    assert pooled.dense == task
    assert KernelTask.of(default_kernel(pooled, AVX512), 1) == pooled  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not apply"):
        parse_task(text.replace("winograd", "winograd 1x16 channel 2"))
    for other in (replace(work, kernel=(3, 3)), replace(work, in_channels=5), replace(work, stride=(1, 1))):
        assert not KernelTask("conv", other, 1).takes_winograd
    assert not winograd_fits(KernelTask("conv", replace(work, out_channels=15), 1), AVX512)


def test_only_some_kernels_take_maxima() -> None:
    work = ConvWorkload(1, 64, 64, 14, 14, (3, 3), epilogue=Epilogue(False, 0.0, pool=MaxPool()))
    with pytest.raises(ValueError, match="no kernel takes these maxima"):
        KernelTask("conv", work, 1)
    with pytest.raises(ValueError, match="no kernel takes these maxima"):
        parse_task("conv 64x14x14->64 k3x3 bias+max2x2; dense; 1 thread")
    assert with_maxima(KernelTask("conv", work.unpooled, 1)) == KernelTask("conv", work, 1, winograd=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "conv 64x56x56->64 k3x3 bias; dense",
        "conv 64x56x56->64 k3x3 bias; ; 1 thread",
        "conv 64x56x56->64 k3x3 bias; winograd ; 1 thread",
        "conv 64x56x56->64 k3x3 bias; 1x16 channel 65; 1 thread",
        "conv 64x56x56->64 k3x3 bias+tanh; dense; 1 thread",
        "conv 64x56x56->64 k3x3 bias+max3; dense; 1 thread",
        "pool 64x56x56->64 k3x3 bias; dense; 1 thread",
    ],
)
def test_a_text_that_is_no_task(text: str) -> None:
    with pytest.raises(ValueError, match=r"no kernel task|keeps 1 to 64|no epilogue"):
        parse_task(text)


def test_a_dense_task_has_no_block() -> None:
    with pytest.raises(ValueError, match="neither block nor kept"):
        KernelTask("conv", ConvWorkload(1, 4, 4, 8, 8, (1, 1)), 1, block=4)


@settings(max_examples=60, deadline=None)
@given(tasks(), st.sampled_from((AVX512, AVX2)))
def test_every_variant_reads_back_from_its_text(task: KernelTask, machine: Machine) -> None:
    machine = replace(machine, threads=task.threads)
    ranked = ranked_kernels(task, machine, 12)
    assert ranked[0] == default_kernel(task, machine)
    assert len(set(ranked)) == len(ranked)
    for kernel in [*ranked, *neighbours(ranked[0], machine)]:
        assert kernel_from_text(variant_text(kernel), task, machine) == kernel


@pytest.mark.parametrize("machine", [AVX512, AVX2])
@pytest.mark.parametrize(("block", "kept"), [(0, 0), (16, 64)])
def test_winograd_variants_of_a_large_map_read_back(machine: Machine, block: int, kept: int) -> None:
    work = ConvWorkload(1, 128, 128, 28, 28, (3, 3), padding=(1, 1, 1, 1))
    index = IndexKind.CHANNEL if block else IndexKind.NONE
    task = KernelTask("conv", work, 1, index, block, kept).as_winograd
    for kernel in [*ranked_kernels(task, machine, 100), *neighbours(default_kernel(task, machine), machine)]:
        assert kernel_from_text(variant_text(kernel), task, machine) == kernel


@settings(max_examples=40, deadline=None)
@given(tasks(), st.data())
def test_a_variant_moves_to_another_density(task: KernelTask, data: st.DataObject) -> None:
    assume(task.kept)
    machine = replace(AVX512, threads=task.threads)
    other = task.with_kept(data.draw(st.integers(1, task.inputs)))
    for kernel in ranked_kernels(task, machine, 6):
        if not isinstance(kernel, ConvKernel):
            continue
        moved = kernel_from_text(variant_text(kernel), other, machine)
        assert isinstance(moved, ConvKernel)
        assert moved.kept == other.kept
        assert moved.geometry == kernel.geometry
        assert not moved.kept_per_block or moved.kept % moved.kept_per_block == 0


def test_ranking_begins_with_the_default_and_goes_by_predicted_time() -> None:
    work = ConvWorkload(1, 64, 64, 28, 28, (3, 3), padding=(1, 1, 1, 1))
    ranked = ranked_kernels(KernelTask("conv", work, 1), AVX512, 12)
    assert ranked[0] == default_kernel(KernelTask("conv", work, 1), AVX512)
    pixels = [kernel for kernel in ranked[1:] if isinstance(kernel, ConvKernel)]
    channels = [kernel for kernel in ranked[1:] if isinstance(kernel, ChannelConvKernel)]
    for family in (pixels, channels):
        cycles = [kernel_cycles(kernel, AVX512) for kernel in family]
        assert len(cycles) > 2
        assert cycles == sorted(cycles)
    assert len({kernel.geometry for kernel in pixels}) > 2


def test_neighbours_differ_from_their_kernel_in_few_ways() -> None:
    work = ConvWorkload(1, 64, 64, 28, 28, (3, 3), padding=(1, 1, 1, 1))
    kernel = choose_kernel(work, AVX512)
    found = neighbours(kernel, AVX512)
    assert kernel not in found
    assert {k.vectors_per_tile for k in found if k.geometry == kernel.geometry} > {kernel.vectors_per_tile}
    assert {k.geometry.rows_per_chunk for k in found} > {kernel.geometry.rows_per_chunk}
    assert {k.oc_tile for k in found} > {kernel.oc_tile}


def test_variants_of_a_fully_connected_layer() -> None:
    work = ConvWorkload(1, 512, 1000, 1, 1, (1, 1))
    dense = KernelTask("fc", work, 1)
    blocks = {k.block for k in ranked_kernels(dense, AVX512, 12) if isinstance(k, FcKernel)}
    assert blocks == {16, 32, 64, 128}
    sparse = KernelTask("fc", work, 1, IndexKind.CHANNEL, 16, 200)
    assert ranked_kernels(sparse, AVX512, 12) == [default_kernel(sparse, AVX512)]
    assert parse_task(str(sparse)) == sparse


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pixel 8x9 padded pitch 66 rows 8 task 1",
        "pixel 8x3 padded pitch 10 rows 8 task 1",
        "pixel 8x3 padded pitch 66 rows 8 task 7",
    ],
)
def test_a_text_that_fits_no_variant(text: str) -> None:
    task = KernelTask("conv", ConvWorkload(1, 64, 64, 64, 64, (3, 3), padding=(1, 1, 1, 1)), 1)
    with pytest.raises(ValueError, match=r"variant|fit"):
        kernel_from_text(text, task, AVX512)


def chain(first: str, last: str | None, links: tuple[Mixing, Mixing], blocked: bool) -> KernelTask:
    wide = ConvWorkload(1, 16, 96, 28, 28, (1, 1), epilogue=Epilogue.parse(first))
    filtered = ConvWorkload(1, 96, 96, 28, 28, (3, 3), (2, 2), (1, 1, 1, 1), groups=96)
    narrow = None if last is None else ConvWorkload(1, 96, 32, 14, 14, (1, 1), epilogue=Epilogue.parse(last))
    return KernelTask("chain", wide, 1, links=ChainLinks(filtered, narrow, *links, blocked))


CHAINS = [
    chain("bias+relu", None, (Mixing(0), Mixing(0)), False),
    chain("bias+clip(0.0,6.0)", "bias+add", (Mixing(0), Mixing(0)), True),
    chain("bias", "bias", (Mixing(0, 8, 16), Mixing(0, 48, 32)), True),
]


@pytest.mark.parametrize("task", CHAINS)
def test_chains_and_their_variants_read_back(task: KernelTask) -> None:
    assert parse_task(str(task)) == task
    ranked = ranked_kernels(task, AVX512, 12)
    assert ranked[0] == default_kernel(task, AVX512)
    assert len(set(ranked)) == len(ranked)
    near = neighbours(ranked[0], AVX512)
    assert near
    assert ranked[0] not in near
    for kernel in [*ranked, *near]:
        assert kernel_from_text(variant_text(kernel), task, AVX512) == kernel
        assert KernelTask.of(kernel, 1) == task  # type: ignore[arg-type]


def test_what_a_chain_keeps() -> None:
    dense, sparse = CHAINS[1:]
    wide, filtered, narrow = 16 * 96 * 28 * 28, 9 * 96 * 14 * 14, 96 * 32 * 14 * 14
    assert dense.macs == wide + filtered + narrow
    assert dense.density == 1
    assert sparse.macs == wide // 2 + filtered + narrow // 2
    assert parse_task(str(sparse.dense)).density == 1
    assert str(sparse).endswith("> 96x14x14->32 k1x1 bias; 1x16 channel 8, 1x32 channel 48; 1 thread")


def test_what_is_no_chain() -> None:
    with pytest.raises(ValueError, match="no task of a chain"):
        parse_task(str(CHAINS[0]).replace(" > ", " < "))
    with pytest.raises(ValueError, match="no chain"):
        parse_task(str(CHAINS[0]).replace("96x28x28->96", "96x27x28->96"))
    with pytest.raises(ValueError, match="chains have links"):
        KernelTask("chain", CHAINS[0].workload, 1)
    with pytest.raises(ValueError, match="does not fit"):
        kernel_from_text("chain 2/2 band 3", CHAINS[0], AVX512)
