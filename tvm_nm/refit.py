"""Least squares with some weights held at zero.

Everything is about one quadratic, ``(w - t) H (w - t)'``: the squared error of an output channel whose best weights, if
all may be used, are t, and whose inputs have covariance H.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.masks import BoolArray

__all__ = ["damped", "masked_least_squares", "spd_inverse", "unrestricted"]

Float64 = NDArray[np.float64]

DAMPING = 1e-2
"""Default share of the mean variance that is added to every input's: the trust in the weights as they were trained."""
_MAX_EXACT = 1536  # unknowns; larger systems with many supports are solved by conjugate gradients
_CG_STEPS = 150
_CG_TOLERANCE = 1e-5


def damped(hessian: Float64, damping: float = DAMPING) -> tuple[Float64, float]:
    """Add a multiple of the identity, so that inputs that are constant or depend on each other do no harm.

    Parameters
    ----------
    hessian
        Covariance, (K, K).
    damping
        The multiple, as a share of the mean variance.

    Returns
    -------
    A new matrix, positive definite, and the multiple in absolute terms. A Hessian of zeros becomes the identity.
    """
    mean = float(np.trace(hessian)) / len(hessian)
    added = damping * mean if mean > 0 else 1.0
    result = hessian.copy()
    result[np.diag_indices_from(result)] += added
    return result, added


def unrestricted(cross: Float64, hessian: Float64, prior: Float64, added: float) -> Float64:
    """Best weights when all may be used: ridge regression that is drawn towards the weights as they were.

    Parameters
    ----------
    cross
        Covariance of targets and columns, (R, K).
    hessian, added
        What `damped` returns.
    prior
        Weights to stay near, (R, K).

    Returns
    -------
    (R, K).
    """
    result: Float64 = np.linalg.solve(hessian, (cross + added * prior).T).T
    return result


def spd_inverse(matrix: Float64) -> Float64:
    """Inverse of a symmetric positive definite matrix, exactly symmetric.

    Raises
    ------
    numpy.linalg.LinAlgError
        If it is not positive definite.
    """
    lower = np.linalg.cholesky(matrix)
    inverse = np.linalg.inv(lower)
    result: Float64 = inverse.T @ inverse
    return result


def masked_least_squares(target: Float64, hessian: Float64, mask: BoolArray) -> Float64:
    """Minimise ``(w - t) H (w - t)'`` for each row t, over the w that are zero where the mask is False.

    Rows of equal masks share one factorisation. Rows with many different large supports are solved together by
    preconditioned conjugate gradients, to a relative residual of 1e-5.

    Parameters
    ----------
    target
        (R, K).
    hessian
        Symmetric positive definite, (K, K).
    mask
        (R, K), True where a weight may differ from zero.

    Returns
    -------
    (R, K), zero where the mask is False.
    """
    right = target @ hessian
    packed = np.packbits(mask, axis=1)
    _, first, which = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    largest = int(mask.sum(axis=1).max(initial=0))
    if len(first) > 8 and largest > _MAX_EXACT:
        return _conjugate_gradients(np.where(mask, target, 0.0), right, hessian, mask)
    result = np.zeros_like(target)
    for index, row in enumerate(first):
        support = np.flatnonzero(mask[row])
        rows = np.flatnonzero(which == index)
        if len(support):
            part = hessian[np.ix_(support, support)]
            result[np.ix_(rows, support)] = np.linalg.solve(part, right[np.ix_(rows, support)].T).T
    return result


def _conjugate_gradients(start: Float64, right: Float64, hessian: Float64, mask: BoolArray) -> Float64:
    """All rows at once: one product (R, K) x (K, K) a step, each row with step lengths of its own."""
    scale = 1.0 / np.diag(hessian)

    def dot(a: Float64, b: Float64) -> Any:
        return np.einsum("rk,rk->r", a, b)

    solution = start
    residual = (right - solution @ hessian) * mask
    goal = _CG_TOLERANCE**2 * dot(right * mask, right * mask)
    direction = residual * scale
    energy = dot(residual, direction)
    for _ in range(_CG_STEPS):
        active = dot(residual, residual) > goal
        if not active.any():
            break
        image = (direction @ hessian) * mask
        curvature = dot(direction, image)
        length = np.where(active, energy / np.where(curvature > 0, curvature, 1.0), 0.0)[:, None]
        solution = solution + length * direction
        residual = residual - length * image
        scaled = residual * scale
        new = dot(residual, scaled)
        direction = scaled + (new / np.where(energy > 0, energy, 1.0))[:, None] * direction
        energy = new
    return solution
