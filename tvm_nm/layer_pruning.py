"""Prunes one layer to a pattern so that its outputs stay near their targets. Needs NumPy only."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tvm_nm.masks import BoolArray, block_row_sizes, round_half_up, tail_quota
from tvm_nm.moments import Moments
from tvm_nm.obs import Units, cheapest_prefixes, remove, remove_by_columns
from tvm_nm.onnx_network import LayerWeights
from tvm_nm.patterns import NM, Dense, Granularity, OneByN, SparsityPattern, TileNM
from tvm_nm.refit import DAMPING, damped, masked_least_squares, spd_inverse, unrestricted

__all__ = ["Fit", "Method", "fit_layer", "relative_error"]

Float64 = NDArray[np.float64]

_WIDE = 1024  # columns; N:M of wider layers is chosen by blocks of columns


class Method(enum.Enum):
    """How weights are dropped.

    MAGNITUDE drops the smallest and leaves the rest as they are. LS drops the smallest and refits the rest and the bias
    by least squares, to the outputs that the dense network has, from the inputs that the pruned network gives. OBS
    chooses what to drop by what it costs after compensation, too.
    """

    MAGNITUDE = "magnitude"
    LS = "ls"
    OBS = "obs"


@dataclass(frozen=True, slots=True)
class Fit:
    """A layer's new parameters.

    Attributes
    ----------
    weights
        Weight and bias.
    mask
        Which weights are kept, of the weight's shape.
    error
        Squared error of the outputs on the calibration data, as a share of the targets' variance.
    """

    weights: LayerWeights
    mask: BoolArray
    error: float


def fit_layer(
    moments: Moments,
    weight: NDArray[np.float32],
    pattern: SparsityPattern,
    density: float,
    method: Method = Method.OBS,
    *,
    damping: float = DAMPING,
    importance: Float64 | None = None,
) -> Fit:
    """Prune a layer and refit what is left of it.

    Parameters
    ----------
    moments
        Of the layer's inputs and targets.
    weight
        Weights as they were trained, (OC, IC / groups, KH, KW).
    pattern, density
        What to prune to; `Dense` refits all weights.
    method
        How; MAGNITUDE corrects the bias, nothing else.
    damping
        See `tvm_nm.refit.damped`.
    importance
        Weight of each output channel's squared error in shared choices, (OC,); default: all the same.
    """
    shape, groups = weight.shape, len(moments.hessian)
    prior = weight.reshape(shape[0], -1).astype(np.float64)
    importance = np.ones(shape[0]) if importance is None else importance
    per_group = shape[0] // groups
    mask: BoolArray = np.ones(prior.shape, np.bool_)
    if method is not Method.OBS:
        mask = pattern.mask(np.abs(weight), density, groups).reshape(prior.shape)
    found = np.where(mask, prior, 0.0)
    if method is not Method.MAGNITUDE:
        for group in range(groups):
            rows = slice(group * per_group, (group + 1) * per_group)
            hessian, added = damped(moments.hessian[group], damping)
            target = unrestricted(moments.cross[rows], hessian, prior[rows], added)
            if isinstance(pattern, Dense):
                found[rows] = target
            elif method is Method.LS:
                found[rows] = masked_least_squares(target, hessian, mask[rows])
            else:
                mask[rows], found[rows] = _obs(target, hessian, shape, pattern, density, importance[rows])
    # float32 from here on, so that the bias makes up for its rounding, too.
    final = found.astype(np.float32)
    means = np.repeat(moments.input_mean, per_group, axis=0)
    bias = moments.target_mean - np.einsum("ok,ok->o", final.astype(np.float64), means)
    weights = LayerWeights(final.reshape(shape), bias.astype(np.float32))
    return Fit(weights, mask.reshape(shape), relative_error(moments, final))


def relative_error(moments: Moments, weight: NDArray[np.floating]) -> float:
    """Squared error of a layer with the best bias, as a share of the targets' variance.

    Parameters
    ----------
    moments
        Of the layer.
    weight
        (OC, K) or (OC, IC / groups, KH, KW).
    """
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    groups = len(moments.hessian)
    image = np.matmul(flat.reshape(groups, -1, flat.shape[1]), moments.hessian).reshape(flat.shape)
    error = moments.target_variance.sum() + np.einsum("ok,ok->", flat, image - 2 * moments.cross)
    total = float(moments.target_variance.sum())
    return max(0.0, float(error) / total) if total > 0 else 0.0


def _obs(
    target: Float64,
    hessian: Float64,
    shape: tuple[int, ...],
    pattern: SparsityPattern,
    density: float,
    importance: Float64,
) -> tuple[BoolArray, Float64]:
    """Mask and weights of one group's output channels, (OC, K)."""
    rows, size = target.shape
    inverse = spd_inverse(hessian)
    units = _units(pattern, density, shape)
    if isinstance(pattern, NM) and size > _WIDE:
        width = pattern.m * shape[2] * shape[3]
        found = remove_by_columns(target, inverse, units, width * max(1, 256 // width))
        mask = found != 0
        return mask, masked_least_squares(target, hessian, mask)
    block = pattern.block
    sizes = block_row_sizes(rows, block)
    # A short last row of blocks is filled up with channels of zeros, which cost nothing.
    missing = len(sizes) * block - rows
    padded = np.concatenate([target, np.zeros((missing, size))]).reshape(len(sizes), block, size)
    weight = np.concatenate([importance, np.ones(missing)]).reshape(len(sizes), block)
    unbalanced = isinstance(pattern, OneByN) and not pattern.balanced
    if unbalanced:
        every = Units(units.size, units.pools, np.array([len(units.pools)]))
        traced = remove(padded, inverse, every, weight)
        total = len(sizes) * len(units.pools)
        counts = cheapest_prefixes(traced.losses, sizes, total - max(1, round_half_up(density * total)))
    else:
        traced = remove(padded, inverse, units, weight)
        counts = np.full(len(sizes), units.removed)
    kept = np.ones((len(sizes), len(units.pools)), np.bool_)
    for index, count in enumerate(counts):
        kept[index, traced.order[index, :count]] = False
    mask = np.repeat(np.repeat(kept, units.size, axis=1), sizes, axis=0)
    if unbalanced:
        return mask, masked_least_squares(target, hessian, mask)
    return mask, traced.weights.reshape(-1, size)[:rows]


def _units(pattern: SparsityPattern, density: float, shape: tuple[int, ...]) -> Units:
    """Say what one row of blocks may lose. Columns are in the order (input channel, kernel position)."""
    _, inputs, height, width = shape
    area = height * width
    if isinstance(pattern, NM | TileNM):
        group = np.repeat(np.arange(inputs) // pattern.m, area)
        pools = group * area + np.tile(np.arange(area), inputs)
        whole, tail = divmod(inputs, pattern.m)
        quotas = [pattern.m - pattern.n] * whole + ([tail - tail_quota(tail, pattern.n, pattern.m)] if tail else [])
        return Units(1, pools, np.repeat(np.array(quotas, np.intp), area))
    if isinstance(pattern, OneByN):
        together = area if pattern.granularity is Granularity.KERNEL else 1
        count = inputs * area // together
        kept = max(1, round_half_up(density * count))
        return Units(together, np.zeros(count, np.intp), np.array([count - kept]))
    return Units(1, np.zeros(inputs * area, np.intp), np.array([0]))
