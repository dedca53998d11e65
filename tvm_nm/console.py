"""How the command line talks: progress, errors as one line, and a clean end on interrupts."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tvm_nm.errors import TvmNmError

__all__ = ["Group", "Steps"]

_EXPECTED_ERROR = 2
_TIMED = "measuring"
_SILENCE = 30.0  # seconds after which a log says how far a step has come


class Steps:
    """Says on standard error which step is under way: a spinner on a terminal, else a line for each.

    How far a step has come, in brackets, is for terminals; other outputs hear of it every half a minute.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last = ""
        self._said = 0.0
        if console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Steps:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, step: str) -> None:
        """Start a step, or say in brackets behind its name how far it has come."""
        _Signals.raise_pending()
        if self._progress is None:
            head, now = step.partition(" (")[0], time.monotonic()
            if head != self._last or now - self._said >= _SILENCE:
                click.echo(f"{head if head != self._last else step} ...", err=True)
                self._last, self._said = head, now
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        if step.startswith(_TIMED):  # the spinner is a thread, which would disturb
            self._progress.stop()
            click.echo(f"{step} ...", err=True)
            return
        self._progress.start()
        self._task = self._progress.add_task(step, total=None)


class Group(click.Group):
    """A group of commands whose expected errors are one line on standard error and exit code 2.

    An interrupt ends with code 130, SIGTERM with 143, both after everything temporary is removed.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with _Signals.raised():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort, Exception) as error:
            # TVM may turn an interrupt in one of its callbacks into an error of its own.
            number = _Signals.received or (signal.SIGINT if isinstance(error, KeyboardInterrupt | click.Abort) else 0)
            if number:
                click.echo("interrupted", err=True)
                ctx.exit(128 + number)
            if ctx.params.get("debug") or not _is_expected(error):
                raise
            click.echo(f"error: {_one_line(error)}", err=True)
            ctx.exit(_EXPECTED_ERROR)


class _Signals:
    """Turns SIGINT and SIGTERM into one KeyboardInterrupt and remembers which came."""

    received: int = 0

    @classmethod
    @contextmanager
    def raised(cls) -> Iterator[None]:
        cls.received = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, cls._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @classmethod
    def _handle(cls, number: int, _frame: FrameType | None) -> None:
        # A second one must not interrupt the clean-up after the first.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cls.received = number
        raise KeyboardInterrupt

    @classmethod
    def raise_pending(cls) -> None:
        """Raise the interrupt again in case that it was raised where exceptions are dropped, such as a destructor."""
        if cls.received:
            raise KeyboardInterrupt


def _is_expected(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno != errno.EPIPE  # click's own business
    return isinstance(error, TvmNmError | MemoryError)


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
