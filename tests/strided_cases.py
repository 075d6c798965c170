"""Small rows, models and forwards that the tests of the strided layout share."""

from types import SimpleNamespace

import torch

from ebft_utils.algorithm.architecture import Head

IMPLEMENTATIONS = ("strided_blocks", "sdpa", "eager")
ARCHITECTURES = {  # settings: sliding layers (where there are any) with a window that no document reaches
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    "mistral": {"sliding_window": 64},
    "gemma": {},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
# Row 0: two packed documents, padding, three anchors. Row 1: one document, padding, two anchors and an invalid slot.
SEGMENTS = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [0] * 14 + [-1] * 6])
ANCHORS = torch.tensor([[3, 6, 12], [3, 11, 1]])
VALID = torch.tensor([[True, True, True], [True, True, False]])
NUM_SAMPLES, NUM_GENERATED = 2, 3


def with_attention(model, implementation: str):
    model.set_attn_implementation(implementation)
    return model


def head_of_weights(weight: torch.Tensor, bias: torch.Tensor | None = None, **changes) -> Head:
    """A plain head of these tensors, (V, H) and (V)."""
    return Head(SimpleNamespace(weight=weight, bias=bias), **changes)


def random_tokens(*shape: int, seed: int = 1, vocabulary: int = 300) -> torch.Tensor:
    return torch.randint(2, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def next_token_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """(T) tokens -> (T, V) logits, an ordinary forward of one sequence, with transformers' own mask and positions."""
    return model(tokens[None], attention_mask=torch.ones(1, len(tokens), dtype=torch.long)).logits[0]


def document_start(segments: torch.Tensor, anchor: int) -> int:
    """Index of the first token of the document that holds token anchor - 1 of a row."""
    return int((segments == segments[anchor - 1]).nonzero()[0])


def padded_inputs():
    """Tokens, segments, rollouts, anchors, validity of SEGMENTS' two rows."""
    return random_tokens(2, 20), SEGMENTS, random_tokens(2, 3, NUM_SAMPLES, NUM_GENERATED, seed=2), ANCHORS, VALID
