"""Rewards and advantages against the released code's numbers, the paper's equations written out, and by hand."""

import itertools

import numpy as np
import pytest
import torch

from ebft_utils.algorithm.features import normalised
from ebft_utils.algorithm.rewards import (
    eq94_baseline,
    feature_matching_rewards,
    first_equal_rollout,
    group_normalised,
    leave_one_out,
    share_equal_rollouts,
    unbiased_cfm,
)
from helpers import GOLDEN

WHITENING_NAMES = {"none": None, "feature": "feature", "sample": "sample"}
WHITENINGS = list(WHITENING_NAMES.values())


def rewards_of(features, truth, whitening, alignment_coef=1.0, diversity_coef=1.0, baseline="leave_out"):
    return feature_matching_rewards(
        features,
        truth,
        whitening=whitening,
        alignment_coef=alignment_coef,
        diversity_coef=diversity_coef,
        baseline=baseline,
    )


def advantages_of(features, truth, whitening, alignment_coef=1.0, diversity_coef=1.0, baseline="leave_out"):
    rewards = rewards_of(features, truth, whitening, alignment_coef, diversity_coef, baseline)
    return rewards.reward - rewards.baseline


def naive_group(features, truth, whitening, tol=1e-5):
    """Alignment (N), diversity (N) and CFM of ONE group: eq 7, 8, 9 and 2, one rollout at a time.

    From whitened vectors in float64.
    """
    features, truth = features.double(), truth.double()
    num = len(features)
    left, singular, right = torch.linalg.svd(features, full_matrices=False)
    inverse = torch.where(singular > tol * singular.max(), 1 / singular, 0.0)
    if whitening == "feature":  # pinv(F^T F)^(1/2), a D x D matrix, applied to every vector
        operator = right.T @ torch.diag(inverse) @ right
        rows, targets = [operator @ row for row in features], [operator @ truth] * num
    elif whitening == "sample":
        # pinv(F F^T)^(1/2), an N x N matrix that mixes the rollouts; N copies of the truth go through it too
        operator = left @ torch.diag(inverse) @ left.T
        rows, targets = list(operator @ features), list(operator @ truth.expand(num, -1))
    else:
        rows, targets = list(features), [truth] * num
    alignment, diversity = [], []
    for j in range(num):
        norms = rows[j].norm() * targets[j].norm()
        alignment.append(2 * (rows[j] @ targets[j] / norms if norms > 1e-12 else torch.zeros(()).double()))
        diversity.append(2 / (num - 1) * sum(rows[j] @ rows[k] for k in range(num) if k != j))
    cfm = (sum(row - target for row, target in zip(rows, targets, strict=True)) / num).square().sum()
    return torch.stack(alignment), torch.stack(diversity), cfm


# ----------------------------------------------------------------------------------------------------------------------
# The released code's numbers


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "rewards.npz").items()}


@pytest.mark.parametrize("diversity_coef", [1.0, 0.5])
@pytest.mark.parametrize("name", WHITENING_NAMES)
def test_rewards_and_advantages_equal_the_released_code(golden, name, diversity_coef):
    """Guards every constant of eq 7-9 (factors 2, 1/(n-1), which vector is whitened) and eq 94, duplicates included."""
    features, truth = golden["gen"].transpose(1, 2), golden["gt"]  # (P, NB, n, D), (P, NB, D)
    rewards = rewards_of(features, truth, WHITENING_NAMES[name], 1.0, diversity_coef)
    key = name if diversity_coef == 1.0 else f"{name}_div0.5"
    for part in ("alignment", "diversity", "reward"):
        torch.testing.assert_close(getattr(rewards, part), golden[f"{key}.{part}"].transpose(1, 2), atol=1e-5, rtol=0)
    advantages = advantages_of(features, truth, WHITENING_NAMES[name], 1.0, diversity_coef, "eq94")
    torch.testing.assert_close(advantages, golden[f"{key}.advantage_rloo"].transpose(1, 2), atol=1e-5, rtol=0)
    assert advantages.abs().max() > 0.1


@pytest.mark.parametrize("name", ["none", "feature"])
def test_cfm_equals_the_released_code(golden, name):
    rewards = rewards_of(golden["gen"].transpose(1, 2), golden["gt"], WHITENING_NAMES[name])
    torch.testing.assert_close(rewards.cfm, golden[f"{name}.cfm"], atol=1e-5, rtol=0)
    assert rewards.cfm.std() > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# The equations, slowly


