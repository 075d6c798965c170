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
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .algorithm.architecture import cast_weights, decoder_of, reaches
from .algorithm.attention import STRIDED_BLOCKS
from .algorithm.features import FeatureNetwork
from .algorithm.flex import STRIDED_FLEX
from .model_files import first_line
from .trial import (
    Example,
    Scores,
    adapters_of,
    first_layers,
    number_of_first_layers,
    one_at_a_time,
    packed_example,
    rows_example,
    scores,
    without_adapters,
)

TOLERANCE = 1e-3  # of log-probs in float32, of features as a share of their size
OF_CACHE = 5e-2  # of log-probs while recurrent layers decode with their cache: they round there in another way
ROUNDING = 1e-4  # of log-probs in float32, where other tokens change the shape of a product: mixtures of experts
# out of memory, in errors that are not a torch.OutOfMemoryError
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")
# what a model that was written for other inputs raises when it gets ours
STRANGE = (RuntimeError, TypeError, AttributeError, ValueError, LookupError, AssertionError)


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
        frozen, own = partial(without_adapters, model), decoder_of(self._frozen_copy(model))
        network = FeatureNetwork(own, _layers(model), frozen, self.layout, self.whole)
        with self._arithmetic(model):
            return scores(model, network, example, self.writes, model.device)

    def one_at_a_time(self, model: PreTrainedModel, example: Example, rollouts: Tensor) -> Scores:
        """The reference: each rollout alone, with transformers' own masks and attention written out."""
        model.set_attn_implementation("eager")
        given = example, rollouts, _layers(model), model.device
        with self._arithmetic(model):
            acting = one_at_a_time(model, *given)
            with without_adapters(model):
                return replace(acting, features=one_at_a_time(self._frozen_copy(model), *given).features)

    def _frozen_copy(self, model: PreTrainedModel) -> PreTrainedModel:
        """What the feature network is made of: a copy in the run's precision; with an adapter, the policy itself."""
        if not self._casts or adapters_of(model):
            return model
        frozen = copy.deepcopy(model)
        cast_weights(frozen, self.dtype)
        return frozen

    @property
    def _casts(self) -> bool:
        return self.autocast and self.dtype != torch.float32

    def _arithmetic(self, model: PreTrainedModel):
        return torch.autocast(model.device.type, self.dtype, enabled=self._casts)


def _layers(model: PreTrainedModel) -> list[int]:
    """The hidden states that are compared: all but the last, so that the network is one that ends early."""
    config = decoder_of(model).config
    return list(range(config.num_hidden_layers))


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
            cast_weights(short, setting.dtype)
        short.set_attn_implementation("eager")
        setting = replace(setting, whole=not can_be_cut(short))
        found = setting.scores(short, example)
        if not all(tensor.isfinite().all() for tensor in (found.logprobs, found.decoded, found.features)):
            return Verdict("its log-probs are not finite: are its weights damaged?")
        leaks = _leak(found, [setting.scores(short, other) for other in changed])
        alone = setting.one_at_a_time(short, example, found.rollouts)
        found_exactly, leaks_exactly, truth, truth_exactly = found, leaks, alone, alone
        if setting.dtype != torch.float32 or setting.implementation == STRIDED_FLEX:
            # a copy of all layers is large in float32: then on the CPU, where there is room for the model
            of_few = number_of_first_layers(decoder_of(model)) is not None
            short, exactly = short.to(device if of_few else "cpu").float(), replace(setting, dtype=torch.float32)
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
