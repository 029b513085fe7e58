"""The quality script: windows, statistics, table and file, on a tiny model from its folder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import popjax
from popjax.bench import DENSE
from popjax.continuation import continuation_logprobs
from popjax.evaluation.paired import Quality
from popjax.evaluation.statistics import standard_error
from popjax.evaluation.windows import cut_windows
from popjax.methods import CHESS, Method, OnlinePruning, WandaSP
from scripts import quality
from scripts.quality import CALIBRATED, METHODS, chosen_methods

TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. " * 8
SHORT = ["--windows", "3", "--prefix", "16", "--scored", "8", "--ratios", "0.5"]


def test_windows_cover_the_text_from_first_to_last_token() -> None:
    windows = cut_windows(range(100), [], 4, 10)
    assert [window[0] for window in windows] == [0, 30, 60, 90]
    assert all(window == list(range(window[0], window[0] + 10)) for window in windows)
    assert cut_windows(range(100), [], 1, 10) == [list(range(10))]
    packed = cut_windows(range(40), [], 4, 10)
    assert sum(packed, []) == list(range(40))


def test_windows_begin_as_the_tokenizer_begins_a_text() -> None:
    windows = cut_windows(range(100), [777], 2, 10)
    assert windows == [[777, *range(9)], [777, *range(91, 100)]]


@pytest.mark.parametrize(("count", "tokens"), [(4, 39), (0, 100)])
def test_windows_that_would_overlap_are_refused(count: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{count} windows of 10 tokens do not fit a text of"):
        cut_windows(range(tokens), [], count, 10)


def test_the_standard_error_is_that_of_the_mean() -> None:
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(standard_error([1.0]))


def test_differences_are_paired_by_window() -> None:
    found = Quality("frozen", 0.5, windows=(2.0, 4.0, 9.0), dense=(1.0, 3.0, 8.0))
    values = found.to_json()
    # Windows differ widely, yet each is exactly 1 above its dense pair.
    assert values["difference"] == 1.0 and values["difference_standard_error"] == 0.0
    assert values["mean"] == 5.0 and values["standard_error"] > 2
    assert found.row().endswith("| +1.000 ± 0.000 |")


def test_the_script_scores_what_it_says(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "quality.json"
    text.write_text(TEXT, encoding="utf-8")
    model = ["--model", str(tiny_checkpoint)]
    quality.main(["--text", str(text), "--json", str(out), *model, *SHORT])
    shown = capsys.readouterr().out
    results = json.loads(out.read_text())["results"]
    assert [(row["method"], row["ratio"]) for row in results] == [
        (DENSE, 0.0),
        *((name, 0.5) for name in METHODS),
    ]
    assert len([line for line in shown.splitlines() if line.startswith("|")]) == 2 + len(results)
    assert list(tmp_path.glob("*.partial")) == []

    loaded = popjax.load(str(tiny_checkpoint))
    ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    special = loaded.tokenizer("")["input_ids"]
    window = cut_windows(ids, special, 3, 24)[1]
    for row, method in ((results[0], Method()), (results[3], OnlinePruning(ratio=0.5))):
        arguments = (loaded.params, loaded.config, method)
        logprobs = continuation_logprobs(*arguments, window[:16], window[16:])
        assert row["windows"][1] == pytest.approx(-np.mean(logprobs, dtype=np.float64))


def test_methods_are_named_and_calibrated_ones_need_statistics() -> None:
    assert chosen_methods(None, None) == METHODS
    every = chosen_methods(None, Path("file"))
    assert list(every) == [*METHODS, *CALIBRATED]
    assert every["wanda-sp"](0.3) == WandaSP(0.3, "file")
    assert every["chess, dense prefill"](0.3) == CHESS(0.3, "file", prefill="dense")
    assert list(chosen_methods(["flap", "griffin"], Path("file"))) == ["flap", "griffin"]
    with pytest.raises(ValueError, match="method 'flap' needs --statistics"):
        chosen_methods(["flap"], None)
    with pytest.raises(ValueError, match="method 'flop' is none of"):
        chosen_methods(["flop"], None)


def test_a_text_that_is_too_short_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(ValueError, match="give a longer text"):
        quality.main(["--text", str(text), "--model", str(tiny_checkpoint), *SHORT])
