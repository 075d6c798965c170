"""Prompt + completion data: what becomes of a row as tokens, which rows are refused and how, conversations turn by
turn, thinking parts.
"""

import ast
import itertools

import pytest
import torch

from conversations import CHATML
from ebft_utils.config.data import ColumnsConfig, EvalConfig, PromptDataConfig
from ebft_utils.config.modes import StructuredConfig
from ebft_utils.config.sections import ModelConfig, StructuredEBFTConfig, TrainConfig
from ebft_utils.data.documents import Tokenizing
from ebft_utils.data.prompts import (
    Conversation,
    conversation_of,
    converse,
    make_prompt_batch,
    most_new_tokens,
    seed_of,
    thinking_opened,
    without_thinking,
)
from ebft_utils.data.rows import load_rows
from ebft_utils.data.sources import stdlib_functions, training_sources
from helpers import assert_holds, refusal, write_rows

MORE = {"columns": ColumnsConfig(turns="more"), "max_conversation_length": 900}


def config_of(source="unused", *, data=None, ebft=None, evaluation=None) -> StructuredConfig:
    return StructuredConfig(
        model=ModelConfig("unused"),
        data=PromptDataConfig(dataset=str(source), **(data or {})),
        ebft=StructuredEBFTConfig(**{"max_completion_length": 40, **(ebft or {})}),
        train=TrainConfig("unused", max_steps=1),
        eval=EvalConfig(**{"num_documents": 0, **(evaluation or {})}),
    )


def load_prompts(config, tokenizer):
    return load_rows(config, tokenizer, conversation_of)


def tokenize_row(row: dict, tokenizer, config) -> Conversation:
    (found,) = Tokenizing(config, tokenizer, *training_sources(config)).documents([row], [0])
    return conversation_of(found)


def test_text_as_tokens(tokenizer):
    """Guards against an end-of-text token inside of the prompt, or none behind the truth."""
    found = tokenize_row({"prompt": "def f(x):", "completion": " return x"}, tokenizer, config_of())
    assert tokenizer.decode(found.prompt) == "def f(x):" and tokenizer.eos_token_id not in found.prompt
    (truth,) = found.truths
    assert tokenizer.decode(truth) == " return x<eos>" and found.between == []
    assert found.truth == (truth, [True] * len(truth))


def test_messages_as_tokens(tokenizer):
    """Prompt and answers together are the whole conversation in the chat template.

    Only the answers, with their end-of-text tokens, are written.
    """
    row = {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Hello!"}],
        "remaining_turns": [{"prompt": "How?", "completion": "Well."}, {"prompt": "Bye", "completion": "See you."}],
    }
    found = tokenize_row(row, tokenizer, config_of(data={"columns": ColumnsConfig(turns="remaining_turns")}))
    tokens, written = found.truth
    whole = [*row["prompt"], *row["completion"]]
    for turn in row["remaining_turns"]:
        whole += [{"role": "user", "content": turn["prompt"]}, {"role": "assistant", "content": turn["completion"]}]
    templated = tokenizer.apply_chat_template(whole, tokenize=False).removesuffix("\n")
    assert tokenizer.decode(found.prompt + tokens) == templated
    answers = [token for token, own in zip(tokens, written, strict=True) if own]
    assert tokenizer.decode(answers) == "Hello!<eos>Well.<eos>See you.<eos>"
    assert tokenizer.decode(found.between[0]) == "\n<|user|>How?<eos>\n<|assistant|>"


def test_turns_of_plain_text(tokenizer):
    """Without a template the turns stand side by side as they are."""
    row = {"prompt": "a", "completion": "b", "more": [{"prompt": "c", "completion": "d"}]}
    tokens, written = tokenize_row(row, tokenizer, config_of(data=MORE)).truth
    assert tokenizer.decode(tokens) == "b<eos>cd<eos>" and written == [True, True, False, True, True]


def pair(prompt, completion, more=None) -> dict:
    return {"prompt": prompt, "completion": completion, **({} if more is None else {"more": more})}


