"""The fixtures and options of all tests.

helpers sets the environment that transformers and datasets read: what is imported before it must not import them.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helpers import (
    ROOT,
    SABOTAGE,
    accelerate_launch,
    all_started,
    config_tree,
    forget_accelerator,
    tiny_model,
    tiny_tokenizer,
    write_rows,
)
from train_strided import main


def pytest_addoption(parser):
    help = "how often test_distributed.py kills a run of each configuration"
    parser.addoption("--kills", type=int, default=1, help=help)


@pytest.fixture(autouse=True)
def cpu_alone(monkeypatch):
    """One thread (tiny matrices on several only wait for each other), and no accelerator state of another test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny llama with its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """40 documents of different lengths out of the licence (a text that does not change): rows with the column text."""
    text = " ".join((ROOT / "LICENSE").read_text().split())
    rows = [{"text": text[index * 200 :][: 16 + 8 * (index * 7 % 13)]} for index in range(40)]
    return write_rows(tmp_path_factory.mktemp("data") / "documents.jsonl", rows)


@pytest.fixture
def write_config(tmp_path, model_folder, text_file):
    """Writes a small complete configuration, with changes by dotted key, and returns its path."""

    def write(**changes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config_tree(model_folder, text_file, tmp_path / "run", **changes)))
        return path

    return write


@pytest.fixture
def run_script():
    """Runs a script of the project as a user does, in its own process."""
    python = (sys.executable,)

    def run(script: str, *arguments, launcher: tuple[str, ...] = python, timeout: float = 300):
        command = [*launcher, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)

    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `train_strided.py ARGUMENTS`, returns (exit code, stderr). An exception that would be a traceback fails."""

    def run(*arguments) -> tuple[int, str]:
        forget_accelerator()
        monkeypatch.setattr(sys, "argv", ["train_strided.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "train_strided.py"), run_name="__main__")
            code = 0
        except SystemExit as stop:  # what the interpreter does with it: a text goes to stderr, and the exit code is 1
            code = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def refused(command):
    """The one message of a run that must be refused."""

    def run(*arguments) -> str:
        code, stderr = command(*arguments)
        assert code != 0, f"accepted; stderr: {stderr}"
        assert "Traceback" not in stderr
        messages = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, stderr
        assert stderr.rstrip().endswith(messages[0])  # nothing after it
        return messages[0]

    return run


@pytest.fixture
def train(write_config, tmp_path):
    """train(NAME, "train.max_steps=4", lora={...}, train__seed=1): runs the script in this process.

    Returns its output folder.
    """

    def run(name: str, *overrides: str, **changes) -> Path:
        forget_accelerator()
        folder = tmp_path / name
        file = write_config(**{"eval__num_documents": 0, **changes})
        main(["--cfg", str(file), f"train.output_dir={folder}", *overrides])
        return folder

    return run


@pytest.fixture
def start(tmp_path):
    """start("ddp", FILE, override, ..): the real command, on 2 processes of the named accelerate config.

    Without a launcher where that is None. Nothing of it outlives the test.

    sabotage: Python that runs in each process before the script, with `rank` and `at_step(3, action)`.
    """
    started, two = [], ("--num_processes", "2")

    def run(config: str | None, file: Path, *overrides: str, options: tuple = two, sabotage: str = "", on_cpu=True):
        command = [sys.executable] if config is None else accelerate_launch(config, *options)
        if config in ("fsdp2", "multi_node") and on_cpu:
            command.append(str(ROOT / "tests" / "fsdp2_on_cpu.py"))
        if sabotage:
            (tmp_path / "sabotage.py").write_text(SABOTAGE.format(root=str(ROOT), sabotage=sabotage))
            command.append(str(tmp_path / "sabotage.py"))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "STARTED_BY": str(tmp_path)}
        if not on_cpu:
            del environment["ACCELERATE_USE_CPU"]
        output = tmp_path / f"output-{len(started)}.txt"
        with output.open("w") as stream:
            command += [str(ROOT / "train_strided.py"), "--cfg", str(file), *overrides]
            places = dict(stdout=stream, stderr=stream, cwd=ROOT, env=environment)
            process = subprocess.Popen(command, start_new_session=True, **places)
        process.output = output
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
    for process in all_started(tmp_path):
        process.kill()
