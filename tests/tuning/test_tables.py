"""The records that come with the package."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import tvm

from tvm_nm.schedules.kernel_task import TEMPLATE_REVISION, parse_task
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.variants import kernel_from_text, ranked_kernels, variant_text
from tvm_nm.tuning import tables
from tvm_nm.tuning.tables import families_of, shipped_tables, tuned_kernels

SKYLAKE = tvm.target.Target({"kind": "llvm", "mcpu": "skylake-avx512"})
ZEN = tvm.target.Target({"kind": "llvm", "mcpu": "znver4"})
HASWELL = tvm.target.Target({"kind": "llvm", "mcpu": "haswell"})
ARM = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]})
TASK = "conv 64x56x56->64 k3x3 p1,1,1,1 bias+relu; 1x16 channel 32; 1 thread"


def test_families() -> None:
    found = [families_of(target) for target in (SKYLAKE, ZEN, HASWELL, ARM)]
    assert found == [("avx512",), ("zen-avx512", "avx512"), ("avx2",), ()]
    assert not shipped_tables(ARM)
    assert tuned_kernels(ARM) is None
    assert tuned_kernels(SKYLAKE, shipped=False) is None


def test_shipped_records_are_found_by_family_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    task = parse_task(TASK)
    kernel = ranked_kernels(task, machine_of(SKYLAKE), 4)[-1]
    record = json.dumps({"task": TASK, "variant": variant_text(kernel), "us": 900.0})
    monkeypatch.setattr(tables, "_shipped_text", lambda family: f"{{}}\n{record}\n" if family == "avx512" else None)
    found = tuned_kernels(SKYLAKE)
    assert found is not None
    best = found.best(task)
    assert best is not None
    assert (best.origin, best.predicted, best.kernel) == ("shipped", True, kernel)
    assert tuned_kernels(HASWELL) is None  # nothing of another family
    # A prediction from another machine's times is theirs, too: it does not compare with this machine's.
    other = found.best(task.with_kept(16))
    assert other is not None
    assert other.origin == "shipped"


def test_the_nearest_family_goes_first_and_tables_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    task = parse_task(TASK)
    near, far = ranked_kernels(task, machine_of(ZEN), 2)

    def text(family: str) -> str:
        kernel = near if family == "zen-avx512" else far
        return "{}\n" + json.dumps({"task": TASK, "variant": variant_text(kernel), "us": 900.0})

    monkeypatch.setattr(tables, "_shipped_text", text)
    for target, kernel, family in ((ZEN, near, "zen-avx512"), (SKYLAKE, far, "avx512")):
        found = tuned_kernels(target)
        assert found is not None
        best = found.best(task)
        assert best is not None
        assert (best.kernel, best.table) == (kernel, family)


@pytest.mark.parametrize("family", ["avx512", "zen-avx512", "avx2"])
def test_every_shipped_record_is_valid(family: str) -> None:
    target = {"avx512": SKYLAKE, "zen-avx512": ZEN, "avx2": HASWELL}[family]
    assert family in families_of(target)
    path = resources.files("tvm_nm") / "data" / "tuned" / f"{family}.r{TEMPLATE_REVISION}.jsonl"
    text = Path(str(path)).read_text()
    assert len(text) < 300_000
    lines = [json.loads(line) for line in text.splitlines()[1:]]
    assert len({(line["task"], "us" in line) for line in lines}) == len(lines) > 20  # one variant a task
    for line in lines:
        task = parse_task(line["task"])
        kernel_from_text(line["variant"], task, replace(machine_of(target), threads=task.threads))
        assert line.get("us", line.get("within_us")) > 0
