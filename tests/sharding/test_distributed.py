"""The distributed script as two real processes over loopback: one answer, held in halves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import popjax
from popjax import sharding

ROOT = Path(__file__).parents[2]
PROMPTS = ["The quick brown fox", "Hello"]
NEW = 8
PATIENCE = 120


def two_processes(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """The script with these arguments on two processes of two CPU devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "scripts.generate_distributed", *arguments]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [*command, "--process", str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
    pairs = zip(started, outputs, strict=True)
    return [subprocess.CompletedProcess(p.args, p.returncode, *texts) for p, texts in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "online-pruning"])
def test_two_processes_answer_as_one(even_checkpoint: Path, method: str) -> None:
    options: dict[str, Any] = {} if method == "dense" else {"ratio": 0.5}
    size = ["--max-new-tokens", str(NEW), "--ratio", "0.5", "--method", method, "--json"]
    first, second = two_processes(*PROMPTS, "--model", str(even_checkpoint), *size)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    found = json.loads(first.stdout)
    # Two key/value heads: four devices are two groups.
    assert found["mesh"] == {"model": 2, "group": 2} and found["processes"] == 2
    alone = popjax.load(str(even_checkpoint))
    mesh = sharding.mesh_over(alone.config, jax.devices()[:4])
    here = popjax.load(str(even_checkpoint), mesh=mesh)
    said = here.generate(PROMPTS, method=method, max_new_tokens=NEW, **options)
    assert found["tokens"] == said.tokens
    assert found["text"] == said.text
    if method == "dense":
        assert said.tokens == alone.generate(PROMPTS, max_new_tokens=NEW).tokens
    # Each process holds half of what is split, and all of the norms.
    assert found["bytes_held_here"] < 0.6 * found["report"]["weight_bytes"]


def test_a_model_that_the_devices_do_not_divide_is_one_sentence(tiny_checkpoint: Path) -> None:
    for process in two_processes("Hello", "--model", str(tiny_checkpoint)):
        assert process.returncode == 1 and process.stdout == ""
        assert "V = 405 (vocabulary) is not a multiple of 4" in process.stderr
        assert "Traceback" not in process.stderr
