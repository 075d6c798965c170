"""Rows with packed documents, anchors and rollouts for the tests of FlexAttention (tests/algorithm/test_flex*.py)."""

import pytest
import torch

from helpers import tiny_model
from strided_cases import with_attention

NUM_SAMPLES, NUM_GENERATED = 3, 4
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def tiny_flex(model_type: str = "llama", **changes):
    """A tiny model of two layers that attends with FlexAttention."""
    return with_attention(tiny_model(model_type, num_hidden_layers=2, **changes), "strided_flex")


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
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*anchors.shape, NUM_SAMPLES, num_generated, generator=generator, dtype=torch.float64)
