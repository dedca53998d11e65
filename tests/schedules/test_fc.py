"""Every variant of the fully connected family computes the layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import fc
from running import build, call, haswell, host_flags, integers

from tvm_nm.schedules.fc import FcKernel, choose_fc_kernel, fc_prim_func, pack_fc
from tvm_nm.schedules.machine import Machine, host_target, machine_of
from tvm_nm.workload import Epilogue

TARGETS = {"one thread": host_target(1), "two threads": host_target(2)}
if "avx2" in host_flags():
    TARGETS["avx2"] = haswell()
AVX512 = Machine(16, 32, 1)


@dataclass(frozen=True)
class Case:
    batch: int
    inputs: int
    outputs: int
    vectors: int | None  # of a block; None is dense
    density: float
    epilogue: Epilogue
    target: str
    seed: int


cases = st.builds(
    Case,
    batch=st.sampled_from([1, 1, 1, 2, 3, 5, 8]),
    inputs=st.one_of(st.integers(1, 80), st.sampled_from([256, 257, 300])),
    outputs=st.one_of(st.integers(1, 100), st.sampled_from([10, 64, 128, 1000])),
    vectors=st.sampled_from([None, None, 1, 2, 4]),
    density=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    epilogue=st.builds(
        lambda residual, bounds: Epilogue(residual, *bounds),
        st.booleans(),
        st.sampled_from([(None, None), (0.0, None), (0.0, 6.0), (None, 1.0)]),
    ),
    target=st.sampled_from(sorted(TARGETS)),
    seed=st.integers(0, 2**32 - 1),
)


def sparse_weights(outputs: int, inputs: int, block: int, density: float, rng: np.random.Generator) -> np.ndarray:
    weights = integers((outputs, inputs), rng)
    weights[weights == 0] = 4
    for start in range(0, outputs, block):
        weights[start : start + block] *= rng.random(inputs) < density
    return weights


def longest(weights: np.ndarray, block: int) -> int:
    rows = range(0, len(weights), block)
    return max(1, *(int((weights[r : r + block] != 0).any(axis=0).sum()) for r in rows))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases)
def test_random_layers(case: Case) -> None:
    target = TARGETS[case.target]
    machine = machine_of(target)
    rng = np.random.default_rng(case.seed)
    block = None if case.vectors is None else case.vectors * machine.lanes
    weights = sparse_weights(case.outputs, case.inputs, block or 1, 1.0 if block is None else case.density, rng)
    kept = None if block is None else longest(weights, block)
    kernel = choose_fc_kernel(case.batch, case.inputs, case.outputs, case.epilogue, machine, block=block, kept=kept)
    packed = pack_fc(kernel, weights)
    data, bias = integers((case.batch, case.inputs), rng), integers((case.outputs,), rng)
    residual = integers((case.batch, case.outputs), rng) if case.epilogue.residual else None
    arguments = [a for a in (data, packed.values, packed.index, bias, residual) if a is not None]
    out = call(build(fc_prim_func(kernel), target), arguments, (case.batch, case.outputs))
    np.testing.assert_array_equal(out, fc(data, weights, bias, case.epilogue, residual))


def unpack(kernel: FcKernel, values: np.ndarray, index: np.ndarray | None) -> np.ndarray:
    weights = np.zeros((kernel.blocks * kernel.block, kernel.in_features), np.float32)
    for block, k in np.ndindex(kernel.blocks, kernel.kept):
        column = k if index is None else int(index[block, k])
        weights[block * kernel.block : (block + 1) * kernel.block, column] += values[block, k]
    assert not weights[kernel.out_features :].any()
    return weights[: kernel.out_features]


@settings(max_examples=60, deadline=None)
@given(cases)
def test_packing_loses_nothing(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    block = None if case.vectors is None else case.vectors * 16
    weights = sparse_weights(case.outputs, case.inputs, block or 1, case.density, rng)
    kept = None if block is None else longest(weights, block)
    kernel = choose_fc_kernel(1, case.inputs, case.outputs, Epilogue(), AVX512, block=block, kept=kept)
    packed = pack_fc(kernel, weights)
    assert packed.values.shape == (kernel.blocks, kernel.kept, kernel.block)
    assert packed.values.flags.c_contiguous
    assert (packed.index is None) == (block is None)
    if packed.index is not None:
        assert packed.index.dtype == kernel.index_dtype
        assert (np.diff(packed.index.astype(np.int64), axis=1) > 0).all()
    np.testing.assert_array_equal(unpack(kernel, packed.values, packed.index), weights)


def test_a_block_must_be_whole_vectors() -> None:
    with pytest.raises(ValueError, match="a block of 8 features is not a multiple of 16 lanes"):
        choose_fc_kernel(1, 64, 64, Epilogue(), AVX512, block=8)


def test_a_block_that_keeps_too_much() -> None:
    kernel = choose_fc_kernel(1, 64, 64, Epilogue(), AVX512, block=16, kept=7)
    with pytest.raises(ValueError, match="a block keeps 64 inputs, the kernel was made for 7"):
        pack_fc(kernel, np.ones((64, 64), np.float32))


def test_sparse_layers_read_less() -> None:
    rng = np.random.default_rng(0)
    weights = sparse_weights(256, 512, 16, 0.25, rng)
    dense = choose_fc_kernel(1, 512, 256, Epilogue(), AVX512)
    sparse = choose_fc_kernel(1, 512, 256, Epilogue(), AVX512, block=16, kept=longest(weights, 16))
    assert pack_fc(sparse, weights).bytes < 0.4 * pack_fc(dense, weights).bytes
    assert sparse.macs < 0.4 * dense.macs
    assert "channel" in str(sparse)
    assert "channel" not in str(dense)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_blocks_for_every_thread(threads: int) -> None:
    for outputs in (256, 1000):
        kernel = choose_fc_kernel(1, 2048, outputs, Epilogue(), Machine(16, 32, threads))
        assert kernel.blocks >= 2 * threads
        assert kernel.block % 16 == 0
