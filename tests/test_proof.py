"""The proof at the start of a run: right models pass, in each precision and layout, and wrong ones fail."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ebft_utils import proof, trial
from ebft_utils.algorithm import attention, decoding, strided
from ebft_utils.algorithm.architecture import decoder_layers
from ebft_utils.models import base_causal_lm
from ebft_utils.proof import Setting, Verdict, prove
from ebft_utils.trial import first_layers
from families import build
from helpers import tiny_model

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
PACKED, ROWS = Setting("packed", "strided_blocks", torch.float32), Setting("rows", "sdpa", torch.float32)
FLEX = replace(PACKED, implementation="strided_flex")


def proved(model, setting: Setting, dtype: torch.dtype, autocast: bool = False) -> Verdict:
    """The verdict on a model whose weights are in a precision, or that is autocast to it.

    As in choose_layout, its attention is set already.
    """
    model = model if autocast else model.to(dtype)
    model.set_attn_implementation(setting.implementation)
    return prove(model, replace(setting, dtype=dtype, autocast=autocast), CPU)


# ----------------------------------------------------------------------------------------------------------------------
# Right models


@DTYPES
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mistral", "cohere2", "granite"])
def test_right_models_pass(family, dtype, autocast):
    model = build(family).train()
    assert proved(model, PACKED, dtype, autocast) == Verdict(None)
    assert model.training


@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "granitemoehybrid", "lfm2", "gpt2"])
def test_rows_pass(family, dtype):
    assert proved(build(family), ROWS, dtype).reason is None


@DTYPES
def test_experts_pass(dtype):
    """Other tokens change how many rows an expert multiplies, and with them its rounding: no leak."""
    for family in ("qwen3_moe", "mixtral", "gpt_oss"):
        assert proved(build(family), PACKED, dtype).reason is None


def test_the_model_itself_is_not_touched():
    model = build("gemma3_text")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prove(model, PACKED, CPU) == Verdict(None)
    assert model.config.sliding_window == 8 and len(decoder_layers(model.model)) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# Wrong models


def replaced(monkeypatch, name: str, attend) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, name, attend)


@DTYPES
def test_attention_that_ignores_the_mask(monkeypatch, dtype):
    """It drops the arguments, and attends causally over the packed tokens: rollouts read each other."""

    def ignoring(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)

    replaced(monkeypatch, "strided_blocks", ignoring)
    verdict = proved(tiny_model(), PACKED, dtype)
    assert "the tokens that a rollout may not see change its log-probs by" in verdict.reason


@pytest.mark.parametrize("setting", [PACKED, FLEX], ids=["blocks", "flex"])
@pytest.mark.parametrize("wrong", ["packed documents", "one anchor"])
def test_masks_that_leak_in_the_run_s_precision_alone(monkeypatch, setting, wrong):
    """A wrong mask in the run's own kernel, and none in float32: exactness is asked of what really runs."""
    right, arguments, run = strided.may_attend, strided.attention_arguments, {}

    def leaking(layout, row, query, key, reach=strided.EVERYTHING):
        seen = right(layout, row, query, key, reach)
        if run["dtype"] != torch.bfloat16:
            return seen
        document = layout.rollout_ids[key] < 0
        if wrong == "packed documents":
            return seen | (document & (layout.rollout_ids[query] >= 0) & (key < layout.visible[row, query]))
        return seen | (document & (layout.rollout_ids[query] == 4) & (row == 0))  # its own document and the other

    def noted(decoder, layout, **how):
        run["dtype"] = decoder.dtype
        return arguments(decoder, layout, **how)

    monkeypatch.setattr(strided, "may_attend", leaking)
    for module in (strided, decoding, trial):
        monkeypatch.setattr(module, "attention_arguments", noted)
    assert "may not see change its" in proved(tiny_model(), setting, torch.bfloat16).reason
    assert proved(tiny_model(), setting, torch.float32) == Verdict(None)


