"""Layout changes against their formulas, and both ways round."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import TRANSFORMS

N, H, D, F = 3, 4, 5, 6


def values(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: [N*H, ...] with halves interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(
    ("name", "source", "target", "at"),
    [
        ("same", (D,), (D,), lambda s, n, h, d: (s[d], d)),
        ("split", (N * H, D), (N, H, D), lambda s, n, h, d: (s[n * H + h, d], (n, h, d))),
        ("split", (N * H,), (N, H), lambda s, n, h, d: (s[n * H + h], (n, h))),
        ("transpose", (D, F), (F, D), lambda s, n, h, d: (s[d, n], (n, d))),
        ("transpose_split", (D, N * H), (N, H, D), lambda s, n, h, d: (s[d, n * H + h], (n, h, d))),
        (
            "transpose_each",
            (N, D, H),
            (N, H, D),
            lambda s, n, h, d: (s[n, d, h], (n, h, d)),
        ),
        # Row 2 j + half of a stored head is row half * H/2 + j of ours.
        (
            "unpermute_split",
            (N * H, D),
            (N, H, D),
            lambda s, n, h, d: (s[n * H + 2 * (h % (H // 2)) + h // (H // 2), d], (n, h, d)),
        ),
        (
            "unpermute_split",
            (N * H,),
            (N, H),
            lambda s, n, h, d: (s[n * H + 2 * (h % (H // 2)) + h // (H // 2)], (n, h)),
        ),
    ],
)
def test_element_by_element(name, source, target, at):
    transform = TRANSFORMS[name]
    stored = values(*source)
    assert transform.source_shape(target) == source
    ours = transform.forward(stored, target)
    assert ours.shape == target
    for n in range(N):
        for h in range(H):
            for d in range(D):
                value, where = at(stored, n, h, d)
                assert ours[where] == value
    np.testing.assert_array_equal(transform.inverse(ours), stored)


@pytest.mark.parametrize("trailing", [(D,), ()])
def test_unpermute_undoes_llama_cpp(trailing):
    weight = values(N * H, *trailing)
    transform = TRANSFORMS["unpermute_split"]
    ours = transform.forward(llama_cpp_permute(weight, N), (N, H, *trailing))
    np.testing.assert_array_equal(ours, weight.reshape(N, H, *trailing))
    np.testing.assert_array_equal(transform.inverse(ours), llama_cpp_permute(weight, N))


@given(
    name=st.sampled_from(sorted(TRANSFORMS)),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4).map(lambda n: 2 * n), st.integers(1, 5)),
    rank=st.integers(2, 3),
)
def test_round_trip(name, sizes, rank):
    rank = {"transpose": 2, "transpose_split": 3, "transpose_each": 3}.get(name, rank)
    target, transform = sizes[:rank], TRANSFORMS[name]
    source = values(*transform.source_shape(target))
    ours = transform.forward(source, target)
    assert ours.shape == target
    back = transform.inverse(ours)
    assert back.shape == source.shape
    np.testing.assert_array_equal(back, source)


@pytest.mark.parametrize(
    ("name", "target", "match"),
    [
        ("split", (4,), "rank 2 or 3, got shape \\(4,\\)"),
        ("transpose", (1, 2, 3), "rank 2, got"),
        ("transpose_split", (1, 2), "rank 3, got"),
        ("transpose_each", (1, 2), "rank 3, got"),
        ("unpermute_split", (2, 3), "even H, got shape \\(2, 3\\)"),
    ],
)
def test_wrong_target(name, target, match):
    with pytest.raises(ValueError, match=match):
        TRANSFORMS[name].source_shape(target)
