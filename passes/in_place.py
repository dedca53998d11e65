"""Residual adds without a tensor of their own: a layer's output takes the place of the residual that it adds.

The residual of a network's block is used for the last time where it is added, within the block's last layer. That layer
then writes to the residual's memory (see `tvm_nm.schedules.in_place`), which saves reading the output's memory before
it is overwritten, and the room for it in the caches.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import tvm
from tvm import relax

from tvm_nm.passes.dataflow import allocation_of, is_allocation, static_shape
from tvm_nm.relax_numpy import variables
from tvm_nm.schedules.in_place import RESIDUAL, adds_in_place

__all__ = ["AddInPlace"]


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.AddInPlace")
class AddInPlace:
    """Let kernels write to the memory of the residual that they add, where nobody needs it afterwards.

    Run it after ``CallTIRRewrite``, when every tensor is an explicit allocation, after `ConcatInPlace`, whose slices
    keep the memory that they look at, and before ``StaticPlanBlockMemory``. A function that several layers share is
    left as it is unless all of them can.
    """

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with fewer allocations."""
        functions = dict(mod.functions_items())
        able = {name: new for name, f in functions.items() if (new := _in_place(f)) is not None}
        calls = Counter(c.op for f in functions.values() for c in _calls(f) if c.op in able)
        while able:
            merged = {name: _Merging(f, able) for name, f in functions.items() if isinstance(f, relax.Function)}
            done = Counter(op for merging in merged.values() for op in merging.calls)
            refused = [name for name in able if done[name] != calls[name]]
            if not refused:
                functions |= able
                functions |= {name: merging.function() for name, merging in merged.items() if merging.calls}
                break
            able = {name: f for name, f in able.items() if name not in refused}
        return tvm.IRModule(functions, attrs=mod.attrs)


def _in_place(func: Any) -> Any:
    return adds_in_place(func) if isinstance(func, tvm.tirx.PrimFunc) else None


def _calls(function: Any) -> list[Any]:
    if not isinstance(function, relax.Function) or not isinstance(function.body, relax.SeqExpr):
        return []
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    return [b.value for b in bindings if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.GlobalVar)]


class _Merging:
    """Finds in one function the outputs that can take the place of residuals.

    Attributes
    ----------
    calls
        The functions of the calls that then add in place.
    """

    def __init__(self, function: Any, able: dict[Any, Any]) -> None:
        self._function = function
        self._bindings = [binding for block in function.body.blocks for binding in block.bindings]
        self._value = {binding.var: binding.value for binding in self._bindings}
        self._position = {binding.var: i for i, binding in enumerate(self._bindings)}
        self._place: dict[Any, Any] = {}  # allocations that are gone, and what took their place
        self._first: dict[Any, int] = {}
        self._last: dict[Any, int] = {}
        self._of: dict[Any, set[Any]] = {}
        for i, binding in enumerate(self._bindings):
            self._note(binding.value, i)
        self._note(function.body.body, len(self._bindings))
        self.calls = [
            binding.value.op
            for i, binding in enumerate(self._bindings)
            if isinstance(binding.value, relax.Call) and binding.value.op in able and self._merge(i, able)
        ]

    def function(self) -> Any:
        """Return the function without the allocations."""
        builder = relax.BlockBuilder()
        bindings = [
            relax.VarBinding(b.var, builder.normalize(self._instead(b.var))) if b.var in self._place else b
            for b in self._bindings
        ]
        old = self._function
        body = builder.normalize(relax.SeqExpr([relax.BindingBlock(bindings)], old.body.body))
        return relax.Function(old.params, body, old.ret_ty, old.is_pure, old.attrs)

    def _instead(self, var: Any) -> Any:
        other = self._place[var]
        if static_shape(other) == static_shape(var):
            return other
        return relax.op.reshape(other, var.ty.shape)

    def _note(self, value: Any, position: int) -> None:
        """Note which allocations are used at a position."""
        for root in self._roots(value):
            self._first.setdefault(root, position)
            self._last[root] = position

    def _roots(self, expr: Any) -> set[Any]:
        """Return the allocations that an expression may look at; of an operator's result, any of its arguments'."""
        found: set[Any] = set()
        for var in variables(expr):
            if var not in self._of:
                value = self._value.get(var)
                is_kernel = isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)
                if is_allocation(value):
                    self._of[var] = {var}
                else:
                    self._of[var] = set() if value is None or is_kernel else self._roots(value)
            found |= self._of[var]
        return found

    def _placed(self, allocation: Any) -> Any:
        """Return the allocation that took the place of another one, or the same."""
        while allocation in self._place:
            allocation = self._place[allocation]
        return allocation

    def _merge(self, position: int, able: dict[Any, Any]) -> bool:
        """Let a call's output take the place of its residual if nothing else looks at either; return whether it can."""
        call = self._bindings[position].value
        which = [param.name for param in able[call.op].params].index(RESIDUAL)
        residual, out = (allocation_of(arg, self._value) for arg in (call.args[which], call.args[-1]))
        if residual is None or out is None or out in self._place:
            return False
        place = self._placed(residual)
        if math.prod(static_shape(place) or ()) != math.prod(static_shape(out) or ()) or _dtype(place) != _dtype(out):
            return False
        # Other tasks would see what is stored, if it were an input as well.
        others = [root for n, arg in enumerate(call.args[:-1]) if n != which for root in self._roots(arg)]
        alone = place not in {self._placed(root) for root in others}
        dead = self._last[residual] == position and self._last[place] <= position
        if not (alone and dead and self._first[out] == position and self._position[place] < self._position[out]):
            return False
        self._place[out] = place
        self._last[place] = self._last[out]
        return True


def _dtype(var: Any) -> str:
    return str(var.ty.dtype)
