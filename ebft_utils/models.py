"""Loads the policy, its tokenizer, adapter and frozen feature network, and refuses models that cannot be trained."""

import re
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from .algorithm.architecture import SLIDING, cast_weights, decoder_layers, decoder_of
from .algorithm.attention import STRIDED_BLOCKS
from .algorithm.decoding import decode_step, generate_rollouts, in_few_shapes
from .algorithm.features import FeatureNetwork, layer_indices
from .algorithm.flex import STRIDED_FLEX
from .algorithm.rows import generate_rows, rows_logprobs
from .algorithm.strided import strided_logprobs
from .config.modes import Config
from .config.sections import ModelConfig
from .config.settings import UserError
from .model_files import LOADING_ERRORS, first_line, named, plain_source
from .text_decoders import read_decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunLayout:
    """How rollouts stand in a forward: packed (algorithm/strided.py) or rows (algorithm/rows.py).

    whole_network: the feature network runs all layers, because it cannot be cut after the deepest that is read.
    """

    name: str = "packed"
    whole_network: bool = False


PACKED = RunLayout()


class Policy(torch.nn.Module):
    """The policy as the module that accelerate prepares: one forward gives all that is trained in a step.

    DDP and FSDP hook the forward of the module that they wrap; calling an inner module instead would skip the gradient
    reduction. For FSDP2, `generate` is registered as a second forward (distributed.prepare_policy).
    """

    def __init__(self, causal_lm: PreTrainedModel | PeftModel, layout: str = "packed", compile_decoding: bool = False):
        super().__init__()
        self.causal_lm, self.layout = causal_lm, layout
        self.compiled_step = None
        if compile_decoding:
            self.compiled_step = torch.compile(decode_step, mode="reduce-overhead", dynamic=False)
        self.kept: dict = {}
        # where accelerate cuts for FSDP2; transformers' own list has layers of image towers that are not here
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.layers})

    @property
    def decoder(self) -> PreTrainedModel:
        """The transformer without its LM head."""
        return decoder_of(base_causal_lm(self.causal_lm))

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The decoder's layers; none where they are not in one list."""
        try:
            return list(decoder_layers(self.decoder))
        except ValueError:
            return []

    def forward(self, **inputs) -> tuple[Tensor | None, Tensor]:
        """Arguments and results of `strided.strided_logprobs`, in the layout of this policy."""
        logprobs = rows_logprobs if self.layout == "rows" else strided_logprobs
        return logprobs(base_causal_lm(self.causal_lm), **inputs)

    def generate(self, **inputs) -> Tensor:
        """Arguments and result of `decoding.generate_rollouts`, in the layout of this policy."""
        model = base_causal_lm(self.causal_lm)
        if self.layout == "rows":
            return generate_rows(model, **inputs)
        if self.compiled_step is None:
            return generate_rollouts(model, **inputs)
        return in_few_shapes(generate_rollouts, model, **inputs, decode=self.compiled_step, kept=self.kept)

    def tie_weights(self) -> None:
        """Makes embedding and head one parameter again where the model ties them; accelerate calls it after a move."""
        base_causal_lm(self.causal_lm).tie_weights()


def base_causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft model (its layers still carry the adapter), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# ----------------------------------------------------------------------------------------------------------------------
# Where a model comes from


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, right-padding. Raises UserError when it has no pad or no end-of-document token."""
    own = config.tokenizer is None
    key = "model.name_or_path" if own else "model.tokenizer"
    source = plain_source(config.tokenizer or config.name_or_path, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision if own else None)
    except LOADING_ERRORS as error:
        raise UserError(f"{key}: no tokenizer can be loaded from {named(source)}: {first_line(error)}") from None
    for kind in ("pad_token", "eos_token"):
        chosen = getattr(config, kind)
        if chosen is not None:
            if chosen not in tokenizer.get_vocab():
                raise UserError(f"model.{kind}: {chosen!r} is not a token of {source!r}")
            setattr(tokenizer, kind, chosen)
        if getattr(tokenizer, kind) is None:
            example = tokenizer.convert_ids_to_tokens(0)
            raise UserError(
                f"model.{kind}: the tokenizer of {source!r} has none; name one of its tokens, for example {example!r}"
            )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def load_causal_lm(config: ModelConfig, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
    """The pretrained causal LM in the given dtype, without dropout, with the attention that transformers gives it.

    Of a multimodal model it is the text decoder (text_decoders.py).

    device: weights are read straight to it; None: to main memory.
    """
    name = config.name_or_path
    source, revision = plain_source(name), config.revision
    try:
        model_config = AutoConfig.from_pretrained(source, revision=revision)
    except LOADING_ERRORS as error:
        asked = named(source) if source == name else repr(name)
        raise UserError(f"model.name_or_path: {asked} cannot be loaded: {first_line(error)}") from None
    refuse_unsupported(model_config, name)
    model = read_decoder(model_config, name, source, revision=revision, dtype=dtype, device_map=device)
    cast_weights(model, dtype)
    _disable_dropout(model)
    return model


def _disable_dropout(model: torch.nn.Module) -> None:
    """Switches dropout off: with it, the policy that is scored would not be the policy that sampled."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Which models can be trained


