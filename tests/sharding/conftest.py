"""A checkpoint folder whose sizes four devices divide."""

import json
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from popjax.families import FAMILIES
from popjax.gguf_tokenizer import tokenizer_from_gguf
from popjax.text import tokenizer_files
from tests.popjax.conftest import hf_json, tiny_checkpoint
from tests.popjax.tiny_models import random_params
from tests.popjax.toy_vocabularies import byte_level

__all__ = ["even_checkpoint", "tiny_checkpoint"]


def raw_config(words: int) -> dict[str, Any]:
    """config.json of the tiny llama with a vocabulary rounded up, as published models do."""
    return hf_json(-(-words // 8) * 8)


@pytest.fixture(scope="session")
def even_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny llama; the ids that only pad its vocabulary never win."""
    tokenizer = tokenizer_from_gguf(byte_level("smollm"))
    raw = raw_config(len(tokenizer))
    params = random_params(FAMILIES["llama"].config(raw))
    params["head"]["table"] = params["head"]["table"].at[len(tokenizer) :].set(0.0)
    folder = tmp_path_factory.mktemp("even") / "llama"
    tensors = checkpoints.export(params, FAMILIES["llama"].hf_rows)
    files = {
        **tokenizer_files(tokenizer),
        "generation_config.json": json.dumps({"eos_token_id": [1]}).encode(),
    }
    checkpoints.save_safetensors(str(folder), tensors, config=raw, extra_files=files)
    return folder
