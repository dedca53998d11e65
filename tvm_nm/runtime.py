"""Loads artefacts and runs them on NumPy arrays."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from tvm_nm.artifact import LIBRARY, copy_artifact
from tvm_nm.environment import check_environment, missing_features, package_versions
from tvm_nm.errors import ArtifactError, EnvironmentMismatchError
from tvm_nm.layer_report import LayerReport
from tvm_nm.library import load_library
from tvm_nm.linker import file_sha256
from tvm_nm.manifest import Manifest
from tvm_nm.reference_run import TensorSpec
from tvm_nm.schedules.machine import usable_threads

if TYPE_CHECKING:
    from tvm_nm.agreement import Agreement
    from tvm_nm.bench import BenchmarkResult

__all__ = ["CompiledModel", "load", "use_threads"]

Array: TypeAlias = NDArray[Any]

_pool = threading.local()


def load(directory: str | os.PathLike[str], *, threads: int | None = None) -> CompiledModel:
    """Load an artefact that `tvm_nm.compile` or ``tvm-nm compile`` built.

    Parameters
    ----------
    directory
        The artefact.
    threads
        Number of threads to run with; default: the number it was built for, or of processors if there are fewer.

    Raises
    ------
    ArtifactError
        If the directory is no artefact of this version, or its library is missing or is not the one that was built.
    EnvironmentMismatchError
        If this machine's processor lacks what the library needs, or TVM is not the version that built it.
    """
    model = CompiledModel(Path(directory), Manifest.load(directory), threads=threads)
    model.open()
    return model


class CompiledModel:
    """A built model: call it with NumPy arrays to get NumPy arrays.

    Arrays are given by position in the order of `inputs`, by name as keywords, or as one mapping. They may have any
    memory layout and alignment; shape and dtype must be those of the inputs. One output comes as an array, several as
    a tuple. Calls from several threads run one after the other.

    Made by `tvm_nm.compile` and `tvm_nm.load`.

    Examples
    --------
    >>> model = tvm_nm.load("resnet50-tvm")                                              # doctest: +SKIP
    >>> logits = model(image)                                                            # doctest: +SKIP
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        temporary: tempfile.TemporaryDirectory[str] | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"a model runs with at least 1 thread, not {threads}")
        self._directory = directory
        self._manifest = manifest
        self._threads = threads or min(manifest.threads, usable_threads())
        self._temporary = temporary
        self._agreement = agreement
        self._lock = threading.Lock()
        self._library: Any = None
        self._main: Any = None
        self._buffers: list[Any] = []

    @property
    def directory(self) -> Path:
        """Where the artefact lies."""
        return self._directory

    @property
    def manifest(self) -> Manifest:
        """What the artefact holds."""
        return self._manifest

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes and dtypes of the inputs."""
        return self._manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes and dtypes of the outputs."""
        return self._manifest.outputs

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """What became of each layer."""
        return self._manifest.layers

    @property
    def agreement(self) -> Agreement | None:
        """How its answers compare with the dense network's, if `tvm_nm.compile` was given a gate."""
        return self._agreement

    @property
    def threads(self) -> int:
        """Number of threads that the model runs with."""
        return self._threads

    def __repr__(self) -> str:
        kept = self._manifest.kept_macs / max(1, self._manifest.macs)
        facts = f"{len(self.layers)} layers, {kept:.0%} of the MACs, {self._threads} threads"
        return f"<CompiledModel {self._manifest.model}: {facts}>"

    def open(self) -> None:
        """Load the library, unless it is loaded; the first call of the model does it by itself.

        Raises
        ------
        ArtifactError
            If the library is missing or is not the one that was built.
        EnvironmentMismatchError
            If this machine's processor lacks what the library needs, or TVM is not the version that built it.
        """
        with self._lock:
            self._open()

    def _open(self) -> None:
        if self._main is not None:
            return
        check_environment()
        _check_host(self._manifest, self._directory)
        library = _load_library(self._directory / LIBRARY, self._manifest)
        self._main = relax.VirtualMachine(library, tvm.cpu())["main"]
        self._library = library
        self._buffers = [tvm.runtime.empty(spec.shape, spec.dtype) for spec in self.inputs]

    def __call__(self, *args: Array | Mapping[str, Array], **kwargs: Array) -> Array | tuple[Array, ...]:
        """Run the model.

        Raises
        ------
        TypeError
            If an input is missing, unknown or given twice, or has another dtype.
        ValueError
            If an array has another shape.
        """
        arrays = self._bind(args, kwargs)
        with self._lock:
            self._open()
            use_threads(self._threads)
            for buffer, array in zip(self._buffers, arrays, strict=True):
                buffer.copyfrom(array)
            result = self._main(*self._buffers)
            if isinstance(result, tvm.runtime.Tensor):
                return _array(result)
            outputs = tuple(_array(item) for item in result)
        return outputs if len(outputs) > 1 else outputs[0]

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Array]:
        given = dict(kwargs)
        if len(args) == 1 and isinstance(args[0], Mapping):
            given = {**args[0], **given}
            args = []
        names = [spec.name for spec in self.inputs]
        if len(args) > len(names):
            raise TypeError(f"the model takes {len(names)} inputs ({', '.join(names)}), not {len(args)}")
        for name, array in zip(names, args, strict=False):
            if name in given:
                raise TypeError(f"input {name!r} is given twice")
            given[name] = array
        if unknown := given.keys() - set(names):
            raise TypeError(f"the model has no input {min(unknown)!r}; it has {', '.join(names)}")
        if missing := [name for name in names if name not in given]:
            raise TypeError(f"input {missing[0]!r} is missing")
        return [_checked(spec, given[spec.name]) for spec in self.inputs]

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Copy the artefact to a directory, whole or not at all.

        Parameters
        ----------
        directory
            Where it goes; its parent must exist.
        overwrite
            Whether an artefact that is there is replaced.

        Raises
        ------
        ArtifactError
            If something other than an artefact is there, or it cannot be written.
        """
        copy_artifact(self._directory, Path(directory), overwrite=overwrite)

    def benchmark(
        self,
        against: str | os.PathLike[str] | None = None,
        *,
        threads: int | None = None,
        rounds: int = 12,
        layers: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> BenchmarkResult:
        """Measure the model's latency; see `tvm_nm.bench.benchmark`."""
        from tvm_nm.bench import benchmark

        return benchmark(self, against, threads=threads, rounds=rounds, layers=layers, progress=progress)

    def with_threads(self, threads: int) -> CompiledModel:
        """Return the model with another number of threads; both share the library, not the calls in flight."""
        self.open()
        other = CompiledModel(self._directory, self._manifest, threads=threads, temporary=self._temporary)
        other._library = self._library
        other._main = self.virtual_machine()["main"]
        other._buffers = [tvm.runtime.empty(spec.shape, spec.dtype) for spec in self.inputs]
        return other

    def virtual_machine(self) -> Any:
        """Return a new `tvm.relax.VirtualMachine` of the library."""
        self.open()
        return relax.VirtualMachine(self._library, tvm.cpu())


