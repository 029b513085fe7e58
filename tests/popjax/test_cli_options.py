"""What the options mean that several commands share: whom an error blames, what is logged, help."""

import logging
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import popjax
import popjax.cli
from popjax.cli import app
from popjax.cli.bench import bench
from popjax.cli.flags import in_flags
from popjax.cli.generate import generate
from popjax.cli.terminal import log_to_stderr

ROOT = Path(__file__).parents[2]


def words(output: str) -> str:
    """Output without the frames and colours of a terminal, on one line."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[^\x00-\x7f]", " ", output).split())


@pytest.mark.parametrize(
    ("arguments", "blamed"),
    [
        (["--ratio", "2"], "--ratio: ratio 2.0 is outside"),
        (["--method", "griffin", "--ratio", "2"], "--ratio: ratio 2.0 is outside"),
        (["--model-ratio", "2"], "--model-ratio: --model-ratio 2.0 is outside"),
        (["--ratio", "0.5", "--gamma", "-1"], "--gamma: gamma -1.0 is outside"),
        (["--ratio", "0.5", "--prefill", "no"], "--prefill: prefill 'no' is unknown"),
        (["--ratio", "0.5", "--model-ratio", "0.2"], "--ratio / --model-ratio: give exactly one"),
        (["--method", "frosen"], "--method: method 'frosen' is unknown"),
        (["--method", "griffin", "--ratio", "0.5", "--gamma", "0.1"], "--method: method 'griffin'"),
    ],
)
def test_an_error_blames_the_option_it_is_about(arguments: list[str], blamed: str) -> None:
    found = CliRunner().invoke(app, ["generate", "hello", *arguments])
    assert found.exit_code == 2
    assert f"Invalid value for {blamed}" in words(found.stderr)


@pytest.mark.parametrize(
    ("message", "command", "said"),
    [
        ("check it (check_tensors=True)", generate, "check it (--check-tensors)"),
        ("check it (check_tensors=True)", bench, "check it (popjax generate --check-tensors)"),
        ("give no method=, or no kv=", generate, "give no --method, or no --kv"),
        ("give kv_tokens=256", generate, "give --kv-tokens 256"),
        ("use prefill='partition' or 'dense'", generate, "use --prefill partition or 'dense'"),
        ("no effect: pass do_sample=True", generate, "no effect: pass --do-sample"),
        ("local_files_only is set: pass local_files_only=False", generate,
         "--offline is set: leave out --offline"),
        ("set HF_TOKEN or pass token= if you can", generate, "set HF_TOKEN if you can"),
        ("check revision=", generate, "check --revision"),
        # What is no option of the command, and what only looks like an argument.
        ("leave out mesh= and kv_every=8", bench, "leave out mesh= and kv_every=8"),
        ("give Scout(bits=8, ratio=0.5)", generate, "give Scout(bits=8, ratio=0.5)"),
        ("max_new_tokens 'a' in generation_config.json", generate,
         "max_new_tokens 'a' in generation_config.json"),
        ("has no option 'kv_keep'", generate, "has no option 'kv_keep'"),
        ("/tmp/method=3/kv_keep is no file", generate, "/tmp/method=3/kv_keep is no file"),
    ],
)  # fmt: skip
def test_arguments_of_python_become_the_options_of_the_command(
    message: str, command: Any, said: str
) -> None:
    assert in_flags(message, command) == said


def test_failures_and_wrong_usage_name_options(tiny_checkpoint: Path) -> None:
    asked = ["generate", "hello", "--model", str(tiny_checkpoint)]
    failed = CliRunner().invoke(app, [*asked, "--temperature", "0.5"])
    assert failed.exit_code == 1 and "decoding: pass --do-sample" in words(failed.stderr)
    skipped = ["--ratio", "0.5", "--skip", "1"]
    failed = CliRunner().invoke(app, [*asked, *skipped])
    assert failed.exit_code == 1 and "skip fewer, or leave out --method" in words(failed.stderr)


def test_a_revision_is_of_models_on_the_hub(tiny_checkpoint: Path) -> None:
    here, prompt = str(tiny_checkpoint), ["generate", "hello"]
    for command, named in (
        (prompt, ["--model", here]),
        (prompt, ["--model", "some.gguf"]),
        (prompt, []),
        (["inspect"], ["--model", here]),
        (["plan", "--target", "v5e:2x2"], ["--model", here]),
        (["plan", "--target", "v5e:2x2"], ["--model", f"{here}/config.json"]),
        (["plan", "--target", "v5e:2x2"], ["--model", "default"]),
    ):
        refused = CliRunner().invoke(app, [*command, *named, "--revision", "v2"])
        assert refused.exit_code == 2
        assert "--revision: revision 'v2' is of models on the hub, and" in words(refused.stderr)
    with pytest.raises(ValueError, match="which lies here, has none: leave it out"):
        popjax.load(here, revision="main")


def test_help_of_inspect_says_one_thing_of_the_model() -> None:
    said = words(CliRunner().invoke(app, ["inspect", "--help"]).stdout)
    assert "MODEL, as the other commands take it" in said
    assert "SmolLM2" not in said


@pytest.fixture
def quiet_after() -> Any:
    yield
    log_to_stderr(False)


@pytest.mark.usefixtures("quiet_after")
@pytest.mark.parametrize(("option", "said"), [([], False), (["--verbose"], True)])
def test_verbose_shows_what_is_logged(option: list[str], said: bool, tiny_checkpoint: Path) -> None:
    asked = ["generate", "hello", "--model", str(tiny_checkpoint), "--max-new-tokens", "1"]
    found = CliRunner().invoke(app, [*option, *asked])
    assert found.exit_code == 0
    assert ("popjax: decode steps run on " in found.stderr) is said


def test_warnings_are_said_without_being_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(False)
    log_to_stderr(False)
    logging.getLogger("popjax.sparsity").warning("coarse")
    assert capsys.readouterr().err == "popjax: warning: coarse\n"


@pytest.mark.parametrize(
    ("installed", "device", "chosen", "wanted"),
    [
        (["libtpu"], None, None, "cpu"),
        (["libtpu"], "accel0", None, None),
        (["libtpu"], "vfio/0", None, None),
        (["libtpu", "jax_plugins"], None, None, None),
        ([], None, None, None),
        (["libtpu"], None, "tpu", "tpu"),
    ],
)
def test_a_tpu_is_left_out_where_there_is_only_its_compiler(
    installed: list[str],
    device: str | None,
    chosen: str | None,
    wanted: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name in installed else None

    monkeypatch.setattr(popjax.cli, "find_spec", find_spec)
    monkeypatch.setattr(popjax.cli, "entry_points", lambda group: ())
    monkeypatch.setenv("JAX_PLATFORMS", chosen or "")  # which pytest puts back afterwards
    if chosen is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    if device is not None:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    popjax.cli.leave_out_tpu(tmp_path)
    assert os.environ.get("JAX_PLATFORMS") == wanted


def test_a_command_prints_nothing_of_chips_that_are_not_here() -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "TPU"))}
    done = subprocess.run(
        [sys.executable, "-c", "from popjax.cli import main; main()", "doctor", "--quick"],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
