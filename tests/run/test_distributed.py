"""Real launches of several processes with the shipped accelerate configs.

Each kind gives the numbers of one process, survives kill -9 and exports the same. Most runs share one launch of their
kind (`runs_in_turn.py`). RUNS says which; the tests compare what they have left behind.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_strided
from ebft_utils.algorithm.strided import number_of_parts
from ebft_utils.config.modes import load_config
from ebft_utils.data.rows import load_rows
from ebft_utils.models import load_tokenizer
from helpers import (
    ROOT,
    all_started,
    assert_equal_weights,
    config_tree,
    evaluations,
    logged,
    saved_tensors,
    tiny_model,
    tiny_tokenizer,
    training,
    weights,
)

MODES = pytest.mark.parametrize("mode", ["full", "LoRA"])
KINDS = pytest.mark.parametrize("launch", ["DDP x 2", "FSDP2 x 2"])
TIMEOUT = 400  # seconds of one launch, on a busy machine
LAUNCHES = {  # accelerate config, number of processes, more arguments, launches whose checkpoints are read
    "1": (None, 1, (), ("FSDP2 x 2",)),
    "DDP x 2": ("ddp", 2, (), ("1", "FSDP2 x 2")),
    "DDP x 4": ("ddp", 4, (), ()),
    "FSDP2 x 2": ("fsdp2", 2, (), ()),
    "FSDP2 x 2, each reads": ("fsdp2", 2, ("--fsdp_cpu_ram_efficient_loading", "false"), ()),
    "FSDP2 x 4": ("fsdp2", 4, (), ()),
}
# `descent` and `gathers` are explained in runs_in_turn.py; ROOT/ in a value is the folder of all runs
DESCENT = dict(descent=True, train__batch_size=4, train__per_device_batch_size=1, eval__num_documents=0)
DESCENT |= dict(train__max_steps=5, train__learning_rate=0.1, ebft__ce_coef=0.3)
DESCENT_2 = dict(DESCENT, train__per_device_batch_size=2)
ADAMW = dict(DESCENT, descent=False, train__max_steps=4, train__save_steps=2, train__learning_rate=1e-4)
EVALUATION = dict(DESCENT, train__max_steps=1, eval__num_documents=3, eval__per_device_batch_size=1)
UNBROKEN = dict(ADAMW, train__max_steps=12, train__learning_rate=1e-2, train__lr_scheduler="cosine")
UNBROKEN |= dict(eval__num_documents=3, eval__per_device_batch_size=2)
LONG, SHARD = dict(ebft__generate_max_len=8), dict(feature_network__shard=True)
GATHERS = dict(DESCENT, train__max_steps=1, gathers=True)
WHOLE = dict(DESCENT, train__max_steps=3, eval__num_documents=3, eval__per_device_batch_size=1)
WHOLE |= dict(train__seed=4, eval__seed=3)  # no token is drawn within 1e-6 of another
PARTS = dict(WHOLE, ebft__max_packed_tokens=96)


def both(name: str, **changes) -> dict[str, dict]:
    """A run, once as full fine-tuning and once with LoRA."""
    return {f"{name} full": changes, f"{name} LoRA": dict(changes, lora={"r": 4, "alpha": 8.0})}


def resumed(launch: str, name: str = "AdamW") -> dict[str, dict]:
    """The second half of that launch's runs."""
    again = both(f"from {launch}", **ADAMW)
    first = f"ROOT/{launch}/{name}"
    return {
        key: dict(changes, train__resume=f"{first} {key.split()[-1]}/checkpoint-2") for key, changes in again.items()
    }


