"""From an ONNX model to a verified artefact."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm

from tvm_nm.artifact import LIBRARY, REPORT, check_output, staged_artifact
from tvm_nm.environment import check_environment, missing_features, package_versions
from tvm_nm.errors import CalibrationError, EnvironmentMismatchError, ModelMismatchError, PlanError
from tvm_nm.fingerprint import model_sha256
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.gate import Gate, Recipe, check_build
from tvm_nm.inventory import inventory, layer_calls
from tvm_nm.layer_pruning import Method
from tvm_nm.linker import export_library
from tvm_nm.manifest import MANIFEST, Manifest, Verification
from tvm_nm.masks import BoolArray, PackedMasks
from tvm_nm.memory import release_memory
from tvm_nm.onnx_pruning import PrunedOnnx, prune_imported
from tvm_nm.passes.rearrange import REARRANGEMENT_ATTR, rearrangement_report
from tvm_nm.patterns import SparsityPattern
from tvm_nm.pipeline import Built, build_executable
from tvm_nm.plan import Plan
from tvm_nm.plan_check import check_plan
from tvm_nm.prune_onnx import prune_onnx
from tvm_nm.pruning import (
    DEFAULT_PATTERN,
    DEFAULT_REARRANGE,
    Images,
    PruneRequest,
    chosen_method,
    open_for,
    prune_by_plan,
    prune_module,
)
from tvm_nm.reference_run import compare, random_inputs, run_onnx
from tvm_nm.report import report_text
from tvm_nm.runtime import CompiledModel
from tvm_nm.targets import processor, resolve_target
from tvm_nm.tuning.tables import tuned_kernels

__all__ = ["TOLERANCE", "compile", "write_library"]

TOLERANCE = 1e-3
"""Largest difference from onnxruntime that a build may have, relative to the output's largest value.

