"""Runs train_strided.py several times in one launch: starting processes takes most of a tiny run's time.

    accelerate launch .. tests/runs_in_turn.py RUNS.json

RUNS.json: [{"arguments": [..], "output": FILE, "descent": true, "gathers": FILE or null}, ..]
    output   what the run prints goes there
    descent  SGD in AdamW's place: updates are then proportional to the gradients, and a gradient that is wrong by a
             factor shows in the weights
    gathers  for each rollout under FSDP2, the number of all-gathers, and of the weights that are still whole after it,
             go there
"""

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_strided

ADAMW, SCORE = torch.optim.AdamW, train_strided.sample_and_score


def descent(parameters, lr, betas, weight_decay):
    return torch.optim.SGD(parameters, lr=lr)


class Gathers(TorchDispatchMode):
    """Counts all-gathers while inside."""

    number = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.number += operation.name().startswith("c10d::") and "allgather" in operation.name()
        return operation(*arguments, **(keywords or {}))


def counting(counts: list[dict]):
    """sample_and_score that notes how often it gathers, and what it leaves gathered."""

    def score(config, accelerator, policy, network, batch, seed):
        with Gathers() as gathers:
            groups = SCORE(config, accelerator, policy, network, batch, seed)
        weights = [*policy.parameters(), *(network.decoder.parameters() if config.feature_network.shard else [])]
        counts.append({"gathers": gathers.number, "whole": sum(not isinstance(weight, DTensor) for weight in weights)})
        return groups

    return score


if __name__ == "__main__":
    PartialState.destroy_process_group = lambda self, group=None: None  # the next run needs it
    kind = dict(PartialState._shared_state)  # a run under FSDP2 changes it
    for run in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._shared_state.update(kind)
        torch.optim.AdamW = descent if run["descent"] else ADAMW
        counts = []
        train_strided.sample_and_score = counting(counts) if run["gathers"] else SCORE
        is_main = os.environ.get("RANK", "0") == "0"
        with open(run["output"] if is_main else os.devnull, "w") as file, redirect_stdout(file):
            train_strided.main(run["arguments"])
        if run["gathers"] and is_main:
            Path(run["gathers"]).write_text(json.dumps(counts))
