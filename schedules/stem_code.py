"""Generated code of the stem family.

Loop nest (AVX-512)::

    parallel n, band of stored rows
      padded = the band's input rows             # (row, channel, column), zeros around: in L2
      for V vectors of channels                  # their weights stay in L1
        for stored row
          for row of sums, tile of P pixels      # pooled: those rows of the window that the one before did not have
            acc[P][V] = bias
            for ky, ic, kx                       # through a table of offsets
              acc[p][v] += W[v] * X[p]           # V loads, P broadcasts, P*V FMAs
            sums = acc                           # one row; pooled: a ring of rows
          pooled: line = maxima of the window's rows
          for square of 16 pixels                # pooled: maxima of the window's columns of the line
            out = act(transposed + residual)     # 16 loads, 64 shuffles, 16 stores

The activation keeps the order of numbers: what comes after it are the maxima of what it is applied to.

Written as TensorIR directly: bands and borders make for loop bounds that a schedule's region analysis turns into
conditions of inner loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from tvm_nm.schedules.fetch_code import FETCHES, Fetch, fetch
from tvm_nm.schedules.stem_conv import StemKernel
from tvm_nm.schedules.stem_output import StemOutput, runs
from tvm_nm.workload import MaxPool

__all__ = ["stem_prim_func"]


@lru_cache(maxsize=128)
def stem_prim_func(kernel: StemKernel) -> tvm.tirx.PrimFunc:
    """Return the function of a variant, which needs no schedule.

    Its arguments, in order: data (N, C, H, W); packed weights and the table of offsets (`StemKernel.weight_shape`,
    `StemKernel.index_shape`); bias (OC,); the residual (N, OC, OH, OW) if the epilogue adds one; the output
    (`ConvWorkload.stored_shape`). All float32 but the table.
    """
    shapes = conv_argument_shapes(kernel.workload, kernel.weight_shape, kernel.index_shape, kernel.index_dtype)
    return flat_function(shapes, lambda buffers: _Code(kernel, buffers).emit())


class _Code:
    """Emits one kernel. Buffers are flat; positions in them are elements."""

    def __init__(self, kernel: StemKernel, buffers: dict[str, Any]) -> None:
        self._kernel = kernel
        self._work = kernel.workload
        self._lanes = kernel.lanes
        self._buffers = buffers
        self._pool = kernel.workload.epilogue.pool
        self._output = StemOutput(kernel.workload, kernel.lanes, buffers)

    def emit(self) -> None:
        kernel, work = self._kernel, self._work
        with T.parallel(0, kernel.tasks, annotations={FETCHES: 1}) as task:
            image, band = divided(task, kernel.bands, work.batch)
            first = bound(band * kernel.rows)
            count = kernel.rows
            if self._output.height % count:
                count = least(count, self._output.height - first)
            top = first
            if self._pool is not None:
                top = most_of(0, first * self._pool.stride[0] - self._pool.padding[0])
            source = T.alloc_buffer((kernel.in_rows * kernel.in_row,), "float32")
            sums = T.alloc_buffer((kernel.vectors * self._plane,), "float32")
            self._copy_input(image, bound(top * work.stride[0] - work.padding[0]), source)
            with T.serial(0, kernel.channel_vectors // kernel.vectors) as group:
                self._channels(image, group * kernel.vectors, first, count, top, source, sums)

    @property
    def _plane(self) -> int:
        """Elements of the sums of a vector of channels that are kept."""
        return self._kernel.ring_rows * self._work.out_width * self._lanes

    def _copy_input(self, image: Any, top: Any, source: Any) -> None:
        """Copy a band's rows, the first of which is `top`, with zeros for what lies beyond the map."""
        work, lanes, pitch = self._work, self._lanes, self._work.reach[1]
        left = work.padding[1]
        width = min(work.width, pitch - left)
        begin = bound(image * (work.in_channels * work.height * work.width))
        with T.serial(0, self._kernel.in_rows) as row:
            y = T.Bind(top + row)
            to = bound(row * self._kernel.in_row)
            with T.If(tirx.all(y >= 0, y < work.height)):
                with T.Then(), T.serial(0, work.in_channels) as c:
                    origin, at = bound(begin + (c * work.height + y) * work.width), bound(to + c * pitch)
                    for x in (*range(left), *range(left + width, pitch)):
                        T.buffer_store(source, tirx.const(0.0, "float32"), [at + x])

                    def copy(x: Any, origin: Any = origin, at: Any = at) -> None:
                        store_vector(source, at + left + x, load(self._buffers["data"], origin + x, lanes), lanes)

                    runs(width, lanes, copy)
                with T.Else():
                    runs(self._kernel.in_row, lanes, lambda x: store_vector(source, to + x, splat(0.0, lanes), lanes))

    def _channels(self, image: Any, start: Any, first: Any, count: Any, top: Any, source: Any, sums: Any) -> None:
        """Compute some vectors of channels, from vector `start`, of `count` stored rows; sums begin with row `top`."""
        work, lanes = self._work, self._lanes
        channels = [bound((start + v) * lanes) for v in range(self._kernel.vectors)]
        if work.out_channels % lanes:
            channels = [least(work.out_channels - lanes, channel) for channel in channels]
        bias = [T.Bind(load(self._buffers["bias"], channel, lanes)) for channel in channels]
        line, pool = None, self._pool
        if pool is not None:
            line = T.alloc_buffer((self._output.line_size,), "float32")
        with T.serial(0, count) as number:
            y = bound(first + number)
            # Where the row of each vector's first channel begins in the output.
            rows = [
                bound((image * work.out_channels + channel) * self._output.pixels + y * self._output.width)
                for channel in channels
            ]
            if pool is None:
                self._sums(start, bias, number, source, sums, 0, rows)
            else:
                with self._new_rows(pool, y, number) as row:
                    self._sums(start, bias, row - top, source, sums, self._ring_row(row), rows)
            for v, row in enumerate(rows):
                if pool is None:
                    self._output.store(sums, v * self._plane, row)
                else:
                    self._output.tallest_rows(pool, y, sums, v * self._plane, self._ring_row, line)
                    self._output.store(line, 0, row)

    @contextmanager
    def _new_rows(self, pool: MaxPool, y: Any, number: Any) -> Iterator[Any]:
        """Loop over the rows of sums that a stored row's window has, and that of the one before did not."""
        begin = T.Bind(y * pool.stride[0] - pool.padding[0])
        end = least(self._work.out_height, begin + pool.kernel[0])
        present = begin - pool.stride[0] + pool.kernel[0]
        begin = most_of(0, tirx.max(begin, tirx.if_then_else(number == 0, 0, present)))
        with T.serial(0, most_of(0, end - begin)) as i:
            yield T.Bind(begin + i)

    def _ring_row(self, row: Any) -> Any:
        """Return where a row of sums is kept."""
        place = tirx.bitwise_and(row, tirx.const(self._kernel.ring_rows - 1, "int32"))
        return T.Bind(place * (self._work.out_width * self._lanes))

    def _sums(self, start: Any, bias: list[Any], row: Any, source: Any, sums: Any, to: Any, rows: list[Any]) -> None:
        """Compute a row of sums, `row` counted from the first of the band, of some vectors of channels."""
        kernel, work, lanes = self._kernel, self._work, self._lanes
        vectors, columns = kernel.vectors, kernel.columns
        weights = bound(start * (kernel.steps * lanes))
        with T.serial(0, -(-work.out_width // columns)) as tile:
            column = tile * columns
            if work.out_width % columns:
                column = least(work.out_width - columns, column)
            acc = registers(columns * vectors, lanes)
            for number, register in enumerate(acc):
                store_vector(register, 0, bias[number % vectors], lanes)
            window = T.Bind(row * (work.stride[0] * kernel.in_row) + column * work.stride[1])
            with T.serial(0, kernel.steps) as step:
                if kernel.fetches_output:
                    self._fetch_output(step, column, rows)
                at = T.Bind(window + self._buffers["index"][step].astype("int32"))
                taps = [
                    T.Bind(load(self._buffers["weight"], weights + (step * vectors + v) * lanes, lanes))
                    for v in range(vectors)
                ]
                for p in range(columns):
                    value = T.Bind(tirx.Broadcast(source[at + p * work.stride[1]], lanes))
                    for v in range(vectors):
                        add_to(acc[p * vectors + v], taps[v] * value, lanes)
            for number, register in enumerate(acc):
                p, v = divmod(number, vectors)
                store_vector(sums, v * self._plane + to + (column + p) * lanes, load(register, 0, lanes), lanes)

    def _fetch_output(self, step: Any, column: Any, rows: list[Any]) -> None:
        """Fetch a share of the lines that a tile's sums will go to: one for each channel, all within the reduction."""
        lanes, steps = self._lanes, self._kernel.steps
        lines = lanes * len(rows)
        for part in range(-(-lines // steps)):
            line = T.Bind(tirx.min(lines - 1, step + part * steps))
            at = rows[0] + line * self._output.pixels + column  # of the last vector perhaps too far: it may overlap
            T.add_to_parent(fetch(Fetch.WRITE, self._buffers["out"], [at]))
