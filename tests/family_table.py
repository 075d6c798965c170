"""Which families of transformers' causal LMs train in which mode, tried on a small random model of each.

python tests/family_table.py        writes the table into ebft_utils/README.md (test_families.py compares it)
"""

import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers.utils import logging as hf_logging

from ebft_utils.proof import Setting, Verdict, prove
from families import FAMILIES, build

PAGE = ROOT / "ebft_utils" / "README.md"
BEGIN, END = "<!-- families: begin (made by tests/family_table.py) -->", "<!-- families: end -->"
CPU = torch.device("cpu")
PACKED, IN_EAGER = Setting("packed", "strided_blocks", torch.float32), Setting("packed", "eager", torch.float32)
ROWS = [Setting("rows", implementation, torch.float32) for implementation in ("sdpa", "eager")]
KINDS = {  # what stands in the table: strided mode, structured mode
    "packed": ("yes", "yes, packed"),
    "packed, eager": ("with `model.attn_implementation=eager`", "yes, in rows; packed with `eager`"),
    "rows": ("no", "yes, in rows"),
    "served": ("no", "in rows, with a vLLM server"),
    "no": ("no", "no"),
}


@dataclass(frozen=True)
class Outcome:
    """The best that a family bears: one of KINDS, the setting, and why nothing better."""

    kind: str
    setting: Setting | None
    reason: str


def outcome(family: str) -> Outcome:
    """Tries the settings of a run one after the other, as layouts.choose_layout does."""
    verdict = _tried(family, PACKED)
    if verdict.reason is None:
        return Outcome("packed", PACKED, "")
    reason = verdict.reason
    if _tried(family, IN_EAGER).reason is None:
        return Outcome("packed, eager", IN_EAGER, reason)
    for setting in ROWS:
        verdict = _tried(family, setting)
        if verdict.reason is None:
            return Outcome("rows", setting, reason)
    for setting in ROWS:
        setting = replace(setting, writes=False)
        if _tried(family, setting).reason is None:
            return Outcome("served", setting, verdict.reason)
    return Outcome("no", None, verdict.reason)


def _tried(family: str, setting: Setting) -> Verdict:
    model = build(family)
    try:
        model.set_attn_implementation(setting.implementation)
    except ValueError as error:
        return Verdict(str(error).splitlines()[0])
    return prove(model, setting, CPU)


def table(outcomes: dict[str, Outcome]) -> str:
    """A row for each outcome; of those that are refused, one for each family."""
    groups = defaultdict(list)
    for family, found in outcomes.items():
        groups[found.kind].append(family)
    lines = ["", "| families | strided | structured |", "|---|---|---|"]
    for kind, (strided, structured) in KINDS.items():
        if kind == "no":
            rows = [([family], f"no: {_shown(outcomes[family].reason)}") for family in groups[kind]]
        else:
            rows = [(groups[kind], structured)] if groups[kind] else []
        lines += [f"| {', '.join(names)} | {strided} | {words} |" for names, words in rows]
    return "\n".join(lines)


def _shown(reason: str) -> str:
    return re.sub(r"by [\d.e+-]+", "by more than rounding", reason).replace("|", "\\|")


def kinds_in(page: str) -> dict[str, str]:
    """Family -> kind, as the page has it."""
    _, _, rest = page.partition(BEGIN)
    found = {}
    for line in rest.partition(END)[0].splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        for kind, words in KINDS.items():
            if (
                len(cells) == 3
                and cells[1] == words[0]
                and (cells[2] == words[1] or (kind == "no" and "no:" in cells[2]))
            ):
                found |= dict.fromkeys(cells[0].split(", "), kind)
    return found


def main() -> None:
    """Writes the table."""
    hf_logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes = {}
    for family in FAMILIES:
        outcomes[family] = outcome(family)
        print(f"{family}: {outcomes[family].kind} {outcomes[family].reason}", flush=True)
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n\n{END}{rest.partition(END)[2]}")
    print(f"{len(outcomes)} families of transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
