"""`popjax plan` as a user meets it, with the real compiler in its own process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from popjax.cli import app
from popjax.families import model_config
from popjax.methods import GateFirst
from tests.popjax.published_models import SMOLLM2_135M

pytestmark = pytest.mark.aot
# Of a published model's widths, and few enough layers to compile in seconds.
SMALL = SMOLLM2_135M | {"num_hidden_layers": 4}


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Runs the command on a bare config.json: exit code, stdout and stderr apart."""

    def run(raw: dict[str, Any], *arguments: str) -> Any:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(raw))
        return CliRunner().invoke(app, ["plan", "--model", str(folder / "config.json"), *arguments])

    return run


def answered(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_plan_of_a_model_that_fits_one_chip(plan: Any) -> None:
    """Bytes add up, dense comes first, and the compiler's arguments are those counted."""
    facts = answered(plan(SMALL, "--target", "v5e", "--context", "1024", "--json"))
    dense, pruned = facts["forecasts"]
    assert [dense["method"], pruned["method"]] == ["dense", "online-pruning"]
    assert facts["fits"] and facts["nearest"] is None and facts["chips"] == 1
    assert facts["options"]["ratio"] == 0.5
    for forecast in (dense, pruned):
        assert forecast["prefill_held"]["weights"] == 2 * facts["parameter_count"]
        for phase in ("prefill", "decode"):
            assert sum(forecast[f"{phase}_held"].values()) == forecast["held_bytes"][phase]
        # The cache is handed back in place.
        assert forecast["decode"]["aliased"] >= forecast["decode_held"]["cache"] > 0
    assert dense["decode_held"]["packed"] == 0 < pruned["decode_held"]["packed"]
    assert pruned["tokens_per_second"] > dense["tokens_per_second"] > 0


def test_the_plan_of_gates_first(plan: Any) -> None:
    """It packs the rows of its gates, of all three matrices of all four layers."""
    options = ("--method", "gate-first", "--ratio", "0.5", "--context", "1024", "--json")
    _, pruned = answered(plan(SMALL, "--target", "v5e", *options))["forecasts"]
    (budget,) = set(GateFirst(0.5).budgets(model_config(SMALL)))
    assert pruned["decode_held"]["packed"] == 4 * 3 * budget.evaluated * 576 * 2


def test_the_plan_of_a_scout(plan: Any) -> None:
    """Nothing is packed; the copies of the inner two of four layers are held and read."""
    options = ("--method", "scout", "--ratio", "0.3", "--context", "1024", "--json")
    dense, pruned = answered(plan(SMALL, "--target", "v5e", *options))["forecasts"]
    copies = 2 * 2 * 1536 * (576 // 2 + 2 * 576 // 64)  # four bits, and a bfloat16 scale a group
    assert pruned["decode_held"]["packed"] == 0
    assert pruned["decode_held"]["weights"] == dense["decode_held"]["weights"] + copies
    # The compiler widens copies to sixteen bits, beside the step's own temporaries: not those of
    # both layers at a time.
    widened = 2 * 2 * 1536 * 576
    assert pruned["decode"]["temporaries"] < 2 * widened


def test_the_plan_of_six_bits_in_one_layer(plan: Any) -> None:
    """Of the inner two one has copies: three quarters of a byte a weight, and a scale a group."""
    options = ("--method", "scout", "--ratio", "0.1", "--context", "1024", "--json")
    form = ("--bits", "6", "--copied", "0.5")
    dense, pruned = answered(plan(SMALL, "--target", "v5e", *options, *form))["forecasts"]
    copies = 2 * 1536 * (576 * 6 // 8 + 2 * 576 // 64)
    assert pruned["decode_held"]["weights"] == dense["decode_held"]["weights"] + copies


def test_what_people_see(plan: Any) -> None:
    result = plan(SMALL, "--target", "v5e:2x2", "--method", "dense", "--context", "512")
    # Nine query heads over four chips.
    assert result.exit_code == 1
    assert "N = 9 (query heads" in result.stderr
    assert "the nearest that fits: --target v5e:1x1" in result.stderr
    result = plan(SMALL, "--target", "v5e:1x1", "--context", "512")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for words in ("packed rows", "temporaries", "program", "not measured", "Fits:", "tokens/s"):
        assert words in text


@pytest.mark.slow
def test_a_request_that_does_not_fit_leads_to_the_nearest_that_does(plan: Any) -> None:
    asked = ("--target", "v5e", "--batch", "256", "--json")
    result = plan(SMALL, "--context", "32768", *asked)
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    nearest = facts["nearest"]
    assert not facts["fits"] and nearest["context"] < 32768
    assert (nearest["batch"], nearest["target"]) == (256, "v5e:1x1")
    assert f"the nearest that fits: --context {nearest['context']}" in result.stderr
    # And it does.
    assert answered(plan(SMALL, "--context", str(nearest["context"]), *asked))["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "v7:2x2"), "names no known chip"),
        (("--target", "v5e:2x3"), "names no listed topology"),
        (("--target", "v5e", "--dtype", "int8"), "dtype 'int8' is not supported"),
        (("--target", "v5e", "--method", "magic"), "method 'magic' is unknown"),
    ],
)
def test_wrong_usage_ends_at_once(plan: Any, arguments: tuple[str, ...], message: str) -> None:
    result = plan(SMALL, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("\u2502", " ").split())


def test_a_context_beyond_the_model_is_refused(plan: Any) -> None:
    result = plan(SMALL, "--target", "v5e", "--context", "65536")
    assert result.exit_code == 1
    assert "is above the model's longest, 32768" in result.stderr


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    for model in (tmp_path / "config.json", tmp_path, tmp_path / "absent.json"):
        result = CliRunner().invoke(app, ["plan", "--model", str(model), "--target", "v5e"])
        assert result.exit_code == 1
        assert result.stderr.startswith("popjax: error: ")
