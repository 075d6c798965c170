"""Whether a model really computes what the algorithm takes for granted: shown at the start of each run, on the model.

    1. What a rollout may not see changes nothing. Other rollouts, the document from its anchor on, documents packed
       beside it and padding are replaced by other tokens: its log-probs, its features and its cached decoding stay the
       same, bit for bit. Rounding cannot hide a leak here, in no precision. (Only in mixtures of experts other tokens
       change the shape of a product, and with it its rounding.)
    2. What it should see, it sees as usual. In float32 log-probs, decoding and features equal those of one sequence at
       a time with the model's own masks, its attention written out ("eager"), and its own logits.
    3. In the run's precision and with its attention kernels they are as near to these numbers as one sequence at a time
       is in that precision.

The model is a copy of the first layers, up to the first layer of each kind, with embedding and head; windows and
chunks are 8 tokens in the copy, so that short sequences show what is beyond them. An adapter is given weights.

Axis legend: as in algorithm/strided.py (B rows, S document tokens, A anchors, N rollouts at an anchor, G tokens).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from .algorithm.architecture import decoder_layers, decoder_of, head_of, reaches
from .algorithm.attention import STRIDED_BLOCKS
from .algorithm.decoding import evaluation_mode, generate_rollouts
from .algorithm.features import FeatureNetwork
from .algorithm.flex import STRIDED_FLEX
from .algorithm.losses import token_logprobs
from .algorithm.rows import completion_rows, generate_rows, rows_logprobs
from .algorithm.strided import attention_arguments, pack_layout, strided_logprobs
from .model_files import first_line

SAMPLES, TOKENS, SMALL_WINDOW = 2, 4, 8
TOLERANCE = 1e-3  # of log-probs in float32, of features as a share of their size
OF_CACHE = 5e-2  # of log-probs while recurrent layers decode with their cache: they round there in another way
ROUNDING = 1e-4  # of log-probs in float32, where other tokens change the shape of a product: mixtures of experts
# out of memory, in errors that are not a torch.OutOfMemoryError
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")
# what a model that was written for other inputs raises when it gets ours
STRANGE = (RuntimeError, TypeError, AttributeError, ValueError, LookupError, AssertionError)


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
    number = _number_of_first_layers(decoder)
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
    for adapter in _adapters(short):
        for weight in adapter.lora_B.parameters():  # they begin as zeros
            noise = 0.1 * torch.randn(weight.shape, generator=generator)
            weight.data.copy_(noise)
    return short


def _number_of_first_layers(decoder: PreTrainedModel) -> int | None:
    """How many layers a copy needs. None: all, because layers share keys, or are not in one list."""
    try:
        layers = decoder_layers(decoder)
    except ValueError:
        return None
    types = getattr(decoder.config, "layer_types", None) or [None] * len(layers)
    kinds = [(layer_type, repr(layer)) for layer_type, layer in zip(types, layers, strict=True)]
    number = max(2, *(1 + kinds.index(kind) for kind in kinds))
    return None if number >= len(layers) or decoder.config.to_dict().get("num_kv_shared_layers") else number


def _adapters(model: torch.nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def _without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """The frozen network of a LoRA run: the policy with its adapter off."""
    for adapter in _adapters(model):
        adapter.enable_adapters(False)
    try:
        yield
    finally:
        for adapter in _adapters(model):
            adapter.enable_adapters(True)


@torch.no_grad()
def can_be_cut(model: PreTrainedModel) -> bool:
    """Whether a decoder that ends after a layer gives the states that the whole one calls by the same number."""
    decoder, tokens = decoder_of(model), torch.arange(1, 13, device=model.device)[None]
    place, inputs = torch.arange(12, device=model.device)[None], {"input_ids": tokens}
    try:
        cut, whole = (FeatureNetwork(decoder, _layers(model), whole=whole) for whole in (False, True))
        pairs = list(zip(cut.hidden_states(place, **inputs), whole.hidden_states(place, **inputs), strict=True))
    except STRANGE as error:
        _raise_out_of_memory(error)
        return False
    return all(_gap("features", one, other) <= TOLERANCE for one, other in pairs)


# ----------------------------------------------------------------------------------------------------------------------
# The proof


@dataclass(frozen=True)
class Setting:
    """How a run uses a model.

    layout: packed or rows; implementation: of attention; dtype: of the arithmetic. autocast: weights are cast while
    they are used, as accelerate does it; otherwise they are in that precision, as FSDP2 does it. writes: the policy
    writes the rollouts itself; whole: the feature network runs all layers.
    """

    layout: str
    implementation: str
    dtype: torch.dtype
    autocast: bool = False
    writes: bool = True
    whole: bool = False

    def scores(self, model: PreTrainedModel, example: Example) -> Scores:
        """The scores of a model, by the run's own functions."""
        model.set_attn_implementation(self.implementation)
        frozen, own = partial(_without_adapters, model), decoder_of(self._frozen_copy(model))
        network = FeatureNetwork(own, _layers(model), frozen, self.layout, self.whole)
        with self._arithmetic(model):
            return scores(model, network, example, self.writes, model.device)

    def one_at_a_time(self, model: PreTrainedModel, example: Example, rollouts: Tensor) -> Scores:
        """The reference: each rollout alone, with transformers' own masks and attention written out."""
        model.set_attn_implementation("eager")
        given = example, rollouts, _layers(model), model.device
        with self._arithmetic(model):
            acting = one_at_a_time(model, *given)
            with _without_adapters(model):
                return replace(acting, features=one_at_a_time(self._frozen_copy(model), *given).features)

    def _frozen_copy(self, model: PreTrainedModel) -> PreTrainedModel:
        """What the feature network is made of: a copy in the run's precision; with an adapter, the policy itself."""
        if not self._casts or _adapters(model):
            return model
        frozen = copy.deepcopy(model)
        cast(frozen, self.dtype)
        return frozen

    @property
    def _casts(self) -> bool:
        return self.autocast and self.dtype != torch.float32

    def _arithmetic(self, model: PreTrainedModel):
        return torch.autocast(model.device.type, self.dtype, enabled=self._casts)


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters only: rotary frequencies are buffers."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _layers(model: PreTrainedModel) -> list[int]:
    """The hidden states that are compared: all but the last, so that the network is one that ends early."""
    config = decoder_of(model).config
    return list(range(config.num_hidden_layers))


