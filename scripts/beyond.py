"""Methods beyond online pruning at its own bytes: log-perplexity of a text, paired by window.

    python -m scripts.beyond --text article.txt --json beyond.json

Each window's prefix is prefilled, and the tokens after it are scored as decode steps under each
method (`popjax.evaluation`). Prints a markdown table: what a step reads of the FFN's bytes, what
each method loses to dense, and how much of online pruning's loss it saves. The text is the
caller's: none is shipped. Scouts are made of the weights alone, or come from a file that
`popjax calibrate scout --ends pruned --text OTHER.txt` wrote; copies of six bits in some of the
layers come from another file, made with `--bits 6 --copied 0.7` and no `--ends`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from popjax.bench import DENSE
from popjax.config import ModelConfig
from popjax.evaluation.paired import paired_losses
from popjax.evaluation.protocols import Case
from popjax.evaluation.statistics import paired
from popjax.methods import GateFirst, Method, OnlinePruning, Scout
from popjax.methods.row_budgets import rows_of_online_pruning
from popjax.scouts import Scouts, load_scouts, make_scouts, with_scouts
from scripts.quality import loaded_windows, progress, window_parser, write_json

FAITHFUL = "online-pruning"
# Has copies of its own, and is left out where it does not fit: from ratios of about 0.6 on.
PARTIAL = "scout, six bits in 0.7 of the layers"
PARTIAL_FORM = {"bits": 6, "copied": 0.7}


def cases(ratio: float) -> dict[str, Method]:
    """The methods compared at one ratio, the one whose bytes they all match first."""
    return {
        FAITHFUL: OnlinePruning(ratio=ratio),
        "gate-first": GateFirst(ratio),
        "gate-first, dense ends": GateFirst(ratio, ends="dense"),
        "scout": Scout(ratio),
        "scout, all layers alike": Scout(ratio, ends="pruned"),
        "scout, none as foretold": Scout(ratio, rest="off"),
        PARTIAL: Scout(ratio, **PARTIAL_FORM),
    }


def fits(method: Method, config: ModelConfig) -> bool:
    """Whether the model can be pruned so; if not, says why."""
    try:
        method.for_model(config)
    except ValueError as error:
        print(f"left out: {error}")
        return False
    return True


def share_read(method: Method, config: ModelConfig) -> float:
    """Bytes of the FFN that a step reads over those of a dense one, in weights of sixteen bits."""
    widths = [layer.mlp_dim for layer in config.layers]
    if isinstance(method, GateFirst):
        rows = sum(one.evaluated + one.tried + one.k_selected for one in method.budgets(config))
    elif isinstance(method, Scout):
        copies = 2 * (method.bits + 16 / method.group) / 16
        pairs = zip(method.budgets(config), widths, strict=True)
        rows = sum(b.on + 2 * b.exact + (copies * F if b.exact < F else 0) for b, F in pairs)
    elif isinstance(method, OnlinePruning) and method.ratio is not None:
        rows = sum(rows_of_online_pruning(F, method.ratio) for F in widths)
    else:
        rows = 3 * sum(widths)
    return rows / (3 * sum(widths))


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one ratio: nats a token of each window, of dense and of online pruning too."""

    name: str
    ratio: float
    read: float
    windows: tuple[float, ...]
    dense: tuple[float, ...]
    faithful: tuple[float, ...]

    def minus(self, others: Sequence[float]) -> tuple[float, float]:
        """Mean difference to others, paired by window, and its standard error."""
        found = paired(self.windows, others)
        return found.mean, found.standard_error

    @property
    def closed(self) -> float:
        """The share of the gap between online pruning and dense that is closed."""
        gap = float(np.mean(self.faithful)) - float(np.mean(self.dense))
        return 1 - self.minus(self.dense)[0] / gap

    def to_json(self) -> dict[str, Any]:
        compared = {"dense": self.minus(self.dense), "faithful": self.minus(self.faithful)}
        return {**dataclasses.asdict(self), "minus": compared, "closed": self.closed}

    def line(self) -> str:
        above, other = self.minus(self.dense), self.minus(self.faithful)
        cells = [self.name, f"{self.ratio:g}", f"{self.read:.3f}"]
        cells += [f"{mean:+.3f} ± {error:.3f}" for mean, error in (above, other)]
        cells.append("" if self.name == FAITHFUL else f"{self.closed:.0%}")
        return f"| {' | '.join(cells)} |"


def measure(
    model: Any,
    windows: Sequence[Sequence[int]],
    prefix: int,
    ratios: Sequence[float],
    names: Sequence[str],
    scouts: dict[str, Scouts],
) -> list[Row]:
    """Online pruning and the methods named, at every ratio; all see a window before the next.

    scouts: by the name of a method, under "scout" what those have that are not named.
    """
    chosen = dict.fromkeys([FAITHFUL, *names])
    pairs = {(name, r): cases(r)[name] for r in ratios for name in chosen}
    wanted = {key: method for key, method in pairs.items() if fits(method, model.config)}
    losses: dict[Any, tuple[float, ...]] = {}
    for kind, held in scouts.items():
        keys = [key for key in wanted if (key[0] if key[0] in scouts else "scout") == kind]
        named = {key: Case(method=wanted[key]) for key in keys}
        if kind == "scout":
            named |= {DENSE: Case()}
        if named:
            # Methods without a scout are as they were: it lies beside the weights.
            scouted = dataclasses.replace(model, params=with_scouts(model.params, held))
            losses |= paired_losses(scouted, windows, prefix, named, progress(len(windows)))
    dense = losses[DENSE]
    return [
        Row(name, r, share_read(method, model.config), losses[name, r], dense, losses[FAITHFUL, r])
        for (name, r), method in wanted.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The markdown table; ± is one standard error over windows, paired."""
    head = "| method | ratio | FFN bytes | above dense | minus online-pruning | closed |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(row.line() for row in rows)])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    parser = window_parser(__doc__, 24, "are prefilled")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    known = list(cases(0.5))
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--scout", type=Path, help="scout with copies of all layers")
    parser.add_argument("--partial-scout", type=Path, help="one of six bits in some of the layers")
    asked = parser.parse_args(argv)
    model, windows, count = loaded_windows(asked)
    own = {"scout": (asked.scout, {"ends": True}), PARTIAL: (asked.partial_scout, PARTIAL_FORM)}
    if PARTIAL not in asked.methods:
        del own[PARTIAL]
    scouts = {
        name: make_scouts(model.params, model.config, **form)
        if path is None
        else load_scouts(path, model.params, model.config)
        for name, (path, form) in own.items()
    }
    rows = measure(model, windows, asked.prefix, asked.ratios, asked.methods, scouts)
    protocol = (
        f"{model.name}, {asked.windows} windows spread over {count} tokens: prefix of "
        f"{asked.prefix}, next {asked.scored} scored as decode steps; ± one standard error"
    )
    print(f"{protocol}\n\n{table(rows)}")
    if asked.json is not None:
        values = {"protocol": protocol, "results": [row.to_json() for row in rows]}
        write_json(asked.json, values)


if __name__ == "__main__":
    main()
