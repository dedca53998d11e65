"""Fine-tuning from file to file, and what it changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from tvm_nm.agreement import Agreement
from tvm_nm.calibration import CalibrationImages
from tvm_nm.detect import detect_pattern
from tvm_nm.errors import ArtifactError, ModelMismatchError, UnsupportedModelError
from tvm_nm.evaluation import answers_of_onnx, compare
from tvm_nm.json_file import check_writable, write_bytes
from tvm_nm.masks import BoolArray, mask_density
from tvm_nm.oneshot import images_per_run
from tvm_nm.onnx_network import OnnxNetwork
from tvm_nm.onnx_segment import default_threads
from tvm_nm.torch.gradual import Phase
from tvm_nm.torch.importer import import_model
from tvm_nm.torch.network_stage import reconstruct_network
from tvm_nm.torch.options import TrainingOptions
from tvm_nm.torch.training import Status, Trained, train

__all__ = ["FineTuned", "Images", "finetune_file", "input_shape"]

Images = Callable[[tuple[int, ...]], CalibrationImages]
"""From the input's shape (C, H, W) to images."""
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class FineTuned:
    """What `finetune_file` did.

    Attributes
    ----------
    trained
        The run.
    before, after
        The models' scores on the test images, by onnxruntime in float32, beside the dense model; without one, beside
        the model as it was. None without test images.
    with_dense
        Whether there was a dense model.
    """

    trained: Trained
    before: Agreement | None
    after: Agreement | None
    with_dense: bool

    def to_dict(self) -> dict[str, Any]:
        """Return all of it but the weights, for JSON."""
        return {
            "format": "tvm_nm.finetuned",
            "version": 1,
            "before": _score(self.before),
            "after": _score(self.after),
            "kept_epoch": self.trained.kept,
            "epochs": [
                {"epoch": e.number, "loss": e.loss, "seconds": e.seconds, "score": _score(e.score)}
                for e in self.trained.epochs
            ],
            "layers": [_layer(name, mask) for name, mask in self.trained.masks.items()],
        }


def finetune_file(
    model: Path,
    output: Path,
    images: Images,
    options: TrainingOptions | None = None,
    *,
    dense: Path | None = None,
    test: Images | None = None,
    phases: Sequence[Phase] = (),
    shape: tuple[int, ...] | None = None,
    network_stage: bool = False,
    checkpoint: Path | None = None,
    threads: int | None = None,
    step: Callable[[str], None] | None = None,
    progress: Callable[[Status], None] | None = None,
) -> FineTuned:
    """Train an ONNX file and write another: the same graph with other weights, the zeros where they were.

    Parameters
    ----------
    model, output
        The files.
    images, test
        Opened when the input's shape is known.
    options
        How.
    dense
        The model to learn from.
    phases
        When to choose masks anew.
    shape
        (C, H, W) of the input, where the file leaves it open.
    network_stage
        Refit to the dense model by `reconstruct_network` instead of training.
    checkpoint
        As for `tvm_nm.torch.training.train`; it is removed when `output` is written.
    threads
        Of PyTorch and onnxruntime; default: `tvm_nm.onnx_segment.default_threads`.
    step
        Called with the name of each step.
    progress
        Called after each step of training.

    Raises
    ------
    TvmNmError
        If a file cannot be read or written, or does not fit the others.
    """
    tell = step or (lambda _: None)
    if output.exists() and output.samefile(model):
        raise ArtifactError(f"{output} is the model itself; choose another output")
    check_writable(output, "model")
    torch.set_num_threads(threads or default_threads())
    source = _load(model)
    reference = None if dense is None else _load(dense)
    wanted = shape or input_shape(source)
    data, judged = images(wanted), None if test is None else test(wanted)
    before = answers = None
    if judged is not None:
        tell("judging the model as it is")
        answers = answers_of_onnx(reference or source, judged, threads)
        found = answers if reference is None else answers_of_onnx(source, judged, threads)
        before = compare(answers, found, judged)
    tell("training")
    if network_stage:
        assert reference is not None
        trained = reconstruct_network(
            source,
            reference,
            data,
            options,
            test=judged,
            checkpoint=checkpoint,
            keep_checkpoint=True,
            progress=progress,
        )
    else:
        trained = train(
            source,
            data,
            options,
            dense=reference,
            phases=phases,
            test=judged,
            checkpoint=checkpoint,
            keep_checkpoint=True,
            progress=progress,
        )
    tell("judging the result")
    _verify(trained.model, data)
    after = None
    if judged is not None and answers is not None:
        after = compare(answers, answers_of_onnx(trained.model, judged, threads), judged)
    write_bytes(output, trained.model.SerializeToString(), "model")
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return FineTuned(trained, before, after, reference is not None)


def input_shape(model: onnx.ModelProto) -> tuple[int, ...]:
    """Return (C, H, W) of a model's first input.

    Raises
    ------
    UnsupportedModelError
        If the file leaves one of them open.
    """
    names = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in names]
    if not inputs:
        raise UnsupportedModelError("the model has no input")
    shape = tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim)[1:]
    if not shape or 0 in shape:
        raise UnsupportedModelError(f"the shape of input {inputs[0].name!r} is left open; give it with --shape")
    return shape


def _verify(model: onnx.ModelProto, images: CalibrationImages) -> None:
    """Compare the file that will be written, in onnxruntime, with what PyTorch computes from it."""
    batch = images.take(np.arange(min(2, images.count)))
    network = OnnxNetwork(model)
    batch = batch[: images_per_run(network, images)]
    module = import_model(model).module.eval()
    with torch.no_grad():
        found = module(torch.from_numpy(batch))
    found = (found[0] if isinstance(found, tuple) else found).numpy()
    wanted = network.run(batch)
    error = float(np.abs(found - wanted).max()) / max(float(np.abs(wanted).max()), 1e-12)
    if not error <= _TOLERANCE:
        raise ModelMismatchError(
            f"onnxruntime and PyTorch differ by {error:.2g} on the trained model; nothing written, please report it"
        )


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # whatever protobuf makes of a file that is none
        raise UnsupportedModelError(f"{path} is no ONNX model: {' '.join(str(error).split())[:200]}") from error


def _score(score: Agreement | None) -> dict[str, Any] | None:
    return None if score is None else score.to_dict()


def _layer(name: str, mask: BoolArray) -> dict[str, Any]:
    return {"name": name, "density": mask_density(mask), "pattern": str(detect_pattern(mask).pattern)}
