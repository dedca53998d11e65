"""The commands ``tvm-nm finetune`` and ``tvm-nm refit``, which need the extra ``torch``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvm_nm.cli_options import (
    OutputFile,
    emit_json,
    exclude_option,
    include_option,
    json_option,
    option_group,
    parse_shape_options,
    shape_option,
    threads_option,
)

if TYPE_CHECKING:
    from tvm_nm.torch.finetune import FineTuned, Images
    from tvm_nm.torch.gradual import Phase

__all__ = ["finetune_command", "refit_command"]

_PATH = click.Path(path_type=Path)

# They import what they need themselves, so that `tvm-nm --help` need not wait for PyTorch.


_common = option_group(
    click.option("-o", "--output", required=True, type=OutputFile("model"), metavar="FILE", help="File to write."),
    click.option("--test", type=_PATH, metavar="DATA", help="Images to judge by after each epoch."),
    click.option("--preprocess", metavar="TEXT", help="From pixels to inputs, see tvm-nm prune --help."),
    click.option(
        "--augment",
        metavar="TEXT",
        help="How images are varied: shift=4,flip,zoom=0.5, or none. [default: none; refit: shift=4,flip]",
    ),
    click.option(
        "--epochs",
        type=click.FloatRange(min=0, min_open=True),
        metavar="N",
        help="Times that all images are seen; may be a fraction. [default: 5; refit: 10]",
    ),
    click.option(
        "--batch", type=click.IntRange(min=1), metavar="N", help="Images in a step. [default: 128; refit: 32]"
    ),
    click.option(
        "--lr",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="Highest learning rate. [default: 0.05; refit: 0.0003]",
    ),
    click.option("--optimizer", type=click.Choice(("sgd", "adamw")), help="[default: sgd; refit: adamw]"),
    click.option("--temperature", type=float, metavar="T", help="Of distillation. [default: 2]"),
    click.option(
        "--batch-norm",
        type=click.Choice(("insert", "keep", "freeze")),
        help="Put batch norms behind convolutions that have none while training; train with those that there are; "
        "or keep their statistics as they are. [default: insert; refit: freeze]",
    ),
    click.option("--precision", type=click.Choice(("bf16", "float32")), help="[default: bf16]"),
    click.option("--device", metavar="NAME", help="Such as cpu or cuda:0. [default: a GPU where there is one]"),
    threads_option,
    click.option("--seed", type=int, metavar="N", help="Of everything random. [default: 0]"),
    click.option("--keep", type=click.Choice(("last", "best")), help="Whose weights are written. [default: last]"),
    click.option(
        "--checkpoint",
        type=OutputFile("checkpoint"),
        metavar="FILE",
        help="Where an interrupted run goes on. [default: the output with .checkpoint]",
    ),
    click.option("--restart", is_flag=True, help="Do not go on from the checkpoint of an interrupted run."),
    shape_option,
    json_option,
)


@click.command("finetune")
@click.argument("model", type=_PATH)
@click.option("--data", required=True, type=_PATH, metavar="DATA", help="Training images: a folder, .npy or .npz file.")
@click.option("--data-images", type=click.IntRange(min=1), metavar="N", help="Images to use. [default: all]")
@click.option("--dense", type=_PATH, metavar="MODEL", help="Learn from this model's answers (needs no labels).")
@click.option("--distill", type=click.FloatRange(0, 1), metavar="X", help="Share of that in the loss. [default: 0.5]")
@click.option("--label-smoothing", type=float, metavar="X", help="[default: 0]")
@click.option("--weight-decay", type=float, metavar="X", help="[default: 5e-4]")
@click.option("--warmup", type=float, metavar="X", help="Share of the steps. [default: 0.1]")
@click.option("--clip", type=float, metavar="X", help="Norm that gradients are clipped to; 0 for none. [default: 1]")
@click.option("--pattern", metavar="P", help="Prune by magnitude while training, to this pattern.")
@click.option("--density", type=float, metavar="D", help="Share of weights kept.")
@include_option
@exclude_option
@click.option("--plan", "plan_file", type=_PATH, metavar="FILE", help="Prune by magnitude while training, as it says.")
@click.option("--gradual", type=click.IntRange(min=1), metavar="N", help="Prune in so many steps. [default: 3]")
@_common
def finetune_command(
    model: Path,
    data: Path,
    data_images: int | None,
    dense: Path | None,
    pattern: str | None,
    density: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    plan_file: Path | None,
    gradual: int | None,
    **options: Any,
) -> None:
    """Train the ONNX model MODEL; weights that are zero stay zero.

    The result has the same graph, so a build of it uses the kernels that were tuned for MODEL. With --pattern or --plan
    weights are dropped step by step in the first third of the training. An interrupted run goes on where it stopped
    when the same command is given again.
    """
    from tvm_nm.torch.options import TrainingOptions

    prunes = pattern is not None or plan_file is not None
    if (density is not None or include or exclude) and pattern is None:
        raise click.UsageError("--density, --include and --exclude need --pattern")
    if gradual is not None and not prunes:
        raise click.UsageError("--gradual needs --pattern or --plan")
    if pattern is not None and plan_file is not None:
        raise click.UsageError("--pattern goes with no plan")
    phases = _phases(model, pattern, density, include, exclude, plan_file, gradual or 3, options) if prunes else ()
    _run(model, _opened(data, data_images, options), dense, TrainingOptions(), options, phases=phases)


@click.command("refit")
@click.argument("model", type=_PATH)
@click.option("--dense", required=True, type=_PATH, metavar="MODEL", help="The network that it was pruned from.")
@click.option("--calib", required=True, type=_PATH, metavar="DATA", help="Calibration images: a folder, .npy or .npz.")
@click.option("--calib-images", type=click.IntRange(min=1), metavar="N", help="Images to use. [default: 1024]")
@click.option("--activations", type=click.FloatRange(min=0), metavar="X", help="Weight of activations. [default: 1]")
@_common
def refit_command(model: Path, dense: Path, calib: Path, calib_images: int | None, **options: Any) -> None:
    """Refit the weights that are left in the pruned MODEL, all together, to the answers of the dense network.

    A second stage behind tvm-nm prune --calib: it takes minutes on a processor and needs no labels.
    """
    from tvm_nm.calibration import DEFAULT_IMAGES
    from tvm_nm.torch.network_stage import DEFAULTS

    images = _opened(calib, calib_images or DEFAULT_IMAGES, options)
    _run(model, images, dense, DEFAULTS, options, network_stage=True)


def _run(model: Path, images: Images, dense: Path | None, defaults: Any, given: dict[str, Any], **how: Any) -> None:
    from dataclasses import replace

    from tvm_nm.errors import PlanError
    from tvm_nm.torch.data import Augmentation
    from tvm_nm.torch.finetune import finetune_file
    from tvm_nm.torch.progress import TrainingProgress

    chosen = {key: value for key, value in given.items() if value is not None}
    if "lr" in chosen:
        chosen["learning_rate"] = chosen.pop("lr")
    if "augment" in chosen:
        chosen["augmentation"] = Augmentation.parse(chosen.pop("augment"))
    if "distill" in chosen:
        if dense is None:
            raise click.UsageError("--distill needs --dense")
        chosen["distillation"] = chosen.pop("distill")
    aims = ("distillation", "temperature", "label_smoothing", "activations")
    try:
        objective = replace(defaults.objective, **{key: chosen.pop(key) for key in aims if key in chosen})
        output, shapes = chosen.pop("output"), parse_shape_options(chosen.pop("shapes"))
        json_file, test, checkpoint = (chosen.pop(key, None) for key in ("json_file", "test", "checkpoint"))
        restart, preprocess = chosen.pop("restart"), chosen.pop("preprocess", None)
        threads = chosen.pop("threads", None)
        settings = replace(defaults, objective=objective, **chosen)
    except ValueError as error:
        raise PlanError(str(error)) from error
    checkpoint = checkpoint or output.with_name(f"{output.name}.checkpoint")
    if restart:
        checkpoint.unlink(missing_ok=True)
    with TrainingProgress() as progress:
        result = finetune_file(
            model,
            output,
            images,
            settings,
            dense=dense,
            test=None if test is None else _opened(test, None, {"preprocess": preprocess}),
            shape=next(iter(shapes.values()))[1:] if shapes else None,
            checkpoint=checkpoint,
            threads=threads,
            step=progress.step,
            progress=progress.status,
            **how,
        )
    if json_file != "-":
        click.echo(_summary(result))
        click.echo(f"written to {output}")
    emit_json(result.to_dict(), json_file)


def _opened(source: Path, limit: int | None, options: dict[str, Any]) -> Images:
    from tvm_nm.calibration import CalibrationImages, open_images
    from tvm_nm.preprocessing import Preprocessing

    text = options.get("preprocess")
    preprocessing = Preprocessing.parse(text) if text else None

    def opened(shape: tuple[int, ...]) -> CalibrationImages:
        return open_images(source, shape, limit=limit, preprocessing=preprocessing)

    return opened


def _phases(
    model: Path,
    pattern: str | None,
    density: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    plan_file: Path | None,
    gradual: int,
    options: dict[str, Any],
) -> tuple[Phase, ...]:
    from tvm_nm.frontend import import_onnx
    from tvm_nm.plan import Plan
    from tvm_nm.pruning import PruneRequest
    from tvm_nm.torch.gradual import gradual_phases

    if plan_file is not None:
        plan = Plan.load(plan_file)
    else:
        imported = import_onnx(model, shapes=parse_shape_options(options["shapes"]), verify=False)
        plan = PruneRequest.make(pattern or "", density, include, exclude).plan(imported.module)
    return gradual_phases(plan, gradual)


def _summary(result: FineTuned) -> str:
    lines = [f"{len(result.trained.masks)} layers keep their zeros"]
    for name, score in (("before", result.before), ("after", result.after)):
        if score is not None:
            found = [] if score.top1 is None else [f"top-1 {score.top1:.2%}"]
            if result.with_dense:
                dense = "" if score.dense_top1 is None else f" (top-1 {score.dense_top1:.2%})"
                found.append(f"{score.same:.2%} as the dense model{dense}")
            lines.append(f"{name}: {', '.join(found)} on {score.images} images")
    return "\n".join(lines)
