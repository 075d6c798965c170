"""The strided layout: one document, many short rollouts, one forward.

Axis legend
    B  rows of the batch            S  document tokens of a row (right-padded)
    A  anchors of a row             N  rollouts (samples) at an anchor
    G  tokens of a rollout          L  packed tokens, S + A*N*G
    H  hidden width                 V  vocabulary

Packed order (anchor-major):  [ document | anchor 0: rollout 0 (G tokens), .., rollout N-1 | anchor 1: .. ]
    a document token sees its own document causally
    a rollout token sees its document before the anchor, and the earlier tokens of its own rollout, nothing else
    an anchor a means "a document tokens are visible"; rollout token t has position a + t
    rollout token t is predicted at document token a-1 (t = 0) or at its own token t-1, NOT at its left neighbour in the
    packed sequence, which can belong to another rollout

Masks are bool, True = may attend / counts. Padding has segment id -1. Everything is tensor operations; the only loop
runs over attention blocks of fixed size. `decoding.py` writes the rollouts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .architecture import Reach, decoder_of, head_of, reaches
from .attention import STRIDED_BLOCKS, Block, StridedBlocks, mask_of_width
from .flex import STRIDED_FLEX, make_block_mask, padded_length
from .losses import token_logprobs
from .rewards import first_equal_rollout

EVERYTHING = Reach()
QUERIES_PER_BLOCK = 256  # rollout tokens of one attention block: fewer means more calls, more means more empty cells


# ----------------------------------------------------------------------------------------------------------------------
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
    """Where rollouts start.

    The first anchor of a completion has at least context_length tokens of the document and min_completion_prefix tokens
    of the completion before it. Further anchors follow every `stride` tokens, as long as the window of G tokens fits
    into the completion. Raw text is one completion.

    A window that reaches into padding, into a prompt or over a document's end is no group, so packing documents does
    not change their groups.

    Args:
        segment_ids (B, S): the document that a token belongs to, -1 for padding.
        completion_ids (B, S): the completion that a token belongs to, -1 for padding and for tokens outside of
            completions (prompts).
    Returns: anchors (B, A) and validity (B, A). A is the largest number in a row; invalid slots hold anchor 1.
    """
    batch, length = segment_ids.shape
    of_document, of_completion = segment_positions(segment_ids), segment_positions(completion_ids)
    # as a position in the completion
    first = (context_length - (of_document - of_completion)).clamp_min(min_completion_prefix)
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


# ----------------------------------------------------------------------------------------------------------------------
# Layout and mask


@dataclass(frozen=True)
class Layout:
    """What each packed token is. Masks and positions are made from this alone.

    num_document: S.
    segment_ids  (B, L): the document that the token belongs to, -1 for padding.
    visible      (B, L): the token sees the document tokens of its segment before this index. Document token s: s+1;
                         rollout token: its anchor.
    rollout_ids  (L):    which rollout of the row, -1 for document tokens.
    steps        (L):    which token of its rollout, 0 for document tokens.
    position_ids (B, L): as the model takes them.
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

    Rollouts at invalid anchors see nothing of the document.

    Args:
        segment_ids (B, S); anchors, valid (B, A).
        step_major: order (G, A, N) instead of (A, N, G): the order in which decoding appends tokens.
    """
    length, device = segment_ids.shape[1], segment_ids.device
    num_anchors = anchors.shape[1]
    index = torch.arange(length, device=device)
    positions = segment_positions(segment_ids)
    before_anchor = (anchors - 1).clamp_min(0)
    anchor_segment = torch.where(valid, segment_ids.gather(1, before_anchor), -1)
    anchor_position = positions.gather(1, before_anchor) + 1
    sizes = (num_generated, num_anchors, num_samples) if step_major else (num_anchors, num_samples, num_generated)
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
    steps, anchor_index, sample = axes if step_major else (axes[2], axes[0], axes[1])
    rollout_ids = (anchor_index * num_samples + sample).flatten()
    steps, anchor_index = steps.flatten(), anchor_index.flatten()
    document_visible = torch.where(segment_ids >= 0, index + 1, 0)
    rollout_visible = torch.where(valid, anchors, 0)[:, anchor_index]
    none = torch.full((length,), -1, device=device)
    return Layout(
        num_document=length,
        segment_ids=torch.cat([segment_ids, anchor_segment[:, anchor_index]], dim=1),
        visible=torch.cat([document_visible, rollout_visible], dim=1),
        rollout_ids=torch.cat([none, rollout_ids]),
        steps=torch.cat([torch.zeros_like(none), steps]),
        position_ids=torch.cat([positions, anchor_position[:, anchor_index] + steps], dim=1),
        rollout_width=1 if step_major else num_generated,
    )


def may_attend(layout: Layout, row: Tensor, query: Tensor, key: Tensor, reach: Reach = EVERYTHING) -> Tensor:
    """THE predicate: whether packed token `query` of batch row `row` sees packed token `key`.

    Every mask of the project is this function, evaluated on a grid of indices or compiled into a kernel (so it reads
    nothing but tensors). Args: row, query, key: index tensors, broadcast against each other.
    """
    of_rollout = layout.rollout_ids[key] >= 0
    same_document = layout.segment_ids[row, query] == layout.segment_ids[row, key]
    document = ~of_rollout & same_document & (key < layout.visible[row, query])
    same_rollout = layout.rollout_ids[query] == layout.rollout_ids[key]
    own_rollout = of_rollout & same_rollout & (layout.steps[key] <= layout.steps[query])
    seen = document | own_rollout
    if reach != EVERYTHING:  # positions count from the start of the own document, in rollouts too
        of_query, of_key = layout.position_ids[row, query], layout.position_ids[row, key]
        if reach.window is not None:
            seen = seen & (of_query - of_key < reach.window)
        if reach.chunk is not None:
            seen = seen & (of_query // reach.chunk == of_key // reach.chunk)
    return seen | (query == key)  # query == key: a row without a single True would be NaN


def mask_on_grid(layout: Layout, query: Tensor, key: Tensor, reach: Reach = EVERYTHING) -> Tensor:
    """`may_attend` for the index vectors query (Q) and key (K). Returns (B, 1, Q, K) bool."""
    row = torch.arange(layout.segment_ids.shape[0], device=query.device)
    return may_attend(layout, row[:, None, None, None], query[None, None, :, None], key[None, None, None, :], reach)


def dense_mask(layout: Layout, reach: Reach = EVERYTHING) -> Tensor:
    """The whole (B, 1, L, L) mask: the slow and obvious form."""
    index = torch.arange(layout.segment_ids.shape[1], device=layout.segment_ids.device)
    return mask_on_grid(layout, index, index, reach)


def strided_blocks(
    layout: Layout, *, document_queries: bool, num_steps: int = 1, reach: Reach = EVERYTHING
) -> StridedBlocks:
    """The same mask as blocks for `attention.strided_blocks_forward`.

    num_steps: 1 for an anchor-major layout (or a document alone). With a step-major layout (decoding): the number of
    steps so far; the queries are the last one.
    """
    device, length = layout.segment_ids.device, layout.num_document
    index = torch.arange(length, device=device)
    document_mask = None
    limited = reach != EVERYTHING
    if document_queries and (limited or bool((layout.segment_ids[:, :length] != 0).any())):
        document_mask = mask_on_grid(layout, index, index, reach)
    num_rollout_tokens = (layout.segment_ids.shape[1] - length) // num_steps
    rollout_width = max(1, layout.rollout_width)
    width = max(1, QUERIES_PER_BLOCK // rollout_width) * rollout_width
    blocks = []
    for start in range(0, num_rollout_tokens, width):
        end = min(start + width, num_rollout_tokens)
        newest = length + (num_steps - 1) * num_rollout_tokens
        queries = torch.arange(newest + start, newest + end, device=device)
        prefix = int(layout.visible[:, queries].max())  # what the block's last anchor sees, in the row with the most
        first = 0
        if limited and prefix:  # document tokens that no query of the block reaches are not even multiplied
            seen = mask_on_grid(layout, queries, index[:prefix], reach).any(dim=(0, 1, 2))
            first = int(torch.where(seen, index[:prefix], prefix).min())
        step_start = length + torch.arange(num_steps, device=device)[:, None] * num_rollout_tokens
        own = (step_start + torch.arange(start, end, device=device)).flatten()
        mask = mask_on_grid(layout, queries, torch.cat([index[first:prefix], own]), reach)
        blocks.append(Block(start, end, first, prefix, mask))
    return StridedBlocks(length, document_queries, document_mask, num_steps, tuple(blocks))


def block_mask(
    layout: Layout, num_queries: int, num_keys: int, first_query: Tensor | None = None, reach: Reach = EVERYTHING
) -> BlockMask:
    """The same mask for FlexAttention: queries first_query, first_query + 1, .. (None: from 0) against all keys.

    Queries and keys are padded to `flex.padded_length`. Padding sees only itself, and no other token sees it.

    Args: num_keys: keys in all; the layout describes the first L of them.
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
        position_ids=pad(layout.position_ids, behind),
    )
    # a copy: the kernel reads it whenever it runs, also in the backward pass, when the caller's may have moved on
    first = torch.zeros((), dtype=torch.long, device=device) if first_query is None else first_query.clone()
    last = torch.full((), num_keys - 1, device=device)

    def predicate(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(padded, row, torch.minimum(first + query, last), key, reach)

    return make_block_mask(predicate, batch, num_queries, num_keys, device)


def attention_arguments(
    decoder: PreTrainedModel,
    layout: Layout,
    *,
    num_steps: int = 0,
    num_keys: int | None = None,
    first_query: Tensor | None = None,
) -> dict:
    """Keyword arguments that make `decoder` attend by `layout`, for the attention implementation it is set to.

    The mask is always given: without one, transformers reads jumping position ids as packed sequences and masks between
    them. Where layers differ in their reach it is a mapping by layer type, as transformers takes it.

    Args:
        num_steps: while decoding, the steps so far of a step-major layout; the queries are the last one. 0: the queries
            are all packed tokens.
        num_keys, first_query: of `block_mask`, while FlexAttention decodes.
    """
    implementation, length = decoder.config._attn_implementation, layout.segment_ids.shape[1]
    newest = (length - layout.num_document) // num_steps if num_steps else length
    # no position is larger than that
    limit = layout.num_document + (num_steps or layout.rollout_width)
    by_type = {layer_type: reach.within(limit) for layer_type, reach in reaches(decoder.config).items()}
    different, device = list(dict.fromkeys(by_type.values())), layout.segment_ids.device
    arguments = {}
    if implementation == STRIDED_BLOCKS:
        how = {"document_queries": not num_steps, "num_steps": num_steps or 1}
        arguments["strided_blocks"] = tuple(strided_blocks(layout, **how, reach=reach) for reach in different)
        masks = [mask_of_width(1 + index, device) for index in range(len(different))]
    elif implementation == STRIDED_FLEX:
        masks = [block_mask(layout, newest, num_keys or length, first_query, reach) for reach in different]
    elif implementation in ("sdpa", "eager"):
        masks = [dense_mask(layout, reach)[:, :, -newest:] for reach in different]
        if implementation == "eager":  # it adds the mask to the scores: a boolean one would be silently wrong
            least = torch.finfo(decoder.dtype).min
            masks = [torch.zeros_like(mask, dtype=decoder.dtype).masked_fill_(~mask, least) for mask in masks]
    else:
        raise ValueError(
            f"attn_implementation {implementation!r} cannot take the strided mask; "
            f"allowed: {STRIDED_BLOCKS}, {STRIDED_FLEX}, sdpa, eager"
        )
    of_type = {layer_type: masks[different.index(reach)] for layer_type, reach in by_type.items()}
    return {**arguments, "attention_mask": of_type.get(None, of_type)}


# ----------------------------------------------------------------------------------------------------------------------
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
    """One packed forward: log-probs of all rollout tokens, softmax(logits / temperature), and document tokens (at 1).

    The last token of a rollout predicts nothing, so it is not run. Log-probs at invalid anchors mean nothing.

    Args:
        document_ids, segment_ids (B, S); anchors, valid (B, A).
        rollouts (B, A, N, G): token ids; None for the document alone.
        document_grad: whether the document's log-probs carry a gradient (not needed when only rollouts are trained);
            None: no document log-probs.
    Returns: rollout log-probs (B, A, N, G) or None; document log-probs (B, S-1), entry s for token s+1, or None.
    """
    decoder, head = decoder_of(model), head_of(model)
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
        rollout_logps = token_logprobs(predictors, head, rollouts, temperature)
    if document_grad is None:
        return rollout_logps, None
    with torch.set_grad_enabled(document_grad and torch.is_grad_enabled()):
        document_logps = token_logprobs(hidden[:, : length - 1], head, document_ids[:, 1:], 1.0)
    return rollout_logps, document_logps


def rollout_logprobs(
    model: PreTrainedModel, document_ids: Tensor, rollouts: Tensor, anchors: Tensor, temperature: float
) -> Tensor:
    """log softmax(logits / temperature) of each rollout token given the document before its anchor, without padding.

    Naive: for each (b, a, n) run the model on cat(document[:anchor], rollout) and read the log-prob of rollout token t
    at position anchor+t-1.

    Args: model: a causal LM; document_ids (B, S) token ids; rollouts (B, A, N, G); anchors (B, A), 1 <= anchor <= S.
    Returns: (B, A, N, G), float32, differentiable.
    """
    segment_ids, valid = torch.zeros_like(document_ids), torch.ones_like(anchors, dtype=torch.bool)
    logprobs, _ = strided_logprobs(model, document_ids, segment_ids, rollouts, anchors, valid, temperature, None)
    return logprobs


def naive_rollout_logprobs(model: PreTrainedModel, document_ids: Tensor, rollouts: Tensor, anchors: Tensor) -> Tensor:
    """The naive form of `rollout_logprobs` at temperature 1: each rollout with its own copy of the document before it.

    Args: document_ids (1, S); rollouts (1, A, N, G); anchors (1, A). Returns (1, A, N, G), float32.
    """
    logprobs = []
    for anchor, group in zip(anchors[0].tolist(), rollouts[0], strict=True):  # group (N, G)
        ids = torch.cat([document_ids[:, :anchor].expand(len(group), -1), group], dim=1)
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[:, anchor - 1 : -1].float()
        logprobs.append(logits.log_softmax(-1).gather(-1, group.unsqueeze(-1)).squeeze(-1))
    return torch.stack(logprobs).unsqueeze(0)


# ----------------------------------------------------------------------------------------------------------------------
# Fewer rollouts, several forwards


def rollouts_to_train(
    rollouts: Tensor, advantages: Tensor, anchors: Tensor, valid: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rollouts that the gradient depends on, each with an anchor slot of its own.

    The sum over rollouts of advantage * log-prob stays the same, exactly. Rollouts of a group with the same tokens have
    the same log-prob, so they are run once, with their advantages added. Rollouts whose advantages add up to zero are
    left out.

    Args:
        rollouts (B, A, N, G); advantages (B, A, N); anchors, valid (B, A).
        scale: how large rewards are. Sums of advantages up to 4e-6 of it are float32's rounding and count as zero.
    Returns: rollouts (B, R, 1, G), their anchors (B, R), validity (B, R), advantages (B, R, 1). R is the largest number
        in a row and at least 1; other rows have invalid slots.
    """
    first = first_equal_rollout(rollouts)
    total = torch.zeros_like(advantages).scatter_add_(-1, first, advantages)  # 0 for later copies of a rollout
    needed = (valid.unsqueeze(-1) & ~(total.abs() <= 4e-6 * scale)).flatten(1)  # NaN is kept: the loss must show it
    order = needed.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(needed.sum(1).max()))]
    chosen = needed.gather(1, order)
    tokens = rollouts.flatten(1, 2).gather(1, order.unsqueeze(-1).expand(-1, -1, rollouts.shape[-1]))
    own_anchors = anchors.repeat_interleave(rollouts.shape[2], dim=1).gather(1, order)
    summed = torch.where(chosen, total.flatten(1).gather(1, order), 0.0)
    return tokens.unsqueeze(2), torch.where(chosen, own_anchors, 1), chosen, summed.unsqueeze(-1)


def number_of_parts(num_slots: int, tokens_per_slot: int, document_tokens: int, max_packed_tokens: int | None) -> int:
    """Number of forwards when each may have at most max_packed_tokens packed tokens in a row (None: no limit)."""
    if max_packed_tokens is None:
        return 1
    return max(1, -(-num_slots // ((max_packed_tokens - document_tokens) // tokens_per_slot)))


def in_parts(num_parts: int, anchors: Tensor, valid: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Cuts (B, A, ..) tensors into num_parts pieces with the same number of anchor slots.

    Where A is no multiple of num_parts, the last pieces are filled up with invalid slots.
    """
    size = max(1, -(-anchors.shape[1] // num_parts))
    missing = num_parts * size - anchors.shape[1]
    filled = [pad(anchors, (0, missing), value=1), pad(valid, (0, missing))]
    filled += [pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)) for tensor in others]
    return list(zip(*(tensor.split(size, dim=1) for tensor in filled), strict=True))
