"""What evicting cache entries costs: continuation perplexity and pass-key retrieval by budget.

    python -m scripts.kv_quality --text article.txt --json kv.json --figure kv.png

A prompt is prefilled once; every method then evicts it to every budget and decodes what follows,
teacher-forced: the text's next tokens, or the number that was asked for. All of its tokens being
the likeliest in turn is exactly what greedy decoding calls a match. The text is the caller's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import popjax
from checkpoints.atomic import new_file
from popjax.bench import DENSE
from popjax.continuation import token_logprobs
from popjax.evaluation.statistics import paired, standard_error
from popjax.evaluation.windows import cut_windows
from popjax.eviction import KV_METHODS, KvMethod, KVzip, kv_method_named
from popjax.frontier import COLOURS, SHAPES
from popjax.picture import require_matplotlib
from scripts.kv_windows import Prefilled
from scripts.pass_key import Haystacks, PassKey
from scripts.quality import progress, write_json

# All but the one whose scores come from gates that somebody must train for the model first.
UNTRAINED = tuple(name for name in KV_METHODS if name != "fast-kvzip")
# A budget of everything stands for dense.
Case = tuple[str, float]


@dataclasses.dataclass(frozen=True)
class Losses:
    """Log-perplexity (nats a token) of each window, by method and budget."""

    windows: dict[Case, list[float]]

    def above_dense(self, case: Case) -> tuple[float, float]:
        """Mean and standard error of the differences to dense, paired by window."""
        found = paired(self.windows[case], self.windows[DENSE, 1.0])
        return found.mean, found.standard_error


@dataclasses.dataclass(frozen=True)
class Hits:
    """Whether each prompt's number was given back, by method and budget."""

    prompts: dict[Case, list[bool]]

    def accuracy(self, case: Case) -> tuple[float, float]:
        """Share and its standard error."""
        return binomial(self.prompts[case])


def binomial(hits: Sequence[bool]) -> tuple[float, float]:
    """Share of hits and its standard error; NaN for none.

    The error is taken at (hits + 1) / (n + 2): at no hits, or nothing else, the usual one is 0.
    """
    n = len(hits)
    if not n:
        return math.nan, math.nan
    likely = (sum(hits) + 1) / (n + 2)
    return sum(hits) / n, math.sqrt(likely * (1 - likely) / n)


