"""Skipped layers as users meet them: options, report, calibration, and calls of a loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import popjax
from popjax import LanguageModel, PrefillPruning
from popjax.cli import app

PROMPT = "The quick brown fox jumps over the lazy dog, again and again, until it is dark."
SHORT = ("--max-new-tokens", "4", "--json")


@pytest.fixture
def command(tiny_checkpoint: Path) -> Any:
    def run(name: str, *arguments: str) -> Any:
        return CliRunner().invoke(app, [name, "--model", str(tiny_checkpoint), *arguments])

    return run


def test_the_report_says_what_was_skipped(command: Any, tiny_model: LanguageModel) -> None:
    result = command("generate", PROMPT, "--depth", "prefill-pruning", "--skip", "0.5", *SHORT)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    depth = found["report"]["depth"]
    assert (depth["layers"], depth["skipped"], depth["dropped"]) == (2, [1], [])
    assert depth["flops"] < depth["dense_flops"]
    called = tiny_model.generate(PROMPT, depth=PrefillPruning(choose=(1,)), max_new_tokens=4)
    assert called.tokens[0] == found["tokens"]
    shown = command("generate", PROMPT, "--skip", "0.5", "--max-new-tokens", "2")
    assert "1 of 2 skipped in prefill (1)" in " ".join(shown.stderr.split())
    dense = command("generate", PROMPT, *SHORT)
    assert json.loads(dense.stdout)["report"]["depth"] is None


def test_one_token_skips_nothing(command: Any, tiny_model: LanguageModel) -> None:
    """It is the boundary, which runs every layer."""
    asked = {"depth": PrefillPruning(skip=0.5), "max_new_tokens": 2}
    (word,) = tiny_model.encode("a")[0]
    found = tiny_model.generate([[word]], **asked).report.depth
    assert found is not None and found.skipped == () and found.flops == found.dense_flops
    shown = command("generate", "a", "--skip", "0.5", "--max-new-tokens", "2")
    assert "0 of 2 skipped in prefill (one prompt token" in " ".join(shown.stderr.split())
    # A longer row beside it skips, and so does the token itself where its boundary is not handled.
    both = tiny_model.generate([[word], [word, word]], **asked).report.depth
    passing = PrefillPruning(skip=0.5, handle_boundary=False)
    alone = tiny_model.generate([[word]], depth=passing, max_new_tokens=2).report.depth
    assert both is not None and both.skipped == (1,) and alone is not None
    assert alone.skipped == (1,)


def test_a_share_that_rounds_to_no_layer_is_refused(command: Any) -> None:
    refused = command("generate", PROMPT, "--skip", "0.01", "--max-new-tokens", "2")
    assert refused.exit_code == 1
    rounds = "skip 0.01 of the model's 2 layers rounds to none: give 0.5 for one layer, or 0"
    assert rounds in refused.stderr
    whole = command("generate", PROMPT, "--skip", "0", *SHORT)
    dense = command("generate", PROMPT, *SHORT)
    assert json.loads(whole.stdout)["tokens"] == json.loads(dense.stdout)["tokens"]


def test_scores_are_calibrated_and_used(command: Any, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "scores.safetensors"
    text.write_text(PROMPT * 3, encoding="utf-8")
    few = ("--samples", "2", "--prompt-tokens", "12", "--max-new-tokens", "3")
    measured = command("calibrate", "prefill-pruning", "--text", str(text), "-o", str(out), *few)
    assert measured.exit_code == 0, measured.stderr
    assert str(out) in measured.stdout and "influence" in measured.stdout
    for name in ("prefill-pruning", "short-gpt"):
        asked = ("--depth", name, "--skip", "0.5", "--layer-scores", str(out), *SHORT)
        result = command("generate", PROMPT, *asked)
        assert result.exit_code == 0, result.stderr
        depth = json.loads(result.stdout)["report"]["depth"]
        assert len(depth["skipped"] + depth["dropped"]) == 1
    again = command("calibrate", "prefill-pruning", "--text", str(text), "-o", str(out), *few)
    assert again.exit_code == 2 and "exists" in again.stderr
    short = command("calibrate", "prefill-pruning", "--text", str(text), "-o",
                    str(tmp_path / "other"), "--prompt-tokens", "5000")  # fmt: skip
    assert short.exit_code == 1 and "--prompt-tokens" in short.stderr


def test_skipping_is_timed_beside_dense(command: Any) -> None:
    few = ("--prompt-tokens", "12", "--max-new-tokens", "2", "--rounds", "1", "--json")
    result = command("bench", "--skip", "0.5", *few)
    assert result.exit_code == 0, result.stderr
    assert timed_names(result) == ["dense", "prefill-pruning"]
    both = command("bench", "--skip", "0.5", "--method", "frozen", *few)
    assert sorted(timed_names(both)) == [
        "dense",
        "frozen",
        "frozen, prefill-pruning",
        "prefill-pruning",
    ]


def timed_names(result: Any) -> list[str]:
    (point,) = json.loads(result.stdout)["points"]
    return [row["name"] for row in point["methods"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--depth", "prefil-pruning"], "--depth: depth method 'prefil-pruning' is unknown"),
        (["--skip", "nan"], "--skip: skip nan is outside 0..1"),
        (["--skip", "-0.1"], "--skip: skip -0.1 is outside 0..1"),
        (["--skip", "1.5"], "--skip: skip 1.5 is outside 0..1"),
        (["--depth", "short-gpt"], "short-gpt needs --layer-scores"),
        (["--ratio", "0.5", "--skip", "0.5", "--compare-dense"], "no --depth"),
    ],
)
def test_wrong_options_are_wrong_usage(command: Any, arguments: list[str], words: str) -> None:
    result = command("generate", PROMPT, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_calls_of_a_model(tiny_model: LanguageModel, tmp_path: Path) -> None:
    whole = tiny_model.generate(PROMPT, max_new_tokens=3)
    assert tiny_model.generate(PROMPT, depth="prefill-pruning", skip=0.0,
                               max_new_tokens=3).tokens == whole.tokens  # fmt: skip
    with pytest.raises(ValueError, match="goes with the name"):
        tiny_model.generate(PROMPT, skip=0.5, max_new_tokens=3)
    context = tiny_model.prefill(
        PROMPT, depth="prefill-pruning", skip=0.5, kv="laprox", kv_keep=1.0
    )
    assert "PrefillPruning" in context.method
    loaded = tiny_model.load_context(context.save(tmp_path / "context.safetensors"))
    asked = {"depth": popjax.PrefillPruning(skip=0.5), "max_new_tokens": 3}
    first, again = (tiny_model.generate(" And?", context=c, **asked) for c in (context, loaded))
    assert first.tokens == again.tokens