SPEED = {"time", "time/step", "train/tokens_per_second"}
COMMON = {
    **both("1 at a time", **DESCENT),
    **both("AdamW", **ADAMW),
    **both("unbroken", **UNBROKEN),
    "evaluation, 1 at a time": EVALUATION,
    "evaluation, 2 at a time": dict(EVALUATION, eval__per_device_batch_size=2),
}
FEW = {**both("1 at a time", **DESCENT), "evaluation, 1 at a time": EVALUATION}
RUNS = {
    "1": {
        **COMMON,
        **both("4 at a time", **dict(DESCENT, train__per_device_batch_size=4)),
        **both("start", **dict(DESCENT, train__max_steps=1, train__learning_rate=1e-20)),
        **both("large steps", **dict(DESCENT, train__learning_rate=1.0)),
        "tied": dict(DESCENT, model__name_or_path="ROOT/tied"),
        **both("whole", **WHOLE),
        **both("whole, start", **dict(WHOLE, train__max_steps=1, train__learning_rate=1e-20, eval__num_documents=0)),
        **resumed("FSDP2 x 2"),
    },
    "DDP x 2": {
        **COMMON,
        **both("2 at a time", **DESCENT_2),
        **both("parts", **PARTS),
        **resumed("1"),
        **resumed("FSDP2 x 2"),
    },
    "DDP x 4": FEW,
    "FSDP2 x 2": {
        **COMMON,
        **both("2 at a time", **DESCENT_2),
        **both("parts", **PARTS),
        **both("large steps", **dict(DESCENT, train__learning_rate=1.0)),
        **both("checkpointing", **DESCENT, model__gradient_checkpointing=True),
        **both("bfloat16", **ADAMW, model__dtype="bfloat16"),
        "merged LoRA": dict(both("", **DESCENT)[" LoRA"], flags=["lora.merge=true"]),
        "sharded features": dict(DESCENT, **SHARD),
        "tied": dict(DESCENT, model__name_or_path="ROOT/tied"),
        **both("gathers, 4 tokens", **GATHERS),
        **both("gathers, 8 tokens", **GATHERS, **LONG),
        "gathers, sharded features, 4 tokens": dict(GATHERS, **SHARD),
        "gathers, sharded features, 8 tokens": dict(GATHERS, **SHARD, **LONG),
    },
    "FSDP2 x 2, each reads": both("1 at a time", **DESCENT),
    "FSDP2 x 4": FEW,
}


class Runs:
    """The runs of all launches. Each launch is made when a test first asks for it, and kept for the others.

    root: a folder for each launch, in it one for each run.
    """

    def __init__(self, root: Path, model_folder: Path, text_file: Path):
        self.root, self.model_folder, self.text_file, self.done = root, model_folder, text_file, {}
        tiny_model(tie_word_embeddings=True).save_pretrained(root / "tied")
        tiny_tokenizer().save_pretrained(root / "tied")

    def write(self, launch: str, name: str, changes: dict) -> Path:
        """The run's configuration file."""
        values = {key: value for key, value in changes.items() if key not in ("descent", "gathers", "flags")}
        for key, value in values.items():
            values[key] = value.replace("ROOT", str(self.root)) if isinstance(value, str) else value
        file = self.root / launch / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        # texts as they are: with some of their pieces a token is drawn so near a limit that rounding decides
        values = {"data__long_documents": "cut", **values}
        tree = config_tree(self.model_folder, self.text_file, self.root / launch / name, **values)
        file.write_text(yaml.safe_dump(tree))
        return file

    def start(self, launch: str, output: Path, script: str, *arguments: str) -> subprocess.Popen:
        """Starts a script of the project as a user does."""
        config, processes, options, _ = LAUNCHES[launch]
        command = [sys.executable]
        if config is not None:
            command += ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
            command += ["--num_processes", str(processes), *options]
        command += ["tests/fsdp2_on_cpu.py", script] if config == "fsdp2" else [script]
        with output.open("w") as file:
            settings = dict(cwd=ROOT, env={**os.environ, "STARTED_BY": str(self.root)}, start_new_session=True)
            return subprocess.Popen([*command, *arguments], stdout=file, stderr=subprocess.STDOUT, **settings)

    def kill(self, launcher: subprocess.Popen | None = None) -> None:
        """kill -9 for a launcher and its processes, which are in sessions of their own."""
        found = all_started(self.root)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if launcher is not None:
            launcher.wait()
        assert psutil.wait_procs(found, timeout=60)[1] == []

    def finish(self, process: subprocess.Popen, output: Path) -> None:
        """Waits for the end, which must be a good one."""
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill(process)
            pytest.fail(f"deadlock: not ended after {TIMEOUT} s\n{output.read_text()[-3000:]}")
        assert process.returncode == 0, output.read_text()[-3000:]

    def launch(self, launch: str) -> None:
        if launch in self.done:
            return
        for needed in LAUNCHES[launch][3]:
            with suppress(AssertionError, pytest.fail.Exception):  # its own tests say so
                self.launch(needed)
        entries = []
        for name, changes in RUNS[launch].items():
            file = self.write(launch, name, changes)
            entry = {"arguments": ["--cfg", str(file), *changes.get("flags", [])], "descent": changes["descent"]}
            entry["output"] = str(file.with_suffix(".txt"))
            entry["gathers"] = str(file.with_suffix(".gathers")) if changes.get("gathers") else None
            entries.append(entry)
        listed, output = self.root / launch / "runs.json", self.root / launch / "launch.txt"
        listed.write_text(json.dumps(entries))
        self.done[launch] = output
        self.finish(self.start(launch, output, "tests/runs_in_turn.py", str(listed)), output)

    def __call__(self, launch: str, name: str) -> Path:
        """What a run has left behind. Runs before one that fails are whole."""
        try:
            self.launch(launch)
        except AssertionError:
            if not (self.root / launch / name / "final").exists():
                raise
        folder = self.root / launch / name
        assert (folder / "final").exists(), self.done[launch].read_text()[-3000:]
        return folder

    def printed(self, launch: str, name: str) -> str:
        self(launch, name)
        return (self.root / launch / f"{name}.txt").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder, text_file):
    """All runs; no process outlives them."""
    runs = Runs(tmp_path_factory.mktemp("runs"), model_folder, text_file)
    yield runs
    runs.kill()


