"""What of the data is not trained on, and that it is said: long documents, bad rows, many held-out documents."""

import json
import re
from collections import Counter

import pytest

from ebft_utils.config.data import ColumnsConfig, MixedSourceConfig
from ebft_utils.data.rows import load_rows
from ebft_utils.data.sources import check_sources, training_sources
from ebft_utils.data.tables import load_documents, share_of
from ebft_utils.run.preview import count
from helpers import refusal, write_rows
from loading import strided, structured

END, LIMIT = 0, 8
ROOM = {"context_length": 2, "generate_max_len": 2}  # an anchor needs 4 tokens


def words(first: int, length: int) -> str:
    return " ".join(f"w{first + step}" for step in range(length))


def short(source, **changes):
    """Strided mode with 8 tokens in a row."""
    return strided(source, **{"sequence_length": LIMIT, "ebft": ROOM, **changes})


def tokens_of(rows) -> list[list[int]]:
    return [[token for document in rows[row] for token in document.tokens] for row in range(len(rows))]


@pytest.fixture
def texts(tmp_path):
    """Texts of 7, 8, 9, 12, 20 and 4 tokens, none of them with a token of another."""
    firsts = {10: 7, 17: 8, 25: 9, 34: 12, 46: 20, 66: 4}
    return write_rows(tmp_path / "texts.jsonl", [{"text": words(*text)} for text in firsts.items()])


# ----------------------------------------------------------------------------------------------------------------------
# Long documents


def test_pieces_are_the_text_in_order(texts, by_word, capsys):
    """Guards against tokens that are lost, come twice or stand in another order, an end-of-text token in the middle,
    and a count that is not that of the tokens.
    """
    longer = f"data: 4 of 6 documents of {str(texts)!r} are longer than data.sequence_length 8"
    expected = [
        [*range(10, 17), END],
        [*range(17, 25)],  # its end-of-text token alone has no room for an anchor
        [*range(25, 33)],  # neither have its last token and the end
        [*range(34, 42)],
        [*range(42, 46), END],
        [*range(46, 54)],
        [*range(54, 62)],
        [*range(62, 66), END],
        [*range(66, 70), END],
    ]
    (source,) = training_sources(short(texts))
    found = load_documents(short(texts), by_word, source)
    assert found["input_ids"][:] == expected
    assert found["piece"][:] == [0, 0, 0, 0, 1, 0, 1, 2, 0]
    split = "split into 7 rows, 4.5 % of the tokens are not used (last pieces without room for an anchor)"
    assert source.notes == [f"{longer}: {split}"]  # 3 of 66
    (source,) = training_sources(short(texts, long_documents="cut"))
    found = load_documents(short(texts, long_documents="cut"), by_word, source)
    assert found["input_ids"][:] == [expected[number] for number in (0, 1, 2, 3, 5, 8)]
    cut = "cut, 32 % of the tokens are not used (data.long_documents: split would use them)"
    assert source.notes == [f"{longer}: {cut}"]  # 21 of 66
    assert capsys.readouterr().out == f"{longer}: {split}\n{longer}: {cut}\n"
    assert load_documents(short(texts, append_eos=False), by_word, source)["input_ids"][:2] == [
        expected[0][:7],
        expected[1],
    ]


