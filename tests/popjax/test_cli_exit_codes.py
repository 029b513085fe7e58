"""What ends with 2: whatever options, and the files they name, show before a model is looked for.

No command finds the model that is named here, so that any other end would be 1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from popjax.cli import app

ABSENT = ["--model", "/no/such/folder"]
ITEM = '{"context": "a", "choices": ["b", "c"], "answer": 0}\n'
FILES = {"empty.txt": b" \n", "latin.txt": b"caf\xe9", "words.txt": b"some words", "full/x": b"x",
         "empty.jsonl": b"", "broken.jsonl": b"{nope\n", "ok.jsonl": ITEM.encode()}  # fmt: skip
# What takes a text, with `{}` in the place of its name.
TEXTS = {
    "generate": ["--prompt-file", "{}"],
    "bench": ["--text", "{}"],
    "perplexity": ["--text", "{}"],
    "calibrate": ["channels", "-o", "out", "--text", "{}"],
    "export": ["out", "--text", "{}"],
}
OTHERS = [
    (["eval", "--tasks", "none.jsonl"], "there is no task file none.jsonl"),
    (["eval", "--tasks", "empty.jsonl"], "empty.jsonl is empty"),
    (["eval", "--tasks", "broken.jsonl"], "line 1 of broken.jsonl is not JSON"),
    (["eval", "--tasks", "ok.jsonl,ok.jsonl"], "two task files are called ok"),
    (["eval", "--tasks", "no_such_task"], "task 'no_such_task' is unknown to lm-eval"),
    (["export", "full", "--text", "words.txt"], "full exists and is not an empty folder"),
    (["export", "words.txt/x", "--text", "words.txt"], "cannot be made (Not a directory)"),
    (["export", "out", "--text", "words.txt", "--method", "online-pruning"], "use frozen or grif"),
    (["export", "out", "--text", "words.txt", "--method", "scout"], "use frozen or griffin"),
    (["show", "hi", *(f"--layer={i}" for i in range(5))], "5 layers do not fit in one picture"),
    (["plan", "--target", "v5e:2x2", "--dtype", "int8"], "dtype 'int8' is not supported"),
    (["plan", "--target", "v5e:2x2", "--context", "9", "--new-tokens", "9"], "no room for a pro"),
]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return ABSENT


def end(arguments: list[str]) -> tuple[int, str]:
    found = CliRunner().invoke(app, arguments)
    return found.exit_code, " ".join(found.stderr.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("file", "words"),
    [("none.txt", "no file none"), ("empty.txt", "is empty"), ("latin.txt", "is not UTF-8 at")],
)
@pytest.mark.parametrize("command", TEXTS)
def test_texts_that_cannot_be_used(refusal: list[str], command: str, file: str, words: str) -> None:
    if (command, file) == ("generate", "empty.txt"):
        Path(file).write_bytes(b"\n")  # spaces are a prompt
    code, said = end([command, *(each.format(file) for each in TEXTS[command]), *refusal])
    assert code == 2 and words in said


@pytest.mark.parametrize(("arguments", "words"), OTHERS)
def test_other_wrong_usage(refusal: list[str], arguments: list[str], words: str) -> None:
    code, said = end([*arguments, *refusal])
    assert code == 2 and words in said


@pytest.mark.parametrize("command", ["generate", "bench", "show", "inspect", "chat"])
def test_a_model_that_is_not_there_is_a_failure(refusal: list[str], command: str) -> None:
    prompt = ["hi"] if command in ("generate", "bench", "show") else []
    code, said = end([command, *prompt, *refusal])
    assert code == 1 and said == "popjax: error: the folder /no/such/folder does not exist"


@pytest.mark.parametrize("option", ["--revision=a", "--dtype=int8", "--context=9", "--checksum"])
def test_options_of_a_model_want_one(option: str) -> None:
    code, said = end(["inspect", option])
    assert code == 2 and f"{option.partition('=')[0]}: it is of a model: name one" in said
