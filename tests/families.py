"""Every decoder-only family of causal LMs in transformers, as a small random model.

FAMILIES has what a family needs besides TINY, SKIPPED the other keys of transformers' table of causal LMs, each with
the reason. Windows and chunks are of 8 tokens, every kind of layer that a family has is among its layers, and what
scales or caps its logits is far enough from 1 that leaving it out shows.
"""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from helpers import TINY

ABSENT = object()  # a setting of TINY that the family's config refuses

SLIDING_FIRST = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
FULL_FIRST = dict(sliding_window=8, layer_types=["full_attention", "sliding_attention"] * 2)
LINEAR = dict(layer_types=["linear_attention", "full_attention"] * 2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
ROUTED_EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DENSE_FIRST = dict(mlp_layer_types=["dense", "sparse", "sparse", "sparse"])
LATENT = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    head_dim=4,
    num_key_value_heads=4,
)
LATENT_EXPERTS = dict(**LATENT, **ROUTED_EXPERTS, first_k_dense_replace=1, n_group=2, topk_group=1)
INDEXER = dict(index_topk=8, index_n_heads=16, index_head_dim=8)  # few heads give many scores of exactly 0: ties
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16)
EXACT_STEPS = dict(time_step_min=1e-6)  # a whole sequence's time steps are clamped there, a cached token's are not
DELTA_NET = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, **LINEAR
)
GRANITE = dict(embedding_multiplier=2.0, logits_scaling=0.5, residual_multiplier=0.5, attention_multiplier=0.2)

