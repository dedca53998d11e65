"""Weights that kernels expand on the first call of a library instead of on each.

`Lower` writes what a kernel reads of expanded weights as a call of its own, of a constant. `KeepExpandedWeights` hands
the constant to the kernel, which expands it once (see `tvm_nm.schedules.kept_weights`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from tvm_nm.passes.dataflow import allocation_of, kernel_var, static_shape
from tvm_nm.relax_numpy import variables
from tvm_nm.schedules.kept_weights import EXPANDS, WEIGHT, expands_weights, room_bytes, room_code

__all__ = ["KeepExpandedWeights"]

_log = logging.getLogger(__name__)


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.KeepExpandedWeights")
class KeepExpandedWeights:
    """Let kernels expand constant weights when they are first called, and keep them.

    Run it after ``CallTIRRewrite``, when every tensor is an explicit allocation, and before ``StaticPlanBlockMemory``.
    A module in which anything but kernels looks at expanded weights, or where a kernel shares its function with one
    whose weights are not expanded, is left as it is: correct, and slow.
    """

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module without calls that only expand constants."""
        functions = dict(mod.functions_items())
        expansions = {name for name, function in functions.items() if (function.attrs or {}).get(EXPANDS, False)}
        if not expansions:
            return mod
        main = mod.get_global_var("main")
        expanded = _read(functions[main], functions, expansions)
        if expanded is None:
            _log.warning("expanded weights have other uses than kernels; they are expanded in each call")
            return mod
        rooms, size = {}, 0
        for weights in expanded.constants:
            rooms[weights] = size
            size += room_bytes(static_shape(weights) or ())
        code = room_code(size)
        new_names = {}
        for kernel, expansion in expanded.expansion_of.items():
            function = expands_weights(functions.pop(kernel), functions[expansion], code)
            new_names[kernel] = kernel_var(kernel.name_hint, function)
            functions[new_names[kernel]] = function
        functions[main] = _rewritten(functions[main], expanded, rooms, new_names)
        return tvm.IRModule({n: f for n, f in functions.items() if n not in expansions}, attrs=mod.attrs)


@dataclass(slots=True)
class _Expanded:
    """The expanded weights of a function.

    Attributes
    ----------
    constants
        What each allocation of expanded weights is made of.
    expansion_of
        The expansion of each kernel that reads such weights.
    reads
        Of each variable that is bound to a call of such a kernel: which argument the weights are, and their allocation.
    needless
        Variables of the allocations, of other names for them and of calls of expansions.
    """

    constants: dict[Any, Any] = field(default_factory=dict)
    expansion_of: dict[Any, Any] = field(default_factory=dict)
    reads: dict[Any, tuple[int, Any]] = field(default_factory=dict)
    needless: set[Any] = field(default_factory=set)


def _read(function: Any, functions: Mapping[Any, Any], expansions: set[Any]) -> _Expanded | None:
    """Find a function's expanded weights; None if not all of them can be kept."""
    found = _Expanded()
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    values = {binding.var: binding.value for binding in bindings}
    made_by: dict[Any, Any] = {}
    others: set[Any] = set()
    for binding in bindings:
        value = binding.value
        kernel = value.op if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar) else None
        if kernel in expansions:
            constant, weights = value.args[0], allocation_of(value.args[1], values)
            if weights is None or not isinstance(constant, tvm.ir.GenericConst):
                return None
            found.constants[weights], made_by[weights] = constant, kernel
            found.needless |= {weights, binding.var}
        elif allocation_of(binding.var, values) in found.constants:
            found.needless.add(binding.var)
        else:
            used = variables(value)
            if kernel is not None:
                at, weights = _weights(value, functions[kernel], values)
                if weights in found.constants:
                    if found.expansion_of.setdefault(kernel, made_by[weights]) != made_by[weights]:
                        return None
                    found.reads[binding.var] = at, weights
                    used = [var for n, arg in enumerate(value.args) if n != at for var in variables(arg)]
                else:
                    others.add(kernel)
            if any(allocation_of(var, values) in found.constants for var in used):
                return None
    returned = any(allocation_of(var, values) in found.constants for var in variables(function.body.body))
    return None if returned or others & found.expansion_of.keys() else found


def _weights(call: Any, function: Any, values: Mapping[Any, Any]) -> tuple[int, Any]:
    """Return which argument of a kernel's call the weights are, and the allocation that they lie in, if any."""
    names = [param.name for param in function.params]
    at = names.index(WEIGHT) if WEIGHT in names else -1
    return at, None if at < 0 else allocation_of(call.args[at], values)


def _rewritten(function: Any, expanded: _Expanded, rooms: Mapping[Any, int], names: Mapping[Any, Any]) -> Any:
    """Return a function whose kernels take constants and rooms, without the expansions."""
    builder = relax.BlockBuilder()
    bindings = []
    for binding in (binding for block in function.body.blocks for binding in block.bindings):
        if binding.var in expanded.needless:
            continue
        if binding.var in expanded.reads:
            call, (at, weights) = binding.value, expanded.reads[binding.var]
            room = relax.prim_value(rooms[weights])
            arguments = [*call.args[:at], expanded.constants[weights], room, *call.args[at + 1 :]]
            call = relax.Call(names[call.op], arguments, call.attrs, call.ty_args)
            binding = relax.VarBinding(binding.var, builder.normalize(call))
        bindings.append(binding)
    body = builder.normalize(relax.SeqExpr([relax.BindingBlock(bindings)], function.body.body))
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
