"""From raw text to batches: sources, rows, packing, anchors, order, and the random numbers of the rollouts."""

import json

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ebft_utils.config.data import ColumnsConfig, EvalConfig, TextDataConfig
from ebft_utils.config.modes import StridedConfig
from ebft_utils.config.sections import ModelConfig, StridedEBFTConfig, TrainConfig
from ebft_utils.data.batches import make_batch, rollout_uniforms
from ebft_utils.data.documents import Document
from ebft_utils.data.rows import Rows, load_rows, pack_documents, rows_of_step
from ebft_utils.data.sources import load_table, training_sources
from ebft_utils.data.tables import load_documents, table_of
from helpers import refusal, write_rows

EOS, PAD = 0, 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: 'w5' is token 5. Lengths and ids can be read off the text."""
    vocabulary = {"<eos>": EOS, "<pad>": PAD, "<unk>": 2, **{f"w{number}": number for number in range(3, 1000)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def write_jsonl(path, values, column="text"):
    return write_rows(path, [{column: value} for value in values])


def texts_of(source, split="train", text_column="text", file_pattern="*.py") -> list:
    data = {"split": split, "columns": ColumnsConfig(text=text_column), "file_pattern": file_pattern}
    return load_table(*training_sources(config_of(source, data=data)))[text_column][:]


def config_of(source, *, data=None, evaluation=None, ebft=None, train=None) -> StridedConfig:
    """Anchors from token 2 on, every 2, rollouts of 2 tokens: a document needs 4 tokens. Nothing held out."""
    return StridedConfig(
        model=ModelConfig("unused"),
        data=TextDataConfig(**{"dataset": str(source), "sequence_length": 8, **(data or {})}),
        ebft=StridedEBFTConfig(**{"context_length": 2, "stride": 2, "generate_max_len": 2, **(ebft or {})}),
        train=TrainConfig(**{"output_dir": "unused", "max_steps": 1, **(train or {})}),
        eval=EvalConfig(**{"num_documents": 0, **(evaluation or {})}),
    )


def contents(rows: Rows) -> list:
    return [[document.tokens for document in rows[row]] for row in range(len(rows))]


# ----------------------------------------------------------------------------------------------------------------------
# Sources


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "txt"])
def test_load_texts_of_every_file_format(tmp_path, kind):
    """Guards against a format that loses, reorders or changes texts (quotes, commas, non-ASCII)."""
    values = ["first", 'with "quotes", and a comma', "naïve café ✓"]
    path = tmp_path / f"texts.{kind}"
    table = datasets.Dataset.from_dict({"number": [1, 2, 3], "text": values})
    if kind == "txt":
        path.write_text("\n".join(values) + "\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps([{"text": value} for value in values]))
    else:
        {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[kind](str(path))
    assert texts_of(path) == values
    assert texts_of(path, "train[1:]") == values[1:]
    assert "'tset[:1]'" in refusal(texts_of, path, "tset[:1]")


SPLITS = {"train": [0, 1, 2, 3], "train[:50%]": [0, 1], "train[50%:]": [2, 3], "train[1:3]": [1, 2], "train[-1:]": [3]}


@pytest.mark.parametrize("split, expected", SPLITS.items())
def test_splits_of_files_and_of_folders(tmp_path, split, expected):
    """Guards against a split that is applied to one kind of source only, or rounds differently."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.py").write_text(f"text {number}")
    path = write_jsonl(tmp_path / "texts.jsonl", [f"text {number}" for number in range(4)])
    assert texts_of(path, split) == texts_of(folder, split) == [f"text {number}" for number in expected]


