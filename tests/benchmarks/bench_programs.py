"""The programs that bench_strided.py times: a step of ours, one in the released code's layout, and a plain forward."""

import copy
import time
from argparse import Namespace
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ebft_utils.algorithm.architecture import cast_weights, head_of
from ebft_utils.algorithm.attention import STRIDED_BLOCKS
from ebft_utils.algorithm.decoding import sample_tokens
from ebft_utils.algorithm.features import FeatureNetwork, layer_indices, strided_features
from ebft_utils.algorithm.losses import policy_gradient_loss, token_logprobs
from ebft_utils.algorithm.rewards import feature_matching_rewards, share_equal_rollouts
from ebft_utils.algorithm.strided import (
    Layout,
    attention_arguments,
    dense_mask,
    find_anchors,
    pack_layout,
    rollouts_to_train,
)
from ebft_utils.config.data import TextDataConfig
from ebft_utils.config.modes import StridedConfig
from ebft_utils.config.sections import ModelConfig, TrainConfig
from ebft_utils.layouts import set_attention
from ebft_utils.models import DTYPES, Policy, load_causal_lm

TEMPERATURE, STRIDE, CONTEXT, GENERATED = 0.6, 8, 8, 8
FEATURE_LAYERS = [0.25, 0.5, 0.75]
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "vocab_size")
SHAPES = {
    "tiny": (64, 128, 4, 4, 2, 512),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
    "llama1b": (2048, 8192, 16, 32, 8, 128256),
    "llama3b": (3072, 8192, 28, 24, 8, 128256),
}


# ----------------------------------------------------------------------------------------------------------------------
# Models and the task


