"""The transforms of Winograd's minimal filtering F(m x m, 3 x 3), and linear combinations that share their terms.

An m x m tile of outputs is `A^T [ (G w G^T) * (B^T d B) ] A` with d the (m + 2) x (m + 2) inputs it needs, w the 3 x 3
weights and * elementwise: (m + 2)^2 multiplications for each pair of channels instead of 9 m^2. The matrices are
those of Toom and Cook for interpolation at m + 1 points and infinity (Lavin & Gray, CVPR 2016).

The points decide the rounding error (Barabasz, Anderson, Soodhalter & Gregg, ACM TOMS 2020). Here they are 0 and pairs
of opposite points, which halves the work of a transform: the terms of even and of odd degree are shared by a pair. Of
the pairs with few bits, 3/4 and 3/2 gave the least error for m = 4: 2.5e-6 of the largest output with 256
channels of normal data, against 1e-5 for the usual 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

__all__ = ["POINTS", "combine_columns", "combine_rows", "transform_matrices"]

POINTS: dict[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}
"""Interpolation points, beside infinity, of each output tile size m; after 0, opposite points follow each other."""

Matrix = npt.NDArray[np.float64]


@cache
def transform_matrices(tile: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return (A^T, G, B^T) for F(tile x tile, 3 x 3), of shapes (m, m + 2), (m + 2, 3) and (m + 2, m + 2).

    Raises
    ------
    KeyError
        If there are no points for this size.
    """
    points = np.asarray(POINTS[tile])
    size = tile + 2
    output, weight, data = np.zeros((tile, size)), np.zeros((size, 3)), np.zeros((size, size))
    for j, point in enumerate(points):
        others = np.delete(points, j)
        output[:, j] = point ** np.arange(tile)
        weight[j] = point ** np.arange(3) / np.prod(point - others)
        data[j, : size - 1] = np.poly(others)[::-1]
    output[-1, -1] = weight[-1, -1] = 1.0
    data[-1] = np.poly(points)[::-1]
    return output, weight, data


def combine_rows(matrix: Matrix, row: Any, value: Callable[[int], Any]) -> Any:
    """Return the TIR expression of `sum_k matrix[row, k] * value(k)` for a loop variable `row`.

    Rows of opposite points are written as even part plus or minus odd part, which are equal expressions: once the loop
    is unrolled, the compiler computes them once.
    """
    return _select(row, [_even_and_odd(coefficients, value) for coefficients in matrix])


def combine_columns(matrix: Matrix, row: Any, value: Callable[[int], Any]) -> Any:
    """As `combine_rows`, for a matrix whose *columns* belong to the points: pairs are combined as sum or difference."""
    return _select(row, [_paired(coefficients, value) for coefficients in matrix])


def _select(index: Any, expressions: Sequence[Any]) -> Any:
    result = expressions[-1]
    for position in range(len(expressions) - 2, -1, -1):
        result = tirx.Select(index == position, expressions[position], result)
    return result


def _even_and_odd(coefficients: npt.NDArray[np.float64], value: Callable[[int], Any]) -> Any:
    even = [(float(c), value(k)) for k, c in enumerate(coefficients) if c and k % 2 == 0]
    odd = [(float(c), value(k)) for k, c in enumerate(coefficients) if c and k % 2 == 1]
    if not even or not odd:
        return _sum(even or odd)
    # The odd part's leading coefficient is the point: without it, the part is the same for both points of a pair.
    point = odd[-1][0]
    return _sum(even) + _sum([(c / point, term) for c, term in odd]) * tirx.const(point, "float32")


def _paired(coefficients: npt.NDArray[np.float64], value: Callable[[int], Any]) -> Any:
    terms: list[tuple[float, Any]] = []
    last = len(coefficients) - 1
    if coefficients[0]:
        terms.append((float(coefficients[0]), value(0)))
    for k in range(1, last, 2):
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
