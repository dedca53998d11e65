"""The chain family: a convolution, the depthwise convolution after it and the pointwise one after that in one function.

An inverted residual block (Sandler et al., MobileNetV2, CVPR 2018) widens a map 6 times, filters each channel and
narrows it again. Layer by layer, the wide tensors are written to memory and read back: at 112x112 pixels they are
larger than L2, and the kernels wait for them most of the time. Here a task computes a band of output rows, a few
channels of the wide tensor at a time, which stay in L1 and L2.

Vectors run over channels everywhere, in *blocked* tensors (N, C / lanes, H, W, lanes): depthwise sums of any width and
stride are whole vectors then, and what one layer stores the next reads by broadcasts. See `chain_code` for the loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm_nm.workload import ConvWorkload

__all__ = ["KEEP_ALL", "ChainKernel", "Mixing", "blocked_shape", "chain_applies"]

_MOST_TAPS = 49


@dataclass(frozen=True, slots=True)
class Mixing:
    """How a layer that mixes channels is computed.

    Attributes
    ----------
    vectors
        Vectors of output channels of the register tile.
    kept
        Input channels that a block row keeps; 0 for all, without an index table.
    block
        Output channels that share their kept inputs; 0 where all do.
    """

    vectors: int
    kept: int = 0
    block: int = 0


KEEP_ALL = Mixing(0)
"""What a layer without an index table keeps, before a register tile is chosen."""


@dataclass(frozen=True, slots=True)
class ChainKernel:
    """A kernel variant of a chain.

    Attributes
    ----------
    first
        The convolution that computes the depthwise one's input: pointwise, or any other without groups.
    depthwise
        The depthwise convolution.
    last
        The pointwise convolution of its output; None where the chain has two layers.
    lanes
        float32 elements of a vector.
    registers
        Vector registers.
    rows
        Output rows of a band.
    staged
        All of the depthwise output is computed before the last layer begins: small maps, whose tasks are then vectors
        of channels. Otherwise a band goes through all three layers in one task.
    mixing, last_mixing
        Register tiles and sparsity of the first and the last layer.
    blocked_input
        The input is blocked already; else it is (N, C, H, W). The output, and a residual, always are blocked.
    shares
        Parts of the hidden channels, each of which a task takes through all three layers: it sums what its channels
        add to every output of its band, and the sums of all shares are added afterwards. 1 where a task has all hidden
        channels; else there are three layers, and the chain is not staged.
    """

    first: ConvWorkload
    depthwise: ConvWorkload
    last: ConvWorkload | None
    lanes: int
    registers: int
    rows: int
    staged: bool
    mixing: Mixing
    last_mixing: Mixing
    blocked_input: bool = False
    shares: int = 1

    @property
    def hidden(self) -> int:
        """Channels of the depthwise convolution."""
        return self.depthwise.in_channels

    @property
    def hidden_vectors(self) -> int:
        return -(-self.hidden // self.lanes)

    @property
    def share_groups(self) -> int:
        """Groups of `mixing.vectors` vectors of hidden channels of each share; the last one may have fewer."""
        return -(-self.hidden_groups // self.shares)

    @property
    def hidden_groups(self) -> int:
        """Register tiles' worth of hidden channels."""
        return -(-self.hidden_vectors // self.mixing.vectors)

    @property
    def share_channels(self) -> tuple[int, ...]:
        """The first hidden channel of each share, and the end of the last one."""
        step = self.share_groups * self.mixing.vectors * self.lanes
        return (*(step * share for share in range(self.shares)), self.hidden)

    @property
    def output(self) -> ConvWorkload:
        """The workload whose output the chain stores."""
        return self.depthwise if self.last is None else self.last

    @property
    def out_vectors(self) -> int:
        return -(-self.output.out_channels // self.lanes)

    @property
    def bands(self) -> int:
        return -(-self.depthwise.out_height // self.rows)

    @property
    def cut(self) -> tuple[int, int]:
        """Rows of a band and shares of the hidden channels."""
        return self.rows, self.shares

    @property
    def in_rows(self) -> int:
        """Rows of the depthwise input that a band reads, padding included."""
        return (self.rows - 1) * self.depthwise.stride[0] + self.depthwise.kernel[0]

    @property
    def pitch(self) -> int:
        """Pixels of a padded row of the depthwise input."""
        return self.depthwise.width + self.depthwise.padding[1] + self.depthwise.padding[3]

    @property
    def hidden_plane(self) -> int:
        """Elements from one vector of channels to the next of the depthwise output's scratch."""
        rows = self.depthwise.out_height if self.staged else self.rows
        return rows * self.depthwise.out_width * self.lanes

    def pixels(self, vectors: int) -> int:
        """Return the most pixels of a register tile of so many vectors that mixes channels.

        Beside the sums, the weights of a step and an input are in registers.
        """
        return min(self.registers - 4, self.registers - 1 - vectors) // vectors

    @property
    def depthwise_pixels(self) -> int:
        """Most pixels of a register tile of the depthwise layer: its weights lie in registers where they fit."""
        return self.registers * 7 // 16 if self.depthwise.taps < self.registers // 2 else self.registers // 2

    @property
    def macs(self) -> int:
        """Multiply-accumulates on kept weights of all layers."""
        return sum(layer_macs for layer_macs in self.layer_macs)

    @property
    def layer_macs(self) -> tuple[int, ...]:
        """Multiply-accumulates on kept weights, layer by layer."""
        found = [_kept_macs(self.first, self.mixing), self.depthwise.macs]
        return (*found, _kept_macs(self.last, self.last_mixing)) if self.last is not None else tuple(found)

    def __str__(self) -> str:
        tiles = [self.mixing.vectors] + ([self.last_mixing.vectors] if self.last is not None else [])
        text = f"chain {'/'.join(map(str, tiles))} {'staged' if self.staged else 'band'} {self.rows}"
        return text if self.shares == 1 else f"{text}, {self.shares} shares"


def _kept_macs(work: ConvWorkload, mixing: Mixing) -> int:
    return work.macs * mixing.kept // work.in_channels if mixing.kept else work.macs


def blocked_shape(shape: tuple[int, ...], lanes: int) -> tuple[int, int, int, int, int]:
    """Return the blocked shape of a tensor (N, C, H, W); what fills up the last vector of channels is zero."""
    batch, channels, height, width = shape
    return batch, -(-channels // lanes), height, width, lanes


def chain_applies(first: ConvWorkload, depthwise: ConvWorkload, last: ConvWorkload | None) -> bool:
    """Whether layers that follow each other, with no other use of what is between them, are a chain."""
    shapes = (first.out_channels, first.out_height, first.out_width)
    plain = first.dilation == depthwise.dilation == (1, 1)
    plain = plain and all(work is None or work.epilogue.pool is None for work in (first, depthwise, last))
    return (
        plain
        and first.groups == 1
        and not first.epilogue.residual
        and math.prod(first.kernel) <= _MOST_TAPS
        and depthwise.groups == depthwise.in_channels == depthwise.out_channels > 1
        and not depthwise.epilogue.residual
        and depthwise.taps <= _MOST_TAPS
        and _pads_within(first)
        and _pads_within(depthwise)
        and shapes == (depthwise.in_channels, depthwise.height, depthwise.width)
        and (last is None or (last.is_pointwise and last.groups == 1 and last.in_channels == depthwise.out_channels))
    )


def _pads_within(work: ConvWorkload) -> bool:
    """Whether every window reads some of the input in each direction."""
    return all(pad < size for pad, size in zip(work.padding, work.kernel * 2, strict=True))
