"""What need not be run, and what is run in parts: neither may change a number, only the tokens of a forward."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaModel

import train_strided
from ebft_utils import layouts, models
from ebft_utils.algorithm.losses import policy_gradient_loss
from ebft_utils.algorithm.strided import in_parts, number_of_parts, rollouts_to_train, strided_logprobs
from helpers import (
    assert_close_runs,
    assert_equal_weights,
    assert_holds,
    assert_trained,
    evaluations,
    tiny_model,
    training,
)

T, F, NAN = True, False, float("nan")


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts that need no training


def test_rollouts_to_train_by_hand():
    """Row 0 has two groups, row 1 one group and an invalid anchor.

    Row 0, anchor 3: [7 8] is there three times; 0.5 - 0.25 + 0.125 = 0.375 goes to the first. [7 9] is alone. Anchor 6:
    the same tokens [7 8] are another rollout there; [5 5] is there twice, 0.75 - 0.75, and is left out.
    Row 1, anchor 2: 1e-7 is left out, 1e-5 is not (but is where that is rounding). The invalid anchor counts nothing.
    """
    first = [[[7, 8], [7, 9], [7, 8], [7, 8]], [[5, 5], [7, 8], [5, 5], [8, 7]]]
    second = [[[1, 2], [3, 4], [5, 6], [5, 6]], [[9, 9], [9, 8], [9, 7], [9, 6]]]
    rollouts = torch.tensor([first, second])
    first = [[0.5, -2.0, -0.25, 0.125], [0.75, 1.5, -0.75, -3.0]]
    second = [[1e-7, 1e-5, 0.5, 0.25], [4.0, 4.0, 4.0, 4.0]]
    advantages = torch.tensor([first, second])
    inputs = rollouts, advantages, torch.tensor([[3, 6], [2, 9]]), torch.tensor([[T, T], [T, F]])
    tokens, anchors, valid, summed = rollouts_to_train(*inputs)
    assert tokens.shape == (2, 4, 1, 2) and tokens[0, :, 0].tolist() == [[7, 8], [7, 9], [7, 8], [8, 7]]
    assert tokens[1, :2, 0].tolist() == [[3, 4], [5, 6]]
    assert anchors.tolist() == [[3, 3, 6, 6], [2, 2, 1, 1]]
    assert valid.tolist() == [[T, T, T, T], [T, T, F, F]]
    assert summed.shape == (2, 4, 1)
    expected = torch.tensor([[0.375, -2.0, 1.5, -3.0], [1e-5, 0.75, 0.0, 0.0]])
    torch.testing.assert_close(summed[..., 0], expected, atol=0, rtol=1e-6)
    assert rollouts_to_train(*inputs, scale=5.0)[2].tolist() == [[T, T, T, T], [T, F, F, F]]


def test_nothing_to_train():
    """A batch that needs no training still has a forward (others wait for it): one slot that does not count."""
    rollouts, zero = torch.tensor([[[[7, 8], [7, 8]]]]), torch.tensor([[[0.5, -0.5]]])
    for advantages, anchor_valid in ((zero, T), (torch.ones(1, 1, 2), F)):
        place = torch.tensor([[5]]), torch.tensor([[anchor_valid]])
        tokens, anchors, valid, summed = rollouts_to_train(rollouts, advantages, *place)
        assert tokens.shape == (1, 1, 1, 2)
        assert (anchors.tolist(), valid.tolist(), summed.tolist()) == ([[1]], [[F]], [[[0.0]]])


def test_a_nan_is_not_saved():
    """It must reach the loss, where the run stops; also when it is that of a duplicate."""
    rollouts = torch.tensor([[[[7, 8], [7, 9], [7, 8], [7, 6]]]])
    advantages = torch.tensor([[[0.5, 0.25, NAN, 0.0]]])
    tokens, _, valid, summed = rollouts_to_train(rollouts, advantages, torch.tensor([[5]]), torch.tensor([[T]]))
    assert tokens[0, :, 0].tolist() == [[7, 8], [7, 9]] and valid.tolist() == [[T, T]]
    assert summed.isnan().flatten().tolist() == [T, F] and summed[0, 1, 0] == 0.25


@pytest.mark.parametrize("num_generated", [1, 4])
def test_savings_change_no_gradient(num_generated):
    """The loss and every parameter's gradient, with 8 of 20 rollouts.

    Duplicates, zero advantages, packed documents, padding, invalid anchors.
    """
    generator = torch.Generator().manual_seed(1)
    segments = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [0] * 14 + [-1] * 6])
    anchors, valid = torch.tensor([[3, 6, 12], [3, 11, 1]]), torch.tensor([[T, T, T], [T, T, F]])
    documents = torch.randint(2, 300, segments.shape, generator=generator)
    rollouts = torch.randint(2, 300, (2, 3, 4, num_generated), generator=generator)
    advantages = torch.randn(2, 3, 4, generator=generator)
    rollouts[:, :, 2] = rollouts[:, :, 0]
    rollouts[0, 1, 3] = rollouts[0, 1, 0]
    rollouts[1, 1] = rollouts[1, 1, 0]  # all equal
    advantages[:, 0, 2] = -advantages[:, 0, 0]
    advantages[1, 1] -= advantages[1, 1].mean()
    advantages[0, 0, 1] = 0.0
    found = []
    for saving in (False, True):
        model = tiny_model()
        model.set_attn_implementation("strided_blocks")
        trained = rollouts, anchors, valid, advantages
        if saving:
            tokens, own_anchors, chosen, summed = rollouts_to_train(rollouts, advantages, anchors, valid)
            trained = tokens, own_anchors, chosen, summed
        logps, _ = strided_logprobs(model, documents, segments, *trained[:3], 0.6, None)
        loss = policy_gradient_loss(logps, trained[3], trained[2].unsqueeze(-1), 80.0)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((loss.item(), gradients, int(trained[2].sum()) * trained[0].shape[2]))
    (loss, gradients, number), (saved_loss, saved_gradients, saved_number) = found
    assert saved_loss == pytest.approx(loss, abs=1e-5) and abs(loss) > 1e-2
    assert (number, saved_number) == (20, 8)
    for name, gradient in gradients.items():
        torch.testing.assert_close(saved_gradients[name], gradient, atol=1e-5, rtol=0)
        assert gradient.abs().max() > 1e-4, name


def counted_savings(seen) -> list[float]:
    """The share of rollouts that need no forward, for each step of one micro-batch, counted group by group.

    What counts is far above the rounding.
    """
    shares = []
    for config, batch, groups in seen:
        advantages, needed, total = train_strided.advantages_of(config, groups.rewards), 0, 0
        for row, slot in batch.valid.nonzero().tolist():
            worth = defaultdict(float)
            group = zip(groups.rollouts[row, slot].tolist(), advantages[row, slot].tolist(), strict=True)
            for rollout, advantage in group:
                worth[tuple(rollout)] += advantage
            needed += sum(abs(value) > 1e-5 * max(1.0, config.ebft.alignment_coef) for value in worth.values())
            total += groups.rollouts.shape[2]
        shares.append(1 - needed / total)
    return shares


LARGE_REWARDS = {"ebft__alignment_coef": 1000.0, "ebft__whitening": "none", "ebft__n_samples_per_prompt": 5}
SAVINGS = {
    "some": ({"ebft__generate_max_len": 1, "ebft__temperature": 0.3}, 0.1, 0.9),
    "none": ({"ebft__generate_max_len": 4, "ebft__temperature": 1.5}, 0.0, 0.0),
    "all": ({"ebft__temperature": 1e-4, "ebft__advantage_estimator": "eq94"}, 1.0, 1.0),
    "two of three equal ones": ({"ebft__temperature": 1e-4}, 2 / 3 - 1e-6, 2 / 3 + 1e-6),  # the third has an advantage
    "all, of large rewards": ({"ebft__temperature": 1e-4, **LARGE_REWARDS}, 1.0, 1.0),
}


@pytest.mark.parametrize("changes, low, high", SAVINGS.values(), ids=SAVINGS)
def test_logged_savings_are_those_of_the_rollouts(train, monkeypatch, changes, low, high):
    """Guards against a metric that counts invalid anchors, or something else than what is saved.

    With nothing left to train (all) the run goes on.
    """
    seen, score = [], train_strided.sample_and_score

    def keep(config, accelerator, policy, network, batch, seed):
        seen.append((config, batch, score(config, accelerator, policy, network, batch, seed)))
        return seen[-1][-1]

    monkeypatch.setattr(train_strided, "sample_and_score", keep)
    settings = dict(train__max_steps=2, ebft__ce_coef=0.1, data__long_documents="cut")
    entries = training(train("run", **settings, **changes))
    logged = [entry["ebft/tokens_saved"] for entry in entries]
    assert any(not batch.valid.all() for _, batch, _ in seen)
    assert logged == pytest.approx(counted_savings(seen), abs=1e-6) and len(logged) == 2
    assert all(low <= share <= high for share in logged)


# ----------------------------------------------------------------------------------------------------------------------
# In parts


@pytest.mark.parametrize(
    "slots, tokens_per_slot, document, limit, expected",
    [
        (11, 12, 48, None, 1),
        (11, 12, 48, 180, 1),  # 48 + 11 * 12: just fits
        (11, 12, 48, 179, 2),
        (11, 12, 48, 120, 2),  # 6 at a time
        (11, 12, 48, 119, 3),  # 5 at a time
        (11, 12, 48, 60, 11),
        (12, 12, 48, 120, 2),
        (13, 12, 48, 120, 3),
        (0, 12, 48, 60, 1),
    ],
)
def test_number_of_parts_by_hand(slots, tokens_per_slot, document, limit, expected):
    assert number_of_parts(slots, tokens_per_slot, document, limit) == expected


def test_parts_by_hand():
    """Five slots in two parts: three and two, and one that does not count; in four: two, two, one, and none."""
    anchors, valid = torch.tensor([[3, 5, 7, 9, 11]]), torch.tensor([[T, T, F, T, T]])
    values = torch.arange(10).view(1, 5, 2)
    first, second = in_parts(2, anchors, valid, values)
    assert [tensor.tolist() for tensor in first] == [[[3, 5, 7]], [[T, T, F]], [[[0, 1], [2, 3], [4, 5]]]]
    assert [tensor.tolist() for tensor in second] == [[[9, 11, 1]], [[T, T, F]], [[[6, 7], [8, 9], [0, 0]]]]
    parts = in_parts(4, anchors, valid, values)
    assert [part[0].tolist() for part in parts] == [[[3, 5]], [[7, 9]], [[11, 1]], [[1, 1]]]
    assert [part[1].tolist() for part in parts] == [[[T, T]], [[F, T]], [[T, F]], [[F, F]]]
    (whole,) = in_parts(1, anchors, valid, values)
    assert [torch.equal(one, other) for one, other in zip(whole, (anchors, valid, values), strict=True)] == [True] * 3
    nothing = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.bool)
    for anchors_of_part, valid_of_part in in_parts(3, *nothing):
        assert anchors_of_part.tolist() == [[1], [1]] and valid_of_part.tolist() == [[F], [F]]


@pytest.fixture
def forwards(monkeypatch):
    """Every forward of a decoder but the proof's: (prefill, step or packed; is it trained; rows; tokens of a row)."""
    seen, forward, prove = [], LlamaModel.forward, layouts.prove

    def see(self, input_ids=None, **others):
        cache = others.get("past_key_values")
        kind = "step" if cache is not None and cache.get_seq_length() else "prefill" if cache is not None else "packed"
        seen.append((kind, torch.is_grad_enabled(), *input_ids.shape))
        return forward(self, input_ids=input_ids, **others)

    def prove_unseen(*arguments):
        before = len(seen)
        verdict = prove(*arguments)
        assert len(seen) > before
        del seen[before:]
        return verdict

    monkeypatch.setattr(LlamaModel, "forward", see)
    monkeypatch.setattr(layouts, "prove", prove_unseen)
    return seen


