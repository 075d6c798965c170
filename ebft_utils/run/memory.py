"""How much memory a process needs, which settings lower it, and the advice when it has run out.

The estimate uses the model's config alone. It adds up what stays in memory (weights, gradients, optimizer state, the
frozen copy) and the largest of what is used in turn (keys and values during rollouts, what autograd keeps of each
layer, AdamW's temporary). It should be right within a third. It does not include the libraries' own memory (1 GB) and
what an allocator holds without using it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..algorithm.architecture import decoder_layers, decoder_of, reaches
from ..algorithm.features import layer_indices
from ..algorithm.losses import LOGITS_PER_CHUNK
from ..algorithm.strided import QUERIES_PER_BLOCK, number_of_parts
from ..config.modes import Config
from ..config.sections import LoraConfig
from ..config.settings import UserError
from ..layouts import attention_heads
from ..model_files import LOADING_ERRORS, first_line, plain_source
from ..models import DTYPES, base_causal_lm, feature_device, refuse_short_context, refuse_unsupported, with_adapter
from ..proof import NO_MEMORY
from ..text_decoders import decoder_config
from .checkpoint import MAY_CHANGE

GB = 2**30
FSDP2 = "accelerate_configs/fsdp2.yaml"
IN_TURN = ("rollouts", "forward and backward", "update")


# ----------------------------------------------------------------------------------------------------------------------
# The estimate


@dataclass
class Shape:
    """The sizes of a model that the estimate needs.

    kept: parameters of the layers that the feature network keeps. packed: whether its config allows the packed layout.
    """

    parameters: int
    trained: int
    kept: int
    layers: int
    hidden: int
    inner: int
    heads: int
    key_value: int
    vocabulary: int
    packed: bool = True


def shape_of(config: Config) -> Shape:
    """The shape of the model that a configuration names. Raises UserError when the model's config cannot be read."""
    source = plain_source(config.model.name_or_path)
    try:
        whole = AutoConfig.from_pretrained(source, revision=config.model.revision)
        settings = decoder_config(whole, config.model.name_or_path)
        refuse_unsupported(settings, config.model.name_or_path)
        refuse_short_context(config, settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
            policy = model if config.lora is None else with_adapter(config, model)
    except LOADING_ERRORS as error:
        name = config.model.name_or_path
        raise UserError(f"model.name_or_path: {name!r} cannot be loaded: {first_line(error)}") from None
    decoder = decoder_of(base_causal_lm(policy))
    base = {name: parameter for name, parameter in policy.named_parameters() if "lora_" not in name}
    parameters, count = sum(parameter.numel() for parameter in base.values()), settings.num_hidden_layers
    try:
        layers = decoder_layers(decoder)[: max(layer_indices(config.ebft.feature_layers, count))]
        named = [pair for layer in layers for pair in layer.named_parameters()]
        of_layers = sum(parameter.numel() for name, parameter in named if "lora_" not in name)
    except ValueError:  # it is not one list of layers, and runs whole
        of_layers = parameters
    embedding = base_causal_lm(policy).get_input_embeddings().weight
    heads, key_heads, width = attention_heads(settings)
    return Shape(
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad),
        kept=min(parameters, embedding.numel() + of_layers),
        layers=count,
        hidden=settings.hidden_size,
        inner=settings.to_dict().get("intermediate_size") or 4 * settings.hidden_size,
        heads=heads,
        key_value=key_heads * width,
        vocabulary=embedding.shape[0],
        packed=_may_be_packed(settings),
    )


def _may_be_packed(settings: PretrainedConfig) -> bool:
    try:
        reaches(settings)
    except ValueError:
        return False
    return True


def largest_row(config: Config) -> tuple[int, int]:
    """Most tokens of a row, and most anchors: those of a raw text with so many tokens."""
    tokens, ebft = config.longest_sequence[0], config.ebft
    if config.mode == "structured":
        return tokens, 1
    return tokens, (tokens - config.first_anchor - ebft.generate_max_len) // ebft.stride + 1


def rollouts_of(config: Config, document_tokens: int) -> tuple[int, int]:
    """Rollouts at an anchor, and most tokens of one."""
    ebft = config.ebft
    if config.mode == "strided":
        return ebft.n_samples_per_prompt, ebft.generate_max_len
    return ebft.num_generations, document_tokens - config.data.max_prompt_length


