"""Register tiles of pixels, of any number, that cover a map: for families whose vectors run over channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tvm_nm.workload import ConvWorkload

__all__ = ["map_cycles", "pixel_tiles"]


def pixel_tiles(work: ConvWorkload, most: int) -> Iterator[tuple[int, int]]:
    """Yield the rows and columns of tiles worth trying, of at most `most` pixels: parts of a row, or whole rows."""
    for columns in range(1, min(most, work.out_width) + 1):
        if _compiles_well(work.out_width, columns):
            yield 1, columns
    for rows in range(2, min(most // work.out_width, work.out_height) + 1):
        if _compiles_well(work.out_height, rows):
            yield rows, work.out_width


def map_cycles(work: ConvWorkload, rows: int, columns: int, tile_cycles: Callable[[int], float]) -> float:
    """Return the cycles of one reduction step over a map: full tiles and shorter last ones, of so many pixels each."""
    return sum(
        down_count * across_count * tile_cycles(down * across)
        for down, down_count in _tiles_of(work.out_height, rows)
        for across, across_count in _tiles_of(work.out_width, columns)
    )


def _tiles_of(extent: int, size: int) -> list[tuple[int, int]]:
    """Return (size, count) of the tiles that cover an extent."""
    full, rest = divmod(extent, size)
    return [(size, full)] + ([(rest, 1)] if rest else [])


def _compiles_well(extent: int, size: int) -> bool:
    """Whether LLVM keeps the sums in registers: a single full tile it merges with a shorter last one, and spills."""
    return extent // size != 1 or extent % size == 0
