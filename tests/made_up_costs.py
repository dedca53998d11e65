"""Cost tables of real models with made-up times."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tvm_nm.cost_measure import TEMPLATE_REVISION
from tvm_nm.costs import Candidate, CostTable, LayerCosts
from tvm_nm.fingerprint import model_sha256, plain_target, structure_digest
from tvm_nm.frontend import import_onnx
from tvm_nm.importance import add_norms
from tvm_nm.inventory import inventory, layer_weights
from tvm_nm.patterns import Dense, OneByN, SparsityPattern
from tvm_nm.plan import prunable_layers
from tvm_nm.targets import resolve_target


def made_up_costs(model: Path, time_us: Callable[[str, int, float], float], blocks: Sequence[int] = (4,)) -> Path:
    """A cost table with made-up times, of a layer by its name, the N of 1xN (1 for dense) and the density."""
    imported = import_onnx(model, verify=False)
    layers = inventory(imported.module)
    prunable = prunable_layers(layers)

    def candidate(name: str, n: int, density: float) -> Candidate:
        pattern: SparsityPattern = OneByN(n) if n > 1 else Dense()
        macs, size = round(1e4 * density), round(4e4 * density)
        return Candidate(pattern, density, time_us(name, n, density), macs=macs, bytes=size)

    costs = []
    for layer in layers:
        options = [(n, density) for n in blocks for density in (0.75, 0.5, 0.25)] if layer.name in prunable else []
        candidates = tuple(candidate(layer.name, n, density) for n, density in [(1, 1.0), *options])
        costs.append(LayerCosts(layer.name, layer.kind, "", "", layer.macs, candidates))
    target = resolve_target(None, 1)
    table = CostTable(
        model=imported.name,
        model_sha256=model_sha256(imported),
        structure=structure_digest(layers),
        target=plain_target(json.loads(str(target))),
        threads=1,
        revision=TEMPLATE_REVISION,
        fixed_us=60.0,
        layers=tuple(costs),
    )
    path = model.parent / "costs.json"
    add_norms(table, layer_weights(imported.module), {}).save(path)
    return path
