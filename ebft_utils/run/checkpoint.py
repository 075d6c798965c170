"""Checkpoints: saving a run so that it can be resumed, and resuming it.

A checkpoint is a folder, written under a temporary name and renamed when it is complete. It is the same for one
process, DDP and FSDP2, and any other number of processes can load it:
    state/        trained weights and optimizer state, each process's part (torch.distributed.checkpoint)
    run.json      step, launch, fingerprint of the data, the evaluation before training
    config.yaml   the whole configuration
    SHA256SUMS    of all of them, written last; `sha256sum -c SHA256SUMS` checks it by hand
There is no random state and no schedule to save: data order, rollouts and learning rate depend only on (seed, step).
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ..config.modes import Config
from ..config.settings import UserError
from .folders import recover, remove
from .integrity import (
    MAY_CHANGE,
    SUMS_FILE,
    RunState,
    StateReader,
    damage_of,
    places_fit,
    read_run,
    read_settings_of,
    sha256_of,
)

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is a normal case
LOCK_FILE = ".lock"


# ----------------------------------------------------------------------------------------------------------------------
# The output folder


@contextmanager
def output_folder(config: Config, accelerator: Accelerator):
    """Creates train.output_dir and locks it against other runs. Yields its path.

    The lock ends with the process, however that ends. eval.only takes none. Raises UserError when the folder cannot be
    written, is in use, or holds a run that this one would overwrite.
    """
    folder = Path(config.train.output_dir).expanduser()
    lock, problem, token = None, None, f"{socket.gethostname()} {os.getpid()}"
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if config.eval.only:
                TemporaryFile(dir=folder).close()
            else:
                lock = _lock(folder / LOCK_FILE, token)
                problem = _not_a_folder(folder)
                if problem is None:
                    _remove_leftovers(folder)
                    recover(folder / "final")
        except BlockingIOError:
            owner = (folder / LOCK_FILE).read_text()
            problem = (
                f"another run is at work in {folder} (process {owner}); wait for its end, or choose another folder"
            )
        except OSError as error:
            problem = f"{folder} is not writable: {error.strerror}"
        if problem is None and not config.eval.only:
            problem = _would_overwrite(config, folder)
    problem, token = broadcast_object_list([problem, token])
    if problem is None and not config.eval.only:
        deadline = time.monotonic() + 30  # network file systems show a new file late
        while not (seen := _reads(folder / LOCK_FILE, token)) and time.monotonic() < deadline:
            time.sleep(0.5)
        hosts = [host for host in gather_object(["" if seen else socket.gethostname()]) if host]
        if hosts:
            others = ", ".join(sorted(set(hosts)))
            problem = f"{folder} is not the same folder on all machines (not on {others})"
            problem += "; it must be on a shared file system"
    if problem is not None:
        if lock is not None:
            lock.close()
        raise UserError(f"train.output_dir: {problem}")
    try:
        yield folder
    finally:
        if lock is not None:
            _remove_leftovers(folder)
            lock.close()


def write_config(config: Config, accelerator: Accelerator, folder: Path) -> None:
    """Writes the whole configuration to config.yaml in the run's folder, when it is sure that the run will go on."""
    if not accelerator.is_main_process or config.eval.only:
        return
    try:
        (folder / "config.yaml").write_text(config.to_yaml())
    except OSError as error:
        raise UserError(f"train.output_dir: {folder / 'config.yaml'} could not be written: {error.strerror}") from None


def _not_a_folder(folder: Path) -> str | None:
    """The problem with a file or a link in the place of a folder that the run will write, hours from now."""
    for path in sorted([folder / "final", *folder.glob("checkpoint-*")]):
        if path.name != "final" and not re.fullmatch(r"checkpoint-\d+", path.name):
            continue
        if path.is_symlink():
            return f"{path} is a symbolic link, and the run writes a folder of this name; give the link another name"
        if path.exists() and not path.is_dir():
            return f"{path} is not a folder, and the run writes a folder of this name; give the file another name"
    return None


def _remove_leftovers(folder: Path) -> None:
    """Removes the half-written checkpoints of a run that was killed. What cannot be removed now is left for later."""
    for leftover in folder.glob(".checkpoint-*.tmp"):
        remove(leftover)


def _would_overwrite(config: Config, folder: Path) -> str | None:
    """The problem with a folder that holds a run which this one does not resume."""
    named = Path(config.train.resume or "latest").expanduser()
    elsewhere = (named / SUMS_FILE).is_file() and named.resolve().parent != folder.resolve()
    if config.train.resume is not None and not elsewhere:
        return None
    found = [path.name for path in (folder / "final", *list_checkpoints(folder)) if path.exists()]
    if not found:
        return None
    holds = f"already holds a{'nother' if elsewhere else ''} run ({found[0]})"
    return f"{folder} {holds}; choose another folder, or go on with it: train.resume=latest"


