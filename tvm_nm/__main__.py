"""``python -m tvm_nm`` is ``tvm-nm``."""

from __future__ import annotations

import signal

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    # Until the commands are loaded an interrupt ends the process as it ends other programs: without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tvm_nm.cli import main as run

    run()


if __name__ == "__main__":
    main()
