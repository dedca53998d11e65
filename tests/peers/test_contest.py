from __future__ import annotations

from pathlib import Path

import pytest

from tvm_nm.errors import PlanError
from tvm_nm.peers.contest import Block, Entry, groups
from tvm_nm.peers.models import ModelFile, Variant, variants
from tvm_nm.peers.registry import Peer
from tvm_nm.peers.table import Contest, best_peer, contest_rows, markdown, to_dict

DENSE = Variant("dense", "dense", 1.0)
SPARSE = Variant("1x16@0.5", "1x16", 0.5)
OTHER = Variant("2:4", "2:4", 0.5)


def _never(_: object) -> object:
    raise AssertionError


def _peer(name: str, precision: str = "fp32") -> Peer:
    return Peer(name, _never, precision=precision)  # type: ignore[arg-type]


def _entry(
    name: str, times: list[float], variant: Variant = DENSE, *, precision: str = "fp32", error: float = 1e-6
) -> Entry:
    file = ModelFile("net", variant, Path(__file__), Path(), ("y",), 1_000_000, 1_000_000 * variant.density, "")
    blocks = [Block(number, ms, 100.0) for number, ms in enumerate(times)]
    return Entry(_peer(name, precision), file, 1, blocks, error)


def test_variants_are_dense_and_every_pattern_at_every_density() -> None:
    found = variants(["1x16", "2:4", "dense"], [0.5, 0.25])
    assert [(v.name, v.pattern, v.density) for v in found] == [
        ("dense", "dense", 1.0),
        ("1x16@0.5", "1x16", 0.5),
        ("1x16@0.25", "1x16", 0.25),
        ("2:4", "2:4", 0.5),
    ]


@pytest.mark.parametrize(("pattern", "density"), [("3:2", 0.5), ("1x16", 1.5), ("blocks", 0.5)])
def test_impossible_variants_are_refused(pattern: str, density: float) -> None:
    with pytest.raises(PlanError):
        variants([pattern], [density])


def test_ratios_are_taken_within_a_round() -> None:
    # The clock halves after the first round; the medians alone would say that both are equally fast.
    ours, other = _entry("a", [1.0, 2.0, 2.0]), _entry("b", [2.0, 4.0, 4.0])
    assert ours.speed_against(other) == 2.0
    ours.blocks = ours.blocks[1:]
    other.blocks = [Block(0, 100.0, 1.0), *other.blocks[1:]]
    assert ours.speed_against(other) == 2.0
    other.blocks = [Block(7, 100.0, 1.0)]
    assert ours.speed_against(other) is None


def test_share_of_peak_counts_weights_that_are_not_zero() -> None:
    # 1e6 multiply-accumulates in 0.04 ms are 50 GFLOP/s.
    assert _entry("a", [0.04] * 3).share_of_peak == pytest.approx(0.5)
    assert _entry("a", [0.04] * 3, SPARSE).share_of_peak == pytest.approx(0.25)


def test_the_best_peer_is_the_fastest_right_one_in_float32() -> None:
    ours = _entry("tvm_nm", [1.0], SPARSE)
    entries = [
        ours,
        _entry("half", [2.0], precision="its default"),
        _entry("wrong", [3.0], error=0.1),
        _entry("elsewhere", [4.0], OTHER),
        _entry("pruned", [5.0], SPARSE),
        _entry("dense", [6.0]),
    ]
    best = best_peer(ours, entries, "tvm_nm")
    assert best is not None
    assert best.peer.name == "pruned"
    best = best_peer(_entry("tvm_nm", [1.0]), entries, "tvm_nm")
    assert best is not None
    assert best.peer.name == "dense"
    assert best_peer(ours, [ours], "tvm_nm") is None


def test_models_that_do_not_fit_together_are_measured_in_groups() -> None:
    entries = [_entry(name, [], variant) for variant in (DENSE, SPARSE, OTHER) for name in ("tvm_nm", "a", "b")]
    (everything,) = groups(entries, 1e12, "tvm_nm")
    assert sorted(entry.name for entry in everything) == sorted(entry.name for entry in entries)
    core = [e for e in entries if e.file.variant is DENSE or e.peer.name == "tvm_nm"]
    parts = groups(entries, 0.0, "tvm_nm")
    assert len(parts) == 4
    assert all(part[: len(core)] == core for part in parts)
    assert [part[len(core) :] for part in parts] == [[e] for e in entries if e not in core]


def test_tables_show_every_contestant_and_who_was_skipped() -> None:
    failed = _entry("broken", [])
    failed.error, failed.note = None, "cannot load | it"
    entries = (_entry("tvm_nm", [1.0, 1.0]), _entry("onnxruntime", [2.0, 2.0]), failed)
    contest = Contest("net", 1, entries, (90.0, 100.0, 110.0), {"absent": "absent not installed"}, 1_000_000)
    rows = contest_rows(contest, "tvm_nm")
    assert [row["runtime"] for row in rows] == ["tvm_nm", "onnxruntime", "broken", "absent"]
    assert rows[0]["vs onnxruntime"] == rows[0]["vs best fp32"] == "2.00x"
    assert rows[1]["vs onnxruntime"] == "1.00x"
    assert "median ms" not in rows[2]
    assert rows[3]["note"] == "absent not installed"
    text = markdown([contest], "tvm_nm")
    assert "100 GFLOP/s in the median, 90 to 110" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    (data,) = to_dict([contest], "tvm_nm")["contests"]
    assert data["rows"][0]["speed_vs_best_fp32_peer"] == 2.0
    assert data["rows"][0]["best_fp32_peer"] == "onnxruntime dense"
    assert data["rows"][2]["note"] == "cannot load | it"
