"""The alphabet of axis letters, and the one table from parameter path to letters.

From this table, with no second source, come Linen's parameter shapes, the shapes that the converter
must produce, the partition specs of a sharded model and the documentation. It holds no sizes of any
model: those are in `config.py`. A path that no row, or more than one row, matches is an error;
there is no catch-all.

    B batch            T query positions   S cache positions   D model width
    N query heads      K key/value heads   G queries per K     H head size
    F FFN channels     R retained          C candidate         V vocabulary      L layers
    A gate width       Z sinks of a gate   P rows of learned positions
    E experts held     M channels of one expert     X experts that a router chooses among
    U numbers that hold a row of a scout     W scales of one
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from jax.sharding import PartitionSpec

from popjax.config import LayerConfig, ModelConfig

# Path pattern -> letters. `{i}` stands for a layer index.
PARAMETERS: dict[str, str] = {
    "embed/table": "VD",
    "head/table": "VD",
    "positions/table": "PD",
    "final_norm/scale": "D",
    "final_norm/bias": "D",
    "layer_{i}/attn_norm/scale": "D",
    "layer_{i}/attn_norm/bias": "D",
    "layer_{i}/attn_out_norm/scale": "D",
    "layer_{i}/attn_out_norm/bias": "D",
    "layer_{i}/attn/q": "NHD",
    "layer_{i}/attn/k": "KHD",
    "layer_{i}/attn/v": "KHD",
    "layer_{i}/attn/o": "NHD",
    "layer_{i}/attn/q_bias": "NH",
    "layer_{i}/attn/k_bias": "KH",
    "layer_{i}/attn/v_bias": "KH",
    "layer_{i}/attn/o_bias": "D",
    "layer_{i}/attn/q_norm": "H",
    "layer_{i}/attn/k_norm": "H",
    # Over all heads of a token at once.
    "layer_{i}/attn/q_all_norm": "NH",
    "layer_{i}/attn/k_all_norm": "KH",
    # Gates that score cache entries, trained for a model and no part of it: no model's own
    # parameters (`parameter_paths`) have them, `popjax.eviction.gates` adds them.
    "layer_{i}/attn/kv_gate/q": "KGAD",
    "layer_{i}/attn/kv_gate/q_bias": "KGA",
    "layer_{i}/attn/kv_gate/k": "KAD",
    "layer_{i}/attn/kv_gate/q_norm": "A",
    "layer_{i}/attn/kv_gate/k_norm": "A",
    "layer_{i}/attn/kv_gate/sinks": "KZA",
    "layer_{i}/attn/kv_gate/bias": "KG",
    "layer_{i}/mlp_norm/scale": "D",
    "layer_{i}/mlp_norm/bias": "D",
    "layer_{i}/mlp_out_norm/scale": "D",
    "layer_{i}/mlp_out_norm/bias": "D",
    # Channel-major on purpose: a channel is one contiguous row, so one gather packs a partition
    # and a pruned channel is bytes never read.
    "layer_{i}/mlp/gate": "FD",
    "layer_{i}/mlp/up": "FD",
    "layer_{i}/mlp/down": "FD",
    # Copies of gate and up in few bits, no model's own either: `popjax.scouts` adds them.
    "layer_{i}/mlp/scout_gate": "FU",
    "layer_{i}/mlp/scout_gate_scale": "FW",
    "layer_{i}/mlp/scout_up": "FU",
    "layer_{i}/mlp/scout_up_scale": "FW",
    # Of up: packed like its rows. That of down belongs to no channel, so it lies outside.
    "layer_{i}/mlp/up_bias": "F",
    "layer_{i}/mlp_bias": "D",
    # What a method was calibrated to, beside the weights of its runs (`popjax.calibration`) and no
    # part of a model: a number for each channel, a bias of down, and what inputs must exceed.
    "layer_{i}/mlp/calibrated": "F",
    "layer_{i}/mlp_compensation": "D",
    "layer_{i}/mlp_threshold": "",
    "layer_{i}/attn/q_threshold": "",
    "layer_{i}/attn/o_threshold": "",
    # A mesh splits experts among devices, never the channels of one, and every device routes all
    # tokens: hence letters of their own for channels of an expert and for what a router chooses of.
    "layer_{i}/moe/router": "XD",
    "layer_{i}/moe/gate": "EMD",
    "layer_{i}/moe/up": "EMD",
    "layer_{i}/moe/down": "EMD",
    # What every token uses beside its experts, and a weight for it by the token.
    "layer_{i}/shared/gate": "FD",
    "layer_{i}/shared/up": "FD",
    "layer_{i}/shared/down": "FD",
    "layer_{i}/moe/shared_gate": "D",
}

# Width of a gate's queries and keys, and its learned sink keys (arXiv 2601.17668: 16 and 16).
GATE_WIDTH, GATE_SINKS = 16, 16

# Letter -> the mesh axis that splits it, or several, the first varying slowest.
Rules = Mapping[str, str | tuple[str, ...]]
# "group" is for more devices than key/value heads: the devices of a group hold the same heads. No
# parameter has B, which is here for activations. Every other letter is replicated.
TENSOR_PARALLEL: Rules = {
    "B": "data",
    "N": ("model", "group"),
    "K": "model",
    "F": ("model", "group"),
    "E": ("model", "group"),
    "V": ("model", "group"),
}


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    rows = []
    for pattern, letters in PARAMETERS.items():
        regex = re.escape(pattern).replace(re.escape("{i}"), r"(\d+)")
        rows.append((re.compile(regex), letters))
    return tuple(rows)


def letters(path: str) -> str:
    """Axis letters of the parameter at `path`, such as "FD" for "layer_3/mlp/up".

    Raises ValueError when no row or more than one row of the table matches.
    """
    found = [axes for regex, axes in _patterns() if regex.fullmatch(path)]
    if len(found) != 1:
        raise ValueError(
            f"parameter path {path!r} matches {len(found)} rows of popjax.axes.PARAMETERS, "
            "expected exactly one: add or repair its row"
        )
    return found[0]


def sizes(config: ModelConfig, layer: LayerConfig | None = None) -> dict[str, int]:
    """Size of every letter, for the whole model or, with `layer`, inside that layer."""
    known = {"V": config.vocab_size, "D": config.embed_dim, "L": len(config.layers)}
    known["P"] = config.max_positions + (config.position_offset or 0)
    if layer is not None:
        known |= {
            "N": layer.num_heads,
            "K": layer.num_kv_heads,
            "G": layer.num_heads // layer.num_kv_heads,
            "H": layer.head_dim,
            "F": layer.mlp_dim,
            "A": GATE_WIDTH,
            "Z": GATE_SINKS,
        }
        if layer.moe is not None:
            moe = layer.moe
            known |= {"E": moe.here, "M": moe.expert_dim, "X": moe.num_experts}
    return known


def shape(path: str, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the parameter at `path`. Raises ValueError for a path outside the table."""
    match = re.match(r"layer_(\d+)/", path)
    known = sizes(config, config.layers[int(match.group(1))] if match else None)
    return tuple(known[letter] for letter in letters(path))


