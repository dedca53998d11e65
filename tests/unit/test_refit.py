"""Least squares with a mask, against NumPy's solver on the data themselves."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_nm import refit
from tvm_nm.refit import damped, masked_least_squares, spd_inverse, unrestricted

RNG = np.random.default_rng(0)
DATA = RNG.standard_normal((24, 500)) + 0.5 * RNG.standard_normal((1, 500))
TRUE = RNG.standard_normal((10, 24))
OUTPUTS = TRUE @ DATA + 0.3 * RNG.standard_normal((10, 500))
HESSIAN = DATA @ DATA.T
TARGET = np.linalg.solve(HESSIAN, DATA @ OUTPUTS.T).T


@pytest.mark.parametrize("exact", [True, False])
def test_refit_is_what_lstsq_finds(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = RNG.random(TARGET.shape) < 0.5
    if not exact:
        monkeypatch.setattr(refit, "_MAX_EXACT", 0)
    found = masked_least_squares(TARGET, HESSIAN, mask)
    assert not found[~mask].any()
    for row, (weights, kept) in enumerate(zip(found, mask, strict=True)):
        expected = np.linalg.lstsq(DATA[kept].T, OUTPUTS[row], rcond=None)[0]
        np.testing.assert_allclose(weights[kept], expected, rtol=1e-6 if exact else 1e-3, atol=1e-8 if exact else 1e-4)


def test_rows_that_keep_nothing_or_all() -> None:
    mask = np.ones(TARGET.shape, np.bool_)
    mask[3] = False
    found = masked_least_squares(TARGET, HESSIAN, mask)
    assert not found[3].any()
    np.testing.assert_allclose(found[mask[:, 0]], TARGET[mask[:, 0]], rtol=1e-8)


def test_damping_draws_towards_the_prior_and_covers_dead_inputs() -> None:
    singular = HESSIAN.copy()
    singular[5] = singular[:, 5] = 0
    matrix, added = damped(singular, 0.01)
    prior = RNG.standard_normal(TRUE.shape)
    cross = TRUE @ singular
    found = unrestricted(cross, matrix, prior, added)
    np.testing.assert_allclose(found[:, 5], prior[:, 5], rtol=1e-9)
    strong, huge = damped(singular, 1e9)
    np.testing.assert_allclose(unrestricted(cross, strong, prior, huge), prior, rtol=1e-4)
    nothing, added = damped(np.zeros((3, 3)))
    np.testing.assert_array_equal(nothing, np.eye(3))
    assert added == 1


def test_inverse() -> None:
    np.testing.assert_allclose(spd_inverse(HESSIAN) @ HESSIAN, np.eye(24), atol=1e-9)
    with pytest.raises(np.linalg.LinAlgError):
        spd_inverse(-HESSIAN)
