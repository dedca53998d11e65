"""Tables for people: of an artefact's layers and of a benchmark."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tvm_nm.layer_report import LayerReport
from tvm_nm.layer_times import LayerTime, mean_share_of_peak, pruned_layers
from tvm_nm.manifest import Manifest
from tvm_nm.patterns import Dense
from tvm_nm.rearrangement_report import RearrangementReport
from tvm_nm.reference_run import TensorSpec

if TYPE_CHECKING:
    from tvm_nm.bench import Timing
    from tvm_nm.pruning import LayerSparsity

__all__ = [
    "layer_table",
    "layer_times_table",
    "rearrangement_table",
    "report_text",
    "short_count",
    "sparsity_rows",
    "sparsity_table",
    "summary",
    "timing_table",
    "to_text",
]

_NAMED = 8
_WIDE = 400
"""Columns of a table: wide enough that no row is cut."""


def report_text(manifest: Manifest, times: Sequence[LayerTime] = ()) -> str:
    """Return the content of the report file, with the layers' times if they were measured."""
    text = f"{summary(manifest)}\n\n{to_text(layer_table(manifest.layers))}"
    if manifest.rearrangement is not None:
        text += f"\nFilter rearrangement:\n\n{to_text(rearrangement_table(manifest.rearrangement))}"
    if times:
        text += f"\nMeasured, one inference:\n\n{to_text(layer_times_table(times))}"
    return text


