"""What a table of tuned kernels offers to those who choose kernels. Reading one needs nothing of the tuner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.variants import Kernel

__all__ = ["Origin", "TunedKernel", "TunedKernels"]

Origin: TypeAlias = Literal["measured", "interpolated", "shipped"]


@dataclass(frozen=True, slots=True)
class TunedKernel:
    """The best variant of a task that a table knows.

    Attributes
    ----------
    task
        What it computes.
    kernel
        The variant, with its template's decisions.
    latency_us
        Time of a call, in the state that a network leaves the caches in.
    origin
        `measured`; `interpolated` between other densities or from another epilogue; `shipped` with the package, from
        another machine of the same family.
    within_us
        Time of a call between the other layers of a network, where that was measured; else 0.
    table
        Which of the package's tables it comes from; empty for a database's.
    """

    task: KernelTask
    kernel: Kernel
    latency_us: float
    origin: Origin
    table: str = ""
    within_us: float = 0.0

    @property
    def predicted(self) -> bool:
        """Whether the time was not measured on this machine for exactly this task."""
        return self.origin != "measured"


class TunedKernels(Protocol):
    """A table of tuned kernels for one target. It does not change while it is read."""

    def best(self, task: KernelTask) -> TunedKernel | None:
        """Return the fastest variant known, or None."""
