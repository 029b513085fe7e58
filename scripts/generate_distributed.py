"""Generation over all devices of several hosts: the same command on each, the first one prints.

    python -m scripts.generate_distributed "Why is the sky blue?" --model FOLDER --ratio 0.5

On a TPU slice or under Slurm the processes find each other; elsewhere say where the first one
listens, how many there are and which this one is (--coordinator, --processes, --process). Every
process reads the checkpoint from its own disk and keeps only the shards of its own devices.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

import popjax
from checkpoints import CheckpointError
from popjax import sharding
from popjax.config import ModelConfig
from popjax.loading import open_source
from popjax.methods import METHODS


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect this process with the others, before anything asks for a device."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # where devices are CPUs
    jax.distributed.initialize(coordinator, processes, process)


def chosen_mesh(config: ModelConfig, model: int | None) -> Mesh:
    """A mesh of all devices of all processes: `model` by what is left, or as fits the config."""
    if model is None:
        return sharding.mesh_over(config)
    devices = jax.devices()
    if model < 1 or len(devices) % model:
        raise ValueError(f"--model-axis {model} does not divide the {len(devices)} devices")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((model, len(devices) // model), ("model", "group"), kinds)


def generate(asked: argparse.Namespace) -> dict[str, Any]:
    """What the model says to each prompt, and what the run cost; the same on every process."""
    # The config says how devices are used, and that says where each weight goes.
    config = open_source(asked.model).config
    mesh = chosen_mesh(config, asked.model_axis)
    model = popjax.load(asked.model, dtype=asked.dtype, mesh=mesh)
    options = {} if asked.method == "dense" else {"ratio": asked.ratio}
    result = model.generate(
        asked.prompts,
        method=asked.method,
        chat=asked.chat,
        max_new_tokens=asked.max_new_tokens,
        do_sample=asked.sample,
        seed=asked.seed,
        **options,
    )
    held = [
        shard.data.nbytes for x in jax.tree.leaves(model.params) for shard in x.addressable_shards
    ]
    return {
        "text": result.text,
        "tokens": result.tokens,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "bytes_held_here": sum(held),
        "report": result.report.to_json(),
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: the default model)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--method", choices=tuple(METHODS), default="online-pruning")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of FFN channels to prune")
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--sample", action="store_true", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-axis", type=int, help="devices that split the key/value heads")
    parser.add_argument("--json", action="store_true", help="print all of the result as JSON")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.add_argument("--processes", type=int, help="how many processes there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    return parser.parse_args(argv)


def _stdout_of_our_own() -> TextIO:
    """Where answers go; what libraries write to stdout, as gloo does, goes to stderr instead."""
    sys.stdout.flush()
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return ours


def main(argv: Sequence[str] | None = None) -> None:
    """Join the others, generate, print from process 0; see `--help`."""
    asked = _arguments(argv)
    stdout = _stdout_of_our_own()
    join(asked.coordinator, asked.processes, asked.process)
    try:
        result = generate(asked)
    except (ValueError, CheckpointError) as error:
        sys.exit(f"generate_distributed: {error}")
    if jax.process_index() == 0:
        text = json.dumps(result) if asked.json else "\n\n".join(result["text"])
        print(text, file=stdout, flush=True)


if __name__ == "__main__":
    main()
