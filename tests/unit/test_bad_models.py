"""Every bad model ends in one line that names what is wrong; none in a traceback of somebody else's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Net, small_cnn
from onnx import TensorProto, helper, numpy_helper

from tvm_nm.errors import ModelMismatchError, TvmNmError, UnsupportedModelError
from tvm_nm.frontend import import_onnx, parse_shapes


def refused(model: onnx.ModelProto | str | os.PathLike[str], *words: str, **options: object) -> UnsupportedModelError:
    """Import must fail with one line that has all the words."""
    with pytest.raises(UnsupportedModelError) as caught:
        import_onnx(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return caught.value


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        refused(tmp_path / "none.onnx", "none.onnx", "no such file")

    def test_folder_missing(self, tmp_path: Path) -> None:
        refused(tmp_path / "a" / "b.onnx", "no such file")

    def test_directory(self, tmp_path: Path) -> None:
        refused(tmp_path, "is a directory")

    def test_file_as_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("x")
        refused(tmp_path / "a" / "b.onnx", "cannot be read")

    def test_null_byte(self) -> None:
        refused("a\0.onnx", "cannot be read")

    def test_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.onnx")
        refused(tmp_path / "pipe.onnx", "not a regular file")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_bytes(b"")
        refused(tmp_path / "m.onnx", "empty")

    @pytest.mark.parametrize("content", [b"PK\3\4 a zip file", b"hello", b"\x80\x02}q\0.", bytes(100)])
    def test_not_onnx(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m.onnx").write_bytes(content)
        refused(tmp_path / "m.onnx", "not an ONNX")

    @pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
    def test_truncated(self, tmp_path: Path, part: float) -> None:
        data = small_cnn().SerializeToString()
        (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * part)])
        refused(tmp_path / "m.onnx", "m.onnx")

    def test_too_large(self, tmp_path: Path) -> None:
        with (tmp_path / "m.onnx").open("wb") as file:
            file.truncate(2**31)  # sparse: takes no disk
        refused(tmp_path / "m.onnx", "2147483648 bytes", "limit")

    def test_limit_can_be_set(self, tmp_path: Path) -> None:
        onnx.save(small_cnn(), tmp_path / "m.onnx")
        refused(tmp_path / "m.onnx", "limit of 1000", max_bytes=1000)
        refused(small_cnn(), "limit of 1000", max_bytes=1000)

    @pytest.mark.parametrize("name", [b"input", b"/conv2/Conv", b"conv2", b"Relu", b"w1", b"pads", b"net"])
    def test_names_that_are_no_text(self, tmp_path: Path, name: bytes) -> None:
        data = small_cnn().SerializeToString()
        assert name in data
        (tmp_path / "m.onnx").write_bytes(data.replace(name, b"\xff" + name[1:], 1))
        refused(tmp_path / "m.onnx", "UTF-8")

    def test_other_protobuf(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_bytes(numpy_helper.from_array(np.ones(3, np.float32)).SerializeToString())
        refused(tmp_path / "m.onnx", "m.onnx")


class TestExternalData:
    @staticmethod
    def save(folder: Path, location: str | None = None) -> Path:
        """Save a model with all weights in data.bin, then let the model name another file."""
        folder.mkdir(exist_ok=True)
        path = folder / "m.onnx"
        onnx.save(small_cnn(), path, save_as_external_data=True, location="data.bin", size_threshold=0)
        if location is not None:
            model = onnx.load(path, load_external_data=False)
            for tensor in model.graph.initializer:
                next(e for e in tensor.external_data if e.key == "location").value = location
            path.write_bytes(model.SerializeToString())
        return path

    def test_beside_the_model_is_fine(self, tmp_path: Path) -> None:
        assert import_onnx(self.save(tmp_path)).module is not None

    def test_same_result_as_inside(self, tmp_path: Path) -> None:
        import tvm

        tvm.ir.assert_structural_equal(import_onnx(self.save(tmp_path)).module, import_onnx(small_cnn()).module)

    def test_missing(self, tmp_path: Path) -> None:
        path = self.save(tmp_path)
        (tmp_path / "data.bin").unlink()
        refused(path, "data.bin", "missing")

    @pytest.mark.parametrize("location", ["../data.bin", "sub/../../data.bin", "", ".."])
    def test_outside(self, tmp_path: Path, location: str) -> None:
        (tmp_path / "data.bin").write_bytes(bytes(100_000))
        refused(self.save(tmp_path / "model", location), "initializer")

    def test_absolute(self, tmp_path: Path) -> None:
        path = self.save(tmp_path / "model", str(tmp_path / "model" / "data.bin"))
        refused(path, "not inside the model's folder")

    def test_link_to_outside(self, tmp_path: Path) -> None:
        path = self.save(tmp_path / "model")
        (tmp_path / "model" / "data.bin").rename(tmp_path / "secret.bin")
        (tmp_path / "model" / "data.bin").symlink_to(tmp_path / "secret.bin")
        refused(path, "not inside the model's folder")

    def test_linked_folder_to_outside(self, tmp_path: Path) -> None:
        path = self.save(tmp_path / "model", "sub/data.bin")
        (tmp_path / "other").mkdir()
        (tmp_path / "model" / "data.bin").rename(tmp_path / "other" / "data.bin")
        (tmp_path / "model" / "sub").symlink_to(tmp_path / "other")
        refused(path, "not inside the model's folder")

    def test_directory(self, tmp_path: Path) -> None:
        path = self.save(tmp_path / "model", "sub")
        (tmp_path / "model" / "sub").mkdir()
        refused(path, "missing")

    def test_too_short(self, tmp_path: Path) -> None:
        path = self.save(tmp_path)
        (tmp_path / "data.bin").write_bytes(b"1234")
        refused(path, "needs", "'data.bin'")

    @pytest.mark.parametrize(
        ("key", "value"), [("offset", "-4"), ("offset", "x"), ("length", "1"), ("offset", "9" * 30)]
    )
    def test_bad_extent(self, tmp_path: Path, key: str, value: str) -> None:
        path = self.save(tmp_path)
        model = onnx.load(path, load_external_data=False)
        entries = model.graph.initializer[0].external_data
        for entry in list(entries):
            if entry.key == key:
                entries.remove(entry)
        entries.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())
        refused(path, model.graph.initializer[0].name)

    def test_in_memory(self, tmp_path: Path) -> None:
        refused(onnx.load(self.save(tmp_path), load_external_data=False), "not given as a file")

    def test_counts_towards_the_limit(self, tmp_path: Path) -> None:
        refused(self.save(tmp_path), "limit", max_bytes=5000)


def one_node(op: str, *more: str, domain: str = "", opset: int = 17, **attributes: object) -> onnx.ModelProto:
    net = Net((1, 4, 6, 6), opset=opset)
    x = net.add("Relu", "input")
    out = net.add(op, x, *more, domain=domain, **attributes)
    return net.model(out)


class TestOperators:
    @pytest.mark.parametrize(
        ("op", "words"),
        [
            ("QLinearConv", "quantised models are not supported; export the float32 model"),
            ("QuantizeLinear", "quantised"),
            ("DynamicQuantizeLinear", "quantised"),
            ("ConvInteger", "quantised"),
            ("LSTM", "recurrent"),
            ("SequenceConstruct", "sequences"),
            ("Optional", "sequences"),
            ("RandomNormalLike", "random"),
            ("Bernoulli", "random"),
            ("DeformConv", "no converter"),
            ("NoSuchOperator", "no converter"),
        ],
    )
    def test_named(self, op: str, words: str) -> None:
        error = refused(one_node(op), words, op)
        assert error.op == op
        assert error.node is not None
        assert error.node in str(error)

    @pytest.mark.parametrize("op", ["If", "Loop", "Scan"])
    def test_control_flow(self, op: str) -> None:
        body = helper.make_graph(
            [helper.make_node("Relu", ["input"], ["y"])],
            "body",
            [],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        )
        attributes = {"then_branch": body, "else_branch": body} if op == "If" else {"body": body}
        refused(one_node(op, **attributes), "control flow", op)

    def test_domain(self) -> None:
        model = one_node("FusedConv", domain="com.microsoft")
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        refused(model, "com.microsoft", "FusedConv")

    def test_unused_nodes_do_not_matter(self) -> None:
        net = Net((1, 4, 6, 6))
        net.add("Flatten", "input")
        assert import_onnx(net.model(net.add("Relu", "input"))).outputs[0].shape == (1, 4, 6, 6)

    def test_old_opset(self) -> None:
        refused(one_node("Relu", opset=6), "operator set 6 is too old")

    def test_future_opset(self) -> None:
        with pytest.raises(UnsupportedModelError):
            import_onnx(one_node("Relu", opset=9999))

    def test_no_standard_opset(self) -> None:
        model = one_node("Relu")
        model.opset_import[0].domain = "other"
        refused(model, "standard operator set")

    def test_training_mode(self) -> None:
        net = Net((1, 4, 6, 6))
        refused(net.model(net.batch_norm("input", 4, training_mode=1)), "training mode", "BatchNormalization")
        net = Net((1, 4, 6, 6))
        on = net.constant(np.array(True))
        refused(net.model(net.add("Dropout", "input", net.constant(np.float32(0.5)), on)), "training mode", "Dropout")

    def test_what_tvms_importer_refuses_is_named(self) -> None:
        net = Net((1, 4, 6, 6))
        x = net.add("MaxPool", "input", kernel_shape=[2, 2], outputs=2)
        model = net.model(x)
        model.graph.output.append(helper.make_tensor_value_info(f"{x}_1", TensorProto.INT64, None))
        error = refused(model, "outputs", "MaxPool")
        assert error.node == f"/{x}/MaxPool"

    @pytest.mark.parametrize(
        ("scales", "attributes", "words"),
        [
            ((1, 1, 0.7, 1), {}, "scale 0.7 of 6 pixels gives no whole number"),
            ((1, 2, 1, 1), {}, "only space can be resized"),
            ((1, 1, 0.5, 0.5), {"mode": "linear", "antialias": 1}, "antialias"),
        ],
    )
    def test_resizing_that_tvm_computes_otherwise(
        self, scales: tuple[float, ...], attributes: dict[str, object], words: str
    ) -> None:
        net = Net((1, 4, 6, 6), opset=18)
        values = net.constant(np.array(scales, np.float32))
        refused(net.model(net.add("Resize", "input", "", values, **attributes)), words, "Resize")

    def test_nothing_is_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        net = Net((4, 6))
        ones = net.constant(np.ones(2, np.float32))
        refused(net.model(net.add("Resize", "input", "", ones)), "Resize", "TVM's importer refuses it")
        assert capfd.readouterr() == ("", "")

    def test_messages_hold_no_control_characters(self) -> None:
        model = one_node("No\nSuch\x1b[31mOperator")
        model.graph.node[1].name = "a\r\nb"
        assert str(refused(model)).isprintable()
        net = Net((1, 4, 6, 6))
        net.conv("input", (4, 4, 1, 1))
        net.nodes[-1].name = "red\x1b[31m"
        assert str(import_onnx(net.model(net.nodes[-1].output[0])).module.get_attr("tvm_nm.layers")[0]).isprintable()


class TestTypes:
    @pytest.mark.parametrize(
        ("dtype", "words"),
        [
            (TensorProto.FLOAT16, "float16"),
            (TensorProto.BFLOAT16, "bfloat16"),
            (TensorProto.DOUBLE, "double"),
            (TensorProto.INT8, "quantised"),
            (TensorProto.UINT8, "quantised"),
            (TensorProto.INT64, "int64"),
            (TensorProto.STRING, "string"),
        ],
    )
    def test_input(self, dtype: int, words: str) -> None:
        model = one_node("Identity")
        model.graph.node[0].op_type = "Identity"
        model.graph.input[0].type.tensor_type.elem_type = dtype
        model.graph.output[0].type.tensor_type.elem_type = dtype
        refused(model, words, "'input'")

    def test_inside(self) -> None:
        model = one_node("Cast", to=TensorProto.FLOAT16)
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        refused(model, "float16", "Cast")

    def test_weights_of_half_precision(self) -> None:
        net = Net((1, 4, 6, 6))
        half = net.constant(net.rng.standard_normal((4, 4, 1, 1)).astype(np.float16))
        refused(net.model(net.add("Conv", "input", half)), "Conv")

    def test_strings(self) -> None:
        net = Net((1, 4, 6, 6))
        net.initializers.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"x"]))
        refused(net.model(net.add("Relu", "input")), "strings", "'s'")

    def test_sequence_input(self) -> None:
        model = one_node("Relu")
        kind = helper.make_sequence_type_proto(model.graph.input[0].type)
        model.graph.input[0].type.CopyFrom(kind)
        refused(model, "'input'", "not a tensor")


class TestWeights:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("op", ["Conv", "Gemm", "BatchNormalization"])
    def test_not_finite(self, value: float, op: str) -> None:
        model = small_cnn()
        node = next(n for n in model.graph.node if n.op_type == op)
        tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[-1] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        error = refused(model, "NaN or infinite", tensor.name, op)
        assert error.node == node.name

    def test_negative_variance(self) -> None:
        net = Net((1, 4, 6, 6))
        names = [net.constant(np.full(4, v, np.float32)) for v in (1, 0, 0, -1)]
        refused(net.model(net.add("BatchNormalization", "input", *names)), "negative", "BatchNormalization")

    def test_wrong_length(self) -> None:
        model = small_cnn()
        model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
        refused(model, model.graph.initializer[0].name, "damaged")

    def test_negative_dimension(self) -> None:
        model = small_cnn()
        model.graph.initializer[0].dims[0] = -3
        refused(model, model.graph.initializer[0].name, "negative")

    def test_huge_dimension(self) -> None:
        model = small_cnn()
        model.graph.initializer[0].dims[0] = 2**40
        refused(model, model.graph.initializer[0].name, "limit")

    def test_unknown_data_type(self) -> None:
        model = small_cnn()
        model.graph.initializer[0].data_type = 99
        refused(model, model.graph.initializer[0].name, "data type")

    def test_constant_bomb(self) -> None:
        net = Net((1, 4, 6, 6))
        shape = net.constant(np.array([1 << 20, 1 << 20, 1, 1]))
        refused(net.model(net.add("Conv", "input", net.add("ConstantOfShape", shape))), "limit", "ConstantOfShape")

    def test_constant_bomb_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tvm_nm.onnx_shapes.MAX_MODEL_BYTES", 1_000_000)
        net = Net((1, 4, 100, 100))
        x = "input"
        for _ in range(10):
            x = net.add("Add", x, net.add("ConstantOfShape", net.constant(np.array([1, 4, 100, 100]))))
        refused(net.model(x), "limit")

    def test_constant_bomb_by_broadcasting(self) -> None:
        net = Net((1, 4, 6, 6))
        outer = net.add(
            "Mul", net.constant(np.ones((1, 200_000), np.float32)), net.constant(np.ones((200_000, 1), np.float32))
        )
        refused(net.model(net.add("Add", "input", net.add("ReduceMax", outer))), "limit", "Mul")

    def test_huge_activations(self) -> None:
        net = Net((1, 4, 6, 6))
        wide = net.add("Expand", "input", net.constant(np.array([1 << 30, 1, 1, 1])))
        refused(net.model(net.add("ReduceMax", wide)), "shape [1073741824, 4, 6, 6]", wide)
        net = Net((1, 3, "H", "W"))
        model = net.model(net.conv("input", (4, 3, 1, 1)))
        refused(model, "would have the shape", shapes={"input": (1, 3, 1 << 20, 1 << 20)})

    def test_window_larger_than_the_image(self) -> None:
        net = Net((1, 4, 20))
        x = net.add("MaxPool", "input", kernel_shape=[3])
        refused(net.model(net.add("MaxPool", net.conv(x, (4, 4, 3), dilations=[15]), kernel_shape=[2])), "shape")

    def test_shapes_do_not_fit(self) -> None:
        net = Net((1, 4, 6, 6))
        error = refused(net.model(net.conv("input", (4, 5, 3, 3))), "Conv")
        assert error.node == "/conv3/Conv"

    def test_missing_constant_value(self) -> None:
        net = Net((1, 4, 6, 6))
        refused(net.model(net.add("Add", "input", net.add("Constant", value_string="x"))), "Constant", "no value")


class TestGraphs:
    def test_undefined_name(self) -> None:
        net = Net((1, 4, 6, 6))
        refused(net.model(net.add("Relu", "nobody")), "invalid ONNX model", "nobody")

    def test_unsorted(self) -> None:
        net = Net((1, 4, 6, 6))
        model = net.model(net.add("Relu", net.add("Sigmoid", "input")))
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        refused(model, "invalid ONNX model")

    def test_missing_attribute(self) -> None:
        net = Net((1, 4, 6, 6))
        refused(net.model(net.add("MaxPool", "input")), "kernel_shape")

    def test_unknown_output(self) -> None:
        refused(Net((1, 4, 6, 6)).model("nobody"), "nobody")

    def test_two_nodes_give_one_name(self) -> None:
        net = Net((1, 4, 6, 6))
        x = net.add("Relu", "input")
        net.nodes.append(helper.make_node("Sigmoid", ["input"], [x]))
        refused(net.model(net.add("Relu", x)), "invalid ONNX model")


class TestShapes:
    def test_symbolic_axes_need_a_size(self) -> None:
        net = Net(("N", 3, "H", "W"))
        model = net.model(net.conv("input", (4, 3, 3, 3)))
        refused(model, "axis 2", "'input'", "--shape input:1,3,H,W")
        assert import_onnx(model, shapes={"input": (2, 3, 8, 9)}).outputs[0].shape == (2, 4, 6, 7)

    def test_batch_is_one(self) -> None:
        assert import_onnx(small_cnn()).inputs[0].shape == (1, 3, 16, 16)

    def test_equal_names_get_equal_sizes(self) -> None:
        net = Net(("N", 3, "S", 4))
        net.inputs.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["N", 3, "S", 4]))
        model = net.model(net.add("Add", "input", "b"))
        assert import_onnx(model, shapes={"input": (2, 3, 5, 4)}).inputs[1].shape == (2, 3, 5, 4)
        refused(model, "'S'", shapes={"input": (2, 3, 5, 4), "b": (2, 3, 6, 4)})

    @pytest.mark.parametrize(
        ("shapes", "words"),
        [
            ({"other": (1, 3, 16, 16)}, "no input 'other'; its inputs are 'input'"),
            ({"input": (1, 3, 16)}, "4 axes"),
            ({"input": (1, 3, 32, 32)}, "fixed shape (N, 3, 16, 16)"),
            ({"input": (0, 3, 16, 16)}, "not positive"),
            ({"input": (-1, 3, 16, 16)}, "not positive"),
        ],
    )
    def test_wrong(self, shapes: dict[str, tuple[int, ...]], words: str) -> None:
        refused(small_cnn(), words, shapes=shapes)

    def test_no_rank(self) -> None:
        net = Net((1, 3, 8, 8))
        net.inputs[0].type.tensor_type.ClearField("shape")
        model = net.model(net.conv("input", (4, 3, 3, 3)))
        refused(model, "no shape", "'input'")
        assert import_onnx(model, shapes={"input": (1, 3, 8, 8)}).outputs[0].shape == (1, 4, 6, 6)

    def test_shape_that_depends_on_the_data(self) -> None:
        net = Net((1, 4, 6, 6))
        model = net.model(net.add("Cast", net.add("NonZero", "input"), to=TensorProto.FLOAT))
        refused(model, "depends on the data", "NonZero")

    def test_parse(self) -> None:
        assert parse_shapes(["input:1,3,224,224", "a:0: 2, 5"]) == {"input": (1, 3, 224, 224), "a:0": (2, 5)}

    @pytest.mark.parametrize("text", ["input", "1,3", ":1,3", "x:", "x:1,,3", "x:1,-3", "x:a", "x:1.5", "x:1,3,"])
    def test_parse_wrong(self, text: str) -> None:
        with pytest.raises(ValueError, match="form"):
            parse_shapes([text])

    def test_parse_twice(self) -> None:
        with pytest.raises(ValueError, match="two shapes"):
            parse_shapes(["x:1", "x:2"])


def test_disagreement_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm_nm.frontend.run_onnx", lambda source, inputs: [np.ones((1, 10), np.float32)])
    with pytest.raises(ModelMismatchError, match=r"disagrees with onnxruntime in 'gemm\d+': output 0 differs by"):
        import_onnx(small_cnn())


DATA = small_cnn().SerializeToString()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever happens to the bytes of a file, import ends in a model or in an error of ours."""
    content = bytearray(DATA)
    # The graph's structure is in the first third and the last tenth, the rest is weights.
    structure = st.one_of(st.integers(0, len(content) // 3), st.integers(len(content) * 9 // 10, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(structure)] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    message = ""
    try:
        import_onnx(path)
    except TvmNmError as err:
        message = str(err)
    assert "\n" not in message
