"""What a tuning run found, and whom it tells how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvm_nm.schedules.kernel_task import KernelTask

__all__ = ["NetworkChoice", "Progress", "TaskOutcome", "TuningSummary"]


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """What tuning found for a task.

    Attributes
    ----------
    task
        Its text.
    layers
        Names of the layers that could use it.
    variant
        The best variant; empty where there is none.
    latency_us
        Its time; infinite where there is none.
    default_us
        Time of the variant of an untuned build; infinite where it is not known.
    trials, failed
        Variants tried in this run, and how many of them failed.
    origin
        `measured`, `interpolated` (see `TrialTable.best`) or `missing`.
    """

    task: str
    layers: tuple[str, ...]
    variant: str
    latency_us: float
    default_us: float
    trials: int
    failed: int
    origin: str


@dataclass(frozen=True, slots=True)
class NetworkChoice:
    """What a comparison within the network found for a task.

    Attributes
    ----------
    task
        Its text.
    layers
        The layers that would have been built with it; none for another kind of kernel, which was timed in their place.
    before
        The variant that would have been built.
    before_us
        Its time within the network.
    times_us
        All variants that were compared, with their times there, the chosen one first.
    """

    task: str
    layers: tuple[str, ...]
    before: str
    before_us: float
    times_us: tuple[tuple[str, float], ...]

    @property
    def saved_us(self) -> float:
        """How much shorter an inference becomes by the choice."""
        chosen, chosen_us = self.times_us[0]
        return 0.0 if chosen == self.before else (self.before_us - chosen_us) * len(self.layers)


@dataclass(frozen=True, slots=True)
class TuningSummary:
    """What a tuning run did.

    Attributes
    ----------
    database
        The database's folder for the target.
    outcomes
        The tasks.
    failures
        Reasons of failed trials, with how often each occurred in this run.
    seconds
        Duration.
    choices
        What was compared within the network, if that was asked for.
    """

    database: str
    outcomes: tuple[TaskOutcome, ...]
    failures: tuple[tuple[str, int], ...]
    seconds: float
    choices: tuple[NetworkChoice, ...] = ()

    @property
    def trials(self) -> int:
        """Variants tried in this run."""
        return sum(outcome.trials for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON-ready values; what is not known is null."""
        data = asdict(self)
        for outcome in data["outcomes"]:
            for name in ("latency_us", "default_us"):
                outcome[name] = None if outcome[name] == float("inf") else round(outcome[name], 2)
        return {**data, "trials": self.trials}


class Progress:
    """Is told how tuning goes; this one keeps it to itself. Subclasses show it."""

    def start(self, tasks: int, done: int) -> None:
        """Say how many tasks there are, and how many of them have been tuned before."""

    def step(self, what: str) -> None:
        """Say what takes time: importing, building, measuring."""

    def finished(self, task: KernelTask, best_us: float, default_us: float) -> None:
        """Say that a task is done."""

    def compared(self, what: str, choices: Sequence[NetworkChoice]) -> None:
        """Say that the variants of a network's layers were compared within it."""