def refuse_unsupported(model_config: PretrainedConfig, name: str) -> None:
    """Raises UserError for models that are no decoder alone."""
    if model_config.is_encoder_decoder:
        kind = f"{name!r} ({model_config.model_type})"
        raise UserError(f"model.name_or_path: {kind} is an encoder-decoder, and training needs a decoder alone")


def _end_of_short_factors(settings: dict) -> int | None:
    """With longrope (Phi-3 ..), the length from which on transformers takes other positions for the whole batch."""
    rope = settings.get("rope_parameters") or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    key = "original_max_position_embeddings"
    ends = [part.get(key) or settings.get(key) for part in parts if part.get("rope_type") == "longrope"]
    return min(filter(None, ends), default=None)


def refuse_short_context(config: Config, model_config: PretrainedConfig) -> None:
    """Raises UserError for sequences longer than the model's positions, and for windows that rollouts would fill."""
    settings, name = model_config.get_text_config().to_dict(), config.model.name_or_path
    (longest, keys), limit = config.longest_sequence, settings.get("max_position_embeddings")
    if limit and longest > limit:
        raise UserError(f"{keys}: {longest} is more than the {limit} positions of {name!r}; lower it")
    limit = _end_of_short_factors(settings)
    if limit and longest > limit:
        raise UserError(
            f"{keys}: {longest} is more than the {limit} tokens up to which {name!r} keeps its short rope factors "
            "(longrope): one longer sequence would move the positions of all others in its batch; lower it"
        )
    if config.mode == "strided":
        needed, window = config.ebft.stride + config.ebft.generate_max_len, settings.get("sliding_window")
        slides = settings.get("use_sliding_window", True) and SLIDING in (settings.get("layer_types") or [SLIDING])
        if window and slides and window < needed:
            raise UserError(
                f"ebft.generate_max_len: ebft.stride + ebft.generate_max_len = {needed} is more than the {window} "
                f"tokens that sliding attention of {name!r} reaches back, so rollouts would lose the text before them; "
                "lower them"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Policy and feature network


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module, name: str) -> None:
    """Raises UserError when the tokenizer has ids that the model has no embedding for."""
    vocabulary = base_causal_lm(model).get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model.tokenizer: it has {len(tokenizer)} tokens and {name!r} only {vocabulary} embeddings: "
            "it belongs to another model"
        )


