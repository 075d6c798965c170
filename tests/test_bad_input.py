"""What users get wrong: each ends with one clear message on stderr, a non-zero exit code and no traceback.

Most runs go through the script's `__main__` in this process (`runpy`: the same code path as the command, without 5 s of
imports); an exception that is not turned into a message fails the test. A few run the real command.
"""

import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ebft_utils.config.data import TextDataConfig
from ebft_utils.config.modes import StridedConfig
from ebft_utils.config.sections import ModelConfig, StridedEBFTConfig, TrainConfig
from ebft_utils.layouts import choose_layout
from ebft_utils.models import load_feature_network, load_policy
from helpers import ROOT, assert_holds, saved_tensors, tiny_model, tiny_tokenizer, write_rows

# ----------------------------------------------------------------------------------------------------------------------
# The real command


MISTAKES = {
    "misspelt key": ({}, "ebft.strid=4", ["command line", "ebft.strid", "did you mean ebft.stride?"]),
    "missing data file": ({"data__dataset": "nowhere.jsonl"}, None, ["nowhere.jsonl", "does not exist"]),
}


@pytest.mark.parametrize("changes, override, words", MISTAKES.values(), ids=MISTAKES)
def test_the_command_itself_shows_one_message(run_script, write_config, changes, override, words):
    """Guards against UserError being caught inside main but not where the interpreter would print a traceback."""
    result = run_script("train_strided.py", "--cfg", write_config(**changes), *([override] if override else []))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert_holds(lines[0], *words)


def test_the_command_stops_on_a_non_finite_loss(run_script, write_config, tmp_path):
    """Guards against a diverged run that goes on, ends with exit code 0, or with a traceback of the linear algebra."""
    overrides = ("train.learning_rate=1e30", "train.warmup_ratio=0", "eval.num_documents=0")
    result = run_script("train_strided.py", "--cfg", write_config(), *overrides)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert_holds(lines[0], "step 2", "not finite", "before the update", "checkpoint-1", "train.learning_rate")
    assert not (tmp_path / "run" / "final").exists()


def test_help_exits_without_an_error(command):
    """Guards against a docstring that argparse cannot format (a bare % is enough)."""
    assert command("--help")[0] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


LENGTH = ["data.sequence_length", "48"]
WRONG = [
    ("ebft.n_sample_per_prompt", 4, ["ebft.n_sample_per_prompt", "did you mean ebft.n_samples_per_prompt?"]),
    ("train.max_steps", "many", ["train.max_steps", "'many'", "whole number"]),
    ("ebft.temperature", -1, ["ebft.temperature", "-1", "at least 0.0001"]),
    ("ebft.feature_layers", [0.5, 1.5], ["ebft.feature_layers[1]", "1.5", "at most 1"]),
    ("ebft.n_samples_per_prompt", 1, ["ebft.n_samples_per_prompt", "1", "2 or more"]),
    ("ebft.stride", 0, ["ebft.stride", "0", "at least 1"]),
    ("ebft.context_length", 100, [*LENGTH, "ebft.context_length 100", "ebft.generate_max_len 4", "104"]),
    ("ebft.top_p", 0.9, ["ebft.top_p", "0.9", "1.0"]),
]


@pytest.mark.parametrize("key, value, words", WRONG)
def test_wrong_value_in_the_file(refused, write_config, tmp_path, key, value, words):
    """Guards against a wrong value that reaches the model, and against an output folder that is made before the
    configuration is checked.
    """
    file = write_config(**{key.replace(".", "__"): value})
    assert_holds(refused("--cfg", file), file, *words)
    assert not (tmp_path / "run").exists()


def test_missing_configuration_file(refused, tmp_path):
    """Guards against a traceback for a mistyped path."""
    assert_holds(refused("--cfg", tmp_path / "none.yaml"), tmp_path / "none.yaml", "No such file")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_missing_data_file(refused, write_config, tmp_path):
    """Guards against a local file that is looked for on the hub."""
    message = refused("--cfg", write_config(data__dataset=str(tmp_path / "none.jsonl")))
    assert_holds(message, "data", tmp_path / "none.jsonl", "does not exist")


