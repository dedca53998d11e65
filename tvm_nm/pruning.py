"""Pruning on request: one pattern for all layers that are worth it, in a module or in an ONNX file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx
import tvm

from tvm_nm.calibration import CalibrationImages
from tvm_nm.detect import Detection, detect_pattern
from tvm_nm.errors import ArtifactError, CalibrationError, PlanError
from tvm_nm.fingerprint import model_sha256
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.inventory import Layer, inventory, layer_calls
from tvm_nm.json_file import check_writable, write_bytes
from tvm_nm.layer_pruning import Method
from tvm_nm.masks import PackedMasks
from tvm_nm.onnx_pruning import PrunedOnnx, prune_imported
from tvm_nm.passes.prune import Prune
from tvm_nm.passes.rearrange import LayerOrder
from tvm_nm.passes.rearrange import rearrange as rearrange_module
from tvm_nm.patterns import Dense, SparsityPattern, parse_pattern
from tvm_nm.plan import Plan, uniform_plan
from tvm_nm.plan_check import check_plan
from tvm_nm.rearrangement import OrderSearch, check_search

__all__ = [
    "DEFAULT_DENSITY",
    "DEFAULT_PATTERN",
    "DEFAULT_REARRANGE",
    "Images",
    "LayerSparsity",
    "PruneRequest",
    "chosen_method",
    "inspect_model",
    "open_for",
    "prune_by_plan",
    "prune_file",
    "prune_module",
]

Images: TypeAlias = CalibrationImages | Callable[[tuple[int, ...]], CalibrationImages]
"""Calibration data, or a function from the input's shape (C, H, W) to them."""
DEFAULT_PATTERN = "1x16"
DEFAULT_DENSITY = 0.5
DEFAULT_REARRANGE: OrderSearch = "none"


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What to prune.

    Attributes
    ----------
    pattern
        The sparsity pattern; `tvm_nm.patterns.Dense` prunes nothing.
    density
        Share of weights kept.
    include, exclude
        Globs of layers to prune although they are spared by default, and of layers to leave alone; see
        `tvm_nm.plan.uniform_plan`.
    method
        How weights are dropped; None takes OBS where there is calibration data, else MAGNITUDE.
    rearrange
        How channels change places before; see `tvm_nm.rearrangement`.
    """

    pattern: SparsityPattern
    density: float
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    method: Method | None = None
    rearrange: OrderSearch = DEFAULT_REARRANGE

    @classmethod
    def make(
        cls,
        pattern: str | SparsityPattern = DEFAULT_PATTERN,
        density: float | None = None,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        method: str | Method | None = None,
        rearrange: str = DEFAULT_REARRANGE,
    ) -> PruneRequest:
        """Read a request: pattern and method may be texts, the density may be left to the pattern.

        Raises
        ------
        PlanError
            If the pattern's text form, the method or the rearrangement is unknown, or the density does not go with the
            pattern.
        """
        try:
            chosen = parse_pattern(pattern) if isinstance(pattern, str) else pattern
            if density is None and chosen.fixed_density is None:
                density = DEFAULT_DENSITY
            how = Method(method) if isinstance(method, str) else method
            density = chosen.check_density(density)
            return cls(chosen, density, tuple(include), tuple(exclude), how, check_search(rearrange))
        except ValueError as error:
            raise PlanError(str(error)) from error

    def plan(self, module: tvm.IRModule) -> Plan:
        """Return the plan for the layers of a canonical module.

        Raises
        ------
        PlanError
            If a glob matches no layer.
        """
        return uniform_plan(inventory(module), self.pattern, self.density, self.include, self.exclude)


@dataclass(frozen=True, slots=True)
class LayerSparsity:
    """A layer of a model, and the pattern that its weights are found to have.

    Attributes
    ----------
    layer
        The layer.
    detection
        The pattern and the density.
    """

    layer: Layer
    detection: Detection


def prune_module(module: tvm.IRModule, request: PruneRequest) -> tuple[tvm.IRModule, PackedMasks]:
    """Prune a canonical module.

    Returns
    -------
    The pruned module, and by the names of the pruned layers which weights are left, as `prune_onnx` takes it: in the
    order of the given module, even where the pruned one has its channels in another order.

    Raises
    ------
    PlanError
        If a glob matches no layer.
    """
    plan = uniform_plan(inventory(module), request.pattern, request.density, request.include, request.exclude)
    return prune_by_plan(module, plan, request.rearrange)


def prune_by_plan(
    module: tvm.IRModule, plan: Plan, rearrange: OrderSearch = DEFAULT_REARRANGE
) -> tuple[tvm.IRModule, PackedMasks]:
    """Prune a canonical module as a plan says; returns and raises as `prune_module`."""
    names = {choice.name for choice in plan.layers if not isinstance(choice.pattern, Dense)}
    if not names:
        return module, PackedMasks()
    orders: Mapping[str, LayerOrder] = {}
    if rearrange != "none":
        rearranged = rearrange_module(module, plan, rearrange)
        module, orders = rearranged.module, rearranged.orders
    module = tvm.transform.Sequential([Prune(plan)])(module)
    calls = [found for found in layer_calls(module) if found.layer.name in names]
    return module, PackedMasks(
        (name, orders[name].undo(mask) if name in orders else mask)
        for name, mask in ((found.layer.name, found.weight_view != 0) for found in calls)
    )


def chosen_method(method: Method | None, images: CalibrationImages | None) -> Method:
    """Return the method to use with these calibration data, or without any.

    Raises
    ------
    CalibrationError
        If the method needs data and there are none.
    """
    if method is None:
        return Method.MAGNITUDE if images is None else Method.OBS
    if images is None and method is not Method.MAGNITUDE:
        raise CalibrationError(f"method {method.value} needs calibration data: give some (--calib)")
    return method


def open_for(imported: ImportedModel, images: Images | None) -> CalibrationImages | None:
    """Open calibration data for a model's input."""
    if images is None or isinstance(images, CalibrationImages):
        return images
    return images(imported.inputs[0].shape[1:])


