"""Runs ``tvm-nm`` in this process and looks at what users see."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from tvm_nm.cli import cli


def run(*arguments: str | Path) -> Result:
    """Run a command."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def fails(*arguments: str | Path) -> str:
    """Run what has to fail as users should see it, and return what it says: in one line, or as wrong use."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout
    *before, error = result.stderr.splitlines()
    if error.startswith("Error: "):
        assert before[0].startswith("Usage: ")
        return error.removeprefix("Error: ")
    assert all(step.endswith(" ...") for step in before)
    assert error.startswith("error: ")
    return error.removeprefix("error: ")