@pytest.fixture
def scored(monkeypatch):
    """Of every policy forward: whether it also scored the document, and whether with a gradient."""
    seen, forward = [], models.strided_logprobs

    def see(*model, **inputs):
        rollout_logps, document_logps = forward(*model, **inputs)
        seen.append((document_logps is not None, document_logps is not None and document_logps.requires_grad))
        return rollout_logps, document_logps

    monkeypatch.setattr(models, "strided_logprobs", see)
    return seen


@pytest.mark.parametrize("ce_coef", [0.0, 0.3])
@pytest.mark.parametrize("mode", [{}, {"lora": {"r": 4, "alpha": 8.0}}], ids=["full", "LoRA"])
def test_parts_change_nothing(train, plain_descent, forwards, scored, model_folder, mode, ce_coef):
    """Guards against rollouts that are drawn with another part's numbers, and a part that is too long.

    A document's loss must count once and not for each part; slots that only fill up must count nothing.
    """
    changes = dict(**mode, ebft__ce_coef=ce_coef, eval__num_documents=3, eval__per_device_batch_size=2, eval__seed=3)
    changes |= dict(train__max_steps=2, train__learning_rate=0.1, train__seed=4)
    changes |= dict(train__batch_size=4, train__per_device_batch_size=2)
    whole = train("whole", **changes)
    number, longest = len(forwards), max(tokens for *_, tokens in forwards)
    documents = [kind for kind in scored if kind[0]]
    assert sum(trained for _, trained, *_ in forwards) == 4 and longest > 150
    assert sum(gradient for _, gradient in documents) == 4 * (ce_coef > 0)
    forwards.clear(), scored.clear()
    # three anchors at a time beside 48 tokens, and nine rollouts in training
    parts = train("parts", "ebft.max_packed_tokens=84", **changes)
    assert max(tokens for *_, tokens in forwards) <= 84
    assert 8 <= sum(trained for _, trained, *_ in forwards) <= 16 and 2 * number <= len(forwards) <= 4 * number
    assert {kind for kind, *_ in forwards} == {"step", "prefill", "packed"}
    assert max(rows for *_, rows, _ in forwards) == 2
    assert [kind for kind in scored if kind[0]] == documents and len(scored) > len(documents)  # once for each batch
    assert_close_runs(whole, parts)
    assert training(whole)[0]["train/grad_norm"] > 0.1 and len(evaluations(whole)) == 2
    if not mode:
        assert_trained(parts, load_file(model_folder / "model.safetensors"))


