"""MetaSchedule users tune and apply the templates through TVM's own calls."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from models import Net
from tvm import relax
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule import relax_integration

from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.pipeline import build_executable
from tvm_nm.pruning import PruneRequest, prune_module
from tvm_nm.schedules.channel_conv import ChannelConvKernel
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import host_target, machine_of
from tvm_nm.schedules.variants import ranked_kernels, variant_text
from tvm_nm.tuning.database import TuningDatabase, open_records
from tvm_nm.tuning.metaschedule import (
    OP_NAMES,
    build_tuned,
    design_space,
    local_builder,
    local_runner,
    tunable_module,
)
from tvm_nm.tuning.tasks import model_tasks
from tvm_nm.tuning.trials import Trial
from tvm_nm.workload import ConvWorkload

TARGET = host_target(1)
MACHINE = machine_of(TARGET)
IMAGE = np.random.default_rng(3).standard_normal((1, 16, 14, 14), np.float32)


@pytest.fixture(scope="module")
def pruned() -> tvm.IRModule:
    """A sparse 3x3 layer (a table of positions), a sparse 1x1 layer (of channels), a softmax and a pool."""
    net = Net((1, 16, 14, 14))
    x = net.add("Relu", net.conv("input", (32, 16, 3, 3), pads=[1, 1, 1, 1]))
    x = net.conv(net.add("MaxPool", x, kernel_shape=[2, 2]), (48, 32, 1, 1))
    imported: ImportedModel = import_onnx(net.model(net.add("Softmax", x, axis=1)))
    module, masks = prune_module(imported.module, PruneRequest.make("1x4p", 0.25, include=["*"]))
    assert len(masks) == 2
    return module


def run(executable: Any, image: np.ndarray = IMAGE) -> np.ndarray:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return np.array(machine["main"](tvm.runtime.tensor(image)).numpy())


def tune(module: tvm.IRModule, work_dir: Path, trials: int) -> Any:
    """Return TVM's database of two rounds of trials."""
    return relax_integration.tune_relax(
        module,
        {},
        TARGET,
        str(work_dir),
        max_trials_global=trials,
        num_trials_per_iter=trials // 2,
        op_names=OP_NAMES,
        space=design_space(),
        builder=local_builder(max_workers=1),
        runner=local_runner(module, repeat=1),
        cost_model="random",
        strategy="replay-trace",
        seed=1,
    )


@pytest.fixture(scope="module")
def tuned(pruned: tvm.IRModule, tmp_path_factory: pytest.TempPathFactory) -> tuple[tvm.IRModule, Any, Path]:
    module = tunable_module(pruned, TARGET, always_sparse=True)
    work_dir = tmp_path_factory.mktemp("work")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that is scheduled already is offered for tuning
        database = tune(module, work_dir, trials=6)
    return module, database, work_dir


def test_every_trial_ran(tuned: tuple[tvm.IRModule, Any, Path]) -> None:
    _, database, work_dir = tuned
    trials = database.get_all_tuning_records()
    assert len(trials) == 6
    # Trials that crash, as they all do with MetaSchedule's own runner, are recorded with 1e10 s.
    assert all(0 < float(seconds) < 1 for trial in trials for seconds in trial.run_secs)
    assert len(ms.database.JSONDatabase(work_dir=str(work_dir)).get_all_tuning_records()) == 6


