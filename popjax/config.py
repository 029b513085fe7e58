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
}

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


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
class LayerConfig:
    """One decoder layer. `window`: number of most recent positions it attends to; None is all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    window: int | None = None
    rope: RopeConfig = RopeConfig()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    The tuple `layers` is the depth. Raises ValueError for sizes that no real model has, or that
    contradict each other.
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

    def __post_init__(self) -> None:
        check_size("num_layers", len(self.layers))
        for name in ("vocab_size", "embed_dim", "max_positions"):
            check_size(name, getattr(self, name))
        for layer in self.layers:
            for name in ("num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
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
            LayerConfig(**{**layer, "rope": RopeConfig(**layer["rope"])})
            for layer in values["layers"]
        )
        return ModelConfig(**{**values, "layers": layers})
    except (TypeError, KeyError) as error:
        raise ValueError(f"stored model config does not fit this version: {error}") from error
