"""The command line as a user meets it: what goes where, exit codes, and what each option does.

Most tests call the app in this process; those about signals, pipes and start-up start it as one of
its own. The model is the tiny llama of `conftest.py`, whose context is 64 tokens.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from checkpoints.safetensors_files import SafetensorsFolder
from popjax import METHODS, LanguageModel, OnlinePruning
from popjax.cli import app
from popjax.cli.tables import speed_change
from popjax.cli.terminal import sentence
from popjax.families import FAMILIES

PROMPT = "The quick brown fox"
COMMANDS = (
    *("generate", "chat", "inspect", "plan", "bench", "calibrate", "show", "export", "doctor"),
    *("eval", "perplexity"),
)
ENTRY = "from popjax.cli import main; main()"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def popjax(tiny_checkpoint: Path) -> Any:
    """Runs a command on the tiny model in this process: exit code, stdout and stderr apart."""

    def run(command: str, *arguments: str, stdin: str | bytes | None = None) -> Any:
        options = ["--model", str(tiny_checkpoint)]
        return CliRunner().invoke(app, [command, *options, *arguments], input=stdin)

    return run


@pytest.fixture(scope="session")
def endless_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context that takes minutes to fill, and no end token."""
    folder = tmp_path_factory.mktemp("endless") / "llama"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": 100_000, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    return folder


