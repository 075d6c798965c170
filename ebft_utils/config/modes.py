"""The configuration: one YAML file, dotted overrides on the command line, strict validation.

    config = load_config("examples/raw_text.yaml", ["train.max_steps=10", "ebft.ce_coef=0.03"])

Every key is defined once, with its type, default and meaning, in the dataclasses of sections.py and data.py. The
configuration never edits itself: it refuses what it cannot honour, naming the file, the key, the value, the reason and
the fix.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import yaml

from .data import DataConfig, EvalConfig, PromptDataConfig, TextDataConfig, check_data
from .names import explain_unknown
from .sections import (
    EBFTConfig,
    FeatureNetworkConfig,
    LoraConfig,
    ModelConfig,
    StridedEBFTConfig,
    StructuredEBFTConfig,
    TrainConfig,
    VLLMConfig,
)
from .settings import ConfigError, Section, UserError, keys_of, read_settings


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
        self._check_compile_decoding()
        self._check_ebft()
        self._check_feature_network()
        self._check_steps()
        rows, per_device = self.train.batch_size, self.train.per_device_batch_size
        if rows % per_device:
            raise ConfigError(
                "train.batch_size",
                f"{rows} rows are no multiple of train.per_device_batch_size {per_device}",
                ("train.per_device_batch_size",),
            )

    def _check_steps(self) -> None:
        train, pair = self.train, ("train.max_steps", "train.num_epochs")
        if train.max_steps is None and train.num_epochs is None:
            raise ConfigError(pair[0], "is required, or train.num_epochs in its place: the length of the run", pair)
        if train.num_epochs is not None:
            if train.max_steps is not None:
                raise ConfigError(
                    pair[1],
                    f"{train.num_epochs:g} stands beside train.max_steps {train.max_steps}, and both say how long the "
                    "run is; leave one of them out, for example train.max_steps=null",
                    pair,
                )
            for key, uncounted, why in (
                ("data.streaming", self.data.streaming, "a stream is not counted"),
                ("data.mix", self.data.mix is not None, "the sources of a mixture have epochs of their own"),
            ):
                if uncounted:
                    raise ConfigError(pair[1], f"has no meaning with {key}: {why}; set train.max_steps", (key,))
        if train.warmup_steps is None:
            return
        if train.warmup_ratio != TrainConfig().warmup_ratio:
            raise ConfigError(
                "train.warmup_steps",
                f"{train.warmup_steps} stands beside train.warmup_ratio {train.warmup_ratio:g}; leave one of them out",
                ("train.warmup_ratio",),
            )
        if train.max_steps is not None and train.warmup_steps > train.max_steps:
            raise ConfigError(
                "train.warmup_steps",
                f"{train.warmup_steps} is more than train.max_steps {train.max_steps}: the peak would not be reached",
                ("train.max_steps",),
            )

    def _check_compile_decoding(self) -> None:
        if not self.model.compile_decoding:
            return
        attention = self.model.attn_implementation
        if attention in ("sdpa", "eager"):
            raise ConfigError(
                "model.compile_decoding",
                "true needs flex_attention, whose shapes stay the same from step to step, and "
                f"model.attn_implementation is {attention}; leave one of them out",
                ("model.attn_implementation",),
            )
        if self.lora is None and self.model.dtype == "bfloat16":
            raise ConfigError(
                "model.compile_decoding",
                "true with full fine-tuning in bfloat16 would cast every float32 weight anew for each token, inside of "
                "what is compiled; leave it out, or train a lora",
                ("model.dtype",),
            )

    def _check_ebft(self) -> None:
        ebft = self.ebft
        if ebft.top_p != 1.0:
            raise ConfigError(
                "ebft.top_p",
                f"{ebft.top_p} would sample from a truncated distribution, and the full softmax is what is scored; "
                "set it to 1.0 and lower ebft.temperature",
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

    def _check_group(self, key: str, num_samples: int) -> None:
        if num_samples < 2:
            raise ConfigError(
                key,
                "1 leaves a rollout without siblings, and the diversity term and the leave-one-out baseline (rloo) "
                "compare siblings; set it to 2 or more",
            )
        if num_samples < 3 and self.ebft.advantage_estimator == "group_norm":
            raise ConfigError(
                key,
                "2 with ebft.advantage_estimator group_norm: the standard deviation of two rewards does not know their "
                "diversity, and nearly equal ones explode; set it to 3 or more, or take rloo",
                ("ebft.advantage_estimator",),
            )

    def _check_feature_network(self) -> None:
        device, shard = self.feature_network.device, self.feature_network.shard
        if not re.fullmatch(r"auto|cpu|cuda:\d+", device):
            raise ConfigError(
                "feature_network.device", f"{device!r} is not allowed; allowed: auto | cpu | cuda:0, cuda:1, .."
            )
        if self.lora is not None and self.feature_network != FeatureNetworkConfig():
            raise ConfigError(
                "feature_network.shard" if shard else "feature_network.device",
                "with lora the feature network is the policy with its adapter off, wherever that lies; "
                "leave the section feature_network out",
                ("lora",),
            )
        if shard and device != "auto":
            raise ConfigError(
                "feature_network.shard",
                "true splits the network over the processes' own devices, and "
                f"feature_network.device is {device}; leave one of them out",
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
        ebft, length = self.ebft, self.data.sequence_length
        self._check_group("ebft.n_samples_per_prompt", ebft.n_samples_per_prompt)
        smallest = length + ebft.n_samples_per_prompt * ebft.generate_max_len
        if ebft.max_packed_tokens is not None and ebft.max_packed_tokens < smallest:
            raise ConfigError(
                "ebft.max_packed_tokens",
                f"{ebft.max_packed_tokens} has no room for a document and the rollouts of one anchor: "
                f"data.sequence_length {length} + ebft.n_samples_per_prompt {ebft.n_samples_per_prompt} x "
                f"ebft.generate_max_len {ebft.generate_max_len} = {smallest}",
                ("data.sequence_length", "ebft.n_samples_per_prompt", "ebft.generate_max_len"),
            )
        needed = self.first_anchor + ebft.generate_max_len
        if needed > length:
            raise ConfigError(
                "data.sequence_length",
                f"{length} has no room for one rollout: ebft.context_length {ebft.context_length} "
                f"(ebft.min_completion_prefix {ebft.min_completion_prefix}) + "
                f"ebft.generate_max_len {ebft.generate_max_len} need {needed} tokens",
                ("ebft.context_length", "ebft.min_completion_prefix", "ebft.generate_max_len"),
            )

    @property
    def first_anchor(self) -> int:
        """Tokens before the first anchor of a raw-text document.

        With a prompt of p tokens: max(context_length, p + min_completion_prefix).
        """
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
        ebft = self.ebft
        self._check_group("ebft.num_generations", ebft.num_generations)
        if ebft.scale_rewards and ebft.advantage_estimator != "group_norm":
            raise ConfigError(
                "ebft.scale_rewards",
                f"true with ebft.advantage_estimator {ebft.advantage_estimator}: dividing by the standard deviation of "
                "a few rewards makes nearly equal ones explode; use group_norm, or leave it out",
                ("ebft.advantage_estimator",),
            )
        self._check_use_vllm()
        longest, keys = self.longest_sequence
        one_turn = self.data.max_prompt_length + ebft.max_completion_length
        if longest < one_turn:
            raise ConfigError(
                "data.max_conversation_length",
                f"{longest} has no room for one turn, data.max_prompt_length + ebft.max_completion_length = {one_turn}",
                ("data.max_prompt_length", "ebft.max_completion_length"),
            )
        vllm = self.vllm
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

    def _check_use_vllm(self) -> None:
        ebft = self.ebft
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
                "true compiles the trainer's own decoding, and with ebft.use_vllm the server writes the completions; "
                "leave it out",
                ("ebft.use_vllm",),
            )

    @property
    def longest_sequence(self) -> tuple[int, str]:
        """Most tokens that the model reads in a row, and the keys that decide it."""
        if self.data.max_conversation_length is not None:
            return self.data.max_conversation_length, "data.max_conversation_length"
        one_turn = self.data.max_prompt_length + self.ebft.max_completion_length
        return one_turn, "data.max_prompt_length + ebft.max_completion_length"

    def to_dict(self) -> dict:
        """As in Config, without the server's API key, which must not be saved."""
        tree = super().to_dict()
        tree["vllm"]["api_key"] = None
        return tree


