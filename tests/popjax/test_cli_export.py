"""`popjax export`: what it writes loads again, and what it cannot do it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from popjax import LanguageModel, load
from popjax.cli import app
from popjax.methods import WandaSP
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
    assert result.exit_code == 2 and "not an empty folder" in flat(result.stderr)
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
    assert "is empty: give a text" in flat(export(text="empty.txt").stderr)
    assert "there is no file" in flat(export(text="absent.txt").stderr)


def test_statistics_may_decide_in_place_of_a_text(
    tiny_checkpoint: Path, tmp_path: Path, tiny_model: LanguageModel
) -> None:
    """The channels that wanda-sp runs with, whatever the prompt; what is more than that is not."""
    from popjax.calibration.measuring import measure
    from popjax.calibration.statistics import save_statistics

    found = measure(tiny_model.params, tiny_model.config, [tiny_model.encode(WORDS)[0][:30]])
    file = tmp_path / "channels.safetensors"
    save_statistics(file, found, tiny_model.params, tiny_model.config, "words")
    asked = ["--model", str(tiny_checkpoint), "--ratio", "0.25", "--statistics", str(file)]

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["export", str(tmp_path / "out"), *asked, *arguments])

    for method in ("flap", "teal"):
        refused = run("--method", method)
        assert refused.exit_code == 2
        assert "no plain checkpoint holds: use frozen, griffin or wanda-sp" in flat(refused.stderr)
    for option, value in (("--text", str(file)), ("--samples", "3"), ("--window", "64")):
        idle = run("--method", "wanda-sp", option, value)
        assert idle.exit_code == 2
        assert f"{option}: wanda-sp ranks channels by --statistics: leave it out" in flat(
            idle.stderr
        )
    assert not (tmp_path / "out").exists()
    result = run("--method", "wanda-sp")
    assert result.exit_code == 0, result.stderr
    more: dict[str, Any] = {"max_new_tokens": 4, "return_logits": True}
    pruned = tiny_model.generate(WORDS[:30], method=WandaSP(0.25, str(file)), **more)
    alone = load(str(tmp_path / "out")).generate(WORDS[:30], **more)
    assert alone.tokens == pruned.tokens
    assert alone.logits is not None and pruned.logits is not None
    np.testing.assert_allclose(alone.logits, pruned.logits, rtol=0, atol=1e-5)


def test_it_needs_something_to_decide_by(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = ["export", str(tmp_path / "out"), "--model", str(tiny_checkpoint)]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 2 and "frozen ranks channels on one: give it" in flat(
        refused.stderr
    )


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/x", "n" * 300])
def test_places_that_take_no_folder(tiny_checkpoint: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "words.txt").write_text(WORDS)
    asked = ["--model", str(tiny_checkpoint), "--text", str(tmp_path / "words.txt")]
    refused = CliRunner().invoke(app, ["export", place, *asked, "--samples", "1", "--window", "9"])
    assert refused.exit_code == 2
    told = flat(refused.stderr)
    assert "Errno" not in told and ("choose another place" in told)
