"""Fixtures of the tests of the algorithm."""

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def compiled():
    """compiled(): how many graphs were compiled since the last call."""
    torch._dynamo.reset()
    counters.clear()
    seen = 0

    def new() -> int:
        nonlocal seen
        before, seen = seen, counters["stats"]["unique_graphs"]
        return seen - before

    return new


@pytest.fixture
def plain_descent(monkeypatch):
    """SGD in AdamW's place: updates are then proportional to the gradients.

    A gradient that is wrong by a factor shows in the weights.
    """

    def descent(parameters, lr, betas, weight_decay):
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", descent)
