"""Checkpoints that are damaged or somebody else's, with checksums that fit: refused with a reason, never executed."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import train_strided
from ebft_utils.config.settings import UserError
from ebft_utils.run.integrity import Damaged, StateReader, damage_of, places_fit, sha256_of
from helpers import assert_equal_weights, assert_holds, config_tree, saved_tensors

CHANGES = dict(train__max_steps=3, train__save_steps=1, train__save_total_limit=4, eval__num_documents=2)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, model_folder, text_file) -> Path:
    """A run of 3 steps with all its checkpoints, and an evaluation before training."""
    folder = tmp_path_factory.mktemp("unbroken")
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config_tree(model_folder, text_file, folder / "run", **CHANGES)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        AcceleratorState._reset_state(True)
        train_strided.main(["--cfg", str(file)])
    return folder / "run"


@pytest.fixture
def broken(unbroken, tmp_path) -> Path:
    """The same as it was after step 2, at tmp_path/run."""
    folder = Path(shutil.copytree(unbroken, tmp_path / "run"))
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-3")
    return folder


@pytest.fixture
def damage():
    """damage(FOLDER): the reason, None for a whole checkpoint."""
    accelerator = Accelerator(cpu=True)
    return lambda checkpoint: damage_of(checkpoint, accelerator)


def sign(checkpoint: Path) -> None:
    """Makes the checksums of a changed checkpoint fit again, as whoever passes it on can."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    sums = "".join(f"{sha256_of(path)}  {path.relative_to(checkpoint)}\n" for path in files)
    (checkpoint / "SHA256SUMS").write_text(sums)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is executed


class Runs:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def real_metadata(checkpoint: Path):
    return pickle.loads((checkpoint / "state" / ".metadata").read_bytes())


def evil_metadata(kind: str, checkpoint: Path, command: str) -> bytes:
    metadata = real_metadata(checkpoint)
    if kind == "beside the tensors":
        metadata.planner_data["more"] = Runs(command)
    elif kind == "as a tensor":
        metadata.state_dict_metadata["model.more"] = Runs(command)
    elif kind == "as a path":
        metadata.storage_meta.checkpoint_id = Runs(command)
    elif kind == "after the metadata":  # a later part of the same pickle: read, executed and thrown away
        return pickle.dumps(metadata)[:-1] + b"0" + pickle.dumps(Runs(command))[2:]
    elif kind == "a name in a module that belongs there":
        module, name = b"torch.distributed.checkpoint.filesystem", b"os.system"
        texts = [b"\x8c" + bytes([len(text)]) + text for text in (module, name, command.encode())]
        return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."
    else:
        return pickle.dumps(Runs(command))
    return pickle.dumps(metadata)


KINDS = ["alone", "beside the tensors", "as a tensor", "as a path", "after the metadata"]
KINDS.append("a name in a module that belongs there")


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_in_the_metadata_is_not_run(broken, damage, tmp_path, kind):
    """Guards against a checkpoint from somebody else that runs code where it is resumed."""
    checkpoint, sign_of_life = broken / "checkpoint-2", tmp_path / "was-here"
    content = evil_metadata(kind, checkpoint, f"touch {sign_of_life}")
    pickle.loads(content)  # guards the test itself: torch reads the file like this
    assert sign_of_life.exists()
    sign_of_life.unlink()
    (checkpoint / "state" / ".metadata").write_bytes(content)
    sign(checkpoint)
    reason = damage(checkpoint)
    assert "state/.metadata" in reason and "system" in reason
    with pytest.raises(Damaged):
        StateReader(checkpoint / "state").read_metadata()
    assert not sign_of_life.exists()


def test_a_command_in_the_metadata_stops_no_run(train, broken, unbroken, capsys, tmp_path):
    """The same for the whole program: `latest` passes over it, and the named one is refused."""
    checkpoint, sign_of_life = broken / "checkpoint-2", tmp_path / "was-here"
    (checkpoint / "state" / ".metadata").write_bytes(pickle.dumps(Runs(f"touch {sign_of_life}")))
    sign(checkpoint)
    with pytest.raises(UserError) as caught:
        train("run", f"train.resume={checkpoint}", **CHANGES)
    assert_holds(str(caught.value), "train.resume", checkpoint, "damaged", "no part of a checkpoint of this program")
    train("run", "train.resume=latest", **CHANGES)
    said = capsys.readouterr().out
    assert f"{checkpoint} is damaged (state/.metadata" in said and "checkpoint-1, step 1" in said
    assert not sign_of_life.exists()
    assert_equal_weights(broken, unbroken)


