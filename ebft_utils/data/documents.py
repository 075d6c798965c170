"""Rows of a dataset -> documents: token ids, and which of them are learnt.

A document is raw text, or a prompt with the turns that follow it. Its *spans* are the parts that are learnt: the whole
of a raw text, each answer of a conversation. All other tokens (prompt, later messages of the user) are context only.

    [ prompt | answer <end> | user's message | answer <end> ]    spans: both answers, each with its end-of-text token

In strided mode a document has at most data.sequence_length tokens. A longer raw text becomes several documents, its
*pieces*, of that many tokens each (data.long_documents: split), or is cut; a prompt with its answers is cut.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..config.modes import Config
from ..config.settings import UserError
from .control import ControlTokens
from .sources import UNREADABLE, Source
from .templates import ChatTemplate
from .transforms import END_OF_THINKING, OF_MESSAGES, START_OF_THINKING, BadRow, shorten

Tokens = list[int]


@dataclass(frozen=True)
class Document:
    """tokens: token ids; spans: (start, end) of each part that is learnt, end-of-text tokens included.

    piece: its number among the pieces of its text, from 0. Of the first piece also unused: how many tokens of the whole
    text are in no piece; lost_ends: how many answers have lost their end.
    """

    tokens: Tokens
    spans: list[tuple[int, int]]
    piece: int = field(default=0, compare=False, repr=False)
    unused: int = field(default=0, compare=False, repr=False)
    lost_ends: int = field(default=0, compare=False, repr=False)


def first_anchor(span: tuple[int, int], context_length: int, min_completion_prefix: int) -> int:
    """The number of a document's tokens that are visible at the first anchor of a span."""
    return max(context_length, span[0] + min_completion_prefix)


@dataclass
class _Pieces:
    """The text of a document before it is tokenised.

    opening: raw text, or the prompt; special: whether the tokenizer adds its special tokens to it; answers: the parts
    that are learnt; between[k]: the text between answers k and k + 1. The columns are for error messages. control: the
    column and the control token that stands in it as ordinary text, if there is one.
    """

    opening: str
    special: bool
    answers: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    prompt_column: str = ""
    answer_columns: list[str] = field(default_factory=list)
    control: tuple[str, str] | None = None


