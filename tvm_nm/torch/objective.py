"""What training minimises: labels, the dense model's answers, and its activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import functional

__all__ = ["Objective"]


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss, as a weighted sum of three.

    Attributes
    ----------
    distillation
        Share of the distillation loss; the rest is the cross entropy with the labels. It is 1 without labels and 0
        without a dense model.
    temperature
        By which logits are divided for distillation; the loss is multiplied by its square (Hinton et al., 2015).
    label_smoothing
        Of the cross entropy.
    activations
        Weight of the squared error of the activations that the modules return behind their first output, each as a
        share of the dense model's mean square.
    """

    distillation: float = 0.5
    temperature: float = 2.0
    label_smoothing: float = 0.0
    activations: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1 or self.temperature <= 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "a share of distillation in [0, 1], a positive temperature and a label smoothing in [0, 1) are needed, "
                f"not {self.distillation}, {self.temperature}, {self.label_smoothing}"
            )

    def __call__(self, found: Any, labels: Any, dense: Any) -> Any:
        """Return the loss, a scalar.

        Parameters
        ----------
        found
            Output of the module that is trained: logits, or logits and activations.
        labels
            (N,), or None.
        dense
            Output of the dense module for the same inputs, or None.
        """
        logits, features = _parts(found)
        share = 0.0 if dense is None else 1.0 if labels is None else self.distillation
        loss: Any = 0.0
        if share < 1:
            loss = (1 - share) * functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if dense is not None:
            target, wanted = _parts(dense)
            if share > 0:
                student = functional.log_softmax(logits / self.temperature, 1)
                teacher = functional.log_softmax(target / self.temperature, 1)
                divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
                loss = loss + share * self.temperature**2 * divergence
            if self.activations:
                errors = [_relative(a, b) for a, b in zip(features, wanted, strict=True)]
                loss = loss + self.activations * sum(errors) / max(1, len(errors))
        return loss


def _parts(output: Any) -> tuple[Any, Sequence[Any]]:
    """Logits (N, classes) in float32, and the rest."""
    logits, *rest = output if isinstance(output, tuple) else (output,)
    return logits.float().flatten(1), rest


def _relative(found: Any, wanted: Any) -> Any:
    wanted = wanted.float()
    return (found.float() - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