def _lock(path: Path, token: str):
    """The open lock file, locked while it is open. Raises BlockingIOError when another process holds the lock."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{path.parent} is on a file system without locks: nothing keeps a second run out of it")
    file.truncate(0)
    file.write(token)
    file.flush()
    os.fsync(file.fileno())
    return file


def _reads(path: Path, token: str) -> bool:
    return path.is_file() and path.read_text() == token


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / SUMS_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


# ----------------------------------------------------------------------------------------------------------------------
# Which checkpoint to resume from


def find_checkpoint(config: Config, accelerator: Accelerator) -> Path | None:
    """The checkpoint that train.resume names, None for a new run. Raises UserError when there is none.

    latest passes over damaged checkpoints, and says so.
    """
    if config.train.resume is None:
        return None
    folder = Path(config.train.output_dir).expanduser()
    if config.train.resume == "latest":
        passed_over = []
        for path in reversed(list_checkpoints(folder)):
            damage = damage_of(path, accelerator)
            if damage is None:
                return path
            passed_over.append(f"{path} is damaged ({damage})")
            accelerator.print(f"{passed_over[-1]}: passed over")
        found = "no whole checkpoint" if passed_over else "no checkpoint"
        raise UserError("; ".join([f"train.resume: latest: {folder} holds {found}", *passed_over]))
    path = Path(config.train.resume).expanduser()
    if not (path / SUMS_FILE).is_file():
        raise UserError(f"train.resume: {path} is not a checkpoint folder (it has no {SUMS_FILE})")
    damage = damage_of(path, accelerator)
    if damage is not None:
        raise UserError(f"train.resume: {path} is damaged: {damage}")
    return path


def check_same_run(config: Config, checkpoint: Path) -> list[str]:
    """The settings that differ from the checkpoint's, in words.

    Raises UserError for settings that would make its continuation another run (with eval.only: another model).
    """
    here, there = flatten(config.to_dict()), flatten(read_settings_of(checkpoint))
    changed = [key for key in here | there if here.get(key) != there.get(key)]
    words = {key: f"{key} is {here.get(key)!r} and was {there.get(key)!r}" for key in changed}
    length = next((key for key in ("train.max_steps", "train.num_epochs") if key in words), None)
    if length is not None:
        words[length] += " (warm-up and decay are shares of the steps: the learning rates change with them)"
    model_keys, trains = ("model.", "lora"), not config.eval.only
    refused = [words[key] for key in changed if key not in MAY_CHANGE and (trains or key.startswith(model_keys))]
    if refused:
        raise UserError(
            f"train.resume: {checkpoint} was made with other settings: {'; '.join(refused)}; restore them, or start a "
            "new run in another train.output_dir"
        )
    return [words[key] for key in changed if key not in ("train.resume", "train.output_dir")]


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested settings by dotted key."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


def trained_state(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The tensors of a checkpoint, by name: the trained tensors themselves, so that loading fills them in place.

    Under FSDP2 they are the process's shards.
    """
    trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    weights = {name.removeprefix("module."): parameter for name, parameter in trained}
    return {"model": weights, "optimizer": get_optimizer_state_dict(policy, optimizer)["state"]}


def save_checkpoint(
    config: Config,
    accelerator: Accelerator,
    policy,
    optimizer,
    run: RunState,
    *,
    alone: bool = False,
    keep_all: bool = False,
) -> Path:
    """Writes checkpoint-STEP, then removes old checkpoints (keep_all: none).

    Removed are the oldest ones beyond train.save_total_limit, and later ones: a run that was resumed from an earlier
    step has abandoned them. Raises UserError on all processes when the checkpoint cannot be written; earlier ones stay.

    alone: without the other processes, which may be gone. Only for the main process of a run that is not sharded.
    """
    gather, tell = (_own, _own) if alone else (gather_object, _from_main_process)
    folder = Path(config.train.output_dir).expanduser()
    target, temporary = folder / f"checkpoint-{run.step}", folder / f".checkpoint-{run.step}.tmp"
    if accelerator.is_main_process:
        _remove_leftovers(folder)
    tell("clean")  # no process writes before this
    sums, errors = [], []
    try:
        _write_state(trained_state(policy, optimizer), temporary / "state", alone or accelerator.num_processes == 1)
        if accelerator.is_main_process:
            before = None if run.before is None else {name: table.tolist() for name, table in run.before.items()}
            (temporary / "run.json").write_text(json.dumps({**vars(run), "before": before}))
            (temporary / "config.yaml").write_text(config.to_yaml())
    except OSError as problem:
        errors.append(problem)
    errors = gather(errors)
    # the main process's list: a network file system may show each machine another one
    files = tell(sorted(path for path in temporary.rglob("*") if path.is_file()))
    try:
        mine = files if alone else files[accelerator.process_index :: accelerator.num_processes]
        sums = [f"{sha256_of(path)}  {path.relative_to(temporary)}\n" for path in mine if not errors]
    except OSError as problem:
        errors.append(problem)
    sums, errors = gather(sums), gather(errors)
    if accelerator.is_main_process and not errors:
        try:
            (temporary / SUMS_FILE).write_text("".join(sums))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        except OSError as problem:
            errors.append(problem)
    errors = tell(errors)
    if errors:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = list_checkpoints(folder)
        rest = f"{kept[-1].name} is whole: train.resume=latest goes on from it" if kept else "there is no earlier one"
        raise UserError(f"{target} could not be written: {errors[0]} ({free_space(folder)}); {rest}")
    if accelerator.is_main_process and not keep_all:
        _remove_old(folder, target, config.train.save_total_limit)
    return target


