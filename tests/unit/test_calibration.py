"""Calibration images from arrays and folders, and the measures of agreement."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tvm_nm.agreement import compare_answers, predict, top1_interval
from tvm_nm.calibration import ArrayImages, batch_size, embedded_images, open_images
from tvm_nm.errors import CalibrationError
from tvm_nm.preprocessing import Preprocessing
from tvm_nm.reference import calibration_images

RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal((20, 3, 8, 8)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (20, 10, 12, 3), dtype=np.uint8)
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is not installed")


def test_floats_are_used_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FLOATS)
    np.savez(tmp_path / "a.npz", images=FLOATS, labels=np.arange(20))
    for name in ("a.npy", "a.npz"):
        images = open_images(tmp_path / name, (3, 8, 8))
        batches = list(images.batches(7))
        assert [len(batch) for batch in batches] == [7, 7, 6]
        np.testing.assert_array_equal(np.concatenate(batches), FLOATS)
    np.testing.assert_array_equal(open_images(tmp_path / "a.npz", (3, 8, 8)).labels, np.arange(20))


def test_a_limit_takes_images_at_equal_distances(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=FLOATS, y=np.arange(20))
    images = open_images(tmp_path / "a.npz", (3, 8, 8), limit=5)
    assert images.labels.tolist() == [0, 4, 8, 12, 16]
    np.testing.assert_array_equal(next(images.batches(8)), FLOATS[::4])


@pytest.mark.parametrize("first", [False, True])
def test_pixels_are_normalised_and_cropped(first: bool) -> None:
    given = np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2)) if first else PIXELS
    found = next(ArrayImages(given, shape=(3, 8, 8)).batches(20))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((PIXELS[:, 1:9, 2:10] / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_preprocessing() -> None:
    chosen = Preprocessing.parse("mean=104/117/123,std=1,scale=1,order=bgr")
    found = next(ArrayImages(PIXELS, preprocessing=chosen).batches(20))
    expected = (PIXELS[..., ::-1].astype(np.float32) - [104, 117, 123]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    grey = next(ArrayImages(PIXELS[..., 0]).batches(20))
    assert grey.shape == (20, 1, 10, 12)


@pytest.mark.parametrize("text", ["size=3", "mean=a", "scale=0", "std=0", "order=gbr", "resize=-1"])
def test_preprocessing_that_makes_no_sense(text: str) -> None:
    with pytest.raises(CalibrationError):
        Preprocessing.parse(text)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (FLOATS[:, :2], "the model wants"),
        (np.full((2, 3, 8, 8), np.nan, np.float32), "not finite"),
        (FLOATS.astype(np.int64), "int64"),
        (FLOATS[:0], "shape"),
        (PIXELS[:, :4], "smaller"),
    ],
)
def test_data_that_do_not_fit(images: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        ArrayImages(images, shape=(3, 8, 8))


def test_files_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"nothing")
    (tmp_path / "a.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "two.npz", first=FLOATS, second=FLOATS)
    (tmp_path / "empty").mkdir()
    for name in ("a.npy", "a.npz", "two.npz", "empty", "missing.npy", "a.txt"):
        with pytest.raises(CalibrationError):
            open_images(tmp_path / name, (3, 8, 8))


def test_the_fingerprint_is_of_what_the_network_sees() -> None:
    first, same, other = ArrayImages(FLOATS), ArrayImages(FLOATS.copy()), ArrayImages(FLOATS[:19])
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert ArrayImages(PIXELS).fingerprint != ArrayImages(PIXELS, preprocessing=Preprocessing(bgr=True)).fingerprint


@needs_pillow
def test_a_folder_of_pictures(tmp_path: Path) -> None:
    from PIL import Image

    for name, level in (("b/1.png", 250), ("a/2.png", 10), ("a/1.jpg", 130)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (level, level, level)).save(tmp_path / name)
    images = open_images(tmp_path, (3, 32, 32), preprocessing=Preprocessing.parse("mean=0,std=1"))
    assert images.count == 3
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    found = next(images.batches(3))
    assert found.shape == (3, 3, 32, 32)
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)) * 255, [130, 10, 250], atol=1.5)
    before = images.fingerprint
    Image.new("RGB", (60, 40), (1, 2, 3)).save(tmp_path / "b/1.png")
    assert images.fingerprint != before
    (tmp_path / "b/1.png").write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=r"1\.png"):
        list(images.batches(3))


def test_embedded_images() -> None:
    images = embedded_images()
    assert images.count == 512
    np.testing.assert_array_equal(next(images.batches(3)), calibration_images()[:3])


def test_batches_are_smaller_for_larger_images() -> None:
    assert batch_size((3, 32, 32)) == 64
    assert batch_size((3, 224, 224)) == 13
    assert batch_size((3, 2000, 2000)) == 4


def test_agreement() -> None:
    dense = RNG.standard_normal((50, 10))
    labels = dense.argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % 10
    same = compare_answers(dense, dense + 3, labels)  # a shift of all logits changes nothing
    assert (same.same, same.top1, same.dense_top1) == (1.0, 0.9, 0.9)
    assert same.divergence == pytest.approx(0, abs=1e-12)
    assert same.distance == pytest.approx(0, abs=1e-12)
    other = compare_answers(dense, dense[::-1], None)
    assert other.top1 is None
    assert other.same < 0.5
    assert other.divergence > 0.1
    probabilities = np.exp(dense) / np.exp(dense).sum(axis=1, keepdims=True)
    twice = compare_answers(probabilities, probabilities[::-1])
    assert twice.divergence == pytest.approx(other.divergence, rel=1e-6)
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_answers(dense, dense[:, :5])
    assert predict(lambda batch: batch, ArrayImages(FLOATS), 6).shape == (20, 192)
    assert top1_interval(0.8, 5000) == pytest.approx(0.00566, abs=1e-5)
