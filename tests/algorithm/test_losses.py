"""Chunked log-probs against the full-logits formula, in value, gradient and memory; the losses with literal numbers."""

import pytest
import torch

from ebft_utils.algorithm import losses
from ebft_utils.algorithm.losses import cross_entropy_loss, policy_gradient_loss, token_logprobs
from strided_cases import head_of_weights

NUM_POSITIONS, WIDTH, VOCABULARY = 37, 8, 29  # with 16 rows a chunk: 16, 16 and a last one of 5


def chunked_logprobs(hidden, weight, bias, token_ids, temperature):
    """The function under test, with the head's weights as arguments."""
    return token_logprobs(hidden, head_of_weights(weight, bias), token_ids, temperature)


def naive_logprobs(hidden, weight, bias, token_ids, temperature):
    """The formula of the docstring: full logits."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return torch.log_softmax(logits.float() / temperature, -1).gather(-1, token_ids[:, None])[:, 0]


def inputs(with_bias=True, scale=1.0):
    """hidden, weight, bias (or None), token ids and a weight for each log-prob; leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(NUM_POSITIONS, WIDTH, generator=generator)).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=generator).requires_grad_() if with_bias else None
    token_ids = torch.randint(VOCABULARY, (NUM_POSITIONS,), generator=generator)
    return hidden, weight, bias, token_ids, torch.randn(NUM_POSITIONS, generator=generator)


def differentiated(function, hidden, weight, bias, token_ids, coefficients, temperature):
    """(log-probs, gradients of a weighted sum of them)."""
    values = function(hidden, weight, bias, token_ids, temperature)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    return values, torch.autograd.grad((values * coefficients).sum(), leaves)


@pytest.fixture
def small_chunks(monkeypatch):
    """The smallest chunks there are: 16 positions."""
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [True, False])
def test_logprobs_and_gradients_equal_the_full_logits(small_chunks, with_bias, temperature):
    """Guards the hand-written backward: the temperature's factor, sums over chunks, the short last chunk."""
    arguments = inputs(with_bias)
    values, gradients = differentiated(chunked_logprobs, *arguments, temperature)
    naive_values, naive_gradients = differentiated(naive_logprobs, *arguments, temperature)
    torch.testing.assert_close(values, naive_values, atol=1e-5, rtol=0)
    assert len(gradients) == (3 if with_bias else 2)
    for gradient, naive in zip(gradients, naive_gradients, strict=True):
        torch.testing.assert_close(gradient, naive, atol=2e-5, rtol=1e-5)
        assert naive.abs().max() > 0.1
    assert values.dtype == torch.float32


def test_one_chunk_equals_many(monkeypatch):
    arguments = inputs()
    whole, whole_gradients = differentiated(chunked_logprobs, *arguments, 0.6)
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 1)
    parts, part_gradients = differentiated(chunked_logprobs, *arguments, 0.6)
    assert losses.rows_per_chunk(VOCABULARY) == 16 < NUM_POSITIONS
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    for part, one in zip(part_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(part, one, atol=1e-5, rtol=0)


def test_backward_by_finite_differences(small_chunks):
    """Independent of autograd: a step along a random direction changes the sum as the gradient says."""
    hidden, weight, bias, token_ids, coefficients = inputs()
    _, gradients = differentiated(chunked_logprobs, hidden, weight, bias, token_ids, coefficients, 0.6)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(leaf.shape, generator=generator) for leaf in (hidden, weight, bias)]
    products = [gradient * direction for gradient, direction in zip(gradients, directions, strict=True)]
    predicted = sum(product.sum() for product in products)

    def total(step):
        pairs = zip((hidden, weight, bias), directions, strict=True)
        moved = [leaf.detach().double() + step * direction.double() for leaf, direction in pairs]
        logits = (moved[0] @ moved[1].T + moved[2]) / 0.6
        return (torch.log_softmax(logits, -1)[torch.arange(NUM_POSITIONS), token_ids] * coefficients).sum()

    measured = (total(1e-5) - total(-1e-5)) / 2e-5
    assert abs(predicted.item() - measured.item()) < 1e-4 * abs(measured.item())


def test_frozen_weight_gets_no_gradient(small_chunks):
    """LoRA: the LM head is frozen; its gradient would be a V x H float32 buffer for nothing."""
    hidden, weight, bias, token_ids, coefficients = inputs()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    (chunked_logprobs(hidden, weight, bias, token_ids, 0.6) * coefficients).sum().backward()
    assert weight.grad is None and bias.grad is None
    naive_sum = (naive_logprobs(hidden, weight, bias, token_ids, 0.6) * coefficients).sum()
    (naive_gradient,) = torch.autograd.grad(naive_sum, hidden)
    torch.testing.assert_close(hidden.grad, naive_gradient, atol=2e-5, rtol=1e-5)


