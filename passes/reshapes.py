"""Lets kernels take and give tensors in the shapes that their neighbours have, so that no reshapes are left between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import tvm
from tvm import relax, tirx

from tvm_nm.passes.dataflow import is_call, kernel_var, static_shape, substitute
from tvm_nm.relax_numpy import variables

__all__ = ["AbsorbReshapes", "with_argument_shapes"]

Shape: TypeAlias = tuple[int, ...]


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.AbsorbReshapes")
class AbsorbReshapes:
    """Declare a PrimFunc's arguments in the shapes that its callers have, instead of reshaping at each call.

    A pointwise convolution, say, sees its input as one long row. A reshape moves no data, but as an operation of the
    virtual machine it takes microseconds, which small networks feel.

    Run it on scheduled functions: templates read the shapes that they were written for. A PrimFunc that is called with
    different shapes keeps its own, and so do results that the network returns.
    """

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with fewer reshapes."""
        main = mod["main"]
        blocks = main.body.blocks
        if len(blocks) != 1 or not isinstance(blocks[0], relax.DataflowBlock):
            return mod
        absorbing = _Absorbing(main)
        shapes = absorbing.plan()
        kernels = {called: with_argument_shapes(mod[called], wanted) for called, wanted in shapes.items()}
        # New variables: one has the type of its function, and other modules may hold the old one.
        renamed = {old: kernel_var(old.name_hint, kernel) for old, kernel in kernels.items()}
        functions = {renamed.get(name, name): kernels.get(name, f) for name, f in mod.functions_items()}
        functions[mod.get_global_var("main")] = absorbing.rewritten(renamed)
        return relax.transform.DeadCodeElimination()(tvm.IRModule(functions, attrs=mod.attrs))


class _Absorbing:
    """Rewrites one function."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._bindings = list(function.body.blocks[0].bindings)
        self._value = {binding.var: binding.value for binding in self._bindings}
        self._users: dict[Any, list[Any]] = {}
        for binding in self._bindings:
            for var in set(variables(binding.value)):
                self._users.setdefault(var, []).append(binding.value)
        for var in variables(function.body.body):
            self._users.setdefault(var, []).append(function.body.body)
        self._results: dict[Any, Shape] = {}
        self._absorbed: set[tuple[Any, int]] = set()

    def plan(self) -> dict[Any, list[Shape]]:
        """Decide what each called PrimFunc's arguments, the result last, are declared as."""
        shapes: dict[Any, list[Shape]] = {}
        sites: dict[Any, list[tuple[Any, Any]]] = {}
        for binding in self._bindings:
            if _is_kernel_call(binding.value):
                sites.setdefault(binding.value.args[0], []).append((binding.var, binding.value))
        # First the results: they decide what readers can take without a reshape.
        for calls in sites.values():
            results = {self._wanted_result(var) for var, _ in calls}
            if len(results) == 1:
                self._results |= {var: next(iter(results)) for var, _ in calls}
        for kernel, calls in sites.items():
            shapes[kernel] = [_shape(argument) for argument in calls[0][1].args[1].fields]
            for number in range(len(shapes[kernel])):
                found = {self._shape_now(self._origin(call.args[1].fields[number])) for _, call in calls}
                if len(found) == 1:
                    self._absorbed.add((kernel, number))
                    shapes[kernel][number] = next(iter(found))
            shapes[kernel].append(self._shape_now(calls[0][0]))
        return shapes

    def _wanted_result(self, var: Any) -> Shape:
        users = self._users.get(var, [])
        if users and all(is_call(user, "relax.reshape") for user in users):
            return _shape(users[0])
        return _shape(var)

    def _origin(self, expr: Any) -> Any:
        """Return what an expression is a reshape of, or itself."""
        while is_call(self._value.get(expr) if isinstance(expr, relax.Var) else None, "relax.reshape"):
            expr = self._value[expr].args[0]
        return expr

    def _shape_now(self, expr: Any) -> Shape:
        return self._results.get(expr) or _shape(expr)

    def rewritten(self, kernels: Mapping[Any, Any]) -> Any:
        """Return the function with calls of other variables for its PrimFuncs, and the planned shapes."""
        builder = relax.BlockBuilder()
        renamed: dict[Any, Any] = {}
        bindings = []
        for binding in self._bindings:
            var, value = binding.var, binding.value
            if _is_kernel_call(value):
                kernel, arguments = value.args[0], list(value.args[1].fields)
                for number, argument in enumerate(arguments):
                    if (kernel, number) in self._absorbed:
                        arguments[number] = self._origin(argument)
                arguments = [substitute(argument, renamed) for argument in arguments]
                result = relax.TensorType(self._shape_now(var), str(var.ty.dtype))
                value = relax.call_tir(kernels[kernel], arguments, result)
            elif is_call(value, "relax.reshape"):
                origin = substitute(self._origin(var), renamed)
                if static_shape(origin) == static_shape(var) and isinstance(var, relax.DataflowVar):
                    renamed[var] = origin
                    continue
                value = relax.op.reshape(origin, value.args[1])
            else:
                value = substitute(value, renamed)
            value = builder.normalize(value)
            renamed[var] = type(var)(var.name, value.ty)
            bindings.append(relax.VarBinding(renamed[var], value))
        returned = substitute(self._function.body.body, renamed)
        body = builder.normalize(relax.SeqExpr([relax.DataflowBlock(bindings)], returned))
        old = self._function
        return relax.Function(old.params, body, old.ret_ty, old.is_pure, old.attrs)


def with_argument_shapes(function: Any, shapes: Sequence[Shape]) -> Any:
    """Return a PrimFunc whose buffers are declared in other shapes of as many elements; its body sees the old ones."""
    declared, views = [], []
    for buffer, shape in zip(function.params, shapes, strict=True):
        if tuple(int(size) for size in buffer.shape) == shape:
            declared.append(buffer)
            continue
        assert math.prod(shape) == math.prod(int(size) for size in buffer.shape)
        declared.append(tirx.decl_buffer(shape, buffer.dtype, buffer.name))
        views.append(tirx.DeclBuffer(buffer, data=declared[-1].data))
    if not views:
        return function
    return tirx.PrimFunc(declared, tirx.SeqStmt([*views, function.body]), function.ret_type, function.attrs)


def _is_kernel_call(value: Any) -> bool:
    if not is_call(value, "relax.call_tir") or len(value.args) != 2 or not isinstance(value.args[1], relax.Tuple):
        return False
    return all(static_shape(expr) is not None for expr in (value, *value.args[1].fields))


def _shape(expr: Any) -> Shape:
    shape = static_shape(expr)
    assert shape is not None
    return shape
