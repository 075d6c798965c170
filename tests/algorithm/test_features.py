"""The feature network against golden hidden states, transformers' own, and, with LoRA, the pure base model."""

from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ebft_utils.algorithm.features import (
    EMBED_METHODS,
    FeatureNetwork,
    cut_decoder,
    layer_indices,
    normalised,
    pool,
    pooled_steps,
    strided_features,
)
from ebft_utils.algorithm.strided import attention_arguments, pack_layout, strided_logprobs
from ebft_utils.config.modes import load_config
from ebft_utils.models import base_causal_lm, load_feature_network, load_policy
from helpers import GOLDEN, tiny_model

NUM_LAYERS = 4  # of the tiny models


def strided_model(model_type: str = "llama", **changes):
    model = tiny_model(model_type, **changes)
    model.set_attn_implementation("strided_blocks")
    return model


def example(num_generated: int = 4) -> tuple[torch.Tensor, ...]:
    """document_ids, segment_ids, rollouts, anchors, valid of two rows.

    Row 0: two packed documents. Row 1: one document, padding and an invalid anchor.
    """
    generator = torch.Generator().manual_seed(1)
    segments = torch.tensor([[0] * 10 + [1] * 8, [0] * 13 + [-1] * 5])
    anchors, valid = torch.tensor([[2, 6, 13], [3, 9, 1]]), torch.tensor([[True, True, True], [True, True, False]])
    document = torch.randint(2, 300, (2, 18), generator=generator)
    return document, segments, torch.randint(2, 300, (2, 3, 2, num_generated), generator=generator), anchors, valid


def packed_states(network: FeatureNetwork, document, segments, rollouts, anchors, valid) -> list[torch.Tensor]:
    """Raw states of every packed token."""
    layout = pack_layout(segments, anchors, valid, rollouts.shape[2], rollouts.shape[3])
    ids = torch.cat([document, rollouts.flatten(1)], dim=1)
    index = torch.arange(ids.shape[1]).expand(len(ids), -1)
    inputs = dict(input_ids=ids, position_ids=layout.position_ids, **attention_arguments(network.decoder, layout))
    return network.hidden_states(index, **inputs)


@torch.no_grad()
def lone_states(model, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(T, H) of each of the num_layers + 1 hidden states of one sequence, as transformers returns them."""
    output = model(tokens[None], attention_mask=torch.ones(1, len(tokens), dtype=torch.long), output_hidden_states=True)
    return tuple(states[0] for states in output.hidden_states)


# ----------------------------------------------------------------------------------------------------------------------
# Hidden states


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "strided_forward.npz").items()}


@pytest.mark.parametrize("implementation", ["strided_blocks", "sdpa", "eager"])
def test_hidden_states_equal_the_released_code(golden, implementation):
    """Guards which state is layer k (0 = embeddings), the final norm, and a rollout's place in the packed sequence."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny-llama", dtype=torch.float32)
    model.set_attn_implementation(implementation)
    rollouts = golden["rollouts"].transpose(1, 2)  # (2, n, NB, G) -> (B, A, N, G)
    network = FeatureNetwork(model.get_decoder(), [2, 4, 6])
    document, anchors, valid = golden["doc"], golden["anchors"].expand(2, -1), torch.ones(2, 4, dtype=torch.bool)
    states = packed_states(network, document, torch.zeros_like(document), rollouts, anchors, valid)
    for layer, state in zip((2, 4, 6), states, strict=True):
        torch.testing.assert_close(state[:, :40], golden[f"hidden{layer}.doc"], atol=1e-4, rtol=0)
        expected = golden[f"hidden{layer}.rollout"].transpose(1, 2)
        torch.testing.assert_close(state[:, 40:].view(expected.shape), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layers", [[0], [1, 3], [0, 2, 4], [4], [3, 1, 3]])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt_neox", "phi"])
