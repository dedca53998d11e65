"""The ordered passes from a canonical module to scheduled code, as a list, a named Relax pipeline and a build."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.layer_report import LayerReport
from tvm_nm.passes.concat import ConcatInPlace, MarkConcats
from tvm_nm.passes.in_place import AddInPlace
from tvm_nm.passes.keep_weights import KeepExpandedWeights
from tvm_nm.passes.lower import Lower, layer_reports
from tvm_nm.passes.power import QuarterPowers
from tvm_nm.schedules.apply import ApplyDefaultSchedules, pass_context
from tvm_nm.schedules.tuned import TunedKernels

__all__ = ["PIPELINE", "Built", "build_executable", "lowering_passes", "scheduling_passes", "tvm_nm_pipeline"]

PIPELINE = "tvm_nm"
"""Name under which Relax knows the pipeline: ``tvm.compile(mod, target, relax_pipeline="tvm_nm")``."""


def lowering_passes(
    target: tvm.target.Target,
    *,
    always_sparse: bool = False,
    winograd: bool = True,
    tuned: TunedKernels | None = None,
    chains: bool = True,
) -> list[tvm.transform.Pass]:
    """Return the passes from a canonical (perhaps pruned) module to one of unscheduled PrimFuncs only.

    The options are those of `Lower`.
    """
    return [
        QuarterPowers(),
        Lower(target, always_sparse=always_sparse, winograd=winograd, tuned=tuned, chains=chains),
        MarkConcats(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        # Reshapes become views here; once scheduled they would not be recognised.
        relax.transform.RewriteDataflowReshape(),
    ]


def scheduling_passes(target: tvm.target.Target) -> list[tvm.transform.Pass]:
    """Return the passes that schedule the PrimFuncs and lower Relax to the virtual machine."""
    return [
        ApplyDefaultSchedules(target),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        KeepExpandedWeights(),
        ConcatInPlace(),
        AddInPlace(),
        *cpu_generic.finalize_passes(target),
    ]


@relax.register_pipeline(PIPELINE)  # type: ignore[untyped-decorator]
def tvm_nm_pipeline(target: tvm.target.Target | None = None) -> tvm.transform.Pass:
    """Return the whole pipeline for `tvm.compile`, from a canonical module to the virtual machine.

    Build within `tvm_nm.schedules.apply.pass_context()` for full speed.

    Parameters
    ----------
    target
        Default: the current target.
    """

    @tvm.transform.module_pass(opt_level=0, name=PIPELINE)  # type: ignore[untyped-decorator]
    def pipeline(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        chosen = target or tvm.target.Target.current(allow_none=False)
        with chosen:
            return tvm.transform.Sequential([*lowering_passes(chosen), *scheduling_passes(chosen)])(mod)

    return pipeline


@dataclass(frozen=True, slots=True)
class Built:
    """A built module.

    Attributes
    ----------
    executable
        The Relax virtual machine's executable, to be exported or run.
    layers
        What became of each layer, in call order.
    """

    executable: Any
    layers: tuple[LayerReport, ...]


def build_executable(
    module: tvm.IRModule,
    target: tvm.target.Target,
    *,
    always_sparse: bool = False,
    winograd: bool = True,
    tuned: TunedKernels | None = None,
    chains: bool = True,
) -> Built:
    """Lower, schedule and compile a canonical module.

    Parameters
    ----------
    module
        What `import_onnx` returns, perhaps pruned; it is not changed.
    target
        An LLVM target whose `num-cores` is the number of threads.
    always_sparse, winograd, tuned, chains
        See `Lower`.

    Raises
    ------
    UnsupportedModelError
        If TVM has no implementation of an operator.
    """
    lowering = lowering_passes(target, always_sparse=always_sparse, winograd=winograd, tuned=tuned, chains=chains)
    with target, pass_context():
        lowered = tvm.transform.Sequential(lowering)(module)
        reports = layer_reports(lowered)
        scheduled = tvm.transform.Sequential(scheduling_passes(target))(lowered)
        try:
            executable = tvm.compile(scheduled, target, relax_pipeline=_already_lowered())
        except tvm.error.InternalError as error:
            found = re.search(r"Offending call:\s*([\w.]+)", str(error))
            if found is None:
                raise
            raise UnsupportedModelError(
                "TVM imports this operator but cannot compile it; export the model without it", op=found[1]
            ) from error
    return Built(executable, reports)


def _already_lowered() -> tvm.transform.Pass:
    return tvm.transform.Sequential([])
