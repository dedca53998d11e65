"""The pixel layout reads what it should and stays within its planes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_conv import workloads

from tvm_nm.schedules.geometry import CopyScope, PixelGeometry, candidate_geometries
from tvm_nm.workload import ConvWorkload

LANES = st.sampled_from([4, 8, 16])


@settings(max_examples=200, deadline=None)
@given(workloads(), LANES, st.data())
def test_every_tap_of_every_pixel(work: ConvWorkload, lanes: int, data: st.DataObject) -> None:
    padded = [geometry for geometry in candidate_geometries(work, lanes) if not geometry.flat]
    assume(padded)
    geometry = data.draw(st.sampled_from(padded))
    top, left, _, _ = work.padding
    # What the kernel computes, thrown-away pixels included, lies within the phase's plane.
    last = int(geometry.virtual_pixel(geometry.chunks - 1, geometry.vectors - 1, lanes - 1))
    for ky in range(work.kernel[0]):
        for kx in range(work.kernel[1]):
            offset = geometry.tap_offset(ky, kx)
            phase = offset // geometry.plane
            assert 0 <= phase < geometry.phases
            assert offset + last < (phase + 1) * geometry.plane <= geometry.channel_size
            for y in range(work.out_height):
                for x in range(work.out_width):
                    row, column = divmod(offset - phase * geometry.plane + y * geometry.pitch + x, geometry.pitch)
                    input_y = row * work.stride[0] + phase // geometry.phase_columns - top
                    input_x = column * work.stride[1] + phase % geometry.phase_columns * geometry.column_step - left
                    assert input_y == y * work.stride[0] + ky * work.dilation[0] - top
                    assert input_x == x * work.stride[1] + kx * work.dilation[1] - left


@settings(max_examples=200, deadline=None)
@given(workloads(), LANES)
def test_candidates(work: ConvWorkload, lanes: int) -> None:
    found = candidate_geometries(work, lanes)
    assert found
    for geometry in found:
        assert geometry.workload == work
        assert 0 < geometry.useful_share <= 1
        assert (geometry.chunks - 1) * geometry.rows_per_chunk < work.out_pixels
        if geometry.flat:
            assert geometry.chunks * geometry.pitch >= work.out_pixels
            continue
        assert (geometry.chunks - 1) * geometry.rows_per_chunk < work.out_height
        assert geometry.chunks * geometry.rows_per_chunk >= work.out_height
        assert geometry.pitch >= work.out_width
        if geometry.aligned:
            assert geometry.useful_share == 1
            continue
        assert geometry.vectors * lanes >= (geometry.rows_per_chunk - 1) * geometry.pitch + work.out_width


@pytest.mark.parametrize(("width", "lanes", "rows"), [(16, 16, 1), (16, 8, 2), (32, 16, 2), (8, 8, 1)])
def test_aligned_vectors_hold_each_pixel_of_the_output_once(width: int, lanes: int, rows: int) -> None:
    work = ConvWorkload(1, 2, 2, 6, width, (3, 3), padding=(1, 1, 1, 1))
    found = [g for g in candidate_geometries(work, lanes) if g.aligned]
    assert {g.rows_per_chunk for g in found} == {1, 2, 3, 6}
    for geometry in found:
        places = itertools.product(range(geometry.chunks), range(geometry.vectors), range(lanes))
        pixels = {int(geometry.output_pixel(*place)): int(geometry.virtual_pixel(*place)) for place in places}
        assert pixels == {y * width + x: y * geometry.pitch + x for y in range(6) for x in range(width)}
        assert all(size % rows == 0 or rows % size == 0 for size in geometry.tile_vectors(12))


@pytest.mark.parametrize(("width", "rows"), [(24, 6), (48, 6), (32, 4)])
def test_other_rows_are_not_aligned(width: int, rows: int) -> None:
    work = ConvWorkload(1, 2, 2, 6, width, (3, 3), padding=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="cannot be aligned"):
        PixelGeometry(work, 16, width + 2, rows, aligned=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), LANES)
def test_the_vectors_of_a_flat_row_cover_its_pixels_and_no_others(
    height: int, width: int, stride: int, lanes: int
) -> None:
    work = ConvWorkload(1, 2, 2, height, width, (1, 1), (stride, stride))
    for geometry in (g for g in candidate_geometries(work, lanes) if g.flat):
        vectors = itertools.product(range(geometry.chunks), range(geometry.vectors))
        starts = {int(geometry.output_pixel(chunk, vector, 0)) for chunk, vector in vectors}
        assert {start + lane for start in starts for lane in range(lanes)} == set(range(work.out_pixels))


def test_pointwise_pixels_are_a_flat_row_if_they_fill_a_vector() -> None:
    for work in (
        ConvWorkload(1, 8, 8, 28, 28, (1, 1)),
        ConvWorkload(1, 8, 8, 7, 7, (1, 1)),
        ConvWorkload(1, 8, 8, 32, 32, (1, 1), (2, 2)),
    ):
        found = candidate_geometries(work, 16)
        assert all(g.flat for g in found)
        assert {g.copy for g in found} == {CopyScope.NONE, CopyScope.TILE, CopyScope.CHUNK}
        assert all(g.subsampled == (work.stride == (2, 2)) for g in found)
    for work in (ConvWorkload(1, 8, 8, 3, 3, (1, 1)), ConvWorkload(1, 8, 8, 28, 28, (1, 1), padding=(1, 1, 1, 1))):
        assert not any(g.flat for g in candidate_geometries(work, 16))


def test_scopes_that_do_not_fit_are_refused() -> None:
    work = ConvWorkload(1, 8, 8, 28, 28, (1, 1))
    with pytest.raises(ValueError, match="no padded pixels with"):
        PixelGeometry(work, 16, 28, 28, copy=CopyScope.TILE)
    with pytest.raises(ValueError, match="no flat pixels with"):
        PixelGeometry(work, 16, 32, 1, copy=CopyScope.TASK, flat=True)


def test_a_copy_for_each_kernel_column_starts_where_its_pixels_do() -> None:
    work = ConvWorkload(1, 8, 8, 14, 14, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2))
    copies = [g for g in candidate_geometries(work, 16) if g.column_copies]
    assert copies
    for geometry in copies:
        assert geometry.pitch in (14, 16)  # rows end where their pixels do, or with a whole vector
        assert geometry.phases == 3
        assert all(geometry.tap_offset(0, kx) == kx * geometry.plane for kx in range(3))


def test_strides_make_phases_of_what_the_kernel_reads() -> None:
    def phases(kernel: tuple[int, int], stride: tuple[int, int]) -> int:
        return PixelGeometry(ConvWorkload(1, 1, 1, 16, 16, kernel, stride), 16, 16, 4).phases

    assert phases((3, 3), (1, 1)) == 1
    assert phases((3, 3), (2, 2)) == 4
    assert phases((1, 3), (2, 2)) == 2
    assert phases((1, 1), (2, 2)) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4, 4, 8, 8, (3, 3)), "positive"),
        ((1, 4, 4, 8, 8, (3, 3), (0, 1)), "positive"),
        ((1, 4, 4, 8, 8, (3, 3), (1, 1), (0, -1, 0, 0)), "positive"),
        ((1, 4, 6, 8, 8, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 3), "3 groups do not divide 4 input and 6 output"),
        ((1, 4, 4, 2, 8, (3, 3)), "larger than the padded input"),
        ((1, 4, 4, 4, 8, (3, 3), (1, 1), (0, 0, 0, 0), (2, 1)), "larger than the padded input"),
    ],
)
def test_workloads_that_cannot_be(sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvWorkload(*sizes)


def test_macs_of_a_known_layer() -> None:
    work = ConvWorkload(1, 64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1))
    assert work.macs == math.prod([64, 64, 9, 56, 56])
    assert str(work) == "64->64 56x56 k3x3"
    assert str(ConvWorkload(2, 8, 8, 9, 9, (3, 3), (2, 2), (2, 2, 2, 2), (2, 2), 4)) == "n2 8->8 5x5 k3x3 s2x2 d2x2 g4"
