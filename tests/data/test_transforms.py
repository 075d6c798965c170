"""Transforms on literal rows: what each gives, its tokens in both modes, and which rows are refused.

Ids are read off with the tokenizer by_word: w10 is 10, <user> 3, <assistant> 4, <system> 5, the end-of-text token 0.
"""

import json

import pytest
from tokenizers import processors

from conversations import (
    CHATML,
    END,
    TALK,
    TEMPLATE,
    THOUGHT,
    TOKENS,
    WORDS,
    A,
    U,
    assistant,
    document_of,
    documents_of,
    in_both_modes,
    spoken,
    strided,
    structured,
    user,
    words,
)
from ebft_utils.config.data import ColumnsConfig
from ebft_utils.data.documents import Document
from ebft_utils.data.transforms import TRANSFORMS
from helpers import refusal, write_rows


def pair(prompt, completion, **more) -> dict:
    return {"prompt": prompt, "completion": completion, **more}


def talk(*messages) -> dict:
    return {"messages": list(messages)}


# ----------------------------------------------------------------------------------------------------------------------
# What each transform gives

SYSTEM = {"role": "system", "content": "S"}
FIVE = [SYSTEM, user("one"), assistant("two"), user("three"), assistant("four")]
TURN = pair([SYSTEM, user("one")], "two")
LATER = [pair("three", "four"), pair("five", "six")]
OTHER_NAMES = {
    "q": "one",
    "a": "two",
    "rest": [pair(user("three"), [assistant("four")], id=7), LATER[1]],
    "prompt": "no",
}
RENAMED = ColumnsConfig(text="body", prompt="q", completion="a", turns="rest", messages="talk")
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
IN_PARTS = [
    user([{"type": "text", "text": "Look: "}, {"type": "text", "text": "here", "image": None}]),
    assistant([{"type": "text", "text": "seen"}]),
]
THINKING = assistant("<think>why</think>Yes.")
LONG_MARKS = "<|begin_of_thought|>\n\nwhy\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nYes.\n\n<|end_of_solution|>"
WAYS_TO_THINK = {
    "<think>": assistant(" <think> why </think> Yes. "),
    "<reasoning>": assistant("<reasoning>why</reasoning>Yes."),
    "<|begin_of_thought|>": assistant(LONG_MARKS),
    "reasoning_content": assistant("Yes.", reasoning_content="why\n"),
    "thinking": assistant("Yes.", thinking="why", reasoning_content=None),
}
TWICE = [user("a"), assistant("b", reasoning_content="old"), user("c"), THINKING]
MARKED = [SYSTEM, user("a"), assistant("<think>old</think>\nb"), *TWICE[2:]]
UNTHOUGHT = [user("a"), assistant("b"), user("c")]  # TWICE without its thinking
IN_A_COLUMN, REASONING = pair("a", "Yes.", r="why"), ColumnsConfig(reasoning="r")
INSTRUCTION = {"input": "Sort.\n", "output": "sorted(x)\n", "unit_tests": "[]"}
GSM8K = {"question": " Six times seven? ", "answer": "42\n"}
GERMAN = {"de": "Guten Tag. ", "en": " Hello."}
INTO_ENGLISH = pair("Translate this from German to English:\nGerman: Guten Tag.\nEnglish:", " Hello.")
INTO_GERMAN = pair("Translate this from English to German:\nEnglish: Hello.\nGerman:", " Guten Tag.")
INTO_ICELANDIC = pair("Translate this from English to Icelandic:\nEnglish: Hi\nIcelandic:", " Hæ")


def example(transform, row, expected, columns=None) -> tuple:
    return transform, row, columns, expected


