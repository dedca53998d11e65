"""Second moments of a layer's inputs and of the outputs that it should have: all that least squares needs to know.

The Hessian of a layer's squared output error is the covariance of its input columns (im2col), the same for all output
channels of a group. It is accumulated in float64 from float32 products of short chunks, batch by batch, so that memory
depends neither on the number of images nor on their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.onnx_network import LayerNode
from tvm_nm.onnx_segment import FloatArray

__all__ = ["Moments", "MomentsAccumulator", "columns", "paired_columns"]

Float64 = NDArray[np.float64]

_CHUNK = 8192  # positions per float32 product: summing that many loses about 1e-6, and the operands stay in cache


@dataclass(frozen=True, slots=True)
class Moments:
    """What a layer saw. K = IC / groups * KH * KW columns in the order (input channel, row, column of the kernel).

    Attributes
    ----------
    count
        Output positions that were looked at, over all images.
    input_mean
        (groups, K).
    hessian
        Covariance of the columns, (groups, K, K); in it, in `cross` and in `target_variance` the means of images may
        count besides, see `MomentsAccumulator`.
    target_mean
        (OC,), of the outputs that the layer should have.
    cross
        Covariance of targets with the columns of their group, (OC, K).
    target_variance
        (OC,).
    """

    count: int
    input_mean: Float64
    hessian: Float64
    target_mean: Float64
    cross: Float64
    target_variance: Float64


class MomentsAccumulator:
    """Sums up moments over batches.

    Parameters
    ----------
    layer
        The layer.
    rows
        Share of the output rows that are looked at, in (0, 1]; chosen anew for each batch.
    seed
        Of that choice.
    image_weight
        How much an image's mean over its positions counts, as a multiple of what its positions count together. What
        errors have in common over an image does not average out in the layers and poolings that follow.
    """

    def __init__(self, layer: LayerNode, rows: float = 1.0, seed: int = 0, image_weight: float = 0.0) -> None:
        self._layer = layer
        self._image_weight = image_weight if layer.kind == "conv" else 0.0
        self._share = rows
        self._rng = np.random.default_rng(seed)
        outputs, inputs, height, width = layer.weight_shape
        size = inputs * height * width
        groups = layer.groups
        self._count = 0
        self._shift_x: NDArray[np.float32] | None = None
        self._shift_y: NDArray[np.float32] | None = None
        self._x = np.zeros((groups, size))
        self._xx = np.zeros((groups, size, size))
        self._y = np.zeros(outputs)
        self._yx = np.zeros((outputs, size))
        self._yy = np.zeros(outputs)

    def add(self, data: FloatArray, target: FloatArray) -> None:
        """Take a batch into account.

        Parameters
        ----------
        data
            The layer's input, float32 (N, C, H, W), (N, C, W) or (..., K).
        target
            Outputs that it should have for it.
        """
        for x, y, images in paired_columns(self._layer, data, target, self._share, self._rng):
            self.add_columns(x, y, images)

    def add_columns(self, x: FloatArray, y: FloatArray, images: int = 1) -> None:
        """Take columns (groups, K, P) and the outputs wanted of them (OC, P) into account.

        With positions of several images, those of each image are to stand together.
        """
        groups = self._layer.groups
        if self._shift_x is None or self._shift_y is None:
            # Sums of squares lose digits where the mean is large, so a first guess of it is taken off.
            self._shift_x = x.mean(axis=2, keepdims=True)
            self._shift_y = y.mean(axis=1, keepdims=True)
        x = x - self._shift_x
        y = y - self._shift_y
        self._count += x.shape[2]
        self._x += x.sum(axis=2, dtype=np.float64)
        self._y += y.sum(axis=1, dtype=np.float64)
        self._yy += np.einsum("op,op->o", y, y)
        by_group = y.reshape(groups, -1, y.shape[1])
        cross = self._yx.reshape(groups, -1, self._yx.shape[1])
        for group in range(groups):
            self._xx[group] += x[group] @ x[group].T
            cross[group] += by_group[group] @ x[group].T
        if self._image_weight:
            each = x.shape[2] // images
            weight = self._image_weight * each
            x, y = x.reshape(*x.shape[:2], images, each).mean(axis=3), y.reshape(len(y), images, each).mean(axis=2)
            self._yy += np.einsum("op,op->o", y, y) * weight
            by_group = y.reshape(groups, -1, y.shape[1])
            for group in range(groups):
                self._xx[group] += x[group] @ x[group].T * weight
                cross[group] += by_group[group] @ x[group].T * weight

    def result(self) -> Moments:
        """Return the moments of all batches so far.

        Raises
        ------
        ValueError
            If there was none.
        """
        if self._shift_x is None or self._shift_y is None:
            raise ValueError(f"layer {self._layer.name!r} has seen no data")
        count, groups = self._count, self._layer.groups
        x, y = self._x / count, self._y / count
        weight = count * (1 + self._image_weight)
        hessian = self._xx / weight - x[:, :, None] * x[:, None, :]
        by_group = (self._yx / weight).reshape(groups, -1, x.shape[1])
        cross = (by_group - y.reshape(groups, -1, 1) * x[:, None, :]).reshape(self._yx.shape)
        return Moments(
            count,
            x + self._shift_x[:, :, 0],
            hessian,
            y + self._shift_y[:, 0],
            cross,
            np.maximum(self._yy / weight - y * y, 0),
        )


def columns(layer: LayerNode, data: FloatArray, rows: NDArray[np.intp] | None = None) -> FloatArray:
    """Lay out a convolution's input so that it becomes a matrix product (im2col).

    Parameters
    ----------
    layer
        The convolution.
    data
        (N, C, H, W).
    rows
        Output rows to look at; default: all.

    Returns
    -------
    (groups, K, N * rows * OW): for each output position the inputs that it reads, zeros for padding.
    """
    batch, channels, height, width = data.shape
    _, inputs, kernel_h, kernel_w = layer.weight_shape
    top, left, bottom, right = layer.pads(height, width)
    (step_h, step_w), (dilation_h, dilation_w) = layer.strides, layer.dilation
    out_h = (height + top + bottom - (kernel_h - 1) * dilation_h - 1) // step_h + 1
    out_w = (width + left + right - (kernel_w - 1) * dilation_w - 1) // step_w + 1
    rows = np.arange(out_h) if rows is None else rows
    # Channels first: each kernel position is then copied in runs along the width.
    padded = np.zeros((channels, batch, height + top + bottom, width + left + right), data.dtype)
    padded[:, :, top : top + height, left : left + width] = data.transpose(1, 0, 2, 3)
    found = np.empty((channels, kernel_h, kernel_w, batch, len(rows), out_w), data.dtype)
    whole = len(rows) == out_h
    for row in range(kernel_h):
        first = row * dilation_h
        taken: Any = slice(first, first + (out_h - 1) * step_h + 1, step_h) if whole else rows * step_h + first
        for column in range(kernel_w):
            start = column * dilation_w
            found[:, row, column] = padded[:, :, taken, start : start + (out_w - 1) * step_w + 1 : step_w]
    return found.reshape(layer.groups, inputs * kernel_h * kernel_w, -1)


def paired_columns(
    layer: LayerNode, data: FloatArray, target: FloatArray, share: float, rng: np.random.Generator
) -> Iterator[tuple[FloatArray, FloatArray, int]]:
    """Lay out a batch's inputs and outputs in pieces of about 8192 positions.

    Parameters
    ----------
    layer
        The layer.
    data, target
        Its input, and outputs of any number of channels, as for `MomentsAccumulator.add`.
    share, rng
        Share of the output rows to look at, and what chooses them.

    Yields
    ------
    Columns (groups, K, P), outputs (channels, P) and the number of images that these are of, one after the other.
    """
    if layer.kind == "fc":
        x = data.reshape(-1, data.shape[-1]).T[None]
        y = target.reshape(-1, target.shape[-1]).T
        for start in range(0, x.shape[2], _CHUNK):
            yield x[:, :, start : start + _CHUNK], y[:, start : start + _CHUNK], 1
        return
    if layer.rank == 3:
        data, target = data[:, :, None], target[:, :, None]
    batch, channels, out_h, out_w = target.shape
    count = max(1, round(share * out_h))
    rows = None if count >= out_h else np.sort(rng.choice(out_h, count, replace=False))
    step = max(1, _CHUNK // (count * out_w))
    for start in range(0, batch, step):
        part = target[start : start + step]
        part = part if rows is None else part[:, :, rows]
        x = columns(layer, data[start : start + step], rows)
        yield x, part.transpose(1, 0, 2, 3).reshape(channels, -1), len(part)