def largest_gap(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((tensor - second[name]).abs().max().item() for name, tensor in first.items())


def logged_gap(first: Path, second: Path) -> float:
    """Largest difference of logged numbers, relative to those above 1.

    Without the share of valid anchors: it depends on the padding of the batch.
    """
    gaps = []
    for left, right in zip(logged(first), logged(second), strict=True):
        assert left.keys() == right.keys()
        names = left.keys() - {"ebft/valid_anchors", *SPEED}
        gaps += [abs(left[name] - right[name]) / max(1.0, abs(left[name])) for name in names]
    return max(gaps)


def assert_same_training(first: Path, second: Path, start: Path, share: float = 1e-4) -> None:
    """Same logged numbers and weights to 1e-5, and weights to a small share of what was trained.

    What was trained must be far more than that.
    """
    gap, moved = largest_gap(weights(first), weights(second)), largest_gap(weights(first), weights(start))
    assert moved > 1e-2
    assert logged_gap(first, second) <= 1e-5
    assert gap <= 1e-5 and gap <= share * moved


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def load_exported(folder: Path, mode: str):
    return (AutoPeftModelForCausalLM if mode == "LoRA" else AutoModelForCausalLM).from_pretrained(folder / "final")


# ----------------------------------------------------------------------------------------------------------------------
# One update, however it is split

SPLITS = [("1", 1), ("DDP x 2", 1), ("DDP x 2", 2), ("DDP x 4", 1)]
SPLITS += [("FSDP2 x 2", 1), ("FSDP2 x 2", 2), ("FSDP2 x 4", 1)]


@MODES
@pytest.mark.parametrize("launch, size", [*SPLITS, ("FSDP2 x 2, each reads", 1)])
def test_same_update_however_it_is_split(runs, launch, size, mode):
    """Guards against gradients that are averaged, lost, summed twice or weighted by micro-batch or process.

    Rollouts and rows must not depend on the process.
    """
    whole, split = runs("1", f"4 at a time {mode}"), runs(launch, f"{size} at a time {mode}")
    assert_same_training(whole, split, runs("1", f"start {mode}"))


@MODES
def test_large_steps_of_lora_keep_the_base_features(runs, mode):
    """Guards against features of the policy instead of the frozen network once lora_B is not zero.

    And against weights of an earlier step.
    """
    one, two = runs("1", f"large steps {mode}"), runs("FSDP2 x 2", f"large steps {mode}")
    start = runs("1", f"start {mode}")
    assert_same_training(one, two, start)
    if mode == "LoRA":
        assert max(tensor.abs().max().item() for name, tensor in weights(two).items() if "lora_B" in name) > 0.05
    assert abs(training(two)[0]["ebft/cfm_loss"] - training(two)[-1]["ebft/cfm_loss"]) > 1e-3


@KINDS
@MODES
def test_parts_on_two_processes(runs, launch, mode):
    """Guards against a process that runs fewer parts than another one waits for.

    Gradients must be reduced once: not with each part, nor with the first alone.
    """
    config = load_config(str(runs.write(launch, "read only", PARTS)))
    tokenizer = load_tokenizer(config.model)
    rows, _ = load_rows(config, tokenizer)

    def parts_of(process: int) -> list[int]:
        """How many each micro-batch of a process needs, in three steps."""
        accelerator = SimpleNamespace(num_processes=2, process_index=process)
        steps = [
            train_strided.step_batches(config, accelerator, rows, step, tokenizer.pad_token_id) for step in range(3)
        ]
        shapes = [(batch.anchors.shape[1], batch.document_ids.shape[1]) for batches in steps for batch in batches]
        return [number_of_parts(num_anchors, 3 * 4, length, 96) for num_anchors, length in shapes]

    needed = [parts_of(process) for process in range(2)]
    assert {1, 3} <= {*needed[0], *needed[1]} and sum(one != other for one, other in zip(*needed, strict=True)) >= 3
    assert_same_training(runs("1", f"whole {mode}"), runs(launch, f"parts {mode}"), runs("1", f"whole, start {mode}"))


# ----------------------------------------------------------------------------------------------------------------------
# FSDP2


def test_tied_embeddings(runs):
    """Guards against a head that is untied by sharding (trained apart, or exported stale beside the embedding)."""
    one, two = runs("1", "tied"), runs("FSDP2 x 2", "tied")
    start = load_file(runs.root / "tied" / "model.safetensors")
    found = weights(two)
    assert "lm_head.weight" not in found and found.keys() == start.keys()
    assert largest_gap(found, start) > 1e-2 and logged_gap(one, two) <= 1e-5
    assert largest_gap(weights(one), found) <= min(1e-5, 1e-4 * largest_gap(found, start))
    model = AutoModelForCausalLM.from_pretrained(two / "final")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, found["model.embed_tokens.weight"])
    assert "model.causal_lm.lm_head.weight" not in saved_tensors(two / "checkpoint-5")


