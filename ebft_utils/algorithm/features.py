"""Features: hidden states of the frozen network, normalised per layer, concatenated, pooled over a rollout's tokens.

Axis legend
    B  rows      S  document tokens      A  anchors      N  rollouts at an anchor      G  tokens of a rollout
    L  packed tokens, S + A*N*G, anchor-major (see strided.py)
    K  packed positions that are read    T  positions of one rollout that are read
    H  hidden width                      D  feature width, (number of layers) * H
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from .architecture import decoder_layers
from .decoding import evaluation_mode
from .rows import completion_rows
from .strided import attention_arguments, pack_layout

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "norm_f", "ln_f", "layer_norm", "embedding_norm")
FEATURE_NORMS = ("layer", "joint")
EMBED_METHODS = ("last_token", "mean_pooling", "completion_mean", "concat")


def layer_indices(feature_layers: list[float], num_layers: int) -> list[int]:
    """Depths in 0..1 -> indices into the num_layers + 1 hidden states.

    0 = embeddings, num_layers = after the final norm.
    """
    return [int(depth * num_layers + 1e-9) for depth in feature_layers]  # 0.29 * 100 is 28.999999999999996


def pooled_steps(embed_method: str, num_generated: int) -> list[int]:
    """Which of a rollout's G tokens are read.

    mean_pooling and completion_mean both average all of them: in strided mode a rollout is its completion.
    """
    if embed_method not in EMBED_METHODS:
        raise ValueError(f"embed_method is {embed_method!r}; allowed: {', '.join(EMBED_METHODS)}")
    if embed_method == "last_token":
        return [num_generated - 1]
    if embed_method == "concat":
        return [num_generated * quarter // 4 for quarter in (1, 2, 3)]
    return list(range(num_generated))


def pool(states: Tensor, embed_method: str) -> Tensor:
    """(..., T, D) states at `pooled_steps` -> (..., D), or (..., 3 D) for concat, scaled to the length of one state."""
    if embed_method in ("mean_pooling", "completion_mean"):
        return states.mean(-2)
    return states.flatten(-2) / states.shape[-2] ** 0.5


def cut_decoder(decoder: torch.nn.Module, num_layers: int) -> torch.nn.Module:
    """A view of a decoder that ends after num_layers layers and shares its parameters.

    The final norm is kept only when all layers are.
    Raises ValueError for a decoder that is not built of layers and one final norm.
    """
    layers = decoder_layers(decoder)
    (place,) = [name for name, child in decoder.named_children() if child is layers]
    final_norm = [name for name in FINAL_NORMS if name in decoder._modules]
    if len(final_norm) != 1:
        raise ValueError(f"{type(decoder).__name__} has no final norm of a known name ({', '.join(FINAL_NORMS)})")
    view = copy.copy(decoder)
    view._modules = dict(decoder._modules)
    setattr(view, place, torch.nn.ModuleList(list(layers)[:num_layers]))
    if num_layers < len(layers):
        setattr(view, final_norm[0], torch.nn.Identity())
    return view


class FeatureNetwork:
    """The frozen network phi: a decoder cut after its deepest feature layer, without LM head, run without gradient.

    Args:
        decoder: of the frozen copy, or of the policy itself when it is trained with LoRA.
        layers: indices of the hidden states to read.
        frozen: for LoRA, the context in which the policy's own decoder computes phi (its adapter switched off). It is
            closed again before anything is trained.
        layout: how completions stand in a forward: packed (strided.py) or rows (rows.py).
        whole: run all layers, for a decoder that cannot be cut.
    """

    def __init__(
        self,
        decoder: torch.nn.Module,
        layers: list[int],
        frozen: Callable[[], AbstractContextManager] | None = None,
        layout: str = "packed",
        whole: bool = False,
    ):
        self.layers, self.layout, self.whole = layers, layout, whole
        self.is_policy = frozen is not None
        self.decoder = decoder if whole else cut_decoder(decoder, max(layers))
        self.blocks = [] if whole else list(decoder_layers(decoder))
        self.frozen = frozen or nullcontext

    @property
    def device(self) -> torch.device:
        """Where the network computes. Inputs must be there, and its states are there."""
        return next(self.decoder.parameters()).device

    @torch.no_grad()
    def hidden_states(self, index: Tensor, **inputs) -> list[Tensor]:
        """The raw hidden states of each feature layer at chosen positions.

        Args: index (B, K), the positions; inputs of the decoder, (B, L). Returns a list of (B, K, H).
        """
        captured, deepest = {}, max(self.layers)

        def read(states: Tensor) -> Tensor:
            if states.dim() != 3:
                raise ValueError(f"a hidden state of {states.dim()} axes is no feature: (B, L, H) was expected")
            return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

        with ExitStack() as stack:
            stack.enter_context(self.frozen())
            stack.enter_context(evaluation_mode(self.decoder))
            if self.whole:
                states = self.decoder(**inputs, use_cache=False, output_hidden_states=True).hidden_states
                if len(states) <= deepest:
                    raise ValueError(
                        f"it gives only {len(states)} hidden states and state {deepest} is a feature layer"
                    )
                return [read(states[layer]) for layer in self.layers]
            for layer in set(self.layers) - {deepest}:  # hidden state k is what enters layer k

                def hook(module, args, kwargs, layer=layer):
                    captured[layer] = read(args[0] if args else kwargs["hidden_states"])

                stack.callback(self.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
            captured[deepest] = read(self.decoder(**inputs, use_cache=False).last_hidden_state)
        return [captured[layer] for layer in self.layers]


@torch.no_grad()
def strided_features(
    network: FeatureNetwork,
    document_ids: Tensor,
    segment_ids: Tensor,
    rollouts: Tensor,
    anchors: Tensor,
    valid: Tensor,
    embed_method: str,
    feature_norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Features of all rollouts and of the ground truth at the same places, in one packed forward.

    The truth at anchor a is the document itself: its token t is the document token a + t.

    Args: document_ids, segment_ids (B, S); rollouts (B, A, N, G); anchors, valid (B, A).
    Returns: features of the rollouts (B, A, N, D) and of the truth (B, A, D), float32.
    """
    home, device = document_ids.device, network.device
    document_ids, segment_ids, rollouts, anchors, valid = (
        tensor.to(device) for tensor in (document_ids, segment_ids, rollouts, anchors, valid)
    )
    batch, num_anchors, num_samples, num_generated = rollouts.shape
    length = document_ids.shape[1]
    steps = torch.tensor(pooled_steps(embed_method, num_generated), device=device)
    layout = pack_layout(segment_ids, anchors, valid, num_samples, num_generated)
    truth_index = (anchors.unsqueeze(-1) + steps).flatten(1)
    rollout_start = length + torch.arange(num_anchors * num_samples, device=device) * num_generated
    rollout_index = (rollout_start.unsqueeze(-1) + steps).flatten().expand(batch, -1)
    states = network.hidden_states(
        torch.cat([truth_index, rollout_index], dim=1),
        input_ids=torch.cat([document_ids, rollouts.flatten(1)], dim=1),
        position_ids=layout.position_ids,
        **attention_arguments(network.decoder, layout),
    )
    states = normalised(states, feature_norm)  # (B, K, D)
    truth, generated = states.split([truth_index.shape[1], rollout_index.shape[1]], dim=1)
    truth = pool(truth.unflatten(1, (num_anchors, -1)), embed_method)
    generated = pool(generated.unflatten(1, (num_anchors, num_samples, -1)), embed_method)
    return generated.to(home), truth.to(home)


