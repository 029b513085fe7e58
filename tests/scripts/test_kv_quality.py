"""The eviction quality scripts: one prefill serves all methods, pass keys, figures and files."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import popjax
from popjax.bench import DENSE
from popjax.continuation import continuation_logits, continuation_logprobs
from popjax.eviction import KvMethod, kv_method_named
from popjax.methods import Method
from popjax.run import Request, run
from scripts import kv_quality, needle
from scripts.kv_quality import Hits, Losses, binomial, retrieval
from scripts.kv_windows import Prefilled
from scripts.pass_key import DIGITS, Haystacks, PassKey
from tests.popjax.tiny_models import CONFIGS, PROMPTS, random_params

TEXT = "The quick brown fox jumps over the lazy dog. The dog lets it! Does the fox? " * 16
FOLLOWING = [3, 41, 8, 77, 20]
HAYSTACK = 4 * TEXT
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model() -> Any:
    """One layer of a tiny llama, as the scripts see a model."""
    config = dataclasses.replace(CONFIGS["llama"], layers=CONFIGS["llama"].layers[:1])
    return SimpleNamespace(config=config, params=random_params(config))


@pytest.fixture(scope="module")
def cases() -> dict[str, KvMethod]:
    """One method that listens to the prompt alone, and one that runs passes of its own."""
    return {
        "laprox": kv_method_named("laprox", keep=0.5, window=3),
        "kvzip": kv_method_named("kvzip", keep=0.4, piece=8, instruction_ids=(9, 2)),
    }


@pytest.fixture(scope="module")
def prefilled(model: Any, cases: dict[str, KvMethod]) -> Prefilled:
    return Prefilled(model.params, model.config, PROMPTS[1], cases)


def test_one_prefill_serves_every_method_as_its_own_would(
    model: Any, prefilled: Prefilled, cases: dict[str, KvMethod]
) -> None:
    found = {}
    for name, eviction in ((DENSE, None), *cases.items()):
        found[name] = np.asarray(prefilled.logits(FOLLOWING, name, eviction))
        arguments = (model.params, model.config, Method(), [PROMPTS[1]], [FOLLOWING])
        alone = np.asarray(continuation_logits(*arguments, eviction=eviction))[0]
        # The same sums over rows of another length: a few roundings of numbers of size 3 apart.
        np.testing.assert_allclose(found[name], alone[: len(FOLLOWING)], atol=2e-5)
    first, *others = found.values()
    assert all(np.abs(first - other)[1:].max() > 1e-2 for other in others)
    assert all(np.array_equal(first[0], other[0]) for other in others)


def test_the_script_measures_what_each_method_does_alone(model: Any) -> None:
    """Whatever its settings, and at a budget of everything, where it listens to nothing."""
    cases: dict[tuple[str, float], KvMethod | None] = {(DENSE, 1.0): None}
    for name, keep, options in (
        ("kvzip", 1.0, {"piece": 8, "instruction_ids": (9, 2)}),
        ("kvzip", 0.4, {"piece": 8, "instruction_ids": (9, 2)}),
        ("snapkv", 0.4, {"window": 3}),
    ):
        cases[name, keep] = kv_method_named(name, keep=keep, **options)
    window = [*PROMPTS[1], *FOLLOWING]
    found = kv_quality.perplexities(model, [window], len(PROMPTS[1]), cases).windows
    for case, eviction in cases.items():
        arguments = (model.params, model.config, Method(), PROMPTS[1], FOLLOWING)
        alone = continuation_logprobs(*arguments, eviction=eviction)
        np.testing.assert_allclose(found[case], -alone.mean(), atol=2e-5)
    assert len({round(losses[0], 3) for losses in found.values()}) == 3


def test_a_budget_of_everything_is_the_dense_cache(prefilled: Prefilled) -> None:
    everything = kv_method_named("laprox", keep=1.0, window=3)
    found = prefilled.logits(FOLLOWING, "laprox", everything)
    assert np.array_equal(found, prefilled.logits(FOLLOWING))


@pytest.mark.parametrize("agnostic", [False, True])
def test_a_hit_is_what_greedy_decoding_writes(model: Any, agnostic: bool) -> None:
    context, question = PROMPTS[1][:14], PROMPTS[1][14:]
    written = run(model.params, model.config, Request([PROMPTS[1]], 4)).tokens[0].tolist()
    wrong = [*written[:-1], (written[-1] + 1) % model.config.vocab_size]
    prompts = [PassKey(tuple(context), tuple(question), tuple(x)) for x in (written, wrong)]
    hits = retrieval(model, prompts, {(DENSE, 1.0): None}, agnostic)
    assert hits.prompts == {(DENSE, 1.0): [True, False]}


def test_errors_of_shares_and_differences() -> None:
    assert binomial([True, True, False, True])[0] == 0.75
    share, error = binomial([False] * 8)
    assert share == 0 and error == pytest.approx(math.sqrt(0.1 * 0.9 / 8))
    assert all(map(math.isnan, binomial([])))
    losses = Losses({(DENSE, 1.0): [1.0, 3.0, 8.0], ("laprox", 0.1): [1.5, 3.5, 8.5]})
    # Windows differ widely, yet each is half a nat above its dense pair.
    assert losses.above_dense(("laprox", 0.1)) == (0.5, 0.0)
    hits = Hits({(DENSE, 1.0): [True] * 3, ("laprox", 0.1): [True, False, False]})
    table = kv_quality.table(losses, hits).splitlines()
    assert table[3].startswith("| laprox | 0.1 | ") and "+0.500 ± 0.000 | 0.33 ±" in table[3]


def test_pass_keys_are_stated_once_among_others(long_checkpoint: Path) -> None:
    tokenizer = popjax.load(str(long_checkpoint)).tokenizer
    haystacks = Haystacks(tokenizer, HAYSTACK)
    places = []
    for depth in (0.0, 0.5, 1.0):
        found = haystacks.prompt(600, depth, seed=3)
        said = tokenizer.decode(found.context)
        number = tokenizer.decode(found.answer).strip()
        assert len(number) == DIGITS and number.isdigit() and said.count(number) == 1
        assert said.count(f"The pass key is {number}.") == 1 and said.count("number is ") == 2
        assert tokenizer.decode(found.question).endswith("The pass key is")
        assert len(found.context) + len(found.question) == 600
        places.append(said.index(number) / len(said))
    assert places[0] < 0.1 < 0.4 < places[1] < 0.6 < 0.9 < places[2]
    assert haystacks.prompt(600, 0.5, seed=3) == haystacks.prompt(600, 0.5, seed=3)
    assert haystacks.prompt(600, 0.5, seed=4) != haystacks.prompt(600, 0.5, seed=3)


def test_lengths_that_cannot_be_filled_are_refused(long_checkpoint: Path) -> None:
    haystacks = Haystacks(popjax.load(str(long_checkpoint)).tokenizer, TEXT)
    with pytest.raises(ValueError, match="tokens too short for a pass key"):
        haystacks.prompt(16, 0.5, seed=0)
    with pytest.raises(ValueError, match="give a longer text or a shorter length"):
        haystacks.prompt(5000, 0.5, seed=0)


def test_the_quality_script_writes_what_it_measured(
    long_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out, figure = (tmp_path / name for name in ("text.txt", "kv.json", "kv.png"))
    text.write_text(TEXT, encoding="utf-8")
    small = ["--windows", "2", "--keys", "2", "--prefix", "128", "--scored", "8", "--keep", "0.4"]
    small += ["--methods", "kvzip", "--json", str(out), "--figure", str(figure)]
    kv_quality.main(["--text", str(text), "--model", str(long_checkpoint), *small])
    rows = json.loads(out.read_text())["results"]
    assert [(row["method"], row["keep"]) for row in rows] == [(DENSE, 1.0), ("kvzip", 0.4)]
    for row in rows:
        above = np.mean(np.subtract(row["windows"], rows[0]["windows"]))
        assert row["difference"] == pytest.approx(above)
        assert len(row["hits"]) == 2
    assert rows[0]["windows"] != rows[1]["windows"]
    assert figure.read_bytes().startswith(PNG) and figure.stat().st_size > 10_000
    assert list(tmp_path.glob(".*partial")) == []
    shown = capsys.readouterr().out.splitlines()
    assert len([line for line in shown if line.startswith("|")]) == 2 + 2


def test_the_needle_script_draws_each_cell_from_its_own_prompts(
    long_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float, int]] = []

    def prompt(self: Haystacks, length: int, depth: float, seed: int) -> tuple[int, float, int]:
        asked.append((length, depth, seed))
        return asked[-1]

    def found(model: Any, prompts: list[Any], cases: dict[Any, Any], agnostic: bool) -> Hits:
        dense, evicted = cases
        assert evicted == ("streaming-llm", 0.5) and agnostic
        # Found in one trial of two, and in both at length 128 and depth 1.
        hits = [seed == 7 or (length, depth) == (128, 1) for length, depth, seed in prompts]
        return Hits({dense: [True] * len(prompts), evicted: hits})

    monkeypatch.setattr(Haystacks, "prompt", prompt)
    monkeypatch.setattr(needle, "retrieval", found)
    text, out, figure = (tmp_path / name for name in ("text.txt", "needle.json", "needle.png"))
    text.write_text(TEXT, encoding="utf-8")
    small = ["--lengths", "96", "128", "--depths", "0", "0.5", "1", "--trials", "2", "--seed", "6"]
    small += ["--kv", "streaming-llm", "--keep", "0.5", "--agnostic"]
    files = ["--json", str(out), "--figure", str(figure)]
    needle.main(["--text", str(text), "--model", str(long_checkpoint), *small, *files])
    assert len(set(asked)) == 2 * 3 * 2
    results = json.loads(out.read_text())["results"]
    assert [row["method"] for row in results] == [DENSE, "streaming-llm"]
    assert results[0]["shares"] == [[1, 1]] * 3
    assert results[1]["shares"] == [[0.5, 0.5], [0.5, 0.5], [0.5, 1]]
    assert figure.read_bytes().startswith(PNG) and figure.stat().st_size > 10_000
    assert list(tmp_path.glob(".*partial")) == []
