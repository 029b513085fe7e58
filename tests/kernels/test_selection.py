"""Which channels are chosen: the kernels and XLA against NumPy, and one against the other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.masked_mlp import POINTS, Selection, choose, masked_mlp, native, select_top

EPS = 2.0**-23
FORMS = {"xla": select_top, "native": native.select_top}
# Op by op, XLA would compile each of a dozen anew for every shape.
compiled = {name: jax.jit(function, static_argnums=1) for name, function in FORMS.items()}


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Masks of the `count` largest, of equal ones the first: a stable sort of each row."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40)
@given(
    # Both sides of the size up to which XLA compares all pairs, and more than one piece of work.
    size=st.sampled_from([1, 2, 7, 255, 256, 257, 300, 2500]),
    rows=st.sampled_from([1, 3]),
    share=st.sampled_from([0.0, 0.01, 0.4, 0.99, 1.0]),
    values=st.sampled_from(["few", "zeros", "normal", "tiny", "infinite", "alike"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_largest_scores_ties_to_the_first(
    form: str, size: int, rows: int, share: float, values: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = np.abs(rng.standard_normal((rows, 1, size))).astype(np.float32)
    if values == "few":
        scores = np.round(scores)
    elif values == "zeros":
        scores[rng.random(scores.shape) < 0.7] = 0
    elif values == "tiny":  # down to subnormal numbers
        scores *= np.float32(1e-41)
    elif values == "infinite":
        scores[rng.random(scores.shape) < 0.3] = np.inf
    elif values == "alike":
        scores[:] = 1.5
    count = round(share * size)
    mask = np.asarray(compiled[form](jnp.asarray(scores), count))
    assert mask.shape == scores.shape and mask.dtype == bool
    assert (mask == largest(scores, count)).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_edges_of_a_digit(form: str) -> None:
    # Scores whose bits differ in one place only, at every place.
    bits = np.concatenate([[0], 1 << np.arange(30), (1 << np.arange(1, 31)) - 1]).astype(np.uint32)
    scores = np.random.default_rng(0).permutation(bits).view(np.float32)
    scores = scores[np.isfinite(scores)]
    for count in range(len(scores) + 1):
        mask = np.asarray(FORMS[form](jnp.asarray(scores), count))
        assert (mask == largest(scores, count)).all()


def test_no_scores_at_all() -> None:
    for form in FORMS.values():
        assert form(jnp.zeros((2, 0)), 0).shape == (2, 0)


def layer(seed: int, B: int, E: int, D: int) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, 1, D))
    weights = (rng.standard_normal((E, D)) / np.sqrt(D) for _ in range(3))
    return tuple(jnp.asarray(array, jnp.float32) for array in (x, *weights))


def activations(x: Any, gate: Any, up: Any, point: str) -> np.ndarray:
    x, gate, up = (np.asarray(array, np.float64) for array in (x, gate, up))
    g = x @ gate.T
    return g / (1 + np.exp(-g)) * (x @ up.T if point == "product" else 1.0)


@st.composite
def selections(draw: Any) -> tuple[int, int, Selection]:
    """Batch, channels, and a selection of any kind among them."""
    B, E = draw(st.integers(1, 6)), draw(st.sampled_from([1, 5, 63, 301]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    C = draw(st.sampled_from(sorted({0, 1, E // 2, E})))
    listed, weighted, by_threshold = (draw(st.booleans()) for _ in range(3))
    return (
        B,
        E,
        Selection(
            candidate=jnp.asarray(rng.permutation(E)[:C], jnp.int32) if listed else None,
            weight=jnp.asarray(rng.random(C) + 0.1, jnp.float32) if weighted else None,
            threshold=jnp.asarray(rng.random(C), jnp.float32) if by_threshold else None,
            num_candidate=C,
            k_selected=draw(st.sampled_from(sorted({0, min(1, C), C // 3, C}))),
            shared=draw(st.booleans()),
            point=draw(st.sampled_from(POINTS)),
        ),
    )


@pytest.mark.parametrize("implementation", ["xla", "native"])
@settings(max_examples=30)
@given(problem=selections(), seed=st.integers(0, 2**16))
def test_a_mask_is_a_valid_choice(
    implementation: str, problem: tuple[int, int, Selection], seed: int
) -> None:
    B, E, selection = problem
    arrays = layer(seed, B, E, 33)
    run = functools.partial(masked_mlp, activation="silu", implementation=implementation)
    out, mask = jax.jit(run)(*arrays, selection=selection)
    assert mask is not None and mask.shape == (1 if selection.shared else B, 1, E)
    a = np.abs(activations(*arrays[:3], point=selection.point))
    places = np.asarray(selection.places(E))
    score = a[..., places]
    if selection.shared:
        score = np.sqrt((score**2).sum(0, keepdims=True))
    if selection.weight is not None:
        score = score * np.asarray(selection.weight, np.float64)
    off = 100 * EPS * (1 + score)
    retained = np.ones(E, bool)
    retained[places] = False
    on = np.asarray(mask)
    assert on[..., retained].all()
    chosen = on[..., places]
    if selection.threshold is not None:
        limit = np.asarray(selection.threshold, np.float64)
        assert (chosen | (score <= limit + off)).all()
        assert (~chosen | (score > limit - off)).all()
    else:
        assert (chosen.sum(-1) == selection.k_selected).all()
        least = np.where(chosen, score + off, np.inf).min(-1, initial=np.inf)
        most = np.where(chosen, -np.inf, score - off).max(-1, initial=-np.inf)
        assert (least >= most).all()
    h = np.where(on, activations(*arrays[:3], point="product"), 0)
    wanted = h @ np.asarray(arrays[3], np.float64)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=10 * EPS * (33 + E))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_channels_that_are_equal_go_by_their_order(
    implementation: str, listed: bool, point: str
) -> None:
    x, gate, up, down = layer(0, 2, 40, 17)
    gate, up = (jnp.broadcast_to(w[:1], w.shape) for w in (gate, up))
    candidate = np.random.default_rng(0).permutation(40)[:20] if listed else np.arange(20, 40)
    selection = Selection(
        candidate=jnp.asarray(candidate, jnp.int32) if listed else None,
        num_candidate=20,
        k_selected=7,
        point=point,
    )
    _, mask = masked_mlp(
        x, gate, up, down, activation="silu", selection=selection, implementation=implementation
    )
    on = np.ones((2, 1, 40), bool)
    on[..., candidate[7:]] = False
    assert (np.asarray(mask) == on).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_the_kernels_choose_what_xla_chooses(point: str, shared: bool) -> None:
    # Scores far enough apart that a rounding cannot reorder them: channel i is 1.05 ** i strong.
    x, gate, up, down = layer(3, 3, 101, 19)
    strength = 1.05 ** np.random.default_rng(0).permutation(101)
    gate, up = jnp.abs(gate[:1]), jnp.asarray(strength[:, None], jnp.float32) * up[:1]
    gate = gate * jnp.asarray(strength[:, None], jnp.float32)
    selection = Selection(num_candidate=70, k_selected=33, shared=shared, point=point)
    options = {"activation": "relu", "selection": selection}
    x = jnp.abs(x)
    _, by_xla = masked_mlp(x, gate, up, down, **options, implementation="xla")
    out, by_kernel = masked_mlp(x, gate, up, down, **options, implementation="native")
    assert by_kernel is not None and (np.asarray(by_kernel) == np.asarray(by_xla)).all()
    a = jax.nn.relu(jnp.einsum("BTD,ED->BTE", x, gate))
    assert (np.asarray(choose(a, selection)) == np.asarray(by_kernel)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("by", ["rank", "threshold"])
def test_a_replayed_mask_gives_the_same_bits(by: str, point: str, shared: bool, dtype: str) -> None:
    arrays = [array.astype(dtype) for array in layer(4, 6, 301, 67)]
    limit = jnp.full((200,), 0.3) if by == "threshold" else None
    selection = Selection(
        threshold=limit, num_candidate=200, k_selected=71, shared=shared, point=point
    )
    options = {"activation": "gelu_tanh", "implementation": "native"}
    out, mask = masked_mlp(*arrays, selection=selection, **options)
    assert mask is not None and 101 < np.asarray(mask)[0].sum() < 301
    for again in (None, selection):
        replayed, used = masked_mlp(*arrays, selection=again, given=mask, **options)
        assert used is mask
        assert np.asarray(replayed).tobytes() == np.asarray(out).tobytes()


def test_thresholds_are_data() -> None:
    arrays, traces = layer(5, 2, 100, 16), []

    @jax.jit
    def run(arrays: Any, threshold: jax.Array) -> Any:
        traces.append(0)
        selection = Selection(threshold=threshold, num_candidate=100)
        return masked_mlp(*arrays, activation="silu", selection=selection, implementation="native")

    counts = []
    for limit in (-1.0, 0.1, 0.3, 1e9):
        out, mask = run(arrays, jnp.full((100,), limit))
        counts.append(int(mask.sum()))
        wanted, _ = masked_mlp(*arrays, activation="silu", given=mask)
        np.testing.assert_allclose(out, wanted, rtol=0, atol=10 * EPS * 116)
    assert counts[0] == 200 > counts[1] > counts[2] > counts[3] == 0
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("selection", "complaint"),
    [
        (Selection(candidate=jnp.array([3, 8])), r"candidate 8 is outside 0\.\.7"),
        (Selection(candidate=jnp.array([-1])), r"candidate -1 is outside 0\.\.7"),
        (Selection(candidate=jnp.array([5, 2, 5])), "candidate 5 is named twice"),
        (Selection(num_candidate=3, k_selected=4), "more candidates to keep than there are"),
        (Selection(num_candidate=3, weight=jnp.ones(4)), "each candidate a float32 weight"),
        (Selection(num_candidate=3, threshold=jnp.ones(2)), "each candidate a float32"),
        (Selection(num_candidate=3, weight=jnp.ones(3, jnp.bfloat16)), "candidate a float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_chosen_is_refused(selection: Selection, complaint: str) -> None:
    arrays = layer(0, 1, 8, 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"popjax: .*{complaint}"):
        jax.block_until_ready(native.masked_mlp(*arrays, activation="silu", selection=selection))