def test_folder_of_source_files(tmp_path):
    """Guards against an unsorted walk (another order on another machine), files of other kinds, and empty files as
    documents.
    """
    (tmp_path / "b").mkdir()
    files = {"z.py": "zz\n", "b/a.py": "import a\n", "c.py": "c", "empty.py": " \n", "note.md": "no code"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert texts_of(tmp_path) == ["import a\n", "c", "zz\n"]
    assert texts_of(tmp_path, file_pattern="*.md") == ["no code"]


def test_folder_of_row_files(tmp_path):
    """Guards against a folder of .jsonl files being read as one document a file."""
    write_jsonl(tmp_path / "b.jsonl", ["three"])
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    assert texts_of(tmp_path, file_pattern="*.jsonl") == ["one", "two", "three"]


def test_standard_library():
    """Guards against tests or installed packages being taken for the standard library, and an order that varies."""
    first = texts_of("python_stdlib", "train[:5]")
    assert len(first) == 5 and first == texts_of("python_stdlib", "train")[:5]
    whole = texts_of("python_stdlib")
    assert 300 < len(whole) < 3000
    assert any("class JSONDecoder" in text for text in whole)
    assert not any("import pytest" in text for text in whole)


ZEROS = ["zero.jsonl", "zero.txt", "zero.csv", "zero.parquet"]


@pytest.mark.parametrize("name", [*ZEROS, "header.csv", "blank.jsonl", "empty_folder", "no_rows"])
def test_empty_dataset_is_called_empty(tmp_path, name):
    """Guards against a traceback (StopIteration), or 'An error occurred while generating the dataset', for no rows."""
    path = tmp_path / name
    split = "train"
    if name == "empty_folder":
        path.mkdir()
        (path / "a.py").write_text("\n")
    elif name == "no_rows":
        path, split = write_jsonl(tmp_path / "two.jsonl", ["a", "b"]), "train[2:]"
    else:
        path.write_text({"header.csv": "text\n", "blank.jsonl": "\n\n"}.get(name, ""))
    message = refusal(texts_of, path, split)
    assert str(path) in message and split in message
    assert any(words in message for words in ("is empty", "0 bytes", "corresponds to no data"))


UNREADABLE = [
    ("broken.jsonl", '{"text": "a"}\n{not json}\n', ["line 2, is not valid JSON"]),
    ("latin.txt", "café\n".encode("latin-1"), ["not UTF-8", "iconv"]),
    ("broken.parquet", "this is no parquet file", ["no Parquet file"]),
]


@pytest.mark.parametrize("name, content, words", UNREADABLE)
def test_unreadable_file_says_why(tmp_path, name, content, words):
    """Guards against a message that hides the cause behind 'An error occurred while generating the dataset'."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(texts_of, path)
    assert str(path) in message
    assert [word for word in words if word.lower() not in message.lower()] == []


def test_missing_things_are_named(tmp_path):
    """Guards against a missing file being looked for on the hub, and messages that name neither source nor remedy."""
    path = write_jsonl(tmp_path / "texts.jsonl", ["a"], column="body")
    (tmp_path / "notes.md").write_text("text")
    remedy = "set data.columns.text, or another data.transform than text"
    assert refusal(texts_of, path) == f"data: {str(path)!r} has no column 'text'; it has body: {remedy}"
    assert "does not exist" in refusal(texts_of, tmp_path / "none.jsonl")
    message = refusal(texts_of, tmp_path / "notes.md")
    assert "notes.md" in message and ".jsonl" in message
    message = refusal(texts_of, tmp_path, file_pattern="*.rs")
    assert str(tmp_path) in message and "data.file_pattern" in message and "'*.rs'" in message
    assert "Unrecognized instruction format" in refusal(texts_of, path, "train[:many]")
    message = refusal(texts_of, tmp_path, file_pattern="*")  # a .jsonl beside a .md: rows or documents?
    assert "several kinds" in message and ".jsonl" in message and ".md" in message
    assert str(tmp_path) in refusal(texts_of, tmp_path, file_pattern="/*.py")
    assert "~nouser" in refusal(texts_of, "~nouser/texts.jsonl")


def test_source_file_that_is_not_text(tmp_path, tokenizer):
    """Guards against a traceback, or a guess at the encoding, for one binary file among many."""
    (tmp_path / "good.py").write_text("a = 1")
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe\x00")
    message = refusal(documents_of, tmp_path, tokenizer)
    assert str(tmp_path / "bad.py") in message and "UTF-8" in message and "file_pattern" in message


# ----------------------------------------------------------------------------------------------------------------------
# Documents


def documents_of(path, tokenizer, text_column="text", **data) -> list[list[int]]:
    config = config_of(path, data={**data, "columns": ColumnsConfig(text=text_column)})
    return load_documents(config, tokenizer, *training_sources(config))["input_ids"][:]


def test_truncation_and_end_of_document_token(tmp_path, tokenizer):
    """Guards against an EOS in the middle of a cut document, a row of sequence_length + 1 tokens, and a whole document
    without EOS.
    """
    path = write_jsonl(tmp_path / "texts.jsonl", [words(*range(10, 10 + length)) for length in (7, 8, 9, 20, 4)])
    seven, cut, four = [*range(10, 17)], [*range(10, 18)], [*range(10, 14)]
    assert documents_of(path, tokenizer, long_documents="cut") == [[*seven, EOS], cut, cut, cut, [*four, EOS]]
    assert documents_of(path, tokenizer, long_documents="cut", append_eos=False) == [seven, cut, cut, cut, four]


def test_text_column(tmp_path, tokenizer):
    """Guards against reading `text` whatever data.columns.text says."""
    path = write_rows(tmp_path / "texts.jsonl", [{"text": words(3, 3, 3, 3), "body": words(4, 5, 6, 7)}])
    assert documents_of(path, tokenizer, text_column="body") == [[4, 5, 6, 7, EOS]]


BAD = [
    (None, ["None is not text"]),
    (5, ["5 is not text"]),
    ("", ["'' is empty", "data.on_bad_row: skip"]),
    (words(3, 4), ["3 tokens", "needs 4"]),
]


@pytest.mark.parametrize("bad, parts", BAD)
def test_bad_row_is_named(tmp_path, tokenizer, bad, parts):
    """Guards against a bad row that trains on nothing, or an error that does not say which of a million rows it is."""
    good = 5 if isinstance(bad, int) else words(10, 11, 12, 13)
    path = write_jsonl(tmp_path / "texts.jsonl", [good, good, bad, good], column="body")
    message = refusal(documents_of, path, tokenizer, text_column="body")
    row = 0 if isinstance(bad, int) else 2
    assert str(path) in message and f"row {row}" in message and "'body'" in message
    assert [part for part in parts if part not in message] == []


def test_bad_row_after_the_first_thousand(tmp_path, tokenizer):
    """Guards against row numbers that count from the start of an internal batch of 1000."""
    path = write_jsonl(tmp_path / "texts.jsonl", [words(10, 11, 12, 13)] * 1005 + [None])
    assert "row 1005" in refusal(documents_of, path, tokenizer)


def test_bad_rows_are_skipped_and_counted(tmp_path, tokenizer, capsys):
    """Guards against `skip` that leaves out good rows, keeps bad ones, or says nothing."""
    path = write_jsonl(tmp_path / "texts.jsonl", [words(10, 11, 12, 13), None, "", words(3), words(20, 21, 22)])
    skip = {"on_bad_row": "skip", "max_skipped": 0.6}
    assert documents_of(path, tokenizer, **skip) == [[10, 11, 12, 13, EOS], [20, 21, 22, EOS]]
    said = capsys.readouterr().out
    assert "3 of 5 rows" in said and str(path) in said and "needs 4" in said


def test_skip_does_not_hide_a_column_of_numbers(tmp_path, tokenizer):
    """Guards against `skip` leaving out a whole column that is not text at all."""
    path = write_jsonl(tmp_path / "texts.jsonl", [5, 6])
    message = refusal(documents_of, path, tokenizer, on_bad_row="skip")
    assert "row 0" in message and "5 is not text" in message


def test_no_row_long_enough(tmp_path, tokenizer):
    """Guards against training on nothing when every row was skipped."""
    path = write_jsonl(tmp_path / "texts.jsonl", [words(10), words(10, 11), None])
    message = refusal(documents_of, path, tokenizer, on_bad_row="skip")
    parts = [str(path), "no row that can be used", "row 0", "2 tokens", "needs 4"]
    assert [part for part in parts if part not in message] == []


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def rows_from(*documents_of_row: list[list[int]]) -> Rows:
    """Rows of literal documents."""
    documents = [document for row in documents_of_row for document in row]
    numbers = iter(range(len(documents)))
    return Rows(raw_texts(documents), [[next(numbers) for _ in row] for row in documents_of_row])


def raw_texts(documents: list[list[int]]) -> datasets.Dataset:
    return table_of([Document(tokens, [(0, len(tokens))]) for tokens in documents])


def alone(documents: datasets.Dataset) -> Rows:
    """One document a row."""
    return Rows(documents, [[document] for document in range(len(documents))])


def packed(documents: datasets.Dataset, sequence_length: int, seed: int) -> Rows:
    return Rows(documents, pack_documents(documents["num_tokens"][:], sequence_length, seed))


def test_make_batch_by_hand():
    """Guards against left padding, padding that is no segment -1, and anchors of the longest row in all rows."""
    rows = rows_from([[10, 11, 12, 13, 14, 15, 16]], [[20, 21, 22, 23]], [[30, 31, 32, 33, 34]])
    anchors = dict(context_length=2, min_completion_prefix=0, stride=2, num_generated=2)
    batch = make_batch(rows, [1, 0], [1, 0], PAD, **anchors)
    assert batch.row_ids == [1, 0]
    assert batch.document_ids.tolist() == [[20, 21, 22, 23, PAD, PAD, PAD], [10, 11, 12, 13, 14, 15, 16]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, -1, -1, -1], [0] * 7]
    # row 1: windows [22 23]; row 0: [12 13], [14 15]; the window at 6 would reach past the end
    assert batch.valid.tolist() == [[True, False], [True, True]]
    assert batch.anchors.tolist()[0][0] == 2 and batch.anchors.tolist()[1] == [2, 4]
    single = make_batch(rows, [1], [1], PAD, **anchors)
    assert single.document_ids.tolist() == [[20, 21, 22, 23]]
    assert single.anchors.tolist() == [[2]] and single.valid.all()


def test_make_batch_of_packed_rows_by_hand():
    """Guards against windows over a document's end, and anchors that count from the row's start, not the document's."""
    rows = rows_from([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25]], [[30, 31, 32, 33]])
    batch = make_batch(rows, [0, 1], [0, 1], PAD, context_length=3, min_completion_prefix=0, stride=1, num_generated=2)
    assert batch.document_ids.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 23, 24, 25], [30, 31, 32, 33] + [PAD] * 7]
    assert batch.segment_ids.tolist() == [[0] * 5 + [1] * 6, [0] * 4 + [-1] * 7]
    # document 0 (tokens 0..4): only 3 (window 3,4). document 1 (tokens 5..10): 8 and 9. Row 1 has 4 tokens: none
    assert batch.anchors[0].tolist() == [3, 8, 9]
    assert batch.valid.tolist() == [[True, True, True], [False, False, False]]


