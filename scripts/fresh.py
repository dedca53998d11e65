"""Do a job on a machine that has only Python: make a virtual environment, install the project, run it.

    python3 scripts/fresh.py demo     # the main job on the embedded model
    python3 scripts/fresh.py test     # lint, format, types, tests

The environments live in `.venv` and `.venv-test` of this checkout and are used again. Needs CPython 3.10 to 3.12 with
`venv`, and nothing outside the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 10), (3, 11), (3, 12))
CHECKS = (
    ("-m", "ruff", "check", "."),
    ("-m", "ruff", "format", "--check", "."),
    ("-m", "mypy"),
    ("-m", "pytest", "-m", "not slow", "--durations=10"),
)

# Without CUDA a tenth of the size; pip finds it where its indexes offer it, such as PyTorch's for processors.
TORCH = "torch==2.13.0+cpu"


def environment(name: str, requirement: str, optional: str = "") -> Path:
    """Return the interpreter of an environment with `requirement` installed, making or updating it first.

    What is `optional` is installed if pip can find it.
    """
    folder = ROOT / name
    python = folder / "bin" / "python"
    stamp = folder / "installed-for"
    state = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + (requirement + optional).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == state:
        return python
    print(f"installing into {folder.name} (a few minutes the first time)", flush=True)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, ModuleNotFoundError) as error:
        raise SystemExit(f"this Python has no usable `venv` ({error}); on Debian: apt install python3-venv") from error
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--editable", requirement], cwd=ROOT, check=True)
    if optional and subprocess.run([*pip, optional], cwd=ROOT, capture_output=True).returncode:
        print(f"pip finds no {optional}: tests that need it are skipped", flush=True)
    stamp.write_text(state)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("demo", "test"))
    parser.add_argument("arguments", nargs="*", help="passed on: to `tvm-nm compile`, or to pytest")
    options = parser.parse_args()
    if sys.version_info[:2] not in SUPPORTED:
        raise SystemExit(f"CPython 3.10 to 3.12 is needed, this is {sys.version.split()[0]}; try python3.11 {__file__}")
    try:
        if options.job == "demo":
            python = environment(".venv", ".")
            return subprocess.run([python, "-m", "tvm_nm", "compile", *options.arguments], cwd=ROOT).returncode
        python = environment(".venv-test", ".[dev]", TORCH)
        for check in CHECKS:
            extra = options.arguments if "pytest" in check else []
            print(f"== {' '.join(check[1:])}", flush=True)
            code = subprocess.run([python, *check, *extra], cwd=ROOT).returncode
            if code:
                return code
        return 0
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"installing failed (exit code {error.returncode}); see the messages above") from error
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
