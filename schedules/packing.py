"""From a weight tensor with zeros to the packed values and index table that a kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_nm.schedules.conv import ConvKernel, IndexKind

__all__ = ["PackedWeights", "kept_per_block_row", "pack_conv", "random_index_table"]


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """What a kernel reads instead of the weight tensor.

    Attributes
    ----------
    values
        float32, `ConvKernel.weight_shape`.
    index
        `ConvKernel.index_shape` in `ConvKernel.index_dtype`, or None for a dense kernel.
    """

    values: npt.NDArray[np.float32]
    index: npt.NDArray[np.integer] | None

    @property
    def bytes(self) -> int:
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)


def in_block_rows(weights: npt.NDArray[np.float32], groups: int, block: int) -> npt.NDArray[np.float32]:
    """Return (groups, block rows, block, ICg, KH, KW): the last row of a group filled up with zero channels."""
    per_group = weights.shape[0] // groups
    rows = -(-per_group // block)
    filled = np.zeros((groups, rows * block, *weights.shape[1:]), np.float32)
    filled[:, :per_group] = weights.reshape(groups, per_group, *weights.shape[1:])
    return filled.reshape(groups, rows, block, *weights.shape[1:])


def _kept(rows: npt.NDArray[np.float32], index: IndexKind) -> npt.NDArray[np.bool_]:
    """Return what each block row keeps: (groups, rows, ICg) by channel, (groups, rows, ICg * KH * KW) by position."""
    any_of_block = (rows != 0).any(axis=2)
    if index is IndexKind.CHANNEL:
        return np.asarray(any_of_block.any(axis=(-2, -1)))
    return np.asarray(any_of_block.reshape(*any_of_block.shape[:2], -1))


def kept_per_block_row(
    weights: npt.NDArray[np.float32], groups: int, block: int, index: IndexKind
) -> npt.NDArray[np.int64]:
    """Count what each row of `block` output channels keeps, shape (groups, block rows).

    Parameters
    ----------
    weights
        (OC, IC/groups, KH, KW).
    index
        `CHANNEL` counts input channels with any non-zero tap, `POSITION` counts (channel, tap) pairs.
    """
    counts: npt.NDArray[np.int64] = _kept(in_block_rows(weights, groups, block), index).sum(axis=-1)
    return counts


def pack_conv(kernel: ConvKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (OC, IC/groups, KH, KW) for `kernel`.

    Block rows that keep fewer inputs than `kernel.kept` are filled up with zero weights.

    Raises
    ------
    ValueError
        If a block row keeps more than `kernel.kept`.
    """
    work = kernel.workload
    rows = in_block_rows(weights, work.groups, kernel.block)
    groups, block_rows, block, in_channels, kh, kw = rows.shape
    channels_to_fill = kernel.tiles * kernel.oc_tile - block
    if channels_to_fill:
        rows = np.pad(rows, [(0, 0), (0, 0), (0, channels_to_fill), (0, 0), (0, 0), (0, 0)])
    if kernel.index is IndexKind.NONE:
        return PackedWeights(_to_tiles(rows.reshape(*rows.shape[:3], in_channels, kh, kw), kernel), None)
    kept = _kept(rows, kernel.index)
    counts = kept.sum(axis=-1)
    if counts.max(initial=0) > kernel.kept:
        raise ValueError(f"a block row keeps {counts.max()} inputs, the kernel was made for {kernel.kept}")
    # Kept inputs first, in order; a short row goes on with dropped ones, whose weights are zero.
    order = np.argsort(~kept, axis=-1, kind="stable")[..., : kernel.kept]
    order.sort(axis=-1)
    if kernel.index is IndexKind.CHANNEL:
        values = np.take_along_axis(rows, order[:, :, None, :, None, None], axis=3)
        table = order + np.arange(groups)[:, None, None] * in_channels
    else:
        flat = rows.reshape(groups, block_rows, -1, in_channels * kh * kw)
        values = np.take_along_axis(flat, order[:, :, None, :], axis=3)
        table = _offsets(kernel)[order] + (np.arange(groups) * in_channels * kernel.channel_stride)[:, None, None]
    if table.size and table.max() > np.iinfo(kernel.index_dtype).max:
        raise ValueError(f"offset {table.max()} does not fit {kernel.index_dtype}")
    return PackedWeights(_to_tiles(values, kernel), _in_blocks(table.astype(kernel.index_dtype), kernel))


def random_index_table(kernel: ConvKernel, rng: np.random.Generator) -> npt.NDArray[np.integer] | None:
    """Return an index table as `pack_conv` makes it from weights of a random mask; None for a dense kernel."""
    if kernel.index_shape is None:
        return None
    work = kernel.workload
    channels = np.arange(work.in_channels_per_group)
    entries = channels if kernel.index is IndexKind.CHANNEL else _offsets(kernel)
    rows = [np.sort(rng.permutation(len(entries))[: kernel.kept]) for _ in range(work.groups * kernel.block_rows)]
    table = entries[np.stack(rows)].reshape(work.groups, kernel.block_rows, kernel.kept)
    step = len(channels) * (1 if kernel.index is IndexKind.CHANNEL else kernel.channel_stride)
    table = table + (np.arange(work.groups) * step)[:, None, None]
    return _in_blocks(table.astype(kernel.index_dtype), kernel)


def _in_blocks(table: npt.NDArray[np.integer], kernel: ConvKernel) -> npt.NDArray[np.integer]:
    """Split the reduction: (groups, rows, kept) to (groups, reduction blocks, rows, kept of a block)."""
    split = table.reshape(*table.shape[:2], kernel.reduction_blocks, -1)
    return np.ascontiguousarray(np.moveaxis(split, 2, 1))


def _offsets(kernel: ConvKernel) -> npt.NDArray[np.int64]:
    """Return the offset of every (input channel, ky, kx) of a group from a virtual pixel, flat."""
    work = kernel.workload
    if kernel.geometry.flat:
        return np.arange(work.in_channels_per_group)  # the kernel indexes channels of the input itself
    taps = [kernel.geometry.tap_offset(ky, kx) for ky in range(work.kernel[0]) for kx in range(work.kernel[1])]
    channels = np.arange(work.in_channels_per_group) * kernel.channel_stride
    offsets: npt.NDArray[np.int64] = (channels[:, None] + np.asarray(taps)).reshape(-1)
    return offsets


def _to_tiles(values: npt.NDArray[np.float32], kernel: ConvKernel) -> npt.NDArray[np.float32]:
    """Split both: (groups, rows, channels, reduction...) to `ConvKernel.weight_shape`."""
    groups, rows, _, kept, *taps = values.shape
    blocks = kernel.reduction_blocks
    split = values.reshape(groups, rows, kernel.tiles, kernel.oc_tile, blocks, kept // blocks, *taps)
    return np.ascontiguousarray(np.moveaxis(np.moveaxis(split, 3, -1), 3, 1))