FAMILIES = {
    "afmoe": dict(**EXPERTS, **SLIDING_FIRST, num_shared_experts=1, mup_enabled=True),
    "apertus": {},
    "arcee": {},
    "aria_text": dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, intermediate_size=16),
    "axk1": LATENT_EXPERTS,
    "axk2": dict(**LATENT, **ROUTED_EXPERTS, **INDEXER, **DENSE_FIRST, gated_norm_rank=4),
    "bamba": dict(**MAMBA, attn_layer_indices=[1, 3]),
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "blt": dict(
        **{
            f"{part}_config": {**TINY, "num_hidden_layers": 2, "hidden_size_global": 32}
            for part in ("patcher", "encoder", "decoder", "global")
        },
        encoder_hash_byte_group_vocab=50,
    ),
    "codegen": dict(rotary_dim=4),
    "cohere": dict(logit_scale=2.0, use_qk_norm=True),
    "cohere2": dict(**SLIDING_FIRST, logit_scale=2.0),
    "cohere2_moe": dict(**EXPERTS, **SLIDING_FIRST, **DENSE_FIRST, logit_scale=2.0, num_shared_experts=1),
    "cohere_compass_text": dict(
        **FULL_FIRST,
        logit_scale=2.0,
        rope_parameters={
            layer_type: dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])
            for layer_type in ("full_attention", "sliding_attention")
        },
    ),
    "ctrl": dict(dff=64),
    "cwm": FULL_FIRST,
    "dbrx": dict(
        d_model=32,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": LATENT_EXPERTS,
    "deepseek_v3": LATENT_EXPERTS,
    "deepseek_v32": dict(**LATENT_EXPERTS, **INDEXER),
    "deepseek_v4": dict(
        **ROUTED_EXPERTS,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "sliding_attention",
        ],
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        compress_rates=dict(compressed_sparse_attention=4, heavily_compressed_attention=8),
        q_lora_rank=16,
        head_dim=16,
        num_key_value_heads=1,
        partial_rotary_factor=0.5,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=4,
        hc_mult=2,
    ),
    "diffllama": {},
    "doge": dict(sliding_window=8, keep_window_size=8),
    "dots1": dict(**ROUTED_EXPERTS, **FULL_FIRST, n_shared_experts=1, first_k_dense_replace=1),
    "ernie4_5": {},
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_intermediate_size=16),
    "exaone4": SLIDING_FIRST,
    "exaone_moe": dict(**EXPERTS, **SLIDING_FIRST, n_group=2, topk_group=1),
    "falcon": dict(head_dim=ABSENT, num_kv_heads=2, new_decoder_architecture=True),
    "falcon_h1": dict(
        **MAMBA,
        mamba_d_ssm=64,
        mamba_rms_norm=True,
        lm_head_multiplier=2.0,
        embedding_multiplier=2.0,
        key_multiplier=0.5,
        mlp_multipliers=[0.5, 2.0],
        ssm_multipliers=[0.5, 2.0, 0.5, 2.0, 0.5],
    ),
    "falcon_mamba": dict(state_size=8),
    "flex_olmo": dict(num_experts=4, num_experts_per_tok=2, intermediate_size=16),
    "gemma": {},
    "gemma2": dict(**SLIDING_FIRST, final_logit_softcapping=3.0, attn_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma3_text": dict(**SLIDING_FIRST, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma3n_text": dict(
        **SLIDING_FIRST,
        final_logit_softcapping=3.0,
        vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "gemma4_text": dict(
        **SLIDING_FIRST,
        final_logit_softcapping=3.0,
        vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        global_head_dim=16,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
    ),
    "gemma4_unified_text": dict(
        **SLIDING_FIRST,
        final_logit_softcapping=3.0,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
    ),
    "glm": {},
    "glm4": {},
    "glm4_moe": dict(**ROUTED_EXPERTS, n_group=2, topk_group=1, use_qk_norm=True),
    "glm4_moe_lite": dict(**LATENT, **ROUTED_EXPERTS, **DENSE_FIRST),
    "glm_moe_dsa": dict(**LATENT_EXPERTS, **INDEXER, indexer_types=["full", "shared"] * 2),
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=8),
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": dict(**LOCAL_EXPERTS, **SLIDING_FIRST),
    "gptj": dict(rotary_dim=4),
    "granite": GRANITE,
    "granite_swa": dict(**GRANITE, **FULL_FIRST),
    "granitemoe": dict(**GRANITE, **LOCAL_EXPERTS),
    "granitemoe_swa": dict(**GRANITE, **LOCAL_EXPERTS, **FULL_FIRST, shared_intermediate_size=16),
    "granitemoehybrid": dict(**GRANITE, **LOCAL_EXPERTS, **MAMBA, **LINEAR, shared_intermediate_size=16),
    "granitemoeshared": dict(**GRANITE, **LOCAL_EXPERTS, shared_intermediate_size=16),
    "helium": {},
    "hrm_text": dict(num_hidden_layers=2, L_cycles=1),
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": dict(num_experts=4, moe_topk=2, intermediate_size=16),
    "hy_v3": dict(**EXPERTS, **DENSE_FIRST),
    "hy_v4": dict(**LATENT, **ROUTED_EXPERTS, **INDEXER, **DENSE_FIRST, hc_mult=2),
    # multiplies its logits by logits_scaling, where granite divides
    "hyperclovax": dict(**{**GRANITE, "logits_scaling": 2.0}, use_post_norm=True),
    "inkling_text": dict(
        **ROUTED_EXPERTS,
        layer_types=["hybrid", "hybrid_sliding"] * 2,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        sliding_window_size=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        d_rel=4,
        rel_extent=32,
        n_shared_experts=1,
        logits_mup_width_multiplier=0.5,
    ),
    "jais2": {},
    "jamba": dict(num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=8),
    "jetmoe": LOCAL_EXPERTS,
    "kimi_linear": dict(
        **LATENT, **EXPERTS, **LINEAR, **DENSE_FIRST, n_shared_experts=1, linear_head_dim=8, linear_num_heads=4
    ),
    "laguna": dict(**EXPERTS, **FULL_FIRST, shared_expert_intermediate_size=16),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
    "lfm2_moe": dict(**EXPERTS, layer_types=["conv", "full_attention"] * 2, num_dense_layers=2),
    "llama": {},
    "llama4_text": dict(
        **LOCAL_EXPERTS,
        intermediate_size=16,
        intermediate_size_mlp=64,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        no_rope_layer_interval=2,
    ),
    "longcat_flash": dict(
        **LATENT, n_routed_experts=4, moe_topk=2, zero_expert_num=2, ffn_hidden_size=64, expert_ffn_hidden_size=16
    ),
    "mamba": dict(state_size=8),
    "mamba2": dict(num_heads=8, state_size=8, n_groups=2, chunk_size=16),
    "mellum": dict(**EXPERTS, **FULL_FIRST),
    "mimo_v2_flash": dict(**ROUTED_EXPERTS, **FULL_FIRST, v_head_dim=4),
    "minicpm3": dict(**LATENT, dim_model_base=64, scale_emb=2),
    # its cache counts tokens in the first layer, so that one is no linear layer
    "minimax": dict(**LOCAL_EXPERTS, layer_types=["full_attention", "linear_attention"] * 2, block_size=16),
    "minimax_m2": dict(**LOCAL_EXPERTS, rotary_dim=4),
    "minimax_m3_vl_text": dict(
        **LOCAL_EXPERTS,
        layer_types=["full_attention", "minimax_m3_sparse"] * 2,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        intermediate_size=16,
        dense_intermediate_size=64,
        shared_intermediate_size=16,
        rotary_dim=4,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "ministral": SLIDING_FIRST,
    "ministral3": dict(
        sliding_window=8,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=10000.0,
            factor=8.0,
            original_max_position_embeddings=32,
            max_position_embeddings=256,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale_all_dim=1.0,
            mscale=1.0,
            llama_4_scaling_beta=0.1,
        ),
    ),
    "mistral": dict(sliding_window=8),
    "mixtral": dict(**LOCAL_EXPERTS, sliding_window=8),
    "modernbert-decoder": dict(local_attention=16, layer_types=["full_attention", "sliding_attention"] * 2),
    # its cache keeps a window of tokens, its mask does not know of the window
    "moshi": dict(ffn_dim=64, audio_vocab_size=16, sliding_window=256),
    "mpt": dict(max_seq_len=256),
    "nanochat": dict(final_logit_softcapping=3.0),
    "nemotron": {},
    "nemotron_h": dict(
        **ROUTED_EXPERTS,
        **EXACT_STEPS,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        moe_shared_expert_intermediate_size=16,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=16,
    ),
    "olmo": dict(clip_qkv=8.0),
    "olmo2": {},
    "olmo3": SLIDING_FIRST,
    "olmo_hybrid": dict(
        **LINEAR, linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16
    ),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, intermediate_size=16),
    "openai-gpt": {},
    "opt": dict(ffn_dim=64),
    "persimmon": {},
    "phi": dict(qk_layernorm=True),
    "phi3": dict(sliding_window=8),
    "phimoe": dict(**LOCAL_EXPERTS, sliding_window=8, lm_head_bias=True),
    "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen2_moe": dict(**EXPERTS, **SLIDING_FIRST, use_sliding_window=True, shared_expert_intermediate_size=16),
    "qwen3": dict(use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3_5_moe_text": dict(**EXPERTS, **DELTA_NET, shared_expert_intermediate_size=16),
    "qwen3_5_text": DELTA_NET,
    "qwen3_moe": dict(**EXPERTS, use_sliding_window=True, sliding_window=8, mlp_only_layers=[0]),
    "qwen3_next": dict(**EXPERTS, **DELTA_NET, shared_expert_intermediate_size=16, mlp_only_layers=[0]),
    "qwen4_exp_text": dict(
        **EXPERTS,
        **{**DELTA_NET, "layer_types": ["linear_attention", "indexed_attention"] * 2},
        shared_expert_intermediate_size=16,
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[1],
        heads_per_ngram=2,
        ngram_vocab_size_base=100,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=1,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
    ),
    "recurrent_gemma": dict(attention_window_size=8, logits_soft_cap=3.0),
    "rwkv": {},
    "seed_oss": {},
    "smollm3": dict(use_sliding_window=True, sliding_window=8, no_rope_layer_interval=2),
    "solar_open": dict(**ROUTED_EXPERTS, n_group=2, topk_group=1),
    "stablelm": dict(qk_layernorm=True, use_qkv_bias=True),
    "starcoder2": dict(sliding_window=8),
    "vaultgemma": dict(
        **SLIDING_FIRST, final_logit_softcapping=3.0, attn_logit_softcapping=3.0, query_pre_attn_scalar=8
    ),
    "xglm": dict(ffn_dim=64),
    # cache and kernels agree on the head size where hidden_size * qk_dim_factor is a multiple of 64
    "xlstm": dict(hidden_size=64, num_heads=4, chunk_size=16, qk_dim_factor=1.0, output_logit_soft_cap=3.0),
    "youtu": LATENT,
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, mamba_d_state=8, head_dim=16),
    "zamba2": dict(
        **EXACT_STEPS, layers_block_type=["linear_attention", "hybrid"] * 2, mamba_d_state=8, chunk_size=16, head_dim=16
    ),
    "zaya": dict(
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        router_hidden_size=16,
        sliding_window=8,
        layer_types=["hybrid", "hybrid_sliding"] * 2,
    ),
}

