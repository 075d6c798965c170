"""The strided layout, its masks, log-probs and generation, against golden numbers and against one sequence at a time."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from conftest import GOLDEN, tiny_model
from ebft_utils.algorithm import flex, strided
from ebft_utils.algorithm.losses import policy_gradient_loss
from ebft_utils.algorithm.strided import (
    dense_mask,
    find_anchors,
    generate_rollouts,
    pack_layout,
    rollout_logprobs,
    sample_tokens,
    segment_positions,
    strided_blocks,
    strided_logprobs,
    truth_windows,
)

IMPLEMENTATIONS = ("strided_sdpa", "sdpa", "eager")
ARCHITECTURES = {  # settings: sliding layers (where there are any) with a window that no document reaches
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    "mistral": {"sliding_window": 64},
    "gemma": {},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
LAYOUT_CASES = (
    "S64_ctx8_G8_stride8",
    "S50_ctx4_G4_stride2",
    "S96_ctx16_G8_stride16",
    "S73_ctx9_G4_stride4",
    "S64_ctx8_G8_stride8_docs",
)
# two rows: two packed documents and padding; one document and padding. Row 0 has three anchors, row 1 two and an invalid slot.
SEGMENTS = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [0] * 14 + [-1] * 6])
ANCHORS = torch.tensor([[3, 6, 12], [3, 11, 1]])
VALID = torch.tensor([[True, True, True], [True, True, False]])
NUM_SAMPLES, NUM_GENERATED = 2, 3


def with_attention(model, implementation: str):
    model.set_attn_implementation(implementation)
    return model


def random_tokens(*shape: int, seed: int = 1, vocabulary: int = 300) -> torch.Tensor:
    return torch.randint(2, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def next_token_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """(T) tokens -> (T, V) logits, an ordinary forward of one sequence, with transformers' own mask and positions."""
    return model(tokens[None], attention_mask=torch.ones(1, len(tokens), dtype=torch.long)).logits[0]


def lone_rollout_logprobs(model, prefix: torch.Tensor, rollout: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) of one rollout's tokens after one prefix."""
    logits = next_token_logits(model, torch.cat([prefix, rollout])) / temperature
    return torch.stack([logits[len(prefix) + t - 1].log_softmax(-1)[token] for t, token in enumerate(rollout)])


def document_start(segments: torch.Tensor, anchor: int) -> int:
    """Index of the first token of the document that holds token anchor - 1 of a row."""
    return int((segments == segments[anchor - 1]).nonzero()[0])


# ---------------------------------------------------------------------------------------------------------------------------------------
# Layout


def golden_layout(case: str):
    """(golden arrays, our step-major layout of the same anchors, anchors, which windows lie in one document)."""
    arrays = {
        name: torch.from_numpy(array)
        for name, array in np.load(GOLDEN / "layout.npz").items()
        if name.startswith(f"{case}.")
    }
    arrays = {name.removeprefix(f"{case}."): array for name, array in arrays.items()}
    length, context, num_generated, stride, num_anchors = arrays["meta"].tolist()
    anchors = (torch.arange(num_anchors) * stride + context).clamp_max(length - num_generated)
    inside = [
        arrays["doc_ids"][anchor - 1] == arrays["doc_ids"][anchor + num_generated - 1] for anchor in anchors.tolist()
    ]
    segments = arrays["doc_ids"][None] if case.endswith("_docs") else torch.zeros(1, length, dtype=torch.long)
    layout = pack_layout(
        segments, anchors[None], torch.ones(1, num_anchors, dtype=torch.bool), 1, num_generated, step_major=True
    )
    return arrays, layout, anchors, torch.tensor(inside), num_generated


