"""Training with real vLLM servers: the CPU build, tiny models.

Completions, weight sync and its proof, asynchronous rollouts, two trainers, servers that die.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import requests
import torch
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import train_structured
from ebft_utils.config.modes import StructuredConfig, load_config
from ebft_utils.config.settings import UserError
from ebft_utils.data.prompts import conversation_of
from ebft_utils.data.rows import load_rows
from ebft_utils.models import Policy, load_policy, load_tokenizer
from ebft_utils.run.distributed import AgreedError, prepare_accelerator, prepare_policy
from ebft_utils.server import weight_sync
from ebft_utils.server.client import VLLMServer
from ebft_utils.server.weight_sync import ServedPolicy
from helpers import ROOT, assert_holds, assert_same_weights, error_of, logged, training, weights
from real_vllm import HEADERS, KEY, Server, naive_logprobs, vllm_python

LORA = {"r": 4, "alpha": 8.0}
KINDS = pytest.mark.parametrize("kind", ["LoRA", "full, tied"])
TIMES = {"time/generate", "time/wait", "time/sync", "time/features", "time/train", "time/step"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two of them, started side by side: one for adapters, one for all weights of a model with tied embeddings."""
    vllm_python()
    started = {
        "LoRA": Server(tmp_path_factory.mktemp("lora"), tied=False, lora=LORA).start(),
        "full, tied": Server(tmp_path_factory.mktemp("full"), tied=True, lora=None).start(),
    }
    try:
        yield {kind: server.wait() for kind, server in started.items()}
    finally:
        for server in started.values():
            server.kill()


def trained(server: Server, name: str, *overrides: str, **changes) -> Path:
    """Runs train_structured.py in this process, returns its output folder."""
    AcceleratorState._reset_state(True)
    shutil.rmtree(server.folder / name, ignore_errors=True)
    train_structured.main(["--cfg", str(server.config(name, **changes)), *overrides])
    return server.folder / name


def served_policy(server: Server, **changes) -> ServedPolicy:
    """A policy beside its server, as train_structured makes it."""
    AcceleratorState._reset_state(True)
    config = load_config(str(server.config("unit", **changes)), [], StructuredConfig)
    accelerator = prepare_accelerator(config)
    torch.manual_seed(0)
    policy = Policy(load_policy(config))
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    policy, _ = prepare_policy(accelerator, policy, torch.optim.AdamW(parameters))
    rows, _ = load_rows(config, load_tokenizer(config.model), conversation_of)
    return ServedPolicy(config, accelerator, policy, VLLMServer(config), rows[0].prompt + rows[0].truth[0])


