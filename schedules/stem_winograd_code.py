"""Generated code of the Winograd kernels for first convolutions.

Loop nest (AVX-512, 7x7 with stride 2 from 3 channels, 112x112 sums)::

    parallel n, band of stored rows
      for row of tiles                                # 4 rows of sums
        for new row of the planes                     # 4; a ring of 8
          line = two rows of each channel             # zeros around
          planes[column] = pixels of all phases       # 12 of 16 lanes: scalar copies
        for column                                    # 115
          half[7] = B^T planes[7]                     # 7 loads, a transform of 7 vectors, 7 stores
        for row i of half, tile
          frequencies[i][7] = half[i][7] B            # the same
        for V vectors of channels, T tiles
          for frequency i, j
            acc[T][V] = sum of frequency * weight     # 12 planes; 6 or 3 where a coordinate is infinity
            products[i][j] = acc
          for vector, tile                            # 49 loads, 11 transforms of 7 vectors, 16 stores
            sums[4][4] = A^T products A + bias        # a ring of 8 rows of all channels
        for stored row that has all its rows, vector of channels
          out = act(turned + residual)                # pooled: of the maxima of its window

Register budget: T * V sums (14), V weights, a frequency from memory; 28 vectors between the two transforms of an output
tile, the rest of 32 for terms. The products of T * V tiles and vectors (44 KiB) stay in L1.
"""

from __future__ import annotations

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
    splat,
    store_vector,
)
from tvm_nm.schedules.conv_arguments import conv_argument_shapes
from tvm_nm.schedules.stem_output import StemOutput, runs
from tvm_nm.schedules.stem_winograd import STRIDE, TILE, Section, StemWinogradKernel
from tvm_nm.schedules.winograd_points import column_sums, row_sums, transform_matrices

__all__ = ["stem_winograd_prim_func"]


@lru_cache(maxsize=128)
def stem_winograd_prim_func(kernel: StemWinogradKernel) -> tvm.tirx.PrimFunc:
    """Return the function of a variant, which needs no schedule.

    Its arguments, in order, all float32: data (N, C, H, W); packed weights (`StemWinogradKernel.weight_shape`); bias
    (OC,); the residual (N, OC, OH, OW) if the epilogue adds one; the output (`ConvWorkload.stored_shape`).
    """
    shapes = conv_argument_shapes(kernel.workload, kernel.weight_shape)
    return flat_function(shapes, lambda buffers: _Code(kernel, buffers).emit())


