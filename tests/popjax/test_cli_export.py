"""`popjax export`: what it writes loads again, and what it cannot do it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from popjax import load
from popjax.cli import app
from tests.popjax.test_cli import flat

WORDS = "the river rises in the hills above the town, where rain falls " * 12


@pytest.fixture
def export(tiny_checkpoint: Path, tmp_path: Path) -> Any:
    """Runs the command on the tiny model, with the words as its text unless told otherwise."""
    (tmp_path / "words.txt").write_text(WORDS)

    def run(*arguments: str, text: str = "words.txt") -> Any:
        given = ["--model", str(tiny_checkpoint), "--text", str(tmp_path / text)]
        size = ["--samples", "3", "--window", "20"]
        return CliRunner().invoke(app, ["export", str(tmp_path / "out"), *given, *size, *arguments])

    return run


def test_it_writes_a_narrower_model(export: Any, tmp_path: Path) -> None:
    result = export("--ratio", "0.25")
    assert result.exit_code == 0, result.stderr
    assert "36 of 48 FFN channels" in result.stderr
    loaded = load(str(tmp_path / "out"))
    assert loaded.params["layer_0"]["mlp"]["up"].shape[0] == 36
    assert loaded.generate(WORDS[:30], max_new_tokens=4).tokens[0]


def test_it_never_writes_over_a_folder(export: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    result = export()
    assert result.exit_code == 1 and "not an empty folder" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "online-pruning"), "frozen or griffin"),
        (("--method", "dense"), "takes none"),
        (("--ratio", "1.5"), "--ratio"),
        (("--ratio", "1"), "leaves no FFN channel"),
        (("--ratio", "nan"), "--ratio"),
    ],
)
def test_what_it_cannot_do(
    export: Any, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = export(*arguments)
    assert result.exit_code in (1, 2) and said in flat(result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_none(export: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert "holds no text" in flat(export(text="empty.txt").stderr)
    assert "there is no file" in flat(export(text="absent.txt").stderr)
