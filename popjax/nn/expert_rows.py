"""The evaluated channels of a token's own experts by index, and no others.

The rows of all experts are one matrix [E F, D], and a pair of a token and an expert has a list of
its channels in it: the CPU kernels read such a list for each pair, those of a TPU one for each
token. The counterpart of `moe.ragged`, which reads the experts that tokens go to whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.masked_mlp import ACTIVATIONS, NATIVE
from kernels_pallas.row_products import contract_rows, expand_rows, tpu_lists
from popjax.config import MoeConfig
from popjax.expert_partition import ExpertPartition
from popjax.nn.moe import Routes, weighted
from popjax.sparsity import Params

# The CPU kernels read a list of rows for each token, however many name the same expert: beyond so
# many pairs an expert, sorting them is faster.
_PAIRS_AN_EXPERT = 4
# The kernels that fetch rows of tiles one by one, and those run by the interpreter.
_TPU = ("pallas_tpu", "pallas_interpret")


def listing(
    implementation: str, tiled: bool, tokens: int, moe: MoeConfig, part: ExpertPartition | None
) -> str | None:
    """What a step of so many tokens reads by index; None where it reads experts whole.

    "evaluated": the rows R u C of each matrix. "chosen": of down only those that are on. tiled:
    whether experts are kept as tiles.
    """
    if implementation in NATIVE:
        few = tokens * moe.top_k <= _PAIRS_AN_EXPERT * moe.here
        return "evaluated" if few or implementation == "native" else None
    # Rows are read again for each token; experts whole, once for all that go there.
    if implementation not in _TPU or not tiled or part is None or part.in_order:
        return None
    unreached = (1 - moe.top_k / moe.num_experts) ** tokens
    whole = moe.num_experts * (1 - unreached) * part.expert_dim
    return "chosen" if tokens * moe.top_k * part.width < whole else None


@struct.dataclass
class Rows:
    """Channels of each pair's expert: numbers [N k, W] in w [E F, D], of which counts [N k] count.

    None of a pair that goes nowhere.
    """

    numbers: jax.Array
    counts: jax.Array

    def valid(self) -> jax.Array:
        """Which of the numbers count, bool [N k, W]."""
        return jnp.arange(self.numbers.shape[1], dtype=jnp.int32)[None, :] < self.counts[:, None]


def rows_of(
    routes: Routes, shape: tuple[int, ...], listed: jax.Array, counts: jax.Array | None = None
) -> Rows:
    """Rows of w, of shape [E, F, ...], whose channels are listed [1 or E, W], first counts [E]."""
    E, F = shape[:2]
    experts = routes.experts.reshape(-1)
    held = jnp.minimum(experts, E - 1)
    channels = listed if listed.shape[0] == 1 else listed[held]
    count = jnp.int32(listed.shape[1]) if counts is None else counts[held].astype(jnp.int32)
    return Rows(held[:, None] * F + channels, jnp.where(experts < E, count, 0))


def listed_channels(
    x: jax.Array, rows: Rows, weights: Params, activation: str, implementation: str = "native"
) -> jax.Array:
    """h [N k, W] of tokens x [N, D]; zeros where a row does not count."""
    matrices = [_flat(weights[name]) for name in ("gate", "up")]
    if implementation in NATIVE:
        pairs = jnp.repeat(x, rows.numbers.shape[0] // x.shape[0], axis=0)
        lists = (rows.numbers, rows.counts, "native")
        gate, up = (expand_rows(pairs, w, *lists) for w in matrices)
    else:
        # All experts of a token share its vector: one list.
        lists = (_by_token(rows.numbers, len(x)), _by_token(rows.valid(), len(x)))
        gate, up = tpu_lists.expand(x, matrices, *lists, interpret=_interpret(implementation))
    return (ACTIVATIONS[activation](gate) * up).reshape(rows.numbers.shape)


def listed_output(
    h: jax.Array,
    rows: Rows,
    routes: Routes,
    weights: Params,
    mask: jax.Array | None = None,
    implementation: str = "native",
) -> jax.Array:
    """Output [N, D] of h [N k, W], of which those in a mask [N k, W] are on, or all."""
    down = _flat(weights["down"])
    if implementation in NATIVE:
        h = h if mask is None else jnp.where(mask, h, jnp.zeros((), h.dtype))
        return weighted(contract_rows(h, down, rows.numbers, rows.counts, "native"), routes)
    on = rows.valid() if mask is None else rows.valid() & mask
    N, scale = routes.weights.shape[0], routes.weights.reshape(-1, 1)
    given = (_by_token(each, N) for each in (h.astype(jnp.float32) * scale, rows.numbers, on))
    scaled, numbers, on = given
    y = tpu_lists.contract(scaled, down, numbers, on, interpret=_interpret(implementation))
    return y.astype(h.dtype)


def _by_token(each: jax.Array, tokens: int) -> jax.Array:
    """[N k, W] of pairs as [N, k W] of tokens."""
    return each.reshape(tokens, -1)


def _interpret(implementation: str) -> bool:
    return implementation == "pallas_interpret"


def _flat(w: jax.Array) -> jax.Array:
    """w [E, F, ...] as [E F, ...]."""
    return w.reshape(-1, *w.shape[2:])
