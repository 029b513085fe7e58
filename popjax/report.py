"""What a run decided, read and cost: counts, bytes and seconds, never a claim.

Bytes of weights a token are those that the compiled step reads from memory, not those a mask
zeroes: the masked form reads every evaluated row of down, the gathered form only the chosen ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kernels_pallas.masked_mlp import NATIVE
from popjax.cache import Kept
from popjax.config import ModelConfig
from popjax.depth.applied import without_others
from popjax.depth.report import DepthReport, depth_report
from popjax.expert_partition import ExpertPartition
from popjax.generate import Masks
from popjax.nn.expert_rows import listing
from popjax.scouts import scout_bytes
from popjax.sparsity import ChannelPartition, Params, Partitions, unrouted


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Channels of one layer, and bytes of FFN weights a token reads there, dense and now.

    Of a layer with experts: those of the experts that a token is routed to, with what every token
    uses beside them only where that is pruned too. Where thresholds choose, as many are active as
    recorded masks had on, on average, and without such masks as many as could be.
    """

    channels: int
    retained: int
    candidate: int
    active: int
    dense_bytes: int
    read_bytes: int


@dataclasses.dataclass(frozen=True)
class LayerCacheReport:
    """Cache entries of the prompt in one layer, all rows and heads, and their bytes, dense and now.

    An entry is a key, a value and their position.
    """

    dense_entries: int
    entries: int
    dense_bytes: int
    held_bytes: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The run against a dense run of the same prompts in the same process.

    decode_speedup: each round's dense decode seconds a step over this run's, in order; token
    agreement: share of this run's tokens that the dense model would also have chosen at that place
    (greedy); kl: mean KL(dense || this run) in nats a token over the run's own text;
    first_difference: tokens before the free-running dense greedy text parts from this one.
    """

    decode_speedup: tuple[float, ...]
    token_agreement: float
    kl: float
    first_difference: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a run reports. Seconds by phase; bytes held and read; tokens a second in decode.

    implementation: how decode steps were computed, a name of masked_mlp.IMPLEMENTATIONS. kv: what
    of the prompt stayed in the cache, layer by layer, where an eviction or a context decided that;
    kv_idle: why an eviction that was asked for took nothing.
    depth: layers skipped or dropped, where any were; `layers` and `kv` are of those that ran.
    """

    model: str
    method: str
    layers: tuple[LayerReport, ...]
    dense_bytes_per_token: int
    read_bytes_per_token: int
    weight_bytes: int
    packed_bytes: int
    cache_bytes: int
    seconds: dict[str, float]
    compilations: int
    prompt_tokens: int
    new_tokens: int
    decode_steps: int
    tokens_per_second: float | None
    implementation: str
    comparison: Comparison | None = None
    kv: tuple[LayerCacheReport, ...] | None = None
    kv_idle: str | None = None
    depth: DepthReport | None = None

    def totals(self) -> LayerReport:
        """The sums over layers."""
        fields = [field.name for field in dataclasses.fields(LayerReport)]
        return LayerReport(*(sum(getattr(y, name) for y in self.layers) for name in fields))

    def kv_totals(self) -> LayerCacheReport | None:
        """The sums over layers of `kv`."""
        if self.kv is None:
            return None
        fields = [field.name for field in dataclasses.fields(LayerCacheReport)]
        return LayerCacheReport(*(sum(getattr(y, name) for y in self.kv) for name in fields))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, totals included."""
        values = {**dataclasses.asdict(self), "totals": dataclasses.asdict(self.totals())}
        kv = self.kv_totals()
        return values if kv is None else {**values, "kv_totals": dataclasses.asdict(kv)}


def layer_reports(
    config: ModelConfig,
    partition: Partitions | None,
    itemsize: int,
    only_chosen: bool,
    by_index: Sequence[str | None] = (),
    masks: Masks | None = None,
    params: Params | None = None,
) -> tuple[LayerReport, ...]:
    """One LayerReport a layer; without a partition every channel is retained.

    by_index: what of a layer's experts is read so, see `expert_rows.listing`; nothing without it.
    masks: those in use, where recorded.
    params: where scouts would be.
    """
    reports = []
    for i, layer in enumerate(config.layers):
        row = config.embed_dim * itemsize
        channel = config.channel_size * itemsize
        channels = layer.routed * layer.channels
        dense = channels * channel
        if partition is None:
            reports.append(LayerReport(channels, channels, 0, channels, dense, dense))
            continue
        part, read = partition[i], 0
        alone = unrouted(part)
        if isinstance(part, ExpertPartition):
            how = by_index[i] if by_index else None
            read = dense if how is None else read_of_experts(part, channel, row, how)
        active = part.active
        retained, candidate = layer.routed * part.num_retained, layer.routed * part.num_candidate
        if isinstance(part, ExpertPartition) and part.whole is not None:
            retained, candidate, active = _with_whole(part, retained, candidate)
        if alone is not None:
            if alone.threshold is not None and masks is not None:
                active = _mean_count(masks[i])
            chosen = active if alone is part else alone.active
            read += _read(alone, channel, row, chosen if only_chosen else None)
            if alone.point == "scout" and not alone.decided:
                read += scout_bytes(params or {}, i)
        if alone is not None and alone is not part:
            retained, candidate = retained + alone.num_retained, candidate + alone.num_candidate
            channels, dense = channels + layer.mlp_dim, dense + layer.mlp_dim * channel
        reports.append(LayerReport(channels, retained, candidate, active, dense, read))
    return tuple(reports)


def _mean_count(mask: jax.Array) -> int:
    """Channels on in a step of a row, on average over the steps [n, B, F] that were recorded."""
    counts = np.asarray(mask).sum(axis=-1)
    return round(float(np.mean(counts))) if counts.size else mask.shape[-1]


def _read(part: ChannelPartition, channel: int, row: int, chosen: int | None) -> int:
    """Bytes of weights read of a partition whose channels have so many bytes, a row of down too.

    chosen: how many are on, where no others are read to the end: down, by the gate alone up of
    those tried too, by a scout all three.
    """
    on = part.evaluated if chosen is None else chosen
    if part.point == "scout" and not part.decided:
        exact = on if part.exact is None or chosen is None else part.exact
        return exact * (channel - row) + on * row
    if part.point == "gate":
        tried = on if part.tried is None or chosen is None else part.num_retained + part.tried
        return part.evaluated * (channel - 2 * row) + (tried + on) * row
    return part.evaluated * (channel - row) + on * row


def _with_whole(part: ExpertPartition, retained: int, candidate: int) -> tuple[int, int, int]:
    """Retained, candidate and active channels of a token's experts, some of which keep them all:
    on average over those that are held.
    """
    whole = float(np.mean(np.asarray(part.whole)))
    every = part.top_k * part.expert_dim
    beside = part.active - part.routed_active
    means = [(1 - whole) * n + whole * m for n, m in ((retained, every), (candidate, 0))]
    active = (1 - whole) * part.routed_active + whole * every
    return round(means[0]), round(means[1]), round(active) + beside


def read_of_experts(part: ExpertPartition, channel: int, row: int, how: str) -> int:
    """Bytes of weights that a token reads of its experts by index, `how` as `expert_rows.listing`
    says, whose channels have so many bytes, a row of down among them.
    """
    rows = rows_read(part)
    on = part.routed_active if how == "chosen" else rows
    return rows * (channel - row) + on * row


def rows_read(part: ExpertPartition) -> int:
    """Rows of each matrix that a token's experts read, on average over all that are held."""
    counts = part.counts()
    if counts is None:
        return part.top_k * part.width
    return round(part.top_k * float(np.mean(np.asarray(counts))))


