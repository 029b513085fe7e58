"""Logits and greedy tokens of every family equal transformers' on torch, both ways of conversion.

Tiny random models, float32, written by transformers and read by popjax, and the reverse. Real
weights are compared in test_default_model.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import popjax
from popjax import LanguageModel, cache
from popjax.buckets import left_padded
from popjax.config import ModelConfig, RopeConfig
from popjax.generate import PROGRAMS, Inputs, Options
from popjax.gguf_tokenizer import tokenizer_from_gguf
from popjax.methods import Method
from popjax.nn.transformer import Transformer
from popjax.run import Request, RunResult, run
from tests.popjax.tiny_models import random_params
from tests.popjax.toy_vocabularies import byte_level

pytestmark = pytest.mark.parity

ATOL = 1e-4
NEW_TOKENS = 32
VOCAB = 99
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Wavelengths of pairs run from 6 to thousands of positions: of a context of 16 every band is used.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
UPPER_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
HALF = {"partial_rotary_factor": 0.5, "rope_theta": 10_000.0, "rope_type": "default"}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.5, 2.5, 4.0],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}
# Local layers, then one that sees all under a rotation of its own.
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 9, **SLIDING}
# Caps near the scores and logits of these models, so that they bend them.
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
# Name of the case: configuration class of transformers, and what it is given beside the sizes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-scaled-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", UPPER_WINDOW),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GEMMA, **CAPS}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "rope_parameters": LINEAR}),
    "phi3": ("Phi3Config", {"sliding_window": 5, "rope_parameters": HALF, "pad_token_id": 0}),
    "phi3-long": (
        "Phi3Config",
        {"rope_parameters": LONG, "original_max_position_embeddings": 128, "pad_token_id": 0},
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo2-biases": ("Olmo2Config", {"attention_bias": True, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt-no-biases": (
        "OPTConfig",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "enable_bias": False},
    ),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neox-in-turn": (
        "GPTNeoXConfig",
        {"use_parallel_residual": False, "attention_bias": False, "rope_parameters": HALF},
    ),
    "mixtral": ("MixtralConfig", {**EXPERTS, "num_local_experts": 6, "sliding_window": 5}),
    # The upper layer is dense.
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "qwen2-moe-windows": (
        "Qwen2MoeConfig",
        {**EXPERTS, **UPPER_WINDOW, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", EXPERTS),
}
_RNG = np.random.default_rng(7)
# 16 fills its bucket, so nothing is padded; the others are unequal and longer than any window.
FULL: list[int] = _RNG.integers(0, VOCAB, 16).tolist()
UNEQUAL: list[list[int]] = [_RNG.integers(0, VOCAB, length).tolist() for length in (9, 3, 20)]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model twice: as transformers made it and as popjax read it from `folder`."""

    case: str
    reference: Any
    loaded: LanguageModel
    folder: Path


def random_reference(case: str) -> Any:
    """A model of transformers whose logits, biases and norms are far from their bland defaults."""
    import torch
    import transformers

    name, fields = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    reference = random_reference(request.param)
    folder = tmp_path_factory.mktemp("hf") / request.param
    reference.save_pretrained(folder)
    tokenizer_from_gguf(byte_level()).save_pretrained(folder)
    return Pair(request.param, reference, popjax.load(str(folder)), folder)


