"""Plans of other models and targets are refused; plans that differ say where."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from models import Net, small_cnn

import tvm_nm
from tvm_nm.errors import PlanError
from tvm_nm.fingerprint import model_sha256, plain_target, structure_digest
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.patterns import Dense, OneByN
from tvm_nm.plan import LayerChoice, Plan, PlanOrigin
from tvm_nm.plan_check import check_plan, diff_plans
from tvm_nm.targets import resolve_target


@pytest.fixture(scope="module")
def imported() -> ImportedModel:
    return import_onnx(small_cnn(), verify=False)


def origin(imported: ImportedModel, **changes: object) -> PlanOrigin:
    target = plain_target(json.loads(str(resolve_target(None, 1))))
    digest = structure_digest(inventory(imported.module))
    made = PlanOrigin("net", model_sha256(imported), digest, target, 1, 1, "l1", 5.0, 10.0, 5.0, 0.1)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def check(imported: ImportedModel, plan: Plan) -> None:
    check_plan(plan, inventory(imported.module), model_sha256(imported), resolve_target(None, 1))


def test_own_plans_and_plans_by_hand_are_welcome(imported: ImportedModel) -> None:
    name = inventory(imported.module)[1].name
    check(imported, Plan((LayerChoice(name, OneByN(4), 0.5),)))
    check(imported, Plan((LayerChoice(name, OneByN(4), 0.5),), origin(imported)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "00"}, r"made for another network \(net\): its layers differ"),
        ({"model_sha256": "00"}, "made for net with other weights"),
        ({"target": {"kind": "llvm", "mcpu": "znver3"}}, 'made for the target .*"znver3".* and this is'),
        ({"threads": 3}, "made for 3 threads and 1 are asked for; plan again or use --threads 3"),
    ],
)
def test_plans_for_something_else_are_refused(
    imported: ImportedModel, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        check(imported, Plan((), origin(imported, **changes)))


def test_structure_is_names_and_shapes_and_not_weights() -> None:
    def digest(seed: int, size: int = 16) -> str:
        net = Net((1, 3, size, size), seed=seed)
        return structure_digest(inventory(import_onnx(net.model(net.conv("input", (8, 3, 3, 3)))).module))

    assert digest(0) == digest(1)
    assert digest(0) != digest(0, 17)


def test_layers_that_do_not_exist_are_named(imported: ImportedModel) -> None:
    with pytest.raises(PlanError, match="names layer 'conv', which the model does not have"):
        check(imported, Plan((LayerChoice("conv", OneByN(4), 0.5),)))


def test_difference_names_changed_and_missing_layers() -> None:
    a, b, c = (LayerChoice(name, OneByN(4), 0.5) for name in "abc")
    changed = LayerChoice("b", Dense(), 1.0)
    found = diff_plans(Plan((a, b)), Plan((a, changed, c)))
    assert [(item.name, item.before, item.after) for item in found] == [("b", b, changed), ("c", None, c)]
    assert diff_plans(Plan((a, b)), Plan((b, a))) == ()


def test_compile_follows_the_plan_and_refuses_others(imported: ImportedModel, tmp_path: Path) -> None:
    layers = inventory(imported.module)
    # So dense that the model of the machine would not take the sparse kernel.
    plan = Plan((LayerChoice(layers[1].name, OneByN(4), 0.75), LayerChoice(layers[2].name, OneByN(2), 0.5)))
    plan.save(tmp_path / "plan.json")
    built = tvm_nm.compile(small_cnn(), plan=tmp_path / "plan.json", threads=1)
    assert [layer.pattern for layer in built.layers] == ["dense", "1x4", "1x2", "dense"]
    assert built.manifest.pattern == "plan"
    kept = sum(layer.parameters for layer in layers) - layers[1].parameters / 4 - layers[2].parameters / 2
    assert built.manifest.density == pytest.approx(kept / sum(layer.parameters for layer in layers))
    assert built.manifest.verification is not None
    with pytest.raises(PlanError, match="another network"):
        tvm_nm.compile(small_cnn(), plan=Plan((), origin(imported, structure="00")), threads=1)
