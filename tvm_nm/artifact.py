"""The directory that a build leaves behind, and how it gets there: whole or not at all. Needs no TVM."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tvm_nm.errors import ArtifactError
from tvm_nm.manifest import MANIFEST, MANIFEST_FORMAT

__all__ = ["LIBRARY", "REPORT", "check_output", "copy_artifact", "is_artifact", "staged_artifact"]

LIBRARY, REPORT = "model.so", "report.txt"

_STALE_SECONDS = 60


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a directory with a manifest, be it readable or not."""
    return (Path(path) / MANIFEST).is_file()


def check_output(output: Path, overwrite: bool = True) -> None:
    """Check that an artefact may be put at a path, which must then be free, an empty directory or an artefact.

    Raises
    ------
    ArtifactError
        If something else is there, if there is an artefact and `overwrite` is False, or if the parent is missing.
    """
    if not output.parent.is_dir():
        raise ArtifactError(f"{output.parent} is not a directory; create it or choose another output")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise ArtifactError(f"{output} exists and is no directory; choose another output")
    try:
        entries = {entry.name for entry in output.iterdir()}
    except OSError as error:
        raise ArtifactError(f"{output} cannot be read: {error.strerror}; choose another output") from error
    if not entries:
        return
    if MANIFEST not in entries:
        raise ArtifactError(f"{output} exists and is no artefact; choose another output")
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ArtifactError(f"{output} exists and its {MANIFEST} is not of an artefact; choose another output")
    if foreign := entries - {MANIFEST, LIBRARY, REPORT}:
        raise ArtifactError(f"{output} holds {min(foreign)!r}, which no build wrote; move it or choose another output")
    if not overwrite:
        raise ArtifactError(f"{output} exists; choose another output or allow overwriting")


@contextmanager
def staged_artifact(output: Path, *, overwrite: bool = True) -> Iterator[tuple[Path, Path]]:
    """Give a directory to build in; when the block ends without an exception it is moved to `output`, whole.

    Everything happens in one hidden directory beside `output`. After an exception or an interrupt nothing of it is
    left and an artefact that was there before still is. What a killed process leaves behind, the next build of the
    same output removes.

    Parameters
    ----------
    output
        Where the artefact goes.
    overwrite
        Whether an artefact that is there is replaced.

    Yields
    ------
    The directory for the artefact's files, and one for scratch files.

    Raises
    ------
    ArtifactError
        As `check_output`, and if something cannot be written, in the block too.
    """
    output = output.resolve()
    check_output(output, overwrite)
    _remove_stale(output)
    staging = output.parent / f".{output.name}.{secrets.token_hex(4)}.tvm-nm"
    lock = -1
    try:
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # tells `_remove_stale` of other processes that this one lives
        new, scratch = staging / "new", staging / "scratch"
        new.mkdir()
        scratch.mkdir()
        yield new, scratch
        _sync(new)
        check_output(output, overwrite)
        _swap(new, output, staging / "old")
    except OSError as error:
        raise _write_error(output, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def copy_artifact(source: Path, output: Path, *, overwrite: bool = True) -> None:
    """Copy an artefact, whole or not at all.

    Raises
    ------
    ArtifactError
        As `staged_artifact`, and if `source` lacks a file.
    """
    with staged_artifact(output, overwrite=overwrite) as (new, _):
        for name in (MANIFEST, LIBRARY, REPORT):
            if not (source / name).is_file():
                raise ArtifactError(f"{source / name} is missing; build the artefact again")
            shutil.copyfile(source / name, new / name)


def _swap(new: Path, output: Path, old: Path) -> None:
    if not output.exists():
        new.rename(output)
    else:
        output.rename(old)
        try:
            new.rename(output)
        except BaseException:
            old.rename(output)
            raise
    _sync_directory(output.parent)


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove_stale(output: Path) -> None:
    """Remove what killed builds of the same output left; bring back the artefact if one was killed between renames."""
    for staging in output.parent.glob(f".{_literal(output.name)}.*.tvm-nm"):
        with suppress(OSError):
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # A young one may be about to take its lock.
                if time.time() - staging.stat().st_mtime > _STALE_SECONDS:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if (staging / "old").exists() and not output.exists():
                        (staging / "old").rename(output)
                    shutil.rmtree(staging, ignore_errors=True)
            finally:
                os.close(lock)


def _literal(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _write_error(output: Path, error: OSError) -> ArtifactError:
    remedy = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "; free some space or choose another output"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "; choose another output"
    return ArtifactError(f"cannot write {output}: {error.strerror or error}{remedy}")
