"""Transforms on literal rows, and what becomes of them as tokens in both modes: spans, anchors, chat templates, bad rows, somebody's own function.

The word-level tokenizer makes one token a word, so that ids are read off: w10 is 10, <user> 3, <assistant> 4, <system> 5, the end-of-text token 0.
"""

import itertools
import json

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer
from ebft_utils.config.data import ColumnsConfig, EvalConfig, PromptDataConfig, TextDataConfig
from ebft_utils.config.modes import (
    ModelConfig,
    StridedConfig,
    StridedEBFTConfig,
    StructuredConfig,
    StructuredEBFTConfig,
    TrainConfig,
)
from ebft_utils.config.settings import UserError
from ebft_utils.data.documents import Document, Tokenizing, documents_from, load_documents, table_of
from ebft_utils.data.prompts import conversation_of, converse
from ebft_utils.data.rows import Rows, load_rows, make_batch
from ebft_utils.data.sources import training_sources
from ebft_utils.data.transforms import TRANSFORMS
from train_strided import batch_of, document_targets

TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
EMPTY = "{{ '<think>\\n\\n</think>\\n\\n' }}"
THINKING_TEMPLATE = TEMPLATE.replace(
    "<|assistant|>{% endif %}",
    f"<|assistant|>{{% if enable_thinking is defined and not enable_thinking %}}{EMPTY}{{% endif %}}{{% endif %}}",
)  # Qwen3's switch
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}<eos> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What one test tokenises is not what another one finds."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with a chat template: any text comes back as it was."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def by_word() -> PreTrainedTokenizerFast:
    """One token a word, with a chat template: ids are read off."""
    special = ["<eos>", "<pad>", "<unk>", "<user>", "<assistant>", "<system>", "<bos>"]
    inner = Tokenizer(
        models.WordLevel(
            {word: number for number, word in enumerate(special)} | {f"w{number}": number for number in range(10, 100)},
            unk_token="<unk>",
        )
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = WORDS
    return tokenizer


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def user(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def structured(source="unused", *, ebft=None, **data) -> StructuredConfig:
    return StructuredConfig(
        model=ModelConfig("unused"),
        data=PromptDataConfig(**{"dataset": str(source), "max_conversation_length": 5000, **data}),
        ebft=StructuredEBFTConfig(**{"max_completion_length": 300, **(ebft or {})}),
        train=TrainConfig("unused"),
        eval=EvalConfig(num_documents=0),
    )


def strided(source="unused", *, ebft=None, **data) -> StridedConfig:
    """Anchors from token 2 on, every 2, rollouts of 2 tokens."""
    return StridedConfig(
        model=ModelConfig("unused"),
        data=TextDataConfig(**{"dataset": str(source), "sequence_length": 5000, **data}),
        ebft=StridedEBFTConfig(**{"context_length": 2, "stride": 2, "generate_max_len": 2, **(ebft or {})}),
        train=TrainConfig("unused"),
        eval=EvalConfig(num_documents=0),
    )


def document_of(config, tokenizer, row: dict):
    """The row's document, or why there is none."""
    (found,) = Tokenizing(config, tokenizer, *training_sources(config)).documents([row], [0])
    return found


def in_both_modes(tokenizer, row: dict, **data) -> Document:
    """The row's document, which is the same in both modes."""
    found, other = (document_of(kind(**data), tokenizer, row) for kind in (structured, strided))
    assert isinstance(found, Document) and found == other
    return found


def spoken(tokenizer, document: Document) -> list[str]:
    return [tokenizer.decode(document.tokens[start:end]) for start, end in document.spans]


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents_of(config, tokenizer) -> list[Document]:
    return documents_from(load_documents(config, tokenizer, *training_sources(config))[:])


# ---------------------------------------------------------------------------------------------------------------------------------------
# What each transform gives

SYSTEM = {"role": "system", "content": "S"}
FIVE = [SYSTEM, user("one"), assistant("two"), user("three"), assistant("four")]
TURN = {"prompt": [SYSTEM, user("one")], "completion": "two"}
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
IN_PARTS = [
    user([{"type": "text", "text": "Look: "}, {"type": "text", "text": "here", "image": None}]),
    assistant([{"type": "text", "text": "seen"}]),
]
THOUGHT = "<think>\nwhy\n</think>\n\nYes."
LONG_MARKS = "<|begin_of_thought|>\n\nwhy\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nYes.\n\n<|end_of_solution|>"
TWICE = [user("a"), assistant("b", reasoning_content="old"), user("c"), assistant("<think>why</think>Yes.")]
GERMAN = {"de": "Guten Tag. ", "en": " Hello."}
RENAMED = ColumnsConfig(text="body", prompt="q", completion="a", turns="rest", messages="talk")

EXAMPLES = {
    "text": ("text", {"text": " a\n b "}, None, {"text": " a\n b "}),
    "text of another column": ("text", {"text": "no", "body": "yes"}, RENAMED, {"text": "yes"}),
    "prompt and completion": ("prompt_completion", {"prompt": "1 + 1 =", "completion": " 2"}, None, {"prompt": "1 + 1 =", "completion": " 2", "turns": []}),
    "prompt of messages": ("prompt_completion", {"prompt": [SYSTEM, user("one")], "completion": [assistant("two")]}, None, {**TURN, "turns": []}),
    "completion as a message": ("prompt_completion", {"prompt": "x", "completion": assistant("two")}, None, {"prompt": "x", "completion": "two", "turns": []}),
    "turns of other columns": (
        "prompt_completion",
        {"q": "one", "a": "two", "rest": [{"prompt": user("three"), "completion": [assistant("four")], "id": 7}, {"prompt": "five", "completion": "six"}], "prompt": "no"},
        RENAMED,
        {"prompt": "one", "completion": "two", "turns": [{"prompt": "three", "completion": "four"}, {"prompt": "five", "completion": "six"}]},
    ),
    "null in place of turns": ("prompt_completion", {"q": "one", "a": "two", "rest": None}, RENAMED, {"prompt": "one", "completion": "two", "turns": []}),
    "chat": ("chat", {"messages": FIVE[:3]}, None, TURN),
    "chat without system": ("chat", {"talk": [user("one"), assistant("two")]}, RENAMED, {"prompt": [user("one")], "completion": "two"}),
    "chat in ShareGPT's form": ("chat", {"messages": SHAREGPT}, None, TURN),
    "chat in parts": ("chat", {"messages": IN_PARTS}, None, {"prompt": [user("Look: here")], "completion": "seen"}),
    "first turn": ("first_turn", {"messages": FIVE}, None, TURN),
    "last turn": ("last_turn", {"messages": FIVE}, None, {"prompt": FIVE[:4], "completion": "four"}),
    "all turns": ("all_turns", {"messages": FIVE}, None, {**TURN, "turns": [{"prompt": "three", "completion": "four"}]}),
    "all turns of three": (
        "all_turns",
        {"messages": [*FIVE, user("five"), assistant("six")]},
        None,
        {**TURN, "turns": [{"prompt": "three", "completion": "four"}, {"prompt": "five", "completion": "six"}]},
    ),
    "all turns, the last without answer": ("all_turns", {"messages": [*FIVE, user("five")]}, None, {**TURN, "turns": [{"prompt": "three", "completion": "four"}]}),
    "last turn, the last without answer": ("last_turn", {"messages": [*FIVE, user("five")]}, None, {"prompt": FIVE[:4], "completion": "four"}),
    "thinking in the text stays in chat": ("chat", {"messages": [user("a"), assistant("<think>why</think>Yes.")]}, None, {"prompt": [user("a")], "completion": "<think>why</think>Yes."}),
    "reasoning, <think>": ("reasoning", {"messages": [user("a"), assistant(" <think> why </think> Yes. ")]}, None, {"prompt": [user("a")], "completion": THOUGHT}),
    "reasoning, <reasoning>": ("reasoning", {"messages": [user("a"), assistant("<reasoning>why</reasoning>Yes.")]}, None, {"prompt": [user("a")], "completion": THOUGHT}),
    "reasoning, <|begin_of_thought|>": ("reasoning", {"messages": [user("a"), assistant(LONG_MARKS)]}, None, {"prompt": [user("a")], "completion": THOUGHT}),
    "reasoning, reasoning_content": ("reasoning", {"messages": [user("a"), assistant("Yes.", reasoning_content="why\n")]}, None, {"prompt": [user("a")], "completion": THOUGHT}),
    "reasoning, thinking": ("reasoning", {"messages": [user("a"), assistant("Yes.", thinking="why", reasoning_content=None)]}, None, {"prompt": [user("a")], "completion": THOUGHT}),
    "reasoning, a column": ("reasoning", {"prompt": "a", "r": "why", "completion": "Yes."}, ColumnsConfig(reasoning="r"), {"prompt": "a", "completion": THOUGHT, "turns": []}),
    "reasoning, earlier answers": ("reasoning", {"messages": TWICE}, None, {"prompt": [user("a"), assistant("b"), user("c")], "completion": THOUGHT}),
    "reasoning, earlier marks": ("reasoning", {"messages": [SYSTEM, user("a"), assistant("<think>old</think>\nb"), *TWICE[2:]]}, None, {"prompt": [SYSTEM, user("a"), assistant("b"), user("c")], "completion": THOUGHT}),
    "answer alone": ("reasoning_answer", {"messages": TWICE[2:]}, None, {"prompt": [user("c")], "completion": "Yes."}),
    "answer alone, a column": ("reasoning_answer", {"prompt": "a", "r": "why", "completion": "Yes."}, ColumnsConfig(reasoning="r"), {"prompt": "a", "completion": "Yes.", "turns": []}),
    "OpenCodeInstruct": ("opencodeinstruct", {"input": "Sort.\n", "output": "sorted(x)\n", "unit_tests": "[]"}, None, {"prompt": "Sort.\n\n", "completion": "sorted(x)\n"}),
    "swallow-code": ("swallow_code", {"text": "import os\n", "text_formatted": "no"}, None, {"text": "import os\n"}),
    "gsm8k": ("question_answer", {"question": " Six times seven? ", "answer": "42\n"}, None, {"prompt": "Question: Six times seven?\nAnswer:", "completion": " 42"}),
    "into English": ("translate_to_english", {"translation": GERMAN}, None, {"prompt": "Translate this from German to English:\nGerman: Guten Tag.\nEnglish:", "completion": " Hello."}),
    "from English": ("translate_from_english", {"translation": GERMAN}, None, {"prompt": "Translate this from English to German:\nEnglish: Hello.\nGerman:", "completion": " Guten Tag."}),
    "WMT22's column": ("translate_to_english", {"de-en": GERMAN}, None, {"prompt": "Translate this from German to English:\nGerman: Guten Tag.\nEnglish:", "completion": " Hello."}),
    "WMT22's other column": ("translate_from_english", {"en-is": {"en": "Hi", "is": "Hæ"}}, None, {"prompt": "Translate this from English to Icelandic:\nEnglish: Hi\nIcelandic:", "completion": " Hæ"}),
}  # fmt: skip


@pytest.mark.parametrize("name, row, columns, expected", EXAMPLES.values(), ids=EXAMPLES)
def test_what_a_transform_gives(name, row, columns, expected):
    """Guards against a lost system message, a turn too few or too many, thinking in the wrong place, changed white space, and a column read by its default name."""
    before = json.dumps(row)
    assert TRANSFORMS[name](row, columns or ColumnsConfig()) == expected
    assert json.dumps(row) == before


def test_every_transform_has_an_example():
    """Guards against a transform that is added and never tried."""
    assert {name for name, *_ in EXAMPLES.values()} == set(TRANSFORMS)


# ---------------------------------------------------------------------------------------------------------------------------------------
# As tokens, in both modes

TALK = [
    {"role": "system", "content": words(20)},
    user(words(21)),
    assistant(words(30, 31)),
    user(words(22, 23)),
    assistant(words(32)),
]
S, U, A, END = 5, 3, 4, 0
TOKENS = {
    "first_turn": ([S, 20, END, U, 21, END, A, 30, 31, END], [(7, 10)]),
    "last_turn": ([S, 20, END, U, 21, END, A, 30, 31, END, U, 22, 23, END, A, 32, END], [(15, 17)]),
    "all_turns": ([S, 20, END, U, 21, END, A, 30, 31, END, U, 22, 23, END, A, 32, END], [(7, 10), (15, 17)]),
}


@pytest.mark.parametrize("transform", TOKENS)
def test_one_conversation_three_ways(by_word, transform):
    """Guards against an answer that is learnt but should be read, an end-of-text token outside of its answer, and modes that differ."""
    assert in_both_modes(by_word, {"messages": TALK}, transform=transform) == Document(*TOKENS[transform])


@pytest.mark.parametrize("template", [TEMPLATE, CHATML], ids=["plain", "chatml"])
@pytest.mark.parametrize(
    "transform, answers",
    [("first_turn", ["two<eos>"]), ("last_turn", ["four<eos>"]), ("all_turns", ["two<eos>", "four<eos>"])],
)
def test_tokens_are_the_templates_own_rendering(tokenizer, template, transform, answers):
    """Guards against a prompt that the chat model never saw in this form. What follows the last answer (a line break) is not the assistant's."""
    tokenizer.chat_template = template
    document = in_both_modes(tokenizer, {"messages": FIVE}, transform=transform)
    whole = tokenizer.apply_chat_template(FIVE[:3] if transform == "first_turn" else FIVE, tokenize=False)
    assert tokenizer.decode(document.tokens) == whole.removesuffix("\n") and whole.endswith("<eos>\n")
    assert spoken(tokenizer, document) == answers


@pytest.mark.parametrize(
    "transform, answer", [("reasoning", "<think>\nwhy\n</think>\n\nYes.<eos>"), ("reasoning_answer", "Yes.<eos>")]
)
@pytest.mark.parametrize(
    "last",
    [
        assistant("<think>why</think>Yes."),
        assistant("Yes.", reasoning_content="why"),
        assistant("<|begin_of_thought|>why<|end_of_thought|>Yes."),
    ],
    ids=["text", "field", "marks"],
)
def test_reasoning_as_tokens(tokenizer, transform, answer, last):
    """Guards against earlier thinking in the prompt, and a form of thinking that comes out in other tokens."""
    document = in_both_modes(
        tokenizer, {"messages": [user("a"), assistant("<think>old</think>b"), user("c"), last]}, transform=transform
    )
    assert tokenizer.decode(
        document.tokens
    ) == f"<|user|>a<eos>\n<|assistant|>b<eos>\n<|user|>c<eos>\n<|assistant|>{answer}" and spoken(
        tokenizer, document
    ) == [answer]


@pytest.mark.parametrize("line_break", ["\n", ""])
def test_a_template_that_opens_the_thinking(tokenizer, line_break):
    """Guards against '<think>' twice, once by the generation prompt and once by the answer, in any turn."""
    tokenizer.chat_template = TEMPLATE.replace(
        "<|assistant|>{% endif %}", f"<|assistant|><think>{line_break}{{% endif %}}"
    )
    thought = THOUGHT.removeprefix("<think>\n")
    document = in_both_modes(
        tokenizer, {"messages": [user("a"), assistant("<think>why</think>Yes.")]}, transform="reasoning"
    )
    assert tokenizer.decode(
        document.tokens
    ) == f"<|user|>a<eos>\n<|assistant|><think>{line_break}{thought}<eos>" and spoken(tokenizer, document) == [
        f"{thought}<eos>"
    ]
    document = in_both_modes(
        tokenizer, {"messages": [user("a"), assistant(THOUGHT), user("b"), assistant(THOUGHT)]}, transform="all_turns"
    )
    opened = f"<eos>\n<|assistant|><think>{line_break}{thought}<eos>"
    assert (
        tokenizer.decode(document.tokens) == f"<|user|>a{opened}\n<|user|>b{opened}"
        and spoken(tokenizer, document) == [f"{thought}<eos>"] * 2
    )


def test_text_in_the_chat_template(by_word, tokenizer):
    """Guards against data.apply_chat_template doing nothing, touching messages twice, or turns of text that stay outside of the template."""
    document = in_both_modes(
        tokenizer,
        {"input": "Sort it.\n", "output": " sorted(x)\n"},
        transform="opencodeinstruct",
        apply_chat_template=True,
    )
    assert tokenizer.decode(document.tokens) == "<|user|>Sort it.<eos>\n<|assistant|>sorted(x)<eos>"
    row = {
        "prompt": f" {words(10)} \n",
        "completion": words(30),
        "more": [{"prompt": words(11), "completion": words(31)}],
    }
    data = {"transform": "prompt_completion", "columns": ColumnsConfig(turns="more")}
    assert in_both_modes(by_word, row, **data) == Document([10, 30, END, 11, 31, END], [(1, 3), (4, 6)])
    templated = Document([U, 10, END, A, 30, END, U, 11, END, A, 31, END], [(4, 6), (10, 12)])
    assert in_both_modes(by_word, row, **data, apply_chat_template=True) == templated
    assert in_both_modes(by_word, {**row, "prompt": [user(words(10))]}, **data, apply_chat_template=True) == templated
    asked = in_both_modes(
        by_word, {"question": words(10), "answer": words(30)}, transform="question_answer", apply_chat_template=True
    )
    assert asked.tokens == [U, 2, 10, 2, END, A, 30, END]  # 2: the words Question: and Answer:


@pytest.mark.parametrize(
    "row, transform",
    [({"prompt": words(10, 11), "completion": words(30, 31)}, "prompt_completion"), ({"messages": TALK}, "all_turns")],
)
def test_the_beginning_of_text_token_stands_once(by_word, row, transform):
    """Guards against two of them (one by the template, one by the tokenizer), or one at the beginning of an answer or of a later turn."""
    by_word.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 6)]
    )
    by_word.chat_template = "<bos> " + WORDS
    document = in_both_modes(by_word, row, transform=transform)
    assert document.tokens == [6] + (
        [10, 11, 30, 31, END] if transform == "prompt_completion" else TOKENS["all_turns"][0]
    )
    assert document.spans == ([(3, 6)] if transform == "prompt_completion" else [(8, 11), (16, 18)])


