"""How pixels become a network's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.errors import CalibrationError

__all__ = ["Preprocessing", "centre_crop", "usual_resize"]

Float32 = NDArray[np.float32]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pixels become a network's input: ``(pixel * scale - mean) / std`` for each channel.

    The shorter side of a picture is resized to `resize` pixels (bicubic), then its centre is cropped to the size that
    the network wants. Pixels that come in arrays are only cropped.

    Attributes
    ----------
    resize
        Pixels of the shorter side; 0 takes 256/224 of the crop, as is usual for ImageNet. Sizes up to 64 are not
        enlarged before cropping.
    mean, std
        By channel, or one for all; of ImageNet by default.
    scale
        1/255 by default.
    bgr
        Whether the network wants blue first.
    """

    resize: int = 0
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    scale: float = 1 / 255
    bgr: bool = False

    def __post_init__(self) -> None:
        if self.resize < 0 or not self.mean or not self.std or min(self.std) <= 0 or self.scale <= 0:
            raise ValueError(f"preprocessing needs a size, positive deviations and a positive scale, not {self}")

    @classmethod
    def parse(cls, text: str) -> Preprocessing:
        """Read ``resize=256,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,scale=255,order=bgr``; all parts are optional.

        ``scale`` is what pixels are divided by.

        Raises
        ------
        CalibrationError
            If a part is not understood.
        """
        values: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            key, _, value = part.partition("=")
            try:
                if key == "resize":
                    values[key] = int(value)
                elif key in ("mean", "std"):
                    values[key] = tuple(float(number) for number in value.split("/"))
                elif key == "scale":
                    values[key] = 1 / float(value)
                elif key == "order" and value in ("rgb", "bgr"):
                    values["bgr"] = value == "bgr"
                else:
                    raise ValueError(f"unknown part {part!r}")
            except (ValueError, ZeroDivisionError) as error:
                raise CalibrationError(
                    f"preprocessing {text!r}: {error}; write it as resize=256,mean=0.485/0.456/0.406,"
                    "std=0.229/0.224/0.225,scale=255,order=rgb"
                ) from error
        try:
            return cls(**values)
        except ValueError as error:
            raise CalibrationError(str(error)) from error

    def normalise(self, pixels: NDArray[Any]) -> Float32:
        """Turn pixels (N, H, W, C), RGB, into float32 (N, C, H, W)."""
        channels = pixels.shape[3]
        mean, std = (_by_channel(values, channels) for values in (self.mean, self.std))
        ordered = pixels[..., ::-1] if self.bgr else pixels
        scaled = (ordered.astype(np.float32) * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def centre_crop(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Return the centres of pixels (N, H, W, ...); raises CalibrationError if they are smaller."""
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    if top < 0 or left < 0:
        raise CalibrationError(f"images of {pixels.shape[1:3]} pixels are smaller than the model's {(height, width)}")
    return pixels[:, top : top + height, left : left + width]


def usual_resize(crop: int) -> int:
    """Return what the shorter side is resized to before a crop, as is usual for ImageNet; small sizes stay."""
    return crop if crop <= 64 else round(crop * 256 / 224)


def _by_channel(values: Sequence[float], channels: int) -> Float32:
    if len(values) not in (1, channels):
        # Grey pictures for a network that was given the three values of colour ones.
        if channels != 1:
            raise CalibrationError(f"{len(values)} means or deviations do not fit images of {channels} channels")
        values = [sum(values) / len(values)]
    return np.asarray(values, np.float32)
