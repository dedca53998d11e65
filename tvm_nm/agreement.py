"""How far a network's answers are from another's, and from the truth where it is known. Needs NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.calibration import CalibrationImages

__all__ = ["Agreement", "compare_answers", "predict", "share_interval", "top1_interval"]

_NORMAL = 1.959964  # 97.5% of a normal distribution lie below
_FIVE = 5


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
    top5, dense_top5
        Shares of answers with the right class among the first five.
    lost, won
        Images that only the dense network, and that only the other one got right.
    """

    images: int
    same: float
    divergence: float
    distance: float
    top1: float | None = None
    dense_top1: float | None = None
    top5: float | None = None
    dense_top5: float | None = None
    lost: int | None = None
    won: int | None = None

    @property
    def drop(self) -> float | None:
        """Top-1 lost against the dense network, as a share; None without labels."""
        return None if self.top1 is None or self.dense_top1 is None else self.dense_top1 - self.top1

    @property
    def drop_interval(self) -> tuple[float, float] | None:
        """95% confidence interval of `drop`.

        Both networks saw the same images, so that only those count on which they differ in being right.
        """
        if self.drop is None or self.lost is None or self.won is None:
            return None
        spread = self.lost + self.won - (self.lost - self.won) ** 2 / self.images
        # Where they never differed, one more image still might have.
        half = _NORMAL * math.sqrt(max(spread, 1.0)) / self.images
        return self.drop - half, self.drop + half

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values, with 95% intervals."""
        found: dict[str, Any] = asdict(self)
        found["same_interval"] = share_interval(self.same, self.images)
        for name in ("top1", "top5"):
            if found[name] is not None:
                found[f"{name}_interval"] = share_interval(found[name], self.images)
        return {**found, "drop": self.drop, "drop_interval": self.drop_interval}


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
    picks = dense.argmax(axis=1), other.argmax(axis=1)
    first, second = _log_probabilities(dense), _log_probabilities(other)
    divergence = (np.exp(first) * (first - second)).sum(axis=1).mean()
    right = None if labels is None else (picks[0] == labels, picks[1] == labels)
    centred = first - first.mean(axis=1, keepdims=True)
    difference = second - second.mean(axis=1, keepdims=True) - centred
    scale = math.sqrt(float((centred**2).mean()))
    return Agreement(
        images=len(dense),
        same=float((picks[0] == picks[1]).mean()),
        divergence=max(0.0, float(divergence)),
        distance=math.sqrt(float((difference**2).mean())) / scale if scale else 0.0,
        top1=None if right is None else float(right[1].mean()),
        dense_top1=None if right is None else float(right[0].mean()),
        top5=None if labels is None else _top5(other, labels),
        dense_top5=None if labels is None else _top5(dense, labels),
        lost=None if right is None else int((right[0] & ~right[1]).sum()),
        won=None if right is None else int((right[1] & ~right[0]).sum()),
    )


def top1_interval(share: float, images: int) -> float:
    """Half width of the 68% confidence interval (one standard error) of a share of right answers."""
    return math.sqrt(max(share * (1 - share), 0.25 / max(images, 1)) / max(images, 1))


def share_interval(share: float, images: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson's, which holds near 0 and 1, too)."""
    square = _NORMAL**2 / images
    middle = (share + square / 2) / (1 + square)
    half = _NORMAL * math.sqrt(share * (1 - share) / images + square / (4 * images)) / (1 + square)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def _top5(answers: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    own = np.take_along_axis(answers, labels[:, None], axis=1)
    return float(((answers >= own).sum(axis=1) <= _FIVE).mean())  # equal answers count against it


def _log_probabilities(answers: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-softmax of logits; the logarithm of what already are probabilities."""
    values = answers.astype(np.float64)
    if values.min() >= 0 and np.allclose(values.sum(axis=1), 1, atol=1e-3):
        logs: NDArray[np.float64] = np.log(np.maximum(values, 1e-12))
        return logs
    shifted = values - values.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
