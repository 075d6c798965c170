"""Tiny real parts for the tests: models and a tokenizer that transformers saves and loads, made on the spot; no network."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
CACHE = tempfile.TemporaryDirectory(prefix="ebft-tests-")  # no tokens of an earlier day, and none left behind
os.environ["HF_DATASETS_CACHE"] = CACHE.name

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(ROOT))

import train_strided

TINY = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)


def tiny_model(model_type: str = "llama", **changes):
    """A random causal LM of a real architecture; the same weights in every call."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**TINY, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, with an end-of-document and a pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name (model.NAME, optimizer.NAME.exp_avg, ..), whole, whatever number of processes wrote them."""
    reader = dcp.FileSystemReader(checkpoint / "state")
    found = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    dcp.load(tensors, storage_reader=reader)
    return tensors


def logged(folder: Path) -> list[dict]:
    """The objects of metrics.jsonl, strictly JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training(folder: Path) -> list[dict]:
    """The numbers of training steps, without the one that differs from run to run."""
    names = {name for entry in logged(folder) for name in entry if not name.startswith("eval/")} - {
        "train/tokens_per_second"
    }
    return [{name: entry[name] for name in entry if name in names} for entry in logged(folder) if "train/loss" in entry]


def evaluations(folder: Path) -> list[dict]:
    """The evaluations, each with its step."""
    return [
        {name: entry[name] for name in entry if name == "step" or name.startswith("eval/")}
        for entry in logged(folder)
        if "eval/cross_entropy" in entry
    ]


def steps_of(folder: Path) -> list[int]:
    """The steps that metrics.jsonl has, in its order."""
    return [entry["step"] for entry in logged(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "final").glob("*model.safetensors")
    return load_file(file)


def assert_same_weights(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 1e-5, share: float = 0.0
) -> None:
    """share: of weights that may differ by more. AdamW divides by the gradient's size, so where that is nearly 0 its rounding decides the update."""
    assert first.keys() == second.keys()
    gaps = torch.cat([(tensor - second[name]).abs().flatten() for name, tensor in first.items()])
    assert (gaps > tolerance).double().mean().item() <= share, f"largest gap {gaps.max():.3g}"


def assert_equal_weights(first: Path, second: Path) -> None:
    """To the last bit."""
    assert_same_weights(weights(first), weights(second), tolerance=0.0)


def assert_close_runs(first: Path, second: Path, tolerance: float = 1e-5, share: float = 0.0) -> None:
    """Same trained weights, and the same logged numbers to 1e-5 (but the share of valid anchors: how much padding there is depends on the batch)."""
    assert_same_weights(weights(first), weights(second), tolerance, share)
    for left, right in zip(logged(first), logged(second), strict=True):
        assert left.keys() == right.keys()
        names = left.keys() - {"ebft/valid_anchors", "train/tokens_per_second"}
        assert {
            name: (left[name], right[name])
            for name in names
            if not math.isclose(left[name], right[name], rel_tol=1e-5, abs_tol=1e-5)
        } == {}


