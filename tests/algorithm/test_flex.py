"""FlexAttention: its masks cell by cell, and its results against those of sdpa.

On the CPU it has no backward pass: what needs one is tested on a GPU, where there is one. Shapes are few, because
each is compiled.
"""

from collections import Counter
from itertools import product

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from ebft_utils.algorithm import flex
from ebft_utils.algorithm.decoding import generate_rollouts
from ebft_utils.algorithm.features import FeatureNetwork, strided_features
from ebft_utils.algorithm.losses import policy_gradient_loss
from ebft_utils.algorithm.strided import block_mask, dense_mask, pack_layout, strided_logprobs
from flex_cases import (
    NUM_GENERATED,
    NUM_SAMPLES,
    long_example,
    middle_example,
    needs_gpu,
    short_example,
    tiny_flex,
    uniforms_for,
)
from helpers import tiny_model
from strided_cases import with_attention

# ----------------------------------------------------------------------------------------------------------------------
# Masks


def test_padded_lengths():
    """Multiples of 128: powers of two and one and a half times that."""
    lengths = (1, 127, 128, 129, 256, 300, 512, 513, 700, 1023, 1024, 1025, 1537, 2048, 2049, 5000, 8192)
    expected = [128, 128, 128, 256, 256, 384, 512, 768, 768, 1024, 1024, 1536, 2048, 2048, 3072, 6144, 8192]
    assert [flex.padded_length(length) for length in lengths] == expected
    assert len({flex.padded_length(length) for length in range(1, 32769)}) == 1 + 1 + 2 * 7


