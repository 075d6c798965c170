"""What the tests share: tiny models and a tokenizer, made on the spot; a run's files and processes; comparisons.

It sets the environment that transformers and datasets read when they are imported, so it is imported before them.
"""

import json
import math
import os
import re
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
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

from ebft_utils.config.settings import UserError

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


def forget_accelerator() -> None:
    """Takes away the accelerator state that an earlier run in this process left."""
    AcceleratorState._reset_state(True)


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
    """All tensors of a checkpoint by name (model.NAME, optimizer.NAME.exp_avg, ..).

    Each is whole, whatever number of processes wrote it.
    """
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
    """The numbers of training steps, without times, which differ from run to run."""

    def kept(name: str) -> bool:
        return not name.startswith(("eval/", "time")) and name != "train/tokens_per_second"

    entries = [entry for entry in logged(folder) if "train/loss" in entry]
    return [{name: value for name, value in entry.items() if kept(name)} for entry in entries]


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
    """All but a share of the weights differ by tolerance at most.

    AdamW divides by the gradient's size, so where that is nearly 0 its rounding decides the update.
    """
    assert first.keys() == second.keys()
    gaps = torch.cat([(tensor - second[name]).abs().flatten() for name, tensor in first.items()])
    assert (gaps > tolerance).double().mean().item() <= share, f"largest gap {gaps.max():.3g}"


def assert_equal_weights(first: Path, second: Path) -> None:
    """To the last bit."""
    assert_same_weights(weights(first), weights(second), tolerance=0.0)


def assert_close_runs(first: Path, second: Path, tolerance: float = 1e-5, share: float = 0.0) -> None:
    """The same trained weights, and the same logged numbers to 1e-5.

    The share of valid anchors may differ: how much padding there is depends on the batch.
    """
    assert_same_weights(weights(first), weights(second), tolerance, share)
    for left, right in zip(logged(first), logged(second), strict=True):
        assert left.keys() == right.keys()
        names = left.keys() - {"ebft/valid_anchors", "train/tokens_per_second", "time", "time/step"}
        pairs = {name: (left[name], right[name]) for name in names}
        assert {name: pair for name, pair in pairs.items() if not math.isclose(*pair, rel_tol=1e-5, abs_tol=1e-5)} == {}


def assert_trained(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Guards the tests themselves: two runs that both train nothing would always be equal."""
    assert max((tensor - start[name]).abs().max().item() for name, tensor in weights(folder).items()) > 1e-4


def assert_holds(message: str, *words) -> None:
    """Paths are looked for in the whole message, words and numbers outside of absolute paths.

    pytest-48/ is no sequence length of 48.
    """
    bare = re.sub(r"(?<![\w.])/[^\s'\":,;)]+", "", message)
    missing = [str(word) for word in words if str(word) not in (message if isinstance(word, Path) else bare)]
    assert not missing, f"{missing} not in {message!r}"


def refusal(function, *arguments, **options) -> str:
    """The message of the UserError that the call must end with."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


def accelerate_launch(config: str, *options: str) -> list[str]:
    """The launcher's command with one of the repository's accelerate configs; a script and its arguments follow."""
    file = str(ROOT / "accelerate_configs" / f"{config}.yaml")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, *options]


def all_started(folder: Path) -> list[psutil.Process]:
    """The processes of a test's launches. Workers are in sessions of their own, and may have lost their launcher."""
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