@dataclass(frozen=True)
class Verdict:
    """Whether a model can be trained in a setting.

    reason: why not, as the end of a sentence about it; None: it can. whole: its feature network must run all layers.
    """

    reason: str | None
    whole: bool = False


def prove(model: PreTrainedModel, setting: Setting, device: torch.device) -> Verdict:
    """Tries a model in a setting, on a device."""
    vocabulary, packed = model.get_input_embeddings().weight.shape[0], setting.layout == "packed"
    example, kept = (packed_example(vocabulary), range(3)) if packed else (rows_example(vocabulary), range(1))
    changed = [example.with_changes(anchor, vocabulary) for anchor in kept]
    attends_alone, experts = True, "experts" in repr(model).lower()
    try:
        reaches(decoder_of(model).config)
    except ValueError as error:
        attends_alone = False
        if packed:
            return Verdict(str(error))
    try:
        short = first_layers(model).to(device)
        if not setting.autocast:
            cast(short, setting.dtype)
        short.set_attn_implementation("eager")
        setting = replace(setting, whole=not can_be_cut(short))
        found = setting.scores(short, example)
        if not all(tensor.isfinite().all() for tensor in (found.logprobs, found.decoded, found.features)):
            return Verdict("its log-probs are not finite: are its weights damaged?")
        leaks = _leak(found, [setting.scores(short, other) for other in changed])
        alone = setting.one_at_a_time(short, example, found.rollouts)
        # a copy of all layers is large in float32: then on the CPU, where there is room for the model
        of_few = _number_of_first_layers(decoder_of(model)) is not None
        exactly, short = replace(setting, dtype=torch.float32), short.to(device if of_few else "cpu").float()
        truth = exactly.one_at_a_time(short, example, found.rollouts)
        if setting.implementation == STRIDED_FLEX:  # flex.prove_flex_attention compares the kernels
            exactly = replace(exactly, implementation=STRIDED_BLOCKS)
        found_exactly = exactly.scores(short, example)
        leaks_exactly = _leak(found_exactly, [exactly.scores(short, other) for other in changed]) if leaks else {}
        truth_exactly = exactly.one_at_a_time(short, example, found_exactly.rollouts)
    except STRANGE as error:
        _raise_out_of_memory(error)
        way = "with a mask over packed rollouts" if packed else "with a row for each completion"
        return Verdict(f"it does not run {way}: {first_line(error)}")
    tolerances = dict.fromkeys(_NAMES, TOLERANCE) | ({} if attends_alone else {"decoded": OF_CACHE})
    reason = (
        _leaks_too_much(leaks, leaks_exactly, _gaps(alone, truth, torch.max), experts)
        or _unlike(_gaps(found_exactly, truth_exactly, torch.max), tolerances)
        or _less_precise(found, alone, truth, tolerances, experts)
    )
    return Verdict(reason, reason is None and setting.whole)


