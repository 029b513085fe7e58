"""The kernels' own tests, run once more in a process of their own with another build of them."""

import re
import subprocess
import sys
from pathlib import Path

from kernels_pallas.native import build

FOLDER = Path(__file__).parent
# Where an instruction set or a compiler has code of its own; attention is templates of a width.
OWN_CODE = (
    "kernels/test_row_products.py",
    "kernels/test_quantized_rows.py",
    "kernels/test_selection.py",
    "popjax/test_scouts.py::test_the_copies_choose_and_the_weights_compute",
)
KERNELS = (
    *OWN_CODE,
    "kernels/test_masked_mlp.py",
    "kernels/test_decode_attention.py",
    "kernels/test_ragged_decode.py",
)
# What XLA computes, Pallas kernels among it, is not under test here.
OTHERS = ("xla", "reference", "auto", "pallas", "tiles", "half_a_step")
SELECT = ("-k", " and ".join(f"not {word}" for word in OTHERS))


def pass_the_kernels_own_tests(
    environment: dict[str, str], tests: tuple[str, ...] = KERNELS
) -> None:
    """Fails, with what pytest said, unless all of them pass and no sanitizer speaks."""
    paths = [str(FOLDER.parent / name) for name in tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SELECT, *paths],
        env=environment,
        cwd=build.ROOT.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 30, done.stdout[-400:]
    assert "runtime error" not in done.stderr and "Sanitizer" not in done.stderr
