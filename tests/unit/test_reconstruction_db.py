"""The database of pruned layers: what is stored, that a build resumes, and that plans are stitched together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_oneshot import IMAGES, answers, batches, plan, small_network
from tvm_nm.errors import ArtifactError
from tvm_nm.layer_pruning import Method, fit_layer
from tvm_nm.onnx_network import OnnxNetwork
from tvm_nm.patterns import parse_pattern
from tvm_nm.plan import Plan
from tvm_nm.reconstruction import Options, reconstruct
from tvm_nm.reconstruction_db import ReconstructionDatabase, build_database, stitch

NETWORK = OnnxNetwork(small_network())
HALF = (parse_pattern("1x4p"), 0.5)
NM = (parse_pattern("2:4"), 0.5)
WANTED = {"first": [HALF, NM], "second": [HALF, NM], "hidden": [NM]}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> ReconstructionDatabase:
    return build_database(tmp_path_factory.mktemp("db") / "db", NETWORK, WANTED, batches(), "images")


def test_entries_obey_their_pattern(database: ReconstructionDatabase) -> None:
    for name, entries in WANTED.items():
        for pattern, density in entries:
            weight = database.weights(name, pattern, density).weight
            assert (weight != 0).mean() == pytest.approx(density)
            assert 0 < database.error(name, pattern, density) < 0.5
    nm = database.weights("second", *NM).weight
    assert ((nm != 0).reshape(8, 4, 4, 3, 3).sum(axis=2) == 2).all()


def test_the_first_layer_is_what_reconstruction_gives(database: ReconstructionDatabase) -> None:
    options = Options(refit_dense=False, rectified=0)  # entries are not refitted behind the ReLU
    found = reconstruct(NETWORK, plan("2:4", None, "first"), batches()(), options)
    stored = database.weights("first", *NM)
    np.testing.assert_allclose(stored.weight, found.weights["first"].weight, atol=1e-5)
    np.testing.assert_allclose(stored.bias, found.weights["first"].bias, atol=1e-5)


def test_a_build_resumes(database: ReconstructionDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, density = HALF
    lost = database._path("second", pattern, density)
    before = database.weights("second", pattern, density)
    lost.unlink()
    with pytest.raises(ArtifactError, match="second"):
        database.weights("second", pattern, density)
    fitted = []

    def spy(*args: object, **kwargs: object) -> object:
        fitted.append(args[2])
        return fit_layer(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("tvm_nm.reconstruction_db.fit_layer", spy)
    again = build_database(database.directory, NETWORK, WANTED, batches(), "images")
    assert fitted == [pattern]
    np.testing.assert_allclose(again.weights("second", pattern, density).weight, before.weight, atol=1e-6)
    build_database(database.directory, NETWORK, WANTED, lambda: iter(()), "images")  # nothing to do: reads no image
    assert len(fitted) == 1


def test_another_model_images_or_options_are_refused(database: ReconstructionDatabase) -> None:
    with pytest.raises(ArtifactError, match="images"):
        build_database(database.directory, NETWORK, WANTED, batches(), "others")
    with pytest.raises(ArtifactError, match="model"):
        build_database(database.directory, OnnxNetwork(small_network()), WANTED, batches(), "images")
    with pytest.raises(ArtifactError, match="options"):
        build_database(database.directory, NETWORK, WANTED, batches(), "images", Options(method=Method.LS))


def test_folders_and_files_that_are_none(tmp_path: Path, database: ReconstructionDatabase) -> None:
    with pytest.raises(ArtifactError, match="no reconstruction database"):
        ReconstructionDatabase(tmp_path)
    copy = ReconstructionDatabase(tmp_path / "copy", database.key)
    copy._path("first", *NM).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged"):
        copy.weights("first", *NM)


def test_stitched_plans(database: ReconstructionDatabase) -> None:
    mixed = Plan((plan("1x4p", 0.5, "first").layers[0], *plan("2:4", None, "second", "hidden").layers))
    dense = answers(NETWORK, {})
    raw = stitch(database, NETWORK, mixed)
    repaired = stitch(database, NETWORK, mixed, batches()())
    assert set(raw) == set(repaired) == {"first", "second", "hidden"}
    for name in raw:
        assert ((raw[name].weight != 0) == (repaired[name].weight != 0)).all()
    network = NETWORK.with_weights(repaired)
    for name in repaired:
        output = NETWORK.layers[name].output
        want, got = (each.segment(0, each.end, [output])({each.input: IMAGES})[output] for each in (NETWORK, network))
        axes = tuple(axis for axis in range(want.ndim) if axis != 1)
        np.testing.assert_allclose(got.mean(axes), want.mean(axes), atol=1e-4)
        np.testing.assert_allclose(got.std(axes), want.std(axes), rtol=1e-3)
    magnitude = reconstruct(NETWORK, mixed, batches()(), Options(method=Method.MAGNITUDE)).weights
    errors = [((answers(NETWORK, weights) - dense) ** 2).mean() for weights in (repaired, magnitude)]
    assert errors[0] < errors[1]
