"""Files that are not what their names say: one line that names the file and the remedy; and wrapped rows are read."""

import gzip
import json

import datasets
import pytest

from conversations import strided
from ebft_utils.config.settings import UserError
from ebft_utils.data.sources import load_table, training_sources
from ebft_utils.data.tables import load_documents
from helpers import assert_holds

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number} é"} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(file, streaming=False, **data):
    config = strided(file, transform="prompt_completion", **data)
    (source,) = training_sources(config)
    return load_table(source, streaming)


def write(folder, name: str, content: str | bytes):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def parquet(folder) -> bytes:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


WRONG = {
    "Latin-1": ("rows.jsonl", LINES.encode("latin1"), ["not UTF-8", "byte", "iconv"]),
    "UTF-16": ("rows.csv", "prompt,completion\na,b\n".encode("utf-16"), ["not UTF-8", "byte 0", "iconv"]),
    "Latin-1, compressed": ("rows.jsonl.gz", gzip.compress(LINES.encode("latin1")), ["not UTF-8", "iconv"]),
    "no gzip": ("rows.jsonl.gz", LINES, ["no gzip file", "rename it to rows.jsonl"]),
    "gzip": ("rows.jsonl", gzip.compress(LINES.encode()), ["is a gzip file", "rows.jsonl.gz"]),
    "half a gzip": ("rows.jsonl.gz", gzip.compress(LINES.encode() * 99)[:-20], ["cannot be unpacked", "again"]),
    "no Parquet": ("rows.parquet", LINES, ["no Parquet file", "name it after what it is"]),
    "half a Parquet": ("rows.parquet", parquet, ["cut off", "copy or download it again"]),
    "semicolons": ("rows.csv", "prompt;completion\na;b\n", ["';'", "','", "save it with commas"]),
    "other splits": ("rows.json", json.dumps({"test": ROWS, "dev": ROWS}), ["rows under test, dev", "'train'"]),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name, content, words", WRONG.values(), ids=WRONG)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, words, streaming):
    if callable(content):
        content = content(tmp_path)[:-10]
    file = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        table(file, streaming)
    assert_holds(str(caught.value), "data", *words)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "content, data",
    [
        (json.dumps(ROWS), {}),
        (LINES, {}),
        (json.dumps({"data": ROWS, "version": 1}), {}),
        (json.dumps({"train": ROWS, "test": ROWS[:1]}), {}),
        (json.dumps({"train": ROWS[:1], "test": ROWS}), {"split": "test"}),
    ],
    ids=["a list", "lines", "data", "splits", "another split"],
)
def test_rows_in_a_json_file(tmp_path, content, data, streaming):
    assert list(table(write(tmp_path, "rows.json", content), streaming, **data)) == ROWS


def test_a_part_of_a_split_in_a_json_file(tmp_path):
    file = write(tmp_path, "rows.json", json.dumps({"test": ROWS}))
    assert list(table(file, split="test[:2]")) == ROWS[:2]


@pytest.fixture
def folder(tmp_path):
    """Two files of source code, and one that is none."""
    folder = tmp_path / "code"
    folder.mkdir()
    for name in ("a.py", "c.py"):
        write(folder, name, "x = 1\n" * 20)
    write(folder, "b.py", "name = 'é'\n".encode("latin1"))
    return folder


def test_a_file_of_a_folder_that_cannot_be_decoded_is_a_bad_row(folder, tokenizer, capsys):
    """It stops the run, or is left out and counted."""
    config = strided(folder)
    with pytest.raises(UserError) as caught:
        load_documents(config, tokenizer, *training_sources(config))
    assert_holds(str(caught.value), "row 1", "'text'", "not UTF-8", "data.on_bad_row: skip")
    assert str(folder / "b.py") in str(caught.value)
    config = strided(folder, on_bad_row="skip")
    assert len(load_documents(config, tokenizer, *training_sources(config))) == 2
    assert "1 of 3 rows" in capsys.readouterr().out
