"""What a checkpoint holds, read without trust: a damaged or foreign one is refused, and nothing in it is executed.

torch keeps `state/.metadata` as a pickle, and a pickle can name any function to call. Here it is read into plain
records that know only the names that torch writes into it. Every part of the records is checked, and torch's own
objects are built from what is left. Tensors are read with `weights_only=True`.
"""

import hashlib
import json
import math
import pickle
import re
import stat
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..config.modes import StridedConfig, StructuredConfig
from ..config.sections import VLLMConfig
from ..config.settings import UserError, alternatives

SUMS_FILE = "SHA256SUMS"
CHANGEABLE = {  # section -> settings that a resumed run may change
    "model": "gradient_checkpointing attn_implementation compile_decoding",
    "ebft": "max_packed_tokens",
    "feature_network": "device shard",
    "lora": "merge",
    "vllm": " ".join(field.name for field in fields(VLLMConfig)),
    "eval": "only at_start at_end every_steps per_device_batch_size",
    "train": "output_dir per_device_batch_size max_steps num_epochs logging_steps report_to rollout_table_steps "
    "save_steps save_total_limit resume process_timeout_minutes",
    "data": "num_proc",
}
MAY_CHANGE = {f"{section}.{name}" for section, names in CHANGEABLE.items() for name in names.split()}


class Damaged(UserError):
    """A checkpoint is not what this program writes. The message names the file and what is wrong with it."""


@dataclass
class RunState:
    """The state of a run apart from its tensors.

    step: optimizer steps done; launch: processes and sharding; data: fingerprint of the rows; before: the evaluation
    before training; places: the position in its streams (`streams.StreamedRows`); tokens: of documents and rollouts
    that were trained on.
    """

    step: int
    launch: str
    data: str
    before: dict[str, Tensor] | None
    places: list
    tokens: int = 0


# ----------------------------------------------------------------------------------------------------------------------
# Files


def damage_of(path: Path, accelerator: Accelerator) -> str | None:
    """What is wrong with a checkpoint, None when it is as written. The processes share the work.

    First the checksums of its files, then what the files hold.
    """
    expected = _read_sums(path)
    unknown = {str(file.relative_to(path)) for file in (path / "state").glob("*")} - expected.keys()
    mine = sorted(expected)[accelerator.process_index :: accelerator.num_processes]
    complete = {"config.yaml", "run.json", "state/.metadata"} <= expected.keys()
    problems = [] if complete else [f"{SUMS_FILE} is not whole"]
    problems += [f"{SUMS_FILE} does not know {name}" for name in sorted(unknown)]
    for name in mine:
        try:
            check_regular(path, name)
            if sha256_of(path / name) != expected[name]:
                problems.append(f"{name} is not what was written")
        except Damaged as damage:
            problems.append(str(damage))
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    problems = gather_object(problems)
    contents = []
    if not problems and accelerator.is_main_process:
        try:
            read_run(path)
            read_settings_of(path)
            StateReader(path / "state").read_metadata()
        except Damaged as damage:
            contents.append(str(damage))
    return next(iter([*problems, *gather_object(contents)]), None)


def _read_sums(path: Path) -> dict[str, str]:
    """Name -> checksum, as SHA256SUMS says; empty where it cannot be read."""
    try:
        check_regular(path, SUMS_FILE)
        return dict(reversed(line.split("  ", 1)) for line in (path / SUMS_FILE).read_text().splitlines())
    except (Damaged, OSError, ValueError):
        return {}


def check_regular(folder: Path, name: str) -> None:
    """Raises Damaged when the name is no regular file inside of the folder: a FIFO would block the run for ever.

    A link is none either, because it can lead to any file.
    """
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or not parts:
        raise Damaged(f"{name!r} is no file of a checkpoint")
    place = folder
    for part in parts[:-1]:
        place = place / part
        if not stat.S_ISDIR(place.lstat().st_mode):
            raise Damaged(f"{name} is not in an ordinary folder")
    if not stat.S_ISREG((folder / name).lstat().st_mode):
        raise Damaged(f"{name} is not a regular file")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# run.json and config.yaml


