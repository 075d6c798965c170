"""Saving: checkpoints to go on from, and the final model to use. Each is written under a temporary name and renamed when it is whole.

A checkpoint is a folder, the same for one process, DDP and FSDP2, and can be read by any other number of processes:
    state/        trained weights and optimizer state, each process's part (torch.distributed.checkpoint)
    run.json      step, launch, fingerprint of the data, the evaluation before training
    config.yaml   the whole configuration
    SHA256SUMS    of all of them, written last; `sha256sum -c SHA256SUMS` checks it by hand
There is no random state and no schedule to save: data order, rollouts and learning rate are functions of (seed, step).
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object, patch_environment
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from ..config.modes import Config, VLLMConfig
from ..config.settings import UserError
from ..models import DTYPES, load_causal_lm, resolve_source

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is a normal case
SUMS_FILE, LOCK_FILE = "SHA256SUMS", ".lock"
MAY_CHANGE = {  # settings that a resumed run may change
    "model.gradient_checkpointing",
    "model.attn_implementation",
    "model.compile_decoding",
    "ebft.max_packed_tokens",
    "feature_network.device",
    "feature_network.shard",
    "lora.merge",
    *(f"vllm.{field.name}" for field in fields(VLLMConfig)),
    *(f"eval.{name}" for name in ("only", "at_start", "at_end", "every_steps", "per_device_batch_size")),
    *(
        f"train.{name}"
        for name in ("output_dir", "per_device_batch_size", "max_steps", "logging_steps", "rollout_table_steps")
    ),
    *(f"train.{name}" for name in ("save_steps", "save_total_limit", "resume", "process_timeout_minutes", "dry_run")),
    "data.num_proc",
}


@dataclass
class RunState:
    """What a run knows about itself. step: optimizer steps done; launch: on what; data: fingerprint of the rows; before: the evaluation before training;
    places: where in its streams it is (`data.StreamedRows`)."""

    step: int
    launch: str
    data: str
    before: dict[str, Tensor] | None
    places: list


# ---------------------------------------------------------------------------------------------------------------------------------------
# The output folder


@contextmanager
def output_folder(config: Config, accelerator: Accelerator):
    """Creates train.output_dir and keeps other runs out of it while inside (the lock ends with the process, however that ends). Gives its path.

    Raises UserError when it cannot be written, is in use, or holds a run that this one would overwrite. (eval.only needs no lock.)
    """
    folder = Path(config.train.output_dir).expanduser()
    lock = None
    problem, token = None, f"{socket.gethostname()} {os.getpid()}"
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if config.eval.only:
                TemporaryFile(dir=folder).close()
            else:
                lock = _lock(folder / LOCK_FILE, token)
        except BlockingIOError:
            problem = f"another run is at work in {folder} (process {(folder / LOCK_FILE).read_text()}); wait for its end, or choose another folder"
        except OSError as error:
            problem = f"{folder} is not writable: {error.strerror}"
        named = Path(config.train.resume or "latest").expanduser()
        elsewhere = (named / SUMS_FILE).is_file() and named.resolve().parent != folder.resolve()
        if problem is None and (config.train.resume is None or elsewhere) and not config.eval.only:
            found = [path.name for path in (folder / "final", *list_checkpoints(folder)) if path.exists()]
            if found:
                problem = f"{folder} already holds a{'nother' if elsewhere else ''} run ({found[0]}); choose another folder, or go on with it: train.resume=latest"
    problem, token = broadcast_object_list([problem, token])
    if problem is None and not config.eval.only:
        deadline = time.monotonic() + 30  # network file systems show a new file late
        while not (seen := _reads(folder / LOCK_FILE, token)) and time.monotonic() < deadline:
            time.sleep(0.5)
        hosts = [host for host in gather_object(["" if seen else socket.gethostname()]) if host]
        if hosts:
            problem = f"{folder} is not the same folder on all machines (not on {', '.join(sorted(set(hosts)))}); it must be on a shared file system"
    if problem is not None:
        raise UserError(f"train.output_dir: {problem}")
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()


def _lock(path: Path, token: str):
    """The open lock file: it is locked as long as it is open. Raises BlockingIOError when another process has it."""
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
    """Finished checkpoints, oldest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / SUMS_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Which checkpoint to go on from


def find_checkpoint(config: Config, accelerator: Accelerator) -> Path | None:
    """The checkpoint that train.resume names; None for a new run. latest passes over damaged ones, with a word. Raises UserError when there is none."""
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
        raise UserError(
            f"train.resume: latest: {folder} holds no {'whole ' if passed_over else ''}checkpoint{''.join(f'; {word}' for word in passed_over)}"
        )
    path = Path(config.train.resume).expanduser()
    if not (path / SUMS_FILE).is_file():
        raise UserError(f"train.resume: {path} is not a checkpoint folder (it has no {SUMS_FILE})")
    damage = damage_of(path, accelerator)
    if damage is not None:
        raise UserError(f"train.resume: {path} is damaged: {damage}")
    return path


