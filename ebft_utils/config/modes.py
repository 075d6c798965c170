"""The configuration: one YAML file, dotted overrides on the command line, strict validation.

    config = load_config("examples/quickstart.yaml", ["train.max_steps=10", "ebft.ce_coef=0.03"])

Every key, its type, its default and its meaning stands in the dataclasses below (those of data and eval in data_config.py), once. The configuration
never edits itself: what it cannot honour it refuses, with the file, the key, the value, the reason and the fix.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import yaml

from .data import DataConfig, EvalConfig, PromptDataConfig, TextDataConfig, check_data
from .settings import ConfigError, Section, UserError, option, read_settings


@dataclass
class ModelConfig(Section):
    name_or_path: str = option(
        "", "hub id, local folder, .gguf file, or package:NAME (a model inside an installed Python package)"
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    tokenizer: str | None = option(None, "hub id or folder of the tokenizer; null: the model's own")
    pad_token: str | None = option(None, "token to pad with, for tokenizers that have none")
    eos_token: str | None = option(None, "end-of-document token, for tokenizers that have none")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "precision of the forward passes and of frozen weights; trained weights and optimizer state are always float32",
    )
    attn_implementation: Literal["auto", "flex_attention", "sdpa", "eager"] = option(
        "auto",
        "how the packed layout attends. flex_attention: a compiled kernel that skips what nobody sees (CUDA GPUs); sdpa: scaled_dot_product_attention in "
        "blocks; eager: with the whole mask and all scores; auto: flex_attention in bfloat16 on a GPU where it runs and agrees with sdpa, else sdpa",
    )
    compile_decoding: bool = option(
        False,
        "compile the step that writes one token of each rollout, on a GPU with a CUDA graph (flex_attention only; not under FSDP2, nor all weights in bfloat16): minutes at the start, and keys and values keep their memory",
    )
    gradient_checkpointing: bool = option(
        False, "recompute layers in the backward pass: less memory, about a third more time"
    )


@dataclass
class LoraConfig(Section):
    r: int = option(16, "rank of the adapter", minimum=1)
    alpha: float = option(32.0, "scale of the adapter is alpha / r", above=0)
    target_modules: str | list[str] = option("all-linear", "names of the layers that get an adapter, or all-linear")
    merge: bool = option(
        False,
        "also export the model with the adapter merged into its weights, as final/merged (the same as --merge-lora)",
    )


@dataclass
class FeatureNetworkConfig(Section):
    device: str = option(
        "auto",
        "where the frozen copy lies: auto (beside the policy; on a second GPU when one process sees several), cuda:1, cpu. With lora there is no copy",
    )
    shard: bool = option(
        False, "split the frozen copy over the processes layer by layer, like the policy (FSDP2 launches)"
    )


@dataclass
class EBFTConfig(Section):
    feature_layers: list[float] = option(
        [0.25, 0.5, 0.75],
        "depths of the hidden states used as features; 0 embeddings, 1 after the last layer",
        minimum=0,
        maximum=1,
    )
    embed_method: Literal["last_token", "mean_pooling", "completion_mean", "concat"] = option(
        "last_token",
        "how the states of a rollout's tokens become one vector: the last one; their mean (mean_pooling: with those of the prompt, in structured mode; "
        "completion_mean: without); or those at 1/4, 1/2 and 3/4 side by side",
    )
    use_whitening: bool = option(True, "whiten the features within each group (eq 8)")
    whitening: Literal["feature", "sample"] = option(
        "feature", "feature: eq 8; sample: the reading of the paper's released code"
    )
    whiten_tol: float = option(
        1e-5, "singular values below this share of the largest count as zero", above=0, maximum=1
    )
    alignment_coef: float = option(1.0, "weight of the alignment reward", minimum=0)
    diversity_coef: float = option(1.0, "weight of the diversity penalty", minimum=0)
    rl_coef: float = option(
        1.0, "weight of the feature-matching policy gradient; 0: no rollouts in training", minimum=0
    )
    ce_coef: float = option(
        0.1,
        "weight of the cross-entropy on the ground truth (the paper tries 0, 0.03, 0.1); rl_coef 0 and ce_coef 1 is plain SFT",
        minimum=0,
    )
    temperature: float = option(
        0.6, "sampling temperature; the policy that is trained is softmax(logits / temperature)", above=0
    )
    top_p: float = option(
        1.0, "only 1.0: a truncated distribution would not be the policy that is scored", above=0, maximum=1
    )
    advantage_estimator: Literal["rloo", "group_norm", "reinforce"] = option(
        "rloo",
        "rloo: leave-one-out with the corrected baseline (eq 94); group_norm: (r - mean) / std; reinforce: the reward itself",
    )


@dataclass
class StridedEBFTConfig(EBFTConfig):
    stride: int = option(8, "tokens from one anchor to the next", minimum=1)
    context_length: int = option(8, "tokens before a document's first anchor", minimum=1)
    min_completion_prefix: int = option(
        0,
        "tokens of a completion that are visible at its first anchor (raw text has no prompt: all of it is completion)",
        minimum=0,
    )
    generate_max_len: int = option(8, "tokens of a rollout", minimum=1)
    n_samples_per_prompt: int = option(
        4,
        "rollouts at each anchor, 2 or more; with 2 the diversity part of the reward has no baseline (eq 94)",
        minimum=1,
    )
    max_packed_tokens: int | None = option(
        None,
        "most tokens of a row, document and rollouts, in one forward: rollouts that do not fit are run in further forwards, each with the document again, with the same results up to rounding; null: no limit",
        minimum=1,
    )


@dataclass
class StructuredEBFTConfig(EBFTConfig):
    num_generations: int = option(
        4,
        "completions of each prompt, 2 or more; with 2 the diversity part of the reward has no baseline (eq 94)",
        minimum=1,
    )
    max_completion_length: int = option(
        256, "most tokens of a completion, in each turn, end-of-text token included", minimum=1
    )
    adaptive_max_tokens: bool = option(
        False,
        "let a completion be at most gt_length_multiplier times as long as its prompt's ground truth (at least 64 tokens, never above the limit)",
    )
    gt_length_multiplier: float = option(1.5, "see adaptive_max_tokens", above=0)
    feature_span: Literal["all", "answer"] = option(
        "all",
        "what features are made of: the whole completion, or only what stands after its </think>, as if the thinking had not been there",
    )
    use_vllm: bool = option(
        True, "completions from the vLLM server of the section vllm; false: from the trained model itself"
    )
    scale_rewards: bool | None = option(
        None,
        "divide advantages by their group's standard deviation; null: what advantage_estimator means by itself (group_norm: true, others: false)",
    )
    loss_type: Literal["grpo", "dr_grpo", "bnpo"] = option(
        "bnpo",
        "what the sum over tokens is divided by: the tokens of the batch (bnpo); each completion's own tokens, then completions (grpo); completions x max_completion_length (dr_grpo)",
    )
    epsilon: float = option(
        0.2,
        "the ratio of new to old policy counts between 1 - epsilon and 1 + epsilon; acts from the second iteration on",
        above=0,
    )
    num_iterations: int = option(1, "updates made with each batch of completions", minimum=1)
    mask_truncated: bool = option(False, "leave completions that ran into their limit out of the policy gradient")
    vllm_importance_cap: float | None = option(
        2.0,
        "tokens are weighted with min(trainer's probability / server's, cap), because the server sampled them; null: not weighted",
        above=0,
    )
    vllm_sync_interval: int = option(1, "send the weights to the server each so many steps", minimum=1)
    async_prefetch: bool = option(
        False, "let the server write the next batch while this one trains, with weights that are one update older"
    )


@dataclass
class TrainConfig(Section):
    MISPLACED: ClassVar[dict[str, str]] = {  # what other trainers call the same thing from the other end
        "gradient_accumulation_steps": "set train.batch_size, the rows of an optimizer step over all processes: the number of accumulated forwards follows from it"
    }

    output_dir: str = option("", "folder for checkpoints, logs and the final model")
    max_steps: int = option(
        1000, "optimizer steps; the data is repeated, in a new order, as often as needed", minimum=1
    )
    seed: int = option(0, "order of the data, rollouts, initial adapter", minimum=0)
    batch_size: int = option(
        8, "rows of one optimizer step, over all processes: the update is the same however they are split", minimum=1
    )
    per_device_batch_size: int = option(
        1, "rows in one forward on each process: gradients are accumulated until batch_size rows are done", minimum=1
    )
    learning_rate: float = option(1e-6, "peak learning rate", above=0)
    lr_scheduler: Literal["constant", "cosine", "linear"] = option(
        "constant", "after the warm-up: stay, or fall to 0 at max_steps"
    )
    warmup_ratio: float = option(
        0.03, "share of max_steps in which the learning rate rises to its peak", minimum=0, maximum=1
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", minimum=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient", minimum=0, maximum=0.99999)
    adam_beta2: float = option(0.95, "AdamW's decay of the mean squared gradient", minimum=0, maximum=0.99999)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    logging_steps: int = option(1, "log the metrics of each so-many-th step", minimum=1)
    rollout_table_steps: int = option(50, "write a table of sample rollouts each so many steps; 0: never", minimum=0)
    save_steps: int = option(100, "checkpoint each so many steps; 0: only at the end", minimum=0)
    save_total_limit: int = option(2, "checkpoints that are kept", minimum=1)
    dry_run: bool = option(
        False, "show what would be done and stop (the same as --dry-run): data, anchors, steps, estimated memory"
    )
    resume: str | None = option(
        None,
        "latest, or the path of a checkpoint folder, whose continuation replaces later checkpoints of this folder; null: a new run",
    )
    process_timeout_minutes: float = option(
        30.0, "a process that waits for another one longer than this ends the run", above=0
    )


@dataclass
class VLLMConfig(Section):
    host: str = option(
        "127.0.0.1",
        "address that the server listens on and the trainer connects to; any other than 127.0.0.1 lets others load weights into it",
    )
    port: int = option(8000, "port that it listens on", minimum=1, maximum=65535)
    api_key: str | None = option(
        None,
        "key of the server's OpenAI endpoints; null: the environment variable VLLM_API_KEY, where it is set. Never saved with the run",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "precision of the server's weights; null: model.dtype"
    )
    max_model_len: int | None = option(
        None, "tokens of prompt and completion together; null: what the data section and max_completion_length need"
    )
    gpu_memory_utilization: float | None = option(
        None,
        "share of the GPU's memory that the server takes (of main memory in the CPU build); null: vLLM's own default",
        above=0,
        maximum=1,
    )
    tensor_parallel_size: int = option(1, "GPUs that share each layer", minimum=1)
    data_parallel_size: int = option(1, "copies of the server's model", minimum=1)
    enforce_eager: bool = option(False, "no compilation and no CUDA graphs: starts faster, runs slower")
    extra_args: list[str] = option([], "further arguments of vLLM's server, as on its command line")
    weight_sync: Literal["files", "nccl"] = option(
        "files",
        "how all weights get to the server: files in sync_folder, or NCCL from GPU to GPU. (A LoRA adapter always goes by files)",
    )
    sync_folder: str = option("/dev/shm", "folder that trainer and server both see; weights pass through it")
    sync_tolerance: float = option(
        0.05,
        "each sync is proved: mean difference of the two sides' log-probs of one text that is still right, nats per token",
        above=0,
    )
    timeout: float = option(
        600.0, "seconds to wait for a server that is not there, at the start or in the middle", above=0
    )
    request_timeout: float = option(1800.0, "seconds that one answer may take", above=0)

    @property
    def url(self) -> str:
        """Where the trainer finds it."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass
