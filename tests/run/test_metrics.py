"""Metric sums, standard errors, the metrics file and the rollout table."""

import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.util.tensor_util import make_ndarray

from ebft_utils.run.metrics import (
    MetricLogger,
    MetricSums,
    logged_entries,
    mean_with_error,
    rollout_table,
    step_metrics,
)
from helpers import ROOT

# ----------------------------------------------------------------------------------------------------------------------
# Means


def test_mean_with_error_by_hand():
    """Totals 4, 6 of weights 1, 3: mean 10/4 = 2.5, deviations 1.5 and -1.5, error sqrt(2/1 * 4.5)/4 = 0.75."""
    assert mean_with_error(torch.tensor([4.0, 6.0]), torch.tensor([1, 3])) == pytest.approx((2.5, 0.75))


def test_mean_with_error_of_literal_documents():
    """The ratio estimate, written out: each document is one independent unit, whatever its weight."""
    totals, weights = [3.0, 10.0, 1.0, 8.0, 2.5], [1, 4, 2, 3, 1]
    mean = sum(totals) / sum(weights)
    squares = sum((total - mean * weight) ** 2 for total, weight in zip(totals, weights, strict=True))
    expected = (5 / 4 * squares) ** 0.5 / sum(weights)
    assert mean_with_error(torch.tensor(totals), torch.tensor(weights)) == pytest.approx((mean, expected), rel=1e-9)


def test_equal_weights_give_the_plain_standard_error():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = mean_with_error(values * 7, torch.full((50,), 7))
    assert mean == pytest.approx(values.mean().item()) and error == pytest.approx((values.std() / 50**0.5).item())


def test_error_is_that_of_repeated_experiments():
    """The spread of the means over many sets of 40 documents is what the error says.

    The groups of a document share its luck.
    """
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(1, 10, (1000, 40), generator=generator)
    totals = weights * (2 + torch.randn(1000, 40, generator=generator))
    means, errors = torch.tensor([mean_with_error(*pair) for pair in zip(totals, weights, strict=True)]).T
    assert errors.mean() == pytest.approx(means.std().item(), rel=0.1)


def test_documents_without_weight_do_not_count():
    """A document without a valid group is no independent unit; the number of units must not grow with it."""
    with_empty = mean_with_error(torch.tensor([4.0, 0.0, 6.0, 0.0]), torch.tensor([1, 0, 3, 0]))
    assert with_empty == pytest.approx((2.5, 0.75))


def test_one_document_has_no_error():
    mean, error = mean_with_error(torch.tensor([6.0]), torch.tensor([3]))
    assert mean == 2.0 and error != error


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_metric_sums_do_not_depend_on_the_split(accelerator):
    """A mean of the micro-batches' means would weigh a nearly empty one like a full one."""
    generator = torch.Generator().manual_seed(2)
    values, mask = torch.randn(6, 5, generator=generator), torch.rand(6, 5, generator=generator) < 0.5
    mask[2] = False
    for split in ([6], [1, 5], [2, 1, 3], [1] * 6):
        sums = MetricSums()
        for part, part_mask in zip(values.split(split), mask.split(split), strict=True):
            sums.add("mean", part, part_mask)
            sums.add_sum("total", part.sum(), 2.0)
        expected = {"mean": values[mask].mean().item(), "total": values.sum().item() / (2 * len(split))}
        assert sums.means(accelerator) == pytest.approx(expected, rel=1e-5)


def test_metric_sums_ignore_what_is_masked(accelerator):
    """NaN at an invalid anchor stays there; a name without a single value is left out, not reported as 0."""
    sums = MetricSums()
    sums.add("some", torch.tensor([1.0, float("nan"), 4.0], requires_grad=True), torch.tensor([True, False, True]))
    sums.add("none", torch.tensor([float("inf")]), torch.tensor([False]))
    assert sums.means(accelerator) == {"some": 2.5}
    assert not sums.sums["some"].requires_grad
    assert MetricSums().means(accelerator) == {}


