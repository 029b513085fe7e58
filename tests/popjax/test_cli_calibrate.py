"""`popjax calibrate` as users meet it: options that a kind has no use for, prompts, places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from popjax.cli import app
from popjax.cli.calibrate import cut

TEXT = "The quick brown fox jumps over the lazy dog, again and again, until it is dark. " * 3


@pytest.fixture
def refusal(tiny_checkpoint: Path, tmp_path: Path) -> Any:
    """The words and exit code of a run that writes nothing."""
    text, out = tmp_path / "text.txt", tmp_path / "out.safetensors"
    text.write_text(TEXT, encoding="utf-8")

    def run(what: str, *arguments: str, needs_text: bool = True) -> tuple[int, str]:
        asked = [what, "--model", str(tiny_checkpoint), "-o", str(out), *arguments]
        asked += ["--text", str(text)] if needs_text else []
        result = CliRunner().invoke(app, ["calibrate", *asked])
        assert not out.exists()
        return result.exit_code, " ".join(result.stderr.replace("\u2502", " ").split())

    return run


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("scout", ("--max-new-tokens", "3")),
        ("scout", ("--seed", "0")),
        ("channels", ("--max-new-tokens", "3")),
        ("channels", ("--seed", "5")),
        ("channels", ("--ends", "pruned")),
    ],
)
def test_options_without_a_use_are_refused(
    refusal: Any, what: str, arguments: tuple[str, ...]
) -> None:
    code, words = refusal(what, *arguments, needs_text=what != "scout")
    assert code == 2 and f"{arguments[0]}: calibrate {what} has no use for it: leave" in words


@pytest.mark.parametrize("arguments", [("--samples", "2"), ("--prompt-tokens", "12")])
def test_prompts_of_a_scout_are_cut_from_a_text(refusal: Any, arguments: tuple[str, ...]) -> None:
    code, words = refusal("scout", *arguments, needs_text=False)
    assert code == 2 and "--text: prompts are cut from one: give --text" in words


def test_ends_of_a_scout_are_known_words(refusal: Any) -> None:
    code, words = refusal("scout", "--ends", "open", needs_text=False)
    assert code == 2 and "--ends: ends 'open' is unknown" in words


@pytest.mark.parametrize("place", ["", "nowhere/out", "/dev/null"])
def test_places_that_take_no_file(refusal: Any, place: str) -> None:
    code, words = refusal("channels", "-o", place)
    assert code == 2 and "--out: " in words and "must be a file in a folder that exists" in words


@pytest.mark.parametrize(
    ("what", "arguments", "complaint"),
    [
        (
            "channels",
            ("--prompt-tokens", "65"),
            "prompts of 65 tokens are longer than the model's context of 64: give "
            "--prompt-tokens 64 or fewer",
        ),
        (
            "prefill-pruning",
            ("--prompt-tokens", "60", "--max-new-tokens", "5"),
            "60 tokens and 5 new ones (--max-new-tokens) are longer than the model's context of "
            "64: give --prompt-tokens 59 or fewer",
        ),
        ("prefill-pruning", ("--max-new-tokens", "64"), "context of 64: give fewer --max-new-tok"),
        ("channels", ("--samples", "999999", "--prompt-tokens", "12"), "different prompts of 12"),
    ],
)
def test_prompts_that_model_or_text_do_not_give(
    refusal: Any, what: str, arguments: tuple[str, ...], complaint: str
) -> None:
    code, words = refusal(what, *arguments)
    assert code == 1 and complaint in words


def test_prompts_are_different_and_reach_both_ends() -> None:
    assert cut(list(range(5)), 3, 3) == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    with pytest.raises(
        ValueError, match="5 tokens, which give 3 different prompts of 3: give --sa"
    ):
        cut(list(range(5)), 4, 3)
    assert cut(list(range(9)), 2, 3) == [[0, 1, 2], [6, 7, 8]]
