"""The training loop: pruned weights stay zero, and an interrupted run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from tvm_nm.agreement import Agreement, compare_answers
from tvm_nm.calibration import CalibrationImages
from tvm_nm.errors import CalibrationError, ModelMismatchError, PlanError
from tvm_nm.masks import BoolArray
from tvm_nm.torch.checkpoint import fingerprint, read_checkpoint, write_checkpoint
from tvm_nm.torch.data import TrainingData
from tvm_nm.torch.gradual import Phase
from tvm_nm.torch.importer import import_model
from tvm_nm.torch.masks import WeightMasks, choose_masks, masks_of_zeros
from tvm_nm.torch.model import TorchModel
from tvm_nm.torch.options import TrainingOptions, cosine_rate, find_device, make_optimizer
from tvm_nm.torch.renormalise import insert_batch_norms

__all__ = ["Epoch", "Status", "Trained", "train"]

_SECONDS_BETWEEN_CHECKPOINTS = 120.0
_EVALUATION_IMAGES = 256
_NORM_IMAGES = 512  # whose activations inserted batch norms start from


@dataclass(frozen=True, slots=True)
class Epoch:
    """What is known at the end of an epoch.

    Attributes
    ----------
    number
        Epochs done.
    loss
        Mean over its steps.
    score
        On the test images: beside the dense model, or beside itself where there is none. None without test images.
    seconds
        Since the run began, those of interrupted runs included.
    """

    number: int
    loss: float
    score: Agreement | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Status:
    """How far a run has come.

    Attributes
    ----------
    step, steps
        Done, and in all.
    loss
        Of the last step.
    epoch
        What was found at the end of an epoch, if one has just ended.
    """

    step: int
    steps: int
    loss: float
    epoch: Epoch | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a run.

    Attributes
    ----------
    model
        The ONNX model with its new weights.
    masks
        By layer name, which weights are kept.
    epochs
        One entry for each epoch.
    kept
        Number of the epoch whose weights these are; 0 is before the first.
    """

    model: onnx.ModelProto
    masks: dict[str, BoolArray]
    epochs: tuple[Epoch, ...]
    kept: int


def train(
    model: onnx.ModelProto,
    images: CalibrationImages,
    options: TrainingOptions | None = None,
    *,
    dense: onnx.ModelProto | None = None,
    masks: Mapping[str, BoolArray] | None = None,
    phases: Sequence[Phase] = (),
    test: CalibrationImages | None = None,
    activations: Sequence[str] = (),
    checkpoint: Path | None = None,
    keep_checkpoint: bool = False,
    progress: Callable[[Status], None] | None = None,
) -> Trained:
    """Train a model whose zeros stay zero.

    Parameters
    ----------
    model
        The model with its weights; it is not changed.
    images
        What to train on. Without labels a dense model is needed.
    options
        How.
    dense
        The model to learn from, see `Objective`.
    masks
        By layer name, which weights may be other than zero; default: those that are not zero in layers with zeros.
    phases
        When to choose masks anew, see `tvm_nm.torch.gradual`.
    test
        What to judge by after each epoch.
    activations
        Names of values of both models whose difference is a part of the loss, see `Objective.activations`.
    checkpoint
        File to write the state to, about every two minutes; if it is there, the run goes on from it. It is removed at
        the end.
    keep_checkpoint
        Leave the state of the end there instead, for the caller to remove when the result is safe.
    progress
        Called after each step.

    Raises
    ------
    CalibrationError
        If the images do not fit, or there are neither labels nor a dense model.
    UnsupportedModelError
        If the model has an operator that cannot be trained.
    ArtifactError
        If the checkpoint belongs to another run or cannot be written.
    """
    return _Run(model, images, options or TrainingOptions(), dense, masks, phases, test, activations).go(
        checkpoint, progress, keep_checkpoint
    )


