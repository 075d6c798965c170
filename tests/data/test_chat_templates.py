"""Chat templates, tokenizers and rows as they are in the wild.

What differs from the plain case must not train on other tokens, nor end in a traceback.
"""

import datetime

import pytest
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from conversations import (
    CHATML,
    END,
    TALK,
    TEMPLATE,
    THINKING_TEMPLATE,
    THOUGHT,
    TOKENS,
    assistant,
    document_of,
    in_both_modes,
    spoken,
    strided,
    structured,
    user,
    words,
)
from ebft_utils.config.data import ColumnsConfig
from ebft_utils.config.sections import ModelConfig
from ebft_utils.data.transforms import TRANSFORMS, load_transform
from ebft_utils.models import load_tokenizer
from helpers import refusal

# ----------------------------------------------------------------------------------------------------------------------
# Chat templates


@pytest.mark.parametrize("transform", ["chat", "all_turns"])
def test_a_template_without_a_generation_prompt(tokenizer, transform):
    """Guards against conversations without the header of the assistant, which many ChatML templates put only before an
    answer that is there.
    """
    tokenizer.chat_template = CHATML.partition("{% if add_generation_prompt")[0]
    row = {"messages": [user("a"), assistant("b")]}
    message = refusal(document_of, structured("rows", transform=transform), tokenizer, row)
    assert message.startswith("model.tokenizer: the chat template")
    assert "add_generation_prompt" in message and "row 0" in message


def test_a_template_that_trims(tokenizer):
    """Guards against spaces around an answer that the template itself would not leave there."""
    row = {"messages": [user("a"), assistant(" b \n")]}
    assert spoken(tokenizer, in_both_modes(tokenizer, row, transform="chat")) == [" b \n<eos>"]
    tokenizer.chat_template = TEMPLATE.replace("message['content']", "message['content'] | trim")
    document = in_both_modes(tokenizer, row, transform="chat")
    templated = tokenizer.apply_chat_template(row["messages"], tokenize=False).removesuffix("\n")
    assert tokenizer.decode(document.tokens) == templated == "<|user|>a<eos>\n<|assistant|>b<eos>"


def test_a_text_that_is_templated_loses_the_space_before_its_answer(tokenizer):
    """Guards against ' four' behind '<|assistant|>': the space sets an answer off from 'Answer:', which is not there
    any more.
    """
    row, data = {"question": "2 + 2?", "answer": "four"}, {"transform": "question_answer"}
    assert spoken(tokenizer, in_both_modes(tokenizer, row, **data)) == [" four<eos>"]
    assert spoken(tokenizer, in_both_modes(tokenizer, row, **data, apply_chat_template=True)) == ["four<eos>"]


UNTHINKING = [
    ("chat", {"messages": [user("a"), assistant("b")]}),
    ("reasoning_answer", {"messages": [user("a"), assistant("<think>c</think>b")]}),
]


@pytest.mark.parametrize("transform, row", UNTHINKING)
def test_an_answer_without_thinking_behind_a_template_that_thinks(tokenizer, transform, row):
    """Guards against an answer that is learnt as thinking, and with feature_span: answer has no features but those of
    the end-of-text token.
    """
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
    for mode in (structured, strided):
        message = refusal(document_of, mode("rows", transform=transform), tokenizer, row)
        assert "row 0" in message and "begins with <think>" in message and "take the transform reasoning" in message


def test_the_switch_for_thinking(tokenizer):
    """Guards against Qwen3's template thinking before solutions that have no thinking."""
    tokenizer.chat_template = THINKING_TEMPLATE
    row = {"messages": [user("a"), assistant("b")]}
    document = in_both_modes(tokenizer, row, transform="chat")
    assert tokenizer.decode(document.tokens) == "<|user|>a<eos>\n<|assistant|>b<eos>"
    document = in_both_modes(tokenizer, row, transform="chat", enable_thinking=False)
    assert tokenizer.decode(document.tokens) == "<|user|>a<eos>\n<|assistant|><think>\n\n</think>\n\nb<eos>"
    assert spoken(tokenizer, document) == ["b<eos>"]
    tokenizer.chat_template = TEMPLATE
    for value in (True, False):
        message = refusal(document_of, structured("rows", transform="chat", enable_thinking=value), tokenizer, row)
        assert message.startswith("data.enable_thinking: the tokenizer's chat template has no such switch")
        assert "row 0" in message


