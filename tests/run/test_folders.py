"""Folders that appear whole or not at all, and an output folder with something else in the place of one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train_strided
from ebft_utils.config.settings import UserError
from ebft_utils.run.folders import recover, remove, writing
from helpers import ROOT, assert_holds, refusal, weights

BASE = dict(train__max_steps=2, train__save_steps=1, train__save_total_limit=3, eval__num_documents=0)

# ----------------------------------------------------------------------------------------------------------------------
# Replacing


def place(target: Path, kind: str) -> None:
    """Something of the kind at the target."""
    other = target.with_name("other")
    other.mkdir()
    (other / "kept.txt").write_text("kept")
    if kind == "folder":
        target.mkdir()
        (target / "old.txt").write_text("old")
    elif kind == "file":
        target.write_text("old")
    elif kind == "link to a folder":
        target.symlink_to(other)
    elif kind == "link to a file":
        target.symlink_to(other / "kept.txt")
    elif kind == "dangling link":
        target.symlink_to("nowhere")


KINDS = ["nothing", "folder", "file", "link to a folder", "link to a file", "dangling link"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_of_any_kind_is_replaced(tmp_path, kind):
    """Guards against leftovers (.final.old), and against what a link leads to being removed with it."""
    target = tmp_path / "final"
    place(target, kind)
    with writing(target) as folder:
        (folder / "new.txt").write_text("new")
    assert not target.is_symlink() and [path.name for path in target.iterdir()] == ["new.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "other"]
    assert (tmp_path / "other" / "kept.txt").read_text() == "kept"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_error_leaves_the_target_as_it_was(tmp_path, monkeypatch, kind, number):
    """Guards against a final model that is lost between its two names.

    number: the renames that work before one fails; 0: the block itself fails.
    """
    target = tmp_path / "final"
    place(target, kind)
    before = os.path.lexists(target), target.is_symlink(), target.is_dir(), target.is_file()
    replace, calls = os.replace, iter(range(1, 10))

    def failing(source, goal):
        if next(calls) == number:
            raise OSError("no room")
        replace(source, goal)

    monkeypatch.setattr(os, "replace", failing)
    if number == 2 and kind == "nothing":
        return  # there is one rename only
    with pytest.raises(OSError, match="no room"), writing(target) as folder:
        (folder / "new.txt").write_text("new")
        if number == 0:
            raise OSError("no room")
    assert (os.path.lexists(target), target.is_symlink(), target.is_dir(), target.is_file()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"other"} | ({"final"} if before[0] else set())


KILLED = """
import os, signal, sys
from pathlib import Path
from ebft_utils.run.folders import writing
replace, number = os.replace, int(sys.argv[2])
def killed(source, goal):
    global number
    number -= 1
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, goal)
os.replace = killed
with writing(Path(sys.argv[1])) as folder:
    (folder / "new.txt").write_text("new")
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_between_the_renames_loses_nothing(tmp_path, number):
    """Guards against the only whole model being removed as a leftover."""
    target = tmp_path / "final"
    place(target, "folder")
    command = [sys.executable, "-c", KILLED, str(target), str(number)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    assert target.exists() == (number == 1)
    recover(target)
    assert (target / "old.txt").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "other"]


def test_remove_does_not_follow_links(tmp_path):
    place(tmp_path / "link", "link to a folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert (tmp_path / "other" / "kept.txt").exists() and not os.path.lexists(tmp_path / "link")


# ----------------------------------------------------------------------------------------------------------------------
# The output folder


@pytest.mark.parametrize("name", ["final", "checkpoint-2"])
@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_file_or_link_in_the_place_of_a_folder_is_refused(train, monkeypatch, tmp_path, name, kind):
    """Guards against an error after hours, when the checkpoint or the final model is written."""
    run = tmp_path / "run"
    run.mkdir()
    place(run / name, kind)
    monkeypatch.setattr(train_strided, "train_step", lambda *arguments: pytest.fail("it trains"))
    for resume in ([], ["train.resume=latest"]):
        message = refusal(train, "run", *resume, **BASE)
        what = "is not a folder" if kind == "file" else "is a symbolic link"
        assert_holds(message, "train.output_dir", run / name, what, "another name")
    assert (run / "other" / "kept.txt").exists() and os.path.lexists(run / name)


def test_other_names_are_nobodys_business(train, tmp_path):
    """Guards against a refusal of notes and links beside the run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-notes").write_text("mine")
    (run / "final-link").symlink_to("final")
    train("run", **BASE)
    assert (run / "checkpoint-notes").read_text() == "mine" and len(weights(run)) > 1


def test_half_written_folders_are_removed_at_the_start(train, tmp_path):
    """Guards against the leftovers of a kill that stay for ever, because no later save comes."""
    run = train("run", **BASE)
    leftovers = [run / ".checkpoint-7.tmp" / "state", run / ".final.tmp"]
    for path in leftovers:
        path.mkdir(parents=True)
        (path / "half").write_bytes(b"half")
    elsewhere = tmp_path / ".checkpoint-7.tmp"  # not this run's
    elsewhere.mkdir()
    (run / "final").rename(run / ".final.old")  # killed between the two renames
    with pytest.raises(UserError, match="already holds a run"):
        train("run", **BASE)
    assert not [path.name for path in run.iterdir() if re.match(r"\.(checkpoint|final)", path.name)]
    assert elsewhere.exists() and len(weights(run)) > 1


def test_half_written_checkpoints_are_removed_at_the_end(train, monkeypatch, tmp_path):
    """Guards against what the last save could not remove (a file that was still open elsewhere)."""
    step_of, run = train_strided.train_step, tmp_path / "run"

    def step_with_leftover(*arguments):
        (run / ".checkpoint-9.tmp").mkdir(exist_ok=True)
        return step_of(*arguments)

    monkeypatch.setattr(train_strided, "train_step", step_with_leftover)
    monkeypatch.setattr(train_strided, "export_final", lambda *arguments: (run / ".checkpoint-8.tmp").mkdir())
    train("run", **BASE)
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]


def test_an_evaluation_removes_nothing(train, tmp_path):
    """Guards against an evaluation that takes the half-written checkpoint of a run at work for a leftover."""
    changes = {**BASE, "eval__num_documents": 2}
    run = train("run", **changes)
    (run / ".checkpoint-3.tmp").mkdir()
    train("run", "train.resume=latest", "eval.only=true", **changes)
    assert (run / ".checkpoint-3.tmp").exists()
