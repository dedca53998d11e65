"""The plan file, and which layers a uniform plan takes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_nm.errors import ArtifactError, PlanError
from tvm_nm.inventory import Layer
from tvm_nm.patterns import NM, Dense, Granularity, OneByN, SparsityPattern, TileNM
from tvm_nm.plan import LayerChoice, Plan, PlanOrigin, near_names, uniform_plan


def layer(name: str, kind: str = "conv", groups: int = 1) -> Layer:
    """A layer of which only the name, kind and groups matter."""
    data, output = ((1, 8, 4, 4), (1, 8, 4, 4)) if kind == "conv" else ((1, 8), (1, 8))
    return Layer(
        name=name,
        kind="conv" if kind == "conv" else "fc",
        weight_shape=(8, 8 // groups, 1, 1),
        groups=groups,
        strides=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        input_shape=data,
        output_shape=output,
        macs=1,
        index=0,
    )


VGG = [layer("conv1"), layer("conv2"), layer("conv3"), layer("fc1", "fc"), layer("fc2", "fc"), layer("fc3", "fc")]
MOBILENET = [
    layer("stem"),
    layer("dw1", groups=8),
    layer("pw1"),
    layer("dw2", groups=8),
    layer("pw2"),
    layer("fc", "fc"),
]
SQUEEZENET = [layer("stem"), layer("squeeze"), layer("expand"), layer("head")]


def names(plan: Plan) -> list[str]:
    return [choice.name for choice in plan.layers]


@st.composite
def choices(draw: st.DrawFn) -> LayerChoice:
    pattern: SparsityPattern = draw(
        st.sampled_from(
            [Dense(), NM(1, 3), TileNM(2, 4, 8), OneByN(4), OneByN(16, Granularity.POSITION, balanced=False)]
        )
    )
    density = pattern.fixed_density or draw(st.floats(0.001, 1.0))
    return LayerChoice(draw(st.text(min_size=1, max_size=8)), pattern, density)


ORIGIN = PlanOrigin(
    model="vgg",
    model_sha256="12ab",
    structure="34cd",
    target={"kind": "llvm", "mcpu": "skylake-avx512"},
    threads=2,
    revision=1,
    metric="l1",
    budget_us=600.0,
    dense_us=1000.0,
    predicted_us=598.5,
    loss=0.125,
)

plans = st.builds(
    lambda found, origin: Plan(tuple(found), origin),
    st.lists(choices(), max_size=6, unique_by=lambda choice: choice.name),
    st.sampled_from([None, ORIGIN, dataclasses.replace(ORIGIN, measured_share=0.61, note="é")]),
)


@given(plans)
def test_json_round_trips(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_file_is_readable_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    plan = Plan((LayerChoice("conv/2", OneByN(16), 0.25), LayerChoice("é", NM(2, 4), 0.5)))
    plan.save(path)
    assert Plan.load(str(path)) == plan
    assert json.loads(path.read_text()) == {
        "format": "tvm_nm plan",
        "version": 1,
        "layers": [
            {"name": "conv/2", "pattern": "1x16", "density": 0.25},
            {"name": "é", "pattern": "2:4", "density": 0.5},
        ],
    }
    assert os.listdir(tmp_path) == ["plan.json"]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    Plan().save(path)
    before = path.read_text()

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Plan((LayerChoice("a", Dense(), 1.0),)).save(path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["plan.json"]


def test_unwritable_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write plan .*nowhere.*: No such file"):
        Plan().save(tmp_path / "nowhere" / "plan.json")
    with pytest.raises(ArtifactError, match=r"cannot read plan .*missing\.json: No such file"):
        Plan.load(tmp_path / "missing.json")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        Plan.load(binary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "remove it from a plan that is written by hand"),
        ({"loss": "small"}, "needs numbers for budget_us"),
        ({"loss": True}, "needs numbers for budget_us"),
        ({"target": "x86"}, 'an object "target"'),
        ({"threads": None}, 'a number "threads"'),
    ],
)
def test_bad_origins_are_explained(changes: dict[str, object], message: str) -> None:
    data = json.loads(Plan((), ORIGIN).to_json())
    data["origin"] |= changes
    with pytest.raises(ArtifactError, match=message):
        Plan.from_json(json.dumps(data))
    del data["origin"]
    assert Plan.from_json(json.dumps(data)) == Plan()


def entry(**changes: object) -> str:
    fields = {"name": "a", "pattern": "1x4", "density": 0.5} | changes
    return json.dumps({"format": "tvm_nm plan", "version": 1, "layers": [fields]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        ('{"format": "tvm_nm plan", "version": 2, "layers": []}', "version 2 .* reads version 1"),
        ('{"format": "tvm_nm plan", "layers": []}', "version None"),
        ('{"format": "tvm_nm plan", "version": 1}', 'lacks the list "layers"'),
        ('{"format": "tvm_nm plan", "version": 1, "layers": [3]}', "layer 0 is not an object"),
        (entry(name=3), 'layer 0 needs the texts "name" and "pattern"'),
        (entry(name=""), "needs a layer name"),
        (entry(pattern="1x"), "layer 'a': bad sparsity pattern '1x'; valid forms"),
        (entry(density="0.5"), "layer 'a' needs the number \"density\""),
        (entry(density=True), "layer 'a' needs the number \"density\""),
        (entry(density=1.5), "layer 'a': density 1.5"),
        (entry(density=float("nan")), "layer 'a': density nan"),
        (entry(pattern="2:4", density=0.25), "layer 'a': pattern 2:4 has density 0.5"),
        (entry()[:-2] + ', {"name": "a", "pattern": "dense", "density": 1}]}', "layer 'a' has two choices"),
    ],
)
def test_bad_files_are_named_and_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_default_selection() -> None:
    assert names(uniform_plan(VGG, OneByN(16), 0.5)) == ["conv2", "conv3", "fc1", "fc2"]
    assert names(uniform_plan(MOBILENET, OneByN(16), 0.5)) == ["pw1", "pw2"]
    assert names(uniform_plan(SQUEEZENET, OneByN(16), 0.5)) == ["squeeze", "expand"]
    assert names(uniform_plan([], OneByN(16), 0.5)) == []


def test_all_choices_are_alike() -> None:
    plan = uniform_plan(SQUEEZENET, NM(2, 4))
    assert plan.layers == (LayerChoice("squeeze", NM(2, 4), 0.5), LayerChoice("expand", NM(2, 4), 0.5))
    with pytest.raises(ValueError, match="needs a density"):
        uniform_plan(SQUEEZENET, OneByN(4))


def test_globs_override_both_ways() -> None:
    assert names(uniform_plan(MOBILENET, NM(2, 4), include=["dw*"])) == ["dw1", "pw1", "dw2", "pw2"]
    assert names(uniform_plan(MOBILENET, NM(2, 4), include=["*"], exclude=["dw?"])) == ["stem", "pw1", "pw2", "fc"]
    assert names(uniform_plan(MOBILENET, NM(2, 4), exclude=["pw1", "dw[12]"])) == ["pw2"]


def test_names_with_brackets_match_themselves() -> None:
    layers = [layer("stem"), layer("block[0]/conv"), layer("block[1]/conv"), layer("head")]
    assert names(uniform_plan(layers, NM(2, 4), exclude=["block[0]/conv"])) == ["block[1]/conv"]


def test_a_glob_without_a_match_is_an_error_with_near_names() -> None:
    with pytest.raises(PlanError, match=r"no layer matches 'squeze\*'; near: squeeze"):
        uniform_plan(SQUEEZENET, NM(2, 4), exclude=["squeze*"])
    with pytest.raises(PlanError, match=r"no layer matches 'zzz'; there are: stem, squeeze, expand, \.\.\."):
        uniform_plan(SQUEEZENET, NM(2, 4), include=["zzz"])
    assert near_names("x", []) == "there are none"
    assert near_names("x", ["abc"]) == "there are: abc"


def test_plan_refuses_doubled_layers_and_bad_choices() -> None:
    choice = LayerChoice("a", Dense(), 1.0)
    with pytest.raises(ValueError, match="'a' has two choices"):
        Plan((choice, choice))
    with pytest.raises(ValueError, match="needs a layer name"):
        LayerChoice("", Dense(), 1.0)
    with pytest.raises(ValueError, match="density"):
        LayerChoice("a", NM(2, 4), 0.25)
