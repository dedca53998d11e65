"""The directory that a build leaves behind, and how it gets there: whole or not at all. Needs no TVM."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tvm_nm.errors import ArtifactError
from tvm_nm.layer_report import LayerReport
from tvm_nm.reference_run import TensorSpec

__all__ = [
    "LIBRARY",
    "MANIFEST",
    "MANIFEST_VERSION",
    "REPORT",
    "Manifest",
    "Verification",
    "check_output",
    "copy_artifact",
    "is_artifact",
    "staged_artifact",
]

MANIFEST, LIBRARY, REPORT = "manifest.json", "model.so", "report.txt"
MANIFEST_VERSION = 1
"""Version of the artefact that this release reads and writes."""

_FORMAT = "tvm_nm artefact"
_STALE_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the built module's outputs were from the reference's on one random input.

    Attributes
    ----------
    max_abs, max_rel
        Largest difference, and that difference as a share of the output's largest value.
    reference
        What ran the pruned model instead, such as ``onnxruntime 1.20.0``.
    """

    max_abs: float
    max_rel: float
    reference: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artefact holds.

    Attributes
    ----------
    model, model_sha256
        Name of the model and the hash of its ONNX file (of the serialised model where there was no file).
    library_sha256, library_bytes
        Hash and size of the library.
    inputs, outputs
        In the order of the function ``main``.
    target
        The TVM target as a dictionary.
    architecture, features
        The processor that the library needs: its architecture, and LLVM's names of its features.
    threads
        Number of threads that the schedules were made for.
    versions
        Versions of the packages that built it.
    pattern, density, include, exclude
        What was asked for.
    layers
        What became of each layer, in call order.
    verification
        None if the build was not verified.
    build_seconds
        Time from start to end.
    """

    model: str
    model_sha256: str
    library_sha256: str
    library_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    target: dict[str, Any]
    architecture: str
    features: tuple[str, ...]
    threads: int
    versions: dict[str, str]
    pattern: str
    density: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    verification: Verification | None
    build_seconds: float

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense model's convolutions and fully connected layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def kept_macs(self) -> int:
        """Multiply-accumulates that the library executes for them."""
        return sum(layer.kept_macs for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON-ready values."""
        return {"format": _FORMAT, "version": MANIFEST_VERSION, **asdict(self)}

    def to_json(self) -> str:
        """Return the manifest as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "manifest") -> Manifest:
        """Read the text that `to_json` writes.

        Parameters
        ----------
        text
            The JSON text.
        source
            What to call it in error messages, such as the file's path.

        Raises
        ------
        ArtifactError
            If the text is no manifest, or one of another version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{source} is not JSON: {error}; build the artefact again") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ArtifactError(f'{source} is not of an artefact: it lacks "format": "{_FORMAT}"')
        if data.get("version") != MANIFEST_VERSION:
            raise ArtifactError(
                f"{source} has format version {data.get('version')!r} and this tvm_nm reads version "
                f"{MANIFEST_VERSION}; build the artefact again"
            )
        try:
            return cls(
                model=_get(data, "model", str),
                model_sha256=_get(data, "model_sha256", str),
                library_sha256=_get(data, "library_sha256", str),
                library_bytes=_get(data, "library_bytes", int),
                inputs=_specs(data, "inputs"),
                outputs=_specs(data, "outputs"),
                target=_get(data, "target", dict),
                architecture=_get(data, "architecture", str),
                features=_texts(data, "features"),
                threads=_get(data, "threads", int),
                versions={key: str(value) for key, value in _get(data, "versions", dict).items()},
                pattern=_get(data, "pattern", str),
                density=float(_get(data, "density", float | int)),
                include=_texts(data, "include"),
                exclude=_texts(data, "exclude"),
                layers=tuple(LayerReport(**_entry(LayerReport, item)) for item in _get(data, "layers", list)),
                verification=None
                if data.get("verification") is None
                else Verification(**_entry(Verification, data["verification"])),
                build_seconds=float(_get(data, "build_seconds", float | int)),
            )
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{source} is damaged: {error}; build the artefact again") from error

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of an artefact.

        Raises
        ------
        ArtifactError
            If the directory is no artefact of this version.
        """
        path = Path(directory) / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise ArtifactError(
                f"{os.fspath(directory)} is not an artefact: {MANIFEST} is missing; build one with `tvm-nm compile`"
            ) from None
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path} is damaged: it is not UTF-8 text; build the artefact again") from error
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
        return cls.from_json(text, source=str(path))


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a directory with a manifest, be it readable or not."""
    return (Path(path) / MANIFEST).is_file()


