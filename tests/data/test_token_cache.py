"""When rows are tokenised again, and when the tokens of an earlier load are taken."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pytest
from tokenizers import processors

from ebft_utils.config.data import ColumnsConfig
from ebft_utils.data.documents import Tokenizing
from ebft_utils.data.sources import load_table, training_sources
from ebft_utils.data.tables import cache_key, load_documents
from helpers import ROOT, assert_holds, refusal, tiny_tokenizer, write_rows
from loading import documents_of, strided, structured, texts_of


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


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
    kinds = {"prompt": "question", "completion": "answer", "other": "another"}
    rows = [{key: f"{word} {number}" for key, word in kinds.items()} for number in range(5)]
    return write_rows(tmp_path / "pairs.jsonl", [{**row, "messages": messages} for row in rows])


OWN = "def transform(row, columns):\n    return {'prompt': row['prompt'], 'completion': row['completion'] + '!'}\n"


def test_the_second_load_tokenises_nothing(pairs, tokenizer, tokenised):
    """Guards against minutes of tokenising at each start.

    Settings that have nothing to do with tokens change nothing, and the documents are the same.
    """
    config = structured(pairs)
    first = documents_of(config, tokenizer)
    texts = [(f"question {number}", f"answer {number}") for number in range(5)]
    ids = [[*tokenizer(prompt)["input_ids"], *tokenizer(answer)["input_ids"], 0] for prompt, answer in texts]
    assert tokenised == [5] and first["input_ids"][:] == ids
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
    """Guards against another stride or packing tokenising a corpus again.

    Where the first anchor is does so, because it decides which documents have room.
    """

    def load(**changes) -> None:
        documents_of(strided(pairs, transform="prompt_completion", **changes), tokenizer)

    load()
    load(ebft={"stride": 7})
    load(packing=True)
    load(ebft={"n_samples_per_prompt": 9})
    load(train={"learning_rate": 0.5, "output_dir": "elsewhere"})
    assert tokenised == [5]
    anchors = ({"generate_max_len": 2}, {"context_length": 2}, {"min_completion_prefix": 1})
    others = [*({"ebft": ebft} for ebft in anchors), {"append_eos": False}, {"sequence_length": 63}]
    for count, other in enumerate(others, start=2):
        load(**other)
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
    """Guards against yesterday's tokens of a file, of settings or of a form that are others today.

    And back again, the first ones are still there.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}({{ message['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}({% endif %}"
    )
    before, rows = texts_of(structured(pairs), tokenizer), [json.loads(line) for line in pairs.read_text().splitlines()]
    assert tokenised == [5]
    if CHANGES[change] is None:
        rows = [*rows[:4], {**rows[4], "completion": "answer 5"}] if change == "content" else [*rows, rows[0]]
        os.utime(
            write_rows(pairs, rows), ns=(0, pairs.stat().st_mtime_ns + 10**9)
        )  # where a file system counts in seconds
        settings, same = {}, False
    else:
        settings, same = CHANGES[change]
    changed = structured(write_rows(tmp_path / "other.jsonl", rows) if change == "another file" else pairs, **settings)
    after = texts_of(changed, tokenizer)
    assert (after == before) == same
    assert tokenised == [5, {"a row more": 6, "max_documents": 4, "split": 4}.get(change, 5)]
    assert tokenised[-1] == len(after)
    assert texts_of(changed, tokenizer) == after and len(tokenised) == 2
    if CHANGES[change] is not None:
        assert texts_of(structured(pairs), tokenizer) == before and len(tokenised) == 2


def test_the_other_mode_tokenises_again(pairs, tokenizer, tokenised):
    """Guards against the limits of one mode being taken for those of the other.

    A document without room for an anchor is usable in structured mode.
    """
    assert len(documents_of(structured(pairs), tokenizer)) == 5
    config = strided(pairs, transform="prompt_completion", ebft={"context_length": 50})
    assert "have no room for one anchor" in refusal(documents_of, config, tokenizer)
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
        begins = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
        tokenizer.backend_tokenizer.post_processor = begins
    return tokenizer


@pytest.mark.parametrize("change", ["token", "end", "template", "beginning"])
def test_another_tokenizer_tokenises_again(pairs, tokenised, change):
    """Guards against the ids of another vocabulary: the most harmful mistake a cache can make."""
    first, second = tiny_tokenizer(), changed_tokenizer(change)
    before, after = (documents_of(structured(pairs), tokenizer)["input_ids"][:] for tokenizer in (first, second))
    assert tokenised == [5, 5] and (before != after) == (change != "template")
    # what a call leaves behind in a tokenizer is no other tokenizer
    first(["a text"], truncation=True, max_length=3, padding=True)
    assert documents_of(structured(pairs), first)["input_ids"][:] == before and tokenised == [5, 5]


def test_bad_rows_are_told_again_by_the_cache(tmp_path, tokenizer, tokenised, capsys):
    """Guards against a warning that only the first of many runs gives, and a refused load that leaves something."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": text} for text in ("b", "")])
    empty = "row 1, column 'completion': '' is empty"
    for _ in range(2):
        assert empty in refusal(documents_of, structured(path), tokenizer)
    assert tokenised == [2, 2]
    for _ in range(2):
        assert texts_of(structured(path, on_bad_row="skip"), tokenizer) == ["ab<eos>"]
        assert capsys.readouterr().out == f"data: 1 of 2 rows of {str(path)!r} left out: 1 like {empty}\n"
    assert tokenised == [2, 2, 2]


def keys_of(places: list[tuple[str, str, str]]) -> list[str]:
    """What tokenised tables of these (dataset, split, transform) are kept under."""
    configs = [strided(dataset, split=split, transform=transform) for dataset, split, transform in places]
    sources = [(config, source) for config in configs for source in training_sources(config)]
    return [cache_key(config, tiny_tokenizer(), source, load_table(source)) for config, source in sources]


def test_another_process_finds_the_cache(pairs, tmp_path):
    """Guards against a key that holds something of one process (an address, the order of a set).

    With it every run would tokenise again.
    """
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 4).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "mine.py").write_text(OWN)
    own = f"{tmp_path / 'mine.py'}:transform"
    places = [
        (str(pairs), "train", "prompt_completion"),
        (str(tmp_path / "saved"), "train[1:]", "prompt_completion"),
        (str(pairs), "train", own),
        ("python_stdlib", "train[:9]", "text"),
    ]
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "data")))
    environment = {**os.environ, "PYTHONPATH": folders, "PYTHONHASHSEED": "5"}
    script = f"import test_token_cache; print(*test_token_cache.keys_of({places!r}), sep='\\n')"
    command, pipes = [sys.executable, "-c", script], {"capture_output": True, "text": True}
    there = subprocess.run(command, **pipes, check=True, timeout=120, env=environment).stdout.split()
    assert there == keys_of(places) and len(set(there)) == 4


# ----------------------------------------------------------------------------------------------------------------------
# A damaged cache


DAMAGES = ["a bit", "half", "no sums", "other sums", "no file"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(pairs, tokenizer, tokenised, cache, capsys, damage):
    """Guards against a traceback, and against training on other tokens without a word."""
    config = structured(pairs)
    before = load_documents(config, tokenizer, *training_sources(config))[:]
    (file,) = (cache / "ebft").rglob("*.arrow")
    sums, content = file.with_name("SHA256SUMS"), bytearray(file.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "half":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "no sums":  # a run that was killed before it wrote them
        sums.unlink()
    elif damage == "other sums":
        sums.write_text("what is this\n")
    else:
        file.unlink()
    capsys.readouterr()
    number = len(tokenised)
    assert load_documents(config, tokenizer, *training_sources(config))[:] == before
    assert len(tokenised) > number
    said = capsys.readouterr().out
    assert f"{file.parent} is damaged" in said and "tokenised again" in said
    load_documents(config, tokenizer, *training_sources(config))
    assert "damaged" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Damaged caches


def cache_of(documents) -> Path:
    """The folder that a table lies in."""
    return Path(documents.cache_files[0]["filename"]).parent


def flipped(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def assert_made_again(config, tokenizer, tokenised, capsys, ids, folder, *words) -> None:
    """The next load names the damage and tokenises; the one after it takes the cache without a word."""
    capsys.readouterr()
    assert documents_of(config, tokenizer)["input_ids"][:] == ids and tokenised == [5, 5]
    said = capsys.readouterr().out
    assert said.startswith(f"data: the cache of tokens {folder} is damaged (") and said.count("\n") == 1
    assert_holds(said, "thrown away, and tokenised again", *words)
    assert documents_of(config, tokenizer)["input_ids"][:] == ids and tokenised == [5, 5]
    assert capsys.readouterr().out == ""
    assert {path.name for path in folder.iterdir()} == {"tokens.arrow", "SHA256SUMS", ".lock"}


@pytest.mark.parametrize("place", [number / 16 for number in range(17)])
def test_a_flipped_bit_tokenises_again(pairs, tokenizer, tokenised, capsys, place):
    """Guards against other tokens than those of the text, without a word, and against a traceback out of arrow."""
    config = structured(pairs)
    documents = documents_of(config, tokenizer)
    ids, folder = documents["input_ids"][:], cache_of(documents)
    flipped(folder / "tokens.arrow", place)
    assert_made_again(config, tokenizer, tokenised, capsys, ids, folder, "tokens.arrow is not what was written")


@pytest.mark.parametrize(
    "damage", ["no sums", "cut", "empty", "gone", "sums cut", "sums flipped", "sums of bytes", "sums a FIFO", "a link"]
)
def test_a_half_written_cache_tokenises_again(pairs, tokenizer, tokenised, capsys, damage):
    """Guards against half a table of a run that was killed."""
    config = structured(pairs)
    documents = documents_of(config, tokenizer)
    ids, folder = documents["input_ids"][:], cache_of(documents)
    table, sums = folder / "tokens.arrow", folder / "SHA256SUMS"
    (folder / "tmpabcdefgh").write_bytes(b"half a table")  # what datasets leaves
    if damage == "no sums":
        sums.unlink()
    elif damage == "cut":
        table.write_bytes(table.read_bytes()[:-100])
    elif damage == "empty":
        table.write_bytes(b"")
    elif damage == "gone":
        table.unlink()
    elif damage == "sums cut":
        sums.write_bytes(sums.read_bytes()[:30])
    elif damage == "sums flipped":
        flipped(sums, 0.1)
    elif damage == "sums of bytes":
        sums.write_bytes(b"\xff\xfe  tokens.arrow\n")
    elif damage == "sums a FIFO":
        sums.unlink()
        os.mkfifo(sums)
    else:
        table.unlink()
        table.symlink_to(folder)
    assert_made_again(config, tokenizer, tokenised, capsys, ids, folder)


def test_a_table_of_several_processes_is_checked_too(pairs, tokenizer, capsys):
    """Guards against a checksum of the first part alone."""
    config = structured(pairs, num_proc=2)
    documents = documents_of(config, tokenizer)
    ids, folder = documents["input_ids"][:], cache_of(documents)
    parts = sorted(folder.glob("*.arrow"))
    assert len(parts) == 2
    capsys.readouterr()
    assert documents_of(structured(pairs), tokenizer)["input_ids"][:] == ids and capsys.readouterr().out == ""
    for damage in (lambda: flipped(parts[1], 0.5), parts[1].unlink):
        damage()
        assert documents_of(config, tokenizer)["input_ids"][:] == ids
        assert f"{folder} is damaged" in capsys.readouterr().out


def test_two_runs_tokenise_the_same_text_once(pairs, tokenizer, tokenised, tmp_path, capsys):
    """Guards against a run that throws away the table which another one is just making."""
    config = structured(pairs)
    documents = documents_of(config, tokenizer)
    ids, folder = documents["input_ids"][:], cache_of(documents)
    (folder / "SHA256SUMS").rename(tmp_path / "sums")
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def end() -> None:
            (tmp_path / "sums").rename(folder / "SHA256SUMS")
            fcntl.flock(lock, fcntl.LOCK_UN)

        other = threading.Timer(1.0, end)
        other.start()
        assert documents_of(config, tokenizer)["input_ids"][:] == ids and tokenised == [5]
        other.join()
    assert f"another run is at work on the same tokens, in {folder}" in capsys.readouterr().out
