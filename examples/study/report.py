"""results.md and plots/ from what is in results/: means over seeds with their standard deviations, and changes with the errors of paired differences over documents.

    python examples/study/report.py         (study.py ends with it; needs matplotlib: pip install 'matplotlib>=3.10,<4')

Runs that are not there yet are left out, and named at the end.
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

import study
from ebft_utils.metrics import mean_with_error

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
    """Over the held-out documents."""
    totals, weights = run["measured"][metric]
    return sum(totals) / sum(weights)


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; NaN for one value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def difference(runs: list[dict], others: list[dict], metric: str) -> tuple[float, float]:
    """Mean difference of two methods on the same documents (each averaged over its seeds), and the standard error of the paired differences over documents."""
    totals = [torch.tensor([run["measured"][metric][0] for run in side], dtype=torch.float64).mean(0) for side in (runs, others)]
    return mean_with_error(totals[0] - totals[1], torch.tensor(runs[0]["measured"][metric][1]))


def gradient_noise(run: dict, supervised: dict) -> dict[str, tuple[float, float]]:
    """From inner products of single documents' gradients: name -> (value, jackknife standard error over documents).

    signal: |mean gradient|^2, estimated without bias from pairs of different documents; noise: the trace of one document's gradient covariance.
    A batch of `documents` = noise / signal has a gradient whose squared error is as large as its signal (the noise scale of McCandlish et al. 2018,
    arXiv 1812.06162). cosine: of the mean gradient with that of the cross-entropy.
    """
    own, cross, sft = (torch.tensor(matrix, dtype=torch.float64) for matrix in (run["measured"]["own"], run["measured"]["with_sft"], supervised["measured"]["own"]))

    def estimates(kept: torch.Tensor) -> torch.Tensor:
        number = len(kept)
        signal, common, of_sft = ((matrix[kept][:, kept].sum() - matrix.diagonal()[kept].sum()) / (number * (number - 1)) for matrix in (own, cross, sft))
        noise = own.diagonal()[kept].mean() - signal
        return torch.stack([signal, noise, noise / signal, common / (signal.clamp_min(0) * of_sft.clamp_min(0)).sqrt()])

    number = len(own)
    every = torch.arange(number)
    left_out = torch.stack([estimates(every[every != document]) for document in range(number)])
    errors = ((number - 1) / number * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    return dict(zip(("signal", "noise", "documents", "cosine"), zip(estimates(every).tolist(), errors.tolist(), strict=True), strict=True))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Tables


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows), ""]


def shown(mean: float, spread: float, signed: bool = False) -> str:
    return f"{mean:+.4f} ± {spread:.4f}" if signed else f"{mean:.4f}" if math.isnan(spread) else f"{mean:.4f} ± {spread:.4f}"


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


def changes(results: Results, prefixes: dict[str, str], base: str, rival: str, columns: dict[str, str]) -> list[str]:
    """A row a method: change since the base model, and difference to the rival (SFT), with errors of paired differences over documents."""
    rows = []
    for label, prefix in prefixes.items():
        runs, rivals = results.seeds(prefix), results.seeds(rival)
        if runs and base in results.runs:
            cells = [shown(*difference(runs, [results.runs[base]], metric), signed=True) for metric in columns]
            to_rival = [shown(*difference(runs, rivals, metric), signed=True) if rivals and prefix != rival else "" for metric in columns]
            rows.append([label, *cells, *to_rival])
    return table(["", *(f"{name}: change" for name in columns.values()), *(f"{name}: minus SFT" for name in columns.values())], rows)


def rates(results: Results, prefix: str, kinds: dict) -> list[str]:
    """The sweep: validation cross-entropy and unbiased CFM at each learning rate; the chosen one in bold."""
    rows = []
    for kind, methods in kinds.items():
        for method, tried in methods.items():
            runs = {rate: results.runs.get(f"{prefix}sweep-{kind}-{method}-{rate:g}") for rate in tried}
            if all(runs.values()):
                chosen = study.chosen_rate(kind, method, prefix, kinds)
                for rate, run in runs.items():
                    name = f"**{rate:g}**" if rate == chosen else f"{rate:g}"
                    rows.append([kind, NAMES[method], name, f"{mean_of(run, 'cross_entropy'):.4f}", f"{mean_of(run, 'cfm_unbiased'):.4f}", f"{mean_of(run, 'reward_pass@1'):.4f}"])
    return table(["", "method", "learning rate", "cross-entropy", "CFM, unbiased", "reward pass@1"], rows) if rows else []


def report(results: Results) -> str:
    """results.md."""
    lines = ["# EBFT against supervised fine-tuning: results", "", "Made by `report.py` from the files in `results/`; what was run stands in `study.py`. Reading them: README.md, *Evidence*.", ""]
    devices = sorted({run["device"] for run in results.runs.values()})
    lines += [
        f"SmolLM2-135M-Instruct, forwards in bfloat16, on the Python standard library's source, documents of 128 tokens, about {GROUPS_PER_DOCUMENT} groups each; 32 held-out documents "
        f"(another 32 for the learning rates). Trained on: {', '.join(devices)}.",
        "",
        "Tables of levels: mean ± standard deviation over seeds. Tables of changes: ± is the standard error of paired differences over the held-out documents, methods averaged over seeds.",
        "",
        "## Learning rates",
        "",
        "48 documents, one seed, validation documents. Chosen by unbiased CFM, for SFT by cross-entropy.",
        *rates(results, "", study.RATES),
    ]
    both = {"cross_entropy": "cross-entropy", "cfm_unbiased": "CFM, unbiased", "reward_pass@1": "reward pass@1"}
    for kind, title in (("lora", "LoRA"), ("full", "Full fine-tuning")):
        prefixes = {NAMES[method]: f"main-{kind}-{method}" for method in study.METHODS}
        if kind == "lora":
            prefixes["SFT, EBFT's time"] = "compute-lora-sft"
        lines += [f"## {title}", "", *levels(results, prefixes, "base", COLUMNS), *changes(results, prefixes, "base", f"main-{kind}-sft", both)]
    if "base" in results.runs:
        lines += ["## CFM by the rollout's length (LoRA)", "", "Unbiased CFM of the first tokens of the same rollouts of 64 tokens, at the same places.", ""]
        by_length = {f"cfm_unbiased@{length}": f"{length} tokens" for length in study.LENGTHS}
        prefixes = {NAMES[method]: f"main-lora-{method}" for method in study.METHODS}
        lines += [*levels(results, prefixes, "base", by_length), *changes(results, prefixes, "base", "main-lora-sft", by_length)]
    if any(name.startswith("gradient-") for name in results.runs) and "gradient-sft" in results.runs:
        rows = []
        for name, run in results.runs.items():
            if name.startswith("gradient-"):
                found = gradient_noise(run, results.runs["gradient-sft"])
                signal, error = found["signal"]
                needed = f"{found['documents'][0]:.0f} ± {found['documents'][1]:.0f}" if signal > 2 * error else f"more than {found['noise'][0] / (max(signal, 0) + 2 * error):.0f}"
                rows.append([name.removeprefix("gradient-"), f"{signal:.3g} ± {error:.2g}", f"{found['noise'][0]:.3g}", needed, shown(*found["cosine"]) if signal > 2 * error else "–"])
        lines += [
            "## The gradient at the base model (LoRA)", "",
            "Of 48 single documents. *documents*: how many a step needs until the error of its gradient is as large as the gradient (noise / signal). *cosine*: of the mean gradient "
            "with that of the cross-entropy; ± are jackknife errors over documents.",
            *table(["", "signal: |mean gradient|²", "noise of one document", "documents", "cosine with SFT"], rows),
        ]
    ablations = {name: f"ablation-{name}" for name in study.ABLATIONS}
    if any(results.seeds(prefix) for prefix in ablations.values()):
        lines += [
            "## Ablations (EBFT γ=0, LoRA)", "", "One setting changed, seed 0; measured like all others. The first row is the three seeds of the comparison.",
            *levels(results, {"as it stands": "main-lora-ebft_0", **ablations}, "base", {name: title for name, title in COLUMNS.items() if name != "human_eval_cross_entropy"}),
        ]
    structured = {NAMES[method]: f"structured-lora-{method}" for method in ("sft", "ebft_0", "ebft_0.1")}
    if any(results.seeds(prefix) for prefix in structured.values()):
        few = {name: title for name, title in COLUMNS.items() if name != "human_eval_cross_entropy"}
        lines += ["## Structured mode (LoRA): signature and docstring → body", "", *rates(results, "structured-", study.STRUCTURED)]
        lines += [*levels(results, structured, "structured-base", few), *changes(results, structured, "structured-base", "structured-lora-sft", both)]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Plots


def plot_comparison(results: Results, folder: Path) -> None:
    """Change since the base model of each method: a dot a seed, the mean with the error over documents."""
    metrics = {"cross_entropy": "cross-entropy", "cfm_unbiased": "CFM, unbiased", "reward_pass@1": "reward", "human_eval_cross_entropy": "HumanEval cross-entropy"}
    figure, axes = plt.subplots(2, len(metrics), figsize=(13, 6), layout="constrained")
    for row, (kind, title) in enumerate((("lora", "LoRA"), ("full", "full"))):
        for axis, (metric, name) in zip(axes[row], metrics.items(), strict=True):
            for place, method in enumerate(study.METHODS):
                runs = results.seeds(f"main-{kind}-{method}")
                if runs:
                    base = mean_of(results.runs["base"], metric)
                    axis.plot([place] * len(runs), [mean_of(run, metric) - base for run in runs], "o", ms=4, alpha=0.5, color=COLOURS[method])
                    mean, error = difference(runs, [results.runs["base"]], metric)
                    axis.errorbar([place + 0.2], [mean], [error], fmt="_", ms=12, color=COLOURS[method], capsize=3)
            axis.axhline(0, color="black", lw=0.6)
            axis.set_xticks(range(len(study.METHODS)), [NAMES[method].replace("EBFT ", "") for method in study.METHODS])
            axis.set_title(f"{title}: {name}, change", fontsize=10)
    figure.savefig(folder / "comparison.png", dpi=110)
    plt.close(figure)


def plot_lengths(results: Results, folder: Path) -> None:
    """CFM by length, and the difference to the base model."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method in ("base", *study.METHODS):
        runs = [results.runs["base"]] if method == "base" else results.seeds(f"main-lora-{method}")
        if runs:
            values = [over_seeds([mean_of(run, f"cfm_unbiased@{length}") for run in runs])[0] for length in study.LENGTHS]
            axes[0].plot(study.LENGTHS, values, "o-", color=COLOURS[method], label=NAMES[method])
            if method != "base":
                found = [difference(runs, [results.runs["base"]], f"cfm_unbiased@{length}") for length in study.LENGTHS]
                axes[1].errorbar(study.LENGTHS, *zip(*found, strict=True), fmt="o-", color=COLOURS[method], capsize=3)
    axes[1].axhline(0, color="black", lw=0.6)
    for axis, title in zip(axes, ("CFM, unbiased (LoRA)", "change since the base model, ± standard error over documents"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(study.LENGTHS, study.LENGTHS)
        axis.set_xlabel("tokens of a rollout")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "cfm_by_length.png", dpi=110)
    plt.close(figure)


def plot_cost(results: Results, folder: Path) -> None:
    """Cross-entropy and CFM against documents seen and against training seconds."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for row, metric in enumerate(("cross_entropy", "cfm_unbiased")):
        for column, cost in enumerate(("documents", "seconds")):
            axis = axes[row, column]
            for prefix, method, marker in [(f"main-{kind}-{method}", method, marker) for kind, marker in (("lora", "o"), ("full", "s")) for method in study.METHODS] + [("compute-lora-sft", "sft", "o")]:
                runs = results.seeds(prefix)
                label = f"{NAMES[method]}, {'full' if marker == 's' else 'LoRA'}" if prefix.startswith("main") else None
                if runs:
                    axis.plot([run[cost] for run in runs], [mean_of(run, metric) for run in runs], marker, ms=5, alpha=0.7, color=COLOURS[method], label=label)
            axis.axhline(mean_of(results.runs["base"], metric), color=COLOURS["base"], lw=1, ls="--")
            axis.set_xscale("log")
            axis.set_xlabel({"documents": "documents seen", "seconds": "seconds of training"}[cost])
            axis.set_ylabel(COLUMNS[metric])
    axes[0, 0].legend(fontsize=7)
    figure.savefig(folder / "cost.png", dpi=110)
    plt.close(figure)


def plot_gradients(results: Results, folder: Path) -> None:
    """Groups that a step needs until its gradient is as large as its error."""
    found = {name.removeprefix("gradient-"): gradient_noise(run, results.runs["gradient-sft"]) for name, run in results.runs.items() if name.startswith("gradient-")}
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, (name, values) in enumerate(found.items()):
        (signal, error), (noise, _) = values["signal"], values["noise"]
        bounds = [noise / bound * GROUPS_PER_DOCUMENT if bound > 0 else math.inf for bound in (signal + error, signal, signal - error)]
        colour = COLOURS["sft"] if name == "sft" else COLOURS["ebft_0"]
        axis.plot([bounds[0], min(bounds[2], 1e6)], [place, place], "-", color=colour)
        if signal > 0:
            axis.plot([bounds[1]], [place], "o", color=colour)
    axis.axvline(2000, color="black", lw=0.8, ls=":")
    axis.annotate("a step of the paper", (2000, len(found) - 0.5), fontsize=8, ha="center")
    axis.set_xscale("log")
    axis.set_yticks(range(len(found)), found)
    axis.set_xlabel("groups a step until noise = signal (bar: ± one standard error of the signal)")
    figure.savefig(folder / "gradients.png", dpi=110)
    plt.close(figure)


def main() -> None:
    results = Results(study.RESULTS)
    folder = HERE / "plots"
    folder.mkdir(exist_ok=True)
    (HERE / "results.md").write_text(report(results))
    if "base" in results.runs:
        plot_comparison(results, folder)
        plot_lengths(results, folder)
        plot_cost(results, folder)
    if "gradient-sft" in results.runs:
        plot_gradients(results, folder)
    print(f"{len(results.runs)} results in {HERE / 'results.md'} and {folder}")


if __name__ == "__main__":
    main()
