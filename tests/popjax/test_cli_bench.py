"""`popjax bench` over several points, with cache evictions, and with quality beside speed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from popjax.cli import app

TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. " * 8
FEW = ("--max-new-tokens", "2", "--rounds", "1", "--json")


@pytest.fixture
def bench(tiny_checkpoint: Path) -> Any:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["bench", "--model", str(tiny_checkpoint), *arguments])

    return run


def test_every_batch_is_timed_with_every_prompt_length(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    points = ("--batch", "1", "--batch", "2", "--prompt-tokens", "8", "--prompt-tokens", "12")
    result = bench("--method", "frozen", "--csv", str(out), *points, *FEW)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["points"]
    expected = [(1, 8), (2, 8), (1, 12), (2, 12)]
    assert [(point["batch"], point["prompt_tokens"]) for point in found] == expected
    with out.open(newline="", encoding="utf-8") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["dense", "frozen"] * 4


def test_evictions_and_ratios_have_names_of_their_own(bench: Any) -> None:
    kv = ("--kv", "snapkv", "--kv-tokens", "6", "--kv-window", "2")
    # An option goes to the methods that have it.
    ratios = ("--method", "frozen", "--ratio", "0.25", "--ratio", "0.5", "--method")
    ratios = (*ratios, "online-pruning", "--gamma", "0.3")
    result = bench(*kv, *ratios, "--prefill", "dense", "--prompt-tokens", "12", *FEW)
    assert result.exit_code == 0, result.stderr
    (point,) = json.loads(result.stdout)["points"]
    pruned = [f"{name} {r}" for name in ("frozen", "online-pruning") for r in ("0.25", "0.5")]
    both = [f"{name}, snapkv" for name in pruned]
    names = [row["name"] for row in point["methods"]]
    assert sorted(names) == sorted(["dense", *pruned, "snapkv", *both])


def test_quality_stands_beside_speed(bench: Any, tmp_path: Path) -> None:
    text, figure = tmp_path / "text.txt", tmp_path / "frontier.png"
    text.write_text(TEXT, encoding="utf-8")
    windows = ("--windows", "2", "--prefix", "12", "--scored", "4", "--prompt-tokens", "8")
    asked = ("--text", str(text), "--figure", str(figure), "--method", "frozen", *windows)
    result = bench(*asked, *FEW)
    assert result.exit_code == 0, result.stderr
    quality = json.loads(result.stdout)["quality"]
    (point,) = quality["points"]
    assert "split: 2 windows" in quality["protocol"] and len(quality["dense_losses"]) == 2
    assert point["name"] == "frozen" and point["windows"] == 2 and point["bytes_share"] < 1
    assert figure.read_bytes().startswith(b"\x89PNG")
    again = bench(*asked, *FEW)
    assert again.exit_code == 2 and "exists: choose another name" in " ".join(again.stderr.split())
    figure.unlink()
    shown = bench(*asked, *FEW[:-1])
    assert "loss above dense, nats" in " ".join(shown.stdout.split())


@pytest.mark.parametrize("name", ["q.txt", "q", "q.pngg"])
def test_pictures_have_a_format_that_can_be_written(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    asked = ["bench", "--model", "nowhere", "--text", str(text), "--figure", name]
    refused = CliRunner().invoke(app, asked)
    said = " ".join(refused.stderr.replace("\u2502", " ").split())
    assert refused.exit_code == 2
    assert f"--figure: {name} is no picture that matplotlib writes: give a name" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--figure", "a.png"], "--figure: the picture shows quality: give --text"),
        (["--text", "nowhere.txt"], "--text: there is no file nowhere.txt"),
        (["hello", "--prompt-tokens", "9"], "has a length of its own: drop one of the two"),
        (["--kv", "snapkv"], "no budget was given"),
        (
            ["--method", "frozen", "--method", "griffin", "--gamma", "0.2"],
            "--gamma: none of frozen",
        ),
        (["--batch", "0"], "--batch"),
        (["--batch", "2", "--batch", "2"], "--batch: 2 is named twice"),
        (["--ratio", "0.3", "--ratio", "0.3"], "--ratio: 0.3 is named twice"),
        (["--csv", "/dev/null"], "--csv: /dev/null must be a file in a folder that exists"),
        (["--windows", "3"], "--windows: it cuts the text: give --text"),
        (["--csv", "nowhere/b.csv"], "--csv: nowhere/b.csv must be a file in a folder that exists"),
    ],
)
def test_wrong_usage_is_said_before_a_model_is_loaded(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--model", "nowhere", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
