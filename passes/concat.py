"""Concatenation without copies: what is concatenated is computed where it belongs in the result.

At batch 1 the inputs of a channel concat are contiguous slices of its output. `MarkConcats` keeps such concats apart
from other operators; `ConcatInPlace`, once memory is explicit, lets producers write into the slices and drops the
copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, te, tirx, topi
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_nm.passes.dataflow import allocation_of, is_allocation, is_call, kernel_var, static_shape
from tvm_nm.relax_numpy import variables

__all__ = ["CONCAT_ATTR", "ConcatInPlace", "MarkConcats"]

CONCAT_ATTR = "tvm_nm.concat"
"""PrimFunc attribute, an axis: the arguments but the last are copied one after the other along it into the last."""

_ALIGNMENT = 64
"""Bytes. Generated code takes a tensor's data to be so aligned, and TVM's view of a slice is free only then."""


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.MarkConcats")
class MarkConcats:
    """Make a call of a PrimFunc of its own of every concat whose inputs are contiguous slices of its output.

    A concat that begins with the inputs of an earlier one takes the earlier result instead: the flat concats of a
    DenseNet become a chain, each link of which only adds to the one before.

    Run it before operators are legalised and fused. On its own it costs a fusion; `ConcatInPlace` makes use of it.
    """

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with the calls."""
        marking = _Marking(mod)
        marking.builder_.update_func(mod.get_global_var("main"), marking.visit_expr(mod["main"]))
        return marking.builder_.get()