def read_run(path: Path) -> RunState:
    """run.json of a checkpoint, every value checked. Raises Damaged."""
    try:
        values = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"run.json: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSON, or UTF-8
        raise Damaged(f"run.json is not JSON: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise Damaged(f"run.json holds {_kind(values)} instead of named values")
    names = [field.name for field in fields(RunState)]
    missing, further = [name for name in names if name not in values], [name for name in values if name not in names]
    if missing or further:
        what = f"lacks {missing[0]!r}" if missing else f"has {further[0]!r}, which this version does not know"
        raise Damaged(f"run.json {what}")
    for name in ("launch", "data"):
        if not isinstance(values[name], str):
            raise Damaged(f"run.json: {name} is {_kind(values[name])} instead of text")
    if not (_is_whole(values["step"]) and values["step"] > 0):
        raise Damaged(f"run.json: step is {values['step']!r:.40}, not a number of steps")
    folder = re.fullmatch(r"checkpoint-(\d+)", path.resolve().name)
    if folder and int(folder[1]) != values["step"]:
        raise Damaged(f"run.json: step is {values['step']}, and the folder is {folder[0]}")
    if not (_is_whole(values["tokens"]) and values["tokens"] >= 0):
        raise Damaged(f"run.json: tokens is {values['tokens']!r:.40}, not a number of tokens")
    if not _are_places(values["places"]):
        raise Damaged("run.json: places is no position in streams")
    before = values["before"]
    if before is not None:
        if not (isinstance(before, dict) and before and all(map(_is_table, before.values()))):
            raise Damaged("run.json: before is no table of an evaluation")
        values["before"] = {name: torch.tensor(table, dtype=torch.float64) for name, table in before.items()}
        if len({table.shape for table in values["before"].values()}) > 1:
            raise Damaged("run.json: before holds tables of different sizes")
    return RunState(**values)


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_places(value) -> bool:
    """Lists, and in the innermost three whole numbers: [epoch, block, position]."""
    if not isinstance(value, list):
        return False
    if value and all(map(_is_whole, value)):
        return len(value) == 3 and min(value) >= 0
    return all(map(_are_places, value))


def places_fit(saved: list, here: list) -> bool:
    """Whether saved places have the form of those of this run's data: one list for each source that is streamed."""
    if here and here[0] and _is_whole(here[0][0]):
        return all(len(place) == 3 and all(map(_is_whole, place)) for place in saved)
    return len(saved) == len(here) and all(map(places_fit, saved, here))


def _is_table(value) -> bool:
    """Two rows of equally many numbers: totals and weights."""
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(row, list) for row in value)):
        return False
    cells = [*value[0], *value[1]]
    return len(value[0]) == len(value[1]) and all(
        isinstance(cell, float) or (_is_whole(cell) and abs(cell) < 2**53) for cell in cells
    )


def read_settings_of(path: Path) -> dict:
    """config.yaml of a checkpoint: sections and settings that this version knows. Raises Damaged.

    A setting that a resumed run may change can be missing; one that decides which run it is cannot.
    """
    try:
        tree = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"config.yaml: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: UTF-8, or a date that does not exist
        raise Damaged(f"config.yaml is not YAML: {_first_line(error)}") from None
    _check_settings(StructuredConfig if isinstance(tree, dict) and "vllm" in tree else StridedConfig, tree, "")
    return tree


def _check_settings(kind: type, tree, prefix: str) -> None:
    if not isinstance(tree, dict):
        raise Damaged(f"config.yaml: {prefix[:-1] or 'it'} holds {_kind(tree)} instead of settings")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    further = [name for name in tree if name not in known]
    if further:
        raise Damaged(f"config.yaml has {prefix}{further[0]}, which this version does not know")
    for name in known:
        kinds = alternatives(hints[name])
        section = next((kind for kind in kinds if is_dataclass(kind)), None)
        if section is None:
            if name not in tree and f"{prefix}{name}" not in MAY_CHANGE:
                raise Damaged(f"config.yaml lacks {prefix}{name}")
        elif name not in tree or tree[name] is not None or type(None) not in kinds:
            _check_settings(section, tree.get(name, {}), f"{prefix}{name}.")


def _kind(value) -> str:
    names = {dict: "named values", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:120]


# ----------------------------------------------------------------------------------------------------------------------
# state/


