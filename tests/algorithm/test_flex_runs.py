"""Where FlexAttention runs and where it is refused, the proof of its kernel, and whole programs with it."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention

from ebft_utils import layouts
from ebft_utils.algorithm import flex
from ebft_utils.config.modes import load_config
from ebft_utils.config.settings import UserError
from ebft_utils.layouts import set_attention
from ebft_utils.run import distributed
from flex_cases import needs_gpu
from helpers import assert_holds, assert_same_weights, tiny_model, tiny_tokenizer, training, weights


def test_training_with_it_on_the_cpu_is_refused(refused, write_config):
    """Guards against an error out of the backward pass of the first step."""
    message = refused("--cfg", write_config(model__attn_implementation="flex_attention"))
    assert_holds(message, "model.attn_implementation", "flex_attention", "on cpu", "no backward pass", "set it to sdpa")


def test_evaluation_with_it_on_the_cpu_equals_sdpa(train, compiled, capsys):
    """The whole program: features, rollouts and cross-entropy."""
    found = {}
    for implementation in ("sdpa", "flex_attention"):
        changes = dict(ebft__stride=8, eval__only=True, eval__num_documents=4, eval__per_device_batch_size=2)
        folder = train(implementation, **changes, model__attn_implementation=implementation)
        found[implementation] = json.loads((folder / "eval-step-0.json").read_text())
        printed = "sdpa in blocks" if implementation == "sdpa" else implementation
        assert f"attention: {printed}" in capsys.readouterr().out
        assert compiled() == (0 if implementation == "sdpa" else 2)  # one to prove the kernel, one for all forwards
    assert len(found["sdpa"]) > 12 and found["flex_attention"] == pytest.approx(found["sdpa"], abs=1e-4)


@pytest.mark.parametrize(
    "asked, expected, printed",
    [
        ("auto", "strided_blocks", "sdpa in blocks"),
        ("sdpa", "strided_blocks", "sdpa in blocks"),
        ("eager", "eager", "eager"),
    ],
)
def test_the_others_are_what_they_say(train, plain_descent, write_config, capsys, asked, expected, printed):
    """Guards against an attention that trains something else, and a setting that is ignored.

    On the CPU auto is sdpa.
    """
    changes = dict(train__max_steps=2, train__learning_rate=0.1, ebft__ce_coef=0.3, model__attn_implementation=asked)
    for only in (True, False):
        model, config = tiny_model(), load_config(str(write_config(**changes, eval__only=only)))
        assert set_attention(config, model, torch.device("cpu")) is None
        assert model.config._attn_implementation == model.get_decoder().config._attn_implementation == expected
        assert capsys.readouterr().out == ""
    folder = train("asked", **changes)
    assert f"attention: {printed}\n" in capsys.readouterr().out
    assert training(folder)[0]["train/grad_norm"] > 0.1
    sdpa = train("sdpa", **{**changes, "model__attn_implementation": "sdpa"})
    assert_same_weights(weights(folder), weights(sdpa), tolerance=1e-5)


def test_where_it_cannot_run(monkeypatch):
    """Each reason is named, and the nearest case that can is none."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, version, width, device, backward, words in [
        ((8, 0), "2.7.0", 256, cuda, True, None),
        ((9, 0), "2.13.0+cu130", 16, cuda, False, None),
        ((9, 0), "2.13.0+cu130", 8, cuda, False, ["8 wide", "16 to 256"]),
        ((7, 5), "2.13.0", 64, cuda, True, ["Tesla T4", "7.5", "8.0"]),
        ((8, 0), "2.6.1+cu124", 64, cuda, True, ["torch 2.6.1+cu124", "2.7"]),
        ((8, 0), "2.13.0", 512, cuda, True, ["512", "256"]),
        (None, "2.13.0", 8, cpu, False, None),
        (None, "2.13.0", 512, cpu, False, ["512", "256"]),
        (None, "2.13.0", 64, cpu, True, ["no backward pass on the CPU"]),
        (None, "2.13.0", 64, torch.device("mps"), True, ["mps"]),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(torch, "__version__", version)
        reason = flex.why_not_flex(width, device, backward)
        if words is None:
            assert reason is None
        else:
            assert_holds(reason, *words)


