"""What the rest of the package asks of a family of kernels: one object each, so that nobody else tells them apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.workload import ConvWorkload

__all__ = ["Array", "ConvFamily", "KernelFamily", "RandomValues", "nearest_sizes"]

Array: TypeAlias = npt.NDArray[Any]
K = TypeVar("K")


class KernelFamily(ABC, Generic[K]):
    """A way to compute some tasks, and its variants: frozen dataclasses of one type.

    Attributes
    ----------
    word
        What the texts of its variants begin with.
    """

    word: str

    @abstractmethod
    def candidates(self, task: KernelTask, machine: Machine) -> list[K]:
        """Return the variants of a task, by their predicted time; none if the family does not compute it."""

    @abstractmethod
    def cycles(self, kernel: K, machine: Machine) -> float:
        """Return what the model predicts for a variant, in cycles."""

    @abstractmethod
    def prim_func(self, kernel: K) -> tvm.tirx.PrimFunc:
        """Return a variant's function; its template schedules it, unless it is written out already."""

    @abstractmethod
    def text(self, kernel: K) -> str:
        """Return what tells a variant from the others of its task, as text that `parse` reads."""

    @abstractmethod
    def steps(self, kernel: K, machine: Machine) -> list[K]:
        """Return variants that differ from one in a single choice, by their predicted time."""

    @abstractmethod
    def random_arguments(self, kernel: K, rng: np.random.Generator) -> list[Array]:
        """Return valid arguments for `prim_func`, the output last."""

    def default(self, task: KernelTask, machine: Machine) -> K | None:
        """Return the variant of a task that an untuned build takes; None if the family does not compute it."""
        return next(iter(self.candidates(task, machine)), None)

    def parse(self, text: str, task: KernelTask, machine: Machine) -> K | None:
        """Return the variant of a task that a text names; None if it is no text of this family.

        Raises
        ------
        ValueError
            If the variant does not fit the task.
        """
        if not text.startswith(self.word):
            return None
        for kernel in self.candidates(task, machine):
            if self.text(kernel) == text:
                return kernel
        raise ValueError(f"{text!r:.100} does not fit {task}")

    def _beside(self, kernel: K, candidates: list[K], choices: tuple[str, ...], machine: Machine) -> list[K]:
        """Return the candidates that differ from a kernel in one of some attributes, by their predicted time."""
        near = [k for k in candidates if sum(getattr(k, name) != getattr(kernel, name) for name in choices) == 1]
        return sorted(near, key=lambda k: self.cycles(k, machine))


class Convolution(Protocol):
    """A variant of a convolution."""

    @property
    def workload(self) -> ConvWorkload: ...

    @property
    def weight_shape(self) -> tuple[int, ...]: ...


C = TypeVar("C", bound=Convolution)


class ConvFamily(KernelFamily[C]):
    """A family for single convolutions."""

    @abstractmethod
    def pack(self, kernel: C, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return weights (OC, IC/groups, KH, KW) as a variant reads them."""

    def stored(self, kernel: C, weights: npt.NDArray[np.float32]) -> PackedWeights:
        """Return what a build holds of weights: what a variant reads, or what `expansion` makes that of."""
        return self.pack(kernel, weights)

    def expansion(self, kernel: C) -> tvm.tirx.PrimFunc | None:
        """Return the function that makes what a variant reads of what is stored; None where these are the same.

        It has the attribute `tvm_nm.schedules.kept_weights.EXPANDS`.
        """
        return None

    @abstractmethod
    def random_table(self, kernel: C, rng: np.random.Generator) -> npt.NDArray[np.integer] | None:
        """Return an index table as `pack` makes it from weights of a random mask; None where there is none."""

    def random_arguments(self, kernel: C, rng: np.random.Generator) -> list[Array]:
        """Return valid arguments for `prim_func`, the output last."""
        work, values = kernel.workload, RandomValues(rng)
        arrays: list[Array] = [values(work.input_shape), values(kernel.weight_shape)]
        table = self.random_table(kernel, rng)
        arrays += [] if table is None else [table]
        arrays.append(values((work.out_channels,)))
        arrays += [values(work.output_shape)] if work.epilogue.residual else []
        return [*arrays, np.zeros(work.stored_shape, np.float32)]


class RandomValues:
    """Makes arrays of any size quickly, by repeating a block: a layer may have 100 million weights."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._block = rng.standard_normal(1 << 16, dtype=np.float32)

    def __call__(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return an array of a shape."""
        return np.resize(self._block, shape)


def nearest_sizes(sizes: list[int], size: int) -> list[int]:
    """Return the next smaller and the next larger of some sizes."""
    below, above = [s for s in sizes if s < size], [s for s in sizes if s > size]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]
