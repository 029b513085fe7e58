"""lm-eval's tasks: run on data of this disk, and one sentence where one cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from popjax.cli import app
from popjax.evaluation import harness
from popjax.evaluation.harness import check_data, task_manager
from tests.evaluation.conftest import ITEMS

CHOICE = """\
task: popjax_pets
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
WORDS = """\
task: popjax_words
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: context
metric_list:
  - metric: word_perplexity
metadata:
  version: 1
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of task descriptions whose data lies beside them."""
    data = tmp_path / "data.jsonl"
    items = [item for item in ITEMS if item["context"]]
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in (("pets", CHOICE), ("words", WORDS)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    missing = CHOICE.format(data=tmp_path / "nowhere.jsonl").replace("popjax_pets", "popjax_gone")
    (tmp_path / "gone.yaml").write_text(missing)
    return tmp_path


def run(long_checkpoint: Path, *arguments: str) -> Any:
    given = ["eval", "--model", str(long_checkpoint), "--offline", *arguments]
    return CliRunner().invoke(app, given)


def test_its_tasks_run_on_our_model(tasks: Path, long_checkpoint: Path) -> None:
    data, out = tasks / "data.jsonl", tasks / "out.jsonl"
    named = f"popjax_pets,popjax_words,{data}"
    given = ("--ratio", "0.5", "--include-path", str(tasks), "--out", str(out), "--json")
    result = run(long_checkpoint, "--tasks", named, *given)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["results"]
    found = {(row["task"], row["metric"], row["case"]): row for row in rows}
    for case in ("dense", "online-pruning ratio 0.5"):
        # One scorer under both: lm-eval counts the same hits on the same items.
        ours, theirs = (found[task, "acc", case] for task in ("data", "popjax_pets"))
        assert theirs["from_lm_eval"] and not ours["from_lm_eval"]
        assert theirs["value"] == ours["value"]
        assert theirs["difference_from_dense"] == ours["difference_from_dense"]
        words = found["popjax_words", "word_perplexity", case]["value"]
        assert words["n"] == 3 and words["mean"] > 1 and words["standard_error"] > 0
    again = run(long_checkpoint, "--tasks", named, *given)
    assert json.loads(again.stdout) == json.loads(result.stdout)


def test_unknown_tasks_and_missing_data_are_one_sentence(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    # Its thousands of files take seconds to read, and have no part in this.
    kind = lm_eval.tasks.TaskManager

    def few(**given: Any) -> Any:
        return kind(**{**given, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    manager = task_manager(["popjax_gone"], tasks)
    with pytest.raises(ValueError, match="data of task 'popjax_gone' cannot be had here"):
        check_data(manager, ["popjax_gone"])
    with pytest.raises(ValueError, match="'popjax_pet' is unknown .* nearest is 'popjax_pets'"):
        task_manager(["popjax_pet"], tasks)
    with pytest.raises(ValueError, match="there is no folder"):
        task_manager(["popjax_pets"], tasks / "nowhere")


def test_without_lm_eval_the_extra_is_named(
    long_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    result = run(long_checkpoint, "--tasks", "hellaswag")
    assert result.exit_code == 1
    assert "pip install 'popjax[eval]', or give a .jsonl file" in " ".join(result.stderr.split())
