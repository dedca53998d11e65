"""The commands ``tvm-nm prune`` and ``tvm-nm inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tvm_nm.cli_options import (
    OutputFile,
    calibration_images,
    calibration_options,
    parse_shape_options,
    pattern_options,
    plan_file_option,
    print_table,
    rearrange_option,
    shape_option,
)
from tvm_nm.console import Steps

__all__ = ["inspect_command", "prune_command"]

# As in cli.py, functions import what they need themselves.


@click.command("prune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=OutputFile("model"), metavar="FILE", help="File to write.")
@pattern_options("1x16")
@plan_file_option
@calibration_options
@rearrange_option
@shape_option
def prune_command(
    model: Path,
    output: Path,
    pattern: str | None,
    density: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    method: str | None,
    plan_file: Path | None,
    calib: Path | None,
    calib_images: int | None,
    preprocess: str | None,
    rearrange: str | None,
    shapes: tuple[str, ...],
) -> None:
    """Zero weights of MODEL.onnx and write it as an ONNX model again, to fine-tune it or to run it elsewhere.

    With --calib the weights that are left are refitted so that each layer's outputs stay near the dense network's. With
    --rearrange the channels within the model are written in another order; its inputs and outputs keep theirs.
    """
    from tvm_nm.pruning import DEFAULT_PATTERN, DEFAULT_REARRANGE, PruneRequest, prune_file

    if plan_file is not None and (pattern or density or include or exclude):
        raise click.UsageError("--pattern, --density, --include and --exclude do not go with a plan")
    chosen = pattern or DEFAULT_PATTERN
    request = PruneRequest.make(chosen, density, include, exclude, method, rearrange or DEFAULT_REARRANGE)
    with Steps() as steps:
        steps("pruning")
        images = calibration_images(calib, calib_images, preprocess)
        done = prune_file(model, output, request, parse_shape_options(shapes), images, steps, plan_file)
    masks = done.masks
    kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.size for mask in masks.values())
    if done.rearrangement is not None:
        before, after = done.rearrangement.kept
        click.echo(f"rearranged channels: {after:.1%} of the {done.rearrangement.measure} is kept, not {before:.1%}")
    form = request.pattern if plan_file is None else "the plan"
    click.echo(f"pruned {len(masks)} layers to {form}: {kept} of their {total} weights are left")
    click.echo(f"written to {output}")


@click.command("inspect")
@click.argument("path", metavar="MODEL|DIR", type=click.Path(path_type=Path))
@shape_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_command(path: Path, shapes: tuple[str, ...], as_json: bool) -> None:
    """List the layers of an ONNX model, with the sparsity patterns found in their weights, or of an artefact."""
    from tvm_nm.report import layer_table, sparsity_rows, sparsity_table, summary

    if path.is_dir():
        from tvm_nm.manifest import Manifest

        manifest = Manifest.load(path)
        if as_json:
            click.echo(manifest.to_json(), nl=False)
        else:
            click.echo(summary(manifest) + "\n")
            print_table(layer_table(manifest.layers))
        return
    from tvm_nm.pruning import inspect_model

    found = inspect_model(path, parse_shape_options(shapes))
    if as_json:
        click.echo(json.dumps(sparsity_rows(found), indent=2))
    else:
        print_table(sparsity_table(found))
