"""More of training with real vLLM servers; test_weight_sync.py has the rest.

Which completion is whose, several turns, stop tokens, caches, servers that die.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import test_weight_sync
import torch
from test_weight_sync import KINDS, assert_close, change, numbers, served_policy, trained
from transformers import GenerationConfig

from ebft_utils.data.prompts import conversation_of, make_prompt_batch
from ebft_utils.data.rows import load_rows
from ebft_utils.models import load_causal_lm, load_tokenizer, stop_token_ids
from ebft_utils.run.distributed import AgreedError
from ebft_utils.server import weight_sync
from ebft_utils.server.client import VLLMServer
from ebft_utils.server.rollouts import Rollouts
from ebft_utils.server.weight_sync import ServedPolicy
from helpers import ROOT, assert_holds, end_of, error_of, evaluations, logged, training, wait_for
from real_vllm import KEY, Server

servers = test_weight_sync.servers  # the fixture
CLOSE = 1e-4  # nats, of two float32 programs
CHANGED = 0.01  # nats, at least, where the weights are others
DEAD_WITHIN = 60  # seconds from a server's end to the run's


def rollouts_of(served: ServedPolicy, stop_ids: tuple[int, ...] = (0,)) -> Rollouts:
    """As a run makes it, with `rows` and `batch(row_ids, keys)` beside it."""
    tokenizer = load_tokenizer(served.config.model)
    rollouts = Rollouts(served.config, served.accelerator, served.policy, tokenizer, list(stop_ids), served, None, 1)
    rollouts.rows, _ = load_rows(served.config, tokenizer, conversation_of)
    others = tokenizer.pad_token_id, served.accelerator.device
    rollouts.batch = lambda row_ids, keys: make_prompt_batch(rollouts.rows, row_ids, keys, *others)
    return rollouts


@torch.no_grad()
def own_logprobs(served: ServedPolicy, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    """Of the tokens behind a prompt, by the model's plain forward: transformers' own, with the adapter as it is now."""
    ids = torch.tensor([prompt + tokens])
    causal_lm = served.accelerator.unwrap_model(served.policy).causal_lm
    logits = causal_lm(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def gap(served: ServedPolicy, prompt: list[int], found: list, temperature: float = 0.8) -> float:
    """The largest difference of the server's log-probs and the policy's. found: (tokens, log-probs, truncated), .."""
    return max(
        (own_logprobs(served, prompt, tokens, temperature) - torch.tensor(logprobs)).abs().max().item()
        for tokens, logprobs, _ in found
    )


# ----------------------------------------------------------------------------------------------------------------------
# Completions


@KINDS
def test_completions_land_at_their_rows(servers, kind):
    """Guards against completions of another row, other weights or another temperature.

    Each log-prob is the policy's behind that very prompt.
    """
    served = served_policy(servers[kind])
    served.start(0)
    change(served, 1)
    served.sync(5)
    rollouts = rollouts_of(served)
    batches = [rollouts.batch([3, 1], [3, 1]), rollouts.batch([0, 7], [0, 7])]
    written = rollouts.write(batches, 0)
    assert written.version == 5
    own, elsewhere, cooler = [], [], []
    for batch, groups in zip(batches, written.completions, strict=True):
        prompts = [conversation.prompt for conversation in batch.conversations]
        for row, group in enumerate(groups):
            assert len(group) == 3
            for completion in group:
                assert all(completion.written)
                assert len(completion.tokens) == len(completion.logprobs) == len(completion.written)
                found = [(completion.tokens, completion.logprobs, False)]
                own.append(gap(served, prompts[row], found))
                elsewhere.append(gap(served, prompts[1 - row], found))
                cooler.append(gap(served, prompts[row], found, temperature=0.7))
    assert max(own) < CLOSE and min(elsewhere) > CHANGED and min(cooler) > CHANGED


@KINDS
def test_what_completions_are_keyed_by(servers, kind):
    """Guards against equal samples: in a group, for equal prompts, in the next epoch, with another seed.

    And against rollouts that cannot be repeated.
    """
    served = served_policy(servers[kind])
    served.start(0)
    rollouts = rollouts_of(served)

    def samples(row_ids: list[int], keys: list[int], seed: int) -> list[list[list[int]]]:
        (groups,) = rollouts.write([rollouts.batch(row_ids, keys)], seed).completions
        return [[completion.tokens for completion in group] for group in groups]

    both = samples([4, 4], [4, 44], 1)  # one row in two epochs
    other_seed = samples([4], [4], 2)
    assert len({tuple(tokens) for group in both + other_seed for tokens in group}) == 9
    assert samples([4, 4], [4, 44], 1) == both
    assert samples([9, 4], [9, 44], 1)[1] == both[1]  # whatever is written beside it


def test_a_second_stop_token_stops(servers):
    """Guards against completions that run past the end of a chat model's turn.

    And against a lost last token, which is the one to learn.
    """
    server = servers["LoRA"]
    served = served_policy(server)
    served.start(0)
    prompt = [5, 6, 7, 8]
    ((tokens, logprobs, _),) = served.server.complete(served.name, [prompt], [24], [3], 1, 0.8, [0])[0]
    at = next(index for index, token in enumerate(tokens) if index >= 2 and token not in tokens[:index] and token != 0)
    try:
        GenerationConfig(eos_token_id=[0, tokens[at]]).save_pretrained(server.model)
        causal_lm = load_causal_lm(served.config.model, torch.float32)
        stop_ids = stop_token_ids(causal_lm, load_tokenizer(served.config.model))
    finally:
        GenerationConfig(eos_token_id=0, pad_token_id=1, bos_token_id=0).save_pretrained(server.model)
    assert stop_ids == [0, tokens[at]]
    ((cut, cut_logprobs, truncated),) = served.server.complete(served.name, [prompt], [24], [3], 1, 0.8, stop_ids)[0]
    assert cut == tokens[: at + 1] and truncated is False
    assert (torch.tensor(cut_logprobs) - torch.tensor(logprobs[: at + 1])).abs().max() < CLOSE


@KINDS
def test_several_turns(servers, kind, tmp_path):
    """Guards against log-probs that slip by the tokens between two turns.

    And against a second turn that does not see the first.
    """
    rows = tmp_path / "turns.jsonl"
    lines = [json.loads(line) for line in servers[kind].prompts.read_text().splitlines()]
    with rows.open("w") as file:
        for first, second, third in zip(lines, lines[1:], lines[2:], strict=False):
            turns = [{"prompt": turn["prompt"][:12], "completion": turn["completion"]} for turn in (second, third)]
            row = {"prompt": first["prompt"], "completion": first["completion"], "turns": turns}
            file.write(json.dumps(row) + "\n")
    changes = dict(data__dataset=str(rows), data__columns={"turns": "turns"}, data__max_conversation_length=250)
    served = served_policy(servers[kind], **changes)
    served.start(0)
    change(served, 1)
    served.sync(1)
    rollouts = rollouts_of(served)
    batch = rollouts.batch([0, 1], [0, 1])
    for conversation, group in zip(batch.conversations, rollouts.write([batch], 0).completions[0], strict=True):
        for completion in group:
            written = torch.tensor(completion.written)
            own = own_logprobs(served, conversation.prompt, completion.tokens, 0.8)
            assert (own - torch.tensor(completion.logprobs))[written].abs().max() < CLOSE
            assert (~written).sum() >= sum(len(tokens) for tokens in conversation.between) > 0
    steps = training(trained(servers[kind], "turns", train__max_steps=2, **changes))
    assert len(steps) == 2
    for step in steps:
        assert abs(step["vllm/ratio_mean"] - 1) < 1e-3 and step["vllm/logprob_gap"] < CLOSE
        assert step["rollout/length"] > 24


# ----------------------------------------------------------------------------------------------------------------------
# Weights


@KINDS
def test_the_start_leaves_trained_weights_alone(servers, kind):
    """Guards against a canary that rounds.

    B of a new adapter is 0, and 0 + x - x would come out right; that of a resumed adapter is not.
    """
    served = served_policy(servers[kind])
    change(served, 1)
    kept = {name: tensor.clone() for name, tensor in served.policy.state_dict().items()}
    served.start(0)
    assert {name for name, tensor in served.policy.state_dict().items() if not torch.equal(tensor, kept[name])} == set()
    found = served.server.complete(served.name, [[5, 6, 7, 8]], [12], [0], 3, 0.8, [0])[0]
    assert gap(served, [5, 6, 7, 8], found) < CLOSE  # the server has the real ones, not the canary


@KINDS
def test_states_of_old_weights_are_not_used_again(servers, kind):
    """Guards against the server's cache of prompts after a sync; it is shown to be at work before."""
    server, prompt = servers[kind], [5 + index * 7 % 200 for index in range(200)]  # a block of the cache has 128 tokens
    served = served_policy(server)
    served.start(0)

    def sample() -> list[tuple[list[int], list[float], bool]]:
        return served.server.complete(served.name, [prompt], [8], [0], 3, 0.8, [0])[0]

    def hits() -> float:
        lines = served.server.session.get(f"{server.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    first, counted = sample(), hits()
    second = sample()
    assert hits() >= counted + 128, "the cache is not used, so nothing is proved here"
    assert gap(served, prompt, first) < CLOSE and gap(served, prompt, second) < CLOSE
    change(served, 1)
    assert gap(served, prompt, second) > CHANGED
    served.sync(1)
    assert gap(served, prompt, sample()) < CLOSE


def test_a_head_that_stays_old_in_the_middle(servers, monkeypatch):
    """Guards against a proof that only works at the start.

    The head does stay old when it is not named; a later sync notices, and the next one mends it.
    """
    served, prompt, whole = served_policy(servers["full, tied"]), [5, 6, 7, 8], weight_sync.whole_state
    served.start(0)
    change(served, 1)

    def without_head(*arguments):
        return {name: tensor for name, tensor in whole(*arguments).items() if name != "lm_head.weight"}

    monkeypatch.setattr(weight_sync, "whole_state", without_head)
    words = "do not have the same weights.* it has old weights, or only a part of the new ones"
    with pytest.raises(AgreedError, match=words):
        served.sync(1)
    assert served.version == 0
    assert gap(served, prompt, served.server.complete(served.name, [prompt], [8], [0], 3, 0.8, [0])[0]) > CHANGED
    monkeypatch.undo()
    served.sync(1)
    assert gap(served, prompt, served.server.complete(served.name, [prompt], [8], [0], 3, 0.8, [0])[0]) < CLOSE


def test_full_weights_that_never_arrive(servers, monkeypatch):
    """Guards against a server that answers 200 and loads nothing: told from one that has the wrong weights."""
    served = served_policy(servers["full, tied"])
    served.start(0)
    monkeypatch.setattr(served.server, "reload_weights", lambda folder, version: served.server.finish_update(version))
    words = "it answers with the weights of before: what is sent does not take effect there"
    with pytest.raises(AgreedError, match=words):
        served.start(0)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@KINDS
def test_evaluation_in_the_middle_changes_nothing(servers, kind):
    """Guards against an evaluation that takes the batch that is written ahead away.

    And against one that brings newer weights under it.
    """
    changes = dict(ebft__async_prefetch=True, train__max_steps=4, eval__num_documents=3)
    plain = trained(servers[kind], "plain", eval__at_start=False, eval__at_end=False, **changes)
    evaluated = trained(servers[kind], "evaluated", eval__every_steps=1, **changes)
    assert [entry["step"] for entry in evaluations(evaluated)] == [0, 1, 2, 3, 4]
    assert evaluations(plain) == []
    assert_close(numbers(plain), numbers(evaluated), 1e-4)
    assert [step["vllm/staleness"] for step in training(evaluated)] == [0, 1, 1, 1]


def test_weights_lost_while_writing_ahead(servers, monkeypatch):
    """Guards against training on what a restarted server wrote ahead with the first weights.

    Such a batch is written again, with new weights.
    """
    server, complete, calls = servers["full, tied"], VLLMServer.complete, []

    def complete_and_lose(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(server.model)}})
            server.post("/update_weight_version", {"new_version": "default"})
        return complete(self, *arguments)

    monkeypatch.setattr(VLLMServer, "complete", complete_and_lose)
    steps = training(trained(server, "lost", ebft__async_prefetch=True, train__max_steps=5))
    assert len(calls) == 6 and [step["vllm/staleness"] for step in steps] == [0, 1, 0, 1, 1]
    assert steps[2]["vllm/logprob_gap"] < CLOSE
    assert all(steps[index]["vllm/logprob_gap"] > 10 * CLOSE for index in (1, 3, 4))


