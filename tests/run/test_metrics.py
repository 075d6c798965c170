"""Metric sums, standard errors, the metrics file and the rollout table."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from ebft_utils.run.metrics import MetricLogger, MetricSums, mean_with_error, rollout_table, step_metrics

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
