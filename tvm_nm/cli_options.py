"""What several commands do with their options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tvm_nm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tvm_nm.pruning import Images

__all__ = ["calibration_images", "calibration_options", "emit_json", "method_option", "parse_shape_options"]

_F = TypeVar("_F", bound=Callable[..., Any])

method_option = click.option(
    "--method",
    type=click.Choice(("magnitude", "ls", "obs")),
    help="Drop the smallest weights; the smallest, refitting the rest; or by what it costs after refitting. "
    "[default: obs with calibration data, else magnitude]",
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
        Path(json_file).write_text(text, encoding="utf-8")


def calibration_options(command: _F) -> _F:
    """Add the options that say where calibration images come from."""
    options = (
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
    for option in reversed(options):
        command = option(command)
    return command


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
