"""Lets runtimes take turns and turns their blocks into rows of a table.

The clock of a shared machine moves by tens of percents within seconds. So blocks are short, each round starts with the
next contestant, the FMA loop is measured before and after every block, and ratios are taken within a round first and
their median then.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tvm_nm.peers.client import Crew, PeerError, Worker
from tvm_nm.peers.models import DENSE, ModelFile
from tvm_nm.peers.registry import Peer
from tvm_nm.peers.worker import job_to_dict
from tvm_nm.reference_run import compare

__all__ = ["BASELINE", "Block", "Entry", "available_memory", "compete", "groups", "prepare"]

BASELINE = "onnxruntime"
TOLERANCE = 1e-2
"""An fp32 row that is further from onnxruntime is wrong, and no best peer. Some Winograd kernels are 1e-3 off."""
_PEAK_MS = 3.0
_SETTLE_S = 0.002
"""Pause between blocks, until the process before has stopped."""
_STAMP = "prepared.json"


@dataclass(frozen=True, slots=True)
class Block:
    """One block of calls.

    Attributes
    ----------
    round
        Number of the round.
    ms
        Mean time of a call.
    peak_gflops
        Mean of the FMA peaks right before and after it.
    """

    round: int
    ms: float
    peak_gflops: float


@dataclass(slots=True)
class Entry:
    """A runtime with a model: a row of the table.

    Attributes
    ----------
    peer, file, threads
        Who runs what.
    blocks
        What was measured.
    error
        Largest difference from onnxruntime's outputs, relative to the largest of these; None where nothing ran.
    note
        Why there is nothing, or what is wrong.
    kernel
        What this project runs a single layer with.
    """

    peer: Peer
    file: ModelFile
    threads: int
    blocks: list[Block] = field(default_factory=list)
    error: float | None = None
    note: str = ""
    kernel: str = ""

    @property
    def name(self) -> str:
        """Runtime and variant."""
        return f"{self.peer.name} {self.file.variant.name}"

    @property
    def is_fp32(self) -> bool:
        """Whether it computes in float32, and rightly."""
        return self.peer.precision == "fp32" and self.error is not None and self.error <= TOLERANCE

    @property
    def min_ms(self) -> float:
        """Best block."""
        return min(block.ms for block in self.blocks)

    @property
    def median_ms(self) -> float:
        """Median over the blocks."""
        return statistics.median(block.ms for block in self.blocks)

    @property
    def share_of_peak(self) -> float:
        """Median over the blocks of useful operations a second over the FMA peak beside the block.

        Useful are multiplications by weights that are not zero.
        """
        operations = 2e-6 * self.file.kept_macs
        return statistics.median(operations / block.ms / block.peak_gflops for block in self.blocks)

    def speed_against(self, other: Entry) -> float | None:
        """Return the median, over the rounds that both ran in, of the other's time over this one's."""
        times = {block.round: block.ms for block in other.blocks}
        ratios = [times[block.round] / block.ms for block in self.blocks if block.round in times]
        return statistics.median(ratios) if ratios else None


def available_memory() -> float:
    """Return how many bytes this machine has left."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), float("inf"))


def groups(entries: Sequence[Entry], memory: float, ours: str) -> list[list[Entry]]:
    """Divide contestants so that the loaded models of each group fit into memory.

    The dense model in every runtime, and this project's models, are in every group; the pruned models of the others,
    which hardly any of them runs differently, are spread.

    Parameters
    ----------
    entries
        The contestants.
    memory
        Bytes to use.
    ours
        The name of this project's runtime.
    """
    core = [entry for entry in entries if entry.file.variant.name == DENSE or entry.peer.name == ours]
    spread = [entry for entry in entries if entry.file.variant.name != DENSE and entry.peer.name != ours]
    found: list[list[Entry]] = [[*core]]
    left = memory - sum(map(_bytes, core))
    room = left
    for entry in spread:
        if room < _bytes(entry) and len(found[-1]) > len(core):
            found.append([*core])
            room = left
        found[-1].append(entry)
        room -= _bytes(entry)
    return found


def _bytes(entry: Entry) -> float:
    return 2.2 * entry.file.path.stat().st_size + 2e8