# script -> its configuration
MODES: dict[str, type[Config]] = {"train_strided.py": StridedConfig, "train_structured.py": StructuredConfig}


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def parse_command_line(argv: list[str], description: str, kind: type[Config] = StridedConfig):
    """(configuration of a mode, whether this is a dry run), as the command line says.

    The configuration is None when it was only printed (--print-config).
    """
    parser = _Parser(
        usage="%(prog)s --cfg FILE [--print-config] [--dry-run] [section.key=value ..]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", metavar="FILE", help="YAML configuration")
    for flag, meaning in (
        ("--print-config", "print the merged configuration and stop"),
        ("--dry-run", "show data, anchors, steps and estimated memory, and stop"),
    ):
        parser.add_argument(flag, action="store_true", help=meaning)
    example = "settings that replace the file's, for example train.max_steps=10"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=example)
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(f"command line: {unknown[0]!r} is no flag; {_instead_of_flag(unknown[0], kind)}")
    if arguments.cfg is None:
        files = [word for word in arguments.overrides if word.endswith((".yaml", ".yml"))]
        raise UserError(f"command line: the configuration is missing: --cfg {next(iter(files), 'FILE')}")
    config = load_config(arguments.cfg, arguments.overrides, kind)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return None, False
    return config, arguments.dry_run


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as all else here does."""

    def error(self, message: str):
        raise UserError(f"command line: {message}")


def _instead_of_flag(argument: str, kind: type[Config]) -> str:
    """What was probably meant by an argument that begins with a dash and is no flag."""
    name, equals, value = argument.lstrip("-").partition("=")
    if name.replace("_", "-") in ("print-config", "dry-run"):
        return f"did you mean --{name.replace('_', '-')}?"
    if name in ("c", "config", "cfg", "config-file", "config_file"):
        return "the configuration is given as --cfg FILE"
    setting = f"{name}={value if equals else 'VALUE'}"
    if name in keys_of(kind):
        return f"a setting is written without dashes: {setting}"
    return f"a setting is written without dashes, as section.key=value; {_explain(name, kind)}"


def _explain(key: str, kind: type[Config]) -> str:
    return explain_unknown(key, kind, {script: other for script, other in MODES.items() if other is not kind})


def load_config(file: str, overrides: Sequence[str] = (), kind: type[Config] = StridedConfig):
    """The configuration of a mode from a YAML file and `section.key=value` overrides.

    Raises UserError with file (or override), key, value and what is allowed.
    """
    return read_settings(kind, file, overrides, partial(_explain, kind=kind))
