"""Filter rearrangement: channels change places so that the plan's sparsity patterns keep more of the weights.

The network computes what it computed. Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks" (TPAMI 2022)
sort a layer's filters and the next layer's input channels with them; here any order of any set of channels that is tied
together in any way is carried through (`tvm_nm.passes.channel_ties`), and the order is searched for the very masks that
pruning will choose (`tvm_nm.rearrangement`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_nm.errors import PlanError
from tvm_nm.inventory import LayerCall, layer_calls
from tvm_nm.masks import BoolArray
from tvm_nm.passes.channel_flow import ChannelFlow, ConstantUse, LayerChannels
from tvm_nm.passes.channel_rules import follow_channels
from tvm_nm.passes.channel_ties import Indices, Solution
from tvm_nm.patterns import Dense
from tvm_nm.plan import Plan, near_names
from tvm_nm.rearrangement import ChannelTie, FreeChannels, OrderSearch, search_orders
from tvm_nm.rearrangement_report import LayerRearrangement, RearrangementReport
from tvm_nm.rearrangement_terms import LayerState
from tvm_nm.relax_numpy import as_constant, as_numpy

__all__ = [
    "REARRANGEMENT_ATTR",
    "LayerOrder",
    "Rearrange",
    "Rearranged",
    "class_contents",
    "free_channels",
    "moved_layers",
    "rearrange",
    "rearrangement_report",
    "reordered",
]

REARRANGEMENT_ATTR = "tvm_nm.rearrangement"
"""Module attribute that `Rearrange` leaves behind: its report as JSON."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """In which order a layer's channels are after rearrangement.

    Attributes
    ----------
    outputs
        By output channel, the one of the original layer that it was; (OC,).
    inputs
        The same for the input channels of all groups together; (IC,). Channels of a grouped convolution stay in their
        group; those of a depthwise one go with the output channels.
    groups
        The convolution's groups.
    """

    outputs: Indices
    inputs: Indices
    groups: int

    def apply(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Bring a weight or mask, (OC, IC / groups, KH, KW), from the original order to this one."""
        width = weight.shape[1]
        if self.groups == 1:
            changed: NDArray[Any] = weight[self.outputs]
            return changed if np.array_equal(self.inputs, np.arange(width)) else changed[:, self.inputs]
        rows = np.arange(len(weight)) // (len(weight) // self.groups)
        local = (self.inputs.reshape(self.groups, width) % width)[rows]
        moved: NDArray[Any] = weight[self.outputs[:, None], local]
        return moved

    def undo(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Bring a weight or mask from this order to the original one."""
        original = np.empty(weight.shape, weight.dtype)  # contiguous, so that the reshape below is a view
        kernels = np.arange(weight.shape[0] * weight.shape[1]).reshape(*weight.shape[:2], 1, 1)
        places = self.apply(kernels)
        original.reshape(-1, *weight.shape[2:])[places.reshape(-1)] = weight.reshape(-1, *weight.shape[2:])
        return original


@dataclass(frozen=True, slots=True)
class Rearranged:
    """A module in another order.

    Attributes
    ----------
    module
        The module, with the report as its attribute.
    orders
        By layer name, where its channels were; layers of which nothing moved are left out.
    report
        What was done.
    """

    module: tvm.IRModule
    orders: dict[str, LayerOrder]
    report: RearrangementReport

    def original_masks(self, masks: Mapping[str, BoolArray]) -> dict[str, BoolArray]:
        """Bring masks of the rearranged layers to the order of the original module."""
        return {name: self.orders[name].undo(mask) if name in self.orders else mask for name, mask in masks.items()}


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.Rearrange")
class Rearrange:
    """Permute channels of a canonical module for a plan; inputs and outputs of the network keep their order.

    `rearrangement_report` tells what was done, `rearrange` returns the orders besides.

    Parameters
    ----------
    plan
        What each layer will be pruned to.
    method
        How to search; see `tvm_nm.rearrangement`.

    Raises
    ------
    PlanError
        When the pass runs, if the plan names a layer that the module lacks.
    """

    def __init__(self, plan: Plan, method: OrderSearch = "swap") -> None:
        self.plan = plan
        self.method = method

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rearranged module."""
        return rearrange(mod, self.plan, self.method).module


def rearrangement_report(mod: tvm.IRModule) -> RearrangementReport | None:
    """Return what `Rearrange` did to a module; None if it did not run."""
    text = mod.get_attr(REARRANGEMENT_ATTR)
    return None if text is None else RearrangementReport.from_json(str(text))


def rearrange(
    mod: tvm.IRModule,
    plan: Plan,
    method: OrderSearch = "swap",
    saliency: Mapping[str, NDArray[np.float32]] | None = None,
) -> Rearranged:
    """Permute channels so that the plan's masks keep more; the function that `Rearrange` makes a pass of.

    Parameters
    ----------
    mod, plan, method
        As for `Rearrange`.
    saliency
        By layer name, what each weight is worth, not negative, of the weight's shape; default: its absolute value. The
        report's shares are of this.

    Raises
    ------
    PlanError
        If the plan names a layer that the module lacks.
    """
    start = time.perf_counter()
    calls = {found.layer.name: found for found in layer_calls(mod)}
    layers = {}
    for choice in plan.layers:
        if choice.name not in calls:
            raise PlanError(
                f"the plan names layer {choice.name!r}, which the model does not have; {near_names(choice.name, calls)}"
            )
        if not isinstance(choice.pattern, Dense):
            found = calls[choice.name]
            weight = (saliency or {}).get(choice.name, found.weight_view)
            layers[choice.name] = LayerState.start(weight, choice.pattern, choice.density, found.layer.groups)
    flow = follow_channels(mod)
    solution = flow.ties.solve()
    free = free_channels(flow, solution)
    before = {name: state.kept_share() for name, state in layers.items()}
    orders = search_orders(layers, free, method)
    after = {name: state.kept_share() for name, state in layers.items()} if method != "none" else before
    content = class_contents(solution, orders)
    moved = moved_layers(flow, solution, content, {name: call.layer.groups for name, call in calls.items()})
    rows = []
    for name in calls:
        pattern = str(layers[name].pattern) if name in layers else ""
        kept = before.get(name, 1.0), after.get(name, 1.0)
        rows.append(_row(name, pattern, kept, flow.layers.get(name), moved.get(name), solution))
    measure = "L1 norm" if saliency is None else "saliency on the calibration images"
    report = RearrangementReport(method, round(time.perf_counter() - start, 3), tuple(rows), measure)
    for row in rows:
        if row.pattern:
            _log.info(
                "%s: %s keeps %.4f instead of %.4f; outputs: %s; inputs: %s",
                *(row.name, row.pattern, row.kept_after, row.kept_before),
                *(row.outputs_note or "free", row.inputs_note or "free"),
            )
    module = reordered(mod, flow, solution, content) if moved else mod
    return Rearranged(module.with_attr(REARRANGEMENT_ATTR, report.to_json()), moved, report)


def free_channels(flow: ChannelFlow, solution: Solution) -> list[FreeChannels]:
    """Say where each set of channels that may change places stands on the axes of layers."""
    owner = np.full(len(solution.roots), -1)
    number = np.zeros(len(solution.roots), np.int64)
    for index, channels in enumerate(solution.sets):
        owner[list(channels.classes)] = index
        number[list(channels.classes)] = np.arange(len(channels.classes))
    ties: list[list[ChannelTie]] = [[] for _ in solution.sets]
    for layer in flow.layers.values():
        for axis, labels in (("output", layer.outputs), ("input", layer.inputs)):
            classes = solution.roots[labels]
            for index in np.unique(owner[classes]).tolist():
                if index >= 0:
                    places = np.flatnonzero(owner[classes] == index)
                    # Each class equally often: sorted by class, the k-th of each is the k-th of its place.
                    ordered = places[np.argsort(number[classes[places]], kind="stable")]
                    size = len(solution.sets[index].classes)
                    for times in ordered.reshape(size, -1).T:
                        ties[index].append(ChannelTie(layer.name, axis, times))  # type: ignore[arg-type]
    return [FreeChannels(len(s.classes), tuple(t)) for s, t in zip(solution.sets, ties, strict=True)]


def class_contents(solution: Solution, orders: list[Indices]) -> Indices:
    """By channel class: the class whose channels come to its places."""
    content = np.arange(len(solution.roots))
    for channels, order in zip(solution.sets, orders, strict=True):
        classes = np.array(channels.classes)
        content[classes] = classes[order]
    return content


def moved_layers(
    flow: ChannelFlow, solution: Solution, content: Indices, groups: Mapping[str, int]
) -> dict[str, LayerOrder]:
    """By layer name, the order of its channels; layers of which nothing moves are left out."""
    orders = {
        name: LayerOrder(
            solution.source(channels.outputs, content), solution.source(channels.inputs, content), groups[name]
        )
        for name, channels in flow.layers.items()
    }
    return {name: order for name, order in orders.items() if _moves(order)}


def reordered(mod: tvm.IRModule, flow: ChannelFlow, solution: Solution, content: Indices) -> tvm.IRModule:
    """Put every constant that belongs to channels in the new order."""
    calls = {found.var: found for found in layer_calls(mod)}
    constants: dict[Any, list[ConstantUse]] = {}
    for use in flow.constants:
        constants.setdefault(use.var, []).append(use)
    main = mod.get_global_var("main")
    result = mod.clone()
    result.update_func(main, _Reorder(mod, calls, flow, constants, solution, content).visit_expr(mod[main]))
    return result


@mutator
class _Reorder(PyExprMutator):  # type: ignore[misc]
    """Replaces the constants of calls, one call at a time: a weight may have hundreds of megabytes."""

    def __init__(
        self,
        mod: tvm.IRModule,
        calls: Mapping[Any, LayerCall],
        flow: ChannelFlow,
        constants: Mapping[Any, list[ConstantUse]],
        solution: Solution,
        content: Indices,
    ) -> None:
        super().__init__(mod)
        self._calls = calls
        self._layers = flow.layers
        self._constants = constants
        self._solution = solution
        self._content = content

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Replace the constants of a call."""
        changed: dict[int, Any] = {}
        found = self._calls.get(binding.var)
        if found is not None and found.layer.name in self._layers:
            channels = self._layers[found.layer.name]
            order = LayerOrder(self._source(channels.outputs), self._source(channels.inputs), found.layer.groups)
            if _moves(order):
                changed[1] = as_constant(found.as_argument(order.apply(found.weight_view)))
        for use in self._constants.get(binding.var, ()):
            source = self._source(use.labels)
            if not np.array_equal(source, np.arange(source.size)):
                value = as_numpy(binding.value.args[use.argument])
                changed[use.argument] = as_constant(_follow(value.reshape(use.shape), use.labels, source, value.shape))
        if changed:
            call = binding.value
            arguments = [changed.get(index, argument) for index, argument in enumerate(call.args)]
            binding = relax.VarBinding(binding.var, relax.Call(call.op, arguments, call.attrs, call.ty_args))
        super().visit_var_binding_(binding)

    def _source(self, labels: Indices) -> Indices:
        return self._solution.source(labels, self._content)


def _follow(value: NDArray[Any], labels: Indices, source: Indices, shape: tuple[int, ...]) -> NDArray[Any]:
    """Put a constant's elements in the order of the channels that they belong to."""
    along = [axis for axis, size in enumerate(labels.shape) if size > 1]
    front = np.moveaxis(value, along, range(len(along)))
    flat = front.reshape(source.size, -1)[source].reshape(front.shape)
    return np.moveaxis(flat, range(len(along)), along).reshape(shape)


def _moves(order: LayerOrder) -> bool:
    return not all(np.array_equal(axis, np.arange(len(axis))) for axis in (order.outputs, order.inputs))


def _row(
    name: str,
    pattern: str,
    kept: tuple[float, float],
    channels: LayerChannels | None,
    order: LayerOrder | None,
    solution: Solution,
) -> LayerRearrangement:
    if channels is None:
        note = "it is no convolution or FC of the usual form"
        return LayerRearrangement(name, pattern, *kept, 0, 0, 0, 0, note, note)
    outputs_free, outputs_note = _freedom(channels.outputs, solution)
    inputs_free, inputs_note = _freedom(channels.inputs, solution)
    moved = (0, 0) if order is None else (_displaced(order.outputs), _displaced(order.inputs))
    return LayerRearrangement(name, pattern, *kept, outputs_free, inputs_free, *moved, outputs_note, inputs_note)


def _freedom(labels: Indices, solution: Solution) -> tuple[int, str]:
    """Count the channels that may move, and say why the others may not."""
    classes = solution.roots[labels].tolist()
    reasons = Counter(solution.reasons[c] for c in classes if c in solution.reasons)
    stay = sum(reasons.values())
    note = "; ".join(f"{count if stay < len(classes) else 'all'} stay: {why}" for why, count in reasons.most_common())
    return len(classes) - stay, note


def _displaced(source: Indices) -> int:
    return int(np.count_nonzero(source != np.arange(len(source))))