# kind -> number of rollouts and of features
GROUPS = {"full rank": (4, 20), "duplicates": (6, 20), "more rollouts than features": (7, 3), "two rollouts": (2, 5)}


def random_groups(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 3) groups of rollout features and truths."""
    generator = torch.Generator().manual_seed(5)
    num, width = GROUPS[kind]
    features = torch.randn(2, 3, num, width, generator=generator)
    if kind == "duplicates":
        features[..., 4, :] = features[..., 1, :]
        features[0, :, 5] = features[0, :, 0]
        features[1, :, 5] = 0.5 * features[1, :, 2] + 0.5 * features[1, :, 3]  # rank-deficient without equal rows
    return features, torch.randn(2, 3, width, generator=generator)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_rewards_equal_the_equations_group_by_group(whitening, kind):
    """Guards the Gram-matrix shortcut: powers of eigenvalues, the projection, the tolerance.

    Groups must not mix in the batched eigh.
    """
    features, truth = random_groups(kind)
    rewards = rewards_of(features, truth, whitening, 0.7, 1.3)
    for place in itertools.product(range(2), range(3)):
        alignment, diversity, cfm = naive_group(features[place], truth[place], whitening)
        torch.testing.assert_close(rewards.alignment[place].double(), alignment, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rewards.diversity[place].double(), diversity, atol=1e-5, rtol=1e-5)
        reward = 0.7 * alignment - 1.3 * diversity
        torch.testing.assert_close(rewards.reward[place].double(), reward, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rewards.cfm[place].double(), cfm, atol=1e-5, rtol=1e-5)
    assert rewards.reward.dtype == rewards.cfm.dtype == torch.float32


def test_literal_group():
    """eq 7 and 9 with numbers that one can check in one's head: rollouts (1,0), (0,1), (1,0), truth (3,4)."""
    rewards = rewards_of(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([3.0, 4.0]), None, 1.0, 0.5)
    torch.testing.assert_close(rewards.alignment, torch.tensor([1.2, 1.6, 1.2]))
    torch.testing.assert_close(rewards.diversity, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(rewards.reward, torch.tensor([0.7, 1.6, 0.7]))
    torch.testing.assert_close(rewards.cfm, torch.tensor((2 / 3 - 3) ** 2 + (1 / 3 - 4) ** 2))


@pytest.mark.parametrize("whitening", ["feature", "sample"])
def test_identical_rollouts(whitening):
    """n equal rollouts are one direction: each is its unit vector / sqrt(n).

    So the penalty is 2/n, not the 0 of n orthogonal samples.
    """
    row, truth = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([1.0, -1.0, 0.0])
    rewards = rewards_of(row.repeat(4, 1), truth, whitening)
    cosine = -1.0 if whitening == "feature" else -(0.5**0.5)  # eq 8 also projects the truth onto the rollouts' span
    torch.testing.assert_close(rewards.alignment, torch.full((4,), 2 * cosine))
    torch.testing.assert_close(rewards.diversity, torch.full((4,), 0.5))
    advantages = advantages_of(row.repeat(4, 1), truth, whitening, baseline="eq94")
    torch.testing.assert_close(advantages, torch.zeros(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_zero_features(whitening):
    """All-zero features have no direction: the reward is exactly 0, and nothing is NaN.

    Also when only one rollout or the truth is zero.
    """
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(6, generator=generator)
    everything = rewards_of(torch.zeros(4, 6), truth, whitening)
    assert everything.alignment.tolist() == everything.diversity.tolist() == everything.reward.tolist() == [0.0] * 4
    torch.testing.assert_close(everything.cfm, torch.zeros(()) if whitening else truth.square().sum())
    features = torch.randn(4, 6, generator=generator)
    features[2] = 0
    one = rewards_of(features, truth, whitening)
    assert one.reward.isfinite().all() and one.cfm.isfinite() and one.alignment.abs().max() > 0.1
    assert one.alignment[2] == 0
    torch.testing.assert_close(one.diversity[2], torch.zeros(()), atol=1e-6, rtol=0)
    no_truth = rewards_of(features, torch.zeros(6), whitening)
    assert no_truth.alignment.tolist() == [0.0] * 4 and no_truth.cfm.isfinite()


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_bfloat16_features_are_upcast_before_anything_is_computed(whitening):
    """A Gram matrix in bfloat16 would lose the small singular values."""
    features, truth = (tensor.bfloat16() for tensor in random_groups("full rank"))
    low, high = rewards_of(features, truth, whitening), rewards_of(features.float(), truth.float(), whitening)
    for part in ("alignment", "diversity", "reward", "cfm"):
        assert getattr(low, part).dtype == torch.float32
        assert torch.equal(getattr(low, part), getattr(high, part))


def test_rewards_carry_no_gradient():
    """The features' network is frozen; a gradient through the reward would be another algorithm."""
    features, truth = (tensor.requires_grad_() for tensor in random_groups("full rank"))
    rewards = rewards_of(features, truth, "feature")
    outputs = [rewards.alignment, rewards.diversity, rewards.reward, rewards.cfm, unbiased_cfm(features, truth)]
    assert not any(output.requires_grad for output in outputs)


def test_refusals():
    features, truth = torch.ones(1, 3), torch.ones(3)
    with pytest.raises(ValueError, match="at least 2"):
        rewards_of(features, truth, None)
    with pytest.raises(ValueError, match="'pca'.*'feature'"):
        rewards_of(features.repeat(2, 1), truth, "pca")
    with pytest.raises(ValueError, match="'mean'.*'eq94'"):
        rewards_of(features.repeat(2, 1), truth, None, baseline="mean")
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.ones(5, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


def test_eq94_by_hand():
    """[1,0,0,0] has the baselines [0,1/3,1/3,1/3]; then the diversity part alone: d = [4,1,1], baseline -(6-2d)/1."""
    baseline = eq94_baseline(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4), 1.0, 1.0)
    torch.testing.assert_close(baseline, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))
    baseline = eq94_baseline(torch.zeros(3), torch.tensor([4.0, 1.0, 1.0]), 1.0, 0.5)
    torch.testing.assert_close(baseline, torch.tensor([0.5 * 2, -0.5 * 4, -0.5 * 4]))


def test_eq94_of_two_rollouts():
    """n = 2: the diversity of the only sibling contains this rollout, so it is no baseline at all.

    And 1/(n-2) is no infinity.
    """
    baseline = eq94_baseline(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5, 0.5]]), 2.0, 10.0)
    torch.testing.assert_close(baseline, torch.tensor([[2.0, 6.0]]))


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_the_baseline_is_the_siblings_reward_without_this_rollout(whitening, kind):
    """Each rollout taken out of its group by hand; without whitening that is eq 94."""
    features, truth = random_groups(kind)
    rewards = rewards_of(features, truth, whitening, 0.7, 1.3)
    if whitening is None:
        formula = eq94_baseline(rewards.alignment, rewards.diversity, 0.7, 1.3)
        torch.testing.assert_close(rewards.baseline, formula, atol=1e-4, rtol=1e-5)
    num = features.shape[-2]
    if num == 2:  # a sibling alone: no diversity, and whitened by itself it points along the truth, or away from it
        cosine = torch.nn.functional.cosine_similarity(features, truth.unsqueeze(-2), dim=-1)
        alone = cosine.sign() if whitening == "feature" else cosine
        torch.testing.assert_close(rewards.baseline, 0.7 * 2 * alone.flip(-1), atol=1e-5, rtol=1e-5)
        return
    for place in itertools.product(range(2), range(3), range(num)):
        others = [k for k in range(num) if k != place[-1]]
        alignment, diversity, _ = naive_group(features[place[:2]][others], truth[place[:2]], whitening)
        wanted = (0.7 * alignment - 1.3 * diversity).mean()
        torch.testing.assert_close(rewards.baseline[place].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_baseline_ignores_its_own_rollout(whitening):
    """Change rollout j and its own baseline stays, although every sibling's reward moves."""
    generator = torch.Generator().manual_seed(2)
    features, truth = torch.randn(4, 6, generator=generator), torch.randn(6, generator=generator)
    before = rewards_of(features, truth, whitening, 1.3, 0.7).baseline
    for j in range(4):
        changed = features.clone()
        changed[j] = torch.randn(6, generator=generator)
        after = rewards_of(changed, truth, whitening, 1.3, 0.7).baseline
        siblings = torch.arange(4) != j
        torch.testing.assert_close(after[j], before[j], atol=1e-5, rtol=0)
        assert (after - before)[siblings].abs().min() > 1e-3


TEXTS, PROBABILITIES = 3, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def expected_gradient(signal: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """E[sum_j signal_j grad log pi_j] over all outcomes (M, N) of N rollouts; gradient with respect to the logits."""
    scores = torch.eye(TEXTS, dtype=torch.float64)[outcomes] - PROBABILITIES
    return torch.einsum("o,on,onk->k", PROBABILITIES[outcomes].prod(-1), signal.double(), scores)


@pytest.mark.parametrize("num_samples", [2, 3, 4])
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_the_gradient_is_unbiased(whitening, num_samples):
    """All 3^n outcomes of n rollouts over 3 texts: the baseline moves nothing, with any whitening.

    The plain mean of the siblings does, and so does eq 94 when features are whitened.
    """
    generator = torch.Generator().manual_seed(3)
    texts, truth = torch.randn(TEXTS, 4, generator=generator), torch.randn(4, generator=generator)
    outcomes = torch.tensor(list(itertools.product(range(TEXTS), repeat=num_samples)))
    rewards = rewards_of(texts[outcomes], truth, whitening)
    wanted = expected_gradient(rewards.reward, outcomes)
    ours = expected_gradient(rewards.reward - rewards.baseline, outcomes)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    plain = expected_gradient(rewards.reward - leave_one_out(rewards.reward), outcomes)
    assert (plain - wanted).norm() > 0.05 * wanted.norm()
    eq94 = expected_gradient(advantages_of(texts[outcomes], truth, whitening, baseline="eq94"), outcomes)
    assert ((eq94 - wanted).norm() > 0.02 * wanted.norm()) == (whitening is not None)


@pytest.mark.parametrize("whitening", ["feature", "sample"])
def test_the_gradient_varies_less_than_with_eq94(whitening):
    """The second moment of sum_j A_j grad log pi_j over all outcomes of 4 rollouts, for 10 random sets of 6 texts."""
    generator = torch.Generator().manual_seed(9)
    outcomes = torch.tensor(list(itertools.product(range(6), repeat=4)))
    scores = torch.eye(6)[outcomes] - 1 / 6
    moments = {"leave_out": 0.0, "eq94": 0.0}
    for _ in range(10):
        # the features of one place's rollouts, and the truth's, have a direction in common
        *texts, truth = torch.randn(7, 16, generator=generator) + torch.randn(16, generator=generator)
        texts = torch.stack(texts)
        for baseline in moments:
            advantages = advantages_of(texts[outcomes], truth, whitening, baseline=baseline)
            moments[baseline] += torch.einsum("on,onk->ok", advantages, scores).square().sum(-1).mean().item()
    assert moments["leave_out"] < 0.9 * moments["eq94"]


@pytest.mark.parametrize("num_samples", [2, 4])
def test_without_whitening_the_gradient_is_that_of_cfm(num_samples):
    """Of features of length 1 (features.normalised), the expected gradient points down || E phi - phi(y) ||^2."""
    generator = torch.Generator().manual_seed(6)
    states = [torch.randn(TEXTS + 1, 5, generator=generator) for _ in range(3)]
    texts, truth = normalised(states, "layer").split([TEXTS, 1])
    outcomes = torch.tensor(list(itertools.product(range(TEXTS), repeat=num_samples)))
    ours = expected_gradient(advantages_of(texts[outcomes], truth[0], None), outcomes)
    logits = PROBABILITIES.log().requires_grad_()
    (logits.softmax(0) @ texts.double() - truth[0].double()).square().sum().backward()
    torch.testing.assert_close(ours / num_samples, -logits.grad, atol=1e-5, rtol=1e-4)


def test_own_rewards():
    """A reward of one's own is added with its plain leave-one-out baseline; the feature rewards stay."""
    features, truth = random_groups("full rank")
    rewards, own = rewards_of(features, truth, "feature"), torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, 3, 4)
    total = rewards.plus(own)
    assert torch.equal(total.alignment, rewards.alignment) and torch.equal(total.cfm, rewards.cfm)
    torch.testing.assert_close(total.reward, rewards.reward + own)
    gained = (total.reward - total.baseline) - (rewards.reward - rewards.baseline)
    torch.testing.assert_close(gained, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3]).expand(2, 3, 4))


