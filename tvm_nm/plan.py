"""Which layer is pruned to which pattern and density: the plan, its file, and the plan that treats all layers alike."""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from tvm_nm.errors import ArtifactError, PlanError
from tvm_nm.json_file import load_text, read_json, write_text
from tvm_nm.patterns import Dense, SparsityPattern, parse_pattern

if TYPE_CHECKING:
    from tvm_nm.inventory import Layer

__all__ = ["PLAN_VERSION", "LayerChoice", "Plan", "PlanOrigin", "near_names", "prunable_layers", "uniform_plan"]

PLAN_VERSION = 1
"""Version of the plan file that this release reads and writes."""

_FORMAT = "tvm_nm plan"


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What one layer is pruned to.

    Attributes
    ----------
    name
        The layer's name; see `tvm_nm.inventory.Layer`.
    pattern
        The sparsity pattern; `tvm_nm.patterns.Dense` leaves the layer as it is.
    density
        Share of weights kept, in (0, 1]; N:M patterns and `Dense` have their own.

    Raises
    ------
    ValueError
        If the name is empty or the density does not go with the pattern.
    """

    name: str
    pattern: SparsityPattern
    density: float

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a layer choice needs a layer name")
        self.pattern.check_density(self.density)


@dataclass(frozen=True, slots=True)
class PlanOrigin:
    """What a plan was made for, and what is expected of it; a plan that was written by hand has none.

    Attributes
    ----------
    model, model_sha256, structure
        The model: its name, the hash of its file, and of its layers; see `tvm_nm.costs.CostTable`.
    target, threads, revision
        What the times were measured on, and the revision of the kernel templates.
    metric
        Importance metric of the losses.
    budget_us
        The time that it had to meet.
    dense_us, predicted_us
        Time of the dense network and of the planned one in the cost table.
    loss
        Sum of the layers' losses.
    measured_share
        Measured time of the planned network as a share of the dense one's; None where it was not built.
    note
        What there is to say of it, such as that no sparse kernel is worth its loss; empty otherwise.
    """

    model: str
    model_sha256: str
    structure: str
    target: dict[str, Any]
    threads: int
    revision: int
    metric: str
    budget_us: float
    dense_us: float
    predicted_us: float
    loss: float
    measured_share: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Choices for some layers of a network; a layer that is not named stays as it is.

    Attributes
    ----------
    layers
        One choice a layer.
    origin
        What it was made for, if that is known.

    Raises
    ------
    ValueError
        If a layer is named twice.
    """

    layers: tuple[LayerChoice, ...] = ()
    origin: PlanOrigin | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for choice in self.layers:
            if choice.name in seen:
                raise ValueError(f"layer {choice.name!r} has two choices")
            seen.add(choice.name)

    def to_json(self) -> str:
        """Return the plan as JSON text, one line a layer."""
        layers = [
            json.dumps({"name": choice.name, "pattern": str(choice.pattern), "density": choice.density})
            for choice in self.layers
        ]
        body = "".join(f"\n    {line}," for line in layers).rstrip(",")
        origin = "" if self.origin is None else f'  "origin": {_indented(asdict(self.origin))},\n'
        return f'{{\n  "format": "{_FORMAT}",\n  "version": {PLAN_VERSION},\n{origin}  "layers": [{body}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
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
            If the text is no plan, or one of another version.
        """
        data = read_json(text, source, _FORMAT, PLAN_VERSION, "plan")
        entries = data.get("layers")
        if not isinstance(entries, list):
            raise ArtifactError(f'{source} lacks the list "layers"')
        try:
            layers = tuple(_read_choice(entry, position) for position, entry in enumerate(entries))
            return cls(layers, _read_origin(data.get("origin")))
        except ValueError as error:
            raise ArtifactError(f"{source}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file. An interrupted write leaves the old file as it was.

        Raises
        ------
        ArtifactError
            If the file cannot be written.
        """
        write_text(path, self.to_json(), "plan")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file.

        Raises
        ------
        ArtifactError
            If the file cannot be read or is no plan of this version.
        """
        return cls.from_json(load_text(path, "plan"), source=f"plan {os.fspath(path)}")


def uniform_plan(
    layers: Sequence[Layer],
    pattern: SparsityPattern,
    density: float | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> Plan:
    """Give all eligible layers the same pattern and density.

    Not eligible by default, because pruning them costs much accuracy for little time: the first convolution,
    depthwise and grouped convolutions, and the classifier, which is the last fully connected layer or, in a network
    without one, the last convolution.

    Parameters
    ----------
    layers
        The network's layers in order, from `tvm_nm.inventory.inventory`.
    pattern
        The sparsity pattern.
    density
        Share of weights to keep; None where the pattern settles it.
    include
        Globs (``*``, ``?``, ``[...]``) or names of layers to prune although they are not eligible.
    exclude
        Globs or names of layers to leave alone; it wins over `include`.

    Raises
    ------
    PlanError
        If a glob matches no layer.
    ValueError
        If the density does not go with the pattern.
    """
    density = pattern.check_density(density)
    added = _matching(layers, include)
    removed = _matching(layers, exclude)
    chosen = (_eligible(layers) | added) - removed
    return Plan(tuple(LayerChoice(layer.name, pattern, density) for layer in layers if layer.name in chosen))


def prunable_layers(
    layers: Sequence[Layer], include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the names of the layers that `uniform_plan` prunes, in order; the same errors."""
    return tuple(choice.name for choice in uniform_plan(layers, Dense(), None, include, exclude).layers)


