"""Gates as parameters and as files: ours, the published layout, damaged and foreign ones."""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import CheckpointError
from popjax.axes import GATE_SINKS
from popjax.eviction.gates import (
    NAMES,
    Gates,
    load_gates,
    load_published_gates,
    save_gates,
    with_gates,
    without_gates,
)
from tests.eviction.tiny_gates import (
    CONFIG,
    EPS,
    GATES,
    PARAMS,
    A,
    D,
    G,
    K,
    random_gates,
    rms,
    scored,
)
from tests.popjax.tiny_models import random_params


def test_gates_come_and_go_without_touching_the_model() -> None:
    params = with_gates(PARAMS, GATES)
    assert "kv_gate" not in PARAMS["layer_0"]["attn"]
    assert params["layer_1"]["attn"]["q"] is PARAMS["layer_1"]["attn"]["q"]
    assert jax.tree.structure(without_gates(params)) == jax.tree.structure(PARAMS)
    assert jax.tree.structure(without_gates(PARAMS)) == jax.tree.structure(PARAMS)


def test_saved_gates_reload_bit_for_bit(tmp_path: Path) -> None:
    halves = {name: value.astype(jnp.bfloat16) for name, value in GATES[1].items()}
    gates = (GATES[0], halves)
    path = save_gates(tmp_path / "gates.safetensors", gates, PARAMS, CONFIG)
    # Also into parameters that hold other gates: those are no part of the model.
    found = load_gates(path, with_gates(PARAMS, random_gates(1)), CONFIG)
    for one, other in zip(gates, found, strict=True):
        assert set(one) == set(other) == set(NAMES)
        for name in NAMES:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])
    with pytest.raises(CheckpointError, match="exists"):
        save_gates(path, gates, PARAMS, CONFIG)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = save_gates(tmp_path / "gates.safetensors", GATES, PARAMS, CONFIG)
    with pytest.raises(CheckpointError, match="gates of another model"):
        load_gates(path, random_params(CONFIG, seed=5), CONFIG)
    whole = path.read_bytes()
    for kept in (0, 5, 200, len(whole) - 1):
        cut = tmp_path / f"cut{kept}.safetensors"
        cut.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match="empty|too short|truncated"):
            load_gates(cut, PARAMS, CONFIG)
    with pytest.raises(CheckpointError, match="not a file"):
        load_gates(tmp_path / "absent.safetensors", PARAMS, CONFIG)
    bad = [gate | {"k": gate["k"].at[0, 0, 0].set(jnp.nan)} for gate in GATES]
    save_gates(tmp_path / "nan.safetensors", tuple(bad), PARAMS, CONFIG)
    with pytest.raises(CheckpointError, match="'layer_0/k' has values that are not finite"):
        load_gates(tmp_path / "nan.safetensors", PARAMS, CONFIG)
    save_file({"0.q_proj.weight": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a gates"):
        load_gates(tmp_path / "other.safetensors", PARAMS, CONFIG)


def published(gates: Gates) -> dict[str, np.ndarray]:
    """The arrays of gates as the authors' modules hold them."""
    found = {}
    for i, gate in enumerate(gates):
        flat = {"q": (-1, D), "k": (-1, D), "q_bias": (-1,), "q_norm": (A,), "k_norm": (A,)}
        flat |= {"sinks": (K, 1, GATE_SINKS, A), "bias": (K, 1, G)}
        for name, shape in flat.items():
            found[f"{i}.{NAMES[name]}"] = np.asarray(gate[name]).reshape(shape)
    return found


def test_the_published_layout_is_read(tmp_path: Path) -> None:
    arrays = published(GATES)
    save_file(arrays, tmp_path / "published.safetensors")
    found = load_published_gates(tmp_path / "published.safetensors", CONFIG)
    x = np.random.default_rng(4).standard_normal((6, D)).astype(np.float32)
    scores = np.asarray(scored(found[1], jnp.asarray(x)))
    # The authors' order of axes: rows of a projection are heads, then their queries, then width.
    q = (x @ arrays["1.q_proj.weight"].T + arrays["1.q_proj.bias"]).reshape(6, K, -1, A)
    k = (x @ arrays["1.k_proj.weight"].T).reshape(6, K, -1, A)
    q, k = rms(q, arrays["1.q_norm.weight"]), rms(k, arrays["1.k_norm.weight"])
    own = np.einsum("SKGA,SKXA->KSXG", q, k) / 4 + arrays["1.b"][:, None]
    sinks = np.einsum("KXZA,SKGA->KSZG", arrays["1.k_base"], q) / 4
    want = (1 / (1 + np.exp(sinks - own).sum(axis=2))).mean(axis=-1)
    np.testing.assert_allclose(scores.T, want, rtol=64 * math.sqrt(D) * EPS)


def without(name: str) -> Callable[[dict], dict]:
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


@pytest.mark.parametrize(
    "change, words",
    [
        (without("1.k_base"), r"lacks '1.k_base' \(1 names differ\)"),
        (lambda arrays: arrays | {"2.b": arrays["1.b"]}, "has, beyond this model's gates, '2.b'"),
        (lambda arrays: arrays | {"0.b": arrays["0.b"][..., :1]}, r"'0.b' is float32\[2, 1, 1\]"),
        (lambda arrays: arrays | {"0.b": np.zeros((2, 1, 2), np.int32)}, "'0.b' is int32"),
    ],
)
def test_published_gates_of_another_model_are_refused(
    change: Callable[[dict], dict], words: str, tmp_path: Path
) -> None:
    save_file(change(published(GATES)), tmp_path / "published.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_published_gates(tmp_path / "published.safetensors", CONFIG)


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "q2_dim16_sink16.pt").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match="is a pickle.*safetensors"):
        load_published_gates(tmp_path / "q2_dim16_sink16.pt", CONFIG)
    with pytest.raises(CheckpointError, match="is not a file"):
        load_published_gates(tmp_path / "absent.safetensors", CONFIG)