def prune_file(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    request: PruneRequest,
    shapes: Mapping[str, Sequence[int]] | None = None,
    images: Images | None = None,
    progress: Callable[[str], None] | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
) -> PrunedOnnx:
    """Prune an ONNX file; the result is the same model with zeros among its weights.

    Parameters
    ----------
    model
        The file.
    output
        The file to write; it is replaced if it exists.
    request
        What to prune.
    shapes
        Shapes of inputs that have symbolic axes; they are needed to read the model and do not end up in the result.
    images
        Calibration data, or a function from the input's shape (C, H, W) to them.
    progress
        Called with the name of each step when it starts, and how far it has come in brackets.

    Returns
    -------
    PrunedOnnx
        What was written, and by the names of the pruned layers which weights are left.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be read.
    PlanError
        If a glob matches no layer, the plan is for something else, or the new order of channels cannot be carried
        through.
    ArtifactError
        If the plan cannot be read or the output cannot be written.
    """
    source, target = Path(model), Path(output)
    if target.exists() and source.exists() and target.samefile(source):
        raise ArtifactError(f"{target} is the model itself; choose another output")
    check_writable(target, "model")
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.load(plan)
    imported = import_onnx(source, shapes=shapes, verify=False)
    data = open_for(imported, images)
    method = chosen_method(request.method, data)
    if plan is None:
        plan = request.plan(imported.module)
    else:
        check_plan(plan, inventory(imported.module), model_sha256(imported))
    modules = [imported.module]
    imported = dataclasses.replace(imported, module=tvm.IRModule())
    done = prune_imported(imported, modules, onnx.load(source), plan, data, method, request.rearrange, progress)
    write_bytes(target, done.model.SerializeToString(), "model")
    return done


def inspect_model(
    model: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[LayerSparsity, ...]:
    """List a model's convolutions and fully connected layers, with the patterns that their weights have.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be read or holds something that cannot be compiled.
    """
    module = import_onnx(model, shapes=shapes, verify=False).module
    return tuple(
        LayerSparsity(found.layer, detect_pattern(found.weight != 0, found.layer.groups))
        for found in layer_calls(module)
    )
