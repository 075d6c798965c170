"""The memory estimate by hand, the settings that lower it, and what is said when memory runs out.

Training that ran out of memory is not lost.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DistributedType

import train_structured
from ebft_utils.algorithm import losses
from ebft_utils.algorithm.strided import find_anchors
from ebft_utils.config.data import EvalConfig, PromptDataConfig, TextDataConfig
from ebft_utils.config.modes import StridedConfig, StructuredConfig, load_config
from ebft_utils.config.sections import (
    FeatureNetworkConfig,
    LoraConfig,
    ModelConfig,
    StridedEBFTConfig,
    StructuredEBFTConfig,
    TrainConfig,
)
from ebft_utils.config.settings import UserError
from ebft_utils.run import preview
from ebft_utils.run.memory import (
    Shape,
    advice,
    largest_row,
    memory_estimate,
    other_runs,
    out_of_memory_advice,
    shape_of,
    ways_to_save,
)
from helpers import assert_holds, logged

GB = 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = Shape(
    parameters=1000, trained=1000, kept=600, layers=4, hidden=10, inner=20, heads=2, key_value=5, vocabulary=100
)
SECTIONS = dict(data={}, model={}, ebft={}, feature_network={}, train={}, eval={}, lora=None)


def common(sections: dict) -> dict:
    """What both modes have. No evaluation, unless it is asked for."""
    return dict(
        model=ModelConfig("unused", **sections["model"]),
        feature_network=FeatureNetworkConfig(**sections["feature_network"]),
        train=TrainConfig("unused", **{"max_steps": 10, **sections["train"]}),
        eval=EvalConfig(**{"num_documents": 0, **sections["eval"]}),
        lora=None if sections["lora"] is None else LoraConfig(**sections["lora"]),
    )


def strided(**changes: dict | None) -> StridedConfig:
    sections = {**SECTIONS, **changes}
    assert sections.keys() == SECTIONS.keys()
    data, ebft = TextDataConfig("unused", **sections["data"]), StridedEBFTConfig(**sections["ebft"])
    return StridedConfig(**common(sections), data=data, ebft=ebft)


def structured(**changes: dict | None) -> StructuredConfig:
    """Completions are the policy's own."""
    sections = {**SECTIONS, **changes}
    assert sections.keys() == SECTIONS.keys()
    data = PromptDataConfig("unused", **sections["data"])
    ebft = StructuredEBFTConfig(use_vllm=False, **sections["ebft"])
    return StructuredConfig(**common(sections), data=data, ebft=ebft)


# ----------------------------------------------------------------------------------------------------------------------
# The estimate


