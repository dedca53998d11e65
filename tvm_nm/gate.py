"""The gate: a build that answers too differently from the dense network fails, and says what would pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm

from tvm_nm.agreement import Agreement, share_interval
from tvm_nm.calibration import CalibrationImages
from tvm_nm.errors import GateError, PlanError
from tvm_nm.evaluation import answers_of_artifact, answers_of_onnx, compare
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.layer_pruning import Method
from tvm_nm.onnx_pruning import prune_imported
from tvm_nm.patterns import NM, OneByN, SparsityPattern, TileNM
from tvm_nm.plan import Plan, uniform_plan
from tvm_nm.pruning import Images, PruneRequest, open_for
from tvm_nm.runtime import CompiledModel

__all__ = ["Alternative", "Gate", "Recipe", "best_passing", "check_build", "denser"]

_STEP = 16  # densities are looked at in sixteenths


@dataclass(frozen=True, slots=True)
class Alternative:
    """Something less sparse that could be built instead.

    Attributes
    ----------
    label
        How to ask for it.
    plan
        What it prunes.
    """

    label: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a build was pruned.

    Attributes
    ----------
    request
        What was asked for.
    plan
        The plan that took the place of its pattern and density; None for none.
    images
        Calibration data.
    method
        How weights were dropped.
    reconstruction
        Directory of the database that layers were taken from; None for none.
    """

    request: PruneRequest
    plan: Plan | None
    images: CalibrationImages | None
    method: Method
    reconstruction: str | os.PathLike[str] | None = None

    def denser(self, module: tvm.IRModule) -> list[Alternative]:
        """Return the same pattern at other densities, the sparsest first."""
        layers, request, found = inventory(module), self.request, []
        for pattern, density in denser(request.pattern, request.density):
            plan = uniform_plan(layers, pattern, density, request.include, request.exclude)
            label = f"--pattern {pattern}" if pattern.fixed_density is not None else f"--density {density:g}"
            found.append(Alternative(label, plan))
        return found


@dataclass(frozen=True, slots=True)
class Gate:
    """What a build must reach; one limit or both.

    Attributes
    ----------
    min_agreement
        Least share of images for which it prefers the same class as the dense network, in (0, 1].
    max_drop
        Most points of top-1 in per cent that it may lose; needs labels.
    images
        Images to judge by, or a function from the input's shape (C, H, W) to them; default: the calibration data.
    alternatives
        What else might be built instead of a plan, the fastest first: if the build fails, the first of these that
        passes is named. What is pruned uniformly is tried at other densities.

    Raises
    ------
    PlanError
        If neither is given, or one is out of range.
    """

    min_agreement: float | None = None
    max_drop: float | None = None
    images: Images | None = None
    alternatives: Sequence[Alternative] = ()

    def __post_init__(self) -> None:
        if self.min_agreement is None and self.max_drop is None:
            raise PlanError("a gate needs --min-agreement or --max-drop")
        if self.min_agreement is not None and not 0 < self.min_agreement <= 1:
            raise PlanError(f"--min-agreement {self.min_agreement:g} is no share in (0, 1], such as 0.98")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise PlanError(f"--max-drop {self.max_drop:g} is no number of points from 0 to 100")

    def passes(self, found: Agreement) -> bool:
        """Whether a build may be used."""
        return not self.failures(found)

    def failures(self, found: Agreement) -> list[str]:
        """Say what is wrong with a build, with 95% intervals; nothing if it passes.

        Raises
        ------
        GateError
            If there are no labels and the gate needs them.
        """
        lines = []
        if self.min_agreement is not None and found.same < self.min_agreement:
            low, high = share_interval(found.same, found.images)
            lines.append(
                f"it agrees with the dense network on {found.same:.2%} of {found.images} images "
                f"({low:.1%} to {high:.1%}), {self.min_agreement:.2%} are wanted"
            )
        if self.max_drop is not None:
            interval = found.drop_interval
            if found.drop is None or interval is None:
                raise GateError("--max-drop needs images with labels; give some with --data")
            # Not `drop > limit`: differences of shares such as 0.812 - 0.802 exceed 0.01 by their rounding.
            if found.drop * found.images > self.max_drop / 100 * found.images + 1e-6:
                lines.append(
                    f"its top-1 is {100 * found.drop:.2f} points lower ({100 * interval[0]:.1f} to "
                    f"{100 * interval[1]:.1f} on {found.images} images), {self.max_drop:g} are allowed"
                )
        return lines


