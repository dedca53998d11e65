"""Which layers compute the same channels."""

from __future__ import annotations

import onnx
from models import Net

from tvm_nm.frontend import import_onnx
from tvm_nm.passes.tied_layers import tied_layers


def tied(model: onnx.ModelProto) -> list[list[int]]:
    """The groups of a model's layers, by their numbers among its convolutions and fully connected layers."""
    names = [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    return [[names.index(name) for name in group] for group in tied_layers(import_onnx(model, verify=False).module)]


def test_a_chain_ties_nothing() -> None:
    net = Net((1, 3, 8, 8))
    x = net.add("Relu", net.conv("input", (8, 3, 3, 3)))
    assert tied(net.model(net.conv(x, (8, 8, 3, 3)))) == []


def test_residual_blocks_tie_their_last_layers_and_what_came_before() -> None:
    net = Net((1, 3, 8, 8))
    x = net.conv("input", (8, 3, 1, 1))  # 0
    for _ in range(2):
        y = net.add("Relu", net.conv(x, (6, 8, 1, 1)))  # 1, 3
        x = net.add("Relu", net.add("Add", net.conv(y, (8, 6, 1, 1)), x))  # 2, 4
    first = net.conv(x, (4, 8, 1, 1))  # 5
    second = net.conv(x, (4, 8, 1, 1))  # 6
    x = net.add("Add", first, second)
    assert tied(net.model(net.conv(x, (3, 4, 1, 1)))) == [[0, 2, 4], [5, 6]]


def test_a_block_whose_input_is_what_it_adds_to() -> None:
    net = Net((1, 8, 8, 8))
    x = net.conv("input", (8, 8, 1, 1))
    x = net.add("Add", x, net.conv(x, (8, 8, 1, 1)))
    x = net.add("Add", x, net.conv(x, (8, 8, 1, 1)))
    assert tied(net.model(net.conv(x, (4, 8, 1, 1)))) == [[0, 1, 2]]


def test_depthwise_layers_are_in_no_group() -> None:
    net = Net((1, 3, 8, 8))
    x = net.conv("input", (8, 3, 1, 1))  # 0
    y = net.conv(x, (8, 1, 3, 3), group=8, pads=[1, 1, 1, 1])  # 1
    y = net.conv(y, (8, 8, 1, 1))  # 2
    x = net.add("Add", x, y)
    assert tied(net.model(net.conv(x, (4, 8, 1, 1)))) == [[0, 2]]


def test_chains_of_shared_channels_make_one_group() -> None:
    net = Net((1, 3, 8, 8))
    convs = [net.conv("input", (4, 3, 1, 1)) for _ in range(4)]
    first, second = net.add("Add", convs[0], convs[1]), net.add("Add", convs[2], convs[3])
    both = net.add("Add", first, second)
    assert tied(net.model(net.conv(both, (2, 4, 1, 1)))) == [[0, 1, 2, 3]]
