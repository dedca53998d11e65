"""The options that several commands have, and what they do with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.json_file import check_writable, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from tvm_nm.pruning import Images

__all__ = [
    "OutputFile",
    "calibration_images",
    "calibration_options",
    "database_option",
    "emit_json",
    "exclude_option",
    "include_option",
    "json_option",
    "method_option",
    "option_group",
    "parse_shape_options",
    "pattern_options",
    "plan_file_option",
    "print_table",
    "rearrange_option",
    "run_threads_option",
    "shape_option",
    "threads_option",
    "untuned_option",
]

_F = TypeVar("_F", bound=Callable[..., Any])

_PATTERNS = "dense, 2:4 (N:M), 2:4t8 (shared by 8 channels), 1x16, 1x4p (by position), 1x16u (unbalanced)"


class OutputFile(click.Path):
    """A file that the command is going to write; the command does not start where it cannot be written.

    Parameters
    ----------
    noun
        What it is called in errors.
    read_if_there
        Whether a file that is there is not written but read.
    """

    def __init__(self, noun: str, *, read_if_there: bool = False) -> None:
        super().__init__(path_type=Path)
        self._noun = noun
        self._read_if_there = read_if_there

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path.

        Raises
        ------
        ArtifactError
            If nothing can be written there.
        """
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not (self._read_if_there and path.is_file()):
            check_writable(path, self._noun)
        return path


def _checked_json(name: str | None) -> str | None:
    if name not in (None, "-"):
        check_writable(str(name), "result")
    return name


def option_group(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Put options together into one decorator, which shows them in this order."""

    def decorate(command: _F) -> _F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of threads. [default: the processors that this process may use]",
)
run_threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of threads. [default: as many as it was built for; of an ONNX model: all processors]",
)
shape_option = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="INPUT:1,3,224,224",
    help="Shape of an input that leaves axes open. [default: batch 1]",
)
json_option = click.option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Write the result as JSON, with - to stdout.",
    callback=lambda _context, _option, name: _checked_json(name),
)
include_option = click.option(
    "--include", multiple=True, metavar="GLOB", help="Prune these layers although spared by default."
)
exclude_option = click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave these layers alone; wins over --include."
)
plan_file_option = click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE", help="Prune as this plan says."
)
rearrange_option = click.option(
    "--rearrange",
    type=click.Choice(["none", "sort", "cluster", "swap"]),
    help="How channels change places before pruning, so that patterns keep more. [default: none]",
)
database_option = click.option(
    "--db",
    "database",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Tuning database whose records are applied.",
)
untuned_option = click.option("--untuned", is_flag=True, help="Do not use the tuned records that come with tvm-nm.")
method_option = click.option(
    "--method",
    type=click.Choice(("magnitude", "ls", "obs")),
    help="Drop the smallest weights; the smallest, refitting the rest; or by what it costs after refitting. "
    "[default: obs with calibration data, else magnitude]",
)


def pattern_options(default: str, density: str = "the pattern's, or 0.5") -> Callable[[_F], _F]:
    """Return the options that say what to prune to; the command itself has the defaults."""
    return option_group(
        click.option("--pattern", metavar="P", help=f"Sparsity pattern: {_PATTERNS}. [default: {default}]"),
        click.option("--density", type=float, metavar="D", help=f"Share of weights kept. [default: {density}]"),
        include_option,
        exclude_option,
        method_option,
    )


calibration_options = option_group(
    click.option(
        "--calib",
        type=click.Path(path_type=Path),
        metavar="DATA",
        help="Calibration images without labels, to refit the weights that are left: a folder, .npy or .npz file.",
    ),
    click.option("--calib-images", type=click.IntRange(min=1), metavar="N", help="Images to use. [default: 1024]"),
    click.option(
        "--preprocess",
        metavar="TEXT",
        help="From pixels to inputs: resize=256,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,scale=255,order=rgb, "
        "which are the defaults.",
    ),
)


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
        write_text(json_file, text, "result")


def calibration_images(calib: Path | None, limit: int | None, preprocess: str | None) -> Images | None:
    """Calibration data as the options say, opened when the input's shape is known."""
    from tvm_nm.calibration import DEFAULT_IMAGES, CalibrationImages, open_images
    from tvm_nm.preprocessing import Preprocessing

    if calib is None:
        if limit or preprocess:
            raise click.UsageError("--calib-images and --preprocess need --calib")
        return None
    preprocessing = Preprocessing.parse(preprocess) if preprocess else None

    def opened(shape: tuple[int, ...]) -> CalibrationImages:
        return open_images(calib, shape, limit=limit or DEFAULT_IMAGES, preprocessing=preprocessing)

    return opened


def print_table(table: Table) -> None:
    """Print a table as wide as it needs."""
    from tvm_nm.report import to_text

    click.echo(to_text(table), nl=False)