@pytest.mark.parametrize("num_samples", [3, 4, 16])
def test_equal_rewards_are_not_normalised(num_samples):
    """A division by the standard deviation would blow rounding noise up to 1."""
    reward = torch.full((2, num_samples), 1.4)
    assert group_normalised(reward - leave_one_out(reward) + 1e-7, reward).abs().max() == 0


def test_group_norm_by_hand():
    """[2,2,2,10]: standard deviation of the sample 4; the advantages are given."""
    reward = torch.tensor([[2.0, 2.0, 2.0, 10.0]])
    advantages = group_normalised(reward - leave_one_out(reward), reward, eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-8 / 3, -8 / 3, -8 / 3, 8.0]]) / 4)
    rounding = torch.tensor([[50.0, 50.000004, 50.0, 50.0], [0.0, 0.0, 1e-7, 0.0]])
    # without the guard 1.7 and 0.001: noise, trained on
    assert group_normalised(rounding - leave_one_out(rounding), rounding).tolist() == [[0.0] * 4] * 2
    near = torch.tensor([[0.5, 0.501, 0.502]])
    assert group_normalised(near - leave_one_out(near), near).abs().max() > 0.8


# ----------------------------------------------------------------------------------------------------------------------
# Fixed points: what every number must be where it can be written down


