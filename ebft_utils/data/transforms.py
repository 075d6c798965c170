"""Transforms: small functions that say what is learnt from a row of a dataset. Your own function has the same form.

    transform(row, columns) -> {"text": ..}                                       raw text
                            or {"prompt": .., "completion": .., "turns": [..]}    prompt, ground truth, later turns
                            or None                                               leaves the row out

row: a dict, as the dataset has it. columns: data.columns of the configuration, the names of the columns to read.
A prompt is text, or a list of messages (role, content) for the tokenizer's chat template. A completion is text. A turn
is {"prompt": text, "completion": text}; "turns" is optional. Raise BadRow for a row that cannot be used:
data.on_bad_row decides what happens then.

The transforms of conversations with tools also give: a message with tool_calls as a completion, a list of messages
(what the tools returned) as a turn's prompt, and "tools", a list for the chat template.
"""

import hashlib
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config.data import OF_MESSAGES, columns_read
from ..config.settings import UserError
from .messages import BadRow, conversation_of, shorten, spoken, text_of, tools_of

START_OF_THINKING, END_OF_THINKING = "<think>", "</think>"
THINKING_MARKS = [
    (START_OF_THINKING, END_OF_THINKING),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
]
LANGUAGES = dict(
    entry.split("=")
    for entry in """
        cs=Czech da=Danish de=German en=English es=Spanish fi=Finnish fr=French ha=Hausa hr=Croatian is=Icelandic
        it=Italian ja=Japanese ko=Korean liv=Livonian nl=Dutch pl=Polish pt=Portuguese ro=Romanian ru=Russian
        sv=Swedish uk=Ukrainian zh=Chinese
    """.split()
)


# ----------------------------------------------------------------------------------------------------------------------
# Text, prompt and completion


def text(row: dict, columns) -> dict:
    """Raw text: every token is learnt."""
    return {"text": text_of(row[columns.text], columns.text)}


def prompt_completion(row: dict, columns) -> dict:
    """A prompt and its completion; with columns.turns also the later turns of the conversation."""
    prompt = [row[columns.prompt]] if isinstance(row[columns.prompt], dict) else row[columns.prompt]
    completion = text_of(row[columns.completion], columns.completion, "assistant")
    if not isinstance(prompt, list):
        text_of(prompt, columns.prompt)
    turns = [] if columns.turns is None or row[columns.turns] is None else row[columns.turns]
    if not isinstance(turns, list):
        raise BadRow(columns.turns, f"{shorten(turns)} is not a list of turns")
    example = {"prompt": prompt, "completion": completion, "turns": []}
    speakers = {"prompt": "user", "completion": "assistant"}
    for number, turn in enumerate(turns):
        place = f"{columns.turns}[{number}]"
        if not isinstance(turn, dict) or not {"prompt", "completion"} <= turn.keys():
            raise BadRow(place, f"{shorten(turn)} is not of the form {{prompt, completion}}")
        example["turns"].append({name: text_of(turn[name], f"{place}.{name}", who) for name, who in speakers.items()})
    return example


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def chat(row: dict, columns) -> dict:
    """One question and its answer, with or without a system message before them."""
    messages = conversation_of(row, columns)
    answers = _answers(messages)
    if len(answers) > 1:
        raise BadRow(
            columns.messages,
            f"the conversation has {len(answers)} answers; data.transform says which to learn: "
            "first_turn, last_turn or all_turns",
        )
    return _up_to(messages, answers[0], row, columns)


def first_turn(row: dict, columns) -> dict:
    """The first answer of a conversation. What comes after it is left out."""
    messages = conversation_of(row, columns)
    return _up_to(messages, _answers(messages)[0], row, columns)


def last_turn(row: dict, columns) -> dict:
    """The last answer of a conversation. Everything before it is the prompt."""
    messages = conversation_of(row, columns)
    return _up_to(messages, _answers(messages)[-1], row, columns)


def all_turns(row: dict, columns) -> dict:
    """Every answer of a conversation, each after the messages before it: the user's, or the results of tools."""
    messages = conversation_of(row, columns)
    answers, turns = _answers(messages), []
    for before, answer in itertools.pairwise(answers):  # later messages without an answer are left out
        between = [spoken(message) for message in messages[before + 1 : answer]]
        alone = len(between) == 1 and between[0]["role"] == "user"
        prompt = between[0]["content"] if alone else between
        turns.append({"prompt": prompt, "completion": _completion(messages[answer])})
    return {**_up_to(messages, answers[0], row, columns), "turns": turns}


