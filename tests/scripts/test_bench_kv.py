"""The cache benchmark: what it decodes from, what it counts, and both sections on a tiny model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popjax.bench import DENSE, Spread
from popjax.cache import Kept
from popjax.eviction import LaProx
from popjax.eviction.method import counts
from popjax.generate import PROGRAMS, Options
from scripts import bench_kv
from scripts.random_cache import Decoding, random_kept, uneven_lengths
from tests.popjax.tiny_models import CONFIGS, WINDOW, random_params

TOKENS, NEW = 40, 5
METHOD = LaProx(keep=0.3, window=4)


def test_lengths_are_uneven_and_add_up_to_the_budget() -> None:
    for tokens, keep in ((40, 0.3), (1000, 0.05), (64, 0.9), (64, 1.0)):
        method = dataclasses.replace(METHOD, keep=keep)
        lengths = uneven_lengths(method, CONFIGS["llama"], tokens)
        assert lengths.shape == (2, 2)
        assert [int(lengths.sum())] == counts(method, CONFIGS["llama"], [tokens])[1]
        assert lengths.min() >= method.window and lengths.max() <= tokens
        assert (len(np.unique(lengths)) > 1) == (keep < 1)


def test_layers_with_a_window_keep_it() -> None:
    assert uneven_lengths(METHOD, CONFIGS["mistral"], TOKENS).tolist() == [[WINDOW - 1] * 2] * 2


def test_a_random_pool_is_laid_out_as_an_eviction_lays_it_out() -> None:
    kept = random_kept(METHOD, CONFIGS["llama"], TOKENS, jnp.float32)
    starts, lengths = (np.asarray(x)[:, 0].reshape(-1) for x in (kept.starts, kept.lengths))
    positions = np.asarray(kept.positions)
    used = np.zeros(len(positions), bool)
    for start, length in zip(starts, lengths, strict=True):
        held = positions[start : start + length]
        assert (np.diff(held) > 0).all() and held[0] >= 0 and held[-1] < TOKENS
        assert not used[start : start + length].any()
        used[start : start + length] = True
    assert (positions[~used] == -1).all()
    assert kept.entries.shape == (len(positions), 2 * 8)


def test_steps_over_a_pool_of_everything_are_those_over_the_dense_cache() -> None:
    config = dataclasses.replace(CONFIGS["llama"], layers=CONFIGS["llama"].layers[:1])
    params = random_params(config)
    options = Options(logits=True, implementation="xla")
    dense = Decoding(params, config, TOKENS, NEW, options=options)
    layers = [jnp.concatenate([x.k, x.v], -1)[0, :, :TOKENS] for x in dense.state.cache.layers]
    entries = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in layers])
    lengths = jnp.full((1, 1, 2), TOKENS, jnp.int32)
    starts = TOKENS * jnp.arange(2, dtype=jnp.int32).reshape(1, 1, 2)
    pool = Kept(entries, jnp.tile(jnp.arange(TOKENS, dtype=jnp.int32), 2), starts, lengths)
    kept = Decoding(params, config, TOKENS, NEW, options=options, kept=pool)

    assert dense.seconds() > 0 and kept.seconds() > 0
    found = [np.asarray(case.state.logits)[0, 1:NEW] for case in (dense, kept)]
    assert np.ptp(found[0]) > 1
    # A softmax over 44 keys summed in another order, under logits of size 10.
    np.testing.assert_allclose(*found, atol=44 * 10 * np.finfo(np.float32).eps)

    compiled = PROGRAMS.compilations
    assert dense.seconds() > 0 and kept.seconds() > 0
    assert PROGRAMS.compilations == compiled
    for case, before in zip((dense, kept), found, strict=True):
        np.testing.assert_array_equal(np.asarray(case.state.logits)[0, 1:NEW], before)


def test_bytes_held_are_those_of_the_arrays() -> None:
    lengths = jnp.asarray([[[3, 1]], [[2, 2]], [[8, 4]]], jnp.int32)
    starts = jnp.asarray([[[0, 4]], [[8, 12]], [[16, 24]]], jnp.int32)  # multiples of 4
    kept = Kept(jnp.zeros((32, 16), jnp.bfloat16), jnp.zeros(32, jnp.int32), starts, lengths)
    layers, whole = bench_kv.held_over_kept(kept)
    entry = 16 * 2
    # Rows 0..7, 8..15 and 16..27 are the layers', the last four nobody's: 28 rows stand for 32.
    rows = np.asarray([8, 8, 12]) * 32 / 28
    held = rows * (entry + 4) + 2 * 2 * 4
    assert layers == pytest.approx((held / (np.asarray([4, 4, 12]) * entry)).tolist())
    assert held.sum() == pytest.approx(sum(x.nbytes for x in jax.tree.leaves(kept)))
    assert whole == pytest.approx(held.sum() / (20 * entry))


def test_no_speed_up_is_claimed_where_the_rounds_disagree(
    capsys: pytest.CaptureFixture[str],
) -> None:
    read = {DENSE: 300, "kept": 100}
    steps = {DENSE: Spread((1.0, 1.0, 1.0)), "kept": Spread((0.5, 1.25, 0.5))}
    values = bench_kv._against_dense("kept", steps, read)
    assert values["bytes_ratio"] == 3.0 and "share_of_bytes_ratio" not in values
    assert "no speed-up shown" in values["speedup"] and "share" not in capsys.readouterr().out
    steps["kept"] = Spread((0.5, 0.5, 0.5))
    assert bench_kv._against_dense("kept", steps, read)["share_of_bytes_ratio"] == 2 / 3
    assert "2.00 times faster" in capsys.readouterr().out


def test_both_sections_on_a_tiny_model(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kv.json"
    small = ["--contexts", "96", "--context", "200", "--new-tokens", "4", "--rounds", "2"]
    bench_kv.main(["--model", str(tiny_checkpoint), "--keep", "0.4", "--json", str(out), *small])
    found: dict[str, Any] = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert list(tmp_path.glob("*.partial")) == []

    share = found["share"]["96"]
    assert all(len(share[name]["rounds"]) == 2 for name in ("prefill", "evict", "observe"))
    assert 0 < share["evict"]["median"] and "score + select + compact" in shown

    cases = found["decode"]["cases"]
    assert list(cases) == [DENSE, "laprox 40%", "laprox 40% and online-pruning"]
    # Two layers of two heads of 8 in float32: keys and values of 200 tokens and two new ones.
    token = 2 * 2 * 2 * 8 * 4
    weights = cases[DENSE]["read_bytes"] - 202 * token
    assert cases["laprox 40%"]["read_bytes"] == weights + 82 * token
    pruned = cases["laprox 40% and online-pruning"]["read_bytes"]
    assert 82 * token < pruned < cases["laprox 40%"]["read_bytes"]
    for case in list(cases.values())[1:]:
        assert case["bytes_ratio"] == cases[DENSE]["read_bytes"] / case["read_bytes"]
        assert len(case["ratio_to_dense"]["rounds"]) == 2
    for section in (share, found["decode"]):
        held = section["bytes_held"]
        assert 1 < held["median"] and 1 < held["whole"]


def test_random_layers_say_what_they_stand_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 128}
    monkeypatch.setattr(bench_kv, "LLAMA_1B", {**bench_kv.LLAMA_1B, **narrow})
    small = ["--layers", "1", "--contexts", "96", "--rounds", "1", "--keep", "0.4"]
    bench_kv.main(["--random", "--sections", "share", *small])
    assert "1 random layers as wide as Llama-3.2-1B's: shares of a pre" in capsys.readouterr().out


def test_a_budget_of_everything_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_kv.main(["--keep", "1"])
    assert "--keep 1 evicts nothing" in capsys.readouterr().err
