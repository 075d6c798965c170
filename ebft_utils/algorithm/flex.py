"""FlexAttention for the packed layout: one compiled kernel that skips the blocks of 128 x 128 cells without attention.

Registered with transformers as the attention implementation "strided_flex". transformers' own "flex_attention" is not
used: it recompiles whenever the model changes between training and evaluation mode, and with changing lengths it
compiles for dynamic shapes, where FlexAttention has given NaN.

Two things keep the kernel from being compiled in every step. Lengths are padded here to a few values
(`padded_length`; padding costs no arithmetic, because its blocks are empty), and everything that a mask depends on is
a tensor. So the kernel is compiled once for each padded shape. Past torch's own limit of 8 shapes, FlexAttention
silently goes on without its kernel, with the whole matrix of scores. Here the limit is far off, and reaching it is an
error.

Axis legend: B rows, H heads, Q queries, K keys, d head width, T tokens, S document tokens, L packed tokens.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

STRIDED_FLEX = "strided_flex"
BLOCK = 128
QUERY_BLOCKS_AT_ONCE = 8  # query blocks whose mask is evaluated cell by cell at a time while a BlockMask is made
OLDEST_TORCH, SMALLEST_HEAD, LARGEST_HEAD, OLDEST_GPU = (2, 7), 16, 256, (8, 0)

for limit in ("recompile_limit", "accumulated_recompile_limit"):
    setattr(torch._dynamo.config, limit, max(1024, getattr(torch._dynamo.config, limit)))
_compiled_flex_attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)


def padded_length(length: int) -> int:
    """The next of the lengths that kernels are compiled for.

    These are the powers of two, and one and a half times each, as far as they are multiples of 128.
    """
    unit = max(BLOCK, 1 << max(0, (length - 1).bit_length() - 2))
    return -(-length // unit) * unit


# ----------------------------------------------------------------------------------------------------------------------
# Masks


def make_block_mask(
    predicate: Callable[[Tensor, Tensor, Tensor], Tensor],
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device,
) -> BlockMask:
    """The BlockMask of predicate(row, query, key) -> bool.

    The predicate is evaluated on all cells, a few rows of blocks at a time, so that Q x K cells are never held at once.

    Args:
        predicate: may capture nothing but tensors: anything else would be compiled into the kernel.
        num_queries, num_keys: multiples of 128.
    """
    row = torch.arange(batch, device=device)[:, None, None]
    key = torch.arange(num_keys, device=device)
    counts = []
    for start in range(0, num_queries, QUERY_BLOCKS_AT_ONCE * BLOCK):
        query = torch.arange(start, min(start + QUERY_BLOCKS_AT_ONCE * BLOCK, num_queries), device=device)
        cells = predicate(row, query[None, :, None], key[None, None])  # (B, Q', K)
        counts.append(cells.unflatten(2, (-1, BLOCK)).sum(-1).unflatten(1, (-1, BLOCK)).sum(2))
    counts = torch.cat(counts, dim=1).unsqueeze(1)  # (B, 1, Q/128, K/128)
    full = counts == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_chosen_first((counts > 0) & ~full),
        *_chosen_first(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, q, k: predicate(b, q, k),
        seq_lengths=(num_queries, num_keys),
    )


def _chosen_first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K/128) bool -> how many are True, and all indices, those of the True ones first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    int32 = {"dtype": torch.int32, "memory_format": torch.contiguous_format}
    return chosen.sum(-1).to(**int32), order.to(**int32)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def strided_flex_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface. Without a BlockMask it is plain sdpa, for everything else the model does.

    Args:
        query (B, H, Q, d); key, value (B, H_kv, K, d).
        softcap, s_aux: scores are capped, and one more key of value zero has a score for each head (attention.attend).
    Returns ((B, Q, H, d), None).
    """
    if not isinstance(attention_mask, BlockMask):
        if softcap is not None or s_aux is not None:
            raise ValueError("softcapping and attention sinks need a BlockMask")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    num_queries, (padded_queries, padded_keys) = query.shape[2], attention_mask.seq_lengths
    dtype = _attended_dtype(value)
    query, key, value = (
        _padded(tensor.to(dtype), length)
        for tensor, length in ((query, padded_queries), (key, padded_keys), (value, padded_keys))
    )
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention
    how = {"block_mask": attention_mask, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if softcap is not None:
        how["score_mod"] = _softcapped(softcap)
    if s_aux is None:
        output = attend(query, key, value, **how)
    else:  # exp(lse) / (exp(lse) + exp(sink)) of the weight is left to the other keys
        output, found = attend(query, key, value, **how, return_aux=AuxRequest(lse=True))
        output = output * torch.sigmoid(found.lse - s_aux.float().view(1, -1, 1)).unsqueeze(-1).to(output.dtype)
    return output[:, :, :num_queries].transpose(1, 2).contiguous(), None


@cache
def _softcapped(softcap: float) -> Callable:
    """One function for each value: another would be compiled again."""
    return lambda score, batch, head, query, key: softcap * torch.tanh(score / softcap)


def _attended_dtype(value: Tensor) -> torch.dtype:
    """The dtype that queries, keys and values are cast to.

    Autocast covers sdpa, not FlexAttention: rotary positions leave float32 queries and keys beside bfloat16 values.
    """
    return torch.get_autocast_dtype(value.device.type) if torch.is_autocast_enabled(value.device.type) else value.dtype


def _padded(tensor: Tensor, length: int) -> Tensor:
    """(B, H, T, d) -> (B, H, length, d), contiguous. Static keys are not copied.

    The order in memory must be the same with and without padding, or two kernels would be compiled.
    """
    if tensor.shape[2] < length:
        tensor = pad(tensor, (0, 0, 0, length - tensor.shape[2]))
    return tensor.contiguous()


AttentionInterface.register(STRIDED_FLEX, strided_flex_forward)
AttentionMaskInterface.register(STRIDED_FLEX, sdpa_mask)


# ----------------------------------------------------------------------------------------------------------------------
# Keys and values of fixed size


class StaticKeys(CacheLayerMixin):
    """Keys and values of one layer, with room for all that decoding will write.

    first (): the index at which the next tokens are written; one tensor, shared by all layers.
    """

    def __init__(self, length: int, first: Tensor):
        super().__init__()
        self.length, self.first, self.prefilled = length, first, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers, in the shape and dtype of the first keys and values."""
        shape, dtype = (*key_states.shape[:2], self.length), _attended_dtype(value_states)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3], dtype=dtype)
        self.values = value_states.new_zeros(*shape, value_states.shape[3], dtype=dtype)
        self.is_initialized = True
        for buffer in (self.keys, self.values):
            torch._dynamo.mark_static_address(buffer)  # else a CUDA graph would copy it in and out

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes keys and values. Returns those that attention is computed on.

        In the prefill these are the document's own. Afterwards they are the whole buffers: the mask says what counts.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.prefilled:
            self.keys[:, :, : key_states.shape[2]], self.values[:, :, : key_states.shape[2]] = key_states, value_states
            self.prefilled = key_states.shape[2]
            return key_states, value_states
        places = self.first + torch.arange(key_states.shape[2], device=key_states.device)
        self.keys.index_copy_(2, places, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, places, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a mask covers, and the index of the first one."""
        return self.length, 0

    def get_seq_length(self) -> int:
        """Tokens of the prefill."""
        return self.prefilled

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.length


def static_cache(num_layers: int, batch: int, length: int, device: torch.device, kept: dict) -> tuple[Cache, Tensor]:
    """A cache of fixed size for a new document, and the () tensor that says where decoding writes next in it.

    kept: the caches of earlier calls, by size. They are used again, because a CUDA graph remembers their addresses.
    """
    if (batch, length) not in kept:
        first = torch.zeros((), dtype=torch.long, device=device)
        torch._dynamo.mark_static_address(first)
        kept[batch, length] = Cache(layers=[StaticKeys(length, first) for _ in range(num_layers)]), first
    cache, first = kept[batch, length]
    for layer in cache.layers:
        layer.prefilled = 0
    return cache, first


# ----------------------------------------------------------------------------------------------------------------------
# Where it runs


def why_not_flex(head_width: int, device: torch.device, backward: bool) -> str | None:
    """Why FlexAttention cannot be used on that device; None when it can, as far as can be told without running it.

    backward: whether anything is trained.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if device.type == "cpu" and backward:
        return "FlexAttention has no backward pass on the CPU"
    if device.type not in ("cpu", "cuda"):
        return f"FlexAttention does not train on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability}, and 8.0 is needed"
    if head_width > LARGEST_HEAD or (device.type == "cuda" and head_width < SMALLEST_HEAD):
        made_for = f"{SMALLEST_HEAD} to {LARGEST_HEAD}"
        return f"the model's heads are {head_width} wide, and its kernels are made for {made_for}"
    return None


def prove_flex_attention(
    num_heads: int, num_key_heads: int, head_width: int, dtype: torch.dtype, device: torch.device, backward: bool
) -> str | None:
    """Runs the kernel once on that device and compares outputs and gradients with sdpa's on the same numbers.

    Returns what is wrong, or None when they agree.
    """
    generator = torch.Generator().manual_seed(0)
    length = 4 * BLOCK
    half_blocks = torch.tensor([0, 1, 1, 1, 1, 1, -1, -1], device=device)  # gives full, partial and empty blocks
    segments = half_blocks.repeat_interleave(BLOCK // 2)

    def predicate(row, query, key):
        return ((segments[query] == segments[key]) & (key <= query)) | (query == key)

    def inputs() -> list[Tensor]:
        return [
            torch.randn(1, heads, length, head_width, generator=generator).to(device, dtype).requires_grad_(backward)
            for heads in (num_heads, num_key_heads, num_key_heads)
        ]

    query, key, value = inputs()
    index = torch.arange(length, device=device)
    dense_mask = predicate(None, index[:, None], index[None])
    with torch.set_grad_enabled(backward), torch.autocast(device.type, enabled=False):
        try:
            block_mask = make_block_mask(predicate, 1, length, length, device)
            found, _ = strided_flex_forward(None, query, key, value, block_mask, scaling=0.5)
            groups = num_heads // num_key_heads
            keys, values = repeat_kv(key, groups), repeat_kv(value, groups)
            expected = scaled_dot_product_attention(query, keys, values, attn_mask=dense_mask, scale=0.5)
            expected = expected.transpose(1, 2)
            pairs = [(found, expected)]
            if backward:
                weights = torch.randn(found.shape, generator=generator).to(device, dtype)
                losses = [(output * weights).sum() for output in (found, expected)]
                pairs += zip(*(torch.autograd.grad(loss, (query, key, value)) for loss in losses), strict=True)
        except Exception as error:  # compilers fail in many ways
            return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    gaps = [((one - other).float().norm() / other.float().norm()).item() for one, other in pairs]
    tolerance, worst = 2e-2 if dtype == torch.bfloat16 else 2e-3, max(gaps, key=lambda gap: (math.isnan(gap), gap))
    if worst <= tolerance:
        return None
    return f"it differs from sdpa on this device by {worst:.2g} of the result's size (allowed {tolerance})"