@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_layout_equals_the_released_code(case):
    """Mask and position ids, cell by cell; of packed documents only rollouts that stay in one (the others are no groups here)."""
    arrays, layout, anchors, inside, num_generated = golden_layout(case)
    length = int(arrays["meta"][0])
    mask = dense_mask(layout)[0, 0]
    rows = torch.cat([torch.ones(length, dtype=torch.bool), inside.repeat(num_generated)])
    assert mask.shape == arrays["mask"].shape
    assert torch.equal(mask[rows], arrays["mask"][rows])
    assert torch.equal(layout.position_ids[0, rows], arrays["position_ids"][rows])
    assert inside.sum() >= 3 and (inside.all() != case.endswith("_docs"))
    for index, anchor in enumerate(
        anchors.tolist()
    ):  # the first rollout token of an anchor sees no document token from the anchor on
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
    layouts = [
        pack_layout(SEGMENTS, ANCHORS, VALID, NUM_SAMPLES, NUM_GENERATED, step_major=order) for order in (False, True)
    ]
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
                segment = segments[anchor - 1] if valid else None
                tokens.append(
                    {"kind": "rollout", "rollout": (slot, sample), "step": step, "anchor": anchor, "segment": segment}
                )
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
    """Packed documents, padding, an invalid anchor, two rows with different anchors, two samples: a loop over all pairs of tokens."""
    mask = dense_mask(pack_layout(SEGMENTS, ANCHORS, VALID, NUM_SAMPLES, NUM_GENERATED))
    expected = []
    for row in range(2):
        tokens = described_tokens(row)
        expected.append([[sees(query, key) for key in tokens] for query in tokens])
    assert mask.shape == (2, 1, 38, 38)
    assert torch.equal(mask[:, 0], torch.tensor(expected))


def test_positions_continue_the_document():
    """Rollout token t after an anchor at position p of its document has position p + t, also in a later packed document."""
    layout = pack_layout(SEGMENTS, ANCHORS, VALID, NUM_SAMPLES, NUM_GENERATED)
    assert layout.position_ids[0, :20].tolist() == [*range(9), *range(8), *range(3)]
    assert layout.position_ids[0, 20:].tolist() == [3, 4, 5] * 2 + [6, 7, 8] * 2 + [3, 4, 5] * 2
    assert layout.position_ids[1, 20:32].tolist() == [3, 4, 5] * 2 + [11, 12, 13] * 2
    assert segment_positions(torch.tensor([[4, 4, 7, 7, 7, 4]])).tolist() == [[0, 1, 0, 1, 2, 0]]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Blocks


