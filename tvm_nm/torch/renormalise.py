"""Batch norms for models whose own were folded into their convolutions: training needs them, the result does not.

A folded model is hard to train: its convolutions have weights of very different scale, and nothing holds the scale of
activations. A batch norm is put behind each convolution such that the model computes what it did; it is trained with
them, and on the way back they are folded in again. A scale of an output channel keeps its zeros, so masks hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tvm_nm.torch.model import BatchNorm, TorchModel

__all__ = ["insert_batch_norms"]

_EPSILON = 1e-5


def insert_batch_norms(model: TorchModel, batches: Iterable[Any]) -> int:
    """Put a batch norm behind each convolution that has a bias, and none of its own.

    Filters are scaled to norm 1, which the batch norm undoes, so that one learning rate suits them all. Convolutions
    that share their weight or are run more than once are left as they are.

    Parameters
    ----------
    model
        The model, changed in place.
    batches
        Inputs (N, C, H, W) on the module's device, of whose activations the running statistics are taken.

    Returns
    -------
    How many there are.
    """
    sites = _sites(model)
    moments = _moments(model.module, [str(node.target) for node in sites], batches)
    graph = model.module.graph
    with torch.no_grad():
        for node in sites:
            path = str(node.target)
            convolution = model.module.get_submodule(path)
            mean, variance = moments[path]
            norm = convolution.weight.flatten(1).norm(dim=1).clamp_min(1e-12)
            made = BatchNorm(len(norm), _EPSILON, device=norm.device)
            made.weight.copy_((variance + _EPSILON).sqrt())
            made.bias.copy_(mean)
            # The convolution's outputs shrink with its filters; epsilon stays where it was beside the variance.
            made.running_mean.copy_((mean - convolution.bias) / norm)
            made.running_var.copy_((variance + _EPSILON) / norm**2 - _EPSILON)
            tiny = made.running_var <= 0
            made.running_var[tiny] = 0.0
            made.weight[tiny] = norm[tiny] * _EPSILON**0.5
            convolution.weight.div_(norm.reshape(-1, *[1] * (convolution.weight.dim() - 1)))
            convolution.bias = None  # the batch norm has one
            added = model.add_norm(path, made)
            with graph.inserting_after(node):
                call = graph.call_module(added, (node,))
            node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    graph.lint()
    model.module.recompile()
    return len(sites)


def _sites(model: TorchModel) -> list[Any]:
    """Find the calls of convolutions that get a batch norm."""
    nodes = [node for node in model.module.graph.nodes if node.op == "call_module"]
    calls: dict[str, int] = {}
    owners: dict[int, int] = {}
    for node in nodes:
        calls[str(node.target)] = calls.get(str(node.target), 0) + 1
        weight = getattr(model.module.get_submodule(str(node.target)), "weight", None)
        owners[id(weight)] = owners.get(id(weight), 0) + 1
    found = []
    for node in nodes:
        module = model.module.get_submodule(str(node.target))
        followed = any(
            user.op == "call_module" and isinstance(model.module.get_submodule(str(user.target)), BatchNorm)
            for user in node.users
        )
        alone = calls[str(node.target)] == 1 and owners[id(getattr(module, "weight", None))] == 1
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.bias is not None and alone and not followed:
            found.append(node)
    return found


def _moments(module: Any, paths: list[str], batches: Iterable[Any]) -> dict[str, tuple[Any, Any]]:
    """Mean and variance of each output channel of some submodules, over all batches."""
    sums: dict[str, list[Any]] = {}

    def hook(path: str) -> Any:
        def add(_module: Any, _inputs: Any, output: Any) -> None:
            values = output.detach().double().transpose(0, 1).flatten(1)
            part = [values.shape[1], values.sum(1), values.square().sum(1)]
            sums[path] = [a + b for a, b in zip(sums[path], part, strict=True)] if path in sums else part

        return module.get_submodule(path).register_forward_hook(add)

    hooks = [hook(path) for path in paths]
    module.eval()
    with torch.no_grad():
        for batch in batches:
            module(batch)
    for handle in hooks:
        handle.remove()
    found = {}
    for path, (count, total, squares) in sums.items():
        mean = total / count
        found[path] = mean.float(), (squares / count - mean.square()).clamp_min(0).float()
    return found
