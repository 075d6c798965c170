"""The strided layout: one document, many short rollouts, one forward.

Axis legend
    B  rows of the batch            S  document tokens of a row (right-padded)
    A  anchors of a row             N  rollouts (samples) at an anchor
    G  tokens of a rollout          L  packed tokens, S + A*N*G
    H  hidden width                 V  vocabulary

Packed order (anchor-major):  [ document | anchor 0: rollout 0 (G tokens), .., rollout N-1 | anchor 1: .. ]
    a document token sees its own document causally
    a rollout token sees its document before the anchor, and the earlier tokens of its own rollout, nothing else
    positions: an anchor a means "a document tokens are visible"; rollout token t has position (anchor + t), and it is predicted at document
    token a-1 (t = 0) or at its own token t-1. NOT at its left neighbour in the packed sequence, which can be another rollout.

Masks are bool, True = may attend / counts. Padding has segment id -1. Everything is tensor operations; the only loops run over the G decoding
steps and over chunks of fixed size.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel

from .attention import STRIDED_SDPA, Block, StridedBlocks
from .flex import STRIDED_FLEX, make_block_mask, padded_length, static_cache
from .losses import rows_per_chunk, token_logprobs
from .rewards import first_equal_rollout

QUERIES_PER_BLOCK = 256  # rollout tokens of one attention block: fewer means more calls, more means more empty cells


# ---------------------------------------------------------------------------------------------------------------------------------------
# Anchors


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Position of each token in its own document: restarts at 0 where the segment changes. (B, S) -> (B, S)."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def find_anchors(
    segment_ids: Tensor,
    completion_ids: Tensor,
    *,
    context_length: int,
    min_completion_prefix: int,
    stride: int,
    num_generated: int,
) -> tuple[Tensor, Tensor]:
    """Where rollouts start: in each completion at the first place with context_length tokens of the document and min_completion_prefix of the completion
    before it, and from there every stride tokens, as long as the window of G tokens fits into the completion.

    Raw text is one completion. A window that reaches into padding, into what is only read, or over a document's end is no group, so packing documents
    changes nothing about their groups.

    Args: segment_ids, completion_ids (B, S): the document that a token belongs to, and the completion; -1 for padding, and for what is only read.
    Returns anchors (B, A) and validity (B, A); A is the largest number in a row, invalid slots hold anchor 1.
    """
    batch, length = segment_ids.shape
    of_document, of_completion = segment_positions(segment_ids), segment_positions(completion_ids)
    first = (context_length - (of_document - of_completion)).clamp_min(
        min_completion_prefix
    )  # as a position in the completion
    window_end = torch.full_like(completion_ids, -1)  # the completion of the window's last token
    window_end[:, : length - num_generated + 1] = completion_ids[:, num_generated - 1 :]
    is_anchor = (
        (completion_ids >= 0)
        & (of_completion >= first)
        & ((of_completion - first) % stride == 0)
        & (window_end == completion_ids)
    )
    num_anchors = int(is_anchor.sum(1).max())
    order = is_anchor.int().argsort(dim=1, descending=True, stable=True)[:, :num_anchors]
    valid = is_anchor.gather(1, order)
    return torch.where(valid, order, 1), valid


def truth_windows(document_ids: Tensor, anchors: Tensor, num_generated: int) -> Tensor:
    """The ground truth of each anchor, tokens[a : a+G]. (B, S), (B, A) -> (B, A, G)."""
    index = anchors.unsqueeze(-1) + torch.arange(num_generated, device=anchors.device)
    return document_ids.gather(1, index.flatten(1)).view_as(index)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Layout and mask


@dataclass(frozen=True)
class Layout:
    """What each packed token is. All that masks and positions are made from.

    num_document: S.
    segment_ids  (B, L): the document that the token belongs to, -1 for padding.
    visible      (B, L): the token sees the document tokens of its segment before this index (document token s: s+1; rollout token: its anchor).
    rollout_ids  (L):    which rollout of the row, -1 for document tokens.
    steps        (L):    which token of its rollout, 0 for document tokens.
    position_ids (B, L).
    rollout_width: tokens of a rollout that stand side by side (G; 1 when step-major).
    """

    num_document: int
    segment_ids: Tensor
    visible: Tensor
    rollout_ids: Tensor
    steps: Tensor
    position_ids: Tensor
    rollout_width: int


def pack_layout(
    segment_ids: Tensor, anchors: Tensor, valid: Tensor, num_samples: int, num_generated: int, step_major: bool = False
) -> Layout:
    """Layout of a document with num_samples rollouts of num_generated tokens at each anchor.

    Rollouts at invalid anchors see nothing of the document. step_major: order (G, A, N) instead of (A, N, G), the order in which decoding appends them.

    Args: segment_ids (B, S); anchors, valid (B, A).
    """
    length, device = segment_ids.shape[1], segment_ids.device
    num_anchors = anchors.shape[1]
    index = torch.arange(length, device=device)
    positions = segment_positions(segment_ids)
    before_anchor = (anchors - 1).clamp_min(0)
    anchor_segment = torch.where(valid, segment_ids.gather(1, before_anchor), -1)
    anchor_position = positions.gather(1, before_anchor) + 1
    shape = (num_generated, num_anchors, num_samples) if step_major else (num_anchors, num_samples, num_generated)
    step_axis, anchor_axis = (0, 1) if step_major else (2, 0)
    steps = (
        torch.arange(num_generated, device=device)
        .view([-1 if axis == step_axis else 1 for axis in range(3)])
        .expand(shape)
        .flatten()
    )
    anchor_index = (
        torch.arange(num_anchors, device=device)
        .view([-1 if axis == anchor_axis else 1 for axis in range(3)])
        .expand(shape)
        .flatten()
    )
    rollout_ids = torch.arange(num_anchors * num_samples, device=device).view(num_anchors, num_samples)
    rollout_ids = (rollout_ids[None] if step_major else rollout_ids[..., None]).expand(shape).flatten()
    none = torch.full((length,), -1, device=device)
    return Layout(
        num_document=length,
        segment_ids=torch.cat([segment_ids, anchor_segment[:, anchor_index]], dim=1),
        visible=torch.cat(
            [torch.where(segment_ids >= 0, index + 1, 0), torch.where(valid, anchors, 0)[:, anchor_index]], dim=1
        ),
        rollout_ids=torch.cat([none, rollout_ids]),
        steps=torch.cat([torch.zeros_like(none), steps]),
        position_ids=torch.cat([positions, anchor_position[:, anchor_index] + steps], dim=1),
        rollout_width=1 if step_major else num_generated,
    )


def may_attend(layout: Layout, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """THE predicate: whether packed token `query` of batch row `row` sees packed token `key`. Index tensors, broadcast against each other.

    Every mask in the project is this function, evaluated on some grid of indices, or compiled into a kernel (so it reads nothing but tensors).
    """
    of_rollout = layout.rollout_ids[key] >= 0
    same_document = layout.segment_ids[row, query] == layout.segment_ids[row, key]
    document = ~of_rollout & same_document & (key < layout.visible[row, query])
    own_rollout = (
        of_rollout & (layout.rollout_ids[query] == layout.rollout_ids[key]) & (layout.steps[key] <= layout.steps[query])
    )
    return document | own_rollout | (query == key)  # the last: a row without a single True would be NaN


def mask_on_grid(layout: Layout, query: Tensor, key: Tensor) -> Tensor:
    """`may_attend` for queries (Q) and keys (K), index vectors. Returns (B, 1, Q, K) bool."""
    row = torch.arange(layout.segment_ids.shape[0], device=query.device)
    return may_attend(layout, row[:, None, None, None], query[None, None, :, None], key[None, None, None, :])


def dense_mask(layout: Layout) -> Tensor:
    """The whole (B, 1, L, L) mask: the slow and obvious form."""
    index = torch.arange(layout.segment_ids.shape[1], device=layout.segment_ids.device)
    return mask_on_grid(layout, index, index)


def strided_blocks(layout: Layout, *, document_queries: bool, num_steps: int = 1) -> StridedBlocks:
    """The same mask as blocks for `attention.strided_sdpa_forward`.

    num_steps: 1 for an anchor-major layout (or a document alone). While decoding with a step-major layout: steps so far, of which the queries
    are the last.
    """
    device, length = layout.segment_ids.device, layout.num_document
    index = torch.arange(length, device=device)
    document_mask = None
    if document_queries and bool((layout.segment_ids[:, :length] != 0).any()):
        document_mask = mask_on_grid(layout, index, index)
    # the prefix of a block: what its last anchor sees, in the row where that is longest
    num_rollout_tokens = (layout.segment_ids.shape[1] - length) // num_steps
    rollout_width = max(1, layout.rollout_width)
    width = max(1, QUERIES_PER_BLOCK // rollout_width) * rollout_width
    blocks = []
    for start in range(0, num_rollout_tokens, width):
        end = min(start + width, num_rollout_tokens)
        queries = torch.arange(
            length + (num_steps - 1) * num_rollout_tokens + start,
            length + (num_steps - 1) * num_rollout_tokens + end,
            device=device,
        )
        prefix = int(layout.visible[:, queries].max())
        step_start = length + torch.arange(num_steps, device=device)[:, None] * num_rollout_tokens
        own = (step_start + torch.arange(start, end, device=device)).flatten()
        blocks.append(Block(start, end, prefix, mask_on_grid(layout, queries, torch.cat([index[:prefix], own]))))
    return StridedBlocks(length, document_queries, document_mask, num_steps, tuple(blocks))


def block_mask(layout: Layout, num_queries: int, num_keys: int, first_query: Tensor | None = None) -> BlockMask:
    """The same mask for FlexAttention, for queries first_query, first_query + 1, .. (null: from 0) and all keys; both are padded (`flex.padded_length`).

    Args: num_keys: of which the layout describes the first L. Padding sees nothing but itself, and nobody sees it.
    """
    batch, length = layout.segment_ids.shape
    num_queries, num_keys = padded_length(num_queries), padded_length(num_keys)
    behind, device = (0, num_keys - length), layout.segment_ids.device
    padded = replace(
        layout,
        segment_ids=pad(layout.segment_ids, behind, value=-1),
        visible=pad(layout.visible, behind),
        rollout_ids=pad(layout.rollout_ids, behind, value=-1),
        steps=pad(layout.steps, behind),
    )
    # read by the kernel whenever it runs, also in the backward pass: the caller's may have moved on by then
    first = torch.zeros((), dtype=torch.long, device=device) if first_query is None else first_query.clone()
    last = torch.full((), num_keys - 1, device=device)

    def predicate(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(padded, row, torch.minimum(first + query, last), key)

    return make_block_mask(predicate, batch, num_queries, num_keys, device)


def attention_arguments(decoder: PreTrainedModel, layout: Layout) -> dict:
    """Keyword arguments that make `decoder` attend by `layout`, for the attention implementation it is set to.

    The mask is always given: with a mask of None, transformers reads jumping position ids as packed sequences and masks between them.
    """
    implementation = decoder.config._attn_implementation
    if implementation == STRIDED_SDPA:
        unused_mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=layout.segment_ids.device)
        return {"attention_mask": unused_mask, "strided_blocks": strided_blocks(layout, document_queries=True)}
    if implementation == STRIDED_FLEX:
        length = layout.segment_ids.shape[1]
        return {"attention_mask": block_mask(layout, length, length)}
    if implementation == "sdpa":
        return {"attention_mask": dense_mask(layout)}
    if implementation == "eager":  # adds its mask to the scores: a boolean one would be silently wrong
        mask = dense_mask(layout)
        return {
            "attention_mask": torch.zeros(mask.shape, dtype=decoder.dtype, device=mask.device).masked_fill_(
                ~mask, torch.finfo(decoder.dtype).min
            )
        }
    raise ValueError(
        f"attn_implementation {implementation!r} cannot take the strided mask; allowed: {STRIDED_SDPA}, {STRIDED_FLEX}, sdpa, eager"
    )


# ---------------------------------------------------------------------------------------------------------------------------------------
# Log-probs


def strided_logprobs(
    model: PreTrainedModel,
    document_ids: Tensor,
    segment_ids: Tensor,
    rollouts: Tensor | None,
    anchors: Tensor,
    valid: Tensor,
    temperature: float,
    document_grad: bool | None,
) -> tuple[Tensor | None, Tensor | None]:
    """One packed forward: log-probs of every rollout token (softmax(logits / temperature)) and of every document token (temperature 1).

    The last token of a rollout predicts nothing, so it is not run. Log-probs at invalid anchors mean nothing.

    Args:
        document_ids, segment_ids (B, S); rollouts (B, A, N, G) token ids, or None for the document alone; anchors, valid (B, A).
        document_grad: whether the document's log-probs carry a gradient (they need none when only rollouts are trained); None: they are not wanted.
    Returns: rollout log-probs (B, A, N, G) or None; document log-probs (B, S-1), entry s for token s+1, or None.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    batch, length = document_ids.shape
    packed_ids = document_ids
    num_samples, num_fed = 1, 0
    if rollouts is not None:
        _, num_anchors, num_samples, num_generated = rollouts.shape
        num_fed = num_generated - 1
        packed_ids = torch.cat([document_ids, rollouts[..., :-1].flatten(1)], dim=1)
    layout = pack_layout(segment_ids, anchors, valid, num_samples, num_fed)
    hidden = decoder(
        input_ids=packed_ids, position_ids=layout.position_ids, use_cache=False, **attention_arguments(decoder, layout)
    ).last_hidden_state  # (B, L, H)
    rollout_logps = None
    if rollouts is not None:
        first = hidden.gather(1, (anchors - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # (B, A, H)
        first = first[:, :, None, None].expand(-1, -1, num_samples, 1, -1)
        later = hidden[:, length:].view(batch, num_anchors, num_samples, num_fed, hidden.shape[-1])
        predictors = torch.cat([first, later], dim=3)
        rollout_logps = token_logprobs(predictors, head.weight, head.bias, rollouts, temperature)
    if document_grad is None:
        return rollout_logps, None
    with torch.set_grad_enabled(document_grad and torch.is_grad_enabled()):
        document_logps = token_logprobs(hidden[:, : length - 1], head.weight, head.bias, document_ids[:, 1:], 1.0)
    return rollout_logps, document_logps


def rollout_logprobs(
    model: PreTrainedModel, document_ids: Tensor, rollouts: Tensor, anchors: Tensor, temperature: float
) -> Tensor:
    """log softmax(logits / temperature) of each rollout token given the document before its anchor; whole documents, nothing padded.

    Naive: for each (b, a, n) run the model on cat(document[:anchor], rollout) and read the log-prob of rollout token t at position anchor+t-1.

    Args: model: a causal LM; document_ids (B, S) token ids; rollouts (B, A, N, G); anchors (B, A), 1 <= anchor <= S.
    Returns: (B, A, N, G), float32, differentiable.
    """
    segment_ids = torch.zeros_like(document_ids)
    valid = torch.ones_like(anchors, dtype=torch.bool)
    return strided_logprobs(
        model, document_ids, segment_ids, rollouts, anchors, valid, temperature, document_grad=None
    )[0]


# ---------------------------------------------------------------------------------------------------------------------------------------
# What need not be run, and what is run in parts


def rollouts_to_train(
    rollouts: Tensor, advantages: Tensor, anchors: Tensor, valid: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rollouts that the gradient depends on, each with an anchor slot of its own: (B, R, 1, G), their anchors (B, R), validity (B, R), advantages (B, R, 1).

    sum over rollouts of advantage * log-prob stays the same, exactly: rollouts of a group that consist of the same tokens have the same log-prob, and are
    run once with their advantages added; those whose advantages add up to nothing are left out. R is the largest number in a row, and at least 1; other
    rows have invalid slots.

    Args: rollouts (B, A, N, G); advantages (B, A, N); anchors, valid (B, A); scale: how large rewards are; sums of advantages up to 4e-6 of it are float32's rounding.
    """
    first = first_equal_rollout(rollouts)
    total = torch.zeros_like(advantages).scatter_add_(-1, first, advantages)  # of a copy: 0
    needed = (valid.unsqueeze(-1) & ~(total.abs() <= 4e-6 * scale)).flatten(
        1
    )  # a NaN is needed: it has to be seen in the loss
    order = needed.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(needed.sum(1).max()))]
    chosen = needed.gather(1, order)
    tokens = rollouts.flatten(1, 2).gather(1, order.unsqueeze(-1).expand(-1, -1, rollouts.shape[-1]))
    own_anchors = anchors.repeat_interleave(rollouts.shape[2], dim=1).gather(1, order)
    return (
        tokens.unsqueeze(2),
        torch.where(chosen, own_anchors, 1),
        chosen,
        torch.where(chosen, total.flatten(1).gather(1, order), 0.0).unsqueeze(-1),
    )


def number_of_parts(num_slots: int, tokens_per_slot: int, document_tokens: int, max_packed_tokens: int | None) -> int:
    """How many forwards it takes when the packed tokens of a row in each may be at most max_packed_tokens (None: no limit)."""
    if max_packed_tokens is None:
        return 1
    return max(1, -(-num_slots // ((max_packed_tokens - document_tokens) // tokens_per_slot)))


def in_parts(num_parts: int, anchors: Tensor, valid: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Cuts (B, A, ..) tensors into num_parts pieces of equally many anchor slots, the last ones filled up with invalid slots where A is no multiple."""
    size = max(1, -(-anchors.shape[1] // num_parts))
    missing = num_parts * size - anchors.shape[1]
    filled = [pad(anchors, (0, missing), value=1), pad(valid, (0, missing))]
    filled += [pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)) for tensor in others]
    return list(zip(*(tensor.split(size, dim=1) for tensor in filled), strict=True))


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
    """`generate_rollouts` for a compiled decoding step: documents padded, and anchors filled up with invalid ones, to one of a few numbers; the result is that without them."""
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


# ---------------------------------------------------------------------------------------------------------------------------------------
# Generation


def sample_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, uniforms: Tensor) -> Tensor:
    """Draws tokens from softmax((hidden W^T + b) / temperature) by inverting the distribution function at given uniform numbers.

    Given, not drawn here: a rollout then depends on the seed, the step and the example, and not on the process that happens to run it.

    Args: hidden (M, H); uniforms (M, N) in [0, 1). Returns (M, N) token ids.
    """
    tokens = []
    for rows, numbers in zip(
        hidden.split(rows_per_chunk(weight.shape[0])), uniforms.split(rows_per_chunk(weight.shape[0])), strict=True
    ):
        logits = (
            torch.nn.functional.linear(
                rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
            ).float()
            / temperature
        )
        cumulative = logits.softmax(-1).double().cumsum(-1)
        drawn = torch.searchsorted(cumulative, numbers.double() * cumulative[:, -1:], right=True)
        tokens.append(drawn.clamp_max(weight.shape[0] - 1))
    return torch.cat(tokens)


@contextmanager
def evaluation_mode(module: torch.nn.Module):
    """Evaluation mode inside, and afterwards each submodule's own mode as it was."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def decode_step(
    decoder: PreTrainedModel,
    head: torch.nn.Module,
    tokens: Tensor,
    position_ids: Tensor,
    cache: Cache,
    attention: dict,
    temperature: float,
    uniforms: Tensor,
) -> Tensor:
    """The next token of each rollout. tokens, position_ids (B, A*N): the newest ones; uniforms (B, A*N); attention: what the decoder takes. Returns (B, A*N)."""
    hidden = decoder(
        input_ids=tokens, position_ids=position_ids, past_key_values=cache, use_cache=True, **attention
    ).last_hidden_state
    return sample_tokens(hidden.flatten(0, 1), head.weight, head.bias, temperature, uniforms.reshape(-1, 1)).view_as(
        tokens
    )


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
    """N rollouts of G tokens at every anchor, block-parallel: the document is prefilled once, then each step feeds only the newest A*N tokens.

    With FlexAttention keys and values have a place from the start, and every step has the same shapes: the mask alone says how far decoding is.
    Without stop_ids nothing waits for the device.

    Args:
        document_ids, segment_ids (B, S); anchors, valid (B, A); uniforms (B, A, N, G) in [0, 1), one number for each sampled token.
        stop_ids: tokens that end a rollout. What stands behind one means nothing, and generation ends when each rollout has one.
        decode: `decode_step`, or that compiled; kept: where FlexAttention's keys and values stay for the next call, at the same addresses.
    Returns: (B, A, N, G) token ids, or fewer than G when all rollouts have ended before. Runs in eval mode (in train mode, gradient checkpointing empties the cache) and restores the mode.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    batch, length = document_ids.shape
    _, num_anchors, num_samples, num_generated = uniforms.shape
    num_newest = num_anchors * num_samples
    static = decoder.config._attn_implementation == STRIDED_FLEX
    with evaluation_mode(model):
        document = pack_layout(segment_ids, anchors, valid, num_samples, 0)
        if static:
            layout = pack_layout(segment_ids, anchors, valid, num_samples, num_generated - 1, step_major=True)
            num_keys = padded_length(length + (num_generated - 1) * num_newest)
            cache, first = static_cache(
                decoder.config.num_hidden_layers, batch, num_keys, document_ids.device, {} if kept is None else kept
            )
        else:
            cache = DynamicCache()  # without the config: a sliding layer would drop keys by count, and rollouts of one position share a count
        hidden = decoder(
            input_ids=document_ids,
            position_ids=document.position_ids,
            past_key_values=cache,
            use_cache=True,
            **attention_arguments(decoder, document),
        ).last_hidden_state
        if cache.get_seq_length() != length:
            raise RuntimeError(
                f"the KV cache holds {cache.get_seq_length()} tokens after a prefill of {length}: the model does not cache"
            )
        hidden = hidden.gather(1, (anchors - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])).flatten(
            0, 1
        )  # (B*A, H)
        tokens = [
            sample_tokens(hidden, head.weight, head.bias, temperature, uniforms[..., 0].flatten(0, 1)).view(batch, -1)
        ]  # (B, A*N)
        running = torch.ones_like(tokens[0], dtype=torch.bool)
        for step in range(1, num_generated):
            if stop_ids is not None:
                running &= ~torch.isin(tokens[-1], stop_ids)
                if not running.any():
                    break
            if static:
                first.fill_(length + (step - 1) * num_newest)
                newest = slice(length + (step - 1) * num_newest, length + step * num_newest)
                attention = {"attention_mask": block_mask(layout, num_newest, num_keys, first)}
            else:
                layout = pack_layout(segment_ids, anchors, valid, num_samples, step, step_major=True)
                newest = slice(-num_newest, None)
                attention = decode_attention_arguments(decoder, layout, step)
            # a copy: the memory that a CUDA graph has left its result in belongs to its next run
            tokens.append(
                decode(
                    decoder,
                    head,
                    tokens[-1],
                    layout.position_ids[:, newest],
                    cache,
                    attention,
                    temperature,
                    uniforms[..., step].flatten(1),
                ).clone()
            )
    return torch.stack(tokens, dim=-1).view(batch, num_anchors, num_samples, -1)


def decode_attention_arguments(decoder: PreTrainedModel, layout: Layout, num_steps: int) -> dict:
    """Like `attention_arguments`, for the newest tokens of a step-major layout against the cache."""
    if decoder.config._attn_implementation == STRIDED_SDPA:
        unused_mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=layout.segment_ids.device)
        return {
            "attention_mask": unused_mask,
            "strided_blocks": strided_blocks(layout, document_queries=False, num_steps=num_steps),
        }
    num_newest = (layout.segment_ids.shape[1] - layout.num_document) // num_steps
    arguments = attention_arguments(decoder, layout)
    return {"attention_mask": arguments["attention_mask"][:, :, -num_newest:]}
