"""The CPU kernels under AddressSanitizer and UBSan.

Slow: the library is built anew. What the kernels compute is tested beside this file.
"""

import os
import subprocess
import sys

import jax
import pytest

from kernels_pallas.native import build
from tests.kernels.own_tests import KERNELS, OWN_CODE, pass_the_kernels_own_tests

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
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


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("isa", ["best", "avx2", "plain"])
def test_the_kernels_own_tests_under_sanitizers(isa: str, sanitized: dict[str, str]) -> None:
    kernels = KERNELS if isa == "best" else OWN_CODE
    pass_the_kernels_own_tests({**sanitized, "POPJAX_ISA": isa}, kernels)
