"""Transforms: what to learn from in a row of a dataset. Each is a small function; your own has the same form.

    transform(row, columns) -> {"text": ..}                                       raw text
                            or {"prompt": .., "completion": .., "turns": [..]}    prompt and ground truth; turns, what follows, may be left out
                            or None                                               the row is left out

row: a dict, as the dataset has it. columns: data.columns of the configuration, the names of the columns to read. A prompt is text, or a list of
messages (role, content) for the tokenizer's chat template; a completion is text; a turn is {"prompt": text, "completion": text}.
Raise BadRow for a row that cannot be used: data.on_bad_row decides what happens then.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config.data import OF_MESSAGES, columns_read
from ..config.settings import UserError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
START_OF_THINKING, END_OF_THINKING = "<think>", "</think>"
THINKING_MARKS = [
    (START_OF_THINKING, END_OF_THINKING),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
]
LANGUAGES = {
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "ha": "Hausa",
    "hr": "Croatian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "liv": "Livonian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "uk": "Ukrainian",
    "zh": "Chinese",
}


class BadRow(Exception):
    """Why a row cannot be used. column: where it is wrong; reason: what is wrong, and what would be right."""

    def __init__(self, column: str, reason: str):
        super().__init__(f"column {column!r}: {reason}")


def shorten(value) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------------------------
# Text, prompt and completion


def text(row: dict, columns) -> dict:
    """Raw text: every token is learnt."""
    return {"text": text_of(row[columns.text], columns.text)}


def prompt_completion(row: dict, columns) -> dict:
    """A prompt and what should follow it; with columns.turns the further turns of the conversation."""
    prompt = [row[columns.prompt]] if isinstance(row[columns.prompt], dict) else row[columns.prompt]
    example = {
        "prompt": prompt,
        "completion": text_of(row[columns.completion], columns.completion, "assistant"),
        "turns": [],
    }
    if not isinstance(prompt, list):
        text_of(prompt, columns.prompt)
    turns = [] if columns.turns is None or row[columns.turns] is None else row[columns.turns]
    if not isinstance(turns, list):
        raise BadRow(columns.turns, f"{shorten(turns)} is not a list of turns")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"prompt", "completion"} <= turn.keys():
            raise BadRow(f"{columns.turns}[{number}]", f"{shorten(turn)} is not of the form {{prompt, completion}}")
        speakers = {"prompt": "user", "completion": "assistant"}
        example["turns"].append(
            {
                name: text_of(turn[name], f"{columns.turns}[{number}].{name}", speaker)
                for name, speaker in speakers.items()
            }
        )
    return example


# ---------------------------------------------------------------------------------------------------------------------------------------
# Conversations


def chat(row: dict, columns) -> dict:
    """One question and its answer, perhaps behind a system message."""
    messages = conversation_of(row, columns)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(answers) > 1:
        raise BadRow(
            columns.messages,
            f"the conversation has {len(answers)} answers; data.transform says which to learn: first_turn, last_turn or all_turns",
        )
    return _answered(messages, answers[0])


def first_turn(row: dict, columns) -> dict:
    """The first answer of a conversation; what comes after it is left out."""
    messages = conversation_of(row, columns)
    return _answered(messages, next(index for index, message in enumerate(messages) if message["role"] == "assistant"))


def last_turn(row: dict, columns) -> dict:
    """The last answer of a conversation; all that comes before it is the prompt."""
    messages = conversation_of(row, columns)
    return _answered(messages, max(index for index, message in enumerate(messages) if message["role"] == "assistant"))


def all_turns(row: dict, columns) -> dict:
    """Every answer of a conversation, each after the user's words before it."""
    messages = conversation_of(row, columns)
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    rest = [message["content"] for message in messages[first + 1 :]]
    return {
        **_answered(messages, first),
        "turns": [{"prompt": prompt, "completion": completion} for prompt, completion in zip(rest[::2], rest[1::2])],
    }


