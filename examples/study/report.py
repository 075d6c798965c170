"""results.md and plots/ from what is in results/: means over seeds with their standard deviations, and changes with the errors of paired differences over documents.

    python examples/study/report.py         (study.py ends with it; needs matplotlib: pip install 'matplotlib>=3.10,<4')

Runs that are not there yet are left out, and named at the end of results.md.
"""

import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import grid
from ebft_utils.config.settings import UserError
from ebft_utils.run.metrics import mean_with_error

NAMES = {"base": "base", "sft": "SFT", "ebft_0": "EBFT γ=0", "ebft_0.03": "EBFT γ=0.03", "ebft_0.1": "EBFT γ=0.1"}
COLOURS = {"base": "#777777", "sft": "#d95f02", "ebft_0": "#1b9e77", "ebft_0.03": "#7570b3", "ebft_0.1": "#1f78b4"}
COLUMNS = {
    "cross_entropy": "cross-entropy",
    "cfm_unbiased": "CFM, unbiased",
    "cfm_loss": "CFM, whitened",
    "reward_pass@1": "reward pass@1",
    "reward_best_of_n": "best of 4",
    "human_eval_cross_entropy": "HumanEval cross-entropy",
}
GROUPS_PER_DOCUMENT = 15
COMPARISONS = {  # part -> base model, what the names of its runs begin with
    "strided, LoRA": ("lora-base", "main-lora"),
    "strided, full": ("full-base", "main-full"),
    "larger, LoRA": ("larger-base", "larger-lora"),
    "structured, LoRA": ("structured-base", "structured-lora"),
}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Numbers


class Results:
    """The files of results/, by name."""

    def __init__(self, folder: Path):
        self.runs = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}

    def seeds(self, prefix: str) -> list[dict]:
        """The runs PREFIX-seed0, -seed1, .. that are there."""
        return [run for name, run in self.runs.items() if name.rpartition("-seed")[0] == prefix]


def mean_of(run: dict, metric: str) -> float:
    """Over the fresh held-out documents."""
    return grid.mean_of_fresh(run["measured"], metric)


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; NaN for one value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(
        values
    ) > 1 else math.nan


def difference(runs: list[dict], others: list[dict], metric: str) -> tuple[float, float, float]:
    """Mean difference of two methods on the same documents (each averaged over its seeds), the standard error of the paired differences over documents, and the
    standard deviation over seeds of the differences (NaN for one seed). Raises ValueError when the documents are others."""
    sides = [[grid.fresh(run["measured"], metric) for run in side] for side in (runs, others)]
    if any(weights != sides[0][0][1] for side in sides for _, weights in side):
        raise ValueError(
            f"{metric} of {runs[0]['name']} and {others[0]['name']} is of different documents: were they measured with another version of Python?"
        )
    weights = torch.tensor(sides[0][0][1], dtype=torch.float64)
    of_runs, of_others = (torch.tensor([totals for totals, _ in side], dtype=torch.float64) for side in sides)
    mean, error = mean_with_error(of_runs.mean(0) - of_others.mean(0), weights)
    per_seed = of_runs - (of_others if len(of_others) == len(of_runs) else of_others.mean(0))
    return mean, error, over_seeds((per_seed.sum(1) / weights.sum()).tolist())[1]


def gradient_noise(run: dict) -> dict[str, tuple[float, float]]:
    """From inner products of single documents' gradients (measure.gradients): name -> (value, jackknife standard error over documents).

    signal: ‖mean gradient‖^2, estimated without bias from pairs of different documents; noise: the trace of one document's gradient covariance.
    A batch of `documents` = noise / signal has a gradient whose squared error is as large as its signal (the noise scale of McCandlish et al. 2018,
    arXiv 1812.06162). cosine: of the mean gradient with that of the cross-entropy.
    """
    matrices = {
        name: torch.tensor(run["measured"][name], dtype=torch.float64) for name in ("own", "with_sft", "sft")
    }  # each: sums of rows, of columns, diagonal
    number = matrices["own"].shape[1]

    def estimates(kept: int, pairs: dict[str, Tensor], square: Tensor) -> Tensor:
        signal, common, of_sft = (pairs[name] / (kept * (kept - 1)) for name in matrices)
        noise = square / kept - signal
        return torch.stack([signal, noise, noise / signal, common / (signal.clamp_min(0) * of_sft.clamp_min(0)).sqrt()])

    every = {name: rows.sum() - diagonal.sum() for name, (rows, _, diagonal) in matrices.items()}
    without = {
        name: every[name] - rows - columns + 2 * diagonal for name, (rows, columns, diagonal) in matrices.items()
    }  # one document left out
    own = matrices["own"][2]
    values, left_out = estimates(number, every, own.sum()), estimates(number - 1, without, own.sum() - own)
    errors = ((number - 1) / number * (left_out - left_out.mean(1, keepdim=True)).square().sum(1)).sqrt()
    return dict(
        zip(("signal", "noise", "documents", "cosine"), zip(values.tolist(), errors.tolist(), strict=True), strict=True)
    )


