"""Files that are written whole or not at all, and never in the place of something else."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tvm_nm.errors import ArtifactError
from tvm_nm.json_file import check_writable, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "plan.json", "old", "plan")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ArtifactError, match=r"cannot write plan .*plan.json: No space left on device; free some space"):
        write_text(tmp_path / "plan.json", "new", "plan")
    assert names(tmp_path) == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "there" / "file.json")
    for text in ("one", "two"):
        check_writable(link, "plan")
        write_text(link, text, "plan")
        assert link.is_symlink()
        assert (tmp_path / "there" / "file.json").read_text() == text
    assert names(tmp_path / "there") == ["file.json"]


def test_pipes_and_devices_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe, "plan")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"hello", "plan")
    reader.join()
    assert found == [b"hello"]
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    name = "n" * 250 + ".json"
    check_writable(tmp_path / name, "plan")
    write_text(tmp_path / name, "text", "plan")
    assert names(tmp_path) == [name]


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write plan .*no/p.json: No such file.*; create the folder .*no"):
        check_writable(tmp_path / "no" / "p.json", "plan")
    with pytest.raises(ArtifactError, match=r"cannot write plan .*: it is a folder; name a file"):
        check_writable(tmp_path, "plan")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"cannot write plan .*: Not a directory"):
        check_writable(tmp_path / "file" / "p.json", "plan")
    check_writable(tmp_path / "file", "plan")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
