"""Metric sums, standard errors, the metrics file and the rollout table."""

import html
import json
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, register_tracker_class
from accelerate.utils import ProjectConfiguration
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.util.tensor_util import make_ndarray

from ebft_utils.run.metrics import (
    MetricLogger,
    MetricSums,
    SampleGroup,
    logged_entries,
    mean_with_error,
    samples_text,
    start_trackers,
    step_metrics,
)
from helpers import ROOT, forget_accelerator

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

    entries = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "time"} for entry in entries]


def test_lines_are_on_disk_at_once(tmp_path):
    logger = MetricLogger(tmp_path)
    logger.log(1, {"loss": 0.5, "reward": -1.25})
    assert read_lines(tmp_path) == [{"step": 1, "loss": 0.5, "reward": -1.25}]
    logger.log(2, {"loss": 0.25})
    assert read_lines(tmp_path)[1] == {"step": 2, "loss": 0.25}
    logger.close()


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
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


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
# Trackers


def started(folder, first_step=None, trackers=("tensorboard",)) -> MetricLogger:
    """A logger with trackers, as a run has it."""
    forget_accelerator()
    logs = ProjectConfiguration(logging_dir=str(folder / "tensorboard"))
    accelerator = Accelerator(cpu=True, log_with=list(trackers), project_config=logs)
    config = SimpleNamespace(to_yaml=lambda: "train:\n  seed: 3\n", to_dict=lambda: {"train": {"seed": 3, "of": [1]}})
    return MetricLogger(folder, first_step, start_trackers(config, accelerator, folder, first_step))


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: name -> (step, value) in its order."""
    return {
        name: [(event.step, make_ndarray(event.tensor_proto).item()) for event in events]
        for name, events in shown(folder, "scalars")
    }


def texts(folder) -> dict[str, list[tuple[int, str]]]:
    return {
        name: [(event.step, make_ndarray(event.tensor_proto).item().decode()) for event in events]
        for name, events in shown(folder, "text")
    }


def shown(folder, plugin: str) -> list[tuple[str, list]]:
    """The events of each name. They are all tensors to TensorBoard, which keeps them by plugin."""
    events = EventAccumulator(str(folder / "tensorboard" / "ebft"), size_guidance={"tensors": 0}).Reload()
    known = plugin in events.ActivePlugins()
    return [(name, events.Tensors(name)) for name in events.PluginTagToContent(plugin)] if known else []


def steps(last: int, loss: float = 1.0) -> list[tuple[int, float]]:
    return [(step, loss * step) for step in range(1, last + 1)]


def log_steps(logger: MetricLogger, first: int, last: int) -> None:
    for step in range(first, last + 1):
        logger.log(step, {"loss": float(step), "reward": 2.0 * step})


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/run"); sys.path.insert(0, "tests")
from test_metrics import log_steps, started
log_steps(started(Path(sys.argv[1])), 1, 7)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("first_step", [7, 5, 0])
def test_a_killed_run_lacks_no_event_once_it_is_resumed(tmp_path, first_step):
    """Guards against a hole in the curves of a run that was killed with kill -9, and steps that are there twice."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    assert scalars(tmp_path)["loss"] == steps(7)
    time.sleep(1.1)  # event files are named by the second
    log_steps(started(tmp_path, first_step), first_step + 1, 9)
    assert scalars(tmp_path) == {"loss": steps(9), "reward": steps(9, 2.0)}


def test_a_new_run_begins_with_empty_curves_and_its_configuration(tmp_path):
    log_steps(started(tmp_path), 1, 5)
    logger = started(tmp_path)
    log_steps(logger, 1, 2)
    logger.samples(2, [SampleGroup("a", "b", [(1.0, "c")])])
    assert scalars(tmp_path) == {"loss": steps(2), "reward": steps(2, 2.0)}
    found = {name.partition("/")[0]: values for name, values in texts(tmp_path).items()}
    assert found["configuration"] == [(0, "~~~yaml\ntrain:\n  seed: 3\n~~~")]
    assert found["rollouts"] == [(2, samples_text([SampleGroup("a", "b", [(1.0, "c")])]))]


def test_people_see_values_and_the_file_has_their_errors_too(tmp_path):
    values = {"eval/loss": 1.0, "eval/loss_se": 0.1, "eval/loss_change": -1.0, "eval/loss_change_se": 0.2}
    started(tmp_path).log(3, values)
    assert scalars(tmp_path) == {"eval/loss": [(3, 1.0)]}
    (line,) = read_lines(tmp_path)
    assert {name: line[name] for name in values} == values


class Remembering(GeneralTracker):
    """A tracker of somebody else's package."""

    name, requires_logging_directory, calls = "remembering", False, []

    def __init__(self, run_name, **how):
        super().__init__()
        self.calls.append((run_name, how))

    tracker = None

    def store_init_configuration(self, values):
        self.calls.append(values)

    def log(self, values, step=None, **how):
        self.calls.append((step, values))


def test_another_tracker_gets_settings_and_steps(tmp_path):
    register_tracker_class(Remembering)
    log_steps(started(tmp_path, trackers=["remembering"]), 1, 1)
    assert Remembering.calls == [("ebft", {}), {"train.seed": 3, "train.of": "[1]"}, (1, {"loss": 1.0, "reward": 2.0})]
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_keeps_its_name_for_a_tracker(tmp_path):
    """Guards against a second run in wandb, and against a new run that takes over an old one."""
    started(tmp_path)
    first = (tmp_path / "run_id").read_text()
    started(tmp_path, first_step=2)
    assert (tmp_path / "run_id").read_text() == first
    started(tmp_path)
    assert (tmp_path / "run_id").read_text() != first


# ----------------------------------------------------------------------------------------------------------------------
# Sample rollouts


def test_samples_by_hand():
    """The rewards first; prefix, truth, best and worst as they were written."""
    group = SampleGroup("def f(x):\n    ", "return x", [(0.25, "pass"), (-0.12345, "x = 1\n    y"), (1.5, "return 1")])
    text = samples_text([group, SampleGroup("a ~~~~ b", "", [(1.0, "c")])])
    bars = {name: f"{f'── {name} ':─<60}" for name in ("prefix", "truth", "reward 1.500", "reward -0.123, the worst")}
    assert text.splitlines()[:12] == [
        "**reward 1.500 to -0.123**, mean 0.542, 3 rollouts",
        "",
        "~~~",
        bars["prefix"],
        "def f(x):",
        "    ",
        bars["truth"],
        "return x",
        bars["reward 1.500"],
        "return 1",
        bars["reward -0.123, the worst"],
        "x = 1",
    ]
    assert text.splitlines()[-1] == "~" * 7


@pytest.mark.parametrize("text", ["a|b", "a`b", "a\n    b", "a\r\nb", "~~~\n# x", "<b>&amp;</b>", "*x* _y_", "\n\n"])
def test_tensorboard_shows_any_text_as_it_is(text):
    """Guards against text that ends its block, is taken for markup, or loses its indentation."""
    page = markdown_to_safe_html(samples_text([SampleGroup("P", text, [(1.0, "R")])] * 2))
    blocks = re.findall("<pre><code>(.*?)</code></pre>", page, flags=re.DOTALL)
    assert len(blocks) == 2 and page.count("<strong>") == 2
    for block in blocks:
        truth = html.unescape(block).partition(" truth ")[2].partition("\n")[2].partition("── reward")[0]
        assert truth.split() == text.split() and ("    b" in truth) == ("    b" in text)
