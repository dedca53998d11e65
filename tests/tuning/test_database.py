"""The tuning database: its file, what it answers, and what it makes of damage."""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tvm

from tvm_nm.errors import TuningError
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.variants import default_kernel, ranked_kernels, variant_text
from tvm_nm.tuning.database import TuningDatabase, open_records, target_name
from tvm_nm.tuning.tables import KernelTables
from tvm_nm.tuning.trials import Trial
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "skylake-avx512", "num-cores": 1})
MACHINE = machine_of(TARGET)
WORK = ConvWorkload(1, 64, 64, 28, 28, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(False, 0.0))
DENSE = KernelTask("conv", WORK, 1)
HALF = KernelTask("conv", WORK, 1, IndexKind.CHANNEL, 16, 32)


def variants(task: KernelTask) -> list[str]:
    return [variant_text(kernel) for kernel in ranked_kernels(task, MACHINE, 4)]


def filled(directory: Path, *trials: Trial) -> TuningDatabase:
    database = TuningDatabase(directory, TARGET)
    database.start(50.0)
    database.add(trials)
    return database


def test_what_is_added_is_read_again(tmp_path: Path) -> None:
    first, second, third, _ = variants(DENSE)
    written = filled(
        tmp_path, Trial(DENSE, first, 300.0), Trial(DENSE, second, 200.0), Trial(DENSE, third, float("inf"), "crashed")
    )
    written.add([], {DENSE: "full"})
    read = TuningDatabase(tmp_path, replace_threads(TARGET, 2))
    best = read.best(DENSE)
    assert best is not None
    assert (variant_text(best.kernel), best.latency_us, best.origin, best.predicted) == (
        second,
        200.0,
        "measured",
        False,
    )
    assert [(trial.variant, trial.error) for trial in read.failures(DENSE)] == [(third, "crashed")]
    assert read.finished == {DENSE: "full"}
    assert read.yardstick_us == 50.0
    assert read.tasks() == (DENSE,)
    assert read.trials == written.trials


def replace_threads(target: tvm.target.Target, threads: int) -> tvm.target.Target:
    return tvm.target.Target({**json.loads(str(target)), "num-cores": threads, "keys": ["cpu"]})


def test_threads_are_part_of_the_task(tmp_path: Path) -> None:
    database = filled(tmp_path, Trial(DENSE, variants(DENSE)[0], 300.0))
    assert database.best(replace(DENSE, threads=2)) is None


def test_the_latest_time_of_a_variant_counts(tmp_path: Path) -> None:
    first = variants(DENSE)[0]
    filled(tmp_path, Trial(DENSE, first, 300.0), Trial(DENSE, first, 310.0))
    best = TuningDatabase(tmp_path, TARGET).best(DENSE)
    assert best is not None
    assert best.latency_us == 310.0


def test_targets_have_folders_of_their_own(tmp_path: Path) -> None:
    filled(tmp_path, Trial(DENSE, variants(DENSE)[0], 300.0))
    haswell = tvm.target.Target({"kind": "llvm", "mcpu": "haswell"})
    assert TuningDatabase(tmp_path, haswell).best(DENSE) is None
    more = tvm.target.Target({"kind": "llvm", "mcpu": "haswell", "mattr": ["+avx512f"]})
    assert len({target_name(target) for target in (TARGET, haswell, more)}) == 3


def test_other_densities_are_interpolated(tmp_path: Path) -> None:
    text = variants(HALF)[0]
    database = filled(
        tmp_path,
        Trial(HALF, text, 200.0),
        Trial(HALF.with_kept(16), text, 120.0),
        Trial(HALF.with_kept(48), text, 260.0),
    )
    for kept, latency_us in ((24, 160.0), (40, 230.0), (56, 290.0), (8, 80.0)):
        found = database.best(HALF.with_kept(kept))
        assert found is not None
        assert found.predicted
        assert found.origin == "interpolated"
        assert found.latency_us == pytest.approx(latency_us)
        assert found.kernel.kept == kept
    # Far outside the line must not become free or negative.
    lowest = database.best(HALF.with_kept(1))
    assert lowest is not None
    assert lowest.latency_us > 0
    assert database.best(replace(HALF, block=4)) is None


def test_one_density_is_scaled_by_the_model(tmp_path: Path) -> None:
    database = filled(tmp_path, Trial(HALF, variants(HALF)[0], 200.0))
    found = database.best(HALF.with_kept(16))
    assert found is not None
    assert 80 < found.latency_us < 180


