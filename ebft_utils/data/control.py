"""Control tokens that stand in a row's text, such as <|im_end|> in a prompt about chat templates.

Tokenised as the rest, such a text would be the control token itself: a row could end its own answer, or open a turn.
So it is tokenised as ordinary text. Control tokens come from the chat template and the tokenizer alone.

A row without such text does not come here. For a row with it, each control token has a *stand-in*, one character that
no text has:

    message  -> hidden:    its control tokens become stand-ins          before the chat template
    rendered -> exchanged: control tokens <-> stand-ins                 after the chat template
    tokens   =  those of a copy of the tokenizer, to which the stand-ins are the control tokens, and their names text
"""

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .transforms import THINKING_MARKS

FIRST_STAND_IN = 0x100000  # of the private use plane 16


class ControlTokens:
    """The control tokens of a tokenizer, and how a text in which they stand is tokenised as ordinary text.

    Control tokens are the special ones of the tokenizer: those that end, begin and pad a text, and added tokens that
    are marked as special. Marks of thinking are none, and neither is a token of one character or of white space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.inner = tokenizer, None
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        ordinary = {mark for marks in THINKING_MARKS for mark in marks} | {tokenizer.unk_token}
        names = (added | set(tokenizer.all_special_tokens)) - ordinary
        names = sorted(name for name in names if len(name.strip()) > 1)
        self.ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True)) if names else {}
        self.stand_ins = {name: chr(FIRST_STAND_IN + number) for number, name in enumerate(names)}
        pairs = self.stand_ins | {stand_in: name for name, stand_in in self.stand_ins.items()}
        self._hidden, self._exchanged = _replacing(self.stand_ins), _replacing(pairs)
        self._names = re.compile(_alternatives(names)) if names else None
        self._taken = re.compile(_alternatives(self.stand_ins.values())) if names else None

    def in_text(self, text: str) -> str | None:
        """The first control token that stands in a text."""
        found = self._names.search(text) if self._names else None
        return found and found.group()

    def hide(self, text: str) -> str:
        """A text with stand-ins in place of its control tokens, for a chat template."""
        return self._hidden(text)

    def exchange(self, rendered: str) -> str:
        """What a chat template made of hidden texts, with each control token and its stand-in exchanged."""
        return self._exchanged(rendered)

    def why_not(self, text: str) -> str | None:
        """Why the control tokens of a text cannot be tokenised as ordinary text. None: they can."""
        if not self.tokenizer.is_fast:
            return "this tokenizer has no fast form, and cannot keep it apart from the control token"
        if self._taken.search(text):
            return "the text also holds characters of the private use plane 16, which are needed to keep it apart"
        if self.inner is None:
            self.inner = self._copy()
        if self.inner is False or not self._is_ordinary(text):
            return "this tokenizer has no ordinary tokens to write it with"
        return None

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        """Token ids. Stand-ins are control tokens, and control tokens are ordinary text."""
        return [encoding.ids for encoding in self.inner.encode_batch(texts, add_special_tokens=special)]

    def _is_ordinary(self, text: str) -> bool:
        control, unknown = set(self.ids.values()), self.tokenizer.unk_token_id
        names = set(self._names.findall(text))
        written = [self.encode([name], False)[0] for name in names]
        return all(tokens and unknown not in tokens for tokens in written) and not control & set(
            self.encode([text], False)[0]
        )

    def _copy(self) -> Tokenizer | bool:
        """The tokenizer with stand-ins for names. False where that cannot be made."""
        tree = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in tree["added_tokens"]:
            if token["content"] in self.stand_ins:
                token |= {"content": self.stand_ins[token["content"]], "normalized": False, "special": True}
        vocabulary = tree["model"].get("vocab")
        if isinstance(vocabulary, dict):
            tree["model"]["vocab"] = {self.stand_ins.get(name, name): number for name, number in vocabulary.items()}
        elif isinstance(vocabulary, list):
            tree["model"]["vocab"] = [[self.stand_ins.get(name, name), score] for name, score in vocabulary]
        try:
            inner = Tokenizer.from_str(json.dumps(tree))
        except Exception:  # the only class that tokenizers raises
            return False
        inner.no_truncation()
        inner.no_padding()
        kept = all(inner.token_to_id(self.stand_ins[name]) == number for name, number in self.ids.items())
        return kept and inner


def _alternatives(names) -> str:
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))  # the longest of two that begin alike


def _replacing(pairs: dict[str, str]) -> Callable[[str], str]:
    if not pairs:
        return str
    pattern = re.compile(_alternatives(pairs))
    return lambda text: pattern.sub(lambda found: pairs[found.group()], text)
