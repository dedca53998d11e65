"""From a weight tensor with zeros to the packed values and index table of a channel-vector kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.channel_conv import ChannelConvKernel
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.packing import PackedWeights, in_block_rows

__all__ = ["pack_channel_conv", "random_positions"]


def pack_channel_conv(kernel: ChannelConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (OC, IC/groups, KH, KW) for `kernel`.

    Block rows that keep fewer inputs than `kernel.kept` are filled up with zero weights.

    Raises
    ------
    ValueError
        If a block row keeps more than `kernel.kept`, or an offset does not fit the table's type.
    """
    work = kernel.workload
    rows = in_block_rows(weights, work.groups, kernel.block)
    groups, block_rows, block = rows.shape[:3]
    values = rows.reshape(groups, block_rows, block, -1)
    offsets = _offsets(kernel)
    if kernel.index is IndexKind.NONE:
        return PackedWeights(_in_tiles(values, kernel), _table(offsets[:, None, :], kernel))
    kept = (values != 0).any(axis=2)
    counts = kept.sum(axis=-1)
    if counts.max(initial=0) > kernel.kept:
        raise ValueError(f"a block row keeps {counts.max()} inputs, the kernel was made for {kernel.kept}")
    # Kept inputs first, in order; a short row goes on with dropped ones, whose weights are zero.
    order = np.argsort(~kept, axis=-1, kind="stable")[..., : kernel.kept]
    order.sort(axis=-1)
    values = np.take_along_axis(values, order[:, :, None, :], axis=3)
    table = np.take_along_axis(np.broadcast_to(offsets[:, None, :], kept.shape), order, axis=-1)
    return PackedWeights(_in_tiles(values, kernel), _table(table, kernel))


def random_positions(kernel: ChannelConvKernel, rng: np.random.Generator) -> npt.NDArray[np.integer] | None:
    """Return an index table as `pack_channel_conv` makes it from weights of a random mask; None without a table."""
    if kernel.index_shape is None:
        return None
    offsets = _offsets(kernel)
    if kernel.index is IndexKind.NONE:
        return _table(offsets[:, None, :], kernel)
    rows = [
        [of_group[np.sort(rng.permutation(len(of_group))[: kernel.kept])] for _ in range(kernel.block_rows)]
        for of_group in offsets
    ]
    return _table(np.array(rows), kernel)


def _offsets(kernel: ChannelConvKernel) -> npt.NDArray[np.int64]:
    """Return where each group finds its (input channel, ky, kx): channels of a 1x1 convolution, offsets of others."""
    work = kernel.workload
    channels = np.arange(work.in_channels).reshape(work.groups, -1)
    if work.taps == 1:
        return channels
    taps = [kernel.tap_offset(ky, kx) for ky in range(work.kernel[0]) for kx in range(work.kernel[1])]
    offsets: npt.NDArray[np.int64] = (channels[..., None] * kernel.channel_stride + np.asarray(taps)).reshape(
        work.groups, -1
    )
    return offsets


def _table(table: npt.NDArray[np.int64], kernel: ChannelConvKernel) -> npt.NDArray[np.integer] | None:
    if kernel.index_shape is None:
        return None
    if table.max() > np.iinfo(kernel.index_dtype).max:
        raise ValueError(f"offset {table.max()} does not fit {kernel.index_dtype}")
    return table.astype(kernel.index_dtype)


def _in_tiles(values: npt.NDArray[np.float32], kernel: ChannelConvKernel) -> npt.NDArray[np.float32]:
    """Split channels: (groups, rows, channels, kept) to (groups, rows, tiles, kept, vectors, lanes)."""
    groups, block_rows = values.shape[:2]
    split = values.reshape(groups, block_rows, kernel.tiles, kernel.vectors, kernel.lanes, kernel.kept)
    return np.ascontiguousarray(np.moveaxis(split, -1, 3))
