"""Tiny real parts for the tests: models and a tokenizer that transformers saves and loads, made on the spot; no network."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, CONFIG_MAPPING, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(ROOT))

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
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name (model.NAME, optimizer.NAME.exp_avg, ..), whole, whatever number of processes wrote them."""
    reader = dcp.FileSystemReader(checkpoint / "state")
    found = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    dcp.load(tensors, storage_reader=reader)
    return tensors


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
    import json

    text = " ".join((ROOT / "LICENSE").read_text().split())
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text[index * 200 :][: 16 + 8 * (index * 7 % 13)]}) + "\n" for index in range(40)))
    return path


@pytest.fixture
def write_config(tmp_path, model_folder, text_file):
    """Writes a small complete configuration, with changes by dotted key, and returns its path."""

    def write(**changes) -> Path:
        tree = {
            "model": {"name_or_path": str(model_folder)},
            "data": {"dataset": str(text_file), "sequence_length": 48, "on_bad_row": "skip"},
            "ebft": {"n_samples_per_prompt": 3, "generate_max_len": 4, "stride": 4, "context_length": 4},
            "train": {"output_dir": str(tmp_path / "run"), "max_steps": 3, "batch_size": 2, "per_device_batch_size": 2, "learning_rate": 1e-3, "save_steps": 0},
            "eval": {"num_documents": 4},
        }
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            if key:
                tree.setdefault(section, {})[key] = value
            else:
                tree[section] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def run_script():
    """Runs a script of the project as a user does, in its own process."""

    def run(script: str, *arguments: str, launcher: tuple[str, ...] = (sys.executable,), timeout: float = 300) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*launcher, str(ROOT / script), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=timeout
        )

    return run
