"""The study's numbers: levels over seeds, differences between methods, signal and noise of gradients.

From the files in results/; the tables (report.py) and the plots (figures.py) show them.
"""

import json
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor

import grid
from ebft_utils.run.metrics import mean_with_error

NAMES = {
    "base": "base model",
    "sft": "SFT",
    "ebft_0": "EBFT, ce_coef 0",
    "ebft_0.03": "EBFT, ce_coef 0.03",
    "ebft_0.1": "EBFT, ce_coef 0.1",
}
CHANGES = {"cross_entropy": "cross-entropy", "cfm_unbiased": "CFM, unbiased", "mean_reward": "reward"}
COLUMNS = {"cross_entropy": "cross-entropy", "cfm_unbiased": "CFM, unbiased", "cfm_loss": "CFM, whitened"}
COLUMNS |= {"mean_reward": "reward", "reward_best_of_n": "best reward of 4"}
HUMAN_EVAL = {"human_eval_cross_entropy": "HumanEval cross-entropy"}
BY_LENGTH = {f"cfm_unbiased@{length}": f"{length} tokens" for length in grid.LENGTHS}
COMPARISONS = {  # runs that are compared -> their base model, what their names begin with
    "strided, LoRA": ("lora-base", "main-lora"),
    "strided, all weights": ("full-base", "main-full"),
    "larger, LoRA": ("larger-base", "larger-lora"),
    "structured, LoRA": ("structured-base", "structured-lora"),
}


class Results:
    """The files of results/, by name."""

    def __init__(self, folder: Path):
        self.runs = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}

    def seeds(self, prefix: str) -> list[dict]:
        """The runs PREFIX-seed0, -seed1, .. that are there; for a base model the run PREFIX."""
        return [run for name, run in self.runs.items() if prefix in (name, name.rpartition("-seed")[0])]


def mean_of(run: dict, metric: str) -> float:
    """Over the fresh held-out documents."""
    return grid.mean_of_fresh(run["measured"], metric)


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; NaN for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def seconds_of(runs: list[dict]) -> str:
    """Of training alone, mean over seeds."""
    return f"{over_seeds([run['seconds'] for run in runs])[0]:.0f}"


def difference(runs: list[dict], others: list[dict], metric: str) -> tuple[float, float, float]:
    """How two methods differ on the same documents, each averaged over its seeds: mean, standard error, spread.

    The spread is the standard deviation of the differences over seeds (NaN for one seed). The standard error is
    sqrt(a^2 + b^2): a is that of the paired differences over documents, b = spread / sqrt(seeds). What belongs to one
    document in one seed alone, as sampling noise does, is in a and in b: at most sqrt(2) too wide. With one seed it is
    a alone. Raises ValueError when the documents are others.
    """
    sides = [[grid.fresh(run["measured"], metric) for run in side] for side in (runs, others)]
    if any(weights != sides[0][0][1] for side in sides for _, weights in side):
        raise ValueError(
            f"{metric} of {runs[0]['name']} and {others[0]['name']} is of different documents: "
            "were they measured with another version of Python?"
        )
    weights = torch.tensor(sides[0][0][1], dtype=torch.float64)
    of_runs, of_others = (torch.tensor([totals for totals, _ in side], dtype=torch.float64) for side in sides)
    mean, error = mean_with_error(of_runs.mean(0) - of_others.mean(0), weights)
    per_seed = of_runs - (of_others if len(of_others) == len(of_runs) else of_others.mean(0))
    _, spread = over_seeds((per_seed.sum(1) / weights.sum()).tolist())
    if len(runs) > 1:
        error = math.hypot(error, spread / math.sqrt(len(runs)))
    return mean, error, spread