BAD = [
    (pair("  ", "x"), ["'prompt'", "is empty"]),
    (pair("x", ""), ["'completion'", "is empty"]),
    (pair(None, "x"), ["'prompt'", "None is not text"]),
    (pair("x", None), ["'completion'", "None is not text"]),
    (pair("word " * 50, "x"), ["'prompt'", "data.max_prompt_length 30", "never cut"]),
    (pair("x", "word " * 50), ["'completion'", "ebft.max_completion_length 40"]),
    (pair("x", "y", [pair("z", " ")]), ["more[0].completion", "is empty"]),
]


@pytest.mark.parametrize("row, words", BAD)
def test_bad_rows_are_named_or_left_out(tmp_path, tokenizer, row, words):
    """Guards against a prompt that is cut, a missing truth that becomes an empty one, and a message without a place."""
    good = pair("one", "two", [])
    path = write_rows(tmp_path / "rows.jsonl", [good, good, {"more": None, **row}])
    data = {"max_prompt_length": 30, "columns": ColumnsConfig(turns="more")}
    message = refusal(load_prompts, config_of(path, data=data), tokenizer)
    assert_holds(message, "row 2", "data.on_bad_row: skip", *words)
    rows, held_out = load_prompts(config_of(path, data={**data, "on_bad_row": "skip"}), tokenizer)
    assert len(rows) == 2 and held_out is None


def test_a_missing_column_is_named(tmp_path, tokenizer):
    """Guards against a KeyError, and against a missing truth that silently is none."""
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "completion": "b"}])
    message = refusal(load_prompts, config_of(path), tokenizer)
    assert_holds(message, "no column 'prompt'", "question, completion", "data.columns.prompt")


def test_held_out_rows_are_not_trained_on(tmp_path, tokenizer):
    """Copies of held-out rows neither; and other data has another fingerprint."""
    rows = [pair(f"p{index % 6}", f"c{index % 6}") for index in range(12)]
    config = config_of(write_rows(tmp_path / "rows.jsonl", rows), evaluation={"num_documents": 2})
    train, held_out = load_prompts(config, tokenizer)
    assert len(held_out) == 2
    kept = {(tuple(row.prompt), tuple(row.truths[0])) for row in (held_out[0], held_out[1])}
    assert not kept & {(tuple(train[row].prompt), tuple(train[row].truths[0])) for row in range(len(train))}
    assert len(train) == 12 - 2 * len(kept)
    assert train.fingerprint() != held_out.fingerprint()
    assert train.fingerprint() == load_prompts(config, tokenizer)[0].fingerprint()


def test_functions_of_the_standard_library():
    """Signature and docstring, and a body that belongs to them: together they are Python."""
    functions = stdlib_functions()
    assert len(functions) > 3000
    for row in functions.select(range(0, len(functions), 97)):
        (function,) = ast.parse(row["prompt"] + row["completion"]).body
        assert ast.get_docstring(function) and len(function.body) > 1
        assert ast.parse(row["prompt"]).body[0].name == function.name


# ----------------------------------------------------------------------------------------------------------------------
# Batches and completions

TWO = [Conversation([5, 6, 7], [[8, 9, 0]], []), Conversation([10], [[11, 0], [12, 13, 0]], [[20, 21]])]


def test_a_batch_by_hand():
    """Right padding, lengths, and what of the truth the assistant says."""
    batch = make_prompt_batch(TWO, [1, 0], [70, 80], 1, torch.device("cpu"))
    assert batch.document_ids.tolist() == [[10, 11, 0, 20, 21, 12, 13, 0], [5, 6, 7, 8, 9, 0, 1, 1]]
    assert batch.segment_ids.tolist() == [[0] * 8, [0] * 6 + [-1] * 2]
    assert batch.written.int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch.prompt_lengths.tolist() == [1, 3] and batch.truth_lengths.tolist() == [7, 3] and batch.keys == [70, 80]


