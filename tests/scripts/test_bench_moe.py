"""The benchmark of mixtures runs on a small one, and counts a token's own experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import bench_moe

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}


def test_it_measures_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_moe, "OLMOE", {**bench_moe.OLMOE, **SMALL})
    sizes = ["--prompt-tokens", "12", "--new-tokens", "3", "--rounds", "2"]
    bench_moe.main(["--layers", "1", *sizes, "--json", str(tmp_path / "moe.json")])
    values = json.loads((tmp_path / "moe.json").read_text())
    names = ["dense", "online-pruning", "frozen", "rescore-all"]
    assert list(values["step_seconds"]) == list(values["prefill_seconds"]) == names
    # Router, attention, norms, one row of the input table, the head, and 2 of 8 experts.
    own = 8 * 32 + 4 * 32 * 32 + 2 * 32 + 3 * 32 + 32 + 64 * 32 + 2 * 3 * 16 * 32
    assert values["read_bytes"]["dense"] == 4 * own
    assert "online-pruning: " in capsys.readouterr().out
