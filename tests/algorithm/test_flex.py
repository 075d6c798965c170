"""FlexAttention: its masks cell by cell, its results against sdpa's, how often it compiles, and when it is refused.

On the CPU it has no backward pass: what needs one is tested on a GPU, where there is one. Shapes are few, because each is compiled.
"""

import json
from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from conftest import assert_holds, assert_same_weights, tiny_model, tiny_tokenizer, training, weights
from ebft_utils import models
from ebft_utils.algorithm import flex
from ebft_utils.algorithm.features import FeatureNetwork, strided_features
from ebft_utils.algorithm.losses import policy_gradient_loss
from ebft_utils.algorithm.strided import (
    block_mask,
    dense_mask,
    generate_rollouts,
    in_few_shapes,
    pack_layout,
    strided_logprobs,
)
from ebft_utils.config.modes import load_config
from ebft_utils.config.settings import UserError
from ebft_utils.models import StridedPolicy, set_attention
from ebft_utils.run import distributed

NUM_SAMPLES, NUM_GENERATED = 3, 4
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def compiled():
    """compiled(): how many graphs were compiled since the last call."""
    torch._dynamo.reset()
    counters.clear()
    seen = 0

    def new() -> int:
        nonlocal seen
        before, seen = seen, counters["stats"]["unique_graphs"]
        return seen - before

    return new


@pytest.fixture
def plain_descent(monkeypatch):
    """SGD in AdamW's place: updates are then proportional to the gradients."""
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, lr, betas, weight_decay: torch.optim.SGD(parameters, lr=lr)
    )


def tiny_flex(model_type: str = "llama", **changes):
    """A tiny model of two layers that attends with FlexAttention."""
    return with_attention(tiny_model(model_type, num_hidden_layers=2, **changes), "strided_flex")


def with_attention(model, implementation: str):
    model.set_attn_implementation(implementation)
    return model


def rows_of(*documents: list[int], length: int) -> torch.Tensor:
    """Segment ids of rows that hold documents of these lengths, then padding."""
    rows = [[number for number, size in enumerate(sizes) for _ in range(size)] for sizes in documents]
    return torch.tensor([row + [-1] * (length - len(row)) for row in rows])


def example(segments: torch.Tensor, anchors: list[list[int]], seed: int = 1):
    """document_ids, segment_ids, rollouts, anchors, valid of rows; an anchor of 0 is an invalid slot."""
    generator, anchors = torch.Generator().manual_seed(seed), torch.tensor(anchors)
    documents = torch.randint(2, 300, segments.shape, generator=generator)
    rollouts = torch.randint(2, 300, (*anchors.shape, NUM_SAMPLES, NUM_GENERATED), generator=generator)
    return documents, segments, rollouts, anchors.clamp_min(1), anchors > 0


def short_example(seed: int = 1):
    """Everything in one block of 128: two packed documents and padding; one document, padding and an invalid anchor."""
    return example(rows_of([20, 14], [30], length=38), [[4, 12, 26], [5, 17, 0]], seed)


def middle_example(seed: int = 1):
    """104 document tokens, and with the keys of 24 rollouts, more than 128."""
    return example(rows_of([60, 40], [88], length=104), [[4, 30, 66, 90], [5, 40, 70, 0]], seed)


def long_example(seed: int = 1):
    """Three blocks of 128, some of which are full and some absent, in one row other ones than in the other."""
    return example(rows_of([130, 120], [262], length=270), [[4, 100, 132, 200, 240], [5, 70, 129, 255, 0]], seed)


