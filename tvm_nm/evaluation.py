"""Runs a model on images and compares its answers with those of the dense network, and with the truth."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tvm_nm.agreement import Agreement, compare_answers
from tvm_nm.calibration import CalibrationImages
from tvm_nm.errors import CalibrationError
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.oneshot import images_per_run
from tvm_nm.onnx_network import OnnxNetwork
from tvm_nm.pruning import Images
from tvm_nm.runtime import CompiledModel, load

__all__ = ["answers_of_artifact", "answers_of_onnx", "compare", "evaluate"]

Answers = NDArray[np.float64]


def evaluate(
    path: str | os.PathLike[str],
    images: Images,
    against: str | os.PathLike[str] | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Agreement:
    """Compare the answers of a model with those of a dense one.

    Parameters
    ----------
    path
        An artefact, which runs as it was built, or an ONNX model, which onnxruntime runs.
    images
        Images, with labels if there are any, or a function from the input's shape (C, H, W) to them.
    against
        The dense ONNX model; None compares with labels only, and the model is then its own dense network.
    shapes
        Shapes of inputs of ONNX models that have symbolic axes.
    threads
        To run with.
    progress
        Called with the name of each step when it starts, and how far it has come in brackets.

    Raises
    ------
    CalibrationError
        If the images do not fit the model, or there is nothing to compare with.
    ArtifactError
        If the artefact cannot be loaded.
    UnsupportedModelError
        If an ONNX model cannot be read or run.
    """
    step = progress or (lambda _: None)
    step("loading")
    model: CompiledModel | ImportedModel
    model = load(path, threads=threads) if Path(path).is_dir() else import_onnx(path, shapes=shapes, verify=False)
    data = images if isinstance(images, CalibrationImages) else images(model.inputs[0].shape[1:])
    if data.labels is None and against is None:
        raise CalibrationError("there is nothing to compare with: give the dense model (--against) or labelled images")
    if isinstance(model, CompiledModel):
        found = answers_of_artifact(model, data, step)
    else:
        found = answers_of_onnx(model.onnx, data, threads, step)
    dense = found
    if against is not None:
        step("running the dense model")
        dense = answers_of_onnx(import_onnx(against, shapes=shapes, verify=False).onnx, data, threads, step)
    return compare(dense, found, data)


def compare(dense: Answers, found: Answers, images: CalibrationImages) -> Agreement:
    """Compare answers for the same images.

    Raises
    ------
    CalibrationError
        If the models do not have the same outputs, or there are labels beyond them.
    """
    if dense.shape != found.shape:
        raise CalibrationError(
            f"the models give {found.shape[1:]} and {dense.shape[1:]} numbers for an image: not the same network"
        )
    labels = images.labels
    if labels is not None and (labels.min() < 0 or labels.max() >= found.shape[1]):
        raise CalibrationError(f"the labels go up to {labels.max()} and the model has {found.shape[1]} classes")
    return compare_answers(dense, found, labels)


def answers_of_onnx(
    model: onnx.ModelProto,
    images: CalibrationImages,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Answers:
    """Return what onnxruntime answers, (N, classes); answers with more axes are flattened.

    Raises
    ------
    CalibrationError
        If the images do not fit the model.
    UnsupportedModelError
        If it has more than one input.
    """
    network = OnnxNetwork(model)
    size = images_per_run(network, images, threads)
    segment = network.segment(0, network.end, [network.output], threads=threads)
    return _gather(lambda batch: segment({network.input: batch})[network.output], images, size, progress)


def answers_of_artifact(
    model: CompiledModel, images: CalibrationImages, progress: Callable[[str], None] | None = None
) -> Answers:
    """Return what a compiled model answers; its first output, if it has several.

    Raises
    ------
    CalibrationError
        If it has more than one input.
    """
    if len(model.inputs) != 1:
        raise CalibrationError(f"images go into one input; this model has {len(model.inputs)}")
    size = model.inputs[0].shape[0]

    def run(batch: NDArray[np.float32]) -> NDArray[Any]:
        filled = batch if len(batch) == size else np.resize(batch, (size, *batch.shape[1:]))
        result = model(np.ascontiguousarray(filled))
        return (result[0] if isinstance(result, tuple) else result)[: len(batch)]

    return _gather(run, images, size, progress)


def _gather(
    run: Callable[[NDArray[np.float32]], NDArray[Any]],
    images: CalibrationImages,
    size: int,
    progress: Callable[[str], None] | None,
) -> Answers:
    found: list[Answers] = []
    for number, batch in enumerate(images.batches(size)):
        if progress is not None and number % max(1, 64 // size) == 0:
            progress(f"running (image {number * size} of {images.count})")
        found.append(run(batch).reshape(len(batch), -1).astype(np.float64))
    return np.concatenate(found)
