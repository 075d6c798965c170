"""Features of completions of different lengths against each completion alone through transformers' own forward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ebft_utils.algorithm.features import EMBED_METHODS, FeatureNetwork, completion_features, read_steps
from ebft_utils.models import base_causal_lm
from helpers import tiny_model

LAYERS = [1, 2, 3]
PROMPTS, TRUTHS = [[5, 6, 7], [8, 9, 10, 11, 12]], [[20, 21, 22, 23, 24], [25]]
COMPLETIONS = [[[30], [31, 32, 33, 34, 35, 36, 37], [38, 39]], [[40, 41, 42], [43], [44, 45, 46, 47]]]


def strided_model():
    model = tiny_model()
    model.set_attn_implementation("strided_blocks")
    return model


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def found(
    network: FeatureNetwork, embed_method: str, pad: int = 1, rows: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    prompts, truths, groups = PROMPTS[rows], TRUTHS[rows], COMPLETIONS[rows]
    return completion_features(
        network,
        padded([prompt + truth for prompt, truth in zip(prompts, truths, strict=True)], pad),
        torch.tensor([len(prompt) for prompt in prompts]),
        torch.tensor([len(truth) for truth in truths]),
        padded([completion for group in groups for completion in group], pad).unflatten(0, (len(groups), -1)),
        torch.tensor([[len(completion) for completion in group] for group in groups]),
        embed_method,
    )


@torch.no_grad()
def naive(model, prompt: list[int], completion: list[int], embed_method: str) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    hidden = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer][0] / hidden[layer][0].norm(dim=-1, keepdim=True) for layer in LAYERS], dim=-1)
    states = states / len(LAYERS) ** 0.5
    own = states[len(prompt) :]
    if embed_method == "last_token":
        return own[-1]
    if embed_method == "mean_pooling":
        return states.mean(0)
    if embed_method == "completion_mean":
        return own.mean(0)
    return torch.cat([own[len(completion) * quarter // 4] for quarter in (1, 2, 3)]) / 3**0.5


@pytest.mark.parametrize("embed_method", EMBED_METHODS)
def test_features_equal_each_completion_alone(embed_method):
    """Guards against a neighbour's positions, padding that is read or averaged, and another row's prompt."""
    model = strided_model()
    features, truth = found(FeatureNetwork(model.get_decoder(), LAYERS), embed_method)
    for row, prompt in enumerate(PROMPTS):
        assert torch.allclose(truth[row], naive(model, prompt, TRUTHS[row], embed_method), atol=1e-5)
        for sample, completion in enumerate(COMPLETIONS[row]):
            assert torch.allclose(features[row, sample], naive(model, prompt, completion, embed_method), atol=1e-5)
    assert (features[0, 0] - features[0, 1]).abs().max() > 0.01


@pytest.mark.parametrize("embed_method", EMBED_METHODS)
def test_padding_and_neighbours_change_nothing(embed_method):
    """Guards against features that depend on the rest of the batch."""
    network = FeatureNetwork(strided_model().get_decoder(), LAYERS)
    features, truth = found(network, embed_method)
    alone = [found(network, embed_method, rows=slice(row, row + 1)) for row in (0, 1)]
    alone = [torch.cat(pair) for pair in zip(*alone, strict=True)]
    for one, other in (found(network, embed_method, pad=77), alone):
        assert torch.allclose(features, one, atol=1e-6) and torch.allclose(truth, other, atol=1e-6)


def test_with_an_adapter_they_are_the_base_models():
    """The feature network of a LoRA policy is the policy without its adapter, which is on again afterwards."""
    expected, _ = found(FeatureNetwork(strided_model().get_decoder(), LAYERS), "completion_mean")
    policy = get_peft_model(
        strided_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = policy(ids).logits
        network = FeatureNetwork(base_causal_lm(policy).get_decoder(), LAYERS, frozen=policy.disable_adapter)
        features, _ = found(network, "completion_mean")
        assert torch.equal(policy(ids).logits, before)
    assert torch.equal(features, expected)


def test_steps_by_hand():
    """Lengths 1, 4 and 7."""
    lengths = torch.tensor([1, 4, 7])
    assert read_steps(lengths, "last_token")[0].tolist() == [[0], [3], [6]]
    assert read_steps(lengths, "concat")[0].tolist() == [[0, 0, 0], [1, 2, 3], [1, 3, 5]]
    steps, counted = read_steps(lengths, "completion_mean")
    assert counted.sum(-1).tolist() == [1, 4, 7] and steps[2].tolist() == [*range(7)]
