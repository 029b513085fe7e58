"""The script that times methods beyond online pruning: what it runs, counts and writes."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from popjax.bench import DENSE
from popjax.scouts import scout_bytes
from scripts.bench_beyond import main, methods_at, scouted_model

SHORT = ["--rounds", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--ratio", "0.3"]


def test_every_method_is_timed_against_dense(
    deep_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "beyond.json"
    main(["--models", str(deep_checkpoint), "--dtype", "bfloat16", "--json", str(out), *SHORT])
    (found,) = json.loads(out.read_text())["models"].values()
    rows = {row["name"]: row for row in found["methods"]}
    assert list(rows) == list(methods_at(0.3, {}))
    shown = capsys.readouterr().out
    for name, row in rows.items():
        assert f"  {name}: " in shown and len(row["decode_step"]["rounds"]) == 2
        if name != DENSE:
            share = row["ratio_to_dense"]["median"] / row["bytes_ratio"]
            assert row["bytes_ratio"] > 1 and row["share_of_bytes_ratio"] == share


def test_a_scout_lies_beside_weights_of_the_dtype(deep_checkpoint: Path) -> None:
    model = scouted_model(str(deep_checkpoint), "bfloat16", {})
    assert model.params["layer_1"]["mlp"]["up"].dtype == jnp.bfloat16
    # Three of five layers: two copies of 48 rows of 64 weights, and a scale of sixteen bits each.
    assert scout_bytes(model.params) == 3 * 2 * 48 * (64 // 2 + 2)
    # One of the three, of six bits.
    half = scouted_model(str(deep_checkpoint), "bfloat16", {"bits": 6, "copied": 0.5})
    assert scout_bytes(half.params) == 2 * 48 * (48 + 2)