def cells_of(mask) -> tuple[torch.Tensor, Counter]:
    """What a kernel with this BlockMask computes, (B, Q, K) bool, and the number of blocks of each kind.

    The kernel does not look at the cells of full blocks.
    """
    assert mask.BLOCK_SIZE == (128, 128)
    (num_queries, num_keys), batch, kinds = mask.seq_lengths, len(mask.kv_num_blocks), Counter()
    cells = torch.zeros(batch, num_queries, num_keys, dtype=torch.bool)

    def listed(counts, indices, row, at, wanted) -> bool:
        return wanted in indices[row, 0, at, : counts[row, 0, at]].tolist()

    for row, query, key in product(range(batch), range(num_queries // 128), range(num_keys // 128)):
        partial = listed(mask.kv_num_blocks, mask.kv_indices, row, query, key)
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, row, query, key)
        # the backward pass goes through the same blocks from the keys' side
        assert partial == listed(mask.q_num_blocks, mask.q_indices, row, key, query)
        assert full == listed(mask.full_q_num_blocks, mask.full_q_indices, row, key, query)
        assert not (partial and full)
        queries, keys = torch.arange(query * 128, query * 128 + 128), torch.arange(key * 128, key * 128 + 128)
        if partial:
            seen = mask.mask_mod(torch.tensor(row), torch.tensor(0), queries[:, None], keys)
            cells[row, queries[:, None], keys] = seen
        elif full:
            cells[row, queries[:, None], keys] = True
        kinds["partial" if partial else "full" if full else "absent"] += 1
    return cells, kinds


MASKS = {
    "short": (short_example, 128, {"partial": 2}),
    "long": (long_example, 384, {"partial": 11, "full": 1, "absent": 6}),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("blocks_at_once", [1, 2, 8])
def test_training_mask_equals_the_dense_mask(monkeypatch, case, blocks_at_once):
    """Packed documents, padding, invalid anchors, two rows.

    Padding sees exactly itself (a row without a cell would be NaN), and nobody sees it.
    """
    monkeypatch.setattr(flex, "QUERY_BLOCKS_AT_ONCE", blocks_at_once)
    make, padded, kinds = MASKS[case]
    _, segments, _, anchors, valid = make()
    layout = pack_layout(segments, anchors, valid, NUM_SAMPLES, NUM_GENERATED)
    length = layout.segment_ids.shape[1]
    found, found_kinds = cells_of(block_mask(layout, length, length))
    expected = torch.eye(padded, dtype=torch.bool).repeat(2, 1, 1)
    expected[:, :length, :length] = dense_mask(layout)[:, 0]
    assert length % 128 and torch.equal(found, expected)
    assert found_kinds == kinds


@pytest.mark.parametrize("make", [short_example, long_example])
def test_decoding_mask_equals_the_dense_mask_of_each_step(make):
    """A step sees neither keys of later steps nor what an earlier generation has left in their place.

    A mask keeps its step when the caller goes on to the next.
    """
    _, segments, _, anchors, valid = make()
    length, num_newest = segments.shape[1], anchors.shape[1] * NUM_SAMPLES
    whole = pack_layout(segments, anchors, valid, NUM_SAMPLES, 5, step_major=True)
    first, masks = torch.zeros((), dtype=torch.long), []
    for step in range(5):
        first.fill_(length + step * num_newest)
        masks.append(block_mask(whole, num_newest, length + 5 * num_newest, first))
    for step, mask in enumerate(masks):
        found, _ = cells_of(mask)
        so_far = pack_layout(segments, anchors, valid, NUM_SAMPLES, step + 1, step_major=True)
        newest = dense_mask(so_far)[:, 0, -num_newest:]
        assert torch.equal(found[:, :num_newest], pad(newest, (0, found.shape[2] - newest.shape[2])))
        assert found.any(2).all()  # also of the queries that are only padding


# ----------------------------------------------------------------------------------------------------------------------
# The same results as sdpa

SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
ARCHITECTURES = {  # with one scale of the scores: another would be another kernel
    "llama": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 512, "layer_types": SLIDING_AND_FULL, "query_pre_attn_scalar": 8},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_results_equal_those_of_sdpa(architecture):
    """Log-probs of rollouts and documents and features, over three blocks; rollouts, whose keys fill two."""
    model = tiny_flex(architecture, max_position_embeddings=512, **ARCHITECTURES[architecture])
    found, (documents, segments, rollouts, anchors, valid), middle = {}, long_example(), middle_example()
    decode = (middle[0], middle[1], middle[3], middle[4], 0.6, uniforms_for(middle[3]))
    for implementation in ("strided_blocks", "strided_flex"):
        network = FeatureNetwork(with_attention(model, implementation).get_decoder(), [1, 2])
        with torch.no_grad():
            packed, document = strided_logprobs(model, documents, segments, rollouts, anchors, valid, 0.6, False)
        features, truth = strided_features(network, documents, segments, rollouts, anchors, valid, "mean_pooling")
        written = generate_rollouts(model, *decode)[middle[4]]
        found[implementation] = packed[valid], document, features[valid], truth[valid], written
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    tokens = found["strided_flex"][-1]
    assert len(tokens.flatten(0, 1).unique(dim=0)) > 12 and found["strided_flex"][0].std() > 0.3


def test_results_under_autocast_equal_those_of_sdpa(monkeypatch):
    """Guards against float32 queries beside bfloat16 values, which FlexAttention refuses.

    Autocast rounds for sdpa, and not for FlexAttention.
    """
    model, (documents, segments, rollouts, anchors, valid) = tiny_flex(), short_example()
    given, passed, forward, attend = set(), set(), flex.strided_flex_forward, flex._compiled_flex_attention

    def see(module, query, key, value, *rest, **others):
        given.add((query.dtype, value.dtype))
        return forward(module, query, key, value, *rest, **others)

    def see_passed(query, key, value, **others):
        passed.add((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, **others)

    monkeypatch.setitem(AttentionInterface._global_mapping, "strided_flex", see)
    monkeypatch.setattr(flex, "_compiled_flex_attention", see_passed)
    found, kept = {}, {}
    decode = (documents, segments, anchors, valid, 0.6, uniforms_for(anchors))
    for implementation in ("strided_blocks", "strided_flex"):
        with_attention(model, implementation)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            packed, document = strided_logprobs(model, documents, segments, rollouts, anchors, valid, 0.6, False)
            written = generate_rollouts(model, *decode, kept=kept)
        found[implementation] = packed[valid], document, written[valid]
    layers = [layer for cache, _ in kept.values() for layer in cache.layers]
    cached = {tensor.dtype for layer in layers for tensor in (layer.keys, layer.values)}
    assert cached == {torch.bfloat16}  # float32 would take twice the memory
    assert given == {(torch.float32, torch.bfloat16)} and passed == {(torch.bfloat16,) * 3}
    packed, document, written = found["strided_flex"]
    expected, expected_document, expected_written = found["strided_blocks"]
    assert (packed - expected).abs().mean() < 0.02 and (document - expected_document).abs().mean() < 0.02
    assert (written == expected_written).double().mean() > 0.8


def test_the_cache_is_kept_and_holds_nothing_of_the_last_document():
    """Guards against new memory in each generation, and against keys that an earlier one has left.

    A CUDA graph would go on reading the old memory.
    """
    model, kept = tiny_flex(), {}
    addresses = []
    for seed in (1, 2):
        documents, segments, _, anchors, valid = short_example(seed)
        inputs = documents, segments, anchors, valid, 0.6, uniforms_for(anchors, seed=seed)
        assert torch.equal(generate_rollouts(model, *inputs, kept=kept), generate_rollouts(model, *inputs))
        ((cache, first),) = kept.values()
        tensors = [first, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))]
        addresses.append([tensor.data_ptr() for tensor in tensors])
    assert addresses[0] == addresses[1] and len(set(addresses[0])) == 5
    generate_rollouts(model, *(tensor[:1] for tensor in inputs[:4]), 0.6, inputs[5][:1, :, :, :1], kept=kept)
    assert list(kept) == [(2, 128), (1, 128)]  # a graph that was recorded with the first goes on reading it


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_ordinary_forward_is_that_of_sdpa(compiled, side):
    """Without a BlockMask the model still takes transformers' own masks."""
    model, ids = tiny_flex(), torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, slice(8, None) if side == "right" else slice(0, 4)] = 0
    with torch.no_grad():
        found, bare = model(ids, attention_mask=mask).logits, model(ids).logits
        with_attention(model, "sdpa")
        expected, expected_bare = (model(ids, attention_mask=given).logits for given in (mask, None))
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(bare, expected_bare, atol=1e-6, rtol=0)
    if side == "left":
        assert (found[1, 4:] - bare[1, 4:]).abs().max() > 0.1
    assert compiled() == 0


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


