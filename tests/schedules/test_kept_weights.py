"""Kernels that expand their weights once: the same results, from memory that is filled by the first call only."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tvm
from running import integers
from tvm import tirx

from tvm_nm.schedules.apply import pass_context, schedule_function
from tvm_nm.schedules.kept_weights import EXPANDS, ROOM, expands_weights, room_bytes, room_code
from tvm_nm.schedules.machine import host_target
from tvm_nm.schedules.winograd import WinogradKernel, winograd_prim_func
from tvm_nm.schedules.winograd_packing import compact_winograd, pack_winograd, winograd_expansion
from tvm_nm.workload import ConvWorkload

WORK = ConvWorkload(1, 12, 20, 10, 9, (3, 3), padding=(1, 1, 1, 1))
DENSE = WinogradKernel(WORK, 8, 4, 2, 2, 1, 6, False)
SPARSE = WinogradKernel(WORK, 8, 2, 2, 3, 1, 6, False, block=8, kept=5)


def weights(kernel: WinogradKernel, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((WORK.out_channels, WORK.in_channels, 3, 3), dtype=np.float32)
    for start in range(0, len(values), kernel.block or len(values)):
        if kernel.block:
            values[start : start + kernel.block, rng.permutation(WORK.in_channels)[kernel.kept :]] = 0
    return values


def compiled(function: tvm.tirx.PrimFunc, threads: int = 1) -> tvm.runtime.Module:
    target = host_target(threads)
    with pass_context():
        return tvm.compile(tvm.IRModule({"main": function}), target=target)


def keeping(kernel: WinogradKernel, rooms: int = 1, threads: int = 1) -> tvm.tirx.PrimFunc:
    function = schedule_function(winograd_prim_func(kernel), host_target(threads))
    return expands_weights(function, winograd_expansion(kernel), room_code(rooms * room_bytes(kernel.weight_shape)))


def run(module: tvm.runtime.Module, *arguments: object) -> np.ndarray:
    tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments if a is not None]
    out = tvm.runtime.tensor(np.full(WORK.output_shape, np.nan, np.float32))
    module["main"](*tensors, out)
    return np.array(out.numpy())


@pytest.mark.parametrize("kernel", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_the_expansion_is_what_packing_does(kernel: WinogradKernel) -> None:
    values = weights(kernel, 0)
    function = winograd_expansion(kernel)
    assert function.attrs[EXPANDS]
    compact, packed = compact_winograd(kernel, values), pack_winograd(kernel, values)
    assert packed.values.size == kernel.size**2 / 9 * compact.values.size
    out = tvm.runtime.tensor(np.full(kernel.weight_shape, np.nan, np.float32))
    compiled(function)["main"](tvm.runtime.tensor(compact.values), out)
    np.testing.assert_allclose(out.numpy(), packed.values, rtol=1e-6, atol=1e-7)
    if kernel.block:
        np.testing.assert_array_equal(compact.index, packed.index)


@pytest.mark.parametrize("kernel", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_are_expanded_by_the_first_call_only(kernel: WinogradKernel, threads: int) -> None:
    values = weights(kernel, 0)
    compact, packed = compact_winograd(kernel, values), pack_winograd(kernel, values)
    rng = np.random.default_rng(1)
    bias = integers((WORK.out_channels,), rng)
    function = keeping(kernel, threads=threads)
    names = [param.name for param in function.params]
    assert names[2] == ROOM
    assert names[-1] == winograd_prim_func(kernel).params[-1].name
    module, plain = (
        compiled(function, threads),
        compiled(schedule_function(winograd_prim_func(kernel), host_target(threads)), threads),
    )
    small = compact.values
    for _ in range(3):
        data = rng.standard_normal(WORK.input_shape, dtype=np.float32)
        want = run(plain, data, packed.values, packed.index, bias)
        np.testing.assert_array_equal(run(module, data, small, 0, compact.index, bias), want)
        small = np.zeros_like(small)  # nobody reads it any more


def test_each_room_has_weights_of_its_own() -> None:
    rng = np.random.default_rng(1)
    bias = integers((WORK.out_channels,), rng)
    module, plain = (
        compiled(keeping(DENSE, rooms=3)),
        compiled(schedule_function(winograd_prim_func(DENSE), host_target(1))),
    )
    data = rng.standard_normal(WORK.input_shape, dtype=np.float32)
    step = room_bytes(DENSE.weight_shape)
    for _ in range(2):
        for room in (2, 0, 1):
            values = weights(DENSE, room)
            want = run(plain, data, pack_winograd(DENSE, values).values, bias)
            np.testing.assert_array_equal(
                run(module, data, compact_winograd(DENSE, values).values, room * step, bias), want
            )


def test_threads_that_come_first_at_the_same_time() -> None:
    rng = np.random.default_rng(1)
    values, bias = weights(DENSE, 0), integers((WORK.out_channels,), rng)
    data = rng.standard_normal(WORK.input_shape, dtype=np.float32)
    plain = compiled(schedule_function(winograd_prim_func(DENSE), host_target(1)))
    want = run(plain, data, pack_winograd(DENSE, values).values, bias)
    compact = compact_winograd(DENSE, values).values
    rooms, callers = 20, 4
    module = compiled(keeping(DENSE, rooms))
    start = threading.Barrier(callers)
    wrong: list[int] = []

    def caller() -> None:
        for room in range(rooms):
            start.wait()
            got = run(module, data, compact, room * room_bytes(DENSE.weight_shape), bias)
            if not np.array_equal(got, want):
                wrong.append(room)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rooms_are_aligned_and_hold_their_flag() -> None:
    assert room_bytes((1,)) == 128
    assert room_bytes((16,)) == 128
    assert room_bytes((2, 3, 5)) == 64 + 128
    assert "[12345 x i8]" in room_code(12345)


def test_weights_that_are_no_argument() -> None:
    function = tirx.PrimFunc([tirx.decl_buffer((4,), name="data")], tirx.Evaluate(tirx.const(0, "int32")))
    with pytest.raises(ValueError, match="weight"):
        expands_weights(function, winograd_expansion(DENSE), room_code(64))
