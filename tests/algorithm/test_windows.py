"""Sliding windows and chunks of layers: longer documents than the window equal one sequence at a time, in every way."""

import itertools

import pytest
import torch

from ebft_utils.algorithm import strided
from ebft_utils.algorithm.architecture import Reach, decoder_of, reaches
from ebft_utils.algorithm.decoding import generate_rollouts
from ebft_utils.algorithm.features import FeatureNetwork, strided_features
from ebft_utils.algorithm.strided import block_mask, dense_mask, pack_layout, strided_blocks, strided_logprobs
from families import build, family_config
from helpers import tiny_model
from strided_cases import ANCHORS, SEGMENTS, VALID, random_tokens

WINDOW, LENGTH, SAMPLES, TOKENS = 8, 60, 2, 4
FAMILIES = ("gemma3_text", "gemma4_text", "olmo3", "mistral", "ministral3", "phi3", "exaone4", "llama4_text")
IMPLEMENTATIONS = ("strided_blocks", "sdpa", "eager", "strided_flex")
REACHES = [Reach(), Reach(window=3), Reach(chunk=4), Reach(window=5, chunk=6)]


def documents():
    """Two packed documents of 60 tokens and padding; one of 60 and a short one. Anchors far beyond the window."""
    segments = torch.tensor([[0] * LENGTH + [1] * LENGTH + [-1] * 4, [0] * LENGTH + [1] * 9 + [-1] * 55])
    anchors = torch.tensor([[7, 33, 60, 95, 120], [8, 20, 47, 66, 1]])
    valid = torch.tensor([[True] * 5, [True] * 4 + [False]])
    return random_tokens(*segments.shape), segments, anchors, valid


def each(anchors: torch.Tensor, valid: torch.Tensor):
    return [place for place in itertools.product(*map(range, anchors.shape)) if valid[place]]