def change(served: ServedPolicy, seed: int) -> None:
    """Another policy: noise on every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in served.policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def gaps(served: ServedPolicy) -> tuple[float, float, torch.Tensor]:
    """Largest differences of log-probs server/trainer, of a text and of sampled tokens.

    And the log-probs of the text on the server.
    """
    given, sampled, logprobs = served.server.score(served.name, served.probe, 4, served.config.ebft.temperature)
    own_given, own_sampled = served._own_scores(sampled)
    given = torch.tensor(given)
    return (given - own_given).abs().max().item(), (torch.tensor(logprobs) - own_sampled).abs().max().item(), given


# ----------------------------------------------------------------------------------------------------------------------
# Completions


def test_completions_are_the_tokens_and_logprobs_of_the_model(servers):
    """Guards against log-probs at another temperature, of other tokens, and against a lost end-of-text token."""
    served = served_policy(servers["LoRA"])
    prompts, model = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], str(servers["LoRA"].model)
    stops = [0, *range(10, 300, 20)]  # several, as models have them that end a turn and a text with different tokens
    found = served.server.complete(model, prompts, [40, 12], [1, 2], 6, 0.7, stops)
    assert [len(group) for group in found] == [6, 6]
    ended = 0
    for prompt, limit, group in zip(prompts, (40, 12), found, strict=True):
        for tokens, logprobs, truncated in group:
            expected = naive_logprobs(servers["LoRA"].model, prompt, tokens, 0.7)
            assert (torch.tensor(logprobs) - expected).abs().max() < 1e-4
            assert truncated == (tokens[-1] not in stops) and not set(stops) & set(tokens[:-1])
            assert len(tokens) == limit if truncated else len(tokens) <= limit
            ended += not truncated
        assert len({tuple(tokens) for tokens, _, _ in group}) > 1
    assert 0 < ended < 12
    again = served.server.complete(model, prompts, [40, 12], [1, 2], 6, 0.7, stops)
    written, written_again = ([[tokens for tokens, _, _ in group] for group in groups] for groups in (found, again))
    assert written_again == written
    (first,), (second,) = (served.server.complete(model, prompts[:1], [40], [seed], 6, 0.7, stops) for seed in (3, 4))
    assert [tokens for tokens, _, _ in first] != [tokens for tokens, _, _ in second]


# ----------------------------------------------------------------------------------------------------------------------
# Weight sync


@KINDS
def test_ten_syncs(servers, kind, record_property):
    """Guards against old weights, or a part of them, behind a server that answers 200.

    Tied heads, cached adapters, cached prefixes.
    """
    server = servers[kind]
    served = served_policy(server)
    before = {name: parameter.detach().clone() for name, parameter in served.policy.named_parameters()}
    served.start(0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in served.policy.named_parameters())
    first, first_sampled, last_scores = gaps(served)
    assert first < 1e-4 and first_sampled < 1e-4
    prompt = [5 + index % 200 for index in range(200)]  # more than a block of the prefix cache
    samples = []
    for step in range(1, 11):
        change(served, step)
        served.sync(step)
        gap, sampled_gap, scores = gaps(served)
        assert gap < 1e-4 and sampled_gap < 1e-4
        assert (scores - last_scores).abs().mean() > 0.01
        last_scores = scores
        ((tokens, logprobs, _),) = served.server.complete(served.name, [prompt], [4], [0], 1, 0.8, [0])[0]
        samples.append((tokens, logprobs))
        document = torch.tensor([prompt])
        rows = dict(document_ids=document, segment_ids=torch.zeros_like(document), rollouts=torch.tensor([[[tokens]]]))
        place = dict(anchors=torch.tensor([[200]]), valid=torch.ones(1, 1, dtype=torch.bool))
        with torch.no_grad():
            own, _ = served.policy(**rows, **place, temperature=0.8, document_grad=False)
        assert (own.flatten() - torch.tensor(logprobs)).abs().max() < 1e-4
    print(f"\n{kind}: largest |trainer - server| {first:.2g} before, {gap:.2g} after 10 syncs")
    print(f"{served.seconds / 11:.3f} s a sync")
    assert len({str(sample) for sample in samples}) == 10
    adapters = [name for name in server.models() if name.startswith("ebft-")]
    assert adapters == ([served.name] if kind == "LoRA" else [])
    assert len(list(served.folder.iterdir())) == (1 if kind == "LoRA" else 0)
    served.close()
    assert not served.folder.exists()


def test_a_head_that_stays_old_is_noticed(servers, monkeypatch):
    """The proof must see a head that stays old.

    The CPU build keeps it when a checkpoint of tied embeddings does not name it, as transformers writes them.
    """
    whole = weight_sync.whole_state

    def without_head(*arguments):
        return {name: tensor for name, tensor in whole(*arguments).items() if "lm_head" not in name}

    monkeypatch.setattr(weight_sync, "whole_state", without_head)
    with pytest.raises(AgreedError, match="only a part of the weights has arrived"):
        served_policy(servers["full, tied"]).start(0)
    monkeypatch.undo()
    served_policy(servers["full, tied"]).start(0)  # whole again


def test_an_adapter_that_matches_nothing_is_noticed(servers, monkeypatch):
    """vLLM loads an adapter whose names match no layer, answers 200, and serves the base model."""
    whole = weight_sync.whole_state

    def zeros(*arguments):
        return {name: torch.zeros_like(tensor) for name, tensor in whole(*arguments).items()}

    monkeypatch.setattr(weight_sync, "whole_state", zeros)
    with pytest.raises(AgreedError, match="weights of before"):
        served_policy(servers["LoRA"]).start(0)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@KINDS
def test_a_run(servers, kind):
    """Guards against a run that trains on other tokens or weights than it says."""
    server = servers[kind]
    folder = trained(server, "run", eval__num_documents=4, ebft__ce_coef=0.1)
    steps = training(folder)
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert abs(step["vllm/ratio_mean"] - 1) < 1e-3
        assert abs(step["vllm/kl"]) < 1e-4 and step["vllm/logprob_gap"] < 1e-4
        assert 0.999 < step["vllm/ratio_min"] <= step["vllm/ratio_max"] < 1.001
        assert step["vllm/staleness"] == step["vllm/capped"] == step["ebft/clipped"] == 0
        assert 0 <= step["rollout/truncated"] <= 1 and 1 <= step["rollout/length"] <= 24
        assert step["rollout/entropy"] > 0 and step["train/grad_norm"] > 0
    assert [entry["step"] for entry in logged(folder) if "eval/mean_reward" in entry] == [0, 3]
    ids = torch.arange(3, 20)[None]
    loader = AutoPeftModelForCausalLM if kind == "LoRA" else AutoModelForCausalLM
    after = loader.from_pretrained(folder / "final")(ids).logits
    before = AutoModelForCausalLM.from_pretrained(server.model)(ids).logits
    assert (after - before).abs().max() > 1e-2
    assert KEY not in "".join(path.read_text() for path in folder.rglob("*.yaml"))


def numbers(folder: Path, *without: str) -> list[dict]:
    left_out = TIMES | set(without)
    return [{name: value for name, value in step.items() if name not in left_out} for step in training(folder)]


def assert_close(first: list[dict], second: list[dict], tolerance: float) -> None:
    close = partial(math.isclose, rel_tol=tolerance, abs_tol=tolerance)
    for left, right in zip(first, second, strict=True):
        assert {name: (left[name], right[name]) for name in left if not close(left[name], right[name])} == {}


@KINDS
def test_async_without_learning_is_sync(servers, kind):
    """The batch written ahead is the batch: with a learning rate of nothing both runs log the same numbers."""
    server = servers[kind]
    changes = dict(train__learning_rate=1e-30, train__max_steps=4)
    both = [trained(server, f"async {ahead}", **changes, ebft__async_prefetch=ahead) for ahead in (False, True)]
    assert [[step["vllm/staleness"] for step in training(folder)] for folder in both] == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert_close(numbers(both[0], "vllm/staleness", "vllm/kl"), numbers(both[1], "vllm/staleness", "vllm/kl"), 1e-4)


def test_async_is_one_update_old(servers):
    """Guards against batches that are older than they may be, and staleness that no number shows."""
    steps = training(trained(servers["LoRA"], "stale", ebft__async_prefetch=True, train__max_steps=4))
    assert [step["vllm/staleness"] for step in steps] == [0, 1, 1, 1]
    assert abs(steps[0]["vllm/kl"]) < 1e-4 and all(step["vllm/logprob_gap"] > 1e-3 for step in steps[1:])
    steps = training(trained(servers["LoRA"], "interval", ebft__vllm_sync_interval=2, train__max_steps=4))
    assert [step["vllm/staleness"] for step in steps] == [0, 1, 0, 1]
    assert [step["vllm/logprob_gap"] > 1e-3 for step in steps] == [False, True, False, True]


@KINDS
def test_a_resumed_run_is_the_unbroken_one(servers, kind):
    """Guards against a resumed trainer whose first completions come from the server's old weights."""
    whole = trained(servers[kind], "whole", train__max_steps=4)
    trained(servers[kind], "parts", train__max_steps=2)
    trained(servers[kind], "other", train__max_steps=1)  # leaves other weights on the server
    AcceleratorState._reset_state(True)
    train_structured.main(["--cfg", str(servers[kind].config("parts", train__max_steps=4)), "train.resume=latest"])
    assert_close(numbers(whole, "vllm/kl"), numbers(servers[kind].folder / "parts", "vllm/kl"), 1e-4)
    assert_same_weights(weights(whole), weights(servers[kind].folder / "parts"), 1e-4)


