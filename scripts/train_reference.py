#!/usr/bin/env python3
"""Train the reference network that tvm_nm ships and write it with its data and model card.

Needs PyTorch (``pip install 'tvm-nm[torch]'``) and Fashion-MNIST's four ``*-ubyte.gz`` files, on Debian and Ubuntu
``apt-get install dataset-fashion-mnist``. It takes about 20 minutes on two idle cores with AMX or AVX-512 BF16. One
seed and one thread count give the same network on the same machine.

The network is a small ResNet with what compiled CNNs are made of: 3x3 convolutions in 32, 64 and 128 channels, identity
and projected shortcuts, and a depthwise-separable step down.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from tvm_nm.reference import PIXEL_MEAN, PIXEL_STD, ReferenceCard, preprocess

try:
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.nn.utils.fusion import fuse_conv_bn_eval
except ImportError as error:
    raise SystemExit(f"train_reference: {error}: install PyTorch with: pip install 'tvm-nm[torch]'") from error

REPOSITORY = Path(__file__).resolve().parents[1]
CALIBRATION_IMAGES = 512
EMBEDDED_TEST_IMAGES = 2000
BATCH = 128
EVALUATION_BATCH = 500
PEAK_LEARNING_RATE = 0.2
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.05
AVERAGE_DECAY = 0.998  # the weights that are shipped are a mean over the last ~500 steps
MAX_SHIFT = 2  # pixels
LICENSE = """\
The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


