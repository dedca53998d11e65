"""Max and average pooling: the depthwise convolution's pixel layout with another reduction.

Loop nest::

    parallel n, chunk, channel
      pad = padded, phase-split copy of this channel's rows      # cache-resident
      for vector of pixels
        acc[lanes] = max or sum over the taps, all unrolled
      out = crop (average: divided by the number of valid taps)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, te, tirx

from tvm_nm.schedules.conv import padded_input, tap_position
from tvm_nm.schedules.conv_arguments import kernel_func
from tvm_nm.schedules.conv_template import schedule_pad
from tvm_nm.schedules.geometry import PixelGeometry
from tvm_nm.schedules.machine import Machine
from tvm_nm.workload import ConvWorkload

__all__ = [
    "PoolKernel",
    "PoolKind",
    "choose_pool_kernel",
    "maxima_cycles",
    "maxima_kernel",
    "pool_prim_func",
    "schedule_pool",
    "windows_padding",
]

POOL_RULE = "tvm_nm_pool"
_LOWEST = -3.402823466e38
_MAX_UNROLLED_TAPS = 64
# Measured on 14x14 to 224x224 pixels, for vectors of inputs.
_MAXIMA_CYCLES_PER_VECTOR = 20.0


class PoolKind(str, Enum):
    """The reduction of a pooling window."""

    MAX = "max"
    AVERAGE = "average"
    """Divided by the number of taps inside the input."""
    AVERAGE_INCLUDE_PAD = "average_include_pad"
    """Divided by the number of taps inside the explicitly padded input."""


@dataclass(frozen=True, slots=True)
class PoolKernel:
    """A pooling operator and its pixel layout; the workload is that of a depthwise convolution of the same window."""

    geometry: PixelGeometry
    kind: PoolKind
    explicit_padding: tuple[int, int, int, int]
    """The operator's own padding; the workload's may be larger at the bottom and right (ceil mode)."""

    def __str__(self) -> str:
        return f"pixel-vector {self.kind.value} pool"


def choose_pool_kernel(
    workload: ConvWorkload, kind: PoolKind, explicit_padding: tuple[int, int, int, int], machine: Machine
) -> PoolKernel:
    """Return the layout with the least wasted pixels whose rows of one channel fit L1."""
    pitch = workload.out_width + (workload.kernel[1] - 1) * workload.dilation[1] // workload.stride[1]
    fitting = [
        PixelGeometry(workload, machine.lanes, pitch, -(-workload.out_height // chunks))
        for chunks in range(1, workload.out_height + 1)
    ]
    small = [g for g in fitting if g.vectors * g.lanes <= 2048] or fitting[-1:]
    best = min(small, key=lambda g: (g.chunks * (g.vectors + 4), g.chunks))
    return PoolKernel(best, kind, explicit_padding)


def windows_padding(
    shape: Sequence[int],
    out_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[Any],
) -> tuple[int, int, int, int]:
    """Return a pooling's padding (top, left, bottom, right) as far as its windows reach; shapes are (N, C, H, W).

    Ceil mode makes windows that begin inside the input but end beyond its padding.
    """
    top, left, bottom, right = (int(pad) for pad in padding)
    reach = [
        (out - 1) * step + (size - 1) * gap + 1
        for out, step, size, gap in zip(out_shape[2:], stride, kernel, dilation, strict=True)
    ]
    return top, left, max(bottom, reach[0] - shape[2] - top), max(right, reach[1] - shape[3] - left)


def maxima_kernel(work: ConvWorkload, machine: Machine) -> PoolKernel:
    """Return the kernel for the maxima of a convolution's output that its epilogue takes at the end."""
    channels, pool = work.out_channels, work.epilogue.pool
    assert pool is not None
    shape = (work.batch, channels, channels, work.out_height, work.out_width)
    windows = ConvWorkload(*shape, pool.kernel, pool.stride, pool.padding, groups=channels)
    return choose_pool_kernel(windows, PoolKind.MAX, pool.padding, machine)


def maxima_cycles(work: ConvWorkload, machine: Machine) -> float:
    """Return the cycles that `maxima_kernel` takes, as the models of convolutions count them."""
    vectors = work.batch * work.out_channels * work.out_pixels / machine.lanes
    return vectors * _MAXIMA_CYCLES_PER_VECTOR * machine.imbalance(work.batch * work.out_channels)