def reasoning(row: dict, columns) -> dict:
    """An answer with the thinking before it: <think> .. </think>, then the answer.

    With columns.reasoning: that column, between prompt and completion. Without: the last answer of a conversation, whose thinking stands in its text
    (<think>, <reasoning>, <|begin_of_thought|>) or in a field of its message (reasoning_content, thinking). The thinking of earlier answers is left
    out, as chat models see them.
    """
    if columns.reasoning is not None:
        thoughts = (
            text_of(row[columns.reasoning], columns.reasoning)
            .strip()
            .removeprefix(START_OF_THINKING)
            .removesuffix(END_OF_THINKING)
        )
        example = prompt_completion(row, columns)
        return {**example, "completion": _thought(thoughts, example["completion"])}
    messages = conversation_of(row, columns)
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    for message in messages[:last]:
        if message["role"] == "assistant":
            message["content"] = _split_thinking(message)[1]
    thoughts, answer = _split_thinking(messages[last])
    if not thoughts.strip() or not answer.strip():
        part = (
            "answer behind its thinking"
            if thoughts.strip()
            else "thinking before it (<think> .. </think>, or the field reasoning_content)"
        )
        raise BadRow(
            f"{columns.messages}[{last}]", f"the last answer has no {part}: {shorten(messages[last]['content'])}"
        )
    return {**_answered(messages, last), "completion": _thought(thoughts, answer)}


def reasoning_answer(row: dict, columns) -> dict:
    """The same without the thinking: the answer alone is learnt."""
    example = reasoning(row, columns)
    if columns.reasoning is not None:
        return {**example, "completion": text_of(row[columns.completion], columns.completion, "assistant")}
    return {**example, "completion": _split_thinking({"content": example["completion"], "thinking": None})[1]}


def _split_thinking(message: dict) -> tuple[str, str]:
    """(thinking, answer) of a message; without thinking the first is empty."""
    content = message["content"].strip()
    for start, end in THINKING_MARKS:
        if content.startswith(start) and end in content:
            thoughts, _, answer = content.removeprefix(start).partition(end)
            return thoughts, answer.replace("<|begin_of_solution|>", "").replace("<|end_of_solution|>", "").strip()
    return message["thinking"] or "", content


def _answered(messages: list[dict], answer: int) -> dict:
    return {
        "prompt": [{"role": message["role"], "content": message["content"]} for message in messages[:answer]],
        "completion": messages[answer]["content"],
    }


def _thought(thoughts: str, answer: str) -> str:
    return f"{START_OF_THINKING}\n{thoughts.strip()}\n{END_OF_THINKING}\n\n{answer}"


def conversation_of(row: dict, columns) -> list[dict]:
    """The messages of a row as {role, content, thinking}: perhaps a system message, then user and assistant in turns. Raises BadRow for any other form.

    Also read: the form {from: human | gpt, value}; content in parts of the type text.
    """
    column, messages = columns.messages, row[columns.messages]
    if not isinstance(messages, list) or not messages:
        raise BadRow(column, f"{shorten(messages)} is not a list of messages (role, content)")
    silent = (
        isinstance(messages[0], dict)
        and "system" in (messages[0].get("role"), messages[0].get("from"))
        and not (messages[0].get("content") or messages[0].get("value"))
    )
    found = [
        _message(message, f"{column}[{number}]") for number, message in enumerate(messages) if number or not silent
    ]
    if not found:
        raise BadRow(column, f"{shorten(messages)} is not a list of messages (role, content)")
    roles = [message["role"] for message in found]
    spoken = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(spoken, start=len(roles) - len(spoken)):
        expected = ("user", "assistant")[(number - len(roles) + len(spoken)) % 2]
        if role != expected:
            raise BadRow(
                f"{column}[{number}]",
                f"the role is {role!r} where {expected!r} should speak: user and assistant have to alternate, after at most one system message",
            )
    if "assistant" not in spoken:
        raise BadRow(column, "the conversation has no turn of the assistant")
    return found


