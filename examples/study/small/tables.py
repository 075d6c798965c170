"""The tables of README.md, from the files in results/. Runs without a result are left out."""

import math
from pathlib import Path

import torch

import estimates
import grid
import report
import runs
from curves import draw
from downstream import calibration_error
from estimates import NAMES, Results

PAGE = Path(__file__).resolve().parent / "README.md"
MAIN = {"cross_entropy": "cross-entropy", "accuracy": "next token right", "cfm_unbiased": "CFM, unbiased"}
MAIN |= {"mean_reward": "reward"}
TEXT = {"valid_python": "valid Python", "next_line_exact": "next line right", "next_line_similarity": "edit similarity"}
LEVELS = {**MAIN, **TEXT}
TIMES = ("cpu_seconds", "seconds")
COMPARED = {NAMES[method]: f"main-{method}" for method in grid.METHODS}
ALL = {**COMPARED, "SFT, for EBFT's time": "time-sft"}


def calibration(results: Results) -> list[str]:
    """Expected calibration error; ± holds modules (jackknife) and seeds."""
    rows = []
    for label, prefix in {NAMES["base"]: "base", **ALL}.items():
        found = [calibration_of(run) for run in results.seeds(prefix)]
        if found:
            mean, spread = estimates.over_seeds([value for value, _ in found])
            error = math.sqrt(sum(error**2 for _, error in found) / len(found))
            if len(found) > 1:
                error = math.hypot(error, spread / math.sqrt(len(found)))
            rows.append([label, f"{len(found)}", f"{mean:.4f} ± {error:.4f}"])
    return report.table(["", "seeds", "expected calibration error"], rows)


def calibration_of(run: dict) -> tuple[float, float]:
    gaps = torch.tensor(run["measured"]["confidence_gaps"], dtype=torch.float64).T
    return calibration_error(gaps, torch.tensor(run["measured"]["accuracy"][1], dtype=torch.float64))


def on_the_way(results: Results) -> list[str]:
    """Change since the base model after so many documents, with its error; mean over the seeds that are in."""
    rows, base = [], results.runs.get("base")
    for label, prefix in ALL.items():
        found = results.seeds(prefix)
        for step in found[0].get("on_the_way", {}) if found and base else ():
            then = [{**run, "measured": run["on_the_way"][step]} for run in found]
            documents = int(step) * found[0]["documents"] // len(found[0]["log"])
            seconds = estimates.over_seeds([run["log"][int(step) - 1]["cpu_seconds"] for run in found])[0]
            cells = [report.shown_change(*estimates.difference(then, [base], metric)) for metric in estimates.CHANGES]
            rows.append([label, f"{len(found)}", f"{documents}", f"{seconds:.0f}", *cells])
    return report.table(["", "seeds", "documents", "CPU seconds", *estimates.CHANGES.values()], rows)


def rates(results: Results) -> list[str]:
    """The sweep, on the validation documents."""
    rows = []
    if start := results.runs.get("validation-base"):
        rows.append(
            [NAMES["base"], "", *(f"{estimates.mean_of(start, metric):.4f}" for metric in estimates.CHANGES), ""]
        )
    for method, tried in runs.RATES.items():
        chosen = runs.chosen_rate(method)
        for rate in sorted(tried):
            if run := results.runs.get(f"sweep-{method}-{rate:g}"):
                name = f"{rate:g} (chosen)" if rate == chosen else f"{rate:g}"
                reached = [f"{estimates.mean_of(run, metric):.4f}" for metric in estimates.CHANGES]
                rows.append([NAMES[method], name, *reached, f"{grid.trained_for(run):.5f}"])
    return report.table(["method", "learning rate", *estimates.CHANGES.values(), "what it is trained for"], rows)


def groups(results: Results) -> list[str]:
    """What each method was trained with, and for how long. CPU seconds do not depend on what else the machine did."""
    rows = []
    for label, prefix in ALL.items():
        if found := results.seeds(prefix):
            log = found[0]["log"]
            seconds = (
                [estimates.over_seeds([run["log"][-1][name] for run in found])[0] for name in TIMES] if log else []
            )
            cells = [f"{len(found)}", f"{len(log)}", f"{found[0]['documents']}", *(f"{value:.0f}" for value in seconds)]
            rows.append([label, *cells])
    return report.table(["", "seeds", "steps", "documents", "CPU seconds of training", "seconds"], rows)


def base_training(results: Results) -> list[str]:
    """Held-out cross-entropy while the base model learnt."""
    log = results.runs["base-training"]["log"] if "base-training" in results.runs else []
    name = "eval/cross_entropy"
    rows = [[f"{entry['step']}", f"{entry[name]:.4f} ± {entry[f'{name}_se']:.4f}"] for entry in log]
    return report.table(["step", "held-out cross-entropy of the base half"], rows)


def ceiling(results: Results) -> list[str]:
    """How often the text's own continuations count as valid Python."""
    if "base" not in results.runs:
        return []
    share = estimates.mean_of(results.runs["base"], "valid_truth")
    return ["", f"Of the text's own continuations {share:.4f} count as valid Python: more cannot be reached.", ""]


def tables(results: Results) -> dict[str, list[str]]:
    """Name of a place in README.md -> what stands there."""
    lengths = estimates.BY_LENGTH
    return {
        "state": groups(results),
        "levels": report.levels(results, ALL, "base", LEVELS),
        "ceiling": ceiling(results),
        "changes": report.against(results, ALL, "base", report.SINCE, LEVELS),
        "to_sft": report.against(results, ALL, "main-sft", report.TO_SFT, LEVELS),
        "lengths": [
            *report.levels(results, ALL, "base", lengths),
            *report.against(results, ALL, "base", report.SINCE, lengths),
            *report.against(results, ALL, "main-sft", report.TO_SFT, lengths),
        ],
        "calibration": calibration(results),
        "on_the_way": on_the_way(results),
        "rates": rates(results),
        "base": base_training(results),
    }


def write_page(plot: bool = True) -> None:
    """README.md with its tables, and its plot."""
    results = Results(runs.RESULTS)
    PAGE.write_text(report.with_tables(PAGE.read_text(), tables(results)))
    if plot:
        draw(results, PAGE.with_name("curves.png"))
