"""How far training has come, on standard error: a bar with the time that is left, or a line for each epoch."""

from __future__ import annotations

from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tvm_nm.console import Steps
from tvm_nm.torch.training import Epoch, Status

__all__ = ["TrainingProgress", "epoch_line"]


class TrainingProgress:
    """Takes the steps and the states of `tvm_nm.torch.finetune.finetune_file`; a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
        self._task: TaskID | None = None
        self._steps = Steps()

    def __enter__(self) -> TrainingProgress:
        self._steps.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._steps.__exit__(kind, value, trace)

    def step(self, name: str) -> None:
        """Say which step is under way."""
        if self._bar is not None and self._task is not None:
            self._bar.stop()
        self._steps(name)

    def status(self, status: Status) -> None:
        """Show the state after a training step."""
        if self._bar is not None:
            if self._task is None:
                self._steps.__exit__(None, None, None)  # two live displays cannot share a terminal
                self._bar.start()
                self._task = self._bar.add_task("training", total=status.steps, loss=status.loss)
            self._bar.update(self._task, completed=status.step, loss=status.loss)
        if status.epoch is not None:
            line = epoch_line(status.epoch)
            if self._bar is not None:
                self._bar.console.print(line, highlight=False)
            else:
                left = status.epoch.seconds / status.step * (status.steps - status.step)
                click.echo(f"{line}, {left:.0f} s left", err=True)


def epoch_line(epoch: Epoch) -> str:
    """Describe an epoch in one line."""
    line = f"epoch {epoch.number}: loss {epoch.loss:.4f}"
    if epoch.score is not None:
        top1 = "" if epoch.score.top1 is None else f", top-1 {epoch.score.top1:.2%}"
        # Without a dense model a score is beside the model itself, which says nothing.
        same = "" if epoch.score.divergence == 0 else f", agreement {epoch.score.same:.2%}"
        line += f"{top1}{same}"
    return f"{line}, {epoch.seconds:.0f} s"
