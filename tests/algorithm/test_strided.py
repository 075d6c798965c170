"""The strided layout, its masks, anchors and log-probs, against golden numbers and one sequence at a time."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ebft_utils.algorithm import strided
from ebft_utils.algorithm.losses import policy_gradient_loss
from ebft_utils.algorithm.strided import (
    dense_mask,
    find_anchors,
    pack_layout,
    rollout_logprobs,
    segment_positions,
    strided_blocks,
    strided_logprobs,
    truth_windows,
)
from helpers import GOLDEN, tiny_model
from strided_cases import (
    ANCHORS,
    ARCHITECTURES,
    IMPLEMENTATIONS,
    NUM_GENERATED,
    NUM_SAMPLES,
    SEGMENTS,
    VALID,
    document_start,
    next_token_logits,
    padded_inputs,
    random_tokens,
    with_attention,
)

LAYOUT_CASES = ("S64_ctx8_G8_stride8", "S50_ctx4_G4_stride2", "S96_ctx16_G8_stride16", "S73_ctx9_G4_stride4")
LAYOUT_CASES += ("S64_ctx8_G8_stride8_docs",)  # the only one with packed documents


# ----------------------------------------------------------------------------------------------------------------------
# Layout


def golden_layout(case: str):
    """(golden arrays, our step-major layout of the same anchors, anchors, which windows lie in one document)."""
    arrays = {name: array for name, array in np.load(GOLDEN / "layout.npz").items() if name.startswith(f"{case}.")}
    arrays = {name.removeprefix(f"{case}."): torch.from_numpy(array) for name, array in arrays.items()}
    length, context, num_generated, stride, num_anchors = arrays["meta"].tolist()
    anchors = (torch.arange(num_anchors) * stride + context).clamp_max(length - num_generated)
    inside = arrays["doc_ids"][anchors - 1] == arrays["doc_ids"][anchors + num_generated - 1]
    segments = arrays["doc_ids"][None] if case.endswith("_docs") else torch.zeros(1, length, dtype=torch.long)
    valid = torch.ones(1, num_anchors, dtype=torch.bool)
    layout = pack_layout(segments, anchors[None], valid, 1, num_generated, step_major=True)
    return arrays, layout, anchors, inside, num_generated


@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_layout_equals_the_released_code(case):
    """Mask and position ids, cell by cell.

    Of packed documents only rollouts that stay in one document: the others are no groups here.
    """
    arrays, layout, anchors, inside, num_generated = golden_layout(case)
    length = int(arrays["meta"][0])
    mask = dense_mask(layout)[0, 0]
    rows = torch.cat([torch.ones(length, dtype=torch.bool), inside.repeat(num_generated)])
    assert mask.shape == arrays["mask"].shape
    assert torch.equal(mask[rows], arrays["mask"][rows])
    assert torch.equal(layout.position_ids[0, rows], arrays["position_ids"][rows])
    assert inside.sum() >= 3 and (inside.all() != case.endswith("_docs"))
    # the first rollout token of an anchor sees no document token from the anchor on
    for index, anchor in enumerate(anchors.tolist()):
        assert not mask[length + index, anchor:length].any()


def token_ranks(num_anchors: int, num_samples: int, num_generated: int) -> torch.Tensor:
    """For each anchor-major rollout token (a, n, g), its place in the step-major order (g, a, n)."""
    ranks = []
    for anchor in range(num_anchors):
        for sample in range(num_samples):
            ranks += [step * num_anchors * num_samples + anchor * num_samples + sample for step in range(num_generated)]
    return torch.tensor(ranks)


def test_anchor_major_is_a_permutation_of_step_major():
    """One predicate for both orders: training and decoding must not disagree on a single cell."""
    inputs = (SEGMENTS, ANCHORS, VALID, NUM_SAMPLES, NUM_GENERATED)
    layouts = [pack_layout(*inputs, step_major=step_major) for step_major in (False, True)]
    length = SEGMENTS.shape[1]
    order = torch.cat([torch.arange(length), length + token_ranks(3, NUM_SAMPLES, NUM_GENERATED)])
    anchor_major, step_major = (dense_mask(layout)[:, 0] for layout in layouts)
    assert torch.equal(anchor_major, step_major[:, order][:, :, order])
    assert torch.equal(layouts[0].position_ids, layouts[1].position_ids[:, order])
    assert not torch.equal(anchor_major, step_major)


def described_tokens(row: int) -> list[dict]:
    """What each packed token of a row is, in the words of the module's docstring; anchor-major."""
    segments = SEGMENTS[row].tolist()
    tokens = [
        {"kind": "padding" if segment < 0 else "document", "index": index, "segment": segment}
        for index, segment in enumerate(segments)
    ]
    for slot in range(3):
        anchor, valid = int(ANCHORS[row, slot]), bool(VALID[row, slot])
        for sample in range(NUM_SAMPLES):
            for step in range(NUM_GENERATED):
                token = {"kind": "rollout", "rollout": (slot, sample), "step": step, "anchor": anchor}
                tokens.append({**token, "segment": segments[anchor - 1] if valid else None})
    return tokens