@torch.no_grad()
def completion_features(
    network: FeatureNetwork,
    document_ids: Tensor,
    prompt_lengths: Tensor,
    truth_lengths: Tensor,
    completions: Tensor,
    completion_lengths: Tensor,
    embed_method: str,
    feature_norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Features of prompt + completion, for each completion, and of prompt + truth, in one forward.

    What is read of a completion:
        last_token       the state of its last token
        concat           the states at 1/4, 1/2 and 3/4 of it, side by side
        completion_mean  the mean over its tokens
        mean_pooling     the mean over the prompt's tokens and its own

    Args:
        document_ids (B, S), prompt + truth, right-padded; prompt_lengths, truth_lengths (B), at least 1.
        completions (B, N, G), right-padded; completion_lengths (B, N), at least 1.
    Returns: features of the completions (B, N, D) and of the truth (B, D), float32.
    """
    home, device = document_ids.device, network.device
    document_ids, prompt_lengths, truth_lengths, completions, completion_lengths = (
        tensor.to(device) for tensor in (document_ids, prompt_lengths, truth_lengths, completions, completion_lengths)
    )
    lengths = torch.cat([truth_lengths.unsqueeze(-1), completion_lengths], dim=1)
    steps, counted = read_steps(lengths, embed_method)  # (B, 1 + N, T)
    num_of_prompt = int(prompt_lengths.max()) if embed_method == "mean_pooling" else 0
    states_of = _states_of_rows if network.layout == "rows" else _packed_states
    states = states_of(network, document_ids, prompt_lengths, completions, lengths, steps, num_of_prompt)
    states = normalised(states, feature_norm)
    own, prompt = states.split([steps[0].numel(), num_of_prompt], dim=1)
    own = own.unflatten(1, (lengths.shape[1], -1))  # (B, 1 + N, T, D)
    if embed_method in ("mean_pooling", "completion_mean"):
        total, number = torch.where(counted.unsqueeze(-1), own, 0.0).sum(2), counted.sum(2)
        if embed_method == "mean_pooling":
            of_prompt = torch.arange(num_of_prompt, device=device) < prompt_lengths.unsqueeze(-1)
            total = total + torch.where(of_prompt.unsqueeze(-1), prompt, 0.0).sum(1, keepdim=True)
            number = number + prompt_lengths.unsqueeze(-1)
        features = total / number.unsqueeze(-1)
    else:
        features = pool(own, embed_method)
    features = features.to(home)
    return features[:, 1:], features[:, 0]


def _packed_states(
    network: FeatureNetwork,
    document_ids: Tensor,
    prompt_lengths: Tensor,
    completions: Tensor,
    lengths: Tensor,
    steps: Tensor,
    num_of_prompt: int,
) -> list[Tensor]:
    """States at the given steps of truth and completions, and of the prompt's first tokens.

    The layout is the strided one with a single anchor, at the prompt's end.

    Args: lengths (B, 1 + N) of truth and completions; steps (B, 1 + N, T). Returns a list of (B, (1 + N) T + P, H).
    """
    (batch, length), (_, num_samples, num_generated) = document_ids.shape, completions.shape
    index = torch.arange(length, device=document_ids.device)
    anchors = prompt_lengths.unsqueeze(-1)  # (B, 1)
    segment_ids = torch.where(index < anchors + lengths[:, :1], 0, -1)
    layout = pack_layout(segment_ids, anchors, torch.ones_like(anchors, dtype=torch.bool), num_samples, num_generated)
    completion_starts = length + torch.arange(num_samples, device=index.device) * num_generated
    starts = torch.cat([anchors, completion_starts.expand(batch, -1)], dim=1)
    read = (starts.unsqueeze(-1) + steps).flatten(1)
    return network.hidden_states(
        torch.cat([read, index[:num_of_prompt].expand(batch, -1)], dim=1),
        input_ids=torch.cat([document_ids, completions.flatten(1)], dim=1),
        position_ids=layout.position_ids,
        **attention_arguments(network.decoder, layout),
    )


def _states_of_rows(
    network: FeatureNetwork,
    document_ids: Tensor,
    prompt_lengths: Tensor,
    completions: Tensor,
    lengths: Tensor,
    steps: Tensor,
    num_of_prompt: int,
) -> list[Tensor]:
    """The same, with a row for the truth and one for each completion. The prompt is read in the truth's row."""
    batch, num_rows = lengths.shape
    truth = document_ids.gather(1, _clamped(prompt_lengths.unsqueeze(-1), int(lengths[:, 0].max()), document_ids))
    width = max(truth.shape[1], completions.shape[2])
    spans = [torch.nn.functional.pad(span, (0, width - span.shape[-1])) for span in (truth.unsqueeze(1), completions)]
    tokens, is_token = completion_rows(document_ids, prompt_lengths, torch.cat(spans, dim=1), lengths)
    read = (prompt_lengths.view(-1, 1, 1) + steps).flatten(0, 1)  # (B (1 + N), T)
    num_steps = read.shape[1]
    if num_of_prompt:
        read = torch.cat([read, torch.arange(num_of_prompt, device=read.device).expand(len(read), -1)], dim=1)
    states = network.hidden_states(read, input_ids=tokens.flatten(0, 1), attention_mask=is_token.flatten(0, 1).long())
    states = [state.unflatten(0, (batch, num_rows)) for state in states]
    return [torch.cat([state[:, :, :num_steps].flatten(1, 2), state[:, 0, num_steps:]], dim=1) for state in states]


def _clamped(first: Tensor, count: int, tokens: Tensor) -> Tensor:
    """Indices first, first + 1, .. of `count` tokens of each row. Beyond the row's end they stay at its last token."""
    index = first + torch.arange(count, device=tokens.device)
    return index.clamp_max(tokens.shape[1] - 1)


def read_steps(lengths: Tensor, embed_method: str) -> tuple[Tensor, Tensor]:
    """Which tokens of rollouts of different lengths are read.

    Args: lengths (...). Returns steps (..., T) and whether each counts (..., T).
    """
    if embed_method == "last_token":
        steps = lengths.unsqueeze(-1) - 1
    elif embed_method == "concat":
        steps = lengths.unsqueeze(-1) * torch.tensor([1, 2, 3], device=lengths.device) // 4
    else:
        steps = torch.arange(int(lengths.max()), device=lengths.device).expand(*lengths.shape, -1)
        counted = steps < lengths.unsqueeze(-1)
        return torch.where(counted, steps, 0), counted
    return steps, torch.ones_like(steps, dtype=torch.bool)


def normalised(states: list[Tensor], feature_norm: str) -> Tensor:
    """The states of the feature layers side by side, scaled to length 1.

    layer: each layer to length 1, then the whole by 1/sqrt(layers); joint: the whole at once, as the paper's released
    code does, so that layers with large states count more. list of (..., H) -> (..., D), float32.
    """
    if feature_norm not in FEATURE_NORMS:
        raise ValueError(f"feature_norm is {feature_norm!r}; allowed: {', '.join(FEATURE_NORMS)}")
    normalize = torch.nn.functional.normalize
    if feature_norm == "joint":
        return normalize(torch.cat([state.float() for state in states], dim=-1), dim=-1)
    return torch.cat([normalize(state.float(), dim=-1) for state in states], dim=-1) / len(states) ** 0.5
