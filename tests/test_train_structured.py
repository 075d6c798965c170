"""train_structured.py end to end without a server: against an obvious step, however it is split, after a resume."""

import itertools
import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_structured
from ebft_utils.algorithm.rewards import FeatureRewards, feature_matching_rewards
from ebft_utils.run.metrics import MetricSums
from helpers import (
    ROOT,
    accelerate_launch,
    assert_equal_weights,
    assert_same_weights,
    evaluations,
    logged,
    weights,
    write_rows,
)
from real_vllm import prompts_file

TIMES = {"time", "time/generate", "time/wait", "time/features", "time/train", "time/step"}
LENGTH, SAMPLES, TEMPERATURE = 24, 3, 0.8
MODES = pytest.mark.parametrize("mode", [{}, {"lora": {"r": 4, "alpha": 8.0}}], ids=["full", "LoRA"])


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts") / "rows.jsonl")


@pytest.fixture
def descent(monkeypatch):
    """SGD: updates in proportion to gradients, so that a factor shows in the weights."""

    def descent(parameters, lr, betas, weight_decay):
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", descent)


@pytest.fixture
def run(tmp_path, model_folder, prompts):
    """run(NAME, override, .., section__key=value): runs the script in this process, returns its output folder."""

    sampling = {"temperature": TEMPERATURE, "use_vllm": False}

    def file(name: str, **changes) -> Path:
        tree = {
            "model": {"name_or_path": str(model_folder)},
            "data": {"dataset": str(prompts), "max_prompt_length": 64},
            "ebft": {"num_generations": SAMPLES, "max_completion_length": LENGTH, **sampling},
            "train": {
                "output_dir": str(tmp_path / name),
                "max_steps": 2,
                "batch_size": 4,
                "per_device_batch_size": 2,
                "learning_rate": 1e-2,
                "save_steps": 0,
                "max_grad_norm": 1e6,
            },
            "eval": {"num_documents": 0},
        }
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            if key:
                tree[section][key] = value
            else:
                tree[section] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def start(name: str, *overrides: str, **changes) -> Path:
        AcceleratorState._reset_state(True)
        train_structured.main(["--cfg", str(file(name, **changes)), *overrides])
        return tmp_path / name

    start.file = file
    return start


def numbers(folder: Path, *without: str) -> list[dict]:
    dropped = TIMES | {"train/tokens_per_second", *without}
    return [{name: value for name, value in entry.items() if name not in dropped} for entry in logged(folder)]


