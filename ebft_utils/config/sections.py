"""The sections model, lora, feature_network, ebft, train and vllm of the configuration (data and eval: data.py)."""

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal

from .settings import Section, option

TRACKERS = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]


@dataclass
class ModelConfig(Section):
    """The model that is trained, and how it runs."""

    name_or_path: str = option(
        "", "hub id, local folder, .gguf file, or package:NAME (a model inside an installed Python package)"
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    tokenizer: str | None = option(None, "hub id or folder of the tokenizer; null: the model's own")
    pad_token: str | None = option(None, "token to pad with, for tokenizers that have none")
    eos_token: str | None = option(None, "end-of-document token, for tokenizers that have none")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision of forward passes and frozen weights; trained weights and optimizer state stay float32"
    )
    attn_implementation: Literal["auto", "flex_attention", "sdpa", "eager"] = option(
        "auto",
        "attention over the packed layout. flex_attention: compiled kernel that skips empty blocks (CUDA GPUs); "
        "sdpa: in blocks; eager: all scores; auto: flex_attention on GPUs in bfloat16 if equal to sdpa, else sdpa",
    )
    compile_decoding: bool = option(
        False,
        "compile the decoding step, on a GPU as a CUDA graph: minutes at the start, and keys and values keep their "
        "memory. Needs flex_attention; not with FSDP2, nor with full fine-tuning in bfloat16",
    )
    gradient_checkpointing: bool = option(
        False, "recompute layers in the backward pass: less memory, about a third more time"
    )


@dataclass
class LoraConfig(Section):
    """The LoRA adapter. Without this section all weights are trained."""

    r: int = option(16, "rank of the adapter", minimum=1)
    alpha: float = option(32.0, "scale of the adapter is alpha / r", above=0)
    target_modules: str | list[str] = option("all-linear", "names of the layers that get an adapter, or all-linear")
    merge: bool | None = option(
        None,
        "export the model with the adapter merged in as final/, and the adapter as final/adapter; null: only where an "
        "adapter cannot be used alone (the model is a GGUF file)",
    )


@dataclass
class FeatureNetworkConfig(Section):
    """Where the frozen copy of the model runs. With lora there is no copy."""

    device: str = option(
        "auto",
        "where the frozen copy lies (with lora there is none): auto, cuda:1, cpu. auto: beside the policy, "
        "or on a second GPU when one process sees several",
    )
    shard: bool = option(False, "split the frozen copy over the processes by layers, like the policy (FSDP2 launches)")


@dataclass
class EBFTConfig(Section):
    """The algorithm, as far as both modes share it."""

    feature_layers: list[float] = option(
        [0.25, 0.5, 0.75], "depths of the feature layers; 0: embeddings, 1: after the last layer", minimum=0, maximum=1
    )
    embed_method: Literal["last_token", "mean_pooling", "completion_mean", "concat"] = option(
        "last_token",
        "the state of a rollout's last token; the mean over its tokens (completion_mean), in structured mode with the "
        "prompt's (mean_pooling); or the states at 1/4, 1/2 and 3/4 of it, side by side (concat)",
    )
    feature_norm: Literal["layer", "joint"] = option(
        "layer",
        "features are scaled to length 1: layer by layer, with equal weights (layer), or all layers side by side, as "
        "in the paper's released code (joint)",
    )
    whitening: Literal["feature", "sample", "none"] = option(
        "feature",
        "whitening of the features within each group. feature: eq 8; sample: the reading of the paper's released code; "
        "none: they stay as they are",
    )
    whiten_tol: float = option(
        1e-5,
        "singular values below this share of the largest count as zero (below 1e-6 they would be rounding)",
        minimum=1e-6,
        maximum=1,
    )
    alignment_coef: float = option(1.0, "weight of the alignment reward", minimum=0)
    diversity_coef: float = option(1.0, "weight of the diversity penalty", minimum=0)
    rl_coef: float = option(
        1.0, "weight of the feature-matching policy gradient; 0: no rollouts in training", minimum=0
    )
    ce_coef: float = option(
        0.1, "weight of cross-entropy on the ground truth (paper: 0, 0.03, 0.1); 1 with rl_coef 0: plain SFT", minimum=0
    )
    temperature: float = option(
        0.6,
        "sampling temperature; the policy that is trained is softmax(logits / temperature). Below 1e-4 float32 cannot "
        "hold it",
        minimum=1e-4,
    )
    top_p: float = option(
        1.0, "only 1.0: a truncated distribution would not be the policy that is scored", above=0, maximum=1
    )
    advantage_estimator: Literal["rloo", "eq94", "group_norm", "reinforce"] = option(
        "rloo",
        "reward minus a baseline. rloo: the siblings' mean reward in the group without this rollout, unbiased; eq94: "
        "the paper's formula, unbiased without whitening; group_norm: eq94 / group's std; reinforce: no baseline",
    )