def dense_attention(query, key, value, *, block_mask, scale, enable_gqa):
    """What FlexAttention computes, with a backward pass on any device: the mask on all cells, then plain sdpa."""
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    row, index, keys = (torch.arange(size, device=query.device) for size in sizes)
    mask = block_mask.mask_mod(row[:, None, None], None, index[:, None], keys[None]).expand(len(row), -1, -1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale, enable_gqa=enable_gqa)


def without_mask(query, key, value, *, block_mask, scale, enable_gqa):
    return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)


def without_gradient_of_keys(query, key, value, **others):
    return dense_attention(query, key.detach(), value, **others) + 0 * key.sum()


def raising(*_, **__):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def test_a_wrong_kernel_is_found(monkeypatch):
    """Guards against a kernel that compiles and computes something else: outputs, gradients, NaN.

    A kernel that is right must not be accused.
    """
    cpu = torch.device("cpu")
    assert flex.prove_flex_attention(4, 2, 8, torch.float32, cpu, False) is None  # the real one
    assert flex.prove_flex_attention(4, 4, 8, torch.bfloat16, cpu, False) is None
    for attend, backward, words in [
        (dense_attention, True, None),
        (without_mask, True, "differs from sdpa"),
        (without_mask, False, "differs from sdpa"),
        (without_gradient_of_keys, False, None),
        (without_gradient_of_keys, True, "differs from sdpa"),
        (lambda *inputs, **others: dense_attention(*inputs, **others) * torch.nan, False, "differs from sdpa"),
        (raising, False, "RuntimeError: no kernel image is available"),
    ]:
        monkeypatch.setattr(flex, "_compiled_flex_attention", attend)
        found = flex.prove_flex_attention(4, 2, 8, torch.float32, cpu, backward)
        assert found is None if words is None else words in found


def test_a_kernel_with_nan_in_a_gradient_alone_is_found(monkeypatch):
    """The outputs are right; FlexAttention has had such gradients."""

    def attend(query, key, value, **others):
        key.register_hook(lambda gradient: gradient * torch.nan)
        return dense_attention(query, key, value, **others)

    monkeypatch.setattr(flex, "_compiled_flex_attention", attend)
    assert flex.prove_flex_attention(4, 2, 8, torch.float32, torch.device("cpu"), True) is not None


@pytest.mark.parametrize(
    "why_not, proof", [("it is too old", None), (None, "it differs from sdpa on this device by 0.7")]
)
def test_what_happens_on_a_gpu_where_it_cannot_run(monkeypatch, write_config, capsys, why_not, proof):
    """auto falls back to sdpa and says so; who asked for it, or for compiled decoding, is refused."""
    monkeypatch.setattr(layouts, "why_not_flex", lambda *_: why_not)
    monkeypatch.setattr(layouts, "prove_flex_attention", lambda *_: proof)
    model, cuda = tiny_model(), torch.device("cuda")
    assert set_attention(load_config(str(write_config())), model, cuda) is None  # in float32 it is not even tried
    assert model.config._attn_implementation == "strided_blocks" and capsys.readouterr().out == ""
    assert set_attention(load_config(str(write_config(model__dtype="bfloat16"))), model, cuda) is None
    assert model.config._attn_implementation == "strided_blocks"
    words = ("model.attn_implementation", "auto takes sdpa", "flex_attention cannot run", why_not or proof)
    assert_holds(capsys.readouterr().out, *words)
    flex_key, compile_key = ("model.attn_implementation", "set it to sdpa"), ("model.compile_decoding", "leave it out")
    for asked, compile_decoding, (key, remedy) in (
        ("flex_attention", False, flex_key),
        ("flex_attention", True, flex_key),
        ("auto", True, compile_key),
    ):
        changes = dict(model__attn_implementation=asked, model__compile_decoding=compile_decoding, lora={"r": 2})
        config = load_config(str(write_config(**changes, model__dtype="bfloat16")))
        with pytest.raises(UserError) as caught:
            set_attention(config, model, cuda)
        assert_holds(str(caught.value), key, "flex_attention", "cannot run on cuda", why_not or proof, remedy)
    assert model.config._attn_implementation == "strided_blocks"