@pytest.mark.parametrize("kind", [structured, strided])
def test_another_end_than_the_tokenizers(by_word, kind):
    """Guards against answers that are trained to end with a token at which the chat model never stops."""
    by_word.eos_token = "<pad>"
    message = refusal(
        document_of, kind("some/rows", transform="chat", on_bad_row="skip"), by_word, {"messages": TALK[:3]}
    )
    assert message.startswith(
        "model.eos_token: the chat template does not end an answer with '<pad>' but with '<eos> '; name the token that ends an answer"
    ) and message.endswith("('some/rows', row 0)")


@pytest.mark.parametrize("kind", [structured, strided])
def test_no_chat_template(tmp_path, by_word, kind):
    """Guards against messages in a form of our own making, and against `skip` that leaves out every row for it. Plain text needs no template."""
    by_word.chat_template = None
    path = write(
        tmp_path / "rows.jsonl",
        [{"prompt": words(10), "completion": words(30, 31)}, {"prompt": [user("w10")], "completion": words(30, 31)}],
    )
    message = refusal(documents_of, kind(path, transform="prompt_completion", on_bad_row="skip"), by_word)
    assert message.startswith(
        "model.tokenizer: the rows hold messages, and the tokenizer has no chat template"
    ) and message.endswith(f"({str(path)!r}, row 1)")
    assert documents_of(kind(path, transform="prompt_completion", max_documents=1), by_word) == [
        Document([10, 30, 31, END], [(1, 4)])
    ]


