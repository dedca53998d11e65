"""Networks with other weights, what their outputs lose, and the search over sensitivities."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from models import Net, small_cnn

from tvm_nm.costs import Candidate, CostTable, LayerCosts
from tvm_nm.errors import UnsupportedModelError
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.importance import add_norms
from tvm_nm.inventory import inventory, layer_weights
from tvm_nm.output_error import OUTPUT, _errors, add_output_errors, probe_candidates, sensitivity_of
from tvm_nm.patterns import Dense, OneByN
from tvm_nm.perturbed import LayerParameters, MagnitudeWeights, PerturbedNetwork, kl_divergence
from tvm_nm.plan import LayerChoice, Plan
from tvm_nm.plan_calibration import Calibration
from tvm_nm.plan_search import search_plan, stitched_divergence
from tvm_nm.planner import Planner
from tvm_nm.prune_onnx import prune_onnx
from tvm_nm.pruning import prune_by_plan
from tvm_nm.reference_run import run_onnx


@pytest.fixture(scope="module")
def imported() -> ImportedModel:
    return import_onnx(small_cnn(), verify=False)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, 3, 16, 16)).astype(np.float32)


def open_network(imported: ImportedModel) -> PerturbedNetwork:
    return PerturbedNetwork(imported.onnx, [layer.name for layer in inventory(imported.module)], 1)


def costs(imported: ImportedModel, densities: tuple[float, ...] = (0.75, 0.5, 0.25)) -> CostTable:
    built = []
    for layer in inventory(imported.module):
        sparse = tuple(Candidate(OneByN(4), density, 100 * density) for density in densities)
        candidates = (Candidate(Dense(), 1.0, 100.0), *(sparse if layer.kind == "conv" else ()))
        built.append(LayerCosts(layer.name, layer.kind, "", "", layer.macs, candidates))
    table = CostTable("m", "", "", {}, 1, 1, 0.0, tuple(built))
    return add_norms(table, layer_weights(imported.module), {})


def test_runs_as_onnxruntime_does_and_in_batches(imported: ImportedModel, images: np.ndarray) -> None:
    network = open_network(imported)
    assert len(network.layers) == 4
    want = [run_onnx(imported.onnx, {"input": images[i : i + 1]})[0] for i in range(3)]
    assert network.run(images[:3]) == pytest.approx(np.concatenate(want), rel=1e-4, abs=1e-5)
    assert network.run(images[:1]) == pytest.approx(want[0], rel=1e-4, abs=1e-5)


def test_a_fixed_batch_is_run_one_by_one(images: np.ndarray) -> None:
    net = Net((1, 3, 16, 16))
    x = net.add("Reshape", net.conv("input", (4, 3, 3, 3)), net.constant(np.array([1, 4 * 14 * 14])))
    model = net.model(net.fc(x, 4 * 14 * 14, 5))
    network = PerturbedNetwork(import_onnx(model, verify=False).onnx, [node.name for node in model.graph.node], 1)
    want = [run_onnx(model, {"input": images[i : i + 1]})[0] for i in range(3)]
    assert network.run(images[:3]) == pytest.approx(np.concatenate(want), rel=1e-4, abs=1e-5)


def test_changed_layers_are_those_of_the_pruned_model(imported: ImportedModel, images: np.ndarray) -> None:
    layers = inventory(imported.module)
    plan = Plan((LayerChoice(layers[1].name, OneByN(4), 0.5), LayerChoice(layers[2].name, OneByN(2), 0.25)))
    _, masks = prune_by_plan(imported.module, plan)
    pruned = prune_onnx(imported.onnx, masks)
    network = open_network(imported)
    source = MagnitudeWeights(network, layer_weights(imported.module), {})
    changed = {choice.name: source.parameters(choice.name, choice.pattern, choice.density) for choice in plan.layers}
    want = run_onnx(pruned, {"input": images[:1]})[0]
    assert network.run(images[:1], changed) == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert network.run(images[:1]) != pytest.approx(want, rel=1e-2)
    name = layers[1].name
    shifted = LayerParameters(network.weight(name), np.full(8, 3.0, np.float32))
    assert network.run(images[:1], {name: shifted}) != pytest.approx(network.run(images[:1]), rel=1e-2)


@pytest.mark.parametrize("form", ["gemm", "transposed gemm", "matmul"])
def test_fully_connected_layers_in_every_form(form: str) -> None:
    net = Net((2, 6))
    if form == "matmul":
        out = net.add("MatMul", "input", net.weight(6, 3))
    else:
        shape = (3, 6) if form == "transposed gemm" else (6, 3)
        out = net.add("Gemm", "input", net.weight(*shape), transB=int(form == "transposed gemm"))
    model = net.model(out)
    name = model.graph.node[0].name
    network = PerturbedNetwork(import_onnx(model, verify=False).onnx, [name], 1)
    assert network.weight(name).shape == (3, 6, 1, 1)
    data = np.random.default_rng(1).standard_normal((2, 6)).astype(np.float32)
    want = data @ network.weight(name)[:, :, 0, 0].T
    assert network.run(data) == pytest.approx(want, rel=1e-5, abs=1e-6)
    changed = np.zeros((3, 6, 1, 1), np.float32)
    changed[1, 2] = 1
    answer = network.run(data, {name: LayerParameters(changed)})
    assert answer[:, 1] == pytest.approx(data[:, 2])
    assert not answer[:, 0].any()


def test_models_with_two_inputs_are_refused() -> None:
    net = Net((1, 4, 4, 4))
    net.inputs.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, [1, 4, 4, 4]))
    with pytest.raises(UnsupportedModelError, match="one input; this one has 2"):
        PerturbedNetwork(net.model(net.add("Add", "input", "other")), [], 1)


def test_divergence() -> None:
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    assert kl_divergence(logits, logits + 7) == pytest.approx(0, abs=1e-12)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    other = np.array([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    want = (probabilities * np.log(probabilities / other)).sum(axis=1).mean()
    assert kl_divergence(logits, np.log(other)) == pytest.approx(want)
    assert kl_divergence(probabilities, other) == pytest.approx(want, rel=1e-6)


def calibration(imported: ImportedModel, network: PerturbedNetwork, images: np.ndarray) -> Calibration:
    return Calibration(images, network, MagnitudeWeights(network, layer_weights(imported.module), {}), "magnitude")


def test_losses_are_sensitivities_times_powers_of_errors(imported: ImportedModel, images: np.ndarray) -> None:
    network = open_network(imported)
    given = calibration(imported, network, images)
    table = add_output_errors(costs(imported), given)
    assert table.metrics == ("l1", "l2", OUTPUT)
    assert table.calibrated == "magnitude"
    assert sum(layer.sensitivity[OUTPUT] for layer in table.layers) == pytest.approx(1)
    *convs, classifier = table.layers
    assert classifier.sensitivity[OUTPUT] == 0
    for layer in convs:
        errors = [candidate.errors[OUTPUT] for candidate in layer.candidates]
        assert errors[0] == 0
        assert errors == sorted(errors)
        assert layer.sensitivity[OUTPUT] > 0
    # The first convolution by hand: its input is the image.
    first, second = convs[:2]
    run, dense = network.layer_runner(first.name), network.weight(first.name)
    weight = given.source.parameters(first.name, OneByN(4), 0.5).weight
    half = first.find(OneByN(4), 0.5)
    assert half is not None
    change = np.square(run(images, dense - weight)).sum()
    output = run(images, dense)
    variance = np.square(output - output.mean((0, 2, 3), keepdims=True)).sum()
    assert half.errors[OUTPUT] == pytest.approx((change / variance) ** 1.5, rel=1e-3)
    # Two layers' sensitivities by hand.
    answers = network.run(images)

    def by_hand(layer: LayerCosts) -> float:
        shares = [candidate.errors[OUTPUT] ** (1 / 1.5) for candidate in layer.candidates]
        points = []
        for index in probe_candidates(layer, shares):
            changed = given.source.parameters(layer.name, OneByN(4), layer.candidates[index].density)
            points.append((shares[index], kl_divergence(answers, network.run(images, {layer.name: changed}))))
        return sensitivity_of(points)

    ratio = first.sensitivity[OUTPUT] / second.sensitivity[OUTPUT]
    assert ratio == pytest.approx(by_hand(first) / by_hand(second), rel=1e-3)


def test_errors_count_the_bias(imported: ImportedModel, images: np.ndarray) -> None:
    network = open_network(imported)
    table = costs(imported, (0.5,))
    layer = table.layers[0]
    dense = network.parameters(layer.name)
    assert dense.bias is not None
    bias = dense.bias + np.float32(0.25)

    class Shifted:
        def parameters(self, *_: object) -> LayerParameters:
            return LayerParameters(dense.weight, bias)

    (errors,) = _errors([layer], network, images, Shifted(), lambda _: None).values()
    output = network.layer_runner(layer.name)(images, dense.weight)
    change = 0.25**2 * output.size / len(images)
    variance = np.square(output - output.mean((0, 2, 3), keepdims=True)).sum() / len(images)
    assert errors == [0.0, pytest.approx(change / variance, rel=1e-3)]


def test_layers_that_cannot_be_replaced_get_their_norm(imported: ImportedModel, images: np.ndarray) -> None:
    names = [layer.name for layer in inventory(imported.module)]
    network = PerturbedNetwork(imported.onnx, names[:2], 1)
    table = add_output_errors(costs(imported), calibration(imported, network, images[:8]))
    third = table.layers[2]
    assert [c.errors[OUTPUT] for c in third.candidates] == [c.errors["l2"] ** 1.5 for c in third.candidates]
    measured = [layer.sensitivity[OUTPUT] for layer in table.layers[:2]]
    assert third.sensitivity[OUTPUT] == pytest.approx(np.mean(measured))


def test_probes_are_near_small_and_larger_errors_of_each_pattern() -> None:
    sparse = [Candidate(OneByN(n), d, 1.0) for n in (4, 16) for d in (0.75, 0.5, 0.25, 0.125)]
    layer = LayerCosts("a", "conv", "", "", 1, (Candidate(Dense(), 1.0, 1.0), *sparse))
    assert probe_candidates(layer, [0.0, 0.02, 0.11, 0.5, 0.9, 0.001, 0.04, 0.2, 0.35]) == (1, 2, 3, 6, 7, 8)
    assert probe_candidates(layer, [0.0, 0.5, 0.6, 0.7, 0.9, 1e-12, 0.0, 0.0, 0.0]) == (1,)
    assert probe_candidates(layer, [0.0] * 9) == ()


def test_sensitivities_are_mean_ratios() -> None:
    assert sensitivity_of([(0.1, 0.05), (0.2, 0.4)]) == pytest.approx(1.0)
    assert sensitivity_of([(0.5, 1.0)]) == pytest.approx(2.0)
    assert sensitivity_of([(0.5, 0.0)]) == pytest.approx(2e-9)
    assert sensitivity_of([]) == 0


def test_search_never_gets_worse_and_meets_the_budget(imported: ImportedModel, images: np.ndarray) -> None:
    network = open_network(imported)
    table = costs(imported, (0.875, 0.75, 0.625, 0.5, 0.375, 0.25))
    # Sensitivities that are as wrong as can be.
    wrong = tuple(
        dataclasses.replace(layer, sensitivity={**layer.sensitivity, "l2": float(10.0**-index)})
        for index, layer in enumerate(table.layers)
    )
    table = dataclasses.replace(table, layers=wrong)
    source = MagnitudeWeights(network, layer_weights(imported.module), {})
    budget = 0.75 * table.dense_us
    start = Planner(table, "l2", buckets=2000).solve(budget)
    said: list[str] = []
    found = search_plan(table, "l2", budget, network, images, source, trials=25, progress=said.append)
    assert found.first_divergence == pytest.approx(stitched_divergence(table, start.choices, network, images, source))
    assert found.divergence < 0.9 * found.first_divergence
    assert found.divergence == pytest.approx(
        stitched_divergence(table, found.solution.choices, network, images, source)
    )
    assert found.solution.time_us <= budget
    assert found.trials > 3
    assert said[0] == f"searching, trial 1 of 25, best divergence {found.first_divergence:.4g}"
    again = search_plan(table, "l2", budget, network, images, source, trials=25)
    assert again.solution == found.solution
