"""The command ``tvm-nm tune``."""

from __future__ import annotations

from pathlib import Path

import click

from tvm_nm.cli_options import emit_json, json_option, parse_shape_options, shape_option, threads_option

__all__ = ["tune_command"]

# It imports what it needs itself, so that `tvm-nm --help` need not wait for TVM.


@click.command("tune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--db", "database", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Tuning database."
)
@click.option("--patterns", default="1x16", show_default=True, metavar="P,P", help="Sparsity patterns, such as 2:4.")
@click.option("--densities", default="0.5", show_default=True, metavar="D,D", help="Shares of weights kept.")
@click.option("--include", multiple=True, metavar="GLOB", help="Tune these layers' sparse kernels, although spared.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Tune these layers only dense; wins over --include.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="M", help="Start no more trials then.")
@click.option(
    "--trials", type=click.IntRange(min=1), metavar="N", help="Most variants to try for a task. [default: 24]"
)
@click.option("--thorough", is_flag=True, help="Try all --trials of every task, also where nothing better is found.")
@threads_option
@click.option("--target", metavar="JSON", help="TVM target, which must run on this machine. [default: this machine]")
@shape_option
@click.option("--retune", is_flag=True, help="Measure anew what the database holds.")
@click.option(
    "--in-network",
    is_flag=True,
    help="At the end, compare each layer's best variants between the other layers of the network, for every pattern"
    " and density.",
)
@json_option
def tune_command(
    model: Path,
    database: Path,
    patterns: str,
    densities: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    minutes: float | None,
    trials: int | None,
    thorough: bool,
    threads: int | None,
    target: str | None,
    shapes: tuple[str, ...],
    retune: bool,
    in_network: bool,
    json_file: str | None,
) -> None:
    """Find the fastest kernel variants for the layers of MODEL.onnx, dense and in each pattern at each density.

    Every time that is measured goes to the database at once: interrupt it whenever you like, and run it again to go on.
    """
    from tvm_nm.report import to_text
    from tvm_nm.tuning.progress import TuningProgress, choice_table, outcome_table, summary_text
    from tvm_nm.tuning.tuner import DEFAULT_TRIALS
    from tvm_nm.tuning.tuner import tune as tune_model

    with TuningProgress() as progress:
        summary = tune_model(
            model,
            database,
            patterns=[part for part in patterns.split(",") if part],
            densities=_densities(densities),
            include=include,
            exclude=exclude,
            threads=threads,
            target=target,
            shapes=parse_shape_options(shapes),
            trials=trials or DEFAULT_TRIALS,
            minutes=minutes,
            thorough=thorough,
            retune=retune,
            in_network=in_network,
            progress=progress,
        )
    if json_file != "-":
        click.echo(to_text(outcome_table(summary)))
        if summary.choices:
            click.echo(to_text(choice_table(summary)))
        click.echo(summary_text(summary))
    emit_json(summary.to_dict(), json_file)


def _densities(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is no list of numbers, such as 0.5,0.25", param_hint="--densities"
        ) from error
