"""Token log-probs without full logits, and the losses made of them.

Axis legend
    M  predictor positions (flattened)      H  hidden width      V  vocabulary
    T  tokens that are scored, in any shape

Losses are SUMS over tokens divided by a count that the caller gives: the number of such tokens in the whole global batch (all processes, all
accumulation steps). That is what makes one update independent of how the batch is split.
"""

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**25  # 128 MB of float32 logits at a time, whatever the vocabulary


def token_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float) -> Tensor:
    """log softmax((hidden W^T + b) / temperature)[token], for one token at each position, differentiable in hidden, W and b.

    Naive: torch.log_softmax((hidden @ weight.T + bias).float() / temperature, -1).gather(-1, token_ids[:, None])[:, 0].
    Here the logits exist for a chunk of positions at a time, in forward and (recomputed) in backward; the log-softmax is float32.

    Args: hidden (.., H); weight (V, H); bias (V) or None; token_ids (..). Returns (..), float32.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    return _ChunkedTokenLogprobs.apply(hidden, weight, bias, token_ids, 1.0 / temperature)


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor, num_tokens: Tensor | float) -> Tensor:
    """REINFORCE with given advantages: sum over counted tokens of -advantage * log-prob, / num_tokens.

    Args:
        logprobs (..., G), log pi(token) at the sampling temperature; advantages (...), one for each rollout; mask (...), True = counts.
        num_tokens: counted tokens of the whole global batch.
    """
    # both factors are masked: 0 * NaN in the backward pass would be NaN
    return (-torch.where(mask, advantages, 0.0) * torch.where(mask, logprobs.sum(-1), 0.0)).sum() / num_tokens


def cross_entropy_loss(logprobs: Tensor, mask: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Cross-entropy on the ground truth: sum over counted tokens of -log-prob, / num_tokens.

    Args: logprobs (T) at temperature 1; mask (T), True = counts; num_tokens: counted tokens of the whole global batch.
    """
    return torch.where(mask, -logprobs, 0.0).sum() / num_tokens


def rows_per_chunk(vocab_size: int) -> int:
    """How many positions' logits are held at a time."""
    return max(16, LOGITS_PER_CHUNK // vocab_size)


class _ChunkedTokenLogprobs(torch.autograd.Function):
    """The backward of log-softmax needs only the log-sum-exp of each row: logits are recomputed chunk by chunk from (hidden, W)."""

    @staticmethod
    def _logits(hidden, weight, bias, scale):
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden, weight, bias).float().mul_(scale)

    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, scale):
        result = hidden.new_empty(token_ids.shape, dtype=torch.float32)
        hidden, token_ids, logprobs = hidden.flatten(0, -2), token_ids.flatten(), result.view(-1)
        rows = rows_per_chunk(weight.shape[0])
        log_normaliser = torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = _ChunkedTokenLogprobs._logits(hidden[chunk], weight, bias, scale)
            log_normaliser[chunk] = logits.logsumexp(-1)
            logprobs[chunk] = logits.gather(-1, token_ids[chunk, None])[:, 0] - log_normaliser[chunk]
        ctx.save_for_backward(hidden, weight, bias, token_ids, log_normaliser)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx, grad_logprobs):
        hidden, weight, bias, token_ids, log_normaliser = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        leading, grad_logprobs = grad_logprobs.shape, grad_logprobs.flatten()
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        rows = rows_per_chunk(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = _ChunkedTokenLogprobs._logits(hidden[chunk], weight, bias, ctx.scale)
            # d logprob / d logits = scale * (onehot(token) - softmax)
            grad = logits.sub_(log_normaliser[chunk, None]).exp_().neg_()
            grad.scatter_add_(-1, token_ids[chunk, None], torch.ones_like(grad[:, :1]))
            grad.mul_(grad_logprobs[chunk, None] * ctx.scale)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if needs_hidden:
                grad_hidden[chunk] = grad @ weight
            if needs_weight:
                grad_weight += grad.mT @ hidden[chunk]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return None if grad_hidden is None else grad_hidden.view(*leading, -1), grad_weight, grad_bias, None, None