def _own(value):
    return value


def _from_main_process(value):
    return broadcast_object_list([value])[0]


def _remove_old(folder: Path, newest: Path, limit: int) -> None:
    checkpoints = list_checkpoints(folder)
    index = checkpoints.index(newest)
    for old in checkpoints[: max(0, index + 1 - limit)] + checkpoints[index + 1 :]:
        leftover = folder / f".{old.name}.tmp"  # the next save removes what cannot be removed now
        with suppress(OSError):
            os.replace(old, leftover)
            shutil.rmtree(leftover)


def free_space(folder: Path) -> str:
    """The free space on the disk of a folder, in words."""
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GB free there"


def _write_state(state: dict, folder: Path, no_dist: bool) -> None:
    """dcp.save, which raises a failure on any process as an OSError on all, with its reason."""
    try:
        dcp.save(state, checkpoint_id=folder, no_dist=no_dist)
    except CheckpointException as exception:
        cause = next(iter(exception.failures.values()))[0]
        raise OSError(str(cause)) from exception


def load_checkpoint(path: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Restores weights and optimizer state, whatever number of processes wrote them.

    Raises UserError when the checkpoint is of another model, or cannot be read.
    """
    run = read_run(path)
    state = trained_state(policy, optimizer)
    reader = StateReader(path / "state")
    found = reader.read_metadata().state_dict_metadata
    saved = {name: tuple(entry.size) for name, entry in found.items()}
    shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in state["model"].items()}
    shapes |= {
        f"optimizer.{name}.{key}": tuple(tensor.shape)
        for name, entry in state["optimizer"].items()
        for key, tensor in entry.items()
    }
    wrong = [name for name in shapes | saved if saved.get(name) != shapes.get(name)]
    if wrong:
        here, there = (known.get(wrong[0], "missing") for known in (shapes, saved))
        raise UserError(
            f"train.resume: {path} is of another model or adapter: {len(wrong)} tensors differ, for example {wrong[0]} "
            f"({here} here, {there} there)"
        )
    try:
        dcp.load(state, storage_reader=reader)
    except CheckpointException as exception:
        cause = str(next(iter(exception.failures.values()))[0]).strip().partition("\n")[0]
        raise UserError(f"train.resume: {path} is damaged: its tensors cannot be read: {cause}") from None
    return run


def continue_with(config: Config, accelerator: Accelerator, run: RunState, rows) -> None:
    """Brings the rows to the position of a loaded run. Prints a line when the launch is another one.

    Raises UserError when the run cannot be resumed as it began.
    """
    data, launch, num_steps = rows.fingerprint(), launch_of(accelerator), config.train.total_steps(rows)
    if run.step > num_steps:
        done = f"the {run.step} steps that checkpoint-{run.step} has done"
        key, epochs = ("max_steps", "") if config.train.num_epochs is None else ("num_epochs", "so many epochs are ")
        raise UserError(f"train.{key}: {epochs}{num_steps} steps, less than {done}; raise it")
    if run.data != data:
        raise UserError(
            f"train.resume: {config.data.described!r} has changed: {data} to train on, and it was {run.data}; "
            "bring it back, or start a new run in another train.output_dir"
        )
    if run.launch != launch:
        accelerator.print(
            f"begun on {run.launch}, goes on on {launch}: the same rows and rollouts, but sums are rounded in another "
            "order, so the numbers are not bit for bit those of the unbroken run"
        )
        run.launch = launch
    if not places_fit(run.places, rows.places):
        raise UserError("train.resume: the checkpoint is damaged: places in its run.json does not fit this data")
    rows.go_on_from(run.places, run.step * config.train.batch_size)
    run.places = rows.places


def launch_of(accelerator: Accelerator) -> str:
    """What decides the order in which sums are rounded: processes and sharding, in words."""
    sharded = "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else "DDP"
    return f"{accelerator.num_processes} processes with {sharded}" if accelerator.num_processes > 1 else "1 process"
