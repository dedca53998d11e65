"""Files of JSON text that say what they are: read with a clear error, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from tvm_nm.errors import ArtifactError

__all__ = ["load_text", "read_json", "write_bytes", "write_text"]


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


def write_bytes(path: str | os.PathLike[str], data: bytes, noun: str) -> None:
    """Write a file as `write_text` does."""
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        try:
            with scratch.open("xb") as file:
                file.write(data)
            scratch.replace(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ArtifactError(f"cannot write {noun} {target}: {error.strerror or error}") from error
