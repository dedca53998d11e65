"""What the kernels must compute, written as plainly as NumPy allows and in double precision."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tvm_nm.workload import ConvWorkload, Epilogue

__all__ = ["apply_epilogue", "avg_pool", "conv", "fc", "max_pool", "windows"]

Array: TypeAlias = npt.NDArray[Any]


def windows(data: Array, work: ConvWorkload, fill: float) -> Array:
    """Every pixel's window: (N, C, KH, KW, OH, OW), out-of-bounds taps filled with `fill`."""
    top, left, bottom, right = work.padding
    padded = np.pad(data, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    (sy, sx), (dy, dx) = work.stride, work.dilation
    height, width = work.out_height, work.out_width
    rows = [
        [padded[:, :, y : y + sy * height : sy, x : x + sx * width : sx][:, :, :height, :width] for x in xs]
        for y, xs in ((ky * dy, [kx * dx for kx in range(work.kernel[1])]) for ky in range(work.kernel[0]))
    ]
    return np.stack([np.stack(row, axis=2) for row in rows], axis=2)


def conv(work: ConvWorkload, data: Array, weight: Array, bias: Array, residual: Array | None = None) -> Array:
    """A convolution with its epilogue, float64."""
    taps = windows(data.astype(np.float64), work, 0.0)
    per_in, per_out = work.in_channels_per_group, work.out_channels_per_group
    groups = [
        np.einsum(
            "ncklyx,ockl->noyx",
            taps[:, g * per_in : (g + 1) * per_in],
            weight[g * per_out : (g + 1) * per_out].astype(np.float64),
            optimize=True,
        )
        for g in range(work.groups)
    ]
    sums = np.concatenate(groups, axis=1) + bias.astype(np.float64)[:, None, None]
    out = apply_epilogue(sums, work.epilogue, residual)
    pool = work.epilogue.pool
    if pool is None:
        return out
    shape = (work.batch, work.out_channels, work.out_channels, work.out_height, work.out_width)
    return max_pool(out, ConvWorkload(*shape, pool.kernel, pool.stride, pool.padding, groups=work.out_channels))


def fc(data: Array, weight: Array, bias: Array, epilogue: Epilogue, residual: Array | None = None) -> Array:
    """A fully connected layer with its epilogue, weight (OUT, IN), float64."""
    return apply_epilogue(data.astype(np.float64) @ weight.astype(np.float64).T + bias, epilogue, residual)


def apply_epilogue(sums: Array, epilogue: Epilogue, residual: Array | None) -> Array:
    """Add the residual, then clip."""
    if epilogue.residual:
        assert residual is not None
        sums = sums + residual
    return np.clip(sums, epilogue.clip_min, epilogue.clip_max) if _clips(epilogue) else sums


def _clips(epilogue: Epilogue) -> bool:
    return epilogue.clip_min is not None or epilogue.clip_max is not None


def max_pool(data: Array, work: ConvWorkload) -> Array:
    """The largest value of every window; padding never wins."""
    return windows(data, work, -np.inf).max(axis=(2, 3))


def avg_pool(
    data: Array, work: ConvWorkload, explicit_padding: tuple[int, int, int, int], *, include_pad: bool
) -> Array:
    """The mean of every window, over the taps inside the input or inside the explicitly padded input, float64."""
    top, left, bottom, right = explicit_padding if include_pad else (0, 0, 0, 0)
    ones = np.zeros((1, 1, work.height, work.width))
    ones = np.pad(ones + 1, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=1.0)
    # What the padding that `work` asks for leaves around the counted area.
    outer = tuple(max(0, have - used) for have, used in zip(work.padding, (top, left, bottom, right), strict=True))
    counted = ConvWorkload(1, 1, 1, ones.shape[2], ones.shape[3], work.kernel, work.stride, outer, work.dilation)
    count = windows(ones, counted, 0.0).sum(axis=(2, 3))
    return windows(data.astype(np.float64), work, 0.0).sum(axis=(2, 3)) / count
