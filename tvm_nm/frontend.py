"""Import an ONNX CNN: from a file that nobody vouches for to a canonical, verified Relax module."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import tvm

from tvm_nm.errors import ModelMismatchError, UnsupportedModelError
from tvm_nm.inventory import LAYERS_ATTR, layer_calls
from tvm_nm.onnx_checks import check_finite, check_operators, check_types, opset_of
from tvm_nm.onnx_importer import import_graph
from tvm_nm.onnx_load import MAX_MODEL_BYTES, read_model, split_model
from tvm_nm.onnx_shapes import fix_shapes, fold_constants, inline_functions, parse_shapes, transpose_gemm_weights
from tvm_nm.passes.canonicalize import Canonicalize
from tvm_nm.reference_run import TensorSpec, compare, random_inputs, run_onnx
from tvm_nm.relax_numpy import NumpyModule

__all__ = ["MAX_MODEL_BYTES", "TOLERANCE", "ImportedModel", "TensorSpec", "import_onnx", "parse_shapes"]

TOLERANCE = 1e-4
"""Largest difference from onnxruntime that an import may have, relative to the output's largest value.

Summing in another order gives 1e-6 to 2e-5 on the CNNs tried; a wrong attribute gives percents.
"""


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """A model after import.

    Attributes
    ----------
    module
        Canonical Relax module with function "main" and the attribute ``tvm_nm.layers``.
    inputs, outputs
        In the order of the function's parameters and results.
    name
        The file's name without suffix, or the graph's name.
    path
        The file, if there is one.
    """

    module: tvm.IRModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str
    path: Path | None
    _proto: onnx.ModelProto | None = field(repr=False)

    @property
    def source(self) -> Path | onnx.ModelProto:
        """What onnxruntime should run: the file, so that it reads the weights itself, or else the model in memory."""
        if self.path is not None:
            return self.path
        assert self._proto is not None
        return self._proto

    @property
    def onnx(self) -> onnx.ModelProto:
        """The model with the shapes that were compiled written into its inputs.

        Read again from the file on each access: a copy that is kept would double the memory of a compile.
        """
        if self.path is not None:
            model = onnx.load(self.path)
        else:
            model = onnx.ModelProto()
            model.CopyFrom(self._proto)
        shapes = {spec.name: spec.shape for spec in self.inputs}
        for value in model.graph.input:
            if value.name in shapes:
                dims = [onnx.TensorShapeProto.Dimension(dim_value=d) for d in shapes[value.name]]
                value.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=dims))
        for value in model.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()
        del model.graph.value_info[:]
        return model


def import_onnx(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    verify: bool = True,
    max_bytes: int = MAX_MODEL_BYTES,
) -> ImportedModel:
    """Import a float32 CNN.

    Parameters
    ----------
    model
        A file, or a model in memory with its weights.
    shapes
        Shapes of inputs that have symbolic axes. A symbolic batch, the first axis, is 1 where nothing is given.
    verify
        Run the imported module and onnxruntime on one random input and compare them.
    max_bytes
        Largest model that is read, external data included.

    Returns
    -------
    ImportedModel
        The canonical module and what belongs to it.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be read or holds something that cannot be compiled; names the node.
    ModelMismatchError
        If the imported module's outputs differ from onnxruntime's by more than `TOLERANCE`.

    Examples
    --------
    >>> imported = import_onnx("resnet50.onnx")                                          # doctest: +SKIP
    >>> imported.module["main"]                                                          # doctest: +SKIP
    """
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    try:
        module, inputs, output_names, graph_name = _to_relax(model, path, shapes or {}, max_bytes)
    except UnicodeDecodeError as err:  # protobuf looks at a name only when it is read
        raise UnsupportedModelError("the model is damaged: a name in it is no valid UTF-8") from err
    outputs = tuple(
        TensorSpec(name, tuple(int(d) for d in ty.shape), str(ty.dtype))
        for name, ty in zip(output_names, _output_types(module), strict=True)
    )
    imported = ImportedModel(
        module=module,
        inputs=inputs,
        outputs=outputs,
        name=path.stem if path is not None else graph_name,
        path=path,
        _proto=model if isinstance(model, onnx.ModelProto) else None,
    )
    if verify:
        _verify(imported)
    return imported


def _to_relax(
    model: str | os.PathLike[str] | onnx.ModelProto,
    path: Path | None,
    shapes: Mapping[str, Sequence[int]],
    max_bytes: int,
) -> tuple[tvm.IRModule, tuple[TensorSpec, ...], tuple[str, ...], str]:
    proto = model if isinstance(model, onnx.ModelProto) else read_model(Path(model), max_bytes=max_bytes)
    skeleton, weights = split_model(proto, path.parent if path is not None else None, max_bytes=max_bytes)
    del proto, model  # the parsed file is as large as the weights
    opset_of(skeleton)
    skeleton = inline_functions(skeleton)
    check_operators(skeleton.graph, weights)
    fix_shapes(skeleton.graph, shapes)
    known = fold_constants(skeleton, weights)
    check_types(skeleton.graph, known.types)
    check_finite(skeleton.graph, weights)
    transpose_gemm_weights(skeleton.graph, weights)
    raw, node_names = import_graph(skeleton, weights)
    module = _named_layers(tvm.transform.Sequential([Canonicalize()])(raw), node_names)
    inputs = tuple(
        TensorSpec(value.name, tuple(d.dim_value for d in value.type.tensor_type.shape.dim), "float32")
        for value in skeleton.graph.input
    )
    return module, inputs, tuple(value.name for value in skeleton.graph.output), skeleton.graph.name


def _named_layers(module: tvm.IRModule, node_names: Mapping[str, str]) -> tvm.IRModule:
    names = [node_names.get(found.var.name, found.var.name) for found in layer_calls(module)]
    if len(set(names)) != len(names):
        names = [found.var.name for found in layer_calls(module)]  # one node that became several layers
    return module.with_attr(LAYERS_ATTR, names)


def _output_types(module: tvm.IRModule) -> list[Any]:
    ty = module["main"].ret_ty
    return list(ty.fields) if isinstance(ty, tvm.relax.TupleType) else [ty]


def _verify(imported: ImportedModel) -> None:
    inputs = random_inputs(imported.inputs)
    want = run_onnx(imported.source, inputs)
    got = NumpyModule(imported.module)(*(inputs[spec.name] for spec in imported.inputs))
    found = compare(got, want)
    if found.max_rel > TOLERANCE:
        name = imported.outputs[found.output].name if found.output < len(imported.outputs) else "?"
        raise ModelMismatchError(
            f"the imported model disagrees with onnxruntime in {name!r}: {found.describe()} "
            f"(tolerance {TOLERANCE:.2%}); please report it with the model"
        )
