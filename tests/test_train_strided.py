"""The script end to end on a tiny model: what a run leaves, that it can go on, that no split of the work changes it.

Most runs call `train_strided.main` in this process (0.3 s instead of 6); the ones that must be real run the command.
"""

import json
import math
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_strided
from ebft_utils.config.modes import load_config
from ebft_utils.config.settings import UserError
from ebft_utils.data.rows import Rows, load_rows, rows_of_step
from ebft_utils.models import load_tokenizer
from ebft_utils.run.metrics import evaluation_metrics
from helpers import (
    ROOT,
    assert_close_runs,
    assert_holds,
    assert_same_weights,
    assert_trained,
    evaluations,
    logged,
    saved_tensors,
    training,
    weights,
)

METRIC_NAMES = {
    "ebft/alignment",
    "ebft/diversity",
    "ebft/mean_reward",
    "ebft/cfm_loss",
    "ebft/cfm_unbiased",
    "ebft/rl_loss",
    "ebft/ce_loss",
    "ebft/advantages_std",
    "ebft/duplicate_rollouts",
    "ebft/valid_anchors",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/tokens",
    "train/epoch",
    "time/step",
}
MODES = pytest.mark.parametrize("mode", [{}, {"lora": {"r": 4, "alpha": 8.0}}], ids=["full", "LoRA"])
ADAMW = dict(betas=(0.9, 0.95), weight_decay=0.0)


# ----------------------------------------------------------------------------------------------------------------------
# (a) What a run leaves behind, with the real command


