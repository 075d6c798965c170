"""Attention over the packed strided layout with torch's fused kernel, without the cells that nobody attends to.

A dense mask over L = S + A*N*G packed tokens has L^2 cells. Nearly all of them are empty: a rollout sees the document
before its anchor, and itself. Here the rollouts are cut into blocks of neighbouring anchors. Each block calls
`scaled_dot_product_attention` on the document prefix that it can see plus its own tokens. The result is the dense
mask's (a test compares them cell by cell). It is two to four times faster on a CPU, more with longer documents, and no
L x L mask is ever held.

Layers that see no further than a window, or their own chunk, have blocks of their own, without the document tokens that
are out of reach. Which blocks a layer takes is said by its mask, of which nothing but the width is read: width k means
the k-th of `strided_blocks`. So transformers hands each layer type its mask, and a copy on the way does no harm.

Registered with transformers as the attention implementation "strided_blocks". Without the argument of that name it is
plain sdpa, so that the model keeps working for everything else.

Axis legend: B rows, H heads, Q queries, K keys, S document tokens, L packed tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

STRIDED_BLOCKS = "strided_blocks"


@dataclass(frozen=True)
class Block:
    """A run of neighbouring rollouts.

    Queries: rollout tokens start:end. Keys: document tokens first:prefix, then the tokens of the same rollouts.
    mask (B, 1, end - start, prefix - first + steps * (end - start)), True = may attend.
    """

    start: int
    end: int
    first: int
    prefix: int
    mask: Tensor


@dataclass(frozen=True)
class StridedBlocks:
    """Which keys each part of the packed queries sees.

    num_document: S, the document tokens in front of the keys.
    document_queries: True when the queries start with the document (training, prefill); False when they are rollout
        tokens only (decoding).
    document_mask: (B, 1, S, S), or None for plain causal attention in the document.
    steps: runs of rollout keys behind the document, step-major. Decoding has one run for each step so far.
    """

    num_document: int
    document_queries: bool
    document_mask: Tensor | None
    steps: int
    blocks: tuple[Block, ...]


def mask_of_width(width: int, device: torch.device) -> Tensor:
    """(1, 1, 1, width): stands where transformers wants a mask, and says which blocks a layer takes."""
    return torch.ones(1, 1, 1, width, dtype=torch.bool, device=device)


def strided_blocks_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    strided_blocks: tuple[StridedBlocks, ...] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args: query (B, H, Q, d); key, value (B, H_kv, K, d); softcap, s_aux as in `attend`. Returns ((B, Q, H, d), None).
    """
    if strided_blocks is None:
        if softcap is not None or s_aux is not None:
            raise ValueError("softcapping and attention sinks need strided_blocks")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    chosen = strided_blocks[attention_mask.shape[-1] - 1]
    num_document = chosen.num_document
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    document_key, rollout_key = key.split([num_document, key.shape[2] - num_document], dim=2)
    document_value, rollout_value = value.split([num_document, value.shape[2] - num_document], dim=2)
    scores = {"scaling": scaling, "softcap": softcap, "sinks": s_aux}
    outputs = []
    if chosen.document_queries:
        document_query, query = query.split([num_document, query.shape[2] - num_document], dim=2)
        outputs.append(attend(document_query, document_key, document_value, chosen.document_mask, **scores))
    if chosen.blocks:
        widths = [block.end - block.start for block in chosen.blocks]
        queries = query.split(widths, dim=2)
        keys = rollout_key.unflatten(2, (chosen.steps, -1)).split(widths, dim=3)
        values = rollout_value.unflatten(2, (chosen.steps, -1)).split(widths, dim=3)
        for block, q, k, v in zip(chosen.blocks, queries, keys, values, strict=True):
            k = torch.cat([document_key[:, :, block.first : block.prefix], k.flatten(2, 3)], dim=2)
            v = torch.cat([document_value[:, :, block.first : block.prefix], v.flatten(2, 3)], dim=2)
            outputs.append(attend(q, k, v, block.mask, **scores))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention. torch's fused kernel, but for scores that it cannot change: then the scores are held.

    Args:
        query (B, H, Q, d); key, value (B, H, K, d); mask (B, 1, Q, K), or None for causal.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).
        sinks (H): the score of one more key of each head, whose value is zero (gpt-oss).
    Returns (B, H, Q, d).
    """
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return weights[..., : key.shape[2]] @ value


AttentionInterface.register(STRIDED_BLOCKS, strided_blocks_forward)
AttentionMaskInterface.register(STRIDED_BLOCKS, sdpa_mask)
