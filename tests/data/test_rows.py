"""Which rows a step trains on: mixtures and streams, also after a resume and on several processes; the dry run."""

import json
import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft_utils.config.modes import load_config
from ebft_utils.data.documents import Document
from ebft_utils.data.rows import MixedRows, Rows, load_rows, rows_of_step
from ebft_utils.data.streams import StreamedRows
from ebft_utils.data.tables import table_of
from ebft_utils.models import load_tokenizer
from ebft_utils.run.preview import anchors_in, marked
from helpers import (
    assert_close_runs,
    assert_equal_weights,
    assert_holds,
    assert_trained,
    end_of,
    error_of,
    steps_of,
    training,
    write_rows,
)
from train_strided import main


def rows_named(first: int, number: int, seed: tuple[int, ...] = (0,)) -> Rows:
    """Rows of one token each: first, first + 1, .."""
    documents = table_of([Document([first + index], [(0, 1)]) for index in range(number)])
    return Rows(documents, [[index] for index in range(number)], seed)


def tokens_at(rows, positions) -> list[int]:
    return [rows[rows.row_at(position)][0].tokens[0] for position in positions]


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures


SHARES = [
    ([1.0, 1.0], [500, 500]),
    ([3.0, 1.0], [750, 250]),
    ([1.0, 1.0, 1.0], [334, 333, 333]),
    ([0.6991, 0.2998, 0.0011], [699, 300, 1]),
]


@pytest.mark.parametrize("weights_, expected", SHARES)
def test_every_source_has_its_share(weights_, expected):
    """Guards against shares that are right on average only, or weights that are taken as probabilities."""
    sources = [rows_named(10_000 * (number + 1), 7) for number in range(len(weights_))]
    mixed = MixedRows(sources, weights_, seed=3)
    for block in (0, 1, 5):
        turns = Counter(mixed.row_at(position)[0] for position in range(1000 * block, 1000 * (block + 1)))
        assert [turns[number] for number in range(len(weights_))] == expected


def test_a_mixture_is_each_source_in_its_own_order():
    """Guards against rows that are drawn twice or left out in an epoch of their source, and against an order that
    depends on how steps are cut.
    """
    first, second = rows_named(100, 7, (5, 0)), rows_named(200, 11, (5, 1))
    mixed = MixedRows([first, second], [0.4, 0.6], seed=5)
    series = tokens_at(mixed, range(2500))
    for source, start in ((first, 100), (second, 200)):
        own = [token for token in series if start <= token < start + 100]
        assert own == tokens_at(source, range(len(own)))
        size = len(source)
        epochs = [own[at : at + size] for at in range(0, len(own) - size, size)]
        assert all(sorted(epoch) == list(range(start, start + size)) for epoch in epochs)
    assert [mixed[row][0].tokens[0] for step in range(10) for row in rows_of_step(mixed, step, 250)] == series
    assert series != tokens_at(MixedRows([first, second], [0.4, 0.6], seed=6), range(2500))
    assert series[:1000] != [token for token in series[1000:2000]]


# ----------------------------------------------------------------------------------------------------------------------
# Streams


def stream_of(contents: list[int | None], block_size: int, keep: int = 8, opened: list | None = None) -> StreamedRows:
    """A stream of documents of one token; None is a row that cannot be used."""

    def open_at(number):
        if opened is not None:
            opened.append(number)
        return iter([{"token": token} for token in contents[number:]])

    def make(rows, first):
        assert [row["token"] for row in rows] == contents[first : first + len(rows)]
        return [Document([row["token"]], [(0, 1)]) for row in rows if row["token"] is not None]

    def pack(documents, seed):
        generator = torch.Generator().manual_seed(hash(tuple(seed)) % 2**31)
        return [[documents[index]] for index in torch.randperm(len(documents), generator=generator).tolist()]

    return StreamedRows("data: 'it'", open_at, make, pack, block_size, (0,), keep)


