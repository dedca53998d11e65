"""The benchmark's results as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tvm_nm.peers.contest import BASELINE, Entry
from tvm_nm.peers.models import DENSE

__all__ = ["Contest", "best_peer", "contest_rows", "heading", "markdown", "processor", "rich_table", "to_dict"]

_LEFT = ("model", "variant", "runtime", "precision", "note")


@dataclass(frozen=True, slots=True)
class Contest:
    """What took turns with equally many threads.

    Attributes
    ----------
    model
        The model's name, or the layer's.
    threads
        Number of threads.
    entries
        The contestants.
    peaks_gflops
        Every reading of the FMA peak.
    skipped
        Runtimes that did not take part, with the reason.
    macs
        Multiply-accumulates of the dense model.
    """

    model: str
    threads: int
    entries: tuple[Entry, ...]
    peaks_gflops: tuple[float, ...]
    skipped: dict[str, str]
    macs: int


def best_peer(entry: Entry, entries: Iterable[Entry], ours: str) -> Entry | None:
    """Return the fastest fp32 runtime other than this project, on the dense model or on the one that `entry` runs."""
    allowed = {DENSE, entry.file.variant.name}
    others = [
        other
        for other in entries
        if other.blocks and other.is_fp32 and other.peer.name != ours and other.file.variant.name in allowed
    ]
    return min(others, key=lambda other: other.median_ms, default=None)


def contest_rows(contest: Contest, ours: str) -> list[dict[str, str]]:
    """Return a contest's rows, cells by column."""
    baseline = next(
        (e for e in contest.entries if e.blocks and (e.peer.name, e.file.variant.name) == (BASELINE, DENSE)), None
    )
    rows = []
    for entry in contest.entries:
        best = best_peer(entry, contest.entries, ours)
        row = {
            "model": contest.model,
            "threads": str(contest.threads),
            "variant": entry.file.variant.name,
            "runtime": entry.peer.name,
            "precision": entry.peer.precision,
        }
        if entry.blocks:
            row |= {
                "median ms": _digits(entry.median_ms),
                "min ms": _digits(entry.min_ms),
                "of peak": f"{entry.share_of_peak:.0%}",
                f"vs {BASELINE}": _times(entry.speed_against(baseline) if baseline else None),
                "vs best fp32": _times(entry.speed_against(best) if best else None),
            }
        row["max rel. error"] = "" if entry.error is None else f"{entry.error:.0e}"
        row["note"] = entry.note or entry.kernel
        rows.append(row)
    for name, reason in contest.skipped.items():
        rows.append({"model": contest.model, "threads": str(contest.threads), "runtime": name, "note": reason})
    return rows


_COLUMNS = (
    *("model", "threads", "variant", "runtime", "precision", "median ms", "min ms", "of peak"),
    *(f"vs {BASELINE}", "vs best fp32", "max rel. error", "note"),
)


def rich_table(contests: Sequence[Contest], ours: str) -> Table:
    """Show contests on a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(Text(column), justify="left" if column in _LEFT else "right", no_wrap=column != "note")
    for contest in contests:
        for row in contest_rows(contest, ours):
            style = "bold" if row["runtime"] == ours else None
            table.add_row(*(Text(row.get(column, "")) for column in _COLUMNS), style=style)
        table.add_section()
    return table


def markdown(contests: Sequence[Contest], ours: str) -> str:
    """Return the same table as Markdown, with what it was measured on."""
    lines = [*heading(contests), "", "| " + " | ".join(_COLUMNS) + " |"]
    lines.append("|" + "|".join("---" if column in _LEFT else "---:" for column in _COLUMNS) + "|")
    for contest in contests:
        for row in contest_rows(contest, ours):
            cells = [row.get(column, "").replace("|", "\\|") for column in _COLUMNS]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def heading(contests: Sequence[Contest]) -> list[str]:
    """Say what the figures were measured on."""
    lines = [processor()]
    for threads in sorted({contest.threads for contest in contests}):
        peaks = [peak for contest in contests if contest.threads == threads for peak in contest.peaks_gflops]
        if peaks:
            low, middle, high = min(peaks), statistics.median(peaks), max(peaks)
            lines.append(
                f"FMA peak with {threads} thread{'s' if threads > 1 else ''}: {middle:.0f} GFLOP/s in the median, "
                f"{low:.0f} to {high:.0f}"
            )
    versions = {k: v for c in contests for e in c.entries for k, v in e.peer.versions.items() if v}
    if versions:
        lines.append("with " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return lines


def to_dict(contests: Sequence[Contest], ours: str) -> dict[str, Any]:
    """Return everything that was measured as JSON-ready values."""
    return {
        "processor": processor(),
        "contests": [
            {
                "model": contest.model,
                "threads": contest.threads,
                "macs": contest.macs,
                "peaks_gflops": list(contest.peaks_gflops),
                "skipped": contest.skipped,
                "rows": [_entry_dict(entry, contest, ours) for entry in contest.entries],
            }
            for contest in contests
        ],
    }


def processor() -> str:
    """Return the processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")


def _entry_dict(entry: Entry, contest: Contest, ours: str) -> dict[str, Any]:
    data: dict[str, Any] = {
        "runtime": entry.peer.name,
        "versions": entry.peer.versions,
        "precision": entry.peer.precision,
        "variant": entry.file.variant.name,
        "kept_macs": entry.file.kept_macs,
        "max_rel_error": entry.error,
        "note": entry.note,
        "kernel": entry.kernel,
    }
    if entry.blocks:
        baseline = next((e for e in contest.entries if (e.peer.name, e.file.variant.name) == (BASELINE, DENSE)), None)
        best = best_peer(entry, contest.entries, ours)
        data |= {
            "median_ms": entry.median_ms,
            "min_ms": entry.min_ms,
            "share_of_peak": entry.share_of_peak,
            "speed_vs_onnxruntime": entry.speed_against(baseline) if baseline else None,
            "best_fp32_peer": best.name if best else None,
            "speed_vs_best_fp32_peer": entry.speed_against(best) if best else None,
            "blocks": [asdict(block) for block in entry.blocks],
        }
    return data


def _digits(ms: float) -> str:
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 10 else f"{ms:.3f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
