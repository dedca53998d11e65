"""Greedy removal with compensation, against doing it the slow way: refit after every candidate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_nm.obs import Units, cheapest_prefixes, remove, remove_by_columns
from tvm_nm.refit import masked_least_squares, spd_inverse


def hessian(size: int, seed: int) -> np.ndarray:
    columns = np.random.default_rng(seed).standard_normal((size, 3 * size))
    columns[1:] += 0.7 * columns[:-1]  # inputs that depend on each other: compensation matters
    return columns @ columns.T / columns.shape[1]


def error(weights: np.ndarray, target: np.ndarray, matrix: np.ndarray, importance: np.ndarray) -> float:
    change = weights - target
    return float(importance @ np.einsum("rk,kl,rl->r", change, matrix, change))


def brute_force(
    target: np.ndarray, matrix: np.ndarray, units: Units, importance: np.ndarray
) -> tuple[list[int], float]:
    """Greedy removal that refits all that is left for each candidate and takes the best."""
    left = units.quotas.copy()
    gone: list[int] = []
    loss = 0.0
    for _ in range(units.removed):
        best = (np.inf, -1)
        for unit, pool in enumerate(units.pools):
            if unit in gone or not left[pool]:
                continue
            mask = np.ones(target.shape, np.bool_)
            for other in [*gone, unit]:
                mask[:, other * units.size : (other + 1) * units.size] = False
            best = min(best, (error(masked_least_squares(target, matrix, mask), target, matrix, importance), unit))
        loss = best[0]
        gone.append(best[1])
        left[units.pools[best[1]]] -= 1
    return gone, loss


CASES = {
    "single weights": Units(1, np.zeros(12, np.intp), np.array([6])),
    "2:4": Units(1, np.arange(12) // 4, np.array([2, 2, 2])),
    "tails and positions": Units(1, np.array([0, 1] * 4 + [2, 3] * 2), np.array([3, 2, 1, 0])),
    "whole kernels": Units(3, np.zeros(4, np.intp), np.array([2])),
    "all": Units(1, np.zeros(12, np.intp), np.array([12])),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_each_step_is_the_best_one(name: str, rows: int) -> None:
    units = CASES[name]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        matrix, target = hessian(12, seed), rng.standard_normal((rows, 12))
        importance = rng.uniform(0.5, 2.0, rows)
        order, loss = brute_force(target, matrix, units, importance)
        found = remove(target[None], spd_inverse(matrix), units, importance[None])
        assert list(found.order[0]) == order
        assert found.losses.sum() == pytest.approx(loss, rel=1e-6)
        assert error(found.weights[0], target, matrix, importance) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_is_the_least_squares_fit(name: str) -> None:
    units = CASES[name]
    matrix, target = hessian(12, 5), np.random.default_rng(5).standard_normal((4, 2, 12))
    found = remove(target, spd_inverse(matrix), units)
    for block, weights in zip(target, found.weights, strict=True):
        np.testing.assert_allclose(weights, masked_least_squares(block, matrix, weights != 0), atol=1e-8)


def test_blocks_do_not_influence_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, target = hessian(16, 7), np.random.default_rng(7).standard_normal((9, 2, 16))
    units = Units(1, np.arange(16) // 4, np.full(4, 2))
    together = remove(target, spd_inverse(matrix), units)
    monkeypatch.setattr("tvm_nm.obs._CACHE", 1)
    alone = remove(target, spd_inverse(matrix), units)
    np.testing.assert_allclose(together.weights, alone.weights, atol=1e-10)
    np.testing.assert_array_equal(together.order, alone.order)


@pytest.mark.parametrize("pools", [np.zeros(40, np.intp), np.arange(40) // 4])
def test_several_at_a_step_are_compensated_exactly(pools: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, target = hessian(40, 3), np.random.default_rng(3).standard_normal((2, 4, 40))
    count = int(pools.max()) + 1
    units = Units(1, pools, np.full(count, 20 // count))
    monkeypatch.setattr("tvm_nm.obs._EXACT_UNITS", 10)
    many = remove(target, spd_inverse(matrix), units)
    monkeypatch.setattr("tvm_nm.obs._EXACT_UNITS", 1000)
    exact = remove(target, spd_inverse(matrix), units)
    for block, weights in zip(target, many.weights, strict=True):
        np.testing.assert_allclose(weights, masked_least_squares(block, matrix, weights != 0), atol=1e-8)
    importance = np.ones(4)
    for block, a, b in zip(target, many.weights, exact.weights, strict=True):
        assert error(a, block, matrix, importance) <= 1.5 * error(b, block, matrix, importance)


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(2, 12), m=st.sampled_from([2, 4]), seed=st.integers(0, 1000))
def test_block_of_columns_after_block_of_columns(groups: int, m: int, seed: int) -> None:
    size = groups * m
    matrix, target = hessian(size, seed), np.random.default_rng(seed).standard_normal((5, size))
    units = Units(1, np.arange(size) // m, np.full(groups, m // 2))
    found = remove_by_columns(target, spd_inverse(matrix), units, width=2 * m)
    kept = (found != 0).reshape(5, groups, m).sum(axis=2)
    assert (kept == m // 2).all()
    whole = remove_by_columns(target, spd_inverse(matrix), units, width=size)
    exact = remove(target[:, None], spd_inverse(matrix), units).weights[:, 0]
    np.testing.assert_allclose(whole, exact, atol=1e-8)
    one = np.ones(5)
    magnitude = np.zeros_like(target)
    order = np.abs(target).reshape(5, groups, m).argsort(axis=2)[..., m // 2 :]
    np.put_along_axis(magnitude.reshape(5, groups, m), order, 1.0, axis=2)
    assert error(found, target, matrix, one) < error(target * magnitude, target, matrix, one)


def test_the_cheapest_removals_come_first() -> None:
    losses = np.array([[1.0, 5.0, 6.0], [2.0, 2.5, 9.0], [3.0, 3.0, 3.0]])
    assert cheapest_prefixes(losses, np.ones(3), 4).tolist() == [1, 2, 1]
    # The third row has one channel where the others have two: its removals cost twice as much per channel.
    assert cheapest_prefixes(losses, np.array([2, 2, 1]), 4).tolist() == [2, 2, 0]
    assert cheapest_prefixes(losses, np.ones(3), 9).tolist() == [3, 3, 3]
