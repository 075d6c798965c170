"""The command line is checked before a script imports torch: each script, the three ways it can end."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT

SCRIPTS = {"train_strided.py": "raw_text", "train_structured.py": "quickstart", "serve_vllm.py": "structured"}
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("exit", stop.code)
print("torch" in sys.modules)
"""


def run(script: str, *arguments: str, **environment: str) -> tuple[list[str], str]:
    """Lines on stdout, with the exit code and whether torch was imported; stderr."""
    command = [sys.executable, "-c", RUN, script, *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | environment
    )
    return result.stdout.splitlines(), result.stderr


@pytest.mark.parametrize("script, name", SCRIPTS.items())
def test_a_mistake_costs_no_import(script, name):
    """Guards against ten seconds until a typo is named."""
    lines, stderr = run(script, "--cfg", f"examples/{name}.yaml", "train.max_stps=3")
    assert lines == ["exit error: command line: train.max_stps: unknown key; did you mean train.max_steps?", "False"]
    assert stderr == ""
    lines, _ = run(script, "--cfg", f"examples/{name}.yaml", "--print-config")
    assert "model:" in lines and lines[-2:] == ["exit None", "False"]


def test_one_process_of_a_machine_speaks():
    for arguments, code in ((["train.max_stps=3"], "exit 1"), (["--print-config"], "exit None")):
        lines, stderr = run("train_strided.py", "--cfg", "examples/raw_text.yaml", *arguments, LOCAL_RANK="1")
        assert lines == [code, "False"] and stderr == ""


def test_the_first_line_says_what_begins(tmp_path):
    """It comes before the imports, so before the refusal that needs them."""
    folder = tmp_path / "run"
    lines, stderr = run(
        "train_strided.py", "--cfg", "examples/raw_text.yaml", f"train.output_dir={folder}", "model.name_or_path=./none"
    )
    first, *rest = stderr.splitlines()
    assert first == f"strided mode: ./none on python_stdlib, into {folder}; loading torch .."
    assert lines[-1] == "True" and lines[0].startswith("exit error: model.name_or_path: the folder ./none")