@DTYPES
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_a_small_leak(monkeypatch, dtype, size):
    """A hundredth of what the neighbour says: in bfloat16 that is as small as rounding, and still it is found."""
    right = attention.strided_blocks_forward

    def leaking(module, query, key, value, attention_mask, **kwargs):
        output, weights = right(module, query, key, value, attention_mask, **kwargs)
        return output + size * output.roll(7, dims=1), weights

    replaced(monkeypatch, "strided_blocks", leaking)
    assert "may not see change its" in proved(tiny_model(), PACKED, dtype).reason


@DTYPES
def test_positions_shifted_by_one(monkeypatch, dtype):
    """In rollouts alone: relative positions between a rollout and its document are wrong by one."""
    model = tiny_model()
    kind, forward = type(model.model.rotary_emb), type(model.model.rotary_emb).forward

    def shifted(self, states, position_ids):
        jumped = torch.zeros_like(position_ids)
        jumped[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).cumsum(1) > 0
        return forward(self, states, position_ids + jumped)

    monkeypatch.setattr(kind, "forward", shifted)
    reason = proved(model, PACKED, dtype).reason
    assert reason.startswith(("in float32 its log-probs differ by", "in float32 its features differ by"))


@DTYPES
def test_positions_that_are_the_place_in_the_row(monkeypatch, dtype):
    model = tiny_model()
    kind, forward = type(model.model.rotary_emb), type(model.model.rotary_emb).forward

    def by_place(self, states, position_ids):
        return forward(self, states, torch.arange(states.shape[1]).expand_as(position_ids))

    monkeypatch.setattr(kind, "forward", by_place)
    assert proved(model, PACKED, dtype).reason is not None


@DTYPES
@pytest.mark.parametrize("setting", [PACKED, ROWS], ids=["packed", "rows"])
def test_a_recurrent_layer_that_no_config_names(monkeypatch, dtype, setting):
    """A running mean over the row: in one layout it goes from rollout to rollout, in the other it is right."""
    model = tiny_model()
    kind = type(model.model.layers[0])
    forward = kind.forward

    def recurrent(self, hidden_states, *arguments, **named):
        count = torch.arange(1, 1 + hidden_states.shape[1], device=hidden_states.device).view(1, -1, 1)
        mean = (hidden_states.float().cumsum(1) / count).to(hidden_states.dtype)
        return forward(self, hidden_states + 0.1 * mean, *arguments, **named)

    monkeypatch.setattr(kind, "forward", recurrent)
    reason = proved(model, replace(setting, writes=False), dtype).reason
    if setting is ROWS:
        assert reason is None
    else:
        assert "the tokens that a rollout may not see change its log-probs" in reason


