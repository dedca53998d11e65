"""The command line, ``tvm-nm``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tvm_nm import __version__
from tvm_nm.cli_evaluate import agreement_text, evaluate_command, gate_options, make_gate
from tvm_nm.cli_options import calibration_images as _images
from tvm_nm.cli_options import calibration_options as _calibration_options
from tvm_nm.cli_options import emit_json as _emit
from tvm_nm.cli_options import method_option
from tvm_nm.cli_options import parse_shape_options as _shapes
from tvm_nm.cli_plan import goal_options, has_goal, make_planned, plan_command
from tvm_nm.cli_torch import finetune_command, refit_command
from tvm_nm.cli_tune import tune_command
from tvm_nm.console import Group, Steps
from tvm_nm.environment import check_environment

if TYPE_CHECKING:
    from rich.table import Table


# The commands import what they need themselves, so that `tvm-nm --help` need not wait for TVM.

__all__ = ["cli", "main"]

_F = TypeVar("_F", bound=Callable[..., Any])

_PATTERNS = "dense, 2:4 (N:M), 2:4t8 (shared by 8 channels), 1x16, 1x4p (by position), 1x16u (unbalanced)"


@click.group(cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tvm-nm")
@click.option("--verbose", is_flag=True, help="Log what is going on to standard error.")
@click.option("--debug", is_flag=True, help="Show tracebacks of expected errors, too.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool, debug: bool) -> None:
    """Compile ONNX CNNs to sparse TVM modules that run faster on CPUs than dense runtimes."""
    if verbose or debug:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("tvm_nm").setLevel(logging.DEBUG if debug else logging.INFO)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    else:
        check_environment()


def main() -> None:
    """Run the command line."""
    cli(prog_name="tvm-nm")


def _prune_options(command: _F) -> _F:
    options = (
        click.option("--pattern", metavar="P", help=f"Sparsity pattern: {_PATTERNS}. [default: 1x16]"),
        click.option(
            "--density", type=float, metavar="D", help="Share of weights kept. [default: the pattern's, or 0.5]"
        ),
        click.option("--include", multiple=True, metavar="GLOB", help="Prune these layers although spared by default."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these layers alone; wins over --include."),
        method_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


_plan_option = click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE", help="Prune as this plan says."
)
_rearrange_option = click.option(
    "--rearrange",
    type=click.Choice(["none", "sort", "cluster", "swap"]),
    help="How channels change places before pruning, so that patterns keep more. [default: none]",
)
_shape_option = click.option("--shape", "shapes", multiple=True, metavar="INPUT:1,3,224,224", help="Shape of an input.")
_threads_option = click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Number of threads.")
_database_option = click.option(
    "--db",
    "database",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Tuning database whose records are applied.",
)
_json_option = click.option("--json", "json_file", metavar="FILE", help="Write the result as JSON, with - to stdout.")


@cli.command("compile")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="[default: MODEL-tvm]")
@_prune_options
@_plan_option
@goal_options
@gate_options
@_calibration_options
@_rearrange_option
@_threads_option
@click.option("--target", metavar="JSON", help='TVM target, such as \'{"kind": "llvm", "mcpu": "skylake-avx512"}\'.')
@_shape_option
@_json_option
@_database_option
@click.option("--stitch", is_flag=True, help="Take the pruned layers from --reconstruction as they are there.")
@click.option("--untuned", is_flag=True, help="Do not use the tuned records that come with tvm-nm.")
@click.option("--no-verify", is_flag=True, help="Do not compare the outputs with onnxruntime's.")
@click.option("--no-winograd", is_flag=True, help="Compute 3x3 convolutions directly: smaller, rounds less.")
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
    images = None if calib is None and data is not None else _images(calib, calib_images, preprocess)
    with Steps() as steps:
        if has_goal(planning):
            common: dict[str, Any] = {"include": include, "exclude": exclude, "threads": threads, "target": target}
            common |= {"images": images, "method": method, "database": database, "untuned": untuned}
            planned = make_planned(model, {**planning, **common, "shapes": _shapes(shapes)}, steps)
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
            shapes=_shapes(shapes),
            database=database,
            shipped_records=not untuned,
            verify=not no_verify,
            winograd=not no_winograd,
            gate=make_gate(min_agreement, max_drop, data, data_images, preprocess, planned),
            progress=steps,
        )
    _emit(built.manifest.to_dict(), json_file)
    if json_file != "-":
        click.echo(summary(built.manifest))
        if planned is not None:
            from tvm_nm.plan_report import plan_summary

            click.echo(f"\n{plan_summary(planned)}")
        if built.agreement is not None:
            click.echo(f"\nBeside the dense network, on {agreement_text(built.agreement)}")
        click.echo(f"\nwritten to {output}; the layers are listed in {output / 'report.txt'}")


cli.add_command(evaluate_command)
cli.add_command(plan_command)
cli.add_command(tune_command)
cli.add_command(finetune_command)
cli.add_command(refit_command)


@cli.command()
@click.argument("artifact", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="MODEL", help="ONNX model for onnxruntime to run.")
@_threads_option
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True, help="Blocks of calls.")
@click.option("--layers", is_flag=True, help="Show each layer's time and what its sparse kernel gains.")
@click.option("--update-report", is_flag=True, help="Write the layers' times into the artefact's report.txt.")
@_json_option
def bench(
    artifact: Path,
    against: Path | None,
    threads: int | None,
    rounds: int,
    layers: bool,
    update_report: bool,
    json_file: str | None,
) -> None:
    """Measure the latency of the artefact DIR, beside onnxruntime if wanted.

    Both take turns in short blocks, with equally many threads. The speed-up is the ratio of the medians.

    With --layers also each layer inside the network, as a share of the FMA peak of the same run, and each distinct
    sparse layer alone beside the best dense kernel.
    """
    from tvm_nm.artifact import REPORT
    from tvm_nm.json_file import write_text
    from tvm_nm.report import layer_times_table, report_text, timing_table
    from tvm_nm.runtime import load

    with Steps() as steps:
        steps("loading")
        model = load(artifact, threads=threads)
        result = model.benchmark(against, rounds=rounds, layers=layers or update_report, progress=steps)
    if update_report:
        write_text(artifact / REPORT, report_text(model.manifest, result.layers), "report")
    _emit(result.to_dict(), json_file)
    if json_file == "-":
        return
    if layers:
        _print(layer_times_table(result.layers))
        click.echo()
    _print(timing_table(result.timings))


@cli.command()
@click.argument("path", metavar="MODEL|DIR", type=click.Path(path_type=Path))
@_shape_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, shapes: tuple[str, ...], as_json: bool) -> None:
    """List the layers of an ONNX model, with the sparsity patterns found in their weights, or of an artefact."""
    from tvm_nm.report import layer_table, sparsity_rows, sparsity_table, summary

    if path.is_dir():
        from tvm_nm.manifest import Manifest

        manifest = Manifest.load(path)
        if as_json:
            click.echo(manifest.to_json(), nl=False)
        else:
            click.echo(summary(manifest) + "\n")
            _print(layer_table(manifest.layers))
        return
    from tvm_nm.pruning import inspect_model

    found = inspect_model(path, _shapes(shapes))
    if as_json:
        click.echo(json.dumps(sparsity_rows(found), indent=2))
    else:
        _print(sparsity_table(found))


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="File to write.")
@_prune_options
@_plan_option
@_calibration_options
@_rearrange_option
@_shape_option
def prune(
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
        images = _images(calib, calib_images, preprocess)
        done = prune_file(model, output, request, _shapes(shapes), images, steps, plan_file)
    masks = done.masks
    kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.size for mask in masks.values())
    if done.rearrangement is not None:
        before, after = done.rearrangement.kept
        click.echo(f"rearranged channels: {after:.1%} of the {done.rearrangement.measure} is kept, not {before:.1%}")
    form = request.pattern if plan_file is None else "the plan"
    click.echo(f"pruned {len(masks)} layers to {form}: {kept} of their {total} weights are left")
    click.echo(f"written to {output}")


@cli.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Keep the sparse artefact.")
@_prune_options
@_threads_option
@_json_option
def demo(
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
    from tvm_nm.demo import DEMO_DENSITY, DEMO_PATTERN, run_demo
    from tvm_nm.pruning import PruneRequest
    from tvm_nm.report import layer_times_table, timing_table

    if pattern is None and density is None:
        density = DEMO_DENSITY
    request = PruneRequest.make(pattern or DEMO_PATTERN, density, include, exclude, method)
    with Steps() as steps:
        result = run_demo(request, threads=threads, output=output, progress=steps)
    _emit(result.to_dict(), json_file)
    if json_file == "-":
        return
    click.echo("Where the time of the sparse build goes:\n")
    _print(layer_times_table(result.layers))
    click.echo("\nLatency of one image, NumPy to NumPy, taken in turns:\n")
    _print(timing_table(result.timings))
    dense, sparse = result.top1
    click.echo(f"\nTop-1 on {result.images} images of {result.dataset}: dense {dense:.2%}, sparse {sparse:.2%}")
    if output is not None:
        click.echo(f"written to {output}")


def _print(table: Table) -> None:
    from tvm_nm.report import to_text

    click.echo(to_text(table), nl=False)