def sees(query: dict, key: dict) -> bool:
    """The docstring as a rule for two tokens; every token sees itself."""
    if query is key:
        return True
    if query["kind"] == "padding" or key["kind"] == "padding":
        return False
    if key["kind"] == "document":
        limit = query["index"] + 1 if query["kind"] == "document" else query["anchor"]
        return query["segment"] == key["segment"] and key["index"] < limit
    return query["kind"] == "rollout" and query["rollout"] == key["rollout"] and key["step"] < query["step"]


def test_mask_equals_the_words():
    """A loop over all pairs of tokens.

    Packed documents, padding, an invalid anchor, two rows with different anchors, two samples.
    """
    mask = dense_mask(pack_layout(SEGMENTS, ANCHORS, VALID, NUM_SAMPLES, NUM_GENERATED))
    expected = []
    for row in range(2):
        tokens = described_tokens(row)
        expected.append([[sees(query, key) for key in tokens] for query in tokens])
    assert mask.shape == (2, 1, 38, 38)
    assert torch.equal(mask[:, 0], torch.tensor(expected))


def test_positions_continue_the_document():
    """Rollout token t has position p + t, where its anchor is token p of its document, packed or not."""
    layout = pack_layout(SEGMENTS, ANCHORS, VALID, NUM_SAMPLES, NUM_GENERATED)
    assert layout.position_ids[0, :20].tolist() == [*range(9), *range(8), *range(3)]
    assert layout.position_ids[0, 20:].tolist() == [3, 4, 5] * 2 + [6, 7, 8] * 2 + [3, 4, 5] * 2
    assert layout.position_ids[1, 20:32].tolist() == [3, 4, 5] * 2 + [11, 12, 13] * 2
    assert segment_positions(torch.tensor([[4, 4, 7, 7, 7, 4]])).tolist() == [[0, 1, 0, 1, 2, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


def reassembled(blocks, batch: int, num_steps: int) -> torch.Tensor:
    """The mask (B, Q, L) that the blocks stand for.

    Queries are the document (if it is there) and then the newest rollout tokens.
    """
    num_newest = blocks.blocks[-1].end if blocks.blocks else 0
    length, offset = blocks.num_document, blocks.num_document if blocks.document_queries else 0
    mask = torch.zeros(batch, offset + num_newest, length + num_steps * num_newest, dtype=torch.bool)
    if blocks.document_queries:
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask[:, :length, :length] = causal if blocks.document_mask is None else blocks.document_mask[:, 0]
    for block in blocks.blocks:
        keys = [*range(block.prefix)]
        for step in range(num_steps):
            keys += range(length + step * num_newest + block.start, length + step * num_newest + block.end)
        for column, key in enumerate(keys):
            mask[:, offset + block.start : offset + block.end, key] = block.mask[:, 0, :, column]
    return mask


SINGLE = (torch.zeros(1, 20, dtype=torch.long), torch.tensor([[3, 6, 12, 15]]), torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("case", [(SEGMENTS, ANCHORS, VALID), SINGLE], ids=["packed", "single"])
@pytest.mark.parametrize("queries_per_block", [1, 12, 256])
def test_training_blocks_equal_the_dense_mask(monkeypatch, case, queries_per_block):
    """A cell that a block leaves out must be empty, and a cell that it has must be the mask's.

    The anchors are spread over 1 to 4 blocks.
    """
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", queries_per_block)
    layout = pack_layout(*case, NUM_SAMPLES, NUM_GENERATED)
    blocks = strided_blocks(layout, document_queries=True)
    assert torch.equal(reassembled(blocks, len(case[0]), 1), dense_mask(layout)[:, 0])
    num_anchors = case[1].shape[1]
    assert len(blocks.blocks) == {1: num_anchors * NUM_SAMPLES, 12: -(-num_anchors // 2), 256: 1}[queries_per_block]
    assert (blocks.document_mask is None) == (case is SINGLE)
    if queries_per_block == 1:  # what a block leaves out is the speed: no document token behind its longest prefix
        prefixes = [3, 6, 12, 15] if case is SINGLE else [3, 11, 12]
        expected = [prefix for prefix in prefixes for _ in range(NUM_SAMPLES)]
        assert [block.prefix for block in blocks.blocks] == expected


@pytest.mark.parametrize("case", [(SEGMENTS, ANCHORS, VALID), SINGLE], ids=["packed", "single"])
@pytest.mark.parametrize("queries_per_block", [1, 4, 256])
def test_decoding_blocks_equal_the_dense_mask(monkeypatch, case, queries_per_block):
    """At each step the newest tokens against document, older tokens and themselves."""
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", queries_per_block)
    num_newest = case[1].shape[1] * NUM_SAMPLES
    for step in (1, 2, 3):
        layout = pack_layout(*case, NUM_SAMPLES, step, step_major=True)
        blocks = strided_blocks(layout, document_queries=False, num_steps=step)
        assert torch.equal(reassembled(blocks, len(case[0]), step), dense_mask(layout)[:, 0, -num_newest:])
    assert len(blocks.blocks) == {1: num_newest, 4: -(-num_newest // 4), 256: 1}[queries_per_block]


def test_blocks_of_a_document_alone():
    """Prefill: no rollouts yet, so no blocks; padding still sees itself."""
    layout = pack_layout(SEGMENTS, ANCHORS, VALID, NUM_SAMPLES, 0)
    blocks = strided_blocks(layout, document_queries=True)
    assert blocks.blocks == () and torch.equal(reassembled(blocks, 2, 1), dense_mask(layout)[:, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Anchors


def test_anchors_by_hand():
    """Windows of 3 in documents of 9 and 8, by hand; rows have different numbers of anchors.

    Document of 9: anchors 2, 4, 6 (its window is 6..8). Document of 8: 2, 4 (6 would need token 8).
    """

    def found(context_length: int, min_completion_prefix: int, stride: int):
        places = dict(context_length=context_length, min_completion_prefix=min_completion_prefix, stride=stride)
        return find_anchors(SEGMENTS, SEGMENTS, **places, num_generated=3)

    anchors, valid = found(2, 0, 2)
    assert anchors.tolist() == [[2, 4, 6, 11, 13], [2, 4, 6, 8, 10]] and valid.all()
    anchors, valid = found(5, 0, 4)
    assert anchors.tolist() == [[5, 14], [5, 9]] and valid.all()
    anchors, valid = found(3, 6, 1)
    assert anchors.tolist() == [[6, 1, 1, 1, 1, 1], [6, 7, 8, 9, 10, 11]]
    assert valid.tolist() == [[True] + [False] * 5, [True] * 6]


def test_packing_changes_no_window():
    """Documents of all lengths, packed into one row or a row each: the same windows, none over a document's end."""
    lengths, settings = (5, 12, 7, 3, 10, 6), dict(context_length=3, min_completion_prefix=0, stride=2, num_generated=3)
    packed = torch.tensor([[segment for segment, length in enumerate(lengths) for _ in range(length)] + [-1] * 4])
    packed_anchors, packed_valid = find_anchors(packed, packed, **settings)
    assert packed_valid.all()
    start, expected, index = 0, [], torch.arange(packed.shape[1])[None]
    for length in lengths:
        segments = torch.where(torch.arange(length + 5) < length, 0, -1)[None]
        anchors, valid = find_anchors(segments, segments, **settings)
        assert valid.all() and (anchors + 3 <= length).all()
        expected += [start + anchor for anchor in anchors[0].tolist()]
        start += length
    assert packed_anchors[0].tolist() == expected
    assert len(expected) == 4 + 1 + 3 + 1  # no room in those of 5 and 3 tokens
    windows = truth_windows(index, packed_anchors, 3)
    assert windows[0, 0].tolist() == [8, 9, 10]
    assert (packed[0][windows] == packed[0][packed_anchors - 1].unsqueeze(-1)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs


@pytest.fixture(scope="module")
def golden_model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny-llama", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def golden_forward():
    arrays = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "strided_forward.npz").items()}
    arrays["rollouts"] = arrays["rollouts"].transpose(1, 2)  # (2, n, NB, G) -> (B, A, N, G)
    arrays["rollout_logprobs"] = arrays["rollout_logprobs"].transpose(1, 2)
    arrays["anchors"] = arrays["anchors"].expand(2, -1)
    return arrays


def lone_rollout_logprobs(model, prefix: torch.Tensor, rollout: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) of one rollout's tokens after one prefix."""
    logits = next_token_logits(model, torch.cat([prefix, rollout])) / temperature
    return torch.stack([logits[len(prefix) + t - 1].log_softmax(-1)[token] for t, token in enumerate(rollout)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logprobs_equal_the_released_code(golden_model, golden_forward, implementation):
    """Guards the positions of the predictors, the temperature and every rendering of the mask.

    A peer read its left neighbour's state: -12.1 instead of -1.05.
    """
    golden, model = golden_forward, with_attention(golden_model, implementation)
    tokens, rollouts, anchors = golden["doc"], golden["rollouts"], golden["anchors"]
    segments, valid = torch.zeros_like(tokens), torch.ones(2, 4, dtype=torch.bool)
    temperature = golden["temperature"].item()
    with torch.no_grad():
        ours = rollout_logprobs(model, tokens, rollouts, anchors, temperature)
        _, document = strided_logprobs(model, tokens, segments, rollouts, anchors, valid, temperature, False)
    torch.testing.assert_close(ours, golden["rollout_logprobs"], atol=1e-4, rtol=0)
    torch.testing.assert_close(-document, golden["doc_nll"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_one_sequence_at_a_time(architecture):
    """Every supported architecture honours mask and positions.

    Anchors differ by row, and reach both ends of the document.
    """
    model = with_attention(tiny_model(architecture, **ARCHITECTURES[architecture]), "strided_blocks")
    document, rollouts = random_tokens(2, 12), random_tokens(2, 3, 2, 4, seed=2)
    anchors = torch.tensor([[1, 5, 12], [2, 6, 8]])
    with torch.no_grad():
        packed = rollout_logprobs(model, document, rollouts, anchors, 0.6)
    expected = torch.empty_like(packed)
    for row, slot, sample in np.ndindex(2, 3, 2):
        prefix = document[row, : anchors[row, slot]]
        expected[row, slot, sample] = lone_rollout_logprobs(model, prefix, rollouts[row, slot, sample], 0.6)
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=0)
    assert packed.std() > 0.3


@pytest.mark.parametrize("num_generated", [1, 2])
def test_logprobs_of_very_short_rollouts(num_generated):
    """ebft.generate_max_len: 1 is allowed: then no rollout token is fed at all."""
    model = with_attention(tiny_model(), "strided_blocks")
    document, rollouts = random_tokens(1, 10), random_tokens(1, 2, 2, num_generated, seed=2)
    anchors = torch.tensor([[3, 7]])
    with torch.no_grad():
        packed = rollout_logprobs(model, document, rollouts, anchors, 0.6)
    for slot, sample in np.ndindex(2, 2):
        expected = lone_rollout_logprobs(model, document[0, : anchors[0, slot]], rollouts[0, slot, sample], 0.6)
        torch.testing.assert_close(packed[0, slot, sample], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_and_packing_change_no_logprob(implementation):
    """Each rollout, and each document token, as if it were alone.

    The two rows are padded differently, and one has two documents.
    """
    model = with_attention(tiny_model(), implementation)
    tokens, segments, rollouts, anchors, valid = padded_inputs()
    with torch.no_grad():
        packed, document = strided_logprobs(model, tokens, segments, rollouts, anchors, valid, 0.6, False)
    assert packed.isfinite().all() and document.isfinite().all()
    for row, slot, sample in np.ndindex(2, 3, NUM_SAMPLES):
        if valid[row, slot]:
            anchor = int(anchors[row, slot])
            prefix = tokens[row, document_start(segments[row], anchor) : anchor]
            expected = lone_rollout_logprobs(model, prefix, rollouts[row, slot, sample], 0.6)
            torch.testing.assert_close(packed[row, slot, sample], expected, atol=1e-4, rtol=0)
    for row, start, end in ((0, 0, 9), (0, 9, 17), (1, 0, 14)):
        text = tokens[row, start:end]
        expected = next_token_logits(model, text)[:-1].log_softmax(-1).gather(-1, text[1:, None])[:, 0]
        torch.testing.assert_close(document[row, start : end - 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["strided_blocks", "sdpa"])
def test_invalid_anchors_and_padding_leave_the_gradient_alone(implementation):
    """A fully masked row would be NaN, and NaN * 0 is NaN in every weight.

    A finite leak would show in the comparison with the row alone.
    """
    model = with_attention(tiny_model(), implementation)
    tokens, segments, rollouts, anchors, valid = padded_inputs()

    def gradients(rows, slots, length):
        documents = tokens[rows, :length], segments[rows, :length]
        groups = rollouts[rows, :slots], anchors[rows, :slots], valid[rows, :slots]
        logps, _ = strided_logprobs(model, *documents, *groups, 0.6, False)
        counted = groups[-1].unsqueeze(-1).expand(-1, -1, NUM_SAMPLES)
        loss = policy_gradient_loss(logps, torch.ones(counted.shape), counted, 1)
        return torch.autograd.grad(loss, list(model.parameters()))

    together = gradients(slice(0, 2), 3, 20)
    alone = [gradients(slice(0, 1), 3, 17), gradients(slice(1, 2), 2, 14)]  # nothing padded, nothing invalid
    for whole, first, second in zip(together, *alone, strict=True):
        torch.testing.assert_close(whole, first + second, atol=2e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


def copied_document_loss(model, document, rollouts, anchors, advantages, temperature):
    """The released code's layout, plainly, with full logits.

    One copy of the document for each sample: [document | step 0 of all anchors | step 1 ..].
    """
    batch, num_anchors, num_samples, num_generated = rollouts.shape
    length, total = document.shape[1], document.shape[1] + num_generated * num_anchors
    loss, where = 0.0, [(step, slot) for step in range(num_generated) for slot in range(num_anchors)]
    for row in range(batch):
        mask = torch.zeros(total, total, dtype=torch.bool)
        mask[:length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
        positions = [*range(length)]
        for step, slot in where:
            query = length + step * num_anchors + slot
            mask[query, : anchors[row, slot]] = True
            mask[query, [length + earlier * num_anchors + slot for earlier in range(step + 1)]] = True
            positions.append(int(anchors[row, slot]) + step)
        copies = [torch.cat([document[row], rollouts[row, :, sample].T.flatten()]) for sample in range(num_samples)]
        mask, position_ids = mask.expand(num_samples, 1, -1, -1), torch.tensor(positions).expand(num_samples, -1)
        logits = model(torch.stack(copies), attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        logps = (logits / temperature).log_softmax(-1)
        for step, slot in where:
            predictor = int(anchors[row, slot]) - 1 if step == 0 else length + (step - 1) * num_anchors + slot
            for sample in range(num_samples):
                token = rollouts[row, slot, sample, step]
                loss = loss - advantages[row, slot, sample] * logps[sample, predictor, token]
    return loss / rollouts.numel()


@pytest.fixture(scope="module")
def gradient_case():
    """Inputs, and the copied-document layout's loss and gradients."""
    document, rollouts = random_tokens(2, 14), random_tokens(2, 3, 2, 4, seed=2)
    anchors = torch.tensor([[2, 6, 10], [3, 5, 9]])
    advantages = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(3))
    model = with_attention(tiny_model(), "sdpa")
    loss = copied_document_loss(model, document, rollouts, anchors, advantages, 0.6)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return document, rollouts, anchors, advantages, loss.item(), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_the_copied_document_layout(monkeypatch, gradient_case, implementation, checkpointing):
    """One shared document must give the policy gradient of n copies of it, in every parameter.

    Also when layers are recomputed.
    """
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", 6)
    document, rollouts, anchors, advantages, expected_loss, expected = gradient_case
    model = with_attention(tiny_model(), implementation).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logps = rollout_logprobs(model, document, rollouts, anchors, 0.6)
    loss = policy_gradient_loss(logps, advantages, torch.ones(2, 3, 2, dtype=torch.bool), rollouts.numel())
    loss.backward()
    assert abs(loss.item() - expected_loss) < 1e-5
    for name, parameter in model.named_parameters():
        found, wanted = {name: parameter.grad}, {name: expected[name]}  # the name is then in the message
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert expected[name].abs().max() > 1e-4, name


def test_document_logprobs_carry_a_gradient_only_when_asked():
    """ce_coef 0 must not pay for the document's backward; ce_coef > 0 must not silently train nothing."""
    model = with_attention(tiny_model(), "strided_blocks")
    tokens, segments, rollouts, anchors, valid = padded_inputs()
    for wanted in (False, True):
        packed, document = strided_logprobs(model, tokens, segments, rollouts, anchors, valid, 0.6, wanted)
        assert packed.requires_grad and document.requires_grad == wanted
    nothing, document = strided_logprobs(model, tokens, segments, None, anchors, valid, 1.0, True)
    assert nothing is None and document.requires_grad


def test_unknown_attention_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*strided_blocks, strided_flex, sdpa, eager"):
        rollout_logprobs(model, random_tokens(1, 8), random_tokens(1, 1, 2, 3), torch.tensor([[4]]), 1.0)