def test_frozen_hidden_states_get_no_gradient(small_chunks):
    hidden, weight, bias, token_ids, coefficients = inputs()
    hidden.requires_grad_(False)
    (chunked_logprobs(hidden, weight, bias, token_ids, 1.0) * coefficients).sum().backward()
    naive_sum = (naive_logprobs(hidden, weight, bias, token_ids, 1.0) * coefficients).sum()
    naive = torch.autograd.grad(naive_sum, (weight, bias))
    assert hidden.grad is None
    torch.testing.assert_close(weight.grad, naive[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(bias.grad, naive[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_hidden_states(small_chunks, autocast):
    """bf16 logits, float32 log-softmax: near the float32 values, and float32 gradients for float32 weights."""
    hidden, weight, bias, token_ids, coefficients = arguments = inputs()
    reference, reference_gradients = differentiated(chunked_logprobs, *arguments, 0.6)
    given = hidden if autocast else hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        values = chunked_logprobs(given, weight, bias, token_ids, 0.6)
    gradients = torch.autograd.grad((values * coefficients).sum(), (given, weight, bias))
    assert values.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [given.dtype, torch.float32, torch.float32]
    # truly computed in bf16, and no worse than its rounding of logits up to 15
    assert 1e-4 < (values - reference).abs().max() < 0.2
    assert (gradients[1] - reference_gradients[1]).norm() < 0.02 * reference_gradients[1].norm()


def test_large_logits_do_not_overflow(small_chunks):
    """exp(logits) overflows from 89 on in float32; log-sum-exp does not."""
    arguments = inputs(scale=200.0)
    values, gradients = differentiated(chunked_logprobs, *arguments, 0.6)
    naive_values, naive_gradients = differentiated(naive_logprobs, *arguments, 0.6)
    assert naive_values.min() < -500
    torch.testing.assert_close(values, naive_values, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(gradients[0], naive_gradients[0], atol=1e-3, rtol=1e-3)


def saved_sizes(function, *arguments) -> list[int]:
    """Number of elements of every tensor kept for backward."""
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*arguments)
    return sizes


def test_full_logits_are_never_kept(small_chunks):
    """Positions x vocabulary in float32 is what runs out of memory first."""
    hidden, weight, bias, token_ids, _ = inputs()
    full = NUM_POSITIONS * VOCABULARY
    assert max(saved_sizes(naive_logprobs, hidden, weight, bias, token_ids, 0.6)) >= full
    assert max(saved_sizes(chunked_logprobs, hidden, weight, bias, token_ids, 0.6)) == NUM_POSITIONS * WIDTH < full


def test_at_most_one_chunk_of_logits_exists_at_a_time(small_chunks, monkeypatch):
    """In forward and in backward: each call of the head makes 16 rows of logits at most."""
    rows, linear = [], torch.nn.functional.linear

    def spy(hidden, *arguments):
        rows.append(hidden.shape[0])
        return linear(hidden, *arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    hidden, weight, bias, token_ids, _ = inputs()
    chunked_logprobs(hidden, weight, bias, token_ids, 0.6).sum().backward()
    assert rows == [16, 16, 5] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def test_policy_gradient_loss_by_hand():
    """-(2 * (-1-2) + (-1) * (-3-4)) / 8: advantage times the sum of the rollout's log-probs, over the GIVEN count."""
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    loss = policy_gradient_loss(logprobs, torch.tensor([2.0, -1.0]), torch.tensor([True, True]), 8)
    assert loss.item() == -(2 * -3 + -1 * -7) / 8
    loss.backward()
    assert logprobs.grad.tolist() == [[-0.25, -0.25], [0.125, 0.125]]


def test_cross_entropy_loss_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -4.0]], requires_grad=True)
    loss = cross_entropy_loss(logprobs, torch.tensor([[True, False, True]]), torch.tensor(10))
    assert loss.item() == 0.5
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.1, 0.0, -0.1]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["logprobs", "advantages"])
def test_masked_rollouts_do_not_leak(bad, place):
    """What stands at an invalid anchor means nothing: 0 * NaN is NaN, in the loss as in the gradient."""
    logprobs, advantages = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([2.0, 5.0])
    (logprobs[1] if place == "logprobs" else advantages)[1] = bad
    logprobs.requires_grad_()
    loss = policy_gradient_loss(logprobs, advantages, torch.tensor([True, False]), 2)
    assert loss.item() == 3.0
    loss.backward()
    assert logprobs.grad.tolist() == [[-1.0, -1.0], [0.0, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_masked_document_tokens_do_not_leak(bad):
    logprobs = torch.tensor([-1.0, bad, -3.0], requires_grad=True)
    loss = cross_entropy_loss(logprobs, torch.tensor([True, False, True]), 2)
    assert loss.item() == 2.0
    loss.backward()
    assert logprobs.grad.tolist() == [-0.5, 0.0, -0.5]


def test_micro_batches_add_up_to_the_whole_batch():
    """Sum over tokens / GLOBAL count: 1 x 4 = 4 x 1, also with ragged rows and one that is fully masked."""
    generator = torch.Generator().manual_seed(2)
    logprobs, advantages = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 3, generator=generator)
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False], [True, True, False]])
    count = mask.sum() * 5
    whole = policy_gradient_loss(logprobs, advantages, mask, count)
    parts = [policy_gradient_loss(logprobs[row], advantages[row], mask[row], count) for row in range(4)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=0)
    places = [(row, k, t) for row in range(4) for k in range(3) for t in range(5) if mask[row, k]]
    naive = sum(-advantages[row, k] * logprobs[row, k, t] for row, k, t in places) / count
    torch.testing.assert_close(whole, naive, atol=1e-6, rtol=0)
    targets = torch.rand(4, 9, generator=generator) < 0.6
    document = torch.randn(4, 9, generator=generator)
    whole = cross_entropy_loss(document, targets, targets.sum())
    parts = [cross_entropy_loss(document[row], targets[row], targets.sum()) for row in range(4)]
    assert abs(sum(parts) - whole) < 1e-6
    torch.testing.assert_close(whole, -document[targets].mean(), atol=1e-6, rtol=0)
