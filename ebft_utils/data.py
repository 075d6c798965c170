"""Raw text -> tokenised documents -> rows -> batches.

A document is a list of token ids. A row is what the model sees in one line of a batch: one document, or several with `data.packing`. Which rows
make up an optimizer step is a function of (seed, step) alone, so a run resumes where it stopped and does not depend on the number of processes.

Axis legend: B rows, S tokens of a row (right-padded), A anchors, N rollouts at an anchor, G tokens of a rollout.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from .config import Config, StridedConfig, UserError
from .strided import find_anchors

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Sources


def load_table(config: Config, source: str, split: str, columns: dict[str, str], built_in: dict) -> datasets.Dataset:
    """The rows of a dataset, the first data.max_documents of them. Raises UserError naming the dataset when they cannot be had.

    columns: setting -> the column that it names, which must be there. built_in: names of sources that are no files -> a function from split to dataset.
    """
    data = config.data
    try:
        path = Path(source).expanduser()
        if source in built_in:
            table = built_in[source](split)
        elif path.is_dir():
            files = sorted(file for file in path.rglob(data.file_pattern) if file.is_file())
            if not files:
                raise UserError(f"data: the folder {source} holds no file that matches data.file_pattern {data.file_pattern!r}")
            suffix, kinds = files[0].suffix, {file.suffix for file in files}
            if len(kinds) > 1 and kinds & LOADERS.keys():
                raise UserError(f"data: data.file_pattern {data.file_pattern!r} matches files of several kinds in {source} ({', '.join(sorted(kinds))}); narrow it to one")
            if suffix not in LOADERS and config.mode != "strided":
                raise UserError(f"data: data.file_pattern {data.file_pattern!r} matches files of the kind {suffix!r} in {source}; rows can be read from {', '.join(LOADERS)}")
            table = _load_rows([str(file) for file in files], suffix, split) if suffix in LOADERS else read_files(files, source, split, data.text_column)
        elif path.suffix in LOADERS:
            if not path.is_file():
                raise UserError(f"data: the file {source} does not exist")
            table = _load_rows([str(path)], path.suffix, split)
        elif path.exists() or source.startswith((".", "/", "~")):
            raise UserError(f"data: {source} is neither a folder nor a file of a known kind ({', '.join(LOADERS)})")
        else:
            table = datasets.load_dataset(source, data.name, revision=data.revision, split=split)
    except (OSError, ValueError, RuntimeError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data: {source!r} (split {split!r}) cannot be loaded: {_root_cause(error)}") from None
    for key, column in columns.items():
        if column not in table.column_names:
            raise UserError(f"data: {source!r} has no column {column!r}; it has {', '.join(table.column_names)}: set {key}")
    if len(table) == 0:
        raise UserError(f"data: {source!r} (split {split!r}) is empty")
    return table if data.max_documents is None else table.select(range(min(data.max_documents, len(table))))


def load_texts(config: StridedConfig, source: str, split: str) -> datasets.Dataset:
    """The rows of a raw-text dataset, with the column data.text_column."""
    column = config.data.text_column
    return load_table(config, source, split, {"data.text_column": column}, {"python_stdlib": lambda split: read_files(stdlib_files(), source, split, column)})


def _root_cause(error: BaseException) -> str:
    """First line of the error that started it: `datasets` wraps the reason in a general one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def _load_rows(files: list[str], suffix: str, split: str) -> datasets.Dataset:
    _check_local_split(split)
    if not any(Path(file).stat().st_size for file in files):
        raise UserError(f"data: {', '.join(files)} (split {split!r}) is empty")
    return datasets.load_dataset(LOADERS[suffix], data_files={"train": files}, split=split)


def _check_local_split(split: str) -> None:
    if split.partition("[")[0] != "train":
        raise UserError(f"data: local data has one split, train, of which {split!r} is no part; write for example train or train[:10%] (data.split, eval.split)")


