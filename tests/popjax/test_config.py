"""Model configs: plain values that survive JSON, and sizes no real model has refused."""

import dataclasses
import json
from typing import Any

import pytest

from popjax.config import LIMITS, LayerConfig, ModelConfig, from_json, to_json
from tests.popjax.tiny_models import CONFIGS, LAYER

GOOD = CONFIGS["llama"]


@pytest.mark.parametrize("family", CONFIGS)
def test_json_round_trip(family: str) -> None:
    config = CONFIGS[family]
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config
    assert hash(again) == hash(config)


def test_packed_widths_replace_only_widths() -> None:
    packed = GOOD.with_mlp_dims((30, 20))
    assert [layer.mlp_dim for layer in packed.layers] == [30, 20]
    assert packed.with_mlp_dims((48, 40)) == GOOD


def with_layer(**fields: Any) -> ModelConfig:
    return dataclasses.replace(GOOD, layers=(dataclasses.replace(LAYER, **fields),))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: dataclasses.replace(GOOD, layers=()), "num_layers 0 .* outside 1..1024"),
        (lambda: dataclasses.replace(GOOD, vocab_size=0), "vocab_size 0 "),
        (lambda: dataclasses.replace(GOOD, vocab_size=10**12), "outside 1..4194304"),
        (lambda: dataclasses.replace(GOOD, embed_dim=32.0), "embed_dim 32.0 .* not a whole number"),
        (lambda: dataclasses.replace(GOOD, embed_dim=True), "embed_dim True .* not a whole number"),
        (lambda: dataclasses.replace(GOOD, max_positions=-1), "max_positions -1 "),
        (lambda: dataclasses.replace(GOOD, activation="swish"), "activation 'swish'"),
        (lambda: with_layer(num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
        (lambda: with_layer(num_kv_heads=0), "num_kv_heads 0 "),
        (lambda: with_layer(head_dim=7), "head_dim 7 is odd"),
        (lambda: with_layer(mlp_dim=LIMITS["mlp_dim"] + 1), "mlp_dim 1048577 "),
        (lambda: with_layer(window=0), "window 0 "),
        (lambda: with_layer(window="4096"), "window '4096' "),
    ],
)
def test_impossible_sizes_are_refused(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


@pytest.mark.parametrize("damage", [{"colour": 1}, {"layers": [{"num_heads": 4}]}])
def test_stored_config_of_another_version_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not fit this version"):
        from_json({**to_json(GOOD), **damage})


def test_a_layer_defaults_to_plain_attention() -> None:
    layer = LayerConfig(num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=16)
    assert layer.window is None
    assert layer.rope.kind == "default"
