"""Keeps pruned weights of a PyTorch module at zero while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tvm_nm.errors import PlanError
from tvm_nm.masks import BoolArray
from tvm_nm.patterns import SparsityPattern
from tvm_nm.torch.model import TorchModel

__all__ = ["WeightMasks", "choose_masks", "masks_of_zeros"]


def masks_of_zeros(model: TorchModel) -> dict[str, BoolArray]:
    """Return, for each layer that has zeros among its weights, which weights are not zero.

    Returns
    -------
    By layer name, shape (OC, IC / groups, KH, KW).
    """
    weights = ((name, model.weight(name)) for name in model.layers)
    return {name: weight != 0 for name, weight in weights if not weight.all()}


def choose_masks(model: TorchModel, choices: Mapping[str, tuple[SparsityPattern, float]]) -> dict[str, BoolArray]:
    """Choose the weights to keep by their present magnitude.

    Parameters
    ----------
    model
        The model.
    choices
        By layer name, pattern and density.

    Raises
    ------
    PlanError
        If there is no such layer.
    """
    found = {}
    for name, (pattern, density) in choices.items():
        groups = getattr(model.layer(name), "groups", 1)
        found[name] = pattern.mask(np.abs(model.weight(name)), density, groups)
    return found


class WeightMasks:
    """The weights of a model that stay zero.

    Gradients of dropped weights are zeroed as they are computed, so that no momentum builds up and clipping by norm
    does not see them. After every step of an optimiser that was handed to `lock` the weights are zeroed again, whatever
    it did, and so is its state.

    Parameters
    ----------
    model
        The model; its weights are zeroed at once.
    masks
        By layer name, shape (OC, IC / groups, KH, KW), True where a weight is kept; default: `masks_of_zeros`.

    Raises
    ------
    PlanError
        If a mask names no layer of the model or does not fit its weight.
    """

    def __init__(self, model: TorchModel, masks: Mapping[str, BoolArray] | None = None) -> None:
        self._model = model
        self._dropped: dict[Any, Any] = {}  # parameter -> True where a weight is dropped
        self._hooks: list[Any] = []
        self._names: dict[str, Any] = {}
        self.replace(masks_of_zeros(model) if masks is None else masks)

    @property
    def masks(self) -> dict[str, BoolArray]:
        """The masks by layer name."""
        return {
            name: self._model.as_layer(~self._dropped[parameter].cpu().numpy())
            for name, parameter in self._names.items()
        }

    def replace(self, masks: Mapping[str, BoolArray], optimizer: Any | None = None) -> None:
        """Take other masks; weights that were zero start at zero.

        Parameters
        ----------
        masks
            As for the class.
        optimizer
            The optimiser whose state is to be zeroed as well.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._dropped, self._names = [], {}, {}
        for name, mask in masks.items():
            parameter = self._model.layer(name).weight
            if self._model.as_layer(np.empty(tuple(parameter.shape), np.bool_)).shape != mask.shape:
                raise PlanError(f"layer {name!r}: a mask of shape {mask.shape} does not fit {tuple(parameter.shape)}")
            dropped = torch.from_numpy(~np.ascontiguousarray(mask, np.bool_).reshape(tuple(parameter.shape)))
            dropped = dropped.to(parameter.device)
            if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
                dropped = dropped.contiguous(memory_format=torch.channels_last)
            if parameter in self._dropped:  # two layers share the weight: kept is what both keep
                dropped = dropped | self._dropped[parameter]
            self._dropped[parameter] = dropped
            self._names[name] = parameter
        for parameter, dropped in self._dropped.items():
            self._hooks.append(parameter.register_hook(_masked(dropped)))
        self.apply()
        if optimizer is not None:
            self._zero_state(optimizer)

    def lock(self, optimizer: Any) -> None:
        """Zero the dropped weights again after each step of a `torch.optim.Optimizer`."""
        optimizer.register_step_post_hook(lambda *_: self.apply())

    def apply(self) -> None:
        """Zero the dropped weights now."""
        with torch.no_grad():
            for parameter, dropped in self._dropped.items():
                parameter.masked_fill_(dropped, 0.0)

    def _zero_state(self, optimizer: Any) -> None:
        with torch.no_grad():
            for parameter, dropped in self._dropped.items():
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        value.masked_fill_(dropped, 0.0)


def _masked(dropped: Any) -> Any:
    return lambda gradient: gradient.masked_fill(dropped, 0.0)
