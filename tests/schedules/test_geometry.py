"""The pixel layout reads what it should and stays within its planes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv import workloads

from tvm_nm.schedules.geometry import PixelGeometry, candidate_geometries
from tvm_nm.workload import ConvWorkload

LANES = st.sampled_from([4, 8, 16])


@settings(max_examples=200, deadline=None)
@given(workloads(), LANES, st.data())
def test_every_tap_of_every_pixel(work: ConvWorkload, lanes: int, data: st.DataObject) -> None:
    geometry = data.draw(st.sampled_from(candidate_geometries(work, lanes)))
    work = geometry.workload
    top, left, _, _ = work.padding
    # What the kernel computes, thrown-away pixels included, lies within the phase's plane.
    last = (geometry.chunks - 1) * geometry.rows_per_chunk * geometry.pitch + geometry.vectors * lanes - 1
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
        assert 0 < geometry.useful_share <= 1
        assert (geometry.chunks - 1) * geometry.rows_per_chunk < geometry.workload.out_height
        assert geometry.chunks * geometry.rows_per_chunk >= geometry.workload.out_height
        assert geometry.pitch >= geometry.workload.out_width
        assert geometry.vectors * lanes >= (geometry.rows_per_chunk - 1) * geometry.pitch + geometry.workload.out_width
        # A reshaped workload is the same work.
        assert geometry.workload.macs == work.macs
        assert geometry.workload.height * geometry.workload.width == work.height * work.width


def test_pointwise_pixels_in_whole_vectors_are_read_from_the_input() -> None:
    work = ConvWorkload(1, 8, 8, 28, 28, (1, 1))
    direct = [g for g in candidate_geometries(work, 16) if g.reads_input_directly]
    assert direct
    assert all(g.useful_share == 1 and g.channel_size == 28 * 28 for g in direct)
    assert not any(g.reads_input_directly for g in candidate_geometries(ConvWorkload(1, 8, 8, 7, 7, (1, 1)), 16))
    strided = ConvWorkload(1, 8, 8, 32, 32, (1, 1), (2, 2))
    assert not any(g.reads_input_directly for g in candidate_geometries(strided, 16))


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
