"""The two ways of scoring a continuation, by name, and the case that is scored: a set of methods.

Every number that `popjax eval` and `popjax perplexity` print carries the name of its protocol,
since one of the two leaves pruning and eviction no effect to show.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from popjax.bench import DENSE
from popjax.depth import DepthMethod, depth_method_name
from popjax.eviction import KvMethod, kv_method_name
from popjax.methods import Method, method_name

SINGLE_PASS, SPLIT = "single-pass", "split"
PROTOCOLS = {
    SINGLE_PASS: "context and continuation run in one prefill, which exercises no decode-time "
    "sparsity and no eviction",
    SPLIT: "the context is prefilled and decides partition and eviction, the continuation is "
    "decoded under them, teacher-forced",
}

# Options that name a file, and what writes it.
_FILES = {"statistics": "channels", "importance": "prefill-pruning"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is scored, under a name: an FFN method, and what goes with it."""

    name: str = DENSE
    method: Method = Method()
    eviction: KvMethod | None = None
    depth: DepthMethod | None = None

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned, evicted or skipped, so that rows of a batch share nothing."""
        return type(self.method) is Method and self.eviction is None and self.depth is None

    def settings(self) -> dict[str, Any]:
        """All that decides its numbers, for the settings of a run: of its files their bytes.

        Raises ValueError where a file cannot be read.
        """
        kv, depth = self.eviction, self.depth
        return {
            "method": _said(method_name(self.method), self.method),
            "kv": None if kv is None else _said(kv_method_name(kv), kv),
            "depth": None if depth is None else _said(depth_method_name(depth), depth),
        }


def _said(name: str, method: Any) -> dict[str, Any]:
    """A method's name and options, a digest in the place of the name of a file."""
    found = {"name": name, **dataclasses.asdict(method)}
    for option, kind in _FILES.items():
        if found.get(option) is not None:
            found[option] = _digest(option, found[option], kind)
    return found


def _digest(option: str, file: str, kind: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ValueError(
            f"{option} {file} cannot be read ({error.strerror}): write them with `popjax calibrate "
            f"{kind}`"
        ) from error


def checked_protocol(name: str, case: Case) -> str:
    """The protocol. Raises ValueError for an unknown one, or one that the case has no use for."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} is unknown: use one of {', '.join(PROTOCOLS)}")
    if name == SINGLE_PASS and (case.eviction is not None or case.depth is not None):
        raise ValueError(
            "the single-pass protocol has no phase after the prompt, so that evicted entries and "
            "skipped layers (kv, depth) cannot be scored: use the protocol split"
        )
    if name == SINGLE_PASS and case.method.calibration is not None:
        raise ValueError(
            f"the single-pass protocol runs no method that is calibrated, such as {case.name}: use "
            "the protocol split"
        )
    return name


__all__ = ["DENSE", "PROTOCOLS", "SINGLE_PASS", "SPLIT", "Case", "checked_protocol"]
