"""The commands ``tvm-nm compile`` and ``tvm-nm demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tvm_nm.cli_evaluate import agreement_text, gate_options, make_gate
from tvm_nm.cli_options import (
    calibration_images,
    calibration_options,
    database_option,
    emit_json,
    json_option,
    parse_shape_options,
    pattern_options,
    plan_file_option,
    print_table,
    rearrange_option,
    shape_option,
    threads_option,
    untuned_option,
)
from tvm_nm.cli_plan import goal_options, has_goal, make_planned
from tvm_nm.console import Steps

__all__ = ["compile_command", "demo_command"]

# As in cli.py, functions import what they need themselves.


@click.command("compile")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="[default: MODEL-tvm]")
@pattern_options("1x16")
@plan_file_option
@goal_options
@gate_options
@calibration_options
@rearrange_option
@threads_option
@click.option(
    "--target",
    metavar="JSON",
    help='TVM target, such as \'{"kind": "llvm", "mcpu": "skylake-avx512"}\'. [default: this machine]',
)
@shape_option
@json_option
@database_option
@click.option("--stitch", is_flag=True, help="Take the pruned layers from --reconstruction as they are there.")
@untuned_option
@click.option("--no-verify", is_flag=True, help="Do not compare the outputs with onnxruntime's.")
@click.option("--no-winograd", is_flag=True, help="Compute all convolutions directly: less memory, rounds less.")
def compile_command(
    model: Path | None,
    output: Path | None,
    pattern: str | None,
    density: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    method: str | None,
    calib: Path | None,
    calib_images: int | None,
    preprocess: str | None,
    rearrange: str | None,
    threads: int | None,
    target: str | None,
    shapes: tuple[str, ...],
    json_file: str | None,
    database: Path | None,
    untuned: bool,
    no_verify: bool,
    no_winograd: bool,
    stitch: bool,
    plan_file: Path | None,
    min_agreement: float | None,
    max_drop: float | None,
    data: Path | None,
    data_images: int | None,
    **planning: Any,
) -> None:
    """Prune and compile MODEL.onnx into the directory DIR, which then runs without the ONNX file.

    With --budget, --speedup or --max-loss: plan first, as tvm-nm plan does, then build what was planned.

    Without MODEL: compile the network that comes with tvm-nm and show what sparsity does to its speed and accuracy.
    """
    if model is None:
        if target or shapes or no_verify or no_winograd or rearrange or calib or calib_images or preprocess:
            raise click.UsageError("--target, --shape, --calib, --rearrange, --no-verify, --no-winograd need a MODEL")
        if plan_file or has_goal(planning) or database or untuned:
            raise click.UsageError("--plan, --budget, --db and --untuned need a MODEL")
        if min_agreement or max_drop or data or data_images:
            raise click.UsageError("--min-agreement, --max-drop and --data need a MODEL")
        _demo(pattern, density, include, exclude, method, threads, output, json_file)
        return
    from tvm_nm.compiler import compile as compile_model
    from tvm_nm.pruning import DEFAULT_PATTERN, DEFAULT_REARRANGE
    from tvm_nm.report import summary

    if (pattern or density) and (plan_file or has_goal(planning)):
        raise click.UsageError("--pattern and --density go with neither a plan nor a budget; use --patterns, --allow")
    if no_winograd and has_goal(planning):
        raise click.UsageError("--no-winograd goes with no budget: times are measured with Winograd kernels")
    if stitch and not planning["reconstruction"]:
        raise click.UsageError("--stitch needs --reconstruction, the folder with the pruned layers")
    if planning["reconstruction"] and not (stitch or has_goal(planning)):
        raise click.UsageError("--reconstruction goes with a budget or with --stitch")
    if plan_file is not None and has_goal(planning):
        raise click.UsageError("--plan goes with no budget: it has been planned already")
    if rearrange not in (None, "none") and has_goal(planning):
        raise click.UsageError(
            "--rearrange goes with no budget: losses are estimated without it; plan first, then use --plan"
        )
    make_gate(min_agreement, max_drop, data, data_images, preprocess, None)  # says at once what is wrong with it
    output = output or Path(f"{model.stem}-tvm")
    planned = None
    images = None if calib is None and data is not None else calibration_images(calib, calib_images, preprocess)
    with Steps() as steps:
        if has_goal(planning):
            common: dict[str, Any] = {"include": include, "exclude": exclude, "threads": threads, "target": target}
            common |= {"images": images, "method": method, "database": database, "untuned": untuned}
            planned = make_planned(model, {**planning, **common, "shapes": parse_shape_options(shapes)}, steps)
        built = compile_model(
            model,
            output=output,
            plan=plan_file if planned is None else planned.plan,
            pattern=pattern or DEFAULT_PATTERN,
            density=density,
            include=include,
            exclude=exclude,
            method=method,
            images=images,
            reconstruction=planning["reconstruction"] if stitch else None,
            rearrange=rearrange or DEFAULT_REARRANGE,
            threads=threads,
            target=target,
            shapes=parse_shape_options(shapes),
            database=database,
            shipped_records=not untuned,
            verify=not no_verify,
            winograd=not no_winograd,
            gate=make_gate(min_agreement, max_drop, data, data_images, preprocess, planned),
            progress=steps,
        )
    if json_file != "-":
        click.echo(summary(built.manifest))
        if planned is not None:
            from tvm_nm.plan_report import plan_summary

            click.echo(f"\n{plan_summary(planned)}")
        if built.agreement is not None:
            click.echo(f"\nBeside the dense network, on {agreement_text(built.agreement)}")
        click.echo(f"\nwritten to {output}; the layers are listed in {output / 'report.txt'}")
    emit_json(built.manifest.to_dict(), json_file)


@click.command("demo")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Keep the sparse artefact.")
@pattern_options("1x4p", "0.25; with --pattern the pattern's, or 0.5")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Number of threads. [default: 1]")
@json_option
def demo_command(
    output: Path | None,
    pattern: str | None,
    density: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    method: str | None,
    threads: int | None,
    json_file: str | None,
) -> None:
    """Compile the network that comes with tvm-nm and show what sparsity does to its speed and accuracy."""
    _demo(pattern, density, include, exclude, method, threads, output, json_file)


def _demo(
    pattern: str | None,
    density: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    method: str | None,
    threads: int | None,
    output: Path | None,
    json_file: str | None,
) -> None:
    from tvm_nm.demo import DEMO_DENSITY, DEMO_PATTERN, DEMO_THREADS, run_demo
    from tvm_nm.pruning import PruneRequest
    from tvm_nm.report import layer_times_table, timing_table

    if pattern is None and density is None:
        density = DEMO_DENSITY
    request = PruneRequest.make(pattern or DEMO_PATTERN, density, include, exclude, method)
    with Steps() as steps:
        result = run_demo(request, threads=threads or DEMO_THREADS, output=output, progress=steps)
    if json_file != "-":
        click.echo("Where the time of the sparse build goes:\n")
        print_table(layer_times_table(result.layers))
        click.echo("\nLatency of one image, NumPy to NumPy, taken in turns:\n")
        print_table(timing_table(result.timings))
        dense, sparse = result.top1
        click.echo(f"\nTop-1 on {result.images} images of {result.dataset}: dense {dense:.2%}, sparse {sparse:.2%}")
        if output is not None:
            click.echo(f"written to {output}")
    emit_json(result.to_dict(), json_file)