@pytest.mark.parametrize("build", ["compile_relax", "build_tuned"])
def test_what_was_tuned_is_applied_and_right(
    pruned: tvm.IRModule, tuned: tuple[tvm.IRModule, Any, Path], build: str
) -> None:
    module, database, _ = tuned
    extracted = relax_integration.extract_tasks(module, TARGET)
    kernels = [task for task in extracted if any(name in task.task_name for name in OP_NAMES)]
    assert len(kernels) == 2
    for task in kernels:
        assert database.query_tuning_record(task.dispatched[0], TARGET, task.task_name) is not None
    if build == "compile_relax":
        executable = relax_integration.compile_relax(database, module, TARGET, None)
    else:
        executable = build_tuned(module, TARGET, database)
    expected = run(build_executable(pruned, TARGET, always_sparse=True).executable)
    np.testing.assert_allclose(run(executable), expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_is_written_out_does_not_stop_the_tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a first layer: it has no template, and TVM cannot count its work."""
    net = Net((1, 3, 24, 24))
    x = net.add("Relu", net.conv("input", (32, 3, 3, 3), pads=[1, 1, 1, 1]))
    imported = import_onnx(net.model(net.conv(x, (32, 32, 1, 1))))
    module = tunable_module(imported.module, TARGET)
    scheduled = [f for _, f in module.functions_items() if f.attrs and f.attrs.get("tirx.is_scheduled")]
    assert scheduled
    # TVM trips over the handlers that its tuner left there the last time.
    monkeypatch.setattr(logging.getLogger("tvm.s_tir.meta_schedule"), "handlers", [])
    database = tune(module, tmp_path, trials=4)
    image = np.random.default_rng(0).standard_normal((1, 3, 24, 24), np.float32)
    want = run(build_executable(imported.module, TARGET).executable, image)
    np.testing.assert_allclose(run(build_tuned(module, TARGET, database), image), want, rtol=1e-4, atol=1e-4)


def test_the_database_changes_the_schedules(tuned: tuple[tvm.IRModule, Any, Path]) -> None:
    module, database, _ = tuned
    with TARGET, database:
        applied = relax.transform.MetaScheduleApplyDatabase()(module)
    for name, function in applied.functions_items():
        if any(part in name.name_hint for part in OP_NAMES):
            assert function.attrs["tirx.is_scheduled"]
            assert not tvm_ffi.structural_equal(function, module[name])


def test_metaschedule_finds_the_records_of_tune(pruned: tvm.IRModule, tmp_path: Path) -> None:
    mine = TuningDatabase(tmp_path, TARGET)
    mine.start(1.0)
    for item in model_tasks(pruned, MACHINE):
        if not item.task.winograd:
            kernel = ranked_kernels(item.task, MACHINE, 4)[-1]
            mine.add([Trial(item.task, variant_text(kernel), 1.0)])
    mine.commit_records(best for best in map(mine.best, mine.tasks()) if best is not None)
    module = tunable_module(pruned, TARGET, always_sparse=True, tuned=mine)
    database = open_records(mine.folder)
    for task in relax_integration.extract_tasks(module, TARGET):
        found = database.query_tuning_record(task.dispatched[0], TARGET, task.task_name)
        assert (found is not None) == any(name in task.task_name for name in OP_NAMES)
    expected = run(build_executable(pruned, TARGET, always_sparse=True).executable)
    np.testing.assert_allclose(run(build_tuned(module, TARGET, database)), expected, rtol=1e-5, atol=1e-6)


def test_records_open_in_a_process_that_did_not_write_them(tmp_path: Path) -> None:
    """Schedules of channel-vector kernels name a tensor intrinsic, which only the process that made it knows."""
    work = ConvWorkload(1, 16, 32, 14, 14, (3, 3), padding=(1, 1, 1, 1))
    task = KernelTask("conv", work, 1)
    kernel = next(k for k in ranked_kernels(task, MACHINE, 12) if isinstance(k, ChannelConvKernel))
    mine = TuningDatabase(tmp_path, TARGET)
    mine.start(1.0)
    mine.add([Trial(task, variant_text(kernel), 1.0)])
    mine.commit_records([best for best in [mine.best(task)] if best is not None])
    script = (
        "import sys; from tvm_nm.tuning.database import open_records; "
        "print(len(open_records(sys.argv[1]).get_all_tuning_records()))"
    )
    command = [sys.executable, "-c", script, str(mine.folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert found.stdout.split() == ["1"]
