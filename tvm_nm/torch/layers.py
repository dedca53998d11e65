"""Layers with weights, as ONNX has them: PyTorch's own modules with ONNX's padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tvm_nm.torch.functions import pad_pairs, same_pads

__all__ = ["Convolution1d", "Convolution2d", "make_convolution"]


class _Padded:
    """Pads by what the convolution's own symmetric padding cannot express; mixed into PyTorch's convolutions."""

    extra: Any = None
    """(begins, ends) to pad by before, "SAME_UPPER" or "SAME_LOWER", or None."""

    def _pad(self, x: Any) -> Any:
        pads = self.extra
        if isinstance(pads, str):
            pads = same_pads(x.shape[2:], self.kernel_size, self.stride, self.dilation, pads == "SAME_UPPER")  # type: ignore[attr-defined]
        return functional.pad(x, pad_pairs(pads)) if pads is not None and any(pads) else x


class Convolution1d(_Padded, nn.Conv1d):
    """ONNX's Conv over one spatial axis."""

    def forward(self, x: Any) -> Any:
        """(N, C, W) to (N, OC, W')."""
        return super().forward(self._pad(x))


class Convolution2d(_Padded, nn.Conv2d):
    """ONNX's Conv over two spatial axes."""

    def forward(self, x: Any) -> Any:
        """(N, C, H, W) to (N, OC, H', W')."""
        x = self._pad(x)
        if self.groups > 1 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            # In bfloat16 a depthwise convolution's gradients are slower than in float32, strided ones 30 times.
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(torch.bfloat16)
        return super().forward(x)


def make_convolution(
    shape: tuple[int, ...],
    groups: int,
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...] | str,
    bias: bool,
) -> Any:
    """Return a convolution without values.

    Parameters
    ----------
    shape
        Of the weight, (OC, IC / groups, *kernel) with one or two kernel axes.
    groups, strides, dilations
        As in ONNX.
    pads
        (begins, ends) or the name of an automatic padding.
    bias
        Whether it has one.
    """
    axes = len(shape) - 2
    symmetric = not isinstance(pads, str) and pads[:axes] == pads[axes:]
    made = (Convolution1d if axes == 1 else Convolution2d)(
        shape[1] * groups,
        shape[0],
        shape[2:],
        strides,
        pads[:axes] if symmetric else 0,
        dilations,
        groups,
        bias,
        device="meta",  # the values come from the file
    )
    if not symmetric:
        made.extra = pads
    return made
