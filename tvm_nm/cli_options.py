"""What several commands do with their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tvm_nm.errors import UnsupportedModelError

__all__ = ["emit_json", "parse_shape_options"]


def parse_shape_options(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Read the values of ``--shape``.

    Raises
    ------
    UnsupportedModelError
        If one cannot be read.
    """
    from tvm_nm.frontend import parse_shapes

    try:
        return parse_shapes(texts)
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error


def emit_json(data: dict[str, Any], json_file: str | None) -> None:
    """Write what ``--json`` asks for: to a file, or with ``-`` to standard output."""
    if json_file is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    if json_file == "-":
        click.echo(text, nl=False)
    else:
        Path(json_file).write_text(text, encoding="utf-8")