def groups_of(rows: Rows, row_ids: list[int], **anchors) -> list[tuple]:
    """(visible prefix, ground truth) of each valid anchor, as tokens: what a group is, wherever its document stands."""
    batch = make_batch(rows, row_ids, row_ids, PAD, **anchors)
    found = []
    for row, slot in batch.valid.nonzero().tolist():
        ids, segments, anchor = batch.document_ids[row], batch.segment_ids[row], int(batch.anchors[row, slot])
        prefix = ids[:anchor][segments[:anchor] == segments[anchor]]
        truth = ids[anchor : anchor + anchors["num_generated"]]
        found.append((tuple(prefix.tolist()), tuple(truth.tolist())))
    return sorted(found)


@pytest.mark.parametrize("first_anchor, stride, num_generated", [(2, 2, 2), (1, 3, 4), (5, 1, 1), (4, 8, 3)])
def test_packing_changes_no_group(first_anchor, stride, num_generated):
    """Guards against packing that adds, loses or shifts groups."""
    lengths = [8, 9, 20, 12, 31, 8, 15, 10, 11, 24]
    documents = raw_texts([[100 * index + step for step in range(length)] for index, length in enumerate(lengths)])
    anchors = dict(context_length=first_anchor, min_completion_prefix=0, stride=stride, num_generated=num_generated)
    single, together = alone(documents), packed(documents, 32, seed=3)
    expected = groups_of(single, list(range(len(single))), **anchors)
    assert len(together) < len(single)
    assert groups_of(together, list(range(len(together))), **anchors) == expected
    assert sum(len(groups_of(together, [row], **anchors)) for row in range(len(together))) == len(expected)
    by_hand = sum(max(0, (length - num_generated - first_anchor) // stride + 1) for length in lengths)
    assert len(expected) == by_hand


def test_pack_documents():
    """Guards against lost, repeated or cut documents, rows over the limit, and an order that is not the seed's."""
    lengths = [3, 9, 1, 7, 10, 2, 2, 5, 8, 4] * 3
    documents = raw_texts([[index] * length for index, length in enumerate(lengths)])
    together = packed(documents, 10, seed=0)
    found = [document for row in contents(together) for document in row]
    assert sorted(found) == sorted(documents["input_ids"][:])
    assert max(sum(map(len, row)) for row in contents(together)) <= 10
    assert [len(row) for row in pack_documents([5] * 6, 10, seed=0)] == [2, 2, 2]  # a document that just fits is put in
    assert pack_documents(lengths, 10, seed=0) == together.members
    assert pack_documents(lengths, 10, seed=1) != together.members


# ----------------------------------------------------------------------------------------------------------------------
# Order


def step_of(num_rows: int, step: int, rows_per_step: int, seed: int) -> list[int]:
    return rows_of_step(Rows(None, [[]] * num_rows, (seed,)), step, rows_per_step)


@pytest.mark.parametrize("num_rows, rows_per_step", [(10, 4), (7, 7), (5, 8), (12, 1)])
def test_every_row_once_an_epoch(num_rows, rows_per_step):
    """Guards against a dropped remainder, and against epochs that begin anew in the middle of a batch."""
    num_epochs = 4
    steps = range(-(-num_epochs * num_rows // rows_per_step))
    series = [row for step in steps for row in step_of(num_rows, step, rows_per_step, seed=5)]
    epochs = [series[start : start + num_rows] for start in range(0, num_epochs * num_rows, num_rows)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_rows))] * num_epochs
    assert len({tuple(epoch) for epoch in epochs}) == num_epochs  # each epoch in another order


def test_order_does_not_depend_on_how_steps_are_cut():
    """Guards against an order that changes with batch size or number of processes."""
    halves = [step_of(11, step, 2, seed=1) for step in range(20)]
    wholes = [step_of(11, step, 4, seed=1) for step in range(10)]
    assert wholes == [halves[2 * step] + halves[2 * step + 1] for step in range(10)]


def test_order_changes_with_the_seed_only():
    """Guards against an unseeded shuffle, and one that ignores the seed."""
    assert step_of(50, 0, 50, seed=1) == step_of(50, 0, 50, seed=1)
    assert step_of(50, 0, 50, seed=1) != step_of(50, 0, 50, seed=2)
    assert step_of(50, 0, 50, seed=1) != list(range(50))


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers of the rollouts


def test_uniforms_belong_to_the_row():
    """Guards against rollouts that depend on the batch's other rows, their order, or how many anchors they have."""
    together = rollout_uniforms(0, [7, 2, 9], 5, 4, 6)
    assert together.shape == (3, 5, 4, 6)
    assert torch.equal(together[1], rollout_uniforms(0, [2], 5, 4, 6)[0])
    assert torch.equal(together[2], rollout_uniforms(0, [9, 7], 5, 4, 6)[0])
    assert torch.equal(together[0, :2], rollout_uniforms(0, [7], 2, 4, 6)[0])


def test_uniforms_are_uniform_and_differ():
    """Guards against siblings, anchors, rows, steps or seeds that share their numbers, and so draw the same rollout."""
    shape = (10, 8, 25)
    draws = [rollout_uniforms(seed, [key], *shape) for seed, key in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)]]
    numbers = torch.cat(draws).flatten()
    assert numbers.unique().numel() == numbers.numel() == 10_000
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 0.015 and abs(numbers.std().item() - 12**-0.5) < 0.01  # 5 standard errors


