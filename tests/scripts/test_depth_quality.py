"""The scripts about skipped layers: cases, tables and files, on a tiny model from its folder."""

import json
from pathlib import Path

import pytest

from scripts import bench_prefill, depth_quality

TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. " * 8


def test_every_ablation_is_scored(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "depth.json"
    text.write_text(TEXT, encoding="utf-8")
    few = ["--windows", "2", "--prefix", "16", "--scored", "4", "--skip", "0.5"]
    given = ["--text", str(text), "--json", str(out), "--model", str(tiny_checkpoint)]
    depth_quality.main([*given, *few])
    results = json.loads(out.read_text())["results"]
    names = [result["method"] for result in results]
    assert names == ["dense", *depth_quality.cases(0.5, (1,), None)]
    assert all(len(result["windows"]) == 2 for result in results)
    assert results[0]["difference"] == 0 and results[1]["difference"] != 0
    # Of two layers the first and every second are different ones, the last and the latter not.
    by_name = {result["method"]: result["windows"] for result in results}
    assert by_name["last"] == by_name["every"] != by_name["first"]
    assert "| last, no entries | 0.5 |" in capsys.readouterr().out
    assert len(depth_quality.cases(0.5, (1,), 0.2)) == 9


def test_times_stand_beside_what_flops_allow(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prefill.json"
    few = ["--contexts", "24", "--rounds", "1", "--skip", "0.5", "--json", str(out)]
    bench_prefill.main(["--model", str(tiny_checkpoint), *few])
    found = json.loads(out.read_text())["contexts"]["24"]
    assert 1 < found["ideal"] < 2 and found["share"] > 0
    assert "FLOPs allow" in capsys.readouterr().out
