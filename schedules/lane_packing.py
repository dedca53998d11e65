"""From a weight tensor with zeros to the packed values and lanes of a lane-select kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.lane_conv import LaneConvKernel
from tvm_nm.schedules.packing import PackedWeights

__all__ = ["most_kept_of_a_vector", "pack_lane_conv", "random_lanes"]


def most_kept_of_a_vector(weights: npt.NDArray[np.float32], lanes: int) -> int:
    """Return the most weights that any output channel keeps of a vector of input channels, at one kernel position."""
    return int((_by_vector(weights, lanes) != 0).sum(axis=-1).max(initial=0))


def pack_lane_conv(kernel: LaneConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (OC, IC/groups, KH, KW) for `kernel`.

    Raises
    ------
    ValueError
        If an output channel keeps more of a vector of input channels than the kernel reads.
    """
    work, lanes = kernel.workload, kernel.lanes
    vectors = _by_vector(weights, lanes)
    most = int((vectors != 0).sum(axis=-1).max(initial=0))
    if most > kernel.per_vector:
        raise ValueError(f"{most} of {lanes} input channels are kept, the kernel was made for {kernel.per_vector}")
    # Kept lanes first, in order; a vector that keeps fewer goes on with dropped ones, whose weights are zero.
    order = np.argsort(vectors == 0, axis=-1, kind="stable")[..., : kernel.per_vector]
    values = np.take_along_axis(vectors, order, axis=-1).reshape(work.groups, work.out_channels_per_group, -1)
    chosen = order.astype(np.uint8).reshape(values.shape)
    return PackedWeights(_in_tiles(values, kernel), _in_tiles(chosen, kernel))


def random_lanes(kernel: LaneConvKernel, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a table of lanes like those of random weights."""
    return rng.integers(0, kernel.lanes, kernel.weight_shape, dtype=np.uint8)


def _by_vector(weights: npt.NDArray[np.float32], lanes: int) -> npt.NDArray[np.float32]:
    """Return (OC, vectors of input channels, taps, lanes), the last vector filled up with zeros."""
    out_channels, in_channels = weights.shape[:2]
    flat = weights.reshape(out_channels, in_channels, -1)
    filled = np.pad(flat, ((0, 0), (0, -in_channels % lanes), (0, 0)))
    return np.moveaxis(filled.reshape(out_channels, -1, lanes, filled.shape[2]), 2, 3)


def _in_tiles(values: npt.NDArray, kernel: LaneConvKernel) -> npt.NDArray:  # type: ignore[type-arg]
    """Split channels: (groups, channels, kept) to (groups, rows, 1, kept, vectors, lanes)."""
    groups, channels, kept = values.shape
    filled = np.pad(values, ((0, 0), (0, kernel.block_rows * kernel.block - channels), (0, 0)))
    split = filled.reshape(groups, kernel.block_rows, 1, kernel.vectors, kernel.lanes, kept)
    return np.ascontiguousarray(np.moveaxis(split, -1, 3))
