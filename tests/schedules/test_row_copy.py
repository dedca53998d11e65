"""Copies of rows by vectors: which columns of the input they read and where they put them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import run_conv

from tvm_nm.schedules.apply import schedule_function
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.geometry import CopyScope, candidate_geometries
from tvm_nm.schedules.machine import host_target, machine_of
from tvm_nm.schedules.panel_gather import Panels
from tvm_nm.schedules.row_copy import Columns, pieces
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.schedules.variants import kernel_prim_func
from tvm_nm.workload import ConvWorkload

TARGET = host_target(1)
MACHINE = machine_of(TARGET)


@given(st.integers(0, 40), st.integers(0, 90), st.sampled_from([4, 8, 16]))
def test_pieces_cover_a_row_and_nothing_else(first: int, count: int, lanes: int) -> None:
    found = list(pieces(first, first + count, lanes))
    assert {at + i for at, size in found for i in range(size)} == set(range(first, first + count))
    assert all(size <= lanes and size & (size - 1) == 0 for _, size in found)
    assert len(found) <= -(-count // lanes) or (count < lanes and len(found) <= 2)


@given(
    st.integers(1, 70),
    st.integers(0, 7),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]),
    st.integers(0, 3),
    st.integers(0, 80),
)
def test_columns_inside_are_those_of_the_input(
    width: int, left: int, steps: tuple[int, int], phase: int, count: int
) -> None:
    stride, step = steps
    columns = Columns(16, width, left, stride, step)
    places = [column * stride + phase * step - left for column in range(count)]
    first, end = columns.inside(phase, count)
    assert [0 <= x < width for x in places] == [first <= column < end for column in range(count)]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.sampled_from([4, 16]))
def test_a_chunk_has_pixels_of_so_many_rows(height: int, width: int, vectors: int, lanes: int) -> None:
    panels = Panels(lanes, height, width, 2, 2, vectors * lanes, lanes)
    if panels.pixels < lanes:
        return
    most = 0
    for chunk in range(-(-panels.pixels // panels.chunk)):
        starts = [min(chunk * panels.chunk + v * lanes, panels.last_vector) for v in range(vectors)]
        top = min(chunk * panels.chunk, panels.last_vector) // width
        assert min(starts) // width == top
        most = max(most, max((start + lanes - 1) // width - top + 1 for start in starts))
    assert panels.rows == most


@pytest.mark.parametrize("scope", [CopyScope.LAYER, CopyScope.TASK])
@pytest.mark.parametrize("stride", [1, 2])
def test_padded_rows_are_copied_by_vectors(scope: CopyScope, stride: int) -> None:
    work = ConvWorkload(1, 8, 16, 28, 28, (3, 3), (stride, stride), (1, 1, 1, 1))
    geometry = next(g for g in candidate_geometries(work, MACHINE.lanes) if g.copy is scope and not g.column_copies)
    kernel = replace(choose_kernel(work, MACHINE), geometry=geometry, vectors_per_tile=1, rows_per_task=1)
    text = schedule_function(kernel_prim_func(kernel), TARGET).script()
    assert ("T.Shuffle" in text) == (stride == 2)
    assert "T.if_then_else" not in text  # the condition of each element


def test_three_columns_are_too_many_to_skip() -> None:
    work = ConvWorkload(1, 8, 16, 30, 30, (3, 3), (3, 3), (1, 1, 1, 1))
    text = schedule_function(kernel_prim_func(choose_kernel(work, MACHINE)), TARGET).script()
    assert "T.Shuffle" not in text


@pytest.mark.parametrize("all_at_once", [True, False])
def test_panels_of_a_strided_layer_need_no_copy_before(all_at_once: bool) -> None:
    work = ConvWorkload(1, 24, 32, 27, 28, (1, 1), (2, 2))
    chosen = choose_kernel(work, MACHINE, block=16, index=IndexKind.CHANNEL, kept=12)
    panels = next(g for g in candidate_geometries(work, MACHINE.lanes) if g.copy is CopyScope.CHUNK and g.chunks > 1)
    kernel = replace(chosen, geometry=panels, vectors_per_tile=2, rows_per_task=2 if all_at_once else 1)
    assert kernel.gathers_panels == all_at_once
    text = schedule_function(kernel_prim_func(kernel), TARGET).script()
    assert ("joined" in text) == all_at_once
    assert ("subsample" in text) != all_at_once
    weights = np.zeros((32, 24, 1, 1), np.float32)
    weights[:16, ::2] = weights[16:, 1::2] = 1
    out, (data, *_, bias, _) = run_conv(kernel, work, weights, TARGET, np.random.default_rng(0))
    assert data is not None
    assert bias is not None
    kept = data[:, :, ::2, ::2]
    halves = [kept[:, offset::2].sum(axis=1, keepdims=True).repeat(16, axis=1) for offset in (0, 1)]
    np.testing.assert_array_equal(out, np.concatenate(halves, axis=1) + bias[:, None, None])