class Config(Section):
    """What both modes have. The modes are StridedConfig and StructuredConfig below."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    feature_network: FeatureNetworkConfig = dataclasses.field(default_factory=FeatureNetworkConfig)
    ebft: EBFTConfig = dataclasses.field(default_factory=EBFTConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    lora: LoraConfig | None = None  # absent: full fine-tuning

    def __post_init__(self):
        for key, value in (
            ("model.name_or_path", self.model.name_or_path),
            ("data.dataset", self.data.dataset or self.data.mix is not None),
            ("train.output_dir", self.train.output_dir),
        ):
            if not value:
                raise ConfigError(key, "is required and has no default")
        check_data(self.data, self.eval, self.mode)
        if self.model.compile_decoding and self.model.attn_implementation in ("sdpa", "eager"):
            raise ConfigError(
                "model.compile_decoding",
                f"true needs flex_attention, whose shapes stay the same from step to step, and model.attn_implementation is {self.model.attn_implementation}; leave one of them out",
                ("model.attn_implementation",),
            )
        if self.model.compile_decoding and self.lora is None and self.model.dtype == "bfloat16":
            raise ConfigError(
                "model.compile_decoding",
                "true with full fine-tuning in bfloat16 would cast every float32 weight anew for each token, inside of what is compiled; leave it out, or train a lora",
                ("model.dtype",),
            )
        self._check_ebft()
        self._check_feature_network()
        if self.train.batch_size % self.train.per_device_batch_size:
            raise ConfigError(
                "train.batch_size",
                f"{self.train.batch_size} rows are no multiple of train.per_device_batch_size {self.train.per_device_batch_size}",
                ("train.per_device_batch_size",),
            )

    def _check_ebft(self) -> None:
        ebft = self.ebft
        if ebft.top_p != 1.0:
            raise ConfigError(
                "ebft.top_p",
                f"{ebft.top_p} would sample from a truncated distribution, and the full softmax is what is scored; set it to 1.0 and lower ebft.temperature",
            )
        if not ebft.feature_layers:
            raise ConfigError(
                "ebft.feature_layers",
                "is empty; give at least one depth between 0 and 1, for example [0.25, 0.5, 0.75]",
            )
        if ebft.rl_coef == 0 and ebft.ce_coef == 0:
            raise ConfigError(
                "ebft.rl_coef",
                "0 together with ebft.ce_coef 0 trains nothing; set one of them above 0",
                ("ebft.ce_coef",),
            )

    def _check_feature_network(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda:\d+", self.feature_network.device):
            raise ConfigError(
                "feature_network.device",
                f"{self.feature_network.device!r} is not allowed; allowed: auto | cpu | cuda:0, cuda:1, ..",
            )
        if self.lora is not None and self.feature_network != FeatureNetworkConfig():
            key = "feature_network.shard" if self.feature_network.shard else "feature_network.device"
            raise ConfigError(
                key,
                "with lora the feature network is the policy with its adapter off, wherever that lies; leave the section feature_network out",
                ("lora",),
            )
        if self.feature_network.shard and self.feature_network.device != "auto":
            raise ConfigError(
                "feature_network.shard",
                f"true splits the network over the processes' own devices, and feature_network.device is {self.feature_network.device}; leave one of them out",
                ("feature_network.device",),
            )

    def to_dict(self) -> dict:
        """Plain nested dict, as in the YAML."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The whole merged configuration as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


