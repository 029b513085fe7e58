"""Whether a request fits a target, and the nearest one that does: the process behind `popjax plan`.

    python -m popjax.planning < request.json

The compiler wants environment variables set before jax is imported, so `ask` compiles in a process
of its own and this one stays as it is. Answers come as JSON lines. Leaves out reading a model's
files and printing for people: that is `cli/plan.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from popjax import config as configs
from popjax.ahead_of_time import Forecast, Workload, forecast, weights_and_cache
from popjax.buckets import bucket
from popjax.methods import Method, method_name, method_named
from popjax.targets import parse_target

# A shorter context than this is no help to anyone who asked for more.
SHORTEST_CONTEXT = 1024
# How many requests of each kind are compiled in search of one that fits.
_TRIES = 3
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # There is no TPU to ask about, nor one to hold against other processes.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
Say = Callable[[str], None]


def ask(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """The plan of a request (plain JSON values both), made in another process.

    `say` hears what is being compiled. Raises ValueError for a request that makes no sense or
    lacks its compiler, RuntimeError with its last words where the process ends without an answer.
    """
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **_ENVIRONMENT}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "popjax.planning"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            return _answer(process, request, say, log)
        finally:
            process.kill()
            process.wait()


def _answer(
    process: subprocess.Popen[str], request: dict[str, Any], say: Say, log: IO[str]
) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    # A process that ended before it read says why in its last words.
    with contextlib.suppress(BrokenPipeError), process.stdin:
        json.dump(request, process.stdin)
    with process.stdout:
        for line in process.stdout:
            ((kind, value),) = json.loads(line).items()
            if kind == "plan":
                return value
            if kind == "error":
                raise ValueError(value)
            say(value)
    code = process.wait()
    log.seek(0)
    words = [line.strip() for line in log if line.strip()]
    last = f": {words[-1][:300]}" if words else ""
    raise RuntimeError(f"the compiler's process ended with code {code} and no answer{last}")


def main() -> None:
    """Answer the request on standard input; see `ask`."""
    # What a compiler prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(kind: str, value: Any) -> None:
        print(json.dumps({kind: value}, allow_nan=False), file=answers, flush=True)

    request = json.load(sys.stdin)
    try:
        tell("plan", planned(request, lambda text: tell("status", text)))
    except (ValueError, ImportError) as error:
        tell("error", str(error))


def planned(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """The plan of a request: forecasts of dense decoding and the method, and the nearest that fits.

    request: config (as `config.to_json` gives it), method (name) and options of it, target,
    context, batch, new_tokens, dtype. Raises ValueError as Workload and Layout do.
    """
    fields = {name: request[name] for name in ("context", "batch", "new_tokens", "dtype")}
    workload = Workload(
        config=configs.from_json(request["config"]),
        method=method_named(request["method"], **request["options"]),
        target=parse_target(request["target"]),
        **fields,
    )
    _check_shared(workload, say)
    wanted = [workload]
    if type(workload.method) is not Method:
        wanted.insert(0, dataclasses.replace(workload, method=Method()))
    forecasts = [_forecast(one, say) for one in wanted]
    nearest = None if forecasts[-1].fits else nearest_fit(workload, forecasts[-1], say)
    return {
        "chips": workload.target.chips,
        "chip": dataclasses.asdict(workload.target.chip),
        "slots": workload.slots,
        "forecasts": [_facts(one) for one in forecasts],
        "fits": forecasts[-1].fits,
        "nearest": None if nearest is None else _request_facts(nearest),
    }


def _check_shared(workload: Workload, say: Say) -> None:
    """Raise ValueError, with a topology that does it, where these chips cannot share the model."""
    try:
        weights_and_cache(workload)
    except ValueError as error:
        target = workload.target
        others = [
            dataclasses.replace(workload, target=other)
            for other in (*target.smaller(), *target.larger())
        ]
        other = _first_fit((one for one in others if _sizes(one)), say)
        if other is None:
            raise
        raise ValueError(f"{error}; the nearest that fits: --target {other.target}") from error


def _sizes(workload: Workload) -> tuple[int, int] | None:
    """`weights_and_cache`, None where these chips cannot share the model."""
    try:
        return weights_and_cache(workload)
    except ValueError:
        return None


def _first_fit(candidates: Iterable[Workload], say: Say) -> Workload | None:
    """The first of a few that fits when compiled."""
    for candidate in itertools.islice(candidates, _TRIES):
        if _forecast(candidate, say).fits:
            return candidate
    return None


def _forecast(workload: Workload, say: Say) -> Forecast:
    say(
        f"Compiling {method_name(workload.method)} for {workload.target}, "
        f"{workload.context} tokens, batch {workload.batch}"
    )
    return forecast(workload)


def _facts(forecast: Forecast) -> dict[str, Any]:
    held = {"prefill": forecast.prefill_held, "decode": forecast.decode_held}
    return {
        **dataclasses.asdict(forecast),
        "held_bytes": {name: one.total for name, one in held.items()},
        "peak": forecast.peak,
        "fits": forecast.fits,
    }


def _request_facts(workload: Workload) -> dict[str, Any]:
    return {
        "target": str(workload.target),
        "context": workload.context,
        "batch": workload.batch,
    }


def nearest_fit(workload: Workload, asked: Forecast, say: Say) -> Workload | None:
    """The nearest request that fits, compiled to be sure; None where none of those listed does.

    First a shorter context, then a smaller batch, then more chips of the same kind.
    """
    for candidates in (_shorter(workload), _smaller(workload), _larger(workload)):
        found = _first_fit((one for one in candidates if _likely(one, workload, asked)), say)
        if found is not None:
            return found
    return None


def _shorter(workload: Workload) -> Iterator[Workload]:
    """The same with the contexts that fill a smaller bucket of prompt slots, longest first."""
    slots, smaller = workload.prompt_slots, []
    size = bucket(1)
    while size < slots:
        smaller.append(size)
        size = bucket(size + 1)
    for size in reversed(smaller):
        context = size + workload.new_tokens
        if context >= min(SHORTEST_CONTEXT, workload.context):
            yield dataclasses.replace(workload, context=context)


def _smaller(workload: Workload) -> Iterator[Workload]:
    batch = workload.batch
    while batch > 1:
        batch //= 2
        yield dataclasses.replace(workload, batch=batch)


def _larger(workload: Workload) -> Iterator[Workload]:
    for target in workload.target.larger():
        yield dataclasses.replace(workload, target=target)


def _likely(candidate: Workload, workload: Workload, asked: Forecast) -> bool:
    """Whether a request could fit: its arrays, and temporaries in proportion to those asked for."""
    sizes = _sizes(candidate)
    if sizes is None:
        return False
    weights, cache = sizes

    def work(one: Workload) -> float:
        return one.batch * one.prompt_slots / one.target.chips

    held = asked.decode_held
    kept = (held.weights + held.packed) * weights / held.weights
    beyond = asked.peak - held.weights - held.packed - held.cache
    return kept + cache + beyond * work(candidate) / work(workload) <= asked.usable


if __name__ == "__main__":
    main()