class ConvBN(nn.Module):
    """Convolution without bias, batch normalisation, and ReLU unless `relu` is false."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        if self.conv.groups > 1 and x.dtype == torch.bfloat16:
            # The gradient of a strided depthwise convolution is 30 times slower in bfloat16 than in float32.
            with torch.autocast("cpu", enabled=False):
                return self.relu(self.bn(self.conv(x.float())))
        return self.relu(self.bn(self.conv(x)))


class Residual(nn.Module):
    """ResNet's basic block; the shortcut is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvBN(inputs, outputs, 3, stride)
        self.second = ConvBN(outputs, outputs, 3, relu=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvBN(inputs, outputs, 1, stride, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


class ReferenceNet(nn.Module):
    """(N, 1, 28, 28) to (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 32, 3)
        self.block1 = Residual(32, 32)
        self.block2 = Residual(32, 64, stride=2)
        self.block3 = Residual(64, 64)
        self.depthwise = ConvBN(64, 64, 3, stride=2, groups=64)
        self.pointwise = ConvBN(64, 128, 1)
        self.block4 = Residual(128, 128)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        x = self.block3(self.block2(self.block1(self.stem(x))))
        x = self.block4(self.pointwise(self.depthwise(x)))
        return self.classifier(self.flatten(self.pool(x)))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one gzipped IDX file of unsigned bytes: images (N, 28, 28) or labels (N,)."""
    if not path.is_file():
        raise SystemExit(f"train_reference: {path} is missing: apt-get install dataset-fashion-mnist, or set --data")
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise SystemExit(f"train_reference: {path} is not an IDX file of unsigned bytes")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(*map(int, shape))


def augment(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Shift each image by up to `MAX_SHIFT` pixels each way, over background, and mirror half of them."""
    count, _, height, width = images.shape
    background = -PIXEL_MEAN / PIXEL_STD
    padded = functional.pad(images[:, 0], (MAX_SHIFT,) * 4, value=background)
    shift = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count, 1), generator=random)
    rows = torch.arange(height) + shift[0]
    columns = torch.arange(width) + shift[1]
    mirrored = torch.randint(0, 2, (count, 1), generator=random).bool()
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    return padded[index][:, None]


def train(
    images: torch.Tensor, labels: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor], epochs: int, seed: int
) -> ReferenceNet:
    """Train with SGD on a one-cycle schedule; return the running mean of the weights, in evaluation mode."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    net = ReferenceNet().to(memory_format=torch.channels_last)
    average = copy.deepcopy(net).eval()
    # Weight decay is for convolution and classifier weights: it only disturbs biases and normalisations.
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=PEAK_LEARNING_RATE, momentum=0.9, nesterov=True)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps, pct_start=0.2, cycle_momentum=False
    )
    begin = time.monotonic()
    for epoch in range(epochs):
        net.train()
        order = torch.randperm(len(images), generator=random)
        total = 0.0
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            batch = augment(images[chosen], random)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(batch)
            loss = functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done = epoch * steps + step
            update_average(average, net, min(AVERAGE_DECAY, done / (done + 10)))
            total += loss.item()
        accuracy = evaluate(average, *test)
        print(
            f"epoch {epoch + 1:>3}/{epochs}  loss {total / steps:.4f}  test top-1 {accuracy:.4f}"
            f"  {time.monotonic() - begin:.0f} s",
            flush=True,
        )
    return average


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Move `average`, weights and normalisation statistics, towards `net` by the share 1 - `decay`."""
    for mean, value in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def evaluate(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in bfloat16, to show progress: what is reported in the end is measured on the ONNX file."""
    right = sum(
        int((net(images[i : i + EVALUATION_BATCH]).argmax(1) == labels[i : i + EVALUATION_BATCH]).sum())
        for i in range(0, len(images), EVALUATION_BATCH)
    )
    return right / len(images)


def fold_batch_norms(net: ReferenceNet) -> ReferenceNet:
    """Return a copy with every batch normalisation folded into its convolution, so that ONNX names are module paths."""
    folded = copy.deepcopy(net).eval()
    for module in folded.modules():
        if isinstance(module, ConvBN):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return folded.to(memory_format=torch.contiguous_format)


def count_macs(net: nn.Module) -> int:
    """Multiply-accumulates of one image in convolutions and fully connected layers."""
    macs = 0

    def add(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net(torch.zeros(1, 1, 28, 28))
    for hook in hooks:
        hook.remove()
    return macs


def export(net: nn.Module, path: Path) -> None:
    """Write `net` as ONNX with a symbolic batch axis and check the file."""
    with warnings.catch_warnings():
        # Only this exporter names nodes by their module paths.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            net,
            (torch.zeros(1, 1, 28, 28),),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )
    onnx.checker.check_model(onnx.load(path), full_check=True)


def run_onnx(path: Path, images: NDArray[np.float32], threads: int) -> NDArray[np.float32]:
    """Logits of all images in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate(
        [session.run(["logits"], {"input": part})[0] for part in np.split(images, len(images) // EVALUATION_BATCH)]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train tvm_nm's reference network on Fashion-MNIST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="IDX files")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tvm_nm" / "data", help="folder to write to")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch and onnxruntime")
    parser.add_argument("--min-top1", type=float, default=0.91, help="write nothing below this test top-1")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or arguments.threads < 1:
        parser.error("--epochs and --threads must be positive")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    train_images = read_idx(arguments.data / "train-images-idx3-ubyte.gz")
    train_labels = read_idx(arguments.data / "train-labels-idx1-ubyte.gz")
    test_images = read_idx(arguments.data / "t10k-images-idx3-ubyte.gz")
    test_labels = read_idx(arguments.data / "t10k-labels-idx1-ubyte.gz").astype(np.int64)

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any, and it costs a sixth
    test_inputs = preprocess(test_images)
    net = train(
        torch.from_numpy(preprocess(train_images)),
        torch.from_numpy(train_labels.astype(np.int64)),
        (torch.from_numpy(test_inputs), torch.from_numpy(test_labels)),
        arguments.epochs,
        arguments.seed,
    )
    folded = fold_batch_norms(net)

    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out, prefix=".train_reference-") as folder:
        stage = Path(folder)
        export(folded, stage / "reference.onnx")
        logits = run_onnx(stage / "reference.onnx", test_inputs, arguments.threads)
        with torch.no_grad():
            expected = net(torch.from_numpy(test_inputs[:EVALUATION_BATCH])).numpy()
        error = float(np.abs(logits[:EVALUATION_BATCH] - expected).max())
        if error > 1e-3:
            print(f"train_reference: onnxruntime is {error:.2g} off PyTorch; nothing written", file=sys.stderr)
            return 1
        right = logits.argmax(1) == test_labels
        card = ReferenceCard(
            dataset="Fashion-MNIST",
            dataset_license="MIT",
            input_shape=(1, 28, 28),
            pixel_mean=PIXEL_MEAN,
            pixel_std=PIXEL_STD,
            top1_test=round(float(right.mean()), 4),
            top1_embedded=round(float(right[:EMBEDDED_TEST_IMAGES].mean()), 4),
            parameters=sum(p.numel() for p in folded.parameters()),
            macs=count_macs(folded),
            epochs=arguments.epochs,
            seed=arguments.seed,
        )
        print(json.dumps(asdict(card), indent=2))
        if card.top1_test < arguments.min_top1:
            print(f"train_reference: top-1 is below {arguments.min_top1}; nothing written", file=sys.stderr)
            return 1
        np.savez_compressed(
            stage / "fashion_mnist.npz",
            calibration_images=train_images[:CALIBRATION_IMAGES],
            test_images=test_images[:EMBEDDED_TEST_IMAGES],
            test_labels=test_labels[:EMBEDDED_TEST_IMAGES].astype(np.uint8),
        )
        (stage / "reference.json").write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
        (stage / "LICENSE.fashion-mnist").write_text(LICENSE, encoding="utf-8")
        for path in sorted(stage.iterdir()):
            os.replace(path, arguments.out / path.name)
            print(f"wrote {arguments.out / path.name}: {(arguments.out / path.name).stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
