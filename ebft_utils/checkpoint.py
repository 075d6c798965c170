"""Saving: checkpoints to go on from, and the final model to use. Each is written under a temporary name and renamed when it is whole."""

import os
import pickle
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict

from .config import Config, UserError
from .models import resolve_source

STATE_FILE = "state.pt"
MAY_CHANGE = {  # settings that a resumed run may change
    "model.gradient_checkpointing",
    *(f"eval.{name}" for name in ("only", "at_start", "at_end", "every_steps", "per_device_batch_size")),
    *(f"train.{name}" for name in ("output_dir", "max_steps", "logging_steps", "rollout_table_steps", "save_steps", "save_total_limit", "resume")),
}


def prepare_output_dir(config: Config) -> Path:
    """Creates train.output_dir. Raises UserError when it cannot be written, or holds another run that this one would overwrite."""
    folder = Path(config.train.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"train.output_dir: {folder} is not writable: {error.strerror}") from None
    if config.train.resume is None and not config.eval.only:
        found = [path.name for path in (folder / "final", *list_checkpoints(folder)) if path.exists()]
        if found:
            raise UserError(f"train.output_dir: {folder} already holds a run ({found[0]}); choose another folder, or go on with it: train.resume=latest")
    return folder


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that train.resume names; None for a new run. Raises UserError when there is none."""
    if config.train.resume is None:
        return None
    folder = Path(config.train.output_dir).expanduser()
    if config.train.resume == "latest":
        checkpoints = list_checkpoints(folder)
        if not checkpoints:
            raise UserError(f"train.resume: latest: {folder} holds no checkpoint")
        return checkpoints[-1]
    path = Path(config.train.resume).expanduser()
    if not (path / STATE_FILE).is_file():
        raise UserError(f"train.resume: {path} is not a checkpoint folder (it has no {STATE_FILE})")
    return path


def check_same_run(config: Config, checkpoint: Path) -> None:
    """Raises UserError when the checkpoint was made with settings that would make its continuation another run."""
    try:
        saved = yaml.safe_load((checkpoint / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"train.resume: {checkpoint / 'config.yaml'} cannot be read: {error}") from None
    here, there = _flatten(config.to_dict()), _flatten(saved)
    changed = [key for key in here | there if here.get(key) != there.get(key) and key not in MAY_CHANGE]
    if changed:
        differences = "; ".join(f"{key} is {here.get(key)!r} and was {there.get(key)!r}" for key in changed)
        raise UserError(f"train.resume: {checkpoint} was made with other settings: {differences}; restore them, or start a new run in another train.output_dir")


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()]
    return [path for _, path in sorted(found)]


def save_checkpoint(config: Config, accelerator: Accelerator, policy, optimizer, scheduler, step: int, before: dict[str, Tensor] | None) -> Path:
    """Writes checkpoint-STEP: trained weights, optimizer, schedule, step, the evaluation before training, configuration.

    Then removes the oldest ones over train.save_total_limit, and later ones: a run that was resumed further back has left that continuation.
    There is no random state to save: data order and rollouts are functions of (seed, step).
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    model_state = get_model_state_dict(policy, options=options)
    optimizer_state = get_optimizer_state_dict(policy, optimizer, options=options)
    folder = Path(config.train.output_dir).expanduser()
    target = folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        with writing(target) as temporary:
            (temporary / "config.yaml").write_text(config.to_yaml())
            state = {"step": step, "model": model_state, "optimizer": optimizer_state, "scheduler": scheduler.state_dict(), "before": before}
            torch.save(state, temporary / STATE_FILE)
        checkpoints = list_checkpoints(folder)
        newest = checkpoints.index(target)
        for old in checkpoints[: max(0, newest + 1 - config.train.save_total_limit)] + checkpoints[newest + 1 :]:
            shutil.rmtree(old)
    return target


def load_checkpoint(path: Path, policy, optimizer, scheduler) -> tuple[int, dict[str, Tensor] | None]:
    """Restores weights, optimizer and schedule; returns the number of steps done and the evaluation before training.

    Raises UserError when the checkpoint is of another model or damaged.
    """
    try:
        state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise UserError(f"train.resume: {path / STATE_FILE} cannot be read (damaged?): {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.keys() != {"step", "model", "optimizer", "scheduler", "before"}:
        raise UserError(f"train.resume: {path / STATE_FILE} is not a checkpoint of this program")
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    shapes = {name.removeprefix("module."): parameter.shape for name, parameter in trained.items()}
    saved = {name: tensor.shape for name, tensor in state["model"].items()}
    wrong = [name for name in shapes | saved if saved.get(name) != shapes.get(name)]
    if wrong:
        here, there = (tuple(found[wrong[0]]) if wrong[0] in found else "missing" for found in (shapes, saved))
        raise UserError(
            f"train.resume: {path} is of another model or adapter: {len(wrong)} trained weights differ, for example {wrong[0]} ({here} here, {there} there)"
        )
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    set_model_state_dict(policy, state["model"], options=options)
    set_optimizer_state_dict(policy, optimizer, state["optimizer"], options=options)
    scheduler.load_state_dict(state["scheduler"])
    return state["step"], state["before"]


class writing:
    """`with writing(target) as temporary:` - the folder appears under its name only when the block has ended without an error."""

    def __init__(self, target: Path):
        self.target, self.temporary = target, target.with_name(f".{target.name}.tmp-{os.getpid()}")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            old = self.target.with_name(f".{self.target.name}.old-{os.getpid()}")
            if self.target.exists():
                os.replace(self.target, old)
            os.replace(self.temporary, self.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)


def export_final(config: Config, accelerator: Accelerator, causal_lm, tokenizer, card: str) -> Path:
    """Writes <output_dir>/final: the model (or adapter) as `from_pretrained` loads it, tokenizer, configuration and model card.

    An adapter of a GGUF model gets an ordinary copy of that model beside it (final/base_model), because peft cannot load the adapter onto the file.
    """
    target = Path(config.train.output_dir).expanduser().resolve() / "final"
    if accelerator.is_main_process:
        with writing(target) as temporary:
            if isinstance(causal_lm, PeftModel):
                if resolve_source(config.model.name_or_path)[1] is not None:
                    base = causal_lm.get_base_model()
                    weights = {name.replace(".base_layer.", "."): weight for name, weight in base.state_dict().items() if ".lora_" not in name}
                    base.save_pretrained(temporary / "base_model", state_dict=weights)
                    causal_lm.peft_config["default"].base_model_name_or_path = str(target / "base_model")
                causal_lm.save_pretrained(temporary, save_embedding_layers=False)
            else:
                causal_lm.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "training_config.yaml").write_text(config.to_yaml())
            (temporary / "README.md").write_text(card)
    accelerator.wait_for_everyone()
    return target


class StopSignals:
    """Inside, SIGINT and SIGTERM raise KeyboardInterrupt, so that what was trained is saved on the way out; but never in the middle of an update."""

    def __enter__(self) -> "StopSignals":
        self.pending = self.updating = False
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if not self.updating:
            raise KeyboardInterrupt
        self.pending = True

    @contextmanager
    def deferred(self):
        """A signal that comes inside takes effect at the end."""
        self.updating = True
        try:
            yield
        finally:
            self.updating = False
        if self.pending:
            raise KeyboardInterrupt