@pytest.mark.parametrize("kind", [structured, strided])
def test_a_template_that_refuses_a_conversation(tmp_path, by_word, capsys, kind):
    """Guards against a traceback out of the template, and against one row stopping a run that may leave it out."""
    by_word.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + WORDS
    )
    path = write(tmp_path / "rows.jsonl", [{"messages": TALK[1:3]}, {"messages": TALK[:3]}])
    message = refusal(documents_of, kind(path, transform="chat"), by_word)
    assert (
        message.startswith(
            f"data: {str(path)!r}, row 1, column 'messages': the tokenizer's chat template cannot render"
        )
        and ": System role not supported" in message
    )
    assert documents_of(kind(path, transform="chat", on_bad_row="skip"), by_word) == [
        Document([U, 21, END, A, 30, 31, END], [(4, 7)])
    ]
    assert "data: 1 of 2 rows" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------------------------
# Strided mode: what is cut, what is refused, where anchors are


def pair(num_prompt: int, num_completion: int) -> dict:
    return {"prompt": words(*range(10, 10 + num_prompt)), "completion": words(*range(40, 40 + num_completion))}


@pytest.mark.parametrize(
    "num_prompt, num_completion, expected",
    [
        (3, 4, Document([10, 11, 12, 40, 41, 42, 43, END], [(3, 8)])),
        (3, 5, Document([10, 11, 12, 40, 41, 42, 43, 44], [(3, 8)])),
        (3, 30, Document([10, 11, 12, 40, 41, 42, 43, 44], [(3, 8)])),
        (6, 1, Document([10, 11, 12, 13, 14, 15, 40, END], [(6, 8)])),
        (6, 9, Document([10, 11, 12, 13, 14, 15, 40, 41], [(6, 8)])),
    ],
)
def test_completions_are_cut_at_the_sequence_length(by_word, num_prompt, num_completion, expected):
    """Guards against an end-of-text token behind a completion that was cut, and spans that reach past the tokens."""
    assert (
        document_of(
            strided(transform="prompt_completion", sequence_length=8), by_word, pair(num_prompt, num_completion)
        )
        == expected
    )


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
    path = write(tmp_path / "rows.jsonl", [pair(3, 3), pair(num_prompt, 3)])
    data = {"transform": "prompt_completion", "sequence_length": 8}
    reason = "row 1, column 'prompt': the prompt has 8 tokens or more, which leaves nothing of data.sequence_length 8 to the completion"
    assert (
        refusal(documents_of, strided(path, **data), by_word)
        == f"data: {str(path)!r}, {reason}; data.on_bad_row: skip leaves such rows out"
    )
    assert documents_of(strided(path, **data, on_bad_row="skip"), by_word) == [
        Document([10, 11, 12, 40, 41, 42, END], [(3, 7)])
    ]
    assert f"data: 1 of 2 rows of {str(path)!r} left out: 1 like {reason}\n" in capsys.readouterr().out


