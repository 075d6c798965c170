"""The quickstart's own parts: SmolLM2-135M out of its package's GGUF file, and the standard library as text."""

import pytest
import torch

from ebft_utils.algorithm.decoding import generate_rollouts
from ebft_utils.algorithm.features import strided_features
from ebft_utils.algorithm.strided import rollout_logprobs
from ebft_utils.config.modes import load_config
from ebft_utils.data.batches import make_batch, rollout_uniforms
from ebft_utils.data.rows import load_rows
from ebft_utils.models import base_causal_lm, load_feature_network, load_policy, load_tokenizer
from helpers import ROOT


@pytest.fixture(scope="module")
def quickstart():
    """Configuration, tokenizer, policy and one batch of the quickstart."""
    overrides = ["data.split=train[:40]", "data.sequence_length=64", "eval.num_documents=0"]
    overrides.append("ebft.embed_method=last_token")  # whose features have length 1
    config = load_config(str(ROOT / "examples" / "raw_text.yaml"), overrides)
    tokenizer = load_tokenizer(config.model)
    rows, _ = load_rows(config, tokenizer)
    places = dict(context_length=8, min_completion_prefix=0, stride=8, num_generated=8)
    batch = make_batch(rows, [0, 1], [0, 1], tokenizer.pad_token_id, **places)
    return config, tokenizer, load_policy(config), batch


def test_rollouts_are_scored_as_the_model_itself_scores_them(quickstart):
    """Guards against log-probs from the wrong position: on this model their mean was -12.1 then, and is about -1."""
    config, _, policy, batch = quickstart
    uniforms = rollout_uniforms(0, batch.keys, batch.anchors.shape[1], 2, 8)
    places = batch.document_ids, batch.segment_ids, batch.anchors, batch.valid
    rollouts = generate_rollouts(base_causal_lm(policy), *places, 0.6, uniforms)
    with torch.no_grad():
        packed = rollout_logprobs(base_causal_lm(policy), batch.document_ids, rollouts, batch.anchors, 0.6)
        assert batch.valid.all() and -2 < packed.mean() < -0.3
        for row, index in ((0, 0), (1, 3), (0, batch.anchors.shape[1] - 1)):
            anchor = int(batch.anchors[row, index])
            ids = torch.cat([batch.document_ids[row, :anchor], rollouts[row, index, 1]])[None]
            logits = policy(ids, attention_mask=torch.ones_like(ids)).logits[0, anchor - 1 : -1] / 0.6
            alone = logits.log_softmax(-1).gather(-1, rollouts[row, index, 1][:, None])[:, 0]
            torch.testing.assert_close(packed[row, index, 1], alone, atol=1e-3, rtol=0)


def test_features_ignore_the_adapter(quickstart):
    """The frozen network is the base model, whatever the adapter has learnt."""
    config, _, policy, batch = quickstart
    network = load_feature_network(policy, config, torch.device("cpu"))
    rollouts = batch.document_ids[:, :8].view(2, 1, 1, 8).expand(-1, batch.anchors.shape[1], 2, -1)
    inputs = (batch.document_ids, batch.segment_ids, rollouts, batch.anchors, batch.valid, config.ebft.embed_method)
    before, truth = strided_features(network, *inputs)
    assert before.shape == (2, batch.anchors.shape[1], 2, 3 * 576)
    torch.testing.assert_close(truth.norm(dim=-1), torch.ones(truth.shape[:2]))  # three layers, each of length 1/√3
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    assert torch.equal(strided_features(network, *inputs)[0], before)
