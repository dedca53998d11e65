from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_nm import artifact
from tvm_nm.artifact import LIBRARY, REPORT, check_output, staged_artifact
from tvm_nm.errors import ArtifactError
from tvm_nm.layer_report import LayerReport
from tvm_nm.manifest import MANIFEST, Manifest, Verification
from tvm_nm.reference_run import TensorSpec

TEXT = st.text(max_size=8)
COUNT = st.integers(0, 2**40)
RATIO = st.floats(0, 1)
SPECS = st.lists(
    st.builds(TensorSpec, TEXT, st.lists(st.integers(0, 9), max_size=4).map(tuple), st.just("float32")), max_size=2
).map(tuple)
LAYERS = st.lists(
    st.builds(LayerReport, TEXT, TEXT, TEXT, TEXT, TEXT, RATIO, TEXT, TEXT, COUNT, COUNT, COUNT, TEXT), max_size=3
).map(tuple)
TEXTS = st.lists(TEXT, max_size=2).map(tuple)
MANIFESTS = st.builds(
    Manifest,
    model=TEXT,
    model_sha256=TEXT,
    library_sha256=TEXT,
    library_bytes=COUNT,
    inputs=SPECS,
    outputs=SPECS,
    target=st.dictionaries(TEXT, st.integers() | TEXT | st.lists(TEXT, max_size=2), max_size=2),
    architecture=TEXT,
    features=TEXTS,
    threads=st.integers(1, 64),
    versions=st.dictionaries(TEXT, TEXT, max_size=2),
    pattern=TEXT,
    density=RATIO,
    include=TEXTS,
    exclude=TEXTS,
    layers=LAYERS,
    verification=st.none() | st.builds(Verification, RATIO, RATIO, TEXT),
    build_seconds=RATIO,
)
EXAMPLE = Manifest(
    model="net",
    model_sha256="00",
    library_sha256="11",
    library_bytes=3,
    inputs=(TensorSpec("x", (1, 3), "float32"),),
    outputs=(),
    target={"kind": "llvm"},
    architecture="x86_64",
    features=("avx2",),
    threads=2,
    versions={"apache-tvm": "0.27.0.post1"},
    pattern="1x16",
    density=0.5,
    include=(),
    exclude=(),
    layers=(LayerReport("a", "conv", "w", "", "1x16", 0.5, "k", "f", 100, 50, 8),),
    verification=Verification(1e-6, 1e-7, "onnxruntime"),
    build_seconds=1.5,
)


@given(MANIFESTS)
def test_a_manifest_survives_its_file(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_layers_of_earlier_releases_lack_what_has_a_default() -> None:
    data = json.loads(EXAMPLE.to_json())
    del data["layers"][0]["pool"]
    assert Manifest.from_json(json.dumps(data)) == EXAMPLE


def test_macs_are_summed_over_layers() -> None:
    twice = dataclasses.replace(EXAMPLE, layers=EXAMPLE.layers * 2)
    assert (twice.macs, twice.kept_macs) == (200, 100)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "plan"}, "is not a manifest of an artefact"),
        ({"version": 99}, "of version 99"),
        ({"threads": "2"}, "'threads'"),
        ({"threads": True}, "'threads'"),
        ({"threads": None}, "'threads'"),
        ({"layers": [{"name": "a"}]}, "is not a LayerReport"),
        ({"layers": [{**EXAMPLE.layers[0].to_dict(), "macs": "many"}]}, "'macs' of a LayerReport"),
        ({"verification": {"max_abs": 0, "max_rel": "0", "reference": ""}}, "'max_rel' of a Verification"),
        ({"inputs": [{"name": "x", "shape": [-1], "dtype": "float32"}]}, r"the shape \[-1\]"),
        ({"inputs": [7]}, "'inputs' holds 7"),
        ({"versions": []}, "'versions'"),
    ],
)
def test_a_damaged_manifest_is_refused(change: dict[str, Any], says: str) -> None:
    data = {**EXAMPLE.to_dict(), **change}
    with pytest.raises(ArtifactError, match=says):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '"manifest"'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="manifest is not"):
        Manifest.from_json(text)


def test_loading_names_the_directory_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nothing is not an artefact.*tvm-nm compile"):
        Manifest.load(tmp_path / "nothing")
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        Manifest.load(tmp_path)
    (tmp_path / MANIFEST).write_text(EXAMPLE.to_json(), encoding="utf-8")
    assert Manifest.load(tmp_path) == EXAMPLE


