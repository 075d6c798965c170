"""What a model's configuration says about its attention and its head, in the numbers that the algorithm needs.

Nothing here is believed: at the start of a run the model itself is compared with what is made of it (proof.py).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

# layer types that are attention over a mask which the caller may give
OTHER_WINDOWS = re.compile(
    "^(?!(sliding_window|use_sliding_window|max_window_layers|.*_pattern)$).*(window|local_attention)"
)
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True)
class Reach:
    """How far back a layer attends, in positions of the own document. None: no limit.

    window: the query's position minus the key's is below it. chunk: both are in the same chunk of so many positions.
    """

    window: int | None = None
    chunk: int | None = None

    def within(self, length: int) -> "Reach":
        """The same for sequences of at most `length` tokens: without the limits that they never meet."""
        window = self.window if self.window is not None and self.window < length else None
        return Reach(window, self.chunk if self.chunk is not None and self.chunk < length else None)


def reaches(config: PreTrainedConfig) -> dict[str | None, Reach]:
    """The reach of each layer type; with the key None where all layers are of one type.

    Raises ValueError for layers that are no attention over a mask, or whose windows are spelled in another way.
    """
    settings = config.to_dict()
    window, chunk = settings.get("sliding_window"), settings.get("attention_chunk_size")
    unset = None, False, 0, window
    other = [key for key, value in settings.items() if OTHER_WINDOWS.match(key) and value not in unset]
    if other:
        raise ValueError(f"its {', '.join(other)} may limit attention in a way that a mask of ours does not")
    if settings.get("use_sliding_window") is False:
        window = None
    by_type = {FULL: Reach(), SLIDING: Reach(window=window), CHUNKED: Reach(chunk=chunk)}
    types = list(dict.fromkeys(layer_types(config)))
    unknown = [layer_type for layer_type in types if layer_type not in by_type]
    if unknown:
        raise ValueError(f"its layers of type {', '.join(unknown)} are no attention over a mask")
    if len(types) > 1:
        return {layer_type: by_type[layer_type] for layer_type in types}
    return {None: by_type[types[0]] if types else Reach(window=window)}


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The type of each layer; empty where a config names none."""
    return list(getattr(config, "layer_types", None) or ())  # of some configs it is a property


@dataclass(frozen=True)
class Head:
    """The LM head: logits = c * tanh(z / c) with z = (hidden W^T + bias) * scale and c = softcap; z without softcap.

    linear: the module with weight (V, H) and bias (V) or None.
    """

    linear: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        """(V, H)."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """(V), or None."""
        return self.linear.bias


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal LM."""
    config = model.config.get_text_config()
    settings = config.to_dict()
    scale = 1.0
    for key, inverse in (("logits_scaling", config.model_type != "hyperclovax"), ("logit_scale", False)):
        if settings.get(key) is not None:
            scale = 1 / settings[key] if inverse else settings[key]
    if settings.get("lm_head_multiplier") is not None:
        scale = settings["lm_head_multiplier"]
    if settings.get("dim_model_base") is not None:
        scale = settings["dim_model_base"] / settings["hidden_size"]
    caps = [settings.get(key) for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")]
    return Head(model.get_output_embeddings(), scale, next(filter(None, caps), None))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The transformer of a causal LM, without its head. Raises ValueError where there is none to be found."""
    decoder = model.get_decoder()
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1:
        raise ValueError(f"{type(model).__name__} has no decoder of its own")
    return inside[0]


def decoder_layers(decoder: torch.nn.Module) -> torch.nn.ModuleList:
    """The list of a decoder's layers, whatever it is called. Raises ValueError where there is not exactly one."""
    count = decoder.config.num_hidden_layers
    lists = [child for child in decoder.children() if isinstance(child, torch.nn.ModuleList) and len(child) == count]
    if len(lists) != 1:
        raise ValueError(f"{type(decoder).__name__} is not built of one list of {count} layers")
    return lists[0]


def cast_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters only. Rotary frequencies are buffers: in bfloat16 they would change the positions."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
