"""Run a straight-line Relax function in NumPy, without compiling it.

Relax has no interpreter. This one serves three ends: the imported model is checked against onnxruntime within seconds
(an untuned compile of ResNet-50 would take minutes), passes are tested by before/after equality, and calibration
reads the inputs of every layer. It shares no code with the generated kernels, so agreement means something.

Operators that `relax_numpy_ops` does not cover are compiled by TVM one by one and cached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tvm
from tvm import relax

from tvm_nm.relax_numpy_ops import OPS, Array, UnhandledError

__all__ = ["NumpyModule", "Watcher", "as_constant", "as_numpy", "evaluate_constant_call", "variables"]

Watcher: TypeAlias = Callable[[str, Any, tuple[Any, ...], Any], None]
"""Called after every operator with (variable name, relax.Call, arguments, result)."""

_CALL_TIR = "relax.call_tir"


def as_numpy(const: Any) -> Array:
    """Read-only view of a Relax constant: no copy, which matters for 400 MB of weights."""
    view: Array = np.from_dlpack(const.value)
    view.flags.writeable = False
    return view


def as_constant(array: Array) -> Any:
    """Relax constant with the values of `array`, which may be a view of any strides.

    Written straight into TVM's memory: ``relax.const`` would first make a contiguous copy, 400 MB for VGG's first FC.
    """
    tensor = tvm.runtime.empty(array.shape, str(array.dtype))
    np.from_dlpack(tensor)[...] = array
    return relax.const(tensor)


@dataclass(slots=True)
class _Step:
    """One binding: where its value goes, how it is computed, and what may be forgotten after it."""

    var: Any
    value: Any
    operator: Callable[..., Any] | None
    last_uses: list[Any]


class NumpyModule:
    """A Relax function that can be called with NumPy arrays.

    Parameters
    ----------
    mod
        The module. The function must be straight-line code with static shapes: the output of
        `tvm_nm.frontend.import_onnx` and of all passes up to and including pruning.
    func
        Name of the function.

    Raises
    ------
    ValueError
        If the module has no such Relax function, or it has control flow.

    Examples
    --------
    >>> outputs = NumpyModule(imported.module)(x)          # doctest: +SKIP
    """

    def __init__(self, mod: tvm.IRModule, func: str = "main") -> None:
        if func not in [gv.name_hint for gv in mod.get_global_vars()] or not isinstance(mod[func], relax.Function):
            raise ValueError(f"the module has no Relax function {func!r}")
        function = mod[func]
        self._mod = mod
        self._params = list(function.params)
        self._steps: list[_Step] = []
        for block in function.body.blocks:
            for binding in block.bindings:
                if isinstance(binding.value, relax.If | relax.Function):
                    raise ValueError(f"{func!r} is not straight-line code: {binding.var.name} needs control flow")
                self._steps.append(_Step(binding.var, binding.value, _operator(binding.value), []))
        self._result = function.body.body
        self._find_last_uses()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the function's parameters, in order."""
        return tuple(p.name for p in self._params)

    def _find_last_uses(self) -> None:
        kept = set(variables(self._result))
        for step in reversed(self._steps):
            for var in (*variables(step.value), step.var):
                if var not in kept:
                    kept.add(var)
                    step.last_uses.append(var)

    def __call__(self, *inputs: Array, watch: Watcher | None = None) -> list[Array]:
        """Run the function.

        Parameters
        ----------
        inputs
            One array for each parameter, of its shape and dtype.
        watch
            Called after every operator; must not change the arrays.

        Returns
        -------
        list of Array
            The outputs, in the order of the function's result tuple.

        Raises
        ------
        ValueError
            If the inputs' number, shapes or dtypes do not fit.
        """
        if len(inputs) != len(self._params):
            raise ValueError(f"{len(self._params)} inputs expected, {len(inputs)} given")
        env: dict[Any, Any] = {}
        for param, value in zip(self._params, inputs, strict=True):
            shape, dtype = tuple(int(d) for d in param.ty.shape), str(param.ty.dtype)
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(
                    f"input {param.name!r} must be {dtype} {shape}, got {value.dtype} {tuple(value.shape)}"
                )
            env[param] = value
        with np.errstate(all="ignore"):  # infinities and NaN are values like others, as in a compiled module
            for step in self._steps:
                env[step.var] = self._run_step(step, env, watch)
                for var in step.last_uses:
                    del env[var]
        result = _argument(self._result, env)
        return list(result) if isinstance(result, tuple) else [result]

    def _run_step(self, step: _Step, env: dict[Any, Any], watch: Watcher | None) -> Any:
        value = step.value
        if not isinstance(value, relax.Call):
            return _argument(value, env)
        arguments: tuple[Any, ...] = tuple(_argument(a, env) for a in value.args)
        if step.operator is None:
            step.operator = _compile_call(value, self._mod)
        try:
            result = step.operator(value, *arguments)
        except UnhandledError:
            step.operator = _compile_call(value, self._mod)
            result = step.operator(value, *arguments)
        if watch is not None:
            watch(step.var.name, value, arguments, result)
        return result


