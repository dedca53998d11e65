"""How far a network's answers are from another's, and from the truth where it is known. Needs NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.calibration import CalibrationImages

__all__ = ["Agreement", "compare_answers", "predict", "top1_interval"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """A network's answers beside those of the dense network.

    Attributes
    ----------
    images
        Number of images.
    same
        Share of images for which both prefer the same class.
    divergence
        Mean Kullback-Leibler divergence of the answers from the dense ones, in nats.
    distance
        Root mean square difference of the centred logits, as a share of their own root mean square.
    top1, dense_top1
        Shares of right answers, or None without labels.
    """

    images: int
    same: float
    divergence: float
    distance: float
    top1: float | None = None
    dense_top1: float | None = None


def predict(
    run: Callable[[NDArray[np.float32]], NDArray[Any]], images: CalibrationImages, batch: int = 64
) -> NDArray[np.float64]:
    """Return the answers for all images, (N, classes); answers with more axes are flattened."""
    found = [run(part) for part in images.batches(batch)]
    return np.concatenate([part.reshape(len(part), -1) for part in found]).astype(np.float64)


def compare_answers(
    dense: NDArray[np.floating], other: NDArray[np.floating], labels: NDArray[np.int64] | None = None
) -> Agreement:
    """Compare two networks' answers for the same images.

    Parameters
    ----------
    dense, other
        Logits or probabilities, (N, classes).
    labels
        Classes, (N,).

    Raises
    ------
    ValueError
        If the shapes differ or there are no images.
    """
    if dense.shape != other.shape or dense.ndim != 2 or not dense.size:
        raise ValueError(f"answers of shapes {dense.shape} and {other.shape} cannot be compared")
    first, second = _log_probabilities(dense), _log_probabilities(other)
    divergence = (np.exp(first) * (first - second)).sum(axis=1).mean()
    centred = first - first.mean(axis=1, keepdims=True)
    difference = second - second.mean(axis=1, keepdims=True) - centred
    scale = math.sqrt(float((centred**2).mean()))
    picks = dense.argmax(axis=1), other.argmax(axis=1)
    return Agreement(
        images=len(dense),
        same=float((picks[0] == picks[1]).mean()),
        divergence=max(0.0, float(divergence)),
        distance=math.sqrt(float((difference**2).mean())) / scale if scale else 0.0,
        top1=None if labels is None else float((picks[1] == labels).mean()),
        dense_top1=None if labels is None else float((picks[0] == labels).mean()),
    )


def top1_interval(share: float, images: int) -> float:
    """Half width of the 68% confidence interval (one standard error) of a share of right answers."""
    return math.sqrt(max(share * (1 - share), 0.25 / max(images, 1)) / max(images, 1))


def _log_probabilities(answers: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-softmax of logits; the logarithm of what already are probabilities."""
    values = answers.astype(np.float64)
    if values.min() >= 0 and np.allclose(values.sum(axis=1), 1, atol=1e-3):
        logs: NDArray[np.float64] = np.log(np.maximum(values, 1e-12))
        return logs
    shifted = values - values.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
