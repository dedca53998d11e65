"""The two benchmarks: whole networks, and their layers one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tvm_nm.errors import TvmNmError, UnsupportedModelError
from tvm_nm.layer_shape import LayerShape
from tvm_nm.manifest import Manifest
from tvm_nm.peers.client import Crew
from tvm_nm.peers.contest import BASELINE, Entry, available_memory, compete, groups, prepare
from tvm_nm.peers.layers import layers_of, write_layer
from tvm_nm.peers.models import DENSE, ModelFile, Variant, model_file, run_command
from tvm_nm.peers.registry import PEERS, Peer, load_plugin
from tvm_nm.peers.runtimes import OURS, artefact
from tvm_nm.peers.table import Contest

__all__ = ["OURS", "Settings", "bench_layers", "bench_models", "choose_peers", "model_layers"]

_MEMORY_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Settings:
    """What both benchmarks need.

    Attributes
    ----------
    peers
        The runtimes.
    skipped
        Those that cannot take part, with the reason.
    variants
        What models are pruned to; the dense one first.
    threads
        Numbers of threads.
    folder
        Where pruned, converted and compiled models are kept.
    rounds, block_ms
        How many blocks each contestant gets, and their shortest duration.
    build_only
        Prepare everything and measure nothing.
    rebuild
        Compile this project's models again, as its code may have changed.
    plugins
        Files that register further runtimes.
    progress
        Called with a line before each step.
    """

    peers: tuple[Peer, ...]
    skipped: dict[str, str]
    variants: tuple[Variant, ...]
    threads: tuple[int, ...]
    folder: Path
    rounds: int = 15
    block_ms: float = 40.0
    build_only: bool = False
    rebuild: bool = False
    plugins: tuple[Path, ...] = ()
    progress: Callable[[str], None] = lambda _: None


def choose_peers(
    names: Sequence[str] | None = None, plugins: Sequence[Path] = ()
) -> tuple[tuple[Peer, ...], dict[str, str]]:
    """Return the runtimes that can take part, and why others cannot.

    Parameters
    ----------
    names
        Runtimes to take; default: all but optional ones. onnxruntime and this project are always among them.
    plugins
        Files that register further runtimes.

    Raises
    ------
    UnsupportedModelError
        If a name is unknown.
    """
    for plugin in plugins:
        load_plugin(plugin)
    if unknown := [name for name in names or () if name not in PEERS]:
        raise UnsupportedModelError(f"no runtime is called {unknown[0]!r}; there are: {', '.join(PEERS)}")
    wanted = {OURS, BASELINE, *(names or (name for name, peer in PEERS.items() if not peer.optional))}
    chosen = [peer for name, peer in PEERS.items() if name in wanted]
    skipped = {peer.name: f"{', '.join(peer.missing)} not installed" for peer in chosen if peer.missing}
    return tuple(peer for peer in chosen if not peer.missing), skipped


def bench_models(models: Sequence[Path], settings: Settings) -> list[Contest]:
    """Measure networks: every variant in every runtime.

    Raises
    ------
    UnsupportedModelError
        If a model cannot be read or pruned.
    """
    contests = []
    for model in models:
        files = []
        for variant in settings.variants:
            settings.progress(f"preparing {model.stem} {variant.name}")
            files.append(model_file(model, variant, settings.folder))
        for threads in settings.threads:
            entries = [Entry(peer, file, threads) for file in files for peer in settings.peers]
            with Crew(threads, settings.plugins) as crew:
                _prepare(entries, crew, settings)
            peaks: list[float] = []
            if not settings.build_only:
                parts = groups(entries, _MEMORY_SHARE * available_memory(), OURS)
                rounds = max(1, settings.rounds // len(parts))
                for number, part in enumerate(parts):
                    with Crew(threads, settings.plugins) as crew:
                        peaks += compete(
                            part,
                            crew,
                            rounds=rounds,
                            block_ms=settings.block_ms,
                            first_round=number * rounds,
                            progress=settings.progress,
                        )
            contests.append(Contest(model.stem, threads, tuple(entries), tuple(peaks), settings.skipped, files[0].macs))
    return contests


def model_layers(model: Path) -> tuple[LayerShape, ...]:
    """Return a model's distinct layers.

    Raises
    ------
    UnsupportedModelError
        If it cannot be read.
    """
    return layers_of(json.loads(run_command("inspect", str(model), "--json")))


def bench_layers(shapes: Sequence[LayerShape], settings: Settings) -> list[Contest]:
    """Measure single layers: dense in every runtime, pruned in this project."""
    folder = settings.folder / "layers"
    folder.mkdir(parents=True, exist_ok=True)
    contests = []
    for threads in settings.threads:
        with Crew(threads, settings.plugins, shared=True) as crew:
            listed = [(shape, _layer_entries(shape, folder, crew, settings)) for shape in shapes]
            for shape, entries in listed:
                peaks: list[float] = []
                if not settings.build_only:
                    peaks = compete(
                        entries, crew, rounds=settings.rounds, block_ms=settings.block_ms, progress=settings.progress
                    )
                    for entry in entries:
                        crew.dismiss(entry.peer.name, entry.name)
                macs = entries[0].file.macs if entries else 0
                contests.append(Contest(shape.name, threads, tuple(entries), tuple(peaks), settings.skipped, macs))
    return contests


def _layer_entries(shape: LayerShape, folder: Path, crew: Crew, settings: Settings) -> list[Entry]:
    source = write_layer(shape, folder)
    entries = []
    for variant in settings.variants:
        if variant.name != DENSE and not shape.is_prunable:
            continue
        settings.progress(f"preparing {shape.name} {variant.name}")
        try:
            file: ModelFile = model_file(source, variant, folder, include=["*"], in_process=True)
        except TvmNmError as error:
            if variant.name == DENSE:
                raise
            settings.progress(f"{shape.name} {variant.name}: {error}")
            continue
        file = replace(file, model=shape.name)
        peers = [peer for peer in settings.peers if variant.name == DENSE or peer.name == OURS]
        entries += [Entry(peer, file, crew.threads) for peer in peers]
    _prepare(entries, crew, settings)
    for entry in entries:
        if entry.peer.name == OURS and not entry.note:
            layer = Manifest.load(artefact(entry.file.job(entry.peer, crew.threads))).layers[0]
            entry.kernel = f"{layer.kernel} ({layer.note})" if layer.note else layer.kernel
    return entries


def _prepare(entries: Sequence[Entry], crew: Crew, settings: Settings) -> None:
    for entry in entries:
        if entry.peer.prepare is not None:
            settings.progress(f"preparing {entry.file.model} {entry.name} for {entry.threads} threads")
            prepare(entry, crew, again=settings.rebuild and entry.peer.name == OURS)
