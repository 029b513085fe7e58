"""Tiny models of every family, runs of them that tests share, and a checkpoint folder of one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from popjax import LanguageModel
from popjax.families import FAMILIES
from popjax.gguf_tokenizer import tokenizer_from_gguf
from popjax.text import tokenizer_files
from tests.popjax.tiny_models import CONFIGS, random_params
from tests.popjax.toy_vocabularies import byte_level

Params = dict[str, Any]


@pytest.fixture(scope="session")
def params_of() -> Callable[[str], Params]:
    """Random parameters of the tiny config of a family, made once."""
    return functools.cache(lambda family: random_params(CONFIGS[family]))


def hf_json(vocab_size: int) -> dict[str, Any]:
    """The config.json of the tiny llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny llama: weights, config, generation config, tokenizer.

    Read it, do not change it: copy it where a test needs it otherwise.
    """
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def deep_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_checkpoint`, of five layers and rows of 64, which a scout's groups divide."""
    sizes = {"num_hidden_layers": 5, "hidden_size": 64}
    return write_checkpoint(tmp_path_factory.mktemp("deep") / "llama", **sizes)


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A Hugging Face folder of a llama with random weights: `hf_json` with changes."""
    tokenizer = tokenizer_from_gguf(byte_level("smollm"))
    raw = hf_json(len(tokenizer)) | changes
    params = random_params(FAMILIES["llama"].config(raw))
    generation = {"eos_token_id": [1], "bos_token_id": 0, "max_new_tokens": 12}
    files = {
        **tokenizer_files(tokenizer),
        "generation_config.json": json.dumps(generation).encode(),
    }
    tensors = checkpoints.export(params, FAMILIES["llama"].hf_rows)
    checkpoints.save_safetensors(str(folder), tensors, config=raw, extra_files=files)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> LanguageModel:
    """The tiny llama of `tiny_checkpoint`, loaded."""
    import popjax

    return popjax.load(str(tiny_checkpoint))