BY_HAND = dict(ebft={"n_samples_per_prompt": 2, "generate_max_len": 4}, train={"per_device_batch_size": 2})
BY_HAND["data"] = {"sequence_length": 40}
# 5 anchors x 2 rollouts x 4 tokens = 40 rollout tokens beside 40 of the document: 80 of a row, 160 of two
TOKENS = 160 * 4 * (14 * 10 + 4 * 20)  # of a layer
FORWARD = TOKENS + 4 * 2 * 2 * 10 * (40 // 2 + 256)  # of a layer, with the keys of the one block of rollouts
HEAD = 3 * 4 * 160 * 100 + 160 * 10 * 4 + 4 * 100 * 10  # logits, states, gradient of the head
CACHE, SAMPLED = 2 * 80 * 2 * 5 * 4 * 4, 24 * 2 * 5 * 2 * 100  # keys and values; sampling from the vocabulary
RECOMPUTED = 160 * 10 * 4 * 4 + FORWARD + HEAD
ALL_SCORES = 4 * (TOKENS + 2 * 2 * 80 * 80 * 4) + HEAD
DOCUMENTS = 4 * 80 * 4 * (14 * 10 + 4 * 20) + 3 * 4 * 80 * 100 + 80 * 10 * 4 + 4 * 100 * 10
ONLY_EVALUATION = {"only": True, "num_documents": 8, "per_device_batch_size": 2}
NO_TRAINING = {"gradients": 0, "optimizer": 0, "forward and backward": 0}
ESTIMATES = {  # changes of the settings, and what the estimate then is
    "plain": ({}, {}),
    "gradient checkpointing": ({"model": {"gradient_checkpointing": True}}, {"forward and backward": RECOMPUTED}),
    "evaluation": ({"eval": {"num_documents": 8, "per_device_batch_size": 4}}, {"rollouts": 2 * (CACHE + SAMPLED)}),
    "evaluation alone": ({"eval": ONLY_EVALUATION}, NO_TRAINING),
    "compiled decoding": ({"model": {"compile_decoding": True}}, {"keys and values": CACHE, "rollouts": SAMPLED}),
    "eager attention": ({"model": {"attn_implementation": "eager"}}, {"forward and backward": ALL_SCORES}),
    "no rollouts": ({"ebft": {"rl_coef": 0, "ce_coef": 1}}, {"rollouts": 0, "forward and backward": DOCUMENTS}),
}


@pytest.mark.parametrize("changes, expected", ESTIMATES.values(), ids=ESTIMATES)
def test_the_estimate_by_hand(changes, expected):
    """Guards against a term that is lost, counted twice, or in elements instead of bytes."""
    sections = {name: {**BY_HAND.get(name, {}), **changes.get(name, {})} for name in BY_HAND | changes}
    plain = {"weights": 4000, "gradients": 4000, "optimizer": 8000, "feature network": 2400, "keys and values": 0}
    plain |= {"rollouts": CACHE + SAMPLED, "forward and backward": 4 * FORWARD + HEAD, "update": 0}
    wanted = {**plain, **expected}
    found = memory_estimate(strided(**sections), SMALL, 40, 5, 1, False, CPU)
    in_turn = [wanted[name] for name in ("rollouts", "forward and backward", "update")]
    assert found == {**wanted, "peak": sum(wanted.values()) - sum(in_turn) + max(in_turn)}


def test_the_estimate_follows_the_limit_of_packed_tokens():
    """Guards against an estimate of forwards that are never run.

    5 anchors in 3 forwards are 2 at a time, in training and in the rollouts' cache.
    """
    sections = {**BY_HAND, "ebft": {**BY_HAND["ebft"], "max_packed_tokens": 60}}
    limited = memory_estimate(strided(**sections), SMALL, 40, 5, 1, False, CPU)
    two = memory_estimate(strided(**BY_HAND), SMALL, 40, 2, 1, False, CPU)
    assert limited["forward and backward"] == two["forward and backward"] < 4 * FORWARD + HEAD
    assert limited["rollouts"] == two["rollouts"] == 2 * (40 + 16) * 2 * 5 * 4 * 4 + 24 * 2 * 2 * 2 * 100
    sections["ebft"]["max_packed_tokens"] = 80
    limited = memory_estimate(strided(**sections), SMALL, 40, 5, 1, False, CPU)
    unlimited = memory_estimate(strided(**BY_HAND), SMALL, 40, 5, 1, False, CPU)
    assert limited["peak"] == unlimited["peak"]


def test_what_lies_on_another_device_does_not_count():
    """Guards against advice for a GPU that counts a frozen copy in main memory; on a CPU `cpu` is the same place."""
    config = strided(**BY_HAND, feature_network={"device": "cpu"})
    assert memory_estimate(config, SMALL, 40, 5, 1, False, GPU)["feature network"] == 0
    assert memory_estimate(config, SMALL, 40, 5, 1, False, CPU)["feature network"] == 2400
    on_gpu = memory_estimate(strided(**BY_HAND), SMALL, 40, 5, 2, True, GPU)
    parts = [on_gpu[part] for part in ("weights", "optimizer", "feature network", "update")]
    assert parts == [2000, 4000, 2400, 2000]


def test_the_largest_row_of_a_raw_text():
    """The bound against what is found in a text of that length."""
    config = strided(data={"sequence_length": 61}, ebft={"context_length": 5, "stride": 3, "generate_max_len": 7})
    segments = torch.zeros(1, 61, dtype=torch.long)
    anchors, _ = find_anchors(segments, segments, context_length=5, min_completion_prefix=0, stride=3, num_generated=7)
    assert largest_row(config) == (61, anchors.shape[1])
    assert largest_row(structured(data={"max_prompt_length": 32}, ebft={"max_completion_length": 16})) == (48, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Settings that lower it


LARGE = {"data__sequence_length": 128, "train__batch_size": 12, "train__per_device_batch_size": 6}
LARGE["ebft__n_samples_per_prompt"] = 8
ROWS, RECOMPUTING = "train.per_device_batch_size=1 (now 6)", "model.gradient_checkpointing=true"
PACKED = "ebft.max_packed_tokens=256 (now up to 1120)"  # 128 + 31 anchors x 8 rollouts x 4 tokens
OTHER = ["lora.r=16", "a larger ebft.stride (now 4)", "a smaller data.sequence_length (now 128)"]
FEW_ROWS, EVALUATION = {"train__per_device_batch_size": 1}, "eval.per_device_batch_size=1 (now 4)"
SAVINGS = {  # changes of the settings, and what is proposed
    "plain": ({}, [ROWS, RECOMPUTING, PACKED, "model.dtype=bfloat16"]),
    "evaluation": (FEW_ROWS, [EVALUATION, RECOMPUTING, PACKED, "model.dtype=bfloat16"]),
    "no evaluation": ({**FEW_ROWS, "eval__num_documents": 0}, [RECOMPUTING, PACKED, "model.dtype=bfloat16"]),
    "evaluation alone": ({"eval__only": True}, [EVALUATION, PACKED, "model.dtype=bfloat16"]),
    "no rollouts": ({"ebft__rl_coef": 0.0, "ebft__ce_coef": 1.0}, [ROWS, RECOMPUTING, "model.dtype=bfloat16"]),
    "eager": (
        {"model__attn_implementation": "eager"},
        [ROWS, RECOMPUTING, PACKED, "model.attn_implementation=auto", "model.dtype=bfloat16"],
    ),
    "compiled": (
        {"model__compile_decoding": True},
        [ROWS, RECOMPUTING, PACKED, "model.compile_decoding=false", "model.dtype=bfloat16"],
    ),
}


@pytest.mark.parametrize("changes, expected", SAVINGS.values(), ids=SAVINGS)
def test_each_setting_can_be_typed_and_saves_memory(write_config, changes, expected):
    """One after another, in this order. Guards against settings that are refused as they stand, or change nothing."""
    file = str(write_config(**{**LARGE, **changes}))
    config, shape, typed = load_config(file), shape_of(load_config(file)), []
    assert ways_to_save(config, 1, False, CPU) == expected and other_runs(config) == OTHER
    for setting in expected:
        typed.append(setting.split(" ")[0])
        changed = load_config(file, typed)
        before, after = (
            sum(memory_estimate(each, shape, *largest_row(each), 1, False, CPU).values()) for each in (config, changed)
        )
        assert after < before and setting not in ways_to_save(changed, 1, False, CPU), setting
        config = changed


def test_settings_of_a_large_run_on_gpus():
    """Guards against advice that is for another number of processes, and another device."""
    config = strided(data={"sequence_length": 1024}, train={"batch_size": 8, "per_device_batch_size": 4})
    first = ["train.per_device_batch_size=1 (now 4)", RECOMPUTING, "ebft.max_packed_tokens=2048 (now up to 5088)"]
    first += ["model.dtype=bfloat16"]
    copy, fsdp2 = "feature_network.device=cpu", "--config_file accelerate_configs/fsdp2.yaml (now DDP)"
    assert ways_to_save(config, 1, False, CPU) == first
    assert ways_to_save(config, 1, False, GPU) == [*first, copy]
    assert ways_to_save(config, 4, False, GPU) == [*first, copy, fsdp2]
    assert ways_to_save(config, 4, True, GPU) == [*first, "feature_network.shard=true"]


def test_nothing_is_proposed_that_is_already_set():
    """Guards against advice that changes nothing. What makes it another run is then all that is left, and says so."""
    every = dict(data={"sequence_length": 1024}, train={"per_device_batch_size": 1})
    every |= dict(model={"gradient_checkpointing": True, "dtype": "bfloat16"}, ebft={"max_packed_tokens": 1100})
    assert ways_to_save(strided(**every, feature_network={"device": "cpu"}), 1, False, GPU) == []
    assert ways_to_save(strided(**every, feature_network={"shard": True}), 4, True, GPU) == []
    left = "as another run: a larger ebft.stride (now 8), a smaller data.sequence_length (now 1024)"
    assert advice(strided(**every, lora={"r": 16}), 1, False, GPU) == left
    config = structured(ebft={"num_generations": 4, "max_completion_length": 64}, data={"max_prompt_length": 32})
    length = "a smaller data.max_prompt_length + ebft.max_completion_length (now 96)"
    assert other_runs(config) == ["lora.r=16", "a smaller ebft.num_generations (now 4)", length]
    assert not any("packed" in setting for setting in ways_to_save(config, 1, False, GPU))


# ----------------------------------------------------------------------------------------------------------------------
# When it has run out


def runs_out(*arguments):
    raise torch.OutOfMemoryError("out of memory")


def cuda_error(index: int) -> torch.OutOfMemoryError:
    """As torch words it."""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate 2.00 GiB. GPU {index} has a total capacity of 79.11 GiB of which "
        "1.50 GiB is free. Including non-PyTorch memory, .."
    )


CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 9 bytes."
)