@dataclass(frozen=True)
class Models:
    """The policy attends as asked, plain is the same weights with sdpa.

    The network attends like the policy; frozen is its weights, uncut, with sdpa.
    """

    policy: Policy
    plain: PreTrainedModel
    network: FeatureNetwork
    frozen: PreTrainedModel
    dtype: str

    def precision(self):
        """Where the trainer has autocast."""
        return torch.autocast(self.plain.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")


@dataclass(frozen=True)
class Task:
    """document, segments (1, S); anchors, valid (1, A)."""

    document: Tensor
    segments: Tensor
    anchors: Tensor
    valid: Tensor
    num_samples: int

    def uniforms(self, seed: int) -> Tensor:
        """(1, A, N, G) numbers that rollouts are sampled with: the same ones for each program."""
        shape = (1, self.anchors.shape[1], self.num_samples, GENERATED)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(self.document.device)

    def layout(self, num_tokens: int) -> Layout:
        """The document with all rollouts, num_tokens of each."""
        return pack_layout(self.segments, self.anchors, self.valid, self.num_samples, num_tokens)

    @property
    def num_tokens(self) -> int:
        """Of the document and of all rollouts."""
        return self.document.shape[1] + self.anchors.shape[1] * self.num_samples * GENERATED


@dataclass(frozen=True)
class Measured:
    """One run of a program: seconds by phase; model FLOPs, all and those of training.

    rollouts_saved: the share of rollouts that were not trained.
    """

    seconds: dict[str, float]
    flops: float = 0.0
    training_flops: float = 0.0
    rollouts_saved: float = 0.0


class Stopwatch:
    """Seconds by phase."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        """Counts the time since the last lap."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def forward_flops(model: PreTrainedModel, layout: Layout, num_layers: int, num_scored: int) -> float:
    """Model FLOPs of one forward over the tokens of a layout (one row, one document).

    The LM head is counted at num_scored of them. See the top of bench_strided.py.
    """
    settings = model.config.get_text_config()
    head_width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    layers = model.get_decoder().layers[:num_layers]
    weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    of_rollouts = layout.rollout_ids >= 0
    pairs = (layout.visible.sum() + (layout.steps[of_rollouts] + 1).sum()).item()
    matrices = 2 * weights * layout.position_ids.shape[1]
    matrices += 2 * model.get_output_embeddings().weight.numel() * num_scored
    return matrices + 4 * settings.num_attention_heads * head_width * num_layers * pairs


def make_task(vocab_size: int, length: int, num_samples: int, device: torch.device) -> Task:
    """A document of random tokens, and its anchors."""
    document = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    segments = torch.zeros_like(document)
    anchors, valid = find_anchors(
        segments, segments, context_length=CONTEXT, min_completion_prefix=0, stride=STRIDE, num_generated=GENERATED
    )
    return Task(document, segments, anchors, valid, num_samples)


def load_models(arguments: Namespace, device: torch.device) -> Models:
    """All four, on two sets of weights. Raises UserError where the attention that is asked for cannot run."""
    setting = ModelConfig(
        name_or_path=arguments.shape or arguments.model,
        dtype=arguments.dtype,
        attn_implementation=arguments.attention,
        compile_decoding=arguments.compile_decoding,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    data, train = TextDataConfig(dataset="random tokens"), TrainConfig(output_dir="none", max_steps=1)
    config = StridedConfig(model=setting, data=data, train=train)
    if arguments.shape:
        sizes = dict(zip(SIZES, SHAPES[arguments.shape], strict=True))
        shape = LlamaConfig(**sizes, max_position_embeddings=131072, tie_word_embeddings=True)
        with device:
            model = LlamaForCausalLM(shape)
        model.set_attn_implementation(STRIDED_BLOCKS)
    else:
        model = load_causal_lm(setting, torch.float32).to(device)
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    cast_weights(frozen, DTYPES[arguments.dtype])
    set_attention(config, model, device)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    plain, cut = sharing_weights(model), sharing_weights(frozen)
    cut.set_attn_implementation(model.config._attn_implementation)
    for other in (plain, frozen):
        other.set_attn_implementation("sdpa")
    network = FeatureNetwork(cut.get_decoder(), layer_indices(FEATURE_LAYERS, model.config.num_hidden_layers))
    return Models(Policy(model, compile_decoding=arguments.compile_decoding), plain, network, frozen, arguments.dtype)


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same parameters, whose attention can be set by itself."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


# ----------------------------------------------------------------------------------------------------------------------
# The programs


def our_step(models: Models, task: Task, seed: int) -> Measured:
    """The step of train_strided.py."""
    policy, uniforms = models.policy, task.uniforms(seed)
    document = dict(document_ids=task.document, segment_ids=task.segments, temperature=TEMPERATURE)
    watch = Stopwatch(task.document.device)
    with models.precision():
        rollouts = policy.generate(**document, anchors=task.anchors, valid=task.valid, uniforms=uniforms)
        watch.lap("generation")
        groups = rollouts, task.anchors, task.valid
        features, truth = strided_features(models.network, task.document, task.segments, *groups, "last_token")
    watch.lap("features")
    features = share_equal_rollouts(features, rollouts)
    rewards = feature_matching_rewards(features, truth, whitening="feature", alignment_coef=1.0, diversity_coef=1.0)
    advantages = rewards.reward - rewards.baseline
    trained, anchors, valid, summed = rollouts_to_train(rollouts, advantages, task.anchors, task.valid)
    watch.lap("rewards")
    with models.precision():
        logprobs, _ = policy(**document, rollouts=trained, anchors=anchors, valid=valid, document_grad=False)
    loss = policy_gradient_loss(logprobs, summed, valid.unsqueeze(-1), rollouts.numel())
    watch.lap("forward")
    loss.backward()
    watch.lap("backward")
    policy.zero_grad()
    training, others = our_flops(models, task, anchors, valid)
    saved = 1 - anchors.shape[1] / (task.anchors.shape[1] * task.num_samples)
    return Measured(watch.seconds, training + others, training, saved)


def our_flops(models: Models, task: Task, anchors: Tensor, valid: Tensor) -> tuple[float, float]:
    """Model FLOPs of training rollouts at these anchors (1, R), one at each, and of generation and features."""
    model, network = models.plain, models.network
    num_layers, (num_trained, num_anchors) = model.config.num_hidden_layers, (anchors.shape[1], task.anchors.shape[1])
    layout = pack_layout(task.segments, anchors, valid, 1, GENERATED - 1)
    head = model.get_output_embeddings().weight.numel()
    training = 3 * forward_flops(model, layout, num_layers, num_trained * GENERATED)
    training += 2 * head * (task.document.shape[1] - 1)  # document log-probs: no gradient
    # all rollouts of an anchor share the distribution of their first token
    num_sampled = num_anchors * (1 + task.num_samples * (GENERATED - 1))
    generation = forward_flops(model, task.layout(GENERATED - 1), num_layers, num_sampled)
    return training, generation + forward_flops(model, task.layout(GENERATED), max(network.layers), 0)


def copied_step(models: Models, task: Task, seed: int) -> Measured:
    """The same step in the released code's layout.

    n copies of [document | step 0 of all anchors | step 1 of all anchors | ..].
    """
    uniforms, anchors, length = task.uniforms(seed)[0], task.anchors[0], task.document.shape[1]
    watch = Stopwatch(task.document.device)
    layout = pack_layout(task.segments, task.anchors, task.valid, 1, GENERATED, step_major=True)
    mask, head = dense_mask(layout), head_of(models.plain)

    def run(network, tokens, **arguments):
        size = tokens.shape[1]
        arguments |= dict(attention_mask=mask[:, :, :size, :size], position_ids=layout.position_ids[:, :size])
        return network.get_decoder()(input_ids=tokens, use_cache=False, **arguments)

    with models.precision():
        tokens = copied_generation(run, models, task, uniforms)
        watch.lap("generation")
        generated, truth = copied_features(run, models, task, tokens)
    watch.lap("features")
    advantages = copied_advantages(generated, truth).mT.unsqueeze(1)  # (N, 1, A)
    watch.lap("rewards")
    with models.precision():
        hidden = run(models.plain, tokens).last_hidden_state
        later = hidden[:, length : length + (GENERATED - 1) * len(anchors)].unflatten(1, (GENERATED - 1, len(anchors)))
        predictors = torch.cat([hidden[:, None, anchors - 1], later], dim=1)  # (N, G, A, H)
        scored = tokens[:, length:].unflatten(1, (GENERATED, len(anchors)))
        logprobs = token_logprobs(predictors, head, scored, TEMPERATURE)
    loss = (-advantages * logprobs).mean()
    watch.lap("forward")
    loss.backward()
    watch.lap("backward")
    models.plain.zero_grad()
    return Measured(watch.seconds)


@torch.no_grad()
def copied_generation(run, models: Models, task: Task, uniforms: Tensor) -> Tensor:
    """(N, S + G*A) tokens. uniforms (A, N, G)."""
    head, num_anchors = head_of(models.plain), len(uniforms)
    tokens = task.document.expand(task.num_samples, -1)
    for step in range(GENERATED):
        hidden = run(models.plain, tokens).last_hidden_state
        newest = hidden[:, task.anchors[0] - 1] if step == 0 else hidden[:, -num_anchors:]
        numbers = uniforms[..., step].mT.reshape(-1, 1)
        drawn = sample_tokens(newest.flatten(0, 1), head, TEMPERATURE, numbers)
        tokens = torch.cat([tokens, drawn.view(task.num_samples, num_anchors)], dim=1)
    return tokens


@torch.no_grad()
def copied_features(run, models: Models, task: Task, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the rollouts (A, N, D) and of the truth (A, D), from all tokens' states in all layers."""
    states = run(models.frozen, tokens, output_hidden_states=True).hidden_states
    chosen = [states[layer] for layer in models.network.layers]
    chosen = torch.cat([torch.nn.functional.normalize(state.float(), dim=-1) for state in chosen], dim=-1)
    return chosen[:, -task.anchors.shape[1] :].transpose(0, 1), chosen[0, task.anchors[0] + GENERATED - 1]


def copied_advantages(generated: Tensor, truth: Tensor) -> Tensor:
    """(A, N), from what `copied_features` returns: eq 7-9, group by group, and the plain leave-one-out baseline."""
    num_samples = generated.shape[1]
    reward = generated.new_empty(generated.shape[:2])
    for index, (group, target) in enumerate(zip(generated, truth, strict=True)):
        left, singular, right = torch.linalg.svd(group, full_matrices=False)
        inverse = torch.where(singular > 1e-5 * singular[0], 1 / singular, 0.0)
        group = (left * (singular * inverse)) @ right
        target = right.mT @ (inverse * (right @ target))
        similarity = group @ group.mT
        diversity = 2 * (similarity.sum(1) - similarity.diagonal()) / (num_samples - 1)
        reward[index] = 2 * torch.cosine_similarity(group, target[None], dim=-1) - diversity
    return reward - (reward.sum(1, keepdim=True) - reward) / (num_samples - 1)


def forward_backward(models: Models, task: Task, seed: int) -> Measured:
    """One forward + backward of the packed tokens with the log-prob of each."""
    model = models.policy.causal_lm
    decoder, head = model.get_decoder(), head_of(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(head.weight.shape[0], (1, task.num_tokens), generator=generator).to(task.document.device)
    watch = Stopwatch(task.document.device)
    layout = task.layout(GENERATED)
    with models.precision():
        arguments = attention_arguments(decoder, layout)
        hidden = decoder(input_ids=tokens, position_ids=layout.position_ids, use_cache=False, **arguments)
        hidden = hidden.last_hidden_state
        loss = token_logprobs(hidden.flatten(0, 1), head, tokens.flatten(), TEMPERATURE).mean()
    loss.backward()
    watch.lap("forward_backward")
    model.zero_grad()
    flops = forward_flops(model, layout, model.config.num_hidden_layers, task.num_tokens)
    return Measured(watch.seconds, 3 * flops)


PROGRAMS = {"ours": our_step, "copied": copied_step, "forward_backward": forward_backward}