def use_threads(threads: int) -> None:
    """Let TVM run parallel loops of the calling thread with a number of threads.

    Each Python thread has a pool of its own; it is created at its first use and cannot grow afterwards, only rest.

    Raises
    ------
    EnvironmentMismatchError
        If the pool exists and is smaller.
    """
    if getattr(_pool, "threads", None) == threads:
        return
    if threads > int(os.environ.get("TVM_NUM_THREADS", "1")):
        os.environ["TVM_NUM_THREADS"] = str(threads)
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    actual = int(tvm.get_global_func("runtime.NumThreads")())
    if actual != threads:
        raise EnvironmentMismatchError(
            f"TVM's thread pool has {actual} threads, {threads} are asked for; set TVM_NUM_THREADS={threads} before "
            f"the process starts, or run the model with threads={actual}"
        )
    _pool.threads = threads


def _check_host(manifest: Manifest, directory: Path) -> None:
    built, here = manifest.versions.get("apache-tvm"), package_versions()["apache-tvm"]
    if built != here:
        raise EnvironmentMismatchError(
            f"{directory} was built by TVM {built} and this is TVM {here}; build it again, or install the former"
        )
    if missing := missing_features(manifest.architecture, manifest.features):
        cpu = manifest.target.get("mcpu", manifest.architecture)
        raise EnvironmentMismatchError(
            f"{directory} was built for {cpu} and this machine lacks {', '.join(missing)}; build it again here"
        )


def _load_library(path: Path, manifest: Manifest) -> Any:
    try:
        digest = file_sha256(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; build the artefact again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    if digest != manifest.library_sha256:
        raise ArtifactError(f"{path} is not the library that was built: its SHA-256 differs; build the artefact again")
    return load_library(path, digest)


def _array(tensor: Any) -> Array:
    array: Array = tensor.numpy()  # a copy
    return array


def _checked(spec: TensorSpec, value: Any) -> Array:
    array = np.asarray(value)
    if array.dtype != np.dtype(spec.dtype):
        raise TypeError(f"input {spec.name!r} is {array.dtype}, {spec.dtype} is needed: use .astype(np.{spec.dtype})")
    if array.shape != spec.shape:
        raise ValueError(f"input {spec.name!r} has shape {array.shape}, {spec.shape} is needed")
    return np.require(array, requirements="C")  # np.ascontiguousarray makes vectors of scalars
