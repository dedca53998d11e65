"""Top-1 of a classifier after fine-tuning, pruned and dense, all trained equally long.

    python scripts/finetune_study.py resnet20.onnx --train train.npz --test test.npz --augment shift=4,flip \
        --epochs 1.5 --work study/
    python scripts/finetune_study.py reference --epochs 1.5 --work study/      # the embedded network, Fashion-MNIST

Each pattern, or plan file (--patterns "2:4" "fast.plan.json"), starts from one-shot pruning (OBS) on unlabelled
training images; --pruned NAME=FILE adds a network that is pruned already. The dense network is trained first, by
the labels; pruned networks by the labels, and, as a second column, half by its answers (--distill 0 leaves that out).
The data are .npz files with `images` and `labels`; for `reference` Fashion-MNIST's IDX files in --fashion-mnist.

Everything that is done lies in --work: the same command goes on where it was stopped. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from tvm_nm.agreement import top1_interval
from tvm_nm.calibration import ArrayImages, CalibrationImages, open_images
from tvm_nm.evaluation import answers_of_onnx, compare
from tvm_nm.json_file import write_text
from tvm_nm.preprocessing import Preprocessing
from tvm_nm.pruning import PruneRequest, prune_file
from tvm_nm.reference import preprocess, reference_model_path
from tvm_nm.torch import Augmentation, Objective, TrainingOptions, train
from tvm_nm.torch.finetune import input_shape
from tvm_nm.torch.network_stage import block_borders
from tvm_nm.torch.progress import TrainingProgress


@dataclass(frozen=True, slots=True)
class Study:
    """What all rows share.

    Attributes
    ----------
    model
        The dense network as it was given.
    images, test
        With labels.
    calibration
        Images for one-shot pruning.
    options
        Of all trainings.
    distill
        Share of distillation in the second column.
    work
        Folder of everything that is done.
    """

    model: Path
    images: CalibrationImages
    test: CalibrationImages
    calibration: CalibrationImages
    options: TrainingOptions
    distill: float
    work: Path

    def pruned(self, text: str) -> Path:
        """Return the network pruned one-shot to `PATTERN@DENSITY`, or as a plan file says."""
        path = self.work / f"{_stem(text)}.onnx"
        if path.is_file():
            return path
        if text.endswith(".json"):
            prune_file(self.model, path, PruneRequest.make("dense"), images=self.calibration, plan=text)
        else:
            form, _, density = text.partition("@")
            request = PruneRequest.make(form, float(density) if density else None)
            prune_file(self.model, path, request, images=self.calibration)
        return path

    def taken(self, name: str, source: Path) -> Path:
        """Return a network that was pruned elsewhere, as it was when the study began."""
        path = self.work / f"{_stem(name)}.onnx"
        if not path.is_file():
            path.write_bytes(source.read_bytes())
        return path

    def top1(self, path: Path) -> float:
        """Return a network's top-1 on the test images, in onnxruntime."""
        record = path.with_suffix(".json")
        if not record.is_file():
            answers = answers_of_onnx(onnx.load(path), self.test)
            score = compare(answers, answers, self.test)
            write_text(record, json.dumps({"top1": score.top1, "images": score.images}), "score")
        return float(json.loads(record.read_text())["top1"])

    def trained(self, start: Path, seed: int, teacher: Path | None = None) -> Path:
        """Return a network after training, by the labels or half by the answers of another."""
        how = f"trained-{seed}" if teacher is None else f"distilled-{seed}"
        path = self.work / f"{start.stem}-{how}.onnx"
        if path.is_file():
            return path
        dense = None if teacher is None else onnx.load(teacher)
        objective = replace(self.options.objective, distillation=self.distill if dense else 0.0)
        options = replace(self.options, seed=seed, objective=objective)
        print(f"training {path.stem}", flush=True)
        with TrainingProgress() as progress:
            done = train(
                onnx.load(start),
                self.images,
                options,
                dense=dense,
                activations=block_borders(dense) if dense and objective.activations else (),
                checkpoint=path.with_suffix(".checkpoint"),
                progress=progress.status,
            )
        onnx.save(done.model, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an ONNX file, or `reference`")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--preprocess", type=Preprocessing.parse)
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--patterns", nargs="*", default=["2:4", "1x4p@0.5", "1x16p@0.5"], help="and plan files")
    parser.add_argument("--pruned", nargs="+", default=[], metavar="NAME=FILE", help="ONNX files with zeros in them")
    parser.add_argument("--calib-images", type=int, default=1024)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--batch-norm", choices=("keep", "insert", "freeze"), default="insert")
    parser.add_argument("--augment", type=Augmentation.parse, default=Augmentation())
    parser.add_argument("--distill", type=float, default=0.5)
    parser.add_argument("--distill-only", action="store_true", help="leave out pruned networks trained by the labels")
    parser.add_argument(
        "--activations", type=float, default=0.0, help="weight of the teacher's activations, with --distill"
    )
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, help="training and test images to use; all by default")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    if args.model != "reference" and not (args.train and args.test):
        parser.error("--train and --test are needed")
    pruned = [(name, Path(file)) for name, _, file in (text.partition("=") for text in args.pruned)]
    for _, path in [*pruned, *(("", Path(text)) for text in args.patterns if text.endswith(".json"))]:
        if not path.is_file():
            parser.error(f"there is no file {path}")

    args.work.mkdir(parents=True, exist_ok=True)
    model = reference_model_path() if args.model == "reference" else Path(args.model)
    images, test, calibration = open_data(args, input_shape(onnx.load(model)))
    options = TrainingOptions(
        epochs=args.epochs,
        batch=args.batch,
        learning_rate=args.lr,
        objective=Objective(label_smoothing=args.label_smoothing, activations=args.activations),
        augmentation=args.augment,
        batch_norm=args.batch_norm,
        device=args.device,
    )
    study = Study(model, images, test, calibration, options, args.distill, args.work)
    settings = repr((model.name, options, images.count, args.distill, args.calib_images))
    check_settings(args.work / "settings.txt", settings)

    dense = study.work / "dense.onnx"
    dense.write_bytes(model.read_bytes())
    rows = [("dense", dense), *((text, study.pruned(text)) for text in args.patterns)]
    rows += [(name, study.taken(name, path)) for name, path in pruned]
    print(
        f"\n{model.stem}: {args.epochs:g} epochs of {images.count} images, {test.count} test images "
        f"(standard error {top1_interval(study.top1(dense), test.count):.2%}), {len(args.seeds)} seed(s)\n",
        flush=True,
    )
    table = ["| pattern | one-shot | fine-tuned | to dense | distilled | to dense |", "|---" * 6 + "|"]
    teachers = {seed: study.trained(dense, seed) for seed in args.seeds}
    best = float(np.mean([study.top1(path) for path in teachers.values()]))
    for text, start in rows:
        cells = [text, f"{study.top1(start):.2%}"]
        wanted = (True, False) if text == "dense" else (not args.distill_only, args.distill > 0)
        for distilled in (False, True):
            if not wanted[distilled]:
                cells += ["–", "–"]
                continue
            found = [
                study.top1(study.trained(start, seed, teachers[seed] if distilled else None)) for seed in args.seeds
            ]
            cells += [f"{np.mean(found):.2%}", f"{np.mean(found) - best:+.2%}"]
        table.append(f"| {' | '.join(cells)} |")
        print(f"| {' | '.join(cells)} |", flush=True)
    text = "\n".join(table) + "\n"
    write_text(study.work / "table.md", text, "table")
    print(f"\n{text}")


