"""Conversations -> batches of structured mode, and the completions that were sampled for them.

A conversation is a prompt, the ground truth of the assistant's turns, and the tokens between one turn and the next.
Most have one turn.

Axis legend: B rows, S tokens of prompt + truth (right-padded), N completions of a prompt, G tokens of a completion
(right-padded). A "completion" is everything after the prompt. With several turns that includes the tokens between them,
which the policy did not write (`written` is False there).
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config.modes import StructuredConfig
from .documents import Document
from .transforms import END_OF_THINKING, START_OF_THINKING

ADAPTIVE_MINIMUM = 64  # with ebft.adaptive_max_tokens, the limit of a completion is never below this many tokens


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


@dataclass(frozen=True)
class Conversation:
    """Token ids. truths: the assistant's turns, each with its end-of-text token; between[k]: after turn k."""

    prompt: list[int]
    truths: list[list[int]]
    between: list[list[int]]

    @property
    def truth(self) -> tuple[list[int], list[bool]]:
        """All tokens after the prompt, and which of them the assistant wrote."""
        tokens, written = [], []
        for index, turn in enumerate(self.truths):
            gap = self.between[index - 1] if index else []
            tokens += gap + turn
            written += [False] * len(gap) + [True] * len(turn)
        return tokens, written


def conversation_of(documents: list[Document]) -> Conversation:
    """A row, which holds one document, as a conversation."""
    (document,) = documents
    ends = [end for _, end in document.spans]
    gaps = [document.tokens[end:start] for end, (start, _) in zip([0, *ends], document.spans, strict=False)]
    return Conversation(gaps[0], [document.tokens[start:end] for start, end in document.spans], gaps[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class PromptBatch:
    """The rows of one forward.

    Args:
        row_ids: the rows. keys: what each row's random numbers are keyed by.
        document_ids: (B, S) prompt + truth. segment_ids: (B, S) 0 for tokens, -1 for padding.
        written: (B, S) True at the truth's tokens that the assistant wrote.
        prompt_lengths, truth_lengths: (B).
    """

    row_ids: list
    keys: list[int]
    conversations: list[Conversation]
    document_ids: Tensor
    segment_ids: Tensor
    written: Tensor
    prompt_lengths: Tensor
    truth_lengths: Tensor


def make_prompt_batch(rows, row_ids: list, keys: list[int], pad_token_id: int, device: torch.device) -> PromptBatch:
    """Collates rows of conversations."""
    conversations = [rows[row] for row in row_ids]
    prompts = [conversation.prompt for conversation in conversations]
    truths, written = zip(*(conversation.truth for conversation in conversations), strict=True)
    document_ids = padded([prompt + truth for prompt, truth in zip(prompts, truths, strict=True)], pad_token_id, device)
    masks = [[False] * len(prompt) + mask for prompt, mask in zip(prompts, written, strict=True)]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    truth_lengths = torch.tensor([len(truth) for truth in truths], device=device)
    index = torch.arange(document_ids.shape[1], device=device)
    segment_ids = torch.where(index < (prompt_lengths + truth_lengths).unsqueeze(-1), 0, -1)
    written_mask = padded(masks, False, device)
    lengths = prompt_lengths, truth_lengths
    return PromptBatch(row_ids, keys, conversations, document_ids, segment_ids, written_mask, *lengths)


def padded(rows: list[list], value, device: torch.device) -> Tensor:
    """Lists of different lengths as one tensor, right-padded with a value."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)


def most_new_tokens(config: StructuredConfig, conversation: Conversation, turn: int) -> int:
    """The largest number of tokens that a turn of a completion may have."""
    limit = config.ebft.max_completion_length
    if not config.ebft.adaptive_max_tokens:
        return limit
    return min(limit, max(ADAPTIVE_MINIMUM, round(config.ebft.gt_length_multiplier * len(conversation.truths[turn]))))


# ----------------------------------------------------------------------------------------------------------------------
# Completions


@dataclass
class Completion:
    """Everything that was sampled after a prompt.

    logprobs: the sampler's, at the sampling temperature (0 where it gives none); written: whether the policy wrote the
    token; truncated: whether any turn stopped at the limit; cut_off: whether the last one did.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    truncated: bool = False
    cut_off: bool = False

    def add(self, tokens: list[int], logprobs: list[float] | None, written: bool) -> None:
        """Appends a turn, or the tokens between two turns."""
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs
        self.written += [written] * len(tokens)


def converse(
    config: StructuredConfig, conversations: list[Conversation], row_keys: list[int], complete, eos_token_id: int
) -> list[list[Completion]]:
    """N completions of each conversation's prompt, turn by turn.

    In each turn the policy answers to the prompt, its own answers so far, and the next message of the user.

    complete(contexts, limits, keys, n): n completions (tokens, log-probs or None, truncated) of each context, a list of
    token ids, with at most limits[i] new tokens; keys: three numbers that are unique to each context in the run.
    """
    samples = config.ebft.num_generations
    completions = [[Completion() for _ in range(samples)] for _ in conversations]
    for turn in range(max(len(conversation.truths) for conversation in conversations)):
        rows = [row for row, conversation in enumerate(conversations) if turn < len(conversation.truths)]
        limits = [most_new_tokens(config, conversations[row], turn) for row in rows]
        if turn == 0:
            contexts, keys = [conversations[row].prompt for row in rows], [(row_keys[row], turn, 0) for row in rows]
            answers = complete(contexts, limits, keys, samples)
        else:
            for row in rows:
                for completion in completions[row]:
                    end = [eos_token_id] * completion.cut_off  # an answer that was cut off gets an end
                    completion.add(end + conversations[row].between[turn - 1], None, written=False)
            pairs = [(row, completion) for row in rows for completion in completions[row]]
            contexts = [conversations[row].prompt + completion.tokens for row, completion in pairs]
            keys = [(row_keys[row], turn, sample) for row in rows for sample in range(samples)]
            flat = [answer for (answer,) in complete(contexts, np.repeat(limits, samples).tolist(), keys, 1)]
            answers = [flat[start : start + samples] for start in range(0, len(flat), samples)]
        for row, group in zip(rows, answers, strict=True):
            for completion, (tokens, logprobs, truncated) in zip(completions[row], group, strict=True):
                completion.add(tokens, logprobs, written=True)
                completion.cut_off, completion.truncated = truncated, completion.truncated or truncated
    return completions


def seed_of(*numbers: int) -> int:
    """A seed below 2**62 from several numbers. Different numbers give different seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def feature_spans(
    batch: PromptBatch, completions: list[Completion], span: str, tokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens that features are computed from (ebft.feature_span): of each completion, and of each truth.

    completions: those of all rows, row after row. span: "all", or "answer" (without the thinking).
    """
    truths = [conversation.truth for conversation in batch.conversations]
    if span == "all":
        return [completion.tokens for completion in completions], [tokens for tokens, _ in truths]
    samples = len(completions) // len(truths)
    opened = [thinking_opened(conversation.prompt, tokenizer) for conversation in batch.conversations]
    spans = [
        without_thinking(completion.tokens, completion.written, opened[index // samples], tokenizer)
        for index, completion in enumerate(completions)
    ]
    return spans, [without_thinking(*truth, opened[row], tokenizer) for row, truth in enumerate(truths)]


def without_thinking(tokens: list[int], written: list[bool], opened: bool, tokenizer) -> list[int]:
    """The tokens after a prompt without the thinking: of each assistant's turn, what comes after its END_OF_THINKING.

    A turn whose thinking began (opened: inside the prompt) and never ended has no answer. Only its last token is kept,
    the end-of-text token if the turn ended.
    """
    runs = itertools.groupby(zip(tokens, written, strict=True), key=lambda pair: pair[1])
    turns = [(by_assistant, [token for token, _ in run]) for by_assistant, run in runs]
    kept = [_answer(turn, opened, tokenizer) if by_assistant else turn for by_assistant, turn in turns]
    return list(itertools.chain.from_iterable(kept))


def _answer(turn: list[int], opened: bool, tokenizer) -> list[int]:
    def closed(count: int) -> bool:
        return END_OF_THINKING in tokenizer.decode(turn[:count])

    if not closed(len(turn)):
        thinking = opened or START_OF_THINKING in tokenizer.decode(turn)
        return turn[-1:] if thinking else turn
    first, last = 0, len(turn)  # bisection: closed(last) is true, closed(first) is not
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if closed(middle) else (middle, last)
    return turn[last:] or turn[-1:]


def thinking_opened(prompt: list[int], tokenizer) -> bool:
    """Whether a prompt ends inside a thinking part, as with some chat templates."""
    text = tokenizer.decode(prompt)
    return text.rfind(START_OF_THINKING) > text.rfind(END_OF_THINKING)
