"""Trains the gates of Fast KVzip for a model on a text, and saves them.

    python -m scripts.train_gates --text articles.txt --out gates.safetensors

Contexts are cut from the text; KVzip scores their tokens with the model as it is, the gates learn
to guess the scores. Prints losses on held-out tokens (every 100th) before and after. The text is
the caller's: none is shipped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import popjax
from popjax.evaluation.windows import cut_windows
from popjax.eviction.gate_training import (
    Examples,
    Training,
    constant_loss,
    examples,
    losses,
    overlap,
    train,
)
from popjax.eviction.gates import Gates, init_gates, save_gates
from popjax.eviction.kvzip import KVzip

# Shares of entries at which the gates' choice is compared with KVzip's.
SHARES = (0.1, 0.3)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    default = Training()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to learn from")
    parser.add_argument("--out", type=Path, required=True, help="new file for the gates")
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: the default model)")
    parser.add_argument("--contexts", type=int, default=8, help="spread evenly over the text")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a context")
    parser.add_argument("--piece", type=int, default=KVzip.piece, help="tokens KVzip repeats")
    parser.add_argument("--postfix", default="", help="text between KVzip's question and answer")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch", type=int, default=default.batch, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=default.rate, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=default.seed)
    return parser.parse_args(argv)


def summary(name: str, gates: Gates, held: Examples) -> str:
    """A line of the table: mean loss a layer, and how much of KVzip's choice the gates make."""
    shared = " | ".join(f"{overlap(gates, held, keep):.3f}" for keep in SHARES)
    return f"| {name} | {np.mean(losses(gates, held)):.4f} | {shared} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print and save; see `--help`."""
    asked = _arguments(argv)
    if asked.out.exists():
        raise SystemExit(f"{asked.out} exists: choose another name or remove it first")
    text = asked.text.read_text(encoding="utf-8")
    model = popjax.load(asked.model)
    tokenizer = model.tokenizer

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]

    special = tokenizer("")["input_ids"]
    contexts = cut_windows(encode(text), special, asked.contexts, asked.tokens)
    teacher = KVzip(piece=asked.piece).worded(encode, asked.postfix)
    started = time.perf_counter()
    learnt, held = examples(model.params, model.config, contexts, teacher).split()
    counted = f"{learnt.x[0].shape[0]} tokens to learn from, {held.x[0].shape[0]} held out"
    print(f"{counted}; scored in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    training = Training(asked.steps, asked.batch, asked.rate, seed=asked.seed)
    gates = init_gates(model.config, jax.random.key(asked.seed))
    started = time.perf_counter()
    trained = train(gates, learnt, training)
    print(f"trained in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    save_gates(asked.out, trained, model.params, model.config)
    constant = np.mean([constant_loss(y) for y in held.y])
    heads = " | ".join(f"same entries, best {share:g}" for share in SHARES)
    print(f"{model.name}, {asked.steps} steps on {counted}\n")
    print(f"| gates | held-out loss a layer | {heads} |\n|---|---|{'---|' * len(SHARES)}")
    print(f"| constant a head | {constant:.4f} |{' |' * len(SHARES)}")
    print(summary("untrained", gates, held))
    print(summary("trained", trained, held))


if __name__ == "__main__":
    main()