def reference_logits(model: Any, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of transformers for tokens [B, T], -1 in positions marking padding."""
    import torch

    real = torch.tensor(positions >= 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=real.long(),
            position_ids=torch.tensor(positions, dtype=torch.long).clamp(min=0),
        )
    return out.logits.numpy()


def reference_row(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of transformers for one row without padding."""
    return reference_logits(model, np.array([tokens]), np.arange(len(tokens))[None, :])[0]


def reference_greedy(model: Any, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """New tokens [B, n] and their logits [B, n, V] from transformers' cached generate."""
    import torch

    tokens, real = np.asarray(inputs.tokens), np.asarray(inputs.positions) >= 0
    out = model.generate(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(real).long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, tokens.shape[1] :].numpy()
    return new, torch.stack(out.logits, dim=1).numpy()


def uncached(params: Any, config: ModelConfig, inputs: Inputs) -> np.ndarray:
    """popjax's logits [B, T, V] of a whole sequence in one pass."""
    model = Transformer(config, Method())

    @jax.jit
    def logits(params: Any) -> jax.Array:
        held = cache.empty(config, *inputs.tokens.shape, params["embed"]["table"].dtype)
        given = (inputs, held, None, True)
        return model.apply({"params": params}, *given, method="prefill").logits

    return np.asarray(logits(params))


def greedy(model: LanguageModel, prompts: list[list[int]]) -> RunResult:
    options = Options(logits=True)
    return run(model.params, model.config, Request(prompts, NEW_TOKENS, options=options))


def close(actual: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=ATOL)


def test_uncached_unpadded_logits(pair: Pair) -> None:
    sequence = FULL + UNEQUAL[2]
    wanted = reference_row(pair.reference, sequence)
    # Logits that hardly differ would agree whatever was computed.
    assert wanted.std(axis=-1).min() > 1000 * ATOL
    inputs = left_padded([sequence], len(sequence))
    close(uncached(pair.loaded.params, pair.loaded.config, inputs)[0], wanted)


def test_uncached_padded_logits(pair: Pair) -> None:
    inputs = left_padded(UNEQUAL)
    positions = np.asarray(inputs.positions)
    assert (positions < 0).any(axis=1).all()
    logits = uncached(pair.loaded.params, pair.loaded.config, inputs)
    batch = reference_logits(pair.reference, np.asarray(inputs.tokens), positions)
    close(logits[positions >= 0], batch[positions >= 0])
    for row, tokens in enumerate(UNEQUAL):
        close(logits[row, -len(tokens) :], reference_row(pair.reference, tokens))


def test_cached_unpadded_greedy(pair: Pair) -> None:
    inputs = left_padded([FULL])
    assert (np.asarray(inputs.positions) >= 0).all()
    tokens, logits = reference_greedy(pair.reference, inputs)
    result = greedy(pair.loaded, [FULL])
    assert result.tokens.tolist() == tokens.tolist()
    assert result.logits is not None
    close(result.logits, logits)


def test_cached_padded_greedy(pair: Pair) -> None:
    result = greedy(pair.loaded, UNEQUAL)
    assert result.logits is not None
    tokens, logits = reference_greedy(pair.reference, left_padded(UNEQUAL))
    assert result.tokens.tolist() == tokens.tolist()
    close(result.logits, logits)
    for row, prompt in enumerate(UNEQUAL):
        tokens, logits = reference_greedy(pair.reference, left_padded([prompt], len(prompt)))
        assert result.tokens[row].tolist() == tokens[0].tolist()
        close(result.logits[row], logits[0])


def test_given_tokens_after_a_cached_prompt(pair: Pair) -> None:
    config, dense, continuation = pair.loaded.config, Method(), UNEQUAL[2][:16]
    first = left_padded([FULL])
    static = {"config": config, "method": dense}
    held = PROGRAMS.prefill(pair.loaded.params, first, None, **static, capacity=32).cache
    more = left_padded([continuation])
    more = more.replace(positions=more.positions + len(FULL))
    logits = PROGRAMS.score(pair.loaded.params, more, held, None, **static)
    close(np.asarray(logits)[0], reference_row(pair.reference, FULL + continuation)[len(FULL) :])


def without_window(config: ModelConfig) -> ModelConfig:
    layers = tuple(dataclasses.replace(layer, window=None) for layer in config.layers)
    return dataclasses.replace(config, layers=layers)


def without_scaling(config: ModelConfig) -> ModelConfig:
    plain = RopeConfig(config.layers[0].rope.theta)
    layers = tuple(dataclasses.replace(layer, rope=plain) for layer in config.layers)
    return dataclasses.replace(config, layers=layers)


@pytest.mark.parametrize(
    ("pair", "change"),
    [
        ("llama-scaled-rope", without_scaling),
        ("mistral", without_window),
        ("qwen2", without_window),
    ],
    indirect=["pair"],
)
def test_these_prompts_would_show_a_wrong_config(
    pair: Pair, change: Callable[[ModelConfig], ModelConfig]
) -> None:
    inputs = left_padded([UNEQUAL[2]], len(UNEQUAL[2]))
    wrong = uncached(pair.loaded.params, change(pair.loaded.config), inputs)[0]
    assert np.abs(wrong - reference_row(pair.reference, UNEQUAL[2])).max() > 1000 * ATOL


def same_leaves(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), strict=True)


def test_sharded_files_read_alike(pair: Pair, tmp_path: Path) -> None:
    pair.reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    same_leaves(popjax.load(str(tmp_path)).params, pair.loaded.params)


def reloaded(folder: Path) -> Any:
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model, notes = load(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(notes.values()), notes
    return model.eval()


def test_saved_again_it_is_the_model_transformers_wrote(pair: Pair, tmp_path: Path) -> None:
    import torch

    pair.loaded.save(str(tmp_path / "again"))
    again = reloaded(tmp_path / "again")
    wanted = pair.reference.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    logits = reference_row(again, FULL + UNEQUAL[2])
    np.testing.assert_array_equal(logits, reference_row(pair.reference, FULL + UNEQUAL[2]))


def test_weights_of_popjax_run_in_transformers(pair: Pair, tmp_path: Path) -> None:
    params = random_params(pair.loaded.config, seed=1)
    model = dataclasses.replace(pair.loaded, params=params)
    model.save(str(tmp_path / "ours"))
    theirs = reloaded(tmp_path / "ours")
    logits = uncached(params, model.config, left_padded([FULL], len(FULL)))[0]
    close(logits, reference_row(theirs, FULL))
    tokens, _ = reference_greedy(theirs, left_padded([FULL]))
    assert greedy(model, [FULL]).tokens.tolist() == tokens.tolist()
    same_leaves(popjax.load(str(tmp_path / "ours")).params, params)
