"""``tvm-nm plan`` and planning by ``tvm-nm compile``, as users see them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import fails, run
from made_up_costs import made_up_costs
from models import Net, small_cnn

from tvm_nm.costs import CostTable
from tvm_nm.frontend import import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.manifest import Manifest
from tvm_nm.plan import Plan
from tvm_nm.pruning import inspect_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(small_cnn(), path)
    return path


@pytest.fixture(scope="module")
def costs(model: Path) -> Path:
    """10 us and 100 us for all of the weights."""
    return made_up_costs(model, lambda _name, _n, density: 100 * density + 10)


def test_costs_are_measured_once_and_kept(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    common = ("plan", model, "--costs", path, "--plan-rounds", "0", "--threads", "1", "--max-loss")
    result = run(*common, "0", "--patterns", "1x4", "--densities", "0.5", "--measure-seconds", "0")
    assert result.exit_code == 0, result.output
    assert "building 2 of 2: 1x4 at 0.5" in result.stderr
    table = CostTable.load(path)
    assert table.metrics == ("l1", "l2")
    again = run(*common, "0.2")
    assert again.exit_code == 0, again.output
    assert "building" not in again.stderr
    more = run(*common, "0.2", "--patterns", "1x4,2:4", "--measure-seconds", "0")
    assert "building 2 of 2: 2:4" in more.stderr
    labels = [candidate.label for candidate in CostTable.load(path).layers[1].candidates]
    assert labels == ["dense", "1x4 at 0.5", "2:4"]


def test_a_plan_from_costs(model: Path, costs: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("plan.json", "front.json")]
    result = run(
        *("plan", model, "--costs", costs, "--speedup", "1.25", "--plan-rounds", "0", "--threads", "1"),
        *("-o", files[0], "--front", files[1], "--json", tmp_path / "result.json"),
    )
    assert result.exit_code == 0, result.output
    plan = Plan.load(files[0])
    assert plan.origin is not None
    assert plan.origin.predicted_us <= 500 / 1.25
    assert [choice.density for choice in plan.layers] != [1.0, 1.0]
    assert "budget     0.400 ms (80.0%)" in result.stdout
    assert f"written to {files[0]}" in result.stdout
    front = json.loads(files[1].read_text())
    assert front["points"][-1] == {"time_us": 500.0, "loss": 0.0}
    assert {"time_us": plan.origin.predicted_us, "loss": plan.origin.loss} == front["chosen"]
    assert [point["label"] for point in front["uniform"]] == ["1x4 at 0.75", "1x4 at 0.5", "1x4 at 0.25"]
    data = json.loads((tmp_path / "result.json").read_text())
    assert data["rounds"] == []
    assert Plan.from_json(json.dumps(data["plan"])) == plan


def test_the_loop_measures_and_says_so(model: Path, costs: Path) -> None:
    arguments = ("--costs", costs, "--budget", "0.7", "--measure-seconds", "0", "--threads", "1", "--json", "-")
    result = run("plan", model, *arguments, "--plan-rounds", "1")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert len(data["rounds"]) == 1
    assert data["rounds"][data["taken"]]["measured_share"] > 0
    assert data["plan"]["origin"]["measured_share"] == pytest.approx(
        data["rounds"][data["taken"]]["measured_share"], abs=1e-4
    )


def test_compile_plans_by_itself(model: Path, costs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("--costs", costs, "--speedup", "1.25", "--plan-rounds", "0", "--threads", "1")
    result = run("compile", model, "-o", output, *arguments)
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(output)
    assert manifest.pattern == "plan"
    assert "1x4" in {layer.pattern for layer in manifest.layers}
    assert manifest.verification is not None
    assert "predicted" in result.stdout
    run("plan", model, *arguments, "-o", tmp_path / "plan.json")
    assert run("compile", model, "-o", tmp_path / "again", "--plan", tmp_path / "plan.json", "--threads", "1")
    again = Manifest.load(tmp_path / "again")
    assert [(a.pattern, a.density) for a in again.layers] == [(a.pattern, a.density) for a in manifest.layers]


def test_constraints(model: Path, costs: Path, tmp_path: Path) -> None:
    common = ("plan", model, "--costs", costs, "--plan-rounds", "0", "--threads", "1", "-o", tmp_path / "p.json")
    names = [layer.name for layer in CostTable.load(costs).layers]
    assert run(*common, "--budget", "0.9", "--allow", f"{names[1]}=dense").exit_code == 0
    assert [choice.density < 1 for choice in Plan.load(tmp_path / "p.json").layers] == [False, True]
    assert run(*common, "--budget", "0.9", "--tie", "*", "--max-density", "0.75").exit_code == 0
    assert max(choice.density for choice in Plan.load(tmp_path / "p.json").layers) == 0.75
    said = fails(*common[:-2], "--budget", "0.6", "--min-density", "0.75")
    assert "no plan meets the budget of 0.3 ms (60.0% of the dense time); the least achievable time is 0.45 ms" in said
    assert "the least within the constraints is" in fails(*common[:-2], "--budget", "0.9", "--max-bytes", "10")


def test_check(model: Path, costs: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run("plan", model, "--costs", costs, "--budget", "0.8", "--plan-rounds", "0", "--threads", "1", "-o", plan)
    result = run("plan", "--check", plan, model)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{plan} can be applied to {model}\n"
    net = Net((1, 3, 8, 8))
    onnx.save(net.model(net.conv("input", (8, 3, 3, 3))), tmp_path / "other.onnx")
    assert "which the model does not have" in fails("plan", "--check", plan, tmp_path / "other.onnx")
    assert "was made for 1 threads and 2 are asked for" in fails("plan", "--check", plan, model, "--threads", "2")
    other = '{"kind": "llvm", "mcpu": "haswell"}'
    assert "was made for the target" in fails("plan", "--check", plan, model, "--target", other)
    assert "was made for the target" in fails("compile", model, "--plan", plan, "--target", other, "--threads", "1")


def test_calibrated_errors_and_search(model: Path, costs: Path, tmp_path: Path) -> None:
    own = tmp_path / "costs.json"
    own.write_bytes(costs.read_bytes())
    calib = tmp_path / "calib.npy"
    np.save(calib, np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32))
    common = ("plan", model, "--costs", own, "--budget", "0.8", "--plan-rounds", "0", "--threads", "1")
    folder = tmp_path / "pruned"
    searched = (*common, "--calib", calib, "--search", "--trials", "6", "-o", tmp_path / "plan.json")
    result = run(*searched, "--reconstruction", folder)
    assert result.exit_code == 0, result.output
    assert "perturbing layers" in result.stderr
    assert "pruning to all candidates" in result.stderr
    assert len(list(folder.glob("*.npz"))) == 6
    assert "search     divergence from the dense network" in result.stdout
    origin = Plan.load(tmp_path / "plan.json").origin
    assert origin is not None
    assert origin.metric == "search"
    assert origin.predicted_us <= 400
    assert CostTable.load(own).metrics == ("l1", "l2", "output")  # kept: nothing is calibrated again
    again = run(*common, "--metric", "output", "-o", tmp_path / "plan.json")
    assert again.exit_code == 0, again.output
    assert "perturbing" not in again.stderr
    again = run(*searched, "--reconstruction", folder)
    assert "perturbing" not in again.stderr
    assert "pruning" not in again.stderr
    other = run(*searched, "--method", "magnitude")  # other weights have other losses
    assert other.exit_code == 0, other.output
    assert "perturbing layers" in other.stderr
    assert "pruning" not in other.stderr
    assert "give --calib" in fails(*common[:3], costs, *common[4:], "--metric", "output")
    assert "give --calib" in fails(*common, "--search")


def test_prune_takes_a_plan(model: Path, costs: Path, tmp_path: Path) -> None:
    plan, pruned = tmp_path / "plan.json", tmp_path / "pruned.onnx"
    result = run(
        "plan", model, "--costs", costs, "--speedup", "1.25", "--plan-rounds", "0", "--threads", "1", "-o", plan
    )
    assert result.exit_code == 0, result.output
    choices = {choice.name: choice for choice in Plan.load(plan).layers if str(choice.pattern) != "dense"}
    assert choices
    np.save(tmp_path / "images.npy", np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32))
    for more in ((), ("--calib", tmp_path / "images.npy")):
        result = run("prune", model, "--plan", plan, "-o", pruned, *more)
        assert result.exit_code == 0, result.output
        assert f"pruned {len(choices)} layers to the plan" in result.output
        for found in inspect_model(pruned):
            wanted = choices.get(found.layer.name)
            assert found.detection.density == pytest.approx(1.0 if wanted is None else wanted.density, abs=0.02)
    assert "do not go with a plan" in fails("prune", model, "--plan", plan, "-o", pruned, "--pattern", "2:4")
    other = small_cnn()
    next(t for t in other.graph.initializer if len(t.dims) == 4).raw_data = bytes(8 * 3 * 3 * 3 * 4)
    onnx.save(other, tmp_path / "other.onnx")
    assert "other weights" in fails("prune", tmp_path / "other.onnx", "--plan", plan, "-o", pruned)


def test_compile_prunes_in_sequence_or_stitches(model: Path, costs: Path, tmp_path: Path) -> None:
    calib = tmp_path / "calib.npy"
    np.save(calib, np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32))
    own = tmp_path / "costs.json"
    own.write_bytes(costs.read_bytes())
    common = ("--calib", calib, "--reconstruction", tmp_path / "pruned", "--threads", "1")
    goal = ("--budget", "0.8", "--costs", own, "--plan-rounds", "0")
    result = run("compile", model, "-o", tmp_path / "a", *common, *goal)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "pruned").glob("*.npz"))) == 6
    result = run("compile", model, "-o", tmp_path / "b", *common, *goal, "--stitch")
    assert result.exit_code == 0, result.output
    assert "pruning to all candidates" not in result.stderr  # all of it is in the folder
    first, second = (Manifest.load(tmp_path / name) for name in "ab")
    assert [(a.pattern, a.density) for a in first.layers] == [(a.pattern, a.density) for a in second.layers]
    assert first.library_sha256 != second.library_sha256
    assert all(manifest.verification is not None for manifest in (first, second))
    plan = tmp_path / "plan.json"
    assert run("plan", model, *common, *goal, "-o", plan).exit_code == 0
    assert run("compile", model, "-o", tmp_path / "c", *common, "--plan", plan, "--stitch").exit_code == 0
    assert Manifest.load(tmp_path / "c").library_sha256 == second.library_sha256
    assert "--stitch needs --reconstruction" in fails("compile", model, "--plan", plan, "--stitch")
    assert "goes with a budget or with --stitch" in fails("compile", model, "--plan", plan, *common[2:])
    said = fails("compile", model, "--plan", plan, *common[2:], "--stitch")
    assert "needs calibration data" in said


def test_what_cannot_work_is_refused_before_anything_is_built(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    plan = ("plan", model, "--costs", path, "--threads", "1")

    def refused(*arguments: str | Path) -> str:
        result = run(*plan, *arguments)
        assert result.exit_code == 2, result.output
        assert "building" not in result.stderr
        assert not path.exists()
        return result.stderr.splitlines()[-1]

    assert "budget '0.0001x' is neither" in refused("--budget", "0.0001x")
    assert "speed-up 0 is not" in refused("--speedup", "0")
    assert "largest loss -1" in refused("--max-loss", "-1")
    assert "the budget of 1.00% of the dense time is out of reach" in refused("--speedup", "100")
    assert "give --calib" in refused("--budget", "0.5", "--metric", "output")
    assert "give --calib" in refused("--budget", "0.5", "--search")
    assert "no layer matches 'nothing'" in refused("--budget", "0.5", "--max-density", "nothing=0.5")
    assert "not as" in refused("--budget", "0.5", "--plot", "a.pdf")
    # What the sparsest builds say is known before the others are built.
    result = run(*plan, "--budget", "0.001us", "--measure-seconds", "0")
    assert result.exit_code == 2, result.output
    assert "out of reach: with every layer at its lowest density" in result.stderr
    assert "building 3 of 13" in result.stderr
    assert "building 4" not in result.stderr


def test_tied_channels(tmp_path: Path) -> None:
    net = Net((1, 3, 8, 8))
    x = net.conv("input", (8, 3, 1, 1))
    for _ in range(2):
        x = net.add("Relu", net.add("Add", net.conv(x, (8, 8, 3, 3), pads=[1, 1, 1, 1]), x))
    path, output = tmp_path / "net.onnx", tmp_path / "plan.json"
    onnx.save(net.model(net.conv(x, (4, 8, 1, 1))), path)
    imported = import_onnx(path, verify=False)
    names = [layer.name for layer in inventory(imported.module)]
    made = made_up_costs(path, lambda name, n, d: 10 + 100 * d + (5 if (name == names[1]) == (n == 4) else 0), (4, 2))
    common = ("plan", path, "--costs", made, "--budget", "0.75", "--plan-rounds", "0", "--threads", "1", "-o", output)
    assert run(*common).exit_code == 0
    assert len({str(choice.pattern) for choice in Plan.load(output).layers}) == 2
    assert run(*common, "--tie-channels").exit_code == 0
    assert len({str(choice.pattern) for choice in Plan.load(output).layers}) == 1


def test_diff(model: Path, costs: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for path, budget in ((a, "0.8"), (b, "0.7")):
        run("plan", model, "--costs", costs, "--budget", budget, "--plan-rounds", "0", "--threads", "1", "-o", path)
    same = run("plan", "--diff", a, a)
    assert same.stdout == "the plans choose the same for every layer\n"
    result = run("plan", "--diff", a, b)
    assert result.exit_code == 0
    assert "budget_us: 400.0 -> 350.0" in result.stdout
    assert "1x4 at 0." in result.stdout
    found = json.loads(run("plan", "--diff", a, b, "--json", "-").stdout)
    assert found["layers"]


@pytest.mark.parametrize("suffix", ["svg", "png", "html"])
def test_plot(model: Path, costs: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"front.{suffix}"
    result = run(
        *("plan", model, "--costs", costs, "--budget", "0.8", "--plan-rounds", "0", "--threads", "1", "--plot", path)
    )
    assert result.exit_code == 0, result.output
    data = path.read_bytes()
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
    else:
        text = data.decode()
        assert "<svg" in text
        assert text.startswith("<!DOCTYPE html>" if suffix == "html" else "<?xml")
        for word in ("chosen", "one density for all", "dense", "best plans"):
            assert word in text


def test_plots_without_matplotlib_say_what_to_install(
    model: Path, costs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    arguments = ("plan", model, "--costs", costs, "--budget", "0.8", "--plan-rounds", "0", "--threads", "1")
    assert "pip install 'tvm-nm[plot]'" in fails(*arguments, "--plot", tmp_path / "a.svg")
    assert "not as" in fails(*arguments, "--plot", tmp_path / "a.pdf")


def test_wrong_use(model: Path, costs: Path, tmp_path: Path) -> None:
    assert "exactly one of" in fails("plan", model, "--costs", costs)
    assert "exactly one of" in fails("plan", model, "--costs", costs, "--budget", "1", "--speedup", "2")
    assert "Missing argument 'MODEL'" in fails("plan", "--budget", "0.5")
    assert "are not numbers" in fails("plan", model, "--budget", "0.5", "--densities", "a")
    assert "need a MODEL" in fails("compile", "--budget", "0.5")
    assert "--pattern and --density go with" in fails("compile", model, "--budget", "0.5", "--pattern", "1x4")
    assert "planned already" in fails("compile", model, "--budget", "0.5", "--plan", costs)
    assert "--rearrange goes with no budget" in fails("compile", model, "--max-loss", "0.1", "--rearrange", "swap")
    assert "is not a plan" in fails("compile", model, "--plan", costs, "--threads", "1")
    assert "was made for 1 threads" in fails("plan", model, "--costs", costs, "--budget", "0.5", "--threads", "2")
    other = dataclasses.replace(CostTable.load(costs), revision=0)
    other.save(tmp_path / "old.json")
    arguments = ("--budget", "0.5", "--threads", "1")
    assert "revision 0 of the kernels" in fails("plan", model, "--costs", tmp_path / "old.json", *arguments)
