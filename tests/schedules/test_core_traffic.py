"""What threads read from other cores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tvm_nm.schedules.core_traffic import remote_bytes
from tvm_nm.schedules.machine import Machine
from tvm_nm.workload import ConvWorkload, Epilogue

WORK = ConvWorkload(1, 16, 32, 14, 14, (1, 1))
INPUT = 4 * 16 * 14 * 14


def test_one_thread_reads_nothing_remote() -> None:
    assert remote_bytes(WORK, Machine(16, 32, 1), 1) == remote_bytes(WORK, Machine(16, 32, 1), 7) == 0


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_tasks_of_channels_read_all_that_others_wrote(threads: int) -> None:
    assert remote_bytes(WORK, Machine(16, 32, threads), 1) == pytest.approx(INPUT * (threads - 1))


def test_tasks_of_pixels_read_what_borders_on_them() -> None:
    machine = Machine(16, 32, 2)
    lines = remote_bytes(WORK, machine, 2)
    assert 0 < lines < INPUT
    assert remote_bytes(WORK, machine, 8) == lines
    windows = replace(WORK, kernel=(3, 3), padding=(1, 1, 1, 1))
    assert remote_bytes(windows, machine, 2) == lines + 16 * 2 * 4 * 14
    assert remote_bytes(replace(windows, stride=(3, 3)), machine, 2) == lines
    assert remote_bytes(replace(WORK, epilogue=Epilogue(True)), machine, 2) == lines + 32 * 2 * 2 * 64


def test_threads_that_share_a_part_of_the_map() -> None:
    machine = Machine(16, 32, 8)
    two, one, eight = (remote_bytes(WORK, machine, chunks) for chunks in (2, 1, 8))
    assert eight < two < one
