"""A straight-line Relax function as a list of bindings that rules rewrite.

Relax's pattern rewriter neither checks that a matched value has one use (a shared convolution would be computed twice)
nor keeps variable names; this small one does both. Rules see each binding after its operands have been rewritten, so
one sweep follows a chain of any length from the inputs down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tvm
from tvm import relax
from tvm.tirx.buffer import is_buffer_var

from tvm_nm.relax_numpy import as_constant, as_numpy, evaluate_constant_call, variables
from tvm_nm.relax_numpy_ops import Array

__all__ = [
    "TUPLE_ITEM",
    "Dataflow",
    "Rule",
    "allocation_of",
    "constant_of",
    "is_allocation",
    "is_call",
    "kernel_var",
    "static_shape",
    "substitute",
]

Rule: TypeAlias = Callable[["Dataflow", Any], Any]
"""``rule(flow, value)`` gives the expression that replaces the value, or None where it does not apply."""

TUPLE_ITEM = "TupleGetItem"
"""Key of the rules for ``tuple[index]``, beside the operators' names."""

_FOLD_ELEMENTS = 1 << 24  # what would grow beyond this by folding (a broadcast, zeros) is left to run time


def is_call(value: Any, *operators: str) -> bool:
    """Whether `value` is a call of one of the named operators, such as ``relax.add``."""
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name in operators


def is_allocation(value: Any) -> bool:
    """Whether `value` allocates a tensor."""
    return is_call(value, "relax.builtin.alloc_tensor")


def allocation_of(expr: Any, values: Mapping[Any, Any]) -> Any:
    """Return the variable of the allocation that an expression is all of, or None; `values` are what variables hold."""
    while isinstance(expr, relax.Var):
        value: Any = values.get(expr)
        if is_allocation(value):
            return expr
        expr = value.args[0] if is_call(value, "relax.reshape") else value
    return None


def static_shape(expr: Any) -> tuple[int, ...] | None:
    """Shape of a tensor expression, or None where it is unknown or symbolic."""
    shape = getattr(expr.ty, "shape", None)
    if not isinstance(shape, relax.ShapeExpr) or not all(isinstance(d, tvm.tirx.IntImm) for d in shape.values):
        return None
    return tuple(int(d) for d in shape.values)


def constant_of(expr: Any) -> Array | None:
    """Read-only array of a float32 constant, or None for anything else."""
    if isinstance(expr, tvm.ir.GenericConst) and str(expr.ty.dtype) == "float32":
        return as_numpy(expr)
    return None


def kernel_var(name: str, function: Any) -> Any:
    """Return a global variable for a PrimFunc, of the type that Relax checks its callers against."""
    var = tvm.ir.GlobalVar(name)
    type_ = relax.FuncType([_argument_type(param) for param in function.params], relax.TupleType([]), False)
    relax.expr._update_type(var, type_)
    return var


def _argument_type(param: Any) -> Any:
    if not is_buffer_var(param):
        return param.ty
    return relax.TensorType(tuple(int(size) for size in param.shape), str(param.dtype))