@pytest.fixture
def run_of(write_config, monkeypatch):
    """run_of(DEVICE, section__key=value): a configuration, and an accelerator as far as it is asked.

    The GPU is not there.
    """
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=79.11 * GB))

    def make(device: torch.device, **changes):
        accelerator = SimpleNamespace(device=device, num_processes=1, distributed_type=DistributedType.NO)
        return load_config(str(write_config(**{**LARGE, **changes}))), accelerator

    return make


def said(config, accelerator, error: Exception) -> str:
    with pytest.raises(UserError) as caught, out_of_memory_advice(config, accelerator):
        raise error
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    return str(caught.value)


def test_the_message_of_a_gpu(run_of):
    """The whole message: where, how much it has, the estimate, and the settings in the order of `ways_to_save`."""
    config, accelerator = run_of(GPU)
    peak = memory_estimate(config, shape_of(config), *largest_row(config), 1, False, GPU)["peak"]
    start = f"out of memory on cuda:0 (79 GB): the run does not fit; a process is estimated at {peak / GB:.1f} GB; "
    listed = ", ".join([ROWS, RECOMPUTING, PACKED, "model.dtype=bfloat16", "feature_network.device=cpu"])
    whole = f"settings that lower it, first what costs least: {listed}; as another run: {', '.join(OTHER)}"
    assert said(config, accelerator, cuda_error(0)) == start + whole
    assert said(*run_of(torch.device("cuda")), cuda_error(0)) == start + whole


