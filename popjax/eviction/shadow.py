"""Shadow passes: tokens that read a whole prefilled cache, are listened to, and leave nothing.

They run in slots behind the prompt's, which every pass overwrites; the cache is donated, so that
nothing of its size is held beside it. Leaves out what the tokens are and what is heard in them:
that is a method's business.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from popjax.cache import Cache
from popjax.config import LayerConfig, ModelConfig
from popjax.eviction.method import AttentionActs, KvMethod, ShadowPass
from popjax.methods.method import Method
from popjax.nn.ops import QUERY_BLOCK
from popjax.nn.transformer import Inputs, Outputs, Transformer
from popjax.sparsity import Params


@dataclasses.dataclass(frozen=True)
class _Listening(KvMethod):
    """Observes a shadow pass as `method` listens to it; made anew inside every trace."""

    method: KvMethod = KvMethod()
    asked: ShadowPass | None = None

    def observe(self, params: Params, layer: LayerConfig, acts: AttentionActs) -> Any:
        assert self.asked is not None
        return self.method.listen(params, layer, acts, self.asked)


def padded(tokens: int) -> int:
    """Slots for so many tokens: whole blocks of queries, where attention would run by the block.

    A prompt's attention is not held whole; nor should be that of a pass over it.
    """
    if tokens <= 2 * QUERY_BLOCK:
        return tokens
    return -(-tokens // QUERY_BLOCK) * QUERY_BLOCK


def listen(
    cache: Cache,
    seen: tuple[Any, ...],
    params: Params,
    asked: ShadowPass,
    *,
    config: ModelConfig,
    method: KvMethod,
) -> tuple[Cache, tuple[Any, ...]]:
    """The cache as it was but for spare slots, and each layer's statistic with the pass combined.

    The FFN runs dense, whatever channels decoding will leave out: the pass asks the model itself.
    """
    model = Transformer(config, Method(), eviction=_Listening(method=method, asked=asked))
    inputs = Inputs(asked.tokens, asked.positions)
    out = cast(Outputs, model.apply({"params": params}, inputs, cache, None, method="prefill"))
    heard = tuple(method.combine(old, new) for old, new in zip(seen, out.seen, strict=True))
    # Slots count as empty again: the next pass starts where this one did.
    kept = dataclasses.replace(out.cache, positions=cache.positions, length=cache.length)
    return kept, heard


__all__ = ["listen", "padded"]