def reassembled(blocks, batch: int, num_steps: int) -> torch.Tensor:
    """The mask (B, Q, L) that the blocks stand for: queries are the document (if it is there) and then the newest rollout tokens."""
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
    """A cell that a block leaves out must be empty, and a cell it has must be the mask's; anchors are spread over 1 to 4 blocks."""
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", queries_per_block)
    layout = pack_layout(*case, NUM_SAMPLES, NUM_GENERATED)
    blocks = strided_blocks(layout, document_queries=True)
    assert torch.equal(reassembled(blocks, len(case[0]), 1), dense_mask(layout)[:, 0])
    num_anchors = case[1].shape[1]
    assert len(blocks.blocks) == {1: num_anchors * NUM_SAMPLES, 12: -(-num_anchors // 2), 256: 1}[queries_per_block]
    assert (blocks.document_mask is None) == (case is SINGLE)
    if queries_per_block == 1:  # what a block leaves out is the speed: no document token behind its longest prefix
        assert [block.prefix for block in blocks.blocks] == [
            prefix for prefix in ([3, 6, 12, 15] if case is SINGLE else [3, 11, 12]) for _ in range(NUM_SAMPLES)
        ]


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


# ---------------------------------------------------------------------------------------------------------------------------------------
# Anchors


def test_anchors_by_hand():
    """Windows of 3 in documents of 9 and 8: anchors 2, 4, 6 (window 6..8) and 2, 4 (6 would need token 8); rows of different number."""
    anchors, valid = find_anchors(
        SEGMENTS, SEGMENTS, context_length=2, min_completion_prefix=0, stride=2, num_generated=3
    )
    assert anchors.tolist() == [[2, 4, 6, 11, 13], [2, 4, 6, 8, 10]] and valid.all()
    anchors, valid = find_anchors(
        SEGMENTS, SEGMENTS, context_length=5, min_completion_prefix=0, stride=4, num_generated=3
    )
    assert anchors.tolist() == [[5, 14], [5, 9]] and valid.all()
    anchors, valid = find_anchors(
        SEGMENTS, SEGMENTS, context_length=3, min_completion_prefix=6, stride=1, num_generated=3
    )
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
    assert (
        packed_anchors[0].tolist() == expected and len(expected) == 4 + 1 + 3 + 1
    )  # no room in those of 5 and 3 tokens
    windows = truth_windows(index, packed_anchors, 3)
    assert windows[0, 0].tolist() == [8, 9, 10]
    assert (packed[0][windows] == packed[0][packed_anchors - 1].unsqueeze(-1)).all()


# ---------------------------------------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logprobs_equal_the_released_code(golden_model, golden_forward, implementation):
    """Guards the predictor positions (a peer read its left neighbour's state: -12.1 instead of -1.05), the temperature and every mask rendering."""
    golden, model = golden_forward, with_attention(golden_model, implementation)
    temperature = golden["temperature"].item()
    with torch.no_grad():
        ours = rollout_logprobs(model, golden["doc"], golden["rollouts"], golden["anchors"], temperature)
        _, document = strided_logprobs(
            model,
            golden["doc"],
            torch.zeros_like(golden["doc"]),
            golden["rollouts"],
            golden["anchors"],
            torch.ones(2, 4, dtype=torch.bool),
            temperature,
            False,
        )
    torch.testing.assert_close(ours, golden["rollout_logprobs"], atol=1e-4, rtol=0)
    torch.testing.assert_close(-document, golden["doc_nll"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_one_sequence_at_a_time(architecture):
    """Every supported architecture honours mask and positions; anchors differ by row, and reach both ends of the document."""
    model = with_attention(tiny_model(architecture, **ARCHITECTURES[architecture]), "strided_sdpa")
    document, rollouts, anchors = (
        random_tokens(2, 12),
        random_tokens(2, 3, 2, 4, seed=2),
        torch.tensor([[1, 5, 12], [2, 6, 8]]),
    )
    with torch.no_grad():
        packed = rollout_logprobs(model, document, rollouts, anchors, 0.6)
    expected = torch.empty_like(packed)
    for row, slot, sample in np.ndindex(2, 3, 2):
        expected[row, slot, sample] = lone_rollout_logprobs(
            model, document[row, : anchors[row, slot]], rollouts[row, slot, sample], 0.6
        )
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=0)
    assert packed.std() > 0.3


@pytest.mark.parametrize("num_generated", [1, 2])
def test_logprobs_of_very_short_rollouts(num_generated):
    """ebft.generate_max_len: 1 is allowed: then no rollout token is fed at all."""
    model = with_attention(tiny_model(), "strided_sdpa")
    document, rollouts, anchors = (
        random_tokens(1, 10),
        random_tokens(1, 2, 2, num_generated, seed=2),
        torch.tensor([[3, 7]]),
    )
    with torch.no_grad():
        packed = rollout_logprobs(model, document, rollouts, anchors, 0.6)
    for slot, sample in np.ndindex(2, 2):
        expected = lone_rollout_logprobs(model, document[0, : anchors[0, slot]], rollouts[0, slot, sample], 0.6)
        torch.testing.assert_close(packed[0, slot, sample], expected, atol=1e-4, rtol=0)


def padded_inputs():
    """Tokens, segments, rollouts, anchors, validity of SEGMENTS' two rows."""
    return random_tokens(2, 20), SEGMENTS, random_tokens(2, 3, NUM_SAMPLES, NUM_GENERATED, seed=2), ANCHORS, VALID


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_and_packing_change_no_logprob(implementation):
    """Two rows that are padded differently, one with two documents: each rollout, and each document token, as if it were alone."""
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


@pytest.mark.parametrize("implementation", ["strided_sdpa", "sdpa"])
def test_invalid_anchors_and_padding_leave_the_gradient_alone(implementation):
    """A fully masked row would be NaN, and NaN * 0 is NaN in every weight; a finite leak would show in the comparison with the row alone."""
    model = with_attention(tiny_model(), implementation)
    tokens, segments, rollouts, anchors, valid = padded_inputs()

    def gradients(rows, slots, length):
        inputs = (
            tokens[rows, :length],
            segments[rows, :length],
            rollouts[rows, :slots],
            anchors[rows, :slots],
            valid[rows, :slots],
        )
        logps, _ = strided_logprobs(model, *inputs, 0.6, False)
        counted = inputs[-1].unsqueeze(-1).expand(-1, -1, NUM_SAMPLES)
        return torch.autograd.grad(
            policy_gradient_loss(logps, torch.ones(counted.shape), counted, 1), list(model.parameters())
        )

    together = gradients(slice(0, 2), 3, 20)
    alone = [gradients(slice(0, 1), 3, 17), gradients(slice(1, 2), 2, 14)]  # nothing padded, nothing invalid
    for whole, first, second in zip(together, *alone, strict=True):
        torch.testing.assert_close(whole, first + second, atol=2e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Gradients


def copied_document_loss(model, document, rollouts, anchors, advantages, temperature):
    """The released code's layout, plainly: the document once for each sample, [document | step 0 of all anchors | step 1 ..], full logits."""
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
        ids = torch.stack(
            [torch.cat([document[row], rollouts[row, :, sample].T.flatten()]) for sample in range(num_samples)]
        )
        position_ids = torch.tensor(positions).expand(num_samples, -1)
        logits = model(
            ids, attention_mask=mask.expand(num_samples, 1, -1, -1), position_ids=position_ids, use_cache=False
        ).logits
        logps = (logits / temperature).log_softmax(-1)
        for step, slot in where:
            predictor = int(anchors[row, slot]) - 1 if step == 0 else length + (step - 1) * num_anchors + slot
            for sample in range(num_samples):
                loss = (
                    loss - advantages[row, slot, sample] * logps[sample, predictor, rollouts[row, slot, sample, step]]
                )
    return loss / rollouts.numel()


@pytest.fixture(scope="module")
def gradient_case():
    """Inputs, and the copied-document layout's loss and gradients."""
    document, rollouts = random_tokens(2, 14), random_tokens(2, 3, 2, 4, seed=2)
    anchors, advantages = (
        torch.tensor([[2, 6, 10], [3, 5, 9]]),
        torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(3)),
    )
    model = with_attention(tiny_model(), "sdpa")
    loss = copied_document_loss(model, document, rollouts, anchors, advantages, 0.6)
    loss.backward()
    return (
        document,
        rollouts,
        anchors,
        advantages,
        loss.item(),
        {name: parameter.grad for name, parameter in model.named_parameters()},
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_the_copied_document_layout(monkeypatch, gradient_case, implementation, checkpointing):
    """One shared document must give the policy gradient of n copies of it, in every parameter; also when layers are recomputed."""
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
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert expected[name].abs().max() > 1e-4, name


def test_document_logprobs_carry_a_gradient_only_when_asked():
    """ce_coef 0 must not pay for the document's backward; ce_coef > 0 must not silently train nothing."""
    model = with_attention(tiny_model(), "strided_sdpa")
    tokens, segments, rollouts, anchors, valid = padded_inputs()
    for wanted in (False, True):
        packed, document = strided_logprobs(model, tokens, segments, rollouts, anchors, valid, 0.6, wanted)
        assert packed.requires_grad and document.requires_grad == wanted
    nothing, document = strided_logprobs(model, tokens, segments, None, anchors, valid, 1.0, True)
    assert nothing is None and document.requires_grad


class Waits(TorchDispatchMode):
    """Counts where a number is read out of a tensor (int(), bool(), item()): on a GPU the program waits there until all that was begun is done."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_decoding_never_waits_for_the_device(monkeypatch):
    """With FlexAttention (its kernel replaced by the dense mask of the same predicate: a dispatch mode and a compiled kernel exclude each other)."""

    def dense_attention(query, key, value, *, block_mask, scale, enable_gqa):
        row, index, keys = (torch.arange(size) for size in (query.shape[0], query.shape[2], key.shape[2]))
        mask = block_mask.mask_mod(row[:, None, None], 0, index[:, None], keys[None])
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None], scale=scale, enable_gqa=enable_gqa
        )

    monkeypatch.setattr(flex, "_compiled_flex_attention", dense_attention)
    document, uniforms = (
        random_tokens(2, 20),
        torch.rand(2, 3, NUM_SAMPLES, 4, generator=torch.Generator().manual_seed(2)),
    )
    rollouts, waits = {}, {}
    for implementation in ("strided_flex", "strided_sdpa"):
        with Waits() as counted:
            rollouts[implementation] = generate_rollouts(
                with_attention(tiny_model(), implementation), document, SEGMENTS, ANCHORS, VALID, 0.6, uniforms
            )
        waits[implementation] = counted.number
    assert torch.equal(rollouts["strided_flex"][VALID], rollouts["strided_sdpa"][VALID])
    assert waits["strided_flex"] == 0 and waits["strided_sdpa"] > 3  # it cuts its blocks by the anchors


def test_unknown_attention_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*strided_sdpa, strided_flex, sdpa, eager"):
        rollout_logprobs(model, random_tokens(1, 8), random_tokens(1, 1, 2, 3), torch.tensor([[4]]), 1.0)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Generation

UNIFORMS = torch.rand(2, 3, NUM_SAMPLES, NUM_GENERATED, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def naive_rollout(model, prefix: torch.Tensor, uniforms, temperature: float) -> list[int]:
    """Token after token, each from a fresh forward over everything: the first token whose cumulative probability exceeds the uniform number."""
    tokens = prefix
    for uniform in uniforms:
        cumulative = (next_token_logits(model, tokens)[-1] / temperature).softmax(-1).double().cumsum(-1)
        drawn = next(token for token, mass in enumerate((cumulative / cumulative[-1]).tolist()) if mass > uniform)
        tokens = torch.cat([tokens, torch.tensor([drawn])])
    return tokens[len(prefix) :].tolist()


@pytest.fixture(scope="module")
def naive_rollouts():
    """All rollouts at valid anchors of SEGMENTS' rows, one by one, without a cache."""
    model, (tokens, segments, _, anchors, valid) = with_attention(tiny_model(), "sdpa"), padded_inputs()
    rollouts = {}
    for row, slot, sample in np.ndindex(2, 3, NUM_SAMPLES):
        if valid[row, slot]:
            anchor = int(anchors[row, slot])
            prefix = tokens[row, document_start(segments[row], anchor) : anchor]
            rollouts[row, slot, sample] = naive_rollout(model, prefix, UNIFORMS[row, slot, sample].tolist(), 0.6)
    return rollouts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rollouts_equal_a_loop_without_cache(monkeypatch, naive_rollouts, implementation, training):
    """Packed documents, padding, two rows. In train mode checkpointing empties the cache and rollouts are garbage."""
    monkeypatch.setattr(strided, "QUERIES_PER_BLOCK", 4)
    model = with_attention(tiny_model(), implementation).train(training)
    if training:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens, segments, _, anchors, valid = padded_inputs()
    rollouts = generate_rollouts(model, tokens, segments, anchors, valid, 0.6, UNIFORMS)
    assert rollouts.shape == UNIFORMS.shape and ((rollouts >= 0) & (rollouts < 300)).all()
    assert {place: rollouts[place].tolist() for place in naive_rollouts} == naive_rollouts
    assert len({tuple(rollout) for rollout in naive_rollouts.values()}) > 5
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma3_text"])
def test_cached_rollouts_of_other_architectures(architecture):
    """A sliding layer's own cache drops keys by count: here 18 are cached, the window is 12, and no rollout has more than 10 tokens before it."""
    model = with_attention(
        tiny_model(architecture, **{**ARCHITECTURES[architecture], "sliding_window": 12}), "strided_sdpa"
    )
    document, anchors, uniforms = random_tokens(1, 10), torch.tensor([[2, 7]]), UNIFORMS[:1, :2]
    rollouts = generate_rollouts(
        model, document, torch.zeros_like(document), anchors, torch.ones(1, 2, dtype=torch.bool), 0.6, uniforms
    )
    for slot, sample in np.ndindex(2, NUM_SAMPLES):
        expected = naive_rollout(model, document[0, : anchors[0, slot]], uniforms[0, slot, sample].tolist(), 0.6)
        assert rollouts[0, slot, sample].tolist() == expected


def test_single_token_rollouts():
    model, document, anchors = (
        with_attention(tiny_model(), "strided_sdpa"),
        random_tokens(1, 10),
        torch.tensor([[2, 7]]),
    )
    uniforms = UNIFORMS[:1, :2, :, :1]
    rollouts = generate_rollouts(
        model, document, torch.zeros_like(document), anchors, torch.ones(1, 2, dtype=torch.bool), 0.6, uniforms
    )
    expected = [
        [naive_rollout(model, document[0, :anchor], uniforms[0, slot, sample].tolist(), 0.6) for sample in range(2)]
        for slot, anchor in enumerate((2, 7))
    ]
    assert rollouts[0].tolist() == expected


def test_low_temperature_is_greedy():
    """Whatever the uniform numbers: softmax(logits / temperature) becomes the argmax."""
    model, document, anchors = (
        with_attention(tiny_model(), "strided_sdpa"),
        random_tokens(1, 10),
        torch.tensor([[2, 7]]),
    )
    rollouts = generate_rollouts(
        model, document, torch.zeros_like(document), anchors, torch.ones(1, 2, dtype=torch.bool), 1e-4, UNIFORMS[:1, :2]
    )
    for slot, anchor in enumerate((2, 7)):
        tokens = document[0, :anchor]
        for _ in range(NUM_GENERATED):
            tokens = torch.cat([tokens, next_token_logits(model, tokens)[-1].argmax()[None]])
        assert rollouts[0, slot].tolist() == [tokens[anchor:].tolist()] * NUM_SAMPLES


def test_mode_is_restored_after_an_error(monkeypatch):
    """A run that catches the error and goes on must not train in eval mode."""
    model, document = with_attention(tiny_model(), "strided_sdpa").train(), random_tokens(1, 10)
    monkeypatch.setattr(strided, "sample_tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_rollouts(
            model,
            document,
            torch.zeros_like(document),
            torch.tensor([[4]]),
            torch.tensor([[True]]),
            1.0,
            UNIFORMS[:1, :1],
        )
    assert all(module.training for module in model.modules())


def test_sampled_frequencies_are_the_softmax():
    """10,000 evenly spread numbers through the inverse distribution function: each token's share is its probability, to 1/10,000."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 6), (12, 6), (12,)))
    weight = 0.3 * weight
    uniforms = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000).expand(2, -1)
    drawn = sample_tokens(hidden, weight, bias, 0.7, uniforms)
    shares = torch.stack([row.bincount(minlength=12) for row in drawn]) / 10_000
    torch.testing.assert_close(shares, ((hidden @ weight.T + bias) / 0.7).softmax(-1), atol=1.1e-4, rtol=0)
    assert shares.max() < 0.9


def test_impossible_tokens_are_never_drawn():
    """Probability 0 at both ends of the vocabulary and in the middle, at the smallest and the largest uniform number."""
    bias = torch.tensor([-1e4, 0.0, -1e4, 0.0, -1e4])
    uniforms = torch.tensor([[0.0, 0.4999, 0.5, 1 - 2**-40]], dtype=torch.float64)
    assert sample_tokens(torch.zeros(1, 2), torch.zeros(5, 2), bias, 1.0, uniforms).tolist() == [[1, 1, 3, 3]]


def test_many_rows_are_sampled_in_chunks(monkeypatch):
    monkeypatch.setattr("ebft_utils.algorithm.losses.LOGITS_PER_CHUNK", 1)
    generator = torch.Generator().manual_seed(6)
    hidden, weight, uniforms = (
        torch.randn(37, 6, generator=generator),
        torch.randn(12, 6, generator=generator),
        torch.rand(37, 3, generator=generator),
    )
    chunked = sample_tokens(hidden, weight, None, 0.7, uniforms)
    rows = [sample_tokens(hidden[row, None], weight, None, 0.7, uniforms[row, None]) for row in range(37)]
    assert torch.equal(chunked, torch.cat(rows)) and len(chunked.unique()) > 6


def test_the_scored_policy_is_the_sampling_policy(monkeypatch):
    """The ratio of an unchanged policy is 1: log-probs that the sampler drew from equal those the loss scores."""
    model, document, anchors = (
        with_attention(tiny_model(), "strided_sdpa"),
        random_tokens(2, 16),
        torch.tensor([[2, 7, 12], [3, 6, 9]]),
    )
    drawn_logps, sample = [], strided.sample_tokens

    def spy(hidden, weight, bias, temperature, uniforms):
        tokens = sample(hidden, weight, bias, temperature, uniforms)
        drawn_logps.append(
            ((hidden @ weight.T) / temperature).log_softmax(-1).gather(-1, tokens).view(2, 3, NUM_SAMPLES)
        )
        return tokens

    monkeypatch.setattr(strided, "sample_tokens", spy)
    rollouts = generate_rollouts(
        model, document, torch.zeros_like(document), anchors, torch.ones(2, 3, dtype=torch.bool), 0.6, UNIFORMS
    )
    with torch.no_grad():
        scored = rollout_logprobs(model, document, rollouts, anchors, 0.6)
        other = rollout_logprobs(model, document, rollouts, anchors, 1.0)
    torch.testing.assert_close(scored, torch.stack(drawn_logps, dim=-1), atol=1e-4, rtol=0)
    assert (scored - other).abs().mean() > 0.05