def pass_at(k: int, passed: list[float], samples: list[float]) -> float:
    """Unbiased estimate of the chance that one of k completions passes, mean over problems: 1 - C(n - c, k) / C(n, k)."""
    return sum(
        1 - math.comb(round(n - c), k) / math.comb(round(n), k) for c, n in zip(passed, samples, strict=True)
    ) / len(passed)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Tables


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def shown(mean: float, spread: float) -> str:
    return f"{mean:.4f}" if math.isnan(spread) else f"{mean:.4f} ± {spread:.4f}"


def shown_change(mean: float, error: float, spread: float) -> str:
    return f"{mean:+.4f} ± {error:.4f}" + ("" if math.isnan(spread) else f" ({spread:.4f})")


def levels(results: Results, prefixes: dict[str, str], base: str, columns: dict[str, str]) -> list[str]:
    """A row a method: documents, seconds, and each metric as mean ± standard deviation over seeds. prefixes: label -> of the runs' names."""
    rows = []
    if base in results.runs:
        run = results.runs[base]
        rows.append(["base", "0", "", "", *(f"{mean_of(run, metric):.4f}" for metric in columns)])
    for label, prefix in prefixes.items():
        runs = results.seeds(prefix)
        if runs:
            seconds = over_seeds([run["seconds"] for run in runs])[0]
            cells = [shown(*over_seeds([mean_of(run, metric) for run in runs])) for metric in columns]
            rows.append([label, f"{runs[0]['documents']}", f"{seconds:.0f}", f"{len(runs)}", *cells])
    return table(["", "documents", "seconds", "seeds", *columns.values()], rows)


def changes(
    results: Results, prefixes: dict[str, str], base: str, rival: str, rival_name: str, columns: dict[str, str]
) -> list[str]:
    """A row a method: seeds, change since the base model, and difference to the rival, with errors of paired differences over documents (and over seeds)."""
    rows = []
    for label, prefix in prefixes.items():
        runs, rivals = results.seeds(prefix), results.seeds(rival)
        if runs and base in results.runs:
            cells = [shown_change(*difference(runs, [results.runs[base]], metric)) for metric in columns]
            to_rival = [
                shown_change(*difference(runs, rivals[: len(runs)], metric)) if rivals and prefix != rival else ""
                for metric in columns
            ]
            rows.append([label, f"{len(runs)}", *cells, *to_rival])
    return table(
        [
            "",
            "seeds",
            *(f"{name}: change" for name in columns.values()),
            *(f"{name}: minus {rival_name}" for name in columns.values()),
        ],
        rows,
    )


def summary(results: Results) -> list[str]:
    """The table of README.md, *Evidence*: each method's change since its base model."""
    rows = []
    for part, (base, prefix) in COMPARISONS.items():
        prefixes = {f"{part}: {NAMES[method]}": f"{prefix}-{method}" for method in grid.METHODS}
        if part == "strided, LoRA":
            prefixes[f"{part}: SFT, given EBFT's time"] = "compute-lora-sft"
        for label, name in prefixes.items():
            runs = results.seeds(name)
            if runs and base in results.runs:
                found = [
                    difference(runs, [results.runs[base]], metric)
                    for metric in ("cross_entropy", "cfm_unbiased", "reward_pass@1")
                ]
                cells = [f"{mean:+.4f} ± {error:.4f}" for mean, error, _ in found]
                rows.append(
                    [label, f"{runs[0]['documents']}", *cells, f"{over_seeds([run['seconds'] for run in runs])[0]:.0f}"]
                )
    return table(["", "documents", "cross-entropy", "CFM, unbiased", "reward", "seconds of training"], rows)


