"""Rows -> batches of strided mode, and the uniform random numbers that rollouts are drawn with.

Axis legend: B rows, S tokens of a row (right-padded), A anchors, N rollouts at an anchor, G tokens of a rollout.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..algorithm.strided import find_anchors


@dataclass(frozen=True)
class Batch:
    """The rows of one forward.

    Args:
        row_ids: the rows. keys: what each row's random numbers are keyed by (`rollout_uniforms`).
        document_ids: (B, S) token ids.
        segment_ids: (B, S) the number of the document in its row, -1 for padding.
        completion_ids: (B, S) the number of the learnt part in its row, -1 for tokens that are context only.
        anchors, valid: (B, A) from `strided.find_anchors`.
    """

    row_ids: list
    keys: list[int]
    document_ids: Tensor
    segment_ids: Tensor
    completion_ids: Tensor
    anchors: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        tensors = (self.document_ids, self.segment_ids, self.completion_ids, self.anchors, self.valid)
        return Batch(self.row_ids, self.keys, *(tensor.to(device) for tensor in tensors))


def make_batch(
    rows,
    row_ids: list,
    keys: list[int],
    pad_token_id: int,
    *,
    context_length: int,
    min_completion_prefix: int,
    stride: int,
    num_generated: int,
) -> Batch:
    """Collates rows: right padding up to the longest row, and the anchors of each (`strided.find_anchors`)."""
    contents = [rows[row] for row in row_ids]
    length = max(sum(len(document.tokens) for document in documents) for documents in contents)
    document_ids = torch.full((len(contents), length), pad_token_id)
    segment_ids, completion_ids = torch.full((len(contents), length), -1), torch.full((len(contents), length), -1)
    for index, documents in enumerate(contents):
        start, completion = 0, 0
        for segment, document in enumerate(documents):
            own = slice(start, start + len(document.tokens))
            document_ids[index, own], segment_ids[index, own] = torch.tensor(document.tokens), segment
            for first, end in document.spans:
                completion_ids[index, start + first : start + end] = completion
                completion += 1
            start = own.stop
    anchors, valid = find_anchors(
        segment_ids,
        completion_ids,
        context_length=context_length,
        min_completion_prefix=min_completion_prefix,
        stride=stride,
        num_generated=num_generated,
    )
    return Batch(row_ids, keys, document_ids, segment_ids, completion_ids, anchors, valid)


def rollout_uniforms(seed: int, keys: list[int], num_anchors: int, num_samples: int, num_generated: int) -> Tensor:
    """The uniform random numbers that rollouts are drawn with, (B, A, N, G).

    They depend only on the seed and each row's key, whichever process runs the row.
    """
    shape = (num_anchors, num_samples, num_generated)
    generators = [np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, key]))) for key in keys]
    return torch.from_numpy(np.stack([generator.random(shape) for generator in generators]))