@pytest.mark.parametrize("num_samples", [2, 4, 8])
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_rollouts_equal_to_the_truth(whitening, num_samples):
    """CFM 0, cosine 1. n equal rollouts: inner products of 1, whitened of 1/n."""
    truth = torch.nn.functional.normalize(torch.randn(3, 12, generator=torch.Generator().manual_seed(7)), dim=-1)
    features = truth.unsqueeze(-2).expand(-1, num_samples, -1)
    rewards = rewards_of(features, truth, whitening)
    alignment, diversity = torch.full((3, num_samples), 2.0), 2.0 if whitening is None else 2 / num_samples
    torch.testing.assert_close(rewards.alignment, alignment)
    torch.testing.assert_close(rewards.diversity, torch.full_like(alignment, diversity))
    torch.testing.assert_close(rewards.reward, alignment - diversity)
    of_others = 0.0 if num_samples == 2 else 2.0 if whitening is None else 2 / (num_samples - 1)
    torch.testing.assert_close(rewards.baseline, alignment - of_others)
    for cfm in (rewards.cfm, unbiased_cfm(features, truth)):
        torch.testing.assert_close(cfm, torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_samples", [2, 4, 8])
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_orthogonal_rollouts(whitening, num_samples):
    """Unit vectors at right angles, the truth their mean direction: nothing to whiten, no diversity penalty."""
    features = torch.eye(num_samples, 12)
    truth = torch.nn.functional.normalize(features.sum(0), dim=0)
    rewards = rewards_of(features, truth, whitening)
    torch.testing.assert_close(rewards.alignment, torch.full((num_samples,), 2 / num_samples**0.5))
    torch.testing.assert_close(rewards.diversity, torch.zeros(num_samples), atol=1e-7, rtol=0)
    mean = 1 / num_samples**0.5  # length of the rollouts' mean, which points along the truth
    torch.testing.assert_close(rewards.cfm, torch.tensor((1 - mean) ** 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(unbiased_cfm(features, truth), torch.tensor(1 - 2 * mean), atol=1e-6, rtol=0)


@pytest.mark.parametrize("whitening", ["feature", "sample"])
def test_a_rollout_without_features_gets_no_cosine(whitening):
    """Guards against rounding that is scaled up to a random direction (it was, in 64 of 400 groups)."""
    generator = torch.Generator().manual_seed(8)
    features, truth = torch.randn(400, 4, 48, generator=generator), torch.randn(400, 48, generator=generator)
    features[:, 1] = 0
    rewards = rewards_of(features, truth, whitening)
    assert rewards.alignment[:, 1].abs().max() == 0 and rewards.alignment[:, 0].abs().min() > 0
    rest = rewards_of(features[:, [0, 2, 3]], truth, whitening)
    torch.testing.assert_close(rewards.alignment[:, [0, 2, 3]], rest.alignment, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The unbiased CFM


@pytest.mark.parametrize("num_samples", [2, 5])
def test_unbiased_cfm_equals_the_double_loop(num_samples):
    generator = torch.Generator().manual_seed(4)
    features, truth = torch.randn(3, num_samples, 6, generator=generator), torch.randn(3, 6, generator=generator)
    for group in range(3):
        rows, y = features[group].double(), truth[group].double()
        pairs = [rows[j] @ rows[k] for j in range(num_samples) for k in range(num_samples) if j != k]
        naive = sum(pairs) / (num_samples * (num_samples - 1)) - 2 * rows.mean(0) @ y + y @ y
        torch.testing.assert_close(unbiased_cfm(features, truth)[group].double(), naive, atol=1e-5, rtol=0)


def test_unbiased_cfm_does_not_depend_on_the_number_of_samples():
    """Exact expectations over all outcomes of n draws from 3 texts.

    The unbiased CFM hits the truth, the plain one is too large by Var/n.
    """
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]])
    probabilities, truth = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.1])
    mean = probabilities @ texts
    exact = (mean - truth).square().sum()
    variance = probabilities @ (texts - mean).square().sum(-1)
    for num_samples in (2, 3, 4):
        outcomes = torch.tensor(list(itertools.product(range(3), repeat=num_samples)))
        weights, features = probabilities[outcomes].prod(-1), texts[outcomes]
        truths = truth.expand(len(outcomes), -1)
        torch.testing.assert_close(weights @ unbiased_cfm(features, truths), exact, atol=1e-5, rtol=0)
        plain = weights @ rewards_of(features, truths, None).cfm
        torch.testing.assert_close(plain, exact + variance / num_samples, atol=1e-5, rtol=0)
    assert variance > 0.5


