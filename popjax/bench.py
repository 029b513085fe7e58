"""Honest timing: dense and any number of methods, interleaved round by round in one process.

A machine's speed drifts, so runs are compared only with runs beside them: every round runs dense
and each method once, in rotating order, after a warm-up that compiles everything. Phases are kept
apart and every ratio is a spread, never one number. Leaves out quality (`compare.py`) and printing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from popjax.config import ModelConfig
from popjax.depth import DepthMethod
from popjax.eviction import KvMethod
from popjax.generate import Options
from popjax.methods import Method
from popjax.report import Report, make_report
from popjax.run import Request, run
from popjax.sparsity import Params

DENSE = "dense"
Measured = TypeVar("Measured")


class Weights(Protocol):
    """What is timed: a LanguageModel, or anything else that holds a config and parameters."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def params(self) -> Params: ...


@dataclasses.dataclass(frozen=True)
class Spread:
    """One quantity measured once a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)

    def over(self, other: Spread) -> Spread:
        """The ratio of two quantities, round by round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return Spread(tuple(mine / theirs for mine, theirs in pairs))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: every round, and median, min and max."""
        rounds = list(self.rounds)
        return {"rounds": rounds, "median": self.median, "min": self.low, "max": self.high}

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}..{self.high:.3g})"


@dataclasses.dataclass(frozen=True)
class MethodBench:
    """One method's times in seconds, decode_step being a step of the whole batch, and its bytes.

    weight, packed and cache bytes are held at once; read_bytes are weights read by a decode step.
    compile is of the warm-up run alone, and zero for what earlier methods had compiled already.
    """

    name: str
    prefill: Spread
    evict: Spread
    plan: Spread
    pack: Spread
    decode_step: Spread
    compile: float
    read_bytes: int
    weight_bytes: int
    packed_bytes: int
    cache_bytes: int
    skips_layers: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v.to_json() if isinstance(v, Spread) else v for k, v in values.items()}


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What `bench` measured: `methods` in the order given, dense first."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    methods: tuple[MethodBench, ...]

    def __getitem__(self, name: str) -> MethodBench:
        return next(method for method in self.methods if method.name == name)

    def ratio(self, name: str) -> Spread:
        """Dense seconds a decode step over the method's, round by round: above 1 is faster."""
        return self[DENSE].decode_step.over(self[name].decode_step)

    def speedup(self, name: str) -> str:
        """The decode speed-up in words, which claims none where the spread contains 1."""
        return speedup_text(self.ratio(name))

    def bytes_ratio(self, name: str) -> float:
        """Weight bytes that a dense decode step reads over the method's: what memory allows."""
        return self[DENSE].read_bytes / self[name].read_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, ratios and speed-up texts included."""
        rows = []
        for method in self.methods:
            row = method.to_json()
            if method.name != DENSE:
                row["ratio_to_dense"] = self.ratio(method.name).to_json()
                row["bytes_ratio"] = self.bytes_ratio(method.name)
                row["speedup"] = self.speedup(method.name)
            rows.append(row)
        return {
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "methods": rows,
        }


# Fewer rounds have no spread worth the name.
_LEAST_ROUNDS = 3


def speedup_text(ratio: Spread) -> str:
    """A ratio of times in words: a claim only where every one of three or more rounds agrees on who
    is faster.
    """
    rounds = len(ratio.rounds)
    spread = f"{ratio.low:.2f}..{ratio.high:.2f} over {rounds} round{'s' * (rounds != 1)}"
    if rounds < _LEAST_ROUNDS:
        return f"no speed-up shown: {spread}, and fewer than {_LEAST_ROUNDS} show none"
    if ratio.low <= 1.0 <= ratio.high:
        return f"no speed-up shown: {spread} contains 1"
    word = "faster" if ratio.median > 1 else "slower"
    times = ratio.median if ratio.median > 1 else 1 / ratio.median
    return f"{times:.2f} times {word} (ratio {spread})"


def interleaved(
    measures: Mapping[str, Callable[[], Measured]],
    rounds: int,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, tuple[Measured, list[Measured]]]:
    """Each measure's warm-up result and its result of every round, rounds in rotating order.

    `on_round` is told the number of finished rounds. Raises ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} is below 1: measure at least once")
    names = list(measures)
    found = {name: (measures[name](), list[Measured]()) for name in names}
    for done in range(rounds):
        # Whoever always ran after the heaviest would always find the caches coldest.
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            found[name][1].append(measures[name]())
        if on_round is not None:
            on_round(done + 1)
    return found


def bench(
    model: Weights,
    methods: Mapping[str, Method],
    *,
    prompt_ids: Sequence[Sequence[int]],
    new_tokens: int = 64,
    rounds: int = 5,
    on_round: Callable[[int], None] | None = None,
    implementation: str | None = None,
    depths: Mapping[str, DepthMethod] | None = None,
    evictions: Mapping[str, KvMethod] | None = None,
) -> BenchResult:
    """Time dense and `methods` (name -> Method) on rows of token ids, greedily, end tokens ignored.

    depths, evictions: methods for layers and cache entries by the names of `methods`, or by others,
    which prune no channels. Dense is always measured and called "dense". Raises ValueError for
    fewer than two new tokens (the first comes from the prefill), for no rounds, and for what the
    model cannot serve.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens {new_tokens} is below 2: the first needs no decode step")
    if methods.get(DENSE, Method()) != Method():
        raise ValueError(f"method name {DENSE!r} means no pruning: give {methods[DENSE]} another")
    depths, evictions = dict(depths or {}), dict(evictions or {})
    for others, meaning in ((depths, "every layer"), (evictions, "every entry")):
        if DENSE in others:
            raise ValueError(f"method name {DENSE!r} means {meaning}: give {others[DENSE]} another")
    cases = {DENSE: Method(), **dict.fromkeys([*depths, *evictions], Method()), **methods}
    options = Options(implementation=implementation)

    def measure(name: str) -> Callable[[], Report]:
        request = Request(
            prompt_ids,
            new_tokens,
            cases[name],
            options=options,
            depth=depths.get(name),
            eviction=evictions.get(name),
        )
        return lambda: _report(model, name, request)

    found = interleaved({name: measure(name) for name in cases}, rounds, on_round)
    return BenchResult(
        batch=len(prompt_ids),
        prompt_tokens=max(len(row) for row in prompt_ids),
        new_tokens=new_tokens,
        methods=tuple(_method_bench(name, *reports) for name, reports in found.items()),
    )


def _report(model: Weights, name: str, request: Request) -> Report:
    """The report of one run, which is where seconds and bytes are counted."""
    return make_report(
        model="",
        method=name,
        config=model.config,
        params=model.params,
        result=run(model.params, model.config, request),
        load_seconds=0.0,
    )


def _method_bench(name: str, warm: Report, reports: Sequence[Report]) -> MethodBench:
    def phase(key: str, divisor: int = 1) -> Spread:
        return Spread(tuple(report.seconds[key] / divisor for report in reports))

    return MethodBench(
        name=name,
        prefill=phase("prefill"),
        evict=phase("evict"),
        plan=phase("plan"),
        pack=phase("pack"),
        decode_step=phase("decode", warm.decode_steps),
        compile=warm.seconds["compile"],
        read_bytes=warm.read_bytes_per_token,
        weight_bytes=warm.weight_bytes,
        packed_bytes=warm.packed_bytes,
        cache_bytes=warm.cache_bytes,
        skips_layers=warm.depth is not None,
    )
