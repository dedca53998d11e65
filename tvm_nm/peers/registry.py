"""What a runtime has to provide to take part: one function."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tvm_nm.errors import EnvironmentMismatchError

__all__ = ["PEERS", "Job", "Load", "Peer", "Prepare", "Run", "load_plugin", "peer"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """A model to run.

    Attributes
    ----------
    model
        The ONNX file; float32, static shapes.
    threads
        How many threads to use.
    inputs
        Array by input name, in the order of the graph.
    outputs
        Names of the graph's outputs.
    folder
        A folder of this runtime's own, which is kept for the same model: what a preparation leaves there is found by
        the next run.
    """

    model: Path
    threads: int
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    folder: Path


Run: TypeAlias = Callable[[], Sequence[Any]]
"""Runs the model once and returns its outputs in the graph's order, as arrays or anything with ``numpy()``.

Only this is timed. The inputs are where the runtime likes them; nothing needs to be copied to NumPy.
"""
Load: TypeAlias = Callable[[Job], Run]
Prepare: TypeAlias = Callable[[Job], None]


@dataclass(frozen=True, slots=True)
class Peer:
    """A runtime.

    Attributes
    ----------
    name
        What tables call it.
    load
        Loads a model and returns a function that runs it.
    packages
        Python distributions it needs; where one is missing the runtime is skipped.
    precision
        What it computes in. Only ``fp32`` rows count when the best peer is looked for.
    prepare
        Converts or compiles the model into the job's folder, in a process of its own; done once for a model.
    per_thread_count
        Whether what is prepared depends on the number of threads.
    optional
        Whether it takes part only where it is named.
    """

    name: str
    load: Load
    packages: tuple[str, ...] = ()
    precision: str = "fp32"
    prepare: Prepare | None = None
    per_thread_count: bool = False
    optional: bool = False

    @property
    def versions(self) -> dict[str, str | None]:
        """Versions of its packages; None where one is not installed."""
        return {package: _version(package) for package in self.packages}

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package, version in self.versions.items() if version is None]


PEERS: dict[str, Peer] = {}
"""Known runtimes by name, in the order of tables."""


def peer(
    name: str,
    *,
    packages: Sequence[str] = (),
    precision: str = "fp32",
    prepare: Prepare | None = None,
    per_thread_count: bool = False,
    optional: bool = False,
) -> Callable[[Load], Load]:
    """Register the decorated function as the way to load a model into a runtime; see `Peer`.

    Examples
    --------
    >>> @peer("reference", packages=["onnx"])
    ... def load(job):
    ...     from onnx.reference import ReferenceEvaluator
    ...
    ...     evaluator = ReferenceEvaluator(str(job.model))
    ...     return lambda: evaluator.run(None, dict(job.inputs))
    >>> PEERS.pop("reference").missing
    []
    """

    def register(load: Load) -> Load:
        PEERS[name] = Peer(name, load, tuple(packages), precision, prepare, per_thread_count, optional)
        return load

    return register


def load_plugin(path: Path) -> None:
    """Run a Python file that registers runtimes.

    Raises
    ------
    EnvironmentMismatchError
        If there is no such file.
    """
    spec = importlib.util.spec_from_file_location(f"tvm_nm_peer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise EnvironmentMismatchError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
