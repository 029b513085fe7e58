"""Files of channel statistics: written, read back, refused where they do not belong; the CLI."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import popjax
from checkpoints import CheckpointError
from popjax.calibration.measuring import measure
from popjax.calibration.statistics import load_statistics, save_statistics
from popjax.cli import app
from popjax.methods import WandaSP
from popjax.run import run
from tests.calibration.calibrated import (
    config_of,
    file_of,
    params_of,
    prompts,
    reference,
    request,
    statistics_of,
)
from tests.popjax.tiny_models import CONFIGS, random_params

PROMPT = "The quick brown fox jumps over the lazy dog, again and again, until it is dark."


def test_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    params, config, found = params_of("llama"), config_of("llama"), statistics_of("llama")
    path = save_statistics(tmp_path / "again", found, params, config, "noise")
    for layer, other in zip(found, load_statistics(path, params, config), strict=True):
        pairs = zip(layer.arrays(), other.arrays(), strict=True)
        assert all(a == b and (x == y).all() for (a, x), (b, y) in pairs)


def test_another_model_is_refused() -> None:
    other = random_params(config_of("llama"), seed=1)
    asked = request("llama", "wanda-sp")
    with pytest.raises(CheckpointError, match="channel statistics of another model .*calibrate ch"):
        run(other, config_of("llama"), asked)


def test_what_is_not_such_a_file_is_refused(tmp_path: Path) -> None:
    params, config = params_of("llama"), config_of("llama")
    with pytest.raises(CheckpointError, match="is not a file: give one of kind 'channel-st"):
        load_statistics(tmp_path / "none", params, config)
    (tmp_path / "text").write_text("no statistics")
    with pytest.raises(CheckpointError):
        load_statistics(tmp_path / "text", params, config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("layer_1/mean"), r"'layer_1/mean' of shape None, this model needs \(40,"),
        (lambda a: a.update(odd=np.zeros(2, np.float32)), r"'odd' of shape \(2,\).*needs None"),
        (lambda a: a["layer_0/energy"].fill(np.nan), "'layer_0/energy' has values that are not fi"),
    ],
)
def test_damaged_statistics_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    arrays = load_file(file_of("llama"))
    with safe_open(file_of("llama"), framework="np") as opened:
        about = opened.metadata()
    change(arrays)
    save_file(arrays, tmp_path / "damaged", metadata=about)
    with pytest.raises(CheckpointError, match=words):
        load_statistics(tmp_path / "damaged", params_of("llama"), config_of("llama"))


@pytest.mark.parametrize("given", [[], [[1, 2], [3]]])
def test_prompts_of_different_lengths_are_refused(given: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="give at least one, all of one length"):
        measure(params_of("llama"), config_of("llama"), given)


def test_mixtures_and_weights_that_overflow_are_refused() -> None:
    mixture = CONFIGS["qwen2_moe"]
    with pytest.raises(ValueError, match="has experts"):
        measure({}, mixture, prompts())
    params = params_of("llama")
    huge = {**params, "layer_1": {**params["layer_1"], "mlp": {
        name: w * 1e30 for name, w in params["layer_1"]["mlp"].items()}}}  # fmt: skip
    with pytest.raises(ValueError, match="shows on the prompts is not finite"):
        measure(huge, config_of("llama"), prompts(1))


def test_a_report_counts_what_thresholds_let_through() -> None:
    """The kernels read up and down of open gates alone, for one row; without masks: at most all."""
    from popjax.report import layer_reports

    found = reference("llama", "chess")
    assert found.masks is not None
    for masks, spares in ((found.masks, True), (None, False)):
        layers = layer_reports(config_of("llama"), found.partition, 4, True, False, masks)
        for layer, mask in zip(layers, found.masks, strict=True):
            on = round(float(np.mean(np.asarray(mask).sum(axis=-1)))) if spares else layer.channels
            assert layer.active == on
            assert layer.read_bytes == 4 * 32 * (layer.channels + 2 * on)
    masked = layer_reports(config_of("llama"), found.partition, 4, False, False, found.masks)
    assert all(layer.read_bytes == layer.dense_bytes for layer in masked)


def test_channels_are_calibrated_and_used_from_the_command_line(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def command(name: str, *arguments: str) -> Any:
        return CliRunner().invoke(app, [name, "--model", str(tiny_checkpoint), *arguments])

    text, out = tmp_path / "text.txt", tmp_path / "channels.safetensors"
    text.write_text(PROMPT * 3, encoding="utf-8")
    few = ("--samples", "2", "--prompt-tokens", "12")
    measured = command("calibrate", "channels", "--text", str(text), "-o", str(out), *few)
    assert measured.exit_code == 0, measured.stderr
    assert str(out) in measured.stdout
    asked = ("--ratio", "0.5", "--max-new-tokens", "4", "--json")
    result = command("generate", PROMPT, "--method", "chess", "--statistics", str(out), *asked)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    assert report["method"] == "chess"
    assert report["totals"]["read_bytes"] < report["totals"]["dense_bytes"]
    model = popjax.load(str(tiny_checkpoint))
    method = WandaSP(0.5, str(out))
    called = model.generate(PROMPT, method=method, max_new_tokens=4)
    assert called.report.totals().active == sum(y.mlp_dim // 2 for y in model.config.layers)
    for wrong, words in (
        (("--method", "flap"), "'flap' needs statistics"),
        (("--statistics", str(out)), "--statistics: statistics are for a method"),
        (("--method", "frozen", "--statistics", str(out)), "no option 'statistics'"),
    ):
        result = command("generate", PROMPT, *asked, *wrong)
        assert result.exit_code == 2 and words in " ".join(result.stderr.split()), result.stderr


def test_dropped_layers_take_their_statistics_with_them() -> None:
    """What is left of a model is pruned as those layers of the whole one are."""
    from popjax.depth import ShortGPT

    asked = request("llama", "wanda-sp")
    whole = reference("llama", "wanda-sp").partition
    narrow = run(params_of("llama"), config_of("llama"), dataclasses.replace(
        asked, depth=ShortGPT(layers=(0,)))).partition  # fmt: skip
    assert whole is not None and narrow is not None and len(narrow) == 1
    assert narrow[0].retained.tolist() == whole[1].retained.tolist()
