from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from models import Net

import tvm_nm
from tvm_nm.cli import cli
from tvm_nm.layer_bench import LayerAlone, layers_alone
from tvm_nm.layer_report import LayerReport
from tvm_nm.layer_shape import LayerShape, layer_model
from tvm_nm.layer_times import LayerTime, mean_share_of_peak, pruned_layers
from tvm_nm.reference_run import TensorSpec, random_inputs, run_onnx
from tvm_nm.report import layer_times_table, to_text
from tvm_nm.runtime import CompiledModel
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

BOUNDS = st.none() | st.floats(-8, 8).map(float)


POOLS = (
    MaxPool(),
    MaxPool((3, 3), (2, 2), (1, 1, 0, 1)),
    MaxPool((3, 2), (3, 2), (0, 0, 2, 1)),
    MaxPool((5, 1), (1, 4)),
)


@given(st.sampled_from([(False, None), (True, None), *((False, pool) for pool in POOLS)]), BOUNDS, BOUNDS)
def test_epilogues_are_read_as_they_are_written(
    residual_or_pool: tuple[bool, MaxPool | None], low: float | None, high: float | None
) -> None:
    residual, pool = residual_or_pool
    epilogue = Epilogue(residual, low, high, pool)
    assert Epilogue.parse(str(epilogue)) == epilogue


@pytest.mark.parametrize(
    "text", ["", "relu", "bias+mul", "bias+relu+add", "bias+clip(1)", "bias+max2x2+relu", "bias+max2", "bias+max2x2p1"]
)
def test_other_texts_are_no_epilogues(text: str) -> None:
    with pytest.raises(ValueError, match="is no epilogue"):
        Epilogue.parse(text)


def test_windows_in_the_padding_alone_are_refused() -> None:
    assert (str(MaxPool()), MaxPool.parse("max3x3s2x2p1,1,1,1")) == ("max2x2", MaxPool((3, 3), (2, 2), (1, 1, 1, 1)))
    for text in ("bias+max2x2p0,2,0,0", "bias+max0x2", "bias+max2x2s0x1"):
        with pytest.raises(ValueError, match=r"padding alone|must be positive"):
            Epilogue.parse(text)
    with pytest.raises(ValueError, match="no pooling"):
        MaxPool.parse("max2")


def test_maxima_and_a_residual_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="residual"):
        Epilogue(True, pool=MaxPool())
    with pytest.raises(ValueError, match="residual"):
        Epilogue.parse("bias+add+max2x2")
    with pytest.raises(ValueError, match="smaller than the pooling"):
        ConvWorkload(1, 3, 4, 1, 8, (1, 1), epilogue=Epilogue(pool=MaxPool()))


