"""Rows of a dataset -> documents: token ids, and which of them are to be learnt.

A document is raw text, or a prompt with the turns that follow it. Its *spans* are the parts to be learnt: all of a raw text, each answer of a
conversation. Everything else (prompt, the user's further turns) is only read.

    [ prompt | answer <end> | user's turn | answer <end> ]        spans: the two answers, each with its end-of-text token
"""

import datetime
import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import jinja2
import numpy as np
import tokenizers
import transformers
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..config.modes import Config
from ..config.settings import UserError
from .sources import Source, load_table
from .transforms import END_OF_THINKING, OF_MESSAGES, START_OF_THINKING, BadRow, shorten

COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "spans": datasets.List(datasets.Value("int32")),  # start, end, start, end, ..
        "num_tokens": datasets.Value("int32"),
        "digest": datasets.Value("int64"),  # of the tokens: a copy of a held-out text is one, whatever of it is learnt
        "problem": datasets.Value("string"),  # why the row cannot be used
    }
)
TEMPLATE_DAY = datetime.date(
    2024, 7, 26
)  # for templates that tell the date (Llama 3.2's own default): with today's a run would be another one tomorrow
THINKING_PART = re.compile(r"<think>\s*(</think>\s*)?")  # empty thinking that a template adds, or begins
ANSWER = "\u2063answer\u2063"  # stands for an answer in a rendered conversation, and is found again in it


@dataclass(frozen=True)
class Document:
    """tokens: token ids; spans: (start, end) of each part that is learnt, end-of-text tokens included."""

    tokens: list[int]
    spans: list[tuple[int, int]]


def documents_from(columns: dict[str, list]) -> list[Document]:
    """Rows of a tokenised table as documents."""
    return [
        Document(tokens, list(zip(spans[::2], spans[1::2], strict=True)))
        for tokens, spans in zip(columns["input_ids"], columns["spans"], strict=True)
    ]


def table_of(documents: list[Document]) -> datasets.Dataset:
    """Documents as a tokenised table in memory."""
    rows = [_row_of(document) for document in documents]
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in COLUMNS}, features=COLUMNS)


def _row_of(document: Document | None, problem: str = "") -> dict:
    if document is None:
        return {"input_ids": [], "spans": [], "num_tokens": 0, "digest": 0, "problem": problem}
    spans = list(itertools.chain.from_iterable(document.spans))
    digest = int.from_bytes(
        hashlib.blake2b(np.array(document.tokens, dtype=np.int32).tobytes(), digest_size=8).digest(),
        "little",
        signed=True,
    )
    return {
        "input_ids": document.tokens,
        "spans": spans,
        "num_tokens": len(document.tokens),
        "digest": digest,
        "problem": "",
    }


# ---------------------------------------------------------------------------------------------------------------------------------------
# Rows -> text in pieces


@dataclass
class _Pieces:
    """The text of a document. opening: raw text, or the prompt; special: whether it gets the tokenizer's own beginning; then answers and what stands between them, in turns."""

    opening: str
    special: bool
    answers: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    prompt_column: str = ""
    answer_columns: list[str] = field(default_factory=list)


