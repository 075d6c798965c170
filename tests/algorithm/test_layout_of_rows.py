"""The layout of rows: the packed layout's numbers on a model that bears both, and recurrent models one by one."""

import pytest
import torch

from ebft_utils.algorithm.decoding import generate_rollouts
from ebft_utils.algorithm.features import EMBED_METHODS, FeatureNetwork, completion_features
from ebft_utils.algorithm.rows import completion_rows, generate_rows, rows_logprobs
from ebft_utils.algorithm.strided import strided_logprobs
from families import build
from helpers import tiny_model
from strided_cases import random_tokens

PROMPTS = torch.tensor([[6], [11], [6]])
SEGMENTS = torch.tensor([[0] * 14 + [-1] * 6, [0] * 20, [0] * 9 + [-1] * 11])
VALID = torch.ones_like(PROMPTS, dtype=torch.bool)
DOCUMENTS, ROLLOUTS = random_tokens(3, 20), random_tokens(3, 1, 2, 5, seed=2)
UNIFORMS = torch.rand(3, 1, 2, 5, generator=torch.Generator().manual_seed(4))


def packed_model():
    model = tiny_model()
    model.set_attn_implementation("strided_blocks")
    return model


def test_rows_are_prompt_and_completion():
    tokens, is_token = completion_rows(
        torch.tensor([[1, 2, 3, 90, 91], [4, 92, 93, 94, 95]]),
        torch.tensor([3, 1]),
        torch.tensor([[[10, 11]], [[20, 21]]]),
        torch.tensor([[2], [1]]),
    )
    assert tokens[0, 0].tolist() == [1, 2, 3, 10, 11] and is_token[0, 0].tolist() == [True] * 5
    assert tokens[1, 0, :2].tolist() == [4, 20] and is_token[1, 0].tolist() == [True] * 2 + [False] * 3