def test_a_template_that_tells_the_date(tokenizer):
    """Guards against other tokens tomorrow: a stream could not be resumed, and two evaluations would not be of the same
    prompts.
    """
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + TEMPLATE
    document = in_both_modes(tokenizer, {"messages": [user("a"), assistant("b")]}, transform="chat")
    assert tokenizer.decode(document.tokens).startswith("26 Jul 2024\n<|user|>a")
    assert datetime.date.today().year > 2024


def test_an_empty_system_message_is_none(tokenizer):
    """Guards against data sets that have the field in every row, mostly empty, being bad rows; and a question that is
    empty being none.
    """
    row = {"messages": [{"role": "system", "content": ""}, user("a"), assistant("b")]}
    document = in_both_modes(tokenizer, row, transform="chat")
    assert tokenizer.decode(document.tokens) == "<|user|>a<eos>\n<|assistant|>b<eos>"
    empty = {"prompt": [user(" ")], "completion": "b"}
    assert "the last message is empty" in refusal(document_of, structured("rows"), tokenizer, empty)


def test_who_speaks(tokenizer):
    """Guards against the user's words as the ground truth."""
    row = {"prompt": "a", "completion": user("b")}
    assert "is not text" in refusal(document_of, structured("rows"), tokenizer, row)
    row = {"prompt": user("a"), "completion": [assistant("b")]}
    assert spoken(tokenizer, in_both_modes(tokenizer, row, transform="prompt_completion")) == ["b<eos>"]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_tokenizer_that_puts_a_space_before_a_text():
    """Guards against a fifth space of indentation in every completion, with tokenizers of the SentencePiece kind.

    Llama 2's and Mistral's are.
    """
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz():\n+0123456789"]
    vocabulary = {token: index for index, token in enumerate(["<eos>", "<unk>", *letters])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    row = {"prompt": "def f(x):\n", "completion": "    return x", "more": [{"prompt": "\nz", "completion": "y"}]}
    document = in_both_modes(sentencepiece, row, transform="prompt_completion", columns=ColumnsConfig(turns="more"))
    found = "".join(sentencepiece.convert_ids_to_tokens(document.tokens))
    assert found == "\u2581def\u2581f(x):\n\u2581\u2581\u2581\u2581return\u2581x<eos>\nzy<eos>"


def test_a_tokenizer_that_ends_a_text_by_itself(by_word):
    """Guards against an end-of-text token between prompt and completion, and two of them behind a text."""
    ends = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    by_word.backend_tokenizer.post_processor = ends
    row = {"prompt": words(10, 11), "completion": words(12)}
    assert in_both_modes(by_word, row, transform="prompt_completion").tokens == [10, 11, 12, END]
    row = {"text": words(10, 11, 12, 13, 14)}
    assert document_of(strided(), by_word, row).tokens == [10, 11, 12, 13, 14, END]
    assert document_of(strided(sequence_length=4), by_word, row).tokens == [10, 11, 12, 13]  # cut: no end


def test_a_tokenizer_that_cuts_on_the_left(by_word, tmp_path):
    """Guards against documents without their beginning."""
    by_word.truncation_side = "left"
    by_word.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig("unused", tokenizer=str(tmp_path)))
    document = document_of(strided(sequence_length=5), loaded, {"text": words(*range(10, 20))})
    assert document.tokens == [10, 11, 12, 13, 14]


# ----------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("message", [{"role": ["user"], "content": "x"}, {"role": {"a": 1}, "content": "x"}])
def test_a_role_that_is_no_text(tokenizer, message):
    """Guards against a traceback (unhashable) that on_bad_row: skip cannot leave out."""
    config, row = structured("rows", transform="chat"), {"messages": [message, assistant("y")]}
    assert "column 'messages[0]" in refusal(document_of, config, tokenizer, row)