EXAMPLES = {
    "text": example("text", {"text": " a\n b "}, {"text": " a\n b "}),
    "text of another column": example("text", {"text": "no", "body": "yes"}, {"text": "yes"}, RENAMED),
    "prompt and completion": example("prompt_completion", pair("1 + 1 =", " 2"), pair("1 + 1 =", " 2", turns=[])),
    "prompt of messages": example("prompt_completion", pair(FIVE[:2], [assistant("two")]), {**TURN, "turns": []}),
    "completion as a message": example("prompt_completion", pair("x", assistant("two")), pair("x", "two", turns=[])),
    "turns of other columns": example("prompt_completion", OTHER_NAMES, pair("one", "two", turns=LATER), RENAMED),
    "null in place of turns": example(
        "prompt_completion", {"q": "one", "a": "two", "rest": None}, pair("one", "two", turns=[]), RENAMED
    ),
    "chat": example("chat", talk(*FIVE[:3]), TURN),
    "chat without system": example("chat", {"talk": FIVE[1:3]}, pair([user("one")], "two"), RENAMED),
    "chat in ShareGPT's form": example("chat", talk(*SHAREGPT), TURN),
    "chat in parts": example("chat", talk(*IN_PARTS), pair([user("Look: here")], "seen")),
    "first turn": example("first_turn", talk(*FIVE), TURN),
    "last turn": example("last_turn", talk(*FIVE), pair(FIVE[:4], "four")),
    "all turns": example("all_turns", talk(*FIVE), {**TURN, "turns": LATER[:1]}),
    "all turns of three": example("all_turns", talk(*FIVE, user("five"), assistant("six")), {**TURN, "turns": LATER}),
    "all turns, the last without answer": example("all_turns", talk(*FIVE, user("five")), {**TURN, "turns": LATER[:1]}),
    "last turn, the last without answer": example("last_turn", talk(*FIVE, user("five")), pair(FIVE[:4], "four")),
    "thinking in the text stays in chat": example(
        "chat", talk(user("a"), THINKING), pair([user("a")], "<think>why</think>Yes.")
    ),
    **{
        f"reasoning, {way}": example("reasoning", talk(user("a"), answer), pair([user("a")], THOUGHT))
        for way, answer in WAYS_TO_THINK.items()
    },
    "reasoning, a column": example("reasoning", IN_A_COLUMN, pair("a", THOUGHT, turns=[]), REASONING),
    "reasoning, earlier answers": example("reasoning", talk(*TWICE), pair(UNTHOUGHT, THOUGHT)),
    "reasoning, earlier marks": example("reasoning", talk(*MARKED), pair([SYSTEM, *UNTHOUGHT], THOUGHT)),
    "answer alone": example("reasoning_answer", talk(*TWICE[2:]), pair([user("c")], "Yes.")),
    "answer alone, a column": example("reasoning_answer", IN_A_COLUMN, pair("a", "Yes.", turns=[]), REASONING),
    "OpenCodeInstruct": example("opencodeinstruct", INSTRUCTION, pair("Sort.\n\n", "sorted(x)\n")),
    "swallow-code": example("swallow_code", {"text": "import os\n", "text_formatted": "no"}, {"text": "import os\n"}),
    "gsm8k": example("question_answer", GSM8K, pair("Question: Six times seven?\nAnswer:", " 42")),
    "into English": example("translate_to_english", {"translation": GERMAN}, INTO_ENGLISH),
    "from English": example("translate_from_english", {"translation": GERMAN}, INTO_GERMAN),
    "WMT22's column": example("translate_to_english", {"de-en": GERMAN}, INTO_ENGLISH),
    "WMT22's other column": example("translate_from_english", {"en-is": {"en": "Hi", "is": "Hæ"}}, INTO_ICELANDIC),
}


@pytest.mark.parametrize("name, row, columns, expected", EXAMPLES.values(), ids=EXAMPLES)
def test_what_a_transform_gives(name, row, columns, expected):
    """Guards against a lost system message, a turn too few or too many, thinking in the wrong place, changed white
    space, and a column read by its default name.
    """
    before = json.dumps(row)
    assert TRANSFORMS[name](row, columns or ColumnsConfig()) == expected
    assert json.dumps(row) == before


