"""The zero-padded, phase-split copy of an input that kernels with vectors of pixels read (see `geometry`)."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from tvm_nm.schedules.geometry import PixelGeometry
from tvm_nm.schedules.row_copy import ROW_COPY, Columns

__all__ = ["flattened_input", "padded_input"]


def padded_input(geometry: PixelGeometry, data: te.Tensor, fill: float = 0.0) -> te.Tensor:
    """Return the padded, phase-split copy: (batch, channel, phase, row, column), every phase `pitch` wide."""
    work = geometry.workload
    top, left, _, _ = work.padding

    def element(n: Any, c: Any, phase: Any, row: Any, column: Any) -> Any:
        y = row * work.stride[0] + phase // geometry.phase_columns - top
        x = column * work.stride[1] + phase % geometry.phase_columns * geometry.column_step - left
        inside = tirx.all(y >= 0, y < work.height, x >= 0, x < work.width)
        return tirx.if_then_else(inside, data[n, c, y, x], tirx.const(fill, "float32"))

    shape = (work.batch, work.in_channels, geometry.phases, geometry.plane_rows, geometry.pitch)
    attrs = {"tvm_nm_phase_columns": geometry.phase_columns, ROW_COPY: _columns(geometry)}
    return te.compute(shape, element, name="pad", attrs=attrs)


def flattened_input(geometry: PixelGeometry, data: te.Tensor) -> te.Tensor:
    """Return the padded copy as (batch, element): data-dependent offsets need one flat axis."""
    work = geometry.workload
    top, left, _, _ = work.padding

    def element(n: Any, flat: Any) -> Any:
        column = tirx.indexmod(flat, geometry.pitch)
        row = tirx.indexmod(tirx.indexdiv(flat, geometry.pitch), geometry.plane_rows)
        phase = tirx.indexmod(tirx.indexdiv(flat, geometry.plane), geometry.phases)
        y = row * work.stride[0] + tirx.indexdiv(phase, geometry.phase_columns) - top
        x = column * work.stride[1] + tirx.indexmod(phase, geometry.phase_columns) * geometry.column_step - left
        inside = tirx.all(y >= 0, y < work.height, x >= 0, x < work.width)
        channel = tirx.indexdiv(flat, geometry.channel_size)
        return tirx.if_then_else(inside, data[n, channel, y, x], tirx.const(0.0, "float32"))

    attrs = {
        "tvm_nm_phase_columns": geometry.phase_columns,
        ROW_COPY: _columns(geometry),
        "tvm_nm_plane": [work.in_channels, geometry.phases, geometry.plane_rows, geometry.pitch],
    }
    return te.compute((work.batch, work.in_channels * geometry.channel_size), element, name="pad", attrs=attrs)


def _columns(geometry: PixelGeometry) -> list[int]:
    """Return the annotation that says what the rows of a padded copy hold."""
    work = geometry.workload
    columns = Columns(geometry.lanes, work.width, work.padding[1], work.stride[1], geometry.column_step)
    return columns.attribute(geometry.elements_at_once)
