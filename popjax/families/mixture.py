"""What families with mixtures of experts share: names of tensors, and experts added to a config.

An expert is one FFN a tensor in safetensors and one slice of a parameter here, hence `[{e}]`; GGUF
has one tensor for all experts of a layer. Left out: GGUF files of 2023, with one for each expert.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

from checkpoints import CheckpointError, Row, TensorSource
from checkpoints.slices import parent_of
from popjax.config import LayerConfig, ModelConfig, MoeConfig
from popjax.families.family import required


def expert_rows(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Rows of a router and its experts under `block`, such as "mlp", by the names of a family."""
    start = f"model.layers.{{i}}.{block}"
    return (
        Row(f"{start}.gate.weight", "layer_{i}/moe/router", "same"),
        Row(f"{start}.experts.{{e}}.{gate}.weight", "layer_{i}/moe/gate[{e}]", "same"),
        Row(f"{start}.experts.{{e}}.{up}.weight", "layer_{i}/moe/up[{e}]", "same"),
        Row(f"{start}.experts.{{e}}.{down}.weight", "layer_{i}/moe/down[{e}]", "transpose"),
    )


GGUF_EXPERT_ROWS = (
    Row("blk.{i}.ffn_gate_inp.weight", "layer_{i}/moe/router", "same"),
    Row("blk.{i}.ffn_gate_exps.weight", "layer_{i}/moe/gate", "same"),
    Row("blk.{i}.ffn_up_exps.weight", "layer_{i}/moe/up", "same"),
    Row("blk.{i}.ffn_down_exps.weight", "layer_{i}/moe/down", "transpose_each"),
)
EXPERT_ROWS = expert_rows("mlp", "gate_proj", "up_proj", "down_proj")


def with_experts(
    config: ModelConfig, moe: MoeConfig, shared_dim: int = 0, dense: Container[int] = ()
) -> ModelConfig:
    """The config with experts in every layer, but those of `dense`, in place of its FFN.

    shared_dim: width of what every token uses beside them.
    """

    def layer_of(i: int, layer: LayerConfig) -> LayerConfig:
        if i in dense:
            return layer
        return dataclasses.replace(layer, mlp_dim=shared_dim, moe=moe)

    layers = tuple(layer_of(i, layer) for i, layer in enumerate(config.layers))
    return dataclasses.replace(config, layers=layers)


def moe_config(raw: dict[str, Any], width: str, renormalise: bool, **fields: Any) -> MoeConfig:
    """The experts of a raw config, `width` naming their size there.

    Raises ValueError naming a bad value.
    """
    num_experts = required(raw, count_key(raw), "num_experts")
    top_k = required(raw, "num_experts_per_tok", "num_experts_per_tok")
    return MoeConfig(num_experts, top_k, required(raw, width, "expert_dim"), renormalise, **fields)


def count_key(raw: dict[str, Any]) -> str:
    """What a raw config calls the number of experts."""
    # Newer files of one family carry the name that older ones of another do.
    older = "num_local_experts" in raw and "num_experts" not in raw
    return "num_local_experts" if older else "num_experts"


def check_expert_count(
    tensors: TensorSource, rows: Sequence[Row], config: ModelConfig, named: str
) -> None:
    """Raise CheckpointError where routers and experts in the files agree on another count.

    named: what the config calls it. Files that disagree among themselves are left to `convert`,
    which names the tensors.
    """
    routers: dict[str, int] = {}
    experts: Counter[str] = Counter()
    mixed = [row for row in rows if "/moe/" in row.targets[0]]
    for name in tensors.names():
        for target in (path for row in mixed for path in row.to_targets(name) or ()):
            path, index = parent_of(target)
            block, leaf = path.rsplit("/", 1)
            first = (*tensors.info(name).shape, 0)[0]
            if leaf == "router":
                routers[block] = first
            elif leaf == "gate":
                experts[block] += first if index is None else 1
    for i, layer in enumerate(config.layers):
        block = f"layer_{i}/moe"
        asked = None if layer.moe is None else layer.moe.num_experts
        held = routers.get(block)
        if asked is not None and held and held == experts[block] != asked:
            raise CheckpointError(
                f"{tensors.location} does not fit its config: {named} is {asked}, and the weights "
                f"have {held} experts in layer {i}: set {named} to {held}, or fetch the model again"
            )


def dense_layers(raw: dict[str, Any]) -> frozenset[int]:
    """Layers without experts by `mlp_only_layers` and `decoder_sparse_step`; ValueError if bad."""
    step, listed = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"decoder_sparse_step {step!r} in config.json is not a whole number >= 1")
    if not isinstance(listed, list | tuple):
        raise ValueError(f"mlp_only_layers {listed!r} in config.json is not a list: repair it")
    layers = range(raw["num_hidden_layers"])
    return frozenset(i for i in layers if i in listed or (i + 1) % step)
