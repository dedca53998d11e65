"""What the command line says while it works, where nobody watches a terminal."""

from __future__ import annotations

import pytest

from tvm_nm import console
from tvm_nm.console import Steps


def test_a_log_has_a_line_a_step_and_hears_from_long_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Steps() as steps:
        steps("importing")
        for number in range(1, 6):
            steps(f"pruning ({number} of 5: layer{number})")
            now += 13
        steps("writing")
    assert capsys.readouterr().err.splitlines() == [
        "importing ...",
        "pruning ...",
        "pruning (4 of 5: layer4) ...",
        "writing ...",
    ]