def test_file_of_an_unknown_kind(refused, write_config, tmp_path, monkeypatch):
    """Guards against a file that is there being looked for on the hub."""
    (tmp_path / "notes.md").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert_holds(refused("--cfg", write_config(data__dataset="notes.md")), "data", "notes.md", ".jsonl")


def test_missing_column(refused, write_config, text_file):
    """Guards against a KeyError in the tokeniser."""
    message = refused("--cfg", write_config(data__columns={"text": "body"}))
    assert_holds(message, text_file, "'body'", "it has text", "data.columns.text")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt", "empty.csv"])
def test_empty_dataset(refused, write_config, tmp_path, name):
    """Guards against a StopIteration, or an unspecific 'error while generating', for an empty file."""
    (tmp_path / name).write_text("")
    message = refused("--cfg", write_config(data__dataset=str(tmp_path / name)))
    assert_holds(message, "data", tmp_path / name, "is empty")


def test_document_too_short_for_one_anchor(refused, write_config, tmp_path):
    """Guards against a document that gives no group and silently trains nothing."""
    rows = [{"text": "a document that is long enough for an anchor"}, {"text": "a"}]
    path = write_rows(tmp_path / "short.jsonl", rows)
    message = refused("--cfg", write_config(data__dataset=str(path), data__on_bad_row="error"))
    assert_holds(message, path, "row 1", "'text'", "2 tokens", "needs 8", "data.on_bad_row: skip")


def test_row_without_text(refused, write_config, tmp_path):
    """Guards against null being tokenised as the word None."""
    rows = [{"text": "a document that is long enough for an anchor"}, {"text": None}]
    path = write_rows(tmp_path / "null.jsonl", rows)
    message = refused("--cfg", write_config(data__dataset=str(path), data__on_bad_row="error"))
    assert_holds(message, path, "row 1", "'text'", "None is not text")


def test_no_usable_document(refused, write_config, tmp_path):
    """Guards against a run on no rows when all are skipped."""
    path = write_rows(tmp_path / "short.jsonl", [{"text": "a"}, {"text": "b"}])
    assert_holds(refused("--cfg", write_config(data__dataset=str(path))), path, "no row that can be used", "needs 8")


def test_more_held_out_documents_than_there_are(refused, write_config, text_file):
    """Guards against an evaluation that eats the training data."""
    assert_holds(refused("--cfg", write_config(eval__num_documents=40)), "eval.num_documents", "40", text_file)


def test_unreachable_dataset(refused, write_config):
    """Guards against a traceback of the hub client, and a message that does not say which dataset."""
    message = refused("--cfg", write_config(data__dataset="nobody/no-such-dataset"))
    assert_holds(message, "data", "nobody/no-such-dataset", "split 'train'", "reach")


# ----------------------------------------------------------------------------------------------------------------------
# Model and tokenizer


def test_unreachable_model(refused, write_config):
    """Guards against a traceback of the hub client, and blaming model.tokenizer, a key that the user never set."""
    message = refused("--cfg", write_config(model__name_or_path="nobody/no-such-model"))
    assert_holds(message, "model.name_or_path", "nobody/no-such-model", "connect")
    assert "model.tokenizer" not in message


def test_unreachable_tokenizer(refused, write_config):
    """Guards against blaming the model for a tokenizer that was given by hand."""
    message = refused("--cfg", write_config(model__tokenizer="nobody/no-such-tokenizer"))
    assert_holds(message, "model.tokenizer", "nobody/no-such-tokenizer")


def test_missing_model_folder(refused, write_config, tmp_path):
    """Guards against a local path that is looked for on the hub."""
    message = refused("--cfg", write_config(model__name_or_path=str(tmp_path / "none")))
    assert_holds(message, "model.name_or_path", tmp_path / "none", "does not exist")