@pytest.mark.parametrize("num_generated", [1, 5])
def test_log_probs_and_gradients_of_the_packed_layout(num_generated):
    rollouts, results = ROLLOUTS[..., :num_generated], []
    weights = torch.randn(rollouts.shape, generator=torch.Generator().manual_seed(5))
    for function, model in ((strided_logprobs, packed_model()), (rows_logprobs, tiny_model())):
        logps, document = function(model, DOCUMENTS, SEGMENTS, rollouts, PROMPTS, VALID, 0.7, True)
        total = (logps * weights).sum() + document[SEGMENTS[:, 1:] == 0].sum()
        results.append((logps, document[SEGMENTS[:, 1:] == 0], torch.autograd.grad(total, list(model.parameters()))))
    (packed, of_documents, gradients), (rows, of_documents_too, gradients_too) = results
    torch.testing.assert_close(rows, packed, atol=1e-5, rtol=0)
    torch.testing.assert_close(of_documents_too, of_documents, atol=1e-5, rtol=0)
    for found, expected in zip(gradients_too, gradients, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_completions_after_a_document_that_ends_with_the_prompt():
    """As a server is probed: there is no truth behind the prompt."""
    prompt, anchors, valid = DOCUMENTS[:1, :9], torch.tensor([[9]]), torch.ones(1, 1, dtype=torch.bool)
    given = prompt, torch.zeros_like(prompt), ROLLOUTS[:1], anchors, valid, 0.7, False
    with torch.no_grad():
        for found, expected in zip(
            rows_logprobs(tiny_model(), *given), strided_logprobs(packed_model(), *given), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_needs_no_gradient_has_none():
    model = tiny_model()
    logps, document = rows_logprobs(model, DOCUMENTS, SEGMENTS, ROLLOUTS, PROMPTS, VALID, 1.0, False)
    assert logps.requires_grad and not document.requires_grad
    assert rows_logprobs(model, DOCUMENTS, SEGMENTS, ROLLOUTS, PROMPTS, VALID, 1.0, None)[1] is None
    nothing, document = rows_logprobs(model, DOCUMENTS, SEGMENTS, None, PROMPTS, VALID, 1.0, True)
    assert nothing is None and document.requires_grad


@pytest.mark.parametrize("feature_norm", ["layer", "joint"])
@pytest.mark.parametrize("embed_method", EMBED_METHODS)
def test_features_of_the_packed_layout(embed_method, feature_norm):
    """Completions of different lengths, a truth that is longer than all of them, and one that is shorter."""
    lengths = torch.tensor([[5, 1], [2, 3], [1, 4]])
    truths = (SEGMENTS == 0).sum(1) - PROMPTS[:, 0]
    given = DOCUMENTS, PROMPTS[:, 0], truths, ROLLOUTS[:, 0], lengths, embed_method, feature_norm
    packed = completion_features(FeatureNetwork(packed_model().model, [1, 2, 3]), *given)
    for whole in (False, True):
        network = FeatureNetwork(tiny_model().model, [1, 2, 3], layout="rows", whole=whole)
        for found, expected in zip(completion_features(network, *given), packed, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (packed[0][0, 0] - packed[0][0, 1]).abs().max() > 0.01


@pytest.mark.parametrize("stops", [None, list(range(2, 40))])
def test_completions_of_the_packed_layout(stops):
    """The same tokens from the same numbers, up to the end of each; the mode of the model is restored."""
    stop_ids = None if stops is None else torch.tensor(stops)
    given = DOCUMENTS, SEGMENTS, PROMPTS, VALID, 0.8, UNIFORMS, stop_ids
    model = tiny_model().train()
    packed, rows = generate_rollouts(packed_model(), *given), generate_rows(model, *given)
    for found, expected in zip(rows.flatten(0, 2).tolist(), packed.flatten(0, 2).tolist(), strict=True):
        ends = [place for place, token in enumerate(expected) if stops and token in stops]
        end = 1 + ends[0] if ends else len(expected)
        assert found[:end] == expected[:end]
    assert all(module.training for module in model.modules())
    assert rows.unique().numel() > 5


def test_settings_of_the_model_change_no_sample():
    """A penalty in its generation config would make another distribution than the one that is scored."""
    model = tiny_model()
    plain = generate_rows(model, DOCUMENTS, SEGMENTS, PROMPTS, VALID, 0.8, UNIFORMS)
    model.generation_config.update(repetition_penalty=5.0, top_k=1, min_new_tokens=4, suppress_tokens=[3, 4, 5])
    kept = model.generation_config
    assert torch.equal(generate_rows(model, DOCUMENTS, SEGMENTS, PROMPTS, VALID, 0.8, UNIFORMS), plain)
    assert model.generation_config is kept


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next", "granitemoehybrid", "lfm2", "jamba", "nemotron_h"])
def test_recurrent_models_one_by_one(family):
    """Each completion alone, without padding, by the model's own forward; and drawn from that distribution."""
    model = build(family)
    rollouts = generate_rows(model, DOCUMENTS, SEGMENTS, PROMPTS, VALID, 1.0, UNIFORMS)
    with torch.no_grad():
        logps, document = rows_logprobs(model, DOCUMENTS, SEGMENTS, rollouts, PROMPTS, VALID, 1.0, False)
        for row in range(3):
            prompt, length = DOCUMENTS[row, : PROMPTS[row, 0]], int((SEGMENTS[row] == 0).sum())
            for sample in range(2):
                ids = torch.cat([prompt, rollouts[row, 0, sample]])[None]
                expected = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                scored = expected.gather(-1, rollouts[row, 0, sample, :, None])[:, 0]
                torch.testing.assert_close(logps[row, 0, sample], scored, atol=1e-4, rtol=0)
                cumulative = expected.double().exp().cumsum(-1)
                drawn = torch.searchsorted(cumulative, UNIFORMS[row, 0, sample, :, None].double())[:, 0]
                assert drawn.tolist() == rollouts[row, 0, sample].tolist()
            expected = model(DOCUMENTS[row : row + 1, :length]).logits[0, :-1].log_softmax(-1)
            scored = expected.gather(-1, DOCUMENTS[row, 1:length, None])[:, 0]
            torch.testing.assert_close(document[row, : length - 1], scored, atol=1e-4, rtol=0)


def test_padding_changes_nothing():
    """Other tokens behind a document's end, or behind a completion's."""
    model = build("qwen3_5_text")
    with torch.no_grad():
        logps, document = rows_logprobs(model, DOCUMENTS, SEGMENTS, ROLLOUTS, PROMPTS, VALID, 1.0, False)
        others = torch.where(SEGMENTS == 0, DOCUMENTS, 7)
        cut = ROLLOUTS.clone()
        cut[..., 3:] = 9
        again, again_document = rows_logprobs(model, others, SEGMENTS, cut, PROMPTS, VALID, 1.0, False)
    assert torch.equal(again[..., :3], logps[..., :3])
    real = SEGMENTS[:, 1:] == 0
    assert torch.equal(again_document[real], document[real]) and not torch.equal(again, logps)
