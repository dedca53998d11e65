"""Generated code of the channel-pair family.

Loop nest (AVX-512, tiles of 7 or 8 vectors)::

    parallel n, channel                        # copy: zero-padded, phase-split; none for 1x1 with stride 1
    parallel n, pixel tile, pairs-of-task
      for block of the reduction
        tile = its inputs                      # rows of V aligned vectors, one for each input channel and tap: 32 KiB
        for pair of output channels
          acc[2][V] = bias or scratch
          for input that both keep
            acc[0][v] += W[0] * X[v]           # 2 broadcasts, V loads, 2*V FMAs
            acc[1][v] += W[1] * X[v]
          for two inputs of one channel each
            acc[0][v] += W[0] * X[v]           # 2 broadcasts, 2*V loads, 2*V FMAs
            acc[1][v] += W[1] * X'[v]
          scratch = acc, or out = act(acc + residual) after the last block

How many inputs both channels keep differs from pair to pair, and which channels are a pair, and their order, from block
to block: the table says so. Meanwhile are fetched: the next block's inputs, the next
weights, and in the last block the lines that the next pair's outputs go to.

Written as TensorIR directly: the loops over a pair's inputs have bounds that are known only to the table.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

from tvm_nm.schedules.chain_loops import activated, add_to, divided, flat_function, load, registers, store_vector
from tvm_nm.schedules.conv_arguments import conv_argument_shapes
from tvm_nm.schedules.fetch_code import FETCHES, Fetch, fetch
from tvm_nm.schedules.pair_conv import HEADER, PairConvKernel
from tvm_nm.schedules.row_copy import columns_of, copies_by_vectors, pieces

__all__ = ["pair_conv_prim_func"]

_AHEAD = 1024
"""Weights that are fetched ahead: a page."""
_OUTPUTS_AHEAD = 2
"""Pairs that outputs are fetched ahead."""


@lru_cache(maxsize=256)
def pair_conv_prim_func(kernel: PairConvKernel) -> tvm.tirx.PrimFunc:
    """Return the function of a variant, which needs no schedule.

    Its arguments, in order: data (N, C, H, W); packed weights and index table (`PairConvKernel`); bias (OC,); the
    residual (N, OC, OH, OW) if the epilogue adds one; the output (N, OC, OH, OW). All float32 but the table.
    """
    shapes = conv_argument_shapes(kernel.workload, kernel.weight_shape, kernel.index_shape, "uint8")
    return flat_function(shapes, lambda buffers: _Code(kernel, buffers).emit())


class _Code:
    """Emits one kernel. Buffers are flat; positions in them are elements."""

    def __init__(self, kernel: PairConvKernel, buffers: dict[str, Any]) -> None:
        self._kernel = kernel
        self._work = kernel.workload
        self._lanes = kernel.lanes
        self._buffers = buffers

    def emit(self) -> None:
        kernel = self._kernel
        source = self._copy() if kernel.is_copied else self._buffers["data"]
        of_tile = kernel.pairs // kernel.pairs_per_task
        with T.parallel(0, kernel.tasks, annotations={FETCHES: 1}) as task:
            image, rest = divided(task, kernel.tiles * of_tile, self._work.batch)
            number, of_channels = divided(rest, of_tile, kernel.tiles)
            pair = of_channels * kernel.pairs_per_task
            sizes = kernel.tile_sizes
            start = number * kernel.tile_pixels
            if len(sizes) == 1:
                self._tile(source, image, start, sizes[0], pair)
                return
            with T.If(number < kernel.tiles - 1):
                with T.Then():
                    self._tile(source, image, start, sizes[0], pair)
                with T.Else():
                    self._tile(source, image, (kernel.tiles - 1) * kernel.tile_pixels, sizes[1], pair)

    def _copy(self) -> Any:
        """Return the padded, phase-split copy of the input; a vector may be read beyond its end."""
        kernel, work = self._kernel, self._work
        size = work.batch * work.in_channels * kernel.channel_size
        copy = T.alloc_buffer((size + self._lanes,), "float32")
        (rows, columns), (phases_y, phases_x) = kernel.plane, kernel.phases
        copy_row = self._vector_row if copies_by_vectors(work.stride[1], size) else self._scalar_row
        with T.parallel(0, work.batch * work.in_channels) as channel:
            with T.serial(0, kernel.channel_size) as i:
                T.buffer_store(copy, tirx.const(0.0, "float32"), [channel * kernel.channel_size + i])
            for phase_y in range(phases_y):
                for phase_x in range(phases_x):
                    first_row, last_row = _inside(rows, work.stride[0], phase_y - work.padding[0], work.height)
                    first, last = _inside(columns, work.stride[1], phase_x - work.padding[1], work.width)
                    if last <= first or last_row <= first_row:
                        continue
                    with T.serial(0, last_row - first_row) as r:
                        y = (first_row + r) * work.stride[0] + (phase_y - work.padding[0])
                        row = (phase_y * phases_x + phase_x) * rows + first_row + r
                        begin = T.Bind((channel * work.height + y) * work.width + (phase_x - work.padding[1]))
                        copy_row(copy, channel * kernel.channel_size + row * columns, begin, first, last)
        return copy

    def _scalar_row(self, copy: Any, to: Any, begin: Any, first: int, last: int) -> None:
        """Copy the columns of a row that lie inside of the input; its first column reads element `begin`."""
        with T.serial(first, last) as column:
            T.buffer_store(copy, self._buffers["data"][begin + column * self._work.stride[1]], [to + column])

    def _vector_row(self, copy: Any, to: Any, begin: Any, first: int, last: int) -> None:
        """Do the same by vectors."""
        data, stride = self._buffers["data"], self._work.stride[1]
        for at, size in pieces(first, last, self._lanes):
            store_vector(copy, to + at, columns_of(data, [], begin + at * stride, size, stride), size)

    def _tile(self, source: Any, image: Any, start: Any, pixels: int, pair: Any) -> None:
        """Compute some pairs of channels of a tile."""
        kernel, lanes = self._kernel, self._lanes
        vectors = kernel.vectors(pixels)
        inputs = T.alloc_buffer((kernel.rows_per_block * vectors * lanes + lanes,), "float32")
        several = kernel.blocks > 1
        scratch = T.alloc_buffer((kernel.pairs_per_task * 2 * vectors * lanes,), "float32") if several else None
        begin = T.Bind(image * (self._work.in_channels * kernel.channel_size) + self._place(start))
        with T.serial(0, kernel.blocks) as block:
            size = kernel.channels_per_block * kernel.channel_size
            self._pack(source, T.Bind(begin + block * size), pixels, inputs)
            with T.serial(0, kernel.pairs_per_task) as p:
                self._pair(source, begin, image, start, pixels, (block, pair, p), inputs, scratch)

    def _place(self, pixel: Any) -> Any:
        """Return where the first tap of an output pixel that begins a tile lies within its channel."""
        if self._work.taps == 1:
            return pixel
        return (
            tirx.indexdiv(pixel, self._work.out_width) * self._kernel.plane[1]
            if not isinstance(pixel, int)
            else (pixel // self._work.out_width * self._kernel.plane[1])
        )

    def _pack(self, source: Any, begin: Any, pixels: int, inputs: Any) -> None:
        """Copy the pixels of a tile of a block's inputs; the last vector of each ends with the last pixel."""
        kernel, work, lanes = self._kernel, self._work, self._lanes
        vectors = kernel.vectors(pixels)
        with T.serial(0, kernel.channels_per_block) as channel:
            if work.taps == 1:
                at = T.Bind(begin + channel * kernel.channel_size)
                to = T.Bind(channel * (vectors * lanes))
                for v in range(vectors):
                    pixel = min(v * lanes, pixels - lanes)
                    store_vector(inputs, to + v * lanes, load(source, at + pixel, lanes), lanes)
                return
            for tap in range(work.taps):
                at = T.Bind(begin + channel * kernel.channel_size + kernel.tap_offset(tap))
                to = T.Bind((channel * work.taps + tap) * (vectors * lanes))
                with T.serial(0, pixels // work.out_width) as row:
                    for column in range(0, work.out_width, lanes):
                        # What goes beyond a row is overwritten by the next.
                        value = load(source, at + row * kernel.plane[1] + column, lanes)
                        store_vector(inputs, to + row * work.out_width + column, value, lanes)
                if pixels % lanes:
                    last = load(inputs, to + (pixels - lanes), lanes)
                    store_vector(inputs, to + (vectors - 1) * lanes, last, lanes)

    def _pair(
        self,
        source: Any,
        begin: Any,
        image: Any,
        start: Any,
        pixels: int,
        place: tuple[Any, Any, Any],
        inputs: Any,
        scratch: Any,
    ) -> None:
        """Add a block's products to the sums of a pair."""
        kernel, lanes = self._kernel, self._lanes
        vectors, kept = kernel.vectors(pixels), kernel.kept_per_block
        weight, index, bias = (self._buffers[name] for name in ("weight", "index", "bias"))
        block, first_pair, p = place
        row = T.Bind(block * kernel.pairs + first_pair + p)
        weights = T.Bind(row * (2 * kept))
        entries = T.Bind(row * (HEADER + 2 * kept))
        channels = [self._channel(entries, which) for which in range(2)]
        slots = [T.Bind((channel - first_pair * 2) * (vectors * lanes)) for channel in channels]
        sums = registers(2 * vectors, lanes)

        def begin_with_bias() -> None:
            for which, channel in enumerate(channels):
                value = T.Bind(tirx.Broadcast(bias[channel], lanes))
                for v in range(vectors):
                    store_vector(sums[which * vectors + v], 0, value, lanes)

        def begin_with_carried() -> None:
            for i, register in enumerate(sums):
                store_vector(register, 0, load(scratch, slots[i // vectors] + i % vectors * lanes, lanes), lanes)

        def carry() -> None:
            for i, register in enumerate(sums):
                store_vector(scratch, slots[i // vectors] + i % vectors * lanes, load(register, 0, lanes), lanes)

        def finish() -> None:
            for which, channel in enumerate(channels):
                at = T.Bind(self._output(image, channel, start))
                for v in range(vectors):
                    self._store(load(sums[which * vectors + v], 0, lanes), at + min(v * lanes, pixels - lanes))

        last = block == kernel.blocks - 1
        _either(kernel.blocks > 1, block == 0, begin_with_bias, begin_with_carried)
        for line in range(-(-2 * kept // _LINE)):
            T.add_to_parent(fetch(Fetch.AHEAD, weight, [weights + _AHEAD + line * _LINE]))
        _either(kernel.blocks > 1, last, lambda: self._fetch_output(image, row, p, start, pixels), None)
        self._fetch_inputs(source, begin, block, p, pixels)

        shared = T.Bind(index[entries].astype("int32"))

        with T.serial(0, shared) as i:
            at = T.Bind(index[entries + HEADER + 2 * i].astype("int32") * (vectors * lanes))
            both = [T.Bind(tirx.Broadcast(weight[weights + 2 * i + which], lanes)) for which in range(2)]
            for v in range(vectors):
                value = T.Bind(load(inputs, at + v * lanes, lanes))
                for which in range(2):
                    add_to(sums[which * vectors + v], both[which] * value, lanes)
        with T.serial(0, kept - shared) as i:
            entry = T.Bind(shared + i)
            for which in range(2):
                at = T.Bind(index[entries + (HEADER + which) + 2 * entry].astype("int32") * (vectors * lanes))
                scale = T.Bind(tirx.Broadcast(weight[weights + 2 * entry + which], lanes))
                for v in range(vectors):
                    add_to(sums[which * vectors + v], scale * load(inputs, at + v * lanes, lanes), lanes)
        _either(kernel.blocks > 1, last, finish, carry)

    def _channel(self, entries: Any, which: int) -> Any:
        """Return an output channel of a pair."""
        low, high = (self._buffers["index"][entries + 1 + 2 * which + i].astype("int32") for i in range(2))
        return T.Bind(low + high * 256)

    def _output(self, image: Any, channel: Any, start: Any) -> Any:
        """Return where a tile begins in a channel of the output."""
        return (image * self._work.out_channels + channel) * self._work.out_pixels + start

    def _store(self, value: Any, at: Any) -> None:
        epilogue = self._work.epilogue
        if epilogue.residual:
            value = value + load(self._buffers["residual"], at, self._lanes)
        store_vector(self._buffers["out"], at, activated(value, epilogue, self._lanes), self._lanes)

    def _fetch_output(self, image: Any, row: Any, p: Any, start: Any, pixels: int) -> None:
        """Fetch the lines that a later pair's epilogue touches, which lie in other pages: nobody else foresees them."""
        kernel = self._kernel
        ahead = T.Bind(tirx.min(p + _OUTPUTS_AHEAD, kernel.pairs_per_task - 1) - p + row)
        entries = T.Bind(ahead * (HEADER + 2 * kernel.kept_per_block))
        for which in range(2):
            at = T.Bind(self._output(image, self._channel(entries, which), start))
            for pixel in sorted({*range(0, pixels, _LINE), pixels - 1}):
                T.add_to_parent(fetch(Fetch.WRITE, self._buffers["out"], [at + pixel]))
                if self._work.epilogue.residual:
                    T.add_to_parent(fetch(Fetch.READ, self._buffers["residual"], [at + pixel]))

    def _fetch_inputs(self, source: Any, begin: Any, block: Any, p: Any, pixels: int) -> None:
        """Fetch a pair's share of the inputs of the next block, or of the first one of the next tile."""
        kernel = self._kernel
        if kernel.is_copied:
            return  # just written
        share = -(-kernel.channels_per_block // kernel.pairs_per_task)
        needed = -(-kernel.channels_per_block // share)
        size = kernel.channel_size

        def emit() -> None:
            after = (block + 1) * kernel.channels_per_block
            ahead = begin + tirx.if_then_else(block + 1 < kernel.blocks, after * size, pixels)
            at = T.Bind(ahead + p * (share * size))
            for channel in range(share):
                for pixel in sorted({*range(0, pixels, _LINE), pixels - 1}):
                    T.add_to_parent(fetch(Fetch.AHEAD, source, [at + channel * size + pixel]))

        _either(needed < kernel.pairs_per_task, p < needed, emit, None)


_LINE = 16  # float32 elements of a cache line


def _either(decided_later: bool, condition: Any, then: Any, otherwise: Any) -> None:
    """Emit `then` or `otherwise`; `then` where there is nothing to decide."""
    if not decided_later:
        then()
        return
    with T.If(condition):
        with T.Then():
            then()
        if otherwise is not None:
            with T.Else():
                otherwise()


def _inside(count: int, stride: int, offset: int, size: int) -> tuple[int, int]:
    """Return which i of a count, first and end, have 0 <= i * stride + offset < size."""
    first = max(0, -(offset // stride))
    end = min(count, (size - 1 - offset) // stride + 1)
    return first, end
