"""Images to calibrate and to judge a network with: from arrays, from a folder, or those that come with the package.

They are read batch by batch and need no labels. Whatever they come from, the network sees float32 (N, C, H, W).
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.errors import CalibrationError
from tvm_nm.preprocessing import Preprocessing, centre_crop, usual_resize

__all__ = [
    "DEFAULT_IMAGES",
    "ArrayImages",
    "CalibrationImages",
    "FolderImages",
    "batch_size",
    "embedded_images",
    "open_images",
]

Float32 = NDArray[np.float32]

DEFAULT_IMAGES = 1024
"""Images that are used of a larger set unless told otherwise."""
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
_IMAGE_KEYS = ("images", "x", "data", "input", "inputs", "calibration_images")
_LABEL_KEYS = ("labels", "y", "label", "targets")


class CalibrationImages(ABC):
    """A set of images that can be read again and again in batches.

    Attributes
    ----------
    count
        Number of images.
    labels
        Their classes, int64 (count,), or None.
    """

    count: int
    labels: NDArray[np.int64] | None = None

    @abstractmethod
    def batches(self, size: int) -> Iterator[Float32]:
        """Yield the images in order, float32 (up to size, C, H, W)."""

    @abstractmethod
    def take(self, indices: NDArray[np.intp]) -> Float32:
        """Return some of the images, float32 (len(indices), C, H, W)."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all that the network will see."""