@MODES
def test_gradient_checkpointing_under_fsdp2(runs, mode):
    """Guards against weights that are gone when a layer is recomputed, and adapters without a gradient."""
    off, on = runs("FSDP2 x 2", f"1 at a time {mode}"), runs("FSDP2 x 2", f"checkpointing {mode}")
    assert_same_training(off, on, runs("1", f"start {mode}"))


def test_sharded_feature_network(runs):
    """Guards against features of a part of the frozen weights."""
    whole, sharded = runs("FSDP2 x 2", "1 at a time full"), runs("FSDP2 x 2", "sharded features")
    assert_same_training(whole, sharded, runs("1", "start full"))
    assert "feature network: split over the processes" in runs.printed("FSDP2 x 2", "sharded features")


@MODES
def test_bfloat16_under_fsdp2(runs, mode):
    """Guards against trained weights or AdamW moments in bfloat16, and log-probs that are rounded to it.

    And against a dtype that changes nothing.
    """
    low, exact = runs("FSDP2 x 2", f"bfloat16 {mode}"), runs("FSDP2 x 2", f"AdamW {mode}")
    state = saved_tensors(low / "checkpoint-4")
    num_weights = sum(name.startswith("model.") for name in state)
    assert num_weights == len(weights(low))
    assert sum(name.endswith((".exp_avg", ".exp_avg_sq")) for name in state) == 2 * num_weights
    for tensors in (state, weights(low)):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    steps = zip(training(low), training(exact), strict=True)
    gaps = [abs(left["ebft/ce_loss"] - right["ebft/ce_loss"]) for left, right in steps]
    assert 1e-6 < max(gaps) < 0.02