@dataclass
class StridedConfig(Config):
    """Settings of train_strided.py."""

    mode: ClassVar[str] = "strided"
    data: TextDataConfig = dataclasses.field(default_factory=TextDataConfig)
    ebft: StridedEBFTConfig = dataclasses.field(default_factory=StridedEBFTConfig)

    def __post_init__(self):
        super().__post_init__()
        ebft = self.ebft
        if ebft.n_samples_per_prompt < 2:
            raise ConfigError(
                "ebft.n_samples_per_prompt",
                "1 leaves a rollout without siblings, and the diversity term and the leave-one-out baseline compare siblings; set it to 2 or more",
            )
        smallest = self.data.sequence_length + ebft.n_samples_per_prompt * ebft.generate_max_len
        if ebft.max_packed_tokens is not None and ebft.max_packed_tokens < smallest:
            raise ConfigError(
                "ebft.max_packed_tokens",
                f"{ebft.max_packed_tokens} has no room for a document and the rollouts of one anchor: data.sequence_length {self.data.sequence_length} + "
                f"ebft.n_samples_per_prompt {ebft.n_samples_per_prompt} x ebft.generate_max_len {ebft.generate_max_len} = {smallest}",
                ("data.sequence_length", "ebft.n_samples_per_prompt", "ebft.generate_max_len"),
            )
        needed = self.first_anchor + ebft.generate_max_len
        if needed > self.data.sequence_length:
            raise ConfigError(
                "data.sequence_length",
                f"{self.data.sequence_length} has no room for one rollout: ebft.context_length {ebft.context_length} (ebft.min_completion_prefix "
                f"{ebft.min_completion_prefix}) + ebft.generate_max_len {ebft.generate_max_len} need {needed} tokens",
                ("ebft.context_length", "ebft.min_completion_prefix", "ebft.generate_max_len"),
            )

    @property
    def first_anchor(self) -> int:
        """Tokens before the first anchor of a raw-text document. (With a prompt of p tokens: max(context_length, p + min_completion_prefix).)"""
        return max(self.ebft.context_length, self.ebft.min_completion_prefix)

    @property
    def longest_sequence(self) -> tuple[int, str]:
        """Most tokens that the model reads in a row, and the keys that decide it."""
        return self.data.sequence_length, "data.sequence_length"