def _layer_paths(config: ModelConfig, layer: LayerConfig) -> Iterator[str]:
    yield from _norm_paths(config, "attn")
    yield from ("attn/q", "attn/k", "attn/v", "attn/o")
    if config.qkv_bias:
        yield from ("attn/q_bias", "attn/k_bias", "attn/v_bias")
    if config.o_bias:
        yield "attn/o_bias"
    if config.qk_norm:
        infix = "" if config.qk_norm_over == "head" else "all_"
        yield from (f"attn/q_{infix}norm", f"attn/k_{infix}norm")
    yield from _norm_paths(config, "mlp")
    matrices = ("gate", "up", "down") if config.gated else ("up", "down")
    if layer.moe is None:
        yield from (f"mlp/{name}" for name in matrices)
        if config.mlp_bias:
            yield from ("mlp/up_bias", "mlp_bias")
        return
    yield from ("moe/router", "moe/gate", "moe/up", "moe/down")
    if layer.mlp_dim:
        yield from (f"shared/{name}" for name in matrices)
    if layer.moe.shared_gate:
        yield "moe/shared_gate"


def _norm_paths(config: ModelConfig, branch: str) -> Iterator[str]:
    """Parameters of the norms around a branch, "attn" or "mlp", or of the "final" one."""
    before = config.norm_place != "post" or branch == "final"
    after = config.norm_place != "pre" and branch != "final"
    for name, there in ((f"{branch}_norm", before), (f"{branch}_out_norm", after)):
        if there:
            yield f"{name}/scale"
            if config.norm == "layer":
                yield f"{name}/bias"


def parameter_paths(config: ModelConfig) -> tuple[str, ...]:
    """Every parameter path that a model of this config holds, in order of use."""
    paths = ["embed/table"]
    if config.position_offset is not None:
        paths.append("positions/table")
    for i, layer in enumerate(config.layers):
        paths += [f"layer_{i}/{name}" for name in _layer_paths(config, layer)]
    paths += _norm_paths(config, "final")
    if not config.tie_embeddings:
        paths.append("head/table")
    return tuple(paths)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter that a model of this config holds."""
    return {path: shape(path, config) for path in parameter_paths(config)}


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters; a tied output head counts once."""
    return sum(math.prod(dims) for dims in parameter_shapes(config).values())


def partition_spec(
    path: str, rules: Rules = TENSOR_PARALLEL, mesh_axes: Iterable[str] | None = None
) -> PartitionSpec:
    """Partition spec of the parameter at `path`; see `spec`. ValueError for a path unknown."""
    return spec(letters(path), rules, mesh_axes)


def spec(
    letters: str, rules: Rules = TENSOR_PARALLEL, mesh_axes: Iterable[str] | None = None
) -> PartitionSpec:
    """Partition spec of an array whose (leading) axes are `letters` under `rules`.

    mesh_axes: those of the mesh it is for; axes of the rules that are not among them split nothing.
    Raises ValueError when two letters of one array would use the same mesh axis.
    """
    entries = [_axes_of(letter, rules, mesh_axes) for letter in letters]
    used = [axis for names in entries for axis in names]
    if len(used) != len(set(used)):
        raise ValueError(
            f"an array of axes {letters!r} would use one mesh axis twice under {dict(rules)}: "
            "give each of its letters an axis of its own"
        )
    return PartitionSpec(*(_entry(names) for names in entries))


def _axes_of(letter: str, rules: Rules, mesh_axes: Iterable[str] | None) -> tuple[str, ...]:
    found = rules.get(letter, ())
    names = (found,) if isinstance(found, str) else found
    return tuple(name for name in names if mesh_axes is None or name in mesh_axes)


def mesh_axes(letter: str, present: Iterable[str]) -> tuple[str, ...]:
    """Of the mesh axes that are present, those that split a letter."""
    return _axes_of(letter, TENSOR_PARALLEL, present)


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return names if len(names) > 1 else names[0] if names else None