@MODES
def test_the_command_trains_and_saves(run_script, write_config, model_folder, tmp_path, mode):
    """Guards against a run that ends well and leaves no usable model, no numbers, or numbers that differ between its
    two logs.
    """
    file = write_config(**mode, train__learning_rate=1e-2)
    result = run_script("train_strided.py", "--cfg", file)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run"

    entries = [entry for entry in logged(folder) if "train/loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert all(METRIC_NAMES <= entry.keys() for entry in entries)
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    assert [entry["train/learning_rate"] for entry in entries] == [1e-2] * 3
    assert all(0 < entry["ebft/valid_anchors"] <= 1 and 0 <= entry["ebft/duplicate_rollouts"] < 1 for entry in entries)
    positive = ("train/grad_norm", "train/tokens_per_second", "ebft/advantages_std")
    assert all(entry[name] > 0 for entry in entries for name in positive)
    assert [entry["step"] for entry in evaluations(folder)] == [0, 3]

    events = EventAccumulator(str(folder / "tensorboard" / "ebft"), size_guidance={"tensors": 0}).Reload()
    for name in METRIC_NAMES:
        expected = [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in entries]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    (samples,) = events.Tensors("rollouts/text_summary")
    text = samples.tensor_proto.string_val[0].decode()
    heads = re.findall(r"^\*\*reward (\S+) to (\S+)\*\*, mean \S+, \d rollouts$", text, flags=re.MULTILINE)
    assert 2 <= len(heads) <= 8 and all(float(best) >= float(worst) for best, worst in heads)
    assert text.count("── prefix") == len(heads)

    AutoTokenizer.from_pretrained(folder / "final")("some text")
    ids = torch.arange(3, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(model_folder)(ids).logits
    loader = AutoPeftModelForCausalLM if mode else AutoModelForCausalLM
    trained = loader.from_pretrained(folder / "final")(ids).logits
    assert (trained - base).abs().max() > 1e-2
    assert load_config(str(folder / "final" / "training_config.yaml")) == load_config(str(file))
    card = (folder / "final" / "README.md").read_text()
    for name in ("cross_entropy", "cfm_loss", "cfm_unbiased", "mean_reward", "reward_best_of_n", "perplexity"):
        for entry in evaluations(folder):
            assert f"{entry['eval/' + name]:.4f} ± {entry['eval/' + name + '_se']:.4f}" in card
    assert model_folder.name in card and "step 0" in card and "step 3" in card
    assert yaml.safe_load((folder / "config.yaml").read_text()) == load_config(str(file)).to_dict()


def test_print_config(write_config, capsys, tmp_path):
    """Guards against --print-config that starts a run, or prints the file instead of what it is merged with."""
    train_strided.main(["--cfg", str(write_config()), "--print-config", "train.seed=9"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["train"]["seed"] == 9 and printed["train"]["max_steps"] == 3
    assert printed["ebft"]["temperature"] == 0.6
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# (b) Interrupted and continued


@pytest.fixture
def interrupted(train, monkeypatch):
    """interrupted(NAME, 2, ...): a run that is stopped by Ctrl-C in its third step."""

    def run(name: str, after: int, *overrides: str, **changes) -> None:
        step_of, steps = train_strided.train_step, iter(range(after))

        def stop(*arguments):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return step_of(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(train_strided, "train_step", stop)
            with pytest.raises(KeyboardInterrupt):
                train(name, *overrides, **changes)

    return run


@MODES
def test_resumed_run_equals_the_unbroken_one(train, interrupted, tmp_path, mode):
    """Guards against lost optimizer state, a schedule or data order that starts anew, other rollouts, and metrics that
    are lost or written twice.
    """
    schedule = dict(train__lr_scheduler="cosine", train__warmup_ratio=0.5, train__learning_rate=1e-2)
    changes = dict(**mode, **schedule, train__max_steps=4, ebft__ce_coef=0.1)
    whole = train("whole", **changes)
    interrupted("broken", 2, **changes)
    broken = tmp_path / "broken"
    assert (broken / "checkpoint-2" / "SHA256SUMS").is_file() and not (broken / "final").exists()
    assert training(broken) == training(whole)[:2]
    train("broken", "train.resume=latest", **changes)
    assert training(broken) == training(whole)
    expected, found = weights(whole), weights(broken)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_steps_after_the_last_checkpoint_are_done_again(train, interrupted, tmp_path):
    """Guards against a crash (no chance to save) between two saves: logged steps after the checkpoint must be replaced,
    not doubled.
    """
    changes = dict(train__max_steps=6, train__save_steps=3)
    whole = train("whole", **changes)
    interrupted("broken", 5, **changes)
    broken = tmp_path / "broken"
    shutil.rmtree(broken / "checkpoint-5")  # as if the process had been killed
    assert [entry["step"] for entry in logged(broken)] == [1, 2, 3, 4, 5]
    train("broken", "train.resume=latest", **changes)
    assert training(broken) == training(whole)
    assert all(torch.equal(tensor, weights(broken)[name]) for name, tensor in weights(whole).items())
    events = EventAccumulator(str(broken / "tensorboard" / "ebft")).Reload().Scalars("ebft/ce_loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]


def test_resumed_run_reports_the_evaluation_before_training(train, interrupted, tmp_path):
    """Guards against a model card without a 'before', and a last evaluation without changes, after an interruption."""
    changes = dict(train__max_steps=2, eval__num_documents=4)
    whole = train("whole", **changes)
    interrupted("broken", 1, **changes)
    broken = train("broken", "train.resume=latest", **changes)
    assert evaluations(broken) == evaluations(whole) and [entry["step"] for entry in evaluations(whole)] == [0, 2]
    table = (whole / "final" / "README.md").read_text().partition("Held-out")[2]
    assert (broken / "final" / "README.md").read_text().partition("Held-out")[2] == table


@pytest.mark.parametrize("override", ["eval.num_documents=5", "eval.seed=3"])
def test_resume_with_other_evaluation_documents(train, interrupted, tmp_path, override):
    """Guards against a change between two sets of documents, and a traceback where their numbers differ."""
    changes = dict(train__max_steps=2, eval__num_documents=4)
    interrupted("run", 1, **changes)
    try:
        train("run", "train.resume=latest", override, **changes)
    except UserError as error:
        assert "train.resume" in str(error) and override.partition("=")[0] in str(error)
    else:
        (last,) = [entry for entry in evaluations(tmp_path / "run") if entry["step"] == 2]
        assert not [name for name in last if "change" in name]


def test_resume_beyond_max_steps(train):
    """Guards against a model card that says 2 steps for a model of 3."""
    folder = train("run", "train.max_steps=3")
    with pytest.raises(UserError) as caught:
        train("run", "train.max_steps=2", "train.resume=latest")
    assert "train.max_steps" in str(caught.value) and "checkpoint-3" in str(caught.value)
    assert len(training(folder)) == 3


def test_resuming_a_finished_run_changes_nothing(train):
    """Guards against a second final evaluation in metrics.jsonl, or a step too many."""
    changes = dict(train__max_steps=2, eval__num_documents=4)
    folder = train("run", **changes)
    entries, before = logged(folder), weights(folder)
    train("run", "train.resume=latest", **changes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())
    assert [entry["step"] for entry in logged(folder)] == [entry["step"] for entry in entries]


def test_save_total_limit(train):
    """Guards against a disk full of checkpoints, and against removing the newest."""
    folder = train("run", "train.save_steps=1", "train.save_total_limit=2", "train.max_steps=11")
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-10", "checkpoint-11"]
    assert json.loads((folder / "checkpoint-11" / "run.json").read_text())["step"] == 11


def test_resume_from_an_earlier_checkpoint(train):
    """Guards against removing the checkpoint that was just written because older runs left later ones behind.

    `latest` must be this run's.
    """
    all_four = ("train.save_steps=1", "train.max_steps=4", "train.save_total_limit=4")
    folder = train("run", *all_four)
    last = ("train.max_steps=4", "train.save_steps=2", "train.save_total_limit=1")
    train("run", f"train.resume={folder / 'checkpoint-1'}", *last)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    state = saved_tensors(folder / "checkpoint-4")
    assert all(torch.equal(state[f"model.causal_lm.{name}"], tensor) for name, tensor in weights(folder).items())
    again = train("again", *all_four)
    train("again", f"train.resume={again / 'checkpoint-1'}", "train.max_steps=2", "train.save_total_limit=1")
    assert [path.name for path in again.glob("checkpoint-*")] == ["checkpoint-2"]


def test_half_written_checkpoint_is_ignored(train, interrupted, tmp_path):
    """Guards against resuming from what a crash left behind; only whole folders count."""
    changes = dict(train__max_steps=3)
    whole = train("whole", **changes)
    interrupted("broken", 2, **changes)
    broken = tmp_path / "broken"
    for name in (".checkpoint-3.tmp", "checkpoint-3"):
        (broken / name / "state").mkdir(parents=True)
        (broken / name / "state" / "__0_0.distcp").write_bytes(b"half a checkpoint")
    train("broken", "train.resume=latest", **changes)
    assert training(broken) == training(whole)
    assert all(torch.equal(tensor, weights(broken)[name]) for name, tensor in weights(whole).items())


# ----------------------------------------------------------------------------------------------------------------------
# (c, f, h) The same result however the work is split


@pytest.fixture
def plain_descent(monkeypatch):
    """SGD in AdamW's place: updates are proportional to the gradients, so a wrong factor shows in the weights."""

    def descent(parameters, lr, betas, weight_decay):
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", descent)


@MODES
def test_gradient_accumulation_changes_nothing(train, plain_descent, mode):
    """Guards against losses that are averaged over micro-batches, and rollouts that depend on the batch.

    With such losses documents of different lengths would get different weights.
    """
    changes = dict(**mode, train__max_steps=2, ebft__ce_coef=0.3, train__learning_rate=0.1)
    sizes = [(f"{size} at a time", f"train.per_device_batch_size={size}") for size in (4, 1, 2)]
    runs = [train(name, "train.batch_size=4", size, **changes) for name, size in sizes]
    # padding, so lengths, did differ
    assert len({entry["ebft/valid_anchors"] for entry in training(runs[0]) + training(runs[1])}) > 1
    assert training(runs[0])[1]["train/grad_norm"] > 0.1
    for run in runs[1:]:
        assert_close_runs(runs[0], run)


@MODES
def test_gradient_checkpointing_changes_nothing(train, plain_descent, mode):
    """Guards against an empty KV cache in train mode (garbage rollouts), and adapters without a gradient.

    None comes through a checkpointed frozen embedding by itself.
    """
    changes = dict(**mode, train__max_steps=2, ebft__ce_coef=0.3, train__learning_rate=0.1)
    assert_close_runs(train("off", **changes), train("on", "model.gradient_checkpointing=true", **changes))


@pytest.fixture
def two_processes():
    """Runs the script on two CPU processes; none of them outlives the test, not even a deadlocked one."""

    def run(file: Path, timeout: float) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
        command += [str(ROOT / "train_strided.py"), "--cfg", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends its workers
            process.communicate(timeout=60)
            pytest.fail(f"deadlock: two processes did not end within {timeout} s")
        assert process.returncode == 0, stderr[-3000:]
        return stdout

    return run


@MODES
def test_two_processes_equal_one(train, two_processes, write_config, tmp_path, mode):
    """Guards against gradients that are not reduced, or averaged, and rows that both processes train on."""
    rate = 1e-5
    changes = dict(
        **mode,
        train__max_steps=2,
        ebft__ce_coef=0.3,
        eval__num_documents=3,
        eval__per_device_batch_size=1,
        train__learning_rate=rate,
    )
    one = train("one", "train.per_device_batch_size=4", "train.batch_size=4", **changes)
    file = write_config(
        **changes, train__output_dir=str(tmp_path / "two"), train__per_device_batch_size=1, train__batch_size=4
    )
    assert "2 processes on cpu, DDP" in two_processes(file, timeout=120)
    assert_close_runs(one, tmp_path / "two", tolerance=0.1 * rate, share=1e-2)


def test_two_processes_with_less_than_one_evaluation_batch_each(two_processes, write_config, tmp_path, train):
    """Guards against a deadlock: the second process has nothing to evaluate, the other one's DDP broadcasts buffers."""
    changes = dict(eval__num_documents=2, eval__per_device_batch_size=2, train__max_steps=1, train__learning_rate=1e-5)
    one = train("one", "train.per_device_batch_size=2", **changes)
    two_processes(write_config(**changes, train__per_device_batch_size=1), timeout=40)
    for left, right in zip(logged(one), logged(tmp_path / "run"), strict=True):
        pairs = {name: (value, right[name]) for name, value in left.items() if name.startswith("eval/")}
        assert {name: pair for name, pair in pairs.items() if not math.isclose(*pair, rel_tol=1e-4, abs_tol=1e-5)} == {}


# ----------------------------------------------------------------------------------------------------------------------
# (d, e) Against naive computations


def naive_documents(text_file: Path, tokenizer, sequence_length: int = 48, shortest: int = 8) -> list[torch.Tensor]:
    """Token ids of each line with EOS behind it, as the configuration of these tests asks for: in pieces of 48.

    A last piece of fewer than 8 tokens has no room for an anchor.
    """
    documents = []
    for line in text_file.read_text().splitlines():
        ids = torch.tensor([*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id])
        documents += [piece for piece in ids.split(sequence_length) if len(piece) >= shortest]
    return documents


def summed_cross_entropy(model, ids: torch.Tensor) -> torch.Tensor:
    """Of one document alone, by transformers' own mask and positions."""
    return torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")


def test_cross_entropy_alone_is_plain_fine_tuning(train, model_folder, text_file):
    """Guards against an SFT baseline that is not SFT: a naive loop over documents with AdamW gives the same weights."""
    sft = ("ebft.rl_coef=0", "ebft.ce_coef=1", "train.learning_rate=1e-2")
    folder = train("sft", *sft, "train.max_steps=2", "train.batch_size=4")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    documents = naive_documents(text_file, AutoTokenizer.from_pretrained(model_folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **ADAMW)
    for step, entry in enumerate(training(folder)):
        chosen = [documents[row] for row in rows_of_step(Rows(None, documents), step, 4)]
        loss = sum(summed_cross_entropy(model, ids) for ids in chosen) / sum(len(ids) - 1 for ids in chosen)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert entry["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert entry["ebft/ce_loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert entry["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert not {"ebft/alignment", "ebft/rl_loss"} & entry.keys()
    assert_trained(folder, load_file(model_folder / "model.safetensors"))
    assert_same_weights(weights(folder), dict(model.named_parameters()), share=1e-3)


def test_one_step_is_the_naive_policy_gradient(train, plain_descent, monkeypatch, model_folder):
    """Guards against log-probs at temperature 1 of tokens sampled at 0.6, a baseline that is not eq 94, and anchors or
    documents weighted unevenly.
    """
    seen, score = [], train_strided.sample_and_score

    def keep(config, accelerator, policy, network, batch, seed):
        seen.append((batch, score(config, accelerator, policy, network, batch, seed)))
        return seen[-1][1]

    monkeypatch.setattr(train_strided, "sample_and_score", keep)
    settings = ("ebft.alignment_coef=0.7", "ebft.diversity_coef=0.4", "ebft.whitening=none")
    settings += ("ebft.ce_coef=0", "ebft.temperature=0.6")
    folder = train("run", "train.max_steps=1", "train.learning_rate=0.1", *settings)
    ((batch, groups),) = seen
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loss, count = 0.0, 0
    for row, slot in batch.valid.nonzero().tolist():
        anchor, rollouts = int(batch.anchors[row, slot]), groups.rollouts[row, slot]
        a, d = groups.rewards.alignment[row, slot], groups.rewards.diversity[row, slot]
        baseline = 0.7 * (a.sum() - a) / 2 - 0.4 * (d.sum() - 2 * d) / 1
        advantages = 0.7 * a - 0.4 * d - baseline
        for advantage, rollout in zip(advantages, rollouts, strict=True):
            logits = model(torch.cat([batch.document_ids[row, :anchor], rollout])[None]).logits[0, anchor - 1 : -1]
            loss = loss - advantage * (logits / 0.6).log_softmax(-1).gather(-1, rollout[:, None]).sum()
            count += len(rollout)
    loss = loss / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    (entry,) = training(folder)
    assert entry["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert entry["ebft/rl_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert entry["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    expected = {name: (parameter - 0.1 * parameter.grad).detach() for name, parameter in model.named_parameters()}
    assert_same_weights(weights(folder), expected)


@pytest.fixture
def evaluation(train):
    """Results of an eval.only run."""

    def run(name: str, *overrides: str, **changes) -> dict:
        folder = train(name, "eval.only=true", *overrides, **{"eval__num_documents": 7, **changes})
        return json.loads((folder / "eval-step-0.json").read_text())

    return run


@MODES
def test_evaluation_is_repeatable_and_independent_of_the_batch(evaluation, mode):
    """Guards against rollouts that depend on global random state, on train.seed, or on the documents that share the
    batch.
    """
    first = evaluation("first", **mode)
    assert evaluation("second", "train.seed=3", **mode) == first
    alone = evaluation("alone", "eval.per_device_batch_size=1", **mode)
    assert alone == pytest.approx(first, rel=1e-5, abs=1e-5)
    assert evaluation("other", "eval.seed=1", **mode)["eval/cfm_loss"] != first["eval/cfm_loss"]
    for name in ("cross_entropy", "cfm_loss", "cfm_unbiased", "mean_reward", "reward_best_of_n", "perplexity"):
        assert math.isfinite(first[f"eval/{name}"]) and first[f"eval/{name}_se"] > 0
    assert first["eval/reward_best_of_n"] > first["eval/mean_reward"]


def test_evaluated_cross_entropy_is_the_naive_one(evaluation, write_config, model_folder, text_file):
    """Guards against padding, the last token or the temperature getting into the cross-entropy; its error is that over
    documents.
    """
    result = evaluation("run")
    file = write_config(eval__num_documents=7)
    config = load_config(str(file))
    _, held_out = load_rows(config, load_tokenizer(config.model))
    held = [torch.tensor(held_out[row][0].tokens) for row in range(7)]
    everything = [ids.tolist() for ids in naive_documents(text_file, AutoTokenizer.from_pretrained(model_folder))]
    assert all(ids.tolist() in everything for ids in held)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        totals = torch.stack([summed_cross_entropy(model, ids) for ids in held]).double()
    counts = torch.tensor([len(ids) - 1 for ids in held]).double()
    mean = (totals.sum() / counts.sum()).item()
    error = ((totals - mean * counts).square().sum() * 7 / 6).sqrt().item() / counts.sum().item()
    assert result["eval/cross_entropy"] == pytest.approx(mean, abs=1e-5)
    assert result["eval/cross_entropy_se"] == pytest.approx(error, rel=1e-4)
    assert result["eval/perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)


def test_training_evaluates_like_eval_only_and_is_not_disturbed_by_it(train, evaluation):
    """Guards against an evaluation that changes the model's mode or the random numbers, and two that differ."""
    alone = evaluation("alone")
    changes = dict(train__max_steps=3, eval__num_documents=7)
    silent = train("silent", "eval.at_start=false", "eval.at_end=false", **changes)
    often = train("often", "eval.every_steps=1", **changes)
    assert training(silent) == training(often)
    assert all(torch.equal(tensor, weights(often)[name]) for name, tensor in weights(silent).items())
    assert [entry["step"] for entry in evaluations(often)] == [0, 1, 2, 3]
    assert evaluations(often)[0] == alone


def test_evaluation_of_a_checkpoint(train, evaluation):
    """Guards against eval.only with train.resume that evaluates the weights of the start."""
    folder = train("run", train__max_steps=2, eval__num_documents=7)
    last = evaluations(folder)[-1]
    train("elsewhere", "eval.only=true", f"train.resume={folder / 'checkpoint-2'}", eval__num_documents=7)
    found = json.loads((folder / "eval-checkpoint-2.json").read_text())
    assert found == {name: last[name] for name in found}
    assert found["step"] == 2 and not list((folder.parent / "elsewhere").glob("eval*"))


def test_evaluation_says_which_weights_it_is_of(train, evaluation, capsys):
    """Guards against numbers of the base model that are taken for those of the run in whose folder they are."""
    folder = train("run")
    capsys.readouterr()
    assert evaluation("run")["step"] == 0
    said = capsys.readouterr().out
    words = ("before training (not", folder / "checkpoint-3", "train.resume=latest", folder / "eval-step-0.json")
    assert_holds(said, *words)


@MODES
def test_evaluation_runs_in_the_chosen_precision(evaluation, mode):
    """Guards against an evaluation that goes around the prepared module, and measures a float32 model nobody trains."""
    low, exact = evaluation("bf16", "model.dtype=bfloat16", **mode), evaluation("fp32", **mode)
    assert 1e-6 < abs(low["eval/cross_entropy"] - exact["eval/cross_entropy"]) < 0.05


def test_evaluation_metrics_by_hand():
    """Guards against the error of a change being that of its levels.

    Two documents of one token: 2 and 5 now, 1 and 3 before.
    """
    names = train_strided.EVALUATED
    after = {name: torch.tensor([[2.0, 5.0], [1.0, 1.0]]) for name in names}
    before = {name: torch.tensor([[1.0, 3.0], [1.0, 1.0]]) for name in names}
    found = evaluation_metrics(after, before)
    by_hand = {"": 3.5, "_se": 1.5, "_change": 1.5, "_change_se": 0.5}
    for name in names:
        assert {end: found[f"eval/{name}{end}"] for end in by_hand} == pytest.approx(by_hand)
    assert found["eval/perplexity"] == pytest.approx(math.exp(3.5))
    assert found["eval/perplexity_se"] == pytest.approx(1.5 * math.exp(3.5))
    assert not [name for name in evaluation_metrics(after, None) if "change" in name]


def test_perplexity_of_a_diverged_model():
    """Guards against an OverflowError, at the very end of a run, for a cross-entropy above 709."""
    table = {name: torch.tensor([[2000.0, 3000.0], [2.0, 3.0]]) for name in train_strided.EVALUATED}
    assert evaluation_metrics(table, None)["eval/perplexity"] == math.inf


def test_one_held_out_document(train):
    """Guards against NaN in metrics.jsonl (not JSON) when there is no standard error."""
    entries = logged(train("run", train__max_steps=1, eval__num_documents=1))
    assert [entry["step"] for entry in entries] == [0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# (g, i, k) Choices


@MODES
def test_bfloat16_keeps_what_is_trained_in_float32(train, mode):
    """Guards against weights or AdamW moments in bfloat16 (updates of 1e-6 round away), and a dtype without effect."""
    changes = dict(**mode, ebft__ce_coef=0.3, train__learning_rate=1e-6, train__max_steps=2)
    folder, exact = train("bf16", "model.dtype=bfloat16", **changes), train("fp32", **changes)
    state = saved_tensors(folder / "checkpoint-2")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    num_weights = sum(name.startswith("model.") for name in state)
    assert sum(name.endswith((".exp_avg", ".exp_avg_sq")) for name in state) == 2 * num_weights
    assert len(state) == 4 * num_weights
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}
    for low, high in zip(training(folder), training(exact), strict=True):
        assert 1e-6 < abs(low["ebft/ce_loss"] - high["ebft/ce_loss"]) < 0.1
    if mode:
        moved = [tensor.abs().max().item() for name, tensor in weights(folder).items() if "lora_B" in name]
        assert all(0 < value <= 2.1e-6 for value in moved)  # two AdamW steps of at most 1e-6


def test_packing_trains_on_the_same_tokens(train, write_config):
    """Guards against packed documents that see each other, or targets and anchors over a document's end.

    Over all rows at once nothing may change.
    """
    changes = dict(data__sequence_length=96, ebft__ce_coef=1.0, train__max_steps=1, train__warmup_ratio=0.0)
    config = load_config(str(write_config(**changes, data__packing=True, eval__num_documents=0)))
    rows, _ = load_rows(config, load_tokenizer(config.model))
    assert len(rows) < 40

    def all_at_once(number: int) -> tuple[str, ...]:
        return f"train.batch_size={number}", f"train.per_device_batch_size={number}"

    packed = train("packed", "data.packing=true", *all_at_once(len(rows)), **changes)
    alone = train("alone", *all_at_once(40), **changes)
    assert training(packed)[0]["ebft/ce_loss"] == pytest.approx(training(alone)[0]["ebft/ce_loss"], abs=1e-5)
    sft = dict(**changes, ebft__rl_coef=0.0)
    packed = train("packed sft", "data.packing=true", *all_at_once(len(rows)), **sft)
    alone = train("alone sft", *all_at_once(40), **sft)
    assert training(packed)[0]["train/grad_norm"] == pytest.approx(training(alone)[0]["train/grad_norm"], rel=1e-5)


def test_packed_run_of_several_steps(train):
    """Guards against packing that works for one batch only."""
    entries = training(train("run", "data.packing=true", "data.sequence_length=96", "train.max_steps=3"))
    assert len(entries) == 3 and all(math.isfinite(value) for entry in entries for value in entry.values())
    assert len({entry["ebft/rl_loss"] for entry in entries}) == 3
