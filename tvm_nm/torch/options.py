"""How a model is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tvm_nm.errors import EnvironmentMismatchError, PlanError
from tvm_nm.torch.data import Augmentation
from tvm_nm.torch.objective import Objective

__all__ = ["OptimizerMaker", "TrainingOptions", "cosine_rate", "find_device", "make_optimizer"]

OptimizerMaker = Callable[[Iterable[Any], float], Any]
"""From parameter groups and a peak learning rate to a `torch.optim.Optimizer`."""


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How a model is trained.

    Attributes
    ----------
    epochs
        Times that each image is seen; may be a fraction.
    batch
        Images in a step.
    optimizer
        "sgd" (Nesterov momentum), "adamw", or a function that makes one.
    learning_rate
        The highest. It rises linearly and falls as a cosine to zero.
    warmup
        Share of the steps in which it rises.
    momentum
        Of "sgd".
    weight_decay
        Of weights; biases and batch norms have none.
    clip
        Norm that gradients are clipped to; 0 does not clip.
    objective
        The loss.
    augmentation
        How images are varied.
    precision
        "bf16" computes in bfloat16 where that loses little (autocast) and keeps weights in float32.
    device
        "auto" takes a GPU where there is one.
    batch_norm
        "insert" puts batch norms behind convolutions without one while training, see `tvm_nm.torch.renormalise`; "keep"
        takes the model as it is, and needs a lower rate where there are none; "freeze" also keeps the running
        statistics of those that it has.
    seed
        Of everything random.
    keep
        "last" returns the final weights, "best" those with the best score on the test images.
    evaluate_every
        Epochs between two scores.
    """

    epochs: float = 5.0
    batch: int = 128
    optimizer: str | OptimizerMaker = "sgd"
    learning_rate: float = 0.05
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 1.0
    objective: Objective = field(default_factory=Objective)
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: Literal["bf16", "float32"] = "bf16"
    device: str = "auto"
    batch_norm: Literal["insert", "keep", "freeze"] = "insert"
    seed: int = 0
    keep: Literal["last", "best"] = "last"
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        if not self.epochs > 0 or self.batch < 1 or not self.learning_rate > 0 or not 0 <= self.warmup < 1:
            raise PlanError(
                "training needs positive epochs, batch and learning rate and a warm-up in [0, 1), not "
                f"{self.epochs}, {self.batch}, {self.learning_rate}, {self.warmup}"
            )
        if isinstance(self.optimizer, str) and self.optimizer not in ("sgd", "adamw"):
            raise PlanError(f"no optimizer {self.optimizer!r}; choose sgd or adamw, or give a function")


def cosine_rate(step: int, steps: int, warmup: float) -> float:
    """Learning rate of a step as a share of the highest: up linearly, then down as half a cosine."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_optimizer(module: Any, options: TrainingOptions) -> Any:
    """Return the optimiser for a module's parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not isinstance(options.optimizer, str):
        return options.optimizer(groups, options.learning_rate)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, options.learning_rate)
    return torch.optim.SGD(groups, options.learning_rate, momentum=options.momentum, nesterov=options.momentum > 0)


def find_device(name: str) -> Any:
    """Return the device of that name.

    Raises
    ------
    EnvironmentMismatchError
        If this PyTorch has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentMismatchError(
            f"PyTorch cannot use the device {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return device
