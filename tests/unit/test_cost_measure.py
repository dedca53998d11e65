"""Costs that are measured in the network."""

from __future__ import annotations

import math

import pytest
from models import small_cnn

from tvm_nm.cost_measure import CandidateGrid, measure_costs
from tvm_nm.costs import TimeSource
from tvm_nm.errors import PlanError
from tvm_nm.fingerprint import model_sha256, structure_digest
from tvm_nm.frontend import import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.patterns import NM, Dense, OneByN
from tvm_nm.targets import resolve_target


def test_every_layer_gets_every_candidate() -> None:
    imported = import_onnx(small_cnn(), verify=False)
    layers = inventory(imported.module)
    grid = CandidateGrid((OneByN(4), NM(2, 4)), (0.5, 0.375, 0.25), (0.5, 0.25))
    said: list[str] = []
    table = measure_costs(imported, resolve_target(None, 1), grid, seconds=0, progress=said.append)
    assert said == [
        "building 1 of 4: dense",
        "building 2 of 4: 1x4 at 0.25",  # the sparsest first: a hopeless budget is refused before the others are built
        "building 3 of 4: 2:4",
        "building 4 of 4: 1x4 at 0.5",
        "measuring 4 builds in turns, 4 layers each",
    ]
    assert table.model_sha256 == model_sha256(imported)
    assert table.structure == structure_digest(layers)
    assert table.threads == 1
    assert "num-cores" not in table.target
    assert [layer.name for layer in table.layers] == [layer.name for layer in layers]
    first, *middle, last = table.layers
    for spared in (first, last):  # the first convolution and the classifier
        assert [candidate.label for candidate in spared.candidates] == ["dense"]
    for layer, known in zip(middle, layers[1:-1], strict=True):
        labels = ["dense", "1x4 at 0.5", "1x4 at 0.375", "1x4 at 0.25", "2:4"]
        assert [candidate.label for candidate in layer.candidates] == labels
        assert all(candidate.time_us > 0 for candidate in layer.candidates)
        sources = [candidate.source for candidate in layer.candidates]
        assert sources == [TimeSource.INTERPOLATED if "0.375" in label else TimeSource.MEASURED for label in labels]
        between, left, right = (layer.find(OneByN(4), density) for density in (0.375, 0.5, 0.25))
        assert between is not None
        assert left is not None
        assert right is not None
        assert between.time_us == pytest.approx((left.time_us + right.time_us) / 2)
        assert between.macs == pytest.approx((left.macs + right.macs) / 2, abs=1)
        assert (between.kernel, layer.macs) == ("", known.macs)
        assert left.kernel != layer.dense.kernel
        assert left.macs * 2 == pytest.approx(layer.dense.macs, rel=0.3)
    assert math.isfinite(table.fixed_us)


def test_nothing_to_prune_is_an_error() -> None:
    imported = import_onnx(small_cnn(), verify=False)
    with pytest.raises(PlanError, match="no layer that can be pruned; name one with --include"):
        measure_costs(imported, resolve_target(None, 1), exclude=["*"])


def test_grids() -> None:
    usual = CandidateGrid.make()
    assert usual.measured == (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)
    assert set(usual.measured) < set(usual.densities)
    odd = CandidateGrid.make(["1x4", "dense", "1x4", "1:3"], [0.1, 0.3, 0.2, 0.7])
    assert odd.patterns == (OneByN(4), NM(1, 3))
    assert odd.measured == (0.7, 0.2, 0.1)
    assert odd.of(NM(1, 3), measured=True) == (pytest.approx(1 / 3),)
    assert odd.of(OneByN(4)) == (0.7, 0.3, 0.2, 0.1)
    assert Dense() not in odd.patterns
    for patterns, densities, message in (
        (["1y4"], [0.5], "bad sparsity pattern"),
        (["dense"], [0.5], "at least one sparsity pattern"),
        (["1x4"], [1.0], "densities between 0 and 1"),
        (["1x4"], [], "at least one density"),
    ):
        with pytest.raises(PlanError, match=message):
            CandidateGrid.make(patterns, densities)
    assert CandidateGrid.make(["2:4"], []).of(NM(2, 4)) == (0.5,)
