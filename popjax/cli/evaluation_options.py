"""The options about evaluation: protocol, methods that are compared, what is scored and kept."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popjax.cli import options
from popjax.cli.repeated import of_several, once
from popjax.cli.scout_options import check_scout
from popjax.cli.terminal import stderr_console, stdout_console, write

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

    from popjax.depth import DepthMethod
    from popjax.evaluation.protocols import Case
    from popjax.evaluation.results import Evaluation
    from popjax.eviction import KvMethod

_PANEL = "Scoring"

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="What is compared with dense, as popjax generate takes it; may be repeated.",
        rich_help_panel="Method",
    ),
]
Protocol = Annotated[
    str,
    typer.Option(
        help="split: the context is prefilled and decides, the rest is decoded under that. "
        "single-pass: all in one prefill, which shows no decode-time sparsity.",
        rich_help_panel=_PANEL,
    ),
]
Dense = Annotated[
    bool,
    typer.Option(
        "--dense/--no-dense", help="Score dense beside each method.", rich_help_panel=_PANEL
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Rows scored together at most.", rich_help_panel=_PANEL)
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens of a window; without it the model's.", rich_help_panel=_PANEL),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Keep every result here as it comes; run again to go on after an interruption.",
    ),
]


class Bar:
    """A progress bar on stderr; nothing where stderr is no terminal."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Left

        console = stderr_console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left())
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=self._total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._bar is not None
        self._bar.stop()

    def done(self, count: int) -> None:
        """So many more are done."""
        assert self._bar is not None and self._task is not None
        self._bar.advance(self._task, count)


def chosen_cases(
    names: list[str] | None,
    method_options: dict[str, Any],
    kv: KvMethod | None,
    depth: DepthMethod | None,
    dense: bool,
) -> list[Case]:
    """Dense, unless left out, and each method with the cache and depth options.

    --ratio alone means online-pruning, and --kv or --depth alone dense channels. Wrong usage where
    nothing is left, or a method is named twice.
    """
    from popjax.depth import depth_method_name
    from popjax.evaluation.protocols import DENSE, Case
    from popjax.eviction import kv_method_name
    from popjax.methods import Method, method_name

    named = [name for name in names or [] if name != DENSE]
    once(named, "--method")
    asked = any(value is not None for value in method_options.values())
    each = of_several(named, method_options)
    methods = [options.chosen_method(name, **own) for name, own in zip(named, each, strict=True)]
    if not methods and asked and names:
        raise typer.BadParameter(
            "dense decoding prunes nothing: name another method too", param_hint="--method"
        )
    if not methods and asked:
        methods = [options.chosen_method(None, **method_options)]
    beside = [] if kv is None else [_named(kv_method_name(kv), kv, "keep", "tokens")]
    beside += [] if depth is None else [_named(depth_method_name(depth), depth, "skip")]
    if not methods and beside:
        methods = [Method()]
    cases = [Case()] if dense or DENSE in (names or []) else []
    for method in methods:
        pruned = type(method) is not Method
        name = _named(method_name(method), method, "ratio", "model_ratio")
        cases.append(Case(", ".join([name] * pruned + beside), method, kv, depth))
    if not cases:
        raise typer.BadParameter(
            "nothing is left to score: give --method and --ratio, or leave out --no-dense",
            param_hint="--no-dense",
        )
    return cases


def asked_cases(
    names: list[str] | None,
    method_options: dict[str, Any],
    kv: KvMethod | None,
    depth: DepthMethod | None,
    *,
    dense: bool,
    protocol: str,
    scout: Path | None,
) -> list[Case]:
    """`chosen_cases` under a protocol, with the scout that they need, or wrong usage."""
    cases = chosen_cases(names, method_options, kv, depth, dense)
    check_scout([case.method for case in cases], scout)
    check_protocol(protocol, cases)
    return cases


def _named(name: str, method: Any, *budgets: str) -> str:
    """A method's name and how much it takes away or leaves."""
    held = {budget: getattr(method, budget, None) for budget in budgets}
    return " ".join([name, *(f"{b} {v:g}" for b, v in held.items() if v is not None)])


def check_protocol(name: str, cases: list[Case]) -> None:
    """Wrong usage where the protocol is unknown, or has no use for an option."""
    from popjax.evaluation.protocols import checked_protocol

    for case in cases:
        try:
            checked_protocol(name, case)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--protocol") from error


def show(found: Evaluation, json: bool) -> None:
    """The results on stdout, for people or as JSON."""
    if json:
        write(json_format.dumps(found.to_json(), allow_nan=False) + "\n")
    else:
        stdout_console().print(_table(found))


def _table(found: Evaluation) -> RenderableType:
    """The table of a run under its protocol, and what to know about it."""
    from rich.console import Group

    from popjax.cli.tables import table
    from popjax.evaluation.protocols import PROTOCOLS

    rows = [
        (
            row.task,
            row.metric,
            row.case,
            str(row.value.n),
            row.value.words(),
            "" if row.difference is None else row.difference.words(sign=True),
        )
        for row in found.rows
    ]
    columns = ("task", "metric", "case", "n", "value ± s.e.", "minus dense ± s.e.")
    title = f"{found.model}, protocol {found.protocol}: {PROTOCOLS[found.protocol]}"
    shown = table(*columns, rows=rows, words=3)
    return Group(title, shown, *found.notes)


__all__ = ["Bar", "asked_cases", "chosen_cases", "show"]
