"""The pass that brings an imported CNN into the one form that every later pass and kernel expects."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_nm.inventory import LAYERS_ATTR, layer_calls
from tvm_nm.passes.canonical_affine import AFFINE_RULES
from tvm_nm.passes.canonical_simplify import SIMPLIFY_RULES
from tvm_nm.passes.canonical_spatial import SPATIAL_RULES
from tvm_nm.passes.dataflow import Dataflow, Rule

__all__ = ["Canonicalize"]

_LOG = logging.getLogger(__name__)
_MAX_SWEEPS = 100  # each sweep shrinks the function or moves a reshape down; ten are many


def _merged(*tables: Any) -> dict[str, list[Rule]]:
    rules: dict[str, list[Rule]] = defaultdict(list)
    for table in tables:
        for key, some in table.items():
            rules[key].extend(some)
    return dict(rules)


_RULES = _merged(SIMPLIFY_RULES, SPATIAL_RULES, AFFINE_RULES)


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.Canonicalize")
class Canonicalize:
    """Bring every Relax function of a module into canonical form.

    Afterwards, for float32 tensors of static shape and weights that are constants:

    - batch norm, Scale (multiply and add by channel) and Gemm's alpha are folded into the convolution or FC beside
      them; where there is none they are a multiply and an add;
    - a bias is ``add(conv2d, const (1, OC, 1, 1))`` or ``add(matmul, const (1, OUT))``, the constant on the right;
    - FC is ``matmul(x (N, K), const (K, OUT))``;
    - explicit zero padding is part of the convolution, and of the pool where that is exact;
    - one-dimensional convolutions and pools are two-dimensional ones of height 1;
    - an average pool of the whole map is a mean;
    - constant expressions are constants; dropout and identities are gone; Sum is a chain of adds; scalar bounds are
      relu or clip;
    - there is one dataflow block, and nothing in it is dead.

    A convolution that somebody else reads too is neither copied nor folded into. Functions with control flow, symbolic
    casts or side effects are left as they are. Running the pass twice gives the same module as running it once.

    It reads operators, not TIR: `tvm_nm.frontend.import_onnx` imports Clip and Pad as operators, TVM's own importer as
    TIR functions, which stay what they are.

    The computation is in NumPy, a second for ResNet-50; Relax's FoldConstant compiles every constant expression. If the
    module has the attribute ``tvm_nm.layers`` it is kept up to date.

    Examples
    --------
    >>> mod = tvm.transform.Sequential([Canonicalize(), relax.transform.LegalizeOps()])(mod)    # doctest: +SKIP
    """

    def transform_module(self, mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the canonical module; `mod` is not changed."""
        functions: dict[Any, Any] = {}
        for var, func in mod.functions_items():
            functions[var] = _canonical(var.name_hint, func) if isinstance(func, relax.Function) else func
        new = tvm.IRModule(functions, attrs=mod.attrs)
        if mod.get_attr(LAYERS_ATTR) is None:
            return new
        names = {found.var.name: found.layer.name for found in layer_calls(mod)}
        layers = [names.get(found.var.name, found.var.name) for found in layer_calls(new)]
        return new.with_attr(LAYERS_ATTR, layers)


def _canonical(name: str, func: relax.Function) -> relax.Function:
    flow = Dataflow.read(func)
    if flow is None:
        _LOG.debug("%s is left as it is: it has control flow, casts or side effects", name)
        return func
    with np.errstate(all="ignore"):  # weights that overflow do so in the original, too
        for _ in range(_MAX_SWEEPS):
            if not flow.sweep(_RULES):
                break
    return flow.build()