def uniforms_for(anchors: torch.Tensor, num_generated: int = NUM_GENERATED, seed: int = 4) -> torch.Tensor:
    return torch.rand(
        *anchors.shape, NUM_SAMPLES, num_generated, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# ---------------------------------------------------------------------------------------------------------------------------------------
# Masks


def test_padded_lengths():
    """Multiples of 128: powers of two and one and a half times that."""
    lengths = (1, 127, 128, 129, 256, 300, 512, 513, 700, 1023, 1024, 1025, 1537, 2048, 2049, 5000, 8192)
    assert [flex.padded_length(length) for length in lengths] == [
        128,
        128,
        128,
        256,
        256,
        384,
        512,
        768,
        768,
        1024,
        1024,
        1536,
        2048,
        2048,
        3072,
        6144,
        8192,
    ]
    assert len({flex.padded_length(length) for length in range(1, 32769)}) == 1 + 1 + 2 * 7


def cells_of(mask) -> tuple[torch.Tensor, Counter]:
    """What a kernel with this BlockMask computes, (B, Q, K) bool, and the number of blocks of each kind. Cells of full blocks are not looked at by the kernel."""
    assert mask.BLOCK_SIZE == (128, 128)
    (num_queries, num_keys), batch, kinds = mask.seq_lengths, len(mask.kv_num_blocks), Counter()
    cells = torch.zeros(batch, num_queries, num_keys, dtype=torch.bool)
    for row, query, key in product(range(batch), range(num_queries // 128), range(num_keys // 128)):

        def listed(counts, indices, at, wanted):
            return wanted in indices[row, 0, at, : counts[row, 0, at]].tolist()

        partial = listed(mask.kv_num_blocks, mask.kv_indices, query, key)
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, query, key)
        # the backward pass goes through the same blocks from the keys' side
        assert partial == listed(mask.q_num_blocks, mask.q_indices, key, query) and full == listed(
            mask.full_q_num_blocks, mask.full_q_indices, key, query
        )
        assert not (partial and full)
        queries, keys = torch.arange(query * 128, query * 128 + 128), torch.arange(key * 128, key * 128 + 128)
        if partial:
            cells[row, queries[:, None], keys] = mask.mask_mod(
                torch.tensor(row), torch.tensor(0), queries[:, None], keys
            )
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
    """Packed documents, padding, invalid anchors, two rows. What is padded sees exactly itself (a row without a cell would be NaN), and nobody sees it."""
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
    """Keys of later steps, and what an earlier generation has left in their place, are not seen. The mask keeps its step when the caller goes on to the next."""
    _, segments, _, anchors, valid = make()
    length, num_newest = segments.shape[1], anchors.shape[1] * NUM_SAMPLES
    whole, first, masks = (
        pack_layout(segments, anchors, valid, NUM_SAMPLES, 5, step_major=True),
        torch.zeros((), dtype=torch.long),
        [],
    )
    for step in range(5):
        first.fill_(length + step * num_newest)
        masks.append(block_mask(whole, num_newest, length + 5 * num_newest, first))
    for step, mask in enumerate(masks):
        found, _ = cells_of(mask)
        so_far = pack_layout(segments, anchors, valid, NUM_SAMPLES, step + 1, step_major=True)
        newest = dense_mask(so_far)[:, 0, -num_newest:]
        assert torch.equal(found[:, :num_newest], pad(newest, (0, found.shape[2] - newest.shape[2])))
        assert found.any(2).all()  # also of the queries that are only padding


# ---------------------------------------------------------------------------------------------------------------------------------------
# The same results as sdpa

ARCHITECTURES = {  # with one scale of the scores: another would be another kernel
    "llama": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1},
    "gemma3_text": {
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_results_equal_those_of_sdpa(architecture):
    """Log-probs of rollouts and documents and features, over three blocks; rollouts, whose keys fill two."""
    model = tiny_flex(architecture, max_position_embeddings=512, **ARCHITECTURES[architecture])
    found, (documents, segments, rollouts, anchors, valid), middle = {}, long_example(), middle_example()
    decode = (middle[0], middle[1], middle[3], middle[4], 0.6, uniforms_for(middle[3]))
    for implementation in ("strided_sdpa", "strided_flex"):
        network = FeatureNetwork(with_attention(model, implementation).get_decoder(), [1, 2])
        with torch.no_grad():
            packed, document = strided_logprobs(model, documents, segments, rollouts, anchors, valid, 0.6, False)
        features, truth = strided_features(network, documents, segments, rollouts, anchors, valid, "mean_pooling")
        found[implementation] = (
            packed[valid],
            document,
            features[valid],
            truth[valid],
            generate_rollouts(model, *decode)[middle[4]],
        )
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    tokens = found["strided_flex"][-1]
    assert len(tokens.flatten(0, 1).unique(dim=0)) > 12 and found["strided_flex"][0].std() > 0.3


def test_results_under_autocast_equal_those_of_sdpa(monkeypatch):
    """Autocast rounds for sdpa and not for FlexAttention, which gets float32 queries beside bfloat16 values and refuses them."""
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
    for implementation in ("strided_sdpa", "strided_flex"):
        with_attention(model, implementation)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            packed, document = strided_logprobs(model, documents, segments, rollouts, anchors, valid, 0.6, False)
            written = generate_rollouts(
                model, documents, segments, anchors, valid, 0.6, uniforms_for(anchors), kept=kept
            )[valid]
        found[implementation] = packed[valid], document, written
    assert {
        tensor.dtype for cache, _ in kept.values() for layer in cache.layers for tensor in (layer.keys, layer.values)
    } == {torch.bfloat16}  # no room for twice of it
    assert given == {(torch.float32, torch.bfloat16)} and passed == {(torch.bfloat16,) * 3}
    (packed, document, written), (expected, expected_document, expected_written) = (
        found["strided_flex"],
        found["strided_sdpa"],
    )
    assert (packed - expected).abs().mean() < 0.02 and (document - expected_document).abs().mean() < 0.02
    assert (written == expected_written).double().mean() > 0.8


def test_the_cache_is_kept_and_holds_nothing_of_the_last_document():
    """Guards against new memory in each generation (a CUDA graph would read the old), and against keys that an earlier one has left."""
    model, kept = tiny_flex(), {}
    addresses = []
    for seed in (1, 2):
        documents, segments, _, anchors, valid = short_example(seed)
        inputs = documents, segments, anchors, valid, 0.6, uniforms_for(anchors, seed=seed)
        assert torch.equal(generate_rollouts(model, *inputs, kept=kept), generate_rollouts(model, *inputs))
        ((cache, first),) = kept.values()
        addresses.append(
            [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)] + [first.data_ptr()]
        )
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
        expected, expected_bare = (
            with_attention(model, "sdpa")(ids, attention_mask=given).logits for given in (mask, None)
        )
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(bare, expected_bare, atol=1e-6, rtol=0)
    if side == "left":
        assert (found[1, 4:] - bare[1, 4:]).abs().max() > 0.1
    assert compiled() == 0


# ---------------------------------------------------------------------------------------------------------------------------------------
# Compiled once


def random_batch(generator: torch.Generator, num_anchors: int, longest: int):
    """Packed documents of random lengths, anchors and validity."""
    first, second = (int(torch.randint(3, longest // 2 + 1, (), generator=generator)) for _ in range(2))
    segments = rows_of(
        [first, second],
        [longest - int(torch.randint(0, 3, (), generator=generator))],
        length=max(longest, first + second),
    )
    anchors = torch.randint(0, min(first, second), (2, num_anchors), generator=generator)
    return example(segments, anchors.tolist(), seed=longest)


def run(model, batch) -> int:
    """The training forward, without gradients; returns its packed tokens."""
    documents, segments, rollouts, anchors, valid = batch
    with torch.no_grad():
        strided_logprobs(model, *batch, 0.6, False)
    return documents.shape[1] + anchors.shape[1] * NUM_SAMPLES * (NUM_GENERATED - 1)


def test_as_many_graphs_as_padded_shapes(compiled):
    """Guards against a kernel for each length, which is minutes a step, and after a few the whole matrix of scores; or one for each mask, mode or decoding step."""
    model, generator = tiny_flex(max_position_embeddings=512), torch.Generator().manual_seed(0)
    settings = [(num_anchors, longest) for num_anchors in (1, 2, 4, 7) for longest in (20, 41, 60, 150, 180, 297)]
    lengths = {run(model, random_batch(generator, *setting)) for setting in settings}
    assert len(lengths) > 20 and len({-(-length // 128) for length in lengths}) == 3
    assert compiled() == 3
    for setting in settings:  # other anchors, validity and packed ends
        run(model, random_batch(generator, *setting))
    run(model.train(), random_batch(generator, 2, 41))
    assert compiled() == 0
    documents, segments, _, anchors, valid = middle_example()
    written = generate_rollouts(model.eval(), documents, segments, anchors, valid, 0.6, uniforms_for(anchors, 10))
    assert compiled() == 1 and written.shape[-1] == 10  # one for nine steps; the document's own there was already
    documents, segments, _, anchors, valid = example(
        rows_of([80], [30, 52], length=99), [[4, 30, 66, 0], [5, 20, 33, 70]], seed=2
    )
    generate_rollouts(model.train(), documents, segments, anchors, valid, 0.6, uniforms_for(anchors, 10))
    assert compiled() == 0


def test_a_length_that_needs_no_padding_is_no_shape_of_its_own(compiled):
    """Sequences of 1024 tokens are common."""
    model = tiny_flex()
    for length in (100, 128):
        run(model, example(rows_of([length - 9], [length - 9], length=length - 9), [[4], [5]]))
    assert compiled() == 1


def test_one_shape_too_many_is_an_error(compiled):
    """FlexAttention by itself would go on without its kernel, with the whole matrix of scores."""
    assert min(torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit) >= 1024
    model = tiny_flex()
    run(model, short_example())
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        run(model, long_example())
    assert compiled() == 1


def test_few_shapes_change_no_rollout():
    """Documents are padded and anchors filled up for a compiled step; also where generation ends early."""
    model = with_attention(tiny_model(num_hidden_layers=2), "strided_sdpa")
    shapes = []

    def spy(model, documents, segments, anchors, valid, temperature, uniforms, **others):
        shapes.append((documents.shape[1], segments.shape[1], anchors.shape[1], valid.shape[1], uniforms.shape[1]))
        return generate_rollouts(model, documents, segments, anchors, valid, temperature, uniforms, **others)

    for num_anchors, slots in ((3, 3), (9, 12), (11, 12), (17, 24)):
        documents, segments, _, anchors, valid = example(
            rows_of([60, 40], [88], length=104),
            [[3 + index for index in range(num_anchors)], [*range(2, 1 + num_anchors), 0]],
        )
        inputs = documents, segments, anchors, valid, 0.6, uniforms_for(anchors)
        for stop_ids in (None, torch.arange(30, 300)):
            expected, found = (
                generate_rollouts(model, *inputs, stop_ids=stop_ids),
                in_few_shapes(spy, model, *inputs, stop_ids=stop_ids),
            )
            steps = min(expected.shape[-1], found.shape[-1])
            assert found.shape[1] == num_anchors and torch.equal(
                found[valid][..., :steps], expected[valid][..., :steps]
            )
            assert steps == NUM_GENERATED or stop_ids is not None
        assert shapes[-1] == (128, 128, slots, slots, slots)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_compiled_decoding_writes_the_same_rollouts(compiled, lora):
    """Guards against a step that is compiled anew for each document, mode, or adapter switch, or that keeps the weights it was compiled with."""
    model = with_attention(tiny_model(num_hidden_layers=1), "strided_flex")
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    compiling, plain = StridedPolicy(model, compile_decoding=True).train(), StridedPolicy(model)

    def both(*example) -> torch.Tensor:
        documents, segments, _, anchors, valid = example
        inputs = dict(
            document_ids=documents,
            segment_ids=segments,
            anchors=anchors,
            valid=valid,
            temperature=0.6,
            uniforms=uniforms_for(anchors),
        )
        expected = plain.generate(**inputs)
        compiled()
        found = compiling.generate(**inputs)
        assert torch.equal(found[valid], expected[valid])
        return found

    before = both(*short_example())
    assert compiled() == 1  # the step; what reads the document there was already
    kept = compiling.kept[2, 256][0].layers[0].keys.data_ptr()
    assert torch.equal(both(*short_example()), before)
    both(*example(rows_of([70], [40, 20], length=70), [[4, 12, 0], [5, 17, 44]], seed=2))
    compiling.eval()
    if lora:
        with model.disable_adapter():
            pass
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(both(*short_example()), before)
    assert compiled() == 0 and compiling.kept[2, 256][0].layers[0].keys.data_ptr() == kept


# ---------------------------------------------------------------------------------------------------------------------------------------
# Where it runs


def test_training_with_it_on_the_cpu_is_refused(refused, write_config):
    """Guards against an error out of the backward pass of the first step."""
    message = refused("--cfg", write_config(model__attn_implementation="flex_attention"))
    assert_holds(message, "model.attn_implementation", "flex_attention", "on cpu", "no backward pass", "set it to sdpa")


def test_evaluation_with_it_on_the_cpu_equals_sdpa(train, compiled, capsys):
    """The whole program: features, rollouts and cross-entropy."""
    found = {}
    for implementation in ("sdpa", "flex_attention"):
        changes = dict(
            ebft__stride=8,
            eval__only=True,
            eval__num_documents=4,
            eval__per_device_batch_size=2,
            model__attn_implementation=implementation,
        )
        found[implementation] = json.loads((train(implementation, **changes) / "eval.json").read_text())
        assert (
            f"attention: {'sdpa in blocks' if implementation == 'sdpa' else implementation}" in capsys.readouterr().out
        )
        assert compiled() == (0 if implementation == "sdpa" else 2)  # one to prove the kernel, one for all forwards
    assert len(found["sdpa"]) > 12 and found["flex_attention"] == pytest.approx(found["sdpa"], abs=1e-4)


@pytest.mark.parametrize(
    "asked, expected, printed",
    [
        ("auto", "strided_sdpa", "sdpa in blocks"),
        ("sdpa", "strided_sdpa", "sdpa in blocks"),
        ("eager", "eager", "eager"),
    ],
)
def test_the_others_are_what_they_say(train, plain_descent, write_config, capsys, asked, expected, printed):
    """Guards against an attention that trains something else, and a setting that is read and then ignored. auto on the CPU is sdpa."""
    changes = dict(train__max_steps=2, train__learning_rate=0.1, ebft__ce_coef=0.3, model__attn_implementation=asked)
    for only in (True, False):
        model = with_attention(tiny_model(), "strided_sdpa")
        set_attention(load_config(str(write_config(**changes, eval__only=only))), model, torch.device("cpu"))
        assert (
            model.config._attn_implementation == model.get_decoder().config._attn_implementation == expected
            and capsys.readouterr().out == ""
        )
    folder = train("asked", **changes)
    assert f"attention: {printed}\n" in capsys.readouterr().out
    assert training(folder)[0]["train/grad_norm"] > 0.1
    assert_same_weights(
        weights(folder), weights(train("sdpa", **{**changes, "model__attn_implementation": "sdpa"})), tolerance=1e-5
    )


def test_where_it_cannot_run(monkeypatch):
    """Each reason is named, and the nearest case that can is none."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, version, width, device, backward, words in [
        ((8, 0), "2.7.0", 256, cuda, True, None),
        ((9, 0), "2.13.0+cu130", 16, cuda, False, None),
        ((9, 0), "2.13.0+cu130", 8, cuda, False, ["8 wide", "16 to 256"]),
        ((7, 5), "2.13.0", 64, cuda, True, ["Tesla T4", "7.5", "8.0"]),
        ((8, 0), "2.6.1+cu124", 64, cuda, True, ["torch 2.6.1+cu124", "2.7"]),
        ((8, 0), "2.13.0", 512, cuda, True, ["512", "256"]),
        (None, "2.13.0", 8, cpu, False, None),
        (None, "2.13.0", 512, cpu, False, ["512", "256"]),
        (None, "2.13.0", 64, cpu, True, ["no backward pass on the CPU"]),
        (None, "2.13.0", 64, torch.device("mps"), True, ["mps"]),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(torch, "__version__", version)
        reason = flex.why_not_flex(width, device, backward)
        if words is None:
            assert reason is None
        else:
            assert_holds(reason, *words)


def dense_attention(query, key, value, *, block_mask, scale, enable_gqa):
    """What FlexAttention computes, with a backward pass on any device: the mask on all cells, then plain sdpa."""
    row, index, keys = (
        torch.arange(size, device=query.device) for size in (query.shape[0], query.shape[2], key.shape[2])
    )
    mask = block_mask.mask_mod(row[:, None, None], None, index[:, None], keys[None]).expand(len(row), -1, -1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale, enable_gqa=enable_gqa)


def without_mask(query, key, value, *, block_mask, scale, enable_gqa):
    return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)


def without_gradient_of_keys(query, key, value, **others):
    return dense_attention(query, key.detach(), value, **others) + 0 * key.sum()


def raising(*_, **__):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def test_a_wrong_kernel_is_found(monkeypatch):
    """Guards against a kernel that compiles and computes something else: outputs, gradients, NaN; and against an accusation of one that is right."""
    cpu = torch.device("cpu")
    assert flex.prove_flex_attention(4, 2, 8, torch.float32, cpu, False) is None  # the real one
    assert flex.prove_flex_attention(4, 4, 8, torch.bfloat16, cpu, False) is None
    for attend, backward, words in [
        (dense_attention, True, None),
        (without_mask, True, "differs from sdpa"),
        (without_mask, False, "differs from sdpa"),
        (without_gradient_of_keys, False, None),
        (without_gradient_of_keys, True, "differs from sdpa"),
        (lambda *inputs, **others: dense_attention(*inputs, **others) * torch.nan, False, "differs from sdpa"),
        (raising, False, "RuntimeError: no kernel image is available"),
    ]:
        monkeypatch.setattr(flex, "_compiled_flex_attention", attend)
        found = flex.prove_flex_attention(4, 2, 8, torch.float32, cpu, backward)
        assert found is None if words is None else words in found


def test_a_kernel_with_nan_in_a_gradient_alone_is_found(monkeypatch):
    """The outputs are right; FlexAttention has had such gradients."""

    def attend(query, key, value, **others):
        key.register_hook(lambda gradient: gradient * torch.nan)
        return dense_attention(query, key, value, **others)

    monkeypatch.setattr(flex, "_compiled_flex_attention", attend)
    assert flex.prove_flex_attention(4, 2, 8, torch.float32, torch.device("cpu"), True) is not None


@pytest.mark.parametrize(
    "why_not, proof", [("it is too old", None), (None, "it differs from sdpa on this device by 0.7")]
)
def test_what_happens_on_a_gpu_where_it_cannot_run(monkeypatch, write_config, capsys, why_not, proof):
    """auto falls back to sdpa and says so; who asked for it, or for compiled decoding, is refused."""
    monkeypatch.setattr(models, "why_not_flex", lambda *_: why_not)
    monkeypatch.setattr(models, "prove_flex_attention", lambda *_: proof)
    model, cuda = with_attention(tiny_model(), "strided_sdpa"), torch.device("cuda")
    set_attention(load_config(str(write_config())), model, cuda)
    assert (
        model.config._attn_implementation == "strided_sdpa" and capsys.readouterr().out == ""
    )  # in float32 it is not even tried
    set_attention(load_config(str(write_config(model__dtype="bfloat16"))), model, cuda)
    assert model.config._attn_implementation == "strided_sdpa"
    assert_holds(
        capsys.readouterr().out,
        "model.attn_implementation",
        "auto takes sdpa",
        "flex_attention cannot run",
        why_not or proof,
    )
    for asked, compile_decoding in (("flex_attention", False), ("flex_attention", True), ("auto", True)):
        config = load_config(
            str(
                write_config(
                    model__attn_implementation=asked,
                    model__compile_decoding=compile_decoding,
                    model__dtype="bfloat16",
                    lora={"r": 2},
                )
            )
        )
        with pytest.raises(UserError) as caught:
            set_attention(config, model, cuda)
        key, remedy = (
            ("model.compile_decoding", "leave it out")
            if asked == "auto"
            else ("model.attn_implementation", "set it to sdpa")
        )
        assert_holds(str(caught.value), key, "flex_attention", "cannot run on cuda", why_not or proof, remedy)
    assert model.config._attn_implementation == "strided_sdpa"


@pytest.mark.parametrize(
    "model_type, changes, heads, width",
    [
        ("llama", {"head_dim": 16}, (4, 2), 16),
        ("gpt_neox", {"num_key_value_heads": None, "head_dim": None}, (4, 4), 8),
        ("gemma3_text", {"query_pre_attn_scalar": 8, "num_key_value_heads": 1}, (4, 1), 8),
    ],
)
def test_the_model_s_own_heads_are_tried(monkeypatch, write_config, model_type, changes, heads, width):
    """Guards against a proof with other heads than the model's, or without the gradients that training needs."""
    seen = []
    monkeypatch.setattr(models, "why_not_flex", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(models, "prove_flex_attention", lambda *arguments: seen.append(arguments))
    for only in (False, True):
        for lora in (False, True):
            model, cuda = with_attention(tiny_model(model_type, **changes), "strided_sdpa"), torch.device("cuda", 1)
            policy = (
                get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
                if lora
                else model
            )
            set_attention(load_config(str(write_config(eval__only=only, model__dtype="bfloat16"))), policy, cuda)
            assert model.get_decoder().config._attn_implementation == "strided_flex"
            assert seen[-2:] == [(width, cuda, not only), (*heads, width, torch.bfloat16, cuda, not only)]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__attn_implementation": "sdpa"}, ["needs flex_attention", "model.attn_implementation is sdpa"]),
        ({"model__attn_implementation": "eager"}, ["needs flex_attention", "model.attn_implementation is eager"]),
        ({}, ["needs flex_attention", "auto takes sdpa on cpu", "leave it out"]),
        ({"model__dtype": "bfloat16"}, ["full fine-tuning in bfloat16", "every float32 weight"]),
    ],
)
def test_compiled_decoding_without_it_is_refused(refused, write_config, changes, words):
    """Guards against a setting that quietly does nothing."""
    assert_holds(
        refused("--cfg", write_config(model__compile_decoding=True, **changes)), "model.compile_decoding", *words
    )


@pytest.mark.parametrize("compile_decoding", [False, True])
def test_compiled_decoding_under_fsdp2_is_refused(monkeypatch, write_config, compile_decoding):
    """Guards against a step that is compiled around weights which are gathered and freed."""
    plugin = SimpleNamespace(mixed_precision_policy=None)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        device=torch.device("cpu"),
        num_processes=1,
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: accelerator)
    for name, value in (
        ("ACCELERATE_USE_FSDP", "true"),
        ("FSDP_VERSION", "2"),
        ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
    ):
        monkeypatch.setenv(name, value)
    config = load_config(str(write_config(model__compile_decoding=compile_decoding)))
    if not compile_decoding:
        assert distributed.prepare_accelerator(config) is accelerator
        return
    with pytest.raises(UserError) as caught:
        distributed.prepare_accelerator(config)
    assert_holds(str(caught.value), "model.compile_decoding", "FSDP2", "leave it out")


# ---------------------------------------------------------------------------------------------------------------------------------------
# On a GPU


GEOMETRIES = {"short": short_example, "middle": middle_example, "long": long_example}


@needs_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_outputs_and_gradients_on_a_gpu(geometry, dtype, tolerance):
    """Lengths that are no multiple of 128, two rows, packed documents, invalid anchors; against float64 and the dense mask."""
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
    expected = scaled_dot_product_attention(exact[0], *repeated, attn_mask=dense_mask(layout), scale=0.2).transpose(
        1, 2
    )
    weight = weight.transpose(1, 2)
    gradients = torch.autograd.grad((found * weight).sum(), (query, key, value))
    expected_gradients = torch.autograd.grad((expected * weight.double()).sum(), exact)
    for one, other in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert one.isfinite().all() and (one.double() - other).norm() <= tolerance * other.norm()


@needs_gpu
def test_checkpointing_on_a_gpu():
    """Guards against layers that are recomputed with another kernel, or another mask."""
    gradients = []
    for implementation, checkpointing in (("strided_sdpa", False), ("strided_flex", False), ("strided_flex", True)):
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


@needs_gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"model__compile_decoding": True}, {"model__gradient_checkpointing": True}, {"lora": {"r": 4}}],
    ids=str,
)
def test_one_training_step_on_a_gpu_equals_that_of_sdpa(train, plain_descent, monkeypatch, capsys, tmp_path, changes):
    """The whole program, with rollouts, features and an update."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    tiny_model(head_dim=16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    common = dict(
        train__max_steps=1, train__learning_rate=0.1, ebft__ce_coef=0.3, model__name_or_path=str(tmp_path / "model")
    )
    sdpa = train(
        "sdpa", **{**common, **changes, "model__compile_decoding": False, "model__attn_implementation": "sdpa"}
    )
    found = train("flex", **{**common, **changes, "model__attn_implementation": "flex_attention"})
    assert "1 process on cuda" in (printed := capsys.readouterr().out) and "attention: flex_attention" in printed
    assert (
        training(found)[0] == pytest.approx(training(sdpa)[0], rel=1e-3, abs=1e-3)
        and training(found)[0]["train/grad_norm"] > 0.1
    )
    assert_same_weights(weights(found), weights(sdpa), tolerance=1e-4)
