"""The command ``tvm-nm plan``, and the options with which ``tvm-nm compile`` plans by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvm_nm.cli_options import (
    OutputFile,
    calibration_images,
    calibration_options,
    database_option,
    emit_json,
    exclude_option,
    include_option,
    json_option,
    method_option,
    option_group,
    parse_shape_options,
    shape_option,
    threads_option,
    untuned_option,
)
from tvm_nm.console import Steps

if TYPE_CHECKING:
    from tvm_nm.planned import Planned

# As in cli.py, functions import what they need themselves.

__all__ = ["goal_options", "has_goal", "make_planned", "plan_command"]


_METRICS = ("l1", "l2", "output")


goal_options = option_group(
    click.option("--budget", metavar="B", help="Time budget: share of the dense time (0.6, 60%) or a time (25ms)."),
    click.option("--speedup", type=float, metavar="S", help="Time budget as a speed-up over the dense network."),
    click.option("--max-loss", type=float, metavar="L", help="Largest loss; the plan takes the least time."),
    click.option("--metric", type=click.Choice(_METRICS), help="What a loss is. [default: output with --calib, or l1]"),
    click.option("--search", is_flag=True, help="Search the layers' sensitivities on calibration images."),
    click.option("--trials", type=click.IntRange(min=1), default=100, show_default=True, help="Of the search."),
    click.option(
        "--reconstruction",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Layers pruned to all candidates on --calib, to estimate losses with; what is missing is added. "
        "[default: pruned anew]",
    ),
    click.option(
        "--costs",
        type=OutputFile("cost table", read_if_there=True),
        metavar="FILE",
        help="Cost table; measured and written there if it does not exist. [default: measured]",
    ),
    click.option("--patterns", metavar="P,P", help="Sparsity patterns to choose from. [default: 1x4p,1x16p]"),
    click.option("--densities", metavar="D,D", help="Densities to choose from. [default: 11 from 0.75 to 0.0625]"),
    click.option("--min-density", multiple=True, metavar="[GLOB=]D", help="Least density, of some layers."),
    click.option("--max-density", multiple=True, metavar="[GLOB=]D", help="Largest density, of some layers."),
    click.option("--allow", multiple=True, metavar="[GLOB=]P,P", help="Patterns allowed, for some layers."),
    click.option("--tie", multiple=True, metavar="GLOB", help="Layers that have to share a pattern."),
    click.option("--tie-channels", is_flag=True, help="Tie layers whose outputs are added up."),
    click.option("--max-bytes", type=int, metavar="N", help="Largest size of all packed weights."),
    click.option("--max-macs", type=int, metavar="N", help="Most multiply-accumulates."),
    click.option(
        "--plan-rounds",
        type=click.IntRange(min=0),
        default=3,
        show_default=True,
        metavar="N",
        help="Plans to build and measure; 0 trusts the costs.",
    ),
    click.option(
        "--measure-seconds",
        type=click.FloatRange(min=0),
        default=20.0,
        show_default=True,
        metavar="S",
        help="How long to measure costs.",
    ),
)
"""The options that say what a plan is to achieve and where its costs come from."""


def has_goal(options: dict[str, Any]) -> bool:
    """Tell whether the options ask for planning."""
    return any(options[name] is not None for name in ("budget", "speedup", "max_loss"))


def make_planned(model: Path, options: dict[str, Any], progress: Callable[[str], None]) -> Planned:
    """Plan a model with the options of `goal_options`, and what `tvm-nm compile` has under the same names."""
    from tvm_nm.constraints import Constraints
    from tvm_nm.cost_measure import DEFAULT_DENSITIES, DEFAULT_PATTERNS, CandidateGrid
    from tvm_nm.errors import PlanError
    from tvm_nm.inventory import inventory
    from tvm_nm.plan_model import plan_model
    from tvm_nm.planning import Goal, parse_rules

    goal = Goal(options["budget"], options["speedup"], options["max_loss"])
    grid = None
    if options["patterns"] or options["densities"]:
        patterns = options["patterns"].split(",") if options["patterns"] else DEFAULT_PATTERNS
        try:
            densities = (
                tuple(float(text) for text in options["densities"].split(","))
                if options["densities"]
                else DEFAULT_DENSITIES
            )
        except ValueError:
            raise PlanError(f"--densities {options['densities']!r} are not numbers such as 0.5,0.25") from None
        grid = CandidateGrid.make(patterns, densities)
    tied: tuple[tuple[str, ...], ...] = ()
    if options["tie"]:
        from tvm_nm.frontend import import_onnx
        from tvm_nm.planning import matching_names

        names = [layer.name for layer in inventory(import_onnx(model, shapes=options["shapes"], verify=False).module)]
        tied = tuple(matching_names(names, glob) for glob in options["tie"])
    rules = parse_rules(options["min_density"], options["max_density"], options["allow"])
    return plan_model(
        model,
        goal,
        costs=options["costs"],
        grid=grid,
        include=options["include"],
        exclude=options["exclude"],
        metric=options["metric"],
        constraints=Constraints(rules, tied, options["max_bytes"], options["max_macs"]),
        images=options["images"],
        trials=options["trials"] if options["search"] else 0,
        method=options["method"],
        reconstruction=options["reconstruction"],
        tie_channels=options["tie_channels"],
        database=options["database"],
        shipped_records=not options["untuned"],
        rounds=options["plan_rounds"],
        seconds=options["measure_seconds"],
        threads=options["threads"],
        target=options["target"],
        shapes=options["shapes"],
        progress=progress,
    )


@click.command("plan")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OutputFile("plan"), metavar="FILE", help="Write the plan.")
@goal_options
@include_option
@exclude_option
@method_option
@calibration_options
@database_option
@untuned_option
@click.option("--front", type=OutputFile("front"), metavar="FILE", help="Write the whole Pareto front as JSON.")
@click.option("--plot", type=OutputFile("plot"), metavar="FILE", help="Draw it: .svg, .png or .html.")
@click.option("--check", type=click.Path(path_type=Path), metavar="PLAN", help="Check a plan against MODEL instead.")
@click.option("--diff", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="Compare two plans instead.")
@threads_option
@click.option("--target", metavar="JSON", help="TVM target. [default: this machine]")
@shape_option
@json_option
def plan_command(
    model: Path | None,
    output: Path | None,
    front: Path | None,
    plot: Path | None,
    check: Path | None,
    diff: tuple[Path, Path] | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Choose pattern and density of every layer of MODEL.onnx for the least loss within a time budget.

    Measures what layers take at each candidate, plans, builds the plan, measures it beside the dense network, corrects
    and plans again until the measured time meets the budget.
    """
    options["images"] = calibration_images(options.pop("calib"), options.pop("calib_images"), options.pop("preprocess"))
    options["shapes"] = parse_shape_options(options["shapes"])
    if diff:
        _diff(*diff, json_file)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    if check is not None:
        _check(check, model, options)
        return
    from tvm_nm.plan_report import check_plot, plan_summary, plan_table, plot_front
    from tvm_nm.report import to_text

    if plot is not None:
        check_plot(plot)
    with Steps() as steps:
        planned = make_planned(model, options, steps)
    if json_file != "-":
        click.echo(to_text(plan_table(planned.plan, planned.table, planned.metric)))
        click.echo(plan_summary(planned))
    if output is not None:
        planned.plan.save(output)
    if front is not None:
        from tvm_nm.json_file import write_text

        write_text(front, json.dumps(planned.front_dict(), indent=1) + "\n", "front")
    if plot is not None:
        plot_front(planned.front_dict(), plot)
    emit_json(planned.to_dict(), json_file)
    if json_file != "-":
        for path in (output, front, plot):
            if path is not None:
                click.echo(f"written to {path}")