ROOM = "(ebft.context_length or min_completion_prefix + ebft.generate_max_len)"


@pytest.mark.parametrize(
    "ebft, row, too_short",
    [
        ({}, pair(3, 1), None),  # two tokens with the end-of-text token, one rollout
        ({"generate_max_len": 3}, pair(3, 2), None),
        (
            {"generate_max_len": 4},
            pair(3, 2),
            "3 tokens of the completion, behind 3, have no room for one anchor, which needs 4",
        ),
        ({"min_completion_prefix": 2}, pair(3, 3), None),
        (
            {"min_completion_prefix": 2},
            pair(3, 2),
            "3 tokens of the completion, behind 3, have no room for one anchor, which needs 4",
        ),
        ({"context_length": 6}, pair(2, 5), None),  # the first anchor at 6, the completion ends at 8
        (
            {"context_length": 6},
            pair(2, 4),
            "5 tokens of the completion, behind 2, have no room for one anchor, which needs 6",
        ),
        ({"context_length": 6}, pair(6, 1), None),  # the prompt is context enough
        ({}, pair(7, 9), "1 tokens of the completion, behind 7, have no room for one anchor, which needs 2"),
    ],
)
def test_room_for_one_anchor(by_word, ebft, row, too_short):
    """Guards against documents that take part in the order and never have a rollout, and against one that would just fit being refused."""
    config = strided("rows", transform="prompt_completion", sequence_length=8, ebft=ebft)
    if too_short is None:
        rows = Rows(table_of([document_of(config, by_word, row)]), [[0]])
        assert batch_of(config, rows, [0], [0], 1).valid.tolist() == [[True]]
    else:
        assert (
            refusal(document_of, config, by_word, row)
            == f"data: 'rows', row 0, column 'completion': {too_short} {ROOM}; data.on_bad_row: skip leaves such rows out"
        )


