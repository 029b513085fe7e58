"""The script of methods beyond online pruning: what it scores, spends and prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import popjax
from popjax.continuation import continuation_logprobs
from popjax.evaluation.windows import cut_windows
from popjax.methods import GateFirst, Method, OnlinePruning, Scout
from popjax.scouts import make_scouts, save_scouts, with_scouts
from scripts import beyond
from scripts.beyond import FAITHFUL, PARTIAL, PARTIAL_FORM, Row, share_read

TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. " * 8
SHORT = ["--windows", "2", "--prefix", "16", "--scored", "8", "--ratios", "0.3"]


def test_rows_are_paired_and_compared_with_online_pruning() -> None:
    row = Row("scout", 0.5, 0.533, (1.5, 3.5), dense=(1.0, 3.0), faithful=(3.0, 5.0))
    assert row.minus(row.dense) == (0.5, 0.0)
    assert row.minus(row.faithful) == (-1.5, 0.0)
    assert row.closed == pytest.approx(0.75)
    assert row.line() == "| scout | 0.5 | 0.533 | +0.500 ± 0.000 | -1.500 ± 0.000 | 75% |"


def test_a_method_that_is_not_known_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        beyond.main(["--text", "no.txt", "--methods", "griffin"])
    assert "invalid choice: 'griffin'" in capsys.readouterr().err


def test_every_method_reads_the_bytes_of_online_pruning(deep_checkpoint: Path) -> None:
    config = popjax.load(str(deep_checkpoint)).config
    # So many layers that all methods fit.
    config = dataclasses.replace(config, layers=config.layers[1:2] * 30)
    read = {name: share_read(method, config) for name, method in beyond.cases(0.3).items()}
    for name, share in read.items():
        # What rounding to whole rows leaves: at most three of the 144 of a layer.
        assert 0 <= read[FAITHFUL] - share < 3 / 144, name
    assert share_read(Method(), config) == 1.0


def test_scouts_of_a_file_are_used(deep_checkpoint: Path, tmp_path: Path) -> None:
    """Copies that foretell nothing but zeros choose the first channels, whatever the token."""
    loaded = popjax.load(str(deep_checkpoint))
    made = make_scouts(loaded.params, loaded.config, ends=True)
    blind = tuple(
        {name: w * 0 if name.endswith("scale") else w for name, w in one.items()} for one in made
    )
    path, text = tmp_path / "scout.safetensors", tmp_path / "text.txt"
    save_scouts(path, blind, loaded.params, loaded.config)
    text.write_text(TEXT, encoding="utf-8")
    asked = ["--text", str(text), "--model", str(deep_checkpoint), "--methods", "scout", *SHORT]
    found = []
    for name, more in (("none", []), ("blind", ["--scout", str(path)])):
        beyond.main([*asked, *more, "--json", str(tmp_path / name)])
        found.append(json.loads((tmp_path / name).read_text())["results"])
    (faithful, scout), (same, other) = found
    assert faithful["windows"] == same["windows"] and scout["windows"] != other["windows"]


def test_copies_in_some_of_the_layers_come_from_their_own_file(
    deep_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = popjax.load(str(deep_checkpoint))
    made = make_scouts(loaded.params, loaded.config, **PARTIAL_FORM)
    path, text, out = (tmp_path / name for name in ("partial.safetensors", "text.txt", "out.json"))
    save_scouts(path, made, loaded.params, loaded.config)
    text.write_text(TEXT, encoding="utf-8")
    asked = ["--text", str(text), "--model", str(deep_checkpoint), "--partial-scout", str(path)]
    few = ["--windows", "2", "--prefix", "16", "--scored", "8", "--ratios", "0.1", "0.5"]
    beyond.main([*asked, *few, "--methods", PARTIAL, "--json", str(out)])
    found = {(row["name"], row["ratio"]): row for row in json.loads(out.read_text())["results"]}
    assert list(found) == [(FAITHFUL, 0.1), (PARTIAL, 0.1), (FAITHFUL, 0.5)]
    assert "left out: ratio 0.5 with copies in 2 of 3 pruned" in capsys.readouterr().out
    ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    window = cut_windows(ids, loaded.tokenizer("")["input_ids"], 2, 24)[1]
    scouted = with_scouts(loaded.params, made)
    given = (loaded.config, Scout(0.1, **PARTIAL_FORM), window[:16], window[16:])
    alone = -np.mean(continuation_logprobs(scouted, *given), dtype=np.float64)
    assert found[PARTIAL, 0.1]["windows"][1] == pytest.approx(alone, rel=1e-5)


def test_the_script_scores_what_it_says(
    deep_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "beyond.json"
    text.write_text(TEXT, encoding="utf-8")
    model = ["--model", str(deep_checkpoint)]
    beyond.main(["--text", str(text), "--json", str(out), *model, *SHORT])
    rows = {row["name"]: row for row in json.loads(out.read_text())["results"]}
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert list(rows) == list(beyond.cases(0.3))
    assert len(shown) == 2 + len(rows)

    loaded = popjax.load(str(deep_checkpoint))
    ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    window = cut_windows(ids, loaded.tokenizer("")["input_ids"], 2, 24)[1]
    scouted = with_scouts(loaded.params, make_scouts(loaded.params, loaded.config))
    wanted = {
        FAITHFUL: (loaded.params, OnlinePruning(ratio=0.3)),
        "gate-first": (loaded.params, GateFirst(0.3)),
        "scout": (scouted, Scout(0.3)),
    }
    for name, (params, method) in wanted.items():
        given = (loaded.config, method, window[:16], window[16:])
        alone = -np.mean(continuation_logprobs(params, *given), dtype=np.float64)
        # The same steps, in a program of another length.
        assert rows[name]["windows"][1] == pytest.approx(alone, rel=1e-5)
