"""What can go wrong with a run that takes days: damaged files, a full disk, a signal, a checkpoint of another run.

Runs are in this process. The one that is killed is a real launch.
"""

import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

import train_strided
from ebft_utils.algorithm import losses
from ebft_utils.config.modes import StridedConfig
from ebft_utils.config.settings import UserError
from ebft_utils.run import checkpoint, distributed, loop
from ebft_utils.run.distributed import Stopped
from helpers import (
    WAIT,
    assert_equal_weights,
    assert_holds,
    config_tree,
    evaluations,
    logged,
    steps_of,
    training,
    wait_for,
    weights,
)

FILES = ["state/.metadata", "state/__0_0.distcp", "run.json", "config.yaml", "SHA256SUMS"]
BASE = dict(train__max_steps=4, train__learning_rate=1e-2, eval__num_documents=0)
BASE |= dict(train__save_steps=1, train__save_total_limit=3)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, model_folder, text_file) -> Path:
    """A run of 4 steps with checkpoint-2, -3 and -4 and the final model."""
    folder = tmp_path_factory.mktemp("unbroken")
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config_tree(model_folder, text_file, folder / "run", **BASE)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        AcceleratorState._reset_state(True)
        train_strided.main(["--cfg", str(file)])
    return folder / "run"


@pytest.fixture
def broken(unbroken, tmp_path) -> Path:
    """The same as it was after step 3, at tmp_path/run."""
    folder = Path(shutil.copytree(unbroken, tmp_path / "run"))
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-4")
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": content[:middle], "flipped": flipped}[damage])


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint(train, broken, unbroken, capsys, name, damage):
    """Guards against going on from half a checkpoint, and against a dead end while the one before it is whole."""
    spoil(broken / "checkpoint-3" / name, damage)
    with pytest.raises(UserError) as caught:
        train("run", f"train.resume={broken / 'checkpoint-3'}", **BASE)
    half_written = (name, damage) == ("SHA256SUMS", "missing")
    fault = "not a checkpoint folder" if half_written else "damaged"
    assert_holds(str(caught.value), "train.resume", broken / "checkpoint-3", fault)
    capsys.readouterr()
    train("run", "train.resume=latest", **BASE)
    said = capsys.readouterr().out
    assert f"going on from {broken / 'checkpoint-2'}, step 2" in said
    if not half_written:
        passed_over = f"{broken / 'checkpoint-3'} is damaged ("
        assert passed_over in said
        assert name in said.partition(passed_over)[2].partition(")")[0] or name == "SHA256SUMS"
    assert_equal_weights(broken, unbroken)
    assert training(broken) == training(unbroken)
    assert sorted(path.name for path in broken.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_file_that_no_sum_covers(train, broken, unbroken, capsys):
    """Guards against trusting a file whose line in SHA256SUMS is lost (by a copy that was cut at the end of a line)."""
    sums = broken / "checkpoint-3" / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if ".distcp" not in line))
    spoil(broken / "checkpoint-3" / "state" / "__0_0.distcp", "flipped")
    train("run", "train.resume=latest", **BASE)
    assert f"{broken / 'checkpoint-3'} is damaged (" in capsys.readouterr().out
    assert_equal_weights(broken, unbroken)


def test_all_checkpoints_damaged(train, broken, capsys):
    """Guards against a new start where nothing whole is left, and a message that does not say what was tried."""
    spoil(broken / "checkpoint-2" / "state" / "__0_0.distcp", "flipped")
    spoil(broken / "checkpoint-3" / "run.json", "missing")
    before = (broken / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        train("run", "train.resume=latest", **BASE)
    assert_holds(str(caught.value), "train.resume", "latest", broken, "no whole checkpoint")
    said = capsys.readouterr().out
    assert f"{broken / 'checkpoint-2'} is damaged (state/__0_0.distcp" in said
    assert f"{broken / 'checkpoint-3'} is damaged (run.json" in said
    assert (broken / "metrics.jsonl").read_bytes() == before


def test_higher_number_without_sums(train, broken, unbroken, capsys):
    """Guards against `latest` taking the highest number instead of the highest whole checkpoint.

    A half-written one must not count for save_total_limit either.
    """
    (broken / "checkpoint-9" / "state").mkdir(parents=True)
    (broken / "checkpoint-9" / "run.json").write_text("{}")
    train("run", "train.resume=latest", **BASE)
    assert f"going on from {broken / 'checkpoint-3'}, step 3" in capsys.readouterr().out
    assert_equal_weights(broken, unbroken)


def test_sums_are_those_of_sha256sum(unbroken):
    """Guards against a format that only this program reads, and against files that no sum covers."""
    folder = unbroken / "checkpoint-4"
    result = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    listed = {line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"SHA256SUMS"}


class Killed(BaseException):
    """As if the process ended here."""


def half_a_state(state, folder: Path, no_dist: bool) -> None:
    (folder / "__0_0.distcp").parent.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"half")
    raise Killed