class StateReader(dcp.FileSystemReader):
    """Reads the tensors of a checkpoint, and executes nothing of it. read_metadata raises Damaged."""

    def read_metadata(self) -> Metadata:  # without **kwargs, which would let torch fall back to other files
        """state/.metadata, checked in every part: only tensors, each in a file of this folder."""
        try:
            check_regular(self.path, ".metadata")
            with (self.path / ".metadata").open("rb") as file:
                metadata = _metadata_of(_Unpickler(file).load())
        except Damaged as damage:
            raise Damaged(f"state/.metadata: {damage}") from None
        except Exception as error:  # a broken pickle raises whatever its bytes happen to ask for
            raise Damaged(f"state/.metadata cannot be read: {type(error).__name__}: {_first_line(error)}") from None
        sizes = {}
        for info in metadata.storage_data.values():
            name = info.relative_path
            if name not in sizes:
                if Path(name).name != name:
                    raise Damaged(f"state/.metadata: {name!r} is no file of its folder")
                try:
                    check_regular(self.path, name)
                    sizes[name] = (self.path / name).stat().st_size
                except OSError as error:
                    raise Damaged(f"state/{name}: {error.strerror}") from None
            if info.offset + info.length > sizes[name]:
                raise Damaged(f"state/{name} is shorter than state/.metadata says")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Record:
    """What a pickle says of an object: the arguments it is made with, and its state. It has no behaviour."""

    def __new__(cls, *arguments):
        record = super().__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


METADATA = "torch.distributed.checkpoint.metadata"
RECORDS = {
    (METADATA, "Metadata"),
    (METADATA, "TensorStorageMetadata"),
    (METADATA, "ChunkStorageMetadata"),
    (METADATA, "TensorProperties"),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    (METADATA, "MetadataIndex"),
    (METADATA, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),  # where the checkpoint was written
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64", "int64")}


class _Unpickler(pickle.Unpickler):
    """Makes records of the names that torch 2.13 writes into .metadata, and refuses every other name."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        # classes of this one pickle: what it does to a class, it does to nobody else's
        self.kinds = {full_name: type(full_name[1], (_Record,), {}) for full_name in RECORDS}

    def find_class(self, module: str, name: str):
        """A record class, torch.Size or a dtype."""
        if (module, name) in self.kinds:
            return self.kinds[module, name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        raise Damaged(f"it names {f'{module}.{name}'[:80]}, which is no part of a checkpoint of this program")


def _metadata_of(record) -> Metadata:
    """torch's own object from a record, each part checked."""
    state = _state(record, "Metadata")
    entries = {}
    for name, entry in _typed(state["state_dict_metadata"], dict).items():
        parts = _state(entry, "TensorStorageMetadata")
        dtype = _typed(parts["properties"], _Record).state[0]
        states = [_state(chunk, "ChunkStorageMetadata") for chunk in _typed(parts["chunks"], list)]
        chunks = [[_typed(chunk[key], torch.Size) for key in ("offsets", "sizes")] for chunk in states]
        entries[_typed(name, str)] = TensorStorageMetadata(
            TensorProperties(_typed(dtype, torch.dtype)),
            _typed(parts["size"], torch.Size),
            [ChunkStorageMetadata(*chunk) for chunk in chunks],
        )
    places = {}
    for key, info in _typed(state["storage_data"], dict).items():
        index, place = _state(key, "MetadataIndex"), _state(info, "_StorageInfo")
        if place.get("transform_descriptors") or min(_typed(place[key], int) for key in ("offset", "length")) < 0:
            raise Damaged("a tensor is not stored as this program does it")
        where = MetadataIndex(_typed(index["fqn"], str), _typed(index["offset"], torch.Size))
        places[where] = _StorageInfo(_typed(place["relative_path"], str), place["offset"], place["length"])
    for name, entry in entries.items():
        lost = [chunk for chunk in entry.chunks if MetadataIndex(name, chunk.offsets) not in places]
        held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if lost or held != math.prod(entry.size):
            raise Damaged(f"{name[:80]} is not whole")
    return Metadata(entries, storage_data=places)


def _state(record, kind: str) -> dict:
    """The attributes of a record of the kind."""
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise Damaged(f"{type(record).__name__} stands where {kind} belongs: only tensors are part of a checkpoint")
    return _typed(record.state, dict)


def _typed(value, kind: type):
    if type(value) is not kind and not (kind is _Record and isinstance(value, _Record)):
        raise Damaged(f"{type(value).__name__} stands where {kind.__name__} belongs")
    return value