@torch.no_grad()
def alone(model, tokens, segments, anchor: int, rollout: torch.Tensor):
    """transformers' own forward, with its own masks, of the document before the anchor and a rollout."""
    start = int((segments == segments[anchor - 1]).nonzero()[0])
    ids = torch.cat([tokens[start:anchor], rollout])[None]
    output = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return output.logits[0, -len(rollout) - 1 : -1].log_softmax(-1), [state[0] for state in output.hidden_states]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_equals_one_sequence_at_a_time(monkeypatch, family, implementation):
    """Log-probs, features and cached decoding, against transformers' own forward with attention written out."""
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", 16)
    model = build(family)
    tokens, segments, anchors, valid = documents()
    uniforms = torch.rand(*anchors.shape, SAMPLES, TOKENS, generator=torch.Generator().manual_seed(3))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        rollouts = generate_rollouts(model, tokens, segments, anchors, valid, 1.0, uniforms)
        logps, document_logps = strided_logprobs(model, tokens, segments, rollouts, anchors, valid, 1.0, False)
        network = FeatureNetwork(decoder_of(model), [1, 2, 3])
        features, _ = strided_features(network, tokens, segments, rollouts, anchors, valid, "last_token")
    model.set_attn_implementation("eager")
    places = each(anchors, valid)
    for row, slot in places:
        for sample in range(SAMPLES):
            rollout = rollouts[row, slot, sample]
            expected, states = alone(model, tokens[row], segments[row], int(anchors[row, slot]), rollout)
            scored = expected.gather(-1, rollout[:, None])[:, 0]
            torch.testing.assert_close(logps[row, slot, sample], scored, atol=1e-4, rtol=0)
            cumulative = expected.double().exp().cumsum(-1)  # the drawn token is the one that the number lies in
            drawn = torch.searchsorted(cumulative, uniforms[row, slot, sample, :, None].double())[:, 0]
            assert drawn.tolist() == rollout.tolist()
            last = torch.cat([state[-1] / state[-1].norm() for state in states[1:4]]) / 3**0.5
            torch.testing.assert_close(features[row, slot, sample], last, atol=1e-4, rtol=0)
    expected, _ = alone(model, tokens[0], segments[0], 1, tokens[0, 1:LENGTH])
    expected = expected.gather(-1, tokens[0, 1:LENGTH, None])[:, 0]
    torch.testing.assert_close(document_logps[0, : LENGTH - 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_matters_in_these_tests(family):
    """Guards the test above: without the windows its numbers would be others."""
    model, tokens = build(family), random_tokens(1, LENGTH)
    assert any(reach != Reach() for reach in reaches(model.config).values())
    with torch.no_grad():
        narrow = model(tokens).logits
        for key in ("sliding_window", "attention_chunk_size"):
            if model.config.to_dict().get(key):
                setattr(model.config, key, 4096)
        gap = (model(tokens).logits - narrow).abs().max()
    assert gap > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_one_sequence_at_a_time(checkpointing):
    """Blocks leave out document tokens that are out of reach: their keys still get the gradient of other queries.

    With gradient checkpointing each layer's own mask has to reach its second forward, too.
    """
    tokens, segments, anchors, valid = documents()
    rollouts = random_tokens(*anchors.shape, SAMPLES, TOKENS, seed=2)
    gradients = []
    for implementation in ("strided_blocks", "eager"):
        model = build("gemma3_text")
        model.set_attn_implementation(implementation)
        if implementation == "strided_blocks":
            if checkpointing:
                model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            logps, _ = strided_logprobs(model, tokens, segments, rollouts, anchors, valid, 1.0, None)
            total = logps[valid].sum()
        else:
            total = 0.0
            for row, slot in each(anchors, valid):
                start = int((segments[row] == segments[row, anchors[row, slot] - 1]).nonzero()[0])
                for rollout in rollouts[row, slot]:
                    ids = torch.cat([tokens[row, start : anchors[row, slot]], rollout])[None]
                    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, -TOKENS - 1 : -1]
                    total = total + logits.log_softmax(-1).gather(-1, rollout[:, None]).sum()
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The masks, cell by cell


def obvious(layout, reach: Reach, row: int, query: int, key: int) -> bool:
    if query == key:
        return True
    of_rollout = layout.rollout_ids.tolist()
    position = layout.position_ids[row].tolist()
    if of_rollout[key] >= 0:
        seen = of_rollout[key] == of_rollout[query] and layout.steps[key] <= layout.steps[query]
    else:
        same = layout.segment_ids[row, key] == layout.segment_ids[row, query]
        seen = bool(same) and key < layout.visible[row, query]
    if reach.window is not None and position[query] - position[key] >= reach.window:
        return False
    if reach.chunk is not None and position[query] // reach.chunk != position[key] // reach.chunk:
        return False
    return bool(seen)


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_every_mask_is_the_obvious_one(monkeypatch, reach):
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", 4)
    layout = pack_layout(SEGMENTS, ANCHORS, VALID, 2, 3)
    size = layout.segment_ids.shape[1]
    cells = itertools.product(range(2), range(size), range(size))
    expected = torch.tensor([obvious(layout, reach, *cell) for cell in cells]).view(2, size, size)
    assert torch.equal(dense_mask(layout, reach)[:, 0], expected)
    flexible = block_mask(layout, size, size, reach=reach)
    index = torch.arange(size)
    by_kernel = flexible.mask_mod(torch.arange(2)[:, None, None], None, index[None, :, None], index[None, None])
    assert torch.equal(by_kernel, expected)
    blocks = strided_blocks(layout, document_queries=True, reach=reach)
    document = blocks.num_document
    if blocks.document_mask is not None:
        assert torch.equal(blocks.document_mask[:, 0], expected[:, :document, :document])
    for block in blocks.blocks:
        rows = expected[:, document + block.start : document + block.end]
        own = rows[:, :, document + block.start : document + block.end]
        assert torch.equal(block.mask[:, 0], torch.cat([rows[:, :, block.first : block.prefix], own], dim=2))
        covered = rows.clone()
        covered[:, :, block.first : block.prefix] = False
        covered[:, :, document + block.start : document + block.end] = False
        assert not covered.any()  # nothing that is seen lies outside of the block's keys


def test_tokens_out_of_reach_are_not_even_multiplied(monkeypatch):
    """A window of 16 in a document of 1,000: keys of a block are its window, not the whole prefix."""
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", 32)
    segments = torch.zeros(1, 1000, dtype=torch.long)
    anchors = torch.arange(100, 900, 8)[None]
    layout = pack_layout(segments, anchors, torch.ones_like(anchors, dtype=torch.bool), 1, 8)
    blocks = strided_blocks(layout, document_queries=True, reach=Reach(window=16)).blocks
    assert max(block.prefix - block.first for block in blocks) < 64
    assert min(block.prefix for block in blocks) > 100


def test_reaches_of_configs():
    assert reaches(family_config("llama")) == {None: Reach()}
    assert reaches(family_config("mistral")) == {None: Reach(window=8)}
    assert reaches(family_config("gemma3_text")) == {"sliding_attention": Reach(window=8), "full_attention": Reach()}
    assert reaches(family_config("llama4_text")) == {"chunked_attention": Reach(chunk=8), "full_attention": Reach()}
    off = tiny_model("qwen2", use_sliding_window=False, sliding_window=8).config
    assert set(reaches(off).values()) == {Reach()}
    with pytest.raises(ValueError, match="layers of type linear_attention are no attention over a mask"):
        reaches(family_config("qwen3_5_text"))
    with pytest.raises(ValueError, match="window_size may limit attention"):
        reaches(family_config("gpt_neo"))
    assert Reach(window=8, chunk=4).within(8) == Reach(chunk=4) and Reach(window=8).within(9) == Reach(window=8)
