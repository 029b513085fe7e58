"""A loaded model: text in, text out, with every by-product in one struct.

`load()` finds and reads a checkpoint; `LanguageModel.generate()` takes arguments named as in
transformers. The work happens in `run.py`; this file turns prompts into tokens and back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

import checkpoints
from popjax import text
from popjax.config import ModelConfig
from popjax.generate import Masks, Options
from popjax.gguf_tokenizer import end_token_ids, tokenizer_from_gguf
from popjax.listening import Listener
from popjax.loading import Source, open_source, read_params
from popjax.methods import METHODS, Method, method_name, method_named
from popjax.report import Report, make_report
from popjax.run import Request, run
from popjax.sampling import SamplingConfig
from popjax.sparsity import Params, Partitions

DEFAULT_NEW_TOKENS = 128
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns: one entry a row, in the order of the prompts.

    text: new text without special tokens; tokens: new token ids, end token included; finish_reason:
    "stop" (end token or stop string) or "length"; logprobs: natural log-probability of each new
    token under the model itself, before any filter; logits [B, n, V]; partition: a ChannelPartition
    a layer over the full F channels; masks [steps, B, R+C] bool a layer, in the order
    retained-then-candidate (channel order where R u C is everything). None where not asked for.
    """

    text: list[str]
    tokens: list[list[int]]
    finish_reason: list[str]
    logprobs: list[list[float]] | None
    logits: np.ndarray | None
    partition: Partitions | None
    masks: Masks | None
    report: Report


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Config, parameters and tokenizer of one checkpoint; see `load`."""

    name: str
    config: ModelConfig
    params: Params
    source: Source
    load_seconds: float

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer (transformers), made when first needed."""
        if self.source.folder is None:
            assert self.source.metadata is not None
            return tokenizer_from_gguf(self.source.metadata)
        return text.load_tokenizer(self.source.folder)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, from generation_config.json, else config.json, else the GGUF."""
        if self.source.metadata is not None:
            return end_token_ids(self.source.metadata)
        stated = self.source.generation.get("eos_token_id", self.source.raw.get("eos_token_id"))
        return _as_ids(stated)

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
        **method_options: Any,
    ) -> Generation:
        """Generate text for one prompt or many.

        prompts: a str, token ids, or a list of either; with `chat`, messages or lists of messages.
        method: a Method, or its name with its options (`method="online-pruning", ratio=0.5`).
        Unset sampling arguments come from generation_config.json. seed: one for all rows, or one a
        row, which makes a row independent of its batch. streamer: a callable taking new text, or
        an object with put(ids) and end(), for one row. partition and masks replay an earlier run.
        Raises ValueError for anything out of range before work begins.
        """
        prompt_ids = self.encode(prompts, chat=chat)
        sampling = self._sampling(
            {
                "do_sample": do_sample,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "min_new_tokens": min_new_tokens,
            }
        )
        rows = _repeated(prompt_ids, num_return_sequences, sampling)
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        eos_ids = self.eos_token_ids if eos_token_id is None else _as_ids(eos_token_id)
        listener = None
        if stops or streamer is not None:
            listener = Listener.for_rows(self.tokenizer, rows, stops, streamer, eos_ids)
        request = Request(
            prompts=rows,
            max_new_tokens=self._new_tokens(max_new_tokens, rows),
            method=_method(method, method_options),
            sampling=sampling,
            eos_ids=eos_ids,
            seed=seed,
            partition=partition,
            masks=masks,
            options=Options(return_logprobs, return_logits, record_masks, implementation),
            on_chunk=listener,
        )
        return self._finish(request, listener)

    def encode(self, prompts: Any, *, chat: bool = False) -> list[list[int]]:
        """Token ids of prompts in any accepted form. Raises ValueError for anything else."""
        if isinstance(prompts, str):
            prompts = [prompts]
        elif isinstance(prompts, np.ndarray | jax.Array):
            prompts = np.atleast_2d(np.asarray(prompts)).tolist()
        elif not isinstance(prompts, Iterable):
            raise ValueError(
                f"prompts {prompts!r} is neither text nor token ids: give a str, token ids, or a "
                "list of either"
            )
        prompts = list(prompts)
        if not prompts:
            raise ValueError("no prompts were given: give at least one")
        if isinstance(prompts[0], int | np.integer):
            prompts = [prompts]
        elif isinstance(prompts[0], dict):
            prompts, chat = [prompts], True
        if all(_is_ids(prompt) for prompt in prompts):
            return [[int(token) for token in prompt] for prompt in prompts]
        return text.encode_prompts(self.tokenizer, prompts, chat=chat)

    def _finish(self, request: Request, listener: Listener | None) -> Generation:
        result = run(self.params, self.config, request)
        rows = range(len(request.prompts))
        stopped = result.stopped.tolist()
        if listener is not None:
            listener.finish(result.tokens)
            result.counts = np.asarray([listener.count(row) for row in rows])
            stopped = [a or b for a, b in zip(stopped, listener.stopped, strict=True)]
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
            logits=result.logits,
            partition=result.partition,
            masks=result.masks,
            report=make_report(
                model=self.name,
                method=method_name(request.method),
                config=self.config,
                params=self.params,
                result=result,
                load_seconds=self.load_seconds,
                implementation=request.options.implementation,
            ),
        )

    def _sampling(self, given: dict[str, Any]) -> SamplingConfig:
        stated = {key: self.source.generation.get(key) for key in given}
        merged = {**stated, **{key: value for key, value in given.items() if value is not None}}
        idle = [key for key in _SAMPLING if given[key] is not None]
        if idle and not merged["do_sample"]:
            raise ValueError(
                f"{idle[0]} {given[idle[0]]} has no effect on greedy decoding: pass do_sample=True"
            )
        return SamplingConfig(**{key: value for key, value in merged.items() if value is not None})

    def _new_tokens(self, asked: int | None, rows: list[list[int]]) -> int:
        if asked is not None:
            return asked
        default = self.source.generation.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        return max(1, min(default, self.config.max_positions - max(map(len, rows))))

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder (safetensors, config, tokenizer) that transformers loads.

        Raises CheckpointError where `folder` exists and is not empty.
        """
        raw = {**self.source.raw, "dtype": self.params["embed"]["table"].dtype.name}
        rows = self.source.family.hf_rows
        files = text.tokenizer_files(self.tokenizer)
        tensors = checkpoints.export(self.params, rows)
        checkpoints.save_safetensors(folder, tensors, config=raw, extra_files=files)


