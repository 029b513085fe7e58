"""The tiny checkpoint of tests/popjax, for scripts that load a model by its folder."""

import json
import shutil
from pathlib import Path

import pytest

from tests.popjax.conftest import deep_checkpoint, tiny_checkpoint

__all__ = ["deep_checkpoint", "tiny_checkpoint"]


@pytest.fixture(scope="session")
def long_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with a context that holds a prompt of words. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("long") / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    return folder
