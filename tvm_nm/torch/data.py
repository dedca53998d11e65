"""Batches of training images: shuffled, shifted, mirrored and zoomed, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tvm_nm.calibration import CalibrationImages
from tvm_nm.errors import CalibrationError

__all__ = ["Augmentation", "TrainingData"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How training images are varied.

    Attributes
    ----------
    shift
        Pixels by which an image is moved at most, each way; what comes in is a reflection of its border.
    flip
        Whether half of the images are mirrored.
    zoom
        Smallest share of an image's area that is shown, in (0, 1]; 1 always shows all of it.
    """

    shift: int = 0
    flip: bool = False
    zoom: float = 1.0

    def __post_init__(self) -> None:
        if self.shift < 0 or not 0 < self.zoom <= 1:
            raise ValueError(f"augmentation needs a shift of 0 or more and a zoom in (0, 1], not {self}")

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Read ``shift=4,flip,zoom=0.5``; all parts are optional, and ``none`` is none of them.

        Raises
        ------
        CalibrationError
            If a part is not understood.
        """
        values: dict[str, Any] = {}
        try:
            for part in filter(None, (piece.strip() for piece in text.split(","))):
                key, _, value = part.partition("=")
                if key == "shift":
                    values[key] = int(value)
                elif key == "zoom":
                    values[key] = float(value)
                elif part == "flip":
                    values[key] = True
                elif part != "none":
                    raise ValueError(f"unknown part {part!r}")
            return cls(**values)
        except ValueError as error:
            raise CalibrationError(f"augmentation {text!r}: {error}; write it as shift=4,flip,zoom=0.5") from error

    def __call__(self, images: Float32, random: np.random.Generator) -> Float32:
        """Return varied copies of images (N, C, H, W)."""
        count, _, height, width = images.shape
        if self.zoom < 1:
            return self._zoomed(images, random)
        mirrored = random.random((count, 1)) < 0.5 if self.flip else np.zeros((count, 1), np.bool_)
        shift = min(self.shift, height - 1, width - 1)
        if not shift and not self.flip:
            return images
        padded: Float32 = (
            np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)), mode="reflect") if shift else images
        )
        moved = random.integers(0, 2 * shift + 1, (2, count, 1))
        rows, columns = np.arange(height) + moved[0], np.arange(width) + moved[1]
        columns = np.where(mirrored, columns[:, ::-1], columns)
        # The channels come last in memory, which is how they are trained.
        found = padded[np.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        channels_first: Float32 = found.transpose(0, 3, 1, 2)
        return channels_first

    def _zoomed(self, images: Float32, random: np.random.Generator) -> Float32:
        count, _, height, width = images.shape
        scale = np.sqrt(random.uniform(self.zoom, 1, count))
        # The part that is shown stays inside the image, but for the shift.
        reach = 1 - scale + np.array([[2 * self.shift / height], [2 * self.shift / width]])
        move = random.uniform(-1, 1, (2, count)) * reach
        sign = np.where(random.random(count) < 0.5, -1.0, 1.0) if self.flip else np.ones(count)
        matrix = np.zeros((count, 2, 3), np.float32)
        matrix[:, 0, 0], matrix[:, 1, 1] = scale * sign, scale
        matrix[:, 0, 2], matrix[:, 1, 2] = move[1], move[0]
        grid = functional.affine_grid(torch.from_numpy(matrix), list(images.shape), align_corners=False)
        source = torch.from_numpy(np.ascontiguousarray(images)).contiguous(memory_format=torch.channels_last)
        found: Float32 = functional.grid_sample(source, grid, padding_mode="reflection", align_corners=False).numpy()
        return found


class TrainingData:
    """Images in batches, epoch by epoch; any step can be made again from its number.

    Parameters
    ----------
    images
        The images, with labels or without.
    batch
        Images in a batch; fewer if there are not as many.
    augmentation
        How they are varied.
    seed
        Of the order and of the variation.

    Attributes
    ----------
    steps
        Batches in an epoch; what is left over is left out.
    """

    def __init__(self, images: CalibrationImages, batch: int, augmentation: Augmentation, seed: int) -> None:
        self.images, self.augmentation, self._seed = images, augmentation, seed
        self.batch = min(batch, images.count)
        self.steps = images.count // self.batch

    def batches(self, first: int, last: int, device: Any) -> Iterator[tuple[Any, Any]]:
        """Yield inputs (N, C, H, W) and labels (N,), or None, for the steps from `first` up to `last`.

        The next batch is made by another thread meanwhile.
        """
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for step in range(first, last):
                found = (waiting or pool.submit(self._make, step)).result()
                waiting = pool.submit(self._make, step + 1) if step + 1 < last else None
                inputs, labels = found
                yield (
                    inputs.to(device, non_blocking=True, memory_format=torch.channels_last),
                    None if labels is None else labels.to(device, non_blocking=True),
                )

    def _make(self, step: int) -> tuple[Any, Any]:
        epoch, index = divmod(step, self.steps)
        order = np.random.default_rng([self._seed, epoch]).permutation(self.images.count)
        chosen = order[index * self.batch : (index + 1) * self.batch]
        random = np.random.default_rng([self._seed, epoch, index])
        inputs = torch.from_numpy(self.augmentation(self.images.take(chosen), random))
        return inputs, None if self.images.labels is None else torch.from_numpy(self.images.labels[chosen])
