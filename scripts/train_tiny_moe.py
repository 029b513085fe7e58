"""Trains a small mixture of experts on a text, and saves it as a Hugging Face folder.

    python -m scripts.train_tiny_moe --text articles.txt --out tiny-moe

An OLMoE-shaped model of a few million parameters, with a byte-level BPE tokenizer made from the
same text: small enough for two cores and an hour, so that pruning meets routing that was learnt.
Prints the loss on held-out text (its last twentieth) and how evenly the experts are used. The text
is the caller's: none is shipped, and neither are the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

import checkpoints
from popjax import cache
from popjax.config import ModelConfig
from popjax.families import FAMILIES
from popjax.methods import Method
from popjax.methods.experts import ExpertActs
from popjax.nn.transformer import Inputs, Transformer, init_params
from popjax.sparsity import Params
from popjax.text import tokenizer_files

END = "<|endoftext|>"
HELD_OUT = 20  # one token in so many, the last ones


@dataclasses.dataclass(frozen=True)
class Routing(Method):
    """Shows what routers saw, [N, D] a layer, and how many pairs went to each expert, [E]."""

    def observe(self, params: Params, acts: Any) -> Any:
        assert isinstance(acts, ExpertActs), "every layer has experts"
        return acts.x, acts.order.sizes


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to learn from")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--words", type=int, default=2048, help="size of the vocabulary")
    parser.add_argument("--width", type=int, default=192, help="model width D")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4, help="experts of a token")
    parser.add_argument("--expert-width", type=int, default=128, help="channels of an expert")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def raw_config(asked: argparse.Namespace, words: int) -> dict[str, Any]:
    """config.json of the model asked for."""
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "vocab_size": words,
        "hidden_size": asked.width,
        "intermediate_size": asked.expert_width,
        "num_hidden_layers": asked.layers,
        "num_attention_heads": asked.width // 32,
        "num_key_value_heads": asked.width // 32,
        "num_experts": asked.experts,
        "num_experts_per_tok": asked.top_k,
        "norm_topk_prob": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def trained_tokenizer(text: Path, words: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a text."""
    made = ByteLevelBPETokenizer()
    made.train([str(text)], vocab_size=words, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END, pad_token=END)


def losses(params: Params, config: ModelConfig, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """Mean loss in nats a token of rows [B, T + 1], and by layer (balance loss, load [E]).

    Balance is E sum_e f_e P_e with f the share of pairs and P the mean router share of an expert
    (arXiv 2101.03961 Eq. 4): 1 where all are even.
    """
    B, T = tokens.shape[0], tokens.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    inputs = Inputs(tokens[:, :-1], positions)
    held = cache.empty(config, B, T, params["embed"]["table"].dtype)
    model = Transformer(config, Routing())
    given: tuple[Any, ...] = (inputs, held, None, True)
    out: Any = model.apply({"params": params}, *given, method="prefill")
    loss = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:]).mean()
    routing = []
    for i, (x, sizes) in enumerate(out.statistics):
        shares = jax.nn.softmax(x @ params[f"layer_{i}"]["moe"]["router"].T, axis=-1)
        counts = sizes.astype(jnp.float32)
        load = counts / jnp.sum(counts)
        routing.append((len(sizes) * jnp.sum(load * jnp.mean(shares, axis=0)), load))
    return loss, routing


def trained(ids: np.ndarray, config: ModelConfig, asked: argparse.Namespace) -> Params:
    """Parameters learnt from token ids by AdamW with warm-up and a cosine."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, asked.rate, max(1, min(100, asked.steps // 10)), asked.steps, asked.rate / 20
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
    params = init_params(config, jax.random.key(asked.seed))
    rng = np.random.default_rng(asked.seed)

    def objective(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, routing = losses(params, config, tokens)
        return loss + asked.balance * sum(balance for balance, _ in routing), loss

    @jax.jit
    def step(params: Params, state: Any, tokens: jax.Array) -> tuple[Params, Any, jax.Array]:
        (_, loss), gradients = jax.value_and_grad(objective, has_aux=True)(params, tokens)
        # optax raises numbers to the power of a whole step, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optimiser.update(gradients, state, params)
            return cast(Params, optax.apply_updates(params, updates)), state, loss

    state, started = optimiser.init(params), time.perf_counter()
    for i in range(asked.steps):
        starts = rng.integers(0, len(ids) - asked.tokens, asked.batch)
        rows = np.stack([ids[start : start + asked.tokens + 1] for start in starts])
        params, state, loss = step(params, state, jnp.asarray(rows))
        if i % 50 == 0 or i + 1 == asked.steps:
            spent = time.perf_counter() - started
            print(f"step {i}: loss {float(loss):.3f}, {spent:.0f} s", file=sys.stderr)
    return params


def report(params: Params, config: ModelConfig, held: np.ndarray, asked: argparse.Namespace) -> str:
    """Loss on held-out ids, and the least and most used expert of each layer."""
    rows = held[: len(held) // (asked.tokens + 1) * (asked.tokens + 1)]
    rows = rows.reshape(-1, asked.tokens + 1)[: 4 * asked.batch]
    loss, routing = jax.jit(losses, static_argnums=1)(params, config, jnp.asarray(rows))
    lines = [f"held-out loss {float(loss):.4f} nats a token over {rows[:, 1:].size} tokens"]
    for i, (balance, load) in enumerate(routing):
        even = np.asarray(load) * len(load)
        lines.append(
            f"layer {i}: experts used {even.min():.2f} to {even.max():.2f} times their even "
            f"share, balance {float(balance):.3f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print and save; see `--help`."""
    asked = _arguments(argv)
    if asked.out.exists():
        raise SystemExit(f"{asked.out} exists: choose another name or remove it first")
    tokenizer = trained_tokenizer(asked.text, asked.words)
    raw = raw_config(asked, len(tokenizer))
    config = FAMILIES["olmoe"].config(raw)
    text = asked.text.read_text(encoding="utf-8")
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)
    learnt = ids[: len(ids) - len(ids) // HELD_OUT]
    if len(ids) - len(learnt) <= asked.tokens:
        raise SystemExit(
            f"{asked.text} has {len(ids)} tokens, of which one in {HELD_OUT} is held out: give at "
            f"least {HELD_OUT * (asked.tokens + 1)}"
        )
    params = trained(learnt, config, asked)
    print(report(params, config, ids[len(learnt) :], asked))
    tensors = checkpoints.export(params, FAMILIES["olmoe"].hf_rows)
    raw |= {"dtype": "float32"}
    checkpoints.save_safetensors(
        asked.out, tensors, config=raw, extra_files=tokenizer_files(tokenizer)
    )


if __name__ == "__main__":
    main()
