"""Conversations with tools: what the assistant writes is learnt, its calls included; everything else is context."""

import json

import pytest

from conversations import CHATML, assistant, document_of, in_both_modes, spoken, strided, structured, user

TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": "add"}
TALK = [user("1 and 2?"), assistant(None, tool_calls=[CALL]), RESULT, assistant("It is 3.")]
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<eos>\n{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}"
    "<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLED = '<call>{"name": "add", "arguments": {"a": 1}}</call><eos>'


@pytest.fixture
def with_tools(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_calls_are_learnt_and_results_are_read(with_tools):
    """Both answers, as the template renders them; the tool's result stands between them."""
    document = in_both_modes(with_tools, {"messages": TALK}, transform="all_turns")
    assert spoken(with_tools, document) == [CALLED, "It is 3.<eos>"]
    whole = f"<|user|>1 and 2?<eos>\n<|assistant|>{CALLED}\n<|tool|>3<eos>\n<|assistant|>It is 3.<eos>"
    assert with_tools.decode(document.tokens) == whole


@pytest.mark.parametrize("transform, answer", [("first_turn", CALLED), ("last_turn", "It is 3.<eos>")])
def test_one_of_the_answers(with_tools, transform, answer):
    document = in_both_modes(with_tools, {"messages": TALK}, transform=transform)
    assert spoken(with_tools, document) == [answer]


def test_the_list_of_tools_goes_to_the_template(with_tools):
    """As a list, and as a text of JSON."""
    columns = strided().data.columns
    columns.tools = "tools"
    found = []
    for tools in (TOOLS, json.dumps(TOOLS)):
        row = {"messages": TALK, "tools": tools}
        found.append(document_of(strided(transform="last_turn", columns=columns), with_tools, row))
    assert found[0] == found[1] and with_tools.decode(found[0].tokens).startswith(f"<|system|>{json.dumps(TOOLS)}")


FORMS = {
    "a text of JSON": json.dumps(TALK),
    "ShareGPT": [
        {"from": "human", "value": "1 and 2?"},
        {"from": "gpt", "value": "", "tool_calls": [CALL]},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ],
    "arguments as a text": [
        TALK[0],
        assistant("", tool_calls=[{"function": {"name": "add", "arguments": json.dumps({"a": 1})}}]),
        *TALK[2:],
    ],
    "nulls of a table": [{"tool_calls": None, "name": None, **message} for message in TALK],
}


@pytest.mark.parametrize("messages", FORMS.values(), ids=FORMS)
def test_forms_of_the_same_conversation(with_tools, messages):
    document = in_both_modes(with_tools, {"messages": messages}, transform="all_turns")
    assert document == in_both_modes(with_tools, {"messages": TALK}, transform="all_turns")


def test_a_developer_is_the_system(with_tools):
    """Its newer name, for templates that do not know it."""
    talk = [user("a"), assistant("b")]
    found = [
        in_both_modes(with_tools, {"messages": [{"role": role, "content": "S"}, *talk]}, transform="chat")
        for role in ("developer", "system")
    ]
    assert found[0] == found[1]


def test_a_template_without_tools_is_refused(tokenizer):
    """Guards against a call that the template leaves out: an empty answer would be learnt."""
    tokenizer.chat_template = CHATML
    row = {"messages": [user("a"), assistant("", tool_calls=[CALL]), RESULT, assistant("b")]}
    reason = document_of(structured(transform="all_turns", on_bad_row="skip"), tokenizer, row)
    assert "the conversation has tools" in reason and "writes no calls" in reason and "model.tokenizer" in reason