def killed(*arguments, **options) -> None:
    raise Killed


def killed_in_rotation(path: Path, remove=shutil.rmtree, **options) -> None:
    if path.name == ".checkpoint-1.tmp" and path.exists():
        (path / "run.json").unlink()
        raise Killed
    remove(path, **options)


KILLED_IN = {
    "state": (checkpoint, "_write_state", half_a_state),
    "run.json": (json, "dumps", killed),
    "config.yaml": (StridedConfig, "to_yaml", killed),
    "sums": (checkpoint, "sha256_of", killed),
    "rename": (os, "replace", killed),
    "rotation": (shutil, "rmtree", killed_in_rotation),
}


def at_start_only(remove=checkpoint._remove_leftovers):
    """A process that was killed cleans up nothing at its end."""
    calls = iter([remove])
    return lambda folder: next(calls, lambda folder: None)(folder)


@pytest.mark.parametrize("module, name, killed", KILLED_IN.values(), ids=KILLED_IN)
def test_killed_while_saving(train, unbroken, monkeypatch, tmp_path, module, name, killed):
    """Guards against a save that removes the old checkpoint before the new one is whole.

    Leftovers must be removed.
    """
    save, run, changes = loop.save_checkpoint, tmp_path / "run", {**BASE, "train__save_total_limit": 2}

    def save_and_die(config, accelerator, policy, optimizer, state, **options):
        with monkeypatch.context() as patch:
            if state.step == 3:
                patch.setattr(module, name, killed)
            return save(config, accelerator, policy, optimizer, state, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "save_checkpoint", save_and_die)
        patch.setattr(checkpoint, "_remove_leftovers", at_start_only())
        train("run", **changes)
    published = name == "rmtree"
    whole = ["checkpoint-2", "checkpoint-3"] if published else ["checkpoint-1", "checkpoint-2"]
    assert [path.name for path in checkpoint.list_checkpoints(run)] == whole
    assert (run / f".checkpoint-{1 if published else 3}.tmp").exists()
    train("run", "train.resume=latest", **changes)
    assert_equal_weights(run, unbroken)
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-4"]


# ----------------------------------------------------------------------------------------------------------------------
# Full disk: a limit on the size of a file, which gives the same kind of error at the same places


