"""How much memory a process needs, which settings lower it, and what is said when it has run out.

The estimate adds up what is known to be large, from the model's config alone: weights, gradients, optimizer state, the frozen copy; and the largest of what
follows one another: keys and values while rollouts are written, what autograd keeps of each layer, AdamW's temporary. It is meant to be right to a third. The
libraries' own memory (1 GB), and what an allocator holds without using it, are not in it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from transformers import AutoConfig, AutoModelForCausalLM

from ..algorithm.features import cut_decoder, layer_indices
from ..algorithm.losses import LOGITS_PER_CHUNK
from ..algorithm.strided import QUERIES_PER_BLOCK, number_of_parts
from ..config.modes import Config, FeatureNetworkConfig, LoraConfig
from ..config.settings import UserError
from ..models import (
    DTYPES,
    LOADING_ERRORS,
    attention_heads,
    base_causal_lm,
    feature_device,
    first_line,
    refuse_short_context,
    refuse_unsupported,
    resolve_source,
    with_adapter,
)
from .checkpoint import MAY_CHANGE

GB = 2**30
WORTH_SAYING = 0.05  # share of the peak that a setting has to save
IN_TURN = ("rollouts", "forward and backward", "update")
NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
)  # what else than torch.OutOfMemoryError says it


# ---------------------------------------------------------------------------------------------------------------------------------------
# The estimate


@dataclass
class Shape:
    """What the estimate needs to know of a model. Parameters: all, trained, of the layers that the feature network keeps."""

    parameters: int
    trained: int
    kept: int
    layers: int
    hidden: int
    inner: int
    heads: int
    key_value: int
    vocabulary: int


def shape_of(config: Config) -> Shape:
    """Of the model that a configuration names. Raises UserError when its config cannot be read."""
    source, gguf_file = resolve_source(config.model.name_or_path)
    arguments = {"gguf_file": gguf_file} if gguf_file else {"revision": config.model.revision}
    try:
        settings = AutoConfig.from_pretrained(source, **arguments).get_text_config()
        refuse_unsupported(settings, config.model.name_or_path)
        refuse_short_context(settings, *config.longest_sequence, config.model.name_or_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
            cut_decoder(model.get_decoder(), 0)  # or it refuses
            policy = model if config.lora is None else with_adapter(config, model)
    except LOADING_ERRORS as error:
        raise UserError(
            f"model.name_or_path: {config.model.name_or_path!r} cannot be loaded: {first_line(error)}"
        ) from None
    decoder = base_causal_lm(policy).get_decoder()
    base = {name: parameter for name, parameter in policy.named_parameters() if "lora_" not in name}
    layer = sum(parameter.numel() for name, parameter in decoder.layers[0].named_parameters() if "lora_" not in name)
    deepest = max(layer_indices(config.ebft.feature_layers, len(decoder.layers)))
    embedding = base_causal_lm(policy).get_input_embeddings().weight
    heads, key_heads, width = attention_heads(settings)
    return Shape(
        parameters=sum(parameter.numel() for parameter in base.values()),
        trained=sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad),
        kept=embedding.numel() + deepest * layer,
        layers=len(decoder.layers),
        hidden=settings.hidden_size,
        inner=settings.intermediate_size,
        heads=heads,
        key_value=key_heads * width,
        vocabulary=embedding.shape[0],
    )


def largest_row(config: Config) -> tuple[int, int]:
    """Most tokens of a row, and most anchors: those of a raw text of so many tokens."""
    tokens, ebft = config.longest_sequence[0], config.ebft
    return tokens, 1 if config.mode == "structured" else (
        tokens - config.first_anchor - ebft.generate_max_len
    ) // ebft.stride + 1


def rollouts_of(config: Config, document_tokens: int) -> tuple[int, int]:
    """Rollouts at an anchor, and most tokens of one."""
    ebft = config.ebft
    return (
        (ebft.n_samples_per_prompt, ebft.generate_max_len)
        if config.mode == "strided"
        else (ebft.num_generations, document_tokens - config.data.max_prompt_length)
    )


def rollout_tokens_at_once(config: Config, document_tokens: int, anchors: int) -> int:
    """Of a row, in one forward."""
    samples, length = rollouts_of(config, document_tokens)
    limit = config.ebft.max_packed_tokens if config.mode == "strided" else None
    return -(-anchors // number_of_parts(anchors, samples * length, document_tokens, limit)) * samples * length


def memory_estimate(
    config: Config,
    shape: Shape,
    document_tokens: int,
    anchors: int,
    num_processes: int,
    sharded: bool,
    device: torch.device,
) -> dict[str, float]:
    """Bytes of one process on the policy's device, by what they are for; the last entry is the peak: all that stays, and the largest of what comes in turn.

    Args: document_tokens, anchors: of the largest row.
    """
    width = DTYPES[config.model.dtype].itemsize
    ebft, lora, trains = config.ebft, config.lora is not None, not config.eval.only
    attention = config.model.attn_implementation
    flex = attention == "flex_attention" or (attention == "auto" and device.type == "cuda" and width == 2)
    parts = num_processes if sharded else 1
    rows = config.train.per_device_batch_size
    rollout_tokens = rollout_tokens_at_once(config, document_tokens, anchors)
    trained_rollout_tokens = rollout_tokens if ebft.rl_coef > 0 else 0
    row_tokens = document_tokens + trained_rollout_tokens
    tokens = rows * row_tokens
    trained = shape.trained / parts if trains else 0
    beside = not lora and _same(feature_device(config.feature_network.device, device), device)
    evaluated = config.eval.only or (
        config.eval.num_documents != 0 and (config.eval.at_start or config.eval.at_end or config.eval.every_steps > 0)
    )
    writing = max(rows if trains and ebft.rl_coef > 0 else 0, config.eval.per_device_batch_size if evaluated else 0)
    writing = (
        writing if config.mode == "strided" or not ebft.use_vllm else 0
    )  # rows whose rollouts the policy writes at a time
    keys_and_values = writing * (document_tokens + rollout_tokens) * 2 * shape.key_value * shape.layers * width
    stays = {
        "weights": (shape.parameters * width + 4 * shape.trained if lora else 4 * shape.parameters) / parts,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "feature network": shape.kept * width / (num_processes if config.feature_network.shard else 1) if beside else 0,
        "keys and values": keys_and_values if config.model.compile_decoding else 0,
    }
    # what stands beside the weights while they are used: FSDP2 gathers them, autocast casts them
    used = shape.parameters * width if sharded or (width < 4 and not lora) else 0
    # what autograd keeps of a token in a layer, counted (saved_tensors_hooks) for the Llama architecture; autocast has a float32 residual stream
    kept = 14 if width == 4 else 17 if lora or sharded else 22
    per_layer = width * (kept * shape.hidden + 4 * shape.inner)
    blocks = 0 if flex or attention == "eager" else -(-trained_rollout_tokens // QUERIES_PER_BLOCK)
    per_layer_keys = width * rows * 2 * shape.hidden * blocks * (document_tokens // 2 + QUERIES_PER_BLOCK)
    per_layer_scores = (
        rows * shape.heads * row_tokens**2 * (4 if width == 4 else 4 + width) if attention == "eager" else 0
    )
    one_layer = tokens * per_layer + per_layer_keys + per_layer_scores
    activations = (
        tokens * shape.hidden * width * shape.layers + one_layer
        if config.model.gradient_checkpointing
        else one_layer * shape.layers
    )
    logits, sampled = (
        min(LOGITS_PER_CHUNK, number * shape.vocabulary)
        for number in (tokens, writing * rollout_tokens // rollouts_of(config, document_tokens)[1])
    )
    head = 3 * 4 * logits + tokens * shape.hidden * 4 + (4 * shape.vocabulary * shape.hidden if not lora else 0)
    in_turn = (
        6 * 4 * sampled + (0 if config.model.compile_decoding else keys_and_values) + used if writing else 0,
        activations + head + used if trains else 0,
        4 * trained
        if device.type == "cuda"
        else 0,  # AdamW takes all weights at once there: the square roots of their moments are a copy
    )
    return {**stays, **dict(zip(IN_TURN, in_turn, strict=True)), "peak": sum(stays.values()) + max(in_turn)}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Advice


def ways_to_save(
    config: Config,
    shape: Shape,
    document_tokens: int,
    anchors: int,
    num_processes: int,
    sharded: bool,
    device: torch.device,
) -> list[tuple[str, float]]:
    """Settings (as on the command line, with what they are now) that lower the peak, each alone, and by how many bytes; the largest first.

    Those that change what is trained (fewer or shorter rollouts, shorter rows, an adapter) come last, all but the adapter only when nothing else is left.
    """
    where = num_processes, sharded, device
    now = memory_estimate(config, shape, document_tokens, anchors, *where)["peak"]

    def saved(candidates: list[tuple[str, object]]) -> list[tuple[str, float]]:
        found = []
        for key, value in candidates:
            try:
                changed = with_setting(config, key, value)
                new_shape = shape_of(changed) if key == "lora.r" else shape
            except UserError:  # it does not go with the other settings
                continue
            row = [min(pair) for pair in zip((document_tokens, anchors), largest_row(changed), strict=True)]
            less = now - memory_estimate(changed, new_shape, *row, *where)["peak"]
            if less >= WORTH_SAYING * now:
                found.append((f"{key}={_written(value)} ({_before(config, key)})", less))
        return sorted(found, key=lambda one: -one[1])  # stable: equal ones in the order of preference

    ways = saved(_harmless(config, document_tokens, anchors, sharded, device))
    if num_processes > 1 and not sharded and device.type == "cuda" and not config.model.compile_decoding:
        less = now - memory_estimate(config, shape, document_tokens, anchors, num_processes, True, device)["peak"]
        ways = (
            sorted([*ways, ("--config_file accelerate_configs/fsdp2.yaml (now DDP)", less)], key=lambda one: -one[1])
            if less >= WORTH_SAYING * now
            else ways
        )
    if not ways:
        ways = saved(_other_training(config))
    return ways + (saved([("lora.r", LoraConfig().r)]) if config.lora is None else [])


def _harmless(
    config: Config, document_tokens: int, anchors: int, sharded: bool, device: torch.device
) -> list[tuple[str, object]]:
    """Settings that leave the update as it is, up to rounding, in the order of preference. (What is already set saves nothing.)"""
    rows = config.train.per_device_batch_size
    half = max(
        (size for size in range(1, rows // 2 + 1) if rows % size == 0), default=1
    )  # a divisor goes with any number of processes
    candidates = [
        ("train.per_device_batch_size", half),
        ("eval.per_device_batch_size", max(1, config.eval.per_device_batch_size // 2)),
    ]
    if config.mode == "strided":
        candidates.append(
            (
                "ebft.max_packed_tokens",
                (document_tokens + rollout_tokens_at_once(config, document_tokens, anchors)) // 2,
            )
        )
    candidates += [
        ("model.gradient_checkpointing", True),
        ("model.attn_implementation", "auto"),
        ("model.compile_decoding", False),
        ("model.dtype", "bfloat16"),
    ]
    if sharded:
        candidates.append(("feature_network.shard", True))
    elif device.type == "cuda":
        candidates.append(("feature_network.device", "cpu"))
    return candidates


def _other_training(config: Config) -> list[tuple[str, object]]:
    """Settings that save memory because less is trained at a time: another run."""
    ebft, data = config.ebft, config.data
    if config.mode == "strided":
        values = [
            ("ebft.n_samples_per_prompt", max(2, ebft.n_samples_per_prompt // 2)),
            ("ebft.stride", 2 * ebft.stride),
            ("data.sequence_length", data.sequence_length // 2),
        ]
    else:
        length = ("ebft.max_completion_length", max(1, ebft.max_completion_length // 2))
        if data.max_conversation_length is not None:
            length = ("data.max_conversation_length", data.max_conversation_length // 2)
        values = [("ebft.num_generations", max(2, ebft.num_generations // 2)), length]
    return values


def with_setting(config: Config, key: str, value) -> Config:
    """The configuration with another value. Raises ConfigError when that does not go with the others."""
    if key == "lora.r":
        return replace(
            config, lora=LoraConfig(r=value), feature_network=FeatureNetworkConfig()
        )  # there is no frozen copy with it
    section, _, name = key.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _written(value) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _before(config: Config, key: str) -> str:
    if key == "lora.r":
        return "now all weights are trained: another method"
    section, _, name = key.partition(".")
    return f"now {_written(getattr(getattr(config, section), name)).replace('none', 'no limit')}"


def in_words(peak: float, ways: list[tuple[str, float]]) -> str:
    """Of `ways_to_save`, without a stop."""
    if not ways:
        return f"no setting lowers the estimated {peak / GB:.1f} GB of a process by much: it takes larger devices, or a smaller model"
    return f"settings that lower the estimated {peak / GB:.1f} GB of a process, each alone: " + "; ".join(
        f"{setting}: about {less / GB:.1f} GB less" for setting, less in ways
    )


# ---------------------------------------------------------------------------------------------------------------------------------------
# When it has run out


@contextmanager
def out_of_memory_advice(config: Config, accelerator: Accelerator) -> Iterator[None]:
    """Inside, memory that runs out becomes a UserError: where it did, and what would help. All else passes. (TrainingLoop.train has saved by then.)"""
    try:
        yield
    except (RuntimeError, UserError) as error:
        cause = _ran_out(error)
        if cause is None:
            raise
        message = _out_of_memory(config, accelerator, cause)
        raise UserError(f"{error}; {message}" if isinstance(error, UserError) else message) from None


def _ran_out(error: Exception) -> Exception | None:
    """The error that says that memory has run out: this one, or the one that a message was made of (of loading) or hides (of saving, afterwards)."""
    context: BaseException | None = error
    while context is not None:
        if isinstance(context, torch.OutOfMemoryError) or (
            isinstance(context, RuntimeError) and any(words in str(context) for words in NO_MEMORY)
        ):
            return context
        context = context.__context__ if isinstance(error, UserError) else None
    return None


def _out_of_memory(config: Config, accelerator: Accelerator, error: Exception) -> str:
    policy_device = accelerator.device
    number = re.search(r"GPU (\d+) has a total capacity", str(error))
    device = (
        torch.device("cpu")
        if NO_MEMORY[0] in str(error)
        else torch.device("cuda", int(number[1]))
        if number
        else policy_device
    )
    has = f" ({torch.cuda.get_device_properties(device).total_memory / GB:.0f} GB)" if device.type == "cuda" else ""
    start = f"out of memory on {device if device.type == 'cuda' else device.type}{has}: the run does not fit"
    if not _same(device, policy_device):
        what = (
            "the feature network lies there"
            if config.lora is None and _same(device, feature_device(config.feature_network.device, policy_device))
            else "weights are read and saved there"
        )
        return f"{start}; the policy is on {policy_device}, and {what}"
    where = (
        *largest_row(config),
        accelerator.num_processes,
        accelerator.distributed_type == DistributedType.FSDP,
        policy_device,
    )
    try:
        shape = shape_of(config)
    except UserError:  # the advice is lost, not the message
        return start
    ways = ways_to_save(config, shape, *where)
    may_change = [setting.partition("=")[0] for setting, _ in ways if setting.partition("=")[0] in MAY_CHANGE]
    saved = any(Path(config.train.output_dir).expanduser().glob("checkpoint-*"))
    resume = (
        f". train.resume=latest goes on from the last checkpoint, with another {' or '.join(may_change)}"
        if saved and may_change
        else ""
    )
    return f"{start}; {in_words(memory_estimate(config, shape, *where)['peak'], ways)}{resume}"


def _same(one: torch.device, other: torch.device) -> bool:
    """cuda is cuda:0."""
    return (one.type, one.index or 0) == (other.type, other.index or 0)
