"""Prompts and completions: where strided mode cuts them and where its anchors and targets are; the lengths that
structured mode allows.

Ids are read off with the tokenizer by_word: w10 is 10, <user> 3, <assistant> 4, <system> 5, the end-of-text token 0.
"""

import itertools

import pytest
import torch

from conversations import (
    END,
    TALK,
    TOKENS,
    A,
    S,
    U,
    assistant,
    document_of,
    documents_of,
    strided,
    structured,
    user,
    words,
)
from ebft_utils.data.batches import make_batch
from ebft_utils.data.documents import Document
from ebft_utils.data.prompts import conversation_of, converse
from ebft_utils.data.rows import Rows, load_rows
from ebft_utils.data.tables import table_of
from helpers import refusal, write_rows
from train_strided import batch_of, document_targets

SKIP = "data.on_bad_row: skip leaves such rows out"

# ----------------------------------------------------------------------------------------------------------------------
# Strided mode: what is cut, what is refused, where anchors are


def pair(num_prompt: int, num_completion: int) -> dict:
    return {"prompt": words(*range(10, 10 + num_prompt)), "completion": words(*range(40, 40 + num_completion))}


CUT_TO_8 = [
    (3, 4, Document([10, 11, 12, 40, 41, 42, 43, END], [(3, 8)])),
    (3, 5, Document([10, 11, 12, 40, 41, 42, 43, 44], [(3, 8)])),
    (3, 30, Document([10, 11, 12, 40, 41, 42, 43, 44], [(3, 8)])),
    (6, 1, Document([10, 11, 12, 13, 14, 15, 40, END], [(6, 8)])),
    (6, 9, Document([10, 11, 12, 13, 14, 15, 40, 41], [(6, 8)])),
]


@pytest.mark.parametrize("num_prompt, num_completion, expected", CUT_TO_8)
def test_completions_are_cut_at_the_sequence_length(by_word, num_prompt, num_completion, expected):
    """Guards against an end-of-text token behind a completion that was cut, and spans that reach past the tokens."""
    config = strided(transform="prompt_completion", sequence_length=8)
    assert document_of(config, by_word, pair(num_prompt, num_completion)) == expected


@pytest.mark.parametrize(
    "sequence_length, spans",
    [(17, [(7, 10), (15, 17)]), (16, [(7, 10), (15, 16)]), (15, [(7, 10)]), (12, [(7, 10)]), (9, [(7, 9)])],
)
def test_turns_are_cut_at_the_sequence_length(by_word, sequence_length, spans):
    """Guards against a span of no tokens, or one behind the end, where the cut falls between two answers."""
    document = document_of(strided(transform="all_turns", sequence_length=sequence_length), by_word, {"messages": TALK})
    assert document == Document(TOKENS["all_turns"][0][:sequence_length], spans)


@pytest.mark.parametrize("num_prompt", [8, 9, 60])
def test_a_prompt_as_long_as_the_sequence(tmp_path, by_word, capsys, num_prompt):
    """Guards against a prompt that is cut, and a document with nothing to learn."""
    path = write_rows(tmp_path / "rows.jsonl", [pair(3, 3), pair(num_prompt, 3)])
    data = {"transform": "prompt_completion", "sequence_length": 8}
    too_long = f"the prompt has {num_prompt} tokens, which leaves nothing of data.sequence_length 8 to the completion"
    reason = f"row 1, column 'prompt': {too_long}"
    assert refusal(documents_of, strided(path, **data), by_word) == f"data: {str(path)!r}, {reason}; {SKIP}"
    kept = documents_of(strided(path, **data, on_bad_row="skip"), by_word)
    assert kept == [Document([10, 11, 12, 40, 41, 42, END], [(3, 7)])]
    assert f"data: 1 of 2 rows of {str(path)!r} left out: 1 like {reason}\n" in capsys.readouterr().out


def no_room(num_tokens: int, behind: int, needs: int) -> str:
    return f"{num_tokens} tokens of the completion, behind {behind}, have no room for one anchor, which needs {needs}"


BORDERS = [  # settings of ebft, a row, why it is refused
    ({}, pair(3, 1), None),  # two tokens with the end-of-text token, one rollout
    ({"generate_max_len": 3}, pair(3, 2), None),
    ({"generate_max_len": 4}, pair(3, 2), no_room(3, behind=3, needs=4)),
    ({"min_completion_prefix": 2}, pair(3, 3), None),
    ({"min_completion_prefix": 2}, pair(3, 2), no_room(3, behind=3, needs=4)),
    ({"context_length": 6}, pair(2, 5), None),  # the first anchor at 6, the completion ends at 8
    ({"context_length": 6}, pair(2, 4), no_room(5, behind=2, needs=6)),
    ({"context_length": 6}, pair(6, 1), None),  # the prompt is context enough
    ({}, pair(7, 9), no_room(1, behind=7, needs=2)),
]


