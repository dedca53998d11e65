"""Whether a plan is for a model and a target, and how two plans differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_nm.errors import PlanError
from tvm_nm.fingerprint import plain_target, structure_digest
from tvm_nm.inventory import Layer
from tvm_nm.plan import LayerChoice, Plan, near_names

__all__ = ["PlanDifference", "check_match", "check_plan", "diff_plans"]


@dataclass(frozen=True, slots=True)
class PlanDifference:
    """A layer of which two plans think differently.

    Attributes
    ----------
    name
        The layer.
    before, after
        What the plans choose; None where one does not name the layer.
    """

    name: str
    before: LayerChoice | None
    after: LayerChoice | None


def check_plan(plan: Plan, layers: Sequence[Layer], model_sha256: str, target: Any = None) -> None:
    """Check that a plan can be applied to a model, and was made for it and for the target.

    Parameters
    ----------
    plan
        The plan. One without origin is checked against the layers only.
    layers
        The model's layers.
    model_sha256
        Hash of the model's file.
    target
        The `tvm.target.Target`, with its number of threads; None where weights are pruned without building anything.

    Raises
    ------
    PlanError
        If it is for something else; says what differs.
    """
    by_name = {layer.name: layer for layer in layers}
    for choice in plan.layers:
        if choice.name not in by_name:
            raise PlanError(
                f"the plan names layer {choice.name!r}, which the model does not have; "
                f"{near_names(choice.name, by_name)}"
            )
        layer = by_name[choice.name]
        try:
            choice.pattern.mask(np.ones(layer.weight_shape, np.float32), choice.density, layer.groups)
        except ValueError as error:
            raise PlanError(f"layer {choice.name!r} cannot be pruned to {choice.pattern}: {error}") from error
    origin = plan.origin
    if origin is None:
        return
    check_match(
        "the plan",
        {
            "structure": origin.structure,
            "model": origin.model,
            "model_sha256": origin.model_sha256,
            "target": origin.target,
            "threads": origin.threads,
        },
        layers,
        model_sha256,
        target,
    )


def check_match(
    what: str, made_for: Mapping[str, Any], layers: Sequence[Layer], model_sha256: str, target: Any
) -> None:
    """Check that a plan or a cost table was made for a model and a target.

    Parameters
    ----------
    what
        What to call it in errors.
    made_for
        Its structure, model, model_sha256, target and threads.
    layers, model_sha256, target
        As `check_plan`.

    Raises
    ------
    PlanError
        If something differs.
    """
    if made_for["structure"] != structure_digest(layers):
        raise PlanError(f"{what} was made for another network ({made_for['model']}): its layers differ; plan again")
    if made_for["model_sha256"] != model_sha256:
        raise PlanError(f"{what} was made for {made_for['model']} with other weights: the file differs; plan again")
    if target is None:
        return
    here, threads = plain_target(json.loads(str(target))), int(target.attrs["num-cores"])
    if plain_target(made_for["target"]) != here:
        raise PlanError(
            f"{what} was made for the target {json.dumps(plain_target(made_for['target']))} and this is "
            f"{json.dumps(here)}; plan again"
        )
    if made_for["threads"] != threads:
        raise PlanError(
            f"{what} was made for {made_for['threads']} threads and {threads} are asked for; plan again or use "
            f"--threads {made_for['threads']}"
        )


def diff_plans(before: Plan, after: Plan) -> tuple[PlanDifference, ...]:
    """Return the layers of which two plans think differently, in the order of the first, then of the second."""
    first = {choice.name: choice for choice in before.layers}
    second = {choice.name: choice for choice in after.layers}
    names = list(dict.fromkeys([*first, *second]))
    return tuple(
        PlanDifference(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)
    )
