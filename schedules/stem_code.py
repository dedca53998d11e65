"""Generated code of the stem family.

Loop nest (AVX-512)::

    parallel n, band of output rows
      padded = the band's input rows             # (row, channel, column), zeros around: in L2
      for V vectors of channels                  # their weights stay in L1
        for row
          for tile of P pixels
            acc[P][V] = bias
            for ky, ic, kx                       # through a table of offsets
              acc[p][v] += W[v] * X[p]           # V loads, P broadcasts, P*V FMAs
            sums = acc
          for square of 16 pixels
            out = act(transposed + residual)     # 16 loads, 64 shuffles, 16 stores

Written as TensorIR directly: bands and borders make for loop bounds that a schedule's region analysis turns into
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
    activated,
    add_to,
    bound,
    divided,
    flat_function,
    least,
    load,
    splat,
    store_vector,
)
from tvm_nm.schedules.conv_arguments import conv_argument_shapes
from tvm_nm.schedules.fetch_code import FETCHES, Fetch, fetch
from tvm_nm.schedules.stem_conv import StemKernel
from tvm_nm.schedules.transpose import turned_square

__all__ = ["stem_prim_func"]


@lru_cache(maxsize=128)
def stem_prim_func(kernel: StemKernel) -> tvm.tirx.PrimFunc:
    """Return the function of a variant, which needs no schedule.

    Its arguments, in order: data (N, C, H, W); packed weights and the table of offsets (`StemKernel.weight_shape`,
    `StemKernel.index_shape`); bias (OC,); the residual (N, OC, OH, OW) if the epilogue adds one; the output (N, OC, OH,
    OW). All float32 but the table.
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

    def emit(self) -> None:
        kernel, work = self._kernel, self._work
        with T.parallel(0, kernel.tasks, annotations={FETCHES: 1}) as task:
            image, band = divided(task, kernel.bands, work.batch)
            first = bound(band * kernel.rows)
            count = kernel.rows
            if work.out_height % count:
                count = least(count, work.out_height - first)
            source = T.alloc_buffer((kernel.in_rows * kernel.in_row,), "float32")
            sums = T.alloc_buffer((kernel.vectors * work.out_width * kernel.lanes,), "float32")
            self._copy_input(image, bound(first * work.stride[0] - work.padding[0]), source)
            with T.serial(0, kernel.channel_vectors // kernel.vectors) as group:
                self._channels(image, group * kernel.vectors, first, count, source, sums)

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

                    _runs(width, lanes, copy)
                with T.Else():
                    _runs(self._kernel.in_row, lanes, lambda x: store_vector(source, to + x, splat(0.0, lanes), lanes))

    def _channels(self, image: Any, start: Any, first: Any, count: Any, source: Any, sums: Any) -> None:
        """Compute some vectors of channels, from vector `start`, of the rows of a band."""
        work, lanes = self._work, self._lanes
        channels = [bound((start + v) * lanes) for v in range(self._kernel.vectors)]
        if work.out_channels % lanes:
            channels = [least(work.out_channels - lanes, channel) for channel in channels]
        bias = [T.Bind(load(self._buffers["bias"], channel, lanes)) for channel in channels]
        with T.serial(0, count) as number:
            # Where the row of each vector's first channel begins in the output.
            rows = [
                bound((image * work.out_channels + channel) * work.out_pixels + (first + number) * work.out_width)
                for channel in channels
            ]
            self._sums(start, bias, number, source, sums, rows)
            for v, row in enumerate(rows):
                self._store(sums, v * (work.out_width * lanes), row)

    def _sums(self, start: Any, bias: list[Any], row: Any, source: Any, sums: Any, rows: list[Any]) -> None:
        """Compute a row of sums, `row` counted from the first of the band, of some vectors of channels."""
        kernel, work, lanes = self._kernel, self._work, self._lanes
        vectors, columns = kernel.vectors, kernel.columns
        weights = bound(start * (kernel.steps * lanes))
        with T.serial(0, -(-work.out_width // columns)) as tile:
            column = tile * columns
            if work.out_width % columns:
                column = least(work.out_width - columns, column)
            # Each on the stack, being small and global: workspace would be kept in registers until the task ends.
            registers = [T.alloc_buffer((lanes,), "float32") for _ in range(columns * vectors)]
            for number, register in enumerate(registers):
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
                        add_to(registers[p * vectors + v], 0, taps[v] * value, lanes)
            for number, register in enumerate(registers):
                p, v = divmod(number, vectors)
                to = (v * work.out_width + column + p) * lanes
                store_vector(sums, to, load(register, 0, lanes), lanes)

    def _fetch_output(self, step: Any, column: Any, rows: list[Any]) -> None:
        """Fetch a share of the lines that a tile's sums will go to: one for each channel, all within the reduction."""
        lanes, steps = self._lanes, self._kernel.steps
        lines = lanes * len(rows)
        for part in range(-(-lines // steps)):
            line = T.Bind(tirx.min(lines - 1, step + part * steps))
            at = rows[0] + line * self._work.out_pixels + column  # of the last vector perhaps too far: it may overlap
            T.add_to_parent(fetch(Fetch.WRITE, self._buffers["out"], [at]))

    def _store(self, sums: Any, start: int, row: Any) -> None:
        """Turn a row of a vector's sums to pixels, and store them through the epilogue to `row` and those below."""
        work, lanes = self._work, self._lanes

        def square(pixel: Any) -> None:
            at = bound(row + pixel)
            columns = [T.Bind(load(sums, start + (pixel + i) * lanes, lanes)) for i in range(lanes)]
            for i, value in enumerate(turned_square(columns)):
                if work.epilogue.residual:
                    value = value + load(self._buffers["residual"], at + i * work.out_pixels, lanes)
                value = activated(value, work.epilogue, lanes)
                store_vector(self._buffers["out"], at + i * work.out_pixels, value, lanes)

        _runs(work.out_width, lanes, square)


def _runs(size: int, lanes: int, body: Callable[[Any], None]) -> None:
    """Loop over the starts of runs of `lanes` elements; the last begins early enough to be whole."""
    with T.serial(0, -(-size // lanes)) as number:
        body(T.Bind(tirx.min(size - lanes, number * lanes)) if size % lanes else number * lanes)
