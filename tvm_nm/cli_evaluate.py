"""The command ``tvm-nm evaluate``, and the options with which ``tvm-nm compile`` judges what it built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tvm_nm.cli_options import (
    calibration_images,
    emit_json,
    json_option,
    option_group,
    parse_shape_options,
    run_threads_option,
    shape_option,
)
from tvm_nm.console import Steps

if TYPE_CHECKING:
    from tvm_nm.agreement import Agreement
    from tvm_nm.gate import Alternative, Gate
    from tvm_nm.planned import Planned
    from tvm_nm.pruning import Images

# As in cli.py, functions import what they need themselves.

__all__ = ["agreement_text", "evaluate_command", "gate_options", "make_gate"]


_EVERY = 1 << 31  # of the images that a build is judged by, unless --data-images says less


gate_options = option_group(
    click.option(
        "--min-agreement",
        type=float,
        metavar="A",
        help="Fail unless the build prefers the dense network's class for this share of images, such as 0.98.",
    ),
    click.option(
        "--max-drop", type=float, metavar="P", help="Fail if top-1 drops by more points; needs images with labels."
    ),
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        metavar="DATA",
        help="Images to judge the build by. [default: those of --calib]",
    ),
    click.option("--data-images", type=click.IntRange(min=1), metavar="N", help="Of these, use N. [default: all]"),
)
"""The options that say when a build fails."""


def make_gate(
    min_agreement: float | None,
    max_drop: float | None,
    data: Path | None,
    data_images: int | None,
    preprocess: str | None,
    planned: Planned | None,
) -> Gate | None:
    """Return the gate that the options ask for; None if they ask for none."""
    from tvm_nm.gate import Gate

    if min_agreement is None and max_drop is None:
        if data is not None or data_images is not None:
            raise click.UsageError("--data and --data-images need --min-agreement or --max-drop")
        return None
    if data is None and data_images is not None:
        raise click.UsageError("--data-images needs --data")
    images = None if data is None else _images(data, data_images, preprocess)
    return Gate(min_agreement, max_drop, images, () if planned is None else _slower(planned))


def _images(data: Path, limit: int | None, preprocess: str | None) -> Images:
    found = calibration_images(data, limit or _EVERY, preprocess)
    assert found is not None
    return found


def _slower(planned: Planned) -> tuple[Alternative, ...]:
    """Return the plans of the Pareto front that take longer than the chosen one, the fastest first."""
    from tvm_nm.gate import Alternative
    from tvm_nm.plan_loop import predicted_us
    from tvm_nm.planning import make_plan

    least = predicted_us(planned.table, planned.plan)
    found = []
    for point in sorted(planned.front, key=lambda point: point.time_us):
        if point.time_us > least * (1 + 1e-6):
            share = min(1.0, -(-point.time_us / planned.dense_us * 1000 // 1) / 1000)
            plan = make_plan(planned.table, point, planned.metric, point.time_us, planned.dense_us)
            found.append(Alternative(f"--budget {100 * share:.1f}%", plan))
    return tuple(found)


def agreement_text(found: Agreement, dense_given: bool = True) -> str:
    """Say in a few lines how a model's answers compare with the dense network's."""
    from tvm_nm.agreement import share_interval

    def share(value: float) -> str:
        low, high = share_interval(value, found.images)
        return f"{value:7.2%}  (95% interval {low:.1%} to {high:.1%})"

    lines = [f"{found.images} images"]
    if found.top1 is not None and found.top5 is not None:
        dense = dense_given and found.dense_top1 is not None and found.dense_top5 is not None
        lines.append(f"top-1      {share(found.top1)}" + (f"; dense {found.dense_top1:.2%}" if dense else ""))
        lines.append(f"top-5      {share(found.top5)}" + (f"; dense {found.dense_top5:.2%}" if dense else ""))
        if dense and found.drop is not None and found.drop_interval is not None:
            low, high = (100 * end for end in found.drop_interval)
            lines.append(f"drop       {100 * found.drop:6.2f} points (95% interval {low:.2f} to {high:.2f})")
    if dense_given:
        lines.append(f"agreement  {share(found.same)}")
        lines.append(f"KL         {found.divergence:.4f} nats from the dense network's answers")
    return "\n".join(lines)


@click.command("evaluate")
@click.argument("path", metavar="DIR|MODEL", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DATA",
    help="Images: a folder (with a subfolder for each class), .npy, or .npz with images and labels.",
)
@click.option("--images", "limit", type=click.IntRange(min=1), metavar="N", help="Images to use. [default: all]")
@click.option("--preprocess", metavar="TEXT", help="From pixels to inputs; see tvm-nm prune.")
@click.option("--against", type=click.Path(path_type=Path), metavar="MODEL", help="The dense ONNX model.")
@run_threads_option
@shape_option
@json_option
def evaluate_command(
    path: Path,
    data: Path,
    limit: int | None,
    preprocess: str | None,
    against: Path | None,
    threads: int | None,
    shapes: tuple[str, ...],
    json_file: str | None,
) -> None:
    """Run the artefact DIR or MODEL.onnx on images: top-1 and top-5 where there are labels.

    With --against also how often it prefers the same class as the dense network, how far its answers are from that
    network's, and how much top-1 dropped: all with 95% confidence intervals.
    """
    from tvm_nm.evaluation import evaluate

    with Steps() as steps:
        found = evaluate(
            path,
            _images(data, limit, preprocess),
            against,
            shapes=parse_shape_options(shapes),
            threads=threads,
            progress=steps,
        )
    if json_file != "-":
        click.echo(agreement_text(found, against is not None))
    emit_json(found.to_dict(), json_file)
