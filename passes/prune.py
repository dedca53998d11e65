"""Zeroes the weights that a plan drops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_nm.errors import PlanError
from tvm_nm.inventory import LayerCall, layer_calls
from tvm_nm.masks import BoolArray
from tvm_nm.patterns import Dense
from tvm_nm.plan import LayerChoice, Plan, near_names

__all__ = ["Prune", "prune_masks"]


def prune_masks(
    weights: Mapping[str, NDArray[Any]], plan: Plan, groups: Mapping[str, int] | None = None
) -> dict[str, BoolArray]:
    """Choose the weights to keep in every layer that the plan prunes: those of the largest L1 norm.

    Parameters
    ----------
    weights
        Every layer's weight by name, shape (OC, IC / groups, KH, KW).
    plan
        What to prune. Layers that it leaves dense get no mask.
    groups
        Groups by layer name; 1 where a name is missing.

    Returns
    -------
    Masks by layer name, of the weights' shapes, True where a weight is kept.

    Raises
    ------
    PlanError
        If the plan names a layer without a weight, or one whose weight is not finite.
    """
    groups = groups or {}
    masks = {}
    for choice in plan.layers:
        if choice.name not in weights:
            raise _unknown(choice.name, weights)
        if not isinstance(choice.pattern, Dense):
            masks[choice.name] = _mask(choice, weights[choice.name], groups.get(choice.name, 1))
    return masks


def _mask(choice: LayerChoice, weight: NDArray[Any], groups: int) -> BoolArray:
    saliency = np.abs(weight, order="C")
    try:
        return choice.pattern.mask(saliency, choice.density, groups)
    except ValueError as error:
        raise PlanError(f"layer {choice.name!r} cannot be pruned to {choice.pattern}: {error}") from error


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.Prune")
class Prune:
    """Zero the weights that a plan drops; the module stays plain dense Relax of the same structure.

    Parameters
    ----------
    plan
        What each layer is pruned to, by layer name; other layers stay as they are.

    Raises
    ------
    PlanError
        When the pass runs, if the plan names a layer that the module lacks.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the pruned module."""
        calls = {found.layer.name: found for found in layer_calls(mod)}
        pruned = {}
        for choice in self.plan.layers:
            if choice.name not in calls:
                raise _unknown(choice.name, calls)
            if isinstance(choice.pattern, Dense):
                continue
            found = calls[choice.name]
            # Layer by layer and without copies in between: a weight may have hundreds of megabytes.
            weight = found.weight_view
            mask = _mask(choice, weight, found.layer.groups)
            pruned[found.var] = _masked(weight, mask, found)
        main = mod.get_global_var("main")
        result = mod.clone()
        result.update_func(main, _Replace(mod, pruned).visit_expr(mod[main]))
        return result


def _masked(weight: NDArray[Any], mask: BoolArray, found: LayerCall) -> Any:
    """Return the pruned weight as a constant in the form that the call takes."""
    shape, argument = found.call.args[1].value.shape, found.call.args[1].value
    tensor = tvm.runtime.empty(shape, str(argument.dtype))
    target = np.from_dlpack(tensor)
    if found.layer.kind == "fc":
        weight, mask = (array.reshape(array.shape[:2]).T for array in (weight, mask))
    np.copyto(target, 0)  # not a product with the mask: that would leave negative zeros
    np.copyto(target, weight, where=mask)
    return relax.const(tensor)


def _unknown(name: str, known: Iterable[str]) -> PlanError:
    return PlanError(f"the plan names layer {name!r}, which the model does not have; {near_names(name, known)}")


@mutator
class _Replace(PyExprMutator):  # type: ignore[misc]
    """Puts new weights into the calls that are bound to the given variables."""

    def __init__(self, mod: tvm.IRModule, weights: Mapping[Any, Any]) -> None:
        super().__init__(mod)
        self.weights = weights

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Replace the second argument of a chosen call."""
        weight = self.weights.get(binding.var)
        if weight is not None:
            call = binding.value
            value = relax.Call(call.op, [call.args[0], weight], call.attrs, call.ty_args)
            binding = relax.VarBinding(binding.var, value)
        super().visit_var_binding_(binding)
