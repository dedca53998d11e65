"""Give every PrimFunc of a module a schedule: the registered template of its family, or the generic one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import tvm
from tvm import s_tir
from tvm.s_tir.schedule import ScheduleError

from tvm_nm.schedules.channel_conv import CHANNEL_CONV_RULE
from tvm_nm.schedules.channel_template import schedule_channel_conv, schedule_lane_conv
from tvm_nm.schedules.conv import CONV_RULE
from tvm_nm.schedules.conv_template import schedule_conv
from tvm_nm.schedules.fc import FC_RULE, schedule_fc
from tvm_nm.schedules.fetch_code import with_fetches
from tvm_nm.schedules.generic import schedule_generic
from tvm_nm.schedules.lane_conv import LANE_CONV_RULE
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.panel_gather import gather_panels
from tvm_nm.schedules.pool import POOL_RULE, schedule_pool
from tvm_nm.schedules.prefetch import add_prefetches
from tvm_nm.schedules.row_copy import copy_rows
from tvm_nm.schedules.weight_stream import stream_weights
from tvm_nm.schedules.winograd import WINOGRAD_RULE
from tvm_nm.schedules.winograd_template import schedule_winograd

__all__ = ["TEMPLATES", "ApplyDefaultSchedules", "apply_template", "pass_context", "schedule_function"]

_log = logging.getLogger(__name__)

TEMPLATES: dict[str, Callable[[s_tir.Schedule, Any], list[s_tir.Schedule]]] = {
    CONV_RULE: schedule_conv,
    CHANNEL_CONV_RULE: schedule_channel_conv,
    LANE_CONV_RULE: schedule_lane_conv,
    FC_RULE: schedule_fc,
    POOL_RULE: schedule_pool,
    WINOGRAD_RULE: schedule_winograd,
}
"""Templates by the `schedule_rule` annotation that selects them; MetaSchedule finds them by the same names."""


def pass_context() -> tvm.transform.PassContext:
    """Return the pass context in which scheduled modules must be built.

    It turns on LoopPartition for the loops that the templates marked; without it a pixel count that is not a multiple
    of the register tile leaves bounds checks in inner loops (the results are the same, the speed is not).
    """
    return tvm.transform.PassContext(opt_level=3, config={"s_tir.LoopPartition": {"partition_const_loop": True}})


def _template_block(sch: s_tir.Schedule) -> tuple[Any, str] | None:
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        annotations = sch.get(block).annotations
        if "schedule_rule" in annotations and str(annotations["schedule_rule"]) in TEMPLATES:
            return block, str(annotations["schedule_rule"])
    return None


def apply_template(sch: s_tir.Schedule) -> bool:
    """Schedule a function by its template, with its default decisions; return whether it has one."""
    found = _template_block(sch)
    if found is not None:
        block, rule = found
        TEMPLATES[rule](sch, block)
    return found is not None


def schedule_function(func: tvm.tirx.PrimFunc, target: tvm.target.Target, name: str = "main") -> tvm.tirx.PrimFunc:
    """Return `func` scheduled with its template's default decisions.

    What has no template and no generic schedule either, such as a scatter written as raw loops, stays as it is; a
    warning calls it `name`. What is scheduled already stays so.
    """
    if func.attrs.get("tirx.is_scheduled", False):
        return with_fetches(func, target)
    sch = s_tir.Schedule(func)
    try:
        found = _template_block(sch)
        if found is None:
            schedule_generic(sch, machine_of(target))
    except ScheduleError as error:
        _log.warning("%s stays unscheduled: %s", name, str(error).strip().splitlines()[-1])
        sch, found = s_tir.Schedule(func), None
    if found is not None:
        block, rule = found
        TEMPLATES[rule](sch, block)
    attributes = dict(func.attrs.items())
    attributes["tirx.is_scheduled"] = True
    return _with_prefetches(sch.mod["main"], target).with_attrs(attributes)


def _with_prefetches(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
    """Return a function whose marked loops prefetch, or copy by vectors."""
    return gather_panels(copy_rows(stream_weights(add_prefetches(with_fetches(func, target), target), target)))


@tvm.transform.module_pass(opt_level=0, name="tvm_nm.ApplyDefaultSchedules")
class ApplyDefaultSchedules:
    """Schedule every PrimFunc that is not scheduled yet, and let those that are fetch weights ahead.

    Parameters
    ----------
    target
        What vectors and threads are chosen for.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        self._target = target

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the scheduled module."""
        scheduled = mod.clone() if hasattr(mod, "clone") else tvm.IRModule(mod.functions, attrs=mod.attrs)
        for name, func in mod.functions_items():
            if not isinstance(func, tvm.tirx.PrimFunc):
                continue
            if func.attrs.get("tirx.is_scheduled", False):  # by a tuning record of MetaSchedule
                scheduled.update_func(name, _with_prefetches(func, self._target))
            else:
                _log.debug("scheduling %s", name.name_hint)
                scheduled.update_func(name, schedule_function(func, self._target, name.name_hint))
        return scheduled
