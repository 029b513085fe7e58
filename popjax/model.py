"""A loaded model: text in, text out, with every by-product in one struct.

`load()` finds and reads a checkpoint; `LanguageModel.generate()` takes arguments named as in
transformers. The work happens in `run.py`; this file turns prompts into tokens and back.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import checkpoints
from popjax import arguments, sharding, text
from popjax.cache import Kept
from popjax.config import ModelConfig
from popjax.context import Context, load_context
from popjax.depth import DepthMethod
from popjax.eviction import KvMethod, KVzip
from popjax.eviction.gates import without_gates
from popjax.fingerprint import fingerprint
from popjax.generate import Masks, Options
from popjax.gguf_tokenizer import end_token_ids, tokenizer_from_gguf
from popjax.listening import Listener
from popjax.loading import Source, open_source, read_params
from popjax.methods import Method, method_name
from popjax.prefilling import make_context
from popjax.report import Report, make_report
from popjax.run import Request, run
from popjax.scouts import check_saved
from popjax.sparsity import Params, Partitions
from popjax.tiles import as_matrices, tiled_placer


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns: one entry a row, in the order of the prompts.

    text: new text without special tokens; tokens: new token ids, end token included; finish_reason:
    "stop" (end token or stop string) or "length"; logprobs: natural log-probability of each new
    token under the model itself, before any filter; logits [B, n, V]; partition: a ChannelPartition
    a layer over the full F channels; masks [steps, B, R+C] bool a layer, in the order
    retained-then-candidate (channel order where R u C is everything). None where not asked for.
    kept: the cache entries that an eviction left of the prompt, None where all stayed.
    """

    text: list[str]
    tokens: list[list[int]]
    finish_reason: list[str]
    logprobs: list[list[float]] | None
    logits: np.ndarray | None
    partition: Partitions | None
    masks: Masks | None
    report: Report
    kept: Kept | None = None


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Config, parameters and tokenizer of one checkpoint, and the mesh it runs on; see `load`."""

    name: str
    config: ModelConfig
    params: Params
    source: Source
    load_seconds: float
    mesh: Mesh | None = None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer (transformers), made when first needed."""
        if self.source.folder is None:
            assert self.source.metadata is not None
            return tokenizer_from_gguf(self.source.metadata)
        return text.load_tokenizer(self.source.folder)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this model from others; its contexts carry it."""
        return fingerprint(self.params, self.config)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, from generation_config.json, else config.json, else the GGUF."""
        if self.source.metadata is not None:
            return end_token_ids(self.source.metadata)
        stated = self.source.generation.get("eos_token_id", self.source.raw.get("eos_token_id"))
        # Published files name end tokens beyond a model's own vocabulary; such never come.
        ids = arguments.end_ids(stated, "the checkpoint")
        return tuple(token for token in ids if token < self.config.vocab_size)

    def generate(
        self,
        prompts: Any,
        *,
        method: Method | str = "dense",
        chat: bool = False,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_return_sequences: int = 1,
        seed: int | Sequence[int] = 0,
        stop_strings: str | Sequence[str] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        return_logprobs: bool = False,
        return_logits: bool = False,
        record_masks: bool = False,
        partition: Partitions | None = None,
        masks: Masks | None = None,
        streamer: Any = None,
        implementation: str | None = None,
        pack: bool = True,
        kv: KvMethod | str | None = None,
        kv_keep: float | None = None,
        kv_tokens: int | None = None,
        context: Context | None = None,
        kv_every: int | None = None,
        prefill_chunk: int | None = None,
        depth: DepthMethod | str | None = None,
        skip: float | None = None,
        **method_options: Any,
    ) -> Generation:
        """Generate text for one prompt or many.

        prompts: a str, token ids, or a list of either; with `chat`, messages or lists of messages.
        method: a Method, or its name with its options (`method="online-pruning", ratio=0.5`).
        Unset sampling arguments come from generation_config.json. seed: one for all rows, or one a
        row, which makes a row independent of its batch. streamer: a callable taking new text, or
        an object with put(ids) and end(), for one row. partition and masks replay an earlier run.
        pack: False fetches rows by index instead of packing them (kernels of an accelerator).
        kv: what of the prompt stays in the cache, a KvMethod, or its name with the share kv_keep or
        the number kv_tokens of entries a head. context: what `prefill` made, which every prompt
        continues. kv_every: evict again after so many new tokens. prefill_chunk: run prompts so
        many tokens at a time, which bounds memory. depth: layers that prompts skip, a DepthMethod,
        or its name with the share `skip` of them. Raises ValueError for anything out of range
        before work begins.
        """
        context = self._own(context)
        prompt_ids = self.encode(prompts, chat=chat, begin=context is None)
        # A folder without a tokenizer fails here, not after the work is done.
        tokenizer, stated = self.tokenizer, self.source.generation
        before = 0 if context is None else len(context.tokens)
        room = self.config.max_positions - before - max(map(len, prompt_ids))
        new = arguments.new_tokens(max_new_tokens, stated.get("max_new_tokens"), room)
        given = {
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "min_new_tokens": min_new_tokens,
        }
        sampling = arguments.merged_sampling(given, stated, new)
        rows = arguments.repeated(prompt_ids, num_return_sequences, sampling)
        eos_ids = self.eos_token_ids
        if eos_token_id is not None:
            eos_ids = arguments.given_end_ids(eos_token_id, self.config.vocab_size)
        listener = None
        if stop_strings or streamer is not None:
            stops = [stop_strings] if isinstance(stop_strings, str) else stop_strings or []
            listener = Listener.for_rows(tokenizer, rows, stops, streamer, eos_ids)
        request = Request(
            prompts=rows,
            max_new_tokens=new,
            method=arguments.chosen_method(method, method_options),
            sampling=sampling,
            eos_ids=eos_ids,
            seed=seed,
            partition=partition,
            masks=masks,
            options=Options(return_logprobs, return_logits, record_masks, implementation, pack),
            on_chunk=listener,
            eviction=self.eviction_method(kv, kv_keep, kv_tokens),
            context=context,
            prefill_chunk=prefill_chunk,
            evict_every=kv_every,
            depth=arguments.chosen_depth(depth, skip),
        )
        return self._finish(request, listener)

    def prefill(
        self,
        prompt: Any,
        *,
        chat: bool = False,
        kv: KvMethod | str | None = None,
        kv_keep: float | None = None,
        kv_tokens: int | None = None,
        prefill_chunk: int | None = None,
        depth: DepthMethod | str | None = None,
        skip: float | None = None,
    ) -> Context:
        """Run one prompt once, keep what `kv` says of its cache, for many calls of `generate`.

        The entries are chosen before any question is known. Arguments as in `generate`; without
        `kv` every entry stays. With `depth` its last token runs every layer. Raises
        ValueError for more than one prompt.
        """
        rows = self.encode(prompt, chat=chat)
        if len(rows) != 1:
            raise ValueError(f"a context is one prompt, {len(rows)} were given: prefill each alone")
        request = Request(
            rows,
            1,
            eviction=self.eviction_method(kv, kv_keep, kv_tokens),
            prefill_chunk=prefill_chunk,
            depth=arguments.chosen_depth(depth, skip),
        )
        return make_context(self.params, self.config, request)

    def load_context(self, path: str | os.PathLike[str]) -> Context:
        """A context that `Context.save` wrote. Raises CheckpointError unless it is this model's."""
        dtype = self.params["embed"]["table"].dtype
        return load_context(path, self.config, self.fingerprint, dtype)

    def eviction_method(
        self, kv: KvMethod | str | None, keep: float | None, tokens: int | None
    ) -> KvMethod | None:
        """The eviction method meant; one that asks the model in words gets them as tokens."""
        method = arguments.chosen_eviction(kv, keep, tokens)
        if isinstance(method, KVzip) and not method.instruction_ids:
            return method.worded(lambda words: self.encode(words, begin=False)[0])
        return method

    def _own(self, context: Context | None) -> Context | None:
        """The context. Raises ValueError for one of another model."""
        if context is None:
            return None
        if not isinstance(context, Context):
            raise ValueError(f"context is a {type(context).__name__}: give what prefill() returns")
        if context.fingerprint != self.fingerprint:
            raise ValueError("context is of another model: prefill it with this one")
        return context

    def encode(self, prompts: Any, *, chat: bool = False, begin: bool = True) -> list[list[int]]:
        """Token ids of prompts in any accepted form. Raises ValueError for anything else.

        Without `begin` texts get no token that starts one: they continue another.
        """
        if isinstance(prompts, np.ndarray | jax.Array):
            prompts = np.atleast_2d(np.asarray(prompts)).tolist()
        prompts, chat = arguments.prompt_list(prompts, chat)
        if all(arguments.is_ids(prompt) for prompt in prompts):
            return [[int(token) for token in prompt] for prompt in prompts]
        return text.encode_prompts(self.tokenizer, prompts, chat=chat, begin=begin)

    def _finish(self, request: Request, listener: Listener | None) -> Generation:
        result = run(self.params, self.config, request)
        rows = range(len(request.prompts))
        stopped = result.stopped.tolist()
        if listener is not None:
            listener.finish(result.tokens)
            result.counts = np.asarray([listener.count(row) for row in rows])
            stopped = [a or b for a, b in zip(stopped, listener.stopped, strict=True)]
        kept = int(np.max(result.counts))
        tokens = [result.tokens[row, : result.counts[row]].tolist() for row in rows]
        texts = listener.texts if listener else [text.decode(self.tokenizer, row) for row in tokens]
        logprobs = None
        if result.logprobs is not None:
            logprobs = [result.logprobs[i, : len(tokens[i])].tolist() for i in rows]
        return Generation(
            text=texts,
            tokens=tokens,
            finish_reason=["stop" if end else "length" for end in stopped],
            logprobs=logprobs,
            logits=None if result.logits is None else result.logits[:, :kept],
            partition=result.partition,
            masks=None if result.masks is None else tuple(m[: kept - 1] for m in result.masks),
            report=make_report(
                model=self.name,
                method=method_name(request.method),
                config=self.config,
                params=self.params,
                result=result,
                load_seconds=self.load_seconds,
            ),
            kept=result.kept,
        )

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder (safetensors, config, tokenizer) that transformers loads.

        Raises CheckpointError where `folder` exists and is not empty, ValueError for a scout in it.
        """
        check_saved(self.params)
        raw = {**self.source.raw, "dtype": self.params["embed"]["table"].dtype.name}
        rows = self.source.family.hf_rows
        files = text.tokenizer_files(self.tokenizer)
        # Every end token, a GGUF's too, so that the reloaded model stops where this one does.
        stated = {**self.source.generation, "eos_token_id": list(self.eos_token_ids) or None}
        files["generation_config.json"] = json.dumps(stated, indent=2).encode()
        params = without_gates(as_matrices(self.params))
        tensors = checkpoints.export(params, rows)
        checkpoints.save_safetensors(folder, tensors, config=raw, extra_files=files)


def load(
    name: str | os.PathLike[str] | None = None,
    *,
    dtype: Any = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    check_tensors: bool = False,
    mesh: Mesh | None = None,
    tiles: bool | None = None,
) -> LanguageModel:
    """Load a model: a local folder, a .gguf file, a hub id, or the default model for None.

    dtype: "float32", "bfloat16" or "float16"; None is float32 on a CPU backend, bfloat16 elsewhere.
    check_tensors: refuse weights with NaN or infinities. mesh: run on these devices, each holding
    its share of the heads, FFN channels and vocabulary: axis "model", and "group" beside it for
    more devices than key/value heads (see `popjax.sharding`). tiles: keep the rows of FFN matrices
    as whole tiles, which lets TPU kernels fetch them one by one; None does so on TPUs. Raises
    CheckpointError for missing or damaged files and ValueError for a model that popjax does not
    run, or not on this mesh.
    """
    source = open_source(
        name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
    )
    place = None if mesh is None else sharding.placer(source.config, mesh)
    mesh = None if mesh is None else sharding.automatic(mesh)
    if tiles or (tiles is None and jax.default_backend() == "tpu"):
        place = tiled_placer(place or (lambda path, array: jax.device_put(array)))
    params, seconds = read_params(source, dtype=dtype, check_tensors=check_tensors, place=place)
    return LanguageModel(source.name, source.config, params, source, seconds, mesh)


__all__ = ["Generation", "LanguageModel", "load"]
