"""What a model writes, judged as text: is it valid Python, is it the next line; and how sure it is of the next token.

Text and numbers in, numbers out: no model here.
"""

import codeop
import warnings

import torch
from torch import Tensor

BINS = 10  # of confidence, equally wide


def whole_lines(text: str) -> str:
    """Without a last line that has no end."""
    return text[: text.rfind("\n") + 1]


def is_valid_so_far(text: str) -> bool:
    """Whether more text could make it a Python program: it is one, or all that it lacks is what would come next.

    Open blocks, brackets and strings may be closed; nothing is run.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            codeop.compile_command(text, symbol="exec")
        except (SyntaxError, ValueError, OverflowError):
            return False
    return True


def is_valid_continuation(before: str, written: str) -> bool:
    """Whether the whole lines of a continuation keep a program valid.

    before ends where a line does. A continuation without a whole line of its own does not: that would be no more than
    the program that it continues.
    """
    whole = whole_lines(before + written)
    return whole[len(before) :].strip() != "" and is_valid_so_far(whole)


def next_line(text: str) -> str:
    """Of what follows a line's end: the first line that is not empty, without spaces at its end."""
    return text.lstrip("\n").partition("\n")[0].rstrip()


def edit_similarity(first: str, second: str) -> float:
    """1 - (insertions, deletions and replacements of characters from one to the other) / (length of the longer)."""
    previous = list(range(len(second) + 1))
    for row, left in enumerate(first, 1):
        current = [row]
        for column, right in enumerate(second):
            current.append(min(previous[column + 1] + 1, current[column] + 1, previous[column] + (left != right)))
        previous = current
    return 1 - previous[-1] / max(len(first), len(second), 1)


def line_ends(texts: list[str], first: int, last: int) -> list[int]:
    """Places a, first <= a <= last, in front of a token that ends a line of code: not in a string of several lines.

    texts: of each token.
    """
    found, before = [], ""
    for place, text in enumerate(texts):
        in_string = before.count('"""') % 2 or before.count("'''") % 2
        if first <= place <= last and text.startswith("\n") and not before[-1:].isspace() and not in_string:
            found.append(place)
        before += text
    return found


def confidence_gaps(confidence: Tensor, correct: Tensor) -> list[float]:
    """Sums of confidence - correctness over the predictions whose confidence is in each of BINS bins.

    Args: confidence, correct (..): the probability of the likeliest token, and whether it is the next one (0 or 1).
    """
    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64)
    return gaps.index_add_(0, bins.flatten(), (confidence.double() - correct.double()).flatten()).tolist()


def calibration_error(gaps: Tensor, counts: Tensor) -> tuple[float, float]:
    """Expected calibration error, sum over bins |sum of gaps| / number of predictions, and its standard error.

    The error is by the jackknife over the rows. Args: gaps (R, BINS); counts (R): predictions of each row.
    """
    rows = len(gaps)
    error = gaps.sum(0).abs().sum() / counts.sum()
    left_out = (gaps.sum(0) - gaps).abs().sum(1) / (counts.sum() - counts)
    spread = (left_out - left_out.mean()).square().sum()
    return error.item(), ((rows - 1) / rows * spread).sqrt().item()