def stop_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: the tokenizer's end-of-text token, and those of the model's generation config."""
    of_model = base_causal_lm(model).generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [] if of_model is None else [of_model]
    return sorted({tokenizer.eos_token_id, *of_model})


def load_policy(config: Config) -> PreTrainedModel | PeftModel:
    """The policy. Trained weights are always float32: in bfloat16 an update of 1e-6 rounds away."""
    model = load_causal_lm(config.model, torch.float32 if config.lora is None else DTYPES[config.model.dtype])
    hf_logging.disable_progress_bar()  # one bar for reading the weights: reading or writing them again needs no other
    refuse_short_context(config, model.config)
    if config.model.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"model.gradient_checkpointing: true: {first_line(error)}; leave it out") from None
    return model if config.lora is None else with_adapter(config, model)


def with_adapter(config: Config, model: PreTrainedModel) -> PeftModel:
    """The model with a new adapter. Raises UserError for an adapter that is not possible."""
    lora = config.lora
    adapter = PeftLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    _check_targets(lora.target_modules, model)
    try:
        policy = get_peft_model(model, adapter)
    except (ValueError, re.error) as error:
        names = f"its linear layers: {', '.join(_ends_of_linear_layers(model))}"
        raise UserError(f"lora.target_modules: {lora.target_modules!r}: {first_line(error)}; {names}") from None
    if isinstance(policy.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "lora.target_modules: the LM head cannot carry an adapter, because its weight is read directly; "
            "leave it out"
        )
    return policy


def _linear_layers(model: PreTrainedModel) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    return [name for name in linear if model.get_submodule(name) is not model.get_output_embeddings()]


def _ends_of_linear_layers(model: PreTrainedModel) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in _linear_layers(model)))


def _check_targets(targets: str | list[str], model: PreTrainedModel) -> None:
    """Raises UserError, with the layers that there are, when an adapter's target is none of them.

    As in peft, text is a pattern of whole names, and an item of a list is the end of a name.
    """
    layers, ends = _linear_layers(model), _ends_of_linear_layers(model)
    names, wrong = [name for name, _ in model.named_modules()], None
    if isinstance(targets, list):
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
        wrong = f"the model has no layer {', '.join(missing)}" if missing else None
    elif targets != "all-linear":
        try:
            if not any(re.fullmatch(targets, name) for name in names):
                wrong = (
                    f"{targets!r}, a pattern of whole names such as {layers[0]}, matches none; "
                    f"ends of names are written as a list, [{ends[0]}]"
                )
        except re.error as error:
            wrong = f"{targets!r} is no pattern: {error}"
    if wrong:
        raise UserError(f"lora.target_modules: {wrong}; its linear layers: {', '.join(ends)}")


def load_feature_network(
    policy: PreTrainedModel | PeftModel, config: Config, device: torch.device, layout: RunLayout = PACKED
) -> FeatureNetwork:
    """The frozen network, cut after the deepest feature layer.

    With LoRA it is the policy with its adapter off (no second model). Otherwise it is a copy, read from the original
    checkpoint: a sharded policy has only a part of the weights on each process, and a resumed one has others.
    device: where this process's policy lies.
    """
    decoder = decoder_of(base_causal_lm(policy))
    layers = layer_indices(config.ebft.feature_layers, decoder.config.num_hidden_layers)
    how = {"layout": layout.name, "whole": layout.whole_network}
    if isinstance(policy, PeftModel):
        return FeatureNetwork(decoder, layers, frozen=policy.disable_adapter, **how)
    place = device if config.feature_network.shard else feature_device(config.feature_network.device, device)
    # efficient loading gives all processes but one zeros instead of weights
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        copy = load_causal_lm(config.model, DTYPES[config.model.dtype], place)
    attention = decoder.config._attn_implementation
    elsewhere = place.type != device.type  # where FlexAttention was not tried
    copy.set_attn_implementation(STRIDED_BLOCKS if attention == STRIDED_FLEX and elsewhere else attention)
    network = FeatureNetwork(decoder_of(copy).requires_grad_(False).eval(), layers, **how)
    if config.feature_network.shard:
        for layer in decoder_layers(decoder_of(copy))[: max(layers)]:
            fully_shard(layer)
        # reshard: by default the root keeps its weights until its backward pass, which never comes
        fully_shard(network.decoder, reshard_after_forward=True)
    return network


def feature_device(choice: str, policy_device: torch.device) -> torch.device:
    """Where the frozen copy goes. Raises UserError for a GPU that is not seen, or that another process uses."""
    processes, gpus = PartialState().num_processes, torch.cuda.device_count()
    if choice == "auto":
        spare = policy_device.type == "cuda" and processes == 1 and gpus > 1
        return torch.device("cuda", ((policy_device.index or 0) + 1) % gpus) if spare else policy_device
    device = torch.device(choice)
    if device.type == "cuda" and device.index >= gpus:
        seen = f"{gpus} GPU{'s' * (gpus != 1)}"
        raise UserError(f"feature_network.device: {choice}: this process sees {seen}; use auto or cpu")
    if device.type == "cuda" and processes > 1:
        why = f"with {processes} processes each has a GPU of its own"
        raise UserError(f"feature_network.device: {choice}: {why}; use auto or cpu")
    return device