class Tokenizing:
    """What makes documents of a source's rows: its transform, the chat template, the tokenizer, the limits of the mode."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, source: Source):
        self.config, self.tokenizer, self.source = config, tokenizer, source
        self.trims = None  # whether the chat template does away with space around an answer
        self.adds_end = tokenizer("x")["input_ids"][-1:] == [tokenizer.eos_token_id]
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"])
        self.sets_off = bool(tokens) and tokens[0].startswith(
            "\u2581"
        )  # SentencePiece puts a space before a text: not before one that goes on

    def documents(self, rows: list[dict], numbers: list[int]) -> list[Document | str]:
        """A document for each row, or why there is none ("": its transform left it out). numbers: of the rows, for messages.

        Raises UserError where on_bad_row is error, and for a transform that fails or returns something else than it should.
        """
        found = [self._checked(self._pieces, row, number) for row, number in zip(rows, numbers, strict=True)]
        usable = [pieces for pieces in found if isinstance(pieces, _Pieces)]
        special = iter(self._ids([pieces.opening for pieces in usable if pieces.special], True))
        rendered = iter(self._ids([pieces.opening for pieces in usable if not pieces.special], False))
        further = iter(self._ids_of_rest([text for pieces in usable for text in pieces.answers + pieces.between]))

        def assemble(pieces: _Pieces) -> Document:
            opening = next(special if pieces.special else rendered)
            answers, between = [next(further) for _ in pieces.answers], [next(further) for _ in pieces.between]
            return self._document(opening, answers, between, pieces)

        return [
            self._checked(assemble, pieces, number) if isinstance(pieces, _Pieces) else pieces
            for pieces, number in zip(found, numbers, strict=True)
        ]

    def _checked(self, function, argument, number: int):
        try:
            return function(argument)
        except BadRow as reason:
            if self.config.data.on_bad_row == "error":
                raise UserError(
                    f"{self.source.key}: {self.source}, row {number}, {reason}; data.on_bad_row: skip leaves such rows out"
                ) from None
            return f"row {number}, {reason}"
        except UserError as error:
            raise UserError(f"{error} ({self.source}, row {number})") from None

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        limit = {}
        if special and self.config.mode == "strided":  # a prompt that is cut here is refused
            limit = dict(truncation=True, max_length=self.config.data.sequence_length + self.adds_end)
        found = self.tokenizer(texts, add_special_tokens=special, **limit)["input_ids"]
        return (
            [tokens[:-1] for tokens in found] if special and self.adds_end else found
        )  # the end is set here, where there is one

    def _ids_of_rest(self, texts: list[str]) -> list[list[int]]:
        """Of texts that go on from another one."""
        if not self.sets_off:
            return self._ids(texts, False)
        before = len(self._ids(["\n"], False)[0])
        return [tokens[before:] for tokens in self._ids([f"\n{text}" for text in texts], False)]

    def _pieces(self, row: dict) -> _Pieces | str:
        example = self._example(row)
        if example is None:
            return ""
        prompt_column, completion_column = self.source.transform.places(self.source.columns)
        if "text" in example:
            return _Pieces(example["text"], special=True, prompt_column=prompt_column)
        prompt, turns = example["prompt"], example.get("turns") or []
        answers, further = (
            [example["completion"], *(turn["completion"] for turn in turns)],
            [turn["prompt"] for turn in turns],
        )
        turns_column = self.source.columns.turns or "turns"
        later = [
            completion_column if self.source.transform.name in OF_MESSAGES else f"{turns_column}[{number}].completion"
            for number in range(len(turns))
        ]
        where = prompt_column, [completion_column, *later]
        templated = self.source.apply_chat_template and isinstance(prompt, str)
        if templated:
            prompt = [{"role": "user", "content": prompt.strip()}]
        if isinstance(prompt, str):
            return _Pieces(prompt, True, answers, further, *where)
        opening, between = self._rendered(prompt, further, prompt_column)
        if self.trims or templated:  # what sets an answer off from a prompt of text is not part of it
            answers = [answer.strip() for answer in answers]
        if opening.rstrip().endswith(START_OF_THINKING):  # the template has begun to think: the answer goes on
            if not all(END_OF_THINKING in answer for answer in answers):
                raise BadRow(
                    completion_column,
                    f"the chat template begins with {START_OF_THINKING}, and an answer has no thinking: it would be learnt as if it were; take the transform reasoning, or another template",
                )
            answers = [answer.lstrip().removeprefix(START_OF_THINKING).lstrip("\n") for answer in answers]
        return _Pieces(opening, False, answers, between, *where)

    def _example(self, row: dict) -> dict | None:
        transform = self.source.transform
        try:
            example = transform.function(row, self.source.columns)
        except BadRow:
            raise
        except Exception as error:  # whatever somebody's function raises
            if transform.own:
                raise UserError(
                    f"{self.source.key}.transform: {transform.name} raised {type(error).__name__}: {error}"
                ) from None
            if isinstance(error, KeyError):
                raise BadRow(error.args[0], "is missing") from None
            raise
        if transform.own and example is not None:
            self._check_example(example)
        return example

    def _check_example(self, example) -> None:
        """Raises UserError when somebody's own transform returns something else than it should."""
        allowed = "{text}, {prompt, completion} or {prompt, completion, turns}"
        where = f"{self.source.key}.transform: {self.source.transform.name} returned"
        if not isinstance(example, dict) or set(example) not in (
            {"text"},
            {"prompt", "completion"},
            {"prompt", "completion", "turns"},
        ):
            raise UserError(
                f"{where} {sorted(map(str, example)) if isinstance(example, dict) else shorten(example)}; allowed: {allowed}, or None for a row to leave out"
            )
        if "text" in example and self.config.mode == "structured":
            raise UserError(f"{where} raw text, which train_structured.py cannot use: it needs prompt and completion")
        texts = {name: example[name] for name in ("text", "completion") if name in example}
        if not isinstance(example.get("prompt"), list):
            texts |= {name: example[name] for name in ("prompt",) if name in example}
        elif not all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in example["prompt"]
        ):
            raise UserError(
                f"{where} the prompt {shorten(example['prompt'])}, which is neither text nor a list of messages (role, content)"
            )
        turns = example.get("turns") or []
        if not isinstance(turns, list):
            raise UserError(f"{where} turns {shorten(turns)}, which is not a list of {{prompt, completion}}")
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict) or set(turn) != {"prompt", "completion"}:
                raise UserError(f"{where} turns[{number}] {shorten(turn)}; allowed: {{prompt, completion}}")
            texts |= {f"turns[{number}].{name}": value for name, value in turn.items()}
        for name, value in texts.items():
            if not isinstance(value, str):
                raise UserError(f"{where} {name} {shorten(value)}, which is not text")
            if not value.strip():
                raise BadRow(name, f"{shorten(value)} is empty")

    # --- the chat template -------------------------------------------------------------------------------------------------------------

    def _rendered(self, messages: list[dict], further: list[str], column: str) -> tuple[str, list[str]]:
        """The prompt in the tokenizer's chat template, and what the template puts between one answer of the assistant and the next."""
        if not messages or not all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        ):
            raise BadRow(column, f"{shorten(messages)} is not a list of messages (role, content)")
        if not messages[-1]["content"].strip():
            raise BadRow(column, f"the last message is empty: {shorten(messages[-1])}")
        if self.tokenizer.chat_template is None:
            raise UserError(
                "model.tokenizer: the rows hold messages, and the tokenizer has no chat template; take the tokenizer of an instruction-tuned model, or a transform that makes a prompt of plain text"
            )
        try:
            opening, gaps = self._chat(messages, True), []
            if self.trims is None:
                self._check_template(messages, opening)
            messages = list(messages)
            for words in further:
                messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": words}]
                gaps.append(self._gap(messages, True))
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise BadRow(column, f"the tokenizer's chat template cannot render {shorten(messages)}: {error}") from None
        return opening, gaps

    def _chat(self, messages: list[dict], generation_prompt: bool, **settings) -> str:
        if self.config.data.enable_thinking is not None:
            settings = {"enable_thinking": self.config.data.enable_thinking} | settings
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            strftime_now=TEMPLATE_DAY.strftime,
            **settings,
        )

    def _check_template(self, messages: list[dict], opening: str) -> None:
        """Raises UserError for a template whose answered conversation is another text than its prompt and the answer, and for a switch for thinking that it
        does not have; finds out whether it trims answers."""
        if self.config.data.enable_thinking is not None and self._chat(
            messages, True, enable_thinking=True
        ) == self._chat(messages, True, enable_thinking=False):
            raise UserError(
                "data.enable_thinking: the tokenizer's chat template has no such switch: it writes the same with true and with false; leave it out"
            )
        answered = [*messages, {"role": "assistant", "content": ANSWER}]
        self._gap(answered, False)
        before, asked = (
            THINKING_PART.sub("", text) for text in (self._chat(answered, False).partition(ANSWER)[0], opening)
        )
        if before != asked:
            raise UserError(
                f"model.tokenizer: the chat template puts {shorten(before[-30:])} before an answer, and asks for one with {shorten(asked[-30:])}: it has no use for add_generation_prompt; take a tokenizer whose template has"
            )
        self.trims = f" {ANSWER} " not in self._chat(
            [*messages, {"role": "assistant", "content": f" {ANSWER} "}], False
        )

    def _gap(self, messages: list[dict], generation_prompt: bool) -> str:
        """What the template puts behind the last answer. Raises UserError when that does not begin with the end-of-text token, which ends each answer here."""
        gap, end = self._chat(messages, generation_prompt).rpartition(ANSWER)[2], self.tokenizer.eos_token
        if not gap.startswith(end):
            raise UserError(
                f"model.eos_token: the chat template does not end an answer with {end!r} but with {shorten(gap[:20])}; name the token that ends an answer"
            )
        return gap.removeprefix(end)

    # --- tokens ------------------------------------------------------------------------------------------------------------------------

    def _document(
        self, opening: list[int], answers: list[list[int]], between: list[list[int]], pieces: _Pieces
    ) -> Document:
        structured, end = self.config.mode == "structured", [self.tokenizer.eos_token_id]
        last = (
            len(answers) if structured or self.config.data.append_eos else len(answers) - 1
        )  # an answer that the user answers to has always ended
        answers = [answer + end if number < last else answer for number, answer in enumerate(answers)]
        if structured:
            self._check_lengths(opening, answers, between, pieces)
        if not answers:  # raw text
            tokens = (
                opening + end
                if self.config.data.append_eos and len(opening) < self.config.data.sequence_length
                else opening
            )
            return self._with_room(Document(tokens, [(0, len(tokens))]), pieces)
        tokens, spans = list(opening), []
        for gap, answer in zip([[], *between], answers, strict=True):
            start = len(tokens) + len(gap)
            tokens += gap + answer
            spans.append((start, start + len(answer)))
        return (
            Document(tokens, spans)
            if structured
            else self._with_room(self._cut(tokens, spans, len(opening), pieces), pieces)
        )

    def _check_lengths(
        self, opening: list[int], answers: list[list[int]], between: list[list[int]], pieces: _Pieces
    ) -> None:
        data, limit = self.config.data, self.config.ebft.max_completion_length
        if len(opening) > data.max_prompt_length:
            raise BadRow(
                pieces.prompt_column,
                f"the prompt has {len(opening)} tokens, more than data.max_prompt_length {data.max_prompt_length}, and prompts are never cut",
            )
        for number, answer in enumerate(answers):
            if len(answer) > limit:
                raise BadRow(
                    pieces.answer_columns[number],
                    f"the ground truth has {len(answer)} tokens (end-of-text token included), more than ebft.max_completion_length {limit}",
                )
        longest, keys = self.config.longest_sequence
        possible = (
            len(opening) + sum(map(len, between)) + len(answers) * (1 + limit) - 1
        )  # 1: an end for a turn that was cut short
        if len(answers) > 1 and possible > longest:
            raise BadRow(
                pieces.prompt_column,
                f"the conversation can come to {possible} tokens with answers of ebft.max_completion_length {limit}, more than {keys} {longest}; raise data.max_conversation_length",
            )

    def _cut(self, tokens: list[int], spans: list[tuple[int, int]], prompt_length: int, pieces: _Pieces) -> Document:
        limit = self.config.data.sequence_length
        if prompt_length >= limit:
            raise BadRow(
                pieces.prompt_column,
                f"the prompt has {prompt_length} tokens or more, which leaves nothing of data.sequence_length {limit} to the completion",
            )
        return Document(tokens[:limit], [(start, min(end, limit)) for start, end in spans if start < limit])

    def _with_room(self, document: Document, pieces: _Pieces) -> Document:
        """The document, when one anchor fits into it (strided mode)."""
        ebft, words = self.config.ebft, "; text " + shorten(pieces.opening) if not pieces.answers else ""
        if not any(
            first_anchor(span, ebft.context_length, ebft.min_completion_prefix) + ebft.generate_max_len <= span[1]
            for span in document.spans
        ):
            if not pieces.answers:
                needs = f"{len(document.tokens)} tokens have no room for one anchor, which needs {self.config.first_anchor + ebft.generate_max_len}"
            else:
                start, end = max(document.spans, key=lambda span: span[1] - span[0])
                at = f"{end - start} tokens of the completion, behind {start}, have no room for one anchor, which needs"
                needs = f"{at} {first_anchor((start, end), ebft.context_length, ebft.min_completion_prefix) - start + ebft.generate_max_len}"
            raise BadRow(
                pieces.answer_columns[0] if pieces.answers else pieces.prompt_column,
                f"{needs} (ebft.context_length or min_completion_prefix + ebft.generate_max_len){words}",
            )
        return document


