"""One-shot pruning, second stage: all weights that are left are refitted together, to the dense network's answers.

The first stage (`tvm_nm.reconstruction`) fits each layer by itself. What it leaves is made smaller here by training the
whole pruned network, for minutes and without labels, to give the dense network's logits and its activations at the
borders of its blocks, on calibration images that are shifted, mirrored and zoomed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from tvm_nm.calibration import CalibrationImages
from tvm_nm.masks import BoolArray
from tvm_nm.onnx_network import OnnxNetwork
from tvm_nm.torch.data import Augmentation
from tvm_nm.torch.objective import Objective
from tvm_nm.torch.options import TrainingOptions
from tvm_nm.torch.training import Status, Trained, train

__all__ = ["DEFAULTS", "block_borders", "reconstruct_network"]

DEFAULTS = TrainingOptions(
    epochs=10,
    batch=32,
    optimizer="adamw",
    learning_rate=3e-4,
    weight_decay=0.0,
    clip=1.0,
    objective=Objective(distillation=1.0, temperature=2.0, activations=1.0),
    augmentation=Augmentation(shift=4, flip=True),
    batch_norm="freeze",
)
"""What is used unless told otherwise."""
_SHRINKING = ("AveragePool", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMean", "Reshape")


def block_borders(model: onnx.ModelProto) -> tuple[str, ...]:
    """Name the activations at which everything passes through one tensor, the last one before each next layer.

    In a chain these are the inputs of all layers but the first, in a ResNet those of its blocks. Maps are taken before
    they are pooled: there is more to learn from them.
    """
    network = OnnxNetwork(model)
    positions = sorted(layer.position for layer in network.layers.values())
    found: list[str] = []
    for before, after in itertools.pairwise(positions):
        for position in range(after, before, -1):
            crossing = network.frontier(position)
            if len(crossing) == 1 and network.nodes[position - 1].op_type not in _SHRINKING:
                found.append(crossing[0])
                break
    return tuple(dict.fromkeys(found))


def reconstruct_network(
    model: onnx.ModelProto,
    dense: onnx.ModelProto,
    images: CalibrationImages,
    options: TrainingOptions | None = None,
    *,
    masks: Mapping[str, BoolArray] | None = None,
    test: CalibrationImages | None = None,
    checkpoint: Path | None = None,
    keep_checkpoint: bool = False,
    progress: Callable[[Status], None] | None = None,
) -> Trained:
    """Refit the weights of a pruned network together.

    Parameters
    ----------
    model
        The pruned model, best after `tvm_nm.oneshot.prune_calibrated`; it is not changed.
    dense
        The model that it was pruned from.
    images
        Calibration images; labels are not used.
    options
        How; default: `DEFAULTS`. The objective's share of distillation counts as 1.
    masks, test, checkpoint, keep_checkpoint, progress
        As for `tvm_nm.torch.training.train`.

    Raises
    ------
    CalibrationError
        If the images do not fit.
    UnsupportedModelError
        If the model has an operator that cannot be trained, or values that the dense one has not.
    """
    options = options or DEFAULTS
    options = replace(options, objective=replace(options.objective, distillation=1.0))
    return train(
        model,
        images,
        options,
        dense=dense,
        masks=masks,
        test=test,
        activations=block_borders(dense) if options.objective.activations else (),
        checkpoint=checkpoint,
        keep_checkpoint=keep_checkpoint,
        progress=progress,
    )