def test_every_transform_has_an_example():
    """Guards against a transform that is added and never tried."""
    assert {name for name, *_ in EXAMPLES.values()} == set(TRANSFORMS)


# ----------------------------------------------------------------------------------------------------------------------
# As tokens, in both modes


@pytest.mark.parametrize("transform", TOKENS)
def test_one_conversation_three_ways(by_word, transform):
    """Guards against an answer that is learnt but should be read, an end-of-text token outside of its answer, and modes
    that differ.
    """
    assert in_both_modes(by_word, talk(*TALK), transform=transform) == Document(*TOKENS[transform])


ANSWERS = [("first_turn", ["two<eos>"]), ("last_turn", ["four<eos>"]), ("all_turns", ["two<eos>", "four<eos>"])]


@pytest.mark.parametrize("template", [TEMPLATE, CHATML], ids=["plain", "chatml"])
@pytest.mark.parametrize("transform, answers", ANSWERS)
def test_tokens_are_the_templates_own_rendering(tokenizer, template, transform, answers):
    """Guards against a prompt that the chat model never saw in this form.

    What follows the last answer (a line break) is not the assistant's.
    """
    tokenizer.chat_template = template
    document = in_both_modes(tokenizer, talk(*FIVE), transform=transform)
    whole = tokenizer.apply_chat_template(FIVE[:3] if transform == "first_turn" else FIVE, tokenize=False)
    assert tokenizer.decode(document.tokens) == whole.removesuffix("\n") and whole.endswith("<eos>\n")
    assert spoken(tokenizer, document) == answers


ENDINGS = {
    "text": assistant("<think>why</think>Yes."),
    "field": assistant("Yes.", reasoning_content="why"),
    "marks": assistant("<|begin_of_thought|>why<|end_of_thought|>Yes."),
}


@pytest.mark.parametrize("transform, answer", [("reasoning", f"{THOUGHT}<eos>"), ("reasoning_answer", "Yes.<eos>")])
@pytest.mark.parametrize("last", ENDINGS.values(), ids=ENDINGS)
def test_reasoning_as_tokens(tokenizer, transform, answer, last):
    """Guards against earlier thinking in the prompt, and a form of thinking that comes out in other tokens."""
    row = talk(user("a"), assistant("<think>old</think>b"), user("c"), last)
    document = in_both_modes(tokenizer, row, transform=transform)
    before = "<|user|>a<eos>\n<|assistant|>b<eos>\n<|user|>c<eos>\n<|assistant|>"
    assert tokenizer.decode(document.tokens) == before + answer
    assert spoken(tokenizer, document) == [answer]


@pytest.mark.parametrize("line_break", ["\n", ""])
def test_a_template_that_opens_the_thinking(tokenizer, line_break):
    """Guards against '<think>' twice, once by the generation prompt and once by the answer, in any turn."""
    opens = f"<|assistant|><think>{line_break}"
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>{% endif %}", f"{opens}{{% endif %}}")
    thought = THOUGHT.removeprefix("<think>\n")
    document = in_both_modes(tokenizer, talk(user("a"), THINKING), transform="reasoning")
    assert tokenizer.decode(document.tokens) == f"<|user|>a<eos>\n{opens}{thought}<eos>"
    assert spoken(tokenizer, document) == [f"{thought}<eos>"]
    row = talk(user("a"), assistant(THOUGHT), user("b"), assistant(THOUGHT))
    document = in_both_modes(tokenizer, row, transform="all_turns")
    turn = f"<eos>\n{opens}{thought}<eos>"
    assert tokenizer.decode(document.tokens) == f"<|user|>a{turn}\n<|user|>b{turn}"
    assert spoken(tokenizer, document) == [f"{thought}<eos>"] * 2


