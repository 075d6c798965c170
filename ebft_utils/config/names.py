"""What the message of an unknown key says: where the setting is, what it is called here, or that there is none.

FOREIGN holds names of other trainers (TRL, transformers, axolotl, OpenRLHF, LLaMA-Factory) and of earlier versions.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass

from .data import ColumnsConfig
from .settings import keys_of

NEAR_SIBLING, NEAR = 0.75, 0.85  # similarity from which a key counts as misspelt: of the same section, of another one


@dataclass(frozen=True)
class Foreign:
    """What somebody means by a name: keys that set it here (one mode may have only some of them), and a remark."""

    keys: tuple[str, ...]
    note: str = ""


def _set(names: str, *keys: str, note: str = "") -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), Foreign(keys, note))


def _not_supported(names: str, why: str) -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), Foreign((), f"not supported: {why}"))


def _elsewhere(names: str, where: str) -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), Foreign((), where))


ROWS = "It counts the rows of an optimizer step, over all processes"
ACCUMULATION = f"{ROWS}: the number of accumulated forwards follows from it"
LAUNCH = "it is no setting: the launch decides, accelerate launch --config_file accelerate_configs/NAME.yaml"
COLUMNS = [field.name for field in dataclasses.fields(ColumnsConfig)]

# name, or section.name where the section decides what is meant -> what is meant
FOREIGN: dict[str, Foreign] = {
    # --- the model
    **_set("model_name_or_path model_name model_id model_path base_model pretrain", "model.name_or_path"),
    **_set("pretrained_model_name_or_path model.name model.path model.id model.model", "model.name_or_path"),
    **_set("tokenizer_name tokenizer_name_or_path tokenizer_path", "model.tokenizer"),
    **_set("bf16 fp16 torch_dtype precision mixed_precision", "model.dtype", note="It is float32 or bfloat16"),
    **_set(
        "attn_impl flash_attn flash_attention use_flash_attention use_flash_attention_2", "model.attn_implementation"
    ),
    **_set("use_gradient_checkpointing grad_checkpoint activation_checkpointing", "model.gradient_checkpointing"),
    **_set("compile torch_compile", "model.compile_decoding"),
    **_not_supported(
        "load_in_4bit load_in_8bit quantization quantization_config qlora use_qlora bnb_4bit_quant_type",
        "weights are not quantised; less memory: a lora, model.dtype=bfloat16, model.gradient_checkpointing=true",
    ),
    **_not_supported("trust_remote_code", "no code from the hub is run"),
    **_not_supported("push_to_hub hub_model_id", "publish final/ with hf upload"),
    **_elsewhere("cache_dir", "it is no setting: the environment variable HF_HOME decides"),
    # --- lora
    **_set("use_peft peft use_lora adapter", "lora", note="lora={} has its defaults, lora=null leaves it out"),
    **_set("lora_r lora_rank rank", "lora.r"),
    **_set("lora_alpha", "lora.alpha"),
    **_set("lora_target lora_target_modules", "lora.target_modules"),
    **_set("merge_lora merge_adapter merge_weights", "lora.merge"),
    **_not_supported(
        "lora_dropout dropout", "with dropout the policy that is scored would not be the one that sampled"
    ),
    **_not_supported(
        "use_rslora use_dora bias lora_bias modules_to_save lora_modules_to_save init_lora_weights",
        "an adapter has r, alpha and target_modules",
    ),
    # --- data
    **_set("dataset_name dataset_path datasets data_path data_files train_file prompt_data", "data.dataset"),
    **_set("data.path data.file data.files data.name_or_path", "data.dataset"),
    **_set("dataset_config dataset_config_name subset", "data.name"),
    **_set("dataset_split train_split dataset_train_split", "data.split"),
    **_set("max_samples max_train_samples data.num_samples data.limit data.num_documents", "data.max_documents"),
    **_set("dataset_num_proc num_workers dataloader_num_workers preprocessing_num_workers", "data.num_proc"),
    **_set("sample_packing use_packing pack", "data.packing"),
    **_set("add_eos add_eos_token", "data.append_eos"),
    **_set("chat_template", "data.apply_chat_template"),
    **_set("interleave_probs dataset_mixer mixture", "data.mix"),
    **_set("buffer_size shuffle_buffer_size", "data.shuffle_buffer"),
    **_set("format dataset_format dataset_type", "data.transform"),
    **_set("dataset_text_field text_field", "data.columns.text"),
    **_set("input_key prompt_field", "data.columns.prompt"),
    **_set("label_key output_key completion_field", "data.columns.completion"),
    **_set("messages_field conversation_column", "data.columns.messages"),
    **{f"{name}_column": Foreign((f"data.columns.{name}",)) for name in COLUMNS},
    **{f"{at}.{name}_column": Foreign((f"{at}.columns.{name}",)) for at in ("eval", "data.mix[]") for name in COLUMNS},
    **_set(
        "train_on_inputs train_on_prompt mask_prompt completion_only_loss assistant_only_loss",
        "data.transform",
        note="It decides what is a prompt, and prompts are never learnt",
    ),
    **_set(
        "max_length max_seq_length max_seq_len max_len cutoff_len sequence_len seq_length seq_len block_size "
        "model_max_length",
        "data.sequence_length",
        "data.max_prompt_length",
        "ebft.max_completion_length",
    ),
    **_set("prompt_max_len max_prompt_len max_prompt_length", "data.max_prompt_length", "data.sequence_length"),
    # --- the algorithm
    **_set(
        "num_generations n_samples n_samples_per_prompt num_samples num_rollouts group_size num_return_sequences",
        "ebft.n_samples_per_prompt",
        "ebft.num_generations",
    ),
    **_set(
        "max_new_tokens max_completion_length max_completion_len max_response_length response_length generate_max_len",
        "ebft.generate_max_len",
        "ebft.max_completion_length",
    ),
    **_set("use_whitening", "ebft.whitening", note="It is feature, sample or none"),
    **_set("clip_range cliprange clip_eps eps_clip epsilon_high", "ebft.epsilon"),
    **_set("ppo_epochs num_ppo_epochs", "ebft.num_iterations"),
    **_set("mask_truncated_completions", "ebft.mask_truncated"),
    **_not_supported(
        "beta kl_coef init_kl_coef kl_penalty kl_loss_coef use_kl_loss kl ref_model sync_ref_model",
        "there is no KL term and no reference policy; ebft.ce_coef holds the model to the data",
    ),
    **_not_supported(
        "top_k min_p repetition_penalty", "rollouts are sampled from the full softmax, which is what is scored"
    ),
    **_not_supported(
        "reward_funcs reward_model reward_pretrain reward_weights",
        "rewards are similarities of features; a reward of your own: README.md, 'Change it'",
    ),
    # --- training
    **_set("lr peak_lr actor_learning_rate", "train.learning_rate"),
    **_set("lr_scheduler_type lr_schedule scheduler", "train.lr_scheduler"),
    **_set("lr_warmup_ratio warmup", "train.warmup_ratio"),
    **_set("lr_warmup_steps num_warmup_steps", "train.warmup_steps"),
    **_set("num_train_epochs epochs max_epochs n_epochs", "train.num_epochs"),
    **_set("steps num_steps max_train_steps num_train_steps total_steps max_iters", "train.max_steps"),
    **_set("per_device_train_batch_size micro_batch_size micro_train_batch_size", "train.per_device_batch_size"),
    **_set("train_batch_size global_batch_size rollout_batch_size effective_batch_size", "train.batch_size", note=ROWS),
    **_set(
        "gradient_accumulation_steps grad_accum_steps grad_accumulation_steps accumulate_grad_batches",
        "train.batch_size",
        note=ACCUMULATION,
    ),
    **_set("wd", "train.weight_decay"),
    **_set("betas adam_betas", "train.adam_beta1", "train.adam_beta2"),
    **_set("max_norm grad_clip clip_grad gradient_clipping max_gradient_norm", "train.max_grad_norm"),
    **_not_supported("optim optimizer adam_epsilon", "the optimizer is AdamW with epsilon 1e-8; see train.adam_beta1"),
    **_set("out_dir output output_path save_path save_dir checkpoint_dir ckpt_path", "train.output_dir"),
    **_set("logging_dir log_dir run_name", "train.output_dir", note="It holds the logs too"),
    **_set("logging_strategy log_every log_interval", "train.logging_steps"),
    **_set("save_strategy save_every save_interval checkpoint_steps checkpointing_steps", "train.save_steps"),
    **_set("max_ckpt_num max_checkpoints keep_checkpoints", "train.save_total_limit"),
    **_set("resume_from_checkpoint resume_from load_checkpoint", "train.resume"),
    **_set("data_seed random_seed", "train.seed"),
    **_set("wandb use_wandb wandb_project tensorboard tracker trackers log_with", "train.report_to"),
    **_elsewhere("dry_run", "it is the flag --dry-run"),
    **_not_supported("deepspeed zero_stage", "accelerate_configs/fsdp2.yaml splits the model over GPUs"),
    **_elsewhere(
        "fsdp fsdp_config ddp num_gpus n_gpus gpus devices device num_processes world_size local_rank", LAUNCH
    ),
    # --- evaluation
    **_set("eval_steps eval_every eval_interval eval_strategy evaluation_strategy", "eval.every_steps"),
    **_set("eval.steps eval.interval eval.strategy", "eval.every_steps"),
    **_set("eval_on_start", "eval.at_start"),
    **_set("do_eval eval_only evaluate_only", "eval.only"),
    **_set("eval_batch_size per_device_eval_batch_size eval.batch_size", "eval.per_device_batch_size"),
    **_set("eval.num_samples eval.max_samples eval.max_documents eval.size", "eval.num_documents"),
    **_set("max_eval_samples val_set_size val_size test_size eval_size num_eval_samples", "eval.num_documents"),
    **_set("eval_dataset val_dataset validation_file eval_file", "eval.dataset"),
    **_set("eval_split test_split dataset_test_split", "eval.split"),
    # --- the server
    **_set("vllm_server_host vllm_host", "vllm.host"),
    **_set("vllm_server_port vllm_port", "vllm.port"),
    **_set("vllm_gpu_memory_utilization", "vllm.gpu_memory_utilization"),
    **_set("vllm_tensor_parallel_size", "vllm.tensor_parallel_size"),
    **_set("vllm_num_engines", "vllm.data_parallel_size"),
    **_not_supported("vllm_mode", "vLLM runs as a server of its own: serve_vllm.py"),
}


def explain_unknown(key: str, kind: type, others: dict[str, type]) -> str:
    """What to say of a dotted key that a configuration does not have.

    others: script -> the configuration of another mode.
    """
    path, known = re.sub(r"\[\d+\]", "[]", key), keys_of(kind)
    start, dot, name = path.rpartition(".")
    name = name.lower().replace("-", "_")
    belongs = [f"it belongs to {script}" for script, other in others.items() if path in keys_of(other)]
    meant = FOREIGN.get(f"{start}{dot}{name}") or FOREIGN.get(name) or Foreign(())
    keys = [target for target in meant.keys if target in known]
    if keys:
        note = f" {meant.note}" if meant.note else ""
        return "; ".join([*belongs, f"did you mean {' and '.join(keys)}?{note}"])
    if belongs or (meant.note and not meant.keys):
        return "; ".join(belongs) or meant.note
    same = [other for other in known if other.rpartition(".")[2] == name and "[]" not in other]
    if same:
        return f"did you mean {' or '.join(same)}?"
    inside = [other.removeprefix(start + dot) for other in known if other.rpartition(".")[0] == start]
    close = difflib.get_close_matches(name, inside, n=1, cutoff=NEAR_SIBLING)
    if close:
        return f"did you mean {key.rpartition('.')[0]}{dot}{close[0]}?"
    names = {other.rpartition(".")[2]: other for other in known if "[]" not in other}
    names |= {other: target for other, of in FOREIGN.items() for target in of.keys[:1] if target in known}
    close = difflib.get_close_matches(name, names, n=1, cutoff=NEAR)
    return f"did you mean {names[close[0]]}?" if close else f"allowed: {', '.join(inside)}"
