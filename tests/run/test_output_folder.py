"""What stands in an output folder before a run, and what a killed run left there."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ebft_utils.config.settings import UserError
from ebft_utils.run.folders import writing
from helpers import assert_equal_weights, logged

CHANGES = dict(train__max_steps=3, train__save_steps=1, train__save_total_limit=3)


def test_half_a_checkpoint_of_a_killed_run_is_removed(train, tmp_path):
    """Also when no later save of the same step comes."""
    leftover = tmp_path / "run" / ".checkpoint-7.tmp"
    (leftover / "state").mkdir(parents=True)
    train("run", **CHANGES)
    assert not leftover.exists() and (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize("name", ["final", "checkpoint-2"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_no_folder_in_the_place_of_one_is_said_before_training(train, tmp_path, name, kind):
    """Guards against hours of training that end at the first save."""
    run, other = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    other.mkdir()
    (run / name).write_text("mine") if kind == "file" else (run / name).symlink_to(other)
    with pytest.raises(UserError, match=f"{name} is {'not a folder' if kind == 'file' else 'a symbolic link'}"):
        train("run", **CHANGES)
    assert not (run / "metrics.jsonl").exists() and ((run / name).is_file() or (run / name).is_symlink())


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_writing_replaces_whatever_stands_there(tmp_path, kind):
    target, other = tmp_path / "final", tmp_path / "elsewhere"
    other.mkdir()
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("old")
    else:
        target.symlink_to(other)
    with writing(target) as folder:
        (folder / "new").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"final", "elsewhere"}
    assert (target / "new").is_file() and not target.is_symlink()


def test_an_error_while_writing_leaves_the_old_one(tmp_path):
    target = tmp_path / "final"
    target.write_text("old")
    with pytest.raises(ValueError), writing(target):
        raise ValueError
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("lost", [0.3, 0.6, 1.0])
def test_events_that_a_kill_lost_are_written_again(train, tmp_path, lost):
    """A resumed run has each step once in TensorBoard, as in metrics.jsonl, however much of the events is missing."""
    run = train("run", "train.max_steps=6", train__save_steps=1, train__save_total_limit=6)
    whole = train("whole", "train.max_steps=8", train__save_steps=1)
    (events,) = (run / "tensorboard").glob("*tfevents*")
    content = events.read_bytes()
    events.write_bytes(content[: int(len(content) * (1 - lost))])
    (run / "config.yaml").unlink(missing_ok=True)
    train("run", "train.resume=latest", "train.max_steps=8", train__save_steps=1)
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    for name in ("train/loss", "ebft/mean_reward"):
        found = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert found == [(entry["step"], pytest.approx(entry[name])) for entry in logged(run)]
        assert [step for step, _ in found] == [*range(1, 9)]
    assert_equal_weights(run, whole)
