"""Files of JSON text that say what they are: read with a clear error, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from tvm_nm.errors import ArtifactError

__all__ = ["read_json", "write_bytes", "write_text"]


def read_json(text: str, source: str, file_format: str, version: int, noun: str) -> dict[str, Any]:
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

    Raises
    ------
    ArtifactError
        If the text is something else.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != file_format:
        raise ArtifactError(f'{source} is not a {noun}: it lacks "format": "{file_format}"')
    if data.get("version") != version:
        raise ArtifactError(
            f"{source} is a {noun} of version {data.get('version')!r} and this tvm_nm reads version {version}; "
            "make it again"
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
