"""Turns convolutions, fully connected layers and pooling into calls of this project's kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_nm.inventory import LAYERS_ATTR, LayerCall, layer_calls
from tvm_nm.layer_report import LayerReport
from tvm_nm.layer_shape import LayerShape
from tvm_nm.passes.chains import Chain, ChainChoice, choose_chain_kernel, find_chains
from tvm_nm.passes.dataflow import is_call, static_shape
from tvm_nm.passes.epilogue import FusedLayer, fuse_epilogues
from tvm_nm.passes.select import Choice, choose_conv, choose_fc, conv_workload
from tvm_nm.relax_numpy import as_constant
from tvm_nm.schedules.blocked_layout import blocked_layout_func
from tvm_nm.schedules.chain import ChainKernel, blocked_shape
from tvm_nm.schedules.chain_code import chain_prim_func
from tvm_nm.schedules.families import conv_family_of
from tvm_nm.schedules.fc import FcKernel
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.pool import (
    PoolKernel,
    PoolKind,
    choose_pool_kernel,
    maxima_kernel,
    pool_prim_func,
    windows_padding,
)
from tvm_nm.schedules.tuned import TunedKernels
from tvm_nm.schedules.variants import Kernel, kernel_prim_func, variant_text
from tvm_nm.workload import ConvWorkload

__all__ = ["REPORTS_ATTR", "Lower", "layer_reports"]

REPORTS_ATTR = "tvm_nm.layer_reports"
"""Module attribute that `Lower` leaves behind: the layers' reports as JSON."""