@pytest.mark.parametrize("name", ["model.more", "a tensor's"])
def test_a_command_in_an_entry_of_bytes_is_not_run(train, broken, damage, tmp_path, name):
    """Guards against what torch unpickles without a question: an entry that is no tensor."""
    checkpoint, sign_of_life = broken / "checkpoint-2", tmp_path / "was-here"
    tensors = saved_tensors(checkpoint)
    name = next(iter(tensors)) if name == "a tensor's" else name
    shutil.rmtree(checkpoint / "state")
    command = Runs(f"touch {sign_of_life}")
    dcp.save({**tensors, name: command}, checkpoint_id=checkpoint / "state", no_dist=True)
    dcp.load({name: None}, checkpoint_id=checkpoint / "state", no_dist=True)  # guards the test itself
    assert sign_of_life.exists()
    sign_of_life.unlink()
    sign(checkpoint)
    assert "state/.metadata" in damage(checkpoint) and "BytesStorageMetadata" in damage(checkpoint)
    with pytest.raises(UserError, match="BytesStorageMetadata"):
        train("run", f"train.resume={checkpoint}", **CHANGES)
    assert not sign_of_life.exists()


def test_a_command_in_a_tensor_is_not_run(train, broken, tmp_path):
    """Guards against tensors that are read as any other pickle."""
    checkpoint, sign_of_life = broken / "checkpoint-2", tmp_path / "was-here"
    metadata, file = real_metadata(checkpoint), checkpoint / "state" / "__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(Runs(f"touch {sign_of_life}"), buffer)
    content, place = file.read_bytes(), next(iter(metadata.storage_data.values()))
    place.offset, place.length = len(content), len(buffer.getvalue())
    file.write_bytes(content + buffer.getvalue())
    (checkpoint / "state" / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(checkpoint)
    with pytest.raises(UserError) as caught:
        train("run", f"train.resume={checkpoint}", **CHANGES)
    assert_holds(str(caught.value), "train.resume", checkpoint, "damaged", "tensors cannot be read")
    assert not sign_of_life.exists()


def test_a_pickle_cannot_change_a_class(broken):
    """Guards against a state that is set on a class instead of an object: every path would be another one."""
    checkpoint = broken / "checkpoint-2"
    state = b"N}X\x05\x00\x00\x00titleX\x04\x00\x00\x00evils\x86b."
    (checkpoint / "state" / ".metadata").write_bytes(b"\x80\x02cpathlib\nPosixPath\n" + state)
    with pytest.raises(Damaged):
        StateReader(checkpoint / "state").read_metadata()
    assert not hasattr(Path, "title") and not hasattr(type(checkpoint), "title")
    (checkpoint / "state" / ".metadata").write_bytes(
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n" + state
    )
    with pytest.raises(Damaged):
        StateReader(checkpoint / "state").read_metadata()
    assert not hasattr(dcp.Metadata, "title")


def test_real_metadata_is_read_as_torch_reads_it(unbroken):
    checkpoint = unbroken / "checkpoint-3"
    ours, torchs = StateReader(checkpoint / "state").read_metadata(), real_metadata(checkpoint)
    assert ours.storage_data == torchs.storage_data and len(ours.storage_data) > 10
    assert ours.state_dict_metadata.keys() == torchs.state_dict_metadata.keys()
    for name, entry in torchs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[name]
        assert (mine.size, mine.chunks, mine.properties.dtype) == (entry.size, entry.chunks, entry.properties.dtype)


def other_metadata(metadata, change: str) -> None:
    index, place = next(iter(metadata.storage_data.items()))
    entry = metadata.state_dict_metadata[index.fqn]
    if change == "outside":
        place.relative_path = "../../other"
    elif change == "missing file":
        place.relative_path = "__7_0.distcp"
    elif change == "too long":
        place.length += 10**9
    elif change == "negative":
        place.offset = -1
    elif change == "lost part":
        del metadata.storage_data[index]
    elif change == "lost chunk":
        entry.chunks = []
    elif change == "text for a size":
        entry.size = "large"
    elif change == "no tensors":
        metadata.state_dict_metadata = None


CHANGED = [
    "outside",
    "missing file",
    "too long",
    "negative",
    "lost part",
    "lost chunk",
    "text for a size",
    "no tensors",
]


@pytest.mark.parametrize("change", CHANGED)
def test_metadata_that_does_not_fit_its_files(broken, damage, change):
    """Guards against a traceback out of torch, and a file that is read outside of the checkpoint."""
    checkpoint = broken / "checkpoint-2"
    metadata = real_metadata(checkpoint)
    other_metadata(metadata, change)
    (checkpoint / "state" / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(checkpoint)
    assert "state/" in damage(checkpoint)


def test_metadata_of_any_bytes(broken, damage):
    """Guards against whatever exception a broken pickle ends in."""
    checkpoint = broken / "checkpoint-2"
    file = checkpoint / "state" / ".metadata"
    content = file.read_bytes()
    middle = len(content) // 2
    for wrong in (b"", b"\x80", content[:middle], content[:-1], b"\xff" * 50, content[middle:], pickle.dumps([1])):
        file.write_bytes(wrong)
        sign(checkpoint)
        assert "state/.metadata" in damage(checkpoint)


# ----------------------------------------------------------------------------------------------------------------------
# run.json and config.yaml


def changed(**values):
    return lambda run: json.dumps({**run, **values})


RUNS = {
    "a list": (lambda run: "[1, 2]", "holds a list"),
    "no JSON": (lambda run: "{step: 2}", "not JSON"),
    "no UTF-8": (lambda run: b"\xff\xfe{", "not JSON"),
    "empty": (lambda run: "", "not JSON"),
    "deep": (lambda run: "[" * 100_000, "not JSON"),
    "missing key": (lambda run: json.dumps({key: run[key] for key in run if key != "data"}), "lacks 'data'"),
    "key of a later version": (changed(seed=1), "has 'seed', which this version does not know"),
    "negative step": (changed(step=-2), "step is -2"),
    "textual step": (changed(step="2"), "step is '2'"),
    "true for a step": (changed(step=True), "step is True"),
    "no whole step": (changed(step=2.0), "step is 2.0"),
    "another folder's step": (changed(step=7), "step is 7, and the folder is checkpoint-2"),
    "launch": (changed(launch=None), "launch is nothing instead of text"),
    "places": (changed(places=[[1, 2]]), "places"),
    "places of others": (changed(places={"a": 1}), "places"),
    "before": (changed(before={"reward": [[1.0], [1.0, 2.0]]}), "before"),
    "before of text": (changed(before={"reward": [["1"], ["2"]]}), "before"),
    "before of sizes": (changed(before={"a": [[1.0], [1.0]], "b": [[1.0, 1.0], [1.0, 1.0]]}), "before"),
}


@pytest.mark.parametrize("change, words", RUNS.values(), ids=RUNS)
def test_other_run_json(broken, damage, change, words):
    """Guards against a traceback, and against a run that goes on from numbers that are none."""
    checkpoint = broken / "checkpoint-2"
    content = change(json.loads((checkpoint / "run.json").read_text()))
    (checkpoint / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    sign(checkpoint)
    reason = damage(checkpoint)
    assert reason.startswith("run.json") and words in reason and "\n" not in reason


def without(*keys: str):
    def change(tree: dict) -> str:
        inner = tree
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return yaml.safe_dump(tree)

    return change


CONFIGS = {
    "a list": (lambda tree: "- 1", "holds a list"),
    "empty": (lambda tree: "", "holds nothing"),
    "no YAML": (lambda tree: "model: [", "not YAML"),
    "no date": (lambda tree: "model: 2026-13-45", "not YAML"),
    "no UTF-8": (lambda tree: b"model: \xff\xfe", "not YAML"),
    "an object": (lambda tree: "!!python/object/apply:os.system ['true']", "not YAML"),
    "missing section": (without("model"), "lacks model.name_or_path"),
    "missing setting": (without("train", "learning_rate"), "lacks train.learning_rate"),
    "a later version's setting": (
        lambda tree: yaml.safe_dump({**tree, "train": {**tree["train"], "zero": 3}}),
        "has train.zero, which this version does not know",
    ),
    "a later version's section": (lambda tree: yaml.safe_dump({**tree, "reward": {}}), "has reward, which"),
    "text for a section": (lambda tree: yaml.safe_dump({**tree, "train": "fast"}), "train holds text"),
    "nothing for a section": (lambda tree: yaml.safe_dump({**tree, "data": None}), "data holds nothing"),
}


@pytest.mark.parametrize("change, words", CONFIGS.values(), ids=CONFIGS)
def test_other_config_yaml(broken, damage, change, words):
    """Guards against a traceback where settings are compared."""
    checkpoint = broken / "checkpoint-2"
    content = change(yaml.safe_load((checkpoint / "config.yaml").read_text()))
    (checkpoint / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    sign(checkpoint)
    reason = damage(checkpoint)
    assert reason.startswith("config.yaml") and words in reason and "\n" not in reason


def test_a_setting_that_may_change_can_be_missing(train, broken, unbroken):
    """Guards against a checkpoint that an update of this program makes useless."""
    file = broken / "checkpoint-2" / "config.yaml"
    file.write_text(without("train", "logging_steps")(yaml.safe_load(file.read_text())))
    sign(broken / "checkpoint-2")
    train("run", f"train.resume={broken / 'checkpoint-2'}", **CHANGES)
    assert_equal_weights(broken, unbroken)


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_other_contents_are_passed_over(train, broken, unbroken, capsys, name):
    """Guards against a dead end while the checkpoint before it is whole."""
    checkpoint = broken / "checkpoint-2"
    (checkpoint / name).write_text("[1]")
    sign(checkpoint)
    with pytest.raises(UserError) as caught:
        train("run", f"train.resume={checkpoint}", **CHANGES)
    assert_holds(str(caught.value), "train.resume", checkpoint, "damaged", "holds a list")
    train("run", "train.resume=latest", **CHANGES)
    assert f"{checkpoint} is damaged ({name}" in capsys.readouterr().out
    assert_equal_weights(broken, unbroken)


def test_places_of_other_data(train, broken):
    """Guards against a traceback where the rows are brought to their position."""
    checkpoint = broken / "checkpoint-2"
    run = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").write_text(json.dumps({**run, "places": [[[0, 1, 2]], []]}))
    sign(checkpoint)
    with pytest.raises(UserError, match="places in its run.json does not fit this data"):
        train("run", f"train.resume={checkpoint}", **CHANGES)
    stream = [[0, 0, 0]]
    assert (
        places_fit([], [])
        and places_fit([[1, 2, 3], [1, 3, 9]], stream)
        and places_fit([[], [[0, 1, 2]]], [[], stream])
    )
    assert not places_fit([[1, 2]], stream) and not places_fit([stream], [[], stream]) and not places_fit(stream, [])
    assert not places_fit([stream], stream) and not places_fit([[], []], [])


# ----------------------------------------------------------------------------------------------------------------------
# Files that are none


@pytest.mark.parametrize(
    "kind", ["FIFO", "device", "link out", "link inside", "linked folder", "name outside", "folder"]
)
def test_only_regular_files_count(broken, damage, tmp_path, kind):
    """Guards against a FIFO that blocks the run for ever, and against a file of somebody else's choice."""
    checkpoint = broken / "checkpoint-2"
    sums, tensors = checkpoint / "SHA256SUMS", checkpoint / "state" / "__0_0.distcp"
    if kind == "FIFO":
        tensors.unlink()
        os.mkfifo(tensors)
    elif kind == "device":
        sums.write_text(sums.read_text() + f"{'0' * 64}  /dev/zero\n")
    elif kind == "link out":
        tensors.rename(tmp_path / "elsewhere")
        tensors.symlink_to(tmp_path / "elsewhere")
    elif kind == "link inside":
        (checkpoint / "run.json").rename(checkpoint / "other.json")
        (checkpoint / "run.json").symlink_to("other.json")
    elif kind == "linked folder":
        (checkpoint / "state").rename(tmp_path / "state")
        (checkpoint / "state").symlink_to(tmp_path / "state")
    elif kind == "name outside":
        shutil.copy(checkpoint / "run.json", tmp_path / "run.json")
        sums.write_text(sums.read_text() + f"{sha256_of(tmp_path / 'run.json')}  ../../run.json\n")
    else:
        tensors.unlink()
        tensors.mkdir()
    words = {"linked folder": "not in an ordinary folder", "device": "no file of", "name outside": "no file of"}
    assert words.get(kind, "not a regular file") in damage(checkpoint)


def test_sums_that_are_a_fifo(broken, damage):
    sums = broken / "checkpoint-2" / "SHA256SUMS"
    sums.unlink()
    os.mkfifo(sums)
    assert damage(broken / "checkpoint-2") == "SHA256SUMS is not whole"