def test_cut_network_equals_the_whole_model(model_type, layers):
    """Layer 0 is the embeddings (for Gemma after their scaling), layer num_layers is after the final norm.

    The deepest layer of a cut network must not get the final norm.
    """
    model = strided_model(model_type)
    tokens = torch.randint(2, 300, (1, 12), generator=torch.Generator().manual_seed(2))
    network = FeatureNetwork(model.get_decoder(), layers)
    anchors, valid, no_rollouts = torch.tensor([[4]]), torch.tensor([[True]]), torch.empty(1, 1, 1, 0, dtype=torch.long)
    states = packed_states(network, tokens, torch.zeros_like(tokens), no_rollouts, anchors, valid)
    everything = lone_states(model, tokens[0])
    assert len(everything) == NUM_LAYERS + 1 and len(states) == len(layers)
    for layer, state in zip(layers, states, strict=True):
        torch.testing.assert_close(state[0], everything[layer], atol=1e-6, rtol=0)


def test_layer_indices():
    """int(depth * layers), as the paper's code rounds: down."""
    assert layer_indices([0.25, 0.5, 0.75], 8) == [2, 4, 6]
    assert layer_indices([0.0, 0.3, 0.99, 1.0], 30) == [0, 9, 29, 30]
    assert layer_indices([0.29], 100) == layer_indices([0.58], 50) == [29]  # not 28: the products are a bit below 29


def test_only_the_needed_layers_run():
    """Three quarters of the layers by default, and no LM head: what the feature forward costs."""
    model, calls = strided_model(), Counter()
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
    model.lm_head.register_forward_hook(lambda *_: calls.update(["head"]))
    model.model.norm.register_forward_hook(lambda *_: calls.update(["norm"]))
    network = FeatureNetwork(model.get_decoder(), layer_indices([0.25, 0.5, 0.75], NUM_LAYERS))
    strided_features(network, *example(), "last_token")
    assert calls == {0: 1, 1: 1, 2: 1}


def test_features_are_computed_without_dropout():
    """Whatever mode the policy is in: phi is one function, and equal rollouts must have equal features."""
    model = strided_model("phi", resid_pdrop=0.3, embd_pdrop=0.1)
    network = FeatureNetwork(model.get_decoder(), [1, 2, 3])
    expected = strided_features(network, *example(), "last_token")
    model.train(), network.decoder.train()
    for one, other in zip(strided_features(network, *example(), "last_token"), expected, strict=True):
        assert torch.equal(one, other)


