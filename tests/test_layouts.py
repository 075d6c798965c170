"""Which layout a run takes, and runs in the layout of rows: hybrids, and the packed layout's numbers on a llama."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import train_strided
import train_structured
from ebft_utils import layouts
from ebft_utils.algorithm.flex import STRIDED_FLEX
from ebft_utils.models import base_causal_lm
from families import build
from helpers import (
    ROOT,
    accelerate_launch,
    assert_equal_weights,
    config_tree,
    evaluations,
    forget_accelerator,
    refusal,
    tiny_tokenizer,
    training,
    weights,
    write_rows,
)
from real_vllm import prompts_file

HYBRID, LORA = "qwen3_5_text", {"r": 4, "alpha": 8.0}
MODES = pytest.mark.parametrize("mode", [{}, {"lora": LORA}], ids=["full", "LoRA"])


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """family_folder(FAMILY): a small random model of it with its tokenizer, as `save_pretrained` writes them."""
    folders = {}

    def folder(family: str, **changes) -> Path:
        key = family, tuple(changes.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(family)
            build(family, **changes).save_pretrained(folders[key])
            tiny_tokenizer().save_pretrained(folders[key])
        return folders[key]

    return folder


@pytest.fixture
def structured(tmp_path):
    """structured(NAME, MODEL, section__key=value): the file of a small run of train_structured.py."""
    prompts = prompts_file(tmp_path / "prompts.jsonl")

    def file(name: str, model: Path, **changes) -> Path:
        tree = {
            "model": {"name_or_path": str(model)},
            "data": {"dataset": str(prompts), "max_prompt_length": 64},
            "ebft": {"num_generations": 3, "max_completion_length": 24, "temperature": 0.8, "use_vllm": False},
            "train": {"output_dir": str(tmp_path / name), "max_steps": 2, "batch_size": 4},
            "eval": {"num_documents": 4},
        }
        tree["train"] |= {"per_device_batch_size": 2, "learning_rate": 1e-3, "save_steps": 0}
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            tree[section] = tree.get(section, {}) | {key: value} if key else value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return file


def run(file: Path, *overrides: str) -> Path:
    forget_accelerator()
    train_structured.main(["--cfg", str(file), *overrides])
    return Path(yaml.safe_load(file.read_text())["train"]["output_dir"])


def strided_file(tmp_path: Path, model: Path, text_file: Path, **changes) -> Path:
    path = tmp_path / "strided.yaml"
    path.write_text(yaml.safe_dump(config_tree(model, text_file, tmp_path / "run", **changes)))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Which layout


def test_auto_takes_rows_for_a_hybrid_and_says_why(structured, family_folder, capsys):
    folder = run(structured("run", family_folder(HYBRID)))
    output = " ".join(capsys.readouterr().out.split())
    assert "ebft.layout: auto takes rows, one for each completion: its layers of type linear_attention are no" in output
    assert "linear_attention" in output and "a row for each completion" in output
    assert len(training(folder)) == 2 and len(evaluations(folder)) == 2
    AutoModelForCausalLM.from_pretrained(folder / "final")


def test_auto_takes_packed_where_it_can(structured, model_folder, capsys):
    run(structured("run", model_folder, eval__num_documents=0))
    output = capsys.readouterr().out
    assert "completions packed" in output and "auto takes" not in output


def test_networks_that_run_whole_say_so(structured, family_folder, capsys):
    run(structured("run", family_folder("nanochat"), eval__num_documents=0))
    assert "cannot be cut after a layer, so all layers run" in capsys.readouterr().out


def test_packed_that_cannot_be_had(structured, family_folder):
    words = refusal(run, structured("run", family_folder(HYBRID), ebft__layout="packed"))
    assert words.startswith("ebft.layout: packed is not possible with ") and "linear_attention" in words
    assert words.endswith("; ebft.layout=rows can")


@pytest.mark.parametrize("key", ["compile_decoding", "attn_implementation"])
def test_what_rows_do_not_have(structured, model_folder, key):
    value = True if key == "compile_decoding" else "flex_attention"
    words = refusal(run, structured("run", model_folder, ebft__layout="rows", **{f"model__{key}": value}))
    assert words.startswith(f"model.{key}: ") and "needs ebft.layout packed; leave it out" in words


def test_strided_mode_refuses_hybrids(tmp_path, family_folder, text_file):
    file = strided_file(tmp_path, family_folder(HYBRID), text_file)
    words = refusal(train_strided.main, ["--cfg", str(file)])
    assert "cannot be trained in strided mode: " in words and "linear_attention" in words
    assert words.endswith("; train_structured.py can train it, on prompts and completions")


def test_eager_attention_where_it_helps(tmp_path, family_folder, text_file):
    """StableLM chooses its attention when it is made; written out, it takes the mask."""
    file = strided_file(tmp_path, family_folder("stablelm"), text_file)
    words = refusal(train_strided.main, ["--cfg", str(file)])
    assert "change its log-probs" in words and "model.attn_implementation=eager can" in words
    forget_accelerator()
    train_strided.main(["--cfg", str(file), "model.attn_implementation=eager"])
    assert len(training(tmp_path / "run")) == 3


def test_models_without_a_cache_of_their_own_need_a_server(structured, family_folder):
    """Falcon-H1 of this transformers version decodes wrongly; a server does not use that."""
    words = refusal(run, structured("run", family_folder("falcon_h1")))
    assert "cannot be trained: " in words and words.endswith("from a vLLM server (ebft.use_vllm=true) it can")


def test_windows_that_rollouts_would_fill(tmp_path, family_folder, text_file):
    """stride + generate_max_len of 8 + 4 tokens, and a window of 8."""
    file = strided_file(tmp_path, family_folder("mistral"), text_file, ebft__stride=8)
    words = refusal(train_strided.main, ["--cfg", str(file)])
    assert words.startswith("ebft.generate_max_len: ebft.stride + ebft.generate_max_len = 12 is more than the 8 tokens")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_longer_than_the_window_train(tmp_path, family_folder, text_file, dtype):
    """gemma 3 with a window of 8, documents of 48 tokens."""
    folder = family_folder("gemma3_text")
    changes = dict(model__dtype=dtype, ebft__stride=4, ebft__generate_max_len=4, lora=LORA)
    train_strided.main(["--cfg", str(strided_file(tmp_path, folder, text_file, **changes))])
    assert len(training(tmp_path / "run")) == 3


def test_llama_4_s_scale_counts_places_of_the_row(tmp_path, family_folder, text_file):
    folder = family_folder("llama4_text", floor_scale=100)
    words = refusal(train_strided.main, ["--cfg", str(strided_file(tmp_path, folder, text_file))])
    assert "from place 100 of a row on it scales attention, and packed rows have up to" in words
    assert "train_structured.py can" in words and "eager" not in words  # the place in the row is the same there


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_proofs_in_both_scripts(tmp_path, structured, family_folder, text_file, dtype):
    """What most people run: frozen weights in bfloat16 and an adapter."""
    for family in ("llama", "gemma2"):
        model = family_folder(family)
        run(structured(family, model, model__dtype=dtype, lora=LORA, eval__num_documents=0, train__max_steps=1))
        file = strided_file(tmp_path, model, text_file, model__dtype=dtype, lora=LORA, train__max_steps=1)
        forget_accelerator()
        train_strided.main(["--cfg", str(file), f"train.output_dir={tmp_path / ('strided-' + family)}"])


@pytest.mark.parametrize("asked", ["auto", "flex_attention"])
def test_a_kernel_that_fails_the_proof(tmp_path, model_folder, text_file, monkeypatch, capsys, asked):
    """auto falls back on sdpa and says why; what was asked for by name is refused."""

    def deaf(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)

    def flex(config, model, device):
        base_causal_lm(model).set_attn_implementation(STRIDED_FLEX)

    monkeypatch.setitem(AttentionInterface._global_mapping, STRIDED_FLEX, deaf)
    monkeypatch.setattr(layouts, "set_attention", flex)
    file = strided_file(tmp_path, model_folder, text_file, model__attn_implementation=asked)
    if asked == "auto":
        train_strided.main(["--cfg", str(file)])
        words = " ".join(capsys.readouterr().out.split())
        assert "auto takes sdpa here: with flex_attention " in words and "sdpa in blocks" in words
    else:
        assert "cannot be trained in strided mode" in refusal(train_strided.main, ["--cfg", str(file)])


def test_adapter_names_that_a_hybrid_does_not_have(structured, family_folder):
    words = refusal(run, structured("run", family_folder(HYBRID), lora={"r": 4, "target_modules": ["qkv_proj"]}))
    assert words.startswith("lora.target_modules: the model has no layer qkv_proj") and "in_proj_qkv" in words


@pytest.mark.parametrize("family", [HYBRID, "mamba", "gpt2"])
def test_dry_runs(structured, family_folder, family, capsys):
    forget_accelerator()
    train_structured.main(["--cfg", str(structured("dry", family_folder(family))), "--dry-run"])
    assert "GB" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Rows against packed


def of_layout(file: Path, layout: str, tmp_path: Path) -> Path:
    run(file, f"ebft.layout={layout}", f"train.output_dir={tmp_path / layout}")
    return tmp_path / layout


TURNS = [{"prompt": " and ", "completion": "no"}, {"prompt": " but ", "completion": "yes, or"}]
CASES = {
    "plain": {},
    "LoRA": {"lora": LORA},
    "two iterations": {"ebft__num_iterations": 2, "ebft__loss_type": "grpo"},
    "several turns": {"data__columns": {"turns": "more"}},
    "answer spans": {"ebft__feature_span": "answer", "ebft__embed_method": "mean_pooling"},
}


@pytest.mark.parametrize("case", CASES)
def test_rows_train_as_packed(structured, model_folder, tmp_path, monkeypatch, case):
    """The same completions, losses, metrics, evaluation and weights. SGD, so that a factor would show."""

    def descent(parameters, lr, betas, weight_decay):
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", descent)
    rows = [
        {"prompt": f"Say {row} ", "completion": "<think>a</think>" + "b" * (1 + row % 5), "more": TURNS[: row % 3]}
        for row in range(12)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"data__dataset": str(data), "train__learning_rate": 0.05, "train__max_grad_norm": 1e6}
    file = structured("run", model_folder, **settings, **CASES[case])
    packed, in_rows = (of_layout(file, layout, tmp_path) for layout in ("packed", "rows"))
    pairs = zip(training(packed) + evaluations(packed), training(in_rows) + evaluations(in_rows), strict=True)
    for left, right in pairs:
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)
    trained, start = weights(in_rows), dict(weights(packed).items())
    assert max((tensor - start[name]).abs().max().item() for name, tensor in trained.items()) < 1e-5


@MODES
def test_a_hybrid_resumes_to_the_last_bit(structured, family_folder, tmp_path, mode):
    file = structured("parts", family_folder(HYBRID), **mode, train__max_steps=4, eval__num_documents=0)
    run(file, f"train.output_dir={tmp_path / 'whole'}")
    run(file, "train.max_steps=2")
    run(file, "train.resume=latest")
    assert training(tmp_path / "whole") == training(tmp_path / "parts")
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
@MODES
def test_two_processes_train_a_hybrid_as_one(structured, family_folder, tmp_path, launch, mode):
    settings = dict(mode, train__per_device_batch_size=1, train__learning_rate=1e-5, eval__per_device_batch_size=1)
    file = structured("one", family_folder(HYBRID), **settings)
    one = run(file)
    command = accelerate_launch(launch, "--num_processes", "2")
    command += [str(ROOT / "tests" / "fsdp2_on_cpu.py")] * (launch == "fsdp2")
    command += [str(ROOT / "train_structured.py"), "--cfg", str(file), f"train.output_dir={tmp_path / 'two'}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for left, right in zip(training(one), training(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-3)
    for left, right in zip(evaluations(one), evaluations(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-3)