def gradient_noise(run: dict) -> dict[str, tuple[float, float]]:
    """From inner products of single documents' gradients (measure.gradients): name -> (value, standard error).

    signal: ‖mean gradient‖^2, estimated without bias from pairs of different documents; noise: the trace of one
    document's gradient covariance. A batch of `documents` = noise / signal has a gradient whose squared error is as
    large as its signal (the noise scale of McCandlish et al. 2018, arXiv 1812.06162). cosine: of the mean gradient with
    that of the cross-entropy. Errors are by the jackknife over documents, the signal's by `pair_mean_error` where the
    file has the sums of squares.
    """
    # each: sums of rows, of columns, diagonal
    measured = {name: torch.tensor(run["measured"][name], dtype=torch.float64) for name in ("own", "with_sft", "sft")}
    matrices = {name: values[:3] for name, values in measured.items()}
    number = matrices["own"].shape[1]

    def estimates(kept: int, pairs: dict[str, Tensor], square: Tensor) -> Tensor:
        signal, common, of_sft = (pairs[name] / (kept * (kept - 1)) for name in matrices)
        noise = square / kept - signal
        return torch.stack([signal, noise, noise / signal, common / (signal.clamp_min(0) * of_sft.clamp_min(0)).sqrt()])

    every = {name: rows.sum() - diagonal.sum() for name, (rows, _, diagonal) in matrices.items()}
    # one document left out
    without = {name: every[name] - rows - columns + 2 * own for name, (rows, columns, own) in matrices.items()}
    own = matrices["own"][2]
    values, left_out = estimates(number, every, own.sum()), estimates(number - 1, without, own.sum() - own)
    errors = ((number - 1) / number * (left_out - left_out.mean(1, keepdim=True)).square().sum(1)).sqrt()
    if len(measured["own"]) == 4:  # measured from 2026-11-25 on
        rows, _, diagonal, squares = measured["own"]
        errors[0] = pair_mean_error(rows - diagonal, squares - diagonal.square())
    names = ("signal", "noise", "documents", "cosine")
    return dict(zip(names, zip(values.tolist(), errors.tolist(), strict=True), strict=True))


def pair_mean_error(sums: Tensor, squares: Tensor) -> float:
    """Standard error of the mean U of a symmetric h(i, j) over all pairs i != j of n documents; n at least 4.

    Var U = 4 (n-2) / (n (n-1)) * A + 2 / (n (n-1)) * B, with A = Cov(h(i, j), h(i, k)) and B = Var h(i, j) (Hoeffding
    1948). Both are estimated without bias; A is cut to 0 .. B / 2, where it must lie. The jackknife estimates up to
    twice this variance, namely where E[h] is small beside the noise.
    Args: sums, squares (n): for each i, of h and of h^2 over j != i.
    """
    number = len(sums)
    pairs = number * (number - 1)
    of_squares = squares.sum() / pairs  # mean of h(i, j)^2
    of_neighbours = (sums.square().sum() - squares.sum()) / (pairs * (number - 2))  # of h(i, j) h(i, k)
    disjoint = sums.sum().square() - 4 * sums.square().sum() + 2 * squares.sum()
    apart = disjoint / (pairs * (number - 2) * (number - 3))  # of h(i, j) h(k, l)
    one_shared, same = of_neighbours - apart, of_squares - apart
    one_shared = one_shared.clamp(min=0).minimum(same / 2)
    return ((4 * (number - 2) * one_shared + 2 * same) / pairs).clamp(min=0).sqrt().item()


def setting_of(name: str, code: str = "") -> str:
    """What was changed in an ablation, as it is written on the command line; for a method, its name."""
    return f"{code}{grid.ABLATIONS[name][0]}{code}" if name in grid.ABLATIONS else NAMES[name]


def gradients(results: Results) -> dict[tuple[str, int], dict[str, tuple[float, float]]]:
    """(setting, documents that were measured) -> signal and noise; the surest signal first."""
    found = {}
    for name, run in results.runs.items():
        if name.startswith("gradient-"):
            setting, measured = name.removeprefix("gradient-").removesuffix("-192"), len(run["measured"]["own"][0])
            found[setting, measured] = gradient_noise(run)
    return dict(sorted(found.items(), key=lambda item: -item[1]["signal"][0] / item[1]["signal"][1]))