def _check(path: Path, model: Path, options: dict[str, Any]) -> None:
    from tvm_nm.fingerprint import model_sha256
    from tvm_nm.frontend import import_onnx
    from tvm_nm.inventory import inventory
    from tvm_nm.plan import Plan
    from tvm_nm.plan_check import check_plan
    from tvm_nm.targets import resolve_target

    plan = Plan.load(path)
    threads = options["threads"]
    if threads is None and plan.origin is not None:
        threads = plan.origin.threads
    imported = import_onnx(model, shapes=options["shapes"], verify=False)
    check_plan(plan, inventory(imported.module), model_sha256(imported), resolve_target(options["target"], threads))
    made = "" if plan.origin is not None else "; it does not say which model and target it was made for"
    click.echo(f"{path} can be applied to {model}{made}")


def _diff(first: Path, second: Path, json_file: str | None) -> None:
    from tvm_nm.plan import Plan
    from tvm_nm.plan_check import diff_plans
    from tvm_nm.plan_report import choice_label, difference_table, origin_differences
    from tvm_nm.report import to_text

    before, after = Plan.load(first), Plan.load(second)
    found, lines = diff_plans(before, after), origin_differences(before.origin, after.origin)
    layers = [
        {"name": item.name, "before": choice_label(item.before), "after": choice_label(item.after)} for item in found
    ]
    emit_json({"layers": layers, "origin": lines}, json_file)
    if json_file == "-":
        return
    for line in lines:
        click.echo(line)
    if found:
        click.echo(to_text(difference_table(found)), nl=False)
    else:
        click.echo("the plans choose the same for every layer")
