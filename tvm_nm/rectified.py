"""Refit of a layer's weights to what becomes of its outputs in the ReLU that follows.

What a ReLU cuts off need not be met: where the wanted output is negative, any negative output will do. With the masks
fixed, the squared error without those differences is convex. It is minimised by majorisation: outputs that make no
difference are their own targets, which leaves least squares again (He, Zhang and Sun, "Channel Pruning for
Accelerating Very Deep Neural Networks", ICCV 2017, and Zhang et al., "Accelerating Very Deep Convolutional Networks",
TPAMI 2016, look through the ReLU so). Steps are accelerated (Nesterov) and inexact: a few conjugate gradients each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.masks import BoolArray
from tvm_nm.moments import Moments
from tvm_nm.onnx_network import LayerWeights

__all__ = ["Observed", "fit_rectified", "rectified_error"]

Float32 = NDArray[np.float32]

_STEPS = 12
_INNER = 8


@dataclass(frozen=True, slots=True)
class Observed:
    """Some positions of a layer that is followed by a ReLU or by clipping.

    Attributes
    ----------
    data
        Columns, float32 (groups, K, P).
    target
        Outputs that the layer should have, float32 (OC, P), no lower and no higher than makes a difference.
    below, above
        Where any lower, any higher output would do as well, (OC, P).
    image_data, image_target
        Means over the positions of each image that they are of, (groups, K, images) and (OC, images); here nothing is
        cut off.
    """

    data: Float32
    target: Float32
    below: BoolArray
    above: BoolArray
    image_data: Float32
    image_target: Float32

    @classmethod
    def between(
        cls,
        data: Float32,
        target: Float32,
        low: NDArray[Any],
        high: NDArray[Any],
        images: tuple[Float32, Float32] | None = None,
    ) -> Observed:
        """Make one of targets and of the limits beyond which there is no difference, which (OC, P) fits.

        Without means of images, all positions are of one image.
        """
        means = images or (data.mean(axis=2, keepdims=True), target.mean(axis=1, keepdims=True))
        within = np.clip(target, low, high).astype(np.float32, copy=False)
        return cls(data, within, target <= low, target >= high, *means)

    def common(self, weight: Float32, bias: Float32) -> Float32:
        """Return what the outputs' means over each image lack of their targets, (OC, images)."""
        return self.image_target - _outputs(weight, bias, self.image_data)

    @property
    def each(self) -> float:
        """Positions of an image."""
        return float(self.target.shape[1] / self.image_target.shape[1])

    def missing(self, weight: Float32, bias: Float32) -> Float32:
        """Return what the outputs lack of their targets, (OC, P): nothing where it makes no difference."""
        found = _outputs(weight, bias, self.data)
        np.subtract(self.target, found, out=found)
        found[self.below & (found > 0)] = 0
        found[self.above & (found < 0)] = 0
        return found


def _outputs(weight: Float32, bias: Float32, data: Float32) -> Float32:
    groups = len(data)
    found: Float32 = np.matmul(weight.reshape(groups, -1, weight.shape[1]), data).reshape(len(bias), -1)
    found += bias[:, None]
    return found


def rectified_error(parts: Sequence[Observed], weights: LayerWeights, image_weight: float = 0.0) -> float:
    """Squared error of the outputs as far as it makes a difference, per position and summed over channels.

    The square of each image's mean error counts besides, `image_weight` times.
    """
    weight, bias = weights.weight.reshape(len(weights.bias), -1), weights.bias
    squares = count = 0.0
    for part in parts:
        squares += float(np.square(part.missing(weight, bias)).sum(dtype=np.float64))
        if image_weight:
            squares += image_weight * part.each * float(np.square(part.common(weight, bias)).sum(dtype=np.float64))
        count += part.target.shape[1]
    return squares / max(1.0, count)