def reasoning(row: dict, columns) -> dict:
    """An answer with the thinking before it: <think> .. </think>, then the answer.

    With columns.reasoning, that column stands between prompt and completion. Without it, the last answer of a
    conversation is taken, whose thinking is in its text (<think>, <reasoning>, <|begin_of_thought|>) or in a field of
    its message (reasoning_content, thinking). The thinking of earlier answers is removed, as chat models see them.
    """
    if columns.reasoning is not None:
        thoughts = text_of(row[columns.reasoning], columns.reasoning).strip()
        thoughts = thoughts.removeprefix(START_OF_THINKING).removesuffix(END_OF_THINKING)
        example = prompt_completion(row, columns)
        return {**example, "completion": _thought(thoughts, example["completion"])}
    messages = conversation_of(row, columns)
    *earlier, last = _answers(messages)
    for index in earlier:
        messages[index]["content"] = _split_thinking(messages[index])[1]
    thoughts, answer = _split_thinking(messages[last])
    if not thoughts.strip() or not answer.strip():
        lacks = "thinking before it (<think> .. </think>, or the field reasoning_content)"
        if thoughts.strip():
            lacks = "answer behind its thinking"
        reason = f"the last answer has no {lacks}: {shorten(messages[last]['content'])}"
        raise BadRow(f"{columns.messages}[{last}]", reason)
    return {**_up_to(messages, last, row, columns), "completion": _thought(thoughts, answer)}


def reasoning_answer(row: dict, columns) -> dict:
    """The same rows as `reasoning`, but only the answer is learnt, without the thinking."""
    example = reasoning(row, columns)
    if columns.reasoning is not None:
        return {**example, "completion": text_of(row[columns.completion], columns.completion, "assistant")}
    return {**example, "completion": _split_thinking({"content": example["completion"], "thinking": None})[1]}