class Dataflow:
    """The bindings of one pure function.

    Build it with `read`, call `sweep` until it returns False, and take the function from `build`. The original function
    is not touched.

    Attributes
    ----------
    name
        During a sweep: name of the variable whose value is being rewritten.
    """

    def __init__(self, func: relax.Function, bindings: list[tuple[Any, Any]]) -> None:
        self.name = ""
        self._func = func
        self._bindings = bindings
        self._result = func.body.body
        self._values: dict[Any, Any] = {}
        self._alias: dict[Any, Any] = {}
        self._uses: Counter[Any] = Counter()
        self._rules: Mapping[str, Sequence[Rule]] = {}
        self._builder = relax.BlockBuilder()

    @classmethod
    def read(cls, func: relax.Function) -> Dataflow | None:
        """Take a function apart; None if it has control flow, casts of shapes or side effects."""
        if not isinstance(func.body, relax.SeqExpr) or relax.analysis.contains_impure_call(func):
            return None
        bindings = []
        for block in func.body.blocks:
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding) or isinstance(binding.value, relax.If | relax.Function):
                    return None
                bindings.append((binding.var, binding.value))
        return cls(func, bindings)

    def value(self, expr: Any) -> Any:
        """Return what a variable is bound to; None for parameters, constants and everything else."""
        return self._values.get(expr) if isinstance(expr, relax.Var) else None

    def name_of(self, expr: Any) -> str:
        """Name of a variable."""
        return str(expr.name)

    def used_once(self, expr: Any) -> bool:
        """Whether a variable has one use, the function's result counted."""
        return self._uses[expr] == 1

    def emit(self, value: Any, name: str) -> Any:
        """Bind a new value, rewritten itself, ahead of the current one; returns its variable or what it came to."""
        outer, self.name = self.name, name
        value, _ = self._rewrite(self._builder.normalize(value))
        self.name = outer
        if not isinstance(value, relax.Call | relax.TupleGetItem):
            return value
        var = relax.DataflowVar(name, value.ty)
        self._bind(var, value)
        self._uses.update(variables(value))
        return var

    def sweep(self, rules: Mapping[str, Sequence[Rule]]) -> bool:
        """Rewrite all bindings once, from first to last; returns whether anything changed."""
        self._prune()
        self._uses = Counter(v for _, value in self._bindings for v in variables(value))
        self._uses.update(variables(self._result))
        self._rules = rules
        old, self._bindings, self._values, self._alias = self._bindings, [], {}, {}
        changed = False
        for var, value in old:
            self.name = var.name
            new, rewritten = self._rewrite(self._resolve(value))
            changed |= rewritten
            # Uses of what a rewrite dropped stay counted until the next sweep: too many is safe, too few is not.
            if isinstance(new, relax.Call | relax.TupleGetItem):
                target = relax.DataflowVar(var.name, new.ty)
                self._bind(target, new)
                self._uses[target] = self._uses[var]
                self._uses.update(variables(new) if rewritten else [])
            else:  # a variable, a constant, a tuple or a shape: goes straight into its users
                target = new
                changed = True
                for operand in variables(new):
                    self._uses[operand] += self._uses[var]
            self._alias[var] = target
        self._result = self._resolve(self._result)
        return changed

    def build(self) -> relax.Function:
        """Return the rewritten function: one dataflow block without dead bindings, names unique."""
        self._prune()
        result = self._result
        if isinstance(result, relax.Tuple):
            var = relax.DataflowVar("outputs", result.ty)
            self._bindings.append((var, result))
            result = var
        names: Counter[str] = Counter(p.name for p in self._func.params)
        renamed: dict[Any, Any] = {}
        bindings = []
        for var, value in self._bindings:
            kind = relax.Var if var.same_as(result) else relax.DataflowVar
            renamed[var] = kind(_unique(var.name, names), value.ty)
            bindings.append(relax.VarBinding(renamed[var], self._builder.normalize(substitute(value, renamed))))
        blocks = [relax.DataflowBlock(bindings)] if bindings else []
        body = self._builder.normalize(relax.SeqExpr(blocks, substitute(result, renamed)))
        return relax.Function(self._func.params, body, self._func.ret_ty, self._func.is_pure, self._func.attrs)

    def _bind(self, var: Any, value: Any) -> None:
        self._bindings.append((var, value))
        self._values[var] = value

    def _resolve(self, expr: Any) -> Any:
        """Put what earlier variables were rewritten to into an expression."""
        new = substitute(expr, self._alias)
        return self._builder.normalize(new) if isinstance(new, relax.Call | relax.TupleGetItem | relax.Tuple) else new

    def _rewrite(self, value: Any) -> tuple[Any, bool]:
        rewritten = False
        while True:
            new = self._apply_one(value)
            if new is None:
                return value, rewritten
            new = self._builder.normalize(new)
            before, after = static_shape(value), static_shape(new)
            if before is not None and before != after:
                raise AssertionError(f"rewriting {self.name!r} changed its shape from {before} to {after}")
            value, rewritten = new, True

    def _apply_one(self, value: Any) -> Any:
        if isinstance(value, relax.TupleGetItem):
            key = TUPLE_ITEM
        elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            folded = _fold(value)
            if folded is not None:
                return folded
            key = value.op.name
        else:
            return None
        for rule in self._rules.get(key, ()):
            new = rule(self, value)
            if new is not None:
                return new
        return None

    def _prune(self) -> None:
        """Drop bindings that the result does not need."""
        needed = set(variables(self._result))
        kept = []
        for var, value in reversed(self._bindings):
            if var in needed:
                needed.update(variables(value))
                kept.append((var, value))
        self._bindings = kept[::-1]


def _fold(call: Any) -> Any:
    """Value of a call whose arguments are all constant."""
    if not all(_is_constant(a) for a in call.args) or isinstance(call.ty, relax.ShapeType):
        return None
    size = math.prod(static_shape(call) or ())
    if size > _FOLD_ELEMENTS and size > sum(math.prod(static_shape(a) or ()) for a in call.args):
        return None
    with np.errstate(all="ignore"):
        result = evaluate_constant_call(call)
    if result is None:
        return None
    return relax.Tuple([as_constant(r) for r in result]) if isinstance(result, tuple) else as_constant(result)


def _is_constant(expr: Any) -> bool:
    if isinstance(expr, relax.Tuple):
        return all(_is_constant(f) for f in expr.fields)
    if isinstance(expr, relax.ShapeExpr):
        return all(isinstance(d, tvm.tirx.IntImm) for d in expr.values)
    return isinstance(expr, tvm.ir.GenericConst | tvm.tirx.IntImm | tvm.tirx.FloatImm)


def substitute(expr: Any, mapping: Mapping[Any, Any]) -> Any:
    """Replace variables by what they are mapped to; the result is not type-checked."""
    if isinstance(expr, relax.Var):
        return mapping.get(expr, expr)
    if isinstance(expr, relax.Call):
        return relax.Call(expr.op, [substitute(a, mapping) for a in expr.args], expr.attrs, expr.ty_args)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substitute(f, mapping) for f in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        source = substitute(expr.tuple_value, mapping)
        return source.fields[expr.index] if isinstance(source, relax.Tuple) else relax.TupleGetItem(source, expr.index)
    return expr


def _unique(name: str, taken: Counter[str]) -> str:
    candidate = name
    while taken[candidate]:
        candidate = f"{name}_{taken[name]}"
        taken[name] += 1
    taken[candidate] += 1
    return candidate