class _Run:
    def __init__(
        self,
        model: onnx.ModelProto,
        images: CalibrationImages,
        options: TrainingOptions,
        dense: onnx.ModelProto | None,
        masks: Mapping[str, BoolArray] | None,
        phases: Sequence[Phase],
        test: CalibrationImages | None,
        activations: Sequence[str],
    ) -> None:
        if images.labels is None and dense is None:
            raise CalibrationError("the images have no labels: give labels, or the dense model to learn from")
        if test is None and options.keep == "best":
            raise PlanError("the best weights are known by a test set; give one, or keep the last")
        self.options, self.test, self.phases = options, test, list(phases)
        torch.manual_seed(options.seed)
        self.device = find_device(options.device)
        self.data = TrainingData(images, options.batch, options.augmentation, options.seed)
        self.steps = max(1, round(options.epochs * self.data.steps))
        self.model = self._import(model, activations)
        self.teacher = None if dense is None else self._import(dense, activations).module.eval()
        if self.teacher is not None:
            self.teacher.requires_grad_(False)
        chosen = masks_of_zeros(self.model) if masks is None else masks
        if options.batch_norm == "insert" and self.data.batch > 1:  # one image has no statistics of a batch
            count = min(_NORM_IMAGES, images.count)
            some = images.take(np.arange(count) * images.count // count)
            parts = np.array_split(some, -(-len(some) // self.data.batch))
            insert_batch_norms(self.model, (torch.from_numpy(part).to(self.device) for part in parts))
        self.masks = WeightMasks(self.model, chosen)
        self.optimizer = make_optimizer(self.model.module, options)
        self.masks.lock(self.optimizer)
        self.epochs: list[Epoch] = []
        self.best: dict[str, Any] | None = None
        self.kept, self.seconds = 0, 0.0
        maker = options.optimizer
        named = maker if isinstance(maker, str) else getattr(maker, "__qualname__", type(maker).__qualname__)
        settings = {**dataclasses.asdict(options), "optimizer": named}
        identity: list[Any] = [model, dense or "", settings, sorted(self.masks.masks), self.phases, list(activations)]
        sample = self.data.images.take(np.arange(min(8, images.count)))
        self.run = fingerprint(*identity, images.count, sample.tobytes(), test.count if test else 0)

    def go(self, checkpoint: Path | None, progress: Callable[[Status], None] | None, keep: bool) -> Trained:
        step = self._resume(checkpoint)
        before, started = self.seconds, time.monotonic()
        saved = started
        total, counted = 0.0, 0
        module = self.model.module
        self._training_mode()
        for inputs, labels in self.data.batches(step, self.steps, self.device):
            self._enter_phase(step)
            loss = self._step(step, inputs, labels)
            total, counted, step = total + loss, counted + 1, step + 1
            if not np.isfinite(loss):
                raise ModelMismatchError(
                    f"training diverged in step {step}: the loss is {loss}; choose a lower learning rate"
                )
            ended = step % self.data.steps == 0 or step == self.steps
            self.seconds = before + time.monotonic() - started
            if ended:
                self._end_epoch(step, total / counted)
                total, counted = 0.0, 0
                self._training_mode()
            if progress is not None:
                progress(Status(step, self.steps, loss, self.epochs[-1] if ended else None))
            now = time.monotonic()
            due = ended or now - saved > _SECONDS_BETWEEN_CHECKPOINTS
            if checkpoint is not None and due and (keep or step < self.steps):
                write_checkpoint(checkpoint, self.run, self._state(step))
                saved = now
        if self.options.keep == "best" and self.best is not None:
            module.load_state_dict(self.best)
        else:
            self.kept = len(self.epochs)
        masks = self.masks.masks
        result = Trained(self.model.to_onnx(), masks, tuple(self.epochs), self.kept)
        if checkpoint is not None and not keep:
            checkpoint.unlink(missing_ok=True)
        return result

    def _import(self, model: onnx.ModelProto, activations: Sequence[str]) -> TorchModel:
        found = import_model(model, activations)
        found.module.to(self.device, memory_format=torch.channels_last)
        return found

    def _training_mode(self) -> None:
        self.model.module.train(self.options.batch_norm != "freeze")

    def _enter_phase(self, step: int) -> None:
        for phase in self.phases:
            if phase.first_step(self.steps) == step:
                self.masks.replace(choose_masks(self.model, phase.choices), self.optimizer)

    def _step(self, step: int, inputs: Any, labels: Any) -> float:
        rate = cosine_rate(step, self.steps, self.options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.setdefault("peak", group["lr"])
        with self._autocast():
            wanted = None
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = self.teacher(inputs)
            found = self.model.module(inputs)
            loss = self.options.objective(found, labels, wanted)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.options.clip:
            torch.nn.utils.clip_grad_norm_(self.model.module.parameters(), self.options.clip)
        self.optimizer.step()
        return float(loss.detach())

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _end_epoch(self, step: int, loss: float) -> None:
        number = len(self.epochs) + 1
        score = None
        if self.test is not None and (number % self.options.evaluate_every == 0 or step == self.steps):
            score = self._score(self.test)
            past = [epoch.score for epoch in self.epochs if epoch.score is not None]
            if self.options.keep == "best" and all(_better(score, other) for other in past):
                self.kept = number
                self.best = {key: value.detach().cpu().clone() for key, value in self.model.module.state_dict().items()}
        self.epochs.append(Epoch(number, loss, score, self.seconds))

    def _score(self, test: CalibrationImages) -> Agreement:
        answers, wanted = [], []
        self.model.module.eval()
        with torch.no_grad(), self._autocast():
            for batch in test.batches(_EVALUATION_IMAGES):
                inputs = torch.from_numpy(batch).to(self.device, memory_format=torch.channels_last)
                answers.append(_logits(self.model.module(inputs)))
                wanted.append(answers[-1] if self.teacher is None else _logits(self.teacher(inputs)))
        return compare_answers(np.concatenate(wanted), np.concatenate(answers), test.labels)

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "module": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masks": {name: torch.from_numpy(mask) for name, mask in self.masks.masks.items()},
            "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "kept": self.kept,
            "seconds": self.seconds,
        }

    def _resume(self, checkpoint: Path | None) -> int:
        state = None if checkpoint is None else read_checkpoint(checkpoint, self.run)
        if state is None:
            return 0
        self.model.module.load_state_dict(state["module"])
        self.masks.replace({name: mask.numpy() for name, mask in state["masks"].items()})
        self.optimizer.load_state_dict(state["optimizer"])
        self.epochs = [
            Epoch(**{**entry, "score": None if entry["score"] is None else Agreement(**entry["score"])})
            for entry in state["epochs"]
        ]
        self.best, self.kept, self.seconds = state["best"], state["kept"], state["seconds"]
        return int(state["step"])


def _logits(output: Any) -> Any:
    logits = output[0] if isinstance(output, tuple) else output
    return logits.float().flatten(1).cpu().numpy()


def _better(score: Agreement, other: Agreement) -> bool:
    if score.top1 is not None and other.top1 is not None and score.top1 != other.top1:
        return score.top1 > other.top1
    return score.divergence < other.divergence
