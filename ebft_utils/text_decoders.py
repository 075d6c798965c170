"""The text decoder of a multimodal checkpoint: how it is read, and the names of its weights outside of this program.

A multimodal model of transformers wraps a decoder, its towers for images or sound, and a head. Only decoder and head
are trained, as the causal LM of the text config: Gemma3ForCausalLM of a checkpoint of Gemma3ForConditionalGeneration.
The same weight has two names then: model.layers.0.. in the causal LM, model.language_model.layers.0.. in the wrapper,
which is what vLLM serves, and what most users load an adapter onto.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as hf_logging

from .config.settings import UserError
from .model_files import LOADING_ERRORS, read_weights

# beginnings of names (in the causal LM, in the wrapper), by the wrapper's model type
USUAL = ("model.", "model.language_model.")
PREFIXES = {
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm", "emu3"), ("model.", "model.text_model.")),
    **dict.fromkeys(("llama4", "blip-2", "instructblip", "instructblipvideo"), ("", "language_model.")),
    "nemotron_h_omni": ("", "language_model."),
}
# names in files (older ones have the causal LM's within the wrapper's) -> names in the causal LM, one after the other
OF_FILES = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}


@dataclass(frozen=True)
class Wrapper:
    """Around a decoder: the beginnings of names inside and outside, and what AutoModelForCausalLM makes of it.

    loads: "decoder", "wrapper", or None where it refuses such a checkpoint.
    """

    inside: str
    outside: str
    loads: str | None


def decoder_config(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """The config of the text decoder, which is `config` itself of a model of text. Raises UserError without one."""
    text = config.get_text_config()
    if text is config:
        return config
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"model.name_or_path: {name!r} ({config.model_type}) is multimodal, and transformers has no causal LM for "
            f"its text part ({text.model_type}); take a model of text alone"
        )
    if vars(config).get("quantization_config") is not None:
        text.quantization_config = config.quantization_config
    inside, _ = PREFIXES.get(config.model_type, USUAL)
    if inside and config.to_dict().get("tie_word_embeddings") is not None:  # the head is the wrapper's
        text.tie_word_embeddings = config.tie_word_embeddings
    return text


def read_decoder(config: PretrainedConfig, name: str, source: str, **how) -> PreTrainedModel:
    """The causal LM of a folder or hub id with this config; of a multimodal one the decoder and the head alone.

    Raises UserError where there is no text decoder, or where it cannot be read whole.
    """
    text, classes = decoder_config(config, name), AutoModelForCausalLM._model_mapping
    if text is config:
        return read_weights(name, source, **how)
    if text.tie_word_embeddings and _has_own_head(source, how.get("revision")):
        text.tie_word_embeddings = False
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it would list the weights of the towers, which are left where they are
    try:
        model = read_weights(name, source, config=text, key_mapping=OF_FILES, **how)
    finally:
        hf_logging.set_verbosity(verbosity)
    model._weight_conversions = None  # save_pretrained writes the causal LM's own names, not those that were read
    loads = None
    if type(config) in classes:
        loads = "wrapper" if classes[type(config)].config_class is type(config) else "decoder"
    model.wrapper = Wrapper(*PREFIXES.get(config.model_type, USUAL), loads)
    return model


def _has_own_head(source: str, revision: str | None) -> bool:
    """Whether the files have a head beside the embedding, and another one, whatever the config says.

    transformers compares the two when it has read them; of an FSDP2 run's processes only one reads. Damaged files are
    the business of who reads all weights.
    """
    found = partial(cached_file, source, revision=revision, _raise_exceptions_for_missing_entries=False)
    with suppress(*LOADING_ERRORS):
        index, whole, rows, files = found(SAFE_WEIGHTS_INDEX_NAME), found(SAFE_WEIGHTS_NAME), [], {}
        if index is not None:
            files = json.loads(Path(index).read_text())["weight_map"]
        elif whole is not None:
            with safe_open(whole, "pt") as file:
                files = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        for end in ("lm_head.weight", "embed_tokens.weight"):
            name = next((name for name in files if name.endswith(end)), None)
            if name is None:
                return False
            with safe_open(found(files[name]), "pt") as file:
                rows.append(file.get_slice(name)[:1000])
        return not torch.equal(*rows)
    return False


def wrapper_of(model: PreTrainedModel | PeftModel) -> Wrapper | None:
    """The wrapper out of which the model was read."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    return vars(causal_lm).get("wrapper")


def served_name(model: PreTrainedModel | PeftModel, name: str) -> str:
    """A weight's name in the whole checkpoint, which is what vLLM serves. (Of an adapter, as peft writes it.)"""
    wrapper = wrapper_of(model)
    start = "base_model.model." if isinstance(model, PeftModel) else ""
    if wrapper is None or not name.startswith(start + wrapper.inside):
        return name
    return start + wrapper.outside + name.removeprefix(start + wrapper.inside)


def save_adapter(policy: PeftModel, weights: dict[str, Tensor], folder: Path, served: bool = False) -> None:
    """Writes an adapter for what AutoModelForCausalLM makes of its base, or, served, for what vLLM makes of it.

    In a wrapper its layers are listed by their whole names: their ends would be layers of the image tower, too.
    """
    policy.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    wrapper = wrapper_of(policy)
    if wrapper is None or (wrapper.loads == "decoder" and not served):
        return
    file, settings_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    written = {served_name(policy, name): weight for name, weight in load_file(file).items()}
    save_file(written, file, metadata={"format": "pt"})
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in written}
    settings = json.loads(settings_file.read_text()) | {"target_modules": sorted(layers)}
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True))


def with_saved_adapter(base: PreTrainedModel, folder: Path, policy: PeftModel) -> PeftModel:
    """A model from `read_decoder` with the adapter that `save_adapter` wrote of the policy."""
    wrapper, settings = wrapper_of(policy), PeftConfig.from_pretrained(folder)
    settings.target_modules = policy.peft_config["default"].target_modules
    names = {} if wrapper is None else {f"^{re.escape(wrapper.outside)}": wrapper.inside}
    return PeftModel.from_pretrained(base, folder, config=settings, key_mapping=names)


def card_of_adapter(policy: PeftModel, card: str) -> str:
    """The model card of an adapter that `save_adapter` wrote: how to load it depends on its base."""
    wrapper = wrapper_of(policy)
    if wrapper is None or wrapper.loads == "wrapper":
        return card
    if wrapper.loads is None:
        return card.replace("AutoModelForCausalLM", "AutoModelForMultimodalLM")
    note = "vLLM serves the whole multimodal checkpoint, and calls these layers otherwise: for it, merge the adapter in"
    return f"{card}\n{note} (`lora.merge: true`).\n"
