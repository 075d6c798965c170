"""A trial of a model: short examples, what the run's own functions make of them, and what the model itself does.

proof.py compares the two. What is tried is a copy of the first layers, up to the first layer of each kind, with
embedding and head.

Axis legend: as in algorithm/strided.py (B rows, S document tokens, A anchors, N rollouts at an anchor, G tokens).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from .algorithm.architecture import decoder_layers, decoder_of, head_of, layer_types
from .algorithm.decoding import evaluation_mode, generate_rollouts
from .algorithm.features import FeatureNetwork
from .algorithm.losses import token_logprobs
from .algorithm.rows import completion_rows, generate_rows, rows_logprobs
from .algorithm.strided import attention_arguments, pack_layout, strided_logprobs

SAMPLES, TOKENS, SMALL_WINDOW = 2, 4, 8


@dataclass(frozen=True)
class Example:
    """Two rows of short documents.

    document_ids, segment_ids (B, S); anchors, valid (B, A); rollouts (B, A, N, G), and uniforms for those that the
    model writes itself.
    """

    document_ids: Tensor
    segment_ids: Tensor
    anchors: Tensor
    valid: Tensor
    rollouts: Tensor
    uniforms: Tensor

    def with_changes(self, anchor: int, vocabulary: int) -> "Example":
        """Other tokens and other rollouts, but for what rollout 0 at each row's anchor number `anchor` may see."""
        generator = torch.Generator().manual_seed(1 + anchor)
        places, index = self.anchors[:, anchor, None], torch.arange(self.document_ids.shape[1])
        own = self.segment_ids == self.segment_ids.gather(1, places - 1)
        other = torch.randint(1, vocabulary, self.document_ids.shape, generator=generator)
        tokens = torch.where(own & (index < places), self.document_ids, (self.document_ids + other) % vocabulary)
        rollouts = torch.randint(vocabulary, self.rollouts.shape, generator=generator)
        uniforms = torch.rand(self.uniforms.shape, generator=generator)
        for new, old in ((rollouts, self.rollouts), (uniforms, self.uniforms)):
            new[:, anchor, 0] = old[:, anchor, 0]
        return replace(self, document_ids=tokens, rollouts=rollouts, uniforms=uniforms)


def packed_example(vocabulary: int) -> Example:
    """Two packed documents and padding; one document and padding. Both reach beyond a window of 8."""
    segments = torch.tensor([[0] * 17 + [1] * 12 + [-1] * 3, [0] * 26 + [-1] * 6])
    return _example(vocabulary, segments, torch.tensor([[5, 13, 24], [4, 11, 22]]))


def rows_example(vocabulary: int) -> Example:
    """Two prompts of different lengths, each with its truth."""
    segments = torch.tensor([[0] * 20 + [-1] * 3, [0] * 23])
    return _example(vocabulary, segments, torch.tensor([[11], [17]]))


def _example(vocabulary: int, segments: Tensor, anchors: Tensor) -> Example:
    generator = torch.Generator().manual_seed(0)
    document = torch.randint(vocabulary, segments.shape, generator=generator)
    rollouts = torch.randint(vocabulary, (*anchors.shape, SAMPLES, TOKENS), generator=generator)
    uniforms = torch.rand(rollouts.shape, generator=generator)
    return Example(document, segments, anchors, torch.ones_like(anchors, dtype=torch.bool), rollouts, uniforms)


# ----------------------------------------------------------------------------------------------------------------------
# What is compared


@dataclass(frozen=True)
class Scores:
    """What a layout makes of an example, on the CPU.

    rollouts (B, A, N, G); logprobs (B, A, N, G): in the training forward; features (B, A, N, layers, G, H): the raw
    states of their tokens; decoded (B, A, N, G): log-probs while the model wrote them, or logprobs where it does not.
    """

    rollouts: Tensor
    logprobs: Tensor
    features: Tensor
    decoded: Tensor


