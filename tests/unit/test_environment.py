from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from tvm_nm import environment
from tvm_nm.environment import check_environment, missing_features
from tvm_nm.errors import EnvironmentMismatchError

WORKING = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)


def test_the_pair_that_works_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, WORKING)
    check_environment()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"apache-tvm-ffi": "0.1.15"}, r"apache-tvm-ffi 0\.1\.15 does not work, 0\.1\.14 is needed"),
        ({"apache-tvm-ffi": "0.1.15.post2"}, r"apache-tvm-ffi 0\.1\.15\.post2 does not work"),
        ({"apache-tvm-ffi": "0.1"}, r"apache-tvm-ffi 0\.1 does not work"),
        ({"apache-tvm": "0.28.0"}, r"apache-tvm 0\.28\.0 does not work, 0\.27 is needed"),
    ],
)
def test_other_versions_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str], says: str
) -> None:
    installed(monkeypatch, {**WORKING, **change})
    with pytest.raises(EnvironmentMismatchError, match=says + r".*; run pip install 'apache-tvm==0\.27\.0\.post1'"):
        check_environment()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {"apache-tvm": "0.27.0"})
    with pytest.raises(EnvironmentMismatchError, match="apache-tvm-ffi is not installed; run pip install"):
        check_environment()


def test_importing_the_package_loads_no_tvm_and_keeps_settings_of_the_user() -> None:
    program = (
        "import os, sys; os.environ['TVM_NUM_THREADS'] = '7'; os.environ.pop('TVM_BIND_THREADS', None); import tvm_nm;"
        "print('tvm' in sys.modules, 'numpy' in sys.modules, os.environ['TVM_NUM_THREADS'], "
        "os.environ['TVM_BIND_THREADS'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "7", "0"]


def test_features_are_compared_in_llvms_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "fpu sse4_1 sse4_2 avx avx2 fma f16c bmi1 bmi2 avx512f avx512_vnni"
    monkeypatch.setattr(environment, "host_features", lambda: frozenset(map(environment._plain, flags.split())))
    monkeypatch.setattr(environment.platform, "machine", lambda: "x86_64")
    assert (
        missing_features("x86_64", ["sse4.1", "sse4.2", "avx2", "fma", "bmi", "avx512vnni", "64bit", "amx-tile"]) == []
    )
    assert missing_features("x86_64", ["avx2", "avx512fp16", "avx512bw"]) == ["avx512bw", "avx512fp16"]
    assert missing_features("aarch64", []) == ["aarch64"]


def test_this_machine_lists_features() -> None:
    assert environment.host_features()
