"""What has to hold before TVM is loaded: the versions that work together, and settings that TVM reads only once.

Needs no TVM.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from tvm_nm.errors import EnvironmentMismatchError

__all__ = ["check_environment", "host_features", "missing_features", "package_versions", "prepare_environment"]

_PINNED = "pip install 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"
_NEEDED = {"apache-tvm": (0, 27), "apache-tvm-ffi": (0, 1, 14)}

_SPIN_COUNT = "20000"
"""How often a worker of TVM's pool looks for work before it sleeps: about 5 ms. TVM's own 300,000 keep every core busy
for tenths of a second after each inference, at the cost of whatever else runs on the machine."""

# Extensions that LLVM uses in float32 code; the others in a CPU's list it does not generate on its own.
_VECTOR_FEATURE = re.compile(r"sse4|avx|fma$|f16c$|bmi|gfni|vaes|vpclmul")


def check_environment() -> None:
    """Check that the installed TVM and tvm-ffi are ones that work together.

    tvm-ffi 0.1.15 crashes the process when TVM 0.27 reads or writes IR as JSON.

    Raises
    ------
    EnvironmentMismatchError
        If one is missing or has another version; says what to install.
    """
    for package, needed in _NEEDED.items():
        version = _version(package)
        if version is None:
            raise EnvironmentMismatchError(f"{package} is not installed; run {_PINNED}")
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[: len(needed)])
        if numbers != needed:
            wanted = ".".join(map(str, needed))
            raise EnvironmentMismatchError(f"{package} {version} does not work, {wanted} is needed; run {_PINNED}")


def prepare_environment() -> None:
    """Set what TVM's thread pool reads from the environment when it starts; values that are set already stay.

    Without this the pool has half as many threads as there are processors, and it binds them and the calling thread to
    processors of its own choice, whatever `taskset` says.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("TVM_NUM_THREADS", str(processors))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPIN_COUNT)


def package_versions() -> dict[str, str]:
    """Return the versions of tvm_nm and of the packages that decide what it builds."""
    packages = ("tvm-nm", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime")
    return {package: _version(package) or "unknown" for package in packages}


@lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """Return the processor's features as Linux lists them, in LLVM's spelling without punctuation (``avx512vnni``)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(_plain(flag) for flag in value.split())
    return frozenset()


def missing_features(architecture: str, features: Iterable[str]) -> list[str]:
    """Say what this machine lacks to run code that was built for some processor.

    Parameters
    ----------
    architecture
        The processor's architecture, such as ``x86_64``.
    features
        LLVM's names of what it has.

    Returns
    -------
    The architecture, if it is another, or the missing vector extensions; empty where the code runs.
    """
    if architecture != platform.machine():
        return [architecture]
    return sorted(name for name in features if _VECTOR_FEATURE.match(name) and _plain(name) not in host_features())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(feature: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", feature.lower())
    return "bmi" if plain == "bmi1" else plain  # Linux counts from one