def assert_close_numbers(first: Path, second: Path, *without: str) -> None:
    for left, right in zip(numbers(first, *without), numbers(second, *without), strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize("advantage, ratio, share", [(0.0, 0.5, 0), (0.0, 2.0, 0), (1.0, 2.0, 1), (-1.0, 0.5, 1)])
def test_what_the_clip_stops(advantage, ratio, share):
    """A token without advantage is not clipped, wherever its ratio is; one with, where the gradient stops."""
    ebft = SimpleNamespace(epsilon=0.2, use_vllm=False)
    ones, logps, each = torch.ones(1, 2, 3, dtype=torch.bool), torch.zeros(1, 2, 3), torch.zeros(1, 2)
    rewards = FeatureRewards(each, each, each, each, torch.zeros(1))
    tokens = torch.arange(6).view(1, 2, 3)
    groups = train_structured.Groups(tokens, ones, ones, logps, ones[..., 0], each, each, rewards)
    sums, new = MetricSums(), logps + math.log(ratio)
    train_structured.count_completions(SimpleNamespace(ebft=ebft), sums, groups, each + advantage, new, logps)
    total, number = sums.sums["ebft/clipped"].tolist()
    assert (total / number, number) == (share, 6)


# ----------------------------------------------------------------------------------------------------------------------
# One step


def logps_of(model, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    """Log-probs of the tokens behind the prompt, with full logits. (tokens,)."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def naive_step(model_folder, completions, conversations, options: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, each sequence alone, with full logits; completions[row][sample]."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    estimates, ce, num_targets = [], 0.0, sum(len(row.truths[0]) for row in conversations)
    masked = options.get("mask_truncated", False)

    def counts(sample) -> bool:
        return not (masked and sample.truncated)

    num_tokens = sum(len(sample.tokens) for group in completions for sample in group if counts(sample))
    num_completions = sum(map(len, completions))  # those that are left out too: the others' weight stays

    def states(tokens):
        with torch.no_grad():
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return torch.cat([torch.nn.functional.normalize(hidden[layer][0, -1], dim=0) for layer in (1, 2, 3)])

    coefficients = dict(whitening="feature", alignment_coef=1.0, diversity_coef=1.0)
    for row, group in zip(conversations, completions, strict=True):
        features = torch.stack([states(row.prompt + sample.tokens) for sample in group])
        rewards = feature_matching_rewards(features, states(row.prompt + row.truths[0]), **coefficients)
        for sample, advantage in zip(group, rewards.reward - rewards.baseline, strict=True):
            logps = logps_of(model, row.prompt, sample.tokens, TEMPERATURE)
            weight = {
                "bnpo": 1 / num_tokens,
                "grpo": 1 / (len(sample.tokens) * num_completions),
                "dr_grpo": 1 / (num_completions * LENGTH),
            }[options.get("loss_type", "bnpo")]
            ratio = (logps - logps.detach()).exp()  # to the old policy: 1, with the gradient of logps
            estimates.append(-counts(sample) * weight * advantage * ratio.sum())
        ce = ce - logps_of(model, row.prompt, row.truths[0], 1.0).sum() / num_targets
    loss = sum(estimates) + 0.3 * ce
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "grpo"}, {"loss_type": "dr_grpo"}, {"mask_truncated": True}], ids=str
)
def test_a_step_equals_the_obvious_one(run, descent, monkeypatch, model_folder, options):
    """Loss and update of the packed, padded, micro-batched step against each sequence alone with full logits."""
    seen, step_of = [], train_structured.train_step

    def keep(context, batches, completions, update):
        conversations = [row for batch in batches for row in batch.conversations]
        seen.append(([sample for batch in completions for sample in batch], conversations))
        return step_of(context, batches, completions, update)

    monkeypatch.setattr(train_structured, "train_step", keep)
    settings = [f"ebft.{name}={value}" for name, value in options.items()]
    folder = run("step", "train.max_steps=1", "train.warmup_ratio=0", "ebft.ce_coef=0.3", *settings)
    ((completions, conversations),) = seen
    assert {sample.truncated for group in completions for sample in group} == {True, False}
    for sample in itertools.chain.from_iterable(completions):
        assert sample.truncated == (sample.tokens[-1] != 0) and 0 not in sample.tokens[:-1]
        assert len(sample.tokens) == LENGTH or not sample.truncated
    loss, gradients = naive_step(model_folder, completions, conversations, options)
    (entry,) = logged(folder)
    assert entry["train/loss"] == pytest.approx(loss, abs=1e-5)
    before, after = AutoModelForCausalLM.from_pretrained(model_folder).state_dict(), weights(folder)
    for name, gradient in gradients.items():
        assert torch.allclose(before[name] - after[name], 1e-2 * gradient, atol=2e-7), name
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3


def test_second_iteration_starts_from_the_first(run, descent, monkeypatch):
    """num_iterations 2: two updates with one batch of completions, the second against the policy before the first."""
    ratios, loss_of = [], train_structured.losses.clipped_policy_loss

    def keep(logprobs, old_logprobs, advantages, weights, epsilon):
        ratios.append(torch.where(weights != 0, logprobs - old_logprobs, 0.0).abs().max().item())
        return loss_of(logprobs, old_logprobs, advantages, weights, epsilon)

    monkeypatch.setattr(train_structured.losses, "clipped_policy_loss", keep)
    folder = run("twice", "ebft.num_iterations=2", "train.max_steps=1", "train.learning_rate=1.0")
    assert ratios[:2] == [0.0, 0.0] and min(ratios[2:]) > 1e-3
    assert 0 < logged(folder)[0]["ebft/clipped"] < 1
    once = run("once", "train.max_steps=1", "train.learning_rate=1.0")
    assert max((tensor - weights(once)[name]).abs().max() for name, tensor in weights(folder).items()) > 1e-3


def test_supervised_fine_tuning(run, monkeypatch):
    """rl_coef 0 asks for no completions, and no server either."""
    folder = run("sft", "ebft.rl_coef=0", "ebft.ce_coef=1", "ebft.use_vllm=true", "train.max_steps=8")
    entries = logged(folder)
    assert "ebft/mean_reward" not in entries[0] and entries[-1]["ebft/ce_loss"] < entries[0]["ebft/ce_loss"] - 0.3


GROUP_NORM, REINFORCE = "ebft.advantage_estimator=group_norm", "ebft.advantage_estimator=reinforce"


@pytest.mark.parametrize("options", [[GROUP_NORM], [GROUP_NORM, "ebft.scale_rewards=false"], [REINFORCE]])
def test_advantages(run, options):
    """Each estimator is what it says: their spread in the log."""
    spread = logged(run("run", "train.max_steps=1", *options))[0]["ebft/advantages_std"]
    scaled = options == [GROUP_NORM]  # 3 rollouts, leave-one-out: A = 1.5 (r - mean) / std
    assert (abs(spread - 1.5 * (2 / 3) ** 0.5) < 0.01) == scaled and spread > 0.05


# ----------------------------------------------------------------------------------------------------------------------
# However it is split


@MODES
def test_micro_batches_change_nothing(run, descent, mode):
    """4 rows at a time, 2 and 1: the same completions, numbers and weights."""
    whole = run("4", "train.per_device_batch_size=4", "ebft.ce_coef=0.1", **mode)
    for size in (2, 1):
        part = run(str(size), f"train.per_device_batch_size={size}", "ebft.ce_coef=0.1", **mode)
        assert_close_numbers(whole, part)
        assert_same_weights(weights(whole), weights(part), 1e-6)


@pytest.mark.parametrize(
    "launch, mode",
    [("ddp", {"lora": {"r": 4}}), ("fsdp2", {}), ("fsdp2", {"lora": {"r": 4}})],
    ids=["DDP, LoRA", "FSDP2, full", "FSDP2, LoRA"],
)
def test_two_processes_equal_one(run, tmp_path, turns, launch, mode):
    """Real processes, several turns of different numbers.

    Guards against an adapter whose split weights lose their gradient when it is switched off for the features.
    """
    mode = dict(mode, data__dataset=str(turns), data__columns={"turns": "more"})
    alone = run("alone", "train.per_device_batch_size=1", **mode)
    command = accelerate_launch(launch, "--num_processes", "2")
    command += [str(ROOT / "tests" / "fsdp2_on_cpu.py")] * (launch == "fsdp2")
    file = run.file("pair", train__per_device_batch_size=1, **mode)
    command += [str(ROOT / "train_structured.py"), "--cfg", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_close_numbers(alone, tmp_path / "pair")
    assert_same_weights(weights(alone), weights(tmp_path / "pair"), 1e-5, share=0.002)


STREAMED = {"data__streaming": True, "data__shuffle_buffer": 3}


@pytest.mark.parametrize("mode", [{}, {"lora": {"r": 4, "alpha": 8.0}}, STREAMED], ids=["full", "LoRA", "a stream"])
def test_resumed_is_unbroken(run, tmp_path, mode):
    """Bit for bit, in numbers and weights."""
    whole = run("whole", "train.max_steps=4", **mode)
    run("parts", "train.max_steps=2", **mode)
    AcceleratorState._reset_state(True)
    train_structured.main(["--cfg", str(tmp_path / "parts.yaml"), "train.max_steps=4", "train.resume=latest"])
    assert numbers(whole) == numbers(tmp_path / "parts")
    assert_equal_weights(whole, tmp_path / "parts")


def test_evaluation_does_not_depend_on_its_batches(run):
    """1, 2 and 3 rows at a time."""
    found, five = [], ("eval.num_documents=5", "train.max_steps=1")
    for size in (1, 2, 3):
        found.append(evaluations(run(f"eval {size}", *five, f"eval.per_device_batch_size={size}"))[0])
    for other in found[1:]:
        assert found[0] == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert found[0]["eval/reward_best_of_n"] > found[0]["eval/mean_reward"]


# ----------------------------------------------------------------------------------------------------------------------
# Several turns, thinking


def test_several_turns(run, tmp_path, monkeypatch):
    """The policy answers each turn, rows have different numbers of them, and the user's tokens are not trained."""
    later = [{"prompt": f" and{turn} ", "completion": "no"} for turn in range(3)]
    rows = [{"prompt": f"p{row} ", "completion": "yes", "more": later[: row % 3]} for row in range(8)]
    path = write_rows(tmp_path / "turns.jsonl", rows)
    seen, step_of = [], train_structured.train_step

    def keep(context, batches, completions, update):
        seen.extend(
            (row, sample)
            for batch, groups in zip(batches, completions, strict=True)
            for row, group in zip(batch.conversations, groups, strict=True)
            for sample in group
        )
        return step_of(context, batches, completions, update)

    monkeypatch.setattr(train_structured, "train_step", keep)
    folder = run("turns", data__dataset=str(path), data__columns={"turns": "more"})
    assert {len(row.truths) for row, _ in seen} == {1, 2, 3}
    for row, sample in seen:
        foreign = [token for token, written in zip(sample.tokens, sample.written, strict=True) if not written]
        given = [token for gap in row.between for token in gap]
        assert [token for token in foreign if token != 0] == given and sum(sample.written) <= LENGTH * len(row.truths)
    num_written = sum(sum(sample.written) for _, sample in seen[: 4 * SAMPLES])
    assert logged(folder)[0]["rollout/length"] == pytest.approx(num_written / (4 * SAMPLES))


def test_features_of_the_answer_alone(run, tmp_path, model_folder):
    """With feature_span answer a truth's thinking makes no difference to the reward, and with all it does."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rewards = {}
    for span in ("answer", "all"):
        for thought in ("", "<think>a b</think>"):
            rows = [{"prompt": f"p{row} ", "completion": f"{thought}yes {row}"} for row in range(6)]
            path = write_rows(tmp_path / "thinking.jsonl", rows)
            assert len(tokenizer(thought + "yes 1")["input_ids"]) < LENGTH
            changes = dict(data__dataset=str(path), ebft__feature_span=span)
            (entry, *_) = logged(run(f"{span} {len(thought)}", "train.max_steps=1", **changes))
            rewards[span, thought] = entry["ebft/mean_reward"]
    first, second = (rewards["answer", thought] for thought in ("", "<think>a b</think>"))
    assert first == pytest.approx(second, abs=1e-5)
    assert abs(rewards["all", ""] - rewards["all", "<think>a b</think>"]) > 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Several turns in numbers, lengths that differ from row to row


METRICS = {
    "step",
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_second",
    "ebft/rl_loss",
    "ebft/ce_loss",
    "ebft/alignment",
    "ebft/diversity",
    "ebft/mean_reward",
    "ebft/cfm_loss",
    "ebft/cfm_unbiased",
    "train/tokens",
    "train/epoch",
    "ebft/advantages_std",
    "ebft/duplicate_rollouts",
    "ebft/clipped",
    "rollout/length",
    "rollout/truncated",
    "rollout/entropy",
} | TIMES


def test_numbers_of_a_step(run):
    """Guards against a metric that disappears, is not finite, or is summed where a mean is meant."""
    coefficients = ("ebft.ce_coef=0.2", "ebft.rl_coef=0.7", "ebft.alignment_coef=0.5", "ebft.diversity_coef=0.25")
    for entry in logged(run("names", *coefficients, "ebft.whitening=none")):
        assert entry.keys() == METRICS and all(math.isfinite(value) for value in entry.values())
        assert entry["train/loss"] == pytest.approx(0.7 * entry["ebft/rl_loss"] + 0.2 * entry["ebft/ce_loss"], abs=1e-5)
        reward = 0.5 * entry["ebft/alignment"] - 0.25 * entry["ebft/diversity"]
        assert entry["ebft/mean_reward"] == pytest.approx(reward, abs=1e-5)
        assert 1 <= entry["rollout/length"] <= LENGTH and 0 <= entry["rollout/truncated"] <= 1
        assert entry["rollout/entropy"] > 0 and entry["ebft/clipped"] == 0
        assert 0 <= entry["ebft/duplicate_rollouts"] < 1 and -2 <= entry["ebft/alignment"] <= 2


@pytest.fixture
def turns(tmp_path) -> Path:
    """8 rows of 1 to 3 turns."""
    later = [{"prompt": f" and{turn} ", "completion": "no" * (turn + 1)} for turn in range(3)]
    rows = [{"prompt": f"p{row} ", "completion": "yes", "more": later[: row % 3]} for row in range(8)]
    return write_rows(tmp_path / "rows_of_turns.jsonl", rows)


def test_a_step_of_several_turns_equals_the_obvious_one(run, monkeypatch, model_folder, turns):
    """Guards against the user's turns, or an end-of-text token that was put there, in the policy gradient, its
    denominator or the cross-entropy.
    """
    seen, step_of = [], train_structured.train_step

    def keep(context, batches, completions, update):
        for batch, groups in zip(batches, completions, strict=True):
            rewards = train_structured.score(context, batch, groups).rewards
            advantages = train_structured.advantages_of(context.config, rewards)
            seen.extend(zip(batch.conversations, groups, advantages, strict=True))
        return step_of(context, batches, completions, update)

    monkeypatch.setattr(train_structured, "train_step", keep)
    settings = ("train.max_steps=1", "ebft.ce_coef=0.3", "ebft.max_completion_length=6")
    (entry,) = logged(run("turns", *settings, data__dataset=str(turns), data__columns={"turns": "more"}))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rl, num_tokens, ce, num_targets, inserted = 0.0, 0, 0.0, 0, 0
    for row, samples, advantages in seen:
        for sample, advantage in zip(samples, advantages, strict=True):
            own = torch.tensor(sample.written)
            inserted += len(sample.tokens) - int(own.sum()) - sum(map(len, row.between))
            values = logps_of(model, row.prompt, sample.tokens, TEMPERATURE)[own]
            rl, num_tokens = rl - advantage * (values - values.detach()).exp().sum(), num_tokens + len(values)
        tokens, own = [], []
        for turn, gap in zip(row.truths, [*row.between, []], strict=True):
            tokens += turn + gap
            own += [True] * len(turn) + [False] * len(gap)
        values = logps_of(model, row.prompt, tokens, 1.0)[torch.tensor(own)]
        ce, num_targets = ce - values.sum(), num_targets + len(values)
    loss = rl / num_tokens + 0.3 * ce / num_targets
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()
    assert len({len(row.truths) for row, _, _ in seen}) > 1 and inserted > 0
    assert entry["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert entry["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert entry["rollout/length"] == pytest.approx(num_tokens / (4 * SAMPLES))
    assert entry["ebft/ce_loss"] == pytest.approx(ce.item() / num_targets, abs=1e-5)


@pytest.mark.parametrize("case", ["turns", "adaptive lengths"])
def test_micro_batches_of_unlike_rows_change_nothing(run, descent, tmp_path, turns, case):
    """Guards against completions that depend on how many turns the rows beside them have, or how long those may be."""
    changes, one_step = dict(data__dataset=str(turns), data__columns={"turns": "more"}), "train.max_steps=1"
    if case == "adaptive lengths":
        rows = [{"prompt": f"row {row}: ", "completion": "abcdefghij" * (4 + 2 * (row % 4))} for row in range(8)]
        changes = dict(data__dataset=str(write_rows(tmp_path / "lengths.jsonl", rows)))
        changes |= dict(ebft__max_completion_length=110, ebft__adaptive_max_tokens=True, ebft__gt_length_multiplier=1.0)
    whole, part = (
        run(f"{size} rows", f"train.per_device_batch_size={size}", one_step, "ebft.ce_coef=0.1", **changes)
        for size in (4, 1)
    )
    assert_close_numbers(whole, part)
    assert_same_weights(weights(whole), weights(part), 1e-6)