def test_another_epilogue_has_the_same_variant(tmp_path: Path) -> None:
    database = filled(tmp_path, Trial(DENSE, variants(DENSE)[2], 200.0))
    other = replace(DENSE, workload=replace(WORK, epilogue=Epilogue(True, 0.0)))
    found = database.best(other)
    assert found is not None
    assert (found.origin, variant_text(found.kernel)) == ("interpolated", variants(DENSE)[2])
    assert found.kernel.workload == other.workload


def test_a_layer_with_maxima_has_the_variant_without_them(tmp_path: Path) -> None:
    task = HALF.as_winograd
    pooled = replace(task, workload=task.workload.pooled(MaxPool()))
    text = variants(task)[2]
    database = filled(tmp_path, Trial(task, text, 200.0), Trial(task.with_kept(16), text, 120.0))
    found = database.best(pooled)
    assert found is not None
    assert (found.origin, variant_text(found.kernel)) == ("interpolated", text)
    assert found.kernel.workload.epilogue.pool
    assert 120.0 < found.latency_us < 200.0  # a quarter of the stores
    # Also where the layer without maxima was measured at other densities only.
    between, plain = (database.best(t.with_kept(24)) for t in (pooled, task))
    assert between is not None
    assert plain is not None
    assert variant_text(between.kernel) == text
    assert between.latency_us < plain.latency_us == pytest.approx(160.0)
    # Its own record goes first, and direct kernels have none of either.
    database.add([Trial(pooled, variants(task)[1], 150.0)])
    own = database.best(pooled)
    assert own is not None
    assert (own.origin, own.latency_us) == ("measured", 150.0)
    assert database.best(HALF) is None


def test_an_exact_record_of_a_later_table_goes_before_a_prediction(tmp_path: Path) -> None:
    text = variants(HALF)[0]
    mine = filled(tmp_path / "mine", Trial(HALF.with_kept(16), text, 100.0))
    theirs = filled(tmp_path / "theirs", Trial(HALF, text, 500.0))
    tables = KernelTables((mine, theirs))
    for task, latency_us in ((HALF, 500.0), (HALF.with_kept(16), 100.0)):
        best = tables.best(task)
        assert best is not None
        assert best.latency_us == latency_us
    assert tables.best(DENSE) is None


def test_damaged_lines_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, *_ = variants(DENSE)
    database = filled(tmp_path, Trial(DENSE, first, 300.0))
    with database.path.open("a") as file:
        file.write('{"task": "nonsense", "variant": "x", "us": 1}\n')
        file.write(json.dumps({"task": str(DENSE), "variant": second, "us": -1}) + "\n[]\n")
        file.write('{"task": "conv 64x')  # a crash in the middle of a line
    database.add([Trial(DENSE, second, 250.0)])
    with caplog.at_level(logging.WARNING):
        read = TuningDatabase(tmp_path, TARGET)
    assert len(caplog.records) == 4
    assert {trial.latency_us for trial in read.best_trials(DENSE)} == {250.0, 300.0}


@pytest.mark.parametrize("name", ["database_tuning_record.json", "database_workload.json"])
def test_damaged_records_are_made_again_from_the_trials(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Of a process that was killed, or a disk that was full, while they were written."""
    database = filled(tmp_path, Trial(DENSE, variants(DENSE)[0], 300.0))
    best = database.measured(DENSE)
    assert best is not None
    database.commit_records([best])
    path = database.folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        database.commit_records([])
    assert "made again" in caplog.text
    assert len(open_records(database.folder)) == 1


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = variants(DENSE)
    database = filled(tmp_path, Trial(DENSE, first, 300.0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TuningError, match=r"cannot write tuning database .*: No space left on device; what was"):
        database.add([Trial(DENSE, second, 250.0)])
    assert [trial.variant for trial in database.best_trials(DENSE)] == [first]


def test_a_record_that_no_variant_fits_is_not_used(tmp_path: Path) -> None:
    good = variants(DENSE)[0]
    database = filled(tmp_path, Trial(DENSE, "pixel 9x9 padded pitch 1 rows 1 task 1", 1.0), Trial(DENSE, good, 300.0))
    best = database.best(DENSE)
    assert best is not None
    assert best.kernel == default_kernel(DENSE, MACHINE)


@pytest.mark.parametrize(
    "header", ["", "{}\n", '{"format": "tvm_nm trials", "version": 99, "yardstick_us": 1, "target": {}}\n']
)
def test_a_file_that_is_no_database(tmp_path: Path, header: str) -> None:
    database = filled(tmp_path)
    database.path.write_text(header)
    with pytest.raises(TuningError, match="remove it"):
        TuningDatabase(tmp_path, TARGET)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "db").write_text("x")
    with pytest.raises(TuningError, match="not a directory"):
        TuningDatabase(tmp_path / "db", TARGET)
