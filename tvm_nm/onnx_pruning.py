"""From an imported model and a plan to a pruned ONNX model, with or without calibration data and rearrangement."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import onnx
import tvm

from tvm_nm.calibration import CalibrationImages
from tvm_nm.errors import ModelMismatchError
from tvm_nm.frontend import ImportedModel
from tvm_nm.inventory import layer_calls
from tvm_nm.layer_pruning import Method
from tvm_nm.masks import PackedMasks
from tvm_nm.oneshot import plan_saliency, prune_calibrated
from tvm_nm.passes.prune import Prune
from tvm_nm.passes.rearrange import rearrange as rearrange_module
from tvm_nm.patterns import Dense
from tvm_nm.plan import Plan
from tvm_nm.prune_onnx import prune_onnx
from tvm_nm.rearrangement import OrderSearch
from tvm_nm.rearrangement_report import RearrangementReport
from tvm_nm.reconstruction import Options
from tvm_nm.reference_run import compare, random_inputs, run_onnx
from tvm_nm.reorder_onnx import reorder_onnx

__all__ = ["PrunedOnnx", "prune_imported"]

_TOLERANCE = 1e-3  # of the largest output; as for builds


@dataclass(frozen=True, slots=True)
class PrunedOnnx:
    """A pruned model.

    Attributes
    ----------
    model
        The model. Its channels are in another order if they were rearranged; inputs and outputs are not.
    masks
        By the names of the pruned layers, which weights are left, in the order of `model`.
    rearrangement
        What rearrangement did, if it was asked for.
    """

    model: onnx.ModelProto
    masks: PackedMasks
    rearrangement: RearrangementReport | None = None


def prune_imported(
    imported: ImportedModel,
    modules: list[tvm.IRModule],
    model: onnx.ModelProto,
    plan: Plan,
    images: CalibrationImages | None = None,
    method: Method = Method.MAGNITUDE,
    rearrange: OrderSearch = "none",
    progress: Callable[[str], None] | None = None,
    database: str | os.PathLike[str] | None = None,
) -> PrunedOnnx:
    """Prune an imported model to a plan.

    Parameters
    ----------
    imported
        The imported model; its module is not looked at.
    modules
        A list of its module, which is taken from it, so that its memory can be given back.
    model
        The same with its weights as an ONNX model; it is changed in place.
    plan
        What to prune.
    images
        Calibration data, for any other method than MAGNITUDE. If there are any, they also say which weights matter
        when channels are rearranged.
    method
        How weights are dropped.
    rearrange
        How channels change places before; see `tvm_nm.rearrangement`.
    progress
        Called with the name of each step when it starts, and how far it has come in brackets.
    database
        Directory of a database of reconstructed layers, as for `tvm_nm.oneshot.prune_calibrated`; for channels in their
        original order only.

    Raises
    ------
    ArtifactError
        If the database is of something else.
    CalibrationError
        If the data do not fit the model.
    PlanError
        If the plan names a layer that the model lacks, or the new order of channels cannot be carried through.
    """

    def tell(what: str) -> Callable[[str, int, int], None]:
        def each(name: str, number: int, count: int) -> None:
            if progress is not None:
                progress(f"{what} ({number + 1} of {count}: {name})")

        return each

    module = modules.pop()
    report = None
    if rearrange != "none" and any(not isinstance(choice.pattern, Dense) for choice in plan.layers):
        worth = None
        if images is not None and method is not Method.MAGNITUDE:
            worth = plan_saliency(model, module, plan, images, tell("weighing"))
        found = rearrange_module(module, plan, rearrange, worth)
        module, report = found.module, found.report
        if found.orders:
            reorder_onnx(model, found.orders)
            _check_same(imported, model)
        del found
    if method is Method.MAGNITUDE:
        return PrunedOnnx(*_by_magnitude(model, module, plan), report)
    assert images is not None
    modules.append(module)
    del module
    done = prune_calibrated(model, modules, plan, images, Options(method=method), tell("pruning"), database)
    return PrunedOnnx(model, PackedMasks(done.masks.items()), report)


def _by_magnitude(model: onnx.ModelProto, module: tvm.IRModule, plan: Plan) -> tuple[onnx.ModelProto, PackedMasks]:
    names = {choice.name for choice in plan.layers if not isinstance(choice.pattern, Dense)}
    if not names:
        return model, PackedMasks()
    pruned = tvm.transform.Sequential([Prune(plan)])(module)
    masks = PackedMasks(
        (call.layer.name, call.weight_view != 0) for call in layer_calls(pruned) if call.layer.name in names
    )
    return prune_onnx(model, masks, in_place=True), masks


def _check_same(imported: ImportedModel, model: onnx.ModelProto) -> None:
    """Make sure that a model computes what it did before its channels changed places."""
    inputs = random_inputs(imported.inputs)
    found = compare(run_onnx(model, inputs), run_onnx(imported.source, inputs))
    if not found.max_rel <= _TOLERANCE:
        raise ModelMismatchError(
            f"the rearranged model disagrees with the original: {found.describe()}; leave out --rearrange, and please "
            "report it with the model"
        )