def rollout_tokens_at_once(config: Config, document_tokens: int, anchors: int, packed: bool = True) -> int:
    """The rollout tokens of a row in one forward. Not packed, each has the prompt before it."""
    samples, length = rollouts_of(config, document_tokens)
    if config.mode == "structured" and (config.ebft.layout == "rows" or not packed):
        return samples * document_tokens
    limit = config.ebft.max_packed_tokens if config.mode == "strided" else None
    num_parts = number_of_parts(anchors, samples * length, document_tokens, limit)
    return -(-anchors // num_parts) * samples * length


def _evaluates(config: Config) -> bool:
    settings = config.eval
    sometimes = settings.at_start or settings.at_end or settings.every_steps > 0
    return settings.only or (settings.num_documents != 0 and sometimes)


def memory_estimate(
    config: Config,
    shape: Shape,
    document_tokens: int,
    anchors: int,
    num_processes: int,
    sharded: bool,
    device: torch.device,
) -> dict[str, float]:
    """Bytes of one process on the policy's device, by what they are for.

    The last entry is the peak: everything that stays, plus the largest of what is used in turn.

    Args: document_tokens, anchors: of the largest row.
    """
    width = DTYPES[config.model.dtype].itemsize
    ebft, lora, trains = config.ebft, config.lora is not None, not config.eval.only
    attention = config.model.attn_implementation
    flex = attention == "flex_attention" or (attention == "auto" and device.type == "cuda" and width == 2)
    parts = num_processes if sharded else 1
    rows = config.train.per_device_batch_size
    rollout_tokens = rollout_tokens_at_once(config, document_tokens, anchors, shape.packed)
    trained_rollout_tokens = rollout_tokens if ebft.rl_coef > 0 else 0
    row_tokens = document_tokens + trained_rollout_tokens
    tokens = rows * row_tokens
    trained = shape.trained / parts if trains else 0
    beside = not lora and _same(feature_device(config.feature_network.device, device), device)
    # rows whose rollouts the policy writes at a time
    evaluated = config.eval.per_device_batch_size if _evaluates(config) else 0
    writing = max(rows if trains and ebft.rl_coef > 0 else 0, evaluated)
    writing = writing if config.mode == "strided" or not ebft.use_vllm else 0
    keys_and_values = writing * (document_tokens + rollout_tokens) * 2 * shape.key_value * shape.layers * width
    stays = {
        "weights": (shape.parameters * width + 4 * shape.trained if lora else 4 * shape.parameters) / parts,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "feature network": shape.kept * width / (num_processes if config.feature_network.shard else 1) if beside else 0,
        "keys and values": keys_and_values if config.model.compile_decoding else 0,
    }
    # the copy of the weights while they are used: FSDP2 gathers them, autocast casts them
    used = shape.parameters * width if sharded or (width < 4 and not lora) else 0
    # what autograd keeps of a token in a layer, counted with saved_tensors_hooks for the Llama architecture;
    # with autocast the residual stream is float32
    kept = 14 if width == 4 else 17 if lora or sharded else 22
    per_layer = width * (kept * shape.hidden + 4 * shape.inner)
    blocks = 0 if flex or attention == "eager" else -(-trained_rollout_tokens // QUERIES_PER_BLOCK)
    per_layer_keys = width * rows * 2 * shape.hidden * blocks * (document_tokens // 2 + QUERIES_PER_BLOCK)
    score_width = 4 if width == 4 else 4 + width
    per_layer_scores = rows * shape.heads * row_tokens**2 * score_width if attention == "eager" else 0
    one_layer = tokens * per_layer + per_layer_keys + per_layer_scores
    activations = one_layer * shape.layers
    if config.model.gradient_checkpointing:
        activations = tokens * shape.hidden * width * shape.layers + one_layer
    num_rollouts = writing * rollout_tokens // rollouts_of(config, document_tokens)[1]
    logits, sampled = (min(LOGITS_PER_CHUNK, number * shape.vocabulary) for number in (tokens, num_rollouts))
    head = 3 * 4 * logits + tokens * shape.hidden * 4 + (4 * shape.vocabulary * shape.hidden if not lora else 0)
    in_turn = (
        6 * 4 * sampled + (0 if config.model.compile_decoding else keys_and_values) + used if writing else 0,
        activations + head + used if trains else 0,
        # on CUDA, AdamW updates all weights at once: the square roots of their moments are a copy
        4 * trained if device.type == "cuda" else 0,
    )
    return {**stays, **dict(zip(IN_TURN, in_turn, strict=True)), "peak": sum(stays.values()) + max(in_turn)}


# ----------------------------------------------------------------------------------------------------------------------
# Advice


def ways_to_save(config: Config, num_processes: int, sharded: bool, device: torch.device) -> list[str]:
    """Settings that lower the memory of a process and are not set yet, first what costs least.

    The update stays as it is, up to rounding.
    """
    model, trains, cuda = config.model, not config.eval.only, device.type == "cuda"
    copied = config.lora is None and _same(feature_device(config.feature_network.device, device), device)
    rows, evaluated = config.train.per_device_batch_size, config.eval.per_device_batch_size
    ways = [
        (f"train.per_device_batch_size=1 (now {rows})", trains and rows > 1),
        (f"eval.per_device_batch_size=1 (now {evaluated})", _evaluates(config) and evaluated > (rows if trains else 1)),
        ("model.gradient_checkpointing=true", trains and not model.gradient_checkpointing),
        *_fewer_packed_tokens(config),
        ("model.attn_implementation=auto", model.attn_implementation == "eager"),
        ("model.compile_decoding=false", model.compile_decoding),
        ("model.dtype=bfloat16", model.dtype == "float32"),
        ("feature_network.shard=true", copied and sharded and not config.feature_network.shard),
        ("feature_network.device=cpu", copied and cuda and not sharded),
        (f"--config_file {FSDP2} (now DDP)", cuda and num_processes > 1 and not sharded and not model.compile_decoding),
    ]
    return [setting for setting, helps in ways if helps]


def _fewer_packed_tokens(config: Config) -> list[tuple[str, bool]]:
    """A document and about as many rollout tokens in a forward."""
    if config.mode == "structured":
        return []
    length = config.data.sequence_length
    limit = length + max(length, config.ebft.n_samples_per_prompt * config.ebft.generate_max_len)
    now = length + rollout_tokens_at_once(config, *largest_row(config))
    return [(f"ebft.max_packed_tokens={limit} (now up to {now})", now > limit and config.ebft.rl_coef > 0)]


def other_runs(config: Config) -> list[str]:
    """What saves memory by training something else, or on less at a time."""
    adapter = [f"lora.r={LoraConfig().r}"] if config.lora is None else []
    if config.mode == "strided":
        fewer = f"a larger ebft.stride (now {config.ebft.stride})"
    else:
        fewer = f"a smaller ebft.num_generations (now {config.ebft.num_generations})"
    tokens, keys = config.longest_sequence
    return [*adapter, fewer, f"a smaller {keys} (now {tokens})"]


def advice(config: Config, num_processes: int, sharded: bool, device: torch.device) -> str:
    """`ways_to_save` and `other_runs` as a sentence, without a full stop."""
    ways = ways_to_save(config, num_processes, sharded, device)
    listed = f"settings that lower it, first what costs least: {', '.join(ways)}; " if ways else ""
    return f"{listed}as another run: {', '.join(other_runs(config))}"


# ----------------------------------------------------------------------------------------------------------------------
# When it has run out


@contextmanager
def out_of_memory_advice(config: Config, accelerator: Accelerator) -> Iterator[None]:
    """Turns an out-of-memory error into a UserError that says where memory ran out and which settings would help.

    Other errors pass. TrainingLoop.train has already saved what it can.
    """
    try:
        yield
    except (RuntimeError, UserError) as error:
        cause = _ran_out(error)
        if cause is None:
            raise
        message = _out_of_memory(config, accelerator, cause)
        raise UserError(f"{error}; {message}" if isinstance(error, UserError) else message) from None


def _ran_out(error: Exception) -> Exception | None:
    """The out-of-memory error: this error, or one in the context of a UserError.

    The UserError may repeat it (when loading), or have replaced it (when saving afterwards failed).
    """
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
    device, number = policy_device, re.search(r"GPU (\d+) has a total capacity", str(error))
    if NO_MEMORY[0] in str(error):
        device = torch.device("cpu")
    elif number:
        device = torch.device("cuda", int(number[1]))
    has = f" ({torch.cuda.get_device_properties(device).total_memory / GB:.0f} GB)" if device.type == "cuda" else ""
    start = f"out of memory on {device if device.type == 'cuda' else device.type}{has}: the run does not fit"
    if not _same(device, policy_device):
        what = "weights are read and saved there"
        if config.lora is None and _same(device, feature_device(config.feature_network.device, policy_device)):
            what = "the feature network lies there"
        return f"{start}; the policy is on {policy_device}, and {what}"
    sharded = accelerator.distributed_type == DistributedType.FSDP
    where = accelerator.num_processes, sharded, policy_device
    try:
        peak = memory_estimate(config, shape_of(config), *largest_row(config), *where)["peak"]
        estimated = f"; a process is estimated at {peak / GB:.1f} GB"
    except UserError:  # the model can no longer be read
        estimated = ""
    message = f"{start}{estimated}; {advice(config, *where)}"
    keys = [way.partition("=")[0] for way in ways_to_save(config, *where)]
    may_change = [key for key in keys if key in MAY_CHANGE]
    saved = any(Path(config.train.output_dir).expanduser().glob("checkpoint-*"))
    if not (saved and may_change):
        return message
    keys = " or ".join(may_change)
    return f"{message}. train.resume=latest goes on from the last checkpoint, with another {keys}"


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are the same. cuda is cuda:0."""
    return (one.type, one.index or 0) == (other.type, other.index or 0)
