"""Shows how tuning goes: a progress bar on a terminal, else a line for each task, on standard error."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.tuning.outcomes import NetworkChoice, Progress, TuningSummary

__all__ = ["TuningProgress", "choice_table", "outcome_table", "summary_text"]


class TuningProgress(Progress):
    """The command line's progress: tasks done, time left, what is going on and the last task's best time."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar: Bar | None = None
        self._count, self._total = 0, 0
        if console.is_terminal:
            # Redrawn seldom: the bar is a thread, which would disturb what is measured beside it.
            self._bar = Bar(
                BarColumn(24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
                transient=True,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> TuningProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, tasks: int, done: int) -> None:
        """Say how many tasks there are, and how many of them have been tuned before."""
        self._count, self._total = done, tasks
        if self._bar is not None:
            self._bar.reset(self._task, total=tasks - done)
        click.echo(f"{tasks} tasks, {done} of them tuned before", err=True)

    def step(self, what: str) -> None:
        """Say what takes time."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def finished(self, task: KernelTask, best_us: float, default_us: float) -> None:
        """Say that a task is done, and its best time so far."""
        self._count += 1
        text = f"[{self._count}/{self._total}] {task}: "
        if best_us == float("inf"):
            text += "every variant failed"
        else:
            text += f"{best_us:.1f} us"
            if default_us != float("inf"):
                text += f" (untuned {default_us:.1f}, {best_us / default_us - 1:+.0%})"
        if self._bar is not None:
            self._bar.update(self._task, advance=1)
        self._say(text)

    def compared(self, what: str, choices: Sequence[NetworkChoice]) -> None:
        """Say what the comparison within a network brought."""
        self._say(f"within the network, {what}: {_gains(choices)}")

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            click.echo(text, err=True)


def outcome_table(summary: TuningSummary) -> Table:
    """Show every task with its best variant."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in ("task", "layers", "variant", "us", "untuned us", "tried", "failed", "time is"):
        right = column in ("layers", "us", "untuned us", "tried", "failed")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for outcome in summary.outcomes:
        table.add_row(
            outcome.task,
            str(len(outcome.layers)),
            outcome.variant,
            _time(outcome.latency_us),
            _time(outcome.default_us),
            str(outcome.trials),
            str(outcome.failed),
            outcome.origin,
        )
    return table


def choice_table(summary: TuningSummary) -> Table:
    """Show the tasks for which another variant was faster within the network."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in ("within the network: task", "layers", "variant", "us", "instead of", "us"):
        table.add_column(column, justify="right" if column in ("layers", "us") else "left", no_wrap=True)
    for choice in summary.choices:
        variant, us = choice.times_us[0]
        if choice.saved_us > 0:
            layers = str(len(choice.layers))
            table.add_row(choice.task, layers, variant, _time(us), choice.before, _time(choice.before_us))
    return table


def summary_text(summary: TuningSummary) -> str:
    """Describe a run in a few lines."""
    count = dict.fromkeys(("measured", "interpolated", "missing"), 0)
    for outcome in summary.outcomes:
        count[outcome.origin] += 1
    lines = [
        f"{summary.trials} variants tried in {summary.seconds:.0f} s; of {len(summary.outcomes)} tasks "
        f"{count['measured']} are measured, {count['interpolated']} interpolated, {count['missing']} not tuned"
    ]
    if summary.failures:
        lines.append(f"{sum(number for _, number in summary.failures)} trials failed:")
        lines += [f"  {number} x {reason}" for reason, number in summary.failures]
    if summary.choices:
        lines.append(f"within the network: {_gains(summary.choices)}")
    return "\n".join([*lines, f"records are in {summary.database}"])


def _time(latency_us: float) -> str:
    return "" if latency_us == float("inf") else f"{latency_us:.1f}"


def _gains(choices: Sequence[NetworkChoice]) -> str:
    better = [choice.saved_us for choice in choices if choice.saved_us > 0]
    return (
        f"another variant is faster for {len(better)} of {len(choices)} tasks compared, by {sum(better):.0f} us in all"
    )
