"""What every layer costs in time and in accuracy at each pattern and density: the table that the planner reads.

Needs NumPy only. The file is JSON with one line a candidate, so that it can be read, compared and edited by hand.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm_nm.errors import ArtifactError, PlanError
from tvm_nm.json_file import load_text, read_json, write_text
from tvm_nm.patterns import Dense, SparsityPattern, parse_pattern

__all__ = ["COSTS_VERSION", "Candidate", "CostTable", "LayerCosts", "TimeSource"]

COSTS_VERSION = 1
"""Version of the cost table that this release reads and writes."""

_FORMAT = "tvm_nm costs"


class TimeSource(enum.Enum):
    """Where a time comes from, the most trustworthy first.

    MEASURED is in the network; TUNED in a tuning database, scaled to the network; INTERPOLATED between other densities.
    """

    MEASURED = "measured"
    TUNED = "tuned"
    INTERPOLATED = "interpolated"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing that a layer can be pruned to.

    Attributes
    ----------
    pattern, density
        As in a plan.
    time_us
        Time of the layer with its epilogue in one inference.
    source
        Where the time comes from.
    macs
        Multiply-accumulates that the kernel executes.
    bytes
        Size of the packed weights.
    kernel
        The kernel variant in words; empty where none was built.
    errors
        By importance metric, the share of the layer that is lost: 0 for dense, 1 where nothing is left of it.

    Raises
    ------
    ValueError
        If the density does not go with the pattern, or a number is negative or not finite.
    """

    pattern: SparsityPattern
    density: float
    time_us: float
    source: TimeSource = TimeSource.MEASURED
    macs: int = 0
    bytes: int = 0
    kernel: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pattern.check_density(self.density)
        for number in (self.time_us, self.macs, self.bytes, *self.errors.values()):
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{self.label} has the cost {number}, which is no finite number from 0")

    @property
    def is_dense(self) -> bool:
        return isinstance(self.pattern, Dense)

    @property
    def label(self) -> str:
        """Pattern and density in words, such as ``1x16 at 0.25``."""
        return self.pattern.at(self.density)

    @property
    def key(self) -> tuple[str, float]:
        """What tells two candidates of a layer apart."""
        return str(self.pattern), round(self.density, 6)


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """A layer's candidates.

    Attributes
    ----------
    name, kind, workload, epilogue
        As in `tvm_nm.layer_report.LayerReport`.
    macs
        Multiply-accumulates of the dense layer.
    candidates
        Different ones; dense is always among them.
    sensitivity
        By importance metric, what share of the network's loss the layer's error counts for. The sensitivities of all
        layers that can be pruned add up to 1, so that every metric has the same scale: 0 is the dense network, 1 one
        of which nothing is left.

    Raises
    ------
    ValueError
        If a candidate is there twice, or dense is missing.
    """

    name: str
    kind: str
    workload: str
    epilogue: str
    macs: int
    candidates: tuple[Candidate, ...]
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [candidate.key for candidate in self.candidates]
        if len(set(keys)) != len(keys):
            raise ValueError(f"layer {self.name!r} has a candidate twice")
        if not any(candidate.is_dense for candidate in self.candidates):
            raise ValueError(f"layer {self.name!r} lacks the dense candidate")

    @property
    def dense(self) -> Candidate:
        """The dense candidate."""
        return next(candidate for candidate in self.candidates if candidate.is_dense)

    @property
    def can_be_pruned(self) -> bool:
        """Whether there is anything but dense."""
        return len(self.candidates) > 1

    def find(self, pattern: SparsityPattern, density: float) -> Candidate | None:
        """Return the candidate of that pattern and density, if there is one."""
        key = (str(pattern), round(density, 6))
        return next((candidate for candidate in self.candidates if candidate.key == key), None)

    def loss(self, candidate: Candidate, metric: str) -> float:
        """Return what a candidate costs in accuracy: the layer's sensitivity times the candidate's error."""
        return self.sensitivity[metric] * candidate.errors[metric]