def evictions(
    names: Sequence[str], budgets: Sequence[float], model: Any
) -> dict[Case, KvMethod | None]:
    """Dense, then every method at every budget, each with its defaults."""

    def encode(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    cases: dict[Case, KvMethod | None] = {(DENSE, 1.0): None}
    for name in names:
        for keep in budgets:
            method = kv_method_named(name, keep=keep)
            if isinstance(method, KVzip):
                method = method.worded(encode)
            cases[name, keep] = method.for_model(model.config)
    return cases


def perplexities(
    model: Any,
    windows: Sequence[Sequence[int]],
    prefix: int,
    cases: Mapping[Case, KvMethod | None],
) -> Losses:
    """Losses of every window's tokens after its prefix, which alone is prefilled and evicted."""

    def loss(window: Sequence[int], logits: Callable[..., jax.Array]) -> float:
        following = window[prefix:]
        tokens = jnp.asarray(np.asarray(following, np.int32))
        found = np.asarray(token_logprobs(logits(following), tokens))
        return -float(np.mean(found, dtype=np.float64))

    return Losses(_all(model, windows, [w[:prefix] for w in windows], cases, loss, "window"))


def retrieval(
    model: Any,
    prompts: Sequence[PassKey],
    cases: Mapping[Case, KvMethod | None],
    agnostic: bool = False,
) -> Hits:
    """Whether the number follows; `agnostic` evicts the context before the question is known."""

    def hit(prompt: PassKey, logits: Callable[..., jax.Array]) -> bool:
        following = (*prompt.question, *prompt.answer) if agnostic else prompt.answer
        found = np.asarray(jnp.argmax(logits(following), axis=-1))
        return bool(np.array_equal(found[-len(prompt.answer) :], prompt.answer))

    prefilled = [p.context if agnostic else (*p.context, *p.question) for p in prompts]
    return Hits(_all(model, prompts, prefilled, cases, hit, "pass key"))


def _all(
    model: Any,
    items: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    cases: Mapping[Case, KvMethod | None],
    measure: Callable[[Any, Callable[..., jax.Array]], Any],
    what: str,
) -> dict[Case, list[Any]]:
    """`measure` of every item under every case, its prompt prefilled once."""
    found: dict[Case, list[Any]] = {case: [] for case in cases}
    # As in the cases themselves: with the words of the model's tokenizer, for instance.
    observed = {name: method for (name, _), method in cases.items() if method is not None}
    say = progress(len(items), what)
    for i, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        prefilled = Prefilled(model.params, model.config, prompt, observed)
        for case, eviction in cases.items():

            def logits(
                following: Sequence[int],
                prefilled: Prefilled = prefilled,
                name: str = case[0],
                eviction: KvMethod | None = eviction,
            ) -> jax.Array:
                return prefilled.logits(following, name, eviction)

            found[case].append(measure(item, logits))
        say(i + 1)
    return found


def table(losses: Losses, hits: Hits) -> str:
    """The markdown table; ± is one standard error, paired by window for losses."""
    lines = ["| method | kept | log-perplexity | above dense | pass key |", "|---|---|---|---|---|"]
    for case, values in losses.windows.items():
        above, error = losses.above_dense(case)
        share, share_error = hits.accuracy(case)
        difference = "" if case[0] == DENSE else f"{above:+.3f} ± {error:.3f}"
        lines.append(
            f"| {case[0]} | {case[1]:g} | {np.mean(values):.3f} ± {standard_error(values):.3f} | "
            f"{difference} | {share:.2f} ± {share_error:.2f} |"
        )
    return "\n".join(lines)


def to_json(losses: Losses, hits: Hits) -> list[dict[str, Any]]:
    """One row a method and budget, every window and prompt in it."""
    rows = []
    for case, values in losses.windows.items():
        (above, error), (share, share_error) = losses.above_dense(case), hits.accuracy(case)
        rows.append(
            {
                "method": case[0],
                "keep": case[1],
                "windows": values,
                "difference": above,
                "difference_standard_error": error,
                "hits": hits.prompts[case],
                "accuracy": share,
                "accuracy_standard_error": share_error,
            }
        )
    return rows


def draw(path: Path, losses: Losses, hits: Hits, protocol: str) -> None:
    """A PNG of both measures against the kept share, one line a method with standard errors."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), dpi=120, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(name for name, _ in losses.windows if name != DENSE))
    for n, name in enumerate(names):
        budgets = sorted(keep for other, keep in losses.windows if other == name)
        # Side by side, or the error bars of one budget hide each other.
        places = [keep * 1.02 ** (n - (len(names) - 1) / 2) for keep in budgets]
        for axes, measure in ((left, losses.above_dense), (right, hits.accuracy)):
            values, errors = zip(*(measure((name, keep)) for keep in budgets), strict=True)
            axes.errorbar(places, values, yerr=errors, label=name, **_style(n))
    left.axhline(0, color="black", linewidth=1, linestyle=":")
    left.set_ylabel("loss above dense, nats a token")
    right.axhline(hits.accuracy((DENSE, 1.0))[0], color="black", linewidth=1, linestyle=":")
    right.set_ylabel("pass keys given back, share (dotted: dense)")
    right.set_ylim(-0.05, 1.05)
    budgets = sorted({keep for name, keep in losses.windows if name != DENSE})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{keep:.0%}" for keep in budgets])
        axes.minorticks_off()
        axes.set_xlabel("cache entries kept")
        axes.grid(alpha=0.3)
    right.legend(fontsize=9)
    figure.suptitle(protocol, fontsize=10, parse_math=False, wrap=True)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _style(n: int) -> dict[str, Any]:
    """How the n-th method's line looks."""
    return {
        "color": COLOURS[n % len(COLOURS)],
        "marker": SHAPES[n % len(SHAPES)],
        "linestyle": "-" if n < len(COLOURS) else "--",
        "markersize": 5,
        "linewidth": 1.4,
        "capsize": 2,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: the default model)")
    parser.add_argument("--methods", nargs="+", choices=UNTRAINED, default=UNTRAINED)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=2048, help="tokens prefilled and evicted")
    parser.add_argument("--scored", type=int, default=128, help="tokens scored after the prefix")
    parser.add_argument("--keys", type=int, default=32, help="pass-key prompts, as long as prefix")
    parser.add_argument("--agnostic", action="store_true", help="evict before the question")
    parser.add_argument("--seed", type=int, default=0, help="of numbers, depths and filler")
    parser.add_argument("--json", type=Path, help="also write every window's numbers here")
    parser.add_argument("--figure", type=Path, help="also draw a PNG here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    asked = _arguments(argv)
    if asked.figure is not None:
        require_matplotlib()
    text = asked.text.read_text(encoding="utf-8")
    model = popjax.load(asked.model)
    cases = evictions(asked.methods, asked.keep, model)
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    special = model.tokenizer("")["input_ids"]
    windows = cut_windows(ids, special, asked.windows, asked.prefix + asked.scored)
    haystacks = Haystacks(model.tokenizer, text)
    depths = np.random.default_rng(asked.seed).random(asked.keys)
    prompts = [
        haystacks.prompt(asked.prefix, depth, asked.seed + i) for i, depth in enumerate(depths)
    ]
    losses = perplexities(model, windows, asked.prefix, cases)
    hits = retrieval(model, prompts, cases, asked.agnostic)
    question = "before" if asked.agnostic else "after"
    protocol = (
        f"{model.name}, {asked.windows} windows: {asked.prefix} tokens evicted, next "
        f"{asked.scored} scored; {asked.keys} pass keys in {asked.prefix} tokens, evicted "
        f"{question} the question; ± one standard error"
    )
    print(f"{protocol}\n\n{table(losses, hits)}")
    if asked.json is not None:
        write_json(asked.json, {"protocol": protocol, "results": to_json(losses, hits)})
    if asked.figure is not None:
        draw(asked.figure, losses, hits, protocol)


if __name__ == "__main__":
    main()
