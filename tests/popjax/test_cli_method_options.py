"""Options of single methods: every command takes them, and methods and models without refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from popjax.cli import app
from popjax.cli.options import chosen_method
from popjax.methods import OnlinePruning
from tests.popjax.tiny_models import CONFIGS

PROMPT = "The quick brown fox jumps over the lazy dog, again and again."
COMMANDS = {
    "generate": (PROMPT,),
    "chat": (),
    "show": (PROMPT,),
    "bench": (PROMPT,),
    "eval": ("--tasks", "pets.jsonl"),
    "perplexity": ("--text", "pets.txt"),
    "plan": ("--target", "v5e:1x1"),
}
OPTIONS = {
    "min_tokens": "2",
    "unseen": "dense",
    "shared": "pruned",
    "ends": "dense",
    "rest": "off",
}


def said(result: Any) -> str:
    return " ".join((result.stdout + result.stderr).replace("\u2502", " ").split())


@pytest.fixture
def command(deep_checkpoint: Path) -> Any:
    def run(name: str, *arguments: str) -> Any:
        return CliRunner().invoke(app, [name, "--model", str(deep_checkpoint), *arguments])

    return run


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_hands_them_to_the_method(command: Any, name: str, option: str) -> None:
    flag = f"--{option.replace('_', '-')}"
    asked = (*COMMANDS[name], "--method", "griffin", "--ratio", "0.5", flag, OPTIONS[option])
    refused = command(name, *asked)
    assert refused.exit_code == 2, refused.stderr
    assert f"method 'griffin' has no option '{option}'" in said(refused)


def test_they_reach_the_method() -> None:
    found = chosen_method(None, ratio=0.5, min_tokens=3, unseen="dense", shared="pruned", ends=None)
    assert found == OnlinePruning(ratio=0.5, min_tokens=3, unseen="dense", shared="pruned")
    assert found.for_model(CONFIGS["qwen2_moe"]) == found


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--min-tokens", "2"), 1, "--min-tokens 2 is of experts, and this llama model has none"),
        (("--unseen", "dense"), 1, "unseen 'dense' is of experts, and this llama model has none"),
        (("--shared", "pruned"), 1, "shared 'pruned' is of an FFN that every token uses beside"),
        (("--min-tokens", "-1"), 2, "--min-tokens: --min-tokens -1 is not a whole number"),
        (("--unseen", "some"), 2, "--unseen: unseen 'some' is unknown"),
        (("--shared", "some"), 2, "--shared: shared 'some' is unknown"),
        (("--method", "gate-first", "--ends", "some"), 2, "--ends: ends 'some' is unknown"),
        (("--method", "scout", "--rest", "some"), 2, "--rest: rest 'some' is unknown"),
    ],
)
def test_values_that_do_not_fit(
    command: Any, arguments: tuple[str, ...], code: int, words: str
) -> None:
    refused = command("generate", PROMPT, "--ratio", "0.5", "--max-new-tokens", "2", *arguments)
    assert refused.exit_code == code and words in said(refused)


def test_ends_stay_whole_where_asked_for(command: Any) -> None:
    """Which gate-first does not do unless told."""
    asked = ("--method", "gate-first", "--ratio", "0.3", "--max-new-tokens", "2", "--json")
    result = command("generate", PROMPT, *asked, "--ends", "dense")
    assert result.exit_code == 0, result.stderr
    first, *inner, last = [y["active"] for y in json.loads(result.stdout)["report"]["layers"]]
    assert first == last == 48 > max(inner)


@pytest.mark.parametrize("method", ["wanda-sp", "flap", "probe-pruning", "teal", "chess"])
def test_what_a_plan_cannot_know(command: Any, method: str) -> None:
    refused = command("plan", "--target", "v5e:1x1", "--method", method, "--ratio", "0.5")
    assert refused.exit_code == 2
    assert f"a plan reads no weights, and what {method} prunes follows from" in said(refused)
