"""For users of TVM's own tuner, MetaSchedule: what it needs in order to search this project's templates.

MetaSchedule finds a template by its block's ``schedule_rule`` annotation. Its defaults do not do for these kernels: its
runner fills index tables with the bits of random floats, which crashes the process that runs them; its builder does not
turn LoopPartition on; and importing its tensor intrinsics takes longer than its builder waits.

>>> from tvm.s_tir.meta_schedule import relax_integration                                # doctest: +SKIP
>>> module = tunable_module(import_onnx("net.onnx").module, target)                      # doctest: +SKIP
>>> database = relax_integration.tune_relax(                                             # doctest: +SKIP
...     module, {}, target, "work", 64, op_names=OP_NAMES, space=design_space(),
...     builder=local_builder(), runner=local_runner(module), cost_model="random",
... )
>>> executable = build_tuned(module, target, database)                                   # doctest: +SKIP
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir

from tvm_nm.linker import export_library
from tvm_nm.pipeline import lowering_passes, scheduling_passes
from tvm_nm.schedules.apply import TEMPLATES, pass_context, schedule_function
from tvm_nm.schedules.tensor_intrin_stub import skip_tensor_intrinsics
from tvm_nm.schedules.tuned import TunedKernels

__all__ = ["OP_NAMES", "build_tuned", "design_space", "local_builder", "local_runner", "tunable_module"]

OP_NAMES = ["tvm_nm_conv", "tvm_nm_fc"]
"""Names of the functions that are worth tuning, as `tune_relax` takes them: those whose template samples anything."""

_IndexSteps = dict[tuple[tuple[int, ...], ...], int]


def tunable_module(
    module: tvm.IRModule,
    target: tvm.target.Target,
    *,
    always_sparse: bool = False,
    tuned: TunedKernels | None = None,
) -> tvm.IRModule:
    """Lower a canonical module as far as MetaSchedule wants it: what it shall tune is not scheduled yet, the rest is.

    Parameters
    ----------
    module
        What `import_onnx` returns, perhaps pruned.
    target
        What it is tuned for.
    always_sparse, tuned
        See `tvm_nm.passes.lower.Lower`.
    """
    skip_tensor_intrinsics()
    with target:
        passes = lowering_passes(target, always_sparse=always_sparse, tuned=tuned)
        lowered = tvm.transform.Sequential(passes)(module)
    for name, function in lowered.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc):
            tunable = _is_tunable(name.name_hint)
            function = function if tunable else schedule_function(function, target, name.name_hint)
            if function.attrs.get("tirx.is_scheduled"):
                # Offered as a task by its name all the same; TVM cannot count the work of vectors that are written out.
                function = function.with_attr("estimated_flops", 1)
            # TE and schedules call every function main, and `compile_relax` wants no two functions of one name.
            lowered.update_func(name, function.without_attr("global_symbol"))
    return lowered


def design_space() -> Any:
    """Return the space generator that applies the templates and nothing else."""
    from tvm.s_tir import meta_schedule as ms

    skip_tensor_intrinsics()
    return ms.space_generator.PostOrderApply(
        sch_rules=[ms.schedule_rule.ApplyCustomRule()],
        postprocs=[ms.postproc.DisallowDynamicLoop()],
        mutator_probs={ms.mutator.MutateTileSize(): 1.0},
    )


def local_builder(max_workers: int | None = None, timeout_s: float = 60.0) -> Any:
    """Return a builder that compiles in worker processes; without a compiler, where the target is this architecture."""
    from tvm.s_tir import meta_schedule as ms

    skip_tensor_intrinsics()
    return ms.builder.LocalBuilder(
        max_workers=max_workers,
        timeout_sec=timeout_s,
        f_build=_build,
        f_export=_export,
        initializer=skip_tensor_intrinsics,
    )


def local_runner(module: tvm.IRModule, timeout_s: float = 30.0, repeat: int = 5) -> Any:
    """Return a runner that times in a worker process, with index tables such as the module's kernels read.

    Parameters
    ----------
    module
        What is tuned: `tunable_module` or another module with kernels that are not scheduled.
    timeout_s
        Time limit of a trial.
    repeat
        Times that a trial takes, of at least 20 ms each.
    """
    from tvm.s_tir import meta_schedule as ms

    skip_tensor_intrinsics()
    config = ms.runner.EvaluatorConfig(number=1, repeat=repeat, min_repeat_ms=20, enable_cpu_cache_flush=False)
    return ms.runner.LocalRunner(
        timeout_sec=timeout_s,
        evaluator_config=config,
        f_alloc_argument=partial(_allocate, index_steps=_index_steps(module)),
        initializer=skip_tensor_intrinsics,
    )


def build_tuned(module: tvm.IRModule, target: tvm.target.Target, database: Any) -> Any:
    """Build a module of `tunable_module` with a MetaSchedule database; what it does not know uses default decisions.

    `relax_integration.compile_relax` does the same, but leaves what is unknown unscheduled and the tails of pixel loops
    unpartitioned.

    Returns
    -------
    A `tvm.relax.VMExecutable`.
    """
    with target, database, pass_context():
        passes = [relax.transform.MetaScheduleApplyDatabase(), *scheduling_passes(target)]
        scheduled = tvm.transform.Sequential(passes)(module)
        return tvm.compile(scheduled, target, relax_pipeline=tvm.transform.Sequential([]))


def _is_tunable(name: str) -> bool:
    return any(part in name for part in OP_NAMES)


def _build(module: tvm.IRModule, target: tvm.target.Target, _params: object) -> Any:
    with pass_context():
        return tvm.compile(module, target=target)


def _export(executable: Any) -> str:
    path = Path(tempfile.mkdtemp(prefix="tvm-nm-")) / "trial.so"
    export_library(executable, path, tvm.target.Target({"kind": "llvm"}))
    return str(path)


def _allocate(
    device: Any, descriptions: Sequence[Any], repeat: int, *, index_steps: _IndexSteps
) -> list[list[tvm.runtime.Tensor]]:
    """Return arguments: random floats, and for an integer tensor a table that points into the data."""
    rng = np.random.default_rng(0)
    shapes = tuple(tuple(int(size) for size in description[2]) for description in descriptions)
    arrays = []
    for (_, dtype, _), shape in zip(descriptions, shapes, strict=True):
        if str(dtype).startswith("float"):
            arrays.append(rng.standard_normal(shape, dtype=np.float32).astype(str(dtype)))
        else:
            arrays.append(_table(shapes, shape, index_steps.get(shapes, 1), rng).astype(str(dtype)))
    return [[tvm.runtime.tensor(array, device) for array in arrays] for _ in range(repeat)]


def _table(
    shapes: tuple[tuple[int, ...], ...], shape: tuple[int, ...], step: int, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Return an index table: of each block row some entries of its group's input, in order.

    A table of positions has more entries than its group has channels; the further ones of a channel follow its first.
    """
    groups = shape[0] if len(shape) == 3 else 1
    inputs, kept = shapes[0][1] // groups, shape[-1]
    # A whole row of a kernel's taps is in the padded copy wherever its first tap is.
    positions = -(-kept // inputs)
    entries = (np.arange(inputs)[:, None] * step + np.arange(positions)).reshape(-1)
    rows = [entries[np.sort(rng.permutation(entries.size)[:kept])] for _ in range(math.prod(shape[:-1]))]
    table = np.stack(rows).reshape(shape)
    return table + (np.arange(groups) * inputs * step)[:, None, None] if len(shape) == 3 else table


def _index_steps(module: tvm.IRModule) -> _IndexSteps:
    """Return by the shapes of a kernel's arguments how far its inputs are apart, as its block annotation says."""
    from tvm.s_tir import meta_schedule as ms

    steps: _IndexSteps = {}
    for name, function in module.functions_items():
        if not isinstance(function, tvm.tirx.PrimFunc) or not _is_tunable(name.name_hint):
            continue
        schedule = s_tir.Schedule(function)
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            annotations = schedule.get(block).annotations
            if str(annotations.get("schedule_rule", "")) in TEMPLATES and "tvm_nm_index_step" in annotations:
                arguments = ms.arg_info.ArgInfo.from_prim_func(function)
                shapes = tuple(tuple(int(size) for size in argument.shape) for argument in arguments)
                # Two kernels of other layouts may look alike: the smaller step is right for both.
                steps[shapes] = min(steps.get(shapes, 1 << 30), int(annotations["tvm_nm_index_step"]))
    return steps
