"""Measure models, or their layers, in this project and in other runtimes side by side.

    python scripts/bench_peers.py resnet50.onnx --patterns 1x16,2:4 --densities 0.5 --threads 1,2 --json out.json
    python scripts/bench_peers.py resnet50.onnx --layers --sets small-maps fc
    python scripts/bench_peers.py --smoke                     # the embedded model, in seconds

`pip install tvm-nm[bench]` installs the runtimes; those that are missing are skipped. With --artifacts DIR what was
converted and compiled is kept, and --build-only does nothing else. docs/benchmark.md explains the columns and how to
add a runtime.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tvm_nm.errors import TvmNmError  # noqa: E402
from tvm_nm.peers.benchmark import OURS, Settings, bench_layers, bench_models, choose_peers, model_layers  # noqa: E402
from tvm_nm.peers.layers import LAYER_SETS  # noqa: E402
from tvm_nm.peers.models import variants  # noqa: E402
from tvm_nm.peers.table import Contest, heading, markdown, rich_table, to_dict  # noqa: E402


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--threads", type=words, default=["1"], help="numbers of threads, such as 1,2")
    parser.add_argument("--patterns", type=words, default=["1x16"], help="sparsity patterns, such as 1x16,2:4")
    parser.add_argument("--densities", type=words, default=["0.5"], help="of patterns without one, such as 0.5,0.25")
    parser.add_argument("--peers", type=words, help="runtimes to compare with [default: all but optional ones]")
    parser.add_argument("--plugin", type=Path, action="append", default=[], help="Python file that registers a runtime")
    parser.add_argument("--layers", action="store_true", help="measure each distinct layer of the models alone")
    parser.add_argument("--sets", nargs="+", default=[], choices=[*LAYER_SETS, "all"], help="shapes for --layers")
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each contestant")
    parser.add_argument("--block-ms", type=float, default=40.0, help="shortest duration of a block")
    parser.add_argument("--artifacts", type=Path, help="folder to keep what was converted and compiled in")
    parser.add_argument("--build-only", action="store_true", help="convert and compile into --artifacts")
    parser.add_argument("--rebuild", action="store_true", help="compile again with the current code")
    parser.add_argument("--json", type=Path, help="write every block of every contestant")
    parser.add_argument("--markdown", type=Path, help="write the table")
    parser.add_argument(
        "--smoke", action="store_true", help="two short rounds, with the embedded model if none is named"
    )
    found = parser.parse_args()
    if not found.models and not found.smoke and not found.sets:
        parser.error("name a MODEL.onnx, or --layers --sets, or --smoke")
    if found.sets and not found.layers:
        parser.error("--sets needs --layers")
    if found.build_only and not found.artifacts:
        parser.error("--build-only needs --artifacts")
    return found


def measure(chosen: argparse.Namespace, folder: Path, console: Console) -> list[Contest]:
    peers, skipped = choose_peers(chosen.peers, chosen.plugin)
    status = console.status("starting")

    def progress(line: str) -> None:
        # The spinner is drawn by a thread, which would disturb what is measured.
        if line.startswith("measuring"):
            status.stop()
        else:
            status.start()
        status.update(line)

    settings = Settings(
        peers=peers,
        skipped=skipped,
        variants=variants(chosen.patterns, [float(text) for text in chosen.densities]),
        threads=tuple(int(text) for text in chosen.threads),
        folder=folder,
        rounds=chosen.rounds,
        block_ms=chosen.block_ms,
        build_only=chosen.build_only,
        rebuild=chosen.rebuild,
        plugins=tuple(path.resolve() for path in chosen.plugin),
        progress=progress,
    )
    models = chosen.models
    if chosen.smoke:
        settings = replace(settings, rounds=2, block_ms=2.0)
        if not models and not chosen.layers:
            from tvm_nm.reference import reference_model_path

            models = [reference_model_path()]
    try:
        if not chosen.layers:
            return bench_models(models, settings)
        sets = list(LAYER_SETS) if "all" in chosen.sets else chosen.sets
        shapes = [shape for model in models for shape in model_layers(model)]
        shapes += [shape for name in sets for shape in LAYER_SETS[name]]
        return bench_layers(list(dict.fromkeys(shapes)), settings)
    finally:
        status.stop()


def main() -> int:
    chosen = options()
    console = Console(stderr=True)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-peers-") as temporary:
            folder = chosen.artifacts or Path(temporary)
            contests = measure(chosen, folder, console)
    except TvmNmError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        return 130
    if chosen.json:
        chosen.json.write_text(json.dumps(to_dict(contests, OURS), indent=1) + "\n", encoding="utf-8")
    if chosen.markdown:
        chosen.markdown.write_text(markdown(contests, OURS), encoding="utf-8")
    out = Console(width=None if sys.stdout.isatty() else 200)
    for line in heading(contests):
        out.print(line, markup=False, highlight=False)
    out.print(rich_table(contests, OURS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
