"""Which layer is pruned to which pattern and density: the plan, its file, and the plan that treats all layers alike."""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_nm.errors import ArtifactError, PlanError
from tvm_nm.patterns import SparsityPattern, parse_pattern

if TYPE_CHECKING:
    from tvm_nm.inventory import Layer

__all__ = ["PLAN_VERSION", "LayerChoice", "Plan", "near_names", "uniform_plan"]

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
class Plan:
    """Choices for some layers of a network; a layer that is not named stays as it is.

    Attributes
    ----------
    layers
        One choice a layer.

    Raises
    ------
    ValueError
        If a layer is named twice.
    """

    layers: tuple[LayerChoice, ...] = ()

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
        return f'{{\n  "format": "{_FORMAT}",\n  "version": {PLAN_VERSION},\n  "layers": [{body}\n  ]\n}}\n'

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
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{source} is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ArtifactError(f'{source} is not a plan: it lacks "format": "{_FORMAT}"')
        if data.get("version") != PLAN_VERSION:
            raise ArtifactError(
                f"{source} is a plan of version {data.get('version')!r} and this tvm_nm reads version {PLAN_VERSION}; "
                "make it again"
            )
        entries = data.get("layers")
        if not isinstance(entries, list):
            raise ArtifactError(f'{source} lacks the list "layers"')
        try:
            return cls(tuple(_read_choice(entry, position) for position, entry in enumerate(entries)))
        except ValueError as error:
            raise ArtifactError(f"{source}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file. An interrupted write leaves the old file as it was.

        Raises
        ------
        ArtifactError
            If the file cannot be written.
        """
        target = Path(path)
        scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            try:
                with scratch.open("x", encoding="utf-8") as file:
                    file.write(self.to_json())
                scratch.replace(target)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ArtifactError(f"cannot write plan {target}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file.

        Raises
        ------
        ArtifactError
            If the file cannot be read or is no plan of this version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ArtifactError(f"cannot read plan {os.fspath(path)}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{os.fspath(path)} is not a plan: it is not UTF-8 text") from error
        return cls.from_json(text, source=f"plan {os.fspath(path)}")


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
