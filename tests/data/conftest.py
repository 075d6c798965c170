"""Fixtures of the tests on data. A module that defines one of the same name uses its own."""

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conversations import TEMPLATE, WORDS
from helpers import tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What one test tokenises is not what another one finds."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


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
