"""The reference network: a small trained CNN and data to calibrate and to judge it with, shipped inside the package.

Every command has something real to work on without a download: ``reference.onnx`` (trained by
``scripts/train_reference.py``), 512 unlabelled training images and 2,000 labelled test images of Fashion-MNIST
(Xiao, Rasul, Vollgraf, 2017; MIT licence, see ``LICENSE.fashion-mnist`` beside the data).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tvm_nm.errors import ArtifactError

__all__ = [
    "CLASSES",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "ReferenceCard",
    "calibration_images",
    "preprocess",
    "reference_card",
    "reference_model_path",
    "test_set",
    "top1",
]

PIXEL_MEAN = 0.2860
"""Mean of all training pixels, scaled to 0..1."""
PIXEL_STD = 0.3530
"""Their standard deviation."""
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""What the ten logits stand for, in order."""

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class ReferenceCard:
    """What is known about the reference network; the content of ``reference.json``.

    Attributes
    ----------
    dataset, dataset_license
        The training data and the SPDX identifier of its licence.
    input_shape
        Shape of one image with its channel axis, without the batch axis.
    pixel_mean, pixel_std
        The normalisation the network was trained with; see `preprocess`.
    top1_test, top1_embedded
        Share of right answers of the ONNX file in onnxruntime: on all 10,000 test images, and on the 2,000 embedded.
    parameters
        Weights and biases in the ONNX file, whose batch normalisations are folded into the convolutions.
    macs
        Multiply-accumulates of one image in convolutions and fully connected layers.
    epochs, seed
        What the training was run with.
    """

    dataset: str
    dataset_license: str
    input_shape: tuple[int, int, int]
    pixel_mean: float
    pixel_std: float
    top1_test: float
    top1_embedded: float
    parameters: int
    macs: int
    epochs: int
    seed: int


def reference_model_path() -> Path:
    """Path of the reference network: ONNX, ``input`` (batch, 1, 28, 28) float32 to ``logits`` (batch, 10) float32.

    Raises
    ------
    ArtifactError
        If the installed package lacks the file.
    """
    return _data_file("reference.onnx")


def reference_card() -> ReferenceCard:
    """Read the model card that was written when the network was trained.

    Raises
    ------
    ArtifactError
        If the installed package lacks the file or the file is not a model card.
    """
    path = _data_file("reference.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["input_shape"] = tuple(values["input_shape"])
        return ReferenceCard(**{field.name: values[field.name] for field in fields(ReferenceCard)})
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not a model card ({error!r}): reinstall tvm-nm") from error


def calibration_images() -> NDArray[np.float32]:
    """First 512 training images, preprocessed: float32 (512, 1, 28, 28). They come without labels.

    Raises
    ------
    ArtifactError
        If the installed package lacks the data.
    """
    return preprocess(_arrays("calibration_images")[0])


def test_set() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """First 2,000 test images, preprocessed, float32 (2000, 1, 28, 28), and their classes, int64 (2000,).

    Raises
    ------
    ArtifactError
        If the installed package lacks the data.
    """
    images, labels = _arrays("test_images", "test_labels")
    return preprocess(images), labels.astype(np.int64)


def preprocess(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn grey-scale images into the network's input: ``(pixel / 255 - PIXEL_MEAN) / PIXEL_STD``.

    Parameters
    ----------
    images
        uint8 (N, 28, 28), 0 is the black background.

    Returns
    -------
    float32 (N, 1, 28, 28), C-contiguous.

    Raises
    ------
    ValueError
        If dtype or shape are others.
    """
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"expected uint8 images of shape (N, 28, 28), got {images.dtype} of shape {images.shape}")
    scaled: NDArray[np.float32] = images[:, np.newaxis].astype(np.float32) / np.float32(255)
    scaled -= np.float32(PIXEL_MEAN)
    scaled /= np.float32(PIXEL_STD)
    return scaled


def top1(
    predict: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    batch: int = 100,
) -> float:
    """Share of images whose largest logit is that of their class.

    Parameters
    ----------
    predict
        Maps float32 (batch, ...) to logits (batch, classes). It is always called with exactly `batch` images, so a
        module compiled for that batch size fits: a short last chunk is filled up with its last image.
    images
        float32 (N, ...), N > 0.
    labels
        int64 (N,).
    batch
        Images per call.

    Raises
    ------
    ValueError
        If there are no images, their number is not that of the labels, or `batch` is not positive.
    """
    if len(images) != len(labels) or not len(images) or batch < 1:
        raise ValueError(f"cannot score {len(images)} images with {len(labels)} labels, {batch} at a time")
    right = 0
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch]
        missing = batch - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        answers = predict(chunk)[: batch - missing].argmax(axis=1)
        right += int((answers == labels[start : start + batch]).sum())
    return right / len(images)


def _data_file(name: str) -> Path:
    path = _DATA / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: reinstall tvm-nm, or rebuild it with scripts/train_reference.py")
    return path


def _arrays(*names: str) -> list[NDArray[np.uint8]]:
    path = _data_file("fashion_mnist.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return [archive[name] for name in names]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path} is damaged ({error}): reinstall tvm-nm") from error