@lru_cache(maxsize=128)
def pool_prim_func(kernel: PoolKernel) -> tvm.tirx.PrimFunc:
    """Return the unscheduled PrimFunc: data (N, C, H, W), output (N, C, OH, OW)."""
    geometry, kind = kernel.geometry, kernel.kind
    work = geometry.workload
    lanes, pitch = geometry.lanes, geometry.pitch
    data = te.placeholder(work.input_shape, name="data")
    source = padded_input(geometry, data, _LOWEST if kind is PoolKind.MAX else 0.0)
    ky = te.reduce_axis((0, work.kernel[0]), name="ky")
    kx = te.reduce_axis((0, work.kernel[1]), name="kx")
    reduce = te.max if kind is PoolKind.MAX else te.sum

    def window(n: Any, chunk: Any, c: Any, v: Any, lane: Any) -> Any:
        phase, tap = tap_position(geometry, ky, kx)
        q = chunk * (geometry.rows_per_chunk * pitch) + tap + v * lanes + lane
        return reduce(source[n, c, phase, tirx.indexdiv(q, pitch), tirx.indexmod(q, pitch)], axis=[ky, kx])

    shape = (work.batch, geometry.chunks, work.in_channels, geometry.vectors, lanes)
    attrs = {
        "schedule_rule": POOL_RULE,
        "tvm_nm_rows_per_chunk": geometry.rows_per_chunk,
        "tvm_nm_unroll": int(work.taps <= _MAX_UNROLLED_TAPS),
    }
    reduced = te.compute(shape, window, name="window", attrs=attrs)

    def element(n: Any, c: Any, y: Any, x: Any) -> Any:
        pixel = tirx.indexmod(y, geometry.rows_per_chunk) * pitch + x
        lane = tirx.bitwise_and(pixel, tirx.const(lanes - 1, "int32"))
        value = reduced[n, tirx.indexdiv(y, geometry.rows_per_chunk), c, tirx.indexdiv(pixel, lanes), lane]
        if kind is PoolKind.MAX:
            return value
        return value / _valid_taps(kernel, y, x).astype("float32")

    out = te.compute(work.output_shape, element, name="out")
    return kernel_func([data, out])


def _valid_taps(kernel: PoolKernel, y: Any, x: Any) -> Any:
    work = kernel.geometry.workload
    top, left, bottom, right = kernel.explicit_padding
    include = kernel.kind is PoolKind.AVERAGE_INCLUDE_PAD

    def along(position: Any, axis: int, size: int, before: int, after: int) -> Any:
        start = position * work.stride[axis] - before
        step = work.dilation[axis]
        low, high = (-before, size + after) if include else (0, size)
        first = tirx.max(start, low)
        last = tirx.min(start + (work.kernel[axis] - 1) * step, high - 1)
        if step == 1:
            return last - first + 1
        first_tap = tirx.indexdiv(first - start + step - 1, step)
        return tirx.indexdiv(last - start, step) - first_tap + 1

    return along(y, 0, work.height, top, bottom) * along(x, 1, work.width, left, right)


@tvm_ffi.register_global_func(f"s_tir.meta_schedule.cpu.{POOL_RULE}", override=True)  # type: ignore[untyped-decorator]
def schedule_pool(sch: s_tir.Schedule, window: Any) -> list[s_tir.Schedule]:
    """Schedule the pooling whose reduction is block `window`."""
    annotations = sch.get(window).annotations
    out, pad = sch.get_consumers(window)[0], sch.get_producers(window)[0]
    n, c, y, x = sch.get_loops(out)
    chunk, row = sch.split(y, [None, int(annotations["tvm_nm_rows_per_chunk"])])
    sch.reorder(n, chunk, c, row, x)
    task = sch.fuse(n, chunk, c)
    sch.parallel(task)
    sch.compute_at(window, task, preserve_unit_loops=True)
    vector, lane, ky, kx = sch.get_loops(window)[-4:]
    sch.reorder(vector, ky, kx, lane)
    sch.vectorize(lane)
    if int(annotations["tvm_nm_unroll"]):
        sch.unroll(ky)
        sch.unroll(kx)
    schedule_pad(sch, pad, task)
    sch.decompose_reduction(window, ky)
    return [sch]