def gradient_table(results: Results) -> list[str]:
    """Signal and noise of the gradient, a row a setting; what is less than two errors away from nothing is a bound."""
    rows = []
    for name, run in results.runs.items():
        if name.startswith("gradient-"):
            found = gradient_noise(run)
            signal, error = found["signal"]
            needed = (
                f"{found['documents'][0]:.0f} ± {found['documents'][1]:.0f}"
                if signal > 2 * error
                else f"more than {found['noise'][0] / (max(signal, 0) + 2 * error):.0f}"
            )
            rows.append(
                [
                    name.removeprefix("gradient-"),
                    f"{signal:.3g} ± {error:.2g}",
                    f"{found['noise'][0]:.3g}",
                    needed,
                    shown(*found["cosine"]) if signal > 2 * error else "–",
                ]
            )
    return table(["", "signal: ‖mean gradient‖²", "noise of one document", "documents", "cosine with SFT"], rows)


def rates(results: Results, prefix: str, kinds: dict) -> list[str]:
    """The sweep on the validation documents, with the paired differences of CFM and reward to the chosen rate, which is in bold."""
    rows = []
    for kind, methods in kinds.items():
        for method, tried in methods.items():
            runs = {rate: results.runs.get(f"{prefix}sweep-{kind}-{method}-{rate:g}") for rate in tried}
            if all(runs.values()):
                chosen = grid.chosen_rate(kind, method, prefix, kinds)
                for rate, run in runs.items():
                    name = f"**{rate:g}**" if rate == chosen else f"{rate:g}"
                    to_chosen = [
                        "" if rate == chosen else shown_change(*difference([run], [runs[chosen]], metric))
                        for metric in ("cfm_unbiased", "reward_pass@1")
                    ]
                    levels = [
                        f"{mean_of(run, metric):.4f}" for metric in ("cross_entropy", "cfm_unbiased", "reward_pass@1")
                    ]
                    rows.append([kind, NAMES[method], name, *levels, *to_chosen])
    return (
        table(
            [
                "",
                "method",
                "learning rate",
                "cross-entropy",
                "CFM, unbiased",
                "reward pass@1",
                "CFM: minus chosen",
                "reward: minus chosen",
            ],
            rows,
        )
        if rows
        else []
    )


def missing(results: Results) -> list[str]:
    """Names of the study's runs without a result."""
    names = []
    for part, runs in grid.PARTS.items():
        try:
            names += [run.name for run in runs() if run.name not in results.runs]
        except UserError:  # its learning rates are not chosen yet
            names.append(f"all of the part {part}")
    return names


