"""Generated code of the depthwise family.

Loop nest (AVX-512)::

    parallel n, vector of channels, bands-of-task
      for band
        for square of 16 pixels of its new input rows
          ring = transposed                    # 16 loads, 64 shuffles, 16 stores
        for row of the band, register tile     # P pixels of a row
          acc[P] = bias
          for ky that meets the map
            W[kw]                              # in registers
            for input pixel of the tile        # those in the padding have no code
              acc[p] += W[kx] * ring           # loaded once for all taps that read it
          sums = acc
        for square of 16 pixels of the band
          out = act(transposed + residual)     # 16 loads, 64 shuffles, 16 stores

Written as TensorIR directly: the borders of a map make for loop bounds that a schedule's region analysis turns into
conditions of inner loops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

from tvm_nm.schedules.chain_loops import (
    add_to,
    bound,
    divided,
    flat_function,
    least,
    load,
    most_of,
    registers,
    store_turned,
    store_vector,
)
from tvm_nm.schedules.conv_arguments import conv_argument_shapes
from tvm_nm.schedules.depthwise_conv import DepthwiseKernel
from tvm_nm.schedules.transpose import turned_square

__all__ = ["depthwise_prim_func"]


@lru_cache(maxsize=256)
def depthwise_prim_func(kernel: DepthwiseKernel) -> tvm.tirx.PrimFunc:
    """Return the function of a variant, which needs no schedule.

    Its arguments, in order: data (N, C, H, W); packed weights (`DepthwiseKernel.weight_shape`); bias (C,); the residual
    (N, C, OH, OW) if the epilogue adds one; the output (N, C, OH, OW). All float32.
    """
    shapes = conv_argument_shapes(kernel.workload, kernel.weight_shape)
    return flat_function(shapes, lambda buffers: _Code(kernel, buffers).emit())


class _Code:
    """Emits one kernel. Buffers are flat; positions in them are elements."""

    def __init__(self, kernel: DepthwiseKernel, buffers: dict[str, Any]) -> None:
        self._kernel = kernel
        self._work = kernel.workload
        self._lanes = kernel.lanes
        self._buffers = buffers

    def emit(self) -> None:
        kernel, work, lanes = self._kernel, self._work, self._lanes
        with T.parallel(0, kernel.tasks) as task:
            image, rest = divided(task, kernel.blocks * kernel.parts, work.batch)
            block, part = divided(rest, kernel.parts, kernel.blocks)
            channel = block * lanes
            if work.in_channels % lanes:
                channel = least(work.in_channels - lanes, channel)
            channel = bound(image * work.in_channels + channel)
            ring = T.alloc_buffer((kernel.ring_rows * work.width * lanes,), "float32")
            sums = T.alloc_buffer((kernel.rows * work.out_width * lanes,), "float32")
            if kernel.is_whole:
                self._turn(channel, work.height * work.width, 0, ring, 0)
                self._band(block, channel, 0, ring, sums)
                return
            first = part * kernel.bands_per_task
            count = kernel.bands_per_task
            if kernel.bands % count:
                count = least(count, kernel.bands - first)
            with T.serial(0, count) as number:
                top = unclipped = bound((first + number) * kernel.rows)
                if work.out_height % kernel.rows:
                    top = least(work.out_height - kernel.rows, top)
                self._new_rows(channel, number, top, unclipped - kernel.rows, ring)
                self._band(block, channel, top, ring, sums)

    def _new_rows(self, channel: Any, number: Any, top: Any, previous: Any, ring: Any) -> None:
        """Transpose the input rows that a band needs and the one before it, which began with `previous`, did not."""
        kernel, work = self._kernel, self._work
        begin = bound(top * work.stride[0] - work.padding[0])
        end = least(work.height, most_of(0, begin + kernel.in_rows))
        present = previous * work.stride[0] - work.padding[0] + kernel.in_rows
        begin = most_of(0, tirx.max(begin, tirx.if_then_else(number == 0, 0, present)))
        with T.serial(0, most_of(0, end - begin)) as i:
            row = T.Bind(begin + i)
            self._turn(channel, work.width, row * work.width, ring, self._ring_row(row))

    def _ring_row(self, row: Any) -> Any:
        """Return where an input row lies as vectors of channels."""
        kernel = self._kernel
        if kernel.ring_rows < self._work.height:
            row = tirx.bitwise_and(row, tirx.const(kernel.ring_rows - 1, "int32"))
        return row * (self._work.width * self._lanes)

    def _turn(self, channel: Any, pixels: int, start: Any, ring: Any, to: Any) -> None:
        """Transpose consecutive pixels of the channels to vectors of channels."""
        lanes, plane = self._lanes, self._work.height * self._work.width
        begin, to = bound(channel * plane + start), bound(to)

        def square(pixel: Any) -> None:
            at = bound(begin + pixel)
            rows = [T.Bind(load(self._buffers["data"], at + i * plane, lanes)) for i in range(lanes)]
            for i, vector in enumerate(turned_square(rows)):
                store_vector(ring, to + (pixel + i) * lanes, vector, lanes)

        _squares(pixels, lanes, square)

    def _band(self, block: Any, channel: Any, top: Any, ring: Any, sums: Any) -> None:
        """Compute a band of output rows, the first of which is `top`."""
        kernel, work, lanes = self._kernel, self._work, self._lanes
        weights = bound(block * (work.taps * lanes))
        bias = T.Bind(load(self._buffers["bias"], _within_image(channel, work), lanes))
        with T.serial(0, kernel.rows) as row:
            self._row(weights, bias, top + row, ring, sums, row * (work.out_width * lanes))
        begin = bound(channel * work.out_pixels + top * work.out_width)

        def square(pixel: Any) -> None:
            at = bound(begin + pixel)
            columns = [T.Bind(load(sums, (pixel + i) * lanes, lanes)) for i in range(lanes)]
            store_turned(columns, self._buffers, at, work.out_pixels, work.epilogue, lanes)

        _squares(kernel.rows * work.out_width, lanes, square)

    def _row(self, weights: Any, bias: Any, y: Any, ring: Any, sums: Any, to: Any) -> None:
        """Compute an output row: register tiles at the borders have code of their own, those between share it."""
        work, step = self._work, self._work.dilation[0]
        above = bound(y * work.stride[0] - work.padding[0])
        first = T.Bind(tirx.indexdiv(most_of(0, -above) + (step - 1), step))
        after = T.Bind(tirx.min(work.kernel[0], tirx.indexdiv(most_of(0, work.height - above) + (step - 1), step)))
        place = (weights, bias, above, first, T.Bind(tirx.max(0, after - first)), ring, sums, bound(to))
        tiles = [
            (x, min(self._kernel.columns, work.out_width - x)) for x in range(0, work.out_width, self._kernel.columns)
        ]
        inner = [tile for tile in tiles if self._is_inner(*tile)]
        for tile in tiles:
            if tile not in inner or len(inner) == 1:
                self._tile(*tile, *place)
            elif tile == inner[0]:
                with T.serial(0, len(inner)) as number:
                    self._tile(tile[0] + number * tile[1], tile[1], *place, inner=True)

    def _is_inner(self, x: int, count: int) -> bool:
        """Whether a full register tile reads no padding."""
        work = self._work
        left = x * work.stride[1] - work.padding[1]
        right = left + (count - 1) * work.stride[1] + (work.kernel[1] - 1) * work.dilation[1]
        return count == self._kernel.columns and left >= 0 and right < work.width

    def _tile(
        self,
        x: Any,
        count: int,
        weights: Any,
        bias: Any,
        above: Any,
        first: Any,
        steps: Any,
        ring: Any,
        sums: Any,
        to: Any,
        *,
        inner: bool = False,
    ) -> None:
        """Compute some pixels of a row, over `steps` rows of the window from the `first`."""
        work, lanes, width = self._work, self._lanes, self._work.kernel[1]
        acc = registers(count, lanes)
        for register in acc:
            store_vector(register, 0, bias, lanes)
        left = x * work.stride[1] - work.padding[1]
        readers: dict[int, list[tuple[int, int]]] = {}
        for p in range(count):
            for kx in range(width):
                readers.setdefault(p * work.stride[1] + kx * work.dilation[1], []).append((p, kx))
        with T.serial(0, steps) as step:
            ky = T.Bind(first + step)
            taps = [
                T.Bind(load(self._buffers["weight"], weights + (ky * width + kx) * lanes, lanes)) for kx in range(width)
            ]
            row = T.Bind(self._ring_row(above + ky * work.dilation[0]))
            for offset in sorted(readers):
                if inner or 0 <= left + offset < work.width:
                    value = T.Bind(load(ring, row + (left + offset) * lanes, lanes))
                    for p, kx in readers[offset]:
                        add_to(acc[p], taps[kx] * value, lanes)
        for p in range(count):
            store_vector(sums, to + (x + p) * lanes, load(acc[p], 0, lanes), lanes)


def _within_image(channel: Any, work: Any) -> Any:
    """Return a channel's number within its image."""
    return channel if work.batch == 1 else tirx.indexmod(channel, work.in_channels)


def _squares(pixels: int, lanes: int, body: Callable[[Any], None]) -> None:
    """Loop over the first pixels of squares; the last one begins early enough to end with them."""
    full = pixels // lanes
    if full > 1:
        with T.serial(0, full) as number:
            body(number * lanes)
    elif full:
        body(0)
    if pixels % lanes:
        body(pixels - lanes)
