"""Which layers compute the same channels: those whose outputs are added up, as behind the blocks of a ResNet.

Their filters can only change places together (`tvm_nm.passes.rearrange`), which suits both only if their sparsity
patterns are of the same kind.
"""

from __future__ import annotations

import tvm

from tvm_nm.inventory import inventory
from tvm_nm.passes.channel_rules import follow_channels

__all__ = ["tied_layers"]


def tied_layers(mod: tvm.IRModule) -> tuple[tuple[str, ...], ...]:
    """Return groups of layers of a canonical module that share output channels, in call order.

    Layers are in one group if some chain of shared channels leads from one to the other. Depthwise convolutions, which
    compute nothing but their inputs' channels, are in none, and a layer that shares its channels with nobody neither.
    """
    layers = {layer.name: layer for layer in inventory(mod)}
    flow = follow_channels(mod)
    roots = flow.ties.solve().roots
    groups: list[tuple[list[str], set[int]]] = []
    for name, channels in flow.layers.items():
        if 1 < layers[name].groups == len(channels.inputs):
            continue
        names, classes = [name], set(roots[channels.outputs].tolist())
        apart = []
        for group in groups:
            if group[1] & classes:
                names, classes = group[0] + names, group[1] | classes
            else:
                apart.append(group)
        groups = [*apart, (names, classes)]
    order = list(layers)
    found = [tuple(sorted(names, key=order.index)) for names, _ in groups if len(names) > 1]
    return tuple(sorted(found, key=lambda names: order.index(names[0])))