def test_unbiased_cfm_over_random_samples():
    """The same with 20,000 random groups of 2: within 4 standard errors of the truth.

    The plain estimate is far outside.
    """
    generator = torch.Generator().manual_seed(6)
    mean, truth = torch.tensor([0.3, -0.2, 0.5]), torch.tensor([0.1, 0.2, 0.3])
    features = mean + torch.randn(20_000, 2, 3, generator=generator)
    truths, exact = truth.expand(20_000, 3), (mean - truth).square().sum()
    values = unbiased_cfm(features, truths)
    standard_error = values.std() / 20_000**0.5
    assert (values.mean() - exact).abs() < 4 * standard_error
    assert rewards_of(features, truths, None).cfm.mean() - exact > 20 * standard_error


# ----------------------------------------------------------------------------------------------------------------------
# Equal rollouts


def test_first_equal_rollout():
    """Equal means all tokens equal, in the same order, in the same group."""
    rollouts = torch.tensor([[[1, 2], [2, 1], [1, 2], [2, 1], [1, 3]], [[2, 1], [7, 7], [7, 7], [7, 7], [1, 2]]])
    assert first_equal_rollout(rollouts).tolist() == [[0, 1, 0, 1, 4], [0, 1, 1, 1, 4]]


def test_equal_rollouts_share_one_row_of_features():
    """Rounding noise between two equal rollouts is, whitened, a whole new direction.

    The penalty between them would vanish.
    """
    generator = torch.Generator().manual_seed(7)
    rollouts = torch.tensor([[[5, 6], [5, 6], [7, 8]]])
    exact = torch.nn.functional.normalize(torch.randn(1, 3, 16, generator=generator), dim=-1)
    exact[:, 1] = exact[:, 0]
    truth = torch.randn(1, 16, generator=generator)
    noisy = exact + 1e-3 * torch.randn(1, 3, 16, generator=generator)
    shared = share_equal_rollouts(noisy, rollouts)
    assert torch.equal(shared[:, 1], noisy[:, 0]) and torch.equal(shared[:, [0, 2]], noisy[:, [0, 2]])
    of_shared, of_noisy = rewards_of(shared, truth, "feature"), rewards_of(noisy, truth, "feature")
    torch.testing.assert_close(of_shared.diversity, torch.tensor([[0.5, 0.5, 0.0]]), atol=1e-5, rtol=0)
    assert of_noisy.diversity.abs().max() < 1e-4
    assert (of_shared.reward - of_noisy.reward).abs().max() > 0.3


def test_different_rollouts_keep_their_features():
    """Leading axes (rows, anchors) are groups of their own: equal rollouts of different groups are not merged."""
    features = torch.arange(2 * 2 * 2 * 3.0).view(2, 2, 2, 3)
    rollouts = torch.tensor([[[[1], [2]], [[1], [2]]], [[[2], [1]], [[3], [3]]]])
    shared = share_equal_rollouts(features, rollouts)
    expected = features.clone()
    expected[1, 1, 1] = features[1, 1, 0]
    assert torch.equal(shared, expected)