def test_a_small_spread_of_large_advantages():
    """2 ± 3e-4: the squares differ in the ninth digit, which float32 does not have."""
    alone = SimpleNamespace(num_processes=1, reduce=lambda tensor, reduction: tensor)
    advantages = 2 + torch.tensor([[3e-4, -3e-4]]).expand(500, -1)
    sums = MetricSums()
    sums.add("advantage", advantages, torch.ones_like(advantages, dtype=torch.bool))
    sums.add("advantage_square", advantages.double().square(), torch.ones_like(advantages, dtype=torch.bool))
    sums.add_sum("tokens", torch.tensor(1.0), 1.0)
    assert step_metrics(alone, sums, 1)["ebft/advantages_std"] == pytest.approx(3e-4, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The metrics file


def read_lines(folder) -> list[dict]:
    """The lines as any JSON reader sees them: NaN and Infinity are Python's own additions, not JSON."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_on_disk_at_once(tmp_path):
    logger = MetricLogger(tmp_path)
    logger.log(1, {"loss": 0.5, "reward": -1.25})
    assert read_lines(tmp_path) == [{"step": 1, "loss": 0.5, "reward": -1.25}]
    logger.log(2, {"loss": 0.25})
    assert read_lines(tmp_path)[1] == {"step": 2, "loss": 0.25}
    logger.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_resume_drops_what_will_be_written_again(tmp_path):
    """A run killed at step 5 goes on from its checkpoint of step 3: each step stands there once."""
    logger = MetricLogger(tmp_path)
    for step in range(1, 6):
        logger.log(step, {"loss": float(step)})
    logger.close()
    logger = MetricLogger(tmp_path, first_step=3)
    assert read_lines(tmp_path) == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    for step in (4, 5, 6):
        logger.log(step, {"loss": 10.0 * step})
    logger.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert read_lines(tmp_path)[3]["loss"] == 40.0
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_half_written_last_line_does_not_stop_the_resume(tmp_path):
    """The run that is resumed is the one that was killed."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    MetricLogger(tmp_path, first_step=1).close()
    assert read_lines(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_lines_are_json_whatever_the_value(tmp_path, value):
    """eval.num_documents: 1 has no standard error: its NaN must not make the file unreadable to other programs."""
    logger = MetricLogger(tmp_path)
    logger.log(1, {"eval/cfm_loss": 0.5, "eval/cfm_loss_se": value})
    logger.close()
    (line,) = read_lines(tmp_path)
    assert line["step"] == 1 and line["eval/cfm_loss"] == 0.5 and not isinstance(line.get("eval/cfm_loss_se"), float)


@pytest.mark.parametrize(
    "line", [b'{"step": 2, "lo', b"\xff\xfe", b"[2]", b'{"loss": 2.0}', b'{"step": "2"}', b"[" * 10**5]
)
def test_a_damaged_line_does_not_stop_the_resume(tmp_path, capsys, line):
    """Guards against one bad byte that makes a run impossible to resume, and a line that is dropped without a word."""
    content = b'{"step": 1, "loss": 1.0}\n' + line + b'\n{"step": 3, "loss": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert [entry["step"] for entry in logged_entries(tmp_path, 3)] == [1, 3] and capsys.readouterr().out == ""
    MetricLogger(tmp_path, first_step=3).close()
    assert [entry["step"] for entry in read_lines(tmp_path)] == [1, 3]
    copy = tmp_path / "metrics.jsonl.damaged"
    assert copy.read_bytes() == content
    said = capsys.readouterr().out
    assert f"{tmp_path / 'metrics.jsonl'}: damaged lines are left out (2)" in said and str(copy) in said


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard's events


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: name -> (step, value) in its order."""
    return {
        name: [(event.step, make_ndarray(event.tensor_proto).item()) for event in events]
        for name, events in shown(folder, "scalars")
    }


def texts(folder) -> list[int]:
    """The steps that have a text."""
    return [event.step for _, events in shown(folder, "text") for event in events]


def shown(folder, plugin: str) -> list[tuple[str, list]]:
    """The events of each name. They are all tensors to TensorBoard, which keeps them by plugin."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    known = plugin in events.ActivePlugins()
    return [(name, events.Tensors(name)) for name in events.PluginTagToContent(plugin)] if known else []


def steps(last: int, loss: float = 1.0, first: int = 1) -> list[tuple[int, float]]:
    return [(step, loss * step) for step in range(first, last + 1)]


def log_steps(logger: MetricLogger, first: int, last: int) -> None:
    for step in range(first, last + 1):
        logger.log(step, {"loss": float(step), "reward": 2.0 * step})


def newest(folder):
    return sorted((folder / "tensorboard").glob("*"))[-1]


@pytest.fixture
def in_order(monkeypatch):
    """The names of event files begin with the second: starts of a test are a second apart, as those of runs are."""
    seconds = iter(range(10**9, 2 * 10**9))
    monkeypatch.setattr(event_file_writer.time, "time", lambda: next(seconds))


KILLED = """
import os, signal, sys, time
from pathlib import Path
from ebft_utils.run.metrics import MetricLogger
logger = MetricLogger(Path(sys.argv[1]))
for step in range(1, 8):
    logger.log(step, {"loss": float(step), "reward": 2.0 * step})
    if step == int(sys.argv[2]):
        logger.flush()
        records = logger.writer.file_writer.event_writer._async_writer._writer
        records.write = lambda data: time.sleep(100)  # a disk that is busy: what follows waits in the queue
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("flushed, first_step", [(2, 7), (2, 5), (5, 7), (5, 5), (6, 4)])
def test_a_killed_run_lacks_no_event_once_it_is_resumed(tmp_path, flushed, first_step):
    """Guards against a hole in the curves of a run that was killed with kill -9, and steps that are there twice.

    flushed: the step after which the events were given to the operating system.
    """
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(flushed)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    assert len(scalars(tmp_path).get("loss", [])) < 7  # guards the test itself
    time.sleep(1.1)  # event files are named by the second
    logger = MetricLogger(tmp_path, first_step=first_step)
    log_steps(logger, first_step + 1, 9)
    logger.close()
    assert scalars(tmp_path) == {"loss": steps(9), "reward": steps(9, 2.0)}


@pytest.mark.parametrize("cut", range(1, 400, 23))
def test_events_are_whole_wherever_they_break_off(tmp_path, in_order, cut):
    """Guards against a step of which TensorBoard has one name and not the other.

    cut: bytes that are lost at the end of the first file; the second start is killed before it has written anything but
    a part of what was missing.
    """
    logger = MetricLogger(tmp_path)
    log_steps(logger, 1, 5)
    logger.close()
    first = newest(tmp_path)
    first.write_bytes(first.read_bytes()[:-cut])
    MetricLogger(tmp_path, first_step=4).close()
    second = newest(tmp_path)
    assert second != first
    second.write_bytes(second.read_bytes()[: -cut // 2])
    logger = MetricLogger(tmp_path, first_step=4)
    log_steps(logger, 5, 6)
    logger.close()
    assert scalars(tmp_path) == {"loss": steps(6), "reward": steps(6, 2.0)}


def test_whole_events_are_not_written_again(tmp_path, in_order):
    """Guards against texts that are lost, because they are in no other file."""
    logger = MetricLogger(tmp_path)
    for step in range(1, 6):
        log_steps(logger, step, step)
        logger.text(step, "rollouts", "| a |")
        logger.log(step, {"eval/loss": float(step)})
    logger.close()
    logger = MetricLogger(tmp_path, first_step=3)
    assert texts(tmp_path) == [1, 2, 3]
    size = newest(tmp_path).stat().st_size
    log_steps(logger, 4, 6)
    logger.close()
    assert size < 200  # no number of the steps before
    assert scalars(tmp_path) == {"loss": steps(6), "reward": steps(6, 2.0), "eval/loss": steps(3)}


def test_events_without_an_evaluation_get_it(tmp_path, in_order):
    """Guards against a step that counts as whole because its training numbers are there."""
    logger = MetricLogger(tmp_path)
    log_steps(logger, 1, 3)
    logger.flush()
    whole = newest(tmp_path).read_bytes()
    logger.log(3, {"eval/loss": float("nan")})
    logger.close()
    newest(tmp_path).write_bytes(whole)
    MetricLogger(tmp_path, first_step=3).close()
    found = scalars(tmp_path)
    assert found["loss"] == steps(3) and [step for step, _ in found["eval/loss"]] == [3]


def test_lost_events_are_all_written_again(tmp_path):
    logger = MetricLogger(tmp_path)
    logger.log(0, {"eval/loss": 0.5})
    log_steps(logger, 1, 3)
    logger.close()
    shutil.rmtree(tmp_path / "tensorboard")
    MetricLogger(tmp_path, first_step=3).close()
    assert scalars(tmp_path) == {"eval/loss": [(0, 0.5)], "loss": steps(3), "reward": steps(3, 2.0)}


# ----------------------------------------------------------------------------------------------------------------------
# The table


def test_rollout_table_by_hand():
    rows = [{"prefix": "def f(", "rollout": "x", "ground truth": "self", "reward": -0.12345}]
    assert rollout_table(rows).split("\n") == [
        "| prefix | rollout | ground truth | reward |",
        "| --- | --- | --- | --- |",
        "| `def f(` | `x` | `self` | -0.123 |",
    ]
    assert len(rollout_table([]).split("\n")) == 2


@pytest.mark.parametrize("text", ["a|b", "a`b", "a\nb", "a\r\nb", "a\rb", "``|\n|``", "\n\n"])
def test_rollout_table_survives_any_text(text):
    """Each row keeps its four cells.

    A pipe would end a cell, a line end (LF, CR or both) the table, a backtick the code.
    """
    rows = [{"prefix": text, "rollout": text, "ground truth": text, "reward": 1.0}] * 2
    table = rollout_table(rows)
    lines = table.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert len(lines) == 4
    for line in lines[2:]:
        cells = line.split("|")
        assert len(cells) == 6 and cells[0] == cells[5] == "" and cells[4] == " 1.000 "
        assert all(cell.startswith(" `") and cell.endswith("` ") and cell.count("`") == 2 for cell in cells[1:4])