def prepare(entry: Entry, crew: Crew, *, again: bool = False) -> None:
    """Convert or compile a contestant's model in its process, unless it was done before; a failure becomes its note.

    Parameters
    ----------
    entry
        The contestant.
    crew
        The processes.
    again
        Do it although it was done, for instance because the compiler has changed.
    """
    job = entry.file.job(entry.peer, entry.threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    if entry.peer.prepare is None:
        return
    count = f"-{entry.threads}" if entry.peer.per_thread_count else ""
    stamp = job.folder / f"{entry.peer.name}{count}-{_STAMP}"
    state = {"model": entry.file.digest, "versions": entry.peer.versions}
    done = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if {key: done.get(key) for key in state} != state or again:
        note = ""
        try:
            described = job_to_dict(job, entry.file.inputs_file)
            crew.worker(entry.peer.name, entry.name).ask(do="prepare", peer=entry.peer.name, job=described)
        except PeerError as error:
            note = str(error)
        crew.dismiss(entry.peer.name, entry.name)
        done = {**state, "note": note}
        stamp.write_text(json.dumps(done, indent=1))
    entry.note = done["note"]


def load(entry: Entry, worker: Worker, key: str, scratch: Path) -> None:
    """Load a contestant's model in a worker and compare its outputs with the reference.

    Raises
    ------
    PeerError
        If it cannot.
    """
    saved = scratch / "outputs.npz"
    described = job_to_dict(entry.file.job(entry.peer, entry.threads), entry.file.inputs_file)
    worker.ask(do="load", key=key, peer=entry.peer.name, job=described, save=str(saved))
    want = entry.file.reference()
    with np.load(saved) as file:
        got = [file[name] for name in file.files]
    # Some runtimes know no batch axis.
    if len(got) == len(want):
        got = [a.reshape(b.shape) if a.size == b.size else a for a, b in zip(got, want, strict=True)]
    found = compare(got, want)
    entry.error = found.max_rel
    if found.problem:
        entry.note = found.problem
    elif entry.peer.precision == "fp32" and not entry.error <= TOLERANCE:
        entry.note = "wrong result"


def compete(
    entries: Sequence[Entry],
    crew: Crew,
    *,
    rounds: int,
    block_ms: float = 40.0,
    first_round: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[float]:
    """Measure contestants in turns.

    Parameters
    ----------
    entries
        The contestants; their blocks, errors and notes are filled in. Those that have a note already are skipped.
    crew
        Their processes, with as many threads as the entries say.
    rounds
        Blocks of each.
    block_ms
        Shortest duration of a block.
    first_round
        Number of the first round, for another group of the same contestants.
    progress
        Called with a line before each step.

    Returns
    -------
    Every reading of the FMA peak, in GFLOP/s.
    """
    running: dict[str, tuple[Entry, Worker]] = {}
    with TemporaryDirectory(prefix="bench-peers-") as scratch:
        for entry in entries:
            if entry.note and entry.error is None:
                continue
            progress(f"loading {entry.file.model} {entry.name}")
            worker = crew.worker(entry.peer.name, entry.name)
            try:
                load(entry, worker, entry.name, Path(scratch))
                running[entry.name] = entry, worker
            except PeerError as error:
                entry.note = str(error)
                crew.dismiss(entry.peer.name, entry.name)
    numbers = range(first_round, first_round + rounds)
    peaks: list[float] = []
    for number in numbers:
        progress(f"measuring {entries[0].file.model}, round {number - first_round + 1} of {rounds}")
        peaks += _round(number, running, crew, block_ms)
    return peaks


def _round(number: int, running: dict[str, tuple[Entry, Worker]], crew: Crew, block_ms: float) -> list[float]:
    names = list(running)
    start = number % max(1, len(names))
    readings = [crew.peak_gflops(_PEAK_MS)]
    for name in names[start:] + names[:start]:
        entry, worker = running[name]
        time.sleep(_SETTLE_S)
        try:
            answer = worker.ask(do="block", key=name, ms=block_ms)
        except PeerError as error:
            entry.note, entry.blocks = str(error), []
            del running[name]
            continue
        time.sleep(_SETTLE_S)
        readings.append(crew.peak_gflops(_PEAK_MS))
        entry.blocks.append(Block(number, float(answer["mean_ms"]), (readings[-2] + readings[-1]) / 2))
    return readings
