"""Somebody's own transform, out of a file or a module: what it may return, and what is said of one that does not."""

import json
import re

import datasets
import pytest

from conversations import END, A, U, document_of, documents_of, strided, structured, words
from ebft_utils.config.data import ColumnsConfig
from ebft_utils.data.documents import Document
from ebft_utils.data.sources import training_sources
from ebft_utils.data.tables import documents_from, load_documents
from ebft_utils.data.transforms import BadRow, load_transform
from helpers import refusal, write_rows

OWN = """
from ebft_utils.data.transforms import BadRow

def transform(row, columns):
    if row["n"] % 3 == 2:
        return None
    return {"prompt": f"w{row['n']} w11", "completion": f"w{row['n'] + 1} {row[columns.completion]}"}

def refusing(row, columns):
    if row["n"] == 11:
        raise BadRow("n", "11 is not wanted")
    return transform(row, columns) or {"prompt": "w20", "completion": "w21 w22"}

def talking(row, columns):
    turns = [{"prompt": "w22", "completion": "w32"}]
    return {"prompt": [{"role": "user", "content": f"w{row['n']}"}], "completion": "w30", "turns": turns}

def _hidden(row, columns):
    return None

NUMBER = 5
"""
SKIP = "data.on_bad_row: skip leaves such rows out"