def start(*arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own, unbuffered pipes on all three streams."""
    pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", ENTRY, *arguments],
        bufsize=0,
        cwd=ROOT,
        **(pipes | streams),
    )


@pytest.fixture
def started() -> Iterator[Any]:
    """`start`, with every process ended after the test whatever became of it."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
        processes.append(start(*arguments, **streams))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def flat(text: str) -> str:
    """Text without the boxes and line breaks that depend on the width of the terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_does_not_import_jax() -> None:
    """It answers at once: jax, transformers and matplotlib take seconds to import."""
    probe = (
        "import atexit, sys\n"
        "heavy = ('jax', 'numpy', 'transformers', 'matplotlib')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
    )
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", probe + ENTRY, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command_and_method() -> None:
    overview = flat(CliRunner().invoke(app, ["--help"]).stdout)
    assert all(f" {name} " in overview for name in COMMANDS)
    options = flat(CliRunner().invoke(app, ["generate", "--help"]).stdout)
    assert all(name in options for name in METHODS)
    assert "--compare-dense" in options


def test_generate_puts_text_on_stdout_and_the_report_on_stderr(
    popjax: Any, tiny_model: LanguageModel
) -> None:
    result = popjax("generate", PROMPT, "--ratio", "0.5")
    assert result.exit_code == 0, result.output
    expected = tiny_model.generate(PROMPT, method=OnlinePruning(ratio=0.5))
    assert result.stdout == expected.text[0].removesuffix("\n") + "\n"
    report = flat(result.stderr)
    # 48 channels a layer: R 22 and C 4 (band 0.1), half of which is active.
    assert "layers 0 to 1, each 48 22 4 24" in report
    assert "total 96 44 8 48" in report
    for name in ("load", "compile", "prefill", "plan", "pack", "decode"):
        assert re.search(rf"\b{name} [\d.]+ m?s", report), name
    # Not a terminal: no bar, no colour, nothing that moves the cursor.
    assert not re.search(r"[\x1b\r]", result.stderr + result.stdout)


def test_generate_json_is_one_object_and_nothing_else(
    popjax: Any, tiny_model: LanguageModel
) -> None:
    result = popjax("generate", PROMPT, "--ratio", "0.5", "--max-new-tokens", "9", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    expected = tiny_model.generate(PROMPT, method=OnlinePruning(ratio=0.5), max_new_tokens=9)
    assert found["prompt"] == PROMPT
    assert found["text"] == expected.text[0]
    assert found["tokens"] == expected.tokens[0]
    assert found["finish_reason"] == expected.finish_reason[0]
    report = found["report"]
    assert report["method"] == "online-pruning"
    assert report["read_bytes_per_token"] < report["dense_bytes_per_token"]
    assert [layer["active"] for layer in report["layers"]] == [24, 24]
    assert set(report["seconds"]) == {
        "load",
        "compile",
        "prefill",
        "evict",
        "plan",
        "pack",
        "decode",
    }
    assert report["comparison"] is None


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ([], "dense"),
        (["--ratio", "0.5"], "online-pruning"),
        (["--model-ratio", "0.2"], "online-pruning"),
        (["--ratio", "0.5", "--gamma", "0.2", "--prefill", "dense"], "online-pruning"),
        (["--ratio", "0.5", "--method", "griffin"], "griffin"),
        (["--method", "dense"], "dense"),
    ],
)
def test_generate_picks_the_method(popjax: Any, arguments: list[str], method: str) -> None:
    result = popjax("generate", PROMPT, *arguments, "--max-new-tokens", "4", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"]["method"] == method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "ratio 1.5 is outside 0..1"),
        (["--ratio", "nan"], "ratio nan is outside 0..1"),
        (["--ratio", "half"], "--ratio"),
        (["--method", "online-pruning"], "needs a ratio"),
        (["--method", "onlin-pruning", "--ratio", "0.5"], "the nearest is 'online-pruning'"),
        (["--method", "griffin", "--ratio", "0.5", "--gamma", "0.1"], "no option 'gamma'"),
        (["--ratio", "0.5", "--model-ratio", "0.5"], "exactly one of ratio"),
        (["--ratio", "0.5", "--prefill", "fast"], "prefill 'fast' is unknown"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--temperature", "-1", "--do-sample"], "temperature -1.0 is out of range"),
        (["--top-p", "2", "--do-sample"], "--top-p 2.0 is out of range"),
        (["--top-k", "3", "--greedy"], "no effect on greedy"),
        (["--dtype", "int8"], "dtype 'int8' is not supported"),
        (["--compare-dense"], "compares FFN pruning alone"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage_ends_with_two(popjax: Any, arguments: list[str], message: str) -> None:
    result = popjax("generate", PROMPT, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in flat(result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [[], [""]])
def test_no_prompt_is_wrong_usage(popjax: Any, arguments: list[str]) -> None:
    result = popjax("generate", *arguments, stdin="")
    assert result.exit_code == 2
    assert "prompt" in flat(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "the folder /no/such/folder does not exist"),
        (["--max-new-tokens", "65"], "maximum context length of 64"),
        (["--temperature", "0.5"], "no effect on greedy decoding"),
    ],
)
def test_failure_is_one_sentence_and_one(popjax: Any, arguments: list[str], message: str) -> None:
    result = popjax("generate", PROMPT, *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"popjax: error: [^\n]+\n", result.stderr)
    assert message in result.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", PROMPT, "--model", "/no/such/folder"]
    result = CliRunner().invoke(app, ["--debug", *command])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    monkeypatch.setenv("POPJAX_DEBUG", "1")
    assert "Traceback" in CliRunner().invoke(app, command).stderr
    monkeypatch.setenv("POPJAX_DEBUG", "0")
    assert "Traceback" not in CliRunner().invoke(app, command).stderr


def test_prompt_comes_from_argument_file_or_pipe(popjax: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    short = ("--max-new-tokens", "4", "--json")
    outputs = [
        popjax("generate", PROMPT, *short),
        popjax("generate", "--prompt-file", str(file), *short),
        popjax("generate", "--prompt-file", "-", *short, stdin=PROMPT + "\n"),
        popjax("generate", *short, stdin=PROMPT + "\r\n"),
    ]
    assert [json.loads(result.stdout)["prompt"] for result in outputs] == [PROMPT] * 4
    assert len({str(json.loads(result.stdout)["tokens"]) for result in outputs}) == 1
    absent = popjax("generate", "--prompt-file", "no-such-file")
    assert absent.exit_code == 2
    assert "there is no file no-such-file" in flat(absent.stderr)
    both = popjax("generate", PROMPT, "--prompt-file", str(file))
    assert both.exit_code == 2
    assert "not both" in flat(both.stderr)


def test_prompt_that_is_not_text_fails(popjax: Any) -> None:
    result = popjax("generate", stdin=b"good \xff bad")
    assert result.exit_code == 2
    assert "standard input is not UTF-8 at byte 5" in flat(result.stderr)


def test_chat_option_applies_the_template(popjax: Any, tiny_model: LanguageModel) -> None:
    counts = []
    for arguments in ([], ["--chat"]):
        result = popjax("generate", "hi", *arguments, "--max-new-tokens", "2", "--json")
        counts.append(json.loads(result.stdout)["report"]["prompt_tokens"])
    plain, chat = (len(tiny_model.encode("hi", chat=chat)[0]) for chat in (False, True))
    assert counts == [plain, chat]
    assert plain != chat


def test_sampling_options_reach_the_sampler(popjax: Any, tiny_model: LanguageModel) -> None:
    arguments = ["--do-sample", "--temperature", "3", "--top-k", "50", "--seed", "7"]
    result = popjax("generate", PROMPT, *arguments, "--max-new-tokens", "8", "--json")
    expected = tiny_model.generate(
        PROMPT, do_sample=True, temperature=3.0, top_k=50, seed=7, max_new_tokens=8
    )
    assert json.loads(result.stdout)["tokens"] == expected.tokens[0]
    greedy = tiny_model.generate(PROMPT, max_new_tokens=8)
    assert expected.tokens != greedy.tokens


def test_stop_ends_the_text(popjax: Any, tiny_model: LanguageModel) -> None:
    text = tiny_model.generate(PROMPT, max_new_tokens=10).text[0]
    stop = text[len(text) // 2 :][:3]
    result = popjax("generate", PROMPT, "--max-new-tokens", "10", "--stop", stop, "--json")
    found = json.loads(result.stdout)
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"


def test_compare_dense_reports_speed_and_distance(popjax: Any) -> None:
    arguments = ["--ratio", "0.5", "--max-new-tokens", "8", "--compare-dense"]
    report = flat(popjax("generate", PROMPT, *arguments).stderr)
    assert re.search(r"against dense .* over 3 rounds", report)
    assert re.search(r"same token [\d.]+ % of tokens", report)
    assert re.search(r"KL from dense [\d.e-]+ nats a token", report)
    comparison = json.loads(popjax("generate", PROMPT, *arguments, "--json").stdout)["report"][
        "comparison"
    ]
    assert len(comparison["decode_speedup"]) == 3
    assert 0 <= comparison["token_agreement"] <= 1
    assert comparison["kl"] >= 0


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ((0.98, 1.4, 1.5), "no measurable difference"),
        ((1.0, 1.2, 1.1), "no measurable difference"),
        ((1.2, 1.4, 1.3), "1.30 times faster"),
        ((0.5, 0.5, 0.5), "2.00 times slower"),
    ],
)
def test_a_spread_across_one_is_no_speed_up(rounds: Sequence[float], verdict: str) -> None:
    said = speed_change(rounds)
    assert verdict in said
    assert f"{min(rounds):.2f}" in said and f"{max(rounds):.2f}" in said


def test_chat_answers_turn_by_turn(popjax: Any, tiny_model: LanguageModel) -> None:
    lines = "hi\n\n/bogus\n/reset\nhi\n/exit\nnot read\n"
    result = popjax("chat", "--max-new-tokens", "3", stdin=lines)
    assert result.exit_code == 0, result.output
    asked = [{"role": "user", "content": "hi"}]
    reply = tiny_model.generate(asked, max_new_tokens=3).text[0].removesuffix("\n")
    # After /reset the same question has the same answer: nothing was kept.
    assert result.stdout == f"{reply}\n" * 2
    assert "/bogus is no command" in result.stderr
    assert "starts anew" in result.stderr


def test_chat_carries_the_conversation(popjax: Any, tiny_model: LanguageModel) -> None:
    result = popjax("chat", "--max-new-tokens", "3", stdin="hi\nyes\n")
    assert result.exit_code == 0  # the end of the input
    messages = [{"role": "user", "content": "hi"}]
    first = tiny_model.generate(messages, max_new_tokens=3).text[0]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "yes"}]
    second = tiny_model.generate(messages, max_new_tokens=3).text[0]
    replies = [reply.removesuffix("\n") + "\n" for reply in (first, second)]
    assert result.stdout == "".join(replies)


def test_chat_says_when_the_context_is_full(popjax: Any) -> None:
    result = popjax("chat", stdin="hi\nand then?\n" + "word " * 80 + "\n")
    assert result.exit_code == 0
    assert "the reply was cut: the context is full; /reset starts anew" in result.stderr
    assert re.search(r"would be \d+ tokens and the model takes 64: /reset", result.stderr)


def test_chat_needs_a_template(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "chat_template.jinja").unlink()
    result = CliRunner().invoke(app, ["chat", "--model", str(folder)], input="hi\n")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr
    assert result.stdout == ""


def test_interrupting_generate_ends_with_130(endless_checkpoint: Path, started: Any) -> None:
    process = started(
        *("generate", PROMPT, "--model", str(endless_checkpoint)),
        *("--max-new-tokens", "60000", "--ratio", "0.5"),
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout.read(1)  # it is decoding
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode() == "\npopjax: interrupted\n"


def test_interrupting_a_reply_returns_to_the_prompt(endless_checkpoint: Path, started: Any) -> None:
    process = started("chat", "--model", str(endless_checkpoint), "--max-new-tokens", "60000")
    process.stdin.write(b"hi\n")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    heard = b""
    while b"stopped: what came of the reply stays" not in heard:
        piece = process.stderr.read(64)
        assert piece, heard
        heard += piece
    # Back at the prompt, where the same key ends the program.
    process.stdin.write(b"/bogus\n")
    while b"no command" not in heard:
        heard += process.stderr.read(64)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_closed_pipe_is_quiet(endless_checkpoint: Path, started: Any) -> None:
    process = started(
        "generate", PROMPT, "--model", str(endless_checkpoint), "--max-new-tokens", "60000"
    )
    assert process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error == b""


def test_status_is_shown_on_a_terminal_without_colour(tiny_checkpoint: Path, started: Any) -> None:
    controller, terminal = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    process = started(
        *("generate", PROMPT, "--model", str(tiny_checkpoint), "--max-new-tokens", "4"),
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(controller, 4096):
            shown += piece
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(controller)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"Starting" in shown and b"Loading" in shown
    assert not re.search(rb"\x1b\[[\d;]*(3[0-8]|9[0-7])[\d;]*m", shown)
    assert b"\x1b" not in output


def test_out_of_memory_says_needed_and_free() -> None:
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as caught:
        jnp.zeros((10**13,), jnp.float32).block_until_ready()
    said = sentence(caught.value)
    assert said.startswith("out of memory: 36.4 TiB needed in one piece, ")
    assert re.search(r"[\d.]+ [GMK]iB are free in main memory: use", said)
    assert "21.40 G needed" in sentence(RuntimeError("RESOURCE_EXHAUSTED: Used 21.40G of 15.48G"))
    assert "more memory than there is needed" in sentence(MemoryError())


def test_a_defect_is_told_apart_from_a_failure() -> None:
    assert sentence(KeyError("x")).startswith("unexpected KeyError: 'x'; `popjax --debug")
    assert sentence(ValueError("bad\n value")) == "bad value"


def test_inspect_lists_families_and_methods() -> None:
    result = CliRunner().invoke(app, ["inspect"])
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("llama", "mistral", "qwen2", "qwen3", *METHODS))
    found = json.loads(CliRunner().invoke(app, ["inspect", "--json"]).stdout)
    families = {family["family"]: family for family in found["families"]}
    assert list(families) == list(FAMILIES)
    assert families["opt"]["gguf_architecture"] is None
    assert "experts" in families["qwen3_moe"]["extras"]
    assert set(found["methods"]) == set(METHODS)


def test_inspect_reads_no_weight(
    tiny_checkpoint: Path, tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    expected = sum(leaf.size for leaf in jax.tree.leaves(tiny_model.params))

    def refuse(self: SafetensorsFolder, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsFolder, "read", refuse)
    arguments = ["inspect", str(tiny_checkpoint), "--dtype", "bfloat16", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["parameter_count"] == expected
    assert found["fit"]["weight_bytes"] == 2 * expected
    assert sum(found["group_bytes"].values()) == 2 * expected
    assert found["stored_types"] == {"F32": len(tiny_model.source.tensors.names())}
    assert found["fit"]["fits"] is True
    assert found["sizes"]["mlp_dim"] == 48
    assert "sha256" not in found


def test_inspect_shows_a_model(tiny_checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", "--model", str(tiny_checkpoint), "--checksum"])
    assert result.exit_code == 0
    shown = flat(result.stdout)
    assert "layer_{i}/mlp/gate FFN FD 48 x 32 2 12.0 KiB" in shown
    assert re.search(r"SHA-256 model.safetensors [0-9a-f]{64}", shown)
    assert "fits yes" in shown


def test_inspect_takes_one_model() -> None:
    result = CliRunner().invoke(app, ["inspect", "a", "--model", "b"])
    assert result.exit_code == 2
    assert "once" in flat(result.stderr)


def test_bench_shows_medians_and_spread(popjax: Any) -> None:
    arguments = ["--rounds", "2", "--max-new-tokens", "4", "--prompt-tokens", "10"]
    methods = ["--method", "online-pruning", "--method", "griffin"]
    result = popjax("bench", *arguments, *methods)
    assert result.exit_code == 0, result.output
    shown = flat(result.stdout)
    assert "10 prompt and 4 new tokens" in shown
    for name in ("dense", "online-pruning", "griffin"):
        assert re.search(rf"{name} [\d.]+ \([\d.]+-[\d.]+\)", shown), name
    assert re.search(r"griffin, decode .* over 2 rounds", shown)
    (found,) = json.loads(popjax("bench", *arguments, "--json").stdout)["points"]
    assert [row["name"] for row in found["methods"]] == ["dense", "online-pruning"]
    assert len(found["methods"][1]["ratio_to_dense"]["rounds"]) == 2


def test_bench_refuses_dense_alone(popjax: Any) -> None:
    result = popjax("bench", "--method", "dense")
    assert result.exit_code == 2
    assert "prunes nothing" in flat(result.stderr)


def test_show_writes_a_png_and_says_where(popjax: Any, tmp_path: Path) -> None:
    output = tmp_path / "picture.png"
    result = popjax("show", PROMPT, "--max-new-tokens", "6", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("name", ["picture.pdf", "no/such/picture.png"])
def test_show_checks_the_output_first(popjax: Any, tmp_path: Path, name: str) -> None:
    result = popjax("show", PROMPT, "--output", str(tmp_path / name))
    assert result.exit_code == 2
    assert "must be a .png file in a folder that exists" in flat(result.stderr)


def test_show_says_how_to_get_matplotlib(
    popjax: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = popjax("show", PROMPT, "--output", str(tmp_path / "picture.png"))
    assert result.exit_code == 1
    assert 'pip install "popjax[plots]"' in result.stderr
    assert not list(tmp_path.iterdir())