def _answers(messages: list[dict]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _split_thinking(message: dict) -> tuple[str, str]:
    """(thinking, answer) of a message. The thinking is empty where there is none."""
    content = message["content"].strip()
    for start, end in THINKING_MARKS:
        if content.startswith(start) and end in content:
            thoughts, _, answer = content.removeprefix(start).partition(end)
            return thoughts, answer.replace("<|begin_of_solution|>", "").replace("<|end_of_solution|>", "").strip()
    return message["thinking"] or "", content


def _up_to(messages: list[dict], answer: int, row: dict, columns) -> dict:
    prompt = [spoken(message) for message in messages[:answer]]
    tools = tools_of(row, columns)
    example = {"prompt": prompt, "completion": _completion(messages[answer])}
    return {**example, "tools": tools} if tools else example


def _completion(message: dict):
    return spoken(message) if "tool_calls" in message else message["content"]


def _thought(thoughts: str, answer: str) -> str:
    return f"{START_OF_THINKING}\n{thoughts.strip()}\n{END_OF_THINKING}\n\n{answer}"


# ----------------------------------------------------------------------------------------------------------------------
# Known datasets


def opencodeinstruct(row: dict, columns) -> dict:
    """nvidia/OpenCodeInstruct: a task and its solution."""
    return {"prompt": text_of(row["input"], "input").rstrip() + "\n\n", "completion": text_of(row["output"], "output")}


def swallow_code(row: dict, columns) -> dict:
    """tokyotech-llm/swallow-code: a Python file."""
    return {"text": text_of(row["text"], "text")}


def question_answer(row: dict, columns) -> dict:
    """openai/gsm8k and similar datasets: question and answer."""
    return {
        "prompt": f"Question: {text_of(row['question'], 'question').strip()}\nAnswer:",
        "completion": " " + text_of(row["answer"], "answer").strip(),
    }


def translate_to_english(row: dict, columns) -> dict:
    """haoranxu/ALMA-Human-Parallel, WMT and similar datasets, {translation: {de: .., en: ..}}: into English."""
    return _translation(row, into_english=True)


def translate_from_english(row: dict, columns) -> dict:
    """The same datasets, from English into the other language."""
    return _translation(row, into_english=False)


def _translation(row: dict, into_english: bool) -> dict:
    column = "translation" if "translation" in row else next((name for name in row if "-" in name), "translation")
    pair = row.get(column)
    if isinstance(pair, dict):  # every row has the languages of the whole table, null where it has no text
        pair = {language: words for language, words in pair.items() if words is not None}
    others = sorted(set(pair) - {"en"}) if isinstance(pair, dict) else []
    if len(others) != 1 or "en" not in pair or others[0] not in LANGUAGES:
        raise BadRow(
            column,
            f"{shorten(pair)} is not a text in English and in one other language "
            f"({{en: .., de: ..}}; known: {', '.join(LANGUAGES)})",
        )
    source, target = (others[0], "en") if into_english else ("en", others[0])
    original, translation = (text_of(pair[language], f"{column}.{language}").strip() for language in (source, target))
    names = LANGUAGES[source], LANGUAGES[target]
    return {
        "prompt": f"Translate this from {names[0]} to {names[1]}:\n{names[0]}: {original}\n{names[1]}:",
        "completion": f" {translation}",
    }


# ----------------------------------------------------------------------------------------------------------------------
# Finding them


@dataclass(frozen=True)
class Transform:
    """A function and its name. version: a digest that changes with its code; own: it is the user's."""

    name: str
    function: Callable
    version: str
    own: bool = False

    def columns_needed(self, columns) -> dict[str, str]:
        """Setting -> column that the dataset must have. Empty for the user's own function: they are unknown."""
        if self.own:
            return {}
        named = {f"columns.{name}": getattr(columns, name) for name in columns_read(self.name, columns)}
        fixed = {name: name for name in FIXED_COLUMNS.get(self.function, ())}
        return {key: column for key, column in named.items() if column is not None} | fixed

    def columns_read(self, columns, of_dataset: list[str]) -> list[str]:
        """The columns of a dataset that the transform reads."""
        if self.own:
            return of_dataset
        if self.function in (translate_to_english, translate_from_english):
            return [name for name in of_dataset if name == "translation" or "-" in name]
        return list(dict.fromkeys(self.columns_needed(columns).values()))

    def places(self, columns) -> tuple[str, str]:
        """The columns that prompt (or text) and completion come from, for error messages."""
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
# ebft_utils/config/data.py says which keys of data.columns each one reads
GENERAL = (text, prompt_completion, chat, first_turn, last_turn, all_turns, reasoning, reasoning_answer)
OF_DATASETS = (opencodeinstruct, swallow_code, question_answer, translate_to_english, translate_from_english)
TRANSFORMS = {function.__name__: function for function in GENERAL + OF_DATASETS}


def load_transform(name: str, key: str = "data.transform") -> Transform:
    """A transform by its name, or as FILE.py:FUNCTION or MODULE:FUNCTION. Raises UserError when it does not exist."""
    own_version = _digest(Path(__file__)) + _digest(Path(__file__).with_name("messages.py"))
    if name in TRANSFORMS:
        return Transform(name, TRANSFORMS[name], own_version)
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        file = Path(os.path.expanduser(place)).resolve()  # the ~ of an unknown user stays as it is
        module = _module_of(file, place, f"{key}: {name!r}")
    else:
        module = _imported(place, f"{key}: {name!r}")
    function = vars(module).get(attribute)
    if not callable(function):
        functions = {other: value for other, value in vars(module).items() if inspect.isfunction(value)}
        own = [other for other, value in functions.items() if value.__module__ == module.__name__ and other[0] != "_"]
        raise UserError(f"{key}: {place} has no function {attribute!r}; it has {', '.join(own) or 'none'}")
    try:
        inspect.signature(function).bind({}, None)
    except (TypeError, ValueError):
        needs = f"a transform takes a row and the names of the columns: def {attribute}(row, columns)"
        raise UserError(f"{key}: {name}: {needs}") from None
    if not place.endswith(".py"):  # the file that defines the function may be another one than the module's
        defined = inspect.unwrap(function) if inspect.isfunction(function) else type(function)
        file = Path(inspect.getsourcefile(defined))
    return Transform(name, function, _digest(file) + own_version, own=True)  # it may call functions of this module


def _imported(module: str, where: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{where}: the module {module} cannot be imported: {error}") from None
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise UserError(f"{where}: the module {module} cannot be run: {type(error).__name__}: {error}") from None


def _module_of(file: Path, place: str, where: str):
    if not file.is_file():
        raise UserError(f"{where}: there is no file {place}")
    spec = importlib.util.spec_from_file_location(f"transform_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the processes that data.num_proc starts find it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise UserError(f"{where}: the file cannot be run: {type(error).__name__}: {error}") from None
    return module


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