class _Code:
    """Emits one kernel. Buffers are flat; positions in them are elements."""

    def __init__(self, kernel: StemWinogradKernel, buffers: dict[str, Any]) -> None:
        self._kernel = kernel
        self._work = kernel.workload
        self._lanes = kernel.lanes
        self._buffers = buffers
        self._pool = kernel.workload.epilogue.pool
        self._output = StemOutput(kernel.workload, kernel.lanes, buffers)
        self._line_columns = STRIDE * kernel.plane_columns
        self._plane_row = kernel.plane_columns * kernel.planes
        self._sum_row = kernel.tile_columns * TILE * kernel.lanes

    def emit(self) -> None:
        kernel, work = self._kernel, self._work
        down, across = kernel.size
        with T.parallel(0, kernel.tasks) as task:
            image, band = divided(task, kernel.bands, work.batch)
            first = bound(band * kernel.rows)
            count = kernel.rows
            if self._output.height % count:
                count = least(count, self._output.height - first)
            top = first
            if self._pool is not None:
                top = most_of(0, first * self._pool.stride[0] - self._pool.padding[0])
            line = T.alloc_buffer((STRIDE * work.in_channels * self._line_columns,), "float32")
            planes = T.alloc_buffer((kernel.kept_plane_rows * self._plane_row,), "float32")
            half = T.alloc_buffer((down * self._plane_row,), "float32")
            frequencies = T.alloc_buffer((down * across * kernel.tile_columns * kernel.planes,), "float32")
            block = kernel.tiles * kernel.vectors * self._lanes
            products = T.alloc_buffer((down * across * block,), "float32")
            sums = T.alloc_buffer((kernel.channel_vectors * kernel.ring_rows * self._sum_row,), "float32")
            maxima = None if self._pool is None else T.alloc_buffer((self._output.line_size,), "float32")
            # Lanes that no plane has stay as they are.
            self._clear(planes, 0, kernel.kept_plane_rows * self._plane_row)
            tile_rows = T.Bind(tirx.indexdiv(self._needed_rows(first, count, top) + (TILE - 1), TILE))
            with T.serial(0, tile_rows) as row:
                begin = T.Bind(tirx.if_then_else(row == 0, 0, row * TILE + down - TILE))
                with T.serial(0, row * TILE + down - begin) as new:
                    number = T.Bind(begin + new)
                    y = T.Bind((top + number) * STRIDE - work.padding[0])
                    self._copy_rows(image, y, line)
                    self._fill_planes(line, planes, self._kept_row(number))
                self._transform_input(row, planes, half, frequencies)
                parts = -(-kernel.tile_columns // kernel.tiles)
                with T.serial(0, kernel.groups) as group, T.serial(0, parts) as part:
                    tile = part * kernel.tiles
                    if kernel.tile_columns % kernel.tiles:
                        tile = least(kernel.tile_columns - kernel.tiles, tile)
                    self._multiply(group, tile, frequencies, products)
                    self._transform_output(group, row, tile, products, sums)
                done = T.Bind(tirx.if_then_else(row == 0, 0, self._finished(row, first, count, top)))
                ready = T.Bind(
                    tirx.if_then_else(row == tile_rows - 1, count, self._finished(row + 1, first, count, top))
                )
                with T.serial(0, ready - done) as new:
                    self._store(image, T.Bind(first + done + new), top, sums, maxima)

    def _needed_rows(self, first: Any, count: Any, top: Any) -> Any:
        """Return how many rows of sums `count` stored rows from `first` need, from row `top` on."""
        if self._pool is None:
            return count
        end = (first + count - 1) * self._pool.stride[0] - self._pool.padding[0] + self._pool.kernel[0]
        return tirx.min(self._work.out_height, end) - top

    def _finished(self, tile_rows: Any, first: Any, count: Any, top: Any) -> Any:
        """Return how many stored rows from `first` have all their rows of sums after some rows of tiles."""
        rows = tile_rows * TILE
        if self._pool is None:
            return tirx.min(count, rows)
        last = top + rows - self._pool.kernel[0] + self._pool.padding[0]  # the last window that is whole begins here
        return tirx.max(0, tirx.min(count, tirx.floordiv(last, self._pool.stride[0]) + 1 - first))

    def _clear(self, buffer: Any, start: Any, size: int) -> None:
        runs(size, self._lanes, lambda at: store_vector(buffer, start + at, splat(0.0, self._lanes), self._lanes))

    def _copy_rows(self, image: Any, top: Any, line: Any) -> None:
        """Copy the input's row `top` and the next one, with zeros for what lies beyond the map."""
        work, lanes, columns = self._work, self._lanes, self._line_columns
        left = work.padding[1]
        width = min(work.width, columns - left)
        for p in range(STRIDE):
            y = T.Bind(top + p)
            start = p * work.in_channels * columns
            with T.If(tirx.all(y >= 0, y < work.height)):
                with T.Then(), T.serial(0, work.in_channels) as c:
                    origin = T.Bind(((image * work.in_channels + c) * work.height + y) * work.width)
                    at = T.Bind(start + c * columns)
                    for x in (*range(left), *range(left + width, columns)):
                        T.buffer_store(line, tirx.const(0.0, "float32"), [at + x])

                    def copy(x: Any, origin: Any = origin, at: Any = at) -> None:
                        store_vector(line, at + left + x, load(self._buffers["data"], origin + x, lanes), lanes)

                    runs(width, lanes, copy)
                with T.Else():
                    self._clear(line, start, work.in_channels * columns)

    def _kept_row(self, number: Any) -> Any:
        """Return where row `number` of the planes is kept."""
        return T.Bind(tirx.bitwise_and(number, self._kernel.kept_plane_rows - 1) * self._plane_row)

    def _fill_planes(self, line: Any, planes: Any, to: Any) -> None:
        """Turn two rows of each channel to a row of pixels of all planes."""
        channels = self._work.in_channels
        with T.serial(0, self._kernel.plane_columns) as x:
            for p in range(STRIDE):
                for c in range(channels):
                    for q in range(STRIDE):
                        value = line[(p * channels + c) * self._line_columns + STRIDE * x + q]
                        place = to + x * self._kernel.planes + (STRIDE * p + q) * channels + c
                        T.buffer_store(planes, value, [place])

    def _transform_input(self, row: Any, planes: Any, half: Any, frequencies: Any) -> None:
        """Compute the frequencies of a row of tiles: (i, j, tile, plane)."""
        kernel, lanes, pixel = self._kernel, self._lanes, self._kernel.planes
        (down, across), (by_rows, by_columns) = kernel.size, [transform_matrices(TILE, r)[2] for r in kernel.taps]
        rows = [self._kept_row(row * TILE + i) for i in range(down)]
        with T.serial(0, self._plane_row // lanes) as vector:
            at = vector * lanes
            values = [T.Bind(load(planes, start + at, lanes)) for start in rows]
            for i, value in enumerate(row_sums(by_rows, values.__getitem__)):
                store_vector(half, i * self._plane_row + at, value, lanes)
        with T.serial(0, down) as i, T.serial(0, kernel.tile_columns) as tile:
            for part in range(0, pixel, lanes):
                start = T.Bind(i * self._plane_row + tile * (TILE * pixel) + part)
                values = [T.Bind(load(half, start + j * pixel, lanes)) for j in range(across)]
                for j, value in enumerate(row_sums(by_columns, values.__getitem__)):
                    to = ((i * across + j) * kernel.tile_columns + tile) * pixel + part
                    store_vector(frequencies, to, value, lanes)

    def _multiply(self, group: Any, tile: Any, frequencies: Any, products: Any) -> None:
        """Compute the products of a register tile at all frequencies: (i, j, tile, vector, lane)."""
        start = bound(group * (self._kernel.products * self._kernel.vectors * self._lanes))
        for section in self._kernel.sections:
            with T.serial(0, section.rows) as i, T.serial(0, section.columns) as j:
                number = (i * section.columns + j) * len(section.planes)
                at = T.Bind(start + number * (self._kernel.vectors * self._lanes))
                frequency = T.Bind((section.first_row + i) * self._kernel.size[1] + section.first_column + j)
                self._multiply_at(frequency, section, at, tile, frequencies, products)
            start = start + section.products * self._kernel.vectors * self._lanes

    def _multiply_at(
        self, frequency: Any, section: Section, weights: Any, tile: Any, frequencies: Any, products: Any
    ) -> None:
        kernel, lanes = self._kernel, self._lanes
        acc = registers(kernel.tiles * kernel.vectors, lanes)
        first = T.Bind((frequency * kernel.tile_columns + tile) * kernel.planes)
        for number, plane in enumerate(section.planes):
            taps = [
                T.Bind(load(self._buffers["weight"], weights + (number * kernel.vectors + v) * lanes, lanes))
                for v in range(kernel.vectors)
            ]
            for t in range(kernel.tiles):
                value = T.Bind(tirx.Broadcast(frequencies[first + t * kernel.planes + plane], lanes))
                for v, tap in enumerate(taps):
                    register = acc[t * kernel.vectors + v]
                    if number:
                        add_to(register, tap * value, lanes)
                    else:
                        store_vector(register, 0, tap * value, lanes)
        to = T.Bind(frequency * (kernel.tiles * kernel.vectors * lanes))
        for number, register in enumerate(acc):
            store_vector(products, to + number * lanes, load(register, 0, lanes), lanes)

    def _transform_output(self, group: Any, row: Any, tile: Any, products: Any, sums: Any) -> None:
        """Compute the sums of a register tile: (vector, kept row, column, lane)."""
        kernel, lanes = self._kernel, self._lanes
        (down, across), (by_rows, by_columns) = kernel.size, [transform_matrices(TILE, r)[0] for r in kernel.taps]
        block = kernel.tiles * kernel.vectors * lanes
        with T.serial(0, kernel.vectors) as v:
            vector = T.Bind(group * kernel.vectors + v)
            bias = T.Bind(load(self._buffers["bias"], self._channel(vector), lanes))
            to = T.Bind(vector * (kernel.ring_rows * self._sum_row) + tile * (TILE * lanes))
            rows = [T.Bind(to + self._ring_row(row * TILE + p)) for p in range(TILE)]
            with T.serial(0, kernel.tiles) as t:
                at = T.Bind((t * kernel.vectors + v) * lanes)
                columns = []
                for j in range(across):
                    values = [T.Bind(load(products, at + (i * across + j) * block, lanes)) for i in range(down)]
                    columns.append([T.Bind(value) for value in column_sums(by_rows, values.__getitem__)])
                for p, start in enumerate(rows):
                    values = [column[p] for column in columns]
                    for q, value in enumerate(column_sums(by_columns, values.__getitem__)):
                        store_vector(sums, start + t * (TILE * lanes) + q * lanes, value + bias, lanes)

    def _channel(self, vector: Any) -> Any:
        """Return the first channel of a vector."""
        channel, last = vector * self._lanes, self._work.out_channels - self._lanes
        return least(last, channel) if self._work.out_channels % self._lanes else channel

    def _ring_row(self, row: Any) -> Any:
        """Return where a row of sums is kept, counted from the band's first."""
        return T.Bind(tirx.bitwise_and(row, self._kernel.ring_rows - 1) * self._sum_row)

    def _store(self, image: Any, y: Any, top: Any, sums: Any, maxima: Any) -> None:
        """Store row `y` of all channels."""
        kernel, work, output = self._kernel, self._work, self._output
        with T.serial(0, kernel.channel_vectors) as vector:
            channel = image * work.out_channels + self._channel(vector)
            to = T.Bind(channel * output.pixels + y * output.width)
            start = T.Bind(vector * (kernel.ring_rows * self._sum_row))
            if self._pool is None:
                output.store(sums, start + self._ring_row(y - top), to)
            else:
                output.tallest_rows(self._pool, y, sums, start, lambda row: self._ring_row(row - top), maxima)
                output.store(maxima, 0, to)