def layer_reports(mod: tvm.IRModule) -> tuple[LayerReport, ...]:
    """Return what `Lower` did to each layer of a module, in the order of their calls."""
    text = mod.get_attr(REPORTS_ATTR)
    return () if text is None else tuple(LayerReport(**entry) for entry in json.loads(str(text))["layers"])


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.Lower")
class Lower:
    """Replace every layer with constant weights, and every pooling, by a call of a kernel's PrimFunc.

    The zeros in a layer's weights decide: if a sparsity pattern explains them and its kernel is predicted to be faster
    than the dense one, the weights are packed into values and an index table. The bias, one residual add and one
    activation that follow a layer, and have no other use, are computed in its kernel; so is max pooling, where that is
    a kernel for first layers or, for 2x2 pixels, by Winograd's algorithm.

    The result still holds Relax operators (softmax, concat, ...) for the usual legalisation, and `layer_reports` tells
    what was done. The PrimFuncs are not scheduled yet.

    Parameters
    ----------
    target
        What kernels are chosen for.
    always_sparse
        Use a sparse kernel wherever a pattern explains the zeros, even one that is predicted to lose.
    winograd
        Let 3x3 convolutions and large first ones be computed by Winograd's algorithm where that is predicted to be
        faster.
    tuned
        Tuned kernel variants, such as a `tvm_nm.tuning.database.TuningDatabase` of the target; default: none.
    chains
        Let one kernel compute a convolution, the depthwise one after it and the pointwise one after that, where this is
        predicted to be faster. Off, every layer has a call of its own, whose time can be measured.
    """

    def __init__(
        self,
        target: tvm.target.Target,
        *,
        always_sparse: bool = False,
        winograd: bool = True,
        tuned: TunedKernels | None = None,
        chains: bool = True,
    ) -> None:
        self._target = target
        self._chains = chains
        self._always_sparse = always_sparse
        self._winograd = winograd
        self._tuned = tuned

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the lowered module."""
        calls = [found for found in layer_calls(mod) if _has_kernel(found)]
        main = mod["main"]
        bindings = [binding for block in main.body.blocks for binding in block.bindings]
        layers = fuse_epilogues(calls, bindings, main.body.body)
        sparse, tuned = self._always_sparse, self._tuned
        choose = partial(choose_conv, always_sparse=sparse, winograd=self._winograd, tuned=tuned)
        choose_dense = partial(choose_fc, always_sparse=sparse, tuned=tuned)
        chains = find_chains(layers, bindings, main.body.body) if self._chains else ()
        lowering = _Lowering(mod, layers, self._target, choose, choose_dense)
        lowering.choose_chains(chains, always_sparse=sparse, tuned=tuned)
        lowered = lowering.run(mod)
        # An object, not a list: TVM cannot read an attribute of fewer than 8 characters back.
        reports = json.dumps({"layers": [report.to_dict() for report in lowering.reports]})
        return lowered.without_attr(LAYERS_ATTR).with_attr(REPORTS_ATTR, reports)


def _has_kernel(found: LayerCall) -> bool:
    expressions = (found.call.args[0], found.call.args[1], found.var)
    floats = all(str(expr.ty.dtype) == "float32" for expr in expressions)
    return floats and (found.layer.kind == "conv" or len(found.layer.input_shape) == 2)


@mutator
class _Lowering(PyExprMutator):  # type: ignore[misc]
    def __init__(
        self,
        mod: tvm.IRModule,
        layers: tuple[FusedLayer, ...],
        target: tvm.target.Target,
        choose: Callable[..., Choice],
        choose_fully_connected: Callable[..., Choice],
    ) -> None:
        super().__init__(mod)
        self._machine = machine_of(target)
        self._choose = {"conv": choose, "fc": choose_fully_connected}
        self._by_end = {layer.end: layer for layer in layers}
        self._absorbed = {var for layer in layers for var in layer.absorbed}
        self._alone: dict[Any, Choice] = {}
        self._chain_by_end: dict[Any, ChainChoice] = {}
        self._blocked: dict[Any, Any] = {}
        self.reports: list[LayerReport] = []

    def choose_chains(self, chains: tuple[Chain, ...], *, always_sparse: bool, tuned: TunedKernels | None) -> None:
        """Decide which chains of layers are computed by one kernel each."""
        for chain in chains:
            alone = [self._choice(fused) for fused in chain]
            blocked = chain[0].found.call.args[0] in self._chain_by_end
            found = choose_chain_kernel(
                chain, alone, self._machine, blocked_input=blocked, always_sparse=always_sparse, tuned=tuned
            )
            if found is None:
                self._alone |= {fused.end: choice for fused, choice in zip(chain, alone, strict=True)}
            else:
                self._chain_by_end[chain[-1].end] = found
                self._absorbed |= {fused.end for fused in chain[:-1]}

    def _choice(self, fused: FusedLayer) -> Choice:
        layer = fused.found.layer
        return self._choose[layer.kind](layer, fused.found.weight_view, fused.epilogue, self._machine)

    def run(self, mod: tvm.IRModule) -> tvm.IRModule:
        self.builder_.update_func(mod.get_global_var("main"), self.visit_expr(mod["main"]))
        return self.builder_.get()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self._absorbed:
            return
        layer = self._by_end.get(binding.var)
        if binding.var in self._chain_by_end:
            value = self._chain(self._chain_by_end[binding.var])
        else:
            value = self._layer(layer) if layer is not None else self._pool(binding.value)
        if value is None:
            super().visit_var_binding_(binding)
            return
        emit = self.builder_.emit if isinstance(binding.var, relax.DataflowVar) else self.builder_.emit_output
        self.set_var_remap(binding.var, emit(value, binding.var.name))

    def _layer(self, fused: FusedLayer) -> relax.Call:
        layer = fused.found.layer
        choice = self._alone.pop(fused.end, None) or self._choice(fused)
        kernel = choice.kernel
        function = self.builder_.add_func(
            kernel_prim_func(kernel), "tvm_nm_fc" if layer.kind == "fc" else "tvm_nm_conv"
        )
        # A kernel may see a pointwise layer's map as a single row of pixels, a fully connected layer as one pixel.
        in_shape, out_shape = layer.input_shape, layer.output_shape
        if not isinstance(kernel, (FcKernel, ChainKernel)):
            in_shape, out_shape = kernel.workload.input_shape, kernel.workload.stored_shape
        data = self._shaped(self.visit_expr(fused.found.call.args[0]), in_shape)
        arguments = [data, self._weights(kernel, choice.packed)]
        if choice.packed.index is not None:
            arguments.append(relax.const(choice.packed.index))
        arguments.append(relax.const(fused.bias))
        if fused.residual is not None:
            arguments.append(self._shaped(self.visit_expr(fused.residual), out_shape))
        call = relax.call_tir(function, arguments, relax.TensorType(out_shape, "float32"))
        pool = self._maxima(fused, kernel, call)
        name = "" if pool is None else pool.args[0].name_hint
        self.reports.append(_report(fused, choice, function.name_hint, name))
        if fused.epilogue.pool:
            return call if pool is None else pool
        return self._shaped(self.builder_.emit(call), layer.output_shape) if out_shape != layer.output_shape else call

    def _weights(self, kernel: Kernel, packed: PackedWeights) -> Any:
        """Return what a kernel reads: a constant, or what becomes of one."""
        stored = as_constant(packed.values)
        if isinstance(kernel, (FcKernel, ChainKernel)):
            return stored
        expansion = conv_family_of(kernel).expansion(kernel)
        if expansion is None:
            return stored
        function = self.builder_.add_func(expansion, "tvm_nm_expand")
        return self.builder_.emit(relax.call_tir(function, [stored], relax.TensorType(kernel.weight_shape, "float32")))

    def _maxima(self, fused: FusedLayer, kernel: Kernel, call: relax.Call) -> relax.Call | None:
        """Return the pooling of a layer whose kernel leaves the maxima to it; None for all other layers."""
        if not fused.epilogue.pool or isinstance(kernel, (FcKernel, ChainKernel)) or kernel.workload.epilogue.pool:
            return None
        work = conv_workload(fused.found.layer, fused.epilogue)
        data = self._shaped(self.builder_.emit(call), work.output_shape)
        return self._pooled(maxima_kernel(work, self._machine), data)

    def _chain(self, choice: ChainChoice) -> relax.Call:
        """Return the copy of a chain's output to the usual layout; chains that follow read the blocked one instead."""
        kernel, layers = choice.kernel, choice.layers
        function = self.builder_.add_func(chain_prim_func(kernel), "tvm_nm_chain")
        data, residual = layers[0].found.call.args[0], layers[-1].residual
        arguments = [self._as_blocked(data) if kernel.blocked_input else self.visit_expr(data)]
        for packed, bias in zip(choice.packed, choice.biases, strict=True):
            arguments.append(as_constant(packed.values))
            if packed.index is not None:
                arguments.append(relax.const(packed.index))
            arguments.append(relax.const(bias))
        if residual is not None:
            arguments.append(self._as_blocked(residual))
        self.reports += _chain_reports(choice, function.name_hint, self._machine.threads)
        shape = layers[-1].found.layer.output_shape
        out = relax.TensorType(blocked_shape(shape, kernel.lanes), "float32")
        blocked = self.builder_.emit(relax.call_tir(function, arguments, out))
        self._blocked[layers[-1].end] = blocked
        return self._copied(blocked, shape, to_blocked=False)

    def _as_blocked(self, expr: Any) -> Any:
        if expr not in self._blocked:
            copied = self._copied(self.visit_expr(expr), static_shape(expr), to_blocked=True)
            self._blocked[expr] = self.builder_.emit(copied)
        return self._blocked[expr]

    def _copied(self, expr: Any, shape: Any, *, to_blocked: bool) -> relax.Call:
        machine = self._machine
        function = self.builder_.add_func(
            blocked_layout_func(tuple(shape), machine.lanes, to_blocked=to_blocked, threads=machine.threads),
            "tvm_nm_to_blocked" if to_blocked else "tvm_nm_from_blocked",
        )
        out = blocked_shape(shape, machine.lanes) if to_blocked else shape
        return relax.call_tir(function, [expr], relax.TensorType(out, "float32"))

    def _shaped(self, expr: Any, shape: tuple[int, ...]) -> Any:
        return expr if static_shape(expr) == shape else self.builder_.emit(relax.op.reshape(expr, shape))

    def _pool(self, value: Any) -> relax.Call | None:
        if not is_call(value, "relax.nn.max_pool2d", "relax.nn.avg_pool2d"):
            return None
        attrs = value.attrs
        shape, out_shape = static_shape(value.args[0]), static_shape(value)
        if shape is None or out_shape is None or attrs.layout != "NCHW" or str(value.ty.dtype) != "float32":
            return None
        kernel_size, stride, dilation = (_pair(attrs.pool_size), _pair(attrs.strides), _pair(attrs.dilation))
        top, left, bottom, right = (int(pad) for pad in attrs.padding)
        padding = windows_padding(shape, out_shape, kernel_size, stride, dilation, attrs.padding)
        channels = shape[1]
        work = ConvWorkload(
            shape[0], channels, channels, shape[2], shape[3], kernel_size, stride, padding, dilation, channels
        )
        if (work.out_height, work.out_width) != out_shape[2:]:
            return None
        kind = PoolKind.MAX
        if value.op.name == "relax.nn.avg_pool2d":
            kind = PoolKind.AVERAGE_INCLUDE_PAD if attrs.count_include_pad else PoolKind.AVERAGE
        kernel = choose_pool_kernel(work, kind, (top, left, bottom, right), self._machine)
        return self._pooled(kernel, self.visit_expr(value.args[0]))

    def _pooled(self, kernel: PoolKernel, data: Any) -> relax.Call:
        function = self.builder_.add_func(pool_prim_func(kernel), "tvm_nm_pool")
        shape = kernel.geometry.workload.output_shape
        return relax.call_tir(function, [data], relax.TensorType(shape, "float32"))


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def _report(fused: FusedLayer, choice: Choice, function: str, pool: str) -> LayerReport:
    kernel = choice.kernel
    return _layer_report(
        fused,
        pattern=choice.pattern,
        density=choice.density,
        kernel=f"{kernel}, then a pooling" if pool else str(kernel),
        function=function,
        pool=pool,
        kept_macs=kernel.macs,
        packed_bytes=choice.packed.bytes,
        note=choice.note,
        tuning=choice.tuning,
        **_tuned_as(choice.task, kernel),
    )