@pytest.mark.parametrize("kind, launch", [("LoRA", "ddp"), ("full, tied", "fsdp2")])
def test_two_trainers_on_one_server(servers, kind, launch):
    """Guards against processes that ask for each other's rows, or sync without each other."""
    server = servers[kind]
    alone = trained(server, "alone", train__per_device_batch_size=1, train__max_steps=2)
    config_file = str(ROOT / "accelerate_configs" / f"{launch}.yaml")
    changes = dict(train__per_device_batch_size=1, train__max_steps=2, ebft__async_prefetch=False)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file, "--num_processes", "2"]
    command += [str(ROOT / "tests" / "fsdp2_on_cpu.py")] * (launch == "fsdp2")
    command += [str(ROOT / "train_structured.py"), "--cfg", str(server.config("pair", **changes))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_close(numbers(alone, "vllm/kl"), numbers(server.folder / "pair", "vllm/kl"), 5e-4)
    assert_same_weights(weights(alone), weights(server.folder / "pair"), 1e-3, share=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("LoRA", {"vllm__api_key": "another"}, ["vllm.api_key", "does not accept"]),
        ("LoRA", {"lora": {"r": 32}}, ["lora.r", "32", "--max-lora-rank", "8"]),
        ("LoRA", {"lora": None}, ["--enable-lora", "serve_vllm.py"]),
        ("full, tied", {"lora": {"r": 4}}, ["--enable-lora", "serve_vllm.py"]),
        ("LoRA", {"data__max_prompt_length": 300, "vllm__max_model_len": None}, ["vllm.max_model_len", "256", "324"]),
    ],
)
def test_the_wrong_server_is_refused(servers, kind, changes, words):
    """Before the first step, naming what to change."""
    with pytest.raises(UserError) as caught:
        trained(servers[kind], "refused", **changes)
    assert_holds(str(caught.value), *words)
    folder = servers[kind].folder / "refused"
    assert not (folder / "metrics.jsonl").exists() or not logged(folder)


