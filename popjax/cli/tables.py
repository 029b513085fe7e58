"""Reports as tables for people; `--json` prints the same values for machines.

Leaves out every computation but sums, shares and units: the values come from `report.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from popjax.bench import DENSE, Spread, speedup_text
from popjax.inspection import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from popjax.bench import BenchResult
    from popjax.depth.report import DepthReport
    from popjax.report import Comparison, LayerReport, Report

PHASES = ("load", "compile", "prefill", "evict", "plan", "pack", "decode")


def table(
    *columns: str, rows: Iterable[Sequence[str]], title: str | None = None, words: int = 1
) -> Table:
    """A plain table whose first `words` columns are text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < words else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one pair a line."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, value)
    return grid


def heading(text: str) -> Text:
    """A line above what follows, with space before it."""
    from rich.text import Text

    return Text(f"\n{text}", style="bold underline")


def share(part: float, whole: float) -> str:
    """`part` as a percentage of `whole`."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def seconds(value: float) -> str:
    """A time with three digits that mean something."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def report_tables(report: Report, finish_reason: str | None = None) -> RenderableType:
    """A run's report: channels by layer where any were pruned, then bytes, time and speed."""
    from rich.console import Group

    parts: list[RenderableType] = []
    if any(layer.active < layer.channels for layer in report.layers):
        parts.append(_channels(report))
    parts.append(facts(_facts(report, finish_reason)))
    return Group(*parts)


def _channels(report: Report) -> Table:
    made = table(
        "FFN channels",
        "all",
        "retained",
        "candidate",
        "active a token",
        "read a token",
        "of dense",
        rows=(_channel_row(*group) for group in _alike(report.layers)),
    )
    made.add_section()
    made.add_row(*_channel_row("total", report.totals()))
    return made


def _alike(layers: Sequence[LayerReport]) -> Iterable[tuple[str, LayerReport]]:
    """Runs of layers with the same numbers, each under one name."""
    for layer, run in itertools.groupby(enumerate(layers), key=lambda pair: pair[1]):
        indices = [i for i, _ in run]
        name = f"layer {indices[0]}"
        if len(indices) > 1:
            name = f"layers {indices[0]} to {indices[-1]}, each"
        yield name, layer


def _channel_row(name: str, layer: LayerReport) -> tuple[str, ...]:
    counts = (layer.channels, layer.retained, layer.candidate, layer.active)
    return (
        name,
        *(str(count) for count in counts),
        format_bytes(layer.read_bytes),
        share(layer.read_bytes, layer.dense_bytes),
    )


def _facts(report: Report, finish_reason: str | None) -> Iterable[tuple[str, str]]:
    yield "run", f"{report.model}, {report.method}"
    ended = f", ended by {finish_reason}" if finish_reason else ""
    yield "tokens", f"{report.prompt_tokens} prompt, {report.new_tokens} new{ended}"
    dense, now = report.dense_bytes_per_token, report.read_bytes_per_token
    if now == dense:
        yield "weights read", f"{format_bytes(dense)} a token"
    else:
        amount = f"{format_bytes(dense)} dense, {format_bytes(now)} now"
        yield "weights read", f"{amount} a token ({share(now, dense)})"
    held = [f"weights {format_bytes(report.weight_bytes)}"]
    held += [f"packed rows {format_bytes(report.packed_bytes)}"] if report.packed_bytes else []
    held += [f"cache {format_bytes(report.cache_bytes)}"]
    yield "memory", ", ".join(held)
    kv = report.kv_totals()
    if kv is not None and report.kv is not None:
        least, most = min(y.entries for y in report.kv), max(y.entries for y in report.kv)
        yield (
            "cache kept",
            f"{kv.entries} of {kv.dense_entries} entries ({share(kv.entries, kv.dense_entries)}), "
            f"{least} to {most} a layer, {format_bytes(kv.held_bytes)} of "
            f"{format_bytes(kv.dense_bytes)}",
        )
    if report.kv_idle is not None:
        yield "cache kept", f"every entry, the budget had no effect: {report.kv_idle}"
    if report.depth is not None:
        yield "layers", _depth(report.depth)
    phases = [
        f"{name} {seconds(report.seconds[name])}" for name in PHASES if name in report.seconds
    ]
    yield "time", ", ".join(phases)
    if report.tokens_per_second is not None:
        form = f"implementation {report.implementation}"
        yield "decode speed", f"{report.tokens_per_second:.1f} tokens/s ({form})"
    if report.comparison is not None:
        yield from _comparison(report.comparison, report.new_tokens)