def fit_rectified(
    parts: Sequence[Observed],
    moments: Moments,
    weights: LayerWeights,
    mask: BoolArray,
    damping: float,
    image_weight: float = 0.0,
    steps: int = _STEPS,
) -> LayerWeights:
    """Refit the weights that are left to outputs behind a ReLU.

    Parameters
    ----------
    parts
        Positions to look at.
    moments
        Of the layer's inputs; says how to step, so that it need not be of the very same positions.
    weights
        Where to start, and what to stay near.
    mask
        Which weights are left, of the weight's shape.
    damping
        Share of the mean input variance that holds each weight to where it started.
    image_weight
        See `tvm_nm.moments.MomentsAccumulator`, whose moments should be made with the same.
    steps
        Passes over the positions.

    Returns
    -------
    New weights, zero where the mask is False; those given if they are no worse.
    """
    shape, (groups, size) = weights.weight.shape, moments.input_mean.shape
    per_group = shape[0] // groups
    count = sum(part.data.shape[2] for part in parts) * (1 + image_weight)
    keep = mask.reshape(shape[0], size)
    mean = moments.input_mean.astype(np.float32)
    hessian = moments.hessian.astype(np.float32)
    added = damping * np.trace(hessian, axis1=1, axis2=2) / size
    added[added <= 0] = 1
    hold = np.repeat(added, per_group)[:, None]
    diagonal = np.repeat(np.einsum("gkk->gk", hessian), per_group, axis=0) + hold

    def by_group(array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(groups, per_group, -1)

    def offset(weight: Float32) -> NDArray[Any]:
        product: NDArray[Any] = np.einsum("gok,gk->go", by_group(weight), mean)
        return product.reshape(-1)

    def solved(right: Float32) -> Float32:
        """Take some conjugate gradients for all output channels at once, each with step lengths of its own."""
        found = np.zeros_like(right)
        scaled = direction = right / diagonal
        energy = np.einsum("ok,ok->o", right, scaled)
        for _ in range(_INNER):
            image = np.matmul(by_group(direction), hessian).reshape(right.shape) + hold * direction
            image *= keep
            curve = np.einsum("ok,ok->o", direction, image)
            length = (energy / np.where(curve > 0, curve, 1))[:, None]
            found = found + length * direction
            right = right - length * image
            scaled = right / diagonal
            before, energy = energy, np.einsum("ok,ok->o", right, scaled)
            direction = scaled + (energy / np.where(before > 0, before, 1))[:, None] * direction
        return found

    start = weights.weight.reshape(shape[0], size)
    now = last = start
    # Centred columns keep weights and bias apart.
    level = last_level = weights.bias + offset(start)
    pace = 1.0
    for _ in range(steps):
        faster = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        momentum = np.float32((pace - 1) / faster)
        pace = faster
        ahead, level_ahead = now + momentum * (now - last), level + momentum * (level - last_level)
        last, last_level = now, level
        gradient = np.zeros_like(ahead)
        shift = np.zeros(shape[0], np.float64)
        bias = level_ahead - offset(ahead)
        for part in parts:
            missing = part.missing(ahead, bias)
            shift += missing.sum(axis=1, dtype=np.float64)
            gradient += np.matmul(by_group(missing), part.data.transpose(0, 2, 1)).reshape(gradient.shape)
            if image_weight:
                common = np.float32(image_weight * part.each) * part.common(ahead, bias)
                shift += common.sum(axis=1, dtype=np.float64)
                gradient += np.matmul(by_group(common), part.image_data.transpose(0, 2, 1)).reshape(gradient.shape)
        shift = (shift / count).astype(np.float32)
        gradient = gradient / np.float32(count) + hold * (start - ahead)
        gradient -= (by_group(shift[:, None]) * mean[:, None]).reshape(gradient.shape)
        now = ahead + solved(gradient * keep)
        level = level_ahead + shift
    found = LayerWeights(now.reshape(shape), level - offset(now))
    before, after = (rectified_error(parts, each, image_weight) for each in (weights, found))
    return found if after < before else weights
