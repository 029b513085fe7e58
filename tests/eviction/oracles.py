"""Every eviction method written out in NumPy float64, one prompt and one head after the other.

Explicit attention matrices, explicit projected values, sorting by Python. Each oracle takes a
prompt of n tokens, a budget of entries a head, and returns which entries stay, bool [L, K, n].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.eviction.prompts import Heads, Prompt

EPS = 2.0**-23


def rounding(layers: Prompt) -> float:
    """Relative error that float32 may make of a score.

    An attention score is a sum of H products of at most `size` in all, in the exponent; weights
    are then summed over n keys and n queries, values projected by H * D products.
    """
    size = max(abs(x.q).max() * math.sqrt(x.q.shape[-1]) * abs(x.k).max() for x in layers)
    heads, H, D = layers[0].o.shape
    n = layers[0].q.shape[0]
    return EPS * (2 * (H + 8) * size + 2 * n + heads + H * D + 32)


def attention(heads: Heads, last: int, window: int | None = None) -> np.ndarray:
    """Causal attention [N, last, n] of the last queries over all keys."""
    q, k = heads.q.astype(np.float64), heads.k.astype(np.float64)
    n = q.shape[0]
    last = min(last, n)
    out = np.zeros((q.shape[1], last, n))
    for h in range(q.shape[1]):
        for i in range(last):
            at = n - last + i
            low = 0 if window is None else max(0, at - window + 1)
            row = k[h // heads.queries, low : at + 1] @ q[at, h] / math.sqrt(q.shape[2])
            weights = np.exp(row - row.max())
            out[h, i, low : at + 1] = weights / weights.sum()
    return out


def projected(heads: Heads, h: int) -> np.ndarray:
    """Values [n, D] of the KV head of query head h after W_O."""
    return heads.v[h // heads.queries].astype(np.float64) @ heads.o[h].astype(np.float64)


def group(heads: Heads, g: int) -> range:
    """The query heads of KV head g."""
    return range(g * heads.queries, (g + 1) * heads.queries)


def smoothed(x: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` neighbours of the last axis, zeros counted beyond the ends."""
    around = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(width // 2, width // 2)])
    return np.stack([around[..., i : i + width].mean(-1) for i in range(x.shape[-1])], -1)


def top(scores: np.ndarray, count: int, tolerance: float = 0.0) -> np.ndarray:
    """The `count` largest of any shape, ties to the lower index; none may be near the cut."""
    flat = scores.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-flat[i], i))
    if tolerance and 0 < count < flat.size:
        taken, left = flat[order[count - 1]], flat[order[count]]
        assert taken - left > 2 * tolerance * taken, "a near tie decides nothing: other numbers"
    chosen = np.zeros(flat.size, bool)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape)


def beside(candidates: np.ndarray, first: int, n: int) -> np.ndarray:
    """Candidates [L, K, c] from token `first` on, among n tokens of which the others stay."""
    keep = np.ones((*candidates.shape[:2], n), bool)
    keep[:, :, first : first + candidates.shape[2]] = candidates
    return keep


def snapkv_scores(layers: Prompt, window: int, pooling: int) -> np.ndarray:
    """[L, K, n - window]: mean over window and group, smoothed before the group is averaged."""
    scores = []
    for heads in layers:
        mass = attention(heads, window)[:, :, :-window].mean(1)
        by_head = smoothed(mass, pooling)
        scores.append([by_head[list(group(heads, g))].mean(0) for g in range(len(heads.k))])
    return np.asarray(scores)


def per_head(scores: np.ndarray, counts: Sequence[int], tolerance: float) -> np.ndarray:
    """Scores [L, K, c], the same number in every head of a layer."""
    pairs = zip(scores, counts, strict=True)
    return np.stack([np.stack([top(head, c, tolerance) for head in x]) for x, c in pairs])


def snapkv(layers: Prompt, budget: int, window: int, pooling: int) -> np.ndarray:
    n = layers[0].q.shape[0]
    scores = snapkv_scores(layers, window, pooling)
    counts = [budget - window] * len(layers)
    return beside(per_head(scores, counts, rounding(layers)), 0, n)