def test_the_message_of_a_cpu(run_of):
    config, accelerator = run_of(torch.device("cpu", 0))  # as gloo's processes have it
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15)
    message = said(config, accelerator, real.value)
    assert message.startswith("out of memory on cpu: the run does not fit; a process is estimated at ")
    assert f"first what costs least: {ROWS}, " in message


def test_the_message_where_it_is_not_the_policy_that_did_not_fit(run_of, monkeypatch):
    """Guards against advice for the wrong device.

    Settings that make room on the policy's GPU make none on another one, or in main memory.
    """
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = "out of memory on {}: the run does not fit; the policy is on cuda:0, and "
    on_gpu = place.format("cuda:1 (79 GB)") + "the feature network lies there"
    assert said(*run_of(GPU), cuda_error(1)) == on_gpu
    on_cpu = place.format("cpu") + "weights are read and saved there"
    assert said(*run_of(GPU), CPU_ERROR) == on_cpu


def test_a_message_that_hides_it(run_of):
    """Guards against 'cannot be loaded: CUDA out of memory' without advice.

    A failed save must be told beside it.
    """
    config, accelerator = run_of(GPU)
    with pytest.raises(UserError) as caught:
        try:
            raise cuda_error(0)
        except RuntimeError:
            raise UserError("train.output_dir: the disk is full") from None
    message = said(config, accelerator, caught.value)
    assert message.startswith("train.output_dir: the disk is full; out of memory on cuda:0 (79 GB)")
    assert ROWS in message


