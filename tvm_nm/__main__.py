"""``python -m tvm_nm`` is ``tvm-nm``."""

from __future__ import annotations

from tvm_nm.cli import main

if __name__ == "__main__":
    main()
