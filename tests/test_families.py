"""Every family of transformers' causal LMs: what runs, what does not and why, as ebft_utils/README.md has it."""

from dataclasses import replace

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ebft_utils.algorithm.rows import rows_logprobs
from ebft_utils.algorithm.strided import naive_rollout_logprobs, rollout_logprobs
from ebft_utils.proof import prove
from families import FAMILIES, SKIPPED, build
from family_table import BEGIN, CPU, END, PAGE, kinds_in, outcome, table
from strided_cases import random_tokens

# their own code does not run in bfloat16
FLOAT32_ALONE = {"xlstm"}
RECURRENT = {"nemotron_h", "zamba2"}  # transformers computes them in another way when it has padding or a cache
KINDS = kinds_in(PAGE.read_text())


def test_every_family_is_known():
    """Guards against a family that a newer transformers brings, and a table that lacks some."""
    assert FAMILIES.keys() | SKIPPED.keys() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert FAMILIES.keys() == KINDS.keys() and not FAMILIES.keys() & SKIPPED.keys()
    assert sum(kind == "packed" for kind in KINDS.values()) >= 83
    assert sum(kind == "no" for kind in KINDS.values()) <= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_as_the_table_says(family):
    """No traceback, and no wrong number: what passes the proof is compared once more, on longer documents.

    60 tokens with windows of 8, against one sequence at a time; and the leak in bfloat16.
    """
    found = outcome(family)
    assert found.kind == KINDS[family], found.reason
    if found.setting is None:
        assert found.reason and "\n" not in found.reason
        return
    model = build(family)
    model.set_attn_implementation("eager")
    document, rollouts, anchors = random_tokens(1, 60), random_tokens(1, 3, 2, 5, seed=2), torch.tensor([[9, 20, 52]])
    expected = naive_rollout_logprobs(model, document, rollouts, anchors)
    model.set_attn_implementation(found.setting.implementation)
    with torch.no_grad():
        if found.setting.layout == "packed":
            logps = rollout_logprobs(model, document, rollouts, anchors, 1.0)
        else:
            given = (document.expand(3, -1), torch.zeros(3, 60, dtype=torch.long), rollouts.transpose(0, 1))
            valid = torch.ones(3, 1, dtype=torch.bool)
            logps, _ = rows_logprobs(model, *given, anchors.T, valid, 1.0, None)
            logps = logps.transpose(0, 1)
    gaps = (logps - expected).abs().flatten()
    if "experts" in repr(model).lower():  # their choice may turn on rounding: a few tokens may differ, most do not
        assert gaps.median() < 1e-4 and gaps.quantile(0.9) < 1e-3, gaps
    else:
        assert gaps.max() < (1e-3 if family in RECURRENT else 1e-4), gaps
    if family not in FLOAT32_ALONE:
        verdict = prove(build(family).bfloat16(), replace(found.setting, dtype=torch.bfloat16), CPU)
        assert verdict.reason is None, verdict.reason


def test_the_page_has_the_reasons_of_those_that_are_refused():
    refused = {family: outcome(family) for family, kind in KINDS.items() if kind == "no"}
    page = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    for line in table(refused).splitlines()[4:]:
        if not line.startswith("|  |"):
            assert line in page