@pytest.mark.parametrize(
    "model_type, changes, heads, width",
    [
        ("llama", {"head_dim": 16}, (4, 2), 16),
        ("gpt_neox", {"num_key_value_heads": None, "head_dim": None}, (4, 4), 8),
        ("gemma3_text", {"query_pre_attn_scalar": 8, "num_key_value_heads": 1}, (4, 1), 8),
    ],
)
def test_the_model_s_own_heads_are_tried(monkeypatch, write_config, model_type, changes, heads, width):
    """Guards against a proof with other heads than the model's, or without the gradients that training needs."""
    seen = []
    monkeypatch.setattr(layouts, "why_not_flex", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(layouts, "prove_flex_attention", lambda *arguments: seen.append(arguments))
    cuda = torch.device("cuda", 1)
    for only in (False, True):
        for lora in (False, True):
            policy = model = tiny_model(model_type, **changes)
            if lora:
                policy = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
            config = load_config(str(write_config(eval__only=only, model__dtype="bfloat16")))
            assert set_attention(config, policy, cuda) is None
            assert model.get_decoder().config._attn_implementation == "strided_flex"
            assert seen[-2:] == [(width, cuda, not only), (*heads, width, torch.bfloat16, cuda, not only)]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__attn_implementation": "sdpa"}, ["needs flex_attention", "model.attn_implementation is sdpa"]),
        ({"model__attn_implementation": "eager"}, ["needs flex_attention", "model.attn_implementation is eager"]),
        ({}, ["needs flex_attention", "auto takes sdpa on cpu", "leave it out"]),
        ({"model__dtype": "bfloat16"}, ["full fine-tuning in bfloat16", "every float32 weight"]),
    ],
)
def test_compiled_decoding_without_it_is_refused(refused, write_config, changes, words):
    """Guards against a setting that quietly does nothing."""
    message = refused("--cfg", write_config(model__compile_decoding=True, **changes))
    assert_holds(message, "model.compile_decoding", *words)


@pytest.mark.parametrize("compile_decoding", [False, True])
def test_compiled_decoding_under_fsdp2_is_refused(monkeypatch, write_config, compile_decoding):
    """Guards against a step that is compiled around weights which are gathered and freed."""
    plugin = SimpleNamespace(mixed_precision_policy=None)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=1, state=state)
    accelerator.device = torch.device("cpu")
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    config = load_config(str(write_config(model__compile_decoding=compile_decoding)))
    if not compile_decoding:
        assert distributed.prepare_accelerator(config) is accelerator
        return
    with pytest.raises(UserError) as caught:
        distributed.prepare_accelerator(config)
    assert_holds(str(caught.value), "model.compile_decoding", "FSDP2", "leave it out")


@needs_gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"model__compile_decoding": True}, {"model__gradient_checkpointing": True}, {"lora": {"r": 4}}],
    ids=str,
)
def test_one_training_step_on_a_gpu_equals_that_of_sdpa(train, plain_descent, monkeypatch, capsys, tmp_path, changes):
    """The whole program, with rollouts, features and an update."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    tiny_model(head_dim=16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    changes = dict(train__max_steps=1, train__learning_rate=0.1, ebft__ce_coef=0.3, **changes)
    changes["model__name_or_path"] = str(tmp_path / "model")
    sdpa = train("sdpa", **{**changes, "model__compile_decoding": False, "model__attn_implementation": "sdpa"})
    found = train("flex", **{**changes, "model__attn_implementation": "flex_attention"})
    printed = capsys.readouterr().out
    assert "1 process on cuda" in printed and "attention: flex_attention" in printed
    assert training(found)[0] == pytest.approx(training(sdpa)[0], rel=1e-3, abs=1e-3)
    assert training(found)[0]["train/grad_norm"] > 0.1
    assert_same_weights(weights(found), weights(sdpa), tolerance=1e-4)