Rounding in another order gives about 1e-6; a wrong index or a missing halo gives percents.
"""

_log = logging.getLogger(__name__)


def compile(  # noqa: A001  (tvm_nm.compile is what it is called)
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    output: str | os.PathLike[str] | None = None,
    pattern: str | SparsityPattern = DEFAULT_PATTERN,
    density: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    plan: Plan | str | os.PathLike[str] | None = None,
    method: str | Method | None = None,
    images: Images | None = None,
    reconstruction: str | os.PathLike[str] | None = None,
    rearrange: str = DEFAULT_REARRANGE,
    threads: int | None = None,
    target: Mapping[str, Any] | str | tvm.target.Target | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    database: str | os.PathLike[str] | None = None,
    shipped_records: bool = True,
    verify: bool = True,
    winograd: bool = True,
    overwrite: bool = True,
    gate: Gate | None = None,
    progress: Callable[[str], None] | None = None,
) -> CompiledModel:
    """Prune an ONNX model, compile it, check it against onnxruntime and write the artefact.

    Parameters
    ----------
    model
        A file, or a model in memory with its weights.
    output
        Directory for the artefact; None builds into a temporary one that lives as long as the returned model.
    pattern
        Sparsity pattern, such as ``1x16`` or ``2:4``. ``dense`` prunes nothing; zeros that the model already has in
        a pattern are exploited all the same.
    density
        Share of weights kept; default: what the pattern implies, or else 0.5.
    include, exclude
        Globs of layers to prune although they are spared by default, and of layers to leave alone; see
        `tvm_nm.plan.uniform_plan`.
    plan
        What each layer is pruned to, or the file with it, instead of one pattern and density for all. Sparse kernels
        are used where it says so, whatever the model of the machine thinks of them.
    method
        How weights are dropped: ``magnitude``, ``ls`` or ``obs``; default: ``obs`` where there are `images`, else
        ``magnitude``. See `tvm_nm.layer_pruning.Method`.
    images
        Calibration data (`tvm_nm.calibration.open_images`), or a function from the input's shape (C, H, W) to them. The
        weights that are left are refitted on them.
    reconstruction
        Directory of a `tvm_nm.reconstruction_db.ReconstructionDatabase` to put the pruned layers together from, instead
        of pruning one behind the other, which leaves more accuracy; what it lacks is added. Needs `images`.
    rearrange
        How channels change places before pruning, so that the patterns keep more of the weights: ``none``, ``sort``,
        ``cluster`` or ``swap``; see `tvm_nm.rearrangement`. Inputs and outputs keep their order. With `images`, these
        say which weights matter.
    threads
        Number of threads to build for; default: the processors that this process may use.
    target
        TVM target, as a dictionary, its JSON or a `tvm.target.Target`; default: this machine.
    shapes
        Shapes of inputs that have symbolic axes.
    database
        Directory of a tuning database (see `tvm_nm.tune`), whose records for the target are applied. Layers that it
        does not know use the default variants; the manifest says which those are.
    shipped_records
        Apply the tuned records that come with the package to layers that the database does not know.
    verify
        Compare the library's outputs on a random input with those of onnxruntime running the pruned model.
    winograd
        Let convolutions be computed by Winograd's algorithm where that is faster. Its weights take up to four
        times the memory, though not on disk, and it rounds differently: errors of about 1e-5 of the largest output
        instead of 1e-6.
    overwrite
        Whether an artefact at `output` is replaced.
    gate
        How near the build's answers must be to the dense network's; it fails otherwise.
    progress
        Called with the name of each step when it starts.

    Returns
    -------
    CompiledModel
        The model, ready to be called.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be read or holds something that cannot be compiled.
    PlanError
        If pattern and density do not go together, a glob matches no layer, the plan is for another model or target, or
        the rearrangement is unknown or cannot be carried through.
    CalibrationError
        If the calibration data do not fit the model, or are missing and the method needs them.
    GateError
        If the build does not pass the `gate`; the message names what would.
    ModelMismatchError
        If the outputs differ by more than `TOLERANCE`.
    ArtifactError
        If `output` holds something else or cannot be written; nothing is left behind.
    TuningError
        If `database` cannot be read.
    EnvironmentMismatchError
        If TVM has the wrong version, the target is unknown, or it is not this machine and `verify` is True.

    Examples
    --------
    >>> model = tvm_nm.compile("resnet50.onnx", pattern="1x16", density=0.25)            # doctest: +SKIP
    >>> logits = model(image)                                                            # doctest: +SKIP
    """
    check_environment()
    start = time.perf_counter()
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.load(plan)
    request = PruneRequest.make(pattern if plan is None else "dense", density, include, exclude, method, rearrange)
    chosen = resolve_target(target, threads)
    tuned = tuned_kernels(chosen, database, shipped=shipped_records)
    if verify and (missing := missing_features(*processor(chosen))):
        raise EnvironmentMismatchError(
            f"the target needs {', '.join(missing)}, which this machine lacks, so the build cannot be verified; "
            "turn verification off (--no-verify)"
        )
    temporary = tempfile.TemporaryDirectory(prefix="tvm-nm-") if output is None else None
    directory = Path(output) if output is not None else Path(temporary.name) / "model"  # type: ignore[union-attr]
    check_output(directory.resolve(), overwrite)
    step = progress or (lambda _: None)
    with _cleaned_up(temporary), staged_artifact(directory, overwrite=overwrite) as (new, scratch):
        step("importing")
        imported = import_onnx(model, shapes=shapes, verify=False)
        digest = model_sha256(imported)
        step("pruning")
        if plan is not None:
            check_plan(plan, inventory(imported.module), digest, chosen)
        data = open_for(imported, images)
        dense = dataclasses.replace(imported, module=tvm.IRModule())
        how = chosen_method(request.method, data)
        if reconstruction is not None and request.rearrange != "none":
            raise PlanError("layers of a reconstruction database have their channels in order; leave out --rearrange")
        if reconstruction is not None and how is Method.MAGNITUDE:
            raise CalibrationError("a reconstruction database needs calibration data: give some (--calib)")
        if data is not None and how is not Method.MAGNITUDE:
            wanted = plan if plan is not None else request.plan(imported.module)
            modules = [imported.module]
            imported = dataclasses.replace(imported, module=tvm.IRModule())
            model, order = imported.onnx, request.rearrange
            pruned = prune_imported(imported, modules, model, wanted, data, how, order, step, reconstruction)
            imported = _imported_again(pruned, imported.name, scratch / "calibrated.onnx")
            del pruned
            module, masks = imported.module, PackedMasks()  # the zeros are in the file already
        elif plan is not None:
            module, masks = prune_by_plan(imported.module, plan, request.rearrange)
        else:
            module, masks = prune_module(imported.module, request)
        imported = dataclasses.replace(imported, module=tvm.IRModule())  # its weights are not needed any more
        density = request.density if plan is None else _density(module)
        rearranged = rearrangement_report(module)
        release_memory()
        step("compiling")
        built = build_executable(module, chosen, always_sparse=plan is not None, winograd=winograd, tuned=tuned)
        del module
        release_memory()
        step("linking")
        manifest = write_library(imported, digest, built, chosen, new)
        del built
        if plan is None:
            manifest = dataclasses.replace(
                manifest,
                pattern=str(request.pattern),
                density=density,
                include=request.include,
                exclude=request.exclude,
            )
        else:
            manifest = dataclasses.replace(manifest, pattern="plan", density=density)
        manifest = dataclasses.replace(manifest, rearrangement=rearranged)
        release_memory()
        if verify:
            step("verifying")
            manifest = dataclasses.replace(manifest, verification=_verify(new, manifest, imported, masks, scratch))
        agreement = None
        if gate is not None:
            step("judging")
            recipe = Recipe(request, plan, data, how, reconstruction)
            agreement = check_build(gate, CompiledModel(new, manifest), dense, recipe, step)
        manifest = dataclasses.replace(manifest, build_seconds=round(time.perf_counter() - start, 2))
        (new / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        (new / REPORT).write_text(report_text(manifest), encoding="utf-8")
    return CompiledModel(directory, manifest, temporary=temporary, agreement=agreement)


def write_library(
    imported: ImportedModel, digest: str, built: Built, target: tvm.target.Target, directory: Path
) -> Manifest:
    """Write the library of a build, but not the manifest, to a directory.

    Parameters
    ----------
    imported, digest
        What was built, and its hash; the imported module itself is not needed.
    built
        The build.
    target
        The target with its number of threads.
    directory
        Where the library goes.

    Returns
    -------
    The manifest: not verified, and of a dense model.
    """
    architecture, features = processor(target)
    library = directory / LIBRARY
    return Manifest(
        model=imported.name,
        model_sha256=digest,
        library_sha256=export_library(built.executable, library, target),
        library_bytes=library.stat().st_size,
        inputs=imported.inputs,
        outputs=imported.outputs,
        target=json.loads(str(target)),
        architecture=architecture,
        features=features,
        threads=int(target.attrs["num-cores"]),
        versions=package_versions(),
        pattern="dense",
        density=1.0,
        include=(),
        exclude=(),
        layers=built.layers,
        verification=None,
        build_seconds=0.0,
    )


def _imported_again(pruned: PrunedOnnx, name: str, path: Path) -> ImportedModel:
    """Import a pruned model, by way of a file."""
    onnx.save(pruned.model, path, save_as_external_data=True, location=f"{path.name}.weights")
    pruned.model.Clear()
    found = import_onnx(path, verify=False)
    module = found.module
    if pruned.rearrangement is not None:
        module = module.with_attr(REARRANGEMENT_ATTR, pruned.rearrangement.to_json())
    return dataclasses.replace(found, module=module, name=name)


@contextlib.contextmanager
def _cleaned_up(temporary: tempfile.TemporaryDirectory[str] | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if temporary is not None:
            temporary.cleanup()
        raise


def _verify(
    directory: Path, manifest: Manifest, imported: ImportedModel, masks: Mapping[str, BoolArray], scratch: Path
) -> Verification:
    inputs = random_inputs(manifest.inputs)
    source: Path | onnx.ModelProto = imported.source
    if masks:
        # Through files, and the weights one by one, so that few copies of a large model are in memory at a time.
        source = scratch / "pruned.onnx"
        pruned = prune_onnx(imported.onnx, masks, in_place=True)
        onnx.save(pruned, source, save_as_external_data=True, location="pruned.weights")
        del pruned
    want = run_onnx(source, inputs, manifest.threads)
    release_memory()
    model = CompiledModel(directory, manifest)
    result = model(inputs)
    found = compare(result if isinstance(result, tuple) else (result,), want)
    if not found.max_rel <= TOLERANCE:
        raise ModelMismatchError(
            f"the compiled model disagrees with onnxruntime: {found.describe()} (tolerance {TOLERANCE:.1%}); "
            "please report it with the model"
        )
    _log.info("verified: %s", found.describe())
    return Verification(found.max_abs, found.max_rel, f"onnxruntime {manifest.versions['onnxruntime']}")


def _density(module: tvm.IRModule) -> float:
    calls = layer_calls(module)
    kept = sum(int(np.count_nonzero(found.weight_view)) for found in calls)
    return kept / max(1, sum(found.layer.parameters for found in calls))
