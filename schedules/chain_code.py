"""Generated code of the chain family.

Loop nest (AVX-512; other ways to cut the work below)::

    parallel n, band of output rows                # one task
      for vectors of hidden channels
        for row of the band, pixel tile            #   first layer: to a zero-padded scratch
          acc[P][V] = bias
          for kept input
            acc[p][v] += W[v] * X[p]               #   V loads, P broadcasts, P*V FMAs
          scratch = act(acc)
        for row, pixel tile                        #   depthwise: all taps unrolled
          acc[P] = bias
          for input pixel of the tile
            acc[p] += W[tap] * scratch             #   an input pixel is loaded once for all taps that read it
          hidden = act(acc)                        #   stays in L2, or L1
      for vectors of output channels               # last layer
        for row, pixel tile
          acc[P][V] = bias
          for kept hidden channel
            acc[p][v] += W[v] * hidden[p]
          out = act(acc + residual)

Written as TensorIR directly: borders and bands make for loop bounds that a schedule's region analysis turns into
conditions of inner loops.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 -- as TVM's own scripts call it

from tvm_nm.schedules.chain import ChainKernel
from tvm_nm.schedules.chain_arguments import argument_shapes
from tvm_nm.schedules.chain_layers import ChainLayers, Part
from tvm_nm.schedules.chain_loops import (
    activated,
    divided,
    flat_function,
    in_groups,
    least,
    load,
    one_group,
    store_vector,
)
from tvm_nm.schedules.fetch_code import FETCHES

__all__ = ["chain_prim_func"]


@lru_cache(maxsize=128)
def chain_prim_func(kernel: ChainKernel) -> tvm.tirx.PrimFunc:
    """Return the function of a chain, which needs no schedule; its arguments are those of `argument_shapes`."""
    emit = _emit_staged if kernel.staged else _emit_shares if kernel.shares > 1 else _emit_bands
    return flat_function(argument_shapes(kernel), lambda buffers: emit(kernel, buffers))


def _emit_bands(kernel: ChainKernel, buffers: dict[str, Any]) -> None:
    layers, work = ChainLayers(kernel, buffers), kernel.depthwise
    with T.parallel(0, work.batch * kernel.bands, annotations={FETCHES: 1}) as task:
        image, band = divided(task, kernel.bands, work.batch)
        source, padded = layers.source(image, band), layers.padded()
        hidden = buffers["out"]
        if kernel.last is not None:
            hidden = T.alloc_buffer((kernel.hidden_vectors * kernel.hidden_plane,), "float32")

        def place(vector: Any) -> Any:
            if kernel.last is not None:
                return vector * kernel.hidden_plane
            row = (image * kernel.hidden_vectors + vector) * work.out_height + band * kernel.rows
            return row * (work.out_width * kernel.lanes)

        in_groups(
            kernel.hidden_vectors,
            kernel.mixing.vectors,
            lambda start, count: layers.hidden_channels(
                band, start, count, source, padded, hidden, lambda j: place(start + j)
            ),
        )
        if kernel.last is not None:
            in_groups(
                kernel.out_vectors,
                kernel.last_mixing.vectors,
                lambda start, count: layers.last(image, band, start, count, hidden, 0),
            )


def _emit_staged(kernel: ChainKernel, buffers: dict[str, Any]) -> None:
    """Emit a parallel loop over bands and vectors of hidden channels, and another one for the last layer."""
    layers, work = ChainLayers(kernel, buffers), kernel.depthwise
    hidden, size = buffers["out"], kernel.hidden_vectors * kernel.hidden_plane
    if kernel.last is not None:
        hidden = T.alloc_buffer((work.batch * size,), "float32")
    groups = kernel.hidden_groups
    band_size = kernel.rows * work.out_width * kernel.lanes
    with T.parallel(0, work.batch * kernel.bands * groups, annotations={FETCHES: 1}) as task:
        image, rest = divided(task, kernel.bands * groups, work.batch)
        band, group = divided(rest, groups, kernel.bands)
        source, padded = layers.source(image, band), layers.padded()
        begin = image * size + band * band_size
        one_group(
            group,
            kernel.hidden_vectors,
            kernel.mixing.vectors,
            lambda start, count: layers.hidden_channels(
                band, start, count, source, padded, hidden, lambda j: begin + (start + j) * kernel.hidden_plane
            ),
        )
    if kernel.last is None:
        return
    groups = -(-kernel.out_vectors // kernel.last_mixing.vectors)
    with T.parallel(0, work.batch * kernel.bands * groups, annotations={FETCHES: 1}) as task:
        image, rest = divided(task, kernel.bands * groups, work.batch)
        band, group = divided(rest, groups, kernel.bands)
        begin = image * size + band * band_size
        one_group(
            group,
            kernel.out_vectors,
            kernel.last_mixing.vectors,
            lambda start, count: layers.last(image, band, start, count, hidden, begin),
        )


def _emit_shares(kernel: ChainKernel, buffers: dict[str, Any]) -> None:
    """Emit tasks that take some of the hidden channels of a band through all layers, and then the sum of their sums."""
    layers, work, lanes = ChainLayers(kernel, buffers), kernel.output, kernel.lanes
    size = work.batch * kernel.out_vectors * work.out_pixels * lanes
    sums = T.alloc_buffer((kernel.shares * size,), "float32")
    groups, vectors = kernel.share_groups, kernel.mixing.vectors
    with T.parallel(0, work.batch * kernel.bands * kernel.shares, annotations={FETCHES: 1}) as task:
        image, rest = divided(task, kernel.bands * kernel.shares, work.batch)
        band, share = divided(rest, kernel.shares, kernel.bands)
        source, padded = layers.source(image, band), layers.padded()
        hidden = T.alloc_buffer((groups * vectors * kernel.hidden_plane,), "float32")
        even = kernel.hidden_groups % kernel.shares == 0
        with T.serial(0, groups if even else least(groups, kernel.hidden_groups - share * groups)) as group:
            one_group(
                share * groups + group,
                kernel.hidden_vectors,
                vectors,
                lambda start, count: layers.hidden_channels(
                    band, start, count, source, padded, hidden, lambda j: (group * vectors + j) * kernel.hidden_plane
                ),
            )
        in_groups(
            kernel.out_vectors,
            kernel.last_mixing.vectors,
            lambda start, count: layers.last(image, band, start, count, hidden, 0, Part(share, sums, share * size)),
        )
    with T.parallel(0, work.batch * kernel.out_vectors * work.out_height) as row:
        vector = tirx.indexmod(tirx.indexdiv(row, work.out_height), kernel.out_vectors)
        bias = T.Bind(load(buffers["last_bias"], vector * lanes, lanes))
        with T.serial(0, work.out_width) as column:
            at = T.Bind((row * work.out_width + column) * lanes)
            value = bias
            for share in range(kernel.shares):
                value = value + load(sums, share * size + at, lanes)
            if work.epilogue.residual:
                value = value + load(buffers["residual"], at, lanes)
            store_vector(buffers["out"], at, activated(value, work.epilogue, lanes), lanes)
