"""Rollouts that are decoded with a cache, against one forward for each token; how tokens are sampled."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ebft_utils.algorithm import decoding, flex, strided
from ebft_utils.algorithm.decoding import generate_rollouts, sample_tokens
from ebft_utils.algorithm.strided import rollout_logprobs
from helpers import tiny_model
from strided_cases import (
    ANCHORS,
    ARCHITECTURES,
    IMPLEMENTATIONS,
    NUM_GENERATED,
    NUM_SAMPLES,
    SEGMENTS,
    VALID,
    document_start,
    head_of_weights,
    next_token_logits,
    padded_inputs,
    random_tokens,
    with_attention,
)

UNIFORMS = torch.rand(2, 3, NUM_SAMPLES, NUM_GENERATED, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def naive_rollout(model, prefix: torch.Tensor, uniforms, temperature: float) -> list[int]:
    """Token after token, each from a fresh forward over everything.

    A token is the first one whose cumulative probability exceeds the uniform number.
    """
    tokens = prefix
    for uniform in uniforms:
        cumulative = (next_token_logits(model, tokens)[-1] / temperature).softmax(-1).double().cumsum(-1)
        drawn = next(token for token, mass in enumerate((cumulative / cumulative[-1]).tolist()) if mass > uniform)
        tokens = torch.cat([tokens, torch.tensor([drawn])])
    return tokens[len(prefix) :].tolist()


@pytest.fixture(scope="module")
def naive_rollouts():
    """All rollouts at valid anchors of SEGMENTS' rows, one by one, without a cache."""
    model, (tokens, segments, _, anchors, valid) = with_attention(tiny_model(), "sdpa"), padded_inputs()
    rollouts = {}
    for row, slot, sample in np.ndindex(2, 3, NUM_SAMPLES):
        if valid[row, slot]:
            anchor = int(anchors[row, slot])
            prefix = tokens[row, document_start(segments[row], anchor) : anchor]
            rollouts[row, slot, sample] = naive_rollout(model, prefix, UNIFORMS[row, slot, sample].tolist(), 0.6)
    return rollouts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rollouts_equal_a_loop_without_cache(monkeypatch, naive_rollouts, implementation, training):
    """Packed documents, padding, two rows. In train mode checkpointing empties the cache and rollouts are garbage."""
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", 4)
    model = with_attention(tiny_model(), implementation).train(training)
    if training:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens, segments, _, anchors, valid = padded_inputs()
    rollouts = generate_rollouts(model, tokens, segments, anchors, valid, 0.6, UNIFORMS)
    assert rollouts.shape == UNIFORMS.shape and ((rollouts >= 0) & (rollouts < 300)).all()
    assert {place: rollouts[place].tolist() for place in naive_rollouts} == naive_rollouts
    assert len({tuple(rollout) for rollout in naive_rollouts.values()}) > 5
    assert all(module.training == training for module in model.modules())


def one_document_rollouts(model, document, anchors, temperature, uniforms) -> torch.Tensor:
    """Rollouts of rows that are one document each, with valid anchors."""
    segments, valid = torch.zeros_like(document), torch.ones_like(anchors, dtype=torch.bool)
    return generate_rollouts(model, document, segments, anchors, valid, temperature, uniforms)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma3_text"])
def test_cached_rollouts_of_other_architectures(architecture):
    """A sliding layer's own cache drops keys by their number.

    Here 18 are cached, the window is 12, and no rollout has more than 10 tokens before it.
    """
    changes = {**ARCHITECTURES[architecture], "sliding_window": 12}
    model = with_attention(tiny_model(architecture, **changes), "strided_blocks")
    document, anchors, uniforms = random_tokens(1, 10), torch.tensor([[2, 7]]), UNIFORMS[:1, :2]
    rollouts = one_document_rollouts(model, document, anchors, 0.6, uniforms)
    for slot, sample in np.ndindex(2, NUM_SAMPLES):
        expected = naive_rollout(model, document[0, : anchors[0, slot]], uniforms[0, slot, sample].tolist(), 0.6)
        assert rollouts[0, slot, sample].tolist() == expected


def test_single_token_rollouts():
    model, document = with_attention(tiny_model(), "strided_blocks"), random_tokens(1, 10)
    uniforms = UNIFORMS[:1, :2, :, :1]
    rollouts = one_document_rollouts(model, document, torch.tensor([[2, 7]]), 0.6, uniforms)
    for slot, anchor in enumerate((2, 7)):
        for sample in range(2):
            expected = naive_rollout(model, document[0, :anchor], uniforms[0, slot, sample].tolist(), 0.6)
            assert rollouts[0, slot, sample].tolist() == expected


def test_low_temperature_is_greedy():
    """Whatever the uniform numbers: softmax(logits / temperature) becomes the argmax."""
    model, document = with_attention(tiny_model(), "strided_blocks"), random_tokens(1, 10)
    rollouts = one_document_rollouts(model, document, torch.tensor([[2, 7]]), 1e-4, UNIFORMS[:1, :2])
    for slot, anchor in enumerate((2, 7)):
        tokens = document[0, :anchor]
        for _ in range(NUM_GENERATED):
            tokens = torch.cat([tokens, next_token_logits(model, tokens)[-1].argmax()[None]])
        assert rollouts[0, slot].tolist() == [tokens[anchor:].tolist()] * NUM_SAMPLES