def load(
    name: str | None = None,
    *,
    dtype: Any = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    check_tensors: bool = False,
) -> LanguageModel:
    """Load a model: a local folder, a .gguf file, a hub id, or the default model for None.

    dtype: "float32", "bfloat16" or "float16"; None is float32 on a CPU backend, bfloat16 elsewhere.
    check_tensors: refuse weights with NaN or infinities. Raises CheckpointError for missing or
    damaged files and ValueError for a model that popjax does not run.
    """
    source = open_source(
        name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
    )
    params, seconds = read_params(source, dtype=dtype, check_tensors=check_tensors)
    return LanguageModel(source.name, source.config, params, source, seconds)


def _as_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int | np.integer) else tuple(int(v) for v in value)


def _is_ids(prompt: Any) -> bool:
    if isinstance(prompt, str | dict):
        return False
    return all(isinstance(token, int | np.integer) for token in prompt)


def _repeated(prompts: list[list[int]], times: int, sampling: SamplingConfig) -> list[list[int]]:
    if times < 1:
        raise ValueError(f"num_return_sequences {times} is below 1: ask for at least one")
    if times > 1 and not sampling.do_sample:
        raise ValueError(
            f"num_return_sequences {times} of greedy decoding would be copies: pass do_sample=True"
        )
    return [prompt for prompt in prompts for _ in range(times)]


def _method(method: Method | str, options: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return method_named(method, **options)
    if not isinstance(method, Method):
        raise ValueError(f"method {method!r} is not a Method: use one of {', '.join(METHODS)}")
    if options:
        raise ValueError(
            f"{sorted(options)[0]!r} is not an argument of generate: give method options to the "
            "method itself, or name the method by a string"
        )
    return method


__all__ = ["Generation", "LanguageModel", "load"]