def test_a_stream_gives_every_usable_row_once_an_epoch():
    """Guards against lost rows at a block's or the stream's end, unshuffled blocks, and epochs in one order.

    Some blocks are empty.
    """
    contents = [None if number % 5 == 0 or 8 <= number < 12 else number for number in range(23)]
    usable = [token for token in contents if token is not None]
    rows = stream_of(contents, block_size=4)
    epochs = [tokens_at(rows, range(len(usable) * epoch, len(usable) * (epoch + 1))) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == usable
        place = 0
        for start in range(0, 23, 4):  # the rows of a block stay together
            block = [token for token in contents[start : start + 4] if token is not None]
            assert sorted(epoch[place : place + len(block)]) == block
            place += len(block)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("position", [0, 1, 6, 7, 16, 17, 40, 65])
def test_a_stream_goes_on_from_a_checkpoint(position):
    """Guards against a resumed stream that repeats or skips rows, or reads all that came before."""
    contents = [None if number % 5 == 0 else number for number in range(23)]
    unbroken = tokens_at(stream_of(contents, 4), range(80))
    before = stream_of(contents, 4)
    assert tokens_at(before, range(position)) == unbroken[:position]
    places = json.loads(json.dumps(before.places))
    opened = []
    after = stream_of(contents, 4, opened=opened)
    opened.clear()
    after.go_on_from(places, position)
    assert tokens_at(after, range(position, 80)) == unbroken[position:]
    expected = max((place for place in places if place[2] <= position), key=lambda place: place[2])
    assert opened[0] == 4 * expected[1] and (position < 20 or opened[0] > 0 or expected[2] > 0)


def test_a_stream_keeps_only_what_is_asked_for():
    """Guards against a stream that holds all it has read, or drops the step at work while the next is prepared."""
    rows = stream_of(list(range(1000)), block_size=10, keep=30)
    for step in range(60):
        ahead = tokens_at(rows, range(10 * (step + 1), 10 * (step + 2)))
        assert tokens_at(rows, range(10 * step, 10 * step + 10)) and ahead
        assert len(rows.blocks) == len(rows.places) <= 6


def test_a_stream_without_usable_rows_ends():
    """Guards against an endless search, at the start and in a stream that is empty."""
    for contents in ([], [None] * 9):
        with pytest.raises(Exception, match="'it' has no row that can be used"):
            stream_of(contents, 4)[0]


def test_a_mixture_of_streams_goes_on():
    """Guards against one source of several that begins anew."""

    def mixture():
        streams = [stream_of(list(range(100, 113)), 4), stream_of(list(range(200, 207)), 4)]
        return MixedRows(streams, [0.3, 0.7], seed=1)

    unbroken, before, after = tokens_at(mixture(), range(200)), mixture(), mixture()
    tokens_at(before, range(90))
    after.go_on_from(json.loads(json.dumps(before.places)), 90)
    assert tokens_at(after, range(90, 200)) == unbroken[90:]


def test_a_stream_holds_the_documents_of_its_file(write_config, text_file):
    """Streamed or not: the same documents; held-out ones are the first, and no copy of them is trained on."""
    changes = dict(data__streaming=True, data__shuffle_buffer=7, eval__num_documents=5)
    config = load_config(str(write_config(**changes)))
    tokenizer = load_tokenizer(config.model)
    stream, held_out = load_rows(config, tokenizer)
    whole, _ = load_rows(load_config(str(write_config(eval__num_documents=0))), tokenizer)
    documents = [whole[row][0].tokens for row in range(len(whole))]
    held = [held_out[row][0].tokens for row in range(5)]
    assert held == documents[:5]
    expected = sorted(document for document in documents if document not in held)
    for epoch in range(2):
        positions = range(epoch * len(expected), (epoch + 1) * len(expected))
        assert sorted(stream[stream.row_at(position)][0].tokens for position in positions) == expected
    other = load_config(str(write_config(**{**changes, "data__shuffle_buffer": 8})))
    again, different = (load_rows(each, tokenizer)[0].fingerprint() for each in (config, other))
    assert stream.fingerprint() == again != different


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def mix(text_file, tmp_path) -> list[dict]:
    """The text, and prompts with completions, by weight."""
    pairs = [(f"{number} and one", f" make {number + 1}, as everybody knows") for number in range(15)]
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    columns = {"prompt": "question", "completion": "answer"}
    prompts = {"dataset": str(path), "weight": 1, "transform": "prompt_completion", "columns": columns}
    return [{"dataset": str(text_file), "weight": 2}, prompts]


@pytest.fixture
def mixed(train, mix):
    """train() on the mixture, streamed or not."""

    def run(name: str, *overrides: str, **changes):
        settings = {
            "data__dataset": "",
            "data__mix": mix,
            "data__shuffle_buffer": 6,
            "data__streaming": True,
            "train__max_steps": 8,
            "train__batch_size": 4,
            "ebft__ce_coef": 0.3,
        }
        return train(name, *overrides, **{**settings, **changes})

    return run


PACKED = {"data__packing": True, "data__sequence_length": 96}


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["documents", "packed"])
def test_a_resumed_stream_equals_the_unbroken_run(mixed, changes, model_folder):
    """To the last bit, with a mixture of two streams that begin anew several times."""
    whole = mixed("whole", **changes)
    assert_trained(whole, load_file(model_folder / "model.safetensors"))
    mixed("parts", "train.max_steps=5", "train.save_steps=5", **changes)
    parts = mixed("parts", "train.resume=latest", **changes)
    assert_equal_weights(whole, parts)
    assert training(whole) == training(parts)


