"""The CPU kernels as other compilers and machines see them.

Slow: each test builds the library anew. What the kernels compute is tested beside this file.
"""

import os
import platform
import shlex
import sys
from pathlib import Path

import jax
import pytest

from kernels_pallas.native import build, library
from tests.kernels.own_tests import OWN_CODE, pass_the_kernels_own_tests

pytestmark = pytest.mark.slow


def built_by_clang(target: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The library as the clang of the package ziglang builds it for `target`."""
    command = f"{shlex.quote(sys.executable)} -m ziglang c++ -target {target}"
    monkeypatch.setenv("CXX", command)
    build.build(path, jax.ffi.include_dir())
    return path.read_bytes()


def test_it_builds_for_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built_by_clang("aarch64-linux-gnu", tmp_path / "aarch64.so", monkeypatch)
    assert made[:4] == b"\x7fELF"
    assert int.from_bytes(made[18:20], "little") == 183  # EM_AARCH64
    assert all(target.encode() in made for target in library.TARGETS)


@pytest.mark.timeout(1000)
def test_clang_builds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plain kernels: at run time the package's library says that it knows no other set."""
    path = tmp_path / "clang.so"
    made = built_by_clang(f"{platform.machine()}-linux-gnu", path, monkeypatch)
    assert all(target.encode() in made for target in library.TARGETS)
    pass_the_kernels_own_tests({**os.environ, "POPJAX_NATIVE": str(path)}, OWN_CODE)