def test_one_turn_with_room_is_enough(by_word):
    """Guards against a conversation being refused for a short answer beside a long one."""
    document = document_of(strided(transform="all_turns", ebft={"generate_max_len": 3}), by_word, {"messages": TALK})
    assert document.spans == [(7, 10), (15, 17)]
    short = [*TALK[:2], assistant(words(30)), *TALK[3:]]
    message = refusal(
        document_of, strided(transform="all_turns", ebft={"generate_max_len": 3}), by_word, {"messages": short}
    )
    assert (
        "column 'messages': 2 tokens of the completion, behind 7, have no room for one anchor, which needs 3" in message
    )


# (tokens, spans) of the documents of each row: raw text, one answer, several answers, an answer side by side with the next, one at the very beginning
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
    """Guards against anchors in what is only read, windows over an answer's end, a stride that goes on from the answer before, and a prefix counted from the document."""
    settings = dict(
        context_length=context_length,
        min_completion_prefix=min_completion_prefix,
        stride=stride,
        num_generated=num_generated,
    )
    batch, expected = batch_from(**settings), [slow_anchors(row, **settings) for row in PACKED]
    assert [places[valid].tolist() for places, valid in zip(batch.anchors, batch.valid, strict=True)] == expected
    assert batch.anchors.shape == (4, max(map(len, expected))) and max(map(len, expected)) > 0
    for row in range(4):  # and alone, without the padding of the others
        single = batch_from([row], **settings)
        assert single.anchors[single.valid].tolist() == expected[row]


def test_anchors_by_hand():
    """Guards against the slow loop itself being wrong: one row, counted on paper."""
    settings = dict(context_length=4, min_completion_prefix=1, stride=2, num_generated=2)
    # raw text 0..8: 4, 6 (8 has no second token). Then 9 on: answer 4..13: 5, 7, 9, 11. Then 23 on: answers 3..7: 4, 6; 11..12: 12 would pass its end; 15..19: 16, 18
    assert slow_anchors(PACKED[0], **settings) == [4, 6, 14, 16, 18, 20, 27, 29, 39, 41]
    batch = batch_from(**settings)
    assert batch.anchors[0][batch.valid[0]].tolist() == [4, 6, 14, 16, 18, 20, 27, 29, 39, 41]