@pytest.mark.parametrize("kind, units", [("4 tokens full", 5), ("4 tokens LoRA", 5), ("sharded features, 4 tokens", 9)])
def test_a_rollout_gathers_each_unit_once(runs, kind, units):
    """Guards against an all-gather of the whole model for each token, and weights that stay whole afterwards.

    4 layers and the rest are 5 units; 3 layers and the rest of the feature network are 4 more.
    """
    for name in (kind, kind.replace("4", "8")):
        found = json.loads((runs("FSDP2 x 2", f"gathers, {name}").parent / f"gathers, {name}.gathers").read_text())
        assert found == [{"gathers": units, "whole": 0}] * 2  # two micro-batches
    assert "FSDP2 in 5 units" in runs.printed("FSDP2 x 2", f"gathers, {kind}")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def pytest_generate_tests(metafunc):
    if "killed" in metafunc.fixturenames:
        metafunc.parametrize("killed", range(metafunc.config.getoption("kills")))


def without_speed(folder: Path) -> list[dict]:
    return [{name: entry[name] for name in entry if name not in SPEED} for entry in logged(folder)]


def kill_at(runs: Runs, process: subprocess.Popen, folder: Path, step: int, delay: float) -> None:
    """Kills the run `delay` seconds after it has logged the step."""
    log, deadline = folder / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not (log.exists() and f'{{"step": {step},' in log.read_text()):
        if process.poll() is not None:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    time.sleep(delay)
    runs.kill(process)


@MODES
@pytest.mark.parametrize("launch", ["1", "DDP x 2", "FSDP2 x 2"])
def test_resumed_after_kill_equals_the_unbroken_run(runs, launch, mode, killed):
    """Nothing may differ by a single bit, wherever the power goes out.

    Guards against lost optimizer state, other rows or rollouts, and half-written checkpoints or logs.
    """
    whole = runs(launch, f"unbroken {mode}")
    seed = random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)
    step, delay = dice.randint(3, 8), dice.uniform(0.0, 0.3)
    where = f"seed {seed}: killed {delay:.3f} s after step {step}"
    name = f"killed {mode} {killed}"
    file = runs.write(launch, name, RUNS[launch][f"unbroken {mode}"])
    folder, output = runs.root / launch / name, runs.root / launch / f"{name}.txt"
    process = runs.start(launch, output, "train_strided.py", "--cfg", str(file))
    kill_at(runs, process, folder, step, delay)
    killed_in_time = process.returncode == -9 and not (folder / "final").exists() and len(training(folder)) >= step
    assert killed_in_time, f"{where}\n{output.read_text()[-3000:]}"
    again = runs.root / launch / f"{name}, resumed.txt"
    runs.finish(runs.start(launch, again, "train_strided.py", "--cfg", str(file), "train.resume=latest"), again)
    assert "going on from" in again.read_text() and "not bit for bit" not in again.read_text(), where
    assert without_speed(folder) == without_speed(whole), where
    assert_equal_weights(folder, whole)


@MODES
@pytest.mark.parametrize("first, then", [("FSDP2 x 2", "1"), ("1", "DDP x 2"), ("FSDP2 x 2", "DDP x 2")])
def test_resumed_by_another_kind_of_launch(runs, first, then, mode):
    """Guards against checkpoints that only the same number of processes reads, or reads a part of.

    AdamW's state decides the size of the updates.
    """
    whole, again = runs(first, f"AdamW {mode}"), runs(then, f"from {first} {mode}")
    assert largest_gap(weights(whole), weights(runs("1", f"start {mode}"))) > 3e-4  # four updates of 1e-4
    assert [entry["step"] for entry in logged(again)] == [3, 4]
    gaps = torch.cat([(tensor - weights(again)[name]).abs().flatten() for name, tensor in weights(whole).items()])
    assert gaps.max() <= 1e-5 and (gaps > 1e-7).double().mean() <= 1e-2
    assert "not bit for bit" in runs.printed(then, f"from {first} {mode}")