def first_anchor(span: tuple[int, int], context_length: int, min_completion_prefix: int) -> int:
    """Tokens of a document that are visible at the first anchor in a span."""
    return max(context_length, span[0] + min_completion_prefix)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Whole tables


def load_documents(config: Config, tokenizer: PreTrainedTokenizerBase, source: Source) -> datasets.Dataset:
    """The usable documents of a source (columns: COLUMNS), out of the cache where they were made before. Raises UserError when there are none."""
    table, tokenizing = columns_read(load_table(source), source), Tokenizing(config, tokenizer, source)
    key = cache_key(config, tokenizer, source, table)
    file = Path(datasets.config.HF_DATASETS_CACHE) / "ebft" / f"{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)

    def tokenize(columns: dict, numbers: list[int]) -> dict:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        found = [
            _row_of(None, made) if isinstance(made, str) else _row_of(made)
            for made in tokenizing.documents(rows, numbers)
        ]
        return {name: [row[name] for row in found] for name in COLUMNS}

    documents = table.map(
        tokenize, batched=True, with_indices=True, remove_columns=table.column_names, features=COLUMNS, num_proc=config.data.num_proc if config.data.num_proc > 1 else None,
        cache_file_name=str(file), new_fingerprint=key, desc=f"tokenising {source.dataset}",
    )  # fmt: skip
    lengths = np.array(documents["num_tokens"][:])
    kept = np.flatnonzero(lengths)
    if len(kept) < len(lengths):
        left_out = LeftOut(source)
        left_out.add(documents.select(np.flatnonzero(lengths == 0))["problem"][:])
        if len(kept) == 0:
            raise UserError(
                f"{source.key}: {source} has no row that can be used. {left_out.text(f'of {len(lengths)}')}"
            )
        PartialState().print(left_out.text(f"of {len(lengths)}"))
    return documents.select(kept)