# ----------------------------------------------------------------------------------------------------------------------
# Held-out documents


@pytest.fixture
def thirty(tmp_path):
    """30 documents, each of one word of its own, so that a document can be recognised."""
    return write_jsonl(tmp_path / "thirty.jsonl", [words(*[100 + number] * (4 + number % 4)) for number in range(30)])


def names(rows: Rows) -> set[int]:
    return {document[0] for row in contents(rows) for document in row}


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_documents_are_never_trained_on(thirty, tokenizer, packing):
    """Guards against leakage, lost documents, and a held-out set that changes with train.seed (runs could not be
    compared).
    """
    held, data = {}, {"packing": packing, "sequence_length": 24}
    for seed in (0, 1):
        config = config_of(thirty, data=data, evaluation={"num_documents": 6}, train={"seed": seed})
        train, held_out = load_rows(config, tokenizer)
        assert len(held_out) == 6 and all(len(row) == 1 for row in contents(held_out))
        assert names(train) & names(held_out) == set()
        assert names(train) | names(held_out) == set(range(100, 130))
        held[seed] = contents(held_out)
    assert held[0] == held[1]


@pytest.mark.parametrize("source", ["the same", "its own"])
def test_copies_of_held_out_documents_are_not_trained_on(tmp_path, tokenizer, source, capsys):
    """Guards against leakage through texts that a data set holds twice (the standard library does), or through
    eval.dataset being data.dataset.
    """
    path = write_jsonl(tmp_path / "twice.jsonl", [words(*[100 + number // 2] * 6) for number in range(20)])
    evaluation = {"num_documents": 5, **({"dataset": str(path), "split": "train"} if source == "its own" else {})}
    train, held_out = load_rows(config_of(path, evaluation=evaluation), tokenizer)
    assert len(held_out) == 5 and names(train) & names(held_out) == set()
    assert names(train) | names(held_out) == set(range(100, 110))
    assert "copies of held-out ones" in capsys.readouterr().out


def test_held_out_documents_change_with_the_evaluation_seed(thirty, tokenizer):
    """Guards against always holding out the first documents."""
    configs = [config_of(thirty, evaluation={"num_documents": 6, "seed": seed}) for seed in (0, 0, 1)]
    held = [names(load_rows(config, tokenizer)[1]) for config in configs]
    assert held[0] == held[1] != held[2]
    assert held[0] != set(range(100, 106))


def test_evaluation_dataset_of_its_own(thirty, tmp_path, tokenizer):
    """Guards against training documents being taken away, or evaluated on, when eval.dataset is given."""
    other = write_jsonl(tmp_path / "other.jsonl", [words(*[500 + number] * 5) for number in range(8)])
    evaluation = {"dataset": str(other), "split": "train"}
    train, held_out = load_rows(config_of(thirty, evaluation={**evaluation, "num_documents": 5}), tokenizer)
    assert names(train) == set(range(100, 130))
    assert len(names(held_out)) == 5 and names(held_out) <= set(range(500, 508))
    _, everything = load_rows(config_of(thirty, evaluation={**evaluation, "num_documents": 8}), tokenizer)
    assert names(everything) == set(range(500, 508))


@pytest.mark.parametrize("only", [False, True])
def test_default_number_of_held_out_documents(thirty, tmp_path, tokenizer, only):
    """Guards against a small data set being refused, and eval.only choosing other documents than training held out."""
    train, held_out = load_rows(config_of(thirty, evaluation={"num_documents": None, "only": only}), tokenizer)
    assert contents(held_out) == contents(load_rows(config_of(thirty, evaluation={"num_documents": 3}), tokenizer)[1])
    few = write_jsonl(tmp_path / "few.jsonl", [words(*[500 + number] * 5) for number in range(8)])
    train, held_out = load_rows(config_of(few, evaluation={"num_documents": None, "only": only}), tokenizer)
    assert held_out is None and len(train) == 8


def test_no_evaluation(thirty, tokenizer):
    """Guards against documents being held out for nothing."""
    train, held_out = load_rows(config_of(thirty), tokenizer)
    assert held_out is None and len(train) == 30


def test_max_documents(thirty, tokenizer):
    """Guards against data.max_documents being ignored, or counting after the shuffle."""
    train, _ = load_rows(config_of(thirty, data={"max_documents": 7}), tokenizer)
    assert names(train) == set(range(100, 107))


def test_too_few_documents_to_hold_out(thirty, tmp_path, tokenizer):
    """Guards against a run without training data, and against fewer evaluation documents than were asked for."""
    message = refusal(load_rows, config_of(thirty, evaluation={"num_documents": 30}), tokenizer)
    assert "eval.num_documents" in message and "30" in message and str(thirty) in message
    other = write_jsonl(tmp_path / "other.jsonl", [words(*range(10, 15))] * 3)
    evaluation = {"num_documents": 4, "dataset": str(other), "split": "train"}
    message = refusal(load_rows, config_of(thirty, evaluation=evaluation), tokenizer)
    assert "eval.num_documents" in message and "4" in message and str(other) in message and "3" in message
