"""Tiny random multimodal models of real families, as their own classes save them, for the tests."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from helpers import TINY, tiny_tokenizer

TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
PICTURES = dict(image_size=16, patch_size=8)
HYBRID = dict(
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
QWEN = {
    "vision_config": dict(
        depth=1,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=32,
        patch_size=4,
        num_position_embeddings=16,
    ),
    **dict(image_token_id=290, video_token_id=291, vision_start_token_id=292, vision_end_token_id=293),
}
PER_LAYER = dict(vocab_size_per_layer_input=300, hidden_size_per_layer_input=8, sliding_window=64)
# family: (text config beside TINY, the rest of the config)
FAMILIES = {
    "qwen3_5": (HYBRID, QWEN),
    "qwen3_5_moe": (HYBRID | EXPERTS, QWEN),
    "gemma3": (
        dict(sliding_window=64, query_pre_attn_scalar=8),
        dict(vision_config=TOWER | PICTURES, image_token_index=290, mm_tokens_per_image=4),
    ),
    "gemma4": (
        PER_LAYER
        | dict(layer_types=["sliding_attention", "full_attention"] * 2, global_head_dim=8)
        | dict(num_kv_shared_layers=2),
        dict(
            vision_config=TOWER | dict(num_key_value_heads=2, head_dim=8, patch_size=4),
            audio_config=None,
            **dict(image_token_id=290, video_token_id=291, audio_token_id=292),
        ),
    ),
    "gemma3n": (
        PER_LAYER
        | dict(layer_types=["sliding_attention", "full_attention"] * 2, intermediate_size=[64] * 4)
        | dict(laurel_rank=4, num_kv_shared_layers=0, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4),
        {},
    ),
    "mistral3": (
        dict(model_type="mistral"),
        dict(vision_config=TOWER | PICTURES | dict(model_type="pixtral", head_dim=8), image_token_index=290),
    ),
    "llama4": (
        dict(intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=64),
        dict(
            vision_config=TOWER
            | PICTURES
            | dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
            image_token_index=290,
        ),
    ),
    "internvl": (
        dict(model_type="qwen2"),
        dict(vision_config=TOWER | dict(image_size=[16, 16], patch_size=[8, 8]), image_token_id=290),
    ),
    "llava": (
        dict(model_type="llama"),
        dict(vision_config=TOWER | PICTURES | dict(model_type="clip_vision_model"), image_token_index=290),
    ),
}


def save_wrapped(family: str, folder: Path, **changes) -> Path:
    """Writes a random model of the family, with its tokenizer.

    Gemma 3n's picture tower needs timm: its folder has the decoder's weights alone, under the names of the hub's.
    """
    text, rest = FAMILIES[family]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](text_config={**TINY, **text}, dtype=torch.float32, **rest, **changes)
    if family == "gemma3n":
        model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.float32)
        model.save_pretrained(folder)
        config.architectures = ["Gemma3nForConditionalGeneration"]
        config.save_pretrained(folder)
        rename_weights(folder, lambda name: name.replace("model.", "model.language_model."))
    else:
        AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def whole_model(family: str, folder: Path) -> PreTrainedModel:
    """The model as its own class loads it (Gemma 3n: the decoder in this folder, by its own names)."""
    if family != "gemma3n":
        return AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text, _ = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3n_text"](**{**TINY, **text}), dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("model.language_model.", "model."): weight for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == ["lm_head.weight"]  # tied
    return model.eval()


def rename_weights(folder: Path, new_name) -> None:
    """Other names in a folder's file of weights; where new_name gives None, the weight is left out."""
    file = folder / "model.safetensors"
    weights = {new_name(name): weight for name, weight in load_file(file).items()}
    save_file({name: weight for name, weight in weights.items() if name}, file, metadata={"format": "pt"})