@pytest.mark.parametrize(
    "epilogue",
    [
        Epilogue(),
        Epilogue(True, 0.0),
        Epilogue(False, -1.0, 0.5),
        Epilogue(True, None, 0.25),
        Epilogue(False, 0.0, None, MaxPool()),
        Epilogue(False, None, 0.5, MaxPool()),
        Epilogue(False, 0.0, None, MaxPool((3, 3), (2, 2), (1, 0, 1, 2))),
    ],
    ids=str,
)
def test_the_model_of_a_layer_has_its_epilogue(epilogue: Epilogue) -> None:
    shape = LayerShape("conv", (4, 3, 1, 1), (1, 3, 5, 5))
    plain, full = layer_model(shape, Epilogue()), layer_model(shape, epilogue)
    specs = [TensorSpec("input", (1, 3, 5, 5), "float32"), TensorSpec("residual", (1, 4, 5, 5), "float32")]
    inputs = random_inputs(specs[: 2 if epilogue.residual else 1])
    (want,) = run_onnx(plain, {"input": inputs["input"]})
    want = want + inputs["residual"] if epilogue.residual else want
    bounded = (
        np.clip(want, epilogue.clip_min, epilogue.clip_max)
        if str(epilogue).count("(") or "relu" in str(epilogue)
        else want
    )
    (got,) = run_onnx(full, inputs)
    if epilogue.pool is not None and epilogue.pool.is_squares:
        bounded = bounded[:, :, :4, :4].reshape(1, 4, 2, 2, 2, 2).max(axis=(3, 5))
    elif epilogue.pool is not None:
        rows, columns = ((0, 2), (1, 4), (3, 5)), ((0, 3), (2, 5), (4, 5))  # what windows have within the map
        bounded = np.stack(
            [np.stack([bounded[:, :, a:b, c:d].max(axis=(2, 3)) for c, d in columns], axis=-1) for a, b in rows], axis=2
        )
    np.testing.assert_allclose(got, bounded, rtol=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """Two equal sparse convolutions with a residual between, and layers that stay dense."""
    net = Net((1, 3, 14, 14))
    x = net.add("Relu", net.conv("input", (64, 3, 3, 3), pads=[1, 1, 1, 1]))
    for _ in range(2):
        x = net.add("Relu", net.add("Add", net.conv(x, (64, 64, 1, 1)), x))
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    return tvm_nm.compile(
        net.model(net.fc(x, 64, 10)),
        output=tmp_path_factory.mktemp("layers") / "out",
        pattern="1x16",
        density=0.25,
        threads=1,
    )


def test_sparse_layers_are_measured_alone_beside_dense_ones(model: CompiledModel) -> None:
    steps: list[str] = []
    found = layers_alone(model, rounds=2, progress=steps.append)
    sparse = [layer for layer in model.layers if layer.pattern != "dense"]
    assert len(sparse) == 2
    assert list(found) == sparse
    assert steps == ["building 64->64 14x14 k1x1 alone, 1x16 and dense"]  # once for both
    for layer, alone in found.items():
        assert alone.kernel == layer.kernel
        assert alone.dense_kernel != alone.kernel
        assert 0 < alone.time_us < 1e5
        assert alone.speedup > 0.2
        assert 0 < alone.share_of_peak < 1.5
        assert alone.dense_share > alone.share_of_peak / 4
        assert LayerShape.parse(layer.shape).weight_shape == (64, 64, 1, 1)


def test_the_command_shows_and_keeps_the_times(model: CompiledModel, tmp_path: Path) -> None:
    directory, result = tmp_path / "copy", tmp_path / "result.json"
    model.save(directory)
    before = (directory / "report.txt").read_text()
    arguments = ["bench", str(directory), "--layers", "--rounds", "1", "--json", str(result), "--update-report"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    after = (directory / "report.txt").read_text()
    assert after.startswith(before)
    for column in ("of peak", "alone us", "dense us", "gain"):
        assert column in after[len(before) :]
        assert column in done.output
    layers = json.loads(result.read_text())["layers"]
    assert [entry["alone"] is not None for entry in layers if entry["layer"]] == [False, True, True, False]
    assert all(0 < entry["share_of_peak"] < 2 for entry in layers if entry["layer"])
    assert tvm_nm.load(directory).layers == model.layers


def test_the_mean_share_is_that_of_the_layers_with_zeros() -> None:
    def time(name: str, density: float, time_us: float) -> LayerTime:
        return LayerTime(
            name, LayerReport(name, "conv", "", "", "", density, "", "f", 1000, 1, 1, "", ""), 1, time_us, 1.0
        )

    times = [time("a", 0.5, 2.0), time("dense", 1.0, 2.0), time("b", 0.5, 8.0), LayerTime("pool", None, 1, 2.0, 1.0)]
    assert [pruned.name for pruned in pruned_layers(times)] == ["a", "b"]
    assert mean_share_of_peak(pruned_layers(times)) == pytest.approx((0.5 * 0.125) ** 0.5)
    assert mean_share_of_peak([time("not measured", 0.5, 0.0)]) == 0
    row = next(line for line in to_text(layer_times_table(times)).splitlines() if line.startswith("2 pruned layers"))
    assert row.split()[-3:] == ["10.0", "71.4%", "25%"]


def test_the_table_says_why_a_layer_is_dense_and_which_ones_should_be() -> None:
    def report(name: str, pattern: str, note: str = "") -> LayerReport:
        return LayerReport(name, "conv", "8->8", "bias", pattern, 0.5, "fast", "f", 1000, 500, 1, note, "")

    slow = LayerAlone(10.0, 5.0, 0.5, 0.1, 0.2, "other", "direct")
    text = to_text(
        layer_times_table(
            [
                LayerTime("a", report("a", "1x16"), 1, 2.0, 1.0, slow),
                LayerTime("b", report("b", "dense", "1x16: predicted 1.10x the dense kernel's time"), 1, 2.0, 1.0),
                LayerTime("pool", None, 1, 2.0),
            ]
        )
    )
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "50%" in rows["a"]  # 500 useful operations of 1000 in 2 us at 1 GFLOP/s
    assert "0.50x" in rows["a"]
    assert "dense: direct; alone: other; slower than dense: leave it out with --exclude" in rows["a"]
    assert rows["b"].endswith("1x16: predicted 1.10x the dense kernel's time")
