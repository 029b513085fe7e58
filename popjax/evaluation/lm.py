"""A model for lm-eval: `popjax eval` uses it, and so may `lm_eval.simple_evaluate`.

Needs the extra `eval`. lm-eval releases that know plug-ins find it by the entry point in the group
`lm_eval.models`; for others `register()` makes `--model popjax` known. Tokens, batches and scores
are those of `encoding.py` and `scoring.py`; generation is `LanguageModel.generate`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM

from popjax import arguments
from popjax.evaluation.encoding import Encoder, Pair
from popjax.evaluation.journal import Journal, is_number
from popjax.evaluation.protocols import SINGLE_PASS, SPLIT, Case, checked_protocol
from popjax.evaluation.scoring import Scorer
from popjax.evaluation.windows import rolling, stepped
from popjax.model import LanguageModel, load

NAME = "popjax"
# Tokens that decide, and tokens scored after them, where a whole document is scored by `split`.
ROLLING = 512
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class PopjaxLM(TemplateLM):
    """One model under one case and protocol, as lm-eval asks: text in, log-likelihoods out.

    pretrained: a LanguageModel, or what `popjax.load` takes. method: its name, with its options as
    further arguments (`--model_args pretrained=FOLDER,method=online-pruning,ratio=0.3`); kv and
    depth beside it as in `LanguageModel.generate`; or `case`, which says all of these. A batch
    never lets one request sway another. cut: requests that lost the left of their context, which
    was too long; rolling documents under `split` have their first 512 tokens scored in one
    prefill, later ones 512 at a time after the 512 before them.
    Raises ValueError for anything out of range, CheckpointError for a model that is not there.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: LanguageModel | str | None = None,
        *,
        method: str = "dense",
        kv: str | None = None,
        kv_keep: float | None = None,
        kv_tokens: int | None = None,
        depth: str | None = None,
        skip: float | None = None,
        case: Case | None = None,
        protocol: str = SPLIT,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: Any = None,
        revision: str | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        journal: Journal | None = None,
        on_done: Callable[[int], object] = lambda requests: None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = isinstance(pretrained, LanguageModel)
        self.model = pretrained if given else load(pretrained, dtype=dtype, revision=revision)
        if device is not None and device.split(":")[0] != jax.default_backend():
            raise ValueError(
                f"device {device!r} is not jax's {jax.default_backend()!r}: set JAX_PLATFORMS, "
                "and leave out device"
            )
        if case is None:
            case = Case(
                method,
                arguments.chosen_method(method, options),
                self.model.eviction_method(kv, kv_keep, kv_tokens),
                arguments.chosen_depth(depth, skip),
            )
        self.case, self.protocol = case, checked_protocol(protocol, case)
        rows = 16 if batch_size in (None, "auto") else int(batch_size)
        if max_batch_size is not None:
            rows = min(rows, int(max_batch_size))
        self.scorer = Scorer(self.model.params, self.model.config, case, protocol, rows)
        most = self.model.config.max_positions
        self.max_length = most if max_length is None else min(int(max_length), most)
        self.encoder = Encoder(self.model.tokenizer, self.max_length, protocol)
        self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)
        self.journal, self.on_done = journal or Journal({}), on_done
        self.tokenizer, self.cut = self.model.tokenizer, 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix_token

    @property
    def batch_size(self) -> int:
        return self.scorer.batch_size

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path or self.model.name).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.encoder.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.encoder.chat(chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {"popjax_protocol": self.protocol, "popjax_case": self.case.settings()}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation."""
        texts = [tuple(request.args) for request in requests]
        pairs = [
            self.encoder.pair(context, continuation, f"continuation {i}")
            for i, (context, continuation) in enumerate(texts)
        ]
        return self._answered("loglikelihood", texts, pairs)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        texts = [tuple(text) for text, _, _ in requests]
        pairs = [
            self.encoder.fitted(list(before), list(after), f"continuation {i}")
            for i, (_, before, after) in enumerate(requests)
        ]
        return self._answered("loglikelihood", texts, pairs)

    def _answered(
        self, kind: str, texts: Sequence[tuple[str, ...]], pairs: Sequence[Pair]
    ) -> list[tuple[float, bool]]:
        keys = [self._key(kind, text) for text in texts]
        done = self.journal.holds
        left = {key: i for i, key in enumerate(keys) if not done(key, _is_answer)}
        self.on_done(len(keys) - len(left))
        order = list(left.values())
        self.cut += sum(bool(pair.cut) for pair in pairs)
        for n, score in self.scorer.scores([pairs[i] for i in order]):
            answer = score.logprob, score.greedy
            self.journal.put(keys[order[n]], answer)
            self.cache_hook.add_partial(kind, texts[order[n]], answer)
            self.on_done(1)
        return [(float(a), bool(b)) for a, b in (self.journal[key] for key in keys)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each document, every token of it scored once."""
        texts = [tuple(request.args) for request in requests]
        keys = [self._key("loglikelihood_rolling", text) for text in texts]
        for key, text in zip(keys, texts, strict=True):
            if not self.journal.holds(key, is_number):
                self.journal.put(key, self._document(self.encoder.encode(text[0])))
                self.cache_hook.add_partial("loglikelihood_rolling", text, self.journal[key])
            self.on_done(1)
        return [float(self.journal[key]) for key in keys]

    def _document(self, ids: list[int]) -> float:
        prefix = self.prefix_token_id
        if self.protocol == SINGLE_PASS:
            return self._total(self.scorer, rolling(ids, prefix, self.max_length))
        length = min(self.max_length, 2 * ROLLING)
        first, later = stepped(ids, prefix, length, length // 2)
        # Nothing was decided before the first tokens: they are a prompt, and run as one.
        case = dataclasses.replace(self.case, eviction=None)
        prompt = dataclasses.replace(self.scorer, case=case, protocol=SINGLE_PASS)
        beginning = self._total(prompt, [first]) if first[1] else 0.0
        return beginning + self._total(self.scorer, later)

    def _total(self, scorer: Scorer, windows: Iterable[tuple[list[int], list[int]]]) -> float:
        pairs = [Pair(tuple(before), tuple(scored)) for before, scored in windows]
        return sum(score.logprob for _, score in scorer.scores(pairs))

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to the first of `until`, an end token or max_gen_toks."""
        asked = [tuple(request.args) for request in requests]
        keys = [self._key("generate_until", (*args, i)) for i, args in enumerate(asked)]
        groups: dict[str, list[int]] = {}
        for i, (_, options) in enumerate(asked):
            if not self.journal.holds(keys[i], lambda value: isinstance(value, str)):
                groups.setdefault(json.dumps(options, sort_keys=True), []).append(i)
        self.on_done(len(keys) - sum(map(len, groups.values())))
        for group in groups.values():
            self._generated([(i, *asked[i]) for i in group], keys)
        return [str(self.journal[key]) for key in keys]

    def _generated(self, group: list[tuple[int, str, dict[str, Any]]], keys: list[str]) -> None:
        options, until = generation_options(group[0][2], self.max_gen_toks)
        room = self.max_length - options["max_new_tokens"]
        if room < 1:
            raise ValueError(
                f"max_gen_toks {options['max_new_tokens']} leaves no room for a prompt in a "
                f"context of {self.max_length} tokens: lower it"
            )
        ids = {i: self.encoder.encode(text) or [self.prefix_token_id] for i, text, _ in group}
        self.cut += sum(len(row) > room for row in ids.values())
        known = self.tokenizer.get_added_vocab()
        ends = {*self.model.eos_token_ids, *(known[stop] for stop in until if stop in known)}
        order = sorted(group, key=lambda request: -len(ids[request[0]]))
        rows = self.batch_size if self.case.dense else 1
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            found = self.model.generate(
                [ids[i][-room:] for i, _, _ in batch],
                method=self.case.method,
                kv=self.case.eviction,
                depth=self.case.depth,
                stop_strings=until or None,
                eos_token_id=sorted(ends) or None,
                seed=[(self.seed + i) % 2**32 for i, _, _ in batch],
                **options,
            )
            for (i, *request), text in zip(batch, found.text, strict=True):
                self.journal.put(keys[i], text)
                self.cache_hook.add_partial("generate_until", tuple(request), text)
                self.on_done(1)

    def _key(self, kind: str, args: Sequence[Any]) -> str:
        digest = hashlib.sha256(json.dumps(args, sort_keys=True).encode()).hexdigest()[:24]
        return f"{self.case.name}|{kind}|{digest}"


def _is_answer(value: Any) -> bool:
    """Whether a value is a log-likelihood and whether greedy decoding gives what it is of."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and is_number(value[0]) and isinstance(value[1], bool)


def generation_options(
    asked: dict[str, Any], max_new_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """lm-eval's generation arguments as those of `generate`, and the texts that end it.

    Raises ValueError for an argument that popjax does not have.
    """
    left = dict(asked)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else [stop for stop in until if stop]
    stated = [left.pop(name, None) for name in _NEW_TOKENS]
    new = next((int(n) for n in stated if n is not None), max_new_tokens)
    warm = bool(left.get("temperature"))
    sample = left.pop("do_sample", None)
    sample = warm if sample is None else bool(sample)
    given = {name: left.pop(name, None) for name in _SAMPLING}
    if left:
        raise ValueError(
            f"the task asks for the generation argument {sorted(left)[0]!r}, which popjax does not "
            "have: change the task, or leave it out"
        )
    if not sample:
        given = {"repetition_penalty": given["repetition_penalty"]}
    return {"max_new_tokens": new, "do_sample": sample, **given}, until


def register() -> None:
    """Make `popjax` a model name of this process's lm-eval, unless it is one already."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=PopjaxLM)


__all__ = ["NAME", "PopjaxLM", "generation_options", "register"]
