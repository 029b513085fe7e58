"""Importing the package costs nothing it does not need and leaves the process as it was."""

import subprocess
import sys
from pathlib import Path

CHILD = """
import os, sys
before = dict(os.environ)
import checkpoints
import jax
heavy = {"torch", "orbax", "gguf", "huggingface_hub", "transformers", "matplotlib", "popjax"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert dict(os.environ) == before
assert not jax._src.xla_bridge.backends_are_initialized()
assert set(checkpoints.__all__) <= set(dir(checkpoints))
"""


def test_import_is_light_and_quiet():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
