"""The clipped policy-gradient loss of structured mode, by hand: token weights, importance weights, clipping."""

import math

import pytest
import torch

from ebft_utils.algorithm.losses import (
    clipped_policy_loss,
    completion_token_weights,
    importance_weights,
    policy_gradient_loss,
)

MASK = torch.arange(4) < torch.tensor([[3, 1], [2, 0]]).unsqueeze(-1)  # completions of 3, 1, 2 and 0 tokens
TOKEN_WEIGHTS = [
    ("bnpo", [[[1 / 6, 1 / 6, 1 / 6, 0], [1 / 6, 0, 0, 0]], [[1 / 6, 1 / 6, 0, 0], [0, 0, 0, 0]]]),
    ("grpo", [[[1 / 9, 1 / 9, 1 / 9, 0], [1 / 3, 0, 0, 0]], [[1 / 6, 1 / 6, 0, 0], [0, 0, 0, 0]]]),
    ("dr_grpo", [[[1 / 30, 1 / 30, 1 / 30, 0], [1 / 30, 0, 0, 0]], [[1 / 30, 1 / 30, 0, 0], [0, 0, 0, 0]]]),
]


@pytest.mark.parametrize("loss_type, expected", TOKEN_WEIGHTS)
def test_token_weights_by_hand(loss_type, expected):
    """Guards against normalisers that count masked tokens or completions.

    3 completions count, with 6 tokens; the longest may have 10.
    """
    found = completion_token_weights(MASK, loss_type, 3, 6, 10)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-7)


def test_token_weights_of_an_unknown_type():
    """Guards against a typo that falls through to another loss."""
    with pytest.raises(ValueError, match="loss_type is 'dapo'"):
        completion_token_weights(MASK, "dapo", 1, 1, 1)


def test_importance_weights_by_hand():
    """min(pi/mu, cap), without gradient; 1 where nothing counts, whatever stands there."""
    logprobs = torch.tensor([math.log(0.5), math.log(0.9), -1e9, math.nan], requires_grad=True)
    behaviour = torch.tensor([math.log(0.25), math.log(0.1), -1.0, -1.0])
    mask = torch.tensor([True, True, True, False])
    found = importance_weights(logprobs, behaviour, mask, 3.0)
    assert torch.allclose(found, torch.tensor([2.0, 3.0, 0.0, 1.0])) and not found.requires_grad
    assert torch.equal(importance_weights(logprobs, behaviour, mask, None), torch.ones(4))


def test_loss_and_gradient_by_hand():
    """Ratios 1.1, 1.5 and 0.5 with epsilon 0.2.

    What the clip stops has no gradient, and only on the side that the advantage pushes to.
    """
    ratios = torch.tensor([1.1, 1.5, 0.5])
    for advantage, surrogate, gradient in (
        (2.0, [2.2, 2.4, 1.0], [2.2, 0.0, 1.0]),
        (-2.0, [-2.2, -3.0, -1.6], [-2.2, -3.0, 0.0]),
    ):
        old = torch.tensor([-1.0, -2.0, -3.0])
        logprobs = (old + ratios.log()).requires_grad_()
        weights = torch.tensor([0.5, 0.25, 0.125])
        loss = clipped_policy_loss(logprobs[None], old[None], torch.tensor([advantage]), weights[None], 0.2)
        loss.backward()
        assert loss.item() == pytest.approx(-(weights * torch.tensor(surrogate)).sum().item(), rel=1e-6)
        assert torch.allclose(logprobs.grad, -weights * torch.tensor(gradient), rtol=1e-5)


def test_at_the_old_policy_it_is_the_policy_gradient():
    """The first update of a batch has ratio 1: its gradient is the unclipped one."""
    torch.manual_seed(0)
    logprobs, advantages = (-torch.rand(3, 2, 4)).requires_grad_(), torch.randn(3, 2)
    mask = torch.ones(3, 2, dtype=torch.bool)
    policy_gradient_loss(logprobs, advantages, mask, 24.0).backward()
    expected, logprobs.grad = logprobs.grad, None
    weights = completion_token_weights(torch.ones(3, 2, 4, dtype=torch.bool), "bnpo", 6, 24, 4)
    clipped_policy_loss(logprobs, logprobs.detach(), advantages, weights, 0.2).backward()
    assert torch.allclose(logprobs.grad, expected, atol=1e-7) and expected.abs().max() > 0.01


@pytest.mark.parametrize("rubbish", [math.inf, -math.inf, math.nan])
def test_what_does_not_count_may_be_rubbish(rubbish):
    """0 * inf is NaN: padding must be taken out before exp, in loss and gradient."""
    logprobs = torch.tensor([[-1.0, rubbish]], requires_grad=True)
    old, advantages, weights = torch.tensor([[-1.0, 0.0]]), torch.tensor([3.0]), torch.tensor([[0.5, 0.0]])
    loss = clipped_policy_loss(logprobs, old, advantages, weights, 0.2)
    loss.backward()
    assert loss.item() == -1.5 and logprobs.grad.tolist() == [[-1.5, 0.0]]


def test_extreme_quotients():
    """Guards against inf * 0 and NaN in weights: a server that held a token for impossible, and a trainer that does."""
    logprobs, behaviour = torch.tensor([-1.0, -1.0, -1e4, -math.inf]), torch.tensor([-1e4, -math.inf, -1.0, -1.0])
    found = importance_weights(logprobs, behaviour, torch.ones(4, dtype=torch.bool), 2.0)
    assert found.tolist() == [2.0, 2.0, 0.0, 0.0]
    logprobs, old = torch.tensor([[-1e4, -1.0]], requires_grad=True), torch.tensor([[-1e4, -1.0]])
    weights = found[None, 2:] + torch.tensor([[0.0, 0.25]])
    loss = clipped_policy_loss(logprobs, old, torch.tensor([2.0]), weights, 0.2)
    loss.backward()
    assert loss.item() == -0.5 and logprobs.grad.tolist() == [[0.0, -0.5]]


@pytest.mark.parametrize("rubbish", [math.inf, -math.inf, math.nan])
def test_a_completion_that_does_not_count_may_have_any_advantage(rubbish):
    """Guards against 0 * NaN through the advantage: the second completion was left out."""
    logprobs = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    old, weights = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[0.5], [0.0]])
    loss = clipped_policy_loss(logprobs, old, torch.tensor([3.0, rubbish]), weights, 0.2)
    loss.backward()
    assert loss.item() == -1.5 and logprobs.grad.tolist() == [[-1.5], [0.0]]
