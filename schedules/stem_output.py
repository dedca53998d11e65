"""Stores what stem kernels sum up: rows of pixels, a vector of channels each, become rows of the output.

A max pooling takes the maxima of a window's rows first (`tallest_rows`), into a line with the columns that lie beyond
the map, and those of the window's columns as the line is stored. Where a window reaches beyond the map, the rows and
columns at its border stand in: there is no lowest number that a sum could be below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

from tvm_nm.schedules.chain_loops import least, load, most_of, store_turned, store_vector
from tvm_nm.workload import ConvWorkload, MaxPool

__all__ = ["StemOutput", "runs"]


class StemOutput:
    """Emits the last stage of one kernel. Buffers are flat; positions in them are elements."""

    def __init__(self, work: ConvWorkload, lanes: int, buffers: Mapping[str, Any]) -> None:
        self._work = work
        self._lanes = lanes
        self._buffers = buffers
        self._pool = work.epilogue.pool
        _, _, self.height, self.width = work.stored_shape

    @property
    def pixels(self) -> int:
        """Elements of a stored map."""
        return self.height * self.width

    @property
    def line_size(self) -> int:
        """Elements of the line that `tallest_rows` fills."""
        _, left, _, right = (0,) * 4 if self._pool is None else self._pool.padding
        return (left + self._work.out_width + right) * self._lanes

    def tallest_rows(
        self, pool: MaxPool, y: Any, sums: Any, start: Any, place: Callable[[Any], Any], line: Any
    ) -> None:
        """Fill a line with maxima of the rows of stored row `y`'s window; `place` says how far from `start` one is."""
        work, lanes = self._work, self._lanes
        begin = T.Bind(y * pool.stride[0] - pool.padding[0])
        places = [place(least(work.out_height - 1, most_of(0, begin + ky))) for ky in range(pool.kernel[0])]
        _, left, _, right = pool.padding
        with T.serial(0, work.out_width) as x:
            values = [load(sums, start + at + x * lanes, lanes) for at in places]
            store_vector(line, (left + x) * lanes, _greatest(values), lanes)
        last = left + work.out_width - 1
        for border, columns in ((left, range(left)), (last, range(last + 1, last + 1 + right))):
            for column in columns:
                store_vector(line, column * lanes, load(line, border * lanes, lanes), lanes)

    def store(self, line: Any, start: Any, row: Any) -> None:
        """Turn a row of sums, or a line of maxima, and store it through the epilogue to `row` and `pixels` further."""
        lanes, pool = self._lanes, self._pool
        step, reads = (1, 1) if pool is None else (pool.stride[1], pool.kernel[1])

        def square(pixel: Any) -> None:
            at = T.Bind(row + pixel)
            windows = [
                [load(line, start + ((pixel + i) * step + x) * lanes, lanes) for x in range(reads)]
                for i in range(lanes)
            ]
            turned = [T.Bind(_greatest(window)) for window in windows]
            store_turned(turned, self._buffers, at, self.pixels, self._work.epilogue, lanes)

        runs(self.width, lanes, square)


def _greatest(vectors: list[Any]) -> Any:
    """Return the greatest of some vectors, lane by lane."""
    return reduce(tirx.max, vectors)


def runs(size: int, lanes: int, body: Callable[[Any], None]) -> None:
    """Loop over the starts of runs of `lanes` elements; the last begins early enough to be whole."""
    with T.serial(0, -(-size // lanes)) as number:
        body(T.Bind(tirx.min(size - lanes, number * lanes)) if size % lanes else number * lanes)