def pyramidkv(layers: Prompt, budget: int, window: int, pooling: int, beta: int) -> np.ndarray:
    n, L, mean = layers[0].q.shape[0], len(layers), budget - window
    most = min(2 * mean - mean / beta, n - window)
    counts = [math.floor(most - i * 2 * (most - mean) / (L - 1) + 0.5) for i in range(L // 2)]
    counts += [mean] * (L % 2) + [2 * mean - count for count in reversed(counts)]
    scores = snapkv_scores(layers, window, pooling)
    return beside(per_head(scores, counts, rounding(layers)), 0, n)


def ada(scores: np.ndarray, count: int, floor: float, tolerance: float) -> np.ndarray:
    """One layer's scores [K, c]: each head's best floor * count, then the best of all heads."""
    sure = np.stack([top(head, int(count * floor), tolerance) for head in scores])
    raised = np.where(sure, np.inf, scores)
    return top(raised, count * len(scores), 0.0 if count * floor >= 1 else tolerance)


def adakv(layers: Prompt, budget: int, window: int, pooling: int, floor: float = 0.2) -> np.ndarray:
    scores = snapkv_scores(layers, window, pooling)
    chosen = [ada(layer, budget - window, floor, rounding(layers)) for layer in scores]
    return beside(np.stack(chosen), 0, layers[0].q.shape[0])


def criticalkv(layers: Prompt, budget: int, window: int, pooling: int, scope: str) -> np.ndarray:
    count, found = budget - window, []
    for heads, scores in zip(layers, snapkv_scores(layers, window, pooling), strict=True):
        counts = [count] * len(scores)
        if scope == "layer":
            counts = ada(scores, count, 0.2, rounding(layers)).sum(1).tolist()
        rows = []
        for g, (score, kept) in enumerate(zip(scores, counts, strict=True)):
            norms = [abs(projected(heads, h)).sum(1)[:-window] for h in group(heads, g)]
            first = top(score, kept // 2, rounding(layers))
            second = np.where(first, -1, (score + 1e-4) * np.mean(norms, 0))
            rows.append(first | top(second, kept - kept // 2, rounding(layers)))
        found.append(rows)
    return beside(np.asarray(found), 0, layers[0].q.shape[0])


def tova(layers: Prompt, budget: int) -> np.ndarray:
    n, found = layers[0].q.shape[0], []
    for heads in layers:
        mass = attention(heads, 1)[:, 0, :-1].mean(0)
        found.append([top(mass, budget - 1, rounding(layers))] * len(heads.k))
    return beside(np.asarray(found), 0, n)


def summed(heads: Heads) -> np.ndarray:
    """Attention [K, n] that keys get from all queries, averaged over the query heads of each."""
    whole = attention(heads, heads.q.shape[0]).sum(1)
    return np.stack([whole[list(group(heads, g))].mean(0) for g in range(len(heads.k))])


def h2o(layers: Prompt, budget: int, window: int, recent: float = 0.5) -> np.ndarray:
    n = layers[0].q.shape[0]
    latest = max(window, int(budget * recent))
    scores = np.stack([summed(heads)[:, : n - latest] for heads in layers])
    return beside(per_head(scores, [budget - latest] * len(layers), rounding(layers)), 0, n)


def prefixkv(layers: Prompt, budget: int, sinks: int = 4, window: int = 1) -> np.ndarray:
    """The threshold by bisection on the share; layers that jump together go lower layer first."""
    n, count = layers[0].q.shape[0], budget - sinks - window
    scores = np.stack([summed(heads).mean(0)[sinks : n - window] for heads in layers])
    shares = np.cumsum(np.sort(scores, axis=1)[:, ::-1], axis=1)
    shares /= shares[:, -1:]
    before = np.concatenate([np.zeros((len(layers), 1)), shares[:, :-1]], axis=1)
    wanted = count * len(layers)
    low, high = 0.0, 1.0 + 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (before < middle).sum() <= wanted else (low, middle)
    counts = (before < low).sum(1)
    for i in range(len(layers)):
        counts[i] += min(wanted - counts.sum(), scores.shape[1] - counts[i], 1)
    assert counts.sum() == wanted
    chosen = per_head(np.stack([scores] * len(layers[0].k), 1), counts.tolist(), rounding(layers))
    return beside(chosen, sinks, n)


def streaming(layers: Prompt, budget: int, sinks: int = 4) -> np.ndarray:
    n = layers[0].q.shape[0]
    keep = np.zeros((len(layers), len(layers[0].k), n), bool)
    keep[:, :, :sinks] = keep[:, :, n - (budget - sinks) :] = True
    return keep