@dataclass(frozen=True, slots=True)
class CostTable:
    """The costs of a model's layers on one target.

    Attributes
    ----------
    model, model_sha256
        Name of the model and the hash of its ONNX file.
    structure
        Hash of the layers' names and shapes; see `tvm_nm.fingerprint.structure_digest`.
    target, threads
        What the times were measured on, the target without `num-cores`.
    revision
        Revision of the kernel templates.
    fixed_us
        Time of everything that is no layer, and of what calling the layers one after the other adds.
    layers
        In call order.
    calibrated
        What calibrated errors were found with, in words; empty where there are none.

    Raises
    ------
    ValueError
        If a layer is there twice or the fixed time is not finite.
    """

    model: str
    model_sha256: str
    structure: str
    target: Mapping[str, Any]
    threads: int
    revision: int
    fixed_us: float
    layers: tuple[LayerCosts, ...]
    calibrated: str = ""

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError("the table has a layer twice")
        if not math.isfinite(self.fixed_us):
            raise ValueError(f"the fixed time is {self.fixed_us}")

    @property
    def dense_us(self) -> float:
        """Time of the dense network."""
        return self.fixed_us + sum(layer.dense.time_us for layer in self.layers)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Importance metrics that every candidate of every layer has."""
        sets = [
            set(layer.sensitivity).intersection(*(candidate.errors for candidate in layer.candidates))
            for layer in self.layers
        ]
        return tuple(sorted(set.intersection(*sets))) if sets else ()

    def layer(self, name: str) -> LayerCosts | None:
        """Return the layer of that name, if there is one."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def check_metric(self, metric: str) -> None:
        """Raise `PlanError` unless the table has an importance metric."""
        if metric not in self.metrics:
            known = ", ".join(self.metrics) or "none"
            raise PlanError(f"the cost table has no importance metric {metric!r} (it has: {known}); measure it first")

    def to_json(self) -> str:
        """Return the table as JSON text, one line a candidate."""
        head = {
            "format": _FORMAT,
            "version": COSTS_VERSION,
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "layers"},
            "target": dict(self.target),
        }
        body = ",\n".join(_layer_text(layer) for layer in self.layers)
        return json.dumps(head, indent=2)[:-2] + f',\n  "layers": [\n{body}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, source: str = "cost table") -> CostTable:
        """Read the text that `to_json` writes.

        Raises
        ------
        ArtifactError
            If the text is no cost table, or one of another version.
        """
        data = read_json(text, source, _FORMAT, COSTS_VERSION, "cost table")
        try:
            layers = tuple(_read_layer(entry) for entry in data["layers"])
            return cls(
                model=str(data["model"]),
                model_sha256=str(data["model_sha256"]),
                structure=str(data["structure"]),
                target=dict(data["target"]),
                threads=int(data["threads"]),
                revision=int(data["revision"]),
                fixed_us=float(data["fixed_us"]),
                layers=layers,
                calibrated=str(data.get("calibrated", "")),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{source}: {error}") from error
        except KeyError as error:
            raise ArtifactError(f"{source} lacks {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a file, whole or not at all.

        Raises
        ------
        ArtifactError
            If the file cannot be written.
        """
        write_text(path, self.to_json(), "cost table")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostTable:
        """Read a table from a file.

        Raises
        ------
        ArtifactError
            If the file cannot be read or is no cost table of this version.
        """
        return cls.from_json(load_text(path, "cost table"), source=f"cost table {os.fspath(path)}")


def _layer_text(layer: LayerCosts) -> str:
    head = {
        "name": layer.name,
        "kind": layer.kind,
        "workload": layer.workload,
        "epilogue": layer.epilogue,
        "macs": layer.macs,
        "sensitivity": dict(layer.sensitivity),
    }
    lines = ",\n".join(f"        {json.dumps(_candidate_entry(candidate))}" for candidate in layer.candidates)
    text = ",\n".join(f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    return f'    {{\n{text},\n      "candidates": [\n{lines}\n      ]\n    }}'


def _candidate_entry(candidate: Candidate) -> dict[str, Any]:
    return {
        "pattern": str(candidate.pattern),
        "density": candidate.density,
        "time_us": round(candidate.time_us, 3),
        "source": candidate.source.value,
        "macs": candidate.macs,
        "bytes": candidate.bytes,
        "errors": {metric: float(f"{error:.6g}") for metric, error in candidate.errors.items()},
        "kernel": candidate.kernel,
    }


def _read_layer(entry: Any) -> LayerCosts:
    candidates = tuple(
        Candidate(
            pattern=parse_pattern(item["pattern"]),
            density=float(item["density"]),
            time_us=float(item["time_us"]),
            source=TimeSource(item["source"]),
            macs=int(item["macs"]),
            bytes=int(item["bytes"]),
            kernel=str(item["kernel"]),
            errors={str(metric): float(error) for metric, error in item["errors"].items()},
        )
        for item in entry["candidates"]
    )
    return LayerCosts(
        name=str(entry["name"]),
        kind=str(entry["kind"]),
        workload=str(entry["workload"]),
        epilogue=str(entry["epilogue"]),
        macs=int(entry["macs"]),
        candidates=candidates,
        sensitivity={str(metric): float(value) for metric, value in entry["sensitivity"].items()},
    )
