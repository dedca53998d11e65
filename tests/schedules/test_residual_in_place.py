"""Kernels that add their residual in place compute what they compute otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import conv
from running import haswell, host_flags, integers, masked_weights

from tvm_nm.schedules.apply import pass_context, schedule_function
from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.families import conv_family_of
from tvm_nm.schedules.geometry import candidate_geometries
from tvm_nm.schedules.in_place import adds_in_place
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import host_target, machine_of
from tvm_nm.schedules.packing import kept_per_block_row
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.schedules.variants import Kernel, default_kernel
from tvm_nm.workload import ConvWorkload, Epilogue

TARGETS = {"one thread": host_target(1), "two threads": host_target(2)}
if "avx2" in host_flags():
    TARGETS["avx2"] = haswell()
RELU = Epilogue(True, 0.0)


def check(kernel: Kernel, work: ConvWorkload, weights: np.ndarray, target: tvm.target.Target, seed: int) -> None:
    """Compare the sums, or see that the kernel is one that can't."""
    family = conv_family_of(kernel)
    func = adds_in_place(schedule_function(family.prim_func(kernel), target))
    assert func is not None
    with pass_context():
        module = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=target)
    rng = np.random.default_rng(seed)
    packed = family.pack(kernel, weights)
    data, bias = integers(work.input_shape, rng), integers((work.out_channels,), rng)
    residual = integers(work.output_shape, rng)
    shape = kernel.workload.output_shape
    arguments = [data.reshape(kernel.workload.input_shape), packed.values]
    arguments += [] if packed.index is None else [packed.index]
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in (*arguments, bias)]
    out = tvm.runtime.tensor(residual.reshape(shape).copy())
    module["main"](*tensors, out, out)
    np.testing.assert_array_equal(out.numpy().reshape(residual.shape), conv(work, data, weights, bias, residual))


@st.composite
def flat_rows(draw: st.DrawFn) -> tuple[ConvKernel, ConvWorkload, np.ndarray, str, int]:
    """Pointwise kernels, whose rows of pixels may end within a vector, cut into chunks of any size."""
    size = draw(st.tuples(st.integers(4, 15), st.integers(4, 15)))
    index, block = draw(st.sampled_from([(IndexKind.NONE, 16), (IndexKind.CHANNEL, 16), (IndexKind.CHANNEL, 4)]))
    work = ConvWorkload(draw(st.integers(1, 2)), 12, 32, *size, (1, 1), epilogue=RELU)
    seed, name = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(sorted(TARGETS)))
    weights = masked_weights(work, block, index, 0.5, np.random.default_rng(seed))
    machine = machine_of(TARGETS[name])
    kept = int(kept_per_block_row(weights, 1, block, index).max()) if index is IndexKind.CHANNEL else 12
    sparse = {} if index is IndexKind.NONE else {"block": block, "index": index, "kept": kept}
    chosen = choose_kernel(work, machine, **sparse)  # type: ignore[arg-type]
    geometries = [g for g in candidate_geometries(work, machine.lanes) if g.flat]
    geometry = draw(st.sampled_from(geometries))
    kernel = replace(
        chosen,
        geometry=geometry,
        vectors_per_tile=draw(st.integers(1, min(geometry.vectors, 3))),
        rows_per_task=draw(st.sampled_from([d for d in range(1, chosen.block_rows + 1) if chosen.block_rows % d == 0])),
        kept_per_block=draw(st.sampled_from([0, chosen.kept])),
        index_dtype="uint16",
    )
    return kernel, work, weights, name, seed


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(flat_rows())
def test_flat_rows(case: tuple[ConvKernel, ConvWorkload, np.ndarray, str, int]) -> None:
    kernel, work, weights, name, seed = case
    geometry = kernel.geometry
    if (geometry.chunks - 1) * geometry.pitch + geometry.lanes > work.out_pixels:
        # The last chunk's first vector begins in the chunk before: another task's.
        assert adds_in_place(schedule_function(conv_family_of(kernel).prim_func(kernel), TARGETS[name])) is None
        return
    check(kernel, work, weights, TARGETS[name], seed)


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("winograd", [False, True])
def test_larger_kernels(size: int, target: str, winograd: bool) -> None:
    work = ConvWorkload(1, 32, 32, size, size, (3, 3), padding=(1, 1, 1, 1), epilogue=RELU)
    machine = machine_of(TARGETS[target])
    if winograd:
        task = KernelTask("conv", work, machine.threads).as_winograd
        func = conv_family_of(kernel := default_kernel(task, machine)).prim_func(kernel)
        assert adds_in_place(schedule_function(func, TARGETS[target])) is not None
        return  # its rounding is its own
    weights = integers((32, 32, 3, 3), np.random.default_rng(size))
    check(default_kernel(KernelTask("conv", work, machine.threads), machine), work, weights, TARGETS[target], size)


def test_a_kernel_without_a_residual_has_nothing_to_add() -> None:
    work = ConvWorkload(1, 16, 16, 8, 8, (1, 1))
    kernel = choose_kernel(work, machine_of(TARGETS["one thread"]))
    func = schedule_function(conv_family_of(kernel).prim_func(kernel), TARGETS["one thread"])
    assert adds_in_place(func) is None


def test_the_residual_is_not_fetched_beside_the_output() -> None:
    target = TARGETS["one thread"]
    work = ConvWorkload(1, 64, 64, 56, 56, (1, 1), epilogue=RELU)
    func = schedule_function(conv_family_of(k := choose_kernel(work, machine_of(target))).prim_func(k), target)
    assert '"tvm_nm_fetch"' in func.script()
    changed = adds_in_place(func)
    assert changed is not None
    assert '"tvm_nm_fetch"' not in changed.script()
    assert changed.script().count('"tvm_nm_fetch_to_write"') == func.script().count('"tvm_nm_fetch_to_write"')
