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
BASELINES = ("leave_out", "eq94")


@dataclass(frozen=True)
class FeatureRewards:
    """What `feature_matching_rewards` returns; float32.

    alignment (..., N): 2 * cosine of each rollout's features with the truth's; not yet times alignment_coef
    diversity (..., N): 2/(N-1) * sum over siblings of their inner product with this rollout, the penalty; not yet times
                        diversity_coef
    reward    (..., N): alignment_coef * alignment - diversity_coef * diversity (eq 7, 9)
    baseline  (..., N): what the siblings lead to expect of this rollout's reward; advantage = reward - baseline
    cfm       (...):    || mean of the rollouts' features - truth's features ||^2 (eq 2), in the whitened space if any
    """

    alignment: Tensor
    diversity: Tensor
    reward: Tensor
    baseline: Tensor
    cfm: Tensor

    def plus(self, reward: Tensor) -> "FeatureRewards":
        """These rewards and another one (..., N), of your own. It gets the plain leave-one-out baseline."""
        total, baseline = self.reward + reward, self.baseline + leave_one_out(reward)
        return FeatureRewards(self.alignment, self.diversity, total, baseline, self.cfm)


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
    baseline: str = "leave_out",
) -> FeatureRewards:
    """Rewards of a group's rollouts from their features, eq 7 and 9; with whitening, eq 8.

    Naive, for one group with rows F (N, D) and truth y (D), `feature` whitening with W = pinv(F^T F)^(1/2):
        f_j = W F_j,  t = W y
        alignment_j = 2 cos(f_j, t);  diversity_j = 2/(N-1) * sum_{k != j} f_j . f_k;  cfm = || mean_j f_j - t ||^2
    `sample` is the reading of the paper's released code: M = pinv(F F^T)^(1/2) mixes the samples, f = M F, and the
    truth that rollout j meets is t_j = (M 1)_j y; cfm = || mean_j (f_j - t_j) ||^2. None leaves the features as they
    are.

    Baseline. A sibling's reward contains rollout j, through the diversity sum and through whitening, so the plain mean
    of the siblings' rewards is biased. `leave_out` computes the siblings' rewards in the group of those N-1 alone: it
    does not depend on rollout j, and the policy gradient is unbiased with any whitening. `eq94` is the paper's closed
    form: the same without whitening, and biased with it.

    Args:
        rollout_features: (..., N, D). Rollouts with equal tokens must have equal rows: see `share_equal_rollouts`.
        truth_features: (..., D).
        whiten_tol: singular values below this share of the largest count as zero, and so does a rollout whose features
            are that small. At least 1e-6: a Gram matrix holds their squares, and float64 has 16 digits.
    Raises: ValueError for an unknown whitening or baseline, or fewer than 2 rollouts.
    """
    for name, value, allowed in (("whitening", whitening, WHITENINGS), ("baseline", baseline, BASELINES)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    num_samples = rollout_features.shape[-2]
    if num_samples < 2:
        raise ValueError("feature-matching rewards compare the rollouts of a group: at least 2 are needed")
    with torch.no_grad():
        features, truth = rollout_features.double(), truth_features.double()
        gram = features @ features.mT  # (..., N, N)
        cross = (features @ truth.unsqueeze(-1)).squeeze(-1)  # (..., N)
        truth_square = truth.square().sum(-1)
        alignment, diversity, cfm = _from_gram(gram, cross, truth_square, whitening, whiten_tol)
        reward = alignment_coef * alignment - diversity_coef * diversity
        if baseline == "eq94":
            expected = eq94_baseline(alignment, diversity, alignment_coef, diversity_coef)
        else:
            index = torch.arange(num_samples, device=gram.device)
            others = index[:-1] + (index[:-1] >= index.unsqueeze(-1))  # (N, N-1): the group without rollout j
            gram = gram[..., others.unsqueeze(-1), others.unsqueeze(-2)]  # (..., N, N-1, N-1)
            of_others = _from_gram(gram, cross[..., others], truth_square.unsqueeze(-1), whitening, whiten_tol)
            expected = (alignment_coef * of_others[0] - diversity_coef * of_others[1]).mean(-1)
    return FeatureRewards(*(tensor.float() for tensor in (alignment, diversity, reward, expected, cfm)))


def _from_gram(
    gram: Tensor, cross: Tensor, truth_square: Tensor, whitening: str | None, whiten_tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Alignment (..., N), diversity (..., N) and cfm (...) of groups.

    gram (..., N, N): inner products of the rollouts' features; cross (..., N): with the truth's; truth_square (...).
    """
    num_samples = cross.shape[-1]
    if whitening is None:
        overlap = gram
        cosine = _cosine(cross, gram, truth_square)
        cfm = gram.sum((-2, -1)) / num_samples**2 - 2 * cross.mean(-1) + truth_square
    else:
        # NaN features give NaN rewards below, not an error here
        eigenvalues, vectors = torch.linalg.eigh(gram.nan_to_num(0.0))
        kept = eigenvalues > whiten_tol**2 * eigenvalues[..., -1:].clamp_min(0)
        overlap = (vectors * kept.unsqueeze(-2)) @ vectors.mT  # the projection P = G^0
        total = overlap.sum((-2, -1))
        if whitening == "feature":
            coords = _apply_power(eigenvalues, vectors, kept, -1.0, cross)  # G^-1 c
            coords_square = coords.square().sum(-1)
            cosine = _cosine(coords, overlap, coords_square)
            cfm = total / num_samples**2 - 2 * coords.mean(-1) + coords_square
        else:
            coords = _apply_power(eigenvalues, vectors, kept, -0.5, cross)  # G^-1/2 c
            scales = _apply_power(eigenvalues, vectors, kept, -0.5, torch.ones_like(cross))  # G^-1/2 1
            cosine = scales.sign() * _cosine(coords, overlap, truth_square)
            scale = scales.sum(-1)
            cfm = (total - 2 * scale * coords.sum(-1) + scale.square() * truth_square) / num_samples**2
        square = gram.diagonal(dim1=-2, dim2=-1)  # a rollout without features would be rounding, scaled up
        cosine = torch.where(square <= whiten_tol**2 * square.amax(-1, keepdim=True), 0.0, cosine)
    siblings = overlap.sum(-1) - overlap.diagonal(dim1=-2, dim2=-1)
    return 2 * cosine, 2 * siblings / max(1, num_samples - 1), cfm.clamp_min(0)


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


def eq94_baseline(alignment: Tensor, diversity: Tensor, alignment_coef: float, diversity_coef: float) -> Tensor:
    """The paper's corrected leave-one-out baseline, eq 94. It makes an unbiased gradient without whitening only.

    With a, d as alignment and diversity in `FeatureRewards`:
        baseline_j = alignment_coef * (sum a - a_j)/(N-1) - diversity_coef * (sum d - 2 d_j)/(N-2)
    The diversity part is 0 when N = 2.

    Args: alignment, diversity (..., N). Returns (..., N). Raises ValueError when N < 2.
    """
    num_samples = alignment.shape[-1]
    baseline = alignment_coef * leave_one_out(alignment)
    if num_samples > 2:
        baseline = baseline - diversity_coef * (diversity.sum(-1, keepdim=True) - 2 * diversity) / (num_samples - 2)
    return baseline


def leave_one_out(reward: Tensor) -> Tensor:
    """The mean reward of a rollout's siblings. (..., N) -> (..., N). Raises ValueError when N < 2."""
    num_samples = reward.shape[-1]
    if num_samples < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 rollouts in a group")
    return (reward.sum(-1, keepdim=True) - reward) / (num_samples - 1)


def group_normalised(advantages: Tensor, reward: Tensor, eps: float = 1e-4) -> Tensor:
    """Advantages divided by the standard deviation of their group's rewards, as GRPO does: A / (std(reward) + eps).

    The standard deviation is the sample's (N - 1 in its denominator). 0 where all rewards are equal up to rounding.
    The advantages come from eq 94's baseline: rewards centred in the group would weigh the diversity only (N-2)/(N-1)
    times as much.

    Args: advantages, reward (..., N). Returns (..., N).
    """
    spread = reward.amax(-1, keepdim=True) - reward.amin(-1, keepdim=True)
    equal = spread <= 1e-6 * reward.abs().amax(-1, keepdim=True).clamp_min(1.0)  # rounding must not be scaled up
    return torch.where(equal, 0.0, advantages / (reward.std(-1, keepdim=True) + eps))


def _apply_power(eigenvalues: Tensor, vectors: Tensor, kept: Tensor, power: float, vector: Tensor) -> Tensor:
    """U diag(lambda^power on the kept eigenvalues, else 0) U^T vector."""
    scale = torch.where(kept, eigenvalues, 1.0).pow(power) * kept
    return (vectors @ (scale.unsqueeze(-1) * (vectors.mT @ vector.unsqueeze(-1)))).squeeze(-1)


def _cosine(dots: Tensor, overlap: Tensor, truth_square: Tensor) -> Tensor:
    """dots_j / (sqrt(overlap_jj) * |truth|); 0 where rollout or truth is the zero vector."""
    norms = (overlap.diagonal(dim1=-2, dim2=-1) * truth_square.unsqueeze(-1)).clamp_min(0).sqrt()
    return torch.where(norms > 1e-30, dots / norms.clamp_min(1e-30), 0.0)