def open_data(
    args: argparse.Namespace, shape: tuple[int, ...]
) -> tuple[CalibrationImages, CalibrationImages, CalibrationImages]:
    """Open training, test and calibration images."""
    if args.model != "reference":
        images = open_images(args.train, shape, limit=args.limit, preprocessing=args.preprocess)
        test = open_images(args.test, shape, limit=args.limit, preprocessing=args.preprocess)
        calibration = open_images(args.train, shape, limit=args.calib_images, preprocessing=args.preprocess)
    else:
        from train_reference import read_idx

        read = {}
        for split in ("train", "t10k"):
            pixels = read_idx(args.fashion_mnist / f"{split}-images-idx3-ubyte.gz")
            labels = read_idx(args.fashion_mnist / f"{split}-labels-idx1-ubyte.gz")
            read[split] = preprocess(pixels), labels.astype(np.int64)
        images, test = (ArrayImages(*read[split], limit=args.limit) for split in ("train", "t10k"))
        calibration = ArrayImages(read["train"][0], limit=args.calib_images)
    for name, data in (("training", images), ("test", test)):
        if data.labels is None:
            raise SystemExit(f"finetune_study: the {name} images have no labels")
    return images, test, calibration


def check_settings(path: Path, settings: str) -> None:
    """Remember what the results in a folder were made with, and refuse others."""
    if path.is_file() and path.read_text() != settings:
        raise SystemExit(f"finetune_study: {path.parent} holds results of other settings; choose another --work")
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(settings)
    Path(file.name).replace(path)


def _stem(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text.removesuffix(".json").rpartition("/")[2])


if __name__ == "__main__":
    main()
