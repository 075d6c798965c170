"""How often FlexAttention and the decoding step are compiled, and that this changes no rollout."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ebft_utils.algorithm.decoding import generate_rollouts, in_few_shapes
from ebft_utils.algorithm.strided import strided_logprobs
from ebft_utils.models import Policy
from flex_cases import (
    NUM_GENERATED,
    NUM_SAMPLES,
    example,
    long_example,
    middle_example,
    rows_of,
    short_example,
    tiny_flex,
    uniforms_for,
)
from helpers import tiny_model
from strided_cases import with_attention


def random_batch(generator: torch.Generator, num_anchors: int, longest: int):
    """Packed documents of random lengths, anchors and validity."""
    first, second = (int(torch.randint(3, longest // 2 + 1, (), generator=generator)) for _ in range(2))
    alone = longest - int(torch.randint(0, 3, (), generator=generator))
    segments = rows_of([first, second], [alone], length=max(longest, first + second))
    anchors = torch.randint(0, min(first, second), (2, num_anchors), generator=generator)
    return example(segments, anchors.tolist(), seed=longest)


def run(model, batch) -> int:
    """The training forward, without gradients; returns its packed tokens."""
    documents, segments, rollouts, anchors, valid = batch
    with torch.no_grad():
        strided_logprobs(model, *batch, 0.6, False)
    return documents.shape[1] + anchors.shape[1] * NUM_SAMPLES * (NUM_GENERATED - 1)


def test_as_many_graphs_as_padded_shapes(compiled):
    """Guards against a kernel for each length, which takes minutes a step, or for each mask, mode or decoding step.

    After a few kernels FlexAttention would compute the whole matrix of scores.
    """
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
    rows, places = rows_of([80], [30, 52], length=99), [[4, 30, 66, 0], [5, 20, 33, 70]]
    documents, segments, _, anchors, valid = example(rows, places, seed=2)
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
    model = with_attention(tiny_model(num_hidden_layers=2), "strided_blocks")
    shapes = []

    def spy(model, documents, segments, anchors, valid, temperature, uniforms, **others):
        shapes.append((documents.shape[1], segments.shape[1], anchors.shape[1], valid.shape[1], uniforms.shape[1]))
        return generate_rollouts(model, documents, segments, anchors, valid, temperature, uniforms, **others)

    for num_anchors, slots in ((3, 3), (9, 12), (11, 12), (17, 24)):
        places = [[3 + index for index in range(num_anchors)], [*range(2, 1 + num_anchors), 0]]
        documents, segments, _, anchors, valid = example(rows_of([60, 40], [88], length=104), places)
        inputs = documents, segments, anchors, valid, 0.6, uniforms_for(anchors)
        for stop_ids in (None, torch.arange(30, 300)):
            expected = generate_rollouts(model, *inputs, stop_ids=stop_ids)
            found = in_few_shapes(spy, model, *inputs, stop_ids=stop_ids)
            steps = min(expected.shape[-1], found.shape[-1])
            assert found.shape[1] == num_anchors
            assert torch.equal(found[valid][..., :steps], expected[valid][..., :steps])
            assert steps == NUM_GENERATED or stop_ids is not None
        assert shapes[-1] == (128, 128, slots, slots, slots)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_compiled_decoding_writes_the_same_rollouts(compiled, lora):
    """Guards against a step that keeps the weights it was compiled with.

    It must not be compiled anew for each document, mode or adapter switch either.
    """
    model = with_attention(tiny_model(num_hidden_layers=1), "strided_flex")
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    compiling, plain = Policy(model, compile_decoding=True).train(), Policy(model)

    def both(*example) -> torch.Tensor:
        documents, segments, _, anchors, valid = example
        inputs = dict(document_ids=documents, segment_ids=segments, anchors=anchors, valid=valid)
        inputs |= dict(temperature=0.6, uniforms=uniforms_for(anchors))
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
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(both(*short_example()), before)
    assert compiled() == 0 and compiling.kept[2, 256][0].layers[0].keys.data_ptr() == kept
