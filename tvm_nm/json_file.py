"""Files of JSON text that say what they are: read with a clear error, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
from pathlib import Path
from typing import Any

from tvm_nm.errors import ArtifactError

__all__ = ["check_writable", "load_text", "read_json", "write_bytes", "write_text"]


def load_text(path: str | os.PathLike[str], noun: str) -> str:
    """Read a text file.

    Raises
    ------
    ArtifactError
        If it cannot be read or is no UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot read {noun} {os.fspath(path)}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{os.fspath(path)} is not a {noun}: it is not UTF-8 text") from error


def read_json(
    text: str, source: str, file_format: str, version: int, noun: str, remedy: str = "make it again"
) -> dict[str, Any]:
    """Read a JSON object that has the keys "format" and "version".

    Parameters
    ----------
    text
        The JSON text.
    source
        What to call it in error messages, such as ``plan plan.json``.
    file_format, version
        What the object must say of itself.
    noun
        What kind of file it should be.
    remedy
        What to do about one that is damaged or of another version.

    Raises
    ------
    ArtifactError
        If the text is something else.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source} is not JSON: {error}; {remedy}") from error
    if not isinstance(data, dict) or data.get("format") != file_format:
        raise ArtifactError(f'{source} is not a {noun}: it lacks "format": "{file_format}"')
    if data.get("version") != version:
        raise ArtifactError(
            f"{source} is a {noun} of version {data.get('version')!r} and this tvm_nm reads version {version}; {remedy}"
        )
    return data


def write_text(path: str | os.PathLike[str], text: str, noun: str) -> None:
    """Write a text file. An interrupted write leaves the old file as it was.

    Raises
    ------
    ArtifactError
        If the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"), noun)


def check_writable(path: str | os.PathLike[str], noun: str) -> None:
    """Find out whether a file can be written, before the work whose result it is for.

    Raises
    ------
    ArtifactError
        If the path is a folder, or its own folder is missing or takes no new files.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file")
        if _is_special(target):
            return
        scratch = _scratch(target.resolve())
        scratch.touch(exist_ok=False)
        scratch.unlink()
    except OSError as error:
        raise _write_error(target, noun, error) from error


def write_bytes(path: str | os.PathLike[str], data: bytes, noun: str) -> None:
    """Write a file as `write_text` does. Pipes and devices are written to; where a link leads is written."""
    target = Path(path)
    try:
        if _is_special(target):
            target.write_bytes(data)
            return
        target = target.resolve()
        scratch = _scratch(target)
        try:
            with scratch.open("xb") as file:
                file.write(data)
            scratch.replace(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _write_error(Path(path), noun, error) from error


def _is_special(path: Path) -> bool:
    """Tell whether a path is a pipe or a device, such as ``/dev/stdout``, which no file may replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _scratch(target: Path) -> Path:
    return target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")  # names have 255 bytes at most


def _write_error(path: Path, noun: str, error: OSError) -> ArtifactError:
    reason = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        reason += f"; create the folder {path.parent} or choose another place"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason += "; free some space or choose another place"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason += "; choose another place"
    return ArtifactError(f"cannot write {noun} {path}: {reason}")
