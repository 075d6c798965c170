"""Structured mode's other layout: a row of its own for each completion. It asks a model for nothing but causality.

    row of a completion:  [ prompt | completion | padding ]

Recurrent layers carry a state through every token, and some models have an attention that takes no mask of ours. Their
completions cannot share a row, so the prompt is read once for each of them. Padding stands on the right, where a
causal model's tokens never see it. Positions count from 0, as they do without being given.

Axis legend: B prompts, N completions of a prompt, S tokens of prompt + truth (right-padded), G tokens of a completion
(right-padded), W tokens of a row, R = B*N rows, H hidden width, V vocabulary.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .architecture import decoder_of, head_of
from .decoding import draw, evaluation_mode
from .losses import token_logprobs


def completion_rows(
    document_ids: Tensor, prompt_lengths: Tensor, completions: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of prompt + completion, and what in them is a token.

    Args: document_ids (B, S), which begin with the prompts; prompt_lengths (B); completions (B, N, G); lengths (B, N).
    Returns: tokens and mask, (B, N, W), W = longest prompt + G. Padding repeats other tokens.
    """
    num_generated = completions.shape[-1]
    index = torch.arange(int(prompt_lengths.max()) + num_generated, device=document_ids.device)
    step = index - prompt_lengths.unsqueeze(-1)  # (B, W)
    prompt = document_ids[:, index.clamp_max(document_ids.shape[1] - 1)]
    own = completions.gather(-1, step.clamp(0, num_generated - 1).unsqueeze(1).expand(-1, completions.shape[1], -1))
    tokens = torch.where((step < 0).unsqueeze(1), prompt.unsqueeze(1), own)
    return tokens, step.unsqueeze(1) < lengths.unsqueeze(-1)


def rows_logprobs(
    model: PreTrainedModel,
    document_ids: Tensor,
    segment_ids: Tensor,
    rollouts: Tensor | None,
    anchors: Tensor,
    valid: Tensor,
    temperature: float,
    document_grad: bool | None,
) -> tuple[Tensor | None, Tensor | None]:
    """`strided.strided_logprobs` for a single anchor, at the prompt's end: the same arguments and results.

    Naive: for each (b, n) run the model on cat(prompt, completion) and read the log-prob of token t at its left
    neighbour. Completions and documents are two forwards, because often only the first needs a gradient.

    Args: document_ids, segment_ids (B, S); rollouts (B, 1, N, G) or None; anchors (B, 1), all valid.
    """
    decoder, head, length = decoder_of(model), head_of(model), document_ids.shape[1]
    rollout_logps = document_logps = None
    if rollouts is not None:
        batch, _, num_samples, num_generated = rollouts.shape
        lengths = torch.full((batch, num_samples), num_generated - 1, device=rollouts.device)
        tokens, is_token = completion_rows(document_ids, anchors[:, 0], rollouts[:, 0], lengths)
        # the last token predicts nothing
        tokens, mask = tokens[..., :-1].flatten(0, 1), is_token[..., :-1].flatten(0, 1).long()
        hidden = decoder(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        predictors = anchors - 1 + torch.arange(num_generated, device=anchors.device)  # (B, G)
        predictors = predictors.repeat_interleave(num_samples, dim=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, predictors).view(batch, 1, num_samples, num_generated, -1)
        rollout_logps = token_logprobs(hidden, head, rollouts, temperature)
    if document_grad is not None:
        with torch.set_grad_enabled(document_grad and torch.is_grad_enabled()):
            mask = (segment_ids >= 0).long()
            hidden = decoder(input_ids=document_ids, attention_mask=mask, use_cache=False).last_hidden_state
            document_logps = token_logprobs(hidden[:, : length - 1], head, document_ids[:, 1:], 1.0)
    return rollout_logps, document_logps


class _Draw(LogitsProcessor):
    """Leaves each row the one token that its uniform number draws from softmax(logits / temperature)."""

    def __init__(self, prompt_length: int, temperature: float, uniforms: Tensor):
        self.prompt_length, self.temperature, self.uniforms = prompt_length, temperature, uniforms

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None]
        drawn = draw(scores.float(), self.temperature, numbers)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


@torch.no_grad()
def generate_rows(
    model: PreTrainedModel,
    document_ids: Tensor,
    segment_ids: Tensor,
    anchors: Tensor,
    valid: Tensor,
    temperature: float,
    uniforms: Tensor,
    stop_ids: Tensor | None = None,
) -> Tensor:
    """`decoding.generate_rollouts` for a single anchor, with the model's own cache: the same arguments and result.

    Prompts of one length are written together, each N times side by side: nothing is padded before a completion, where
    a recurrent layer would read it.

    Args: document_ids, segment_ids (B, S); anchors (B, 1), all valid; uniforms (B, 1, N, G).
    Returns: (B, 1, N, G) token ids; fewer than G when all completions have ended before. Tokens behind a stop token
        mean nothing.
    """
    batch, _, num_samples, num_generated = uniforms.shape
    stops = None if stop_ids is None else stop_ids.tolist()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=num_generated, eos_token_id=stops, pad_token_id=stops[0] if stops else 0
    )
    written, longest = uniforms.new_zeros(batch, num_samples, num_generated, dtype=torch.long), 0
    with evaluation_mode(model), _no_settings_of_its_own(model):
        for length in anchors.unique().tolist():
            rows = (anchors[:, 0] == length).nonzero()[:, 0]
            prompts = document_ids[rows, :length].repeat_interleave(num_samples, dim=0)
            processor = _Draw(length, temperature, uniforms[rows, 0].flatten(0, 1))
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=settings,
                logits_processor=LogitsProcessorList([processor]),
            )[:, length:]
            written[rows, :, : tokens.shape[1]] = tokens.view(len(rows), num_samples, -1)
            if stops and tokens.shape[1] < num_generated:  # all of these have ended
                written[rows, :, tokens.shape[1] :] = stops[0]
            longest = max(longest, tokens.shape[1])
    return written[:, None, :, :longest]


@contextmanager
def _no_settings_of_its_own(model: PreTrainedModel):
    """Takes a model's generation config away: a penalty or a minimum length in it would change what is sampled."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
