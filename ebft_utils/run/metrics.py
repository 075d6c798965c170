"""Metrics: sums over micro-batches and processes, and where they go: metrics.jsonl, TensorBoard and its like."""

import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from ..config.modes import Config
from ..config.settings import UserError
from .checkpoint import flatten
from .distributed import together


class MetricSums:
    """Weighted means that are exact however the work is split. Keeps (sum, weight) for each name."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}

    def add_max(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Keeps the largest of the values where mask (same shape) is True.

        For a minimum, add the negative values under another name.
        """
        largest = torch.where(mask, values.detach().double(), -torch.inf).max()
        self.maxima[name] = torch.maximum(self.maxima[name], largest) if name in self.maxima else largest

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Adds the values where mask (same shape) is True."""
        self.add_sum(name, torch.where(mask, values.detach().double(), 0.0).sum(), mask.sum())

    def add_sum(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """Adds a total of `weight` values."""
        pair = torch.stack([total.detach().double(), torch.as_tensor(weight, dtype=torch.float64, device=total.device)])
        self.sums[name] = self.sums.get(name, 0) + pair

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The means and maxima over all processes. Names of weight 0 are left out."""
        if not self.sums:
            return {}
        stacked = accelerator.reduce(torch.stack(list(self.sums.values())), reduction="sum").tolist()
        means = {name: total / weight for name, (total, weight) in zip(self.sums, stacked, strict=True) if weight > 0}
        if self.maxima:
            largest = accelerator.gather(torch.stack(list(self.maxima.values()))[None]).amax(0).tolist()
            means |= {name: value for name, value in zip(self.maxima, largest, strict=True) if math.isfinite(value)}
        return means


def step_metrics(accelerator: Accelerator, sums: MetricSums, num_micro_batches: int) -> dict[str, float]:
    """Means of a step over all processes, the standard deviation of the advantages, and the number of tokens."""
    metrics = sums.means(accelerator)
    metrics["tokens"] *= num_micro_batches * accelerator.num_processes
    if abs(metrics.get("ebft/diversity", 1.0)) < 1e-7:  # whitened rollouts are orthogonal: what is left is rounding
        metrics["ebft/diversity"] = 0.0
    if "advantage" in metrics:
        mean = metrics.pop("advantage")
        metrics["ebft/advantages_std"] = max(0.0, metrics.pop("advantage_square") - mean**2) ** 0.5
    return metrics


def start_trackers(config: Config, accelerator: Accelerator, output_dir: Path, first_step: int | None) -> list:
    """Starts the trackers of train.report_to. In tensorboard, wandb and trackio a resumed run goes on in place.

    first_step: as in MetricLogger. Returns accelerate's trackers; every process calls this.
    """
    folder, name = output_dir / "tensorboard", output_dir.name
    if first_step is None and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    number = {} if first_step is None else {"purge_step": first_step + 1}
    mark = output_dir / "run_id"  # by which a tracker knows a resumed run
    if accelerator.is_main_process and not (number and mark.is_file()):
        mark.write_text(uuid.uuid4().hex)
    run_id = mark.read_text() if accelerator.is_main_process else None
    how = {
        "tensorboard": number,
        "wandb": {"name": name, "dir": str(output_dir), "id": run_id, "resume": "allow" if number else None},
        "trackio": {"name": name, "resume": "allow" if number else "never"},
    }

    def start() -> None:
        try:
            accelerator.init_trackers("ebft", init_kwargs=how)
        except Exception as error:  # of somebody else's package: no login, no server
            raise UserError(f"train.report_to: a tracker does not start: {type(error).__name__}: {error}") from error

    together(accelerator, start)
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        if tracker.name != "tensorboard":
            settings = flatten(config.to_dict())
            as_text = {key: str(value) if isinstance(value, list) else value for key, value in settings.items()}
            tracker.store_init_configuration(as_text)
        elif first_step is None:
            tracker.log({"configuration": f"~~~yaml\n{config.to_yaml()}~~~"}, step=0)
        else:  # once more: TensorBoard takes the first mark of a folder for that of a new run, and drops nothing
            event = Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
            tracker.tracker.file_writer.add_event(event)
    return accelerator.trackers