@mutator
class _Marking(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self._earlier: list[tuple[list[Any], int, Any]] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        found = self._contiguous(binding.value) if is_call(binding.value, "relax.concat") else None
        if found is None:
            super().visit_var_binding_(binding)
            return
        axis = found[1]
        inputs = [self.visit_expr(part) for part in found[0]]
        parts = self._after_an_earlier_one(inputs, axis)
        tensors = [te.placeholder(static_shape(part), str(part.ty.dtype), f"part{n}") for n, part in enumerate(parts)]
        function = te.create_prim_func([*tensors, topi.concatenate(tensors, axis)])
        function = function.with_attr({"tirx.noalias": True, "op_pattern": 8, CONCAT_ATTR: axis})
        called = self.builder_.add_func(function, "tvm_nm_concat")
        emit = self.builder_.emit if isinstance(binding.var, relax.DataflowVar) else self.builder_.emit_output
        var = emit(relax.call_tir(called, parts, binding.var.ty), binding.var.name)
        self.set_var_remap(binding.var, var)
        self._earlier.append((inputs, axis, var))

    def _contiguous(self, call: Any) -> tuple[list[Any], int] | None:
        """Return inputs and axis of a concat whose inputs are slices of the output's memory, else None."""
        joined, shape = call.args[0], static_shape(call)
        if isinstance(joined, relax.Var):
            joined = self.lookup_binding(joined)
        if not isinstance(joined, relax.Tuple) or len(joined.fields) < 2 or call.attrs.axis is None or not shape:
            return None
        axis = int(call.attrs.axis) % len(shape)
        if any(size != 1 for size in shape[:axis]) or any(not static_shape(part) for part in joined.fields):
            return None
        return list(joined.fields), axis

    def _after_an_earlier_one(self, inputs: list[Any], axis: int) -> list[Any]:
        fitting = [(len(them), var) for them, along, var in self._earlier if along == axis and _starts(inputs, them)]
        if not fitting:
            return inputs
        count, var = max(fitting, key=lambda found: found[0])
        return [var, *inputs[count:]]


def _starts(inputs: list[Any], with_these: list[Any]) -> bool:
    if len(inputs) <= len(with_these):
        return False
    return all(one.same_as(other) for one, other in zip(inputs, with_these, strict=False))


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.ConcatInPlace")
class ConcatInPlace:
    """Let the producers of a marked concat's inputs write into its output, and drop the copies.

    Run it after ``CallTIRRewrite``, when every tensor is an explicit allocation, and before
    ``StaticPlanBlockMemory``, which knows that a view keeps the memory alive that it looks at. An input stays a copy
    if it is an input, constant or output of the network, if it is already a slice of another concat's output, or if its
    slice does not start at a multiple of 64 bytes.
    """

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with views instead of copies."""
        functions = dict(mod.functions_items())
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function) and _is_straight(function):
                rewriting = _InPlace(mod, function)
                if rewriting.sites:
                    functions[name] = rewriting.run()
                    functions.update(rewriting.copies)
        called = {called for function in functions.values() for called in _called(function)}
        unused = [name for name, f in functions.items() if CONCAT_ATTR in (f.attrs or ()) and name not in called]
        return tvm.IRModule({name: f for name, f in functions.items() if name not in unused}, attrs=mod.attrs)


def _is_straight(function: Any) -> bool:
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    return all(isinstance(b, relax.VarBinding) and not isinstance(b.value, relax.If) for b in bindings)


def _called(function: Any) -> Iterator[Any]:
    if isinstance(function, relax.Function):
        for block in function.body.blocks:
            yield from (b.value.op for b in block.bindings if isinstance(b.value, relax.Call))


@dataclass(frozen=True, slots=True)
class _Site:
    """A marked concat.

    Attributes
    ----------
    axis
        What it concatenates along.
    parts
        Its inputs, each with where it starts along the axis.
    out
        The expression that it writes to.
    """

    axis: int
    parts: tuple[tuple[Any, int], ...]
    out: Any


class _InPlace:
    """Rewrites one function.

    Attributes
    ----------
    sites
        The marked concats by the variables that their calls are bound to.
    copies
        Functions for what has to be copied all the same.
    """

    def __init__(self, mod: tvm.IRModule, function: Any) -> None:
        self._function = function
        self._bindings = [binding for block in function.body.blocks for binding in block.bindings]
        self._value = {binding.var: binding.value for binding in self._bindings}
        self.copies: dict[Any, Any] = {}
        self.sites = {b.var: site for b in self._bindings if (site := _site(mod, b.value)) is not None}
        self._placed: dict[Any, tuple[Any, int]] = {}

    def run(self) -> Any:
        """Return the function with views."""
        returned = {allocation_of(var, self._value) for result in self._results() for var in variables(result)}
        left = {var: self._place(site, returned) for var, site in self.sites.items()}
        builder = relax.BlockBuilder()
        bindings: list[Any] = []
        emitted: set[Any] = set()

        def emit(value: Any) -> Any:
            value = builder.normalize(value)
            var = relax.Var("slice", value.ty)
            bindings.append(relax.VarBinding(var, value))
            return var

        def allocate(var: Any) -> None:
            """Emit an allocation ahead of its first use, be it as the whole of a slice."""
            if var in emitted:
                return
            emitted.add(var)
            if var not in self._placed:
                bindings.append(relax.VarBinding(var, self._value[var]))
                return
            whole, offset = self._whole(var)
            allocate(whole)
            value = relax.op.memory.view(whole, var.ty.shape, str(var.ty.dtype), offset)
            if offset:
                value = relax.op.memory.ensure_zero_offset(emit(value))
            bindings.append(relax.VarBinding(var, builder.normalize(value)))

        for binding in self._bindings:
            if is_allocation(binding.value):
                allocate(binding.var)
            elif binding.var not in self.sites:
                bindings.append(binding)
            elif left[binding.var]:
                bindings.append(relax.VarBinding(binding.var, self._copy(self.sites[binding.var], left[binding.var])))
        body = builder.normalize(relax.SeqExpr([relax.BindingBlock(bindings)], self._function.body.body))
        old = self._function
        return relax.Function(old.params, body, old.ret_ty, old.is_pure, old.attrs)

    def _results(self) -> list[Any]:
        """Return what the function returns and, if that is a variable of a tuple, the tuple."""
        result = self._function.body.body
        return [result, self._value[result]] if isinstance(self._value.get(result), relax.Tuple) else [result]

    def _place(self, site: _Site, returned: set[Any]) -> list[tuple[Any, int]]:
        """Decide which inputs of a concat become slices of its output; returns the others."""
        out = allocation_of(site.out, self._value)
        copied = []
        for part, start in site.parts:
            var = allocation_of(part, self._value)
            offset = start * math.prod(static_shape(out)[site.axis + 1 :]) * _bytes(out)  # type: ignore[index]
            free = var is not None and var not in self._placed and var not in returned and not var.same_as(out)
            if free and offset % _ALIGNMENT == 0 and str(var.ty.dtype) == str(out.ty.dtype):
                self._placed[var] = (out, offset)
            else:
                copied.append((part, start))
        return copied

    def _whole(self, var: Any) -> tuple[Any, int]:
        """Return the allocation that a placed one is in, which is in no other, and where it starts there in bytes."""
        offset = 0
        while var in self._placed:
            var, further = self._placed[var]
            offset += further
        return var, offset

    def _copy(self, site: _Site, parts: list[tuple[Any, int]]) -> Any:
        function = _copy_function(site, parts)
        called = kernel_var(f"tvm_nm_concat_rest{len(self.copies)}", function)
        self.copies[called] = function
        return relax.Call(called, [*(part for part, _ in parts), site.out])


def _site(mod: tvm.IRModule, value: Any) -> _Site | None:
    if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.GlobalVar):
        return None
    axis = (mod[value.op].attrs or {}).get(CONCAT_ATTR)
    if axis is None:
        return None
    *parts, out = value.args
    starts, position = [], 0
    for part in parts:
        starts.append((part, position))
        position += static_shape(part)[int(axis)]  # type: ignore[index]
    return _Site(int(axis), tuple(starts), out)


def _bytes(expr: Any) -> int:
    size: int = tvm.DataType(str(expr.ty.dtype)).itemsize
    return size


def _copy_function(site: _Site, parts: list[tuple[Any, int]]) -> Any:
    """Return the function that copies some inputs of a concat: they, then the concat's output, are its arguments."""
    inner = math.prod(static_shape(site.out)[site.axis + 1 :])  # type: ignore[index]
    arguments = [*(part for part, _ in parts), site.out]
    dtype = str(site.out.ty.dtype)
    buffers = [tirx.decl_buffer(static_shape(expr), dtype, f"part{n}") for n, expr in enumerate(arguments)]
    # As rows of memory: what lies before the axis has extent 1, and reshapes may be absorbed in the shapes.
    sizes = [math.prod(static_shape(expr)) for expr in arguments]  # type: ignore[arg-type]
    rows = [tirx.decl_buffer((size,), dtype, f"row{n}") for n, size in enumerate(sizes)]
    statements = [tirx.DeclBuffer(row, data=buffer.data) for row, buffer in zip(rows, buffers, strict=True)]
    for row, size, (_, start) in zip(rows, sizes, parts, strict=False):
        i = tirx.Var("i", "int32")
        store = tirx.BufferStore(rows[-1], tirx.BufferLoad(row, [i]), [i + start * inner])
        statements.append(tirx.For(i, 0, size, tirx.ForKind.SERIAL, store))
    function = tirx.PrimFunc(buffers, tirx.SeqStmt(statements))
    return function.with_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "s_tir": True})
