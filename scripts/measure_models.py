"""Build models in several sparsity patterns and measure them beside onnxruntime.

    python scripts/measure_models.py resnet50.onnx vgg16.onnx --variants dense 1x16@0.5 --threads 1,2 --json out.json
    python scripts/measure_models.py light:squeezenet model.onnx --errors    # only the largest errors, no timing

Every build runs in a process of its own (its time and peak memory are measured there) and is checked against
onnxruntime running the pruned model. Then all builds of a model and onnxruntime running the dense one take turns in one
process; a speed is the median of the rounds' ratios. `light:NAME` is a model of the onnx wheel with random weights
filled in. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VARIANTS = ("dense", "1x16@0.5", "1x4@0.5", "2:4")


def model_file(name: str, folder: Path) -> Path:
    if not name.startswith("light:"):
        return Path(name).resolve()
    import onnx

    from tests.models import light_model

    path = folder / f"light_{name.removeprefix('light:')}.onnx"
    onnx.save(light_model(name.removeprefix("light:")), path)
    return path


def high_water_kb(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def build(model: Path, variant: str, threads: int, folder: Path) -> dict[str, Any]:
    """Build in a child process; returns the manifest with `seconds` and `peak_mb` of that process."""
    pattern, _, density = variant.partition("@")
    output = folder / f"{model.stem}-{variant.replace(':', '_')}-{threads}"
    command = [sys.executable, "-m", "tvm_nm", "compile", str(model), "-o", str(output), "--threads", str(threads)]
    command += ["--pattern", pattern, *(["--density", density] if density else [])]
    start, peak_kb = time.perf_counter(), 0
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages, cwd=ROOT)
        while process.poll() is None:
            # Not ru_maxrss: that counts the memory of this process, of which the child is a fork.
            peak_kb = max(peak_kb, high_water_kb(process.pid))
            time.sleep(0.02)
        messages.seek(0)
        if process.returncode:
            raise SystemExit(f"building {model.name} {variant} failed:\n{messages.read().decode()}")
    manifest = json.loads((output / "manifest.json").read_text())
    return {
        "directory": str(output),
        "seconds": time.perf_counter() - start,
        "peak_mb": peak_kb * 1024 / 1e6,
        "library_mb": manifest["library_bytes"] / 1e6,
        "verification": manifest["verification"],
        "sparse_layers": sum(layer["pattern"] != "dense" for layer in manifest["layers"]),
        "layers": len(manifest["layers"]),
    }


def measure(model: Path, builds: dict[str, dict[str, Any]], threads: int, rounds: int) -> dict[str, Any]:
    from tvm_nm.bench import measure as take_turns
    from tvm_nm.bench import onnxruntime_runner
    from tvm_nm.reference_run import random_inputs
    from tvm_nm.runtime import load

    loaded = {variant: load(built["directory"]) for variant, built in builds.items()}
    inputs = random_inputs(next(iter(loaded.values())).inputs)
    contestants = {"onnxruntime": onnxruntime_runner(model, inputs, threads)}
    contestants |= {variant: (lambda m=compiled: m(inputs)) for variant, compiled in loaded.items()}
    times = take_turns(contestants, rounds=rounds)
    base = np.asarray(times["onnxruntime"])
    return {
        name: {
            "median": float(np.median(blocks)),
            "min": min(blocks),
            "speed": float(np.median(base / np.asarray(blocks))),  # of each round: the machine's clock moves
        }
        for name, blocks in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="PATTERN[@DENSITY]")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--errors", action="store_true", help="check only, no timing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="measure-") as name:
        folder = Path(name)
        if options.errors:
            print("| model | " + " | ".join(options.variants) + " |\n|---|" + "---|" * len(options.variants))
        else:
            print("| model | threads | build | median ms | min ms | speed | max rel. error | build s | peak MB |")
            print("|---|---|---|---|---|---|---|---|---|")
        for text in options.models:
            model = model_file(text, folder)
            for threads in [int(count) for count in options.threads.split(",")][: 1 if options.errors else None]:
                builds = {variant: build(model, variant, threads, folder) for variant in options.variants}
                row: dict[str, Any] = {"model": model.stem, "threads": threads, "builds": builds}
                if options.errors:
                    errors = [f"{b['verification']['max_rel']:.1e}" for b in builds.values()]
                    print(f"| {model.stem} | " + " | ".join(errors) + " |", flush=True)
                else:
                    row["times"] = times = measure(model, builds, threads, options.rounds)
                    base = times["onnxruntime"]
                    print(
                        f"| {model.stem} | {threads} | onnxruntime | {base['median']:.2f} | {base['min']:.2f} | | | | |"
                    )
                    for variant, built in builds.items():
                        t = times[variant]
                        print(
                            f"| {model.stem} | {threads} | {variant} | {t['median']:.2f} | {t['min']:.2f} "
                            f"| {t['speed']:.2f}x | {built['verification']['max_rel']:.1e} "
                            f"| {built['seconds']:.0f} | {built['peak_mb']:.0f} |",
                            flush=True,
                        )
                results.append(row)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