def denser(pattern: SparsityPattern, density: float) -> list[tuple[SparsityPattern, float]]:
    """Patterns and densities of the same kind that keep more than the given one, the sparsest first."""
    if isinstance(pattern, NM):
        return [(NM(n, pattern.m), n / pattern.m) for n in range(pattern.n + 1, pattern.m)]
    if isinstance(pattern, TileNM):
        return [(TileNM(n, pattern.m, pattern.tile), n / pattern.m) for n in range(pattern.n + 1, pattern.m)]
    if isinstance(pattern, OneByN):
        return [(pattern, step / _STEP) for step in range(1, _STEP) if step / _STEP > density + 1e-9]
    return []


def check_build(
    gate: Gate, built: CompiledModel, dense: ImportedModel, recipe: Recipe, progress: Callable[[str], None]
) -> Agreement:
    """Judge a build.

    Parameters
    ----------
    gate
        What it must be like.
    built
        The build.
    dense
        What it was built from; its module is not needed.
    recipe
        How it was pruned.
    progress
        Called with the name of each step when it starts, and how far it has come in brackets.

    Returns
    -------
    How it compares with the dense network.

    Raises
    ------
    GateError
        If it does not pass, or there are no images to judge it by; the message says what would pass.
    """
    images = recipe.images
    if gate.images is not None:
        images = open_for(dense, gate.images)
    if images is None:
        raise GateError("a build is judged on images: give some with --data or --calib")
    if gate.max_drop is not None and images.labels is None:
        raise GateError("--max-drop needs images with labels: give some with --data")
    wanted = answers_of_onnx(dense.onnx, images)
    found = compare(wanted, answers_of_artifact(built, images, progress), images)
    failures = gate.failures(found)
    if not failures:
        return found
    imported = import_onnx(dense.onnx, verify=False)

    def judged(alternative: Alternative) -> Agreement:
        progress(f"looking for what passes: {alternative.label}")
        pruned = prune_imported(
            imported,
            [imported.module],
            dense.onnx,
            alternative.plan,
            recipe.images,
            recipe.method,
            recipe.request.rearrange,
            database=recipe.reconstruction,
        )
        return compare(wanted, answers_of_onnx(pruned.model, images), images)

    alternatives = gate.alternatives if recipe.plan is not None else recipe.denser(imported.module)
    passing = best_passing(gate, alternatives, judged)
    if passing is not None:
        alternative, better = passing
        same = f"{better.same:.2%} agreement"
        drop = "" if better.drop is None else f", {100 * better.drop:.2f} points lower"
        advice = f"{alternative.label} passes ({same}{drop})"
    elif alternatives:
        advice = f"not even {alternatives[-1].label} passes"
    else:
        advice = "plan with a larger budget" if recipe.plan is not None else "nothing denser is left to try"
    raise GateError(f"the build fails: {'; '.join(failures)}; {advice}")


def best_passing(
    gate: Gate, alternatives: Sequence[Alternative], judge: Callable[[Alternative], Agreement]
) -> tuple[Alternative, Agreement] | None:
    """Find the sparsest alternative that passes, by halving: denser ones are taken to answer better.

    Parameters
    ----------
    gate
        What is wanted.
    alternatives
        The sparsest first.
    judge
        Prunes and runs one.

    Returns
    -------
    The alternative and how it does, or None if even the densest fails.
    """
    first, last = 0, len(alternatives)
    found = None
    while first < last:
        middle = (first + last) // 2
        agreement = judge(alternatives[middle])
        if gate.passes(agreement):
            found, last = (alternatives[middle], agreement), middle
        else:
            first = middle + 1
    return found