OTHER_ERRORS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), UserError("data.dataset: is empty")]
OTHER_ERRORS += [ValueError("out of memory"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=lambda error: type(error).__name__)
def test_other_errors_pass(run_of, error):
    """Guards against a mistake in the program, or another message, that is told as a lack of memory."""
    with pytest.raises(type(error)) as caught, out_of_memory_advice(*run_of(CPU)):
        raise error
    assert caught.value is error


def test_another_error_on_the_way_out_passes(run_of):
    """Guards against a mistake in the program that is told as a lack of memory alone.

    It shows because memory ran out.
    """
    with pytest.raises(RuntimeError, match="expected a tensor"), out_of_memory_advice(*run_of(CPU)):
        try:
            runs_out()
        finally:
            raise RuntimeError("expected a tensor")


def test_a_model_that_can_no_longer_be_read(run_of, tmp_path):
    """Guards against a message about the model's folder in place of the one about memory."""
    config, accelerator = run_of(CPU, model__name_or_path=str(tmp_path / "gone"))
    message = said(config, accelerator, torch.OutOfMemoryError("out of memory"))
    assert message.startswith("out of memory on cpu: the run does not fit; settings that lower it")


@pytest.mark.parametrize("total, told", [(2**20, True), (2**40, False)])
def test_the_dry_run_says_when_a_gpu_is_too_small(run_of, monkeypatch, total, told):
    config, accelerator = run_of(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    lines = preview._memory_lines(config, accelerator, (128, 30))
    assert len(lines[2:]) == told
    for line in lines[2:]:
        assert line.startswith(f"this does not fit; settings that lower it, first what costs least: {ROWS}, ")
    assert f"cuda:0 has {total / GB:.0f} GB" in lines[1]


# ----------------------------------------------------------------------------------------------------------------------
# A run


@pytest.mark.parametrize("run_out", [runs_out, lambda: torch.empty(10**15)], ids=["torch", "the CPU's allocator"])
def test_a_run_that_ran_out_is_saved_and_goes_on(refused, command, write_config, tmp_path, monkeypatch, run_out):
    """Guards against a traceback, and against the steps before being lost.

    The run goes on with fewer rows at a time.
    """
    scored, calls = losses.policy_gradient_loss, []

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 3:
            run_out()
        return scored(*arguments)

    changes = {**LARGE, "train__max_steps": 4, "train__per_device_batch_size": 12, "eval__num_documents": 0}
    file = write_config(**changes)
    with monkeypatch.context() as patched:
        patched.setattr(losses, "policy_gradient_loss", loss)
        message = refused("--cfg", file)
    settings = ("train.per_device_batch_size=1 (now 12)", "model.gradient_checkpointing=true")
    assert_holds(message, "out of memory on cpu", *settings, "train.resume=latest goes on from the last checkpoint")
    assert len(calls) == 3
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "run.json").read_text())["step"] == 2
    code, stderr = command("--cfg", file, "train.resume=latest", "train.per_device_batch_size=6")
    assert code == 0, stderr
    assert [entry["step"] for entry in logged(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "final").is_dir()


def test_structured_mode_says_it_too(tmp_path, model_folder, monkeypatch):
    tree = {
        "model": {"name_or_path": str(model_folder)},
        "data": {"dataset": "unused", "max_prompt_length": 64},
        "ebft": {"max_completion_length": 64, "use_vllm": False},
        "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 4, "per_device_batch_size": 4},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))

    monkeypatch.setattr(train_structured, "train_or_evaluate", runs_out)
    with pytest.raises(UserError) as caught:
        train_structured.main(["--cfg", str(tmp_path / "config.yaml")])
    settings = ("train.per_device_batch_size=1 (now 4)", "model.gradient_checkpointing=true")
    assert_holds(str(caught.value), "out of memory on cpu", *settings)