SKIPPED = {
    "bart": "an encoder-decoder",
    "bert": "an encoder, causal only with is_decoder=True",
    "bert-generation": "the decoder of an encoder-decoder",
    "big_bird": "an encoder, causal only with is_decoder=True",
    "bigbird_pegasus": "an encoder-decoder",
    "blenderbot": "an encoder-decoder",
    "blenderbot-small": "an encoder-decoder",
    "camembert": "an encoder, causal only with is_decoder=True",
    "cpmant": "not causal: the tokens of a text attend to later ones",
    "data2vec-text": "an encoder, causal only with is_decoder=True",
    "electra": "an encoder, causal only with is_decoder=True",
    "emu3": "text and image tokens, built with its image tokenizer; the text decoder is llama's",
    "ernie": "an encoder, causal only with is_decoder=True",
    "fuyu": "its text decoder is the family persimmon",
    "gemma3": "its text decoder is the family gemma3_text",
    "gemma3n": "its text decoder is the family gemma3n_text; needs timm",
    "gemma4": "its text decoder is the family gemma4_text",
    "gemma4_assistant": "drafts tokens for gemma4, from whose hidden states and cache it reads",
    "gemma4_unified": "its text decoder is the family gemma4_unified_text",
    "gemma4_unified_assistant": "drafts tokens for gemma4_unified, from whose hidden states and cache it reads",
    "git": "describes images: an image encoder is part of its decoder",
    "got_ocr2": "reads images; its text decoder is the family qwen2",
    "gpt-sw3": "its model is the family gpt2",
    "llama4": "its text decoder is the family llama4_text",
    "marian": "an encoder-decoder",
    "mbart": "an encoder-decoder",
    "megatron-bert": "an encoder, causal only with is_decoder=True",
    "mllama": "its text decoder is llama's, with layers that attend to images and that text alone skips",
    "musicgen": "writes audio tokens for a text encoder's states",
    "musicgen_melody": "writes audio tokens for a text encoder's states",
    "mvp": "an encoder-decoder",
    "pegasus": "an encoder-decoder",
    "phi4_multimodal": "its text decoder is the family phi3, with image and audio encoders inside",
    "plbart": "an encoder-decoder",
    "prophetnet": "an encoder-decoder",
    "qwen3_5": "its text decoder is the family qwen3_5_text",
    "qwen3_5_moe": "its text decoder is the family qwen3_5_moe_text",
    "qwen4_exp": "its text decoder is the family qwen4_exp_text",
    "reformer": "not causal: later tokens decide which chunks its hashed attention cuts",
    "rembert": "an encoder, causal only with is_decoder=True",
    "roberta": "an encoder, causal only with is_decoder=True",
    "roberta-prelayernorm": "an encoder, causal only with is_decoder=True",
    "roc_bert": "an encoder, causal only with is_decoder=True",
    "roformer": "an encoder, causal only with is_decoder=True",
    "trocr": "the decoder of an image encoder",
    "whisper": "an encoder-decoder for speech",
    "xlm": "an encoder, causal only with causal=True",
    "xlm-roberta": "an encoder, causal only with is_decoder=True",
    "xlm-roberta-xl": "an encoder, causal only with is_decoder=True",
    "xlnet": "predicts tokens in a permuted order, causal only with a perm_mask",
    "xmod": "an encoder, causal only with is_decoder=True",
}


def family_config(model_type: str, **changes) -> PreTrainedConfig:
    """The config of a family's small model, with every dropout and jitter at 0."""
    settings = {**TINY, **FAMILIES[model_type], **changes}
    settings = {name: value for name, value in settings.items() if value is not ABSENT}
    config = CONFIG_MAPPING[model_type](**settings)
    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    for part in [config, *nested]:
        for name, value in vars(part).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def build(model_type: str, **changes) -> PreTrainedModel:
    """A random model of the family, in float32 and in eval mode; the same weights in every call."""
    config = family_config(model_type, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.max() == parameter.min():  # a norm's ones, a bias's zeros
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.dim() > 1 and parameter.std() < 0.1:  # where a family ignores initializer_range
                parameter.normal_(0.0, 0.2)
    return model
