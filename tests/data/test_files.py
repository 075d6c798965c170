"""Files that are not what their names say: one line that names the file and the remedy; and wrapped rows are read."""

import gzip
import json

import datasets
import pytest

from conversations import strided
from ebft_utils.config.settings import UserError
from ebft_utils.data import files
from ebft_utils.data.sources import evaluation_source, load_table, training_sources
from ebft_utils.data.streams import Stream
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
    "UTF-16, named": ("rows.jsonl", LINES.encode("utf-16"), ["not UTF-8", "it is UTF-16", "iconv -f UTF-16"]),
    "tabs": ("rows.csv", "prompt\tcompletion\na\tb\n", ["'\\t'", "save it with commas"]),
    "white space": ("rows.jsonl", "\n \n", ["is empty"]),
    "an empty gzip": ("rows.jsonl.gz", gzip.compress(b""), ["is empty"]),
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


BROKEN = {
    "a line": ("rows.jsonl", LINES + '{"prompt": "x"\n' + LINES, ["line 4, is not valid JSON", "take it out"]),
    "a line far on": ("rows.jsonl", LINES * 9999 + "{]\n", ["line 29998, is not valid JSON"]),
    "no object": ("rows.jsonl", LINES + "5\n", ["line 4, is no object"]),
    "half a list": ("rows.json", json.dumps(ROWS)[:-9], ["is not valid JSON", "again"]),
    "a web page": ("rows.jsonl.gz", gzip.compress(b"<html>\n404\n</html>"), ["line 1, is not valid JSON"]),
    "a comma too many": ("rows.csv", "prompt,completion\na,b\nc,d,e\n", ["line 3, has 3 columns", "quotes around"]),
    "Latin-1 far on": ("rows.jsonl", LINES.encode() * 99999 + LINES.encode("latin1"), ["not UTF-8", "iconv"]),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name, content, words", BROKEN.values(), ids=BROKEN)
def test_a_fault_that_shows_when_the_rows_are_read(tmp_path, tokenizer, capfd, name, content, words, streaming):
    """Guards against a traceback, a row number that counts within a block, and a folder whose broken file is not named;
    and against lines of the reader's own beside the message.
    """
    file = write(tmp_path, name, content)
    config = strided(tmp_path, file_pattern="rows.*", transform="prompt_completion", streaming=streaming)
    with pytest.raises(UserError) as caught:
        if streaming:
            list(Stream(config, tokenizer, *training_sources(config)).open_at(0))
        else:
            load_documents(config, tokenizer, *training_sources(config))
    assert str(caught.value).startswith("data: ") and str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert_holds(str(caught.value), *words)
    assert "Failed to" not in capfd.readouterr().err


@pytest.mark.parametrize("name, content", [("rows.json", "[]"), ("rows.csv", "prompt,completion\n")])
def test_files_without_rows_are_called_empty(tmp_path, name, content):
    """Guards against 'Instruction "train" corresponds to no data!'."""
    file = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        table(file)
    assert str(caught.value) == f"data: {str(file)!r} (split 'train') is empty"


def test_the_mark_before_a_text_is_none_of_it(tmp_path, tokenizer):
    """Guards against the byte order mark of some editors becoming a token, in lines and in whole files."""
    write(tmp_path, "lines.txt", "\ufeffone line of text\n")
    write(tmp_path, "code.py", "\ufeffone line of text")
    for config in (strided(tmp_path / "lines.txt"), strided(tmp_path)):
        (row,) = load_table(*training_sources(config))
        assert row == {"text": "one line of text"}


def test_an_object_that_is_a_row_itself(tmp_path):
    """Guards against a conversation, or a column data, being taken for rows that are wrapped."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in ({"messages": messages}, {"messages": messages, "data": [{"x": 1}]}):
        for content in (json.dumps(row), json.dumps(row, indent=1), f"{json.dumps(row)}\n{json.dumps(row)}\n"):
            config = strided(write(tmp_path, "rows.json", content), transform="chat")
            (source,) = training_sources(config)
            assert load_table(source)[0]["messages"] == messages


def test_the_split_that_is_evaluated(tmp_path):
    """Guards against an evaluation on the training rows of a file that has test rows, and on none where it has none."""
    for content, split in (
        ({"train": ROWS[:1], "test": ROWS[1:]}, "test"),
        ({"train": ROWS}, "train"),
        (ROWS, "train"),
    ):
        file = write(tmp_path, "rows.json", json.dumps(content))
        config = strided("x", transform="prompt_completion")
        config.eval.dataset = str(file)
        assert evaluation_source(config).split == split
        assert list(load_table(evaluation_source(config))) == (ROWS[1:] if split == "test" else ROWS)


def test_the_rest_of_a_stream_is_not_read_before_it(tmp_path, monkeypatch):
    """Guards against a stream of 100 GB whose files are all read before the first step."""
    file = write(tmp_path, "rows.jsonl", LINES * 99999)
    read = []
    whole = files.CHUNK
    monkeypatch.setattr(files.codecs, "getincrementaldecoder", counting(files.codecs.getincrementaldecoder, read))
    table(file, streaming=True)
    assert sum(read) == whole < file.stat().st_size


def counting(decoder_of, read: list[int]):
    """The decoder, which notes how many bytes it is given."""

    class Counting:
        def __init__(self):
            self.inner = decoder_of("utf-8")()

        def decode(self, chunk, final=False):
            read.append(len(chunk))
            return self.inner.decode(chunk, final)

        def getstate(self):
            return self.inner.getstate()

    return lambda encoding: Counting


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


FAULTY = {"Latin-1": ("b.jsonl", LINES.encode("latin1")), "no gzip": ("b.jsonl.gz", LINES)}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name, content", FAULTY.values(), ids=FAULTY)
def test_a_file_of_rows_in_a_folder_that_cannot_be_decoded(tmp_path, capsys, name, content, streaming):
    """Guards against one file stopping a run that may leave it out, and against a file that is left out in silence. A
    folder with nothing else, and a single file, are refused.
    """
    write(tmp_path, "a.jsonl", LINES)
    faulty = write(tmp_path, name, content)
    pattern = {"file_pattern": "*.jsonl*"}
    with pytest.raises(UserError, match=f"data: {faulty}"):
        table(tmp_path, streaming, **pattern)
    assert list(table(tmp_path, streaming, **pattern, on_bad_row="skip")) == ROWS
    said = capsys.readouterr().out
    assert said.startswith(f"data: 1 of 2 files of {str(tmp_path)!r} left out: 1 like {faulty}")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="has no file that can be read"):
        table(tmp_path, streaming, **pattern, on_bad_row="skip")
    with pytest.raises(UserError, match=f"data: {faulty}"):
        table(faulty, streaming, on_bad_row="skip")