def check_output(output: Path, overwrite: bool = True) -> None:
    """Check that an artefact may be put at a path, which must then be free, an empty directory or an artefact.

    Raises
    ------
    ArtifactError
        If something else is there, if there is an artefact and `overwrite` is False, or if the parent is missing.
    """
    if not output.parent.is_dir():
        raise ArtifactError(f"{output.parent} is not a directory; create it or choose another output")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise ArtifactError(f"{output} exists and is no directory; choose another output")
    try:
        entries = {entry.name for entry in output.iterdir()}
    except OSError as error:
        raise ArtifactError(f"{output} cannot be read: {error.strerror}; choose another output") from error
    if not entries:
        return
    if MANIFEST not in entries:
        raise ArtifactError(f"{output} exists and is no artefact; choose another output")
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ArtifactError(f"{output} exists and its {MANIFEST} is not of an artefact; choose another output")
    if foreign := entries - {MANIFEST, LIBRARY, REPORT}:
        raise ArtifactError(f"{output} holds {min(foreign)!r}, which no build wrote; move it or choose another output")
    if not overwrite:
        raise ArtifactError(f"{output} exists; choose another output or allow overwriting")


@contextmanager
def staged_artifact(output: Path, *, overwrite: bool = True) -> Iterator[tuple[Path, Path]]:
    """Give a directory to build in; when the block ends without an exception it is moved to `output`, whole.

    Everything happens in one hidden directory beside `output`. After an exception or an interrupt nothing of it is
    left and an artefact that was there before still is. What a killed process leaves behind, the next build of the
    same output removes.

    Parameters
    ----------
    output
        Where the artefact goes.
    overwrite
        Whether an artefact that is there is replaced.

    Yields
    ------
    The directory for the artefact's files, and one for scratch files.

    Raises
    ------
    ArtifactError
        As `check_output`, and if something cannot be written, in the block too.
    """
    output = output.resolve()
    check_output(output, overwrite)
    _remove_stale(output)
    staging = output.parent / f".{output.name}.{secrets.token_hex(4)}.tvm-nm"
    lock = -1
    try:
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # tells `_remove_stale` of other processes that this one lives
        new, scratch = staging / "new", staging / "scratch"
        new.mkdir()
        scratch.mkdir()
        yield new, scratch
        _sync(new)
        check_output(output, overwrite)
        _swap(new, output, staging / "old")
    except OSError as error:
        raise _write_error(output, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def copy_artifact(source: Path, output: Path, *, overwrite: bool = True) -> None:
    """Copy an artefact, whole or not at all.

    Raises
    ------
    ArtifactError
        As `staged_artifact`, and if `source` lacks a file.
    """
    with staged_artifact(output, overwrite=overwrite) as (new, _):
        for name in (MANIFEST, LIBRARY, REPORT):
            if not (source / name).is_file():
                raise ArtifactError(f"{source / name} is missing; build the artefact again")
            shutil.copyfile(source / name, new / name)


def _swap(new: Path, output: Path, old: Path) -> None:
    if not output.exists():
        new.rename(output)
    else:
        output.rename(old)
        try:
            new.rename(output)
        except BaseException:
            old.rename(output)
            raise
    _sync_directory(output.parent)


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove_stale(output: Path) -> None:
    """Remove what killed builds of the same output left; bring back the artefact if one was killed between renames."""
    for staging in output.parent.glob(f".{_literal(output.name)}.*.tvm-nm"):
        with suppress(OSError):
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # A young one may be about to take its lock.
                if time.time() - staging.stat().st_mtime > _STALE_SECONDS:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if (staging / "old").exists() and not output.exists():
                        (staging / "old").rename(output)
                    shutil.rmtree(staging, ignore_errors=True)
            finally:
                os.close(lock)


def _literal(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _write_error(output: Path, error: OSError) -> ArtifactError:
    remedy = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "; free some space or choose another output"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "; choose another output"
    return ArtifactError(f"cannot write {output}: {error.strerror or error}{remedy}")


def _get(data: dict[str, Any], key: str, kind: Any) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key!r} is missing or of the wrong type")
    return value


def _texts(data: dict[str, Any], key: str) -> tuple[str, ...]:
    return tuple(str(item) for item in _get(data, key, list))


def _entry(kind: type, item: object) -> dict[str, Any]:
    """Return an object's entries after checking that they are the fields of a dataclass, and numbers where it says."""
    names = {field.name: str(field.type) for field in fields(kind)}
    if not isinstance(item, dict) or item.keys() != names.keys():
        raise ValueError(f"{item!r:.60} is not a {kind.__name__}")
    allowed: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
    for name, value in item.items():
        if not isinstance(value, allowed[names[name]]) or isinstance(value, bool):
            raise ValueError(f"{name!r} of a {kind.__name__} is {value!r:.60}")
    return item


def _specs(data: dict[str, Any], key: str) -> tuple[TensorSpec, ...]:
    specs = []
    for item in _get(data, key, list):
        if not isinstance(item, dict):
            raise ValueError(f"{key!r} holds {item!r:.60}")
        shape = _get(item, "shape", list)
        if not all(isinstance(extent, int) and extent >= 0 for extent in shape):
            raise ValueError(f"{key!r} has the shape {shape!r:.60}")
        specs.append(TensorSpec(_get(item, "name", str), tuple(shape), _get(item, "dtype", str)))
    return tuple(specs)
