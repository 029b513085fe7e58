"""Decode steps of the methods beyond online pruning, at its bytes, against our dense ones.

    python -m scripts.bench_beyond --models default random-1b --dtype float32 --json beyond.json

Interleaved round by round in one process. Scouts are made of the weights, rounded to nearest: time
does not depend on how they were rounded. Leaves out quality, which is `beyond.py`'s business.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.row_products import STORED_BITS
from popjax.bench import DENSE
from popjax.methods import GateFirst, Method, OnlinePruning, Scout
from popjax.scouts import make_scouts, with_scouts
from scripts.bench_decode import timed_steps
from scripts.bench_models import DEFAULT, RANDOM_1B, BenchModel, as_dtype, named_model
from scripts.quality import write_json


def methods_at(ratio: float, form: dict[str, Any]) -> dict[str, Method]:
    """Dense first, then the methods that read as many bytes as online pruning at `ratio`.

    form: the scout's copies.
    """
    return {
        DENSE: Method(),
        "online-pruning": OnlinePruning(ratio=ratio),
        "gate-first": GateFirst(ratio),
        "scout": Scout(ratio, **form),
    }


def scouted_model(name: str, dtype: str, form: dict[str, Any]) -> BenchModel:
    """The named model in a dtype, with a scout of a form beside its weights."""
    model = named_model(name)
    params = as_dtype(model.params, jnp.dtype(dtype))
    scouts = make_scouts(params, model.config, **form)
    return dataclasses.replace(model, params=with_scouts(params, scouts))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[DEFAULT, RANDOM_1B])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--bits", type=int, choices=STORED_BITS, default=4, help="of the scout")
    parser.add_argument("--copied", type=float, default=1.0, help="share of layers with copies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path, help="also write every round's numbers here")
    asked = parser.parse_args(argv)
    form = {"bits": asked.bits, "copied": asked.copied}
    measured: dict[str, Any] = {"jax": jax.__version__, "cores": os.cpu_count(), "models": {}}
    for name in asked.models:
        model = scouted_model(name, asked.dtype, form)
        print(f"{name}, {asked.dtype}, ratio {asked.ratio:g}:", flush=True)
        measured["models"][name] = timed_steps(model, methods_at(asked.ratio, form), asked)
        del model  # before the next one is made beside it
    if asked.json is not None:
        write_json(asked.json, measured)


if __name__ == "__main__":
    main()
