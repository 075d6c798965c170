"""The configuration: one YAML file, dotted overrides on the command line, strict validation.

    config = load_config("examples/quickstart.yaml", ["train.max_steps=10", "ebft.ce_coef=0.03"])

Every key, its type, its default and its meaning stands in the dataclasses below, once. The configuration never edits itself: what it cannot
honour it refuses, with the file, the key, the value, the reason and the fix.
"""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml


class UserError(Exception):
    """Something that the user can mend: shown as one message, without a traceback."""


class ConfigError(UserError):
    """A wrong configuration value. key: the dotted key; reason: what is wrong and what would be right; related: other keys that take part in it."""

    def __init__(self, key: str, reason: str, related: tuple[str, ...] = ()):
        super().__init__(f"{key}: {reason}")
        self.keys = (key, *related)


def option(default, description: str, minimum=None, maximum=None, above=None):
    """A dataclass field with its description (and unit), and the bounds that its value (or each value of a list) must keep."""
    metadata = {"description": description, "minimum": minimum, "maximum": maximum, "above": above}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    name_or_path: str = option("", "hub id, local folder, .gguf file, or package:NAME (a model inside an installed Python package)")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    tokenizer: str | None = option(None, "hub id or folder of the tokenizer; null: the model's own")
    pad_token: str | None = option(None, "token to pad with, for tokenizers that have none")
    eos_token: str | None = option(None, "end-of-document token, for tokenizers that have none")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision of the forward passes and of frozen weights; trained weights and optimizer state are always float32"
    )
    gradient_checkpointing: bool = option(False, "recompute layers in the backward pass: less memory, about a third more time")


@dataclass
class LoraConfig:
    r: int = option(16, "rank of the adapter", minimum=1)
    alpha: float = option(32.0, "scale of the adapter is alpha / r", above=0)
    target_modules: str | list[str] = option("all-linear", "names of the layers that get an adapter, or all-linear")
    merge: bool = option(False, "also export the model with the adapter merged into its weights, as final/merged (the same as --merge-lora)")


@dataclass
class FeatureNetworkConfig:
    device: str = option(
        "auto", "where the frozen copy lies: auto (beside the policy; on a second GPU when one process sees several), cuda:1, cpu. With lora there is no copy"
    )
    shard: bool = option(False, "split the frozen copy over the processes layer by layer, like the policy (FSDP2 launches)")


@dataclass
class DataConfig:
    dataset: str = option(
        "", "python_stdlib (the standard library's source), a .jsonl/.json/.parquet/.csv/.txt file (.txt: a document a line), a folder, or a hub id"
    )
    name: str | None = option(None, "configuration (subset) of a hub dataset")
    revision: str | None = option(None, "branch, tag or commit of a hub dataset")
    split: str = option("train", "which rows, for example train, train[:1%], test[100:200]")
    text_column: str = option("text", "column that holds the raw text")
    file_pattern: str = option("*.py", "which files of a folder are read: *.jsonl, *.json, *.parquet, *.csv or *.txt for rows; of any other kind, each file is a document")
    sequence_length: int = option(256, "tokens of a document (longer ones are truncated), or of a packed row", minimum=2)
    packing: bool = option(False, "put several documents into one row, with attention, positions and anchors kept apart")
    append_eos: bool = option(True, "end each document with the end-of-document token, where it fits")
    on_bad_row: Literal["error", "skip"] = option(
        "error", "a row without text, or too short for one anchor: stop and name it, or leave it out and say how many"
    )
    max_documents: int | None = option(None, "use at most this many documents (before shuffling)", minimum=1)


@dataclass
class EvalConfig:
    only: bool = option(False, "evaluate the model and stop: no training")
    at_start: bool = option(True, "evaluate before the first step")
    at_end: bool = option(True, "evaluate after the last step")
    every_steps: int = option(0, "evaluate each so many steps; 0: not during training", minimum=0)
    num_documents: int | None = option(None, "held-out documents; 0: no evaluation; null: 64, but at most a tenth of the documents", minimum=0)
    dataset: str | None = option(None, "where they come from, like data.dataset; null: taken out of data.dataset, and never trained on")
    split: str = option("test", "rows of eval.dataset (local files have one split: train)")
    per_device_batch_size: int = option(4, "documents at a time on each process", minimum=1)
    seed: int = option(0, "chooses the held-out documents and their rollouts: the same in every run", minimum=0)