@torch.no_grad()
def scores(
    model: PreTrainedModel, network: FeatureNetwork, example: Example, writes: bool, device: torch.device
) -> Scores:
    """The scores in the layout of the network, with the attention that model and network are set to.

    writes: the model writes the rollouts, with cached decoding. Otherwise they are the example's.
    """
    given = tuple(
        tensor.to(device) for tensor in (example.document_ids, example.segment_ids, example.anchors, example.valid)
    )
    rollouts, rows, decoded = example.rollouts.to(device), network.layout == "rows", None
    with evaluation_mode(model):
        if writes:
            with _watched(model) as seen:
                rollouts = (generate_rows if rows else generate_rollouts)(
                    model, *given, 1.0, example.uniforms.to(device)
                )
            decoded = _decoded(model, seen, rollouts, given[2], rows)
        logprobs, _ = (rows_logprobs if rows else strided_logprobs)(
            model, *given[:2], rollouts, *given[2:], temperature=1.0, document_grad=None
        )
    decoded = logprobs if decoded is None else decoded
    states = (_row_states if rows else _packed_states)(network, *given, rollouts)
    features = torch.stack([state.float() for state in states], dim=-3)
    return Scores(*(tensor.cpu() for tensor in (rollouts, logprobs, features, decoded)))


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The hidden states of each forward of the decoder."""
    seen = []
    handle = decoder_of(model).register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


def _decoded(model: PreTrainedModel, seen: list[Tensor], rollouts: Tensor, anchors: Tensor, rows: bool) -> Tensor:
    """The log-probs of sampled tokens, from the states that they were sampled from."""
    batch, num_anchors, num_samples, num_generated = rollouts.shape
    if rows:  # prompts of one length at a time, shortest first: a prefill, then a token at a time
        order, calls = anchors[:, 0].argsort(), []
        for start in range(0, len(seen), num_generated):
            calls.append(torch.stack([states[:, -1] for states in seen[start : start + num_generated]], dim=1))
        hidden = torch.cat(calls).view(batch, 1, num_samples, num_generated, -1)[order.argsort()]
    else:
        first = seen[0].gather(1, (anchors - 1).unsqueeze(-1).expand(-1, -1, seen[0].shape[-1]))
        first = first.unsqueeze(2).expand(-1, -1, num_samples, -1)
        later = [states[:, : num_anchors * num_samples].view_as(first) for states in seen[1:]]
        hidden = torch.stack([first, *later], dim=3)
    return token_logprobs(hidden, head_of(model), rollouts, 1.0)


def _packed_states(network: FeatureNetwork, document_ids, segment_ids, anchors, valid, rollouts) -> list[Tensor]:
    batch, num_anchors, num_samples, num_generated = rollouts.shape
    layout = pack_layout(segment_ids, anchors, valid, num_samples, num_generated)
    index = torch.arange(document_ids.shape[1], layout.position_ids.shape[1], device=document_ids.device)
    states = network.hidden_states(
        index.expand(batch, -1),
        input_ids=torch.cat([document_ids, rollouts.flatten(1)], dim=1),
        position_ids=layout.position_ids,
        **attention_arguments(network.decoder, layout),
    )
    return [state.view(*rollouts.shape, -1) for state in states]


def _row_states(network: FeatureNetwork, document_ids, segment_ids, anchors, valid, rollouts) -> list[Tensor]:
    batch, _, num_samples, num_generated = rollouts.shape
    lengths = torch.full((batch, num_samples), num_generated, device=rollouts.device)
    tokens, is_token = completion_rows(document_ids, anchors[:, 0], rollouts[:, 0], lengths)
    index = (anchors + torch.arange(num_generated, device=anchors.device)).repeat_interleave(num_samples, dim=0)
    states = network.hidden_states(index, input_ids=tokens.flatten(0, 1), attention_mask=is_token.flatten(0, 1).long())
    return [state.view(*rollouts.shape, -1) for state in states]


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, example: Example, rollouts: Tensor, layers: list[int], device) -> Scores:
    """The same numbers from each rollout with its own copy of the document before it, by the model's own forward."""
    logprobs, features = torch.zeros(rollouts.shape), []
    with evaluation_mode(model):
        for row, anchors in enumerate(example.anchors.tolist()):
            for number, anchor in enumerate(anchors):
                segments, group = example.segment_ids[row], rollouts[row, number]
                start = int((segments == segments[anchor - 1]).nonzero()[0])
                ids = torch.cat([example.document_ids[row, start:anchor].expand(len(group), -1), group], dim=1)
                output = model(
                    ids.to(device), attention_mask=torch.ones_like(ids).to(device), output_hidden_states=True
                )
                logits = output.logits[:, -TOKENS - 1 : -1].float().log_softmax(-1).cpu()
                logprobs[row, number] = logits.gather(-1, group.unsqueeze(-1)).squeeze(-1)
                states = [output.hidden_states[layer][:, -TOKENS:].float().cpu() for layer in layers]
                features.append(torch.stack(states, dim=1))
    batch, num_anchors = example.anchors.shape
    features = torch.stack(features).unflatten(0, (batch, num_anchors))
    return Scores(rollouts, logprobs, features, logprobs)


# ----------------------------------------------------------------------------------------------------------------------
# The model that is tried


def first_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a causal LM up to the first layer of each kind, at least two, with small windows and adapters that act.

    A kind is what a layer is built of, and its type. Where layers share keys with earlier ones, all are copied.
    """
    decoder = decoder_of(model)
    settings, copied = decoder.config.to_dict(), {}
    number = number_of_first_layers(decoder)
    if number is not None:  # copy.deepcopy is told that it has copied the long list already: the short one
        layers = decoder_layers(decoder)
        copied[id(layers)] = copy.deepcopy(torch.nn.ModuleList(list(layers)[:number]), copied)
    short = copy.deepcopy(model, copied)
    config = decoder_of(short).config
    for key in ("sliding_window", "attention_chunk_size"):
        if settings.get(key):
            setattr(config, key, SMALL_WINDOW)
    if number is not None:
        config.num_hidden_layers = number
        if "layer_types" in vars(config):
            config.layer_types = config.layer_types[:number]
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters_of(short):
        for weight in adapter.lora_B.parameters():  # they begin as zeros
            noise = 0.1 * torch.randn(weight.shape, generator=generator)
            weight.data.copy_(noise)
    return short


def number_of_first_layers(decoder: PreTrainedModel) -> int | None:
    """How many layers a copy needs. None: all, because layers share keys, or are not in one list."""
    try:
        layers = decoder_layers(decoder)
    except ValueError:
        return None
    types = layer_types(decoder.config) or [None] * len(layers)
    kinds = [(layer_type, repr(layer)) for layer_type, layer in zip(types, layers, strict=True)]
    number = max(2, *(1 + kinds.index(kind) for kind in kinds))
    return None if number >= len(layers) or decoder.config.to_dict().get("num_kv_shared_layers") else number


def adapters_of(model: torch.nn.Module) -> list[BaseTunerLayer]:
    """The layers that carry a LoRA adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """The frozen network of a LoRA run: the policy with its adapter off."""
    for adapter in adapters_of(model):
        adapter.enable_adapters(False)
    try:
        yield
    finally:
        for adapter in adapters_of(model):
            adapter.enable_adapters(True)