# ----------------------------------------------------------------------------------------------------------------------
# The server itself


def test_the_key_is_not_in_the_process_list(servers):
    """Guards against a key that every user of the machine can read."""
    server = servers["LoRA"]
    root = psutil.Process(server.process.pid)
    lines = [" ".join(process.cmdline()) for process in [root, *root.children(recursive=True)]]
    assert any("--enable-lora" in line and "--logprobs-mode processed_logprobs" in line for line in lines)
    assert not [line for line in lines if KEY in line]
    log = (server.folder / "server.log").read_text()
    assert KEY not in log and "VLLM_API_KEY=..." in log


@pytest.fixture
def launch(tmp_path):
    """launch(FILE, processes=2): the real command in the background, with its output in `.output`.

    Nothing of it outlives the test.
    """
    started = []

    def run(file: Path, *, processes: int = 1) -> subprocess.Popen:
        command = [sys.executable]
        if processes > 1:
            config_file = str(ROOT / "accelerate_configs" / "ddp.yaml")
            command += ["-m", "accelerate.commands.launch", "--config_file", config_file]
            command += ["--num_processes", str(processes)]
        command += [str(ROOT / "train_structured.py"), "--cfg", str(file)]
        output = tmp_path / f"output-{len(started)}.txt"
        with output.open("w") as stream:
            settings = dict(cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True)
            process = subprocess.Popen(command, stdout=stream, stderr=stream, **settings)
        process.output = output
        started.append((process, psutil.Process(process.pid)))
        return process

    yield run
    for process, root in started:
        with suppress(psutil.NoSuchProcess):
            for child in root.children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