def near_names(name: str, known: Iterable[str]) -> str:
    """Say which names somebody may have meant by one that does not exist: the end of an error message."""
    names = list(known)
    if not names:
        return "there are none"
    near = difflib.get_close_matches(name.strip("*?"), names, n=3, cutoff=0.4)
    if near:
        return "near: " + ", ".join(near)
    return "there are: " + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _eligible(layers: Sequence[Layer]) -> set[str]:
    convs = [layer for layer in layers if layer.kind == "conv"]
    classifier = [layer for layer in layers if layer.kind == "fc"] or convs
    spared = {layer.name for layer in (*convs[:1], *classifier[-1:])}
    return {layer.name for layer in layers if layer.groups == 1} - spared


def _matching(layers: Sequence[Layer], globs: Iterable[str]) -> set[str]:
    names = [layer.name for layer in layers]
    matched: set[str] = set()
    for glob in globs:
        # A name may hold brackets, so it is tried as it stands too.
        found = {name for name in names if name == glob or fnmatch.fnmatchcase(name, glob)}
        if not found:
            raise PlanError(f"no layer matches {glob!r}; {near_names(glob, names)}")
        matched |= found
    return matched


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2).replace("\n", "\n  ")


def _read_origin(entry: object) -> PlanOrigin | None:
    if entry is None:
        return None
    known = {item.name for item in fields(PlanOrigin)}
    needed = {item.name for item in fields(PlanOrigin) if item.default is MISSING}
    if not isinstance(entry, dict) or not needed <= entry.keys() <= known:
        raise ValueError(f'"origin" needs {", ".join(sorted(needed))}; remove it from a plan that is written by hand')
    numbers = ("budget_us", "dense_us", "predicted_us", "loss")
    if any(isinstance(entry[key], bool) or not isinstance(entry[key], int | float) for key in numbers):
        raise ValueError(f'"origin" needs numbers for {", ".join(numbers)}')
    if not isinstance(entry["target"], dict) or not isinstance(entry["threads"], int):
        raise ValueError('"origin" needs an object "target" and a number "threads"')
    return PlanOrigin(**entry)


def _read_choice(entry: object, position: int) -> LayerChoice:
    if not isinstance(entry, dict):
        raise ValueError(f"layer {position} is not an object")
    name, pattern, density = (entry.get(key) for key in ("name", "pattern", "density"))
    if not isinstance(name, str) or not isinstance(pattern, str):
        raise ValueError(f'layer {position} needs the texts "name" and "pattern"')
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise ValueError(f'layer {name!r} needs the number "density"')
    try:
        return LayerChoice(name, parse_pattern(pattern), float(density))
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