def _message(message, place: str) -> dict:
    if not isinstance(message, dict):
        raise BadRow(place, f"{shorten(message)} is not a message (role, content)")
    sharegpt = message.get("from") is not None
    role, content = (
        (message.get("from"), message.get("value")) if sharegpt else (message.get("role"), message.get("content"))
    )
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if role is not None and not isinstance(role, str):
        raise BadRow(f"{place}.{'from' if sharegpt else 'role'}", f"{shorten(role)} is not text")
    field = "reasoning_content" if message.get("reasoning_content") else "thinking"
    thinking = message.get(field)
    if thinking and not isinstance(thinking, str):
        raise BadRow(f"{place}.{field}", f"{shorten(thinking)} is not text")
    return {
        "role": SHAREGPT_ROLES.get(role, role),
        "content": text_of(content, f"{place}.{'value' if sharegpt else 'content'}"),
        "thinking": thinking,
    }


def text_of(value, column: str, speaker: str | None = None) -> str:
    """The text of a field: itself, or the content of one message of a speaker (user, assistant). Raises BadRow for anything else, and for an empty one."""
    inner = value[0] if isinstance(value, list) and len(value) == 1 else value
    if speaker is not None and isinstance(inner, dict) and inner.get("role") == speaker and "content" in inner:
        value = inner["content"]
    if not isinstance(value, str):
        raise BadRow(column, f"{shorten(value)} is not text")
    if not value.strip():
        raise BadRow(column, f"{shorten(value)} is empty")
    return value


# ---------------------------------------------------------------------------------------------------------------------------------------
# Known datasets


def opencodeinstruct(row: dict, columns) -> dict:
    """nvidia/OpenCodeInstruct: a task and its solution."""
    return {"prompt": text_of(row["input"], "input").rstrip() + "\n\n", "completion": text_of(row["output"], "output")}


def swallow_code(row: dict, columns) -> dict:
    """tokyotech-llm/swallow-code: a Python file."""
    return {"text": text_of(row["text"], "text")}


def question_answer(row: dict, columns) -> dict:
    """openai/gsm8k and its like: question and answer."""
    return {
        "prompt": f"Question: {text_of(row['question'], 'question').strip()}\nAnswer:",
        "completion": " " + text_of(row["answer"], "answer").strip(),
    }


def translate_to_english(row: dict, columns) -> dict:
    """haoranxu/ALMA-Human-Parallel, WMT and their like: {translation: {de: .., en: ..}}, from the other language into English."""
    return _translation(row, into_english=True)


def translate_from_english(row: dict, columns) -> dict:
    """The same, from English into the other language."""
    return _translation(row, into_english=False)


def _translation(row: dict, into_english: bool) -> dict:
    column = "translation" if "translation" in row else next((name for name in row if "-" in name), "translation")
    pair = row.get(column)
    if isinstance(pair, dict):  # a table gives each row the languages of all, as null
        pair = {language: words for language, words in pair.items() if words is not None}
    others = sorted(set(pair) - {"en"}) if isinstance(pair, dict) else []
    if len(others) != 1 or "en" not in pair or others[0] not in LANGUAGES:
        raise BadRow(
            column,
            f"{shorten(pair)} is not a text in English and in one other language ({{en: .., de: ..}}; known: {', '.join(LANGUAGES)})",
        )
    source, target = (others[0], "en") if into_english else ("en", others[0])
    original, translation = (text_of(pair[language], f"{column}.{language}").strip() for language in (source, target))
    names = LANGUAGES[source], LANGUAGES[target]
    return {
        "prompt": f"Translate this from {names[0]} to {names[1]}:\n{names[0]}: {original}\n{names[1]}:",
        "completion": f" {translation}",
    }


# ---------------------------------------------------------------------------------------------------------------------------------------
# Finding them


