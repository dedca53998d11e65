"""A process that builds or times kernel variants, so that one that crashes or hangs takes nothing else with it.

Run as ``python -m tvm_nm.tuning.worker``. It reads requests, one JSON object a line, from standard input and answers
each with one line or more; see `tvm_nm.tuning.pool`. Its own time limit is an alarm whose default action
ends the process even in the middle of generated code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["main"]

_START_LIMIT_S = 120.0


def main() -> int:
    """Serve requests until standard input ends."""
    # Whatever a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's business

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    signal.setitimer(signal.ITIMER_REAL, _START_LIMIT_S)
    from tvm_nm.tuning import trying  # the slow import, once

    signal.setitimer(signal.ITIMER_REAL, 0)
    answer({"ready": True})

    actions: dict[str, Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]]] = {
        "build": lambda request, _: trying.build(**request),
        "time": lambda request, say: trying.time_variants(**request, say=say),
    }
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, float(request.pop("limit_s")))
        try:
            result = actions[request.pop("action")](request, answer)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer({"result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
