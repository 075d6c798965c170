"""Metrics: sums over micro-batches and processes, and where they go: console, TensorBoard, metrics.jsonl."""

import json
import math
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


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
    if "advantage" in metrics:
        mean = metrics.pop("advantage")
        metrics["ebft/advantages_std"] = max(0.0, metrics.pop("advantage_square") - mean**2) ** 0.5
    return metrics


class MetricLogger:
    """Writes numbers to TensorBoard and to <output_dir>/metrics.jsonl, one JSON object for each logged step.

    The object is on disk when the call returns. TensorBoard's events are written later, so a killed run lacks its last
    ones: a resumed run writes them again from metrics.jsonl. Either way each step is there once.

    first_step: the step after which a resumed run starts. Later entries of the interrupted run are dropped, because
    they will be written again. None for a new run, which drops all entries of earlier starts.
    """

    def __init__(self, output_dir: Path, first_step: int | None = None):
        path, events = output_dir / "metrics.jsonl", output_dir / "tensorboard"
        kept = [] if first_step is None else logged_entries(output_dir, first_step, keep_damaged=True)
        replacement = path.with_suffix(".jsonl.tmp")
        replacement.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(replacement, path)
        if first_step is None:
            shutil.rmtree(events, ignore_errors=True)
            self.writer = SummaryWriter(str(events))
        else:
            self.writer = _continued_events(events, kept, first_step)
        self.file = path.open("r+")
        self.last, self.last_start = (kept[-1] if kept else {}), 0
        self.file.seek(0, os.SEEK_END)
        if kept:
            self.last_start = self.file.tell() - len(json.dumps(kept[-1])) - 1

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the numbers of a step. A second call for the same step (an evaluation) adds to its object."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # NaN is not JSON
        if self.last.get("step") == step:
            self.file.seek(self.last_start)
            self.last |= finite
        else:
            self.last_start, self.last = self.file.tell(), {"step": step, **finite}
        self.file.write(json.dumps(self.last, allow_nan=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a text, for example a table, to TensorBoard."""
        self.writer.add_text(name, markdown, step)

    def flush(self) -> None:
        """Gives TensorBoard's events to the operating system: a killed process does not lose them.

        An error (a full disk) does not end the run here: the numbers are in metrics.jsonl, the next event raises it.
        """
        with suppress(OSError):
            self.writer.flush()

    def close(self) -> None:
        """Writes everything to disk and closes the files."""
        self.writer.close()
        self.file.close()


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


def _continued_events(events: Path, kept: list[dict], first_step: int) -> SummaryWriter:
    """A writer that goes on after first_step, with the kept entries that the events of an earlier run lack.

    TensorBoard drops what earlier files have from the purge step on.
    """
    step, names = last_event(events)
    purge_step = min(step + 1 if names else step, first_step + 1)
    writer = SummaryWriter(str(events), purge_step=purge_step)
    # once more, because TensorBoard takes the first mark of a folder for that of a new run, and drops nothing
    writer.file_writer.add_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
    for entry in kept:
        for name, value in entry.items():
            if name != "step" and (entry["step"] >= purge_step or (entry["step"] == step and name not in names)):
                writer.add_scalar(name, math.nan if value is None else value, entry["step"])
    writer.flush()
    return writer


def last_event(events: Path) -> tuple[int, set[str]]:
    """The last step in a folder of TensorBoard events, and the names that it has there. Earlier steps are whole.

    Events are lost from the end on: a killed process writes no more. So only the last ones are decoded. (0, nothing)
    where there is none.
    """
    last, names = None, set()
    for path in sorted(events.glob("*tfevents*"), reverse=True):
        for event in _events_from_the_end(path):
            if event.session_log.status == SessionLog.START:  # it drops this step and later ones from earlier files
                if last is None:
                    last = event.step - 1
                elif event.step <= last:
                    return last, names
            elif event.HasField("summary"):
                last = event.step if last is None else last
                if event.step < last:
                    return last, names
                if event.step == last:
                    names |= {value.tag for value in event.summary.value}
    return last or 0, names


def _events_from_the_end(path: Path):
    """The whole events of a file, last first. A frame: length (8 bytes), its checksum (4), event, checksum (4)."""
    content, frames, begin = path.read_bytes(), [], 0
    while begin + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, begin)
        end = begin + 12 + length + 4
        if end > len(content):
            break
        frames.append((begin + 12, end - 4))
        begin = end
    for first, last in reversed(frames):
        try:
            yield Event.FromString(content[first:last])
        except DecodeError:
            continue


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


def rollout_table(rows: list[dict[str, str | float]]) -> str:
    """Markdown table of sample rollouts: prefix | rollout | ground truth | reward."""

    def cell(value: str | float) -> str:
        if isinstance(value, float):
            return f"{value:.3f}"
        text = value.replace("|", "¦").replace("`", "'")
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "⏎")
        return f"`{text.strip()}`"

    names = ["prefix", "rollout", "ground truth", "reward"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows])