@pytest.mark.parametrize("ebft, row, too_short", BORDERS)
def test_room_for_one_anchor(by_word, ebft, row, too_short):
    """Guards against documents that take part in the order and never have a rollout, and against one that would just
    fit being refused.
    """
    config = strided("rows", transform="prompt_completion", sequence_length=8, ebft=ebft)
    if too_short is None:
        rows = Rows(table_of([document_of(config, by_word, row)]), [[0]])
        assert batch_of(config, rows, [0], [0], 1).valid.tolist() == [[True]]
    else:
        room = "(ebft.context_length or min_completion_prefix + ebft.generate_max_len)"
        message = refusal(document_of, config, by_word, row)
        assert message == f"data: 'rows', row 0, column 'completion': {too_short} {room}; {SKIP}"


def test_one_turn_with_room_is_enough(by_word):
    """Guards against a conversation being refused for a short answer beside a long one."""
    config = strided(transform="all_turns", ebft={"generate_max_len": 3})
    assert document_of(config, by_word, {"messages": TALK}).spans == [(7, 10), (15, 17)]
    short = [*TALK[:2], assistant(words(30)), *TALK[3:]]
    message = refusal(document_of, config, by_word, {"messages": short})
    assert f"column 'messages': {no_room(2, behind=7, needs=3)}" in message


# (tokens, spans) of the documents of each row: raw text, one answer, several answers, an answer side by side with the
# next, one at the very beginning
PACKED = [
    [(9, [(0, 9)]), (14, [(4, 14)]), (20, [(3, 8), (11, 13), (15, 20)])],
    [(6, [(5, 6)]), (12, [(2, 5), (5, 12)])],
    [(31, [(1, 2), (6, 19), (22, 31)])],
    [(5, [(0, 5)]), (4, [(0, 4)]), (16, [(10, 16)])],
]


def slow_anchors(row, context_length, min_completion_prefix, stride, num_generated) -> list[int]:
    """Places of a packed row, one token after the other."""
    found, offset = [], 0
    for length, spans in row:
        for start, end in spans:
            last = None
            for place in range(start, end):
                enough = place >= context_length and place - start >= min_completion_prefix
                if enough and place + num_generated <= end and (last is None or place - last == stride):
                    found.append(offset + place)
                    last = place
        offset += length
    return found


def slow_targets(row) -> list[int]:
    """Places s of a packed row whose next token is to be learnt."""
    found, offset = [], 0
    for length, spans in row:
        for place in range(1, length):
            if any(start <= place < end for start, end in spans):
                found.append(offset + place - 1)
        offset += length
    return found


def batch_from(row_ids=(0, 1, 2, 3), **anchors):
    numbers = itertools.count(100)
    documents = [Document([next(numbers) for _ in range(length)], spans) for row in PACKED for length, spans in row]
    ids = iter(range(len(documents)))
    rows = Rows(table_of(documents), [[next(ids) for _ in row] for row in PACKED])
    return make_batch(rows, list(row_ids), list(row_ids), 1, **anchors)


@pytest.mark.parametrize("context_length", [1, 4, 8])
@pytest.mark.parametrize("min_completion_prefix", [0, 1, 3])
@pytest.mark.parametrize("stride, num_generated", [(1, 1), (2, 2), (3, 2), (1, 4), (8, 3)])
def test_anchors_equal_a_slow_loop(context_length, min_completion_prefix, stride, num_generated):
    """Guards against anchors in what is only read, windows over an answer's end, a stride that goes on from the answer
    before, and a prefix counted from the document.
    """
    settings = dict(context_length=context_length, min_completion_prefix=min_completion_prefix)
    settings |= dict(stride=stride, num_generated=num_generated)
    batch, expected = batch_from(**settings), [slow_anchors(row, **settings) for row in PACKED]
    assert [places[valid].tolist() for places, valid in zip(batch.anchors, batch.valid, strict=True)] == expected
    assert batch.anchors.shape == (4, max(map(len, expected))) and max(map(len, expected)) > 0
    for row in range(4):  # and alone, without the padding of the others
        single = batch_from([row], **settings)
        assert single.anchors[single.valid].tolist() == expected[row]


def test_anchors_by_hand():
    """Guards against the slow loop itself being wrong: one row, counted on paper."""
    settings = dict(context_length=4, min_completion_prefix=1, stride=2, num_generated=2)
    # raw text 0..8: 4, 6 (8 has no second token). Then 9 on: answer 4..13: 5, 7, 9, 11. Then 23 on: answers 3..7: 4, 6;
    # 11..12: 12 would pass its end; 15..19: 16, 18
    assert slow_anchors(PACKED[0], **settings) == [4, 6, 14, 16, 18, 20, 27, 29, 39, 41]
    batch = batch_from(**settings)
    assert batch.anchors[0][batch.valid[0]].tolist() == [4, 6, 14, 16, 18, 20, 27, 29, 39, 41]