class ArrayImages(CalibrationImages):
    """Images from an array, which may be a memory map.

    Parameters
    ----------
    images
        Floats (N, C, H, W) are used as they are; uint8 (N, H, W, 3), (N, H, W, 1), (N, H, W) or (N, C, H, W) are
        preprocessed.
    labels
        Classes.
    limit
        Images to use; of more, as many at equal distances.
    shape
        (C, H, W) that the network wants; None leaves it open.
    preprocessing
        For uint8.
    source
        What to call it in error messages.

    Raises
    ------
    CalibrationError
        If the shapes or types do not fit.
    """

    def __init__(
        self,
        images: NDArray[Any],
        labels: NDArray[Any] | None = None,
        *,
        limit: int | None = None,
        shape: Sequence[int] | None = None,
        preprocessing: Preprocessing | None = None,
        source: str = "the array",
    ) -> None:
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise CalibrationError(f"{source} holds {images.dtype}; images are floats (N, C, H, W) or uint8 pixels")
        if images.dtype == np.uint8 and images.ndim == 3:
            images = images[..., None]
        if images.ndim < 2 or (images.dtype == np.uint8 and images.ndim != 4) or not len(images):
            raise CalibrationError(f"{source} has shape {images.shape}; images are (N, C, H, W) or pixels (N, H, W, 3)")
        if labels is not None and len(labels) != len(images):
            raise CalibrationError(f"{source} has {len(images)} images and {len(labels)} labels")
        self._images, self._source = images, source
        self._shape = tuple(shape) if shape is not None else None
        self._preprocessing = preprocessing or Preprocessing()
        self._picked = _spread(len(images), limit)
        self.count = len(self._picked)
        self.labels = None if labels is None else np.asarray(labels)[self._picked].astype(np.int64)
        next(self.batches(1))  # shapes are checked now, not in the middle of the work

    def batches(self, size: int) -> Iterator[Float32]:
        for start in range(0, self.count, size):
            yield self.take(np.arange(start, min(start + size, self.count)))

    def take(self, indices: NDArray[np.intp]) -> Float32:
        part = self._images[self._picked[indices]]
        if part.dtype == np.uint8:
            part = self._pixels(part)
        found = np.ascontiguousarray(part, np.float32)
        if self._shape is not None and found.shape[1:] != self._shape:
            raise CalibrationError(
                f"{self._source} has images of shape {found.shape[1:]} and the model wants {self._shape}"
            )
        if not np.isfinite(found).all():
            raise CalibrationError(f"{self._source} has values that are not finite")
        return found

    def _pixels(self, part: NDArray[Any]) -> Float32:
        if part.shape[3] not in (1, 3) and part.shape[1] in (1, 3):
            part = part.transpose(0, 2, 3, 1)
        if self._shape is not None and len(self._shape) == 3:
            part = centre_crop(part, self._shape[1], self._shape[2])
        return self._preprocessing.normalise(part)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the network will see."""
        digest = hashlib.sha256()
        for batch in self.batches(64):
            digest.update(repr(batch.shape[1:]).encode())
            digest.update(batch.tobytes())
        return digest.hexdigest()


class FolderImages(CalibrationImages):
    """Pictures in a folder and its subfolders, in alphabetical order. Needs Pillow.

    If there is more than one subfolder and no picture outside them, each is a class, numbered in alphabetical order.

    Parameters
    ----------
    folder
        Where the pictures are.
    shape
        (C, H, W) that the network wants; C is 1 or 3.
    limit
        Pictures to use; of more, as many at equal distances.
    preprocessing
        From pixels to the network's input.

    Raises
    ------
    CalibrationError
        If there are no pictures, Pillow is missing, or the shape is no picture's.
    """

    def __init__(
        self,
        folder: Path,
        shape: Sequence[int],
        *,
        limit: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise CalibrationError(f"pictures cannot be made into inputs of shape {tuple(shape)}; give an .npy file")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not files:
            raise CalibrationError(f"{folder} holds no pictures ({', '.join(_SUFFIXES)})")
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise CalibrationError("reading pictures needs Pillow: pip install 'tvm-nm[images]'") from error
        self._channels, self._height, self._width = shape
        self._preprocessing = preprocessing or Preprocessing()
        tops = [path.relative_to(folder).parts[:-1][:1] for path in files]
        classes = sorted({top[0] for top in tops if top})
        picked = _spread(len(files), limit)
        self._files = [files[index] for index in picked]
        self.count = len(self._files)
        if len(classes) > 1 and all(tops):
            number = {name: index for index, name in enumerate(classes)}
            self.labels = np.array([number[tops[index][0]] for index in picked], np.int64)

    def batches(self, size: int) -> Iterator[Float32]:
        for start in range(0, self.count, size):
            yield self.take(np.arange(start, min(start + size, self.count)))

    def take(self, indices: NDArray[np.intp]) -> Float32:
        return self._preprocessing.normalise(np.stack([self._read(self._files[index]) for index in indices]))

    def _read(self, path: Path) -> NDArray[np.uint8]:
        from PIL import Image

        try:
            with Image.open(path) as opened:
                picture = opened.convert("L" if self._channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise CalibrationError(f"{path} cannot be read as a picture: {error}") from error
        short = self._preprocessing.resize or usual_resize(max(self._height, self._width))
        scale = max(short / min(picture.size), self._height / picture.height, self._width / picture.width)
        size = (max(self._width, round(picture.width * scale)), max(self._height, round(picture.height * scale)))
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        pixels: NDArray[np.uint8] = np.asarray(picture)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        cropped: NDArray[np.uint8] = centre_crop(pixels[None], self._height, self._width)[0]
        return cropped

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files and of what is done to them."""
        digest = hashlib.sha256(repr((self._preprocessing, self._channels, self._height, self._width)).encode())
        for path in self._files:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def open_images(
    source: str | os.PathLike[str],
    shape: Sequence[int],
    *,
    limit: int | None = DEFAULT_IMAGES,
    preprocessing: Preprocessing | None = None,
) -> CalibrationImages:
    """Open calibration data.

    Parameters
    ----------
    source
        A folder of pictures, an ``.npy`` file, or an ``.npz`` file with the array ``images`` (or ``x``, ``data``,
        ``input``, or its only array of images) and, if there are labels, ``labels`` (or ``y``).
    shape
        (C, H, W) that the network wants.
    limit
        Images to use; of more, as many at equal distances.
    preprocessing
        For pictures and uint8 arrays.

    Raises
    ------
    CalibrationError
        If there is no such data or it does not fit.
    """
    path = Path(source)
    if path.is_dir():
        return FolderImages(path, shape, limit=limit, preprocessing=preprocessing)
    labels = None
    try:
        if path.suffix == ".npy":
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                images, labels = _from_archive(archive, path)
        else:
            raise CalibrationError(f"{path} is no folder of pictures, .npy or .npz file; see --calib")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path} cannot be read as arrays: {error}") from error
    return ArrayImages(images, labels, limit=limit, shape=shape, preprocessing=preprocessing, source=str(path))


def embedded_images() -> CalibrationImages:
    """Return the 512 images that come with the package, for the network that comes with it."""
    from tvm_nm.reference import calibration_images

    return ArrayImages(calibration_images(), source="the embedded images")


def batch_size(shape: Sequence[int]) -> int:
    """Images that are run together: many of small ones, 13 of 3x224x224."""
    return int(np.clip((1 << 21) // max(1, int(np.prod(shape))), 4, 64))


def _from_archive(archive: Any, path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    names = list(archive.files)
    labels = next((archive[name] for name in _LABEL_KEYS if name in names), None)
    named = next((name for name in _IMAGE_KEYS if name in names), None)
    if named is None:
        others = [name for name in names if name not in _LABEL_KEYS]
        if len(others) != 1:
            raise CalibrationError(f"{path} has the arrays {', '.join(names) or 'none'}; call the images 'images'")
        named = others[0]
    return archive[named], labels


def _spread(count: int, limit: int | None) -> NDArray[np.intp]:
    if limit is not None and limit < 1:
        raise CalibrationError(f"calibration needs at least 1 image, not {limit}")
    used = count if limit is None else min(limit, count)
    return np.arange(used, dtype=np.intp) * count // used
