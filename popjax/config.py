"""What a model is, as frozen dataclasses of plain values: hashable, static under jit.

Layers are described one by one, so they may differ in width, window or rotation. Leaves out where a
model runs (mesh, dtype, kernels) and what prunes it (`methods/`): a config knows neither.
"""

from __future__ import annotations

import dataclasses

# Far above any published model, far below what would exhaust a machine's integers: a config.json
# beyond these is damaged or hostile, and is refused before anything is allocated.
LIMITS: dict[str, int] = {
    "num_layers": 1024,
    "vocab_size": 4_194_304,
    "embed_dim": 131_072,
    "mlp_dim": 1_048_576,
    "num_heads": 4096,
    "num_kv_heads": 4096,
    "head_dim": 4096,
    "max_positions": 268_435_456,
    "window": 268_435_456,
    "num_experts": 65_536,
    "expert_dim": 1_048_576,
}

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
QK_NORMS = ("head", "all")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, and the frequency scaling of Llama 3.1 or linear scaling.

    `factor` is 1 where there is no scaling. `kind` is "default", "linear" (all frequencies divided
    by factor) or "llama3" (low frequencies divided, high kept, a smooth band between them).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts: each token goes to `top_k` of `num_experts` FFNs of `expert_dim`.

    renormalise: the chosen experts' weights are made to sum to one. shared_gate: what the layer's
    `mlp_dim` channels give, an expert that every token goes to, is weighted by a sigmoid of the
    input. held: how many of the experts are here, None for all. Raises ValueError for sizes that
    contradict each other.
    """

    num_experts: int
    top_k: int
    expert_dim: int
    renormalise: bool = True
    shared_gate: bool = False
    held: int | None = None

    def __post_init__(self) -> None:
        check_size("num_experts", self.num_experts)
        check_size("expert_dim", self.expert_dim)
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        if not whole or not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k {self.top_k!r} in the model config is outside 1..{self.num_experts}, the "
                "number of experts: repair it"
            )

    @property
    def here(self) -> int:
        """How many experts are held here."""
        return self.num_experts if self.held is None else self.held


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One decoder layer. `window`: number of most recent positions it attends to; None is all.

    moe: experts beside the `mlp_dim` channels that every token uses, which may then be 0.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    window: int | None = None
    rope: RopeConfig = RopeConfig()
    moe: MoeConfig | None = None

    @property
    def channels(self) -> int:
        """Width of the FFNs whose channels methods rank: of one expert, or of the only FFN."""
        return self.mlp_dim if self.moe is None else self.moe.expert_dim

    @property
    def routed(self) -> int:
        """How many such FFNs a token uses."""
        return 1 if self.moe is None else self.moe.top_k


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    The tuple `layers` is the depth. qk_norm: RMS norms on queries and keys, over each "head" or
    "all" heads of a token (qk_norm_over). Raises ValueError for sizes that no real model has, or
    that contradict each other.
    """

    family: str
    vocab_size: int
    embed_dim: int
    layers: tuple[LayerConfig, ...]
    max_positions: int
    norm_eps: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: str = "head"

    def __post_init__(self) -> None:
        check_size("num_layers", len(self.layers))
        for name in ("vocab_size", "embed_dim", "max_positions"):
            check_size(name, getattr(self, name))
        for layer in self.layers:
            for name in ("num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
                if name != "mlp_dim" or layer.moe is None or layer.mlp_dim != 0:
                    check_size(name, getattr(layer, name))
            if layer.num_heads % layer.num_kv_heads:
                raise ValueError(
                    f"num_heads {layer.num_heads} is not a multiple of num_kv_heads "
                    f"{layer.num_kv_heads}: every key/value head must serve as many query heads"
                )
            if layer.head_dim % 2:
                raise ValueError(f"head_dim {layer.head_dim} is odd: rotary positions need pairs")
            if layer.window is not None:
                check_size("window", layer.window)
        if self.qk_norm_over not in QK_NORMS:
            raise ValueError(
                f"qk_norm_over {self.qk_norm_over!r} is unknown: use one of {QK_NORMS}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is not supported: use one of {ACTIVATIONS}"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def with_mlp_dims(self, mlp_dims: tuple[int, ...]) -> ModelConfig:
        """The same model with other FFN widths, one a layer: what a packed model looks like."""
        pairs = zip(self.layers, mlp_dims, strict=True)
        layers = tuple(dataclasses.replace(layer, mlp_dim=width) for layer, width in pairs)
        return dataclasses.replace(self, layers=layers)


def check_size(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number within `LIMITS[name]`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} {value!r} in the model config is not a whole number: repair it")
    if not 1 <= value <= LIMITS[name]:
        raise ValueError(
            f"{name} {value} in the model config is outside 1..{LIMITS[name]}: "
            "the file is damaged or not a model config"
        )


def to_json(config: ModelConfig) -> dict[str, object]:
    """The config as plain JSON values; `from_json` is its inverse."""
    return dataclasses.asdict(config)


def from_json(values: dict) -> ModelConfig:
    """The config that `to_json` wrote. Raises ValueError for unknown or missing fields."""
    try:
        layers = tuple(
            LayerConfig(
                **{**layer, "rope": RopeConfig(**layer["rope"]), "moe": _moe(layer.get("moe"))}
            )
            for layer in values["layers"]
        )
        return ModelConfig(**{**values, "layers": layers})
    except (TypeError, KeyError) as error:
        raise ValueError(f"stored model config does not fit this version: {error}") from error


def _moe(values: dict | None) -> MoeConfig | None:
    return None if values is None else MoeConfig(**values)