@dataclass
class StridedEBFTConfig(EBFTConfig):
    """The algorithm in strided mode."""

    stride: int = option(8, "tokens from one anchor to the next", minimum=1)
    context_length: int = option(8, "tokens before a document's first anchor", minimum=1)
    min_completion_prefix: int = option(
        0, "tokens of a completion before its first anchor (raw text has no prompt: it is all completion)", minimum=0
    )
    generate_max_len: int = option(8, "tokens of a rollout", minimum=1)
    n_samples_per_prompt: int = option(4, "rollouts at each anchor, at least 2 (group_norm: 3)", minimum=1)
    max_packed_tokens: int | None = option(
        None,
        "most tokens of a row, document and rollouts, in one forward; further rollouts run in further forwards, each "
        "with the document again; the results are the same up to rounding. null: no limit",
        minimum=1,
    )


@dataclass
class StructuredEBFTConfig(EBFTConfig):
    """The algorithm in structured mode."""

    num_generations: int = option(4, "completions of each prompt, at least 2 (group_norm: 3)", minimum=1)
    max_completion_length: int = option(
        256, "most tokens of a completion in each turn, end-of-text token included", minimum=1
    )
    adaptive_max_tokens: bool = option(
        False,
        "limit completions to gt_length_multiplier x the length of their prompt's ground truth "
        "(at least 64 tokens, never above max_completion_length)",
    )
    gt_length_multiplier: float = option(1.5, "see adaptive_max_tokens", above=0)
    feature_span: Literal["all", "answer"] = option(
        "all",
        "features of the whole completion (all), or of what follows its </think>, as if there had been no thinking",
    )
    layout: Literal["auto", "packed", "rows"] = option(
        "auto",
        "packed: the completions of a prompt share one copy of it, in one forward; rows: each has its own row, for "
        "recurrent layers and models whose attention takes no mask; auto: packed where the model is proved to bear it",
    )
    use_vllm: bool = option(True, "completions come from the vLLM server (section vllm); false: from the model itself")
    scale_rewards: bool | None = option(
        None,
        "divide advantages by their group's standard deviation; null: as advantage_estimator implies "
        "(group_norm: true, others: false)",
    )
    loss_type: Literal["grpo", "dr_grpo", "bnpo"] = option(
        "bnpo",
        "what the sum over tokens is divided by. bnpo: the batch's tokens; grpo: each completion's tokens, then "
        "completions; dr_grpo: completions x max_completion_length",
    )
    epsilon: float = option(
        0.2,
        "clips the ratio of new to old policy to 1 - epsilon .. 1 + epsilon; acts from the second iteration on",
        above=0,
    )
    num_iterations: int = option(1, "updates made with each batch of completions", minimum=1)
    mask_truncated: bool = option(False, "leave completions that reached their limit out of the policy gradient")
    vllm_importance_cap: float | None = option(
        2.0,
        "weight tokens by min(trainer's probability / server's, cap): the server sampled them; null: no weights. Below "
        "1 it would scale down tokens on which both agree",
        minimum=1,
    )
    vllm_sync_interval: int = option(1, "send the weights to the server every so many steps", minimum=1)
    async_prefetch: bool = option(
        False, "the server writes the next batch while this one trains, with weights that are one update older"
    )


