"""What filter rearrangement keeps, how long its search takes, and what it does to top-1 after magnitude pruning.

    python scripts/rearrange_study.py resnet20.onnx --images images.npz --patterns 1x4@0.5 2:4 --markdown

`--images` holds preprocessed inputs `x`, float32 (N, C, H, W), and labels `y`, (N,). All layers that `tvm-nm compile`
prunes by default are pruned. The network is checked to compute the same before pruning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from tvm_nm.frontend import import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.passes.rearrange import rearrange
from tvm_nm.patterns import parse_pattern
from tvm_nm.plan import uniform_plan
from tvm_nm.prune_onnx import prune_onnx
from tvm_nm.pruning import prune_by_plan
from tvm_nm.rearrangement import SEARCHES, check_search
from tvm_nm.reference_run import compare, random_inputs
from tvm_nm.relax_numpy import NumpyModule

_PATTERNS = ("1x4@0.5", "1x4@0.25", "1x16@0.5", "1x16@0.25", "1x4p@0.5", "1x16p@0.5", "2:4", "1:4", "2:4t8", "1:4t8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, help="npz with x and y")
    parser.add_argument("--limit", type=int, help="use so many images")
    parser.add_argument("--patterns", nargs="+", default=_PATTERNS, metavar="PATTERN[@DENSITY]")
    parser.add_argument("--methods", nargs="+", default=SEARCHES, choices=SEARCHES)
    parser.add_argument("--check", action="store_true", help="compare the rearranged dense network with the original")
    arguments = parser.parse_args()
    imported = import_onnx(arguments.model, verify=False)
    data = None
    if arguments.images:
        with np.load(arguments.images) as archive:
            data = archive["x"][: arguments.limit], archive["y"][: arguments.limit]
        print(f"dense: top-1 {_top1(onnx.load(arguments.model), *data):.1f} on {len(data[0])} images")
    print("| pattern | " + " | ".join(arguments.methods) + " |\n|---|" + "---|" * len(arguments.methods))
    for text in arguments.patterns:
        form, _, density = text.partition("@")
        pattern = parse_pattern(form)
        plan = uniform_plan(
            inventory(imported.module), pattern, pattern.check_density(float(density) if density else None)
        )
        cells = []
        for name in arguments.methods:
            method = check_search(name)
            done = rearrange(imported.module, plan, method)
            if arguments.check:
                inputs = [random_inputs(imported.inputs)[spec.name] for spec in imported.inputs]
                found = compare(NumpyModule(done.module)(*inputs), NumpyModule(imported.module)(*inputs))
                if not found.max_rel <= 1e-5:
                    raise SystemExit(f"{text}, {name}: {found.describe()}")
            cell = f"{done.report.kept[1]:.4f} ({done.report.seconds:.1f} s)"
            if data is not None:
                _, masks = prune_by_plan(imported.module, plan, method)
                cell += f" {_top1(prune_onnx(onnx.load(arguments.model), masks), *data):.1f}"
            cells.append(cell)
        print(f"| {pattern} {plan.layers[0].density:.0%} | " + " | ".join(cells) + " |", flush=True)


def _top1(model: onnx.ModelProto, images: np.ndarray, labels: np.ndarray) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    hits = 0
    for start in range(0, len(labels), 50):
        logits = session.run(None, {name: images[start : start + 50]})[0]
        hits += int((logits.reshape(len(logits), -1).argmax(axis=1) == labels[start : start + 50]).sum())
    return 100 * hits / len(labels)


if __name__ == "__main__":
    main()