@pytest.fixture
def own(tmp_path):
    """A file of transforms, and rows for them."""
    file, rows = tmp_path / "my_file.py", [{"n": 10 + number, "a": "w50 w51"} for number in range(7)]
    file.write_text(OWN)
    return file, write_rows(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("kind", [structured, strided])
def test_a_function_of_ones_own(own, by_word, capsys, kind):
    """Guards against a function that gets other names than data.columns, rows that it leaves out and nobody counts, and
    a cached second load that says nothing.
    """
    file, path = own
    config = kind(path, transform=f"{file}:transform", columns=ColumnsConfig(completion="a"))
    expected = [Document([n, 11, n + 1, 50, 51, END], [(2, 6)]) for n in (10, 12, 13, 15, 16)]
    said = f"data: 2 of 7 rows of {str(path)!r} left out: 2 by the transform {file}:transform\n"
    for _ in range(2):
        assert documents_of(config, by_word) == expected
        assert capsys.readouterr().out == said


@pytest.mark.parametrize("kind", [structured, strided])
def test_a_function_of_ones_own_with_bad_rows_and_turns(own, by_word, capsys, kind):
    """Guards against an own BadRow that is a traceback, and against own messages and turns that are not templated."""
    file, path = own
    config = dict(columns=ColumnsConfig(completion="a"), transform=f"{file}:refusing")
    message = refusal(documents_of, kind(path, **config), by_word)
    assert message == f"data: {str(path)!r}, row 1, column 'n': 11 is not wanted; {SKIP}"
    assert len(documents_of(kind(path, **config, on_bad_row="skip"), by_word)) == 6
    assert "1 of 7 rows" in capsys.readouterr().out
    document = document_of(kind(transform=f"{file}:talking"), by_word, {"n": 10})
    assert document == Document([U, 10, END, A, 30, END, U, 22, END, A, 32, END], [(4, 6), (10, 12)])


def test_a_function_of_a_module(own, by_word, monkeypatch):
    """Guards against package.module:function being looked for as a file.

    A file is found relative to the current folder too.
    """
    file, path = own
    (file.parent / "some_package_of_ones_own").mkdir()
    (file.parent / "some_package_of_ones_own" / "inner.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.chdir(file.parent)
    names = ("some_package_of_ones_own.inner:transform", "my_file.py:transform", f"{file}:transform")
    configs = [structured(path, transform=name, columns=ColumnsConfig(completion="a")) for name in names]
    found = [documents_of(config, by_word) for config in configs]
    assert len(found[0]) == 5 and found[0] == found[1] == found[2]


def test_two_files_of_the_same_name(tmp_path, by_word):
    """Guards against the second file's function being run for both, in this process and in others."""
    path = write_rows(tmp_path / "rows.jsonl", [{"n": 10 + number} for number in range(4)])
    names = []
    for word in ("w30", "w31"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "my.py").write_text(
            f"WORD = '{word}'\ndef f(row, columns):\n    return {{'prompt': 'w' + str(row['n']), 'completion': WORD}}\n"
        )
        names.append(f"{tmp_path / word / 'my.py'}:f")
    for num_proc in (1, 2):
        configs = [structured(path, transform=name, num_proc=num_proc) for name in names]
        sources = [training_sources(config)[0] for config in configs]  # both files are loaded before one is used
        pairs = zip(configs, sources, strict=True)
        found = [documents_from(load_documents(config, by_word, source)[:]) for config, source in pairs]
        assert found == [[Document([10 + number, word, END], [(1, 3)]) for number in range(4)] for word in (30, 31)]


@pytest.mark.parametrize("kind", [structured, strided])
def test_processes_change_nothing(own, by_word, monkeypatch, tmp_path, kind):
    """Guards against another order, rows that are lost between two processes, and a file that they cannot find."""
    file, path = own
    tables = []
    for num_proc in (1, 2):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache of {num_proc}")
        config = kind(path, transform=f"{file}:transform", columns=ColumnsConfig(completion="a"), num_proc=num_proc)
        tables.append(load_documents(config, by_word, *training_sources(config))[:])
    assert tables[0] == tables[1] and len(tables[0]["input_ids"]) == 5


@pytest.mark.parametrize("num_proc", [1, 2])
def test_errors_of_processes(own, by_word, num_proc):
    """Guards against a row number that counts from a process's own first row, and a message that is lost on the way
    from it.
    """
    file, path = own
    with path.open("a") as stream:
        stream.write(json.dumps({"n": 30, "a": None}) + "\n")

    def message_of(transform: str, **columns) -> str:
        config = structured(path, transform=transform, columns=ColumnsConfig(**columns), num_proc=num_proc)
        return refusal(documents_of, config, by_word)

    message = message_of(f"{file}:refusing", completion="a")
    assert message == f"data: {str(path)!r}, row 1, column 'n': 11 is not wanted; {SKIP}"
    message = message_of("prompt_completion", prompt="a", completion="a")
    assert message == f"data: {str(path)!r}, row 7, column 'a': None is not text; {SKIP}"
    file.write_text(OWN.replace("return None\n    return {", "return None\n    return {'id': 3, "))
    message = message_of(f"{file}:transform", completion="a")
    assert "returned ['completion', 'id', 'prompt']" in message and message.endswith(f"({str(path)!r}, row 0)")


ALLOWED = "allowed: {text}, {prompt, completion} or {prompt, completion, turns}, or None for a row to leave out"


NEITHER = "is neither text nor a list of messages (role, content)"
NO_STRIP = "'int' object has no attribute 'strip'"


def saying(**changes) -> str:
    """The body of a transform that returns literal values."""
    return f"return {dict(prompt='a', completion='b') | changes}"


WRONG = [  # the body of a transform, what is said of it
    ("return {'prompt': 'a', 'answer': 'b'}", f"returned ['answer', 'prompt']; {ALLOWED}"),
    ("return {'prompt': 'a'}", f"returned ['prompt']; {ALLOWED}"),
    ("return {}", f"returned []; {ALLOWED}"),
    ("return {'text': 'a', 'prompt': 'a', 'completion': 'b'}", f"returned ['completion', 'prompt', 'text']; {ALLOWED}"),
    ("return 'a text'", f"returned 'a text'; {ALLOWED}"),
    ("return ('a', 'b')", f"returned ('a', 'b'); {ALLOWED}"),
    ("return False", f"returned False; {ALLOWED}"),
    ("yield {'prompt': 'a', 'completion': 'b'}", f"; {ALLOWED}"),
    (saying(prompt=5), "returned prompt 5, which is not text"),
    (saying(completion=None), "returned completion None, which is not text"),
    (saying(completion=["b"]), "returned completion ['b'], which is not text"),
    (saying(prompt=["a"]), f"returned the prompt ['a'], which {NEITHER}"),
    (saying(prompt=[{"content": "a"}]), f"returned the prompt [{{'content': 'a'}}], which {NEITHER}"),
    (saying(turns=[{"prompt": "c"}]), "returned turns[0] {'prompt': 'c'}; allowed: {prompt, completion}"),
    (saying(turns=["c"]), "returned turns[0] 'c'; allowed: {prompt, completion}"),
    (saying(turns=[{"prompt": "c", "completion": 7}]), "returned turns[0].completion 7, which is not text"),
    ("return {'prompt': row['question'], 'completion': 'b'}", "KeyError: 'question'; the row has the columns n ("),
    ("return {'prompt': row['n'].strip(), 'completion': 'b'}", f"raised AttributeError: {NO_STRIP}"),
    ("raise RuntimeError('no time')", "raised RuntimeError: no time"),
]


@pytest.mark.parametrize("body, words", WRONG)
@pytest.mark.parametrize("kind", [structured, strided])
def test_a_function_that_does_something_else(tmp_path, tokenizer, kind, body, words):
    """Guards against a traceback, and against `skip` leaving out every row for a mistake in the function.

    Names the function, the dataset and the row.
    """
    file = tmp_path / "mine.py"
    file.write_text(f"def transform(row, columns):\n    if row['n'] == 0:\n        return None\n    {body}\n")
    if body.startswith("yield"):
        file.write_text(f"def transform(row, columns):\n    {body}\n")
    path = write_rows(tmp_path / "rows.jsonl", [{"n": 0}, {"n": 1}])
    message = refusal(documents_of, kind(path, transform=f"{file}:transform", on_bad_row="skip"), tokenizer)
    assert message.startswith(f"data.transform: {file}:transform r") and words in message
    assert re.search(rf" \('{re.escape(str(path))}', row {0 if body.startswith('yield') else 1}\)$", message)


NULL = "[{'role': 'user', 'content': None}]"
EMPTY_TURN = "'turns': [{'prompt': '', 'completion': 'b'}]"
BAD_ROWS = [
    ("{'prompt': ' ', 'completion': 'b'}", "column 'prompt': ' ' is empty"),
    ("{'prompt': [], 'completion': 'b'}", "column 'prompt': [] is not a list of messages"),
    (f"{{'prompt': {NULL}, 'completion': 'b'}}", f"column 'prompt': {NULL} is not a list of messages"),
    (f"{{'prompt': 'a', 'completion': 'b', {EMPTY_TURN}}}", "column 'turns[0].prompt': '' is empty"),
]


@pytest.mark.parametrize("body, words", BAD_ROWS)
def test_a_function_that_gives_a_bad_row(tmp_path, tokenizer, body, words):
    """Guards against an empty text that one row happens to have stopping a run that may leave it out."""
    (tmp_path / "mine.py").write_text(f"def transform(row, columns):\n    return {body}\n")
    data = {"transform": f"{tmp_path / 'mine.py'}:transform"}
    assert f"data: 'rows', row 0, {words}" in refusal(document_of, structured("rows", **data), tokenizer, {"n": 0})
    assert document_of(structured("rows", **data, on_bad_row="skip"), tokenizer, {"n": 0}).startswith(f"row 0, {words}")


def test_raw_text_of_a_function_of_ones_own(tmp_path, by_word):
    """Guards against a prompt-less document in structured mode; in strided mode all of it is learnt."""
    (tmp_path / "mine.py").write_text("def transform(row, columns):\n    return {'text': row['body'] + ' w99'}\n")
    data, row = {"transform": f"{tmp_path / 'mine.py'}:transform"}, {"body": words(10, 11, 12)}
    assert document_of(strided(**data), by_word, row) == Document([10, 11, 12, 99, END], [(0, 5)])
    message = refusal(document_of, structured("rows", **data, on_bad_row="skip"), by_word, row)
    text = "returned raw text, which train_structured.py cannot use: it needs prompt and completion"
    assert message.endswith(f"mine.py:transform {text} ('rows', row 0)")


UNKNOWN = "nothing_of_that_name"
TAKES = "a transform takes a row and the names of the columns: def transform(row, columns)"
NO_MODULE = f"No module named '{UNKNOWN}'"


def not_run(error: str) -> str:
    return f"'mine.py:transform': the file cannot be run: {error}"


ABSENT = [  # what stands in mine.py, the name that is asked for, what is said of it
    (None, "none.py:transform", "there is no file none.py"),
    (OWN, "mine.py:transfrom", "mine.py has no function 'transfrom'; it has transform, refusing, talking"),
    (OWN, "mine.py:NUMBER", "mine.py has no function 'NUMBER'; it has transform, refusing, talking"),
    (OWN, "mine.py:", "mine.py has no function ''; it has transform, refusing, talking"),
    ("x = 1\n", "mine.py:transform", "mine.py has no function 'transform'; it has none"),
    ("def transform(row, columns:\n", "mine.py:transform", not_run("SyntaxError: ")),
    (f"import {UNKNOWN}\n", "mine.py:transform", not_run(f"ModuleNotFoundError: {NO_MODULE}")),
    ("LIMIT = 1 / 0\n", "mine.py:transform", not_run("ZeroDivisionError: division by zero")),
    ("def transform(row):\n    return row\n", "mine.py:transform", f"mine.py:transform: {TAKES}"),
    ("def transform(row, columns, tokenizer):\n    return row\n", "mine.py:transform", TAKES),
    ("def transform(row, *, columns):\n    return row\n", "mine.py:transform", TAKES),
    (None, f"{UNKNOWN}:transform", f"the module {UNKNOWN} cannot be imported: {NO_MODULE}"),
    (None, "json:lood", "json has no function 'lood'; it has "),
]


@pytest.mark.parametrize("content, name, words", ABSENT)
def test_a_function_that_is_not_there(tmp_path, monkeypatch, content, name, words):
    """Guards against a traceback before the first row, with the key that it comes from."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    message = refusal(load_transform, name, "data.mix[1].transform")
    assert message.startswith("data.mix[1].transform: ") and words in message
    assert "\n" not in message and "_hidden" not in message
    assert refusal(training_sources, structured(transform=name)).startswith("data.transform: ")


@pytest.mark.parametrize("signature", ["row, columns", "row, columns, more=1", "*everything", "row, names"])
def test_signatures_that_will_do(tmp_path, by_word, signature):
    """Guards against a function being refused that can be called."""
    file = tmp_path / "mine.py"
    file.write_text(f"def transform({signature}):\n    return {{'prompt': 'w10', 'completion': 'w30'}}\n")
    document = document_of(structured(transform=f"{file}:transform"), by_word, {})
    assert document == Document([10, 30, END], [(1, 3)])


WITH_A_DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Pair:
    prompt: str
    completion: str

def transform(row, columns):
    return vars(Pair("w10", "w30"))
"""


def test_a_file_with_more_in_it(tmp_path, by_word):
    """Guards against a file that runs as a script but not here.

    Dataclasses with postponed annotations look their module up by its name.
    """
    (tmp_path / "mine.py").write_text(WITH_A_DATACLASS)
    document = document_of(structured(transform=f"{tmp_path / 'mine.py'}:transform"), by_word, {})
    assert document == Document([10, 30, END], [(1, 3)])


NEAREST = [
    ("chatt", "chat"),
    ("first_trun", "first_turn"),
    ("translate_english", "translate_to_english"),
    ("reasoning_answers", "reasoning_answer"),
    ("zzz", None),
    ("my_file.py", None),
]
FORMS = (
    "text, prompt_completion, chat, first_turn, last_turn, all_turns, reasoning, reasoning_answer, opencodeinstruct, "
    "swallow_code, question_answer, translate_to_english, translate_from_english, my_file.py:function, "
    "package.module:function"
)


@pytest.mark.parametrize("name, nearest", NEAREST)
@pytest.mark.parametrize("kind", [structured, strided])
def test_an_unknown_name(kind, name, nearest):
    """Guards against a typo that is found only when the first row is read."""
    message = refusal(kind, transform=name)
    hint = "" if nearest is None else f"; did you mean {nearest}?"
    assert message == f"data.transform: {name!r} is unknown; allowed: {FORMS}{hint}"


def test_bad_row_says_where_and_why():
    """Guards against the documented form of BadRow (column, reason) changing under somebody's own transform."""
    assert str(BadRow("n", "11 is not wanted")) == "column 'n': 11 is not wanted"
