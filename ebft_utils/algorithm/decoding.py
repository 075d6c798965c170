"""Rollouts from the policy, all anchors at once: the document is prefilled once, then each step adds a token to each.

Axis legend: as in strided.py (B rows, S document tokens, A anchors, N rollouts at an anchor, G tokens of a rollout, H
hidden width, V vocabulary); M positions that are sampled from.

While decoding, the layout is step-major (G, A, N): each step appends one token of every rollout to the KV cache. The LM
head runs only on the positions that are sampled from. The only loops run over the G steps and over chunks of fixed
size.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel

from .architecture import Head, decoder_of, head_of
from .flex import STRIDED_FLEX, padded_length, static_cache
from .losses import head_logits, rows_per_chunk
from .strided import Layout, attention_arguments, pack_layout

# ----------------------------------------------------------------------------------------------------------------------
# One step


def sample_tokens(hidden: Tensor, head: Head, temperature: float, uniforms: Tensor) -> Tensor:
    """Draws tokens from softmax(logits / temperature) by inverting its distribution function.

    The uniform numbers are given, not drawn here: a rollout depends on the seed, the step and the example, not on the
    process that happens to run it.

    Args: hidden (M, H); uniforms (M, N) in [0, 1). Returns (M, N) token ids.
    """
    tokens, num_rows = [], rows_per_chunk(head.weight.shape[0])
    for rows, numbers in zip(hidden.split(num_rows), uniforms.split(num_rows), strict=True):
        tokens.append(draw(head_logits(rows, head), temperature, numbers))
    return torch.cat(tokens)


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """The tokens at the given places of the distribution function. Logits (M, V), uniforms (M, N) -> (M, N)."""
    cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms.double() * cumulative[:, -1:], right=True)
    return drawn.clamp_max(logits.shape[-1] - 1)


def decode_step(
    decoder: PreTrainedModel,
    head: Head,
    tokens: Tensor,
    position_ids: Tensor,
    cache: Cache,
    attention: dict,
    temperature: float,
    uniforms: Tensor,
) -> Tensor:
    """The next token of each rollout.

    Args:
        tokens, position_ids (B, A*N): the newest tokens of the rollouts; uniforms (B, A*N).
        attention: attention arguments of the decoder.
    Returns: (B, A*N) token ids.
    """
    output = decoder(input_ids=tokens, position_ids=position_ids, past_key_values=cache, use_cache=True, **attention)
    hidden = output.last_hidden_state.flatten(0, 1)
    drawn = sample_tokens(hidden, head, temperature, uniforms.reshape(-1, 1))
    return drawn.view_as(tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts


@contextmanager
def evaluation_mode(module: torch.nn.Module):
    """Evaluation mode inside; afterwards each submodule has its own mode again."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