def _leaks_too_much(
    leaks: dict[str, float], leaks_exactly: dict[str, float], rounding: dict[str, float], experts: bool
) -> str | None:
    """Any change is a leak, but where experts round: a change below that of the precision, and of float32's."""
    for name, leak in leaks.items():
        rounded = experts and leaks_exactly.get(name, 0.0) <= ROUNDING and leak <= max(ROUNDING, 2 * rounding[name])
        if not rounded:
            return f"the tokens that a rollout may not see change its {_NAMES[name]} by {leak:.2g}"
    return None


def _unlike(gaps: dict[str, float], tolerances: dict[str, float]) -> str | None:
    for name, gap in gaps.items():
        if not gap <= tolerances[name]:
            return f"in float32 its {_NAMES[name]} differ by {gap:.2g} from those of one sequence at a time"
    return None


def _less_precise(
    found: Scores, alone: Scores, truth: Scores, tolerances: dict[str, float], experts: bool
) -> str | None:
    """Medians, because a few numbers are far away by chance: of each anchor's, the largest.

    Where rounding sends tokens to another expert, those of an anchor may all be far away: there of all.
    """
    summary = torch.median if experts else _largest_median
    rounding, apart = _gaps(alone, truth, summary), _gaps(found, truth, summary)
    for name, gap in apart.items():
        if not gap <= 4 * rounding[name] + tolerances[name]:
            return (
                f"its {_NAMES[name]} differ by {gap:.2g} from float32's, and those of one sequence at a time, in the "
                f"same precision, only by {rounding[name]:.2g}"
            )
    return None


def _largest_median(gaps: Tensor) -> Tensor:
    """(B, A, ..) -> (): the largest over rows and anchors of the median of the rest."""
    return gaps.flatten(2).median(dim=2).values.max()


def _raise_out_of_memory(error: Exception) -> None:
    """Raises an error of the machine again: it says nothing about the model."""
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY):
        raise error


def _leak(found: Scores, others: list[Scores]) -> dict[str, float]:
    """By how much rollout 0 at anchor k differs in the k-th of the others. Only what differs, so nothing is {}."""
    leaks = {}
    for name in _NAMES:
        for anchor, other in enumerate(others):
            before, after = (getattr(scores, name)[:, anchor, 0] for scores in (found, other))
            if not torch.equal(before, after):
                leaks[name] = max(leaks.get(name, 0.0), _gap(name, before, after))
    return leaks


def _gaps(found: Scores, expected: Scores, summary: Callable[[Tensor], Tensor]) -> dict[str, float]:
    return {name: _gap(name, getattr(found, name), getattr(expected, name), summary) for name in _NAMES}


def _gap(name: str, found: Tensor, expected: Tensor, summary: Callable[[Tensor], Tensor] = torch.max) -> float:
    """The largest difference, of features as a share of the state's length. NaN and infinity count as infinite.

    The first state is the embedding, which nothing rounds: it has no part in a median.
    """
    gap = (found - expected).abs()
    if name == "features":
        gap = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
        gap = gap if summary is torch.max else gap[..., 1:, :]
    return summary(gap.nan_to_num(torch.inf, torch.inf)).item()


_NAMES = {"logprobs": "log-probs", "features": "features", "decoded": "log-probs while decoding"}
