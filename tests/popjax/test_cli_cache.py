"""Evicted caches as users meet them: options, report, picture, and the calls of a loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import popjax
from popjax import LanguageModel, LaProx
from popjax.cache_picture import occupancy
from popjax.cli import app

PROMPT = "The quick brown fox jumps over the lazy dog, again and again, until it is dark."
SHORT = ("--max-new-tokens", "4", "--json")


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Path) -> LanguageModel:
    return popjax.load(tiny_checkpoint)


@pytest.fixture
def command(tiny_checkpoint: Path) -> Any:
    def run(name: str, *arguments: str) -> Any:
        return CliRunner().invoke(app, [name, "--model", str(tiny_checkpoint), *arguments])

    return run


def test_the_report_counts_what_stays(command: Any, model: LanguageModel) -> None:
    result = command("generate", PROMPT, "--kv", "laprox", "--kv-tokens", "6", "--kv-window", "3",
                     "--ratio", "0.5", *SHORT)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    heads = sum(layer.num_kv_heads for layer in model.config.layers)
    assert report["kv_totals"]["entries"] == 6 * heads
    assert report["kv_totals"]["dense_entries"] == report["prompt_tokens"] * heads
    assert report["kv_totals"]["held_bytes"] < report["kv_totals"]["dense_bytes"]
    assert len(report["kv"]) == model.config.num_layers
    assert report["method"] == "online-pruning"


def test_a_budget_alone_means_laprox_and_is_shown(command: Any) -> None:
    arguments = ("generate", PROMPT, "--kv-keep", "0.5", "--kv-window", "2")
    result = command(*arguments, "--max-new-tokens", "2", "--prefill-chunk", "8")
    assert result.exit_code == 0, result.stderr
    assert "cache kept" in result.stderr and "evict" in result.stderr
    dense = command("generate", PROMPT, "--max-new-tokens", "2")
    assert "cache kept" not in dense.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--kv", "laprox", "--kv-keep", "0.1"], "32 tokens stay whatever it is"),
        (["--kv", "streaming-llm", "--kv-keep", "0.1", "--kv-window", "40"],
         "44 tokens stay whatever it is"),
        (["--kv-keep", "1"], "entries a head holds all"),
        (["--kv-tokens", "60"], "the budget of 60 entries a head holds all"),
    ],
)  # fmt: skip
def test_a_budget_without_effect_is_said_with_the_reason(
    command: Any, arguments: list[str], why: str
) -> None:
    shown = command("generate", "The quick fox", *arguments, "--max-new-tokens", "2")
    assert shown.exit_code == 0, shown.stderr
    text = " ".join(shown.stderr.split())
    said = text.partition("cache kept every entry, the budget had no effect: ")[2]
    assert why in said.partition(" time ")[0]
    assert text.count("cache kept") == 1


def test_a_budget_with_an_effect_is_not_called_idle(model: LanguageModel) -> None:
    found = model.generate(PROMPT, kv=LaProx(tokens=6, window=3), max_new_tokens=2)
    assert found.report.kv_idle is None and found.report.kv is not None
    assert model.generate(PROMPT, max_new_tokens=2).report.kv_idle is None
    idle = model.generate("The fox", kv=LaProx(keep=0.1), max_new_tokens=2).report
    assert idle.kv_idle is not None and idle.to_json()["kv_idle"] == idle.kv_idle
    # A long prompt beside a short one has entries to spare.
    both = model.generate([PROMPT, "The"], kv=LaProx(tokens=6, window=3), max_new_tokens=2)
    assert both.report.kv_idle is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv", "laprox"], "no budget was given"),
        (["--kv", "laproxx", "--kv-keep", "0.5"], "nearest is 'laprox'"),
        (["--kv", "laprox", "--kv-tokens", "8"], "below the 32 entries"),
        (["--kv-keep", "nan"], "outside 0..1"),
        (["--kv-keep", "0"], "outside 0..1"),
        (["--kv-tokens", "-3"], "whole number above 0"),
        (["--kv-keep", "0.5", "--kv-tokens", "40"], "one of keep and tokens"),
        (["--ratio", "0.5", "--kv-keep", "0.5", "--compare-dense"], "no --kv"),
    ],
)
def test_wrong_options_are_wrong_usage(command: Any, arguments: list[str], words: str) -> None:
    result = command("generate", PROMPT, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--kv", "tova", "--kv-keep", "0.5", "--kv-window", "0"], "--kv-window: window 0"),
        (["--kv-keep", "2"], "--kv-keep: keep 2.0 is outside"),
        (["--kv-tokens", "8"], "--kv-tokens: tokens 8 is below"),
        (["--kv-keep", "0.5", "--kv-tokens", "40"], "--kv-keep / --kv-tokens: give one"),
        (["--kv-every", "40"], "--kv-every: --kv-every needs"),
        (["--kv-keep", "0.5", "--kv-every", "40"], "give --kv-tokens 256"),
        (["--kv", "h2o", "--kv-tokens", "40", "--kv-every", "40"], "--kv-every: H2O scores"),
        (["--kv-tokens", "40", "--kv-every", "8"], "--kv-every: --kv-every 8 is below the window"),
        (["--kv-tokens", "40", "--prefill-chunk", "8"], "--prefill-chunk: --prefill-chunk 8 is"),
        (["--ratio", "0.5", "--prefill-chunk", "8"], "leave out --prefill-chunk, or let the prompt "
         "run dense (online-pruning with --prefill dense)"),
    ],
)  # fmt: skip
def test_wrong_usage_names_options_as_they_are_written(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], flag: str
) -> None:
    """Before any weight is read: there are none at this path."""
    monkeypatch.setenv("COLUMNS", "1000")
    result = CliRunner().invoke(app, ["generate", PROMPT, "--model", "no/where", *arguments])
    assert result.exit_code == 2
    shown = " ".join(result.stderr.replace("│", " ").split())
    assert flag in shown
    assert "kv_" not in shown and "prefill_" not in shown


def test_the_picture_of_a_cache(command: Any, model: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "cache.png"
    arguments = ("--kv", "snapkv", "--kv-tokens", "6", "--kv-window", "3", "-o", str(file))
    result = command("show", PROMPT, *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{file}\n"
    assert file.read_bytes().startswith(b"\x89PNG")
    whole = command("show", PROMPT, "--kv-keep", "1.0", "-o", str(file))
    assert whole.exit_code == 1 and "nothing to draw" in whole.stderr
    both = command("show", PROMPT, "--kv-keep", "0.5", "--ratio", "0.5", "-o", str(file))
    assert both.exit_code == 2


def test_occupancy_is_where_entries_lie(model: LanguageModel) -> None:
    ids = model.encode(PROMPT)[0]
    found = model.generate(ids, kv=LaProx(tokens=6, window=3), max_new_tokens=1)
    assert found.kept is not None
    share, places = occupancy(found.kept, len(ids))
    assert share.shape == places.shape[:2]
    np.testing.assert_allclose(share.sum() * len(ids), 6 * share.size)
    assert (places[:, :, -3:] == 1).all()  # the window
    np.testing.assert_allclose(places.sum(axis=2), share * len(ids))


def test_a_context_of_text_is_continued_saved_and_loaded(
    model: LanguageModel, tmp_path: Path
) -> None:
    context = model.prefill(PROMPT, kv="laprox", kv_keep=1.0)
    asked = " And then?"
    whole = model.encode(PROMPT)[0] + model.encode(asked, begin=False)[0]
    wanted = model.generate(whole, max_new_tokens=6, return_logits=True)
    found = model.generate(asked, context=context, max_new_tokens=6, return_logits=True)
    assert found.logits is not None and wanted.logits is not None
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    path = context.save(tmp_path / "context.safetensors")
    again = model.generate(asked, context=model.load_context(path), max_new_tokens=6)
    assert again.tokens == found.tokens


def test_kvzip_by_name_gets_its_instructions_in_words(model: LanguageModel) -> None:
    ids = model.encode(PROMPT)[0][:10]
    found = model.generate(ids, kv="kvzip", kv_tokens=6, max_new_tokens=2)
    assert found.report.kv is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kv": "laprox"}, "needs a budget"),
        ({"kv_keep": 0.5}, "go with the name"),
        ({"kv": 3}, "is not a KvMethod"),
        ({"kv": LaProx(keep=0.5), "kv_tokens": 64}, "go with the name"),
        ({"context": "file"}, "give what prefill"),
    ],
)
def test_calls_that_make_no_sense(model: LanguageModel, arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.generate(PROMPT, max_new_tokens=2, **arguments)


def test_a_context_of_another_model_is_refused(model: LanguageModel) -> None:
    import dataclasses

    context = dataclasses.replace(model.prefill(PROMPT), fingerprint="0" * 32)
    with pytest.raises(ValueError, match="another model"):
        model.generate("And?", context=context, max_new_tokens=2)
    with pytest.raises(ValueError, match="one prompt"):
        model.prefill([PROMPT, PROMPT])
