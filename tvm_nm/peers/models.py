"""The ONNX files that go to every runtime: the model as it is and pruned, their inputs and onnxruntime's outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_nm.errors import PlanError, UnsupportedModelError
from tvm_nm.linker import file_sha256
from tvm_nm.patterns import Dense, parse_pattern
from tvm_nm.peers.registry import Job, Peer
from tvm_nm.pruning import PruneRequest, inspect_model, prune_file
from tvm_nm.reference_run import TensorSpec, random_inputs, run_onnx
from tvm_nm.report import sparsity_rows

__all__ = ["DENSE", "ModelFile", "Variant", "model_file", "run_command", "variants"]

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Variant:
    """What a model is pruned to.

    Attributes
    ----------
    name
        `dense`, or pattern and density, such as ``1x16@0.5``.
    pattern
        The sparsity pattern's text.
    density
        Share of weights kept.
    """

    name: str
    pattern: str
    density: float


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that all runtimes get.

    Attributes
    ----------
    model
        The model's name.
    variant
        What it was pruned to.
    path
        The ONNX file.
    folder
        Where what belongs to it is kept: inputs, reference outputs, converted models.
    outputs
        Names of its outputs.
    macs, kept_macs
        Multiply-accumulates of all layers, and of their non-zero weights.
    digest
        The file's SHA-256.
    """

    model: str
    variant: Variant
    path: Path
    folder: Path
    outputs: tuple[str, ...]
    macs: int
    kept_macs: float
    digest: str

    @property
    def inputs_file(self) -> Path:
        """The inputs, by name."""
        return self.folder / "inputs.npz"

    @property
    def reference_file(self) -> Path:
        """What onnxruntime returns, unoptimised."""
        return self.folder / "reference.npz"

    def job(self, peer: Peer, threads: int) -> Job:
        """Return what a runtime is asked to run; inputs are filled in by the worker."""
        # Runtimes that are prepared in the same way share the result.
        owner = peer.prepare.__name__.strip("_") if peer.prepare else peer.name
        return Job(self.path, threads, {}, self.outputs, self.folder / owner)

    def reference(self) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        """Return onnxruntime's outputs."""
        with np.load(self.reference_file) as file:
            return [file[name] for name in file.files]


def variants(patterns: Sequence[str], densities: Sequence[float]) -> tuple[Variant, ...]:
    """Return the dense variant and every pattern at every density; N:M has its own density.

    Raises
    ------
    PlanError
        If a pattern is unknown or a density does not go with it.
    """
    found = {DENSE: Variant(DENSE, DENSE, 1.0)}
    for text in patterns:
        try:
            pattern = parse_pattern(text)
            if isinstance(pattern, Dense):
                continue
            fixed = pattern.fixed_density
            for density in densities if fixed is None else [fixed]:
                name = text if fixed is not None else f"{text}@{density:g}"
                found[name] = Variant(name, text, pattern.check_density(density))
        except ValueError as error:
            raise PlanError(str(error)) from error
    return tuple(found.values())


def model_file(
    source: Path, variant: Variant, folder: Path, include: Sequence[str] = (), *, in_process: bool = False
) -> ModelFile:
    """Prune a model, draw inputs, run onnxruntime; what is there from an earlier call is used again.

    Parameters
    ----------
    source
        The ONNX file. A symbolic batch becomes 1; other axes must be fixed.
    variant
        What to prune it to.
    folder
        Where it goes, with a folder for each model and variant.
    include
        Globs of layers to prune although they are spared by default.
    in_process
        Prune here: faster for small models. Else it is done in a process of its own, whose memory the system gets back.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be read, pruned or run by onnxruntime.
    """
    if not source.is_file():
        raise UnsupportedModelError(f"{source}: no such file")
    own = folder / source.stem / variant.name.replace(":", "_")
    own.mkdir(parents=True, exist_ok=True)
    path, facts_file = _with_fixed_batch(source, folder).resolve(), own / "facts.json"
    origin = file_sha256(path)
    facts = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    is_dense = variant.pattern == DENSE
    pruned = path if is_dense else (own / f"{source.stem}.onnx").resolve()
    if facts.get("origin") != origin or facts.get("include") != list(include) or not pruned.is_file():
        if not is_dense:
            _prune(path, pruned, variant, include, in_process=in_process)
        layers = _layers(pruned, in_process=in_process)
        inputs, outputs = _signature(pruned)
        arrays = random_inputs(inputs)
        np.savez(own / "inputs.npz", **arrays)  # type: ignore[arg-type]
        np.savez(own / "reference.npz", *run_onnx(pruned, arrays))
        facts = {
            "origin": origin,
            "include": list(include),
            "digest": origin if is_dense else file_sha256(pruned),
            "outputs": outputs,
            "macs": sum(layer["macs"] for layer in layers),
            "kept_macs": sum(layer["macs"] * layer["density"] for layer in layers),
        }
        facts_file.write_text(json.dumps(facts, indent=1))
    return ModelFile(
        source.stem,
        variant,
        pruned,
        own,
        tuple(facts["outputs"]),
        facts["macs"],
        facts["kept_macs"],
        facts["digest"],
    )


def _prune(path: Path, pruned: Path, variant: Variant, include: Sequence[str], *, in_process: bool) -> None:
    if in_process:
        prune_file(path, pruned, PruneRequest.make(variant.pattern, variant.density, include))
        return
    options = ["--pattern", variant.pattern, "--density", f"{variant.density:g}"]
    options += [word for glob in include for word in ("--include", glob)]
    run_command("prune", str(path), "-o", str(pruned), *options)


def _layers(path: Path, *, in_process: bool) -> list[dict[str, Any]]:
    if in_process:
        return sparsity_rows(inspect_model(path))
    rows: list[dict[str, Any]] = json.loads(run_command("inspect", str(path), "--json"))
    return rows


def _with_fixed_batch(source: Path, folder: Path) -> Path:
    """Return the model with a batch of 1 where its inputs leave the batch open; not all runtimes take it otherwise."""
    import onnx

    shapes = [item.type.tensor_type.shape for item in onnx.load(source, load_external_data=False).graph.input]
    if all(axis.HasField("dim_value") for shape in shapes for axis in shape.dim):
        return source
    model = onnx.load(source)
    for item in model.graph.input:
        for axis in item.type.tensor_type.shape.dim[:1]:
            if not axis.HasField("dim_value"):
                axis.dim_value = 1
    del model.graph.value_info[:]
    for item in model.graph.output:
        item.type.tensor_type.ClearField("shape")
    fixed = folder / source.stem / f"{source.stem}-batch-1.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), fixed)
    return fixed


def _signature(path: Path) -> tuple[list[TensorSpec], list[str]]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    specs = []
    for item in graph.input:
        if item.name in constants:
            continue
        kind = item.type.tensor_type
        shape = tuple(int(axis.dim_value) for axis in kind.shape.dim)
        if not all(shape):
            raise UnsupportedModelError(f"{path}: input {item.name!r} has no fixed shape; fix it before the benchmark")
        specs.append(TensorSpec(item.name, shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name))
    return specs, [item.name for item in graph.output]


def run_command(*arguments: str) -> str:
    """Run ``tvm-nm`` in a process of its own, whose memory the system gets back, and return what it prints.

    Raises
    ------
    UnsupportedModelError
        With the command's error, if it fails.
    """
    done = subprocess.run([sys.executable, "-m", "tvm_nm", *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnsupportedModelError(last.removeprefix("error: "))
    return done.stdout