def damage_of(path: Path, accelerator: Accelerator) -> str | None:
    """What is wrong with a checkpoint's files, None when they are as they were written. The processes share the work."""
    try:
        expected = dict(reversed(line.split("  ", 1)) for line in (path / SUMS_FILE).read_text().splitlines())
    except (OSError, ValueError):
        expected = {}
    unknown = {str(file.relative_to(path)) for file in (path / "state").glob("*")} - expected.keys()
    mine = sorted(expected)[accelerator.process_index :: accelerator.num_processes]
    problems = (
        [] if {"config.yaml", "run.json", "state/.metadata"} <= expected.keys() else [f"{SUMS_FILE} is not whole"]
    )
    problems += [f"{SUMS_FILE} does not know {name}" for name in sorted(unknown)]
    for name in mine:
        try:
            if _sha256(path / name) != expected[name]:
                problems.append(f"{name} is not what was written")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return next(iter(gather_object(problems)), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_same_run(config: Config, checkpoint: Path) -> list[str]:
    """The settings that differ from those the checkpoint was made with. Raises UserError for those that would make its continuation another run
    (for an evaluation alone: another model)."""
    saved = yaml.safe_load((checkpoint / "config.yaml").read_text())
    here, there = _flatten(config.to_dict()), _flatten(saved)
    changed = [key for key in here | there if here.get(key) != there.get(key)]
    words = {key: f"{key} is {here.get(key)!r} and was {there.get(key)!r}" for key in changed}
    if "train.max_steps" in words:
        words["train.max_steps"] += " (warm-up and decay are shares of it: the learning rates change with it)"
    refused = [
        words[key]
        for key in changed
        if key not in MAY_CHANGE and (not config.eval.only or key.startswith(("model.", "lora")))
    ]
    if refused:
        raise UserError(
            f"train.resume: {checkpoint} was made with other settings: {'; '.join(refused)}; restore them, or start a new run in another train.output_dir"
        )
    return [words[key] for key in changed if key not in ("train.resume", "train.output_dir")]


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# ---------------------------------------------------------------------------------------------------------------------------------------
# Saving and loading


def trained_state(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The tensors of a checkpoint, by name: the very ones that are trained (under FSDP2 the process's shards), so loading into them is all there is to do."""
    weights = {
        name.removeprefix("module."): parameter
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    }
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
    """Writes checkpoint-STEP, then removes the oldest ones over train.save_total_limit, and later ones: a run that was resumed further back has left
    that continuation (keep_all: removes none). Raises UserError on all processes when it cannot be written; what was saved before stays.

    alone: without the other processes, which may be gone. Only for the main process of a run that is not sharded.
    """
    gather, tell = (_own, _own) if alone else (gather_object, _from_main_process)
    folder = Path(config.train.output_dir).expanduser()
    target, temporary = folder / f"checkpoint-{run.step}", folder / f".checkpoint-{run.step}.tmp"
    if accelerator.is_main_process:
        for leftover in folder.glob(".checkpoint-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
    tell("clean")  # nobody writes before
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
    files = tell(
        sorted(path for path in temporary.rglob("*") if path.is_file())
    )  # network file systems may show each machine another list
    try:
        mine = files if alone else files[accelerator.process_index :: accelerator.num_processes]
        sums = [f"{_sha256(path)}  {path.relative_to(temporary)}\n" for path in mine if not errors]
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
        raise UserError(
            f"{target} could not be written: {errors[0]} ({_free(folder)}); "
            + (f"{kept[-1].name} is whole: train.resume=latest goes on from it" if kept else "there is no earlier one")
        )
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
        leftover = folder / f".{old.name}.tmp"  # what cannot be removed now is removed by the next save
        with suppress(OSError):
            os.replace(old, leftover)
            shutil.rmtree(leftover)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GB free there"


def _write_state(state: dict, folder: Path, no_dist: bool) -> None:
    """dcp.save, with the reason of a failure on any process as an OSError on all."""
    try:
        dcp.save(state, checkpoint_id=folder, no_dist=no_dist)
    except CheckpointException as exception:
        cause = next(iter(exception.failures.values()))[0]
        raise OSError(str(cause)) from exception


def load_checkpoint(path: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Restores weights and optimizer state, whatever number of processes wrote them. Raises UserError when the checkpoint is of another model."""
    values = json.loads((path / "run.json").read_text())
    before = values.pop("before")
    run = RunState(
        **values,
        before=None
        if before is None
        else {name: torch.tensor(table, dtype=torch.float64) for name, table in before.items()},
    )
    state = trained_state(policy, optimizer)
    found = dcp.FileSystemReader(path / "state").read_metadata().state_dict_metadata
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
            f"train.resume: {path} is of another model or adapter: {len(wrong)} tensors differ, for example {wrong[0]} ({here} here, {there} there)"
        )
    dcp.load(state, checkpoint_id=path / "state")
    return run


def continue_with(config: Config, accelerator: Accelerator, run: RunState, rows) -> None:
    """Brings the rows to where a loaded run is. Raises UserError when it cannot go on as it began; says so when it goes on under another launch."""
    data = rows.fingerprint()
    if run.step > config.train.max_steps:
        raise UserError(
            f"train.max_steps: {config.train.max_steps} is less than the {run.step} steps that checkpoint-{run.step} has done"
        )
    if run.data != data:
        raise UserError(
            f"train.resume: {config.data.described!r} has changed: {data} to train on, and it was {run.data}; bring it back, or start a new run in another train.output_dir"
        )
    if run.launch != launch_of(accelerator):
        accelerator.print(
            f"begun on {run.launch}, goes on on {launch_of(accelerator)}: the same rows and rollouts, but sums are rounded in another order, so the numbers "
            "are not bit for bit those of the unbroken run"
        )
        run.launch = launch_of(accelerator)
    rows.go_on_from(run.places, run.step * config.train.batch_size)
    run.places = rows.places


def launch_of(accelerator: Accelerator) -> str:
    """What decides the order of sums."""
    sharded = "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else "DDP"
    return f"{accelerator.num_processes} processes with {sharded}" if accelerator.num_processes > 1 else "1 process"


# ---------------------------------------------------------------------------------------------------------------------------------------
# The final model


@contextmanager
def writing(target: Path):
    """`with writing(target) as temporary:` - the folder appears under its name only when the block has ended without an error."""
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def whole_state(config: Config, policy: torch.nn.Module) -> dict[str, Tensor]:
    """The trained weights, whole, on the main process (the others have none of them under FSDP2), by the names that transformers and peft know.

    Tied weights are there under each of their names.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=config.lora is not None)
    return {
        name.removeprefix("causal_lm."): tensor
        for name, tensor in get_model_state_dict(policy, options=options).items()
    }


def export_final(config: Config, accelerator: Accelerator, policy: torch.nn.Module, tokenizer, card: str) -> Path:
    """Writes <output_dir>/final: the whole model (or adapter) as `from_pretrained` loads it, tokenizer, configuration and model card.

    An adapter of a GGUF model gets an ordinary copy of that model beside it (final/base_model), because peft cannot load the adapter onto the file;
    with lora.merge there is final/merged, the model with the adapter merged in (in float32, then rounded to model.dtype).
    """
    target = Path(config.train.output_dir).expanduser().resolve() / "final"
    weights = whole_state(config, policy)
    causal_lm = accelerator.unwrap_model(policy).causal_lm
    if accelerator.is_main_process:
        unique = dict(causal_lm.named_parameters())
        tied = dict(causal_lm.named_parameters(remove_duplicate=False)).keys() - unique.keys()
        weights = {name: tensor for name, tensor in weights.items() if name not in tied}
        try:
            with writing(target) as temporary:
                if isinstance(causal_lm, PeftModel):
                    _export_adapter(config, causal_lm, weights, tokenizer, temporary, target)
                else:
                    causal_lm.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
                (temporary / "training_config.yaml").write_text(config.to_yaml())
                (temporary / "README.md").write_text(card)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{target} could not be written: {error} ({_free(target.parent)}); the checkpoints are whole: train.resume=latest writes it again"
            ) from None
    accelerator.wait_for_everyone()
    return target


def _export_adapter(
    config: Config, causal_lm: PeftModel, weights: dict[str, Tensor], tokenizer, folder: Path, target: Path
) -> None:
    """target: what `folder` will be called."""
    is_gguf = resolve_source(config.model.name_or_path)[1] is not None
    if is_gguf:
        causal_lm.peft_config["default"].base_model_name_or_path = str(target / "base_model")
    causal_lm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    if not is_gguf and not config.lora.merge:
        return
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        base = load_causal_lm(config.model, torch.float32)
    if is_gguf:
        base.to(DTYPES[config.model.dtype]).save_pretrained(folder / "base_model")
        tokenizer.save_pretrained(folder / "base_model")
        base.float()
    if config.lora.merge:
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
        merged.to(DTYPES[config.model.dtype]).save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")