def _tuned_as(task: KernelTask | None, kernel: Kernel) -> dict[str, str]:
    return {} if task is None else {"task": str(task), "variant": variant_text(kernel)}


def _chain_reports(choice: ChainChoice, function: str, threads: int) -> list[LayerReport]:
    name = choice.layers[0].found.layer.name
    tuned_as = _tuned_as(KernelTask.of(choice.kernel, threads), choice.kernel)
    return [
        _layer_report(
            fused,
            pattern=choice.patterns[number],
            density=choice.densities[number],
            kernel=str(choice.kernel),
            function=function,
            kept_macs=choice.kernel.layer_macs[number],
            packed_bytes=choice.packed[number].bytes,
            note=choice.notes[number],
            tuning=choice.tuning,
            chain=name if number else "",
            **({} if number else tuned_as),
        )
        for number, fused in enumerate(choice.layers)
    ]


def _layer_report(fused: FusedLayer, **found: Any) -> LayerReport:
    layer = fused.found.layer
    shape = LayerShape(
        layer.kind,
        layer.weight_shape,
        layer.input_shape,
        layer.strides,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    if layer.kind == "fc":
        batch, features = layer.input_shape
        workload = f"{features}->{layer.weight_shape[0]} fc" + (f" n{batch}" if batch > 1 else "")
    else:
        workload = str(conv_workload(layer, fused.epilogue))
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        workload=workload,
        epilogue=str(fused.epilogue),
        macs=layer.macs,
        shape=shape.text,
        **found,
    )