def test_a_conversation_turn_by_turn():
    """Each sample goes on from its own answers; one that was cut short is ended before the next turn; keys never
    repeat.
    """
    asked = []

    def complete(contexts, limits, keys, n):
        asked.append((contexts, limits, keys, n))
        rows = range(len(contexts))
        return [[([100 + 10 * row + sample], [-0.5], sample == 1) for sample in range(n)] for row in rows]

    found = converse(config_of(ebft={"num_generations": 2}), TWO, [7, 8], complete, eos_token_id=0)
    assert asked[0] == ([[5, 6, 7], [10]], [40, 40], [(7, 0, 0), (8, 0, 0)], 2)
    assert asked[1] == ([[10, 110, 20, 21], [10, 111, 0, 20, 21]], [40, 40], [(8, 1, 0), (8, 1, 1)], 1)
    assert [completion.tokens for completion in found[0]] == [[100], [101]]
    assert [completion.truncated for completion in found[0]] == [False, True]
    first, second = found[1]
    assert first.tokens == [110, 20, 21, 100] and first.written == [True, False, False, True]
    assert first.logprobs == [-0.5, 0.0, 0.0, -0.5] and not first.truncated
    assert second.tokens == [111, 0, 20, 21, 110] and second.written == [True, False, False, False, True]
    assert second.truncated  # in its first turn


def test_seeds_differ():
    """Guards against identical samples in other rows, turns, samples or runs."""
    seeds = {seed_of(*numbers) for numbers in itertools.product(range(3), range(20), range(3), range(4))}
    assert len(seeds) == 720
    assert 0 <= seed_of(1, 2, 3) < 2**62 and seed_of(1, 2, 3) == seed_of(1, 2, 3)


ADAPTIVE = [(10, 1.5, 64), (100, 1.5, 150), (100, 3.0, 200), (100, 0.1, 64)]


@pytest.mark.parametrize("length, multiplier, expected", ADAPTIVE)
def test_adaptive_length(length, multiplier, expected):
    """At least 64, at most the limit; the limit itself when it is not asked for, or below 64."""
    conversation = Conversation([1], [[2] * length], [])

    def most(max_completion_length: int, **ebft) -> int:
        config = config_of(ebft={"max_completion_length": max_completion_length, **ebft})
        return most_new_tokens(config, conversation, 0)

    assert most(200, adaptive_max_tokens=True, gt_length_multiplier=multiplier) == expected
    assert most(200) == 200
    assert most(32, adaptive_max_tokens=True) == 32


THOUGHTS = [
    ("<think>so so</think>Yes.<eos>", False, "Yes.<eos>"),
    ("so so</think>Yes.<eos>", True, "Yes.<eos>"),
    ("Yes.<eos>", False, "Yes.<eos>"),
    ("<think>so so<eos>", False, "<eos>"),
    ("so so<eos>", True, "<eos>"),
    ("<think>so</think><eos>", False, "<eos>"),
]


@pytest.mark.parametrize("text, opened, answer", THOUGHTS)
def test_without_thinking(tokenizer, text, opened, answer):
    """Only the answer stays; of thinking that does not end, the end-of-text token."""
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(without_thinking(tokens, [True] * len(tokens), opened, tokenizer)) == answer


