"""Samplers equal transformers' logits processors: the same -inf set, the same values elsewhere."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from popjax.sampling import SamplingConfig, processed

pytestmark = pytest.mark.parity

ROWS, VOCAB, PROMPT, MADE = 4, 99, 10, 3
EOS = (2, 50)
# A penalty and a temperature are one division each; the reference may multiply by a reciprocal.
RTOL = 4 * float(np.finfo(np.float32).eps)

CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "penalty": {"repetition_penalty": 1.3},
    "reward": {"repetition_penalty": 0.7},
    "too short": {"min_new_tokens": MADE + 1},
    "long enough": {"min_new_tokens": MADE},
    "cold": {"do_sample": True, "temperature": 0.3},
    "hot": {"do_sample": True, "temperature": 2.5},
    "top_k": {"do_sample": True, "top_k": 7},
    "top_k beyond the vocabulary": {"do_sample": True, "top_k": 1000},
    "top_k of one": {"do_sample": True, "top_k": 1},
    "top_p": {"do_sample": True, "top_p": 0.8},
    "top_p small": {"do_sample": True, "top_p": 1e-6},
    "min_p": {"do_sample": True, "min_p": 0.05},
    "min_p of one": {"do_sample": True, "min_p": 1.0},
    "greedy ignores filters": {"top_k": 3, "top_p": 0.5, "min_p": 0.5, "temperature": 2.0},
    "everything": {
        "do_sample": True,
        "repetition_penalty": 1.2,
        "min_new_tokens": MADE + 1,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
    },
}


def reference_chain(settings: dict[str, Any]) -> Any:
    """transformers' processors of these settings, in the order in which generate applies them."""
    import transformers as t

    chain = t.LogitsProcessorList()
    if "repetition_penalty" in settings:
        chain.append(t.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "min_new_tokens" in settings:
        wait = settings["min_new_tokens"]
        chain.append(t.MinNewTokensLengthLogitsProcessor(PROMPT, wait, list(EOS)))
    if not settings.get("do_sample"):
        return chain
    warpers = {
        "temperature": t.TemperatureLogitsWarper,
        "top_k": t.TopKLogitsWarper,
        "top_p": t.TopPLogitsWarper,
        "min_p": t.MinPLogitsWarper,
    }
    chain.extend(make(settings[name]) for name, make in warpers.items() if name in settings)
    return chain


def ours(settings: dict[str, Any], logits: np.ndarray, ids: np.ndarray, step: int) -> np.ndarray:
    """popjax's processed logits [B, V] after the tokens ids [B, T], `step` of them new."""
    config = SamplingConfig(**settings)
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    values = config.values(EOS, logits.shape[1])
    given = (jnp.asarray(logits), jnp.asarray(seen), values, config.flags(), jnp.int32(step))
    return np.asarray(processed(*given))


def same(actual: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(wanted))
    np.testing.assert_allclose(actual, wanted, rtol=RTOL)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_processed_logits_equal_the_chain(name: str, spread: float) -> None:
    import torch

    rng = np.random.default_rng(11)
    logits = (spread * rng.standard_normal((ROWS, VOCAB))).astype(np.float32)
    ids = rng.integers(0, VOCAB, (ROWS, PROMPT + MADE))
    settings = CONFIGS[name]
    wanted = reference_chain(settings)(torch.tensor(ids), torch.tensor(logits)).numpy()
    same(ours(settings, logits, ids, MADE), wanted)


def test_generate_of_transformers_applies_them_in_this_order() -> None:
    """Raw and processed logits of every step of a sampling run, all filters on at once."""
    import torch
    import transformers

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    prompt = torch.randint(0, VOCAB, (1, PROMPT))
    settings = CONFIGS["everything"]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        eos_token_id=list(EOS),
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    ids = out.sequences.numpy()
    # At least the steps under min_new_tokens, and one on which the end tokens are free again.
    assert len(out.logits) > settings["min_new_tokens"]
    kept = 0
    for step, (raw, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        wanted = scores.numpy()
        same(ours(settings, raw.numpy(), ids[:, : PROMPT + step], step), wanted)
        kept += int(np.isfinite(wanted).sum())
    # The filters must have had something to remove and something to leave.
    assert len(out.logits) < kept < 40 * len(out.logits)
