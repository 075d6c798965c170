"""The plot of the small study: change since the base model against documents and against CPU time."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import estimates
import grid
from estimates import NAMES, Results
from figures import COLOURS


def curve(results: Results, prefix: str, metric: str) -> list[tuple[float, float, float, float]]:
    """(documents, CPU seconds, change since the base model, its error) at the start, on the way, and at the end."""
    found, base = results.seeds(prefix), results.runs["base"]
    points, log = [(0.0, 0.0, 0.0, 0.0)], found[0]["log"]
    per_step = found[0]["documents"] / len(log)
    steps = sorted({int(step) for step in found[0].get("on_the_way", {})} | {len(log)})
    for step in steps:
        then = [{**run, "measured": run["on_the_way"][str(step)]} for run in found] if step < len(log) else found
        seconds = estimates.over_seeds([run["log"][step - 1]["cpu_seconds"] for run in found])[0]
        points.append((step * per_step, seconds, *estimates.difference(then, [base], metric)[:2]))
    return points


def draw(results: Results, file: Path) -> None:
    """A row a metric, a column a cost. Bands are ± one standard error over modules and seeds."""
    methods = [method for method in grid.METHODS if results.seeds(f"main-{method}")]
    if not methods or "base" not in results.runs:
        return
    figure, axes = plt.subplots(len(estimates.CHANGES), 2, figsize=(10, 9), layout="constrained")
    for row, (metric, name) in zip(axes, estimates.CHANGES.items(), strict=True):
        for method in methods:
            documents, seconds, means, errors = zip(*curve(results, f"main-{method}", metric), strict=True)
            label = f"{NAMES[method]} ({len(results.seeds(f'main-{method}'))} seeds)"
            low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
            for axis, cost in zip(row, (documents, [value / 60 for value in seconds]), strict=True):
                axis.plot(cost, means, "o-", ms=3, color=COLOURS[method], label=label)
                axis.fill_between(cost, low, high, color=COLOURS[method], alpha=0.2, lw=0)
        for axis, words in zip(row, ("documents seen", "CPU minutes of training"), strict=True):
            axis.axhline(0, color="black", lw=0.6)
            axis.set_xlabel(words)
            axis.set_ylabel(f"{name}, change")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)