@pytest.fixture
def full_disk():
    """full_disk(BYTES): from then on no file can grow beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100_000, 1_000])
def test_disk_full_while_saving(train, unbroken, monkeypatch, full_disk, tmp_path, size):
    """Guards against a traceback out of the serialisation, and a half-written checkpoint that is left.

    No checkpoint may be removed to make room either.
    """
    save = loop.save_checkpoint

    def save_on_full_disk(config, accelerator, policy, optimizer, run, **options):
        full_disk(size if run.step == 3 else -1)
        try:
            return save(config, accelerator, policy, optimizer, run, **options)
        finally:
            full_disk(-1)

    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(loop, "save_checkpoint", save_on_full_disk)
        train("run", **BASE)
    words = ("could not be written", "checkpoint-2 is whole", "train.resume=latest")
    assert_holds(str(caught.value), tmp_path / "run" / "checkpoint-3", *words)
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    train("run", "train.resume=latest", **BASE)
    assert_equal_weights(tmp_path / "run", unbroken)


@pytest.mark.parametrize("mode", [{}, {"lora": {"r": 4}}], ids=["full", "LoRA"])
@pytest.mark.parametrize("size", [10_000, 20])
def test_disk_full_while_exporting(train, monkeypatch, full_disk, tmp_path, mode, size):
    """Guards against a traceback at the very end of a run, and a half-written final model."""
    export = train_strided.export_final

    def export_on_full_disk(*arguments):
        full_disk(size)
        try:
            return export(*arguments)
        finally:
            full_disk(-1)

    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(train_strided, "export_final", export_on_full_disk)
        train("run", **BASE, **mode)
    assert_holds(str(caught.value), tmp_path / "run" / "final", "could not be written", "train.resume=latest")
    assert not [path.name for path in (tmp_path / "run").iterdir() if "final" in path.name]
    train("run", "train.resume=latest", **BASE, **mode)
    assert len(weights(tmp_path / "run")) > 1


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints of something else, and the output folder


@pytest.mark.parametrize(
    "there, here",
    [({"r": 4}, {"r": 8}), ({"r": 4}, None), (None, {"r": 4})],
    ids=["other rank", "full from LoRA", "LoRA from full"],
)
def test_other_adapter(train, tmp_path, there, here):
    """Guards against fresh weights because nothing in the checkpoint fits, also in eval.only.

    The adapter has another rank, or the run is full fine-tuning.
    """
    train("run", **{**BASE, "train__max_steps": 1}, **({"lora": there} if there else {}))
    changes = {**BASE, **({"lora": here} if here else {})}
    for override, num_documents in (("eval.only=false", 0), ("eval.only=true", 2)):
        with pytest.raises(UserError) as caught:
            train("run", "train.resume=latest", override, **{**changes, "eval__num_documents": num_documents})
        change = f"lora.r is {(here or {}).get('r')} and was {(there or {}).get('r')}"
        assert_holds(str(caught.value), "train.resume", tmp_path / "run" / "checkpoint-1", "other settings", change)


def test_not_a_checkpoint(train, broken, model_folder, text_file, tmp_path):
    """Guards against a traceback for the path of something else."""
    for path in (model_folder, text_file, tmp_path / "none", broken, broken / "checkpoint-3" / "state"):
        with pytest.raises(UserError) as caught:
            train("run", f"train.resume={path}", **BASE)
        assert_holds(str(caught.value), "train.resume", path, "not a checkpoint folder", "SHA256SUMS")


def test_data_changed_in_between(train, broken, text_file, tmp_path):
    """Guards against an order of the data that is not the one the run began with."""
    path, lines = tmp_path / "documents.jsonl", text_file.read_text().splitlines(keepends=True)
    path.write_text("".join(lines))
    a_row_each = dict(data__dataset=str(path), data__long_documents="cut")
    train("other", **a_row_each, **{**BASE, "train__max_steps": 1})
    for changed in (lines[:-1], [line.replace("License", "Licence") for line in lines]):
        path.write_text("".join(changed))
        with pytest.raises(UserError) as caught:
            train("other", "train.resume=latest", **a_row_each, **BASE)
        sizes = (f"{len(changed)} rows", f"it was {len(lines)} rows")
        assert_holds(str(caught.value), "train.resume", path, "has changed", *sizes)


def test_a_checkpoint_of_another_run_does_not_replace_this_one(train, broken, tmp_path):
    """Guards against a slip of the path that removes a run's own checkpoints and final model, and mixes two logs."""
    other = train("other", **{**BASE, "train__max_steps": 2})
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError) as caught:
        train("other", f"train.resume={broken / 'checkpoint-3'}", **BASE)
    assert_holds(str(caught.value), "train.output_dir", other, "already holds another run", "final")
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file() and path.name != ".lock"} == before
    moved = train("moved", f"train.resume={broken / 'checkpoint-3'}", **BASE)
    assert steps_of(moved) == [4] and (broken / "checkpoint-3").is_dir()


def test_evaluation_of_a_checkpoint_with_another_adapter(train, tmp_path, capsys):
    """Guards against numbers of a model that was never trained."""
    changes, again = {**BASE, "eval__num_documents": 3}, ("train.resume=latest", "eval.only=true")
    train("run", "train.max_steps=2", lora={"r": 4, "alpha": 8.0}, **changes)
    with pytest.raises(UserError) as caught:
        train("run", *again, lora={"r": 4, "alpha": 800.0}, **changes)
    assert_holds(str(caught.value), "train.resume", "lora.alpha is 800.0 and was 8.0")
    capsys.readouterr()
    train("run", *again, "ebft.temperature=0.9", lora={"r": 4, "alpha": 8.0}, **changes)
    assert "ebft.temperature is 0.9 and was 0.6" in capsys.readouterr().out


def test_a_run_that_diverges_keeps_its_earlier_checkpoints(train, monkeypatch, tmp_path):
    """Guards against weights that are already bad in the place of the last good ones."""
    step_of, steps = train_strided.train_step, iter(range(3))

    def diverge(*arguments):
        sums, loss, groups = step_of(*arguments)
        return sums, loss if next(steps, None) is not None else math.nan, groups

    monkeypatch.setattr(train_strided, "train_step", diverge)
    with pytest.raises(UserError) as caught:
        train("run", "train.save_steps=2", "train.save_total_limit=1", **BASE)
    assert_holds(str(caught.value), "step 4", "not finite", "checkpoint-3, beside earlier ones")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_changed_settings_are_told(train, broken, capsys):
    """Guards against a resumed run that quietly is not quite the one that was begun."""
    overrides = ("train.max_steps=5", "train.logging_steps=2", "train.per_device_batch_size=1")
    train("run", "train.resume=latest", *overrides, **BASE)
    said = capsys.readouterr().out.partition("going on from")[2]
    assert f"{broken / 'checkpoint-3'}, step 3" in said
    for words in (
        "train.max_steps is 5 and was 4",
        "train.logging_steps is 2 and was 1",
        "train.per_device_batch_size is 1 and was 2",
    ):
        assert said.count(words) == 1
    assert "train.save_steps" not in said and "train.resume is" not in said


