"""`popjax eval` and `popjax perplexity` as users meet them: tables, resuming, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import checkpoints
from popjax import LanguageModel, PrefillPruning, ShortGPT, SnapKV
from popjax.calibration.statistics import FORM
from popjax.cli import app
from popjax.cli.evaluation_options import chosen_cases
from popjax.continuation import continuation_logprobs
from popjax.evaluation import scoring
from popjax.evaluation.protocols import Case
from popjax.evaluation.run import How
from popjax.evaluation.windows import cut_windows
from popjax.methods import FLAP, Method, OnlinePruning
from popjax.scouts import make_scouts, with_scouts
from tests.evaluation.conftest import ITEMS

ONLINE = ("--ratio", "0.5")
SMALL = (*ONLINE, "--batch-size", "4")
TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. " * 8
SHORT = ("--windows", "3", "--prefix", "16", "--scored", "8")


@pytest.fixture
def command(long_checkpoint: Path) -> Any:
    def run(name: str, *arguments: str) -> Any:
        return CliRunner().invoke(app, [name, "--model", str(long_checkpoint), *arguments])

    return run


def said(result: Any) -> str:
    """All that was printed, in one line and without boxes."""
    return " ".join((result.stdout + result.stderr).replace("│", " ").split())


def rows(result: Any) -> dict[tuple[str, str], Any]:
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["results"]
    return {(row["metric"], row["case"]): row for row in found}


def test_a_task_file_is_scored_against_dense(
    command: Any, task_file: Callable[..., Path], long_model: LanguageModel
) -> None:
    asked = ("eval", "--tasks", str(task_file()), *SMALL)
    result = command(*asked, "--limit", "2", "--json")
    found = rows(result)
    assert json.loads(result.stdout)["protocol"] == "split"
    assert {case for _, case in found} == {"dense", "online-pruning ratio 0.5"}
    for method, case in (
        (Method(), "dense"),
        (OnlinePruning(ratio=0.5), "online-pruning ratio 0.5"),
    ):
        hits = []
        for item in ITEMS[:2]:
            before = long_model.encode(item["context"])[0]
            wholes = (long_model.encode(item["context"] + c)[0] for c in item["choices"])
            place = long_model.params, long_model.config, method
            given = ((before, whole[len(before) :]) for whole in wholes)
            scores = [float(continuation_logprobs(*place, *pair).sum()) for pair in given]
            hits.append(scores.index(max(scores)) == item["answer"])
        acc = found["acc", case]
        assert acc["value"]["mean"] == pytest.approx(sum(hits) / 2) and acc["value"]["n"] == 2
    pair = found["answer_logprob", "online-pruning ratio 0.5"]
    dense = found["answer_logprob", "dense"]
    gap = pair["value"]["mean"] - dense["value"]["mean"]
    assert pair["difference_from_dense"]["mean"] == pytest.approx(gap)
    assert dense["difference_from_dense"] is None
    shown = said(command(*asked))
    assert "protocol split: the context is prefilled" in shown and "minus dense" in shown
    assert "1 of 4 contexts are empty" in shown and "guessing gets" in shown


def test_an_interrupted_run_goes_on_and_others_are_refused(
    command: Any, task_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out.jsonl", str(task_file())
    whole = rows(command("eval", "--tasks", file, *SMALL, "--json"))
    score, calls = scoring.Scorer._split, 0

    def interrupted(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return score(self, batch)

    monkeypatch.setattr(scoring.Scorer, "_split", interrupted)
    broken = command("eval", "--tasks", file, *SMALL, "--out", str(out))
    assert broken.exit_code == 130
    kept = out.read_text().count("\n")
    assert 1 < kept < 9
    calls = 100
    again = rows(command("eval", "--tasks", file, *SMALL, "--out", str(out), "--json"))
    assert out.read_text().count("\n") == 9 and calls - 100 < 8
    for key, row in whole.items():
        assert again[key]["value"]["mean"] == pytest.approx(row["value"]["mean"], abs=1e-4)
    calls = 1000
    assert command("eval", "--tasks", file, *SMALL, "--out", str(out)).exit_code == 0
    assert calls == 1000, "everything was there"
    other = command("eval", "--tasks", file, "--ratio", "0.3", "--out", str(out))
    assert other.exit_code == 1 and "use the same settings, or give --out" in said(other)
    wanted = "of other settings (cases: online-pruning ratio 0.5 given, now none; cases: online-"
    assert wanted in said(other)
    banded = command("eval", "--tasks", file, *SMALL, "--gamma", "0.2", "--out", str(out))
    assert "(cases: online-pruning ratio 0.5: method: gamma 0.1, now 0.2)" in said(banded)


@pytest.mark.parametrize("bad", ["words", None, True, [1], {"a": 1}])
def test_results_of_another_form_are_one_sentence(
    command: Any, task_file: Callable[..., Path], tmp_path: Path, bad: Any
) -> None:
    text = tmp_path / "fox.txt"
    text.write_text(TEXT, encoding="utf-8")
    for asked in (
        ("eval", "--tasks", str(task_file()), "--limit", "1"),
        ("perplexity", "--text", str(text), *SHORT),
    ):
        out = tmp_path / f"{asked[0]}.jsonl"
        assert command(*asked, "--out", str(out)).exit_code == 0
        first, line, *others = out.read_text().splitlines()
        record = json.dumps({**json.loads(line), "value": bad})
        out.write_text("\n".join([first, record, *others, ""]))
        refused = command(*asked, "--out", str(out))
        assert refused.exit_code == 1
        assert "is damaged: the value of 'dense|" in said(refused) and "unexpected" not in said(
            refused
        )


def test_perplexity_of_windows_is_paired_with_dense(
    command: Any, tmp_path: Path, long_model: LanguageModel
) -> None:
    text = tmp_path / "fox.txt"
    text.write_text(TEXT, encoding="utf-8")
    result = command("perplexity", "--text", str(text), *ONLINE, *SHORT, "--json")
    found = rows(result)
    ids = long_model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    special = long_model.tokenizer("")["input_ids"]
    losses = {"dense": [], "online-pruning ratio 0.5": []}
    for window in cut_windows(ids, special, 3, 24):
        for name, method in (
            ("dense", Method()),
            ("online-pruning ratio 0.5", OnlinePruning(ratio=0.5)),
        ):
            place = long_model.params, long_model.config, method
            losses[name].append(-continuation_logprobs(*place, window[:16], window[16:]).mean())
    for name, values in losses.items():
        mean = found["log-perplexity", name]["value"]["mean"]
        assert mean == pytest.approx(sum(values) / 3, abs=1e-4)
    gaps = [a - b for a, b in zip(losses["online-pruning ratio 0.5"], losses["dense"], strict=True)]
    difference = found["log-perplexity", "online-pruning ratio 0.5"]["difference_from_dense"]
    assert difference["mean"] == pytest.approx(sum(gaps) / 3, abs=1e-4)
    spread = math.sqrt(sum((g - sum(gaps) / 3) ** 2 for g in gaps) / 2 / 3)
    assert difference["standard_error"] == pytest.approx(spread, rel=1e-2)


def test_single_pass_perplexity_rolls_over_the_text(command: Any, tmp_path: Path) -> None:
    text, out = tmp_path / "fox.txt", tmp_path / "out.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    asked = ("--text", str(text), "--protocol", "single-pass", "--max-length", "64")
    result = command("perplexity", *asked, "--out", str(out))
    assert result.exit_code == 0, result.stderr
    shown = said(result)
    assert "exercises no decode-time sparsity" in shown and " a word" in shown
    few = command("perplexity", *asked, "--windows", "2")
    assert few.exit_code == 0 and " a word" not in said(few)
    other = command("perplexity", *asked, "--windows", "2", "--out", str(out))
    assert other.exit_code == 1 and "use the same settings" in said(other)
    for option in ("--prefix", "--scored"):
        unused = command("perplexity", *asked, option, "8")
        assert unused.exit_code == 2 and f"{option}: single-pass scores every token" in said(unused)
    many = command("perplexity", *asked, "--windows", "1000")
    assert many.exit_code == 1 and "give a longer text, or fewer" in said(many)


def test_cases_are_named_by_what_they_take_away() -> None:
    given = {"ratio": 0.3, "model_ratio": None}
    kv, depth = SnapKV(tokens=64), PrefillPruning(skip=0.5)
    found = chosen_cases(["griffin", "frozen"], given, kv, None, True)
    names = [case.name for case in found]
    assert names == ["dense", *(f"{m} ratio 0.3, snapkv tokens 64" for m in ("griffin", "frozen"))]
    (alone,) = chosen_cases(None, {}, None, depth, False)
    assert (alone.name, alone.method) == ("prefill-pruning skip 0.5", Method())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--protocol", "spilt"], 2, "--protocol: protocol 'spilt' is unknown"),
        (["--protocol", "single-pass", "--kv-keep", "0.5"], 2, "use the protocol split"),
        (["--method", "grifin", "--ratio", "0.5"], 2, "the nearest is 'griffin'"),
        (["--method", "griffin"], 2, "needs a ratio"),
        (["--method", "griffin", "--method", "griffin", "--ratio", "0.5"], 2, "named twice"),
        (["--no-dense"], 2, "nothing is left to score"),
        (["--method", "dense", "--ratio", "0.5"], 2, "--method: dense decoding prunes nothing"),
        (["--num-fewshot", "2"], 2, "--num-fewshot: it is of tasks that lm-eval has, and only"),
        (["--include-path", "."], 2, "--include-path: it is of tasks that lm-eval has"),
        (["--tasks", "arc_easy", "--include-path", "nowhere"], 2, "there is no folder nowhere"),
        (["--max-length", "5000"], 1, "--max-length 5000 is outside 2..1024"),
        (["--max-length", "4"], 1, "of pets has 7 tokens, above"),
    ],
)
def test_wrong_options_are_one_sentence(
    command: Any, task_file: Callable[..., Path], arguments: list[str], code: int, words: str
) -> None:
    result = command("eval", "--tasks", str(task_file()), *arguments)
    assert result.exit_code == code and words in said(result)


def test_bad_files_are_one_sentence(command: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    result = command("eval", "--tasks", str(empty))
    assert result.exit_code == 2 and "is empty: write one JSON object" in said(result)
    (tmp_path / "empty.txt").touch()
    for name, words in (("empty.txt", "is empty"), ("none.txt", "there is no file")):
        result = command("perplexity", "--text", str(tmp_path / name))
        assert result.exit_code == 2 and words in said(result)
    (tmp_path / "short.txt").write_text("too short")
    result = command("perplexity", "--text", str(tmp_path / "short.txt"), *SHORT)
    assert result.exit_code == 1 and "give a longer text" in said(result)
    result = command("perplexity", "--text", str(tmp_path / "short.txt"), "--prefix", "1024")
    assert result.exit_code == 1 and "do not fit the model's maximum context" in said(result)


def test_an_overlong_choice_is_named_before_anything_is_scored(
    command: Any, task_file: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    path = task_file([*ITEMS, {"context": "a", "choices": ["b", TEXT * 9], "answer": 0}])
    result = command("eval", "--tasks", str(path), "--out", str(out))
    assert result.exit_code == 1 and not out.exists()
    assert "choice 1 of item 5 of pets has" in said(result) and "1024: shorten it" in said(result)


def test_what_was_scored_before_a_nan_is_kept(
    command: Any, task_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, score, calls = tmp_path / "out.jsonl", scoring.Scorer._split, 0

    def failing(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        logprobs, best = score(self, batch)
        return (logprobs * math.nan if calls == 5 else logprobs), best

    monkeypatch.setattr(scoring.Scorer, "_split", failing)
    result = command("eval", "--tasks", str(task_file()), *SMALL, "--out", str(out))
    assert (
        result.exit_code == 1
        and "a log-likelihood under online-pruning ratio 0.5 is nan" in said(result)
    )
    assert out.read_text().count("\n") > 4


def test_calibrated_methods_are_none_of_a_single_pass(command: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    asked = ("perplexity", "--text", str(text), *SHORT, *ONLINE, "--method", "flap")
    missing = command(*asked, "--statistics", str(tmp_path / "none.safetensors"))
    assert missing.exit_code == 2 and "is not a file: give one of kind" in said(missing)
    file = tmp_path / "statistics.safetensors"
    checkpoints.save_bundle(file, FORM.kind, FORM.version, {"a": np.zeros(1)}, {})
    refused = command(*asked, "--statistics", str(file), "--protocol", "single-pass")
    assert refused.exit_code == 2 and "runs no method that is calibrated" in said(refused)


def test_a_ratio_that_cannot_be_served_begins_no_file(command: Any, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    asked = ("--method", "frozen", "--ratio", "1", "--out", str(out))
    refused = command("perplexity", "--text", str(text), *SHORT, *asked)
    assert refused.exit_code == 1 and "leaves no FFN channel" in said(refused)
    assert not out.exists()


def test_no_task_is_wrong_usage(command: Any) -> None:
    refused = command("eval", "--tasks", ",")
    assert refused.exit_code == 2 and "no task is named" in said(refused)


@pytest.mark.parametrize("place", ["/dev/null", ".", "", "nowhere/out.jsonl", "n" * 300])
@pytest.mark.parametrize("name", ["eval", "perplexity"])
def test_places_for_results_are_refused_before_any_work(
    command: Any, task_file: Callable[..., Path], name: str, place: str
) -> None:
    what = "--tasks" if name == "eval" else "--text"
    refused = command(name, what, str(task_file()), *ONLINE, "--out", place)
    assert refused.exit_code == 2
    told = "cannot be a file here" if len(place) > 99 else "must be a file in a folder that exists"
    assert "--out: " in said(refused) and told in said(refused)


def test_files_of_a_case_count_by_their_bytes(tmp_path: Path) -> None:
    """Under another name they are the same settings, with other contents they are not."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a")
    two.write_bytes(b"a")
    for make in (
        lambda file: Case("case", FLAP(0.5, str(file))),
        lambda file: Case("case", depth=ShortGPT(importance=str(file))),
    ):
        before = make(one).settings()
        assert make(two).settings() == before
        two.write_bytes(b"b")
        assert make(two).settings() != before
        two.write_bytes(b"a")
        with pytest.raises(ValueError, match="none cannot be read .* `popjax calibrate "):
            make(tmp_path / "none").settings()


def test_another_scout_is_another_setting(long_model: LanguageModel) -> None:
    params, how = long_model.params, How()
    found = [how.settings(long_model, [Case()])["scout"]]
    for bits in (4, 8):
        made = make_scouts(params, long_model.config, bits, 32, ends=True)
        model = dataclasses.replace(long_model, params=with_scouts(params, made))
        found.append(how.settings(model, [Case()])["scout"])
    assert found[0] is None and len(set(found)) == 3
