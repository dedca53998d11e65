"""The command ``tvm-nm bench``."""

from __future__ import annotations

from pathlib import Path

import click

from tvm_nm.cli_options import emit_json, json_option, print_table, run_threads_option
from tvm_nm.console import Steps

__all__ = ["bench_command"]

# As in cli.py, functions import what they need themselves.


@click.command("bench")
@click.argument("artifact", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="MODEL", help="ONNX model for onnxruntime to run.")
@run_threads_option
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True, help="Blocks of calls.")
@click.option("--layers", is_flag=True, help="Show each layer's time and what its sparse kernel gains.")
@click.option("--update-report", is_flag=True, help="Write the layers' times into the artefact's report.txt.")
@json_option
def bench_command(
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
    from tvm_nm.json_file import check_writable, write_text
    from tvm_nm.report import layer_times_table, report_text, timing_table
    from tvm_nm.runtime import load

    with Steps() as steps:
        steps("loading")
        model = load(artifact, threads=threads)
        if update_report:
            check_writable(artifact / REPORT, "report")
        result = model.benchmark(against, rounds=rounds, layers=layers or update_report, progress=steps)
    if json_file != "-":
        if layers:
            print_table(layer_times_table(result.layers))
            click.echo()
        print_table(timing_table(result.timings))
    emit_json(result.to_dict(), json_file)
    if update_report:
        write_text(artifact / REPORT, report_text(model.manifest, result.layers), "report")