def test_two_runs_in_one_folder(train, start, write_config, tmp_path):
    """Guards against two runs that overwrite each other's checkpoints, and a lock that outlives a killed run."""
    run = tmp_path / "first"
    changes = BASE | dict(train__max_steps=100_000, eval__num_documents=2, eval__at_start=False)
    changes |= dict(train__save_steps=2, train__save_total_limit=2)
    first = start(None, write_config(**changes), f"train.output_dir={run}")
    wait_for(first, lambda: len(checkpoint.list_checkpoints(run)) == 2)
    for override in ([], ["train.resume=latest"]):
        with pytest.raises(UserError) as caught:
            train("first", *override, **changes)
        owner = f"process {socket.gethostname()} {first.pid}"
        assert_holds(str(caught.value), "train.output_dir", "another run", run, owner)
    train("first", "eval.only=true", **changes)
    assert json.loads((run / "eval-step-0.json").read_text())["step"] == 0
    assert first.poll() is None
    first.kill()
    first.wait(WAIT)
    done = int(checkpoint.list_checkpoints(run)[-1].name.partition("-")[2])
    train("first", "train.resume=latest", f"train.max_steps={done + 1}", **changes)
    assert logged(run)[-1]["step"] == done + 1 and (run / "final").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Signals to one process


def signal_at(monkeypatch, call: int, *numbers: int) -> None:
    """Sends the signals to this process in the given call of the loss (which is the step)."""
    loss, calls = losses.policy_gradient_loss, iter(range(1, 1000))

    def loss_with_signal(*arguments):
        if next(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return loss(*arguments)

    monkeypatch.setattr(losses, "policy_gradient_loss", loss_with_signal)


@pytest.mark.parametrize("number", distributed.STOP_SIGNALS)
def test_signal_to_a_single_process(command, train, unbroken, monkeypatch, write_config, tmp_path, number):
    """Guards against a signal that loses the step it comes in, and an exit code that a scheduler takes for success."""
    changes, said, write = {**BASE, "train__save_steps": 0}, [], os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: said.append(data) if file == 2 else write(file, data))
        signal_at(patch, 2, number, *([number] if number != signal.SIGINT else []))  # clusters send theirs twice
        code, stderr = command("--cfg", write_config(**changes))
    assert f"{signal.Signals(number).name}: finishing this step, then saving".encode() in said[0]
    assert code == 128 + number and f"stopped by {signal.Signals(number).name}; train.resume=latest" in stderr
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-2"]
    train("run", "train.resume=latest", **changes)
    assert_equal_weights(tmp_path / "run", unbroken)
    assert training(tmp_path / "run") == training(unbroken)


def test_second_interrupt_ends_at_once(command, monkeypatch, write_config, tmp_path):
    """Guards against a run that cannot be ended while a step hangs, and against a save of a step that was cut off."""
    signal_at(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    code, stderr = command("--cfg", write_config(**{**BASE, "train__save_steps": 0}))
    assert code == 1 and "Traceback" not in stderr and "interrupted; train.resume=latest" in stderr
    assert not list((tmp_path / "run").glob("*checkpoint*")) and steps_of(tmp_path / "run") == [1]


@pytest.mark.parametrize(
    "when, saved",
    [(1, []), (2, ["checkpoint-2"]), (3, ["checkpoint-4"])],
    ids=["before training", "in between", "at the end"],
)
def test_signal_during_an_evaluation(train, monkeypatch, tmp_path, when, saved):
    """Guards against an hour's evaluation that is finished first, and half an evaluation that is logged.

    After resuming, the final model must be evaluated.
    """
    changes = BASE | dict(eval__num_documents=4, eval__per_device_batch_size=1, eval__every_steps=2)
    changes["train__save_steps"] = 0
    whole = train("whole", **changes)
    sample, keys = train_strided.sample_and_score, []

    def sample_with_signal(config, accelerator, policy, network, batch, seed):
        keys.append(policy.training)
        if keys.count(False) == 4 * (when - 1) + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(config, accelerator, policy, network, batch, seed)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="SIGTERM"):
        patch.setattr(train_strided, "sample_and_score", sample_with_signal)
        train("run", **changes)
    assert keys.count(False) == 4 * (when - 1) + 2  # no further document
    run = tmp_path / "run"
    assert [path.name for path in run.glob("*checkpoint*")] == saved
    assert not run.joinpath("metrics.jsonl").exists() or evaluations(run) == evaluations(whole)[: when - 1]
    train("run", *(["train.resume=latest"] if saved else []), **changes)
    assert_equal_weights(run, whole)
    assert evaluations(run)[-1] == evaluations(whole)[-1]
