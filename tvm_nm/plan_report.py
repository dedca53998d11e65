"""Plans for people: tables, summaries and a plot of time against loss."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tvm_nm.costs import CostTable
from tvm_nm.errors import PlanError
from tvm_nm.json_file import write_bytes
from tvm_nm.plan import LayerChoice, Plan, PlanOrigin
from tvm_nm.plan_check import PlanDifference

if TYPE_CHECKING:
    from tvm_nm.planned import Planned

__all__ = [
    "check_plot",
    "choice_label",
    "difference_table",
    "origin_differences",
    "plan_summary",
    "plan_table",
    "plot_front",
]

_FORMATS = ("svg", "png", "html")


def plan_table(plan: Plan, table: CostTable, metric: str) -> Table:
    """Show what becomes of each layer, beside its dense time."""
    result = _table("layer", "workload", "choice", "time us", "dense us", "source", "loss", "note")
    choices = {choice.name: choice for choice in plan.layers}
    for layer in table.layers:
        choice = choices.get(layer.name)
        candidate = layer.dense if choice is None else layer.find(choice.pattern, choice.density)
        if candidate is None:
            assert choice is not None
            result.add_row(
                layer.name, layer.workload, choice_label(choice), "?", f"{layer.dense.time_us:.1f}", "", "?", ""
            )
            continue
        faster = [c for c in layer.candidates if not c.is_dense and c.time_us < layer.dense.time_us]
        note = "no sparse kernel is faster" if layer.can_be_pruned and not faster else ""
        result.add_row(
            layer.name,
            layer.workload,
            candidate.label,
            f"{candidate.time_us:.1f}",
            f"{layer.dense.time_us:.1f}",
            candidate.source.value,
            f"{layer.loss(candidate, metric):.5f}" if metric in layer.sensitivity else "",
            note,
        )
    return result


def plan_summary(planned: Planned) -> str:
    """Say what the plan is expected to achieve, and what was measured of it."""
    from tvm_nm.plan_loop import describe_rounds

    origin = planned.plan.origin
    assert origin is not None
    dense = planned.dense_us
    lines = [
        f"dense      {dense / 1e3:.3f} ms ({planned.table.threads} thread{'s' if planned.table.threads > 1 else ''})",
        f"budget     {planned.budget_us / 1e3:.3f} ms ({planned.budget_us / dense:.1%})",
        f"predicted  {origin.predicted_us / 1e3:.3f} ms ({origin.predicted_us / dense:.1%}, "
        f"{dense / origin.predicted_us:.2f}x)",
        f"loss       {origin.loss:.5f} ({planned.metric}; 0 is dense, 1 is nothing left)",
    ]
    beaten = [point for point in planned.uniform if point.time_us <= origin.predicted_us * 1.001]
    if beaten:
        best = min(beaten, key=lambda point: point.loss)
        lines.append(f"uniform    {best.loss:.5f} is what {best.label} for all layers loses within that time")
    if planned.search is not None:
        found = planned.search
        lines.append(
            f"search     divergence from the dense network {found.first_divergence:.4g} -> {found.divergence:.4g} "
            f"({found.trials} different plans)"
        )
    if planned.loop is not None:
        lines += describe_rounds(planned.loop)
    if origin.note:
        lines.append(origin.note)
    return "\n".join(lines)


def difference_table(differences: Sequence[PlanDifference]) -> Table:
    """Show the layers of which two plans think differently."""
    result = _table("layer", "before", "after")
    for item in differences:
        result.add_row(item.name, choice_label(item.before), choice_label(item.after))
    return result


def origin_differences(before: PlanOrigin | None, after: PlanOrigin | None) -> list[str]:
    """Return lines about what two plans were made for, as far as it differs."""
    if before is None or after is None:
        return [] if before is after else ["one of the plans does not say what it was made for"]
    names = ("model", "model_sha256", "target", "threads", "revision", "metric", "budget_us", "dense_us")
    return [
        f"{name}: {getattr(before, name)} -> {getattr(after, name)}"
        for name in (*names, "predicted_us", "loss", "measured_share")
        if getattr(before, name) != getattr(after, name)
    ]


def check_plot(path: str | os.PathLike[str]) -> str:
    """Return the kind of plot that a file's suffix asks for; raises `PlanError` as `plot_front`."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise PlanError(f"a plot is written as .svg, .png or .html, not as {os.fspath(path)!r}")
    try:
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlanError(f"plots need Matplotlib ({error}); run: pip install 'tvm-nm[plot]'") from error
    return kind


def plot_front(front: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw time against loss: the front, one density for all, the dense network and the plan that was chosen.

    Parameters
    ----------
    front
        What `tvm_nm.plan_model.Planned.front_dict` returns.
    path
        ``.svg``, ``.png`` or ``.html``.

    Raises
    ------
    PlanError
        If the suffix is another, or Matplotlib is missing.
    ArtifactError
        If the file cannot be written.
    """
    kind = check_plot(path)
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    dense = front["dense_us"]

    def draw(points: Sequence[dict[str, Any]], *style: Any, **options: Any) -> None:
        axes.plot([p["time_us"] / dense for p in points], [p["loss"] for p in points], *style, **options)

    draw(front["points"], "-", color="tab:blue", label="best plans")
    for pattern in dict.fromkeys(point["pattern"] for point in front["uniform"]):
        draw([p for p in front["uniform"] if p["pattern"] == pattern], ".--", label=f"{pattern}, one density for all")
    axes.plot([1.0], [0.0], "s", color="black", label="dense")
    draw([front["chosen"]], "*", color="tab:red", markersize=14, label="chosen")
    axes.axvline(front["budget_us"] / dense, color="grey", linewidth=0.8, linestyle=":", label="budget")
    axes.set_xlabel(f"time, share of dense ({dense / 1e3:.3g} ms)")
    axes.set_ylabel(f"loss ({front['metric']})")
    axes.set_title(front["model"])
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png" if kind == "png" else "svg", dpi=150)
    data = buffer.getvalue()
    if kind == "html":
        drawing = data.decode("utf-8")
        drawing = drawing[drawing.index("<svg") :]
        data = f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>Plans</title>\n{drawing}\n'.encode()
    write_bytes(path, data, "plot")


def choice_label(choice: LayerChoice | None) -> str:
    """Return pattern and density in words."""
    return "not named" if choice is None else choice.pattern.at(choice.density)


def _table(*columns: str) -> Table:
    result = Table(box=None, pad_edge=False, header_style="bold")
    numbers = ("time us", "dense us", "loss")
    for column in columns:
        result.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return result
