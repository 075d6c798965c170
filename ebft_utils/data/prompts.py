"""Conversations -> batches of structured mode, and the completions that were sampled for them.

A conversation is a prompt, the ground truth of the assistant's turns, and the tokens between one turn and the next. Most have one turn.

Axis legend: B rows, S tokens of prompt + truth (right-padded), N completions of a prompt, G tokens of a completion (right-padded). A "completion"
is all that follows the prompt: with several turns also the tokens between them, which the policy did not write (`written` is False there).
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config.modes import StructuredConfig
from .documents import Document
from .transforms import END_OF_THINKING, START_OF_THINKING

ADAPTIVE_MINIMUM = 64  # tokens that a completion may always have with ebft.adaptive_max_tokens


# ---------------------------------------------------------------------------------------------------------------------------------------
# Conversations


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


def conversation_of(documents: list[Document]) -> Conversation:
    """The one document of a row as a conversation."""
    (document,) = documents
    ends = [end for _, end in document.spans]
    gaps = [document.tokens[end:start] for end, (start, _) in zip([0, *ends], document.spans, strict=False)]
    return Conversation(gaps[0], [document.tokens[start:end] for start, end in document.spans], gaps[1:])


# ---------------------------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class PromptBatch:
    """One forward's worth of rows. row_ids: which; keys: what each row's random numbers are keyed by; document_ids, segment_ids (B, S): prompt +
    truth, segment 0, padding -1; written (B, S): the truth's tokens that the assistant says; prompt_lengths, truth_lengths (B)."""

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
    prompts, truths = (
        [conversation.prompt for conversation in conversations],
        [conversation.truth for conversation in conversations],
    )
    document_ids = padded(
        [prompt + truth for prompt, (truth, _) in zip(prompts, truths, strict=True)], pad_token_id, device
    )
    written = padded(
        [[False] * len(prompt) + spoken for prompt, (_, spoken) in zip(prompts, truths, strict=True)], False, device
    )
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


def converse(
    config: StructuredConfig, conversations: list[Conversation], row_keys: list[int], complete, eos_token_id: int
) -> list[list[Completion]]:
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
            answers = complete(
                [conversations[row].prompt for row in rows], limits, [(row_keys[row], turn, 0) for row in rows], samples
            )
        else:
            for row in rows:
                for completion in completions[row]:
                    completion.add(
                        [eos_token_id] * completion.truncated + conversations[row].between[turn - 1],
                        None,
                        written=False,
                    )
            contexts = [
                conversations[row].prompt + completion.tokens for row in rows for completion in completions[row]
            ]
            keys = [(row_keys[row], turn, sample) for row in rows for sample in range(samples)]
            flat = complete(contexts, [limit for limit in limits for _ in range(samples)], keys, 1)
            answers = [
                [answer for (answer,) in flat[start : start + samples]] for start in range(0, len(flat), samples)
            ]
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
    turns = [
        (spoken, [token for token, _ in run])
        for spoken, run in itertools.groupby(zip(tokens, written, strict=True), key=lambda pair: pair[1])
    ]
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