@pytest.mark.parametrize("thinking", [5, ["why"], {"text": "why"}])
def test_thinking_that_is_no_text(tokenizer, thinking):
    """Guards against a traceback that on_bad_row: skip cannot leave out."""
    row = {"messages": [user("a"), assistant("Yes.", reasoning_content=thinking)]}
    message = refusal(document_of, structured("rows", transform="reasoning"), tokenizer, row)
    assert "column 'messages[1].reasoning_content'" in message


def test_thinking_in_both_places():
    """Guards against thinking that stands twice in an answer, or stays in an earlier one."""
    old = assistant("<think>old</think>b", reasoning_content="old")
    last = assistant("<think>why</think>Yes.", reasoning_content="why")
    found = TRANSFORMS["reasoning"]({"messages": [user("a"), old, user("c"), last]}, ColumnsConfig())
    assert found == {"prompt": [user("a"), assistant("b"), user("c")], "completion": THOUGHT}
    row = {"prompt": "a", "r": "<think>\nwhy\n</think>", "completion": "Yes."}
    assert TRANSFORMS["reasoning"](row, ColumnsConfig(reasoning="r"))["completion"] == THOUGHT


def test_the_answer_alone_when_the_thinking_holds_its_own_end():
    """Guards against half of the thinking in the answer."""
    row = {"prompt": "a", "r": "write </think> last", "completion": "Yes."}
    assert TRANSFORMS["reasoning_answer"](row, ColumnsConfig(reasoning="r"))["completion"] == "Yes."


def test_the_ends_of_earlier_answers_stay(by_word):
    """Guards against append_eos: false taking the end-of-text token out of the middle of a conversation."""
    document = document_of(strided(transform="all_turns", append_eos=False), by_word, {"messages": TALK})
    assert document.tokens == TOKENS["all_turns"][0][:-1]


@pytest.mark.parametrize("turns", [5, True, "abc", {"prompt": "a", "completion": "b"}])
def test_turns_that_are_no_list(tmp_path, tokenizer, turns):
    """Guards against a traceback for a number, and against 'turns[0] 'prompt'' for a mapping."""
    (tmp_path / "mine.py").write_text(
        f"def transform(row, columns):\n    return {{'prompt': 'a', 'completion': 'b', 'turns': {turns!r}}}\n"
    )
    message = refusal(document_of, structured("rows", transform=f"{tmp_path / 'mine.py'}:transform"), tokenizer, {})
    assert f"returned turns {turns!r}, which is not a list" in message


BROKEN = ["sys:exit", ":f", "..a:f", "~nouser/f.py:t", "own_broken_module:f", "own_syntax_module:f"]


@pytest.mark.parametrize("name", BROKEN)
def test_modules_that_cannot_be_loaded(tmp_path, monkeypatch, name):
    """Guards against a traceback before the first row."""
    (tmp_path / "own_broken_module.py").write_text("x = 1 / 0\n")
    (tmp_path / "own_syntax_module.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert refusal(load_transform, name).startswith("data.transform: ")


def test_a_function_that_a_package_passes_on(tmp_path, monkeypatch):
    """Guards against the cache of a function whose own file changed, and the package's __init__.py did not."""
    (tmp_path / "own_passing_package").mkdir()
    (tmp_path / "own_passing_package" / "__init__.py").write_text("from .inner import f\n")
    inner = tmp_path / "own_passing_package" / "inner.py"
    inner.write_text("def f(row, columns):\n    return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = load_transform("own_passing_package:f").version
    inner.write_text("def f(row, columns):\n    return {}\n")
    assert load_transform("own_passing_package:f").version != before


def test_translations_of_several_languages_in_one_table():
    """Guards against all rows being bad because Arrow gives each row every language, the others as null; and a column
    doc-id standing before translation.
    """
    row = {"doc-id": 3, "translation": {"de": "Guten Tag.", "en": "Hello.", "fr": None}}
    assert TRANSFORMS["translate_to_english"](row, ColumnsConfig())["completion"] == " Hello."


def test_two_forms_of_messages_in_one_table():
    """Guards against all rows being bad because Arrow gives each message the keys of both forms."""
    messages = [{"from": None, "value": None, **user("one")}, {"from": None, "value": None, **assistant("two")}]
    assert TRANSFORMS["chat"]({"messages": messages}, ColumnsConfig()) == {"prompt": [user("one")], "completion": "two"}