def report(results: Results) -> str:
    """results.md."""
    lines = [
        "# EBFT against supervised fine-tuning: results",
        "",
        "Made by `report.py` from the files in `results/`; what was run stands in `study.py`. Reading them: README.md, *Evidence*.",
        "",
    ]
    copied = {}
    for run in results.runs.values():
        shares = run["measured"].get("copied_share", [()])[0]
        if shares:
            copied.setdefault((run["base"], len(shares)), set()).add(sum(share > grid.MOST_COPIED for share in shares))
    counts = ", ".join(
        f"{base.removesuffix('.yaml')} {' or '.join(map(str, sorted(numbers)))} of {of}"
        for (base, of), numbers in sorted(copied.items())
    )
    devices = sorted({run["device"] for run in results.runs.values()})
    lines += [
        f"SmolLM2-135M-Instruct, forwards in bfloat16, on the Python standard library's source, the first 128 tokens of each module, about {GROUPS_PER_DOCUMENT} groups each; 32 held-out documents "
        f"(another 32 for the learning rates), of the larger runs 96 (and 96). Trained on: {', '.join(devices)}.",
        "",
        f"Held-out documents of which more than {grid.MOST_COPIED:.0%} of the 16-token windows stand in training documents too (templates: {counts}) do not count, here and in the choice of learning rates.",
        "",
        "Tables of levels: mean ± standard deviation over seeds. Tables of changes: ± is the standard error of paired differences over documents, the methods averaged over seeds; in brackets the "
        "standard deviation over seeds. Seconds are of training alone; where one CPU core is named, two runs shared a machine of two.",
        "",
        "## Changes since the base model",
        *summary(results),
        "## Learning rates",
        "",
        "48 documents (6 steps), one seed. Chosen, in bold: the best value of what is trained, rl_coef * reward / 8 - ce_coef * cross-entropy. γ=0.03 takes the rate of γ=0.1.",
        *rates(results, "", grid.RATES),
    ]
    both = {"cross_entropy": "cross-entropy", "cfm_unbiased": "CFM, unbiased", "reward_pass@1": "reward pass@1"}
    for kind, title in (("lora", "LoRA"), ("full", "Full fine-tuning")):
        prefixes = {NAMES[method]: f"main-{kind}-{method}" for method in grid.METHODS}
        if kind == "lora":
            prefixes["SFT, EBFT's time"] = "compute-lora-sft"
        lines += [
            f"## {title}",
            "",
            *levels(results, prefixes, f"{kind}-base", COLUMNS),
            *changes(results, prefixes, f"{kind}-base", f"main-{kind}-sft", "SFT", both),
        ]
    by_length = {f"cfm_unbiased@{length}": f"{length} tokens" for length in grid.LENGTHS}
    if "lora-base" in results.runs:
        lines += [
            "## CFM by the rollout's length (LoRA)",
            "",
            "Unbiased CFM of the first tokens of the same rollouts of 64 tokens, at the same places.",
            "",
        ]
        prefixes = {NAMES[method]: f"main-lora-{method}" for method in grid.METHODS}
        lines += [
            *levels(results, prefixes, "lora-base", by_length),
            *changes(results, prefixes, "lora-base", "main-lora-sft", "SFT", by_length),
        ]
    larger = {NAMES[method]: f"larger-lora-{method}" for method in grid.LARGER["lora"]}
    if any(results.seeds(prefix) for prefix in larger.values()):
        lines += [
            "## Larger runs (LoRA): the feature is the mean over a rollout",
            "",
            "`strided_larger.yaml`: `embed_method: completion_mean`, in training and in what is measured (so CFM and reward are not those of the tables above); 16 steps of 16 documents.",
            "",
            "Learning rates: 96 documents (6 steps), one seed, chosen as above.",
            *rates(results, "larger-", grid.LARGER),
            *levels(results, larger, "larger-base", COLUMNS),
            *changes(results, larger, "larger-base", "larger-lora-sft", "SFT", both),
            "CFM by the rollout's length:",
            *levels(results, larger, "larger-base", by_length),
            *changes(results, larger, "larger-base", "larger-lora-sft", "SFT", by_length),
        ]
    if any(name.startswith("gradient-") for name in results.runs):
        lines += [
            "## The gradient at the base model (LoRA)",
            "",
            "Of single documents (48, or 192 where the name says so), with respect to the adapter as it is initialised (so to its matrices B, seen through one random A). *documents*: how many a step needs until the error of its gradient is as large as the gradient (noise / signal). *cosine*: of the mean gradient "
            "with that of the cross-entropy; ± are jackknife errors over documents.",
            *gradient_table(results),
        ]
    ablations = {name: f"ablation-{name}" for name in grid.ABLATIONS}
    if any(results.seeds(prefix) for prefix in ablations.values()):
        few = {name: title for name, title in COLUMNS.items() if name != "human_eval_cross_entropy"}
        lines += [
            "## Ablations (EBFT γ=0, LoRA)",
            "",
            "One setting changed, all measured with the same settings; differences are to the same seeds of the comparison, *as it stands*: seed 0, or all three.",
            *levels(results, {"as it stands": "main-lora-ebft_0", **ablations}, "lora-base", few),
            *changes(results, ablations, "lora-base", "main-lora-ebft_0", "as it stands", both),
        ]
    structured = {NAMES[method]: f"structured-lora-{method}" for method in ("sft", "ebft_0", "ebft_0.1")}
    if any(results.seeds(prefix) for prefix in structured.values()):
        few = {name: title for name, title in COLUMNS.items() if name != "human_eval_cross_entropy"}
        lines += [
            "## Structured mode (LoRA): signature and docstring → body",
            "",
            "Learning rates as above, with reward / 48.",
            *rates(results, "structured-", grid.STRUCTURED),
        ]
        lines += [
            *levels(results, structured, "structured-base", few),
            *changes(results, structured, "structured-base", "structured-lora-sft", "SFT", both),
        ]
        rows = []
        for label, prefix in structured.items():
            logs = [run["log"] for run in results.seeds(prefix) if "rollout/length" in run["log"][0]]
            for name in ("rollout/length", "rollout/truncated") if logs else ():
                rows.append(
                    [
                        label,
                        name,
                        *(f"{over_seeds([log[step][name] for log in logs])[0]:.2f}" for step in range(len(logs[0]))),
                    ]
                )
        lines += (
            [
                "The completions while training, step after step (at most 48 tokens), mean over seeds:",
                *table(["", "", *map(str, range(1, len(rows[0]) - 1))], rows),
            ]
            if rows
            else []
        )
    passed = {
        name.removeprefix("pass_at_k-"): run["measured"]["human_eval_passed"]
        for name, run in results.runs.items()
        if name.startswith("pass_at_k-")
    }
    if passed:
        lines += [
            "## HumanEval, executed",
            "",
            *table(
                ["", "pass@1", "pass@10"],
                [[name, *(f"{pass_at(k, *counts):.4f}" for k in (1, 10))] for name, counts in passed.items()],
            ),
        ]
    absent = missing(results)
    lines += [f"Not run yet: {', '.join(absent)}." if absent else "All runs of the study are here.", ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Plots


def plot_comparison(results: Results, folder: Path) -> None:
    """Change since the base model of each method: a dot a seed, the mean with the error over documents."""
    metrics = {
        "cross_entropy": "cross-entropy",
        "cfm_unbiased": "CFM, unbiased",
        "reward_pass@1": "reward",
        "human_eval_cross_entropy": "HumanEval cross-entropy",
    }
    figure, axes = plt.subplots(
        len(COMPARISONS), len(metrics), figsize=(13, 3 * len(COMPARISONS)), layout="constrained"
    )
    for row, (title, (base, prefix)) in enumerate(COMPARISONS.items()):
        methods = [method for method in grid.METHODS if results.seeds(f"{prefix}-{method}")]
        for axis, (metric, name) in zip(axes[row], metrics.items(), strict=True):
            if not methods or base not in results.runs or metric not in results.runs[base]["measured"]:
                axis.set_axis_off()
                continue
            for place, method in enumerate(methods):
                runs, start = results.seeds(f"{prefix}-{method}"), results.runs[base]
                axis.plot(
                    [place] * len(runs),
                    [mean_of(run, metric) - mean_of(start, metric) for run in runs],
                    "o",
                    ms=4,
                    alpha=0.5,
                    color=COLOURS[method],
                )
                mean, error, _ = difference(runs, [start], metric)
                axis.errorbar([place + 0.2], [mean], [error], fmt="_", ms=12, color=COLOURS[method], capsize=3)
            axis.axhline(0, color="black", lw=0.6)
            axis.set_xticks(range(len(methods)), [NAMES[method].replace("EBFT ", "") for method in methods])
            axis.set_title(f"{title}: {name}", fontsize=9)
    figure.suptitle("change since the base model", fontsize=10)
    figure.savefig(folder / "comparison.png", dpi=110)
    plt.close(figure)


def plot_lengths(results: Results, base: str, prefix: str, file: Path) -> None:
    """CFM by length, and the difference to the base model."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method in ("base", *grid.METHODS):
        runs = [results.runs[base]] if method == "base" else results.seeds(f"{prefix}-{method}")
        if runs:
            values = [
                over_seeds([mean_of(run, f"cfm_unbiased@{length}") for run in runs])[0] for length in grid.LENGTHS
            ]
            axes[0].plot(grid.LENGTHS, values, "o-", color=COLOURS[method], label=NAMES[method])
            if method != "base":
                found = [
                    difference(runs, [results.runs[base]], f"cfm_unbiased@{length}")[:2] for length in grid.LENGTHS
                ]
                axes[1].errorbar(grid.LENGTHS, *zip(*found, strict=True), fmt="o-", color=COLOURS[method], capsize=3)
    axes[1].axhline(0, color="black", lw=0.6)
    for axis, title in zip(
        axes, ("CFM, unbiased (LoRA)", "change since the base model, ± standard error over documents"), strict=True
    ):
        axis.set_xscale("log", base=2)
        axis.set_xticks(grid.LENGTHS, grid.LENGTHS)
        axis.set_xlabel("tokens of a rollout")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_cost(results: Results, folder: Path) -> None:
    """Cross-entropy and CFM against documents seen and against training seconds."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for row, metric in enumerate(("cross_entropy", "cfm_unbiased")):
        for column, cost in enumerate(("documents", "seconds")):
            axis = axes[row, column]
            for prefix, method, marker in [
                (f"main-{kind}-{method}", method, marker)
                for kind, marker in (("lora", "o"), ("full", "s"))
                for method in grid.METHODS
            ] + [("compute-lora-sft", "sft", "o")]:
                runs = results.seeds(prefix)
                label = f"{NAMES[method]}, {'full' if marker == 's' else 'LoRA'}" if prefix.startswith("main") else None
                if runs:
                    axis.plot(
                        [run[cost] for run in runs],
                        [mean_of(run, metric) for run in runs],
                        marker,
                        ms=5,
                        alpha=0.7,
                        color=COLOURS[method],
                        label=label,
                    )
            axis.axhline(mean_of(results.runs["lora-base"], metric), color=COLOURS["base"], lw=1, ls="--")
            axis.set_xscale("log")
            axis.set_xlabel({"documents": "documents seen", "seconds": "seconds of training"}[cost])
            axis.set_ylabel(COLUMNS[metric])
    axes[0, 0].legend(fontsize=7)
    figure.savefig(folder / "cost.png", dpi=110)
    plt.close(figure)


def plot_gradients(results: Results, folder: Path) -> None:
    """Groups that a step needs until its gradient is as large as its error."""
    found = {
        name.removeprefix("gradient-"): gradient_noise(run)
        for name, run in results.runs.items()
        if name.startswith("gradient-")
    }
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, (name, values) in enumerate(found.items()):
        (signal, error), (noise, _) = values["signal"], values["noise"]
        bounds = [
            noise / bound * GROUPS_PER_DOCUMENT if bound > 0 else math.inf
            for bound in (signal + error, signal, signal - error)
        ]
        colour = COLOURS["sft"] if name == "sft" else COLOURS["ebft_0"]
        axis.plot([bounds[0], min(bounds[2], 1e6)], [place, place], "-", color=colour)
        if signal > 0:
            axis.plot([bounds[1]], [place], "o", color=colour)
    axis.axvline(2000, color="black", lw=0.8, ls=":")
    axis.annotate("about a step of the paper", (2000, len(found) - 0.5), fontsize=8, ha="center")
    axis.set_xscale("log")
    axis.set_yticks(range(len(found)), found)
    axis.set_xlabel("groups a step until noise = signal (bar: ± one standard error of the signal)")
    figure.savefig(folder / "gradients.png", dpi=110)
    plt.close(figure)


def main() -> None:
    results = Results(grid.RESULTS)
    folder = HERE / "plots"
    folder.mkdir(exist_ok=True)
    (HERE / "results.md").write_text(report(results))
    if {"lora-base", "full-base"} <= results.runs.keys():
        plot_comparison(results, folder)
        plot_lengths(results, "lora-base", "main-lora", folder / "cfm_by_length.png")
        plot_cost(results, folder)
    if "larger-base" in results.runs:
        plot_lengths(results, "larger-base", "larger-lora", folder / "cfm_by_length_larger.png")
    if any(name.startswith("gradient-") for name in results.runs):
        plot_gradients(results, folder)
    print(f"{len(results.runs)} results in {HERE / 'results.md'} and {folder}")


if __name__ == "__main__":
    main()