def test_mode_is_restored_after_an_error(monkeypatch):
    """A run that catches the error and goes on must not train in eval mode."""
    model, document = with_attention(tiny_model(), "strided_blocks").train(), random_tokens(1, 10)
    monkeypatch.setattr(decoding, "sample_tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one_document_rollouts(model, document, torch.tensor([[4]]), 1.0, UNIFORMS[:1, :1])
    assert all(module.training for module in model.modules())


def test_sampled_frequencies_are_the_softmax():
    """10,000 evenly spread numbers through the inverse distribution function.

    The share of each token is its probability, to 1/10,000.
    """
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 6), (12, 6), (12,)))
    weight = 0.3 * weight
    uniforms = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000).expand(2, -1)
    drawn = sample_tokens(hidden, head_of_weights(weight, bias), 0.7, uniforms)
    shares = torch.stack([row.bincount(minlength=12) for row in drawn]) / 10_000
    torch.testing.assert_close(shares, ((hidden @ weight.T + bias) / 0.7).softmax(-1), atol=1.1e-4, rtol=0)
    assert shares.max() < 0.9


def test_impossible_tokens_are_never_drawn():
    """Probability 0 at both ends of the vocabulary and in the middle; the smallest and the largest uniform number."""
    bias = torch.tensor([-1e4, 0.0, -1e4, 0.0, -1e4])
    uniforms = torch.tensor([[0.0, 0.4999, 0.5, 1 - 2**-40]], dtype=torch.float64)
    head = head_of_weights(torch.zeros(5, 2), bias)
    assert sample_tokens(torch.zeros(1, 2), head, 1.0, uniforms).tolist() == [[1, 1, 3, 3]]


def test_many_rows_are_sampled_in_chunks(monkeypatch):
    monkeypatch.setattr("ebft_utils.algorithm.losses.LOGITS_PER_CHUNK", 1)
    generator = torch.Generator().manual_seed(6)
    hidden, head = torch.randn(37, 6, generator=generator), head_of_weights(torch.randn(12, 6, generator=generator))
    uniforms = torch.rand(37, 3, generator=generator)
    chunked = sample_tokens(hidden, head, 0.7, uniforms)
    rows = [sample_tokens(hidden[row, None], head, 0.7, uniforms[row, None]) for row in range(37)]
    assert torch.equal(chunked, torch.cat(rows)) and len(chunked.unique()) > 6


def test_the_scored_policy_is_the_sampling_policy(monkeypatch):
    """The ratio of an unchanged policy is 1: log-probs that the sampler drew from equal those the loss scores."""
    model, document = with_attention(tiny_model(), "strided_blocks"), random_tokens(2, 16)
    anchors = torch.tensor([[2, 7, 12], [3, 6, 9]])
    drawn_logps, sample = [], decoding.sample_tokens

    def spy(hidden, head, temperature, uniforms):
        tokens = sample(hidden, head, temperature, uniforms)
        logps = ((hidden @ head.weight.T) / temperature).log_softmax(-1)
        drawn_logps.append(logps.gather(-1, tokens).view(2, 3, NUM_SAMPLES))
        return tokens

    monkeypatch.setattr(decoding, "sample_tokens", spy)
    rollouts = one_document_rollouts(model, document, anchors, 0.6, UNIFORMS)
    with torch.no_grad():
        scored = rollout_logprobs(model, document, rollouts, anchors, 0.6)
        other = rollout_logprobs(model, document, rollouts, anchors, 1.0)
    torch.testing.assert_close(scored, torch.stack(drawn_logps, dim=-1), atol=1e-4, rtol=0)
    assert (scored - other).abs().mean() > 0.05


class Waits(TorchDispatchMode):
    """Counts where a number is read out of a tensor (int(), bool(), item()).

    On a GPU the program waits there until all that was begun is done.
    """

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_decoding_never_waits_for_the_device(monkeypatch):
    """With FlexAttention, its kernel replaced by the dense mask of the same predicate.

    A dispatch mode and a compiled kernel exclude each other.
    """

    def dense_attention(query, key, value, *, block_mask, scale, enable_gqa):
        row, index, keys = (torch.arange(size) for size in (query.shape[0], query.shape[2], key.shape[2]))
        mask = block_mask.mask_mod(row[:, None, None], 0, index[:, None], keys[None])
        arguments = dict(attn_mask=mask[:, None], scale=scale, enable_gqa=enable_gqa)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **arguments)

    monkeypatch.setattr(flex, "_compiled_flex_attention", dense_attention)
    uniforms = torch.rand(2, 3, NUM_SAMPLES, 4, generator=torch.Generator().manual_seed(2))
    inputs = random_tokens(2, 20), SEGMENTS, ANCHORS, VALID, 0.6, uniforms
    rollouts, waits = {}, {}
    for implementation in ("strided_flex", "strided_blocks"):
        with Waits() as counted:
            model = with_attention(tiny_model(), implementation)
            rollouts[implementation] = generate_rollouts(model, *inputs)
        waits[implementation] = counted.number
    assert torch.equal(rollouts["strided_flex"][VALID], rollouts["strided_blocks"][VALID])
    assert waits["strided_flex"] == 0 and waits["strided_blocks"] > 3  # it cuts its blocks by the anchors
