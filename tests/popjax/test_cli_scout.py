"""Scouts as users meet them: written once, named where they are needed, counted in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from checkpoints import load_bundle
from popjax.cli import app

PROMPT = "The quick brown fox jumps over the lazy dog, again and again."
SHORT = ("--max-new-tokens", "4", "--json")


@pytest.fixture
def command(deep_checkpoint: Path) -> Any:
    def run(name: str, *arguments: str) -> Any:
        return CliRunner().invoke(app, [name, "--model", str(deep_checkpoint), *arguments])

    return run


def test_a_scout_is_written_and_used(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "scout.safetensors"
    written = command("calibrate", "scout", "-o", str(out))
    assert written.exit_code == 0, written.stderr
    assert written.stdout.strip() == str(out)
    # Of 32 bits a weight: two copies of 4.5 bits, in three of five layers, beside three matrices.
    assert f"{2 * 4.5 / 32 * 3 / 15:.1%} of the FFN weights" in " ".join(written.stderr.split())
    again = command("calibrate", "scout", "-o", str(out))
    assert again.exit_code == 2 and "exists" in again.stderr
    asked = ("--method", "scout", "--ratio", "0.3", "--scout", str(out))
    used = command("generate", PROMPT, *asked, *SHORT)
    assert used.exit_code == 0, used.stderr
    report = json.loads(used.stdout)["report"]
    dense = json.loads(command("generate", PROMPT, *SHORT).stdout)["report"]
    assert report["method"] == "scout" and report["packed_bytes"] == 0
    copies = 3 * 2 * 48 * (64 // 2 + 4)
    assert report["weight_bytes"] == dense["weight_bytes"] + copies
    assert report["dense_bytes_per_token"] == dense["dense_bytes_per_token"]
    assert report["read_bytes_per_token"] < dense["read_bytes_per_token"]
    few = ("--prompt-tokens", "12", "--max-new-tokens", "2", "--rounds", "1", "--json")
    timed = command("bench", *asked, *few)
    assert timed.exit_code == 0, timed.stderr
    (point,) = json.loads(timed.stdout)["points"]
    assert [row["name"] for row in point["methods"]] == ["dense", "scout"]
    text = tmp_path / "text.txt"
    text.write_text(PROMPT * 4, encoding="utf-8")
    few = ("--text", str(text), "--windows", "2", "--prefix", "12", "--scored", "4", "--json")
    scored = command("perplexity", *asked, "--method", "frozen", *few)
    assert scored.exit_code == 0, scored.stderr
    cases = [row["case"] for row in json.loads(scored.stdout)["results"]]
    assert cases == ["dense", "scout ratio 0.3", "frozen ratio 0.3"]


def test_copies_of_six_bits_in_some_layers(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    written = command("calibrate", "scout", "--bits", "6", "--copied", "0.5", "-o", str(out))
    assert written.exit_code == 0, written.stderr
    # One of three inner layers, the floor of half of them, at 6.5 bits a weight.
    assert f"{2 * 6.5 / 32 / 15:.1%} of the FFN weights" in " ".join(written.stderr.split())
    few = command("generate", PROMPT, "--method", "scout", "--ratio", "0.1", "--scout", str(out))
    assert few.exit_code == 0, few.stderr
    high = ("--method", "scout", "--ratio", "0.5", "--scout", str(out))
    refused = command("generate", PROMPT, *high)
    said = " ".join(refused.stderr.split())
    assert refused.exit_code != 0 and "copies in 1 of 3 pruned layers leaves no rows" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--bits", "3"), "bits 3 are not offered: use 4, 6 or 8"),
        (("--copied", "0"), "copied 0.0 is no share of the pruned layers"),
        (("--copied", "0.1"), "copied 0.1 of 3 pruned layers is less than one layer"),
    ],
)
def test_forms_of_scouts_that_are_refused(
    command: Any, tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    out = tmp_path / "scout.safetensors"
    refused = command("calibrate", "scout", *arguments, "-o", str(out))
    assert refused.exit_code != 0 and not out.exists()
    assert complaint in " ".join(refused.stderr.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--method", "scout", "--ratio", "0.3"), "scout needs --scout FILE"),
        (("--scout", "none.safetensors"), "it is of --method scout"),
        (
            ("--method", "scout", "--ratio", "0.3", "--scout", "none"),
            "none is not a file: give",
        ),
    ],
)
def test_scouts_and_methods_go_together(
    command: Any, arguments: tuple[str, ...], complaint: str
) -> None:
    refused = command("generate", PROMPT, *arguments)
    assert refused.exit_code == 2
    assert complaint in " ".join(refused.stderr.replace("\u2502", " ").split())


def test_prompts_of_a_calibration_need_a_text(command: Any, tmp_path: Path) -> None:
    refused = command("calibrate", "prefill-pruning", "-o", str(tmp_path / "scores"))
    assert refused.exit_code == 2 and "give --text" in refused.stderr


def test_a_scout_is_rounded_by_a_text(command: Any, tmp_path: Path) -> None:
    plain, rounded = tmp_path / "plain.safetensors", tmp_path / "rounded.safetensors"
    text = tmp_path / "text.txt"
    text.write_text(PROMPT * 4, encoding="utf-8")
    few = ("--text", str(text), "--samples", "3", "--prompt-tokens", "12")
    assert command("calibrate", "scout", "-o", str(plain)).exit_code == 0
    written = command("calibrate", "scout", "-o", str(rounded), *few)
    assert written.exit_code == 0, written.stderr
    (one, _), (other, about) = (load_bundle(path, "scout", "1", "") for path in (plain, rounded))
    assert about["about"] == "3 prompts of 12 tokens of text.txt"
    assert one.keys() == other.keys()
    assert all((one[name] != other[name]).any() for name in one if not name.endswith("scale"))
    asked = ("--method", "scout", "--ratio", "0.3", "--scout", str(rounded), *SHORT)
    used = command("generate", PROMPT, *asked)
    assert used.exit_code == 0, used.stderr


def test_ends_are_pruned_where_they_have_copies(command: Any, tmp_path: Path) -> None:
    inner, every = tmp_path / "inner.safetensors", tmp_path / "every.safetensors"
    assert command("calibrate", "scout", "-o", str(inner)).exit_code == 0
    assert command("calibrate", "scout", "-o", str(every), "--ends", "pruned").exit_code == 0
    asked = ("--method", "scout", "--ratio", "0.3", "--ends", "pruned", *SHORT)
    refused = command("generate", PROMPT, *asked, "--scout", str(inner))
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.replace("\u2502", " ").split())
    assert "no copies of layers that --ends pruned prunes: give --ends dense" in said
    used = command("generate", PROMPT, *asked, "--scout", str(every))
    assert used.exit_code == 0, used.stderr
    layers = json.loads(used.stdout)["report"]["layers"]
    assert len({layer["active"] for layer in layers}) == 1 and layers[0]["active"] < 48
