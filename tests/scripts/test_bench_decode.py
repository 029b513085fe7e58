"""The decode benchmark end to end on tiny models: every section, its numbers, and its refusals."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import popjax
from kernels_pallas.native import measure
from popjax import axes
from popjax.families import model_config
from popjax.sparsity import channel_budget
from scripts import bench_decode, bench_llama_cpp, bench_native, peak_memory
from scripts.bench_models import LLAMA_1B, BenchModel, methods_at, random_model, tiny_twin

SHORT = ["--rounds", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--long-prompt-tokens", "32"]


def measured(folder: Path, out: Path, *arguments: str) -> dict[str, Any]:
    bench_decode.main(["--models", str(folder), "--json", str(out), *SHORT, *arguments])
    return json.loads(out.read_text())["models"][str(folder)]


def test_decode_ffn_and_prefill_sections(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = ("decode", "ffn", "prefill")
    found = measured(tiny_checkpoint, tmp_path / "bench.json", "--sections", *sections)
    assert list(found) == list(sections)
    shown = capsys.readouterr().out
    pruned = [name for name in methods_at(0.5) if name != "dense"]

    rows = {row["name"]: row for row in found["decode"]["methods"]}
    assert list(rows) == list(methods_at(0.5))
    for name in pruned:
        share = rows[name]["ratio_to_dense"]["median"] / rows[name]["bytes_ratio"]
        assert rows[name]["share_of_bytes_ratio"] == share
        assert len(found["ffn"][name]["ratio"]["rounds"]) == 2
        assert f"{name}: " in shown
    budget = channel_budget(48, 0.5, 0.05)
    assert found["ffn"]["online-pruning"]["ideal"] == 48 / (budget.retained + budget.candidate)
    assert found["ffn"]["frozen"]["ideal"] == 2.0 and found["ffn"]["rescore-all"]["ideal"] == 1.0
    parts = found["prefill"]["griffin"]
    for i in range(2):
        added = sum(parts[name]["rounds"][i] for name in ("observe", "plan", "pack"))
        assert parts["total"]["rounds"][i] == pytest.approx(added)
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.slow
def test_sections_of_the_cpu_kernels(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_READ", 2**16)
    monkeypatch.setattr(bench_native, "BATCHES", (1, 3))
    sections = ("bandwidth", "batch", "choosing")
    found = measured(tiny_checkpoint, tmp_path / "bench.json", "--sections", *sections)
    assert list(found) == list(sections)
    half, scattered = found["bandwidth"]["bfloat16"], found["bandwidth"]["40% of the rows"]
    assert half["bytes_ratio"] == 2.0 and 1 < scattered["bytes_ratio"] < 2
    assert len(half["share_of_reading"]["rounds"]) == 2
    assert list(found["batch"]) == ["1", "3"]
    shares = np.divide(found["choosing"]["choosing"]["rounds"], found["choosing"]["step"]["rounds"])
    assert found["choosing"]["share"]["rounds"] == pytest.approx(shares.tolist())


@pytest.mark.slow
@pytest.mark.weights
def test_the_yardstick_of_llama_cpp_holds_our_weights(default_model: Any, tmp_path: Path) -> None:
    target = tmp_path / "bfloat16.gguf"
    ours = BenchModel(default_model.source.raw, default_model.config, default_model.params)
    bench_llama_cpp.written(ours, target, bench_llama_cpp.KINDS["bfloat16"])
    again = popjax.load(str(target), dtype="bfloat16")
    assert again.config == default_model.config
    for path, leaf in jax.tree.leaves_with_path(again.params):
        mine = default_model.params
        for key in path:
            mine = mine[key.key]
        assert (np.asarray(leaf) == np.asarray(mine.astype(leaf.dtype))).all()


@pytest.mark.parity
def test_torch_is_timed_beside_popjax(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = measured(tiny_checkpoint, tmp_path / "bench.json", "--sections", "decode", "--torch")
    torch = found["decode"]["torch"]
    names = ["popjax", "popjax, bfloat16", "torch, 1 thread", "torch, 2 threads"]
    assert list(torch["step_seconds"]) == names
    best = min((torch["step_seconds"][name] for name in names[2:]), key=_median)
    ratios = np.divide(best["rounds"], torch["step_seconds"]["popjax"]["rounds"])
    assert torch["torch_over_popjax"]["rounds"] == pytest.approx(ratios.tolist())


def _median(values: dict[str, Any]) -> float:
    return values["median"]


def test_torch_is_asked_for_before_anything_is_measured(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--torch needs the package torch"):
        bench_decode.main(["--models", str(tiny_checkpoint), "--torch"])
    assert capsys.readouterr().out == ""


def test_peak_memory_is_measured_in_a_process_of_its_own(tiny_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "scripts.peak_memory", "--model", str(tiny_checkpoint)]
    command += ["--prompt-tokens", "8", "--new-tokens", "4", "--method", "frozen"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["packed"] == 2 * channel_budget(48, 0.5).active * 3 * 32 * 4
    # Python and jax alone hold more than 50 MB; this model is far from a gigabyte.
    assert 50e6 < found["peak"] < 1e9 and found["weights"] > found["cache"] > 0


def test_a_peak_that_the_system_does_not_tell_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t   2048 kB\n")
    assert peak_memory.peak_bytes(tmp_path / "status") == 2048 * 1024
    (tmp_path / "status").write_text("Name:\tpython\n")
    for name in ("status", "absent"):
        with pytest.raises(OSError, match="only be read on Linux"):
            peak_memory.peak_bytes(tmp_path / name)


def test_the_random_model_has_the_parameters_of_llama_3_2_1b() -> None:
    config = model_config(LLAMA_1B)
    assert axes.parameter_count(config) == 1_235_814_400


def test_random_models_are_complete_and_repeatable(tiny_checkpoint: Path) -> None:
    twin = tiny_twin(str(tiny_checkpoint))
    assert twin.config.num_layers == 2 and twin.config.layers[0].num_heads == 4
    assert (twin.config.embed_dim, twin.config.layers[0].mlp_dim) == (16, 64)
    again = random_model(twin.raw)
    for path, shape in axes.parameter_shapes(twin.config).items():
        first: Any = twin.params
        second: Any = again.params
        for key in path.split("/"):
            first, second = first[key], second[key]
        assert first.shape == shape and np.array_equal(np.asarray(first), np.asarray(second))
