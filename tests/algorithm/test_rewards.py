"""Rewards and advantages against the released code's numbers, the paper's equations written out, and by hand."""

import itertools

import numpy as np
import pytest
import torch

from ebft_utils.algorithm.rewards import (
    feature_matching_rewards,
    first_equal_rollout,
    group_norm_advantages,
    rloo_advantages,
    share_equal_rollouts,
    unbiased_cfm,
)
from helpers import GOLDEN

WHITENING_NAMES = {"none": None, "feature": "feature", "sample": "sample"}
WHITENINGS = list(WHITENING_NAMES.values())


def rewards_of(features, truth, whitening, alignment_coef=1.0, diversity_coef=1.0):
    return feature_matching_rewards(
        features, truth, whitening=whitening, alignment_coef=alignment_coef, diversity_coef=diversity_coef
    )


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
        rows, target = [operator @ row for row in features], operator @ truth
        targets = [target] * num
    elif whitening == "sample":
        # pinv(F F^T)^(1/2), an N x N matrix that mixes the rollouts; N copies of the truth go through it too
        operator = left @ torch.diag(inverse) @ left.T
        rows, target = list(operator @ features), truth
        targets = list(operator @ truth.expand(num, -1))
    else:
        rows, target, targets = list(features), truth, [truth] * num
    alignment, diversity = [], []
    for j in range(num):
        norms = rows[j].norm() * targets[j].norm()
        alignment.append(2 * (rows[j] @ targets[j] / norms if norms > 1e-12 else torch.zeros(()).double()))
        diversity.append(2 / (num - 1) * sum(rows[j] @ rows[k] for k in range(num) if k != j))
    cfm = (sum(rows) / num - target).square().sum()
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
    advantages = rloo_advantages(rewards.alignment, rewards.diversity, 1.0, diversity_coef)
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
    advantages = rloo_advantages(rewards.alignment, rewards.diversity, 1.0, 1.0)
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
    torch.testing.assert_close(everything.cfm, torch.zeros(()) if whitening == "feature" else truth.square().sum())
    features = torch.randn(4, 6, generator=generator)
    features[2] = 0
    one = rewards_of(features, truth, whitening)
    assert one.reward.isfinite().all() and one.cfm.isfinite() and one.alignment.abs().max() > 0.1
    torch.testing.assert_close(torch.stack([one.alignment[2], one.diversity[2]]), torch.zeros(2), atol=1e-6, rtol=0)
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
    with pytest.raises(ValueError, match="at least 2"):
        rloo_advantages(torch.ones(5, 1), torch.ones(5, 1), 1.0, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


def test_rloo_by_hand():
    """[1,0,0,0] gives [1,-1/3,-1/3,-1/3]; then the diversity part alone: d = [4,1,1], baseline -(6-2d)/1."""
    advantages = rloo_advantages(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4), 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3]))
    advantages = rloo_advantages(torch.zeros(3), torch.tensor([4.0, 1.0, 1.0]), 1.0, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([-0.5 * (4 - (-2)), -0.5 * (1 - 4), -0.5 * (1 - 4)]))


def test_rloo_of_two_rollouts():
    """n = 2: the diversity of the only sibling contains this rollout, so it is no baseline at all.

    And 1/(n-2) is no infinity.
    """
    advantages = rloo_advantages(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5, 0.5]]), 2.0, 10.0)
    torch.testing.assert_close(advantages, torch.tensor([[2 * 3 - 10 * 0.5 - 2 * 1, 2 * 1 - 10 * 0.5 - 2 * 3]]))


@pytest.mark.parametrize("num_samples", [3, 4, 16])
def test_equal_rewards_have_no_advantage(num_samples):
    """A dead group must not train; a division by its standard deviation would blow rounding noise up to 1."""
    alignment, diversity = torch.full((2, num_samples), 1.7), torch.full((2, num_samples), 0.3)
    assert rloo_advantages(alignment, diversity, 1.0, 1.0).abs().max() < 1e-6
    assert group_norm_advantages(alignment - diversity).abs().max() == 0


def test_baseline_ignores_its_own_rollout():
    """Eq 94's point: change rollout j and its own baseline stays, although every sibling's reward moves."""
    generator = torch.Generator().manual_seed(2)
    features, truth = torch.randn(4, 6, generator=generator), torch.randn(6, generator=generator)

    def baseline(features):
        rewards = rewards_of(features, truth, None, 1.3, 0.7)
        return rewards.reward - rloo_advantages(rewards.alignment, rewards.diversity, 1.3, 0.7)

    before = baseline(features)
    for j in range(4):
        changed = features.clone()
        changed[j] = torch.randn(6, generator=generator)
        after = baseline(changed)
        siblings = torch.arange(4) != j
        torch.testing.assert_close(after[j], before[j], atol=1e-5, rtol=0)
        assert (after - before)[siblings].abs().min() > 1e-3


def test_rloo_gradient_is_unbiased():
    """All 3^3 outcomes of 3 rollouts over 3 possible texts.

    E[sum_j A_j grad log pi_j] = E[sum_j r_j grad log pi_j]; the plain mean is biased.
    """
    generator = torch.Generator().manual_seed(3)
    texts, truth = torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    outcomes = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, N)
    rewards = rewards_of(texts[outcomes], truth, None)
    weights = probabilities[outcomes].prod(-1)
    scores = torch.eye(3)[outcomes] - probabilities  # grad of log softmax with respect to the logits

    def expected_gradient(signal):
        return torch.einsum("o,on,onk->k", weights, signal, scores)

    wanted = expected_gradient(rewards.reward)
    advantages = rloo_advantages(rewards.alignment, rewards.diversity, 1.0, 1.0)
    torch.testing.assert_close(expected_gradient(advantages), wanted, atol=1e-5, rtol=0)
    plain = rewards.reward - (rewards.reward.sum(-1, keepdim=True) - rewards.reward) / 2
    assert (expected_gradient(plain) - wanted).abs().max() > 0.05


def test_group_norm_by_hand():
    """[1,3]: mean 2, standard deviation (of the population) 1."""
    advantages = group_norm_advantages(torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 1.0]]) / (1 + 1e-4))
    advantages = group_norm_advantages(torch.tensor([[2.0, 2.0, 2.0, 10.0]]), eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-2.0, -2.0, -2.0, 6.0]]) / 12**0.5)
    assert group_norm_advantages(torch.zeros(2, 4)).tolist() == [[0.0] * 4] * 2
    rounding = torch.tensor([[50.0, 50.000004, 50.0, 50.0], [0.0, 0.0, 1e-7, 0.0]])
    # without the guard 1.7 and 0.001: noise, trained on
    assert group_norm_advantages(rounding).tolist() == [[0.0] * 4] * 2
    assert group_norm_advantages(torch.tensor([[0.5, 0.501]])).abs().min() > 0.8


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