def assert_trained(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Guards the tests themselves: two runs that both train nothing would always be equal."""
    assert max((tensor - start[name]).abs().max().item() for name, tensor in weights(folder).items()) > 1e-4


def assert_holds(message: str, *words) -> None:
    """Paths are looked for in the whole message, words and numbers outside of absolute paths (pytest-48/ is no sequence length of 48)."""
    bare = re.sub(r"(?<![\w.])/[^\s'\":,;)]+", "", message)
    missing = [str(word) for word in words if str(word) not in (message if isinstance(word, Path) else bare)]
    assert not missing, f"{missing} not in {message!r}"


WAIT = 150  # seconds that anything may take on a busy machine
SABOTAGE = """
import os, resource, runpy, signal, sys
sys.path.insert(0, {root!r})
from ebft_utils.algorithm import losses
from ebft_utils.run import checkpoint
rank, scored, num_calls = int(os.environ["RANK"]), losses.policy_gradient_loss, 0


def at_step(step, action):
    def loss(*arguments):
        global num_calls
        num_calls += 1
        return (action() if num_calls == step else 1.0) * scored(*arguments)
    losses.policy_gradient_loss = loss


{sabotage}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def all_started(folder: Path) -> list[psutil.Process]:
    """The processes of a test's launches: workers are in sessions of their own, and may have lost their launcher."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("STARTED_BY") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None, process.output.read_text()[-3000:]
        assert time.monotonic() < deadline, f"waited {WAIT} s\n{process.output.read_text()[-3000:]}"
        time.sleep(0.02)


def end_of(process: subprocess.Popen, within: float = WAIT) -> tuple[int, str]:
    """Exit code and output."""
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not ended after {within} s\n{process.output.read_text()[-3000:]}")
    return process.returncode, process.output.read_text()


def error_of(output: str) -> str:
    """The one message."""
    messages = sorted({line for line in re.split(r"[\r\n]+", output) if line.startswith("error: ")})
    assert len(messages) == 1, f"{messages}\n{output[-3000:]}"
    return messages[0]


def config_tree(model_folder: Path, text_file: Path, output_dir: Path, **changes) -> dict:
    """A small complete configuration, with changes by dotted key (train__seed=1) or section (lora={"r": 4})."""
    tree = {
        "model": {"name_or_path": str(model_folder)},
        "data": {"dataset": str(text_file), "sequence_length": 48, "on_bad_row": "skip"},
        "ebft": {"n_samples_per_prompt": 3, "generate_max_len": 4, "stride": 4, "context_length": 4},
        "train": {
            "output_dir": str(output_dir),
            "max_steps": 3,
            "batch_size": 2,
            "per_device_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 0,
        },
        "eval": {"num_documents": 4},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value
    return tree


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=1, help="how often test_distributed.py kills a run of each configuration"
    )


@pytest.fixture(autouse=True)
def cpu_alone(monkeypatch):
    """One thread (tiny matrices on several only wait for each other), and no accelerator state left from another test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny llama with its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """40 documents of different lengths out of the licence (a text that does not change), as JSON lines with the column text."""
    text = " ".join((ROOT / "LICENSE").read_text().split())
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text[index * 200 :][: 16 + 8 * (index * 7 % 13)]}) + "\n" for index in range(40))
    )
    return path


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

    def run(
        script: str, *arguments: str, launcher: tuple[str, ...] = (sys.executable,), timeout: float = 300
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*launcher, str(ROOT / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=timeout,
        )

    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `train_strided.py ARGUMENTS`. Returns (exit code, stderr); fails on an exception that would be a traceback."""

    def run(*arguments) -> tuple[int, str]:
        AcceleratorState._reset_state(True)
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
    """train(NAME, "train.max_steps=4", lora={...}, train__seed=1): runs the script in this process, returns its output folder."""

    def run(name: str, *overrides: str, **changes) -> Path:
        AcceleratorState._reset_state(True)
        folder = tmp_path / name
        file = write_config(**{"eval__num_documents": 0, **changes})
        train_strided.main(["--cfg", str(file), f"train.output_dir={folder}", *overrides])
        return folder

    return run


@pytest.fixture
def start(tmp_path):
    """start("ddp", FILE, override, ..): the real command, on 2 processes of the named accelerate config (None: without a launcher). Nothing of it outlives the test.

    sabotage: Python that runs in each process before the script, with `rank` and `at_step(3, action)`.
    """
    started = []

    def run(
        config: str | None,
        file: Path,
        *overrides: str,
        options: tuple = ("--num_processes", "2"),
        sabotage: str = "",
        on_cpu: bool = True,
    ) -> subprocess.Popen:
        command = [sys.executable]
        if config is not None:
            command += [
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                str(ROOT / "accelerate_configs" / f"{config}.yaml"),
                *options,
            ]
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
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, cwd=ROOT, env=environment, start_new_session=True
            )
        process.output = output
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
    for process in all_started(tmp_path):
        process.kill()
