"""Prompt + completion data -> tokenised conversations -> batches, and the completions that were sampled for them.

A conversation is a prompt, the ground truth of the assistant's turns, and the tokens between one turn and the next. Most have one turn.

Axis legend: B rows, S tokens of prompt + truth (right-padded), N completions of a prompt, G tokens of a completion (right-padded). A "completion"
is all that follows the prompt: with several turns also the tokens between them, which the policy did not write (`written` is False there).
"""

import ast
import hashlib
import itertools
import textwrap
from dataclasses import dataclass, field

import datasets
import jinja2
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from .config import StructuredConfig, UserError
from .data import hold_out, load_table, shorten, stdlib_files, take_split

ADAPTIVE_MINIMUM = 64  # tokens that a completion may always have with ebft.adaptive_max_tokens
START_OF_THINKING, END_OF_THINKING = "<think>", "</think>"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Sources


def load_prompts(config: StructuredConfig, tokenizer) -> tuple["PromptRows", "PromptRows | None"]:
    """Training rows and held-out rows (None when eval.num_documents is 0)."""

    def documents_of(source: str, split: str) -> datasets.Dataset:
        data = config.data
        columns = {"data.prompt_column": data.prompt_column, "data.completion_column": data.completion_column}
        if data.turns_column is not None:
            columns["data.turns_column"] = data.turns_column
        built_in = {"python_stdlib_functions": lambda split: take_split(stdlib_functions(data.prompt_column, data.completion_column), split)}
        return tokenize_conversations(load_table(config, source, split, columns, built_in), tokenizer, config, source)

    documents, held_out = hold_out(config, documents_of)
    return PromptRows(documents), None if held_out is None else PromptRows(held_out)


def stdlib_functions(prompt_column: str, completion_column: str) -> datasets.Dataset:
    """The functions and methods of the standard library that have a docstring: signature and docstring -> body."""
    prompts, completions = [], []
    for file in stdlib_files():
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
                continue
            docstring_end = node.body[0].end_lineno
            if node.body[1].lineno <= docstring_end:  # on the docstring's own line
                continue
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).splitlines(keepends=True)
            signature_end = docstring_end - node.lineno + 1
            prompts.append("".join(source[:signature_end]))
            completions.append("".join(source[signature_end:]).rstrip("\n") + "\n")
    return datasets.Dataset.from_dict({prompt_column: prompts, completion_column: completions})


# ---------------------------------------------------------------------------------------------------------------------------------------
# Conversations as tokens


@dataclass(frozen=True)
class Conversation:
    """prompt: token ids; truths: the assistant's turns, each with its end-of-text token; between[k]: what stands between turns k and k + 1."""

    prompt: list[int]
    truths: list[list[int]]
    between: list[list[int]]

    @property
    def truth(self) -> tuple[list[int], list[bool]]:
        """All that follows the prompt, and which of it the assistant says."""
        tokens, written = [], []
        for index, turn in enumerate(self.truths):
            gap = self.between[index - 1] if index else []
            tokens += gap + turn
            written += [False] * len(gap) + [True] * len(turn)
        return tokens, written