@torch.no_grad()
def generate_rollouts(
    model: PreTrainedModel,
    document_ids: Tensor,
    segment_ids: Tensor,
    anchors: Tensor,
    valid: Tensor,
    temperature: float,
    uniforms: Tensor,
    stop_ids: Tensor | None = None,
    decode=decode_step,
    kept: dict | None = None,
) -> Tensor:
    """N rollouts of G tokens at every anchor: one prefill of the document, then each step feeds the newest A*N tokens.

    With FlexAttention, keys and values have their places from the start and every step has the same shapes: only the
    mask says how far decoding is. Without stop_ids nothing waits for the device.
    Runs in eval mode (in train mode, gradient checkpointing empties the cache) and restores the mode.

    Args:
        document_ids, segment_ids (B, S); anchors, valid (B, A).
        uniforms (B, A, N, G) in [0, 1): one number for each sampled token.
        stop_ids: tokens that end a rollout. Tokens behind one mean nothing; generation ends when each rollout has one.
        decode: `decode_step`, or a compiled one.
        kept: holds FlexAttention's keys and values for the next call, at the same addresses.
    Returns: (B, A, N, G) token ids; fewer than G when all rollouts have ended before.
    """
    decoder, head = decoder_of(model), head_of(model)
    batch, length = document_ids.shape
    _, num_anchors, num_samples, num_generated = uniforms.shape
    num_newest = num_anchors * num_samples
    static = decoder.config._attn_implementation == STRIDED_FLEX
    with evaluation_mode(model):
        if static:
            layout = pack_layout(segment_ids, anchors, valid, num_samples, num_generated - 1, step_major=True)
            num_keys = padded_length(length + (num_generated - 1) * num_newest)
            num_layers, kept = decoder.config.num_hidden_layers, {} if kept is None else kept
            cache, first = static_cache(num_layers, batch, num_keys, document_ids.device, kept)
        else:
            # no config: a sliding layer would drop keys by count, and rollouts of one position share a count
            cache = DynamicCache()
        hidden = _prefill(decoder, document_ids, pack_layout(segment_ids, anchors, valid, num_samples, 0), cache)
        before_anchors = (anchors - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, before_anchors).flatten(0, 1)  # (B*A, H)
        drawn = sample_tokens(hidden, head, temperature, uniforms[..., 0].flatten(0, 1))
        tokens = [drawn.view(batch, -1)]  # of (B, A*N)
        running = torch.ones_like(tokens[0], dtype=torch.bool)
        for step in range(1, num_generated):
            if stop_ids is not None:
                running &= ~torch.isin(tokens[-1], stop_ids)
                if not running.any():
                    break
            if static:
                start = length + (step - 1) * num_newest
                first.fill_(start)
                newest = slice(start, start + num_newest)
                where = {"num_steps": num_generated - 1, "num_keys": num_keys, "first_query": first}
            else:
                layout = pack_layout(segment_ids, anchors, valid, num_samples, step, step_major=True)
                newest, where = slice(-num_newest, None), {"num_steps": step}
            attention = attention_arguments(decoder, layout, **where)
            position_ids, numbers = layout.position_ids[:, newest], uniforms[..., step].flatten(1)
            drawn = decode(decoder, head, tokens[-1], position_ids, cache, attention, temperature, numbers)
            tokens.append(drawn.clone())  # a copy: the next run of a CUDA graph overwrites its result
    return torch.stack(tokens, dim=-1).view(batch, num_anchors, num_samples, -1)


def _prefill(decoder: PreTrainedModel, document_ids: Tensor, layout: Layout, cache: Cache) -> Tensor:
    """Runs the document and fills the cache with it. Returns the hidden states (B, S, H)."""
    output = decoder(
        input_ids=document_ids,
        position_ids=layout.position_ids,
        past_key_values=cache,
        use_cache=True,
        **attention_arguments(decoder, layout),
    )
    cached, length = cache.get_seq_length(), document_ids.shape[1]
    if cached != length:
        raise RuntimeError(f"the KV cache holds {cached} tokens after a prefill of {length}: the model does not cache")
    return output.last_hidden_state


def in_few_shapes(
    generate,
    model: PreTrainedModel,
    document_ids: Tensor,
    segment_ids: Tensor,
    anchors: Tensor,
    valid: Tensor,
    temperature: float,
    uniforms: Tensor,
    **others,
) -> Tensor:
    """`generate_rollouts` for a compiled decoding step, which is compiled once for each shape.

    Documents are padded, and anchors are filled up with invalid ones, so that few shapes occur. The result is the same
    as without.
    """
    behind, num_anchors = (0, padded_length(document_ids.shape[1]) - document_ids.shape[1]), anchors.shape[1]
    unit = 1 << max(0, (num_anchors - 1).bit_length() - 2)  # as in `padded_length`
    missing = -num_anchors % unit
    rollouts = generate(
        model,
        pad(document_ids, behind),
        pad(segment_ids, behind, value=-1),
        pad(anchors, (0, missing), value=1),
        pad(valid, (0, missing)),
        temperature,
        pad(uniforms, (0, 0, 0, 0, 0, missing)),
        **others,
    )
    return rollouts[:, :num_anchors]
