"""What a model is, as frozen dataclasses of plain values: hashable, static under jit.

Layers are described one by one, so they may differ in width, window or rotation. Leaves out where a
model runs (mesh, dtype, kernels) and what prunes it (`methods/`): a config knows neither.
"""

from __future__ import annotations

import dataclasses
import math

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
    "num_experts_per_tok": 65_536,
    "expert_dim": 1_048_576,
}

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
NORMS = ("rms", "layer")
NORM_PLACES = ("pre", "post", "both")
QK_NORMS = ("head", "all")
ROPE_KINDS = ("default", "linear", "llama3", "factors")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not supported: use one of {allowed}")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless `value` is None or a positive finite number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"{name} {value!r} in the model config is not a positive number: repair it"
        )


def check_size(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number within `LIMITS[name]`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} {value!r} in the model config is not a whole number: repair it")
    if not 1 <= value <= LIMITS[name]:
        raise ValueError(
            f"{name} {value} in the model config is outside 1..{LIMITS[name]}: "
            "the file is damaged or not a model config"
        )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, the share of a head that turns, and frequency scaling.

    `factor` is 1 where there is no scaling. `kind` is "default", "linear" (all frequencies divided
    by factor), "llama3" (low frequencies divided, high kept, a smooth band between them) or
    "factors" (each frequency divided by its own of `factors`, the rotated values grown by
    `magnitude`). `share`: the first int(share H) numbers of a head turn, the others stay.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    share: float = 1.0
    factors: tuple[float, ...] = ()
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rope kind", self.kind, ROPE_KINDS)
        check_positive("theta", self.theta)
        if not 0 < self.share <= 1:
            raise ValueError(f"rotary share {self.share} is outside 0..1: repair the model config")

    def rotated(self, head_dim: int) -> int:
        """How many of a head's `head_dim` numbers turn."""
        return int(head_dim * self.share)


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
                f"num_experts_per_tok {self.top_k!r} in the model config is outside "
                f"1..{self.num_experts}, the number of experts: repair it"
            )

    @property
    def here(self) -> int:
        """How many experts are held here."""
        return self.num_experts if self.held is None else self.held


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    window: number of most recent positions it attends to; None is all. rope: None rotates nothing.
    softcap: scores s of attention become softcap * tanh(s / softcap); None leaves them. moe:
    experts beside the `mlp_dim` channels that every token uses, which may then be 0.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    window: int | None = None
    rope: RopeConfig | None = RopeConfig()
    softcap: float | None = None
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            if name != "mlp_dim" or self.moe is None or self.mlp_dim != 0:
                check_size(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}: every key/value head must serve as many query heads"
            )
        if self.window is not None:
            check_size("window", self.window)
        check_positive("softcap", self.softcap)
        if self.rope is not None:
            _check_pairs(self.rope, self.head_dim)

    @property
    def channels(self) -> int:
        """Width of the FFNs whose channels methods rank: of one expert, or of the only FFN."""
        return self.mlp_dim if self.moe is None else self.moe.expert_dim

    @property
    def ffn(self) -> str:
        """Where the layer's parameters hold the FFN that every token uses."""
        return "mlp" if self.moe is None else "shared"

    @property
    def routed(self) -> int:
        """How many such FFNs a token uses."""
        return 1 if self.moe is None else self.moe.top_k


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    The tuple `layers` is the depth. norm: "rms", or "layer" with a bias; norm_offset: its scale is
    1 + w. norm_place: before a branch reads ("pre"), on what it adds ("post"), or "both". qk_norm:
    RMS norms on queries and keys, over each "head" or "all" heads of a token (qk_norm_over).
    query_scale: what multiplies q.k, None is H**-0.5; embed_scale: what multiplies embeddings.
    gated: h = act(gate) * up, else act(up), with biases where mlp_bias. parallel: the FFN reads
    what attention read. position_offset: the row of position 0 in a table of learned positions,
    None without one. Raises ValueError for sizes that no real model has, or that contradict.
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
    norm: str = "rms"
    norm_offset: bool = False
    norm_place: str = "pre"
    query_scale: float | None = None
    embed_scale: float | None = None
    final_softcap: float | None = None
    gated: bool = True
    mlp_bias: bool = False
    parallel: bool = False
    position_offset: int | None = None

    def __post_init__(self) -> None:
        check_size("num_layers", len(self.layers))
        for name in ("vocab_size", "embed_dim", "max_positions"):
            check_size(name, getattr(self, name))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("norm_place", self.norm_place, NORM_PLACES)
        check_choice("qk_norm_over", self.qk_norm_over, QK_NORMS)
        for name in ("query_scale", "embed_scale", "final_softcap"):
            check_positive(name, getattr(self, name))
        if self.gated and self.mlp_bias:
            raise ValueError("mlp_bias is not supported with a gate: set gated to False")
        if self.norm == "layer" and self.norm_offset:
            raise ValueError("norm_offset is not supported with norm 'layer': use norm 'rms'")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def mlp_matrices(self) -> int:
        """Matrices [F, D] of an FFN: up and down, and a gate where there is one."""
        return 2 + self.gated

    @property
    def channel_size(self) -> int:
        """Parameters of one FFN channel: its rows [D], and its bias where there is one."""
        return self.mlp_matrices * self.embed_dim + self.mlp_bias

    def with_mlp_dims(self, mlp_dims: tuple[int, ...]) -> ModelConfig:
        """The same model with other FFN widths, one a layer: what a packed model looks like."""
        pairs = zip(self.layers, mlp_dims, strict=True)
        layers = tuple(dataclasses.replace(layer, mlp_dim=width) for layer, width in pairs)
        return dataclasses.replace(self, layers=layers)


def _check_pairs(rope: RopeConfig, head_dim: int) -> None:
    rotated = rope.rotated(head_dim)
    if rotated < 2 or rotated % 2:
        what = f"head_dim {head_dim}" if rope.share == 1 else f"head_dim {head_dim} turns {rotated}"
        raise ValueError(f"{what} is odd or below 2: rotary positions need pairs")
    if rope.kind == "factors" and len(rope.factors) != rotated // 2:
        raise ValueError(
            f"rope has {len(rope.factors)} factors for {rotated // 2} rotary pairs: give one each"
        )


def to_json(config: ModelConfig) -> dict[str, object]:
    """The config as plain JSON values; `from_json` is its inverse."""
    return dataclasses.asdict(config)


def from_json(values: dict) -> ModelConfig:
    """The config that `to_json` wrote. Raises ValueError for unknown or missing fields."""
    try:
        layers = tuple(
            LayerConfig(**{**layer, "rope": _rope(layer["rope"]), "moe": _moe(layer.get("moe"))})
            for layer in values["layers"]
        )
        return ModelConfig(**{**values, "layers": layers})
    except (TypeError, KeyError) as error:
        raise ValueError(f"stored model config does not fit this version: {error}") from error


def _rope(values: dict | None) -> RopeConfig | None:
    if values is None:
        return None
    return RopeConfig(**{**values, "factors": tuple(values.get("factors", ()))})


def _moe(values: dict | None) -> MoeConfig | None:
    return None if values is None else MoeConfig(**values)
