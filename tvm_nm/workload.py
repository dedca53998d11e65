"""What a convolution computes, independent of how: the key of every table."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

__all__ = ["ConvWorkload", "Epilogue", "MaxPool"]

_EPILOGUE = re.compile(
    r"bias(?P<add>\+add)?(?:\+(?P<relu>relu)|\+clip\((?P<low>[^,]+),(?P<high>[^)]+)\))?"
    r"(?:\+(?P<pool>max\d+x\d+(?:s\d+x\d+)?(?:p\d+(?:,\d+){3})?))?"
)
_POOL = re.compile(r"max(\d+)x(\d+)(?:s(\d+)x(\d+))?(?:p(\d+),(\d+),(\d+),(\d+))?")


@dataclass(frozen=True, slots=True)
class MaxPool:
    """Maxima of windows; padding never wins.

    Attributes
    ----------
    kernel, stride
        (vertical, horizontal).
    padding
        (top, left, bottom, right), as far as windows reach.

    Raises
    ------
    ValueError
        If sizes are not positive, or a window could lie in the padding alone.
    """

    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        if min(*self.kernel, *self.stride) < 1 or min(self.padding) < 0:
            raise ValueError(f"sizes must be positive: {self!r}")
        if any(pad >= size for pad, size in zip(self.padding, self.kernel * 2, strict=True)):
            raise ValueError(f"a window could lie in the padding alone: {self!r}")

    @property
    def is_squares(self) -> bool:
        """Whether the windows are squares of 2x2 pixels side by side; an odd last row or column is dropped."""
        return self == MaxPool()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns that are left of a map."""
        top, left, bottom, right = self.padding
        return (
            (height + top + bottom - self.kernel[0]) // self.stride[0] + 1,
            (width + left + right - self.kernel[1]) // self.stride[1] + 1,
        )

    def __str__(self) -> str:
        """Return the text form that `parse` reads, such as `max2x2` or `max3x3s2x2p1,1,1,1`."""
        stride = "" if self.stride == self.kernel else f"s{self.stride[0]}x{self.stride[1]}"
        padding = f"p{','.join(map(str, self.padding))}" if any(self.padding) else ""
        return f"max{self.kernel[0]}x{self.kernel[1]}{stride}{padding}"

    @classmethod
    def parse(cls, text: str) -> MaxPool:
        """Read the text form.

        Raises
        ------
        ValueError
            If it is none.
        """
        found = _POOL.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r:.60} is no pooling, such as 'max3x3s2x2p1,1,1,1'")
        kh, kw, sy, sx, *padding = found.groups()
        top, left, bottom, right = (int(pad or 0) for pad in padding)
        return cls((int(kh), int(kw)), (int(sy or kh), int(sx or kw)), (top, left, bottom, right))


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What is applied to a convolution's sums before they are stored, in this order.

    Attributes
    ----------
    residual
        A tensor of the output's shape is added.
    clip_min, clip_max
        Bounds of the activation, None where it has none. ReLU is `(0.0, None)`, ReLU6 `(0.0, 6.0)`.
    pool
        What is pooled and stored instead; None where all is stored.

    The bias is always there; a convolution without one adds zeros.

    Raises
    ------
    ValueError
        If a residual is added before the maxima: there is no kernel for that.
    """

    residual: bool = False
    clip_min: float | None = None
    clip_max: float | None = None
    pool: MaxPool | None = None

    def __post_init__(self) -> None:
        if self.residual and self.pool:
            raise ValueError(f"nothing takes maxima of sums with a residual: {self!r}")

    def __str__(self) -> str:
        parts = ["bias"]
        if self.residual:
            parts.append("add")
        if self.clip_min == 0.0 and self.clip_max is None:
            parts.append("relu")
        elif self.clip_min is not None or self.clip_max is not None:
            parts.append(f"clip({self.clip_min},{self.clip_max})")
        if self.pool:
            parts.append(str(self.pool))
        return "+".join(parts)

    @classmethod
    def parse(cls, text: str) -> Epilogue:
        """Read the text form.

        Raises
        ------
        ValueError
            If it is none.
        """
        found = _EPILOGUE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r:.60} is no epilogue, such as 'bias+add+relu'")
        add, pool = bool(found["add"]), MaxPool.parse(found["pool"]) if found["pool"] else None
        if found["relu"]:
            return cls(add, 0.0, pool=pool)
        low, high = (None if found[name] in (None, "None") else float(found[name]) for name in ("low", "high"))
        return cls(add, low, high, pool)


@dataclass(frozen=True, slots=True)
class ConvWorkload:
    """A float32 NCHW convolution with static shapes; 1-D convolutions have `height` 1.

    What is named after its output is before any maxima of the epilogue; `stored_shape` is what these leave.

    Attributes
    ----------
    batch, in_channels, out_channels, height, width
        Logical sizes; height and width are the input's.
    kernel, stride, dilation
        (vertical, horizontal).
    padding
        (top, left, bottom, right), in pixels of zeros.
    groups
        Divides both channel counts.

    Raises
    ------
    ValueError
        If sizes are not positive, groups do not divide the channels or the output would be empty.
    """

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        positive = (self.batch, self.in_channels, self.out_channels, self.height, self.width, self.groups)
        if min(*positive, *self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise ValueError(f"sizes must be positive: {self!r}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"{self.groups} groups do not divide {self.in_channels} input and {self.out_channels} output channels"
            )
        if self.out_height < 1 or self.out_width < 1:
            raise ValueError(f"the kernel is larger than the padded input: {self!r}")
        if min(self.stored_shape) < 1:
            raise ValueError(f"nothing is left of an output that is smaller than the pooling's window: {self!r}")

    @property
    def out_height(self) -> int:
        top, _, bottom, _ = self.padding
        return (self.height + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        _, left, _, right = self.padding
        return (self.width + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (self.batch, self.in_channels, self.height, self.width)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, OC, OH, OW)."""
        return (self.batch, self.out_channels, self.out_height, self.out_width)

    @property
    def stored_shape(self) -> tuple[int, int, int, int]:
        """(N, OC, height, width) of what the epilogue leaves of the output."""
        size, pool = (self.out_height, self.out_width), self.epilogue.pool
        return (self.batch, self.out_channels, *(size if pool is None else pool.output_size(*size)))

    @property
    def unpooled(self) -> ConvWorkload:
        """The same without the maxima of its epilogue."""
        return self.pooled(None)

    def pooled(self, pool: MaxPool | None) -> ConvWorkload:
        """Return the same with these maxima at the end of its epilogue."""
        return replace(self, epilogue=replace(self.epilogue, pool=pool))

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns of the padded input that the windows reach."""
        height, width = (
            (out - 1) * stride + (size - 1) * dilation + 1
            for out, stride, size, dilation in zip(
                (self.out_height, self.out_width), self.stride, self.kernel, self.dilation, strict=True
            )
        )
        return height, width

    @property
    def out_pixels(self) -> int:
        """Output pixels of one channel."""
        return self.out_height * self.out_width

    @property
    def taps(self) -> int:
        """Kernel positions: KH * KW."""
        return self.kernel[0] * self.kernel[1]

    @property
    def in_channels_per_group(self) -> int:
        return self.in_channels // self.groups

    @property
    def out_channels_per_group(self) -> int:
        return self.out_channels // self.groups

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.in_channels_per_group == 1

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution that reads every input pixel once: stride 1, no padding."""
        return self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0, 0, 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense convolution."""
        return self.batch * self.out_pixels * self.out_channels * self.in_channels_per_group * self.taps

    def __str__(self) -> str:
        kh, kw = self.kernel
        text = f"{self.in_channels}->{self.out_channels} {self.out_height}x{self.out_width} k{kh}x{kw}"
        if self.batch != 1:
            text = f"n{self.batch} {text}"
        if self.stride != (1, 1):
            text += f" s{self.stride[0]}x{self.stride[1]}"
        if self.dilation != (1, 1):
            text += f" d{self.dilation[0]}x{self.dilation[1]}"
        if self.groups != 1:
            text += f" g{self.groups}"
        return text