@MODES
def test_checkpoint_holds_all_of_every_slice(runs, mode):
    """Guards against a sharded checkpoint with one process's part of weights or AdamW moments, or with a part twice."""
    folder = runs("FSDP2 x 2", f"AdamW {mode}")
    found, expected = saved_tensors(folder / "checkpoint-4"), saved_tensors(runs("1", f"AdamW {mode}") / "checkpoint-4")
    assert {name: found[name].shape for name in found} == {name: expected[name].shape for name in expected}
    exported, states = weights(folder), [name for name in found if name.startswith("model.")]
    saved = {name.removeprefix("model.causal_lm."): found[name] for name in states}
    saved = {name.replace(".default.weight", ".weight"): tensor for name, tensor in saved.items()}
    assert exported.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exported.items())
    moments = [name for name in found if name.endswith((".exp_avg", ".exp_avg_sq"))]
    assert len(moments) == 2 * len(exported)
    assert all(tensor.eq(4).all() for name, tensor in found.items() if name.endswith(".step"))
    for name in moments:
        assert (found[name] - expected[name]).abs().max() <= min(1e-6, 1e-4 * expected[name].abs().max()), name
    for name in [*moments, *states]:
        if found[name].ndim > 1:
            assert torch.equal(found[name].flatten(1).any(1), expected[name].flatten(1).any(1)), name
        else:
            assert found[name].any(), name
    zero_rows = {name: (~tensor.any(1)).sum().item() for name, tensor in exported.items() if tensor.ndim > 1}
    of_padding = {} if mode == "LoRA" else {"model.embed_tokens.weight": 1}  # the padding token's row
    assert {name: number for name, number in zero_rows.items() if number} == of_padding


# ----------------------------------------------------------------------------------------------------------------------
# The exported model, evaluation


@KINDS
@MODES
def test_export_equals_the_single_process_export(runs, launch, mode):
    """Guards against an export of shards, under prefixes of wrappers, or with files missing."""
    one, two = runs("1", f"1 at a time {mode}"), runs(launch, f"1 at a time {mode}")
    assert {path.name for path in (two / "final").iterdir()} == {path.name for path in (one / "final").iterdir()}
    for name in ("config.json", "adapter_config.json", "generation_config.json"):
        if (one / "final" / name).exists():
            found, expected = (json.loads((folder / "final" / name).read_text()) for folder in (two, one))
            for values in (found, expected):  # a set, which peft writes in any order
                values["target_modules"] = sorted(values.get("target_modules", []))
            assert found == expected
    kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in weights(run).items()} for run in (one, two)]
    assert kinds[0] == kinds[1]
    found, expected = logits(load_exported(two, mode)), logits(load_exported(one, mode))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - logits(AutoModelForCausalLM.from_pretrained(runs.model_folder))).abs().max() > 1e-2


def test_merged_adapter_under_fsdp2(runs):
    """Guards against merging a process's part of the adapter, or into a part of the base."""
    folder = runs("FSDP2 x 2", "merged LoRA") / "final"
    base = AutoModelForCausalLM.from_pretrained(runs.model_folder, dtype=torch.float32)
    base_logits = logits(base)
    expected = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert expected.keys() == merged.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    found = logits(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"))
    assert (logits(merged) - found).abs().max() <= 1e-5 * found.abs().max() and (found - base_logits).abs().max() > 1e-2


@pytest.mark.parametrize("launch, size", SPLITS)
def test_evaluation_of_three_documents(runs, launch, size):
    """Guards against a deadlock where a process has no rows left, and rows that count twice.

    And against a step that trains weights other than those evaluated.
    """
    expected = evaluations(runs("1", "evaluation, 2 at a time"))
    found = evaluations(runs(launch, f"evaluation, {size} at a time"))
    assert [entry["step"] for entry in found] == [0, 1]
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    assert abs(found[1]["eval/cross_entropy"] - found[0]["eval/cross_entropy"]) > 5e-3
    close = partial(math.isclose, rel_tol=1e-5, abs_tol=1e-5)
    for left, right in zip(found, expected, strict=True):
        assert {name: (left[name], right[name]) for name in left if not close(left[name], right[name])} == {}