def to_text(table: Table) -> str:
    """Render a table as plain text without trailing blanks."""
    console = Console(file=io.StringIO(), width=_WIDE, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def summary(manifest: Manifest) -> str:
    """Describe an artefact in a few lines."""
    found = manifest.verification
    verified = "not verified"
    if found is not None:
        verified = f"differs from {found.reference} by at most {found.max_abs:.2g} ({found.max_rel:.1e} relative)"
    cpu = manifest.target.get("mcpu", manifest.architecture)
    share = manifest.kept_macs / max(1, manifest.macs)
    lines = [
        f"model      {manifest.model} (sha256 {manifest.model_sha256[:12]})",
        f"inputs     {_signature(manifest.inputs)}",
        f"outputs    {_signature(manifest.outputs)}",
        f"target     {cpu}, {manifest.threads} thread{'s' if manifest.threads > 1 else ''}",
        f"pattern    {manifest.pattern} at density {manifest.density:g}",
        *([] if manifest.rearrangement is None else [_rearranged(manifest.rearrangement)]),
        f"executed   {short_count(manifest.kept_macs)} of {short_count(manifest.macs)} MACs ({share:.1%})",
        f"tuning     {_tuning(manifest.layers)}",
        f"library    {manifest.library_bytes / 1e6:.1f} MB (sha256 {manifest.library_sha256[:12]})",
        f"verified   {verified}",
        f"built      in {manifest.build_seconds:.1f} s by tvm-nm {manifest.versions.get('tvm-nm', '?')}, "
        f"TVM {manifest.versions.get('apache-tvm', '?')}",
    ]
    return "\n".join(lines)


def layer_table(layers: Sequence[LayerReport]) -> Table:
    """Show what became of each layer, and the totals."""
    table = _table(
        "layer", "workload", "epilogue", "pattern", "density", "kernel", "tuning", "MACs", "kept", "bytes", "note"
    )
    for layer in layers:
        table.add_row(
            layer.name,
            layer.workload,
            layer.epilogue,
            layer.pattern,
            f"{layer.density:.3f}",
            layer.kernel,
            layer.tuning,
            short_count(layer.macs),
            short_count(layer.kept_macs),
            short_count(layer.packed_bytes),
            layer.note,
        )
    macs, kept, packed = (
        sum(getattr(layer, field) for layer in layers) for field in ("macs", "kept_macs", "packed_bytes")
    )
    table.add_section()
    totals = (f"{kept / max(1, macs):.3f}", "", *map(short_count, (macs, kept, packed)))
    table.add_row(f"{len(layers)} layers", "", "", "", totals[0], totals[1], "", *totals[2:])
    return table


def rearrangement_table(report: RearrangementReport) -> Table:
    """Show what rearrangement did to each pruned layer: the share of what it is worth that is kept, what moved."""
    table = _table("layer", "pattern", "kept before", "kept after", "outputs moved", "inputs moved", "note")
    for layer in report.layers:
        if layer.pattern:
            notes = [
                f"{axis}: {note}" for axis, note in (("out", layer.outputs_note), ("in", layer.inputs_note)) if note
            ]
            shares = f"{layer.kept_before:.4f}", f"{layer.kept_after:.4f}"
            moved = str(layer.outputs_moved), str(layer.inputs_moved)
            table.add_row(layer.name, layer.pattern, *shares, *moved, "; ".join(notes))
    return table


def sparsity_rows(found: Sequence[LayerSparsity]) -> list[dict[str, Any]]:
    """Return a model's layers and the patterns found in them as JSON-ready values."""
    return [
        {
            **asdict(item.layer),
            "parameters": item.layer.parameters,
            "pattern": str(item.detection.pattern) if item.detection.pattern else None,
            "density": item.detection.density,
            "reason": item.detection.reason,
        }
        for item in found
    ]


def sparsity_table(found: Sequence[LayerSparsity]) -> Table:
    """Show a model's layers and the patterns found in their weights."""
    table = _table("layer", "kind", "weight", "groups", "strides", "MACs", "density", "pattern", "note")
    for item in found:
        layer, detection = item.layer, item.detection
        table.add_row(
            layer.name,
            layer.kind,
            "x".join(map(str, layer.weight_shape)),
            str(layer.groups),
            "x".join(map(str, layer.strides)),
            short_count(layer.macs),
            f"{detection.density:.3f}",
            str(detection.pattern) if detection.pattern else "none",
            "" if isinstance(detection.pattern, Dense) else detection.reason,
        )
    parameters = sum(item.layer.parameters for item in found)
    left = sum(item.layer.parameters * item.detection.density for item in found)
    table.add_section()
    macs = short_count(sum(item.layer.macs for item in found))
    table.add_row(f"{len(found)} layers", "", short_count(parameters), "", "", macs, f"{left / max(1, parameters):.3f}")
    return table


def layer_times_table(times: Sequence[LayerTime]) -> Table:
    """Show where the time of an inference goes and, where it was measured, what the sparse kernels gain."""
    total = sum(time.time_us for time in times) or 1.0
    compared = any(time.alone for time in times)
    columns = ["layer", "workload", "pattern", "density", "kernel", "calls", "us", "share", "GFLOP/s", "of peak"]
    table = _table(*columns, *(["alone us", "dense us", "gain", "note"] if compared else ["note"]))
    for time in times:
        layer = time.layer
        table.add_row(
            time.name,
            layer.workload if layer else "",
            layer.pattern if layer else "",
            f"{layer.density:.3f}" if layer else "",
            layer.kernel if layer else "",
            str(time.calls),
            f"{time.time_us:.1f}",
            f"{time.time_us / total:.1%}",
            f"{time.gflops:.0f}" if layer else "",
            f"{time.share_of_peak:.0%}" if layer else "",
            *(_alone_cells(time) if compared else ()),
            _layer_note(time),
        )
    table.add_section()
    if pruned := pruned_layers(times):
        together = sum(time.time_us for time in pruned)
        row = f"{len(pruned)} pruned layers", *[""] * 5, f"{together:.1f}", f"{together / total:.1%}", ""
        table.add_row(*row, f"{mean_share_of_peak(pruned):.0%}")
    table.add_row("sum", "", "", "", "", "", f"{total:.1f}")
    return table


def _alone_cells(time: LayerTime) -> tuple[str, str, str]:
    found = time.alone
    if found is None:
        return "", "", ""
    return f"{found.time_us:.1f}", f"{found.dense_us:.1f}", f"{found.speedup:.2f}x"


def _layer_note(time: LayerTime) -> str:
    if time.layer is None:
        return ""
    if time.alone is None:
        return time.layer.note
    notes = [f"dense: {time.alone.dense_kernel}"]
    if time.alone.kernel != time.layer.kernel:
        notes.append(f"alone: {time.alone.kernel}")
    if time.alone.speedup < 1:
        notes.append("slower than dense: leave it out with --exclude")
    return "; ".join(notes)


def timing_table(timings: Sequence[Timing]) -> Table:
    """Show the contestants' latencies and, beside onnxruntime, the ratios of its median to theirs."""
    baseline = next((timing for timing in timings if timing.name.startswith("onnxruntime")), None)
    table = _table("", "threads", "median ms", "min ms", *(["speed-up"] if baseline else []))
    for timing in timings:
        cells = [timing.name, str(timing.threads), f"{timing.median_ms:.3f}", f"{timing.min_ms:.3f}"]
        if baseline:
            cells.append(f"{baseline.median_ms / timing.median_ms:.2f}x")
        table.add_row(*cells)
    return table


def short_count(number: float) -> str:
    """Write a number with three digits and k, M or G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _tuning(layers: Sequence[LayerReport]) -> str:
    """Say where the layers' kernel variants come from, and name those that were never tuned."""
    counts = Counter(layer.tuning for layer in layers)
    untuned = [layer.name for layer in layers if layer.tuning == "default"]
    parts = [f"{count} {origin}" for origin, count in counts.items() if origin != "default"]
    if untuned:
        named = ", ".join(untuned[:_NAMED]) + (", ..." if len(untuned) > _NAMED else "")
        parts.append(f"{len(untuned)} untuned ({named})")
    return ", ".join(parts) or "no layers"


def _rearranged(report: RearrangementReport) -> str:
    before, after = report.kept
    kept = f"keeps {after:.1%} of the {report.measure}, not {before:.1%}"
    return f"rearranged by {report.method} in {report.seconds:.1f} s: {kept}"


def _signature(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype}{list(s.shape)}" for s in specs)


_NUMBERS = frozenset({"density", "MACs", "kept", "bytes", "calls", "us", "share", "GFLOP/s"})
_NUMBERS |= {"of peak", "alone us", "dense us", "gain", "groups", "threads", "median ms", "min ms", "speed-up"}
_NUMBERS |= {"kept before", "kept after", "outputs moved", "inputs moved"}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="right" if column in _NUMBERS else "left", no_wrap=True)
    return table
