"""The CPU kernels under AddressSanitizer and UBSan, and as other compilers and machines see them.

Slow: each test builds the library anew. What the kernels compute is tested beside this file.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from kernels_pallas.native import build, library

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
KERNELS = (
    "test_row_products",
    "test_selection",
    "test_masked_mlp",
    "test_decode_attention",
    "test_ragged_decode",
)
# Where an instruction set or a compiler has code of its own; attention is templates of a width.
OWN_CODE = ("test_row_products", "test_selection", "test_masked_mlp")
# What XLA computes is not under test here.
SELECT = ("-k", "not xla and not reference and not auto")
# Two mistakes, built along: proof that the sanitizers look.
MISTAKES = """
#include <climits>
#include <vector>
extern "C" int read_beyond(int n) { return std::vector<int>(n).data()[n]; }
extern "C" int add_beyond(int n) { return INT_MAX - 1 + n; }
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that runs the kernels under both sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    mistakes, path = folder / "mistakes.cc", folder / "sanitized.so"
    mistakes.write_text(MISTAKES)
    build.build(path, jax.ffi.include_dir(), flags=(*SANITIZERS, str(mistakes)))
    runtimes = [
        subprocess.run(
            [*build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    assert all(map(os.path.isabs, runtimes)), f"{build.compiler()} has no sanitizers: {runtimes}"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # The interpreter and jaxlib keep memory to the end, which is not for these tests.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "POPJAX_NATIVE": str(path),
    }


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("read_beyond", "AddressSanitizer: heap-buffer-overflow"),
        ("add_beyond", "runtime error: signed integer overflow"),
    ],
)
def test_the_sanitizers_find_a_mistake(
    mistake: str, report: str, sanitized: dict[str, str]
) -> None:
    script = f"import ctypes, os; ctypes.CDLL(os.environ['POPJAX_NATIVE']).{mistake}(8)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=sanitized, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and report in done.stderr


def pass_the_kernels_own_tests(
    environment: dict[str, str], kernels: tuple[str, ...] = KERNELS
) -> None:
    tests = [str(Path(__file__).with_name(f"{name}.py")) for name in kernels]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SELECT, *tests],
        env=environment,
        cwd=build.ROOT.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"\d{3} passed", done.stdout)
    assert "runtime error" not in done.stderr and "Sanitizer" not in done.stderr


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("isa", ["best", "plain"])
def test_the_kernels_own_tests_under_sanitizers(isa: str, sanitized: dict[str, str]) -> None:
    kernels = OWN_CODE if isa == "plain" else KERNELS
    pass_the_kernels_own_tests({**sanitized, "POPJAX_ISA": isa}, kernels)


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
    path = tmp_path / "clang.so"
    made = built_by_clang(f"{platform.machine()}-linux-gnu", path, monkeypatch)
    assert all(target.encode() in made for target in library.TARGETS)
    pass_the_kernels_own_tests({**os.environ, "POPJAX_NATIVE": str(path)}, OWN_CODE)