def test_parts_that_all_processes_agree_on():
    """A process with fewer slots runs as many forwards as the one with most: FSDP2 would wait for ever.

    Without a limit nobody is asked.
    """
    asked = []

    def gather(number):
        asked.append(number.tolist())
        return torch.cat([number, torch.tensor([3])])

    batch = SimpleNamespace(document_ids=torch.zeros(1, 48))
    accelerator = SimpleNamespace(gather=gather, device=torch.device("cpu"))
    for limit, slots, expected in ((None, 11, 1), (120, 11, 3), (120, 25, 5)):
        config = SimpleNamespace(ebft=SimpleNamespace(max_packed_tokens=limit))
        assert train_strided.agreed_parts(config, accelerator, slots, 12, batch) == expected
    assert asked == [[2], [5]]


def test_fine_tuning_alone_has_no_parts(train, forwards):
    """A document is never cut: the limit has room for it, and without rollouts for nothing else."""
    changes = dict(train__max_steps=2, ebft__rl_coef=0.0, ebft__ce_coef=1.0)
    whole = train("whole", **changes)
    expected = forwards.copy()
    forwards.clear()
    parts = train("parts", "ebft.max_packed_tokens=60", **changes)
    assert forwards == expected and training(parts) == training(whole)
    assert_equal_weights(whole, parts)


def test_a_limit_without_room_is_refused(refused, command, write_config):
    """Guards against a division by zero. One anchor's rollouts have to fit beside the longest document: 48 + 3 * 4."""
    message = refused("--cfg", write_config(ebft__max_packed_tokens=59))
    sizes = ("data.sequence_length 48", "ebft.n_samples_per_prompt 3", "ebft.generate_max_len 4")
    assert_holds(message, "ebft.max_packed_tokens", "59", *sizes, "= 60")
    assert command("--cfg", write_config(ebft__max_packed_tokens=60, train__max_steps=1, eval__num_documents=0))[0] == 0


def test_a_resumed_run_may_change_the_limit(train, capsys):
    """Out of memory is when one wants to; the rest of the run is the same."""
    whole = train("whole", train__max_steps=2, train__learning_rate=1e-5)
    train("run", train__max_steps=1, train__learning_rate=1e-5)
    overrides = ("train.resume=latest", "ebft.max_packed_tokens=72")
    again = train("run", *overrides, train__max_steps=2, train__learning_rate=1e-5)
    assert_holds(capsys.readouterr().out, "going on from", "ebft.max_packed_tokens")
    assert_close_runs(whole, again, tolerance=1e-6, share=1e-2)