@dataclass
class StructuredConfig(Config):
    """Settings of train_structured.py and serve_vllm.py."""

    mode: ClassVar[str] = "structured"
    data: PromptDataConfig = dataclasses.field(default_factory=PromptDataConfig)
    ebft: StructuredEBFTConfig = dataclasses.field(default_factory=StructuredEBFTConfig)
    vllm: VLLMConfig = dataclasses.field(default_factory=VLLMConfig)

    def __post_init__(self):
        super().__post_init__()
        ebft, vllm = self.ebft, self.vllm
        if ebft.num_generations < 2:
            raise ConfigError(
                "ebft.num_generations",
                "1 leaves a completion without siblings, and the diversity term and the leave-one-out baseline (rloo) compare siblings; set it to 2 or more",
            )
        if ebft.scale_rewards and ebft.advantage_estimator != "group_norm":
            raise ConfigError(
                "ebft.scale_rewards",
                f"true with ebft.advantage_estimator {ebft.advantage_estimator}: dividing by the standard deviation of a few rewards makes nearly equal ones explode; "
                "use group_norm, or leave it out",
                ("ebft.advantage_estimator",),
            )
        for key, value, alone in (
            ("async_prefetch", ebft.async_prefetch, False),
            ("vllm_sync_interval", ebft.vllm_sync_interval, 1),
        ):
            if not ebft.use_vllm and value != alone:
                raise ConfigError(
                    f"ebft.{key}",
                    f"{value!r} needs a server, and ebft.use_vllm is false; leave it out",
                    ("ebft.use_vllm",),
                )
        if ebft.use_vllm and self.model.compile_decoding:
            raise ConfigError(
                "model.compile_decoding",
                "true compiles the trainer's own decoding, and with ebft.use_vllm the server writes the completions; leave it out",
                ("ebft.use_vllm",),
            )
        longest, keys = self.longest_sequence
        one_turn = self.data.max_prompt_length + ebft.max_completion_length
        if longest < one_turn:
            raise ConfigError(
                "data.max_conversation_length",
                f"{longest} has no room for one turn, data.max_prompt_length + ebft.max_completion_length = {one_turn}",
                ("data.max_prompt_length", "ebft.max_completion_length"),
            )
        if vllm.max_model_len is not None and vllm.max_model_len < longest:
            raise ConfigError(
                "vllm.max_model_len",
                f"{vllm.max_model_len} tokens have no room for the {longest} of {keys}",
                ("data.max_prompt_length", "ebft.max_completion_length"),
            )
        if self.lora is not None and vllm.data_parallel_size > 1:
            raise ConfigError(
                "vllm.data_parallel_size",
                f"{vllm.data_parallel_size} with lora: only one of the copies would get the adapter; set it to 1",
                ("lora",),
            )
        if self.lora is not None and vllm.weight_sync == "nccl":
            raise ConfigError(
                "vllm.weight_sync",
                "nccl sends all weights, and with lora only the adapter is trained, which goes by files; leave it out",
                ("lora",),
            )

    @property
    def longest_sequence(self) -> tuple[int, str]:
        """Most tokens that the model reads in a row, and the keys that decide it."""
        if self.data.max_conversation_length is not None:
            return self.data.max_conversation_length, "data.max_conversation_length"
        return (
            self.data.max_prompt_length + self.ebft.max_completion_length,
            "data.max_prompt_length + ebft.max_completion_length",
        )

    def to_dict(self) -> dict:
        """As in Config, without the server's key: what is saved must not give it away."""
        tree = super().to_dict()
        tree["vllm"]["api_key"] = None
        return tree