@DTYPES
def test_rows_of_a_model_that_looks_ahead(monkeypatch, dtype):
    """An encoder in a decoder's clothes sees the padding and the tokens to come."""

    def both_ways(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": False})

    replaced(monkeypatch, "sdpa", both_ways)
    assert proved(tiny_model(), replace(ROWS, writes=False), dtype).reason is not None


@DTYPES
def test_a_wrong_scale(monkeypatch, dtype):
    right = attention.strided_blocks_forward

    def unscaled(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return right(module, query, key, value, attention_mask, scaling=1.1 * scaling, **kwargs)

    replaced(monkeypatch, "strided_blocks", unscaled)
    assert "differ by" in proved(tiny_model(), PACKED, dtype).reason


def test_kernels_that_are_wrong_only_in_the_run_s_precision(monkeypatch):
    """In float32 all is well, and the run is in bfloat16."""
    right = attention.strided_blocks_forward

    def wrong(module, query, key, value, attention_mask, scaling=None, **kwargs):
        scaling = scaling * (1.5 if query.dtype == torch.bfloat16 else 1.0)
        return right(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    assert proved(tiny_model(), PACKED, torch.bfloat16) == Verdict(None)
    replaced(monkeypatch, "strided_blocks", wrong)
    reason = proved(tiny_model(), PACKED, torch.bfloat16).reason
    assert "differ by" in reason and "in the same precision, only by" in reason


@DTYPES
def test_decoding_that_is_wrong_alone(monkeypatch, dtype):
    """The cache loses a token: the forward is right, and rollouts come from another distribution."""
    blocks = attention.strided_blocks_forward

    def forgetful(module, query, key, value, attention_mask, *, strided_blocks, **kwargs):
        if not strided_blocks[0].document_queries:
            key = torch.cat([torch.zeros_like(key[:, :, :1]), key[:, :, 1:]], dim=2)
        return blocks(module, query, key, value, attention_mask, strided_blocks=strided_blocks, **kwargs)

    replaced(monkeypatch, "strided_blocks", forgetful)
    assert "log-probs while decoding differ by" in proved(tiny_model(), PACKED, dtype).reason
    assert proved(tiny_model(), replace(PACKED, writes=False), dtype) == Verdict(None)


@pytest.mark.parametrize("setting", [PACKED, ROWS], ids=["packed", "rows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights(setting, value):
    """NaN compares as false with any tolerance."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0] = value
    assert "not finite" in prove(model, replace(setting, writes=False), CPU).reason


def test_a_head_with_an_unknown_scale():
    """Its logits are not those that the program would make of its states."""
    model = build("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 0.5 * forward(hidden)
    for setting in (PACKED, ROWS):
        assert "in float32 its log-probs differ by" in prove(model, setting, CPU).reason


def test_windows_of_another_spelling():
    """Attention that is limited in a way that short sequences would never show."""
    model = tiny_model()
    model.config.local_window = 4096
    assert "its local_window may limit attention" in prove(model, PACKED, CPU).reason
    assert prove(model, ROWS, CPU) == Verdict(None)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=str
)
def test_memory_that_runs_out_is_no_verdict(monkeypatch, error):
    """Guards against a run that takes rows because the proof of the packed layout found no memory."""

    def full(*_, **__):
        raise error

    for module, name in ((trial, "strided_logprobs"), (proof, "FeatureNetwork")):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError) as caught:
            patch.setattr(module, name, full)
            prove(tiny_model(), PACKED, CPU)
        assert caught.value is error


# ----------------------------------------------------------------------------------------------------------------------
# Adapters and the feature network


def with_adapter(dtype: torch.dtype):
    policy = get_peft_model(tiny_model().to(dtype), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    return base_causal_lm(policy)


@DTYPES
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("on", [False, True])
def test_adapters_on_and_off(monkeypatch, dtype, autocast, on):
    """A leak in the adapter's path shows although a new adapter adds nothing, and one of the base alone in features."""
    model = with_adapter(dtype)
    assert proved(model, PACKED, dtype, autocast) == Verdict(None)
    kind = type(model.model.layers[0].self_attn.q_proj)
    forward = kind.forward

    def leaking(self, states, *arguments, **named):
        result = forward(self, states, *arguments, **named)
        return result + 0.1 * result.roll(9, dims=1) if self.disable_adapters != on else result

    monkeypatch.setattr(kind, "forward", leaking)
    reason = proved(model, PACKED, dtype, autocast).reason
    assert ("log-probs" in reason) if on else ("features" in reason)


def test_first_layers_are_one_of_each_kind():
    short = first_layers(build("gemma3_text"))
    assert len(short.model.layers) == 2 and short.config.sliding_window == 8 and short.config.num_hidden_layers == 2
    assert [layer.self_attn.is_sliding for layer in short.model.layers] == [True, False]
    assert len(first_layers(build("qwen3_moe")).model.layers) == 2  # all are alike: two are enough
    assert len(first_layers(build("deepseek_v3")).model.layers) == 2  # a dense one, then experts
    assert len(first_layers(build("gemma4_text")).model.layers) == 4  # later layers use the keys of earlier ones
    short = first_layers(with_adapter(torch.float32))
    assert all(module.lora_B["default"].weight.abs().max() > 0 for module in trial.adapters_of(short))


@pytest.mark.parametrize(("family", "whole"), [("llama", False), ("nanochat", True), ("mamba", True)])
def test_networks_that_cannot_be_cut(family, whole):
    """nanochat's final norm is its first one too; Mamba numbers its states in another way."""
    setting = ROWS if family != "mamba" else replace(ROWS, implementation="eager")
    assert prove(build(family), setting, CPU) == Verdict(None, whole)


def test_flex_attention_is_tried_where_it_runs():
    """On the CPU it runs forwards only; decoding and prefill are of its own."""
    assert prove(build("gemma3_text"), FLEX, CPU) == Verdict(None)