@pytest.fixture
def model_copy(model_folder, tmp_path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize("kind", ["pad", "eos"])
def test_tokenizer_without_a_needed_token(refused, command, write_config, model_copy, tmp_path, kind):
    """Guards against a token that is missing only at the first padded batch, and a remedy that does not work."""
    tokenizer = tiny_tokenizer()
    setattr(tokenizer, f"{kind}_token", None)
    tokenizer.save_pretrained(model_copy)
    file = write_config(model__name_or_path=str(model_copy), train__max_steps=1, eval__num_documents=0)
    assert_holds(refused("--cfg", file), f"model.{kind}_token", model_copy, "has none", "<eos>")
    assert command("--cfg", file, f"model.{kind}_token=<eos>")[0] == 0
    tokenizer.unk_token = "<eos>"  # as in GPT-2's: a token that is also the unknown one is a token
    tokenizer.save_pretrained(model_copy)
    assert command("--cfg", file, f"model.{kind}_token=<eos>", f"train.output_dir={tmp_path / 'unknown'}")[0] == 0
    message = refused("--cfg", file, f"model.{kind}_token=<nope>", f"train.output_dir={tmp_path / 'other'}")
    assert_holds(message, f"model.{kind}_token", "'<nope>'", "not a token")


def test_tokenizer_of_another_model(refused, write_config, model_copy):
    """Guards against an IndexError deep in the embedding when token ids are larger than the model's vocabulary."""
    tiny_model(vocab_size=200).save_pretrained(model_copy)
    assert_holds(refused("--cfg", write_config(model__name_or_path=str(model_copy))), "model.", "tokenizer", "200")


DAMAGED = [("model.safetensors", b"not weights " * 9), ("config.json", b"{broken"), ("tokenizer.json", b"{}")]


@pytest.mark.parametrize("name, content", DAMAGED)
def test_damaged_model_file(refused, write_config, model_copy, name, content):
    """Guards against a traceback for a download that was cut off."""
    (model_copy / name).write_bytes(content)
    assert_holds(refused("--cfg", write_config(model__name_or_path=str(model_copy))), "model.", model_copy)


STRUCTURED = ["model.name_or_path", "cannot be trained in strided mode", "train_structured.py"]
WINDOW = ["ebft.stride + ebft.generate_max_len = 8", "sliding attention", "7 tokens", "lower them"]
OTHER_ATTENTION = {
    "linear attention": ("qwen3_next", {}, [*STRUCTURED, "linear_attention"]),
    "state space": ("mamba", {}, [*STRUCTURED, "linear_attention"]),
    "encoder": ("bert", {}, ["model.name_or_path", "cannot be trained in strided mode", "one sequence at a time"]),
    "no positions": ("bloom", {}, [*STRUCTURED, "does not run with a mask over packed rollouts"]),
    "short window": ("mistral", {"sliding_window": 7}, WINDOW),
    "short window in some layers": ("gemma3_text", {"sliding_window": 7}, WINDOW),
    "few positions": ("llama", {"max_position_embeddings": 32}, [*LENGTH, "32", "positions"]),
}


@pytest.mark.parametrize("architecture, changes, words", OTHER_ATTENTION.values(), ids=OTHER_ATTENTION)
def test_model_that_cannot_take_the_strided_mask(refused, write_config, model_copy, architecture, changes, words):
    """Guards against a model that trains on log-probs of another attention pattern than the one it has."""
    (model_copy / "config.json").unlink()
    tiny_model(architecture, **changes).save_pretrained(model_copy)
    assert_holds(refused("--cfg", write_config(model__name_or_path=str(model_copy))), model_copy, *words)


@pytest.mark.parametrize(
    "architecture, changes", [("gpt2", {}), ("gemma2", {"sliding_window": 8}), ("mistral", {"sliding_window": 8})]
)
def test_model_that_can(command, write_config, model_copy, tmp_path, architecture, changes):
    """Other names of layers, capped scores and logits, documents that are longer than a window: a run to its end."""
    (model_copy / "config.json").unlink()
    tiny_model(architecture, **changes).save_pretrained(model_copy)
    code, stderr = command("--cfg", write_config(model__name_or_path=str(model_copy), train__max_steps=1))
    assert code == 0, stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt", "phi"])
def test_features_are_the_raw_hidden_states(tmp_path, architecture):
    """Guards against decoders whose final norm is not called `norm`.

    A cut copy would pass its deepest feature layer through that norm.
    """
    tiny_model(architecture).save_pretrained(tmp_path)
    config = StridedConfig(
        model=ModelConfig(str(tmp_path)),
        data=TextDataConfig("unused", sequence_length=16),
        train=TrainConfig("unused", max_steps=1),
        ebft=StridedEBFTConfig(feature_layers=[0.0, 0.5, 0.75]),
    )
    policy = load_policy(config)
    network = load_feature_network(policy, config, torch.device("cpu"), choose_layout(config, Accelerator(), policy))
    ids, positions = torch.arange(3, 13)[None], torch.arange(10)[None]
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = policy.eval()(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    found = network.hidden_states(positions, input_ids=ids, position_ids=positions, attention_mask=mask)
    for layer, states in zip((0, 2, 3), found, strict=True):
        assert (states - expected[layer]).abs().max() < 1e-5, f"layer {layer}"


ADAPTERS = {
    "unknown": ("[no_such_layer]", ["no_such_layer"]),
    "LM head": ("[lm_head]", ["LM head"]),
    "none": ("[]", ["target"]),
    "broken pattern": ("'[('", ["[("]),
}


@pytest.mark.parametrize("modules, words", ADAPTERS.values(), ids=ADAPTERS)
def test_impossible_adapter(refused, write_config, modules, words):
    """Guards against a peft traceback, and against an adapter on the LM head that the log-probs would not see."""
    assert_holds(refused("--cfg", write_config(), f"lora.target_modules={modules}"), "lora.target_modules", *words)


# ----------------------------------------------------------------------------------------------------------------------
# Non-finite numbers


TRAININGS = {"EBFT": {}, "SFT": {"ebft__rl_coef": 0.0, "ebft__ce_coef": 1.0}, "LoRA": {"lora": {"r": 4}}}


@pytest.mark.parametrize("changes", TRAININGS.values(), ids=TRAININGS)
def test_diverged_run_stops_before_the_update(refused, write_config, tmp_path, changes):
    """Guards against NaN weights in the checkpoint.

    The update that would write them must not happen, and what was trained must be kept.
    """
    train = dict(train__learning_rate=1e30, train__warmup_ratio=0.0, train__max_steps=5)
    message = refused("--cfg", write_config(**changes, **train))
    assert_holds(message, "step 2", "not finite", "before the update", "checkpoint-1", "train.learning_rate")
    output = tmp_path / "run"
    assert json.loads((output / "checkpoint-1" / "run.json").read_text())["step"] == 1
    assert all(tensor.isfinite().all() for tensor in saved_tensors(output / "checkpoint-1").values())
    assert not (output / "checkpoint-2").exists() and not (output / "final").exists()
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    events = EventAccumulator(str(output / "tensorboard" / "ebft")).Reload().Scalars("ebft/ce_loss")
    assert [event.step for event in events] == [1]


def test_weights_that_are_not_finite(refused, write_config, model_copy, tmp_path):
    """Guards against a broken checkpoint being blamed on the attention mask ('differ by nan')."""
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(model_copy)
    message = refused("--cfg", write_config(model__name_or_path=str(model_copy)))
    assert_holds(message, "model.name_or_path", model_copy, "not finite")
    assert "mask" not in message
    assert not (tmp_path / "run" / "final").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Output folder


@pytest.mark.parametrize("place", ["below a file", "a file", "/proc"])
def test_output_folder_that_cannot_be_written(refused, write_config, tmp_path, place):
    """Guards against hours of training that cannot be saved. (A read-only folder is no test for root.)"""
    (tmp_path / "file").write_text("")
    folder = {"below a file": tmp_path / "file" / "run", "a file": tmp_path / "file", "/proc": Path("/proc/run")}[place]
    # checked before the model is loaded
    message = refused("--cfg", write_config(train__output_dir=str(folder), model__name_or_path="/nonexistent"))
    assert_holds(message, "train.output_dir", folder, "not writable")


@pytest.fixture
def finished(command, write_config, tmp_path) -> Path:
    """The output folder of a run of 2 steps, and its configuration in write_config's place."""
    code, stderr = command("--cfg", write_config(train__max_steps=2, eval__num_documents=0))
    assert code == 0, stderr
    return tmp_path / "run"


def test_output_folder_that_holds_a_run(refused, write_config, finished):
    """Guards against a second run writing over the first one's model, or mixing its metrics with the first one's."""
    before = (finished / "metrics.jsonl").read_bytes()
    message = refused("--cfg", write_config())
    assert_holds(message, "train.output_dir", finished, "already holds a run", "train.resume=latest")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_output_folder_that_holds_only_checkpoints(refused, write_config, finished):
    """Guards against old checkpoints that a new run would mix with its own (and `latest` would find)."""
    for path in finished.iterdir():
        if not path.name.startswith("checkpoint-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_holds(refused("--cfg", write_config()), "train.output_dir", finished, "already holds a run")


def test_folder_of_a_run_that_saved_nothing(command, write_config, tmp_path):
    """Guards against a dead end: a folder interrupted before the first save, neither resumed nor used again."""
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "eval/cross_entropy": 1.0}\n')
    code, stderr = command("--cfg", write_config(train__max_steps=1, eval__num_documents=0))
    assert code == 0, stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1]


def test_adapter_as_a_model(refused, command, write_config, tmp_path):
    """Guards against 'holds neither a config.json' for someone who evaluates the adapter that a run has exported."""
    assert command("--cfg", write_config(lora={"r": 4}, train__max_steps=1, eval__num_documents=0))[0] == 0
    message = refused("--cfg", write_config(model__name_or_path=str(tmp_path / "run" / "final"), eval__only=True))
    assert_holds(message, "model.name_or_path", tmp_path / "run" / "final", "is an adapter", "train.resume")


def test_sharding_that_would_not_happen(refused, write_config, monkeypatch):
    """Guards against an accelerate config that asks for FSDP on a CPU, where accelerate silently runs unsharded."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    assert_holds(refused("--cfg", write_config()), "distributed_type: FSDP", "unsharded")


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


def test_resume_without_a_checkpoint(refused, write_config, tmp_path):
    """Guards against `latest` quietly starting anew, and against a path that is not a checkpoint."""
    message = refused("--cfg", write_config(), "train.resume=latest")
    assert_holds(message, "train.resume", "latest", tmp_path / "run", "no checkpoint")
    message = refused("--cfg", write_config(), f"train.resume={tmp_path}")
    assert_holds(message, "train.resume", tmp_path, "not a checkpoint")
    assert_holds(refused("--cfg", write_config(), "train.resume=true"), "train.resume", "true", "not a checkpoint")


def test_half_written_checkpoints_do_not_count(refused, write_config, tmp_path):
    """Guards against resuming from a folder that a crash left behind."""
    for name in ("checkpoint-7", ".checkpoint-8.tmp-1", "checkpoint-x"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / ".checkpoint-8.tmp-1" / "SHA256SUMS").write_bytes(b"half")
    (tmp_path / "run" / "checkpoint-x" / "SHA256SUMS").write_bytes(b"half")
    assert_holds(refused("--cfg", write_config(), "train.resume=latest"), "train.resume", "no checkpoint")


def test_resume_with_other_settings(refused, write_config, finished):
    """Guards against a run that goes on with the old learning rate and records the new one, or with other data or
    rollouts than it started with.
    """
    changes = {"train__learning_rate": 7e-6, "train__seed": 5, "ebft__stride": 8, "data__sequence_length": 40}
    file = write_config(lora={"r": 4}, **changes, eval__num_documents=0)
    message = refused("--cfg", file, "train.resume=latest", "train.max_steps=3")
    assert_holds(message, "train.resume", finished / "checkpoint-2", "lora.r is 4", "train.seed", "ebft.stride")
    assert_holds(message, "train.learning_rate is 7e-06 and was 0.001", "data.sequence_length is 40 and was 48")


SHAPES = {"wider": {"intermediate_size": 96}, "deeper": {"num_hidden_layers": 5}, "shallower": {"num_hidden_layers": 3}}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_resume_from_a_checkpoint_of_another_model(refused, command, write_config, tmp_path, model_copy, changes):
    """Guards against weights that stay at their start because the checkpoint does not hold them, or are dropped."""
    file = write_config(model__name_or_path=str(model_copy), train__max_steps=2, eval__num_documents=0)
    assert command("--cfg", file)[0] == 0
    tiny_model(**changes).save_pretrained(model_copy)
    message = refused("--cfg", file, "train.resume=latest", "train.max_steps=3")
    assert_holds(message, "train.resume", tmp_path / "run" / "checkpoint-2", "another model")


def test_model_folder_that_lacks_weights(refused, write_config, model_copy):
    """Guards against layers that are trained from random numbers because the file does not hold them."""
    settings = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 6}))
    message = refused("--cfg", write_config(model__name_or_path=str(model_copy)))
    assert_holds(message, "model.name_or_path", model_copy, "lacks 18 weights", "layers.4")


LAUNCHER = [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps: 4"),
    ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision: bf16"),
]


@pytest.mark.parametrize("name, value, word", LAUNCHER)
def test_launcher_settings_that_contradict(refused, write_config, monkeypatch, name, value, word):
    """Guards against an accelerate config that silently divides the loss once more, or is silently not followed."""
    monkeypatch.setenv(name, value)
    assert_holds(refused("--cfg", write_config()), word, "accelerate config")


def sign(checkpoint: Path) -> None:
    """Writes SHA256SUMS anew, as if the files had been written as they are."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    sums = {path.relative_to(checkpoint): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "SHA256SUMS").write_text("".join(f"{number}  {name}\n" for name, number in sums.items()))


@pytest.mark.parametrize("damage", ["empty", "cut", "bytes", "text", "pickle of something else"])
@pytest.mark.parametrize("name", ["state/.metadata", "state/__0_0.distcp"])
def test_resume_from_a_damaged_checkpoint(refused, write_config, finished, name, damage):
    """Guards against a traceback of pickle or zipfile, and against a start from fresh weights."""
    path = finished / "checkpoint-2" / name
    if damage == "pickle of something else":
        path.write_bytes(pickle.dumps([1, 2, 3]))
    else:
        whole = path.read_bytes()
        half, noise = whole[: len(whole) // 2], bytes(range(256)) * 20
        path.write_bytes({"empty": b"", "cut": half, "bytes": noise, "text": b"hello\n"}[damage])
    file, checkpoint = write_config(eval__num_documents=0), finished / "checkpoint-2"
    message = refused("--cfg", file, f"train.resume={checkpoint}", "train.max_steps=3")
    assert_holds(message, "train.resume", checkpoint, "damaged", name, "not what was written")
    message = refused("--cfg", file, "train.resume=latest", "train.max_steps=3")
    assert_holds(message, "train.resume", finished, "no whole checkpoint")


@pytest.mark.parametrize("content", ["other keys", "no optimizer"])
def test_resume_from_a_checkpoint_of_another_program(refused, write_config, finished, content):
    """Guards against a traceback, or fresh weights or moments, where the files are whole and hold something else."""
    checkpoint = finished / "checkpoint-2"
    kept = {name: tensor for name, tensor in saved_tensors(checkpoint).items() if name.startswith("model.")}
    shutil.rmtree(checkpoint / "state")
    state = {"epoch": torch.ones(3)} if content == "other keys" else kept
    dcp.save(state, checkpoint_id=checkpoint / "state", no_dist=True)
    sign(checkpoint)
    message = refused("--cfg", write_config(eval__num_documents=0), "train.resume=latest", "train.max_steps=3")
    assert_holds(message, "train.resume", checkpoint)


def test_metrics_file_with_a_half_written_line(command, write_config, finished):
    """Guards against a power cut that leaves half a line in metrics.jsonl and makes the run impossible to resume."""
    metrics = finished / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 2, "ebft/ali')
    code, stderr = command("--cfg", write_config(eval__num_documents=0), "train.resume=latest", "train.max_steps=3")
    assert code == 0, stderr
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_interrupted_command_is_no_success(write_config, tmp_path, number):
    """Guards against Ctrl-C or a scheduler's signal losing what was trained, or looking like a finished run."""
    file = write_config(train__max_steps=100_000, train__save_steps=0, eval__num_documents=0)
    command = [sys.executable, str(ROOT / "train_strided.py"), "--cfg", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    try:
        while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
            time.sleep(0.1)
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number and "Traceback" not in message
    assert f"stopped by {signal.Signals(number).name}" in message and "train.resume=latest" in message
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = json.loads((checkpoint / "run.json").read_text())["step"]
    assert checkpoint.name == f"checkpoint-{step}" and step >= 3
    assert not (tmp_path / "run" / "final").exists()