def test_a_stream_on_two_processes_equals_one(mixed, start, write_config, tmp_path, mix):
    """Guards against processes that read the same rows, or each other's."""
    alone = mixed("alone", "train.max_steps=4", "data.long_documents=cut")
    file = write_config(
        eval__num_documents=0,
        data__dataset="",
        data__mix=mix,
        data__shuffle_buffer=6,
        data__streaming=True,
        data__long_documents="cut",
        train__max_steps=4,
        train__batch_size=4,
        ebft__ce_coef=0.3,
    )
    code, output = end_of(start("ddp", file, f"train.output_dir={tmp_path / 'two'}", "train.per_device_batch_size=1"))
    assert code == 0, output[-3000:]
    assert_close_runs(alone, tmp_path / "two", share=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_that_breaks_off_saves_what_was_trained(start, write_config, tmp_path, processes):
    """A bad row in the middle: one message with its number, and all steps before it are in a checkpoint."""
    texts = [f"row {number} is long enough" if number != 17 else None for number in range(40)]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    changes = dict(
        data__dataset=str(rows),
        data__streaming=True,
        data__shuffle_buffer=4,
        data__on_bad_row="error",
        eval__num_documents=0,
        train__max_steps=9,
        train__per_device_batch_size=1,
    )
    launch = ("ddp", write_config(**changes)) if processes == 2 else (None, write_config(**changes))
    code, output = end_of(start(*launch))
    assert code != 0
    assert_holds(error_of(output), "row 17", "'text'", "None is not text", "step 8 is saved")
    assert (tmp_path / "run" / "checkpoint-8" / "SHA256SUMS").is_file()
    assert steps_of(tmp_path / "run") == list(range(1, 9))


def test_completions_alone_are_learnt(train, tmp_path, model_folder):
    """SFT on prompts and completions in strided mode against a loop over documents.

    The loop has the cross-entropy of the completion and its end-of-text token.
    """
    prompts = [f"{number} and one" + " more" * (number % 3) for number in range(8)]
    pairs = [(prompt, f" make {number + 1}, as everybody knows") for number, prompt in enumerate(prompts)]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    rows = write_rows(tmp_path / "pairs.jsonl", rows)
    changes = dict(data__dataset=str(rows), data__transform="prompt_completion", data__sequence_length=96)
    sft = ("ebft.rl_coef=0", "ebft.ce_coef=1", "train.learning_rate=1e-2")
    sft += ("train.max_steps=1", "train.batch_size=4", "train.per_device_batch_size=2")
    for name, packing in (("alone", "false"), ("packed", "true")):
        folder = train(name, *sft, f"data.packing={packing}", **changes)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        config = load_config(str(tmp_path / "config.yaml"), [f"data.packing={packing}"])
        chosen = rows_of_step(load_rows(config, load_tokenizer(config.model))[0], 0, 4)
        documents = [document for row in chosen for document in load_rows(config, load_tokenizer(config.model))[0][row]]
        assert len(documents) == 4 if packing == "false" else len(documents) > 4
        total, number = 0.0, 0
        for document in documents:
            (start, end), text = document.spans[0], tokenizer.decode(document.tokens)
            prompt = next(prompt for prompt, completion in pairs if text == prompt + completion + "<eos>")
            assert tokenizer.decode(document.tokens[:start]) == prompt and end == len(document.tokens)
            logps = model(torch.tensor([document.tokens])).logits[0, start - 1 : -1].log_softmax(-1)
            total -= logps.gather(-1, torch.tensor(document.tokens[start:])[:, None]).sum()
            number += end - start
        (total / number).backward()
        assert training(folder)[0]["train/loss"] == pytest.approx((total / number).item(), abs=1e-5)
        norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
        assert training(folder)[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The dry run


def test_dry_run_counts(command, write_config, capsys, tmp_path, text_file):
    """The numbers of a run that is not made, against a loop over its documents; nothing is written."""
    file = write_config(eval__num_documents=4, train__max_steps=30)
    config = load_config(str(file))
    rows, _ = load_rows(config, load_tokenizer(config.model))
    tokens = [rows[row][0].tokens for row in range(len(rows))]
    anchors = sum(len(range(4, len(document) - 4 + 1, 4)) for document in tokens)
    capsys.readouterr()
    main(["--cfg", str(file), "--dry-run"])
    printed = capsys.readouterr().out
    num_rows, total = len(tokens), sum(map(len, tokens))
    documents = rows.documents["piece"][:].count(0)
    assert 30 < documents < num_rows  # the pieces of a long text are one document
    words = f"{documents} documents in {num_rows} rows to train on"
    assert f"{words}: {total:,} tokens, {total - num_rows:,} of them learnt; 4 held out" in printed
    assert f"{anchors:,} anchors (groups), {anchors / len(tokens):.1f} a row; 3 rollouts of 4 tokens at each" in printed
    assert f"30 steps of 2 rows: {2 * anchors / num_rows:.0f} groups" in printed
    assert f"{60 / num_rows:.2f} epochs" in printed
    weights = f"{AutoModelForCausalLM.from_pretrained(config.model.name_or_path).num_parameters():,}"
    largest = max(map(len, tokens))
    assert f"{weights} weights, {weights} trained; largest row: {largest} tokens" in printed
    assert printed.count("example ") == 3 and not (tmp_path / "run").exists()


def test_marks_stand_at_anchors_and_completions(write_config, model_folder):
    """Guards against marks that are a token off: what a reader believes of anchors comes from here."""
    ebft = dict(ebft__min_completion_prefix=1, ebft__context_length=2, ebft__stride=3, ebft__generate_max_len=2)
    config = load_config(str(write_config(**ebft)))
    tokenizer = load_tokenizer(config.model)
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijkl"))
    document = Document(letters, [(2, 6), (8, 12)])
    assert [list(places) for places in anchors_in(config, document.spans)] == [[3], [9]]
    assert marked(config, tokenizer, [document]) == "ab⟦c▸def⟧gh⟦i▸jkl⟧"
    raw = Document(letters, [(0, 12)])
    assert [list(places) for places in anchors_in(config, raw.spans)] == [[2, 5, 8]]
    assert marked(config, tokenizer, [raw]) == "⟦ab▸cde▸fgh▸ijkl⟧"


def test_dry_run_of_a_stream_and_a_mixture(mixed, write_config, mix, capsys):
    """Guards against a count that reads the whole stream, and a mixture without its shares."""
    stream = dict(data__dataset="", data__mix=mix, data__shuffle_buffer=6, data__streaming=True)
    file = write_config(**stream, eval__num_documents=0)
    main(["--cfg", str(file), "--dry-run"])
    printed = capsys.readouterr().out
    assert "read so far (a stream is not counted)" in printed and "epochs" not in printed
    assert "66.7 %" in printed and "33.3 %" in printed
