"""The model class for lm-eval: its answers against the model itself, and lm-eval running it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax import LanguageModel, OnlinePruning
from popjax import cache as kv
from popjax.buckets import left_padded
from popjax.config import ModelConfig
from popjax.continuation import continuation_logprobs
from popjax.evaluation.journal import Journal
from popjax.evaluation.lm import PopjaxLM, generation_options, register
from popjax.evaluation.protocols import SINGLE_PASS, SPLIT, Case
from popjax.evaluation.scoring import Scorer
from popjax.methods import Method
from popjax.nn.transformer import Inputs, Transformer

TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. "
ONLINE = Case("online", OnlinePruning(ratio=0.5))
WINDOW = 48
TOLERANCE = 1e-3  # what the answers may differ from another float32 computation, in nats


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]  # type: ignore[arg-type]


@functools.cache
def all_logits(config: ModelConfig) -> Any:
    """Compiled once: logits of every token of a window."""

    def forward(params: Any, inputs: Inputs) -> Any:
        cache = kv.empty(config, 1, WINDOW, jnp.dtype("float32"))
        given = ({"params": params}, inputs, cache, None, True)
        return Transformer(config, Method()).apply(*given, method="prefill").logits  # type: ignore[union-attr]

    return jax.jit(forward)


def direct(model: LanguageModel, window: list[int], scored: int) -> float:
    """Log-likelihood of the last `scored` tokens of a window, from all logits of one forward."""
    out = all_logits(model.config)(model.params, left_padded([window[:-1]], WINDOW))
    logits = np.asarray(out)[0].astype(np.float64)[-scored:]
    chosen = logits[np.arange(scored), window[-scored:]]
    return float((chosen - np.log(np.exp(logits).sum(axis=-1))).sum())


@pytest.mark.parametrize("protocol", [SPLIT, SINGLE_PASS])
def test_rolling_perplexity_is_that_of_a_direct_computation(
    long_model: LanguageModel, protocol: str
) -> None:
    from lm_eval.utils import get_rolling_token_windows

    lm = PopjaxLM(long_model, protocol=protocol, max_length=WINDOW)
    ids = lm.tok_encode(TEXT * 5)
    assert len(ids) > 96
    wanted = 0.0
    if protocol == SINGLE_PASS:
        for before, scored in get_rolling_token_windows(ids, lm.prefix_token_id, WINDOW, 1):
            wanted += direct(long_model, [*before, scored[-1]], len(scored))
    else:
        wanted += direct(long_model, [lm.prefix_token_id, *ids[:24]], 24)
        for start in range(24, len(ids), 24):
            scored = ids[start : start + 24]
            wanted += direct(long_model, [*ids[start - 24 : start], *scored], len(scored))
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT * 5,), ("",)))
    assert found == [pytest.approx(wanted, abs=TOLERANCE), 0.0]


def test_log_likelihoods_are_those_of_the_split_protocol(long_model: LanguageModel) -> None:
    lm = PopjaxLM(long_model, case=ONLINE)
    ((found, greedy),) = lm.loglikelihood(requests("loglikelihood", (TEXT, "The fox runs")))
    before = lm.tok_encode(TEXT.rstrip())
    after = lm.tok_encode(TEXT + "The fox runs")[len(before) :]
    place = long_model.params, long_model.config, ONLINE.method
    wanted = continuation_logprobs(*place, before, after)
    assert found == pytest.approx(float(wanted.sum()), abs=TOLERANCE) and not greedy


def test_texts_become_the_tokens_that_lm_eval_makes(long_model: LanguageModel) -> None:
    from lm_eval.api.model import TemplateLM

    lm = PopjaxLM(long_model)
    for context, continuation in ((TEXT, "word"), ("a", " b"), ("ends in space ", "word")):
        pair = lm.encoder.pair(context, continuation)
        wanted = TemplateLM._encode_pair(lm, context, continuation)
        assert (list(pair.context), list(pair.continuation)) == wanted
    prefix = lm.prefix_token_id
    assert lm.encoder.pair("", "word").context == (prefix,)
    begun = long_model.tokenizer.decode([prefix]) + "word"
    assert lm.encoder.pair("", begun) == lm.encoder.pair("", "word")


def test_contexts_too_long_are_cut_and_counted_and_choices_refused(
    long_model: LanguageModel,
) -> None:
    lm = PopjaxLM(long_model, max_length=32)
    ((cut, _),) = lm.loglikelihood(requests("loglikelihood", (TEXT * 3, " dog")))
    assert lm.cut == 1
    ids = lm.tok_encode(TEXT * 3 + " dog")[-32:]
    # The context's last space is part of the word.
    before = lm.encoder.pair(TEXT * 3, " dog")
    assert [*before.context, *before.continuation] == ids
    assert cut == pytest.approx(direct(long_model, ids, len(before.continuation)), abs=TOLERANCE)
    with pytest.raises(ValueError, match="continuation 0 has .* above the model's maximum context"):
        lm.loglikelihood(requests("loglikelihood", ("a", TEXT * 3)))
    with pytest.raises(ValueError, match="continuation 0 has no tokens of its own"):
        lm.loglikelihood(requests("loglikelihood", ("a", "")))


def test_generation_is_that_of_the_model_and_stops(long_model: LanguageModel) -> None:
    asked = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    contexts = (TEXT[:30], "A")
    for case in (ONLINE, Case()):
        lm = PopjaxLM(long_model, case=case, batch_size=2)
        found = lm.generate_until(requests("generate_until", *((c, asked) for c in contexts)))
        alone = [
            long_model.generate(c, method=case.method, max_new_tokens=12, do_sample=False)
            for c in contexts
        ]
        assert found == [each.text[0].split("\n\n")[0] for each in alone]
    stop = found[0][2:4]
    (cut,) = lm.generate_until(
        requests("generate_until", (contexts[0], {**asked, "until": [stop]}))
    )
    assert cut == found[0].split(stop)[0]


def test_generation_arguments_are_read_as_lm_eval_means_them() -> None:
    greedy = {"max_new_tokens": 7, "do_sample": False, "repetition_penalty": None}
    assert generation_options({"until": "x", "max_tokens": 7}, 9) == (greedy, ["x"])
    warm, until = generation_options({"until": ["", "y"], "temperature": 0.7, "top_p": 0.9}, 9)
    assert until == ["y"] and warm["do_sample"] is True and warm["max_new_tokens"] == 9
    assert (warm["temperature"], warm["top_p"]) == (0.7, 0.9)
    with pytest.raises(ValueError, match="generation argument 'num_beams'"):
        generation_options({"num_beams": 4}, 9)


def test_answers_go_to_the_cache_hook_and_come_from_the_journal(
    long_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[Any, ...]] = []
    journal = Journal({})
    lm = PopjaxLM(long_model, journal=journal)
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *given: heard.append(given))
    asked = requests("loglikelihood", ("A dog", " barks"), ("A dog", " purrs"))
    first = lm.loglikelihood(asked)
    assert sorted(heard) == [
        ("loglikelihood", ("A dog", f" {word}"), answer)
        for word, answer in zip(("barks", "purrs"), first, strict=True)
    ]
    monkeypatch.setattr(Scorer, "_split", lambda *given: pytest.fail("scored again"))
    assert PopjaxLM(long_model, journal=journal).loglikelihood(asked) == first


def test_chats_are_written_by_the_template(long_model: LanguageModel) -> None:
    lm = PopjaxLM(long_model)
    turns = [{"role": "user", "content": "Hi"}]
    if long_model.tokenizer.chat_template:
        wanted = long_model.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        assert lm.apply_chat_template(turns) == wanted
        assert lm.chat_template(True) == long_model.tokenizer.chat_template
    else:
        with pytest.raises(ValueError, match="no chat template"):
            lm.apply_chat_template(turns)
    assert lm.tokenizer_name and "/" not in lm.tokenizer_name


def test_lm_eval_finds_it_by_name(long_checkpoint: Path) -> None:
    from lm_eval.api.registry import get_model

    register()
    register()
    lm = get_model("popjax").create_from_arg_string(
        f"pretrained={long_checkpoint},method=online-pruning,ratio=0.5,max_length=64",
        {"batch_size": "auto", "device": "cpu"},
    )
    assert isinstance(lm, PopjaxLM) and lm.case.method == OnlinePruning(ratio=0.5)
    assert (lm.max_length, lm.batch_size, lm.protocol) == (64, 16, SPLIT)
    with pytest.raises(ValueError, match="device 'cuda:0' is not jax's 'cpu'"):
        PopjaxLM(str(long_checkpoint), device="cuda:0")


@pytest.mark.parametrize(
    ("kind", "arguments", "bad"),
    [
        ("loglikelihood", ("The", " fox"), 3.0),
        ("loglikelihood", ("The", " fox"), [1.0, 2]),
        ("loglikelihood_rolling", ("The fox",), "words"),
        ("generate_until", ("The", {"until": ["."], "max_gen_toks": 2}), 3.0),
    ],
)
def test_kept_answers_of_another_form_are_refused(
    long_model: LanguageModel, kind: str, arguments: tuple[Any, ...], bad: Any, tmp_path: Path
) -> None:
    with Journal({}, tmp_path / "out.jsonl") as journal:
        lm = PopjaxLM(long_model, journal=journal)
        args = (*arguments, 0) if kind == "generate_until" else arguments
        journal.put(lm._key(kind, args), bad)
        with pytest.raises(ValueError, match="is damaged: the value of .* no result of its kind"):
            getattr(lm, kind)(requests(kind, arguments))