def cache_reports(
    kept: Kept | None, config: ModelConfig, prompt_tokens: int
) -> tuple[LayerCacheReport, ...] | None:
    """One LayerCacheReport a layer; rows that name the same entries count once."""
    if kept is None:
        return None
    entry = kept.entries.shape[1] * kept.entries.dtype.itemsize + kept.positions.dtype.itemsize
    starts, lengths = np.asarray(kept.starts), np.asarray(kept.lengths)
    reports = []
    for i, layer in enumerate(config.layers):
        ranges = np.unique(np.stack([starts[i].ravel(), lengths[i].ravel()]), axis=1)
        entries, dense = int(ranges[1].sum()), prompt_tokens * layer.num_kv_heads
        reports.append(LayerCacheReport(dense, entries, dense * entry, entries * entry))
    return tuple(reports)


def reads_only_chosen(result: Any) -> bool:
    """Whether a decode step read only the chosen rows of `down`.

    Rows of a batch that choose for themselves read the union, for which R u C is the bound.
    """
    if result.implementation == "xla_gathered":
        return True
    return result.implementation in NATIVE and len(result.tokens) == 1


def weight_bytes(params: Params) -> int:
    """Bytes that the parameters occupy, read from the arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def bytes_per_token(config: ModelConfig, params: Params) -> int:
    """Bytes of weights that one dense decode step reads for one row.

    Every weight once and no scout, of experts those that it goes to, except that an embedding table
    is read whole only as the output head; as an input table, or one of positions, it costs one row.
    """
    table = params["embed"]["table"]
    total = weight_bytes(params) - scout_bytes(params)
    for layer in config.layers:
        if layer.moe is not None:
            # A token reads its own experts.
            unused = layer.moe.num_experts - layer.moe.top_k
            total -= unused * layer.channels * config.channel_size * table.dtype.itemsize
    if config.position_offset is not None:
        positions = params["positions"]["table"]
        total -= positions.nbytes - positions.nbytes // positions.shape[0]
    if not config.tie_embeddings:
        total -= table.nbytes - config.embed_dim * table.dtype.itemsize
    return total


def _listings(result: Any, config: ModelConfig, params: Params) -> tuple[str | None, ...]:
    """By layer, what of its experts a step of the run reads by index."""
    found: list[str | None] = []
    for i, layer in enumerate(config.layers):
        part = None if result.partition is None else result.partition[i]
        if layer.moe is None or not isinstance(part, ExpertPartition):
            found.append(None)
            continue
        tiled = params[f"layer_{i}"]["moe"]["down"].ndim > 3
        found.append(listing(result.implementation, tiled, len(result.tokens), layer.moe, part))
    return tuple(found)


def make_report(
    *,
    model: str,
    method: str,
    config: ModelConfig,
    params: Params,
    result: Any,
    load_seconds: float,
) -> Report:
    """The report of a RunResult."""
    depth = depth_report(
        config, result.layers, result.depth, result.prompt_lengths, result.context_tokens
    )
    held = weight_bytes(params)
    params, config = without_others(params, config, result.layers)
    itemsize = params["embed"]["table"].dtype.itemsize
    how = (_listings(result, config, params), result.masks, params)
    layers = layer_reports(config, result.partition, itemsize, reads_only_chosen(result), *how)
    dense = bytes_per_token(config, params)
    saved = sum(layer.dense_bytes - layer.read_bytes for layer in layers)
    decode_steps = result.steps - 1
    seconds = {"load": load_seconds, **result.seconds}
    decoded = decode_steps * len(result.tokens)
    return Report(
        model=model,
        method=method,
        layers=layers,
        dense_bytes_per_token=dense,
        read_bytes_per_token=dense - saved,
        weight_bytes=held,
        packed_bytes=result.packed_bytes,
        implementation=result.implementation,
        cache_bytes=result.cache_bytes,
        seconds={name: float(value) for name, value in seconds.items()},
        compilations=result.compilations,
        prompt_tokens=result.prompt_tokens,
        new_tokens=int(np.sum(result.counts)),
        decode_steps=decode_steps,
        tokens_per_second=decoded / seconds["decode"] if decoded else None,
        kv=cache_reports(result.kept, config, result.pooled_tokens),
        kv_idle=result.idle,
        depth=depth,
    )