class PromptRows:
    """Rows of conversations."""

    def __init__(self, documents: datasets.Dataset):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, row: int) -> Conversation:
        document = self.documents[row]
        return Conversation(document["prompt_ids"], document["truths"], document["between"])

    def longest(self, max_completion_length: int) -> int:
        """Most tokens that a conversation can come to, with the policy's answers in place of the truths."""
        rows = zip(self.documents["prompt_ids"], self.documents["truths"], self.documents["between"], strict=True)
        return max(len(prompt) + sum(map(len, between)) + len(truths) * (1 + max_completion_length) - 1 for prompt, truths, between in rows)  # 1: an end for a turn that was cut short

    def fingerprint(self) -> str:
        """Tells other data from the same: the number of rows, and a digest of up to 64 of them."""
        digest = hashlib.sha256()
        for row in range(0, len(self), -(-len(self) // 64)):
            digest.update(repr(self[row]).encode())
        return f"{len(self)} rows, {digest.hexdigest()[:12]}"


def tokenize_conversations(table: datasets.Dataset, tokenizer, config: StructuredConfig, source: str) -> datasets.Dataset:
    """Token ids of each row: prompt_ids, truths, between, and all of them as input_ids. Bad rows stop with their number, or are left out and counted."""
    data = config.data

    def tokenize(row: dict, index: int) -> dict:
        try:
            conversation = tokenize_row(row, tokenizer, config)
        except BadRow as reason:
            if data.on_bad_row == "error":
                raise UserError(f"data: {source!r}, row {index}, {reason}; data.on_bad_row: skip leaves such rows out") from None
            return {"prompt_ids": [], "truths": [], "between": [], "input_ids": []}
        return {**vars(conversation), "prompt_ids": conversation.prompt, "input_ids": conversation.prompt + conversation.truth[0]}

    columns = datasets.Features({"prompt_ids": INTEGERS, "truths": datasets.List(INTEGERS), "between": datasets.List(INTEGERS), "input_ids": INTEGERS})
    documents = table.map(
        lambda row, index: {name: tokens for name, tokens in tokenize(row, index).items() if name in columns},
        with_indices=True,
        remove_columns=table.column_names,
        features=columns,
        desc="tokenising",
    )
    kept = [row for row, tokens in enumerate(documents["prompt_ids"]) if tokens]
    if not kept:
        raise UserError(f"data: {source!r} has no row that can be used: each of the {len(table)} is empty, or longer than data.max_prompt_length or ebft.max_completion_length")
    if len(kept) < len(table):
        PartialState().print(f"data: {len(table) - len(kept)} of {len(table)} rows of {source!r} left out (empty, or prompt or completion too long)")
    return documents.select(kept)


INTEGERS = datasets.List(datasets.Value("int64"))


class BadRow(Exception):
    """Why a row cannot be used: column, what is wrong, what would be right."""


def tokenize_row(row: dict, tokenizer, config: StructuredConfig) -> Conversation:
    """A row of the dataset as tokens. Raises BadRow."""
    data, limit = config.data, config.ebft.max_completion_length
    turns = [{"prompt": row[data.prompt_column], "completion": row[data.completion_column]}]
    columns = [(data.prompt_column, data.completion_column)]
    if data.turns_column is not None:
        for number, turn in enumerate(_listed(row[data.turns_column], data.turns_column)):
            if not isinstance(turn, dict) or not {"prompt", "completion"} <= turn.keys():
                raise BadRow(f"column {data.turns_column!r}[{number}]: {shorten(turn)} is not of the form {{prompt, completion}}")
            turns.append(turn)
            columns.append((f"{data.turns_column}[{number}].prompt", f"{data.turns_column}[{number}].completion"))
    chat = isinstance(turns[0]["prompt"], list)
    completions = [_text_of(turn["completion"], completion) for turn, (_, completion) in zip(turns, columns, strict=True)]
    if chat:
        opening, gaps = _chat_texts(turns, columns, tokenizer)
        prompt = tokenizer(opening, add_special_tokens=False)["input_ids"]
    else:
        gaps = [_text_of(turn["prompt"], column) for turn, (column, _) in zip(turns, columns, strict=True)]
        prompt, gaps = tokenizer(gaps[0])["input_ids"], gaps[1:]
    between = [tokenizer(gap, add_special_tokens=False)["input_ids"] for gap in gaps]
    truths = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in completions]
    if len(prompt) > data.max_prompt_length:
        raise BadRow(f"column {data.prompt_column!r}: the prompt has {len(prompt)} tokens, more than data.max_prompt_length {data.max_prompt_length}, and prompts are never cut")
    for tokens, (_, column) in zip(truths, columns, strict=True):
        if len(tokens) > limit:
            raise BadRow(f"column {column!r}: the ground truth has {len(tokens)} tokens (end-of-text token included), more than ebft.max_completion_length {limit}")
    return Conversation(prompt, truths, between)


def _listed(value, column: str) -> list:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow(f"column {column!r}: {shorten(value)} is not a list of turns")
    return value


def _text_of(value, column: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, dict) and value.get("role") in ("assistant", "user") and "content" in value:
        value = value["content"]
    if not isinstance(value, str):
        raise BadRow(f"column {column!r}: {shorten(value)} is not text")
    if not value.strip():
        raise BadRow(f"column {column!r}: {shorten(value)} is empty")
    return value


def _chat_texts(turns: list[dict], columns: list[tuple[str, str]], tokenizer) -> tuple[str, list[str]]:
    """The prompt in the tokenizer's chat template, and what the template puts between one answer of the assistant and the next."""
    messages = list(turns[0]["prompt"])
    if not messages or not all(isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str) for message in messages):
        raise BadRow(f"column {columns[0][0]!r}: {shorten(messages)} is not a list of messages (role, content)")
    try:
        opening = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        gaps, mark = [], "\u2063answer\u2063"  # found again in the rendered text
        for turn, (column, _) in zip(turns[1:], columns[1:], strict=True):
            messages += [{"role": "assistant", "content": mark}, {"role": "user", "content": _text_of(turn["prompt"], column)}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            gap = rendered.rpartition(mark)[2]
            if not gap.startswith(tokenizer.eos_token):
                raise UserError(f"model.eos_token: the chat template does not end an answer with {tokenizer.eos_token!r} but with {shorten(gap[:20])}; name the token that ends an answer")
            gaps.append(gap.removeprefix(tokenizer.eos_token))
    except (ValueError, jinja2.TemplateError) as error:
        raise UserError(f"data: column {columns[0][0]!r} holds messages, and the tokenizer's chat template cannot render them: {error}") from None
    return opening, gaps


# ---------------------------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class PromptBatch:
    """One forward's worth of rows. row_ids: which; keys: what each row's random numbers are keyed by; document_ids, segment_ids (B, S): prompt +
    truth, segment 0, padding -1; written (B, S): the truth's tokens that the assistant says; prompt_lengths, truth_lengths (B)."""

    row_ids: list[int]
    keys: list[int]
    conversations: list[Conversation]
    document_ids: Tensor
    segment_ids: Tensor
    written: Tensor
    prompt_lengths: Tensor
    truth_lengths: Tensor


def make_prompt_batch(rows: PromptRows, row_ids: list[int], keys: list[int], pad_token_id: int, device: torch.device) -> PromptBatch:
    """Collates rows."""
    conversations = [rows[row] for row in row_ids]
    prompts, truths = [conversation.prompt for conversation in conversations], [conversation.truth for conversation in conversations]
    document_ids = padded([prompt + truth for prompt, (truth, _) in zip(prompts, truths, strict=True)], pad_token_id, device)
    written = padded([[False] * len(prompt) + spoken for prompt, (_, spoken) in zip(prompts, truths, strict=True)], False, device)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    truth_lengths = torch.tensor([len(truth) for truth, _ in truths], device=device)
    index = torch.arange(document_ids.shape[1], device=device)
    segment_ids = torch.where(index < (prompt_lengths + truth_lengths).unsqueeze(-1), 0, -1)
    return PromptBatch(row_ids, keys, conversations, document_ids, segment_ids, written, prompt_lengths, truth_lengths)


def padded(rows: list[list], value, device: torch.device) -> Tensor:
    """Lists of different lengths as one tensor, filled up on the right."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)


def most_new_tokens(config: StructuredConfig, conversation: Conversation, turn: int) -> int:
    """Most tokens of a completion's turn."""
    limit = config.ebft.max_completion_length
    if not config.ebft.adaptive_max_tokens:
        return limit
    return min(limit, max(ADAPTIVE_MINIMUM, round(config.ebft.gt_length_multiplier * len(conversation.truths[turn]))))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Completions


@dataclass
class Completion:
    """What followed a prompt. logprobs: of the sampler, at the sampling temperature, where it gives them; written: whether the policy wrote the token."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    truncated: bool = False

    def add(self, tokens: list[int], logprobs: list[float] | None, written: bool) -> None:
        """Appends a turn, or what stands between two."""
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs
        self.written += [written] * len(tokens)


def converse(config: StructuredConfig, conversations: list[Conversation], row_keys: list[int], complete, eos_token_id: int) -> list[list[Completion]]:
    """N completions of each conversation's prompt, turn by turn: in each the policy answers to the prompt, its own answers so far, and the next user turn.

    complete(contexts, limits, keys, n): n completions (tokens, log-probs or None, truncated) of at most limits[i] new tokens for each context, a
    list of token ids; keys: three numbers that tell each context from all others of the run.
    """
    samples = config.ebft.num_generations
    completions = [[Completion() for _ in range(samples)] for _ in conversations]
    for turn in range(max(len(conversation.truths) for conversation in conversations)):
        rows = [row for row, conversation in enumerate(conversations) if turn < len(conversation.truths)]
        limits = [most_new_tokens(config, conversations[row], turn) for row in rows]
        if turn == 0:
            answers = complete([conversations[row].prompt for row in rows], limits, [(row_keys[row], turn, 0) for row in rows], samples)
        else:
            for row in rows:
                for completion in completions[row]:
                    completion.add([eos_token_id] * completion.truncated + conversations[row].between[turn - 1], None, written=False)
            contexts = [conversations[row].prompt + completion.tokens for row in rows for completion in completions[row]]
            keys = [(row_keys[row], turn, sample) for row in rows for sample in range(samples)]
            flat = complete(contexts, [limit for limit in limits for _ in range(samples)], keys, 1)
            answers = [[answer for (answer,) in flat[start : start + samples]] for start in range(0, len(flat), samples)]
        for row, group in zip(rows, answers, strict=True):
            for completion, (tokens, logprobs, truncated) in zip(completions[row], group, strict=True):
                completion.add(tokens, logprobs, written=True)
                completion.truncated = truncated
    return completions


def seed_of(*numbers: int) -> int:
    """A seed below 2**62 out of several numbers, different for different ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def without_thinking(tokens: list[int], written: list[bool], opened: bool, tokenizer) -> list[int]:
    """What follows a prompt, without the thinking of the assistant's turns: of each, what stands behind its END_OF_THINKING.

    A turn that began to think (opened: the prompt ends inside of it) and did not come to an end has no answer: only its last token stays, which of a
    turn that ended is the end-of-text token.
    """
    turns = [(spoken, [token for token, _ in run]) for spoken, run in itertools.groupby(zip(tokens, written, strict=True), key=lambda pair: pair[1])]
    return [token for spoken, turn in turns for token in (_answer(turn, opened, tokenizer) if spoken else turn)]


def _answer(turn: list[int], opened: bool, tokenizer) -> list[int]:
    def closed(count: int) -> bool:
        return END_OF_THINKING in tokenizer.decode(turn[:count])

    if not closed(len(turn)):
        thinking = opened or START_OF_THINKING in tokenizer.decode(turn)
        return turn[-1:] if thinking else turn
    first, last = 0, len(turn)  # not closed(first), closed(last)
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if closed(middle) else (middle, last)
    return turn[last:] or turn[-1:]


def thinking_opened(prompt: list[int], tokenizer) -> bool:
    """Whether a prompt ends inside of a thinking part, as some chat templates let it."""
    text = tokenizer.decode(prompt)
    return text.rfind(START_OF_THINKING) > text.rfind(END_OF_THINKING)
