"""The command line, ``tvm-nm``."""

from __future__ import annotations

import logging
import sys

import click

from tvm_nm import __version__
from tvm_nm.cli_bench import bench_command
from tvm_nm.cli_compile import compile_command, demo_command
from tvm_nm.cli_evaluate import evaluate_command
from tvm_nm.cli_plan import plan_command
from tvm_nm.cli_prune import inspect_command, prune_command
from tvm_nm.cli_torch import finetune_command, refit_command
from tvm_nm.cli_tune import tune_command
from tvm_nm.console import Group
from tvm_nm.environment import check_environment

# The commands import what they need themselves, so that `tvm-nm --help` need not wait for TVM.

__all__ = ["cli", "main"]


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


for _command in (
    compile_command,
    evaluate_command,
    plan_command,
    tune_command,
    finetune_command,
    refit_command,
    bench_command,
    inspect_command,
    prune_command,
    demo_command,
):
    cli.add_command(_command)