def test_without_thinking_in_each_turn(tokenizer):
    """What stands between two turns is kept, whatever it says."""
    parts = [("<think>a</think>b<eos>", True), ("<think>c</think>d", False), ("<think>e</think>f<eos>", True)]
    tokens = [(token, written) for text, written in parts for token in tokenizer(text)["input_ids"]]
    found = without_thinking([token for token, _ in tokens], [written for _, written in tokens], False, tokenizer)
    assert tokenizer.decode(found) == "b<eos><think>c</think>df<eos>"
    assert thinking_opened(tokenizer("a</think>b<think>")["input_ids"], tokenizer)
    assert not thinking_opened(tokenizer("<think>a</think>")["input_ids"], tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# More rows as they come


USER = [{"role": "user", "content": "Hi"}]
NO_TEXT = {"role": "assistant", "text": "x"}
NO_PAIR = "is not of the form {prompt, completion}"
WRONG = [
    (pair(3, "x"), "'prompt': 3 is not text"),
    (pair("x", 2.5), "'completion': 2.5 is not text"),
    (pair([], "x"), "'prompt': [] is not a list of messages"),
    (pair([{"role": "user", "content": None}], "x"), "is not a list of messages"),
    (pair([{"role": None, "content": "x"}], "x"), "is not a list of messages"),
    (pair(USER, [*USER, *USER]), "'completion': [{'role': 'user'"),
    (pair(USER, NO_TEXT), "'completion': {'role': 'assistant', 'text': 'x'} is not text"),
    (pair("x", "y", "z"), "'more': 'z' is not a list of turns"),
    (pair("x", "y", [{"prompt": "z"}]), f"'more[0]': {{'prompt': 'z'}} {NO_PAIR}"),
    (pair("x", "y", [pair(7, "z")]), "more[0].prompt': 7 is not text"),
    (pair(USER, "y", [pair(" ", "z")]), "more[0].prompt': ' ' is empty"),
    (pair("x", "y", [pair("z", "word " * 50)]), "more[0].completion': the ground truth has"),
]


@pytest.mark.parametrize("row, words", WRONG, ids=str)
def test_rows_of_the_wrong_form(tokenizer, row, words):
    """Guards against a traceback in place of the row's number, which on_bad_row: skip could not leave out either."""
    tokenizer.chat_template = CHATML
    assert words in refusal(tokenize_row, {"more": None, **row}, tokenizer, config_of(data=MORE))


def test_smollm_template_piece_by_piece(tokenizer):
    """Guards against tokens that go over the border of two turns, and a line break that the template writes behind an
    answer and the policy does not.
    """
    tokenizer.chat_template = CHATML  # SmolLM2's, with this tokenizer's end-of-text token
    found = tokenize_row(pair(USER, "Hello", [pair("How?", "Well")]), tokenizer, config_of(data=MORE))

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert found.prompt == ids("<|im_start|>user\nHi<eos>\n<|im_start|>assistant\n")
    first, second = [*ids("Hello"), 0], [*ids("Well"), 0]
    gap = ids("\n<|im_start|>user\nHow?<eos>\n<|im_start|>assistant\n")
    assert (found.truths, found.between) == ([first, second], [gap])
    assert found.truth == (first + gap + second, [True] * len(first) + [False] * len(gap) + [True] * len(second))


def test_keys_never_repeat():
    """Guards against equal random numbers in two rows, turns or samples: rows of 3, 1, 2 and 3 turns."""
    conversations = [Conversation([5], [[0]] * turns, [[9]] * (turns - 1)) for turns in (3, 1, 2, 3)]
    seen = []

    def complete(contexts, limits, keys, n):
        assert len(contexts) == len(limits) == len(keys)
        seen.extend(keys)
        return [[([7, 0], None, False)] * n for _ in contexts]

    found = converse(config_of(ebft={"num_generations": 3}), conversations, [10, 11, 12, 13], complete, eos_token_id=0)
    assert len(seen) == len(set(seen)) == len({seed_of(0, *key) for key in seen}) == 4 + 3 * (2 + 0 + 1 + 2)
    assert [completion.tokens for completion in found[2]] == [[7, 0, 9, 7, 0]] * 3
    assert [completion.tokens for completion in found[1]] == [[7, 0]] * 3
    assert found[0][1].logprobs == [0.0] * 8


def test_other_data_has_another_fingerprint(tmp_path, tokenizer):
    """Guards against a run that is continued on data of the same size with one word changed, in a prompt, a truth or a
    later turn.
    """
    row, found = pair("one", "two", [pair("three", "four")]), []
    later = ({"more": [pair("Three", "four")]}, {"more": [pair("three", "Four")]})
    changes = ({}, {"prompt": "One"}, {"completion": "Two"}, *later)
    for number, change in enumerate((*changes, {})):
        path = write_rows(tmp_path / f"rows{number}.jsonl", [row, {**row, **change}])
        config = config_of(path, data={"columns": ColumnsConfig(turns="more")})
        found.append(load_prompts(config, tokenizer)[0].fingerprint())
    assert len(set(found[:-1])) == 5 and found[0] == found[-1]


def test_a_token_over_the_border_of_the_thinking(tokenizer):
    """Guards against half of '</think>' in the answer where one token ends the mark and begins what follows."""
    tokenizer.add_tokens([">\n"])
    tokens = tokenizer("<think>so</think>\nYes.<eos>")["input_ids"]
    assert ">\n" in tokenizer.convert_ids_to_tokens(tokens)
    assert tokenizer.decode(without_thinking(tokens, [True] * len(tokens), False, tokenizer)) == "Yes.<eos>"
