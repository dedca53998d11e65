"""Top-1 of a classifier that is pruned one-shot, for several patterns and methods.

    python scripts/oneshot_study.py resnet20.onnx --calib train.npz --labelled test.npz \
        --patterns 2:4 1:4 1x4p 1x16p 1x4 1x16 --methods magnitude ls obs

The data are .npz files with `images` and `labels` (or x and y), or folders with one subfolder a class; those for
calibration need no labels. N:M patterns have their own density, others get --density; a pattern may be followed by its
own, as in 1x16p@0.25. Prints a Markdown table of top-1, in brackets how much lower it is than the dense network's,
with the standard error of that difference on the same images, and the CPU seconds that pruning took; and with --json
one object for each network measured. --refit adds a column for each method but magnitude: the network after `tvm-nm
refit` on the same images, with its CPU seconds (needs the extra torch).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from tvm_nm.agreement import Agreement, compare_answers, predict, top1_interval
from tvm_nm.calibration import CalibrationImages, batch_size, open_images
from tvm_nm.onnx_network import OnnxNetwork
from tvm_nm.patterns import parse_pattern
from tvm_nm.preprocessing import Preprocessing
from tvm_nm.pruning import PruneRequest, prune_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True, help="images to calibrate with")
    parser.add_argument("--calib-images", type=int, default=1024)
    parser.add_argument("--labelled", type=Path, required=True, help="images with labels to judge by")
    parser.add_argument("--labelled-images", type=int)
    parser.add_argument("--preprocess", type=Preprocessing.parse)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "1x4p", "1x16p", "1x4", "1x16"])
    parser.add_argument("--methods", nargs="+", default=["magnitude", "ls", "obs"])
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--include", nargs="*", default=[], help="globs of layers that are spared by default")
    parser.add_argument("--rearrange", default="none", help="how channels change places before: none, cluster, swap")
    parser.add_argument("--refit", action="store_true", help="refit the whole network after pruning, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    network = OnnxNetwork(onnx.load(args.model))
    shape = [dim.dim_value for dim in network.model.graph.input[0].type.tensor_type.shape.dim][1:]
    labelled = open_images(args.labelled, shape, limit=args.labelled_images, preprocessing=args.preprocess)
    if labelled.labels is None:
        parser.error(f"{args.labelled} has no labels")
    images = open_images(args.calib, shape, limit=args.calib_images, preprocessing=args.preprocess)
    dense = predict(network.run, labelled, batch_size(shape))
    reference = compare_answers(dense, dense, labelled.labels)
    assert reference.top1 is not None
    margin = top1_interval(reference.top1, labelled.count)
    print(
        f"{args.model.name}: dense {reference.top1:.1%} on {labelled.count} images (standard error {margin:.1%}); "
        f"{images.count} images for calibration\n"
    )
    refitted = [args.refit and method != "magnitude" for method in args.methods]
    columns = []
    for method, more in zip(args.methods, refitted, strict=True):
        columns += [method, f"{method}, refit"] if more else [method]
    print("| pattern | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|", flush=True)
    records = [{"pattern": "dense", "top1": reference.top1, "images": labelled.count}]
    for text in args.patterns:
        form, _, density = text.partition("@")
        cells = []
        for method, more in zip(args.methods, refitted, strict=True):
            share = None if parse_pattern(form).fixed_density is not None else float(density or args.density)
            request = PruneRequest.make(form, share, args.include, method=method, rearrange=args.rearrange)
            stages = measure(args.model, request, images, labelled, dense, more)
            for refit, (found, seconds) in enumerate(stages):
                assert found.top1 is not None
                assert found.drop is not None
                assert found.drop_interval is not None
                error = (found.drop_interval[1] - found.drop) / 1.96  # paired: both networks saw the same images
                cells.append(f"{found.top1:.1%} ({100 * found.drop:+.1f} ± {100 * error:.1f}; {seconds:.0f} s)")
                records.append(
                    {
                        "pattern": form,
                        "density": request.density,
                        "method": method,
                        "rearrange": args.rearrange,
                        "refit": bool(refit),
                        "top1": found.top1,
                        "agreement": found.same,
                        "divergence": found.divergence,
                        "seconds": seconds,
                    }
                )
            if args.json:
                args.json.write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(f"| {form} at {request.density:g} | " + " | ".join(cells) + " |", flush=True)


def measure(
    model: Path,
    request: PruneRequest,
    images: CalibrationImages,
    labelled: CalibrationImages,
    dense: NDArray[np.float64],
    refit: bool,
) -> list[tuple[Agreement, float]]:
    """Prune the model, and refit it if wanted; compare each result with the dense one's answers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        started = time.process_time()
        prune_file(model, path, request, images=images)
        seconds = time.process_time() - started
        stages = [(onnx.load(path), seconds)]
    if refit:
        from tvm_nm.torch.network_stage import reconstruct_network

        started = time.process_time()
        done = reconstruct_network(stages[0][0], onnx.load(model), images)
        stages.append((done.model, time.process_time() - started))
    found = []
    for network, seconds in stages:
        answers = predict(OnnxNetwork(network).run, labelled, batch_size(next(labelled.batches(1)).shape[1:]))
        found.append((compare_answers(dense, answers, labelled.labels), seconds))
    return found


if __name__ == "__main__":
    main()