class MetricLogger:
    """Writes numbers to <output_dir>/metrics.jsonl, one JSON object for each logged step, and to the trackers.

    Both have the numbers of a step when the call returns. The file has all of them. The trackers, where people look,
    get neither standard errors nor changes.

    first_step: the step after which a resumed run starts. Later entries of the interrupted run are dropped, because
    they will be written again. None for a new run, which drops all entries of earlier starts.
    """

    def __init__(self, output_dir: Path, first_step: int | None = None, trackers: Sequence[GeneralTracker] = ()):
        path, self.trackers = output_dir / "metrics.jsonl", trackers
        kept = [] if first_step is None else logged_entries(output_dir, first_step, keep_damaged=True)
        replacement = path.with_suffix(".jsonl.tmp")
        replacement.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(replacement, path)
        self.file = path.open("r+")
        self.last, self.last_start = (kept[-1] if kept else {}), 0
        self.file.seek(0, os.SEEK_END)
        if kept:
            self.last_start = self.file.tell() - len(json.dumps(kept[-1])) - 1

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the numbers of a step. A second call for the same step (an evaluation) adds to its object."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # NaN is not JSON
        if self.last.get("step") == step:
            self.file.seek(self.last_start)
            self.last |= finite
        else:
            self.last_start, self.last = self.file.tell(), {"step": step, "time": round(time.time(), 3), **finite}
        self.file.write(json.dumps(self.last, allow_nan=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        looked_at = {name: value for name, value in metrics.items() if not name.endswith(("_se", "_change"))}
        for tracker in self.trackers:
            tracker.log(looked_at, step=step)

    def samples(self, step: int, groups: Sequence["SampleGroup"]) -> None:
        """Shows the rollouts of some groups: as text in TensorBoard, as a table in the trackers that have tables."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                tracker.log({"rollouts": samples_text(groups)}, step=step)
            elif tracker.name in ("wandb", "clearml"):
                rows = [
                    [reward, group.prefix, text, group.truth] for group in groups for reward, text in group.rollouts
                ]
                tracker.log_table("rollouts", ["reward", "prefix", "rollout", "truth"], rows, step=step)

    def close(self) -> None:
        """Closes the file and the trackers."""
        self.file.close()
        while self.trackers:  # accelerate's own list: it closes none twice
            self.trackers.pop().finish()


def logged_entries(output_dir: Path, last_step: int, keep_damaged: bool = False) -> list[dict]:
    """The entries of metrics.jsonl up to a step. Lines that are none are left out: a bad disk can leave anything.

    A crash can leave half a line at the end. keep_damaged: names the other ones, and keeps a copy of the file.
    """
    path = output_dir / "metrics.jsonl"
    entries, damaged = _read_entries(path)
    if damaged and keep_damaged:
        copy = path.with_suffix(".jsonl.damaged")
        shutil.copyfile(path, copy)
        numbers = ", ".join(map(str, damaged[:5])) + (", .." if len(damaged) > 5 else "")
        print(f"{path}: damaged lines are left out ({numbers}); the file as it was is {copy}")
    return [entry for entry in entries if entry["step"] <= last_step]


def _read_entries(path: Path) -> tuple[list[dict], list[int]]:
    """The entries of a metrics file, and the numbers of the whole lines that are none."""
    entries, damaged = [], []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            entry = None
        if _is_entry(entry):
            entries.append(entry)
        elif line.endswith(b"\n"):
            damaged.append(number)
    return entries, damaged


def _is_entry(entry) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return False
    return all(value is None or isinstance(value, (int, float)) for value in entry.values())


def logged_evaluations(output_dir: Path, last_step: int) -> dict[int, dict[str, float]]:
    """The evaluations among the logged entries, by step."""
    found = {}
    for entry in logged_entries(output_dir, last_step):
        metrics = {name: value for name, value in entry.items() if name.startswith("eval/")}
        if metrics:
            found[entry["step"]] = {name: math.nan if value is None else value for name, value in metrics.items()}
    return found


def mean_with_error(totals: Tensor, weights: Tensor) -> tuple[float, float]:
    """A mean over documents of different weight, and its standard error.

    mean m = sum t / sum w (t: a document's total, w: its number of tokens or groups). The documents are the independent
    units, because groups of one document share its text. So the error is that of a ratio estimate:
    sqrt(R/(R-1) * sum (t - m w)^2) / sum w.

    Args: totals, weights: (R), one entry for each document. With one document the error is NaN.
    """
    totals, weights = totals.double(), weights.double()
    mean = totals.sum() / weights.sum()
    num = (weights > 0).sum()
    spread = (totals - mean * weights).square().sum()
    error = (num / (num - 1) * spread).sqrt() / weights.sum() if num > 1 else torch.tensor(float("nan"))
    return mean.item(), error.item()


def evaluation_metrics(table: dict[str, Tensor], before: dict[str, Tensor] | None) -> dict[str, float]:
    """Means over documents with their standard errors (name + "_se"). before: the evaluation before training.

    With it, also the change since then. Each evaluation uses the same documents and random numbers, so the error of a
    change is that of the paired differences. It is much smaller than that of the mean itself, which comes mostly from
    the differences between documents.
    """
    metrics = {}
    for name, (totals, weights) in table.items():
        metrics[f"eval/{name}"], metrics[f"eval/{name}_se"] = mean_with_error(totals, weights)
    perplexity = torch.tensor(metrics["eval/cross_entropy"], dtype=torch.float64).exp().item()
    metrics |= {"eval/perplexity": perplexity, "eval/perplexity_se": perplexity * metrics["eval/cross_entropy_se"]}
    if before is not None:
        for name, (totals, weights) in table.items():
            change, error = mean_with_error(totals - before[name][0], weights)
            metrics |= {f"eval/{name}_change": change, f"eval/{name}_change_se": error}
    return metrics


def summary_of(metrics: dict[str, float]) -> str:
    """Evaluation results as a table: metric, mean ± standard error, and the change since the start if known."""
    lines = []
    for name in (name for name in metrics if not name.endswith(("_se", "_change"))):
        line = f"  {name.removeprefix('eval/'):18}{metrics[name]:9.4f} ± {metrics[name + '_se']:.4f}"
        if f"{name}_change" in metrics:
            line += f"   change {metrics[name + '_change']:+.4f} ± {metrics[name + '_change_se']:.4f}"
        lines.append(line)
    return "\n".join(lines)


@dataclass
class SampleGroup:
    """Rollouts of one anchor (or prompt) as text. rollouts: (reward, text) of each."""

    prefix: str
    truth: str
    rollouts: list[tuple[float, str]]


def samples_text(groups: Sequence[SampleGroup]) -> str:
    """Groups as Markdown: the rewards of each, then prefix, truth, its best and its worst rollout as they were written.

    Code blocks keep line ends and indentation, and are as wide as the page.
    """
    texts = []
    for group in groups:
        ranked = sorted(group.rollouts, key=lambda rollout: -rollout[0])
        mean = sum(reward for reward, _ in ranked) / len(ranked)
        (best, best_text), (worst, worst_text) = ranked[0], ranked[-1]
        parts = {"prefix": group.prefix, "truth": group.truth}
        parts |= {f"reward {best:.3f}": best_text, f"reward {worst:.3f}, the worst": worst_text}
        block = "\n".join(f"{f'── {name} ':─<60}\n{text}" for name, text in parts.items())
        fence = "~" * (3 + max(map(len, re.findall("~+", block)), default=0))
        head = f"**reward {best:.3f} to {worst:.3f}**, mean {mean:.3f}, {len(ranked)} rollouts"
        texts.append(f"{head}\n\n{fence}\n{block}\n{fence}")
    return "\n\n".join(texts)