def test_cut_decoder_leaves_the_model_whole():
    """The view shares parameters and nothing else: the policy keeps its layers and its norm."""
    model, tokens = strided_model(), torch.arange(2, 12)
    before = lone_states(model, tokens)
    view = cut_decoder(model.get_decoder(), 2)
    assert len(view.layers) == 2 and len(model.model.layers) == NUM_LAYERS
    assert view.layers[1].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    assert all(torch.equal(one, other) for one, other in zip(before, lone_states(model, tokens), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Features


def naive_features(model, tokens, num_generated: int, layers: list[int], method: str, norm="layer") -> torch.Tensor:
    """Features of the last num_generated tokens of one sequence, token by token: states of length 1, then pooled."""
    states = [state[-num_generated:] for state in lone_states(model, tokens)]
    joined = []
    for step in range(num_generated):
        parts = [states[layer][step] for layer in layers]
        if norm == "layer":
            parts = [part / part.norm() for part in parts]
        joined.append(torch.cat(parts) / torch.cat(parts).norm())
    if method == "last_token":
        return joined[-1]
    if method == "concat":  # at 1/4, 1/2 and 3/4 of the rollout
        three = torch.cat([joined[num_generated // 4], joined[num_generated // 2], joined[3 * num_generated // 4]])
        return three / three.norm()
    return sum(joined) / num_generated


@pytest.mark.parametrize("norm", ["layer", "joint"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", ["last_token", "mean_pooling", "completion_mean", "concat"])
def test_features_equal_one_sequence_at_a_time(method, model_type, norm):
    """Rollouts and truth, packed documents, padding and different anchors: each as if it were the only sequence."""
    model, layers = strided_model(model_type), [1, 2, 3]
    document, segments, rollouts, anchors, valid = example()
    network = FeatureNetwork(model.get_decoder(), layers)
    features, truth = strided_features(network, document, segments, rollouts, anchors, valid, method, norm)
    width = 3 * 32 * (3 if method == "concat" else 1)
    assert features.shape == (2, 3, 2, width) and truth.shape == (2, 3, width)
    assert features.isfinite().all() and not features.requires_grad and not truth.requires_grad
    for row, slot in np.argwhere(valid.numpy()):
        anchor = int(anchors[row, slot])
        start = int((segments[row] == segments[row, anchor - 1]).nonzero()[0])
        expected = naive_features(model, document[row, start : anchor + 4], 4, layers, method, norm)
        torch.testing.assert_close(truth[row, slot], expected, atol=1e-5, rtol=0)
        for sample in range(2):
            sequence = torch.cat([document[row, start:anchor], rollouts[row, slot, sample]])
            expected = naive_features(model, sequence, 4, layers, method, norm)
            torch.testing.assert_close(features[row, slot, sample], expected, atol=1e-5, rtol=0)
    assert (features[0, 0, 0] - features[0, 0, 1]).abs().max() > 0.05


@pytest.mark.parametrize("method", EMBED_METHODS)
def test_rollouts_that_repeat_the_truth_have_its_features(method):
    """Otherwise the reward would not be highest for the ground truth."""
    document, segments, rollouts, anchors, valid = example()
    windows = document.gather(1, (anchors[..., None] + torch.arange(4)).flatten(1))
    rollouts = windows.view(2, 3, 1, 4).expand(-1, -1, 2, -1)
    network = FeatureNetwork(strided_model().get_decoder(), [1, 2, 3])
    features, truth = strided_features(network, document, segments, rollouts, anchors, valid, method)
    torch.testing.assert_close(features[valid], truth[valid].unsqueeze(1).expand(-1, 2, -1), atol=1e-5, rtol=0)


def test_normalised_by_hand():
    """Layers (3, 4) and (0, 10): of length 1 each, all together of length 1; or in their own proportions."""
    layers = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])]
    torch.testing.assert_close(normalised(layers, "layer"), torch.tensor([[0.6, 0.8, 0.0, 1.0]]) / 2**0.5)
    torch.testing.assert_close(normalised(layers, "joint"), torch.tensor([[3.0, 4.0, 0.0, 10.0]]) / 125**0.5)
    with pytest.raises(ValueError, match="'rows'.*joint"):
        normalised(layers, "rows")


def test_pooling_by_hand():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]])
    assert pool(states, "mean_pooling").tolist() == pool(states, "completion_mean").tolist() == [[3.0, 3.0]]
    torch.testing.assert_close(pool(states, "concat"), torch.tensor([[1.0, 2.0, 3.0, 6.0, 5.0, 1.0]]) / 3**0.5)
    assert pool(states[:, :1], "last_token").tolist() == [[1.0, 2.0]]
    assert [pooled_steps(method, 8) for method in EMBED_METHODS] == [[7], [*range(8)], [*range(8)], [2, 4, 6]]
    with pytest.raises(ValueError, match="'cls'.*last_token"):
        pooled_steps("cls", 8)


# ----------------------------------------------------------------------------------------------------------------------
# Frozen: LoRA and full fine-tuning


def lora_policy(model):
    """A peft model with an adapter that does something.

    In train mode with gradient checkpointing, as train_strided.py has it.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    policy.enable_input_require_grads()
    shake_adapter(policy)
    return policy.train()


def shake_adapter(policy):
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def state_of(policy):
    """Everything that the feature forward must not change."""
    modes = {name: module.training for name, module in policy.named_modules()}
    return modes, {name: parameter.requires_grad for name, parameter in policy.named_parameters()}


def test_lora_features_are_the_base_models_bit_for_bit():
    """With the adapter on, phi would move with the policy."""
    pure = strided_features(FeatureNetwork(strided_model().get_decoder(), [1, 2, 3]), *example(), "last_token")
    policy = lora_policy(strided_model())
    decoder = base_causal_lm(policy).get_decoder()
    network = FeatureNetwork(decoder, [1, 2, 3], frozen=policy.disable_adapter)
    frozen = strided_features(network, *example(), "last_token")
    moved = strided_features(FeatureNetwork(decoder, [1, 2, 3]), *example(), "last_token")
    for one, other, with_adapter in zip(pure, frozen, moved, strict=True):
        assert torch.equal(one, other)
        assert (one - with_adapter).abs().max() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_feature_forward_changes_nothing_in_the_policy(training):
    """Train or eval mode of every module, requires_grad, hooks, and the adapter is on again.

    The network is made in eval mode, before policy.train(), as in train_strided.py: a mode remembered from then would
    leave the policy's layers in eval, and checkpointing off.
    """
    policy = lora_policy(strided_model()).eval()
    network = FeatureNetwork(base_causal_lm(policy).get_decoder(), [1, 2, 3], frozen=policy.disable_adapter)
    policy.train(training)
    before, logits = state_of(policy), policy(torch.arange(2, 12)[None]).logits
    strided_features(network, *example(), "last_token")
    modes, requires_grad = state_of(policy)
    assert requires_grad == before[1] and sum(requires_grad.values()) == NUM_LAYERS * 7 * 2
    assert torch.equal(policy(torch.arange(2, 12)[None]).logits, logits)
    assert all(not layer._forward_pre_hooks for layer in base_causal_lm(policy).model.layers)
    assert [name for name in modes if modes[name] != before[0][name]] == []


def policy_gradients(policy, network=None):
    """Gradients of the rollouts' log-probs, and how often each layer ran.

    A feature forward comes before, if a network is given.
    """
    calls, handles = Counter(), []
    if network is not None:
        strided_features(network, *example(), "last_token")
    for index, layer in enumerate(base_causal_lm(policy).model.layers):
        handles.append(layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.update([index])))
    document, segments, rollouts, anchors, valid = example()
    logps, _ = strided_logprobs(base_causal_lm(policy), document, segments, rollouts, anchors, valid, 0.6, False)
    torch.where(valid[..., None, None], logps, 0.0).mean().backward()
    for handle in handles:
        handle.remove()
    return {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.requires_grad}, calls


def test_backward_after_the_feature_forward():
    """A disabled adapter, or a mode, that leaks into the recomputation breaks checkpointing or its gradients."""
    model = strided_model()
    plain = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake_adapter(plain)
    torch.manual_seed(3)
    policy = lora_policy(strided_model())
    policy.load_state_dict(plain.state_dict())
    policy.eval()
    network = FeatureNetwork(base_causal_lm(policy).get_decoder(), [1, 2, 3], frozen=policy.disable_adapter)
    expected, plain_calls = policy_gradients(plain)
    gradients, calls = policy_gradients(policy.train(), network)
    assert len(gradients) == NUM_LAYERS * 7 * 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
        assert gradient.abs().max() > 1e-6, name
    assert plain_calls == {layer: 1 for layer in range(NUM_LAYERS)}
    assert calls == {layer: 2 for layer in range(NUM_LAYERS)}, "each layer is recomputed in the backward pass"


def test_full_fine_tuning_has_a_frozen_copy(write_config):
    """An update of the policy must not move phi.

    The copy has no gradient, the dtype of model.dtype and only the layers it needs.
    """
    config = load_config(str(write_config(model__dtype="bfloat16", model__gradient_checkpointing=True)))
    policy = load_policy(config)
    network = load_feature_network(policy, config, torch.device("cpu"))
    parameters = list(network.decoder.parameters())
    assert network.layers == [1, 2, 3] and len(network.decoder.layers) == 3 and len(policy.model.layers) == NUM_LAYERS
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in parameters)
    before = strided_features(network, *example(), "last_token")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    after = strided_features(network, *example(), "last_token")
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert before[0].dtype == torch.float32


def test_lora_network_is_no_second_model(write_config):
    """It is the policy itself: not one parameter more in memory."""
    config = load_config(str(write_config(lora={"r": 4})))
    policy = load_policy(config)
    base_causal_lm(policy).set_attn_implementation("strided_blocks")
    network = load_feature_network(policy, config, torch.device("cpu"))
    owned = {id(parameter) for parameter in policy.parameters()}
    assert {id(parameter) for parameter in network.decoder.parameters()} <= owned
    shake_adapter(policy)
    features = strided_features(network, *example(), "last_token")
    pure = strided_model()  # the weights of the model folder
    expected = strided_features(FeatureNetwork(pure.get_decoder(), [1, 2, 3]), *example(), "last_token")
    assert torch.equal(features[0], expected[0]) and torch.equal(features[1], expected[1])
