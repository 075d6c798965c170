"""Feature-matching rewards and advantages (Jelassi et al. 2026, sections 2 and 3; equation numbers are the paper's).

Axis legend
    ...  any leading axes: groups that share one context (here: batch rows, anchors)
    N    rollouts of a group            D    feature width

Everything here is a pure tensor function. Rewards need only inner products, so all of them are computed from each
group's N x N Gram matrix, in float64: one batched `eigh` of (..., N, N) replaces an SVD of an N x D matrix per group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WHITENINGS = (None, "feature", "sample")


@dataclass(frozen=True)
class FeatureRewards:
    """What `feature_matching_rewards` returns; float32.

    alignment (..., N): 2 * cosine of each rollout's features with the truth's; not yet times alignment_coef
    diversity (..., N): 2/(N-1) * sum over siblings of their inner product with this rollout, the penalty; not yet times
                        diversity_coef
    reward    (..., N): alignment_coef * alignment - diversity_coef * diversity (eq 7, 9)
    cfm       (...):    || mean of the rollouts' features - truth's features ||^2 (eq 2), in the whitened space if any
    """

    alignment: Tensor
    diversity: Tensor
    reward: Tensor
    cfm: Tensor


def share_equal_rollouts(features: Tensor, rollouts: Tensor) -> Tensor:
    """Gives rollouts of a group with the same tokens the very same feature row: that of the first of them.

    Otherwise whitening turns the rounding noise between two equal rollouts into two orthogonal samples, and their
    penalty vanishes.

    Args: features (..., N, D); rollouts (..., N, G) token ids. Returns (..., N, D).
    """
    first = first_equal_rollout(rollouts)
    return features.gather(-2, first.unsqueeze(-1).expand_as(features))


def first_equal_rollout(rollouts: Tensor) -> Tensor:
    """For each rollout, the index of the first rollout of its group with exactly the same tokens (possibly its own).

    (..., N, G) token ids -> (..., N).
    """
    equal = (rollouts.unsqueeze(-2) == rollouts.unsqueeze(-3)).all(-1)
    return equal.int().argmax(-1)


def feature_matching_rewards(
    rollout_features: Tensor,
    truth_features: Tensor,
    *,
    whitening: str | None,
    alignment_coef: float,
    diversity_coef: float,
    whiten_tol: float = 1e-5,
) -> FeatureRewards:
    """Rewards of a group's rollouts from their features, eq 7 and 9; with whitening, eq 8.

    Naive, for one group with rows F (N, D) and truth y (D), `feature` whitening with W = pinv(F^T F)^(1/2):
        f_j = W F_j,  t = W y
        alignment_j = 2 cos(f_j, t);  diversity_j = 2/(N-1) * sum_{k != j} f_j . f_k;  cfm = || mean_j f_j - t ||^2
    `sample` is the reading of the paper's released code: the operator pinv(F F^T)^(1/2) mixes the samples, and the
    truth stays raw. None leaves the features as they are.

    Args:
        rollout_features: (..., N, D). Rollouts with equal tokens must have equal rows: see `share_equal_rollouts`.
        truth_features: (..., D).
        whiten_tol: singular values below this share of the largest count as zero.
    Raises: ValueError for an unknown whitening, or fewer than 2 rollouts.
    """
    if whitening not in WHITENINGS:
        raise ValueError(f"whitening is {whitening!r}; allowed: {', '.join(map(repr, WHITENINGS))}")
    num_samples = rollout_features.shape[-2]
    if num_samples < 2:
        raise ValueError("feature-matching rewards compare the rollouts of a group: at least 2 are needed")
    with torch.no_grad():
        features, truth = rollout_features.double(), truth_features.double()
        gram = features @ features.mT  # (..., N, N)
        cross = (features @ truth.unsqueeze(-1)).squeeze(-1)  # (..., N)
        truth_square = truth.square().sum(-1)
        if whitening is None:
            cosine = _cosine(cross, gram, truth_square)
            overlap, mean_dot_truth = gram, cross.mean(-1)
        else:
            # NaN features give NaN rewards below, not an error here
            eigenvalues, vectors = torch.linalg.eigh(gram.nan_to_num(0.0))
            kept = eigenvalues > whiten_tol**2 * eigenvalues[..., -1:].clamp_min(0)
            overlap = (vectors * kept.unsqueeze(-2)) @ vectors.mT  # the projection P = G^0
            if whitening == "feature":
                truth_coords = _apply_power(eigenvalues, vectors, kept, -1.0, cross)  # G^-1 c
                truth_square = truth_coords.square().sum(-1)
                cosine = _cosine(truth_coords, overlap, truth_square)
            else:
                truth_coords = _apply_power(eigenvalues, vectors, kept, -0.5, cross)  # G^-1/2 c
                sign = _apply_power(eigenvalues, vectors, kept, -0.5, torch.ones_like(cross)).sign()
                cosine = sign * _cosine(truth_coords, overlap, truth_square)
            mean_dot_truth = truth_coords.mean(-1)
        alignment = 2 * cosine
        off_diagonal = overlap.sum(-1) - overlap.diagonal(dim1=-2, dim2=-1)
        diversity = 2 * off_diagonal / (num_samples - 1)
        cfm = overlap.sum((-2, -1)) / num_samples**2 - 2 * mean_dot_truth + truth_square
        reward = alignment_coef * alignment - diversity_coef * diversity
    return FeatureRewards(alignment.float(), diversity.float(), reward.float(), cfm.float())


def unbiased_cfm(rollout_features: Tensor, truth_features: Tensor) -> Tensor:
    """An unbiased estimate of || E[features of a rollout] - truth's features ||^2, in the raw feature space.

    The plain estimate of eq 2 with N samples is too large by Var/N. Here || mean ||^2 is replaced by the mean inner
    product of two different rollouts, so that runs with different N and temperature can be compared. Single values can
    be negative.

    Args: rollout_features (..., N, D); truth_features (..., D). Returns (...), float32.
    """
    with torch.no_grad():
        features, truth = rollout_features.double(), truth_features.double()
        num_samples = features.shape[-2]
        total = features.sum(-2)
        pairs = total.square().sum(-1) - features.square().sum((-2, -1))
        mean_square = pairs / (num_samples * (num_samples - 1))
        cfm = mean_square - 2 * (total * truth).sum(-1) / num_samples + truth.square().sum(-1)
    return cfm.float()


def rloo_advantages(alignment: Tensor, diversity: Tensor, alignment_coef: float, diversity_coef: float) -> Tensor:
    """Reward minus the corrected leave-one-out baseline, eq 94.

    A sibling's reward contains this rollout through its diversity term, so the plain mean of the siblings' rewards is a
    biased baseline. With a, d as alignment and diversity in `FeatureRewards`:
        baseline_j = alignment_coef * (sum a - a_j)/(N-1) - diversity_coef * (sum d - 2 d_j)/(N-2)
    The diversity part is 0 when N = 2.

    Args: alignment, diversity (..., N). Returns (..., N). Raises ValueError when N < 2.
    """
    num_samples = alignment.shape[-1]
    if num_samples < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 rollouts in a group")
    baseline = alignment_coef * (alignment.sum(-1, keepdim=True) - alignment) / (num_samples - 1)
    if num_samples > 2:
        baseline = baseline - diversity_coef * (diversity.sum(-1, keepdim=True) - 2 * diversity) / (num_samples - 2)
    return alignment_coef * alignment - diversity_coef * diversity - baseline


def group_norm_advantages(reward: Tensor, eps: float = 1e-4) -> Tensor:
    """The GRPO estimator: (r - mean of the group) / (standard deviation of the group + eps).

    0 where all rewards are equal up to rounding. (..., N) -> (..., N).
    """
    centred = reward - reward.mean(-1, keepdim=True)
    spread = reward.amax(-1, keepdim=True) - reward.amin(-1, keepdim=True)
    equal = spread <= 1e-6 * reward.abs().amax(-1, keepdim=True).clamp_min(1.0)
    centred = torch.where(equal, 0.0, centred)  # otherwise rounding would be scaled up and trained on
    return centred / (centred.square().mean(-1, keepdim=True).sqrt() + eps)


def _apply_power(eigenvalues: Tensor, vectors: Tensor, kept: Tensor, power: float, vector: Tensor) -> Tensor:
    """U diag(lambda^power on the kept eigenvalues, else 0) U^T vector."""
    scale = torch.where(kept, eigenvalues, 1.0).pow(power) * kept
    return (vectors @ (scale.unsqueeze(-1) * (vectors.mT @ vector.unsqueeze(-1)))).squeeze(-1)


def _cosine(dots: Tensor, overlap: Tensor, truth_square: Tensor) -> Tensor:
    """dots_j / (sqrt(overlap_jj) * |truth|); 0 where rollout or truth is the zero vector."""
    norms = (overlap.diagonal(dim1=-2, dim2=-1) * truth_square.unsqueeze(-1)).clamp_min(0).sqrt()
    return torch.where(norms > 1e-30, dots / norms.clamp_min(1e-30), 0.0)
