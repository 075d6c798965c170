"""Chat templates, configurations of both modes, and what a row becomes as tokens. The transforms' tests share them.

The template WORDS goes with the fixture by_word, which makes one token a word, so that ids are read off: w10 is 10,
<user> 3, <assistant> 4, <system> 5, the end-of-text token 0.
"""

from ebft_utils.config.data import EvalConfig, PromptDataConfig, TextDataConfig
from ebft_utils.config.modes import StridedConfig, StructuredConfig
from ebft_utils.config.sections import ModelConfig, StridedEBFTConfig, StructuredEBFTConfig, TrainConfig
from ebft_utils.data.documents import Document, Tokenizing
from ebft_utils.data.sources import training_sources
from ebft_utils.data.tables import documents_from, load_documents

EMPTY_THOUGHT = "{{ '<think>\\n\\n</think>\\n\\n' }}"
SWITCH = f"{{% if enable_thinking is defined and not enable_thinking %}}{EMPTY_THOUGHT}{{% endif %}}"  # as Qwen3's
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING_TEMPLATE = TEMPLATE.replace("<|assistant|>{% endif %}", f"<|assistant|>{SWITCH}{{% endif %}}")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<eos>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}<eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def user(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


THOUGHT = "<think>\nwhy\n</think>\n\nYes."
TALK = [
    {"role": "system", "content": words(20)},
    user(words(21)),
    assistant(words(30, 31)),
    user(words(22, 23)),
    assistant(words(32)),
]
S, U, A, END = 5, 3, 4, 0
TOKENS = {  # of TALK: its document's tokens and spans
    "first_turn": ([S, 20, END, U, 21, END, A, 30, 31, END], [(7, 10)]),
    "last_turn": ([S, 20, END, U, 21, END, A, 30, 31, END, U, 22, 23, END, A, 32, END], [(15, 17)]),
    "all_turns": ([S, 20, END, U, 21, END, A, 30, 31, END, U, 22, 23, END, A, 32, END], [(7, 10), (15, 17)]),
}


def structured(source="unused", *, ebft=None, **data) -> StructuredConfig:
    return StructuredConfig(
        model=ModelConfig("unused"),
        data=PromptDataConfig(**{"dataset": str(source), "max_conversation_length": 5000, **data}),
        ebft=StructuredEBFTConfig(**{"max_completion_length": 300, **(ebft or {})}),
        train=TrainConfig("unused", max_steps=1),
        eval=EvalConfig(num_documents=0),
    )


def strided(source="unused", *, ebft=None, **data) -> StridedConfig:
    """Anchors from token 2 on, every 2, rollouts of 2 tokens."""
    return StridedConfig(
        model=ModelConfig("unused"),
        data=TextDataConfig(**{"dataset": str(source), "sequence_length": 5000, **data}),
        ebft=StridedEBFTConfig(**{"context_length": 2, "stride": 2, "generate_max_len": 2, **(ebft or {})}),
        train=TrainConfig("unused", max_steps=1),
        eval=EvalConfig(num_documents=0),
    )


def document_of(config, tokenizer, row: dict):
    """The row's document, or why there is none."""
    (found,) = Tokenizing(config, tokenizer, *training_sources(config)).documents([row], [0])
    return found if isinstance(found, str) else found[0]


def in_both_modes(tokenizer, row: dict, **data) -> Document:
    """The row's document, which is the same in both modes."""
    found, other = (document_of(kind(**data), tokenizer, row) for kind in (structured, strided))
    assert isinstance(found, Document) and found == other
    return found


def spoken(tokenizer, document: Document) -> list[str]:
    return [tokenizer.decode(document.tokens[start:end]) for start, end in document.spans]


def documents_of(config, tokenizer) -> list[Document]:
    return documents_from(load_documents(config, tokenizer, *training_sources(config))[:])