def test_text_in_the_chat_template(by_word, tokenizer):
    """Guards against data.apply_chat_template doing nothing, touching messages twice, or turns of text that stay
    outside of the template.
    """
    row = {"input": "Sort it.\n", "output": " sorted(x)\n"}
    document = in_both_modes(tokenizer, row, transform="opencodeinstruct", apply_chat_template=True)
    assert tokenizer.decode(document.tokens) == "<|user|>Sort it.<eos>\n<|assistant|>sorted(x)<eos>"
    row = pair(f" {words(10)} \n", words(30), more=[pair(words(11), words(31))])
    data = {"transform": "prompt_completion", "columns": ColumnsConfig(turns="more")}
    assert in_both_modes(by_word, row, **data) == Document([10, 30, END, 11, 31, END], [(1, 3), (4, 6)])
    templated = Document([U, 10, END, A, 30, END, U, 11, END, A, 31, END], [(4, 6), (10, 12)])
    assert in_both_modes(by_word, row, **data, apply_chat_template=True) == templated
    assert in_both_modes(by_word, {**row, "prompt": [user(words(10))]}, **data, apply_chat_template=True) == templated
    row = {"question": words(10), "answer": words(30)}
    asked = in_both_modes(by_word, row, transform="question_answer", apply_chat_template=True)
    assert asked.tokens == [U, 2, 10, 2, END, A, 30, END]  # 2: the words Question: and Answer:


BEGINNINGS = [(pair(words(10, 11), words(30, 31)), "prompt_completion"), (talk(*TALK), "all_turns")]


@pytest.mark.parametrize("row, transform", BEGINNINGS)
def test_the_beginning_of_text_token_stands_once(by_word, row, transform):
    """Guards against two of them (one by the template, one by the tokenizer), or one at the beginning of an answer or
    of a later turn.
    """
    begins = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 6)])
    by_word.backend_tokenizer.post_processor = begins
    by_word.chat_template = "<bos> " + WORDS
    document = in_both_modes(by_word, row, transform=transform)
    text = transform == "prompt_completion"
    assert document.tokens == [6] + ([10, 11, 30, 31, END] if text else TOKENS["all_turns"][0])
    assert document.spans == ([(3, 6)] if text else [(8, 11), (16, 18)])


@pytest.mark.parametrize("kind", [structured, strided])
def test_another_end_than_the_tokenizers(by_word, kind):
    """Guards against answers that are trained to end with a token at which the chat model never stops."""
    by_word.eos_token = "<pad>"
    config = kind("some/rows", transform="chat", on_bad_row="skip")
    message = refusal(document_of, config, by_word, talk(*TALK[:3]))
    ends = "the chat template does not end an answer with '<pad>' but with '<eos> '; name the token that ends an answer"
    assert message.startswith(f"model.eos_token: {ends}") and message.endswith("('some/rows', row 0)")


