"""The benchmarks start and end, at their smallest sizes. Guards against scripts that nobody runs for months."""

import json
import sys

import pytest

import bench_layouts
import bench_strided
import bench_tokenising
from helpers import ROOT


def test_strided(monkeypatch, capsys):
    options = "--shape tiny --device cpu --sequence-length 24 --samples 2 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["bench_strided.py", *options.split()])
    bench_strided.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["setting"]["anchors"] == 2 and set(result["seconds"]) == {"ours", "copied", "forward_backward"}
    assert result["speedup"] > 0 and result["step_over_fwd_bwd"] > 0


@pytest.mark.parametrize("way", ["all at once", "streamed"])
def test_tokenising(way, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_tokenising, "reset_peak", lambda: None)  # of the process of all tests
    text = (ROOT / "LICENSE").read_text()
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text[start : start + 2000]}) + "\n" for start in (0, 2000, 4000)))
    bench_tokenising.measure(str(path), way)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["way"] == way and 1000 < result["tokens"] < 2000


def test_layouts(model_folder, capsys):
    """Each layout in a process of its own, and the ratios of the two."""
    options = "--prompts 2 --samples 2 --prompt 6 --completion 4 --repetitions 1"
    bench_layouts.main(["--model", str(model_folder), *options.split()])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines.keys() == {"generation", "features", "training", "step", "proof", "memory"}
    assert all(float(cells[-1]) > 0 for cells in lines.values()) and lines["memory"][2] == "GB"