def columns_read(table, source: Source):
    """A table or stream without the columns that the transform does not look at: an image there would be decoded for nothing."""
    return (
        table
        if table.column_names is None
        else table.select_columns(source.transform.columns_read(source.columns, table.column_names))
    )


class LeftOut:
    """Rows of a source that are not used, counted by the kind of their problem."""

    def __init__(self, source: Source):
        self.source, self.number, self.kinds, self.examples = source, 0, Counter(), {}

    def add(self, problems: list[str]) -> None:
        """problems: why each row is left out; "" where the transform did that."""
        for problem in problems:
            kind = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "", problem).partition("; text")[
                0
            ]  # without what is particular to the row
            self.number += 1
            self.kinds[kind] += 1
            self.examples.setdefault(
                kind, f"like {problem}" if problem else f"by the transform {self.source.transform.name}"
            )

    def text(self, of: str) -> str:
        """How many, and why: one example of each of the commonest kinds."""
        common = self.kinds.most_common(4)
        reasons = [f"{count} {self.examples[kind]}" for kind, count in common]
        others = self.number - sum(count for _, count in common)
        return f"data: {self.number} {of} rows of {self.source} left out: {'; '.join(reasons)}" + (
            f"; {others} for other reasons" if others else ""
        )


def cache_key(config: Config, tokenizer: PreTrainedTokenizerBase, source: Source, table: datasets.Dataset) -> str:
    """Equal for equal content and equal settings: what a tokenised table is kept under.

    Content is the table's fingerprint in `datasets`: for files their paths and times of change, for the hub the revision, for text in memory the text.
    """
    data, ebft = config.data, config.ebft
    if config.mode == "strided":
        limits = [
            data.sequence_length,
            data.append_eos,
            ebft.context_length,
            ebft.min_completion_prefix,
            ebft.generate_max_len,
        ]
    else:
        limits = [data.max_prompt_length, ebft.max_completion_length, config.longest_sequence[0]]
    own_code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    parts = [
        own_code, transformers.__version__, tokenizers.__version__, table._fingerprint, len(table), source.transform.name, source.transform.version,
        vars(source.columns), source.apply_chat_template, data.enable_thinking, config.mode, limits, data.on_bad_row, tokenizer_digest(tokenizer),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells tokenizers apart that make other tokens of some text."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # what a call leaves behind
        tokenizer.backend_tokenizer.no_padding()
        inner = tokenizer.backend_tokenizer.to_str()
    else:
        inner = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(
        json.dumps([inner, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id]).encode()
    ).hexdigest()