@pytest.mark.parametrize("kind", [structured, strided])
def test_no_chat_template(tmp_path, by_word, kind):
    """Guards against messages in a form of our own making, and against `skip` that leaves out every row for it.

    Plain text needs no template.
    """
    by_word.chat_template = None
    rows = [pair(words(10), words(30, 31)), pair([user("w10")], words(30, 31))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = refusal(documents_of, kind(path, transform="prompt_completion", on_bad_row="skip"), by_word)
    assert message.startswith("model.tokenizer: the rows hold messages, and the tokenizer has no chat template")
    assert message.endswith(f"({str(path)!r}, row 1)")
    first = documents_of(kind(path, transform="prompt_completion", max_documents=1), by_word)
    assert first == [Document([10, 30, 31, END], [(1, 4)])]


@pytest.mark.parametrize("kind", [structured, strided])
def test_a_template_that_refuses_a_conversation(tmp_path, by_word, capsys, kind):
    """Guards against a traceback out of the template, and against one row stopping a run that may leave it out."""
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    by_word.chat_template = refuse + WORDS
    path = write_rows(tmp_path / "rows.jsonl", [talk(*TALK[1:3]), talk(*TALK[:3])])
    message = refusal(documents_of, kind(path, transform="chat"), by_word)
    where = f"data: {str(path)!r}, row 1, column 'messages'"
    assert message.startswith(f"{where}: the tokenizer's chat template cannot render")
    assert ": System role not supported" in message
    kept = documents_of(kind(path, transform="chat", on_bad_row="skip"), by_word)
    assert kept == [Document([U, 21, END, A, 30, 31, END], [(4, 7)])]
    assert "data: 1 of 2 rows" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Bad rows

ASK, SAY = user("a long question"), assistant("a long answer")
OK, THOUGHTFUL = talk(ASK, SAY), talk(ASK, assistant(THOUGHT))
PAIR = pair("a question", "an answer", more=[])
WHY = {"prompt": "a", "r": "why", "completion": "an answer"}
GSM = {"question": "a", "answer": "an answer"}
CODE = {"input": "a", "output": "an answer"}
TRANSLATED = {"translation": GERMAN}
TEXT, IMAGE = {"type": "text", "text": "y"}, {"type": "image", "url": "x"}
NO_MESSAGES = "is not a list of messages (role, content)"
NO_THINKING = "'messages[1]': the last answer has no thinking before it"
NO_TURN = "'messages': the conversation has no turn of the assistant"
TWO_ANSWERS = (
    "'messages': the conversation has 2 answers; data.transform says which to learn: first_turn, last_turn or all_turns"
)
NO_TRANSLATION = (
    "'translation': None is not a text in English and in one other language "
    "({en: .., de: ..}; known: cs, da, de, en, es,"
)


def using(transform: str, **columns) -> dict:
    return {"transform": transform, **({"columns": ColumnsConfig(**columns)} if columns else {})}


TURNS, CHAT, THINKS = using("prompt_completion", turns="more"), using("chat"), using("reasoning")
COLUMN, COLUMN_ALONE = using("reasoning", reasoning="r"), using("reasoning_answer", reasoning="r")
INTO, FROM = using("translate_to_english"), using("translate_from_english")


def case(data: dict, good: dict, bad: dict, says: str) -> tuple:
    """Settings of data, a row that they can use, one that they cannot, and what the message says of that."""
    return data, good, bad, says


def speaks(number: int, role: str | None, expected: str) -> str:
    return f"'messages[{number}]': the role is {role!r} where {expected!r} should speak"


BAD = {
    "no prompt": case(TURNS, PAIR, {"completion": "x", "more": []}, "'prompt': None is not text"),
    "empty prompt": case(TURNS, PAIR, {**PAIR, "prompt": " \n"}, r"'prompt': ' \n' is empty"),
    "prompt of numbers": case(TURNS, PAIR, {**PAIR, "prompt": 7}, "'prompt': 7 is not text"),
    "no completion": case(TURNS, PAIR, {"prompt": "x", "more": []}, "'completion': None is not text"),
    "two completions": case(TURNS, PAIR, {**PAIR, "completion": ["x", "y"]}, "'completion': ['x', 'y'] is not text"),
    "turns as text": case(TURNS, PAIR, {**PAIR, "more": "x"}, "'more': 'x' is not a list of turns"),
    "half a turn": case(
        TURNS,
        PAIR,
        {**PAIR, "more": [{"prompt": "x"}]},
        "'more[0]': {'prompt': 'x'} is not of the form {prompt, completion}",
    ),
    "turn of null": case(
        TURNS, PAIR, {**PAIR, "more": [pair("x", "y"), pair("x", None)]}, "'more[1].completion': None is not text"
    ),
    "messages of null": case(CHAT, OK, {"messages": None}, f"'messages': None {NO_MESSAGES}"),
    "no messages": case(CHAT, OK, {"other": 1}, f"'messages': None {NO_MESSAGES}"),
    "empty list": case(CHAT, OK, talk(), f"'messages': [] {NO_MESSAGES}"),
    "messages as text": case(CHAT, OK, {"messages": "Hi"}, f"'messages': 'Hi' {NO_MESSAGES}"),
    "message as text": case(CHAT, OK, talk("Hi", "Ho"), "'messages[0]': 'Hi' is not a message (role, content)"),
    "no role": case(CHAT, OK, talk({"content": "Hi"}, SAY), speaks(0, None, "user")),
    "no content": case(CHAT, OK, talk(ASK, {"role": "assistant"}), "'messages[1].content': None is not text"),
    "empty content": case(CHAT, OK, talk(ASK, assistant("")), "'messages[1].content': '' is empty"),
    "content as a number": case(CHAT, OK, talk(user(3), SAY), "'messages[0].content': 3 is not text"),
    "an image": case(CHAT, OK, talk(user([IMAGE, TEXT]), SAY), "'messages[0].content': [{'type': 'image'"),
    "an image with a text": case(
        CHAT, OK, talk(user([{"type": "image", "text": "x"}, TEXT]), SAY), "'messages[0].content': [{'"
    ),
    "empty ShareGPT": case(
        CHAT, talk(*SHAREGPT), talk(SHAREGPT[1], {"from": "gpt", "value": ""}), "'messages[1].value': '' is empty"
    ),
    "user twice": case(CHAT, OK, talk(ASK, ASK, SAY), speaks(1, "user", "assistant")),
    "assistant twice": case(using("all_turns"), OK, talk(ASK, SAY, SAY), speaks(2, "assistant", "user")),
    "assistant first": case(using("first_turn"), OK, talk(SAY, ASK, SAY), speaks(0, "assistant", "user")),
    "assistant behind system": case(using("last_turn"), OK, talk(SYSTEM, SAY), speaks(1, "assistant", "user")),
    "two system messages": case(CHAT, OK, talk(SYSTEM, SYSTEM, ASK, SAY), speaks(1, "system", "user")),
    "a tool": case(CHAT, OK, talk(ASK, {"role": "tool", "content": "3"}, SAY), speaks(1, "tool", "assistant")),
    "no answer": case(CHAT, OK, talk(SYSTEM, ASK), NO_TURN),
    "system alone": case(using("all_turns"), OK, talk(SYSTEM), NO_TURN),
    "several answers": case(CHAT, OK, talk(ASK, SAY, ASK, SAY), TWO_ANSWERS),
    "no thinking": case(
        THINKS, THOUGHTFUL, OK, f"{NO_THINKING} (<think> .. </think>, or the field reasoning_content): 'a long answer'"
    ),
    "empty thinking": case(THINKS, THOUGHTFUL, talk(ASK, assistant("<think> </think>x")), NO_THINKING),
    "thinking without end": case(THINKS, THOUGHTFUL, talk(ASK, assistant("<think> so so")), NO_THINKING),
    "thinking alone": case(
        using("reasoning_answer"),
        THOUGHTFUL,
        talk(ASK, assistant("<think>x</think> ")),
        "'messages[1]': the last answer has no answer behind its thinking",
    ),
    "column of thinking": case(COLUMN, WHY, {**WHY, "r": None}, "'r': None is not text"),
    "column of no thinking": case(COLUMN_ALONE, WHY, {**WHY, "r": " "}, "'r': ' ' is empty"),
    "thinking, no completion": case(COLUMN, WHY, {"prompt": "a", "r": "why"}, "'completion': None is not text"),
    "no question": case(using("question_answer"), GSM, {"answer": "x"}, "'question': None is not text"),
    "empty answer": case(using("question_answer"), GSM, {**GSM, "answer": " "}, "'answer': ' ' is empty"),
    "no input": case(using("opencodeinstruct"), CODE, {"output": "x"}, "'input': None is not text"),
    "empty output": case(using("opencodeinstruct"), CODE, {**CODE, "output": ""}, "'output': '' is empty"),
    "no translation": case(INTO, TRANSLATED, {"other": 1}, NO_TRANSLATION),
    "one language": case(INTO, TRANSLATED, {"translation": {"en": "x"}}, "'translation': {"),
    "unknown language": case(FROM, TRANSLATED, {"translation": {"en": "x", "tlh": "y"}}, "'translation': {"),
    "empty translation": case(
        FROM, TRANSLATED, {"translation": {"en": "x", "de": " "}}, "'translation.de': ' ' is empty"
    ),
}


@pytest.mark.parametrize("kind", [structured, strided])
@pytest.mark.parametrize("data, good, bad, says", BAD.values(), ids=BAD)
def test_bad_rows(tmp_path, tokenizer, capsys, kind, data, good, bad, says):
    """Guards against a traceback, a bad row that trains on something else, a message without dataset, row and column,
    and `skip` that leaves out more than it says.
    """
    path = write_rows(tmp_path / "rows.jsonl", [good, good, bad, good])
    message = refusal(documents_of, kind(path, **data), tokenizer)
    remedy = "; data.on_bad_row: skip leaves such rows out"
    assert message.startswith(f"data: {str(path)!r}, row 2, column {says}") and message.endswith(remedy)
    capsys.readouterr()
    kept = documents_of(kind(path, **data, on_bad_row="skip"), tokenizer)
    expected = document_of(kind(**data), tokenizer, good)
    assert isinstance(expected, Document) and kept == [expected] * 3
    reason = message.removeprefix(f"data: {str(path)!r}, ").removesuffix(remedy)
    assert capsys.readouterr().out == f"data: 1 of 4 rows of {str(path)!r} left out: 1 like {reason}\n"


def test_all_reasons_are_counted(tmp_path, tokenizer, capsys):
    """Guards against reasons that are told apart by a row's number, or rows whose reason is not told, in whatever order
    they come.
    """
    short, system, null = talk(user("Hi")), talk(SYSTEM, SYSTEM, ASK, SAY), {"messages": None}
    path = write_rows(tmp_path / "rows.jsonl", [short, OK, system, short, null, short, system])
    kept = documents_of(structured(path, transform="chat", on_bad_row="skip", max_skipped=0.9), tokenizer)
    assert [spoken(tokenizer, document) for document in kept] == [["a long answer<eos>"]]
    said = capsys.readouterr().out
    first = f"data: 6 of 7 rows of {str(path)!r} left out: 3 like row 0, column {NO_TURN}; "
    assert said.startswith(f"{first}2 like row 2, column 'messages[1]': ")
    assert said.endswith(f"; 1 like row 4, column 'messages': None {NO_MESSAGES}\n")


def lacking(data: dict, row: dict, column: str, setting: str | None = None) -> tuple:
    """Settings of data, a row, the column that it lacks, and what the message says to do."""
    name = data["transform"]
    if setting is None:
        return data, row, column, f"the transform {name} reads it: take another data.transform"
    return data, row, column, f"set data.columns.{setting}, or another data.transform than {name}"


LACKING = [
    lacking(using("prompt_completion"), {"q": "x", "completion": "y"}, "prompt", "prompt"),
    lacking(TURNS, pair("x", "y"), "more", "turns"),
    lacking(CHAT, {"conversations": [ASK, SAY]}, "messages", "messages"),
    lacking(COLUMN, pair("x", "y"), "r", "reasoning"),
    lacking(COLUMN, {"prompt": "x", "r": "y"}, "completion", "completion"),
    lacking(using("question_answer"), {"question": "x"}, "answer"),
    lacking(using("opencodeinstruct"), {"output": "x"}, "input"),
]


@pytest.mark.parametrize("data, row, column, remedy", LACKING)
@pytest.mark.parametrize("kind", [structured, strided])
def test_a_column_that_no_row_has(tmp_path, tokenizer, kind, data, row, column, remedy):
    """Guards against a message about each row in place of one about the dataset, and against `skip` leaving out all of
    them.
    """
    path = write_rows(tmp_path / "rows.jsonl", [row])
    message = refusal(documents_of, kind(path, **data, on_bad_row="skip"), tokenizer)
    assert message == f"data: {str(path)!r} has no column {column!r}; it has {', '.join(row)}: {remedy}"