@dataclass
class EBFTConfig:
    feature_layers: list[float] = option([0.25, 0.5, 0.75], "depths of the hidden states used as features; 0 embeddings, 1 after the last layer", minimum=0, maximum=1)
    embed_method: Literal["last_token", "mean_pooling", "completion_mean", "concat"] = option(
        "last_token",
        "how the states of a rollout's tokens become one vector: the last one; their mean (both names; they differ in structured mode only); "
        "or those at 1/4, 1/2 and 3/4 side by side",
    )
    use_whitening: bool = option(True, "whiten the features within each group (eq 8)")
    whitening: Literal["feature", "sample"] = option("feature", "feature: eq 8; sample: the reading of the paper's released code")
    whiten_tol: float = option(1e-5, "singular values below this share of the largest count as zero", above=0, maximum=1)
    alignment_coef: float = option(1.0, "weight of the alignment reward", minimum=0)
    diversity_coef: float = option(1.0, "weight of the diversity penalty", minimum=0)
    rl_coef: float = option(1.0, "weight of the feature-matching policy gradient; 0: no rollouts in training", minimum=0)
    ce_coef: float = option(0.0, "weight of the cross-entropy on the ground truth; rl_coef 0 and ce_coef 1 is plain SFT", minimum=0)
    stride: int = option(8, "tokens from one anchor to the next", minimum=1)
    context_length: int = option(8, "tokens before a document's first anchor", minimum=1)
    min_completion_prefix: int = option(0, "tokens of the completion that are visible at the first anchor (raw text has no prompt: all of it is completion)", minimum=0)
    generate_max_len: int = option(8, "tokens of a rollout", minimum=1)
    n_samples_per_prompt: int = option(4, "rollouts at each anchor, 2 or more; with 2 the diversity part of the reward has no baseline (eq 94)", minimum=1)
    temperature: float = option(0.6, "sampling temperature; the policy that is trained is softmax(logits / temperature)", above=0)
    top_p: float = option(1.0, "only 1.0: a truncated distribution would not be the policy that is scored", above=0, maximum=1)
    advantage_estimator: Literal["rloo", "group_norm", "reinforce"] = option(
        "rloo", "rloo: leave-one-out with the corrected baseline (eq 94); group_norm: (r - mean) / std; reinforce: the reward itself"
    )


@dataclass
class TrainConfig:
    output_dir: str = option("", "folder for checkpoints, logs and the final model")
    max_steps: int = option(1000, "optimizer steps; the data is repeated, in a new order, as often as needed", minimum=1)
    seed: int = option(0, "order of the data, rollouts, initial adapter", minimum=0)
    batch_size: int = option(8, "rows of one optimizer step, over all processes: the update is the same however they are split", minimum=1)
    per_device_batch_size: int = option(1, "rows in one forward on each process: gradients are accumulated until batch_size rows are done", minimum=1)
    learning_rate: float = option(1e-6, "peak learning rate", above=0)
    lr_scheduler: Literal["constant", "cosine", "linear"] = option("constant", "after the warm-up: stay, or fall to 0 at max_steps")
    warmup_ratio: float = option(0.03, "share of max_steps in which the learning rate rises to its peak", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", minimum=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient", minimum=0, maximum=0.99999)
    adam_beta2: float = option(0.95, "AdamW's decay of the mean squared gradient", minimum=0, maximum=0.99999)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    logging_steps: int = option(1, "log the metrics of each so-many-th step", minimum=1)
    rollout_table_steps: int = option(50, "write a table of sample rollouts each so many steps; 0: never", minimum=0)
    save_steps: int = option(100, "checkpoint each so many steps; 0: only at the end", minimum=0)
    save_total_limit: int = option(2, "checkpoints that are kept", minimum=1)
    resume: str | None = option(None, "latest, or the path of a checkpoint folder, whose continuation replaces later checkpoints of this folder; null: a new run")
    process_timeout_minutes: float = option(30.0, "a process that waits for another one longer than this ends the run", above=0)