def evaluate_constant_call(call: Any) -> Any:
    """Compute a call all of whose arguments are constants.

    Parameters
    ----------
    call
        A type-checked ``relax.Call`` of an operator.

    Returns
    -------
    Array or tuple of Array, or None
        None if the operator is not in the NumPy table.
    """
    operator = _operator(call)
    if operator is None:
        return None
    try:
        return operator(call, *(_argument(a, {}) for a in call.args))
    except UnhandledError:
        return None


def _operator(value: Any) -> Callable[..., Any] | None:
    return OPS.get(value.op.name) if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else None


def variables(expr: Any) -> list[Any]:
    """Variables that an expression uses, each as often as it does."""
    if isinstance(expr, relax.Call):
        return [v for a in expr.args for v in variables(a)]
    if isinstance(expr, relax.Tuple):
        return [v for f in expr.fields for v in variables(f)]
    if isinstance(expr, relax.TupleGetItem):
        return variables(expr.tuple_value)
    return [expr] if isinstance(expr, relax.Var) else []


def _argument(expr: Any, env: dict[Any, Any]) -> Any:
    """Value of a leaf expression: an array, a number, or a tuple of such."""
    if isinstance(expr, tvm.ir.GenericConst):
        return as_numpy(expr)
    if isinstance(expr, relax.Var):
        return env[expr]
    if isinstance(expr, relax.Tuple):
        return tuple(_argument(f, env) for f in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _argument(expr.tuple_value, env)[expr.index]
    if isinstance(expr, relax.ShapeExpr):
        return tuple(int(v) for v in expr.values)
    if isinstance(expr, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return expr.value
    return expr  # a GlobalVar or another thing that only TVM understands


def _compile_call(call: Any, mod: tvm.IRModule) -> Callable[..., Any]:
    """Compile one operator call with TVM; returns a function with the signature of the NumPy table's."""
    operands = list(dict.fromkeys(variables(call)))
    params = {v: relax.Var(f"p{i}", v.ty) for i, v in enumerate(operands)}
    builder = relax.BlockBuilder()
    args = [_substitute(a, params) for a in call.args]
    if isinstance(call.op, tvm.ir.Op) and call.op.name == _CALL_TIR:
        args[0] = builder.add_func(mod[args[0]], args[0].name_hint)
    with builder.function("main", list(params.values())):
        out = builder.emit(relax.Call(call.op, args, call.attrs, call.ty_args))
        builder.emit_func_output(out)
    executable = tvm.compile(builder.get(), tvm.target.Target({"kind": "llvm"}))
    vm = relax.VirtualMachine(executable, tvm.cpu())

    def run(call: Any, *arguments: Any) -> Any:
        env: dict[Any, Any] = {}
        for expr, value in zip(call.args, arguments, strict=True):
            _bind(expr, value, env)
        # The VM's own tensors are aligned as the kernels expect, NumPy's are not.
        result = vm["main"](*(tvm.runtime.tensor(np.asarray(env[v], order="C")) for v in operands))
        return result.numpy() if hasattr(result, "numpy") else tuple(r.numpy() for r in result)

    return run


def _substitute(expr: Any, params: dict[Any, Any]) -> Any:
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_substitute(f, params) for f in expr.fields])
    return params.get(expr, expr) if isinstance(expr, relax.Var) else expr


def _bind(expr: Any, value: Any, env: dict[Any, Any]) -> None:
    """Match the values of a call's arguments to the variables inside them."""
    if isinstance(expr, relax.Var):
        env[expr] = value
    elif isinstance(expr, relax.Tuple):
        for field, part in zip(expr.fields, value, strict=True):
            _bind(field, part, env)
