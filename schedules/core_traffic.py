"""What the threads of a layer read from other cores' caches: a part of every layer's cost that no single thread has.

The layer before has just written the input, each core a part of the map, and a core reads its own caches several times
as fast as another's (measured on an AVX-512 server: 10 to 15 GB/s in long streams, 4 to 6 in short ones).
"""

from __future__ import annotations

import math

from tvm_nm.schedules.machine import Machine
from tvm_nm.workload import ConvWorkload

__all__ = ["REMOTE_BYTES_PER_CYCLE", "remote_bytes", "remote_bytes_of_channels", "remote_bytes_of_copy"]

REMOTE_BYTES_PER_CYCLE = 2.0
"""Of short reads."""

_LINE = 64


def remote_bytes(work: ConvWorkload, machine: Machine, chunks: int) -> float:
    """Return how many bytes the threads read from other cores, all together.

    Parameters
    ----------
    work
        What is computed.
    machine
        How many threads do.
    chunks
        Parts of the map, over the whole batch, between which the layer's tasks divide. Where there is one for each
        thread, a thread goes on with the pixels that it wrote, and reads what its windows reach into its neighbours'
        parts, and lines in which two parts meet; those of the output are read as well, and twice where a residual is
        added. Tasks that divide the output channels of a part each read all of it.
    """
    parts = min(chunks, machine.threads)
    whole = 4 * math.prod(work.input_shape) * (machine.threads / parts - 1)
    reached = 4 * work.width * max(0, (work.kernel[0] - 1) * work.dilation[0] + 1 - work.stride[0])
    lines = 2 * _LINE * (3 if work.epilogue.residual else 1)
    return whole + (parts - 1) * (work.in_channels * (reached + 2 * _LINE) + work.out_channels * lines)


def remote_bytes_of_channels(work: ConvWorkload, machine: Machine) -> float:
    """Return how many bytes of its input a layer reads from other cores whose tasks divide the input's channels."""
    return 4 * math.prod(work.input_shape) * (1 - 1 / machine.threads)


def remote_bytes_of_copy(work: ConvWorkload, machine: Machine, chunks: int, copied: int) -> float:
    """Return how many bytes are read from other cores where all threads copy the input first, a channel at a time.

    Parameters
    ----------
    work, machine, chunks
        As of `remote_bytes`.
    copied
        Bytes of the copy. Whoever needs a part of it reads what other threads copied.
    """
    read = copied * machine.threads / min(chunks, machine.threads)
    return remote_bytes_of_channels(work, machine) + read * (1 - 1 / machine.threads)