def test_another_models_server_is_refused(servers):
    """A run against the server of another model would train on its tokens."""
    server, other = servers["LoRA"], servers["full, tied"]
    with pytest.raises(UserError, match="model.name_or_path: the vLLM server .* serves"):
        trained(server, "refused", vllm__port=other.vllm["port"])


def test_no_server(servers, capsys):
    """It waits, says so, and ends."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        trained(servers["LoRA"], "refused", vllm__port=9, vllm__timeout=2.0)
    assert time.monotonic() - started < 20
    assert "http://127.0.0.1:9 " in str(caught.value)
    assert_holds(str(caught.value), "vllm.timeout", "serve_vllm.py")
    assert "waiting for the vLLM server at http://127.0.0.1:9" in capsys.readouterr().err


def test_lost_weights_are_sent_again(servers, monkeypatch):
    """Nothing may be sampled from the first weights.

    A server that was started again has them, and another version name.
    """
    server, lose = servers["full, tied"], iter([False, True, False, False, False])
    complete = VLLMServer.complete

    def complete_and_lose(self, *arguments):
        if next(lose):
            server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(server.model)}})
            requests.post(server.url + "/update_weight_version", json={"new_version": "default"}, timeout=60)
        return complete(self, *arguments)

    unbroken = trained(server, "unbroken")
    monkeypatch.setattr(VLLMServer, "complete", complete_and_lose)
    broken = trained(server, "broken")
    assert next(lose) is False  # one more call than steps
    assert_close(numbers(unbroken, "vllm/kl"), numbers(broken, "vllm/kl"), 1e-4)


def test_a_lost_adapter_is_loaded_again(servers, monkeypatch):
    """A server that was started again does not know the adapter: 404."""
    server, lose = servers["LoRA"], iter([False, True, False, False, False])
    complete = VLLMServer.complete

    def complete_and_lose(self, name, *arguments):
        if next(lose):
            requests.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name}, headers=HEADERS, timeout=60)
        return complete(self, name, *arguments)

    unbroken = trained(server, "unbroken")
    monkeypatch.setattr(VLLMServer, "complete", complete_and_lose)
    broken = trained(server, "broken")
    assert_close(numbers(unbroken, "vllm/kl"), numbers(broken, "vllm/kl"), 1e-4)


def test_a_server_that_dies_in_the_middle(servers, tmp_path):
    """The last test of this server: it is killed, and the run saves and ends with one message.

    Started again, the run goes on.
    """
    server = servers["LoRA"]
    shutil.rmtree(server.folder / "dies", ignore_errors=True)
    file = server.config("dies", train__max_steps=400, vllm__timeout=5.0)
    output = tmp_path / "output.txt"
    with output.open("w") as stream:
        command = [sys.executable, str(ROOT / "train_structured.py"), "--cfg", str(file)]
        run = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT)
    deadline = time.monotonic() + 150
    while not ((server.folder / "dies" / "metrics.jsonl").exists() and len(logged(server.folder / "dies")) >= 2):
        assert run.poll() is None and time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(server.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    assert run.wait(timeout=60) == 1
    assert time.monotonic() - killed < 40
    steps = len(logged(server.folder / "dies"))
    message = error_of(output.read_text())
    assert f"{server.url} " in message
    assert_holds(message, f"step {steps} is saved", "train.resume=latest")
    assert (server.folder / "dies" / f"checkpoint-{steps}" / "SHA256SUMS").is_file()
    server.kill()
    server.start().wait()
    AcceleratorState._reset_state(True)
    train_structured.main(["--cfg", str(server.config("dies", train__max_steps=steps + 1)), "train.resume=latest"])
    (last,) = [entry for entry in logged(server.folder / "dies") if entry["step"] == steps + 1]
    assert abs(last["vllm/kl"]) < 1e-4 and json.dumps(last)
