from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LARGE_NAMES, LIGHT, SHARED_NAMES, Net, large_model, light_file, light_model, shared_model, small_cnn
from onnx import TensorProto, helper
from small_models import SMALL_MODELS
from tvm import relax

from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.inventory import inventory, layer_weights
from tvm_nm.reference_run import TensorSpec, compare, random_inputs, run_onnx
from tvm_nm.relax_numpy import NumpyModule


def operators(imported: ImportedModel) -> list[str]:
    return [
        b.value.op.name.removeprefix("relax.").removeprefix("nn.")
        for block in imported.module["main"].body.blocks
        for b in block.bindings
        if isinstance(b.value, relax.Call)
    ]


def names(imported: ImportedModel) -> list[str]:
    return [layer.name for layer in inventory(imported.module)]


class TestSmallModels:
    @pytest.mark.parametrize("name", SMALL_MODELS)
    def test_import_agrees_with_onnxruntime(self, name: str) -> None:
        model = SMALL_MODELS[name]()
        imported = import_onnx(model, verify=False)
        inputs = random_inputs(imported.inputs, seed=1)
        got = NumpyModule(imported.module)(*(inputs[spec.name] for spec in imported.inputs))
        found = compare(got, run_onnx(model, inputs))
        assert found.max_rel < 2e-5, found.describe()
        assert [(spec.shape, spec.dtype) for spec in imported.outputs] == [(g.shape, str(g.dtype)) for g in got]
        assert [spec.name for spec in imported.outputs] == [value.name for value in model.graph.output]
        relax.analysis.well_formed(imported.module)

    @pytest.mark.parametrize("name", ["cnn", "one_dimensional", "explicit_padding", "left_to_tvm", "bounds"])
    def test_compiled_module_agrees_with_the_evaluator(self, name: str) -> None:
        """The evaluator and TVM's own lowering have nothing in common but the module."""
        imported = import_onnx(SMALL_MODELS[name]())
        inputs = [random_inputs(imported.inputs)[spec.name] for spec in imported.inputs]
        compiled = tvm.compile(imported.module, tvm.target.Target({"kind": "llvm"}))
        out = relax.VirtualMachine(compiled, tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
        got = [out.numpy()] if hasattr(out, "numpy") else [o.numpy() for o in out]
        found = compare(got, NumpyModule(imported.module)(*inputs))
        assert found.max_rel < 1e-5, found.describe()

    def test_convolution_with_computed_weight_is_no_layer(self) -> None:
        imported = import_onnx(SMALL_MODELS["computed_weight"]())
        assert names(imported) == []
        assert operators(imported) == ["conv2d", "add"]

    def test_padding_is_folded(self) -> None:
        assert operators(import_onnx(SMALL_MODELS["explicit_padding"]())).count("pad") == 2
        assert "pad" not in operators(import_onnx(SMALL_MODELS["same_upper_and_lower"]()))

    def test_bounds_are_operators(self) -> None:
        imported = import_onnx(SMALL_MODELS["bounds"]())
        assert set(operators(imported)) == {"clip", "maximum", "minimum", "relu"}

    def test_only_convolutions_reshapes_and_pools_are_left(self) -> None:
        assert operators(import_onnx(SMALL_MODELS["one_dimensional"]())).count("reshape") <= 3


class TestNames:
    def test_nodes_name_the_layers(self) -> None:
        model = small_cnn()
        expected = [n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
        imported = import_onnx(model)
        assert names(imported) == expected
        assert list(imported.module.get_attr("tvm_nm.layers")) == expected

    def test_names_lead_to_the_weights(self) -> None:
        """Binding order may differ from node order: the weights tell whether the names do."""
        net = Net((1, 4, 6, 6))
        late, early = net.conv("input", (2, 4, 1, 1), bias=False), net.conv("input", (3, 4, 1, 1), bias=False)
        model = net.model(net.add("Concat", net.add("Relu", early), net.add("Relu", late), axis=1))
        weights = layer_weights(import_onnx(model).module)
        assert {n: w.shape[0] for n, w in weights.items()} == {f"/{late}/Conv": 2, f"/{early}/Conv": 3}

    def test_unnamed_nodes_take_their_outputs_name(self) -> None:
        model = small_cnn()
        expected = [n.output[0] for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
        for node in model.graph.node:
            node.name = ""
        assert names(import_onnx(model)) == expected

    def test_equal_names_are_told_apart(self) -> None:
        model = small_cnn()
        for node in model.graph.node:
            node.name = "same"
        found = names(import_onnx(model, verify=False))  # onnxruntime refuses the model
        assert len(set(found)) == len(found) == 4

    @pytest.mark.parametrize("name", ["input", "a b/c:0", "卷积", "0", "", "if", "main"])
    def test_any_text_will_do(self, name: str) -> None:
        net = Net((1, 4, 6, 6))
        net.conv("input", (4, 4, 1, 1))
        net.nodes[-1].name = name
        model = net.model(net.nodes[-1].output[0])
        assert names(import_onnx(model)) == [name or net.nodes[-1].output[0]]

    def test_input_and_output_names_are_kept(self) -> None:
        imported = import_onnx(SMALL_MODELS["two_inputs"]())
        assert imported.inputs == (
            TensorSpec("input", (1, 4, 6, 6), "float32"),
            TensorSpec("second/in:0", (1, 2, 6, 6), "float32"),
        )
        assert [p.name for p in imported.module["main"].params] == ["input", "second_in_0"]


class TestResult:
    def test_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "some.model.onnx"
        onnx.save(small_cnn(), path)
        for given_path in (path, str(path)):
            imported = import_onnx(given_path)
            assert imported.name == "some.model"
            assert imported.path == path
            assert imported.source == path

    def test_onnx_has_the_fixed_shapes(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        onnx.save(small_cnn(), path)
        for source in (path, small_cnn()):
            imported = import_onnx(source, shapes={"input": (3, 3, 16, 16)})
            dims = imported.onnx.graph.input[0].type.tensor_type.shape.dim
            assert [d.dim_value for d in dims] == [3, 3, 16, 16]
            inputs = random_inputs(imported.inputs)
            want = run_onnx(imported.source, inputs)
            assert compare(run_onnx(imported.onnx, inputs), want).max_abs == 0
            assert want[0].shape == imported.outputs[0].shape == (3, 10)

    def test_the_model_is_not_changed(self) -> None:
        model = small_cnn()
        before = model.SerializeToString(deterministic=True)
        import_onnx(model)
        assert model.SerializeToString(deterministic=True) == before

    def test_verification_can_be_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise AssertionError("onnxruntime was asked")

        monkeypatch.setattr("tvm_nm.frontend.run_onnx", fail)
        assert import_onnx(small_cnn(), verify=False).name == "net"

    def test_slow_modules_stay_out(self) -> None:
        """tvm.s_tir.tensor_intrin takes 40 s to import."""
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import models, tvm_nm.frontend as f;"
            "f.import_onnx(models.small_cnn()); sys.exit('tvm.s_tir.tensor_intrin' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code, str(Path(__file__).parents[1])], check=True, timeout=60)


@st.composite
def convolutions(draw: st.DrawFn) -> onnx.ModelProto:
    """A convolution of one or two spatial axes with every attribute free, a batch norm behind some."""
    rank = draw(st.integers(1, 2))
    group, group_in, group_out = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = [draw(st.integers(1, 5)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 3)) for _ in range(rank)]
    attributes: dict[str, object] = {
        "group": group,
        "dilations": dilations,
        "strides": [draw(st.integers(1, 3)) for _ in range(rank)],
    }
    if draw(st.booleans()):
        attributes["pads"] = [draw(st.integers(0, 3)) for _ in range(2 * rank)]
    elif max(dilations) == 1:  # onnxruntime has no auto_pad with dilation
        attributes["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))
    smallest = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    sizes = [draw(st.integers(s, s + 9)) for s in smallest]
    net = Net((draw(st.integers(1, 2)), group * group_in, *sizes), seed=draw(st.integers(0, 9)))
    x = net.conv("input", (group * group_out, group_in, *kernel), bias=draw(st.booleans()), **attributes)
    if draw(st.booleans()):
        x = net.batch_norm(x, group * group_out)
    return net.model(x)


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_any_convolution(model: onnx.ModelProto) -> None:
    imported = import_onnx(model)
    assert set(operators(imported)) <= {"conv2d", "add", "reshape"}
    assert names(imported) == [model.graph.node[0].name]


@given(
    kind=st.sampled_from(["MaxPool", "AveragePool"]),
    kernel=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    strides=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    extra=st.lists(st.integers(0, 7), min_size=2, max_size=2),
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    include=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_any_pool(
    kind: str, kernel: list[int], strides: list[int], extra: list[int], pads: list[int], include: int
) -> None:
    pads = [min(p, k - 1) for p, k in zip(pads, kernel * 2, strict=True)]
    net = Net((1, 2, kernel[0] + extra[0], kernel[1] + extra[1]))
    more = {"count_include_pad": include} if kind == "AveragePool" else {}
    imported = import_onnx(net.model(net.add(kind, "input", kernel_shape=kernel, strides=strides, pads=pads, **more)))
    assert len(operators(imported)) == 1


class TestRealModels:
    @pytest.mark.parametrize("name", SHARED_NAMES)
    def test_shared(self, name: str) -> None:
        imported = import_onnx(shared_model(name))
        model = onnx.load(imported.source)
        assert sorted(names(imported)) == sorted(n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm"))

    @pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ("vgg19", "zfnet512") else []) for n in LIGHT]
    )
    def test_light_with_random_weights(self, name: str) -> None:
        model = light_model(name)
        imported = import_onnx(model)
        assert len(names(imported)) == sum(n.op_type in ("Conv", "Gemm") for n in model.graph.node)
        assert "batch_norm" not in operators(imported)

    @pytest.mark.parametrize("name", LIGHT)
    def test_light_as_it_is(self, name: str) -> None:
        """The weights are ConstantOfShape nodes; comparing zeros with zeros is left out."""
        imported = import_onnx(light_file(name), verify=False)
        assert len(names(imported)) == sum(
            n.op_type in ("Conv", "Gemm") for n in onnx.load(light_file(name)).graph.node
        )

    @pytest.mark.parametrize("name", LARGE_NAMES)
    def test_large(self, name: str) -> None:
        imported = import_onnx(large_model(name))
        expected = {"mobilenet_v2": 53, "resnet50": 54, "vgg16": 16}[name.removesuffix("_bn")]
        assert len(names(imported)) == expected
        assert not {"batch_norm", "call_tir", "pad"} & set(operators(imported))

    def test_memory_of_vgg16(self) -> None:
        """553 MB of weights: one copy in the module beside onnxruntime's two at most."""
        code = (
            "import sys, tvm_nm.frontend as f; f.import_onnx(sys.argv[1]);"
            "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(large_model("vgg16_bn"))], check=True, timeout=300, capture_output=True
        )
        assert int(done.stdout) < 2_000_000


def test_sparse_initializers() -> None:
    """Both forms of indices."""
    dense = np.zeros((2, 3, 1, 1), np.float32)
    dense[0, 1], dense[1, 2] = 2, 3
    for indices in ([1, 5], [[0, 1, 0, 0], [1, 2, 0, 0]]):
        net = Net((1, 3, 4, 4))
        model = net.model(net.add("Conv", "input", "w"))
        values = helper.make_tensor("w", TensorProto.FLOAT, [2], [2.0, 3.0])
        array = np.array(indices, np.int64)
        where = helper.make_tensor("i", TensorProto.INT64, array.shape, array.reshape(-1))
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, where, [2, 3, 1, 1]))
        imported = import_onnx(model, verify=False)
        np.testing.assert_array_equal(next(iter(layer_weights(imported.module).values())), dense)
