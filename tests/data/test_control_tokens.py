"""Control tokens that stand in a row's text: they stay text, unless data.allow_control_tokens says otherwise."""

import pytest

from conversations import TEMPLATE, assistant, document_of, in_both_modes, spoken, strided, structured, user
from ebft_utils.data.control import ControlTokens

ROWS = {
    "raw text": ({"text": "before <eos> and <pad> after"}, {"transform": "text"}),
    "a prompt": ({"prompt": "what does <eos> do? ", "completion": "it ends a text"}, {}),
    "a completion": ({"prompt": "what ends a text? ", "completion": "the token <eos> does"}, {}),
    "a message": ({"messages": [user("is <eos> a token?"), assistant("yes, <eos> is<pad>")]}, {"transform": "chat"}),
}


def settings(**data) -> dict:
    return {"transform": "prompt_completion", **data}


@pytest.mark.parametrize("row, data", ROWS.values(), ids=ROWS)
def test_text_that_reads_like_a_control_token_stays_text(tokenizer, row, data):
    """The text comes back as it was, and the only control tokens are those of the template and the end of an answer."""
    document = document_of(strided(**settings(**data)), tokenizer, row)
    decoded = tokenizer.decode(document.tokens)
    texts = [row["text"]] if "text" in row else [row.get("prompt", ""), row.get("completion", "")]
    if "messages" in row:
        texts = [message["content"] for message in row["messages"]]
    assert all(text in decoded for text in texts)
    ends = document.tokens.count(tokenizer.eos_token_id)
    assert ends == (2 if "messages" in row else 1) and tokenizer.pad_token_id not in document.tokens
    meant = document_of(strided(**settings(**data), allow_control_tokens=True), tokenizer, row)
    assert meant.tokens.count(tokenizer.eos_token_id) > ends


def test_an_answer_cannot_end_itself(tokenizer):
    """What is learnt is one answer, up to its own end, in both modes."""
    row = {"messages": [user("a"), assistant("one<eos>\n<|user|>b<eos>\n<|assistant|>two")]}
    document = in_both_modes(tokenizer, row, transform="chat")
    ((start, end),) = document.spans
    assert document.tokens[start:end].count(tokenizer.eos_token_id) == 1 and document.tokens[end - 1] == 0
    assert spoken(tokenizer, document) == [f"{row['messages'][1]['content']}<eos>"]


def test_rows_without_such_text_are_tokenised_as_ever(tokenizer):
    row = {"messages": [user("a"), assistant("b")]}
    same = [document_of(strided(transform="chat", allow_control_tokens=allow), tokenizer, row) for allow in (0, 1)]
    assert same[0] == same[1]


def test_it_is_said_once(tokenizer, capsys):
    """Guards against a text that is meant as control tokens, and silently is not."""
    document_of(structured(transform="chat"), tokenizer, ROWS["a message"][0])
    said = capsys.readouterr().out
    assert "row 0, column 'messages': <eos> stands in the text" in said and "data.allow_control_tokens" in said


def test_a_text_that_cannot_be_kept_apart_is_a_bad_row(by_word):
    """A tokenizer of words knows no other way to write <eos>."""
    by_word.chat_template = TEMPLATE
    row = {"prompt": "w10 <eos> w11", "completion": "w12 w13 w14 w15 w16"}
    config = strided(transform="prompt_completion", on_bad_row="skip")
    reason = document_of(config, by_word, row)
    assert "column 'prompt': the control token <eos> stands in the text" in reason and "no ordinary tokens" in reason


def test_thinking_marks_are_no_control_tokens(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert set(ControlTokens(tokenizer).ids) == {"<eos>", "<pad>"}
