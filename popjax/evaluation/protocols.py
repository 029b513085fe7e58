"""The two ways of scoring a continuation, by name, and the case that is scored: a set of methods.

Every number that `popjax eval` and `popjax perplexity` print carries the name of its protocol,
since one of the two leaves pruning and eviction no effect to show.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from popjax.bench import DENSE
from popjax.depth import DepthMethod
from popjax.eviction import KvMethod
from popjax.methods import Method

SINGLE_PASS, SPLIT = "single-pass", "split"
PROTOCOLS = {
    SINGLE_PASS: "context and continuation run in one prefill, which exercises no decode-time "
    "sparsity and no eviction",
    SPLIT: "the context is prefilled and decides partition and eviction, the continuation is "
    "decoded under them, teacher-forced",
}


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

    def words(self) -> str:
        """All that decides its numbers, for the settings of a run: of a statistics file its bytes.

        Raises ValueError where that file cannot be read.
        """
        said = repr((self.method, self.eviction, self.depth))
        file = self.method.calibration
        if file is None:
            return said
        try:
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise ValueError(
                f"statistics {file} cannot be read ({error.strerror}): write them with `popjax "
                "calibrate channels`"
            ) from error
        return f"{said}, statistics {digest}"


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
