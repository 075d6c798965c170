"""Token log-probs without full logits, and the losses made of them.

Axis legend
    M  predictor positions (flattened)      H  hidden width      V  vocabulary
    T  tokens that are scored, in any shape

Losses are SUMS over tokens divided by a count that the caller gives: the number of such tokens in the whole global
batch (all processes, all gradient accumulation steps). So an update does not depend on how the batch is split.
"""

import torch
from torch import Tensor

from .architecture import Head

LOGITS_PER_CHUNK = 2**25  # 128 MB of float32 logits at a time, whatever the vocabulary


def token_logprobs(hidden: Tensor, head: Head, token_ids: Tensor, temperature: float) -> Tensor:
    """log softmax(head(hidden) / temperature)[token], one token at each position; differentiable in hidden, W, b.

    Naive: torch.log_softmax(head_logits(hidden, head) / temperature, -1).gather(-1, token_ids[:, None])[:, 0].

    Here the logits exist for a chunk of positions at a time, in forward and (recomputed) in backward. The log-softmax
    is float32. torch's linear_cross_entropy is not used: it makes gradients in its forward pass, where it must know how
    the tokens are weighted. Here the weights come afterwards.

    Args: hidden (.., H); token_ids (..). Returns (..), float32.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = head.weight.to(hidden.dtype)
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    return _ChunkedTokenLogprobs.apply(hidden, weight, bias, token_ids, head.scale, head.softcap, 1.0 / temperature)


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """The logits of a few positions. (M, H) -> (M, V), float32."""
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    return _logits(hidden, head.weight.to(hidden.dtype), bias, head.scale, head.softcap)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1.0:
        logits = logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor, num_tokens: Tensor | float) -> Tensor:
    """REINFORCE with given advantages: sum over counted tokens of -advantage * log-prob, / num_tokens.

    Args:
        logprobs (..., G): log pi(token) at the sampling temperature.
        advantages (...), one for each rollout; mask (...), True = the rollout counts.
        num_tokens: counted tokens of the whole global batch.
    """
    # both factors are masked: 0 * NaN in the backward pass would be NaN
    return (-torch.where(mask, advantages, 0.0) * torch.where(mask, logprobs.sum(-1), 0.0)).sum() / num_tokens


def completion_token_weights(
    mask: Tensor, loss_type: str, num_completions: Tensor | float, num_tokens: Tensor | float, max_length: int
) -> Tensor:
    """The weight of each completion token in the policy-gradient loss.

    The sum over tokens of weight * loss is the loss of the whole global batch.
        bnpo     1 / num_tokens                                    every token of the batch counts the same
        grpo     1 / (tokens of the completion) / num_completions  every completion counts the same
        dr_grpo  1 / (num_completions * max_length)                as bnpo, but not normalised by the sampled lengths

    Args:
        mask (..., G): True = a token that the policy wrote and that counts. max_length: most tokens of a completion.
        num_completions: all completions, those without counted tokens too; num_tokens: counted tokens; both of the
            whole global batch.
    Returns (..., G), float32, 0 where the mask is False.
    """
    if loss_type == "grpo":
        return mask / (mask.sum(-1, keepdim=True).clamp_min(1) * num_completions)
    if loss_type == "dr_grpo":
        return mask / (num_completions * max_length)
    if loss_type == "bnpo":
        return mask / num_tokens
    raise ValueError(f"loss_type is {loss_type!r}; allowed: grpo, dr_grpo, bnpo")


def importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """Truncated importance sampling: min(pi(token) / mu(token), cap) for tokens that mu sampled and pi trains on.

    mu is the rollout server: its kernels, precision or (one update older) weights differ from the trainer's.

    Args: logprobs, behaviour_logprobs (...), of pi and of mu; mask (...), True = counts; cap: None for weights of 1.
    Returns (...), without gradient, 1 where the mask is False.
    """
    if cap is None:
        return torch.ones_like(behaviour_logprobs)
    return torch.where(mask, logprobs.detach() - behaviour_logprobs, 0.0).exp().clamp_max(cap)


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, epsilon: float
) -> Tensor:
    """Sum over tokens of -weight * min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A).

    ratio = exp(logprob - old logprob), A = advantage.
    As long as the policy is the old one, the ratio is 1, and this is the plain policy gradient.

    Args:
        logprobs, old_logprobs (..., G): of the policy being trained, and of the policy before the batch's first update.
        advantages (...): one for each completion.
        weights (..., G): completion_token_weights times importance_weights; 0 = does not count.
    """
    counts = weights != 0
    ratio = torch.where(counts, logprobs - old_logprobs, 0.0).exp()  # masked before exp: 0 * inf would be NaN
    advantages = advantages.unsqueeze(-1)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return -(weights * torch.where(counts, surrogate, 0.0)).sum()


def cross_entropy_loss(logprobs: Tensor, mask: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Cross-entropy on the ground truth: sum over counted tokens of -log-prob, / num_tokens.

    Args: logprobs (T) at temperature 1; mask (T), True = counts; num_tokens: counted tokens of the whole global batch.
    """
    return torch.where(mask, -logprobs, 0.0).sum() / num_tokens


def rows_per_chunk(vocab_size: int) -> int:
    """Number of positions whose logits are held at a time."""
    return max(16, LOGITS_PER_CHUNK // vocab_size)


class _ChunkedTokenLogprobs(torch.autograd.Function):
    """Log-probs whose backward recomputes the logits chunk by chunk from (hidden, W).

    The backward of log-softmax needs nothing else but the log-sum-exp of each row.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, scale, softcap, inverse_temperature):
        result = hidden.new_empty(token_ids.shape, dtype=torch.float32)
        hidden, token_ids, logprobs = hidden.flatten(0, -2), token_ids.flatten(), result.view(-1)
        rows = rows_per_chunk(weight.shape[0])
        log_normaliser = torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = _logits(hidden[chunk], weight, bias, scale, softcap).mul_(inverse_temperature)
            log_normaliser[chunk] = logits.logsumexp(-1)
            logprobs[chunk] = logits.gather(-1, token_ids[chunk, None])[:, 0] - log_normaliser[chunk]
        ctx.save_for_backward(hidden, weight, bias, token_ids, log_normaliser)
        ctx.head = scale, softcap, inverse_temperature
        return result

    @staticmethod
    def backward(ctx, grad_logprobs):
        hidden, weight, bias, token_ids, log_normaliser = ctx.saved_tensors
        scale, softcap, inverse_temperature = ctx.head
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        leading, grad_logprobs = grad_logprobs.shape, grad_logprobs.flatten()
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        rows = rows_per_chunk(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = _logits(hidden[chunk], weight, bias, scale, softcap)
            # d logits / d z = 1 - tanh^2
            slope = None if softcap is None else 1 - (logits / softcap).square_()
            # d logprob / d logits = (onehot(token) - softmax(logits / temperature)) / temperature
            grad = logits.mul_(inverse_temperature).sub_(log_normaliser[chunk, None]).exp_().neg_()
            grad.scatter_add_(-1, token_ids[chunk, None], torch.ones_like(grad[:, :1]))
            grad.mul_(grad_logprobs[chunk, None] * (inverse_temperature * scale))
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if needs_hidden:
                grad_hidden[chunk] = grad @ weight
            if needs_weight:
                grad_weight += grad.mT @ hidden[chunk]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        grad_hidden = None if grad_hidden is None else grad_hidden.view(*leading, -1)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
