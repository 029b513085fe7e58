"""The script that trains gates: table and file, on a tiny model from its folder."""

from pathlib import Path

import pytest

import popjax
from popjax.eviction.gates import load_gates
from scripts import train_gates

TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. " * 40
SHORT = ["--contexts", "3", "--tokens", "64", "--steps", "40", "--batch", "500", "--rate", "0.5"]


def test_gates_are_trained_printed_and_saved(
    long_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "gates.safetensors"
    text.write_text(TEXT, encoding="utf-8")
    asked = ["--text", str(text), "--out", str(out), "--model", str(long_checkpoint), *SHORT]
    train_gates.main(asked)
    printed = capsys.readouterr().out
    # Tokens less four sinks a context; every 100th is held out.
    assert "179 tokens to learn from, 1 held out" in printed
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in printed.splitlines()}
    assert float(rows["trained"][1]) < float(rows["untrained"][1])
    model = popjax.load(str(long_checkpoint))
    assert len(load_gates(out, model.params, model.config)) == model.config.num_layers
    with pytest.raises(SystemExit, match="exists: choose another name"):
        train_gates.main(asked)


def test_a_text_too_short_for_its_contexts_is_refused(
    long_checkpoint: Path, tmp_path: Path
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "gates.safetensors"
    text.write_text("Too short.", encoding="utf-8")
    asked = ["--text", str(text), "--out", str(out), "--model", str(long_checkpoint)]
    with pytest.raises(ValueError, match="8 windows of 2048 tokens do not fit"):
        train_gates.main(asked)
    assert not out.exists()
