"""Attention over the packed strided layout with torch's fused kernel, without the cells that nobody attends to.

A dense mask over L = S + A*N*G packed tokens has L^2 cells. Nearly all of them are empty: a rollout sees the document
before its anchor, and itself. Here the rollouts are cut into blocks of neighbouring anchors. Each block calls
`scaled_dot_product_attention` on the document prefix that it can see plus its own tokens. The result is the dense
mask's (a test compares them cell by cell). It is two to four times faster on a CPU, more with longer documents, and no
L x L mask is ever held.

Registered with transformers as the attention implementation "strided_sdpa". Without `strided_blocks` it is plain sdpa,
so that the model keeps working for everything else.

Axis legend: B rows, H heads, Q queries, K keys, S document tokens, L packed tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

STRIDED_SDPA = "strided_sdpa"


@dataclass(frozen=True)
class Block:
    """A run of neighbouring rollouts.

    Queries: rollout tokens start:end. Keys: document tokens 0:prefix, then the tokens of the same rollouts.
    mask (B, 1, end - start, prefix + steps * (end - start)), True = may attend.
    """

    start: int
    end: int
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


def strided_sdpa_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    strided_blocks: StridedBlocks | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args: query (B, H, Q, d); key, value (B, H_kv, K, d). Returns ((B, Q, H, d), None).
    """
    if strided_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    num_document = strided_blocks.num_document
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    document_key, rollout_key = key.split([num_document, key.shape[2] - num_document], dim=2)
    document_value, rollout_value = value.split([num_document, value.shape[2] - num_document], dim=2)
    outputs = []
    if strided_blocks.document_queries:
        document_query, query = query.split([num_document, query.shape[2] - num_document], dim=2)
        mask = strided_blocks.document_mask
        outputs.append(
            scaled_dot_product_attention(
                document_query, document_key, document_value, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
        )
    if strided_blocks.blocks:
        widths = [block.end - block.start for block in strided_blocks.blocks]
        queries = query.split(widths, dim=2)
        keys = rollout_key.unflatten(2, (strided_blocks.steps, -1)).split(widths, dim=3)
        values = rollout_value.unflatten(2, (strided_blocks.steps, -1)).split(widths, dim=3)
        for block, q, k, v in zip(strided_blocks.blocks, queries, keys, values, strict=True):
            k = torch.cat([document_key[:, :, : block.prefix], k.flatten(2, 3)], dim=2)
            v = torch.cat([document_value[:, :, : block.prefix], v.flatten(2, 3)], dim=2)
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=block.mask, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(STRIDED_SDPA, strided_sdpa_forward)
AttentionMaskInterface.register(STRIDED_SDPA, sdpa_mask)