def stdlib_files() -> list[Path]:
    """The standard library's modules, without its tests and without installed packages: nearly the same on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts))


def read_files(files: list[Path], source: str, split: str, text_column: str) -> datasets.Dataset:
    """One document a file; `split` may cut a part out, as in train[:10%]."""
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"data: {file} in {source!r} is not UTF-8 text; narrow data.file_pattern") from None
    return take_split(datasets.Dataset.from_dict({text_column: [text for text in texts if text.strip()]}), split)


def take_split(whole: datasets.Dataset, split: str) -> datasets.Dataset:
    """The rows that `split` names, of a dataset that is all train."""
    _check_local_split(split)
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(whole)})
    return whole.select([row for part in parts for row in range(len(whole))[part.from_ : part.to]])


# ---------------------------------------------------------------------------------------------------------------------------------------
# Documents and rows


def tokenize_documents(texts: datasets.Dataset, tokenizer, config: StridedConfig, source: str) -> datasets.Dataset:
    """Token ids of each document, cut to data.sequence_length; the column input_ids. Bad rows stop with their number, or are left out and counted."""
    data, column = config.data, config.data.text_column
    shortest = config.first_anchor + config.ebft.generate_max_len

    def tokenize(batch: dict, rows: list[int]) -> dict:
        for row, text in zip(rows, batch[column], strict=True):
            if not isinstance(text, str) and (data.on_bad_row == "error" or text is not None):
                raise UserError(f"data: {source!r}, row {row}, column {column!r}: {shorten(text)} is not text")
        ids = tokenizer([text or "" for text in batch[column]], truncation=True, max_length=data.sequence_length)["input_ids"]
        if data.append_eos:
            ids = [tokens + [tokenizer.eos_token_id] if len(tokens) < data.sequence_length else tokens for tokens in ids]
        for row, text, tokens in zip(rows, batch[column], ids, strict=True):
            if data.on_bad_row == "error" and len(tokens) < shortest:
                raise UserError(
                    f"data: {source!r}, row {row}, column {column!r}: {len(tokens)} tokens have no room for one anchor, which needs {shortest} "
                    f"(ebft.context_length or min_completion_prefix + ebft.generate_max_len); text {shorten(text)}; data.on_bad_row: skip leaves such rows out"
                )
        return {"input_ids": ids}

    documents = texts.map(tokenize, batched=True, with_indices=True, remove_columns=texts.column_names, desc="tokenising")
    lengths = np.array([len(tokens) for tokens in documents["input_ids"]])
    kept = np.flatnonzero(lengths >= shortest)
    if len(kept) == 0:
        raise UserError(f"data: {source!r} has no document with the {shortest} tokens that one anchor needs (the longest of {len(lengths)} has {lengths.max()})")
    if len(kept) < len(lengths):
        PartialState().print(f"data: {len(lengths) - len(kept)} of {len(lengths)} rows of {source!r} left out (no text, or fewer than {shortest} tokens)")
    return documents.select(kept)


def shorten(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Rows:
    """Rows of documents: rows[i] is the list of the documents' token ids in row i."""

    documents: datasets.Dataset
    members: list[list[int]]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int) -> list[list[int]]:
        return self.documents[self.members[row]]["input_ids"]

    def fingerprint(self) -> str:
        """Tells other data from the same: the number of rows, and a digest of up to 64 of them."""
        digest = hashlib.sha256()
        for row in range(0, len(self), -(-len(self) // 64)):
            digest.update(repr(self[row]).encode())
        return f"{len(self)} rows, {digest.hexdigest()[:12]}"


def pack_documents(documents: datasets.Dataset, sequence_length: int, seed: int) -> Rows:
    """Fills rows of sequence_length with whole documents, in a shuffled order, a new row when the next document does not fit."""
    lengths = [len(tokens) for tokens in documents["input_ids"]]
    members, room = [], 0
    for document in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        if lengths[document] > room:
            members.append([])
            room = sequence_length
        members[-1].append(document)
        room -= lengths[document]
    return Rows(documents, members)


def load_rows(config: StridedConfig, tokenizer) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows (always one document a row; None when eval.num_documents is 0)."""

    def documents_of(source: str, split: str) -> datasets.Dataset:
        return tokenize_documents(load_texts(config, source, split), tokenizer, config, source)

    documents, held_out = hold_out(config, documents_of)
    train = pack_documents(documents, config.data.sequence_length, config.train.seed) if config.data.packing else one_document_a_row(documents)
    return train, None if held_out is None else one_document_a_row(held_out)


def hold_out(config: Config, documents_of) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Documents to train on, and those for evaluation (None when eval.num_documents is 0), of which no copy is trained on.

    documents_of(source, split): the usable documents of a dataset.
    """
    data, evaluation = config.data, config.eval
    documents = documents_of(data.dataset, data.split)
    pool = documents if evaluation.dataset is None else documents_of(evaluation.dataset, evaluation.split)
    spare = evaluation.dataset is None and not evaluation.only  # something must be left to train on
    num_documents = evaluation.num_documents
    if num_documents is None:
        num_documents = min(64, len(pool) // 10 if evaluation.dataset is None else len(pool))
        PartialState().print(f"data: {num_documents} of {len(pool)} documents are for evaluation (eval.num_documents)")
    if num_documents > len(pool) - spare:
        raise UserError(
            f"eval.num_documents: {num_documents} cannot be taken out of the {len(pool)} usable documents of {evaluation.dataset or data.dataset!r}"
            f"{' and leave any to train on' if spare else ''}; lower it{', or set eval.dataset' if spare else ''}"
        )
    order = np.random.default_rng(evaluation.seed).permutation(len(pool))
    held_out = pool.select(np.sort(order[:num_documents])) if num_documents else None
    if held_out is not None and not evaluation.only:
        documents = _without_copies(pool.select(np.sort(order[num_documents:])) if spare else documents, held_out, data.dataset)
    return documents, held_out


def _without_copies(documents: datasets.Dataset, held_out: datasets.Dataset, source: str) -> datasets.Dataset:
    """The documents that are not token for token one of the held-out ones. Data sets often hold a text twice."""
    seen = {tuple(tokens) for tokens in held_out["input_ids"]}
    kept = [row for row, tokens in enumerate(documents["input_ids"]) if tuple(tokens) not in seen]
    if not kept:
        raise UserError(f"eval.num_documents: every other document of {source!r} is a copy of a held-out one: nothing is left to train on")
    if len(kept) < len(documents):
        PartialState().print(f"data: {len(documents) - len(kept)} documents of {source!r} left out of training: copies of held-out ones")
    return documents.select(kept)


def one_document_a_row(documents: datasets.Dataset) -> Rows:
    """Unpacked rows."""
    return Rows(documents, [[document] for document in range(len(documents))])


# ---------------------------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Batch:
    """One forward's worth of rows.

    row_ids: which rows; keys: what each row's random numbers are keyed by (see `rollout_uniforms`); document_ids, segment_ids (B, S): token ids and the number of the document in its row, -1 for padding;
    anchors, valid (B, A).
    """

    row_ids: list[int]
    keys: list[int]
    document_ids: Tensor
    segment_ids: Tensor
    anchors: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        return Batch(self.row_ids, self.keys, *(tensor.to(device) for tensor in (self.document_ids, self.segment_ids, self.anchors, self.valid)))


def make_batch(rows: Rows, row_ids: list[int], keys: list[int], pad_token_id: int, *, first_anchor: int, stride: int, num_generated: int) -> Batch:
    """Collates rows: right padding up to the longest, anchors of each row."""
    contents = [rows[row] for row in row_ids]
    length = max(sum(map(len, documents)) for documents in contents)
    document_ids = torch.full((len(contents), length), pad_token_id)
    segment_ids = torch.full((len(contents), length), -1)
    for index, documents in enumerate(contents):
        tokens = [token for document in documents for token in document]
        segments = [segment for segment, document in enumerate(documents) for _ in document]
        document_ids[index, : len(tokens)] = torch.tensor(tokens)
        segment_ids[index, : len(tokens)] = torch.tensor(segments)
    anchors, valid = find_anchors(segment_ids, first_anchor=first_anchor, stride=stride, num_generated=num_generated)
    return Batch(row_ids, keys, document_ids, segment_ids, anchors, valid)


def rows_of_step(num_rows: int, step: int, rows_per_step: int, seed: int) -> list[int]:
    """The rows of the whole global batch of an optimizer step (counted from 0): the next ones in an endless series of shuffled epochs.

    No row is dropped at an epoch's end: a batch may hold the last rows of one epoch and the first of the next.
    """
    places = [divmod(position, num_rows) for position in range(step * rows_per_step, (step + 1) * rows_per_step)]
    return [int(_epoch_order(num_rows, seed, epoch)[index]) for epoch, index in places]


@lru_cache(maxsize=2)  # a step reads one epoch, or two at its end; shuffling millions of rows at every step would cost more than the step
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def rollout_uniforms(seed: int, keys: list[int], num_anchors: int, num_samples: int, num_generated: int) -> Tensor:
    """The uniform numbers that rollouts are drawn with: a function of seed and each row's key, whichever process runs the row. (B, A, N, G)."""
    shape = (num_anchors, num_samples, num_generated)
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, key]))).random(shape) for key in keys]))
