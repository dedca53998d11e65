"""The transforms of Winograd's minimal filtering F(m x m, r x r), and linear combinations that share their terms.

An m x m tile of outputs is `A^T [ (G w G^T) * (B^T d B) ] A` with d the n x n inputs it needs, n = m + r - 1, w the
r x r weights and * elementwise: n^2 multiplications for each pair of channels instead of r^2 m^2. The matrices are
those of Toom and Cook for interpolation at n - 1 points and infinity (Lavin & Gray, CVPR 2016).

The points decide the rounding error (Barabasz, Anderson, Soodhalter & Gregg, ACM TOMS 2020). Here they are pairs of
opposite points and, where their number is odd, 0. Pairs halve the work of a transform: the terms of even and of odd
degree are shared by a pair. Of the pairs with few bits, 3/4 and 3/2 gave the least error for m = 4 and r = 3: 2.5e-6 of
the largest output with 256 channels of normal data, against 1e-5 for the usual 1 and 2. For r = 4 these are 1/4, 7/8
and 7/4: 1.7e-6 with 12 channels, against 3e-6 for 1/2, 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

__all__ = ["POINTS", "column_sums", "combine_columns", "combine_rows", "row_sums", "transform_matrices"]

POINTS: dict[tuple[int, int], tuple[float, ...]] = {
    (2, 3): (0.0, 1.0, -1.0),
    (4, 3): (0.0, 0.75, -0.75, 1.5, -1.5),
    (4, 4): (0.25, -0.25, 0.875, -0.875, 1.75, -1.75),
}
"""Interpolation points, beside infinity, of each (m, r); 0 is the first, opposite points follow each other."""

Matrix = npt.NDArray[np.float64]


@cache
def transform_matrices(tile: int, taps: int = 3) -> tuple[Matrix, Matrix, Matrix]:
    """Return (A^T, G, B^T) for F(tile x tile, taps x taps), of shapes (m, n), (n, r) and (n, n), n = m + r - 1.

    Raises
    ------
    KeyError
        If there are no points for these sizes.
    """
    points = np.asarray(POINTS[tile, taps])
    size = tile + taps - 1
    output, weight, data = np.zeros((tile, size)), np.zeros((size, taps)), np.zeros((size, size))
    for j, point in enumerate(points):
        others = np.delete(points, j)
        output[:, j] = point ** np.arange(tile)
        weight[j] = point ** np.arange(taps) / np.prod(point - others)
        data[j, : size - 1] = np.poly(others)[::-1]
    output[-1, -1] = weight[-1, -1] = 1.0
    data[-1] = np.poly(points)[::-1]
    return output, weight, data


def combine_rows(matrix: Matrix, row: Any, value: Callable[[int], Any]) -> Any:
    """Return the TIR expression of `sum_k matrix[row, k] * value(k)` for a loop variable `row`.

    Rows of opposite points are written as even part plus or minus odd part, which are equal expressions: once the loop
    is unrolled, the compiler computes them once.
    """
    return _select(row, row_sums(matrix, value))


def combine_columns(matrix: Matrix, row: Any, value: Callable[[int], Any]) -> Any:
    """As `combine_rows`, for a matrix whose *columns* belong to the points: pairs are combined as sum or difference."""
    return _select(row, column_sums(matrix, value))


def row_sums(matrix: Matrix, value: Callable[[int], Any]) -> list[Any]:
    """Return the expressions of all rows of `combine_rows`; values may be vectors."""
    return [_even_and_odd(coefficients, value) for coefficients in matrix]


def column_sums(matrix: Matrix, value: Callable[[int], Any]) -> list[Any]:
    """Return the expressions of all rows of `combine_columns`; values may be vectors."""
    return [_paired(coefficients, value) for coefficients in matrix]


def _select(index: Any, expressions: Sequence[Any]) -> Any:
    result = expressions[-1]
    for position in range(len(expressions) - 2, -1, -1):
        result = tirx.Select(index == position, expressions[position], result)
    return result


def _even_and_odd(coefficients: npt.NDArray[np.float64], value: Callable[[int], Any]) -> Any:
    parts: tuple[list[tuple[float, Any]], ...] = ([], [])
    for k, c in enumerate(coefficients):
        if c:
            parts[k % 2].append((float(c), value(k)))
    if not all(parts):
        return _sum(parts[0] or parts[1])
    # A product of (x - point) over points: its part of the highest degree is the same for both points of a pair. The
    # other part's leading coefficient is the point, without which it is the same as well.
    highest = int(np.flatnonzero(coefficients)[-1]) % 2
    shared, others = parts[highest], parts[1 - highest]
    point = others[-1][0]
    return _sum(shared) + _sum([(c / point, term) for c, term in others]) * tirx.const(point, "float32")


def _paired(coefficients: npt.NDArray[np.float64], value: Callable[[int], Any]) -> Any:
    terms: list[tuple[float, Any]] = []
    last = len(coefficients) - 1
    first_pair = last % 2
    if first_pair and coefficients[0]:
        terms.append((float(coefficients[0]), value(0)))
    for k in range(first_pair, last, 2):
        first, second = (float(c) for c in coefficients[k : k + 2])
        if first:
            terms.append((first, value(k) + value(k + 1) if first == second else value(k) - value(k + 1)))
    if coefficients[last]:
        terms.append((float(coefficients[last]), value(last)))
    return _sum(terms)


def _sum(terms: Sequence[tuple[float, Any]]) -> Any:
    """Return the sum, the terms with coefficient 1 first."""
    ordered = sorted(terms, key=lambda term: term[0] != 1.0)
    total = None
    for coefficient, term in ordered:
        product = term if coefficient == 1.0 else term * tirx.const(coefficient, "float32")
        total = product if total is None else total + product
    return total