def test_cross_entropy_is_in_the_completions_alone():
    """Guards against a prompt's or a user's tokens being learnt, an answer's first token not being learnt, and a token
    predicted from another document or from padding.
    """
    batch = batch_from(context_length=1, min_completion_prefix=0, stride=1, num_generated=1)
    targets = document_targets(batch)
    assert targets.shape == (4, 42)
    assert [row.nonzero().flatten().tolist() for row in targets] == [slow_targets(row) for row in PACKED]
    # row 1 by hand: tokens 0..4 are a prompt, 5 its answer; then a document at 6: prompt 6, 7, answers 8..10 and 11..17
    assert targets[1].nonzero().flatten().tolist() == [4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert batch.completion_ids[1, :19].tolist() == [-1] * 5 + [0] + [-1] * 2 + [1] * 3 + [2] * 7 + [-1]


def test_from_rows_to_anchors_and_targets(tmp_path, by_word):
    """Guards against spans that are lost on the way from a file, through cache and packing, to the batch."""
    second = [user(words(21)), assistant(words(*range(50, 56)))]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}, {"messages": second}])
    config = strided(path, transform="all_turns", packing=True, sequence_length=40, ebft={"min_completion_prefix": 1})
    rows, _ = load_rows(config, by_word)
    batch = batch_of(config, rows, [0], [0], 1)
    chat, short = TOKENS["all_turns"][0], [U, 21, END, A, 50, 51, 52, 53, 54, 55, END]
    ids = batch.document_ids[0].tolist()
    assert len(rows) == 1 and ids in (chat + short, short + chat)
    chat_at, short_at = (0, 17) if ids[0] == S else (11, 0)
    # the second answer of the chat has two tokens, one of them the prefix
    anchors = [chat_at + 8, short_at + 5, short_at + 7, short_at + 9]
    assert sorted(batch.anchors[batch.valid].tolist()) == sorted(anchors)
    learnt = torch.tensor(ids)[1:][document_targets(batch)[0]].tolist()
    assert sorted(learnt) == sorted([30, 31, END, 32, END, 50, 51, 52, 53, 54, 55, END])


# ----------------------------------------------------------------------------------------------------------------------
# Structured mode: lengths


def too_long(limit: str) -> str:
    long = "the conversation can come to 19 tokens with answers of ebft.max_completion_length 3"
    return f"column 'messages': {long}, more than {limit}; raise data.max_conversation_length"


def limits(max_completion_length: int, reason: str | None, **data) -> tuple:
    """Settings of data and ebft, and why TALK is refused with them."""
    return data, {"max_completion_length": max_completion_length}, reason


PROMPT = "column 'messages': the prompt has 7 tokens, more than data.max_prompt_length 6, and prompts are never cut"
TRUTH = (
    "column 'messages': the ground truth has 3 tokens (end-of-text token included), "
    "more than ebft.max_completion_length 2"
)
TURN_LIMIT = "data.max_prompt_length + ebft.max_completion_length 10"
LENGTHS = [
    limits(3, None, max_prompt_length=7),
    limits(3, PROMPT, max_prompt_length=6),
    limits(2, TRUTH, max_prompt_length=7),
    # prompt 7, answers 2 x 3 and an end for the first if it is cut short, the user's turn 5
    limits(3, None, max_prompt_length=7, max_conversation_length=19),
    limits(3, too_long("data.max_conversation_length 18"), max_prompt_length=7, max_conversation_length=18),
    limits(3, too_long(TURN_LIMIT), max_prompt_length=7, max_conversation_length=None),
]


@pytest.mark.parametrize("data, ebft, reason", LENGTHS)
def test_lengths_of_a_conversation(by_word, data, ebft, reason):
    """Guards against a limit that is off by one, a prompt that is cut, and a context that a rollout server would refuse
    in the middle of a run.
    """
    config = structured("rows", transform="all_turns", ebft=ebft, **data)
    if reason is None:
        assert document_of(config, by_word, {"messages": TALK}) == Document(*TOKENS["all_turns"])
    else:
        assert refusal(document_of, config, by_word, {"messages": TALK}) == f"data: 'rows', row 0, {reason}; {SKIP}"


def test_the_longest_conversation_is_as_long_as_was_reckoned(by_word):
    """Guards against the reckoning itself: a policy that never stops comes to exactly the 19 tokens of the test above.

    One turn always fits.
    """
    data = {"transform": "all_turns", "max_prompt_length": 7, "ebft": {"max_completion_length": 3}}
    config = structured(**data, max_conversation_length=19)

    def never_stops(contexts, limits, keys, n):
        return [[([99] * limit, None, True)] * n for limit in limits]

    conversation = conversation_of([document_of(config, by_word, {"messages": TALK})])
    ((completion, *_),) = converse(config, [conversation], [0], never_stops, eos_token_id=END)
    assert len(conversation.prompt) + len(completion.tokens) == 19
    assert completion.tokens == [99] * 3 + [END, U, 22, 23, END, A] + [99] * 3
    alone = structured(**{**data, "transform": "chat"}, max_conversation_length=10)
    assert document_of(alone, by_word, {"messages": TALK[:3]}).spans == [(7, 10)]
