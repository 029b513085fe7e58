"""LaProx (arXiv 2605.07234): which entries the attention layer's output, after W_O, depends on.

The output is a sum over heads of A V W_O, a product whose column-row pairs matter by the product of
their norms (Eq. 8, 9, from Monte Carlo matrix multiplication). Scores are made comparable between
layers and compete in one top-K over the whole model. No author code is public: readings that the
paper leaves open are marked [inferred] and can be switched.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from popjax.config import LayerConfig
from popjax.eviction.allocation import Candidates, layer_shares, over_layers, per_head, per_layer
from popjax.eviction.method import LayerEntries, Scores
from popjax.eviction.pooling import average
from popjax.eviction.windowed import Windowed, attended
from popjax.sparsity import Params

VALUES = ("projected", "norm", "none")
GROUPS = ("mean", "literal")
SCOPES = ("global", "global-unnormalised", "layer", "head")
PLACES = ("score", "attention")
# Without it an accelerator multiplies float32 in passes of fewer bits.
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class LaProx(Windowed):
    """Keep the entries with the largest ||A[:, j]||_2 ||v_j W_O||_2 over the last queries.

    values: "projected" (paper), or its ablations "norm" (||v_j||) and "none" (attention alone).
    scope: where entries compete, "global" (paper: all layers and heads, layer by layer normalised),
      "global-unnormalised", "layer" or "head". pooling: width of the average over neighbouring
      tokens (paper: 7), taken of the final "score" [inferred] or of the "attention" norms (pool).
    group: heads that share a key score by the "mean" of their products [inferred], or by the
      "literal" reading, the norm of their mean attention times the mean of their value norms.
    Window entries always stay and are no part of the normaliser [inferred]; no sinks are kept.
    Raises ValueError for values outside their range.
    """

    values: str = "projected"
    scope: str = "global"
    pool: str = "score"
    group: str = "mean"

    def __post_init__(self) -> None:
        named = (("values", VALUES), ("scope", SCOPES), ("pool", PLACES), ("group", GROUPS))
        for name, allowed in named:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: use one of {allowed}")
        super().__post_init__()

    @property
    def repeats(self) -> bool:
        return self.pool == "score"

    def score(
        self, params: Params, layer: LayerConfig, statistic: Any, entries: LayerEntries
    ) -> jax.Array:
        gram = output_gram(params["o"]) if self.values == "projected" else None
        if self.pool == "attention":
            return self._pooled_first(layer, statistic, entries, gram)
        options = {"gram": gram, "values": self.values, "group": self.group}
        return attended(layer, statistic, entries, "l2", **options)

    def _pooled_first(
        self, layer: LayerConfig, statistic: Any, entries: LayerEntries, gram: jax.Array | None
    ) -> jax.Array:
        """Attention norms pooled, then times value norms, one query head of a group at a time."""
        queries, positions = statistic
        groups = queries.shape[2] // entries.k.shape[1]
        slots = self._candidates(entries.positions)
        norms = [self._norms(entries.v, gram, g, groups) for g in range(groups)]
        if self.group == "literal":
            columns = attended(layer, statistic, entries, "l2", group="literal")
            return average(columns, slots, self.pooling) * (sum(norms) / groups)
        total = jnp.zeros(entries.k.shape[:3], jnp.float32)
        for g, norm in enumerate(norms):
            one = queries[:, :, g::groups], positions
            columns = attended(layer, one, entries, "l2")
            total += average(columns, slots, self.pooling) * norm
        return total / groups

    def _norms(self, v: jax.Array, gram: jax.Array | None, g: int, groups: int) -> jax.Array:
        """Value norms [B, K, S] as the g-th query head of every group projects them."""
        v = v.astype(jnp.float32)
        if self.values == "none":
            return jnp.ones(v.shape[:3], jnp.float32)
        projected = v
        if gram is not None:
            projected = jnp.einsum("BKSH,KHJ->BKSJ", v, gram[g::groups], precision=_EXACT)
        return jnp.sqrt(jnp.maximum(jnp.sum(projected * v, axis=-1), 0.0))

    def _candidates(self, positions: jax.Array) -> jax.Array:
        lengths = jnp.max(positions, axis=1) + 1
        return (positions >= 0) & ~self.protected(positions, lengths)

    def allocate(self, scores: Scores, candidates: Candidates) -> Scores:
        if self.pool == "score":
            scores = self.pooled(scores, candidates)
        if self.scope == "head":
            return per_head(scores, candidates)
        if self.scope == "layer":
            return per_layer(scores, candidates)
        if self.scope == "global":
            scores = tuple(layer_shares(y, candidates.layer(i)) for i, y in enumerate(scores))
        return over_layers(scores, candidates)


def output_gram(o: jax.Array) -> jax.Array:
    """W_O^n W_O^nT [N, H, H] float32 of each query head's rows o [N, H, D] of W_O.

    With it ||v W_O||_2 = sqrt(v G v^T) needs H^2 products a token in place of H D.
    """
    o = o.astype(jnp.float32)
    return jnp.einsum("NHD,NJD->NHJ", o, o, precision=_EXACT)


__all__ = ["GROUPS", "PLACES", "SCOPES", "VALUES", "LaProx", "output_gram"]
