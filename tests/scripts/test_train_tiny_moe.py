"""The script that trains a mixture: it learns, and what it saves loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import popjax
from scripts import train_tiny_moe

TEXT = "the quick brown fox jumps over the lazy dog and the dog lets it.\n" * 120
SIZES = "--words 300 --width 32 --layers 1 --experts 4 --top-k 2 --expert-width 16".split()


def test_a_mixture_learns_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "moe"
    text.write_text(TEXT)
    given = ["--text", str(text), "--out", str(out), *SIZES]
    run = [*given, "--tokens", "16", "--batch", "8", "--steps", "60", "--rate", "0.01"]
    train_tiny_moe.main(run)
    said = capsys.readouterr()
    first = re.search(r"step 0: loss ([\d.]+)", said.err)
    held = re.search(r"held-out loss ([\d.]+)", said.out)
    assert first and held
    assert float(held[1]) < 0.6 * float(first[1])
    assert "layer 0: experts used" in said.out
    model = popjax.load(str(out))
    assert model.config.layers[0].moe is not None
    assert model.generate("the quick", max_new_tokens=4, method="online-pruning", ratio=0.5).text
    with pytest.raises(SystemExit, match="exists: choose another name"):
        train_tiny_moe.main(run)


def test_a_text_too_short_is_one_sentence(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short " * 30)
    given = ["--text", str(text), "--out", str(tmp_path / "moe"), *SIZES]
    with pytest.raises(SystemExit, match="one in 20 is held out: give at least"):
        train_tiny_moe.main(given)
