"""Let a kernel's output take the place of the residual that it adds.

An epilogue reads each element of the residual once, to store the output's element of the same place. Written elsewhere,
an output that is larger than what is left of the caches is read from memory before it is overwritten: a third of all
the bytes of a pointwise layer with few inputs. `adds_in_place` makes a function read the residual from its output
instead; whoever calls it passes the same memory for both, see `tvm_nm.passes.in_place`.

A flat row of pixels that is no whole number of vectors is computed twice in part (see `geometry`). What lies in the
vector before has the residual added already when the last one comes to it: these lanes keep what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.sym import Analyzer
from tvm.tirx import BufferRegion

from tvm_nm.schedules.geometry import PixelGeometry

__all__ = ["FLAT_STORE", "RESIDUAL", "adds_in_place", "flat_store"]

RESIDUAL = "residual"
"""Name of the argument."""

FLAT_STORE = "tvm_nm_flat_store"
"""Annotation of a block that stores to a flat row by (n, channel, chunk, pixel): pixels of a chunk, lanes."""


def flat_store(geometry: PixelGeometry) -> dict[str, Any]:
    """Return the annotation of a flat row's store; none where tasks may store the same pixels.

    The last chunk's vectors that begin early must still be its own: those of other chunks are other tasks'.
    """
    first_of_last = (geometry.chunks - 1) * geometry.chunk_pixels
    if first_of_last + geometry.lanes > geometry.workload.out_pixels:
        return {}
    return {FLAT_STORE: [geometry.chunk_pixels, geometry.lanes]}


def adds_in_place(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc | None:
    """Return a scheduled function that takes its residual from its output, None if it can't.

    The arguments stay the same; that of the residual is not used any more. A function can if each element of the output
    is stored once, by a block that reads no other element of the residual.
    """
    residual = next((param for param in func.params if param.name == RESIDUAL), None)
    if residual is None:
        return None
    rewriting = _Rewriting(residual, func.params[-1])
    body = tvm_ffi.structural_map(func.body, [(s_tir.SBlock, rewriting.block), (tirx.Evaluate, rewriting.fetch)])
    left = 0

    def count(load: Any) -> None:
        nonlocal left
        left += load.source.same_as(residual)

    tvm_ffi.structural_walk(body, (tvm.ir.TensorLoad, count))
    if left or not rewriting.stores:
        return None
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


class _Rewriting:
    """Rewrites the parts of a function.

    Attributes
    ----------
    stores
        The blocks that were found to add the residual.
    """

    def __init__(self, residual: Any, out: Any) -> None:
        self._residual = residual
        self._out = out
        self.stores = 0

    def fetch(self, evaluated: Any) -> Any:
        """Return nothing for a fetch of the residual: the output's line is fetched as well."""
        found = False

        def note(load: Any) -> None:
            nonlocal found
            found = found or load.source.same_as(self._residual)

        tvm_ffi.structural_walk(evaluated, (tvm.ir.TensorLoad, note))
        return tirx.Evaluate(tirx.const(0, "int32")) if found else evaluated

    def block(self, block: Any) -> Any:
        """Return a block that reads the output instead of the residual, if it is one that stores to the output."""
        store = block.body
        if not isinstance(store, tirx.BufferStore) or not store.buffer.same_as(self._out):
            return block
        place = list(store.indices)
        flat = block.annotations.get(FLAT_STORE)
        if flat is None and not _same(place, [axis.var for axis in block.iter_vars]):
            return block
        old = tirx.BufferLoad(self._out, place)

        def instead(load: Any) -> Any:
            return old if load.source.same_as(self._residual) and _same(place, list(load.indices)) else load

        value = tvm_ffi.structural_map(store.value, (tvm.ir.TensorLoad, instead))
        if flat is not None:
            pixels, lanes = (int(number) for number in flat)
            chunk, pixel = (axis.var for axis in block.iter_vars[2:])
            vector = chunk * pixels + tirx.indexdiv(pixel, lanes) * lanes
            value = tirx.Select(place[-1] >= vector, value, old)
        self.stores += 1
        reads = [self._instead(region) for region in block.reads]
        return s_tir.SBlock(
            block.iter_vars,
            reads,
            block.writes,
            block.name_hint,
            tirx.BufferStore(self._out, value, place),
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            _without(block.annotations, FLAT_STORE),
        )

    def _instead(self, region: Any) -> Any:
        return BufferRegion(self._out, region.region) if region.source.same_as(self._residual) else region


def _same(one: list[Any], other: list[Any]) -> bool:
    analyzer = Analyzer()
    return len(one) == len(other) and all(analyzer.can_prove_equal(a, b) for a, b in zip(one, other, strict=True))


def _without(annotations: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in annotations.items() if key != name}
