"""Which variants of a task to try, and when to stop: the model's ranking, what won nearby, then steps from the best."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.variants import Kernel, default_kernel, kernel_from_text, neighbours, ranked_kernels, variant_text
from tvm_nm.tuning.trials import Trial, TrialTable

__all__ = ["Effort", "Search"]

Effort: TypeAlias = Literal["light", "full", "thorough"]
"""`full` for the first densities of a layer; `light` for those between, which start from what won beside them.

`thorough` goes on to the limit although nothing better is found."""

_BATCH = 6
_GAIN = 0.98
_ENOUGH = 12
_PATIENCE = 2
_FINALISTS = 3
_LIGHT_TRIALS = 8


@dataclass(slots=True)
class Search:
    """The search for one task's best variant: batches to measure until one of them brings nothing more.

    Attributes
    ----------
    task
        The task.
    machine
        What it runs on, with the task's threads.
    known
        What was measured before, of this task and of others.
    effort
        How thorough to be.
    limit
        Most variants to try.
    retune
        Try variants again that have been tried in another run.
    """

    task: KernelTask
    machine: Machine
    known: TrialTable
    effort: Effort
    limit: int
    retune: bool = False
    default: str = field(init=False)
    tried: dict[str, float] = field(init=False, default_factory=dict)
    _ranked: list[str] = field(init=False)
    _idle: int = field(init=False, default=0)
    _first: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.machine = replace(self.machine, threads=self.task.threads)
        self.default = variant_text(default_kernel(self.task, self.machine))
        self.limit = min(self.limit, _LIGHT_TRIALS) if self.effort == "light" else self.limit
        ranked = ranked_kernels(self.task, self.machine, self.limit + _BATCH)
        self._ranked = [variant_text(kernel) for kernel in ranked]
        if not self.retune:
            self.tried = {trial.variant: trial.latency_us for trial in self.known.trials.get(self.task, {}).values()}

    @property
    def best(self) -> str | None:
        """The fastest variant so far."""
        good = [variant for variant, latency_us in self.tried.items() if latency_us < float("inf")]
        return min(good, key=self.tried.__getitem__, default=None)

    @property
    def finalists(self) -> list[str]:
        """The fastest variants so far and the default one: what every batch is compared with."""
        good = sorted((us, variant) for variant, us in self.tried.items() if us < float("inf"))
        return list(dict.fromkeys([*(variant for _, variant in good[:_FINALISTS]), *self._tried_default()]))

    def _tried_default(self) -> list[str]:
        return [self.default] if self.tried.get(self.default, float("inf")) < float("inf") else []

    def propose(self) -> list[str]:
        """Return the next variants to try; none when the search is over."""
        room = self.limit - len(self.tried)
        if room <= 0 or self._gives_up:
            return []
        steps = self._steps()
        if self._first:
            mix = [self.default, *self._seeds(), *(self._ranked[: 2 if self.effort == "light" else _BATCH])]
        else:
            fresh = [variant for variant in self._ranked if variant not in self.tried]
            mix = [*steps[: _BATCH // 2], *([] if self.effort == "light" else fresh[: _BATCH // 2]), *steps]
            if self.effort == "thorough":
                mix += fresh
        self._first = False
        new = [variant for variant in dict.fromkeys(mix) if variant not in self.tried]
        return new[: min(room, _BATCH)]

    @property
    def _gives_up(self) -> bool:
        if self.effort == "thorough":
            return False
        enough = self.effort == "light" or len(self.tried) >= _ENOUGH
        return self._idle >= (1 if enough else _PATIENCE)

    def observe(self, trials: list[Trial]) -> None:
        """Take the results of a batch."""
        before = min(self.tried.values(), default=float("inf"))
        self.tried |= {trial.variant: trial.latency_us for trial in trials}
        after = min(self.tried.values(), default=float("inf"))
        self._idle = 0 if after < before * _GAIN else self._idle + 1

    def _steps(self) -> list[str]:
        if self.best is None:
            return []
        kernel = kernel_from_text(self.best, self.task, self.machine)
        return [variant_text(step) for step in neighbours(kernel, self.machine)]

    def _seeds(self) -> list[str]:
        """Return what won for this layer at other densities and for the nearest relatives of its shape."""
        relatives = [task for task in self.known.trials if task != self.task and _distance(task, self.task) < 8]
        relatives.sort(key=lambda task: _distance(task, self.task))
        found: list[str] = []
        for task in relatives[:4]:
            for trial in self.known.best_trials(task)[:2]:
                kernel = self._transferred(trial.variant)
                if kernel is not None:
                    found.append(variant_text(kernel))
        return list(dict.fromkeys(found))[: _BATCH // 2]

    def _transferred(self, variant: str) -> Kernel | None:
        try:
            return kernel_from_text(variant, self.task, self.machine)
        except ValueError:
            return None


def _distance(one: KernelTask, other: KernelTask) -> float:
    """Return how unlike two tasks are: less than 8 where a variant of one is worth trying for the other."""
    if (one.kind, one.index, one.block, one.winograd) != (other.kind, other.index, other.block, other.winograd):
        return 8
    if _shape(one) != _shape(other):
        return 8
    apart = abs(one.density - other.density)
    apart += one.workload.epilogue != other.workload.epilogue
    apart += one.threads != other.threads
    return apart + 2 * (one.workload != replace(other.workload, epilogue=one.workload.epilogue))


def _shape(task: KernelTask) -> tuple[object, ...]:
    """Return what a variant's pixel layout depends on; channels may differ."""
    works = [task.workload, *(task.links.layers if task.links else ())]
    return tuple((work.height, work.width, work.kernel, work.stride, work.padding, work.dilation) for work in works)
