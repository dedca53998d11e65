"""Replaces powers by quarter exponents, which local response normalisation uses, by square roots."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvm_nm.passes.dataflow import Dataflow, constant_of

__all__ = ["QuarterPowers"]


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.QuarterPowers")
class QuarterPowers:
    """Rewrite ``x ** 0.25``, ``x ** 0.5`` and ``x ** 0.75`` as square roots.

    A power becomes one call of the C library for every element; a square root is a vector instruction. For x >= 0,
    where these powers are defined, the result differs by rounding only.
    """

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        flow = Dataflow.read(mod["main"])
        if flow is None or not flow.sweep({"relax.power": [_roots]}):
            return mod
        rewritten = tvm.IRModule(mod.functions, attrs=mod.attrs)
        rewritten.update_func(mod.get_global_var("main"), flow.build())
        return rewritten


def _roots(flow: Dataflow, call: Any) -> Any:
    exponent = constant_of(call.args[1])
    if exponent is None or exponent.size != 1:
        return None
    quarters = 4 * float(exponent.reshape(()))
    if quarters not in (1.0, 2.0, 3.0):
        return None
    half = relax.op.sqrt(call.args[0])
    if quarters == 2:
        return half
    half = flow.emit(half, flow.name)
    fourth = relax.op.sqrt(half)
    return fourth if quarters == 1 else relax.op.multiply(half, flow.emit(fourth, flow.name))
