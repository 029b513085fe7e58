"""Files made once for a model: refused before a model is read, by the command that makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import checkpoints
from popjax import LanguageModel
from popjax.cli import app
from popjax.eviction.gates import digest, init_gates, save_gates, with_gates

PROMPT = "The quick brown fox jumps over the lazy dog, again and again."
# The options that want a file, what goes with each, and the command that writes it.
WANTED = {
    "--scout": (["--method", "scout", "--ratio", "0.3"], "popjax calibrate scout -o FILE"),
    "--statistics": (
        ["--method", "flap", "--ratio", "0.3"],
        "popjax calibrate channels --text TEXT -o FILE",
    ),
    "--layer-scores": ([], "popjax calibrate prefill-pruning --text TEXT -o FILE"),
    "--kv-gates": (
        ["--kv", "fast-kvzip", "--kv-keep", "0.5"],
        "python -m scripts.train_gates --text TEXT --out FILE",
    ),
}


def run(*arguments: str, name: str = "generate") -> tuple[int, str]:
    found = CliRunner().invoke(app, [name, *arguments])
    return found.exit_code, " ".join(found.stderr.replace("\u2502", " ").split())


def file_of(tmp_path: Path, what: str) -> Path:
    """A file with something wrong."""
    path = tmp_path / "file.safetensors"
    if what == "kind":
        return checkpoints.save_bundle(path, "context", "1", {"a": np.zeros(1)}, {})
    if what == "damaged":
        path.write_bytes(b"no file of tensors")
    return {"folder": tmp_path, "long": tmp_path / ("n" * 300)}.get(what, path)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("absent", "is not a file: give one of kind"),
        ("folder", "is not a file: give one of kind"),
        ("long", "is not a file: give one of kind"),
        ("kind", "holds 'context', not a"),
        ("damaged", "safetensors"),
    ],
)
@pytest.mark.parametrize("option", WANTED)
def test_a_wrong_file_is_refused_before_the_model_is_looked_for(
    option: str, what: str, words: str, tmp_path: Path
) -> None:
    others, command = WANTED[option]
    path = file_of(tmp_path, what)
    code, said = run(PROMPT, "--model", "/no/such/folder", *others, option, str(path))
    assert code == 2 and f"{option}: " in said and words in said
    assert what == "damaged" or command in said


@pytest.mark.parametrize("option", WANTED)
def test_an_empty_name_is_not_called_a_dot(option: str) -> None:
    others, command = WANTED[option]
    code, said = run(PROMPT, "--model", "/no/such/folder", *others, option, "")
    assert code == 2 and f"{option}: the name is empty, or of a folder: give a file that" in said
    assert command in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv", "fast-kvzip", "--kv-keep", "0.5"], "--kv: fast-kvzip needs --kv-gates FILE"),
        (["--kv", "kvzip", "--kv-keep", "0.5", "--kv-gates", "f"], "it is of --kv fast-kvzip"),
        (["--kv-gates", "f"], "it is of --kv fast-kvzip"),
    ],
)
def test_gates_and_their_method_go_together(arguments: list[str], words: str) -> None:
    code, said = run(PROMPT, "--model", "/no/such/folder", *arguments)
    assert code == 2 and words in said


def test_fast_kvzip_runs_with_its_gates(
    tiny_checkpoint: Path, tiny_model: LanguageModel, tmp_path: Path
) -> None:
    gates = init_gates(tiny_model.config, jax.random.key(3))
    file = save_gates(tmp_path / "gates.safetensors", gates, tiny_model.params, tiny_model.config)
    asked = ["--model", str(tiny_checkpoint), "--kv", "fast-kvzip", "--kv-keep", "0.5"]
    asked += ["--kv-window", "2", "--kv-gates", str(file)]
    shown = CliRunner().invoke(app, ["generate", PROMPT, *asked, "--max-new-tokens", "2", "--json"])
    assert shown.exit_code == 0, shown.stderr
    kept = json.loads(shown.stdout)["report"]["kv_totals"]
    assert kept["entries"] < kept["dense_entries"]
    text = tmp_path / "text.txt"
    text.write_text(PROMPT * 4, encoding="utf-8")
    few = ["--text", str(text), "--windows", "2", "--prefix", "12", "--scored", "4", "--json"]
    scored = CliRunner().invoke(app, ["perplexity", *asked, *few])
    assert scored.exit_code == 0, scored.stderr
    settings = json.loads(scored.stdout)["settings"]
    assert settings["gates"] == digest(with_gates(tiny_model.params, gates)) is not None
    assert digest(tiny_model.params) is None
    listed = CliRunner().invoke(app, ["generate", "--help"]).stdout
    assert "fast-kvzip" in listed


def test_other_gates_have_another_digest(tiny_model: LanguageModel) -> None:
    made: list[Any] = [init_gates(tiny_model.config, jax.random.key(seed)) for seed in (0, 0, 1)]
    first, same, other = (digest(with_gates(tiny_model.params, gates)) for gates in made)
    assert first == same != other
