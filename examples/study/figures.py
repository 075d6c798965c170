"""The study's plots, from the files in results/; report.py makes them. Needs matplotlib."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import grid
from estimates import (
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
    setting_of,
)

COLOURS = {"base": "#777777", "sft": "#d95f02", "ebft_0": "#1b9e77", "ebft_0.03": "#7570b3", "ebft_0.1": "#1f78b4"}
GROUPS_PER_DOCUMENT = 15


def plot_comparison(results: Results, folder: Path) -> None:
    """Change since the base model of each method: a dot a seed, the mean with its error over documents and seeds."""
    metrics = {**CHANGES, **HUMAN_EVAL}
    size = (13, 3 * len(COMPARISONS))
    figure, axes = plt.subplots(len(COMPARISONS), len(metrics), figsize=size, layout="constrained")
    for row, (title, (base, prefix)) in enumerate(COMPARISONS.items()):
        methods = [method for method in grid.METHODS if results.seeds(f"{prefix}-{method}")]
        for axis, (metric, name) in zip(axes[row], metrics.items(), strict=True):
            if not methods or base not in results.runs or metric not in results.runs[base]["measured"]:
                axis.set_axis_off()
                continue
            for place, method in enumerate(methods):
                runs, start = results.seeds(f"{prefix}-{method}"), results.runs[base]
                values = [mean_of(run, metric) - mean_of(start, metric) for run in runs]
                axis.plot([place] * len(runs), values, "o", ms=4, alpha=0.5, color=COLOURS[method])
                mean, error, _ = difference(runs, [start], metric)
                axis.errorbar([place + 0.2], [mean], [error], fmt="_", ms=12, color=COLOURS[method], capsize=3)
            axis.axhline(0, color="black", lw=0.6)
            axis.set_xticks(range(len(methods)), [NAMES[method].replace(", ce_coef ", "\n") for method in methods])
            axis.set_title(f"{title}: {name}", fontsize=8)
    title = "change since the base model (a dot a seed, bars ± one standard error over documents and seeds)"
    figure.suptitle(title, fontsize=10)
    figure.savefig(folder / "comparison.png", dpi=110)
    plt.close(figure)


def plot_lengths(results: Results, base: str, prefix: str, file: Path) -> None:
    """CFM by length, and the difference to the base model."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method in ("base", *grid.METHODS):
        runs = [results.runs[base]] if method == "base" else results.seeds(f"{prefix}-{method}")
        if runs:
            metrics = [f"cfm_unbiased@{length}" for length in grid.LENGTHS]
            values = [over_seeds([mean_of(run, metric) for run in runs])[0] for metric in metrics]
            axes[0].plot(grid.LENGTHS, values, "o-", color=COLOURS[method], label=NAMES[method])
            if method != "base":
                found = [difference(runs, [results.runs[base]], metric)[:2] for metric in metrics]
                axes[1].errorbar(grid.LENGTHS, *zip(*found, strict=True), fmt="o-", color=COLOURS[method], capsize=3)
    axes[1].axhline(0, color="black", lw=0.6)
    titles = ("CFM, unbiased (LoRA)", "change since the base model, ± standard error over documents, seeds")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(grid.LENGTHS, grid.LENGTHS)
        axis.set_xlabel("tokens of a rollout")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_cost(results: Results, folder: Path) -> None:
    """Cross-entropy and CFM against documents seen and against training seconds."""
    kinds = {"lora": ("o", "LoRA"), "full": ("s", "all weights")}
    series = [  # names of the runs, method, marker, label
        (f"main-{kind}-{method}", method, marker, f"{NAMES[method]}, {words}")
        for kind, (marker, words) in kinds.items()
        for method in grid.METHODS
    ]
    series.append(("compute-lora-sft", "sft", "o", None))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for row, metric in enumerate(("cross_entropy", "cfm_unbiased")):
        for column, cost in enumerate(("documents", "seconds")):
            axis = axes[row, column]
            for prefix, method, marker, label in series:
                if runs := results.seeds(prefix):
                    costs, values = [run[cost] for run in runs], [mean_of(run, metric) for run in runs]
                    axis.plot(costs, values, marker, ms=5, alpha=0.7, color=COLOURS[method], label=label)
            axis.axhline(mean_of(results.runs["lora-base"], metric), color=COLOURS["base"], lw=1, ls="--")
            axis.set_xscale("log")
            axis.set_xlabel({"documents": "documents seen", "seconds": "seconds of training"}[cost])
            axis.set_ylabel(COLUMNS[metric])
    axes[0, 0].legend(fontsize=7)
    figure.savefig(folder / "cost.png", dpi=110)
    plt.close(figure)


def plot_gradients(results: Results, folder: Path) -> None:
    """Groups that a step needs until its gradient is as large as its error."""
    found = gradients(results)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, ((setting, _), values) in enumerate(found.items()):
        (signal, error), (noise, _) = values["signal"], values["noise"]
        sizes = (signal + 2 * error, signal, signal - 2 * error)
        bounds = [noise / size * GROUPS_PER_DOCUMENT if size > 0 else math.inf for size in sizes]
        colour = COLOURS["sft"] if setting == "sft" else COLOURS["ebft_0"]
        axis.plot([bounds[0], min(bounds[2], 1e6)], [place, place], "-", color=colour)
        if signal > 0:
            axis.plot([bounds[1]], [place], "o", color=colour)
    axis.axvline(2000, color="black", lw=0.8, ls=":")
    axis.annotate("about an update of the paper", (2100, -0.6), fontsize=8)
    axis.set_ylim(len(found) - 0.5, -1)
    axis.set_xscale("log")
    labels = [f"{setting_of(name)} ({measured} documents)" for name, measured in found]
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.set_xlabel("groups an update needs (± two standard errors of the signal)", fontsize=9)
    figure.savefig(folder / "gradients.png", dpi=110)
    plt.close(figure)


def draw(results: Results, folder: Path) -> None:
    """All plots whose runs have results."""
    if {"lora-base", "full-base"} <= results.runs.keys():
        plot_comparison(results, folder)
        plot_lengths(results, "lora-base", "main-lora", folder / "cfm_by_length.png")
        plot_cost(results, folder)
    if "larger-base" in results.runs:
        plot_lengths(results, "larger-base", "larger-lora", folder / "cfm_by_length_larger.png")
    if any(name.startswith("gradient-") for name in results.runs):
        plot_gradients(results, folder)