def build(output: Path, library: bytes = b"code", error: BaseException | None = None, **options: Any) -> None:
    with staged_artifact(output, **options) as (new, scratch):
        (scratch / "big").write_bytes(b"temporary")
        (new / LIBRARY).write_bytes(library)
        (new / REPORT).write_text("report")
        if error is not None:
            raise error
        (new / MANIFEST).write_text(EXAMPLE.to_json())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_artefact_appears_whole(tmp_path: Path) -> None:
    with staged_artifact(tmp_path / "out") as (new, _):
        (new / LIBRARY).write_bytes(b"code")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [LIBRARY]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        build(tmp_path / "out", error=error())
    assert names(tmp_path) == []


def test_an_artefact_is_replaced_and_survives_a_failed_build(tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(output, b"first")
    build(output, b"second")
    with pytest.raises(KeyboardInterrupt):
        build(output, b"third", error=KeyboardInterrupt())
    assert (output / LIBRARY).read_bytes() == b"second"
    assert names(tmp_path) == ["out"]


def test_an_empty_directory_and_a_link_to_an_artefact_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    build(tmp_path / "link", b"new")
    assert (tmp_path / "out" / LIBRARY).read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_what_is_no_artefact_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text('{"short_name": "app"}')
    build(tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.txt").write_text("mine")
    for name, says in [
        ("file", "no directory"),
        ("folder", "is no artefact"),
        ("web", "not of an artefact"),
        ("mixed", "'notes.txt', which no build wrote"),
        ("missing/out", "is not a directory"),
    ]:
        with pytest.raises(ArtifactError, match=says):
            build(tmp_path / name)
    assert (tmp_path / "mixed" / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["file", "folder", "mixed", "web"]


def test_overwriting_can_be_forbidden(tmp_path: Path) -> None:
    build(tmp_path / "out", overwrite=False)
    with pytest.raises(ArtifactError, match="exists"):
        build(tmp_path / "out", overwrite=False)


def test_what_appears_during_the_build_is_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with staged_artifact(tmp_path / "out") as (new, _):
            (new / LIBRARY).write_bytes(b"code")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(ArtifactError, match="no artefact"):
        race()
    assert names(tmp_path / "out") == ["notes.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, number: int) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*out: .*; free some space"):
        build(tmp_path / "out", error=OSError(number, os.strerror(number)))
    assert names(tmp_path) == []


def test_the_old_artefact_comes_back_when_the_new_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    build(output, b"first")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match="broken"):
        build(output, b"second")
    assert (output / LIBRARY).read_bytes() == b"first"


def leftover(tmp_path: Path, token: str, age: float = 3600) -> Path:
    staging = tmp_path / f".out.{token}.tvm-nm"
    (staging / "old").mkdir(parents=True)
    (staging / "old" / LIBRARY).write_bytes(b"old")
    os.utime(staging, (os.path.getmtime(staging) - age,) * 2)
    return staging


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    build(tmp_path / "out", b"first")
    dead, live, young = leftover(tmp_path, "dead"), leftover(tmp_path, "live"), leftover(tmp_path, "young", 0)
    other = tmp_path / ".another.dead.tvm-nm"
    other.mkdir()
    lock = os.open(live, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        build(tmp_path / "out", b"second")
    finally:
        os.close(lock)
    assert (dead.exists(), live.exists(), young.exists(), other.exists()) == (False, True, True, True)
    assert (tmp_path / "out" / LIBRARY).read_bytes() == b"second"


def test_an_artefact_lost_between_renames_is_brought_back(tmp_path: Path) -> None:
    leftover(tmp_path, "dead")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", error=KeyboardInterrupt())
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / LIBRARY).read_bytes() == b"old"


def test_globs_in_the_output_name_are_literal(tmp_path: Path) -> None:
    other = tmp_path / ".outs.dead.tvm-nm"
    other.mkdir()
    os.utime(other, (0, 0))
    build(tmp_path / "out[s]")
    assert other.exists()


def test_copying_needs_every_file(tmp_path: Path) -> None:
    build(tmp_path / "a")
    artifact.copy_artifact(tmp_path / "a", tmp_path / "b")
    assert {n: (tmp_path / "b" / n).read_bytes() for n in names(tmp_path / "b")} == {
        n: (tmp_path / "a" / n).read_bytes() for n in names(tmp_path / "a")
    }
    (tmp_path / "a" / REPORT).unlink()
    with pytest.raises(ArtifactError, match=r"report\.txt is missing"):
        artifact.copy_artifact(tmp_path / "a", tmp_path / "c")
    assert names(tmp_path) == ["a", "b"]


def test_a_free_path_is_a_fine_output(tmp_path: Path) -> None:
    check_output(tmp_path / "free")
    assert not artifact.is_artifact(tmp_path / "free")
    build(tmp_path / "free")
    assert artifact.is_artifact(tmp_path / "free")
