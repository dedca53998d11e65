"""The cost table, its file, interpolation and merging."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from cost_tables import table

from tvm_nm.cost_merge import add_density, interpolate_times, merge_tables
from tvm_nm.costs import Candidate, CostTable, LayerCosts, TimeSource
from tvm_nm.errors import ArtifactError, PlanError
from tvm_nm.patterns import NM, Dense, OneByN

SMALL = table(
    [
        [("dense", 1.0, 9.5, 0.0), ("4", 0.5, 5.25, 0.4), ("16", 0.25, 3.0, 0.7)],
        [("dense", 1.0, 4.0, 0.0)],
    ],
    fixed=1.5,
)


def test_json_round_trips() -> None:
    assert CostTable.from_json(SMALL.to_json()) == SMALL


def test_file_has_a_line_for_each_candidate_and_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text("old")
    SMALL.save(path)
    assert CostTable.load(path) == SMALL
    assert os.listdir(tmp_path) == ["costs.json"]
    lines = [line for line in path.read_text().splitlines() if '"pattern"' in line]
    assert len(lines) == 4
    assert json.loads(lines[1].strip().rstrip(",")) == {
        "pattern": "1x4",
        "density": 0.5,
        "time_us": 5.25,
        "source": "measured",
        "macs": 500,
        "bytes": 2028,
        "errors": {"l1": 0.4},
        "kernel": "k",
    }


def test_unwritable_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write cost table .*nowhere.*: No such file"):
        SMALL.save(tmp_path / "nowhere" / "costs.json")
    with pytest.raises(ArtifactError, match=r"cannot read cost table .*missing\.json: No such file"):
        CostTable.load(tmp_path / "missing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        CostTable.load(tmp_path / "binary")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "", "is not JSON"),
        ('"tvm_nm costs"', '"else"', "is not a cost table"),
        ('"version": 1', '"version": 9', "version 9 and this tvm_nm reads version 1"),
        ('"fixed_us": 1.5,', "", "lacks 'fixed_us'"),
        ('"density": 0.5', '"density": 2', "density 2.0 is not in"),
        ('"1x4"', '"1x"', "bad sparsity pattern"),
        ('"measured"', '"guessed"', "guessed"),
        ('"time_us": 5.25', '"time_us": -1', "1x4 at 0.5 has the cost -1"),
        ('"time_us": 5.25', '"time_us": NaN', "nan"),
        ('"layer1"', '"layer0"', "a layer twice"),
        ('"density": 0.25', '"density": 0.25, "errors": 3', "mapping|attribute|object"),
    ],
)
def test_bad_files_are_named_and_explained(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.json"
    text = SMALL.to_json()
    assert old in text
    if "errors" in new:
        text = text.replace('"errors": {"l1": 0.7}', '"errors": 3')
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ArtifactError, match=message) as error:
        CostTable.load(path)
    assert str(path) in str(error.value)


def test_layers_need_dense_and_no_candidate_twice() -> None:
    sparse = Candidate(OneByN(4), 0.5, 1.0)
    with pytest.raises(ValueError, match="lacks the dense candidate"):
        LayerCosts("a", "conv", "", "", 1, (sparse,))
    with pytest.raises(ValueError, match="a candidate twice"):
        LayerCosts("a", "conv", "", "", 1, (Candidate(Dense(), 1.0, 1.0), sparse, sparse))
    with pytest.raises(ValueError, match="pattern 2:4 has density"):
        Candidate(NM(2, 4), 0.25, 1.0)


def test_dense_time_and_look_ups() -> None:
    assert SMALL.dense_us == 15
    assert SMALL.metrics == ("l1",)
    layer = SMALL.layer("layer0")
    assert layer is not None
    assert layer.find(OneByN(16), 0.25) is layer.candidates[2]
    assert layer.find(OneByN(16), 0.5) is None
    assert layer.loss(layer.candidates[1], "l1") == pytest.approx(0.2)
    assert SMALL.layer("other") is None
    assert [candidate.label for candidate in layer.candidates] == ["dense", "1x4 at 0.5", "1x16 at 0.25"]


def test_interpolation_is_a_line_between_and_beyond_the_points() -> None:
    points = [(0.75, 8.0), (0.25, 4.0), (0.5, 5.0)]
    found = interpolate_times(points, [0.25, 0.375, 0.5, 0.7, 0.9, 0.125])
    assert found == pytest.approx([4.0, 4.5, 5.0, 7.4, 9.8, 3.5])
    assert interpolate_times([(0.5, 10.0), (1.0, 100.0)], [0.1]) == pytest.approx([1.0])
    assert interpolate_times([(0.5, 6.0)], [0.5, 1.0]) == pytest.approx([6.0, 10.0])


def test_merging_prefers_better_sources_and_keeps_errors() -> None:
    def one(source: TimeSource, time: float, **errors: float) -> CostTable:
        layer = SMALL.layers[0]
        sparse = dataclasses.replace(layer.candidates[1], source=source, time_us=time, errors=errors)
        changed = dataclasses.replace(layer, candidates=(layer.candidates[0], sparse))
        return dataclasses.replace(SMALL, layers=(changed,))

    measured = one(TimeSource.MEASURED, 5.0, l1=0.4)
    guessed = one(TimeSource.INTERPOLATED, 7.0, l2=0.3)
    for merged in (merge_tables(measured, guessed), merge_tables(guessed, measured)):
        found = merged.layers[0].find(OneByN(4), 0.5)
        assert found is not None
        assert (found.time_us, found.source, found.errors) == (5.0, TimeSource.MEASURED, {"l1": 0.4, "l2": 0.3})
    assert merge_tables(measured, one(TimeSource.MEASURED, 6.0)).layers[0].candidates[1].time_us == 6.0
    more = merge_tables(measured, SMALL)
    assert [candidate.label for candidate in more.layers[0].candidates] == ["dense", "1x4 at 0.5", "1x16 at 0.25"]
    with pytest.raises(PlanError, match="threads is 1 in one and 2 in the other"):
        merge_tables(SMALL, dataclasses.replace(SMALL, threads=2))


def test_a_density_more() -> None:
    layer = SMALL.layers[0]
    quarter = Candidate(OneByN(4), 0.25, 3.25, macs=100, bytes=40, errors={"l1": 0.8})
    half = dataclasses.replace(layer.candidates[1], macs=300, bytes=80)
    table = dataclasses.replace(
        SMALL, layers=(dataclasses.replace(layer, candidates=(layer.candidates[0], half, quarter)), *SMALL.layers[1:])
    )
    added = add_density(table, OneByN(4), 0.375)
    found = added.layers[0].find(OneByN(4), 0.375)
    assert found is not None
    assert (found.time_us, found.macs, found.bytes) == (pytest.approx((half.time_us + 3.25) / 2), 200, 60)
    assert found.source is TimeSource.INTERPOLATED
    assert found.errors["l1"] == pytest.approx((half.errors["l1"] + 0.8) / 2)
    assert added.layers[1:] == table.layers[1:]  # they do not have the pattern
    assert add_density(added, OneByN(4), 0.375) == added