def test_answers_that_lose_their_end_are_counted(tmp_path, by_word):
    """Guards against a prompt with its answer in pieces, and against an end that is lost without a word."""
    rows = [{"prompt": words(10, 2), "completion": words(20, length)} for length in (4, 5, 6, 20)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    (source,) = training_sources(config := short(path, transform="prompt_completion"))
    found = load_documents(config, by_word, source)["input_ids"][:]
    assert found == [[10, 11, *range(20, 24), END], [10, 11, *range(20, 25), END], *[[10, 11, *range(20, 26)]] * 2]
    # of 7 + 8 + 9 + 23 tokens 1 + 15
    lost = "are longer than data.sequence_length 8: cut, 2 answers lost the end, 34 % of the tokens are not used"
    said = f"data: 2 of 4 documents of {str(path)!r} {lost}; raise data.sequence_length to keep them"
    assert source.notes == [said]
    (source,) = training_sources(config := structured(path))
    assert len(load_documents(config, by_word, source)) == 4 and source.notes == []


def test_turns_that_lose_their_end(tmp_path, by_word):
    """Guards against counting a conversation's last answer alone."""
    turns = [{"prompt": words(30, 2), "completion": words(40, 3)}] * 2
    path = write_rows(tmp_path / "turns.jsonl", [{"prompt": "w10", "completion": words(20, 4), "turns": turns}])
    data = {"transform": "prompt_completion", "columns": ColumnsConfig(turns="turns")}
    (source,) = training_sources(config := short(path, **data))
    load_documents(config, by_word, source)
    assert source.notes[0].startswith(f"data: 1 of 1 documents of {str(path)!r} is longer than")
    assert "cut, 2 answers lost the end, 56 % of the tokens are not used" in source.notes[0]  # 10 of 18


OWN = """
def transform(row, columns):
    return row["pair"] or {"text": row["text"]}
"""


def test_an_own_transform_of_both_forms(tmp_path, by_word):
    """Guards against splitting by data.transform's name in place of what a row is."""
    (tmp_path / "mine.py").write_text(OWN)
    rows = [{"text": words(10, 15), "pair": None}, {"text": "", "pair": {"prompt": "w70", "completion": words(30, 15)}}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (source,) = training_sources(config := short(path, transform=f"{tmp_path / 'mine.py'}:transform"))
    found = load_documents(config, by_word, source)["input_ids"][:]
    assert found == [[*range(10, 18)], [*range(18, 25), END], [70, *range(30, 37)]]
    assert ["split into 2 rows, 0 %" in source.notes[0], "1 answer lost the end, 27 %" in source.notes[1]] == [True] * 2


@pytest.fixture
def thirty(tmp_path):
    """30 texts of 4 to 33 tokens. The first token names the text, and is in each of its pieces."""
    rows = [{"text": " ".join([f"w{10 + number}"] * (4 + number))} for number in range(30)]
    return write_rows(tmp_path / "thirty.jsonl", rows)


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_texts_are_whole(thirty, by_word, packing):
    """Guards against a text that is trained on in part and evaluated in part, and against held-out documents that
    depend on data.long_documents.
    """
    found = {}
    for how in ("split", "cut"):
        config = short(thirty, long_documents=how, packing=packing, evaluation={"num_documents": 6})
        found[how] = [tokens_of(rows) for rows in load_rows(config, by_word)]
    (split, held_out), (cut, held_out_of_cut) = found["split"], found["cut"]
    assert held_out == held_out_of_cut and len(held_out) == 6 and max(map(len, held_out)) == LIMIT
    names = {row[0] for row in held_out}
    trained = Counter(token for row in split for token in row)
    assert names & trained.keys() == set() and sum(map(len, cut)) < sum(map(len, split))
    for number in set(range(30)) - {name - 10 for name in names}:
        length = 4 + number
        rest = (length + 1) % LIMIT  # tokens and end-of-text token of the last piece
        assert trained[10 + number] == length - (rest - 1 if 0 < rest < 4 else 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_copies_of_held_out_texts_are_left_out_whole(tmp_path, by_word, streaming):
    """Guards against a text whose beginning is evaluated and whose rest is trained on, under another row."""
    rows = [{"text": words(10 + 3 * (number // 2), 20)} for number in range(16)]
    path = write_rows(tmp_path / "twice.jsonl", rows)
    train, held_out = load_rows(short(path, streaming=streaming, evaluation={"num_documents": 3}), by_word)
    evaluated = {row[0] for row in tokens_of(held_out)}
    number = 2 * (8 - len(evaluated))  # texts that are left, 3 pieces each
    trained = [train[train.row_at(position)][0] for position in range(3 * number)]
    firsts = Counter(document.tokens[0] for document in trained if document.piece == 0)
    assert firsts == dict.fromkeys({10 + 3 * text for text in range(8)} - evaluated, 2)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_of_long_texts(thirty, by_word, packing):
    """An epoch of a stream in one block has the rows of the whole table; and it goes on from any place."""
    config = short(thirty, packing=packing)
    stream, table = (load_rows(short(thirty, packing=packing, streaming=on), by_word)[0] for on in (True, False))
    pieces = Counter(tuple(found.tokens) for row in range(len(table)) for found in table[row])
    assert sum(pieces.values()) == 75 and count(config, table)[0].documents == 30
    assert Counter(tuple(found.tokens) for row in stream.blocks[0] for found in row) == pieces
    assert stream.notes == [note.replace("30 documents", "the first 30 documents") for note in table.notes]

    def blocks():
        return load_rows(short(thirty, packing=packing, streaming=True, shuffle_buffer=4), by_word)[0]

    rows = blocks()
    unbroken = [rows[position] for position in range(150)]
    for position in (1, 17, 50, 90, 131):
        before, after = blocks(), blocks()
        assert [before[at] for at in range(position)] == unbroken[:position]
        after.go_on_from(json.loads(json.dumps(before.places)), position)
        assert [after[at] for at in range(position, 150)] == unbroken[position:]
        assert position < 90 or "the first" not in "".join(after.notes)  # a resumed run counts from its place


def test_texts_of_evaluation_are_not_split(texts, thirty, by_word):
    """Guards against a note, and so a model card, of pieces that nobody evaluates."""
    evaluation = {"dataset": str(thirty), "num_documents": 5}
    rows, held_out = load_rows(short(texts, evaluation=evaluation), by_word)
    (note,) = [note for note in rows.notes if str(thirty) in note]
    assert note.endswith("are longer than data.sequence_length 8: the beginning of each is evaluated")
    assert len(held_out) == 5 and max(map(len, tokens_of(held_out))) == LIMIT


def test_max_documents_counts_texts(texts, by_word):
    """Guards against data.max_documents that counts pieces, and default evaluation numbers that do."""
    config = short(texts, max_documents=5, evaluation={"num_documents": 1})
    train, held_out = load_rows(config, by_word)
    assert len(held_out) == 1 and len({tuple(row) for row in tokens_of(train) + tokens_of(held_out)}) > 5
    message = refusal(load_rows, short(texts, evaluation={"num_documents": 6}), by_word)
    assert "6 cannot be taken out of the 6 usable documents" in message


def test_long_texts_make_no_noise(texts, by_word, capfd):
    """Guards against the tokenizer's warning of a text that is longer than the model reads."""
    by_word.model_max_length = 6
    load_rows(short(texts), by_word)
    assert "longer than the specified maximum" not in capfd.readouterr().err


def test_shares():
    """Guards against 100 % of the tokens where some are used, and 0 % where some are not."""
    pairs = [(0, 9), (1, 10**6), (4, 90), (89, 100), (99_999, 100_000), (5, 5), (0, 0)]
    assert [share_of(*pair) for pair in pairs] == ["0 %", "0.1 %", "4.4 %", "89 %", "99.9 %", "100 %", "0 %"]


# ----------------------------------------------------------------------------------------------------------------------
# Bad rows, held-out rows


@pytest.fixture
def mostly_bad(tmp_path):
    """57 of 60 rows are too short or no text."""
    texts = [words(10, 5)] * 3 + ["w10"] * 50 + [None] * 7
    return write_rows(tmp_path / "mostly_bad.jsonl", [{"text": text} for text in texts])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_of_mostly_bad_rows_stops(mostly_bad, by_word, streaming):
    """Guards against a run that trains on three rows as if all were well."""
    skip = {"on_bad_row": "skip", "streaming": streaming}
    message = refusal(load_rows, short(mostly_bad, **skip), by_word)
    first = "the first " if streaming else ""
    many = f"data: 57 of {first}60 rows of {str(mostly_bad)!r} are bad: 95 %, and data.max_skipped is 0.5: "
    assert message.startswith(f"{many}50 like row 3, column 'text': 2 tokens have no room for one anchor")
    assert "; 7 like row 53, column 'text': None is not text" in message and "or raise data.max_skipped" in message
    assert refusal(load_rows, short(mostly_bad, **skip, max_skipped=0.94), by_word).startswith("data: 57 of")
    for _ in range(2):  # from the cache, too
        rows, _ = load_rows(short(mostly_bad, **skip, max_skipped=0.95), by_word)
        left_out = f"data: 57 of {first}60 rows of {str(mostly_bad)!r} left out: 50 like row 3"
        assert [note[: len(left_out)] for note in rows.notes] == [left_out]


@pytest.mark.parametrize("block_size", [1, 3, 7, 12])
def test_a_stream_is_judged_by_more_than_its_first_rows(tmp_path, by_word, block_size):
    """Guards against a stop at the first bad rows of a good stream, and a bad stream that never stops."""
    for number, (bad, good) in enumerate([(4, 8), (8, 4)]):
        rows = write_rows(tmp_path / f"{number}.jsonl", [{"text": "w10"}] * bad + [{"text": words(10, 5)}] * good)
        config = short(rows, on_bad_row="skip", streaming=True, shuffle_buffer=block_size)

        def two_epochs(config=config, good=good):
            stream, _ = load_rows(config, by_word)
            return [stream[position] for position in range(2 * good)]

        if bad < good:
            assert len(two_epochs()) == 16
        else:
            assert "8 of the first 12 rows" in refusal(two_epochs)


def test_rows_that_the_transform_leaves_out_are_not_bad(tmp_path, by_word):
    """Guards against a filter that the user wrote being taken for bad data, and against it hiding bad data."""
    (tmp_path / "mine.py").write_text('def transform(row, columns):\n    return row["n"] and {"text": row["n"]}\n')
    own = {"transform": f"{tmp_path / 'mine.py'}:transform", "on_bad_row": "skip"}
    rows = [{"n": None}] * 50 + [{"n": words(10, 5)}] * 4 + [{"n": "w10"}] * 4
    train, _ = load_rows(short(write_rows(tmp_path / "rows.jsonl", rows), **own), by_word)
    assert len(train) == 4 and "54 of 58 rows" in train.notes[0]
    message = refusal(load_rows, short(write_rows(tmp_path / "more.jsonl", [*rows, {"n": "w10"}]), **own), by_word)
    assert "5 of 9 rows" in message and "are bad: 56 %" in message


def test_bad_rows_of_evaluation_count_too(tmp_path, mostly_bad, texts, by_word):
    """Guards against an evaluation on three rows of sixty, and notes without those of eval.dataset."""
    evaluation = {"dataset": str(mostly_bad), "num_documents": 2}
    message = refusal(load_rows, short(texts, on_bad_row="skip", evaluation=evaluation), by_word)
    assert message.startswith("eval: 57 of 60 rows")
    train, _ = load_rows(short(texts, on_bad_row="skip", max_skipped=1, evaluation=evaluation), by_word)
    assert [re.split(" of | rows | are ", note)[:2] for note in train.notes] == [
        ["data: 4", "6 documents"],
        ["data: 57", "60"],
    ]


def test_many_held_out_documents_are_said(thirty, by_word, capsys):
    """Guards against a run that holds out half of its data without a word, and against saying it of a usual share."""
    train, _ = load_rows(short(thirty, evaluation={"num_documents": 12}), by_word)
    share = f"data: 12 of 30 documents of {str(thirty)!r} (40 %) are held out and not trained on (eval.num_documents)"
    assert train.notes[-1] == f"{share}; a tenth is usually enough"
    assert train.notes[-1] in capsys.readouterr().out
    for evaluation in ({"num_documents": 6}, {"num_documents": 12, "only": True}, {"num_documents": None}):
        train, _ = load_rows(short(thirty, evaluation=evaluation), by_word)
        assert not [note for note in train.notes if "held out" in note]


def test_notes_of_a_mixture(texts, thirty, by_word):
    """Guards against the notes of the first source alone."""
    mix = [MixedSourceConfig(str(texts)), MixedSourceConfig(str(thirty))]
    train, _ = load_rows(short("", mix=mix, evaluation={"num_documents": 4}), by_word)
    kinds = [("4 of 6 documents" in note, str(thirty) in note, "held out" in note) for note in train.notes]
    assert kinds == [(True, False, False), (False, False, True), (False, True, False)]


# ----------------------------------------------------------------------------------------------------------------------
# Led to the right setting


@pytest.mark.parametrize(
    "columns, fitting",
    [
        (["prompt", "completion"], "data.transform=prompt_completion"),
        (["id", "messages"], "data.transform=chat"),
        (["conversations"], "data.transform=chat data.columns.messages=conversations"),
        (["body"], "data.columns.text, or another data.transform than text"),
    ],
)
def test_columns_of_another_transform(tmp_path, by_word, columns, fitting):
    """Guards against leading a file of prompts to data.columns.text=completion."""
    path = write_rows(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "w10")])
    message = refusal(load_rows, strided(path), by_word)
    assert message == f"data: {str(path)!r} has no column 'text'; it has {', '.join(columns)}: set {fitting}"


def test_a_folder_of_other_files(tmp_path, by_word):
    """Guards against a message that leaves open what the folder holds."""
    for name in ("a.md", "b.md", "deeper/c.md", "d.txt", ".git/config", ".git/e.py.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(words(10, 5))
    holds = f"data: the folder {tmp_path} holds no file that matches data.file_pattern '*.py'"
    held = f"{holds}; its files are 3 .md, 1 .txt: set data.file_pattern='*.md'"
    assert refusal(load_rows, strided(tmp_path), by_word) == held
    assert len(load_rows(strided(tmp_path, file_pattern="*.md"), by_word)[0]) == 3
    (tmp_path / "new").mkdir()
    assert (
        refusal(check_sources, strided(tmp_path / "new"))
        == f"{holds.replace(str(tmp_path), str(tmp_path / 'new'))}: it is empty"
    )


def test_sources_are_looked_at_first(tmp_path, texts):
    """Guards against a tokenizer and a model that are read before a missing file is noticed."""
    gone = {"dataset": str(tmp_path / "gone.jsonl")}
    does_not_exist = f"the file {gone['dataset']} does not exist"
    assert refusal(check_sources, strided(gone["dataset"])) == f"data: {does_not_exist}"
    assert refusal(check_sources, strided(texts, evaluation=gone)) == f"eval: {does_not_exist}"
    assert (
        refusal(check_sources, strided(mix=[MixedSourceConfig(str(texts)), MixedSourceConfig(**gone)]))
        == f"data.mix[1]: {does_not_exist}"
    )
    assert "there is no file gone.py" in refusal(check_sources, strided(texts, transform="gone.py:function"))
    assert "is neither a folder nor a file" in refusal(check_sources, strided("./gone"))
    for dataset in (texts, "python_stdlib", "some/rows"):
        check_sources(strided(dataset))