def _depth(found: DepthReport) -> str:
    """What the prompt skipped, in words."""
    parts = [
        f"{len(layers)} of {found.layers} {what} ({', '.join(map(str, layers))})"
        for layers, what in ((found.skipped, "skipped in prefill"), (found.dropped, "dropped"))
        if layers
    ] or [f"0 of {found.layers} skipped in prefill (one prompt token, which runs them all)"]
    allowed = f"prefill FLOPs allow {found.dense_flops / found.flops:.2f} times dense speed"
    return ", ".join([*parts, allowed])


def _comparison(found: Comparison, new_tokens: int) -> Iterable[tuple[str, str]]:
    yield "against dense", speed_change(found.decode_speedup)
    yield "same token", f"{100 * found.token_agreement:.1f} % of tokens are also dense's choice"
    yield "KL from dense", f"{found.kl:.4g} nats a token"
    shared = ", ".join(str(count) for count in found.first_difference)
    yield "same start", f"{shared} of {new_tokens} tokens, before dense's greedy text parts"


def layer_table(scores: Mapping[str, Iterable[float]], title: str) -> Table:
    """Scores of every layer, a column a kind."""
    kinds = list(scores)
    rows = [
        (str(i), *(f"{value:.4g}" for value in values))
        for i, values in enumerate(zip(*scores.values(), strict=True))
    ]
    return table("layer", *kinds, rows=rows, title=title)


def speed_change(rounds: Sequence[float]) -> str:
    """What rounds of dense time over this time allow one to say; a spread across 1 is no change."""
    ratio = Spread(tuple(rounds))
    if ratio.low <= 1 <= ratio.high:
        return (
            f"no measurable difference: {ratio.low:.2f} to {ratio.high:.2f} times dense speed over "
            f"{len(rounds)} rounds"
        )
    return speedup_text(ratio)


def bench_view(result: BenchResult) -> RenderableType:
    """Times of every method, median (least to most) over the rounds, and speed against dense."""
    from rich.console import Group

    rows = [
        (
            row.name,
            _milliseconds(row.decode_step.rounds),
            _milliseconds(row.prefill.rounds),
            _milliseconds(
                [plan + pack for plan, pack in zip(row.plan.rounds, row.pack.rounds, strict=True)]
            ),
            format_bytes(row.read_bytes),
        )
        for row in result.methods
    ]
    columns = ("method", "decode step, ms", "prefill, ms", "plan and pack, ms", "read a token")
    rounds = len(result.methods[0].decode_step.rounds)
    title = (
        f"{result.prompt_tokens} prompt and {result.new_tokens} new tokens; median (least to most) "
        f"of {rounds} interleaved round{'s' if rounds > 1 else ''}"
    )
    verdicts = [
        (f"{row.name}, decode", speed_change(result.ratio(row.name).rounds))
        for row in result.methods
        if row.name != DENSE
    ]
    prefill = result[DENSE].prefill
    verdicts += [
        (f"{row.name}, prefill", speed_change(prefill.over(row.prefill).rounds))
        for row in result.methods
        if row.skips_layers
    ]
    return Group(title, table(*columns, rows=rows), facts(verdicts))


def frontier_view(found: dict[str, Any]) -> RenderableType:
    """Loss above dense with its standard error, beside shares of dense's bytes and time."""
    from rich.console import Group

    rows = [
        (
            point["name"],
            f"{point['loss']:+.3f} ± {point['loss_error']:.3f}",
            f"{point['bytes_share']:.3f}",
            f"{point['time_share']['median']:.3f}",
        )
        for point in found["points"]
    ]
    columns = ("method", "loss above dense, nats", "bytes, of dense", "step time, of dense")
    return Group(heading(found["protocol"]), table(*columns, rows=rows))


def _milliseconds(rounds: Sequence[float]) -> str:
    spread = Spread(tuple(1e3 * seconds for seconds in rounds))
    return f"{spread.median:.3g} ({spread.low:.3g}-{spread.high:.3g})"