@dataclass(frozen=True)
class Transform:
    """A function and what is known of it. version: changes when it may give something else; own: it is not of this module."""

    name: str
    function: Callable
    version: str
    own: bool = False

    def columns_needed(self, columns) -> dict[str, str]:
        """Setting -> column that the dataset has to have. (Nothing is known of somebody's own.)"""
        if self.own:
            return {}
        named = {f"columns.{name}": getattr(columns, name) for name in columns_read(self.name, columns)}
        return {key: column for key, column in named.items() if column is not None} | {
            name: name for name in FIXED_COLUMNS.get(self.function, ())
        }

    def columns_read(self, columns, of_dataset: list[str]) -> list[str]:
        """Which of a dataset's columns it looks at."""
        if self.own:
            return of_dataset
        if self.function in (translate_to_english, translate_from_english):
            return [name for name in of_dataset if name == "translation" or "-" in name]
        return list(dict.fromkeys(self.columns_needed(columns).values()))

    def places(self, columns) -> tuple[str, str]:
        """The columns that prompt (or text) and completion come from, for messages."""
        if self.own:
            return "prompt", "completion"
        if self.function in (translate_to_english, translate_from_english):
            return "translation", "translation"
        if self.function in FIXED_COLUMNS:
            return FIXED_COLUMNS[self.function][0], FIXED_COLUMNS[self.function][-1]
        if self.function is text:
            return columns.text, columns.text
        if self.name in OF_MESSAGES or (self.function in (reasoning, reasoning_answer) and columns.reasoning is None):
            return columns.messages, columns.messages
        return columns.prompt, columns.completion


FIXED_COLUMNS = {
    opencodeinstruct: ("input", "output"),
    swallow_code: ("text",),
    question_answer: ("question", "answer"),
}
FUNCTIONS = (
    text,
    prompt_completion,
    chat,
    first_turn,
    last_turn,
    all_turns,
    reasoning,
    reasoning_answer,
    opencodeinstruct,
    swallow_code,
    question_answer,
    translate_to_english,
    translate_from_english,
)  # what each reads, and what the configuration allows: ebft_utils/config/data.py
TRANSFORMS = {function.__name__: function for function in FUNCTIONS}


def load_transform(name: str, key: str = "data.transform") -> Transform:
    """A transform by its name, or as FILE.py:FUNCTION or MODULE:FUNCTION. Raises UserError when there is no such thing."""
    if name in TRANSFORMS:
        function = TRANSFORMS[name]
        return Transform(name, function, _digest(Path(__file__)))
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        file = Path(os.path.expanduser(place)).resolve()  # leaves an unknown user as it is
        if not file.is_file():
            raise UserError(f"{key}: {name!r}: there is no file {place}")
        module = _module_of(file, key, name)
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise UserError(f"{key}: {name!r}: the module {place} cannot be imported: {error}") from None
        except (Exception, SystemExit) as error:  # whatever somebody's module raises
            raise UserError(
                f"{key}: {name!r}: the module {place} cannot be run: {type(error).__name__}: {error}"
            ) from None
    function = vars(module).get(attribute)
    if not callable(function):
        own = [
            other
            for other, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not other.startswith("_")
        ]
        raise UserError(f"{key}: {place} has no function {attribute!r}; it has {', '.join(own) or 'none'}")
    try:
        inspect.signature(function).bind({}, None)
    except (TypeError, ValueError):
        raise UserError(
            f"{key}: {name}: a transform takes a row and the names of the columns: def {attribute}(row, columns)"
        ) from None
    if not place.endswith(".py"):  # the file that defines it, which may be another one than the module's
        file = Path(inspect.getsourcefile(inspect.unwrap(function) if inspect.isfunction(function) else type(function)))
    return Transform(name, function, _digest(file) + _digest(Path(__file__)), own=True)  # it may call those here


def _module_of(file: Path, key: str, name: str):
    spec = importlib.util.spec_from_file_location(f"transform_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the processes that data.num_proc starts find it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody's file raises
        raise UserError(f"{key}: {name!r}: the file cannot be run: {type(error).__name__}: {error}") from None
    return module


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