class Tokenizing:
    """Makes documents from the rows of a source: transform, chat template, tokenizer, and the limits of the mode."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, source: Source):
        self.config, self.tokenizer, self.source = config, tokenizer, source
        self.template, self.control, self.told = ChatTemplate(config, tokenizer), ControlTokens(tokenizer), False
        self.adds_end = tokenizer("x")["input_ids"][-1:] == [tokenizer.eos_token_id]
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"])
        # SentencePiece puts a space before each text. A text that continues another one must not get it.
        self.adds_space = bool(tokens) and tokens[0].startswith("\u2581")

    def documents(self, rows: list[dict], numbers: list[int]) -> list[list[Document] | str]:
        """The pieces of each row's document, or the reason why there is none ("": the transform left the row out).

        numbers: row numbers, for messages. Raises UserError for a bad row where data.on_bad_row is error, and for a
        transform that fails or returns something else than it should.
        """
        found = [self._checked(self._pieces, row, number) for row, number in zip(rows, numbers, strict=True)]
        tokens = {}
        for apart in (False, True):
            group = [
                pieces for pieces in found if isinstance(pieces, _Pieces) and (pieces.control is not None) == apart
            ]
            special = iter(self._ids([pieces.opening for pieces in group if pieces.special], True, apart))
            rendered = iter(self._ids([pieces.opening for pieces in group if not pieces.special], False, apart))
            texts = [text for pieces in group for text in pieces.answers + pieces.between]
            further = iter(self._ids_of_rest(texts, apart))
            for pieces in group:
                opening = next(special if pieces.special else rendered)
                answers, between = [next(further) for _ in pieces.answers], [next(further) for _ in pieces.between]
                tokens[id(pieces)] = opening, answers, between
        self._tell(found, numbers)

        def assemble(pieces: _Pieces) -> list[Document]:
            return self._assembled(*tokens[id(pieces)], pieces)

        return [
            self._checked(assemble, pieces, number) if isinstance(pieces, _Pieces) else pieces
            for pieces, number in zip(found, numbers, strict=True)
        ]

    def _checked(self, function, argument, number: int):
        try:
            return function(argument)
        except BadRow as reason:
            if self.config.data.on_bad_row == "error":
                where = f"{self.source.key}: {self.source}, row {number}"
                raise UserError(f"{where}, {reason}; data.on_bad_row: skip leaves such rows out") from None
            return f"row {number}, {reason}"
        except UserError as error:
            raise UserError(f"{error} ({self.source}, row {number})") from None

    def _tell(self, found: list, numbers: list[int]) -> None:
        """Says once where a control token stands in a text, since it is not what such a text may be meant for."""
        for pieces, number in zip(found, numbers, strict=True):
            if not self.told and isinstance(pieces, _Pieces) and pieces.control is not None:
                column, token = pieces.control
                self.told = True
                PartialState().print(
                    f"data: {self.source}, row {number}, column {column!r}: {token} stands in the text, and is "
                    "tokenised as ordinary text, in all rows; data.allow_control_tokens: true takes it as the token"
                )

    def _ids(self, texts: list[str], special: bool, apart: bool) -> list[Tokens]:
        """Token ids. special: with the tokenizer's special tokens; apart: control tokens in a text are ordinary."""
        if not texts:
            return []
        if apart:
            found = self.control.encode(texts, special)
        else:  # verbose: it would warn of texts that are longer than the model reads, before they are cut
            found = self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        if special and self.adds_end:  # _assembled appends the end token, where there is one
            return [tokens[:-1] for tokens in found]
        return found

    def _ids_of_rest(self, texts: list[str], apart: bool) -> list[Tokens]:
        """Token ids of texts that continue another text."""
        if not self.adds_space:
            return self._ids(texts, False, apart)
        before = len(self._ids(["\n"], False, False)[0])
        return [tokens[before:] for tokens in self._ids([f"\n{text}" for text in texts], False, apart)]

    # --- a row's text -------------------------------------------------------------------------------------------------

    def _pieces(self, row: dict) -> _Pieces | str:
        if (reason := row.get(UNREADABLE)) is not None:
            raise BadRow("text", reason)
        example = self._example({name: value for name, value in row.items() if name != UNREADABLE})
        if example is None:
            return ""
        prompt_column, completion_column = self.source.transform.places(self.source.columns)
        if "text" in example:
            control = self._control_token([(prompt_column, example["text"])])
            return _Pieces(example["text"], special=True, prompt_column=prompt_column, control=control)
        prompt, turns, tools = example["prompt"], example.get("turns") or [], example.get("tools")
        answers = [example["completion"], *(turn["completion"] for turn in turns)]
        further = [turn["prompt"] for turn in turns]
        if self.source.transform.name in OF_MESSAGES:
            later = [completion_column] * len(turns)
        else:
            later = [f"{self.source.columns.turns or 'turns'}[{number}].completion" for number in range(len(turns))]
        where = prompt_column, [completion_column, *later]
        texts = [(prompt_column, prompt), *zip(where[1], answers, strict=True)]
        texts += [*zip(later, further, strict=True), (self.source.columns.tools, tools)]
        control = self._control_token(texts)
        templated = self.source.apply_chat_template and isinstance(prompt, str)
        if templated:
            prompt = [{"role": "user", "content": prompt.strip()}]
        if isinstance(prompt, str):
            return _Pieces(prompt, True, answers, further, *where, control)
        opening, answers, between = self._in_template(prompt, answers, further, tools, prompt_column, control)
        if self.template.trims or templated:  # white space between a text prompt and its answer is not part of it
            answers = [answer.strip() for answer in answers]
        if opening.rstrip().endswith(START_OF_THINKING):  # the template opens the thinking, and the answer continues it
            if not all(END_OF_THINKING in answer for answer in answers):
                raise BadRow(
                    completion_column,
                    f"the chat template begins with {START_OF_THINKING}, and an answer has no thinking: it would be "
                    "learnt as if it were; take the transform reasoning, or another template",
                )
            answers = [answer.lstrip().removeprefix(START_OF_THINKING).lstrip("\n") for answer in answers]
        return _Pieces(opening, False, answers, between, *where, control)

    def _in_template(self, prompt: list, answers: list, further: list, tools, column: str, control) -> tuple:
        """Opening, answers and the texts between them, as the chat template writes them."""
        later = [[{"role": "user", "content": words}] if isinstance(words, str) else words for words in further]
        if control is None:
            return self.template.rendered(prompt, answers, later, tools, column)
        hidden = [_replaced(value, self.control.hide) for value in (prompt, answers, later, tools)]
        opening, written, between = self.template.rendered(*hidden, column)
        exchange = self.control.exchange  # an answer that is text is put there as it is
        answers = [
            answer if isinstance(answer, str) else exchange(made) for answer, made in zip(answers, written, strict=True)
        ]
        return exchange(opening), answers, [exchange(text) for text in between]

    def _control_token(self, texts: list[tuple[str, object]]) -> tuple[str, str] | None:
        """The first column in which a control token stands as text, and the token. None where they are allowed.

        Raises BadRow where such a text cannot be tokenised as ordinary text.
        """
        first = None
        for column, value in () if self.config.data.allow_control_tokens else texts:
            for text in _strings(value):
                token = self.control.in_text(text)
                if token is not None and (why := self.control.why_not(text)) is not None:
                    remedy = "data.allow_control_tokens: true takes it as the control token"
                    raise BadRow(column, f"the control token {token} stands in the text, and {why}; {remedy}")
                first = first or (token and (column, token))
        return first

    def _example(self, row: dict) -> dict | None:
        transform = self.source.transform
        try:
            example = transform.function(row, self.source.columns)
        except BadRow:
            raise
        except Exception as error:  # the user's function may raise anything
            if transform.own:
                where = f"{self.source.key}.transform: {transform.name} raised {type(error).__name__}: {error}"
                has = f"; the row has the columns {', '.join(row)}" if isinstance(error, KeyError) else ""
                raise UserError(f"{where}{has}") from None
            if isinstance(error, KeyError):
                raise BadRow(error.args[0], "is missing") from None
            raise
        if transform.own and example is not None:
            self._check_example(example)
        return example

    def _check_example(self, example) -> None:
        """Raises UserError when the user's own transform returns something else than it should."""
        where = f"{self.source.key}.transform: {self.source.transform.name} returned"
        pair = {"prompt", "completion"}
        if not isinstance(example, dict) or set(example) not in ({"text"}, pair, pair | {"turns"}):
            returned = sorted(map(str, example)) if isinstance(example, dict) else shorten(example)
            allowed = "{text}, {prompt, completion} or {prompt, completion, turns}"
            raise UserError(f"{where} {returned}; allowed: {allowed}, or None for a row to leave out")
        if "text" in example and self.config.mode == "structured":
            raise UserError(f"{where} raw text, which train_structured.py cannot use: it needs prompt and completion")
        texts = {name: example[name] for name in ("text", "completion") if name in example}
        prompt = example.get("prompt")
        if not isinstance(prompt, list):
            texts |= {name: example[name] for name in ("prompt",) if name in example}
        elif not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt):
            wrong = "which is neither text nor a list of messages (role, content)"
            raise UserError(f"{where} the prompt {shorten(prompt)}, {wrong}")
        turns = example.get("turns") or []
        if not isinstance(turns, list):
            raise UserError(f"{where} turns {shorten(turns)}, which is not a list of {{prompt, completion}}")
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict) or set(turn) != pair:
                raise UserError(f"{where} turns[{number}] {shorten(turn)}; allowed: {{prompt, completion}}")
            texts |= {f"turns[{number}].{name}": value for name, value in turn.items()}
        for name, value in texts.items():
            if not isinstance(value, str):
                raise UserError(f"{where} {name} {shorten(value)}, which is not text")
            if not value.strip():
                raise BadRow(name, f"{shorten(value)} is empty")

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _assembled(
        self, opening: Tokens, answers: list[Tokens], between: list[Tokens], pieces: _Pieces
    ) -> list[Document]:
        data, structured, end = self.config.data, self.config.mode == "structured", [self.tokenizer.eos_token_id]
        # An answer that the user replies to has always ended. data.append_eos decides for the last one alone.
        num_ended = len(answers) if structured or data.append_eos else len(answers) - 1
        answers = [answer + end if number < num_ended else answer for number, answer in enumerate(answers)]
        if structured:
            self._check_lengths(opening, answers, between, pieces)
        if not answers:  # raw text
            return self._text_pieces(opening + end if data.append_eos else opening, pieces)
        tokens, spans = list(opening), []
        for gap, answer in zip([[], *between], answers, strict=True):
            start = len(tokens) + len(gap)
            tokens += gap + answer
            spans.append((start, start + len(answer)))
        if structured:
            return [Document(tokens, spans)]
        document = self._cut(tokens, spans, len(opening), pieces)
        self._check_room(document, pieces)
        return [document]

    def _text_pieces(self, tokens: Tokens, pieces: _Pieces) -> list[Document]:
        """A raw text in pieces of data.sequence_length tokens, or its first piece (data.long_documents).

        A last piece without room for an anchor is left out.
        """
        data, limit = self.config.data, self.config.data.sequence_length
        needs, parts = self.config.first_anchor + self.config.ebft.generate_max_len, [tokens[:limit]]
        if data.long_documents == "split":
            parts += [tokens[start : start + limit] for start in range(limit, len(tokens), limit)]
            parts = parts[:1] + [part for part in parts[1:] if len(part) >= needs]
        unused = [len(tokens) - sum(map(len, parts))] + [0] * (len(parts) - 1)
        documents = [Document(part, [(0, len(part))], number, unused[number]) for number, part in enumerate(parts)]
        self._check_room(documents[0], pieces)
        return documents

    def _check_lengths(self, opening: Tokens, answers: list[Tokens], between: list[Tokens], pieces: _Pieces) -> None:
        data, limit = self.config.data, self.config.ebft.max_completion_length
        if len(opening) > data.max_prompt_length:
            raise BadRow(
                pieces.prompt_column,
                f"the prompt has {len(opening)} tokens, more than data.max_prompt_length {data.max_prompt_length}, "
                "and prompts are never cut",
            )
        for number, answer in enumerate(answers):
            if len(answer) > limit:
                raise BadRow(
                    pieces.answer_columns[number],
                    f"the ground truth has {len(answer)} tokens (end-of-text token included), more than "
                    f"ebft.max_completion_length {limit}",
                )
        longest, keys = self.config.longest_sequence
        # + 1: a turn that is cut off at the limit gets an end token, unless it is the last
        possible = len(opening) + sum(map(len, between)) + len(answers) * (1 + limit) - 1
        if len(answers) > 1 and possible > longest:
            raise BadRow(
                pieces.prompt_column,
                f"the conversation can come to {possible} tokens with answers of ebft.max_completion_length {limit}, "
                f"more than {keys} {longest}; raise data.max_conversation_length",
            )

    def _cut(self, tokens: Tokens, spans: list[tuple[int, int]], prompt_length: int, pieces: _Pieces) -> Document:
        limit = self.config.data.sequence_length
        if prompt_length >= limit:
            raise BadRow(
                pieces.prompt_column,
                f"the prompt has {prompt_length} tokens, which leaves nothing of data.sequence_length {limit} "
                "to the completion",
            )
        kept = [(start, min(end, limit)) for start, end in spans if start < limit]
        lost_ends = sum(end > limit for _, end in spans)
        return Document(tokens[:limit], kept, unused=max(0, len(tokens) - limit), lost_ends=lost_ends)

    def _check_room(self, document: Document, pieces: _Pieces) -> None:
        """Raises BadRow when no anchor fits into a document of strided mode."""
        ebft = self.config.ebft

        def first_end(span: tuple[int, int]) -> int:
            return first_anchor(span, ebft.context_length, ebft.min_completion_prefix) + ebft.generate_max_len

        if any(first_end(span) <= span[1] for span in document.spans):
            return
        lacks = "no room for one anchor, which needs"
        keys = "(ebft.context_length or min_completion_prefix + ebft.generate_max_len)"
        if not pieces.answers:
            needs = self.config.first_anchor + ebft.generate_max_len
            words = f"{len(document.tokens)} tokens have {lacks} {needs} {keys}; text {shorten(pieces.opening)}"
            raise BadRow(pieces.prompt_column, words)
        start, end = max(document.spans, key=lambda span: span[1] - span[0])
        needs = first_end((start, end)) - start
        words = f"{end - start} tokens of the completion, behind {start}, have {lacks} {needs} {keys}"
        raise BadRow(pieces.answer_columns[0], words)


def _strings(value) -> Iterator[str]:
    """Every text in a value: a prompt, messages, tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from itertools.chain(_strings(key), _strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _replaced(value, function: Callable[[str], str]):
    """The value with another text in place of each of its texts."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_replaced(key, function): _replaced(item, function) for key, item in value.items()}
    return [_replaced(item, function) for item in value] if isinstance(value, list) else value