for one, other, script in (
    (StridedEBFTConfig, StructuredEBFTConfig, "train_structured.py"),
    (TextDataConfig, PromptDataConfig, "train_structured.py"),
    (StridedConfig, StructuredConfig, "train_structured.py"),
):
    names, others = (
        {field.name for field in dataclasses.fields(one)},
        {field.name for field in dataclasses.fields(other)},
    )
    one.MISPLACED = {**one.MISPLACED, **{name: f"it belongs to {script}" for name in others - names}}
    other.MISPLACED = {**other.MISPLACED, **{name: "it belongs to train_strided.py" for name in names - others}}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Reading


def parse_command_line(argv: list[str], description: str, kind: type[Config] = StridedConfig):
    """The configuration (of a mode) that the command line asks for; None when it only asked for it to be printed (--print-config)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--print-config", action="store_true", help="print the merged configuration and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="show data, anchors, steps and estimated memory, and stop"
    )
    parser.add_argument(
        "--merge-lora",
        action="store_true",
        help="also export the model with the adapter merged into its weights (final/merged)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="overrides, for example train.max_steps=10"
    )
    arguments = parser.parse_intermixed_args(argv)
    overrides = arguments.overrides + ["train.dry_run=true"] * arguments.dry_run
    config = load_config(arguments.cfg, overrides, kind)
    if arguments.merge_lora:
        if config.lora is None:
            raise UserError(f"--merge-lora: {arguments.cfg} has no lora section, so there is no adapter to merge")
        config = load_config(arguments.cfg, [*overrides, "lora.merge=true"], kind)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return None
    return config


def load_config(file: str, overrides: Sequence[str] = (), kind: type[Config] = StridedConfig):
    """The configuration of a mode from a YAML file and `section.key=value` overrides. Raises UserError with file (or override), key, value and what is allowed."""
    return read_settings(kind, file, overrides)