def assert_kept(server: Server, name: str, message: str) -> None:
    """A checkpoint of the last finished step, named in the message."""
    steps = len(logged(server.folder / name))
    assert steps >= 2 and (server.folder / name / f"checkpoint-{steps}" / "SHA256SUMS").is_file()
    assert f"{server.url} " in message
    assert_holds(message, f"step {steps} is saved", "train.resume=latest", "vllm.timeout")


def test_runs_end_with_their_server(servers, launch):
    """The last test of this server, which is killed under three runs.

    One run has two processes, one prefetches, and one is asked to stop while it waits. Guards against processes that
    wait for each other for ever, an error that stays in the prefetching thread, and a signal that waits for
    vllm.timeout.
    """
    server = servers["LoRA"]
    changes = dict(train__max_steps=100000, train__learning_rate=1e-5, train__rollout_table_steps=0)
    pair = server.config("pair_dies", vllm__timeout=5.0, train__per_device_batch_size=1, **changes)
    ahead = server.config("ahead_dies", vllm__timeout=5.0, ebft__async_prefetch=True, **changes)
    asked = server.config("asked_dies", vllm__timeout=600.0, **changes)
    runs = {"pair": launch(pair, processes=2), "ahead": launch(ahead), "asked": launch(asked)}
    for name, run in runs.items():
        metrics = server.folder / f"{name}_dies" / "metrics.jsonl"
        wait_for(run, lambda metrics=metrics: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
    family = psutil.Process(server.process.pid).children(recursive=True)
    os.killpg(server.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    psutil.wait_procs(family, timeout=10)
    asked = runs.pop("asked")
    time.sleep(3)  # now it waits
    asked.send_signal(signal.SIGTERM)
    code, output = end_of(asked, within=DEAD_WITHIN)
    steps = len(logged(server.folder / "asked_dies"))
    assert code != 0 and "Traceback" not in output and time.monotonic() - killed < DEAD_WITHIN, output[-3000:]
    assert (server.folder / "asked_dies" / f"checkpoint-{steps}" / "SHA256SUMS").is_file()
    for name, run in runs.items():
        code, output = end_of(run, within=DEAD_WITHIN)
        assert code != 0 and time.monotonic() - killed < DEAD_WITHIN
        assert_kept(server, f"{name}_dies", error_of(output))
        assert name == "pair" or "Traceback" not in output, output[-3000:]  # a launcher reports in its own way