@dataclass
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    feature_network: FeatureNetworkConfig = dataclasses.field(default_factory=FeatureNetworkConfig)
    ebft: EBFTConfig = dataclasses.field(default_factory=EBFTConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    lora: LoraConfig | None = None  # absent: full fine-tuning

    def __post_init__(self):
        for key in ("model.name_or_path", "data.dataset", "train.output_dir"):
            section, name = key.split(".")
            if not getattr(getattr(self, section), name):
                raise ConfigError(key, "is required and has no default")
        ebft = self.ebft
        if ebft.top_p != 1.0:
            raise ConfigError(
                "ebft.top_p", f"{ebft.top_p} would sample from a truncated distribution, and the full softmax is what is scored; set it to 1.0 and lower ebft.temperature"
            )
        if ebft.n_samples_per_prompt < 2:
            raise ConfigError(
                "ebft.n_samples_per_prompt", "1 leaves a rollout without siblings, and the diversity term and the leave-one-out baseline compare siblings; set it to 2 or more"
            )
        if not ebft.feature_layers:
            raise ConfigError("ebft.feature_layers", "is empty; give at least one depth between 0 and 1, for example [0.25, 0.5, 0.75]")
        if ebft.rl_coef == 0 and ebft.ce_coef == 0:
            raise ConfigError("ebft.rl_coef", "0 together with ebft.ce_coef 0 trains nothing; set one of them above 0", ("ebft.ce_coef",))
        if not re.fullmatch(r"auto|cpu|cuda:\d+", self.feature_network.device):
            raise ConfigError("feature_network.device", f"{self.feature_network.device!r} is not allowed; allowed: auto | cpu | cuda:0, cuda:1, ..")
        if self.lora is not None and self.feature_network != FeatureNetworkConfig():
            key = "feature_network.shard" if self.feature_network.shard else "feature_network.device"
            raise ConfigError(key, "with lora the feature network is the policy with its adapter off, wherever that lies; leave the section feature_network out", ("lora",))
        if self.feature_network.shard and self.feature_network.device != "auto":
            raise ConfigError(
                "feature_network.shard", f"true splits the network over the processes' own devices, and feature_network.device is {self.feature_network.device}; leave one of them out",
                ("feature_network.device",),
            )
        if self.train.batch_size % self.train.per_device_batch_size:
            raise ConfigError(
                "train.batch_size", f"{self.train.batch_size} rows are no multiple of train.per_device_batch_size {self.train.per_device_batch_size}", ("train.per_device_batch_size",)
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
        """Tokens before the first anchor of a raw-text document."""
        return max(self.ebft.context_length, self.ebft.min_completion_prefix)

    def to_dict(self) -> dict:
        """Plain nested dict, as in the YAML."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The whole merged configuration as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Reading


def parse_command_line(argv: list[str], description: str) -> Config | None:
    """The configuration that the command line asks for; None when it only asked for it to be printed (--print-config)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--print-config", action="store_true", help="print the merged configuration and stop")
    parser.add_argument("--merge-lora", action="store_true", help="also export the model with the adapter merged into its weights (final/merged)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides, for example train.max_steps=10")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.cfg, arguments.overrides)
    if arguments.merge_lora:
        if config.lora is None:
            raise UserError(f"--merge-lora: {arguments.cfg} has no lora section, so there is no adapter to merge")
        config = load_config(arguments.cfg, [*arguments.overrides, "lora.merge=true"])
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return None
    return config


def load_config(file: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `section.key=value` overrides, validates. Raises UserError with file (or override), key, value and what is allowed."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--cfg {file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--cfg {file}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    tree = _parse_yaml(text, f"--cfg {file}")
    if not isinstance(tree, dict):
        raise UserError(f"--cfg {file}: holds no sections; allowed: {', '.join(_fields(Config))}")
    overridden_keys = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        path = dotted.split(".")
        if not equals or not all(path):
            raise UserError(f"command line: {override!r} is not of the form section.key=value")
        node = tree
        for name in path[:-1]:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[path[-1]] = _parse_yaml(text, f"command line: {override!r}")
        overridden_keys.append(dotted)
    try:
        return _build(Config, tree, "")
    except ConfigError as error:
        pairs = [(f"{culprit}.", key) for culprit in error.keys for key in overridden_keys]
        overridden = any(culprit.startswith((f"{key}.", f"{key}[")) or f"{key}.".startswith(culprit) for culprit, key in pairs)
        raise UserError(f"{'command line' if overridden else file}: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would silently keep the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


EMPTY = object()  # `key:` with nothing behind it; a written null is None
_StrictLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None if node.value else EMPTY)


def _parse_yaml(text: str, source: str):
    try:
        return yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise UserError(f"{source}: is not valid YAML: {error}") from None


def _fields(cls) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _build(cls, tree: dict, prefix: str):
    """An instance of a (nested) config dataclass from a dict, every key and value checked."""
    fields, hints = _fields(cls), typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in fields:
            if dotted == "train.gradient_accumulation_steps":  # what other trainers call the same thing from the other end
                raise ConfigError(dotted, "unknown key; set train.batch_size, the rows of an optimizer step over all processes: the number of accumulated forwards follows from it")
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"allowed: {', '.join(fields)}"
            raise ConfigError(dotted, f"unknown key; {hint}")
        section = next((kind for kind in _alternatives(hints[key]) if dataclasses.is_dataclass(kind)), None)
        if section is not None and value is EMPTY:
            if type(None) in _alternatives(hints[key]):
                raise ConfigError(dotted, f"is an empty section; write {dotted}: null to leave it out, {dotted}: {{}} for its defaults, or its keys: {', '.join(_fields(section))}")
            value = {}
        value = None if value is EMPTY else value
        if section is None:
            values[key] = _convert(value, hints[key], fields[key].metadata, dotted)
        elif value is None and type(None) in _alternatives(hints[key]):
            values[key] = None
        elif isinstance(value, dict):
            values[key] = _build(section, value, f"{dotted}.")
        else:
            raise ConfigError(dotted, f"{value!r} is not a section; allowed: a mapping with {', '.join(_fields(section))}")
    return cls(**values)


def _alternatives(hint) -> tuple:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)


def _convert(value, hint, bounds, key: str):
    """Checks a value against its type hint; numbers also against their bounds. YAML reads 1e-5 (no point) as text: taken as the number it is."""
    for kind in _alternatives(hint):
        if kind is type(None) and value is None:
            return None
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if kind in (str, bool) and isinstance(value, kind):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return _within(value, bounds, key)
        if kind is float:
            number = _as_float(value)
            if number is not None:
                return _within(number, bounds, key)
        if typing.get_origin(kind) is list and isinstance(value, list):
            return [_convert(item, typing.get_args(kind)[0], bounds, f"{key}[{index}]") for index, item in enumerate(value)]
    allowed = " or ".join(_describe(kind) for kind in _alternatives(hint))
    close = difflib.get_close_matches(str(value), [str(choice) for choice in typing.get_args(hint)], n=1) if typing.get_origin(hint) is Literal else []
    raise ConfigError(key, f"{value!r} is not allowed; allowed: {allowed}" + (f"; did you mean {close[0]}?" if close else ""))


def _as_float(value) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _within(number, bounds, key: str):
    for bound, broken, words in (
        (bounds["minimum"], lambda limit: number < limit, "at least"),
        (bounds["maximum"], lambda limit: number > limit, "at most"),
        (bounds["above"], lambda limit: number <= limit, "above"),
    ):
        if bound is not None and broken(bound):
            raise ConfigError(key, f"{number} is out of range; it must be {words} {bound}")
    return number


def _describe(kind) -> str:
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"a list of {_describe(typing.get_args(kind)[0])}"
    return {str: "text", bool: "true | false", int: "a whole number", float: "a finite number"}[kind]