@dataclass
class TrainConfig(Section):
    """Steps, optimizer, logging and checkpoints."""

    output_dir: str = option("", "folder for checkpoints, logs and the final model")
    max_steps: int | None = option(
        None,
        "optimizer steps; the data repeats, in a new order, as often as needed; null: num_epochs decides. One of the "
        "two is required",
        minimum=1,
    )
    num_epochs: float | None = option(
        None,
        "passes over the data, in place of max_steps (not of streams and mixtures); the steps are num_epochs x rows / "
        "batch_size, rounded up",
        above=0,
    )
    seed: int = option(0, "order of the data, rollouts, initial adapter", minimum=0)
    batch_size: int = option(
        8, "rows of an optimizer step, over all processes: the update is the same however they are split", minimum=1
    )
    per_device_batch_size: int = option(
        1, "rows in one forward on each process; gradients are accumulated until batch_size rows are done", minimum=1
    )
    learning_rate: float = option(1e-6, "peak learning rate", above=0)
    lr_scheduler: Literal["constant", "cosine", "linear"] = option(
        "constant", "after the warm-up: stay, or fall to 0 at the last step"
    )
    warmup_ratio: float = option(
        0.03, "share of the steps in which the learning rate rises to its peak", minimum=0, maximum=1
    )
    warmup_steps: int | None = option(
        None, "steps in which the learning rate rises to its peak; null: warmup_ratio decides", minimum=0
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", minimum=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient", minimum=0, maximum=0.99999)
    adam_beta2: float = option(0.95, "AdamW's decay of the mean squared gradient", minimum=0, maximum=0.99999)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    logging_steps: int = option(1, "log a step's metrics every so many steps", minimum=1)
    report_to: list[TRACKERS] = option(
        ["tensorboard"], "where metrics go beside metrics.jsonl: trackers of accelerate, whose package is installed"
    )
    rollout_table_steps: int = option(50, "write a table of sample rollouts every so many steps; 0: never", minimum=0)
    save_steps: int = option(100, "write a checkpoint every so many steps; 0: only at the end", minimum=0)
    save_total_limit: int = option(2, "checkpoints that are kept", minimum=1)
    resume: str | None = option(
        None,
        "latest, or the path of a checkpoint folder; the resumed run replaces later checkpoints in output_dir; "
        "null: a new run",
    )
    process_timeout_minutes: float = option(
        30.0, "the run ends when a process waits for another one longer than this", above=0
    )

    def total_steps(self, rows: Sized) -> int:
        """Optimizer steps of the whole run. rows: those to train on; their number matters with num_epochs alone."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.num_epochs * len(rows) / self.batch_size - 1e-9))  # 1.1 * 10 is 11.000000000000002


@dataclass
class VLLMConfig(Section):
    """The vLLM server, and how the trainer's weights get to it."""

    host: str = option(
        "127.0.0.1", "address the server listens on; any other than 127.0.0.1 lets others load weights into it"
    )
    port: int = option(8000, "port of the server", minimum=1, maximum=65535)
    api_key: str | None = option(
        None, "key of the server's OpenAI endpoints; null: environment variable VLLM_API_KEY, if set. Never saved"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "precision of the server's weights; null: model.dtype"
    )
    max_model_len: int | None = option(
        None, "most tokens of prompt and completion; null: what the data section and max_completion_length need"
    )
    gpu_memory_utilization: float | None = option(
        None,
        "share of the GPU's memory that the server takes (CPU build: of main memory); null: vLLM's own default",
        above=0,
        maximum=1,
    )
    tensor_parallel_size: int = option(1, "GPUs that share each layer", minimum=1)
    data_parallel_size: int = option(1, "copies of the server's model", minimum=1)
    enforce_eager: bool = option(False, "no compilation and no CUDA graphs: starts faster, runs slower")
    extra_args: list[str] = option([], "further arguments of vLLM's server, as on its command line")
    weight_sync: Literal["files", "nccl"] = option(
        "files", "how all weights get to the server: files in sync_folder, or NCCL; a LoRA adapter always goes by files"
    )
    sync_folder: str = option("/dev/shm", "folder that trainer and server both see; weights pass through it")
    sync_tolerance: float = option(
        0.05,
        "each sync is proved: server and trainer score one text. Largest mean difference of their log-probs, "
        "in nats per token",
        above=0,
    )
    timeout: float = option(600.0, "seconds to wait for an unreachable server, at the start or during the run", above=0)
    request_timeout: float = option(1800.0, "seconds that one answer may take", above=0)

    @property
    def url(self) -> str:
        """The server's address, as the trainer reaches it."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
