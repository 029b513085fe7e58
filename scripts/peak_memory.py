"""Peak resident memory of loading a model and running it once, as one line of JSON. Linux only.

    python -m scripts.peak_memory --model default --method online-pruning

A process's peak cannot be reset, so every measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from popjax.report import weight_bytes
from popjax.run import Request, run
from scripts.bench_models import DEFAULT, methods_at, named_model, random_prompt, tiny_twin


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most bytes this process has ever held. Raises OSError where the system does not tell."""
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{status} states no VmHWM: peak memory can only be read on Linux")


def measure(asked: argparse.Namespace) -> dict[str, int]:
    """Bytes: this process's peak after one run, and what weights, cache and packed rows took."""
    model = (tiny_twin if asked.tiny else named_model)(asked.model)
    prompt = random_prompt(model.config, asked.prompt_tokens)
    method = methods_at(asked.ratio)[asked.method]
    result = run(model.params, model.config, Request([prompt], asked.new_tokens, method=method))
    return {
        "peak": peak_bytes(),
        "weights": weight_bytes(model.params),
        "cache": result.cache_bytes,
        "packed": result.packed_bytes,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--tiny", action="store_true", help="as deep a model, of tiny widths")
    parser.add_argument("--method", choices=list(methods_at(0.5)), default="online-pruning")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    print(json.dumps(measure(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
