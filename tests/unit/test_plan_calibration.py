"""What losses are estimated with: weights out of a database, images, and repaired channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import small_cnn

from tvm_nm.calibration import ArrayImages
from tvm_nm.costs import Candidate, CostTable, LayerCosts
from tvm_nm.errors import ArtifactError
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.layer_pruning import Method
from tvm_nm.patterns import Dense, OneByN
from tvm_nm.perturbed import MagnitudeWeights, kl_divergence
from tvm_nm.plan_calibration import MOST_IMAGES, Calibration, ReconstructedWeights, calibrate
from tvm_nm.reconstruction_db import ReconstructionDatabase

PATTERN = OneByN(4)


@pytest.fixture(scope="module")
def imported() -> ImportedModel:
    return import_onnx(small_cnn(), verify=False)


@pytest.fixture(scope="module")
def table(imported: ImportedModel) -> CostTable:
    built = []
    for layer in inventory(imported.module):
        sparse = tuple(Candidate(PATTERN, density, 100 * density) for density in (0.5, 0.25))
        candidates = (Candidate(Dense(), 1.0, 100.0), *(sparse if layer.kind == "conv" else ()))
        built.append(LayerCosts(layer.name, layer.kind, "", "", layer.macs, candidates))
    return CostTable("m", "", "", {}, 1, 1, 0.0, tuple(built))


def data(count: int = 80, seed: int = 0) -> ArrayImages:
    images = np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)
    return ArrayImages(images)


@pytest.fixture(scope="module")
def calibration(imported: ImportedModel, table: CostTable, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibrate(imported, table, data(), Method.OBS, tmp_path_factory.mktemp("db") / "pruned")


def test_pruned_layers_are_those_of_the_database(
    imported: ImportedModel, table: CostTable, calibration: Calibration, tmp_path: Path
) -> None:
    name = table.layers[1].name
    said: list[str] = []
    again = calibrate(imported, table, data(), Method.OBS, tmp_path / "pruned", said.append)
    assert said[-1].startswith("pruning to all candidates (3 of 3: ")
    assert calibrate(imported, table, data(), Method.OBS, tmp_path / "pruned", said.append)
    assert len(said) == 3  # all was there
    stored = ReconstructionDatabase(tmp_path / "pruned").weights(name, PATTERN, 0.5)
    for source in (again.source, calibration.source):
        found = source.parameters(name, PATTERN, 0.5)
        np.testing.assert_allclose(found.weight, stored.weight, atol=1e-6)
        np.testing.assert_allclose(found.bias, stored.bias, atol=1e-6)  # type: ignore[arg-type]
    assert (found.weight != 0).mean() == pytest.approx(0.5)
    with pytest.raises(ArtifactError, match="images"):
        calibrate(imported, table, data(seed=1), Method.OBS, tmp_path / "pruned")
    with pytest.raises(ArtifactError, match="options"):
        calibrate(imported, table, data(), Method.LS, tmp_path / "pruned")


def test_layers_that_the_database_lacks_come_from_elsewhere(
    imported: ImportedModel, table: CostTable, calibration: Calibration, tmp_path: Path
) -> None:
    name = table.layers[1].name
    weights = np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)
    network = calibration.network
    others = MagnitudeWeights(network, {name: weights.reshape(network.weight(name).shape[0], -1, 3, 3)}, {})
    empty = ReconstructionDatabase(tmp_path / "db", {"model": "", "images": "", "options": ""})
    source = ReconstructedWeights(empty, others)
    np.testing.assert_array_equal(
        source.parameters(name, PATTERN, 0.5).weight, others.parameters(name, PATTERN, 0.5).weight
    )


def test_refitted_layers_are_nearer_to_the_dense_network(
    imported: ImportedModel, table: CostTable, calibration: Calibration, tmp_path: Path
) -> None:
    magnitude = calibrate(imported, table, data(), Method.MAGNITUDE, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert magnitude.repair is None
    assert calibration.repair is not None
    assert magnitude.origin != calibration.origin
    images, network = data(seed=2)._images[:64], calibration.network
    dense = network.run(images)
    divergences = []
    for given in (magnitude, calibration):
        changed = {
            layer.name: given.source.parameters(layer.name, PATTERN, 0.5)
            for layer in table.layers
            if layer.can_be_pruned
        }
        divergences.append(kl_divergence(dense, network.run(images, changed)))
    divergences.append(kl_divergence(dense, network.run(images, calibration.repair(changed))))
    assert divergences[1] < 0.5 * divergences[0]
    assert divergences[2] < 1.02 * divergences[1]


def test_images_are_taken_at_equal_distances(imported: ImportedModel, table: CostTable, tmp_path: Path) -> None:
    many = data(MOST_IMAGES * 2)
    found = calibrate(imported, table, many, Method.MAGNITUDE, tmp_path).images
    np.testing.assert_array_equal(found, many._images[::2])
    few = data(10)
    np.testing.assert_array_equal(calibrate(imported, table, few, Method.MAGNITUDE, tmp_path).images, few._images)