GEOMETRIES = {"short": short_example, "middle": middle_example, "long": long_example}


@needs_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_outputs_and_gradients_on_a_gpu(geometry, dtype, tolerance):
    """Against float64 and the dense mask.

    Lengths that are no multiple of 128, two rows, packed documents, invalid anchors.
    """
    _, segments, _, anchors, valid = GEOMETRIES[geometry]()
    layout = pack_layout(segments.cuda(), anchors.cuda(), valid.cuda(), NUM_SAMPLES, NUM_GENERATED - 1)
    length, generator = layout.segment_ids.shape[1], torch.Generator().manual_seed(1)
    query, key, value, weight = (
        torch.randn(2, heads, length, 32, generator=generator).to("cuda", dtype) for heads in (4, 2, 2, 4)
    )
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    query, key, value = (tensor.requires_grad_() for tensor in (query, key, value))
    found, _ = flex.strided_flex_forward(None, query, key, value, block_mask(layout, length, length), scaling=0.2)
    repeated = (tensor.repeat_interleave(2, dim=1) for tensor in exact[1:])
    expected = scaled_dot_product_attention(exact[0], *repeated, attn_mask=dense_mask(layout), scale=0.2)
    expected, weight = expected.transpose(1, 2), weight.transpose(1, 2)
    gradients = torch.autograd.grad((found * weight).sum(), (query, key, value))
    expected_gradients = torch.autograd.grad((expected * weight.double()).sum(), exact)
    for one, other in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert one.isfinite().all() and (one.double() - other).norm() <= tolerance * other.norm()


@needs_gpu
def test_checkpointing_on_a_gpu():
    """Guards against layers that are recomputed with another kernel, or another mask."""
    gradients = []
    for implementation, checkpointing in (("strided_blocks", False), ("strided_flex", False), ("strided_flex", True)):
        model = with_attention(tiny_model(head_dim=16, max_position_embeddings=512), implementation).cuda().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        documents, segments, rollouts, anchors, valid = (tensor.cuda() for tensor in long_example())
        logps, _ = strided_logprobs(model, documents, segments, rollouts, anchors, valid, 0.6, False)
        counted = valid.unsqueeze(-1).expand(-1, -1, NUM_SAMPLES)
        policy_gradient_loss(logps, torch.ones_like(logps[..., 0]), counted, 100.0).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected.norm() > 0
        for found in gradients[1:]:
            assert (found[name] - expected).norm() <= 1e-3 * expected.norm(), name