def test_cross_entropy_is_in_the_completions_alone():
    """Guards against a prompt's or a user's tokens being learnt, an answer's first token not being learnt, and a token predicted from another document or from padding."""
    batch = batch_from(context_length=1, min_completion_prefix=0, stride=1, num_generated=1)
    targets = document_targets(batch)
    assert targets.shape == (4, 42) and [row.nonzero().flatten().tolist() for row in targets] == [
        slow_targets(row) for row in PACKED
    ]
    # row 1 by hand: tokens 0..4 are a prompt, 5 its answer; then a document at 6: prompt 6, 7, answers 8..10 and 11..17
    assert targets[1].nonzero().flatten().tolist() == [4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert batch.completion_ids[1, :19].tolist() == [-1] * 5 + [0] + [-1] * 2 + [1] * 3 + [2] * 7 + [-1]


def test_from_rows_to_anchors_and_targets(tmp_path, by_word):
    """Guards against spans that are lost on the way from a file, through cache and packing, to the batch."""
    path = write(
        tmp_path / "rows.jsonl", [{"messages": TALK}, {"messages": [user(words(21)), assistant(words(*range(50, 56)))]}]
    )
    config = strided(path, transform="all_turns", packing=True, sequence_length=40, ebft={"min_completion_prefix": 1})
    rows, _ = load_rows(config, by_word)
    batch = batch_of(config, rows, [0], [0], 1)
    chat, short = TOKENS["all_turns"][0], [U, 21, END, A, 50, 51, 52, 53, 54, 55, END]
    ids = batch.document_ids[0].tolist()
    assert len(rows) == 1 and ids in (chat + short, short + chat)
    chat_at, short_at = (0, 17) if ids[0] == S else (11, 0)
    anchors = [
        chat_at + 8,
        short_at + 5,
        short_at + 7,
        short_at + 9,
    ]  # the second answer of the chat has two tokens, one of them the prefix
    assert sorted(batch.anchors[batch.valid].tolist()) == sorted(anchors)
    learnt = torch.tensor(ids)[1:][document_targets(batch)[0]].tolist()
    assert sorted(learnt) == sorted([30, 31, END, 32, END, 50, 51, 52, 53, 54, 55, END])


# ---------------------------------------------------------------------------------------------------------------------------------------
# Structured mode: lengths


@pytest.mark.parametrize(
    "data, ebft, reason",
    [
        ({"max_prompt_length": 7}, {"max_completion_length": 3}, None),
        ({"max_prompt_length": 6}, {"max_completion_length": 3}, "column 'messages': the prompt has 7 tokens, more than data.max_prompt_length 6, and prompts are never cut"),
        ({"max_prompt_length": 7}, {"max_completion_length": 2}, "column 'messages': the ground truth has 3 tokens (end-of-text token included), more than ebft.max_completion_length 2"),
        # prompt 7, answers 2 x 3 and an end for the first if it is cut short, the user's turn 5
        ({"max_prompt_length": 7, "max_conversation_length": 19}, {"max_completion_length": 3}, None),
        (
            {"max_prompt_length": 7, "max_conversation_length": 18},
            {"max_completion_length": 3},
            "column 'messages': the conversation can come to 19 tokens with answers of ebft.max_completion_length 3, more than data.max_conversation_length 18; raise data.max_conversation_length",
        ),
        (
            {"max_prompt_length": 7, "max_conversation_length": None},
            {"max_completion_length": 3},
            "column 'messages': the conversation can come to 19 tokens with answers of ebft.max_completion_length 3, more than data.max_prompt_length + ebft.max_completion_length 10; raise data.max_conversation_length",
        ),
    ],
)  # fmt: skip
def test_lengths_of_a_conversation(by_word, data, ebft, reason):
    """Guards against a limit that is off by one, a prompt that is cut, and a context that a rollout server would refuse in the middle of a run."""
    config = structured("rows", transform="all_turns", ebft=ebft, **data)
    if reason is None:
        assert document_of(config, by_word, {"messages": TALK}) == Document(*TOKENS["all_turns"])
    else:
        assert (
            refusal(document_of, config, by_word, {"messages": TALK})
            == f"data: 'rows', row 0, {reason}; data.on_bad_row: skip leaves such rows out"
        )


def test_the_longest_conversation_is_as_long_as_was_reckoned(by_word):
    """Guards against the reckoning itself: a policy that never stops comes to exactly the 19 tokens of the test above. One turn always fits."""
    config = structured(
        transform="all_turns", max_prompt_length=7, max_conversation_length=19, ebft={"max_completion_length": 3}
    )

    def never_stops(contexts, limits, keys, n):
        return [[([99] * limit, None, True)] * n for limit in limits]

    conversation = conversation_of([document_of(config, by_word, {"messages": TALK})])
    ((completion, *_),) = converse(config, [conversation], [0], never_stops, eos_token_id=END)
    assert (
        len(conversation.prompt) + len(completion.tokens) == 19
        and completion.tokens == [99] * 3 + [END, U, 22, 23, END, A] + [99] * 3
    )
    alone = structured(
        transform="chat", max_prompt_length=7, max_conversation_length=10, ebft={"max_completion_length": 3}
    )
    assert document_of(alone, by_word, {"messages": TALK[:3]}).spans == [(7, 10)]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Bad rows

OK = [user("a long question"), assistant("a long answer")]
PAIR = {"prompt": "a question", "completion": "an answer", "more": []}
TURNS = {"transform": "prompt_completion", "columns": ColumnsConfig(turns="more")}
CHAT = {"transform": "chat"}
R = {"transform": "reasoning"}
COLUMN = {"transform": "reasoning", "columns": ColumnsConfig(reasoning="r")}
WHY = {"prompt": "a", "r": "why", "completion": "an answer"}
GSM = {"question": "a", "answer": "an answer"}
CODE = {"input": "a", "output": "an answer"}
GERMAN_ROW = {"translation": GERMAN}
BAD = {  # data, a good row, the bad one, what the message says of it
    "no prompt": (TURNS, PAIR, {"completion": "x", "more": []}, "'prompt': None is not text"),
    "empty prompt": (TURNS, PAIR, {**PAIR, "prompt": " \n"}, r"'prompt': ' \n' is empty"),
    "prompt of numbers": (TURNS, PAIR, {**PAIR, "prompt": 7}, "'prompt': 7 is not text"),
    "no completion": (TURNS, PAIR, {"prompt": "x", "more": []}, "'completion': None is not text"),
    "two completions": (TURNS, PAIR, {**PAIR, "completion": ["x", "y"]}, "'completion': ['x', 'y'] is not text"),
    "turns as text": (TURNS, PAIR, {**PAIR, "more": "x"}, "'more': 'x' is not a list of turns"),
    "half a turn": (TURNS, PAIR, {**PAIR, "more": [{"prompt": "x"}]}, "'more[0]': {'prompt': 'x'} is not of the form {prompt, completion}"),
    "turn of null": (TURNS, PAIR, {**PAIR, "more": [{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": None}]}, "'more[1].completion': None is not text"),
    "messages of null": (CHAT, {"messages": OK}, {"messages": None}, "'messages': None is not a list of messages (role, content)"),
    "no messages": (CHAT, {"messages": OK}, {"other": 1}, "'messages': None is not a list of messages (role, content)"),
    "empty list": (CHAT, {"messages": OK}, {"messages": []}, "'messages': [] is not a list of messages (role, content)"),
    "messages as text": (CHAT, {"messages": OK}, {"messages": "Hi"}, "'messages': 'Hi' is not a list of messages (role, content)"),
    "message as text": (CHAT, {"messages": OK}, {"messages": ["Hi", "Ho"]}, "'messages[0]': 'Hi' is not a message (role, content)"),
    "no role": (CHAT, {"messages": OK}, {"messages": [{"content": "Hi"}, OK[1]]}, "'messages[0]': the role is None where 'user' should speak"),
    "no content": (CHAT, {"messages": OK}, {"messages": [OK[0], {"role": "assistant"}]}, "'messages[1].content': None is not text"),
    "empty content": (CHAT, {"messages": OK}, {"messages": [OK[0], assistant("")]}, "'messages[1].content': '' is empty"),
    "content as a number": (CHAT, {"messages": OK}, {"messages": [user(3), OK[1]]}, "'messages[0].content': 3 is not text"),
    "an image": (CHAT, {"messages": OK}, {"messages": [user([{"type": "image", "url": "x"}, {"type": "text", "text": "y"}]), OK[1]]}, "'messages[0].content': [{'type': 'image'"),
    "an image with a text": (CHAT, {"messages": OK}, {"messages": [user([{"type": "image", "text": "x"}, {"type": "text", "text": "y"}]), OK[1]]}, "'messages[0].content': [{'"),
    "empty ShareGPT": (CHAT, {"messages": SHAREGPT}, {"messages": [SHAREGPT[1], {"from": "gpt", "value": ""}]}, "'messages[1].value': '' is empty"),
    "user twice": (CHAT, {"messages": OK}, {"messages": [OK[0], *OK]}, "'messages[1]': the role is 'user' where 'assistant' should speak"),
    "assistant twice": ({"transform": "all_turns"}, {"messages": OK}, {"messages": [*OK, OK[1]]}, "'messages[2]': the role is 'assistant' where 'user' should speak"),
    "assistant first": ({"transform": "first_turn"}, {"messages": OK}, {"messages": [OK[1], *OK]}, "'messages[0]': the role is 'assistant' where 'user' should speak"),
    "assistant behind system": ({"transform": "last_turn"}, {"messages": OK}, {"messages": [SYSTEM, OK[1]]}, "'messages[1]': the role is 'assistant' where 'user' should speak"),
    "two system messages": (CHAT, {"messages": OK}, {"messages": [SYSTEM, SYSTEM, *OK]}, "'messages[1]': the role is 'system' where 'user' should speak"),
    "a tool": (CHAT, {"messages": OK}, {"messages": [OK[0], {"role": "tool", "content": "3"}, OK[1]]}, "'messages[1]': the role is 'tool' where 'assistant' should speak"),
    "no answer": (CHAT, {"messages": OK}, {"messages": [SYSTEM, OK[0]]}, "'messages': the conversation has no turn of the assistant"),
    "system alone": ({"transform": "all_turns"}, {"messages": OK}, {"messages": [SYSTEM]}, "'messages': the conversation has no turn of the assistant"),
    "several answers": (CHAT, {"messages": OK}, {"messages": [*OK, *OK]}, "'messages': the conversation has 2 answers; data.transform says which to learn: first_turn, last_turn or all_turns"),
    "no thinking": (R, {"messages": [OK[0], assistant(THOUGHT)]}, {"messages": OK}, "'messages[1]': the last answer has no thinking before it (<think> .. </think>, or the field reasoning_content): 'a long answer'"),
    "empty thinking": (R, {"messages": [OK[0], assistant(THOUGHT)]}, {"messages": [OK[0], assistant("<think> </think>x")]}, "'messages[1]': the last answer has no thinking before it"),
    "thinking without end": (R, {"messages": [OK[0], assistant(THOUGHT)]}, {"messages": [OK[0], assistant("<think> so so")]}, "'messages[1]': the last answer has no thinking before it"),
    "thinking alone": ({"transform": "reasoning_answer"}, {"messages": [OK[0], assistant(THOUGHT)]}, {"messages": [OK[0], assistant("<think>x</think> ")]}, "'messages[1]': the last answer has no answer behind its thinking"),
    "column of thinking": (COLUMN, WHY, {**WHY, "r": None}, "'r': None is not text"),
    "column of no thinking": ({**COLUMN, "transform": "reasoning_answer"}, WHY, {**WHY, "r": " "}, "'r': ' ' is empty"),
    "thinking, no completion": (COLUMN, WHY, {"prompt": "a", "r": "why"}, "'completion': None is not text"),
    "no question": ({"transform": "question_answer"}, GSM, {"answer": "x"}, "'question': None is not text"),
    "empty answer": ({"transform": "question_answer"}, GSM, {**GSM, "answer": " "}, "'answer': ' ' is empty"),
    "no input": ({"transform": "opencodeinstruct"}, CODE, {"output": "x"}, "'input': None is not text"),
    "empty output": ({"transform": "opencodeinstruct"}, CODE, {**CODE, "output": ""}, "'output': '' is empty"),
    "no translation": ({"transform": "translate_to_english"}, GERMAN_ROW, {"other": 1}, "'translation': None is not a text in English and in one other language ({en: .., de: ..}; known: cs, da, de, en, es,"),
    "one language": ({"transform": "translate_to_english"}, GERMAN_ROW, {"translation": {"en": "x"}}, "'translation': {"),
    "unknown language": ({"transform": "translate_from_english"}, GERMAN_ROW, {"translation": {"en": "x", "tlh": "y"}}, "'translation': {"),
    "empty translation": ({"transform": "translate_from_english"}, GERMAN_ROW, {"translation": {"en": "x", "de": " "}}, "'translation.de': ' ' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [structured, strided])
@pytest.mark.parametrize("data, good, bad, says", BAD.values(), ids=BAD)
def test_bad_rows(tmp_path, tokenizer, capsys, kind, data, good, bad, says):
    """Guards against a traceback, a bad row that trains on something else, a message without dataset, row and column, and `skip` that leaves out more than it says."""
    path = write(tmp_path / "rows.jsonl", [good, good, bad, good])
    message, remedy = (
        refusal(documents_of, kind(path, **data), tokenizer),
        "; data.on_bad_row: skip leaves such rows out",
    )
    assert message.startswith(f"data: {str(path)!r}, row 2, column {says}") and message.endswith(remedy)
    capsys.readouterr()
    kept = documents_of(kind(path, **data, on_bad_row="skip"), tokenizer)
    expected = document_of(kind(**data), tokenizer, good)
    assert isinstance(expected, Document) and kept == [expected] * 3
    reason = message.removeprefix(f"data: {str(path)!r}, ").removesuffix(remedy)
    assert capsys.readouterr().out == f"data: 1 of 4 rows of {str(path)!r} left out: 1 like {reason}\n"


def test_all_reasons_are_counted(tmp_path, tokenizer, capsys):
    """Guards against reasons that are told apart by a row's number, or rows whose reason is not told, in whatever order they come."""
    short, system = {"messages": [user("Hi")]}, {"messages": [SYSTEM, SYSTEM, *OK]}
    path = write(tmp_path / "rows.jsonl", [short, {"messages": OK}, system, short, {"messages": None}, short, system])
    kept = documents_of(structured(path, transform="chat", on_bad_row="skip"), tokenizer)
    assert [spoken(tokenizer, document) for document in kept] == [["a long answer<eos>"]]
    said = capsys.readouterr().out
    assert said.startswith(
        f"data: 6 of 7 rows of {str(path)!r} left out: 3 like row 0, column 'messages': the conversation has no turn of the assistant; 2 like row 2, column 'messages[1]': "
    )
    assert said.endswith("; 1 like row 4, column 'messages': None is not a list of messages (role, content)\n")


@pytest.mark.parametrize(
    "data, row, column, remedy",
    [
        (
            {"transform": "prompt_completion"},
            {"q": "x", "completion": "y"},
            "prompt",
            "set data.columns.prompt, or another data.transform than prompt_completion",
        ),
        (
            TURNS,
            {"prompt": "x", "completion": "y"},
            "more",
            "set data.columns.turns, or another data.transform than prompt_completion",
        ),
        (CHAT, {"conversations": OK}, "messages", "set data.columns.messages, or another data.transform than chat"),
        (
            COLUMN,
            {"prompt": "x", "completion": "y"},
            "r",
            "set data.columns.reasoning, or another data.transform than reasoning",
        ),
        (
            COLUMN,
            {"prompt": "x", "r": "y"},
            "completion",
            "set data.columns.completion, or another data.transform than reasoning",
        ),
        (
            {"transform": "question_answer"},
            {"question": "x"},
            "answer",
            "the transform question_answer reads it: take another data.transform",
        ),
        (
            {"transform": "opencodeinstruct"},
            {"output": "x"},
            "input",
            "the transform opencodeinstruct reads it: take another data.transform",
        ),
    ],
)
@pytest.mark.parametrize("kind", [structured, strided])
def test_a_column_that_no_row_has(tmp_path, tokenizer, kind, data, row, column, remedy):
    """Guards against a message about each row in place of one about the dataset, and against `skip` leaving out all of them."""
    path = write(tmp_path / "rows.jsonl", [row])
    message = refusal(documents_of, kind(path, **data, on_bad_row="skip"), tokenizer)
    assert message == f"data: {str(path)!r} has no column {column!r}; it has {', '.join(row)}: {remedy}"
