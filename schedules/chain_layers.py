"""The layers of a chain, as a task computes them: see `chain_code` for the loops around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

from tvm_nm.schedules.chain import ChainKernel, Mixing
from tvm_nm.schedules.chain_loops import (
    activated,
    add_to,
    blocked_channel,
    bound,
    least,
    load,
    most_of,
    registers,
    splat,
    store_vector,
    tiles,
)
from tvm_nm.schedules.fetch_code import Fetch, fetch
from tvm_nm.workload import ConvWorkload

__all__ = ["ChainLayers", "Part"]

# Weights of this size have left L2 since the last image. The processor's prefetchers stop at the end of a page, which
# lasts for a few hundred cycles: about as long as the next page's first line takes from beyond L2.
_STREAMED_BYTES = 128 * 1024
_PREFETCH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """What a task with some of the hidden channels sums: the share that these are, and where in a buffer it goes."""

    share: Any
    sums: Any
    begin: Any


class ChainLayers:
    """Emits the layers of one chain. Buffers are flat; positions in them are elements.

    Parameters
    ----------
    kernel
        The chain.
    buffers
        The function's arguments, by name.
    """

    def __init__(self, kernel: ChainKernel, buffers: dict[str, Any]) -> None:
        self._kernel = kernel
        self._buffers = buffers
        self._lanes = kernel.lanes
        # Of the first layer's output and of the depthwise output, for one vector of channels.
        self._padded_plane = kernel.in_rows * kernel.pitch * kernel.lanes
        first = kernel.first
        self._copies_input = not first.is_pointwise
        self._copy_rows = (kernel.in_rows - 1) * first.stride[0] + first.kernel[0]
        self._copy_pitch = (first.out_width - 1) * first.stride[1] + first.kernel[1]

    def padded(self) -> Any:
        """Return a scratch for a register tile's vectors of the first layer's output."""
        return T.alloc_buffer((self._kernel.mixing.vectors * self._padded_plane,), "float32")

    def rows_of(self, band: Any) -> Any:
        """Return the output rows of a band: the last one may have fewer."""
        rows, height = self._kernel.rows, self._kernel.depthwise.out_height
        return rows if height % rows == 0 else least(rows, height - band * rows)

    def source(self, image: Any, band: Any) -> tuple[Any, Any]:
        """Return what the first layer reads, and where this image's starts: the input, or a padded copy of rows."""
        kernel, work = self._kernel, self._kernel.first
        data = self._buffers["data"]
        channels = -(-work.in_channels // self._lanes) * self._lanes if kernel.blocked_input else work.in_channels
        start = image * (channels * work.height * work.width)
        if not self._copies_input:
            return data, start
        top, left, _, _ = work.padding
        row_size, plane = self._copy_pitch, self._copy_rows * self._copy_pitch
        copy = T.alloc_buffer((work.in_channels * plane,), "float32")
        with T.serial(0, work.in_channels * plane) as i:
            T.buffer_store(copy, tirx.const(0.0, "float32"), [i])
        first_row = bound(self._top_row(band) * work.stride[0] - top)
        begin = most_of(0, -first_row)
        end = least(self._copy_rows, work.height - first_row)
        width = min(work.width, self._copy_pitch - left)
        with T.serial(0, work.in_channels) as c, T.serial(0, end - begin) as r, T.serial(0, width) as x:
            row = begin + r
            value = data[start + (c * work.height + first_row + row) * work.width + x]
            T.buffer_store(copy, value, [c * plane + row * row_size + left + x])
        return copy, 0

    def _top_row(self, band: Any) -> Any:
        """Return the row of the first layer's output, perhaps above it, that a band's first row begins with."""
        work = self._kernel.depthwise
        return band * (self._kernel.rows * work.stride[0]) - work.padding[0]

    def hidden_channels(
        self,
        band: Any,
        start: Any,
        count: int,
        source: tuple[Any, Any],
        padded: Any,
        hidden: Any,
        place: Callable[[int], Any],
    ) -> None:
        """Compute `count` vectors of channels, from vector `start`, of a band of the depthwise output.

        `source` and `padded` are what `source` and `padded` return; vector j of these goes to `place(j)` of `hidden`.
        """
        self._first(band, start, count, source, padded)
        for j in range(count):
            self._depthwise(band, start + j, padded, j * self._padded_plane, hidden, place(j))

    def _first(self, band: Any, start: Any, count: int, source: Any, padded: Any) -> None:
        """Compute the rows that a band's depthwise sums read; zeros where they lie beyond the map."""
        kernel, lanes = self._kernel, self._lanes
        work, mixing = kernel.first, kernel.mixing
        _, left, _, right = kernel.depthwise.padding
        top_row = bound(self._top_row(band))
        top = most_of(0, -top_row)
        bottom = least(kernel.in_rows, work.out_height - top_row)

        def zero(vector: int, row: Any, column: Any) -> None:
            at = vector * self._padded_plane + (row * kernel.pitch + column) * lanes
            store_vector(padded, at, splat(0.0, lanes), lanes)

        for j in range(count):
            with T.serial(0, top) as row, T.serial(0, kernel.pitch) as column:
                zero(j, row, column)
            with T.serial(0, kernel.in_rows - bottom) as row, T.serial(0, kernel.pitch) as column:
                zero(j, bottom + row, column)
            if left + right:
                with T.serial(0, bottom - top) as row:
                    for column in (*range(left), *range(kernel.pitch - right, kernel.pitch)):
                        zero(j, top + row, column)
        buffer, base = source

        def tile(row: Any, column: Any, rows: int, columns: int) -> None:
            def inputs(channel: Any, ky: int, kx: int) -> list[Any]:
                if self._copies_input:
                    sy, sx = work.stride
                    at = channel * (self._copy_rows * self._copy_pitch) + column * sx + kx
                    places = [
                        ((top + row + p // columns) * sy + ky) * self._copy_pitch + p % columns * sx
                        for p in range(rows * columns)
                    ]
                    at = T.Bind(base + at)
                    return [buffer[at + place] for place in places]
                # The tile's rows are contiguous: it has several only if they are whole.
                step = lanes if kernel.blocked_input else 1
                at = T.Bind(base + channel + ((top_row + top + row) * work.width + column) * step)
                return [buffer[at + p * step] for p in range(rows * columns)]

            def channel_of(position: Any) -> Any:
                if mixing.kept:
                    return position
                if self._copies_input or not kernel.blocked_input:
                    return position if self._copies_input else position * (work.height * work.width)
                return blocked_channel(position, work.height * work.width * lanes, lanes)

            def store(vector: int, pixel: int, value: Any) -> None:
                at = (top + row + pixel // columns) * kernel.pitch + left + column + pixel % columns
                value = activated(value, work.epilogue, lanes)
                store_vector(padded, vector * self._padded_plane + at * lanes, value, lanes)

            self._mix("first", work, mixing, start, count, rows * columns, channel_of, inputs, store)

        tiles(bottom - top, work.out_width, kernel.pixels(count), tile)

    def _depthwise(self, band: Any, vector: Any, padded: Any, start: Any, hidden: Any, target: Any) -> None:
        kernel, lanes = self._kernel, self._lanes
        work = kernel.depthwise
        (kh, kw), (sy, sx) = work.kernel, work.stride
        weights = [
            T.Bind(load(self._buffers["depthwise"], (vector * work.taps + tap) * lanes, lanes))
            for tap in range(work.taps)
        ]
        bias = T.Bind(load(self._buffers["depthwise_bias"], vector * lanes, lanes))

        def tile(row: Any, column: Any, rows: int, columns: int) -> None:
            sums = registers(rows * columns, lanes)
            for register in sums:
                store_vector(register, 0, bias, lanes)
            for y in range((rows - 1) * sy + kh):
                for x in range((columns - 1) * sx + kw):
                    readers = [
                        (r * columns + c, (y - r * sy) * kw + x - c * sx)
                        for r in range(rows)
                        for c in range(columns)
                        if 0 <= y - r * sy < kh and 0 <= x - c * sx < kw
                    ]
                    if not readers:
                        continue
                    at = start + ((row * sy + y) * kernel.pitch + column * sx + x) * lanes
                    value = T.Bind(load(padded, at, lanes))
                    for pixel, tap in readers:
                        add_to(sums[pixel], weights[tap] * value, lanes)
            for p in range(rows * columns):
                value = activated(load(sums[p], 0, lanes), work.epilogue, lanes)
                at = target + ((row + p // columns) * work.out_width + column + p % columns) * lanes
                store_vector(hidden, at, value, lanes)

        tiles(self.rows_of(band), work.out_width, kernel.depthwise_pixels, tile)

    def last(
        self, image: Any, band: Any, start: Any, count: int, hidden: Any, base: Any, part: Part | None = None
    ) -> None:
        """Compute `count` vectors of channels, from vector `start`, of a band of the last layer's output.

        The depthwise output begins at `base` of `hidden`; of a share, at its own first channel.
        """
        kernel, lanes = self._kernel, self._lanes
        work, mixing = kernel.last, kernel.last_mixing
        assert work is not None
        first_row = band * kernel.rows

        def tile(row: Any, column: Any, rows: int, columns: int) -> None:
            def inputs(channel: Any, _ky: int, _kx: int) -> list[Any]:
                at = T.Bind(base + channel + (row * work.width + column) * lanes)
                return [hidden[at + p * lanes] for p in range(rows * columns)]

            def channel_of(position: Any) -> Any:
                return position if mixing.kept else blocked_channel(position, kernel.hidden_plane, lanes)

            def store(vector: int, pixel: int, value: Any) -> None:
                pixels = work.out_height * work.out_width
                at = (image * kernel.out_vectors + start + vector) * pixels
                at = (at + (first_row + row) * work.out_width + column + pixel) * lanes
                if part is not None:
                    store_vector(part.sums, part.begin + at, value, lanes)
                    return
                if work.epilogue.residual:
                    value = value + load(self._buffers["residual"], at, lanes)
                store_vector(self._buffers["out"], at, activated(value, work.epilogue, lanes), lanes)

            self._mix("last", work, mixing, start, count, rows * columns, channel_of, inputs, store, part)

        tiles(self.rows_of(band), work.out_width, kernel.pixels(count), tile)

    def _mix(
        self,
        name: str,
        work: ConvWorkload,
        mixing: Mixing,
        start: Any,
        count: int,
        pixels: int,
        channel_of: Callable[[Any], Any],
        inputs: Callable[[Any, int, int], list[Any]],
        store: Callable[[int, int, Any], None],
        part: Part | None = None,
    ) -> None:
        """Sum a register tile of `count` vectors of channels, from vector `start`, over the inputs that it keeps."""
        lanes, kept = self._lanes, mixing.kept or work.in_channels
        weights, bias, index = (self._buffers.get(f"{name}{what}") for what in ("", "_bias", "_index"))
        sums = registers(pixels * count, lanes)
        for j in range(count):
            value = T.Bind(load(bias, (start + j) * lanes, lanes)) if part is None else splat(0.0, lanes)
            for p in range(pixels):
                store_vector(sums[p * count + j], 0, value, lanes)
        row = tirx.indexdiv(start * lanes, mixing.block) if mixing.block else 0
        ahead = 4 * work.out_channels * kept * work.taps >= _STREAMED_BYTES
        begin, steps = (0, kept) if part is None else self._inputs_of(part.share, index, row, kept)
        with T.serial(0, steps) as step:
            position = begin + step
            entry = step if index is None else index[row * kept + position]
            channel = T.Bind(channel_of(entry))
            for tap in range(work.taps):
                at = T.Bind(start * (kept * work.taps * lanes) + (position * work.taps + tap) * (count * lanes))
                vectors = [T.Bind(load(weights, at + j * lanes, lanes)) for j in range(count)]
                if ahead:
                    for j in range(count):
                        T.add_to_parent(fetch(Fetch.READ, weights, [at + j * lanes + _PREFETCH_BYTES // 4]))
                for p, scalar in enumerate(inputs(channel, *divmod(tap, work.kernel[1]))):
                    value = T.Bind(tirx.Broadcast(scalar, lanes))
                    for j in range(count):
                        add_to(sums[p * count + j], vectors[j] * value, lanes)
        for j in range(count):
            for p in range(pixels):
                store(j, p, load(sums[p * count + j], 0, lanes))

    def _inputs_of(self, share: Any, index: Any, row: Any, kept: int) -> tuple[Any, Any]:
        """Return where a share's inputs begin among those that a block row of the last layer keeps, and how many."""
        kernel = self._kernel
        if index is None:
            size = kernel.share_groups * kernel.mixing.vectors * self._lanes
            begin = T.Bind(share * size)
            return begin, size if kernel.shares * size == kept else least(size, kept - begin)
        assert kernel.last is not None
        rows = -(-kernel.last.out_channels // kernel.last_mixing.block)
        at = T.Bind(rows * kept + row * (kernel.shares + 1) + share)
        begin = T.Bind(index[at])
        return begin, T.Bind(index[at + 1] - begin)
