"""What an artefact says of itself: the manifest and its file. Needs no TVM."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tvm_nm.errors import ArtifactError
from tvm_nm.json_file import read_json
from tvm_nm.layer_report import LayerReport
from tvm_nm.rearrangement_report import LayerRearrangement, RearrangementReport
from tvm_nm.reference_run import TensorSpec

__all__ = ["MANIFEST", "MANIFEST_FORMAT", "MANIFEST_VERSION", "Manifest", "Verification"]

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "tvm_nm artefact"
MANIFEST_VERSION = 3
"""Version of the artefact that this release reads and writes."""

_REMEDY = "build the artefact again"


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
    rearrangement
        How channels changed places before pruning; None if they did not.
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
    rearrangement: RearrangementReport | None = None

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
        return {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **asdict(self)}

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
        data = read_json(text, source, MANIFEST_FORMAT, MANIFEST_VERSION, "manifest of an artefact", _REMEDY)
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
                rearrangement=_rearrangement(data.get("rearrangement")),
            )
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{source} is damaged: {error}; {_REMEDY}") from error

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
            raise ArtifactError(f"{path} is damaged: it is not UTF-8 text; {_REMEDY}") from error
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
        return cls.from_json(text, source=str(path))


def _get(data: dict[str, Any], key: str, kind: Any) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key!r} is missing or of the wrong type")
    return value


def _texts(data: dict[str, Any], key: str) -> tuple[str, ...]:
    return tuple(str(item) for item in _get(data, key, list))


def _entry(kind: type, item: object) -> dict[str, Any]:
    """Return an object's entries after checking that they are the fields of a dataclass, and numbers where it says.

    Artefacts of earlier releases may lack fields with defaults.
    """
    names = {field.name: str(field.type) for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not isinstance(item, dict) or not needed <= item.keys() <= names.keys():
        raise ValueError(f"{item!r:.60} is not a {kind.__name__}")
    allowed: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
    for name, value in item.items():
        if not isinstance(value, allowed[names[name]]) or isinstance(value, bool):
            raise ValueError(f"{name!r} of a {kind.__name__} is {value!r:.60}")
    return item


def _rearrangement(entry: object) -> RearrangementReport | None:
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ValueError(f"'rearrangement' is {entry!r:.60}")
    layers = tuple(LayerRearrangement(**_entry(LayerRearrangement, item)) for item in _get(entry, "layers", list))
    report = RearrangementReport(_get(entry, "method", str), float(_get(entry, "seconds", float | int)), layers)
    return replace(report, measure=_get(entry, "measure", str)) if "measure" in entry else report


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
